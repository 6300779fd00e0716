"""Decoding: the cache as a ring, and every step equal to the last row of the full operator."""

import math

import dense
import pytest
import torch
from support import LAYOUTS, Problem, assert_same_up_to_rounding, assert_within_budget, label, make_problem
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from torus_kernels import Stream, TorusKVCache, TorusLattice, lattice_rope, torus_attention_decode

LATTICES = [TorusLattice(4, 6, "causal", winding=2), TorusLattice(3, 5, "causal", cross_radius=(3, 7)),
            TorusLattice(2, 2, "causal"), TorusLattice(7, 3, "causal", winding=2, cross_radius=(0, 2)),
            TorusLattice(2, 9, "causal", winding=8, cross_radius=(2**62, 1))]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def make_cache(problem: Problem) -> TorusKVCache:
    """An empty cache for the problem's keys; a read of a slot that was never written shows."""
    batch, kv_heads, _, head_dim = problem.k.shape
    cache = TorusKVCache(problem.lattice, batch, kv_heads, head_dim, problem.k.dtype, problem.k.device)
    cache.keys.fill_(math.nan)
    cache.values.fill_(math.nan)
    return cache


def append(cache: TorusKVCache, problem: Problem, start: int, stop: int) -> None:
    cache.append(problem.k[:, :, start:stop], problem.v[:, :, start:stop])


def options(problem: Problem, t: int) -> dict:
    """The options of `torus_attention_decode` for token t."""
    chosen = {name: getattr(problem, name) for name in ("stream_weights", "decay", "scale", "ema_state", "ema_alpha")}
    per_token = {"ema_state": 4, "stream_weights": 4, "ema_alpha": 3}
    for name, dim in per_token.items():
        if chosen[name] is not None and chosen[name].dim() == dim:
            chosen[name] = chosen[name][:, :, t : t + 1]
    chosen["first_key"] = None if problem.first_key is None else problem.first_key[:, t : t + 1]
    return chosen


def decode(backend, problem: Problem, cache: TorusKVCache, t: int) -> torch.Tensor:
    return torus_attention_decode(problem.q[:, :, t : t + 1], cache, backend=backend.name, **options(problem, t))


def decode_all(backend, problem: Problem) -> torch.Tensor:
    """The operator's output, token by token."""
    cache, rows = make_cache(problem), []
    for t in range(problem.q.shape[2]):
        append(cache, problem, t, t + 1)
        rows.append(decode(backend, problem, cache, t))
    return torch.cat(rows, dim=2)


def check(backend, problem: Problem, dtype: torch.dtype, rows: slice = slice(None), actual=None) -> None:
    """Decoded tokens keep to the error budget of the full operator."""
    if dtype not in backend.dtypes:
        pytest.skip(f"{dtype} is not for {backend.name}")
    problem = problem.to(dtype, backend.device)
    decoded = (actual or decode_all)(backend, problem)
    plain = dense.attention(**problem.arguments())[:, :, rows]
    expected = dense.attention(**problem.to(torch.float64, backend.device).arguments())[:, :, rows]
    assert_within_budget({"out": decoded}, {"out": expected}, {"out": plain})


def causal(lattice: TorusLattice, seq_len: int | None = None, **choices) -> Problem:
    return make_problem(lattice, 3 * lattice.num_sites + 2 if seq_len is None else seq_len, **choices)


def exact(backend, problem: Problem) -> Problem:
    return problem.to(backend.exact_dtype, backend.device)


