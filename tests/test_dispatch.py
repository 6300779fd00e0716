"""The operators as PyTorch sees them: opcheck, fakes, meta tensors, autocast, and a clean import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import LAYOUTS, error, evaluate, make_problem
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import torus_kernels
from torus_kernels import (
    TorusLattice,
    ema_compound,
    ema_compound_multiscale,
    lattice_rope,
    torus_attention,
    torus_attention_with_stats,
)

OPS = torch.ops.torus_kernels
CAUSAL, PERIODIC = TorusLattice(2, 3, "causal"), TorusLattice(3, 3, streams=[0, 2, 4, 6])
ATTENTION = ("stream_weights", "decay", "ema_state", "ema_alpha", "first_key")


def problem_for(kind: str):
    if kind == "periodic":
        return make_problem(PERIODIC, batch=2, heads=4, kv_heads=2, token_weights=True)
    if kind == "causal":
        return make_problem(CAUSAL, 8, state=False)
    if kind == "packed":
        first_key = torch.tensor([[0, 0, 2, 2, 2, 2, 6, 6]], dtype=torch.int32)
        return make_problem(CAUSAL, 8, token_alpha=True).replace(first_key=first_key)
    if kind == "strided":
        problem = make_problem(CAUSAL, 8, heads=4, kv_heads=2)
        return problem.replace(**{name: LAYOUTS["transposed"](getattr(problem, name)) for name in "qkv"})
    return make_problem(CAUSAL, 8, batch=0)


KINDS = pytest.mark.parametrize("kind", ["periodic", "causal", "packed", "strided", "empty"])


class TestOpcheck:
    """`torch.library.opcheck`: schema, autograd registration, fakes, and tracing with dynamic shapes."""

    @KINDS
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_attention(self, backend, kind, dtype):
        problem = problem_for(kind).to(dtype, backend.device)
        for x in problem.tensors().values():
            x.requires_grad_()
        operands = [getattr(problem, name) for name in ATTENTION]
        opcheck(OPS.attention.default, (problem.q, problem.k, problem.v, *operands, problem.lattice.spec, 0.3, True,
                                        kind == "packed", backend.name))

    @KINDS
    def test_attention_without_gradient(self, backend, kind):
        problem = problem_for(kind).to(backend.common_dtype, backend.device)
        operands = [getattr(problem, name) for name in ATTENTION]
        opcheck(OPS.attention.default, (problem.q, problem.k, problem.v, *operands, problem.lattice.spec, 0.3, False,
                                        False, backend.name))

    @KINDS
    def test_attention_backward(self, backend, kind):
        problem = problem_for(kind).to(backend.common_dtype, backend.device)
        operands = [getattr(problem, name) for name in ATTENTION]
        tokens = (problem.q, problem.k, problem.v)
        _, lse, _ = OPS.attention(*tokens, *operands, problem.lattice.spec, 0.3, True, False, backend.name)
        opcheck(OPS.attention_backward.default,
                (problem.d_out, *tokens, lse, *operands, problem.lattice.spec, 0.3, backend.name))

    @pytest.mark.parametrize("momentum", [False, True])
    @pytest.mark.parametrize("batch", [0, 2])
    def test_ema_compound(self, backend, momentum, batch):
        x, state, velocity = torch.randn(3, batch, 2, 5, 8, device=backend.device)
        x, state = x.to(backend.common_dtype), state.to(backend.common_dtype)
        alpha, beta = torch.rand(2, 2, device=backend.device)
        gates = (alpha.requires_grad_(), *((beta, velocity) if momentum else (None, None)))
        opcheck(OPS.ema_compound.default, (x.requires_grad_(), state, *gates, backend.name))
        tokens = [t.detach() for t in (x, velocity, x, state)]
        opcheck(OPS.ema_compound_backward.default,
                (*tokens, *(None if gate is None else gate.detach() for gate in gates), backend.name))

    @pytest.mark.parametrize("batch", [0, 2])
    def test_ema_multiscale(self, backend, batch):
        x, states = torch.randn(batch, 2, 5, 8), torch.randn(3, batch, 2, 5, 8)
        x, states = x.to(backend.common_dtype), states.to(backend.common_dtype)
        arguments = [t.to(backend.device) for t in (x, states, torch.rand(3, 2), torch.rand(3))]
        opcheck(OPS.ema_multiscale.default, (*(t.clone().requires_grad_() for t in arguments), backend.name))
        opcheck(OPS.ema_multiscale_backward.default, (arguments[0], arguments[1], *arguments, backend.name))

    @pytest.mark.parametrize("inverse", [False, True])
    @pytest.mark.parametrize("batch", [0, 2])
    def test_rope(self, backend, inverse, batch):
        if backend.name == "cuda":
            pytest.skip("it has no rotary positions")
        x = LAYOUTS["transposed"](torch.randn(batch, 3, 7, 8, device=backend.device)).detach().requires_grad_()
        opcheck(OPS.rope.default, (x, CAUSAL.spec, 5, inverse, backend.name))


class TestShapesWithoutValues:
    @KINDS
    def test_fake_tensors(self, backend, kind):
        problem = problem_for(kind).to(backend.low_dtype, backend.device)
        real_out, real_stats = backend.attention_with_stats(**problem.arguments())
        real_grads = evaluate(backend.attention, problem)
        with FakeTensorMode() as mode:
            arguments = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
                         for name, x in problem.arguments().items()}
            fake = problem.replace(**arguments, d_out=mode.from_tensor(problem.d_out))
            out, stats = backend.attention_with_stats(**fake.arguments())
            grads = evaluate(backend.attention, fake)
        pairs = [(out, real_out), *zip(stats, real_stats, strict=True),
                 *((grads[name], real_grads[name]) for name in real_grads)]
        for actual, expected in pairs:
            assert actual.shape == expected.shape
            assert actual.dtype == expected.dtype
            assert actual.stride() == expected.stride() or not expected.numel()
            assert actual.device == expected.device

    def test_meta_tensors(self):
        q = torch.empty(2, 4, 9, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
        k = torch.empty(2, 2, 9, 16, device="meta", dtype=torch.bfloat16)
        out, stats = torus_attention_with_stats(q, k, k, PERIODIC)
        assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "meta")
        assert stats.lse.shape == stats.entropy.shape == (2, 4, 9, 8)
        out.sum().backward()
        assert q.grad.shape == q.shape

    def test_meta_tensors_of_the_companions(self):
        x, alpha = torch.empty(2, 4, 9, 16, device="meta"), torch.empty(4, device="meta")
        assert lattice_rope(x, PERIODIC).shape == x.shape
        assert ema_compound(x, x, alpha).shape == x.shape
        out, velocity = ema_compound(x, x, alpha, beta=alpha, velocity=x)
        assert out.shape == velocity.shape == x.shape
        mixed, states = ema_compound_multiscale(x, x[None], alpha[None], alpha[:1])
        assert (mixed.shape, states.shape) == (x.shape, (1, *x.shape))

    def test_output_keeps_the_memory_order_of_projections(self, backend):
        problem = problem_for("strided").to(torch.float32, backend.device)
        out = backend.attention(**problem.arguments())
        assert out.transpose(1, 2).is_contiguous()
        assert backend.attention(**problem.replace(q=problem.q.contiguous()).arguments()).is_contiguous()


class TestAutocast:
    def test_tokens_are_cast_and_parameters_are_not(self, backend):
        problem = make_problem(CAUSAL, 9).to(torch.float32, backend.device)
        leaves = {name: x.requires_grad_() for name, x in problem.tensors().items()}
        with torch.autocast(backend.device, dtype=backend.low_dtype):
            out, stats = backend.attention_with_stats(**problem.arguments())
        assert out.dtype == backend.low_dtype
        assert stats.lse.dtype == torch.float32
        by_hand = problem.replace(**{name: getattr(problem, name).to(backend.low_dtype)
                                     for name in ("q", "k", "v", "ema_state")})
        assert torch.equal(out, backend.attention(**by_hand.arguments()))
        out.backward(problem.d_out.to(backend.low_dtype))
        for name, leaf in leaves.items():
            assert leaf.grad.dtype == torch.float32, name
            assert leaf.grad.isfinite().all(), name

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_parameters_of_the_autocast_dtype_are_taken(self, backend, dtype):
        problem = make_problem(CAUSAL, 9, token_weights=True, token_alpha=True).to(torch.float32, backend.device)
        low = {name: getattr(problem, name).to(dtype) for name in ("stream_weights", "decay", "ema_alpha")}
        with pytest.raises(TypeError, match="stream_weights must have dtype"):
            backend.attention(**problem.replace(**low).arguments())
        leaves = {name: x.requires_grad_() for name, x in low.items()}
        with torch.autocast(backend.device, dtype=dtype):
            out = backend.attention(**problem.replace(**leaves).arguments())
            wide = backend.attention(**problem.replace(**{n: x.float() for n, x in low.items()}).arguments())
        assert torch.equal(out, wide)
        out.sum().backward()
        assert all(leaf.grad.dtype == dtype for leaf in leaves.values())

    def test_float64_is_left_alone(self):
        problem = make_problem(CAUSAL, 9)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = torus_attention(**problem.arguments())
            x = ema_compound(problem.q, problem.q, problem.ema_alpha)
        assert out.dtype == x.dtype == torch.float64
        assert torch.equal(out, torus_attention(**problem.arguments()))

    def test_companions(self, backend):
        x, state, velocity = torch.randn(3, 2, 4, 9, 8, device=backend.device)
        gate, states = torch.rand(4, device=backend.device), torch.randn(3, 2, 4, 9, 8, device=backend.device)
        with backend.chosen():
            exact = ema_compound(x, state, gate)
            with torch.autocast(backend.device, dtype=backend.low_dtype):
                out = ema_compound(x, state, gate.to(backend.low_dtype))
                momentum, new_velocity = ema_compound(x, state, gate, beta=gate, velocity=velocity)
                mixed, new_states = ema_compound_multiscale(x, states, gate.expand(3, 4), gate[:3])
                turned = lattice_rope(x, PERIODIC)
        assert out.dtype == momentum.dtype == mixed.dtype == new_states.dtype == backend.low_dtype
        assert new_velocity.dtype == turned.dtype == torch.float32
        assert error(out, exact) <= 4 * torch.finfo(backend.low_dtype).eps * exact.abs().max().item()


class Log(TorchDispatchMode):
    """Names of the operators that PyTorch dispatches, but for those that only look at a tensor anew."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.detach.default:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_stats", [False, True], ids=["plain", "with_stats"])
