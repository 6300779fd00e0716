"""``python -m torus_kernels``: the report of a sound machine, and of one with broken backends."""

import json
import os
import subprocess
import sys

import pytest
import torch

import torus_kernels
from torus_kernels import backends
from torus_kernels.__main__ import main
from torus_kernels.backends import reference

CASES = {(dtype, topology) for dtype in ("float32", "bfloat16", "float16") for topology in ("periodic", "causal")}


@pytest.fixture(autouse=True)
def only_the_reference(monkeypatch):
    """As the kernels have the parity suite, one backend is enough to see what the report makes of it."""
    def unavailable(name):
        return None if name == "reference" else f"no {name} today\nbecause of the weather"

    monkeypatch.setattr(backends, "unavailable", unavailable)


def run(capsys, *arguments):
    status = main(list(arguments))
    output = capsys.readouterr()
    assert "Traceback" not in output.out + output.err
    return status, output.out


def report(capsys, *arguments):
    status, output = run(capsys, "--json", *arguments)
    return status, json.loads(output)


def test_a_sound_backend(backend, capsys, monkeypatch):
    monkeypatch.setattr(backends, "unavailable", lambda name: None if name in (backend.name, "reference") else "no")
    status, result = report(capsys, "--cuda")
    assert (status, result["failures"]) == (0, [])
    checks = [check for check in result["checks"] if check["backend"] == backend.name]
    assert {(check["dtype"], check["topology"]) for check in checks} == {
        (dtype, topology) for dtype, topology in CASES if getattr(torch, dtype) in backend.dtypes}
    for check in checks:
        assert check["device"] == backend.device
        assert 0 < check["error"] <= check["allowed"] < 0.02


def test_says_what_a_bug_report_needs(capsys, monkeypatch):
    monkeypatch.setenv("TORUS_BACKEND", "reference")
    status, result = report(capsys)
    assert result["versions"].keys() == {"torus_kernels", "torch", "triton", "Python", "compiler"}
    assert result["versions"]["torus_kernels"] == torus_kernels.__version__
    assert result["versions"]["torch"].startswith(torch.__version__)
    assert result["machine"].keys() == {"platform", "CPU", "CPU capability", "threads", "GPU", "library"}
    assert result["variables"]["TORUS_BACKEND"] == "reference"
    assert result["backends"].keys() == set(backends.BACKENDS)
    assert result["backends"]["cpu"] == "no cpu today\nbecause of the weather"
    text_status, text = run(capsys)
    assert status == text_status == 0
    for part in ("versions", "machine", "variables", "backends"):
        for name, value in result[part].items():
            assert name in text and value.splitlines()[0] in text
    assert text.count(" ok ") == len(CASES) and text.endswith("all is well\n")


def assert_reported(capsys, *causes):
    status, result = report(capsys)
    text_status, text = run(capsys)
    assert status == text_status == 1
    for cause in causes:
        assert any(cause in failure for failure in result["failures"]), result["failures"]
        assert cause in text
    assert "all is well" not in text


@pytest.mark.parametrize("operator", ["attention_forward", "attention_backward"])
def test_a_backend_that_raises(operator, capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(reference, operator, broken)
    assert_reported(capsys, "reference, float32, causal: RuntimeError: broken on purpose")


@pytest.mark.parametrize("place, name", [(15, "d_q"), (17, "d_v"), (18, "d_stream_weights"), (21, "d_ema_alpha")])
@pytest.mark.parametrize("spoil", [lambda x: x.view(-1)[3:4].add_(0.01 * x.abs().max()),
                                   lambda x: x.view(-1)[0].fill_(torch.nan)], ids=["off", "nan"])
def test_a_gradient_that_is_wrong(place, name, spoil, capsys, monkeypatch):
    right = reference.attention_backward

    def wrong(*arguments):
        right(*arguments)
        gradient = arguments[place - 3]
        if gradient.dtype == torch.float32:  # not the truth in float64
            spoil(gradient)

    monkeypatch.setattr(reference, "attention_backward", wrong)
    assert_reported(capsys, f"reference, float32, causal: {name} is wrong")


def test_a_backend_that_cannot_be_asked(capsys, monkeypatch):
    def unavailable(name):
        if name == "cpu":
            raise OSError("libtorch_cpu.so: undefined symbol")
        return None if name == "reference" else "not now"

    monkeypatch.setattr(backends, "unavailable", unavailable)
    assert_reported(capsys, "cpu: broken: OSError: libtorch_cpu.so: undefined symbol")
    _, result = report(capsys)
    assert len(result["checks"]) == len(CASES)


def test_a_backend_that_takes_nothing(capsys, monkeypatch):
    monkeypatch.setattr(reference, "can_run", lambda problem: "not this")
    assert_reported(capsys, "reference: it takes none of the cases")


def test_cuda_is_left_alone_unless_asked_for(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("TORUS_CUDA_EMULATE", raising=False)
    monkeypatch.setattr(backends, "unavailable", lambda name: asked.append(name) or f"no {name}")
    _, result = report(capsys)
    assert "--cuda does it" in result["backends"]["triton"] and "--cuda does it" in result["backends"]["cuda"]
    assert not set(asked) & {"triton", "cuda"}
    _, result = report(capsys, "--cuda")
    assert result["backends"]["triton"] == "no triton"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_is_not_initialised():
    code = "import torch, torus_kernels.__main__ as m; m.make_report(); raise SystemExit(torch.cuda.is_initialized())"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_as_a_command_with_a_broken_installation(tmp_path):
    """The variable names no instruction set, so that the C++ library refuses to work."""
    environment = os.environ | {"TORUS_CPU_ISA": "quantum", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-m", "torus_kernels"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "TORUS_CPU_ISA" in done.stdout.partition("backends\n")[2] and "cpu       cpu" not in done.stdout
