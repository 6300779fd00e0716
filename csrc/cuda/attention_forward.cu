// Torus attention, forward.
#include "forward.h"

#include "plan.h"

namespace torus::cuda {

namespace {

template <class E, int D, int kStreams>
void launch_forward(const ForwardArguments& arguments, int64_t heads, const Device& device) {
  using Kernel = ForwardKernel<E, D, kStreams>;
  const Schedule& schedule = arguments.in.schedule;
  launch<Kernel>({schedule.num_blocks, heads}, schedule.warps, Kernel::shared_bytes(schedule.warps), device, arguments);
}

}  // namespace

void attention_forward(const AttentionForward& problem, const Device& device) {
  const AttentionInputs& in = problem.in;
  check_supported(in);
  if (in.batch == 0) return;
  Plan plan(in, false);
  plan.fill_tables(in, device);

  ForwardArguments arguments{operands_of(in), problem.out, static_cast<float*>(problem.lse),
                             static_cast<float*>(problem.entropy), nullptr};
  const int64_t heads = in.batch * in.heads, statistics = heads * in.seq_len * kNumStreams;
  const bool all = in.lattice.streams == (1 << kNumStreams) - 1;
  if (arguments.lse != nullptr && !all) FillKernel::fill(arguments.lse, statistics, -__builtin_huge_valf(), device);
  if (arguments.entropy != nullptr && !all) FillKernel::fill(arguments.entropy, statistics, 0.0f, device);

  const int64_t chunk = heads_of_chunk(heads, 1, arguments.in.tokens() * static_cast<int64_t>(sizeof(float)), device);
  arguments.y = Plan::allocate<float>(device, plan.count > 1 ? chunk * arguments.in.tokens() : 0);
  dispatch(in, [&](auto element, auto dim) {
    using E = decltype(element);
    for (int64_t first = 0; first < heads; first += chunk)
      for (int i = 0; i < plan.count; ++i) {
        Operands& operands = arguments.in;
        operands.schedule = plan.schedules[i], operands.squared = plan.tables[i];
        operands.heads.first = first;
        operands.begins = i == 0, operands.ends = i == plan.count - 1;
        if (operands.schedule.num_streams == 2) {
          launch_forward<E, dim, 2>(arguments, min_of(chunk, heads - first), device);
        } else {
          launch_forward<E, dim, 1>(arguments, min_of(chunk, heads - first), device);
        }
      }
  });
}

}  // namespace torus::cuda
