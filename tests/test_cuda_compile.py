"""What nvcc makes of the CUDA kernels for sm_80 and sm_90a, read from the library; no GPU needed."""

import subprocess
import sys

import pytest

from benchmarks import machine_code
from torus_kernels import building

ARCHITECTURES = ("sm_80", "sm_90a")

GENERAL = ("ForwardKernel", "QueryGradientsKernel", "KeyGradientsKernel")
FORWARD = ("LineForwardKernel", "CrossForwardKernel")
BACKWARD = ("ChunkQueryGradientsKernel", "ChunkKeyGradientsKernel")
ATTENTION = (*FORWARD, *BACKWARD, *GENERAL)

ROWS_AND_KEYS = 16 * 32
"""Scores that a warp makes in one turn of its inner loop: kOwnRows of csrc/cuda/schedule.h against kOtherRows, or
against two chunks of csrc/cuda/chunks.h. A score is that of one pair for one stream, with all that it costs: products
with K and V, bias, exponential and sum."""

MAX_PER_SCORE = {32: 7, 64: 9, 128: 12}
"""Instructions of the forward's inner loops of lines and cross flows for each score, by channels. The target is 12;
half of what there is at 128 are matrix products and their operands."""

MAX_PER_SCORE_BACKWARD = {
    "delta": {32: 7, 64: 9, 128: 12.5},
    "d_q": {32: 13.5, 64: 17.5, 128: 22.5},
    "d_k and d_v": {32: 12, 64: 14, 128: 23.5},
}
"""The same of the backward's three sweeps, of which the last two have four products for two."""

GENERAL_PER_SCORE = 79
"""The same for the forward of what those do not take, at 64 channels on sm_80: walking, staging and every branch of a
turn included. These numbers may only fall."""

OPERATORS = ("attention_forward", "attention_backward", "attention_decode", "ema_compound", "ema_compound_backward",
             "ema_multiscale", "ema_multiscale_backward")


@pytest.fixture(scope="module")
def library():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORUS_CUDA_ARCHS", raising=False)
        try:
            building.find_nvcc()
        except building.BuildError as error:
            pytest.skip(str(error).splitlines()[0])
        return building.ensure_library(building.cuda())


@pytest.fixture(scope="module")
def codes(library):
    try:
        return machine_code.read_library(library)
    except machine_code.NoDisassembler as error:
        pytest.skip(f"nothing here reads machine code: {error}")


@pytest.fixture(params=ARCHITECTURES)
def kernels(codes, request):
    return codes[request.param]


def test_it_loads_and_registers_beside_any_torch(library):
    code = f"""
import torch
from torus_kernels.backends import load
load("cuda")
torch.ops.load_library({str(library)!r})
for name in {OPERATORS}:
    operator = f"torus_kernels::cuda_{{name}}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA"), name
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CPU"), name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_kernel_is_there(codes):
    assert tuple(codes) == ARCHITECTURES
    for kernels in codes.values():
        for name in ATTENTION:
            found = {(code.constants["element"], code.constants.get("sweep"), *code.constants["numbers"])
                     for code in kernels if code.name == name}
            sweeps = ("LineSweep", "PatchSweep") if name in BACKWARD else (None,)
            numbers = ([(dim,) for dim in (64, 128)] if name in GENERAL else
                       [(dim, in_pairs) for dim in (32, 64, 128) for in_pairs in (0, 1)])
            assert found == {(element, sweep, *given) for element in ("Float16", "BFloat16")
                             for sweep in sweeps for given in numbers}, name
        assert {"DecodeKernel", "JoinKernel", "CompoundKernel", "CompoundBackwardKernel", "MultiscaleKernel",
                "MultiscaleBackwardKernel"} <= {code.name for code in kernels}


def test_nothing_spills(kernels):
    for code in kernels:
        assert code.spills == 0, code.describe()
        assert code.local_bytes == 0, code.describe()


def test_scores_are_made_by_tensor_cores(kernels):
    for code in kernels:
        assert code.uses_tensor_cores == (code.name in ATTENTION), code.describe()


def test_rows_are_read_16_bytes_at_a_time(kernels):
    for code in kernels:
        if code.name in (*ATTENTION, "DecodeKernel", "CompoundKernel", "MultiscaleKernel"):
            wide = [i for i in code.instructions if i.opcode.startswith(("LDG", "LDGSTS")) and ".128" in i.opcode]
            assert wide, code.describe()


def turns_of(code, products: int) -> list:
    """Inner loops over two chunks with so many matrix products, or over one with half as many and half the scores."""
    return [loop for loop in code.loops if loop.innermost and loop.count("MUFU.EX2") in (8, 16)
            and loop.count("HMMA") * 16 == products * loop.count("MUFU.EX2")]


def per_score(code, turn) -> float:
    return code.per_score(len(turn), turn.count("MUFU.EX2") * 32)


def test_instructions_per_score(kernels):
    for code in kernels:
        if code.name not in FORWARD:
            continue
        head_dim, in_pairs = code.constants["numbers"]
        if not in_pairs:
            continue
        turns = [turn for turn in turns_of(code, head_dim // 2) if turn.count("MUFU.EX2") == 16]
        assert len(turns) == (1 if code.name == "LineForwardKernel" else 2), code.describe()  # of the two flows
        for turn in turns:
            assert per_score(code, turn) <= MAX_PER_SCORE[head_dim], code.describe()


def test_instructions_per_score_of_the_backward(kernels):
    for code in kernels:
        if code.name not in BACKWARD or not code.constants["numbers"][1]:
            continue
        head_dim = code.constants["numbers"][0]
        # Products of a score: scores and d_out V^T; d_q in two parts, or d_k and d_v.
        sweeps = ({"delta": 2, "d_q": 4} if code.name == "ChunkQueryGradientsKernel" else {"d_k and d_v": 4})
        for sweep, products in sweeps.items():
            turns = turns_of(code, products * head_dim // 4)
            assert turns, (sweep, code.describe())
            most = max(turn.count("MUFU.EX2") for turn in turns)
            for turn in turns:
                if turn.count("MUFU.EX2") == most:
                    assert per_score(code, turn) <= MAX_PER_SCORE_BACKWARD[sweep][head_dim], (sweep, code.describe())


def test_instructions_per_score_of_everything_else(codes):
    for code in codes["sm_80"]:
        if code.name != "ForwardKernel" or code.constants["numbers"][0] != 64:
            continue
        most = max(loop.count("HMMA") for loop in code.loops)
        turn = min((loop for loop in code.loops if loop.count("HMMA") == most), key=len)
        assert code.per_score(len(turn), ROWS_AND_KEYS) <= GENERAL_PER_SCORE, code.describe()
