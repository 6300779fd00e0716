// Torus attention, forward.
#include "cross_forward.h"
#include "forward.h"
#include "line_forward.h"
#include "plan.h"

namespace torus::cuda {

namespace {

template <class Kernel>
void launch_cross(const CrossForwardArguments& arguments, int64_t heads, const Device& device) {
  launch<Kernel>({arguments.plan.num_blocks, heads}, arguments.plan.warps, Kernel::kSharedBytes, device, arguments);
}

template <class Kernel>
void launch_lines(const LineForwardArguments& arguments, int64_t heads, const Device& device) {
  const Schedule& schedule = arguments.forward.in.schedule;
  launch<Kernel>({schedule.num_blocks, heads}, schedule.warps, Kernel::shared_bytes(arguments.plan), device, arguments);
}

// One family of lines, or the cross flows, with the kernel that is for it.
template <class E, int D>
void launch_family(const ForwardArguments& arguments, const Lattice& lattice, int64_t heads, const Device& device) {
  const Schedule& schedule = arguments.in.schedule;
  // What a query gets is to the bit the same in pairs and without.
  const bool in_pairs = arguments.entropy == nullptr && arguments.in.first_key == nullptr;
  const bool by_chunks = shifts_products(arguments.in);
  if (by_chunks && schedule.is_cross) {
    const CrossForwardArguments cross{arguments, cross_plan(lattice, schedule, schedule.seq_len)};
    if (cross.plan.fits) {
      if (in_pairs) {
        launch_cross<CrossForwardKernel<E, D, true>>(cross, heads, device);
      } else {
        launch_cross<CrossForwardKernel<E, D, false>>(cross, heads, device);
      }
      return;
    }
  }
  if (by_chunks && !schedule.is_cross) {
    using Kernel = LineForwardKernel<E, D, true>;
    const LineForwardArguments lines{arguments, line_plan(lattice, schedule, schedule.seq_len, Kernel::kChunkBytes)};
    if (lines.plan.fits) {
      if (in_pairs) {
        launch_lines<Kernel>(lines, heads, device);
      } else {
        launch_lines<LineForwardKernel<E, D, false>>(lines, heads, device);
      }
      return;
    }
  }
  using Kernel = ForwardKernel<E, general_dim(D)>;
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
        operands.heads.begin_at(first);
        operands.begins = i == 0, operands.ends = i == plan.count - 1;
        launch_family<E, dim>(arguments, in.lattice, min_of(chunk, heads - first), device);
      }
  });
}

}  // namespace torus::cuda
