"""What nvcc makes of the CUDA kernels for sm_80 and sm_90a, read from the library; no GPU needed."""

import subprocess
import sys

import pytest

from benchmarks import sass
from torus_kernels import building

ARCHITECTURES = ("sm_80", "sm_90a")

GENERAL = ("ForwardKernel", "QueryGradientsKernel", "KeyGradientsKernel")
CHUNKS = ("LineForwardKernel", "CrossForwardKernel", "ChunkQueryGradientsKernel", "ChunkKeyGradientsKernel")
ATTENTION = (*CHUNKS, *GENERAL)

ROWS_AND_KEYS = 16 * 32
"""Scores that a warp makes in one turn of its inner loop: kOwnRows of csrc/cuda/schedule.h against kOtherRows, or
against two chunks of csrc/cuda/chunk_softmax.h. A score is that of one pair for one stream, with all that it costs:
products with K and V, bias, exponential and sum."""

MAX_PER_SCORE = {32: 9, 64: 10.5, 128: 13}
"""Instructions of the inner loops of lines and cross flows for each score, by channels. The target is 12 at 64; half of
what there is at 128 are matrix products and their operands."""

GENERAL_PER_SCORE = {1: 60, 2: 79}
"""The same for the kernel of what those two do not take, by streams, at 64 channels on sm_80: walking, staging and
every branch of a turn included. These numbers may only fall."""

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
        return sass.read_library(library)
    except sass.NoDisassembler as error:
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
            found = [(code.constants["element"], *code.constants["numbers"]) for code in kernels if code.name == name]
            # Streams; whether chunks are taken in twos; lines or patches.
            variants = (1, 2) if name in GENERAL else (0, 1)
            assert sorted(found) == sorted((element, head_dim, variant) for element in ("Float16", "BFloat16")
                                           for head_dim in (32, 64, 128) for variant in variants), name
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


def test_instructions_per_score(kernels):
    for code in kernels:
        if code.name not in ("LineForwardKernel", "CrossForwardKernel"):
            continue
        head_dim, in_pairs = code.constants["numbers"]
        if not in_pairs:
            continue
        turns = [loop for loop in code.loops if loop.innermost and loop.count("HMMA") == head_dim // 2
                 and loop.count("MUFU.EX2") * 32 == ROWS_AND_KEYS]
        assert len(turns) == (1 if code.name == "LineForwardKernel" else 2), code.describe()  # of the two flows
        for turn in turns:
            assert code.per_score(turn, ROWS_AND_KEYS) <= MAX_PER_SCORE[head_dim], code.describe()


def test_instructions_per_score_of_everything_else(codes):
    for code in codes["sm_80"]:
        if code.name != "ForwardKernel" or code.constants["numbers"][0] != 64:
            continue
        most = max(loop.count("HMMA") for loop in code.loops)
        turn = min((loop for loop in code.loops if loop.count("HMMA") == most), key=len)
        streams = code.constants["numbers"][1]
        assert code.per_score(turn, ROWS_AND_KEYS) <= GENERAL_PER_SCORE[streams], code.describe()