def test_a_call_and_its_gradient_are_one_operator_each(with_stats):
    """Anything more would be a kernel of its own on a GPU: a copy, or zeros for the gradients of the statistics."""
    problem = make_problem(CAUSAL, 8, token_alpha=True).to(torch.float32)
    d_out = torch.ones_like(problem.q)
    leaves = [x.requires_grad_() for x in problem.tensors().values() if x.is_floating_point()]
    operands = {name: getattr(problem, name) for name in ATTENTION}
    call = torus_attention_with_stats if with_stats else torus_attention
    with Log() as log:
        result = call(problem.q, problem.k, problem.v, problem.lattice, **operands)
        out = result[0] if with_stats else result
        torch.autograd.grad(out, leaves, d_out)
    assert log.names == ["torus_kernels::attention", "torus_kernels::attention_backward"]


def test_registered_operators_are_the_public_ones():
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("torus_kernels::")}
    assert {"attention", "ema_compound", "ema_multiscale", "rope"} <= names


def test_public_names_are_there():
    for name in torus_kernels.__all__:
        assert hasattr(torus_kernels, name), name


def test_import_leaves_cuda_and_the_global_state_alone():
    """A library that initialises CUDA on import breaks every later fork."""
    root = Path(torus_kernels.__file__).parents[1]
    script = ("import torch; before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled();"
              "import torus_kernels; assert not torch.cuda.is_initialized();"
              "torus_kernels.available_backends(); assert not torch.cuda.is_initialized();"
              "assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())")
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
