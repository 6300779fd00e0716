"""Decoding: every step equals the last row of the full operator."""


import pytest
import torch
from decoding import DTYPES, LATTICES, append, causal, check, decode, decode_all, exact, make_cache, options, steps
from support import LAYOUTS, assert_same_up_to_rounding, label

from torus_kernels import Stream, TorusLattice, lattice_rope, torus_attention_decode


class TestEqualsTheFullOperator:
    @pytest.mark.parametrize("dtype", DTYPES, ids=label)
    @pytest.mark.parametrize("lattice", LATTICES, ids=label)
    def test_every_step_through_several_wraps(self, backend, lattice, dtype):
        check(backend, causal(lattice, batch=2, heads=2, kv_heads=1), dtype)

    @pytest.mark.parametrize("lattice", LATTICES, ids=label)
    def test_the_same_backend(self, backend, lattice):
        problem = exact(backend, causal(lattice, batch=2, heads=2, kv_heads=1, token_weights=True, token_alpha=True))
        expected = backend.attention(**problem.arguments())[:, :, steps(backend, problem)]
        assert_same_up_to_rounding(decode_all(backend, problem), expected)

    @pytest.mark.parametrize("token_gates", [False, True])
    @pytest.mark.parametrize("state", [False, True])
    @pytest.mark.parametrize("batch, heads, kv_heads", [(1, 1, 1), (2, 6, 2), (1, 5, 1), (3, 4, 4)])
    def test_heads_groups_and_gates(self, backend, batch, heads, kv_heads, state, token_gates):
        problem = causal(TorusLattice(3, 4, "causal", winding=2), 27, batch=batch, heads=heads, kv_heads=kv_heads,
                         state=state, token_weights=token_gates, token_alpha=token_gates)
        check(backend, problem, backend.common_dtype)

    def test_defaults(self, backend):
        problem = causal(LATTICES[0], 40).replace(stream_weights=None, decay=None, ema_state=None, ema_alpha=None)
        check(backend, problem, backend.common_dtype)

    @pytest.mark.parametrize("streams", [[s] for s in Stream] + [[0, 3, 5], [1, 2, 7], [4, 6]], ids=label)
    def test_subsets_of_streams(self, backend, streams):
        lattice = TorusLattice(5, 6, "causal", winding=2, cross_radius=(1, 2), streams=streams)
        check(backend, causal(lattice, 64, token_weights=True), backend.common_dtype)

    @pytest.mark.parametrize("dtype", DTYPES, ids=label)
    @pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 104, 256])
    def test_head_dimensions(self, backend, head_dim, dtype):
        check(backend, causal(TorusLattice(4, 5, "causal"), 31, heads=3, kv_heads=1, head_dim=head_dim), dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=label)
    @pytest.mark.parametrize("lattice, seq_len", [
        (TorusLattice(32, 20, "causal"), 700), (TorusLattice(19, 33, "causal", winding=32, cross_radius=(5, 2)), 650),
        (TorusLattice(3, 70, "causal", winding=2), 450), (TorusLattice(70, 3, "causal"), 450),
        (TorusLattice(64, 64, "causal"), 300)], ids=label)
    def test_larger_lattices(self, backend, lattice, seq_len, dtype):
        def last_rows(backend, problem):
            cache = make_cache(problem)
            append(cache, problem, 0, seq_len - 2)
            rows = []
            for t in (seq_len - 2, seq_len - 1):
                append(cache, problem, t, t + 1)
                rows.append(decode(backend, problem, cache, t))
            return torch.cat(rows, dim=2)

        problem = causal(lattice, seq_len, heads=4, kv_heads=2, head_dim=32)
        check(backend, problem, dtype, slice(-2, None), last_rows)

    @pytest.mark.parametrize("change", [
        {"scale": 0.0}, {"scale": -0.7}, {"scale": 3}, {"ema_alpha": -2.5}, {"decay": -3.0}, {"decay": 50.0},
        {"stream_weights": 0.0}, {"stream_weights": -1.5}], ids=str)
    def test_any_finite_parameter(self, backend, change):
        problem = causal(TorusLattice(3, 8, "causal"), 40)
        (name, value), = change.items()
        if name != "scale":
            value = torch.full_like(getattr(problem, name), value)
        check(backend, problem.replace(**{name: value}), backend.common_dtype)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_memory_layouts(self, backend, layout):
        problem = causal(LATTICES[0], 60, batch=2, heads=4, kv_heads=2, token_weights=True, token_alpha=True)
        problem = exact(backend, problem)
        strided = {name: LAYOUTS[layout](x) for name, x in problem.tensors().items() if x.dim() > 2}
        assert torch.equal(decode_all(backend, problem.replace(**strided)), decode_all(backend, problem))

    def test_rope_continues_from_the_length(self, backend):
        lattice, seq_len = LATTICES[0], 80
        problem = exact(backend, causal(lattice, seq_len))
        with backend.chosen():
            turned = problem.replace(q=lattice_rope(problem.q, lattice), k=lattice_rope(problem.k, lattice))
            expected = backend.attention(**turned.arguments())
            cache = make_cache(problem)
            for t in range(seq_len):
                q, k = (lattice_rope(x[:, :, t : t + 1], lattice, offset=len(cache)) for x in (problem.q, problem.k))
                cache.append(k, problem.v[:, :, t : t + 1])
                if t not in steps(backend, problem):
                    continue
                out = torus_attention_decode(q, cache, backend=backend.name, **options(problem, t))
                assert_same_up_to_rounding(out, expected[:, :, t : t + 1], f"token {t}")


class TestFirstKey:
    LATTICE = TorusLattice(4, 5, "causal", winding=2)
    SEQ_LEN = 50

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=label)
    @pytest.mark.parametrize("kind", ["left padding", "packed", "beyond", "negative", "recent"])
    def test_equals_the_full_operator(self, backend, kind, dtype):
        t = torch.arange(self.SEQ_LEN)
        first_key = {
            "left padding": torch.tensor([[0], [7], [30]]).expand(3, self.SEQ_LEN),
            "packed": torch.stack([t // 13 * 13, t // 29 * 29, torch.zeros_like(t)]),
            "beyond": torch.stack([t + 1, t, torch.full_like(t, torch.iinfo(dtype).max)]),
            "negative": torch.stack([-1 - t, torch.full_like(t, torch.iinfo(dtype).min), t - 3]),
            "recent": torch.stack([t - 1, t - 4, t - 19]),
        }[kind].to(dtype)
        problem = causal(self.LATTICE, self.SEQ_LEN, batch=3, heads=4, kv_heads=2).replace(first_key=first_key)
        check(backend, problem, backend.common_dtype)

    def test_left_padding_equals_the_sequence_without_it(self, backend):
        padding, seq_len = 9, 40
        problem = exact(backend, causal(self.LATTICE, seq_len, state=False))
        padded = problem.replace(first_key=torch.full((1, seq_len), padding, device=backend.device))
        bare = problem.replace(**{name: getattr(problem, name)[:, :, padding:] for name in "qkv"})
        at = steps(backend, bare)
        expected = decode_all(backend, bare, at)
        assert_same_up_to_rounding(decode_all(backend, padded, [padding + t for t in at]), expected)
