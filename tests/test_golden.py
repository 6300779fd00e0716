"""Stored cases: inputs, output and all gradients in float64."""

import json
from pathlib import Path

import dense
import numpy as np
import pytest
import torch
from support import Problem, check_precision, evaluate, label

from torus_kernels import TorusLattice, lattice_rope

DATA = Path(__file__).parent / "data"
ATTENTION_CASES = sorted(path.stem for path in DATA.glob("*.npz") if not path.stem.startswith("rope_"))
ROPE_CASES = sorted(path.stem for path in DATA.glob("rope_*.npz"))
ARGUMENTS = {"weights": "stream_weights"}  # where a stored array is not named as the argument


def load(case: str) -> tuple[TorusLattice, dict[str, torch.Tensor]]:
    with np.load(DATA / f"{case}.npz") as stored:
        options = json.loads(str(stored["lattice"]))
        if "streams" in stored:
            options["streams"] = stored["streams"].tolist()
        arrays = {name: torch.from_numpy(stored[name]) for name in stored if stored[name].dtype.kind in "fi"}
    return TorusLattice(**options), arrays


def load_problem(case: str) -> tuple[Problem, dict[str, torch.Tensor]]:
    lattice, arrays = load(case)
    inputs = {name.removeprefix("in_"): x for name, x in arrays.items() if name.startswith("in_")}
    grads = {name.removeprefix("grad_"): x for name, x in arrays.items() if name.startswith("grad_")}
    problem = Problem(
        lattice, first_key=arrays.get("first_key"), d_out=arrays["dout"],
        **{ARGUMENTS.get(name, name): x for name, x in inputs.items()},
    )
    stored = {"out": arrays["out"], **{f"d_{ARGUMENTS.get(name, name)}": x for name, x in grads.items()}}
    return problem, stored


def test_every_kind_of_case_is_there():
    assert len(ATTENTION_CASES) == 15
    assert len(ROPE_CASES) == 4


@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_the_yardstick_agrees(case):
    problem, stored = load_problem(case)
    plain = evaluate(dense.attention, problem)
    for name, value in stored.items():
        torch.testing.assert_close(plain[name], value, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention_in_float64(backend, case):
    if torch.float64 not in backend.dtypes:
        pytest.skip("float64 on a GPU runs on reference")
    problem, stored = load_problem(case)
    backend.require(problem.lattice)
    check_precision(backend, problem, torch.float64, expected=stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=label)
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention_within_the_error_budget(backend, case, dtype):
    problem, _ = load_problem(case)
    backend.require(problem.lattice)
    check_precision(backend, problem, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=label)
@pytest.mark.parametrize("case", ROPE_CASES)
def test_rope(backend, case, dtype):
    lattice, arrays = load(case)
    with backend.chosen():
        out = lattice_rope(arrays["x"].to(backend.device, dtype), lattice, offset=int(arrays["offset"]))
    assert out.dtype == dtype
    # The input is rounded once and so is the output; a rotation does not magnify either.
    roundings = 16 if dtype == torch.float64 else 2
    expected = arrays["out"]
    error = (out.cpu().double() - expected).abs().max()
    assert error <= roundings * torch.finfo(dtype).eps * expected.abs().max()
