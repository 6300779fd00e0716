"""The cache: a ring of N slots, of which only those that a stream sees are read."""

import math

import dense
import pytest
import torch
from decoding import DTYPES, LATTICES, append, causal, decode, exact, make_cache
from support import label

from torus_kernels import TorusKVCache, TorusLattice


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
