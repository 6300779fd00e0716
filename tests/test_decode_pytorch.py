"""Decoding as PyTorch sees it: autocast, inference mode, fake tensors, compilation, threads."""


import pytest
import torch
from decoding import LATTICES, append, causal, decode, decode_all, exact, make_cache
from support import LAYOUTS
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from torus_kernels import TorusKVCache, TorusLattice, torus_attention_decode


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
        low = problem.replace(**{name: getattr(problem, name).to(backend.low_dtype)
                                 for name in ("q", "k", "v", "ema_state")})
        cache = make_cache(low)
        with torch.autocast(backend.device, dtype=backend.low_dtype):
            append(cache, problem, 0, 30)
            gates = {name: getattr(problem, name).to(backend.low_dtype)
                     for name in ("stream_weights", "decay", "ema_alpha")}
            out = decode(backend, problem.replace(**gates), cache, 29)
        expected = make_cache(low)
        append(expected, low, 0, 30)
        wide = low.replace(**{name: gate.float() for name, gate in gates.items()})
        assert out.dtype == backend.low_dtype
        assert torch.equal(out, decode(backend, wide, expected, 29))

    @pytest.mark.parametrize("given", [False, True])
    def test_opcheck(self, backend, given):
        problem = self.PROBLEM.to(backend.common_dtype, backend.device)
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
