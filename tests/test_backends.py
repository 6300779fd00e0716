"""Which backend runs: availability with reasons, the automatic choice, and choices that must not be overruled."""

import warnings

import pytest
import torch

import torus_kernels
from torus_kernels import BackendError, TorusLattice, backends, ema_compound, lattice_rope, torus_attention
from torus_kernels.backends import Problem

LATTICE = TorusLattice(3, 3)


@pytest.fixture
def q() -> torch.Tensor:
    return torch.randn(1, 2, 9, 8)


@pytest.fixture
def only_reference(monkeypatch):
    """A machine where nothing but the reference can run, and no warning has been given yet."""
    def can_run(name, problem):
        return None if name == "reference" else f"the {name} backend is broken on purpose"

    monkeypatch.setattr(backends, "can_run", can_run)
    monkeypatch.setattr(backends, "_warned", set())


def companions(q):
    return [lambda: lattice_rope(q, LATTICE), lambda: ema_compound(q, q, torch.rand(2))]


def test_report():
    report = torus_kernels.backend_report()
    assert tuple(report) == ("reference", "cpu", "triton", "cuda")
    available = torus_kernels.available_backends()
    assert "reference" in available
    for name, state in report.items():
        assert (state == "available") == (name in available)
        assert state.strip()


def test_every_available_backend_runs(backend):
    q = torch.randn(1, 2, 9, 8, device=backend.device)
    assert backend.attention(q, q, q, LATTICE).isfinite().all()


@pytest.mark.parametrize("name, error, message", [
    ("flash", ValueError, "backend must be one of reference, cpu, triton, cuda.*got 'flash'"),
    ("", ValueError, "backend must be one of"), ("CPU", ValueError, "backend must be one of"),
    (3, TypeError, "backend must be a string, got int"), (torch.device("cpu"), TypeError, "backend must be a string"),
])
def test_names(q, name, error, message):
    with pytest.raises(error, match=message):
        torus_attention(q, q, q, LATTICE, backend=name)


def test_forced_backend_never_gives_way(q, only_reference):
    with pytest.raises(BackendError, match="backend 'cpu' cannot run here: the cpu backend is broken on purpose"):
        torus_attention(q, q, q, LATTICE, backend="cpu")


def test_forced_backend_says_why_in_backward(q, monkeypatch):
    out = torus_attention(q.requires_grad_(), q, q, LATTICE, backend="reference")
    monkeypatch.setattr(backends, "can_run", lambda name, problem: "it went away")
    with pytest.raises(BackendError, match="it went away"):
        out.sum().backward()


def test_cuda_kernels_refuse_tensors_on_the_cpu(q):
    with pytest.raises(BackendError, match=r"'cuda' cannot run here: .{10}"):
        torus_attention(q, q, q, LATTICE, backend="cuda")


@pytest.mark.parametrize("problem, reason", [
    (Problem("cuda", torch.float32, 64), "takes float16 and bfloat16, and these tensors are float32"),
    (Problem("cuda", torch.bfloat16, 136), "up to 128 channels, and these have 136"),
    (Problem("cuda", torch.bfloat16, 12), "a multiple of 8 channels, and these have 12"),
    (Problem("cuda", torch.bfloat16, 64, "rope"), "no rotary positions"),
    (Problem("meta", torch.bfloat16, 64), "these tensors are on meta"),
    (Problem("cuda", torch.float16, 128), None), (Problem("cuda", torch.bfloat16, 8, "decode"), None),
])
def test_what_the_cuda_kernels_take(problem, reason, monkeypatch):
    module = backends.load("cuda")
    monkeypatch.setattr(module, "emulating", lambda: False)
    found = module.can_run(problem)
    assert found is None if reason is None else reason in found


def test_automatic_choice_prefers_triton_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backends, "can_run", lambda name, problem: None)
    monkeypatch.delenv("TORUS_BACKEND", raising=False)
    assert backends.select("auto", Problem("cuda", torch.bfloat16, 64)) is backends.load("triton")


@pytest.mark.gpu
def test_cpu_kernels_refuse_tensors_on_a_gpu(q):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    q = q.cuda()
    with pytest.raises(BackendError, match="'cpu' cannot run here"):
        torus_attention(q, q, q, LATTICE, backend="cpu")
    assert torus_attention(q, q, q, LATTICE, backend="reference").is_cuda


def test_automatic_choice_falls_back_and_says_so_once(q, only_reference, monkeypatch):
    monkeypatch.setattr(backends, "_IMPLEMENTED", {"reference": ".reference", "cpu": ".cpu"})
    with pytest.warns(UserWarning, match="slow reference backend, because cpu: the cpu backend is broken on purpose"):
        out = torus_attention(q, q, q, LATTICE)
    assert torch.equal(out, torus_attention(q, q, q, LATTICE, backend="reference"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torus_attention(q, q, q, LATTICE)


def test_automatic_choice_without_any_backend(q, monkeypatch):
    monkeypatch.setattr(backends, "can_run", lambda name, problem: f"no {name} today")
    with pytest.raises(BackendError, match="cpu: no cpu today; reference: no reference today"):
        torus_attention(q, q, q, LATTICE)


def test_choosing_reference_does_not_warn(q, only_reference):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torus_attention(q, q, q, LATTICE, backend="reference")


class TestVariable:
    def test_forces_every_operator(self, q, only_reference, monkeypatch):
        monkeypatch.setenv("TORUS_BACKEND", "cpu")
        for call in (lambda: torus_attention(q, q, q, LATTICE), *companions(q)):
            with pytest.raises(BackendError, match="'cpu' cannot run here: the cpu backend is broken on purpose"):
                call()

    def test_argument_is_stronger(self, q, only_reference, monkeypatch):
        monkeypatch.setenv("TORUS_BACKEND", "cpu")
        assert torus_attention(q, q, q, LATTICE, backend="reference").shape == q.shape

    def test_unknown_name(self, q, monkeypatch):
        monkeypatch.setenv("TORUS_BACKEND", "fast")
        for call in (lambda: torus_attention(q, q, q, LATTICE), *companions(q)):
            with pytest.raises(ValueError, match=r"TORUS_BACKEND must be one of .*got 'fast'"):
                call()

    @pytest.mark.parametrize("value", ["", "auto"])
    def test_empty_is_no_choice(self, q, monkeypatch, value):
        expected = torus_attention(q, q, q, LATTICE)
        monkeypatch.setenv("TORUS_BACKEND", value)
        assert torch.equal(torus_attention(q, q, q, LATTICE), expected)

    def test_chooses(self, backend, monkeypatch):
        q = torch.randn(1, 2, 9, 8, device=backend.device)
        expected = backend.attention(q, q, q, LATTICE)
        monkeypatch.setenv("TORUS_BACKEND", backend.name)
        assert torch.equal(torus_attention(q, q, q, LATTICE), expected)
