// What a launch says that CUDA refuses: one that asks for more shared memory than any GPU has; without a GPU, any.
#include <cstdio>

#include "cuda/launch.h"

namespace torus::cuda {

struct IdleKernel {
  struct Arguments {};
  static constexpr const char* kName = "idle";
  static constexpr int kMaxWarps = 2;
  static TORUS_DEVICE void run(const Warp&, const Arguments&) {}
};

}  // namespace torus::cuda

int main() {
  using namespace torus::cuda;
  try {
    launch<IdleKernel>({3, 2}, 2, 1 << 20, Device{}, {});
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 0;
  }
  return 1;
}