class TestEqualsTheFullOperator:
    @pytest.mark.parametrize("dtype", DTYPES, ids=label)
    @pytest.mark.parametrize("lattice", LATTICES, ids=label)
    def test_every_step_through_several_wraps(self, backend, lattice, dtype):
        check(backend, causal(lattice, batch=2, heads=2, kv_heads=1), dtype)

    @pytest.mark.parametrize("lattice", LATTICES, ids=label)
    def test_the_same_backend(self, backend, lattice):
        problem = exact(backend, causal(lattice, batch=2, heads=2, kv_heads=1, token_weights=True, token_alpha=True))
        assert_same_up_to_rounding(decode_all(backend, problem), backend.attention(**problem.arguments()))

    @pytest.mark.parametrize("token_gates", [False, True])
    @pytest.mark.parametrize("state", [False, True])
    @pytest.mark.parametrize("batch, heads, kv_heads", [(1, 1, 1), (2, 6, 2), (1, 5, 1), (3, 4, 4)])
    def test_heads_groups_and_gates(self, backend, batch, heads, kv_heads, state, token_gates):
        problem = causal(TorusLattice(3, 4, "causal", winding=2), 27, batch=batch, heads=heads, kv_heads=kv_heads,
                         state=state, token_weights=token_gates, token_alpha=token_gates)
        check(backend, problem, torch.float32)

    def test_defaults(self, backend):
        problem = causal(LATTICES[0], 40).replace(stream_weights=None, decay=None, ema_state=None, ema_alpha=None)
        check(backend, problem, torch.float32)

    @pytest.mark.parametrize("streams", [[s] for s in Stream] + [[0, 3, 5], [1, 2, 7], [4, 6]], ids=label)
    def test_subsets_of_streams(self, backend, streams):
        lattice = TorusLattice(5, 6, "causal", winding=2, cross_radius=(1, 2), streams=streams)
        check(backend, causal(lattice, 64, token_weights=True), torch.float32)

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
        check(backend, problem.replace(**{name: value}), torch.float32)

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
        check(backend, problem, torch.float32)

    def test_left_padding_equals_the_sequence_without_it(self, backend):
        padding, seq_len = 9, 40
        problem = exact(backend, causal(self.LATTICE, seq_len, state=False))
        padded = problem.replace(first_key=torch.full((1, seq_len), padding, device=backend.device))
        bare = problem.replace(**{name: getattr(problem, name)[:, :, padding:] for name in "qkv"})
        assert_same_up_to_rounding(decode_all(backend, padded)[:, :, padding:], decode_all(backend, bare))


