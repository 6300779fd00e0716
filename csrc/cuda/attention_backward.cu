// Torus attention, backward: for each chunk of key/value heads every family's queries and then its keys, then what goes
// token by token.
#include "backward_keys.h"
#include "backward_queries.h"
#include "chunk_backward.h"
#include "parameters.h"
#include "plan.h"

namespace torus::cuda {

namespace {

template <class Kernel>
void launch_chunks(const ChunkBackwardArguments<typename Kernel::Plan>& arguments, int64_t blocks, int warps,
                   int64_t heads, const Device& device) {
  launch<Kernel>({blocks, heads}, warps, Kernel::shared_bytes(arguments.plan), device, arguments);
}

// One family of lines, or the cross flows, by queries or by keys, with the kernel that is for it.
template <template <class, int, class, bool> class ByChunks, template <class, int> class General, class E, int D>
void launch_family(const BackwardArguments& arguments, const Lattice& lattice, int64_t heads, const Device& device) {
  const Schedule& schedule = arguments.in.schedule;
  const bool in_pairs = arguments.in.first_key == nullptr, by_chunks = shifts_products(arguments.in);
  if (by_chunks && schedule.is_cross) {
    const CrossPlan plan = cross_plan(lattice, schedule, schedule.seq_len);
    const auto run = [&](auto pairs) {
      using Kernel = ByChunks<E, D, PatchSweep, pairs>;
      launch_chunks<Kernel>({arguments, plan}, plan.num_blocks, plan.warps, heads, device);
    };
    if (plan.fits) return in_pairs ? run(std::true_type{}) : run(std::false_type{});
  } else if (by_chunks) {
    const LinePlan plan =
        line_plan(lattice, schedule, schedule.seq_len, ByChunks<E, D, LineSweep, true>::kChunkBytes);
    const auto run = [&](auto pairs) {
      using Kernel = ByChunks<E, D, LineSweep, pairs>;
      launch_chunks<Kernel>({arguments, plan}, schedule.num_blocks, schedule.warps, heads, device);
    };
    if (plan.fits) return in_pairs ? run(std::true_type{}) : run(std::false_type{});
  }
  using Kernel = General<E, general_dim(D)>;
  launch<Kernel>({schedule.num_blocks, heads}, schedule.warps, Kernel::shared_bytes(schedule.warps), device, arguments);
}

}  // namespace

void attention_backward(const AttentionBackward& problem, const Device& device) {
  const torus::AttentionBackward& gradients = problem.gradients;
  const AttentionInputs& in = gradients.in;
  check_supported(in);
  Plan by_queries(in, false);
  const Plan by_keys(in, true);
  const bool token_weights = in.weights.token != 0, token_alpha = in.alpha.token != 0;

  BackwardArguments arguments{};
  arguments.in = operands_of(in);
  arguments.in.d_out = gradients.d_out;
  arguments.lse = problem.lse;
  arguments.d_q_out = gradients.d_q, arguments.d_k_out = gradients.d_k, arguments.d_v_out = gradients.d_v;
  const int64_t group = in.heads / in.kv_heads, kv_heads = in.batch * in.kv_heads, tokens = arguments.in.tokens();
  const int64_t warps = TokenGradientsKernel<BFloat16>::warps_of_head(in.seq_len);

  const int64_t rows = in.seq_len * kNumStreams, sums = by_queries.count > 1 ? tokens : 0;
  const int64_t bytes_per_head = (group * (3 * rows + sums) + 2 * sums) * static_cast<int64_t>(sizeof(float));
  const int64_t chunk = heads_of_chunk(kv_heads, group, bytes_per_head, device);
  by_queries.fill_tables(in, device);
  for (float** numbers : {&arguments.rows.delta, &arguments.rows.gate, &arguments.rows.decay})
    *numbers = Plan::allocate<float>(device, chunk * group * rows);
  arguments.d_q = Plan::allocate<float>(device, chunk * group * sums);
  arguments.d_k = Plan::allocate<float>(device, chunk * sums);
  arguments.d_v = Plan::allocate<float>(device, chunk * sums);
  float* const partials = Plan::allocate<float>(device, in.batch * in.heads * warps * kWarpLanes);

  ParameterArguments parameters{};
  parameters.streams = in.lattice.streams;
  parameters.rows = arguments.rows;
  parameters.d_state = gradients.d_state;
  parameters.d_weights = token_weights ? static_cast<float*>(gradients.d_weights) : nullptr;
  parameters.d_alpha = token_alpha ? static_cast<float*>(gradients.d_alpha) : nullptr;
  parameters.partials = partials;

  dispatch(in, [&](auto element, auto dim) {
    using E = decltype(element);
    for (int64_t first = 0; first < kv_heads; first += chunk) {
      const int64_t count = min_of(chunk, kv_heads - first);
      Operands& operands = arguments.in;
      operands.heads.begin_at(first * group);
      for (int i = 0; i < by_queries.count; ++i) {
        operands.squared = by_queries.tables[i];
        operands.begins = i == 0, operands.ends = i == by_queries.count - 1;
        operands.schedule = by_queries.schedules[i];
        launch_family<ChunkQueryGradientsKernel, QueryGradientsKernel, E, dim>(arguments, in.lattice, count * group,
                                                                               device);
        operands.schedule = by_keys.schedules[i];
        launch_family<ChunkKeyGradientsKernel, KeyGradientsKernel, E, dim>(arguments, in.lattice, count, device);
      }
      parameters.in = operands;
      using Kernel = TokenGradientsKernel<E>;
      launch<Kernel>({ceil_div(warps, Kernel::kMaxWarps), count * group}, Kernel::kMaxWarps, 0, device, parameters);
    }
  });
  launch<ReduceKernel>({in.heads}, 1, 0, device,
                       {in.batch, in.heads, warps, partials,
                        token_weights ? nullptr : static_cast<float*>(gradients.d_weights),
                        static_cast<float*>(gradients.d_decay),
                        token_alpha ? nullptr : static_cast<float*>(gradients.d_alpha)});
}

}  // namespace torus::cuda