class TestRing:
    @pytest.mark.parametrize("lattice", LATTICES, ids=label)
    def test_many_tokens_at_once_are_the_same_as_one_by_one(self, backend, lattice):
        n = lattice.num_sites
        chunks = [1, n - 1, n, 2, n + 1, 3, 2 * n + 3, n // 2, 5 * n]
        problem = exact(backend, causal(lattice, sum(chunks), batch=2, heads=2, kv_heads=1))
        many, single, end = make_cache(problem), make_cache(problem), 0
        for count in chunks:
            start, end = end, end + count
            append(many, problem, start, end)
            for t in range(start, end):
                append(single, problem, t, t + 1)
            assert len(many) == len(single) == end
            for name in ("keys", "values"):
                assert torch.equal(getattr(many, name).nan_to_num(), getattr(single, name).nan_to_num())
            assert torch.equal(decode(backend, problem, many, end - 1), decode(backend, problem, single, end - 1))

    def test_position_p_is_in_slot_p_modulo_n(self):
        lattice = TorusLattice(2, 3, "causal")
        cache = TorusKVCache(lattice, 1, 1, 8)
        positions = torch.arange(16.0)[None, None, :, None].expand(1, 1, 16, 8)
        cache.append(positions, -positions)
        assert cache.keys.shape == cache.values.shape == (1, 1, 6, 8)
        assert cache.keys[0, 0, :, 0].tolist() == [12, 13, 14, 15, 10, 11]
        assert cache.values[0, 0, :, 7].tolist() == [-12, -13, -14, -15, -10, -11]

    @pytest.mark.parametrize("seq_len", [1, 5, 60])
    def test_reset_forgets(self, backend, seq_len):
        lattice = LATTICES[0]
        problem = exact(backend, causal(lattice, seq_len, batch=2))
        cache = make_cache(problem)
        append(cache, problem.replace(k=problem.k * math.nan, v=problem.v * math.nan), 0, seq_len)
        keys = cache.keys.data_ptr()
        cache.reset()
        assert len(cache) == 0
        assert cache.keys.data_ptr() == keys
        with pytest.raises(ValueError, match="cache must hold at least one token"):
            decode(backend, problem, cache, 0)
        fresh = make_cache(problem)
        for t in range(seq_len):
            for each in (cache, fresh):
                append(each, problem, t, t + 1)
            assert torch.equal(decode(backend, problem, cache, t), decode(backend, problem, fresh, t))

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=label)
    @pytest.mark.parametrize("written", [0, 7, 24, 55])
    def test_reorder_with_repeats(self, backend, written, dtype):
        lattice, order = LATTICES[0], [2, 0, 0, 3]
        problem = exact(backend, causal(lattice, written + 4, batch=4, heads=2, kv_heads=1))
        mixed = problem.replace(**{
            name: torch.cat([getattr(problem, name)[order, :, :written], getattr(problem, name)[:, :, written:]], dim=2)
            for name in "kv"})
        cache, expected = make_cache(problem), make_cache(problem)
        if written:
            append(cache, problem, 0, written)
            append(expected, mixed, 0, written)
        keys = cache.keys.data_ptr()
        cache.reorder(torch.tensor(order, dtype=dtype, device=backend.device))
        assert len(cache) == written
        assert cache.keys.data_ptr() == keys
        for t in range(written, written + 4):
            append(cache, problem, t, t + 1)
            append(expected, mixed, t, t + 1)
            assert torch.equal(decode(backend, problem, cache, t), decode(backend, problem, expected, t))

    def test_an_empty_cache_is_true(self):
        assert TorusKVCache(LATTICES[0], 1, 1, 8)

    def test_a_refused_append_changes_nothing(self):
        cache = TorusKVCache(LATTICES[0], 1, 1, 8)
        cache.keys.zero_()
        with pytest.raises(ValueError, match="v must have shape"):
            cache.append(torch.ones(1, 1, 2, 8), torch.ones(1, 1, 3, 8))
        assert len(cache) == 0
        assert not cache.keys.any()

    def test_defaults_of_the_cache(self):
        cache = TorusKVCache(LATTICES[0], 1, 1, 8)
        assert (cache.dtype, cache.device) == (torch.get_default_dtype(), torch.get_default_device())
        assert "length=0" in repr(cache)


class TestPoison:
    LATTICE = TorusLattice(6, 8, "causal", winding=3, cross_radius=(1, 2))

    def visible_slots(self, lattice: TorusLattice, t: int) -> torch.Tensor:
        lags = set().union(*(dense.lags(lattice, int(s), t + 1) for s in lattice.streams))
        visible = torch.zeros(lattice.num_sites, dtype=torch.bool)
        visible[[(t - lag) % lattice.num_sites for lag in lags]] = True
        return visible

    @pytest.mark.parametrize("streams", [range(8), [0], [3, 6], [1, 7], [5]], ids=label)
    @pytest.mark.parametrize("seq_len", [1, 5, 30, 48, 120])
    def test_slots_that_no_stream_sees_are_not_read(self, kernel_backend, seq_len, streams):
        lattice = TorusLattice(6, 8, "causal", winding=3, cross_radius=(1, 2), streams=streams)
        problem = exact(kernel_backend, causal(lattice, seq_len, heads=3, kv_heads=1))
        cache = make_cache(problem)
        append(cache, problem, 0, seq_len)
        clean = decode(kernel_backend, problem, cache, seq_len - 1)
        hidden = ~self.visible_slots(lattice, seq_len - 1).to(kernel_backend.device)
        cache.keys[:, :, hidden] = math.nan
        cache.values[:, :, hidden] = math.inf
        assert torch.equal(decode(kernel_backend, problem, cache, seq_len - 1), clean)
        assert not clean.isnan().any()

    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
    @pytest.mark.parametrize("name", ["keys", "values"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=label)
    def test_poison_in_a_visible_slot_shows(self, backend, dtype, name, poison):
        if dtype not in backend.dtypes:
            pytest.skip(f"{dtype} is not for {backend.name}")
        seq_len = 60
        problem = causal(self.LATTICE, seq_len, batch=2, heads=4, kv_heads=2).to(dtype, backend.device)
        # With queries and poison of one sign an infinite key scores +inf, which no softmax can hide.
        problem = problem.replace(q=(-1.0 if poison < 0 else 1.0) * problem.q.abs())
        cache = make_cache(problem)
        append(cache, problem, 0, seq_len)
        clean = decode(backend, problem, cache, seq_len - 1)
        for slot in self.visible_slots(self.LATTICE, seq_len - 1).nonzero().flatten().tolist():
            ring = getattr(cache, name)
            before = ring[1, 0, slot, 3].item()
            ring[1, 0, slot, 3] = poison
            out = decode(backend, problem, cache, seq_len - 1)
            ring[1, 0, slot, 3] = before
            lost = out[1, :2] if name == "keys" else out[1, :2, :, 3]
            assert not lost.isfinite().any(), slot
            assert torch.equal(out[0], clean[0])
            assert torch.equal(out[1, 2:], clean[1, 2:])


class TestAsPyTorchSeesIt:
    PROBLEM = causal(LATTICES[0], 30, batch=2, heads=4, kv_heads=2)

    def test_nothing_is_differentiated(self, backend):
        problem = exact(backend, self.PROBLEM)
        leaves = problem.replace(**{name: x.clone().requires_grad_() for name, x in problem.tensors().items()})
        cache = make_cache(problem)
        append(cache, leaves, 0, 30)
        assert not cache.keys.requires_grad
        assert not cache.values.requires_grad
        out = decode(backend, leaves, cache, 29)
        assert not out.requires_grad
        append(cache, leaves, 0, 1)
        assert torch.equal(decode_all(backend, leaves), decode_all(backend, problem))

    def test_inference_mode(self, backend):
        problem = exact(backend, self.PROBLEM)
        with torch.inference_mode():
            cache = make_cache(problem)
            append(cache, problem, 0, 20)
            inside = decode(backend, problem, cache, 19)
        assert torch.equal(decode(backend, problem, cache, 19), inside)
        append(cache, problem, 20, 30)
        with torch.inference_mode():
            cache.reorder(torch.tensor([1, 0], device=backend.device))

    def test_autocast(self, backend):
        problem = self.PROBLEM.to(torch.float32, backend.device)
        low = problem.replace(**{name: getattr(problem, name).bfloat16() for name in ("q", "k", "v", "ema_state")})
        cache = make_cache(low)
        with torch.autocast(backend.device, dtype=torch.bfloat16):
            append(cache, problem, 0, 30)
            gates = {name: getattr(problem, name).bfloat16() for name in ("stream_weights", "decay", "ema_alpha")}
            out = decode(backend, problem.replace(**gates), cache, 29)
        expected = make_cache(low)
        append(expected, low, 0, 30)
        wide = low.replace(**{name: gate.float() for name, gate in gates.items()})
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, decode(backend, wide, expected, 29))

    @pytest.mark.parametrize("given", [False, True])
    def test_opcheck(self, backend, given):
        problem = self.PROBLEM.to(torch.float32, backend.device)
        cache = make_cache(problem)
        append(cache, problem, 0, 30)
        q = LAYOUTS["transposed"](problem.q[:, :, -1:])
        extra = (torch.ones_like(q), problem.ema_alpha, torch.zeros(2, 1, dtype=torch.int32, device=q.device))
        opcheck(torch.ops.torus_kernels.attention_decode.default,
                (q, cache.keys, cache.values, problem.stream_weights, problem.decay,
                 *(extra if given else (None, None, None)), problem.lattice.spec, 0.3, 30, backend.name))

    def test_empty_batch(self, backend):
        cache = TorusKVCache(LATTICES[0], 0, 2, 8, device=backend.device)
        cache.append(*torch.zeros(2, 0, 2, 3, 8, device=backend.device))
        cache.reorder(torch.zeros(0, dtype=torch.int64, device=backend.device))
        q = torch.zeros(0, 4, 1, 8, device=backend.device)
        assert torus_attention_decode(q, cache, backend=backend.name).shape == q.shape

    def test_fake_and_meta_tensors(self):
        with FakeTensorMode():
            cache = TorusKVCache(LATTICES[0], 2, 2, 16, torch.bfloat16)
            cache.append(*torch.zeros(2, 2, 2, 5, 16, dtype=torch.bfloat16))
            out = torus_attention_decode(torch.zeros(2, 4, 1, 16, dtype=torch.bfloat16), cache)
            assert (out.shape, out.dtype) == ((2, 4, 1, 16), torch.bfloat16)
        cache = TorusKVCache(LATTICES[0], 2, 2, 16, device="meta")
        cache.append(*torch.zeros(2, 2, 2, 5, 16, device="meta"))
        assert torus_attention_decode(torch.zeros(2, 4, 1, 16, device="meta"), cache).device.type == "meta"

    def test_a_compiled_step_serves_every_length(self, backend):
        torch._dynamo.reset()
        problem = self.PROBLEM.to(torch.float32, backend.device)
        counter = CompileCounterWithBackend("aot_eager")

        @torch.compile(fullgraph=True, backend=counter)
        def step(q, k, v):
            cache.append(k, v)
            return torus_attention_decode(q, cache, stream_weights=problem.stream_weights, backend=backend.name)

        cache, expected = make_cache(problem), make_cache(problem)
        counts = []
        for t in range(30):
            q, k, v = (x[:, :, t : t + 1] for x in (problem.q, problem.k, problem.v))
            append(expected, problem, t, t + 1)
            out = torus_attention_decode(q, expected, stream_weights=problem.stream_weights, backend=backend.name)
            assert torch.equal(step(q, k, v), out)
            assert len(cache) == t + 1
            counts.append(counter.frame_count)
        assert counts[-1] <= 5, counts
        torch._dynamo.reset()

    @pytest.mark.parametrize("heads, kv_heads", [(16, 16), (16, 1), (15, 3)])
    def test_any_number_of_threads_gives_the_same_bits(self, kernel_backend, heads, kv_heads):
        lattice = TorusLattice(24, 32, "causal")
        problem = exact(kernel_backend, causal(lattice, 900, heads=heads, kv_heads=kv_heads, head_dim=128))
        cache = make_cache(problem)
        append(cache, problem, 0, 900)
        threads, outs = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                outs.append(decode(kernel_backend, problem, cache, 899))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(out, outs[0]) for out in outs)


class TestLagGeometry:
    @pytest.mark.parametrize("stream", Stream, ids=label)
    @pytest.mark.parametrize("lattice", LATTICES, ids=label)
    def test_is_a_row_of_the_dense_geometry(self, lattice, stream):
        n = lattice.num_sites
        visible, rho_squared = lattice.lag_geometry(stream, torch.arange(-2, 2 * n))
        assert not visible[:2].any()
        assert not visible[n + 2 :].any()
        expected = dense.lags(lattice, int(stream), n)
        assert (visible.nonzero().flatten() - 2).tolist() == sorted(expected)
        torch.testing.assert_close(rho_squared[visible].tolist(), [expected[lag] for lag in sorted(expected)])
        assert not rho_squared[~visible].any()

    def test_needs_the_causal_topology(self):
        with pytest.raises(ValueError, match="lags belong to the causal topology, this lattice is periodic"):
            TorusLattice(4, 4).lag_geometry(0, torch.arange(3))
