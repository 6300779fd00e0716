"""The CUDA kernels without a GPU: parts of the suite run again on their emulation, which takes CPU tensors.

The emulation is slow, so these are the small cases. Everything else of the suite that is in float16 or bfloat16 runs on
it too, for as long as it takes: ``TORUS_CUDA_EMULATE=1 ./run test -k cuda``.
"""

import os

import pytest
from reruns import Reruns

from torus_kernels import building

# What of each file runs, as an expression of pytest's -k.
SELECTED = {
    "test_golden.py": "error_budget",
    "test_symmetries.py": "test_shift and 6x4 and 3-2 or reflection_of_u and 5x6 or transposition and 5x5 "
                          "or closed_loop and 5x6 and w2-2",
    "test_cylinder.py": "leaves or distances",
    "test_streams.py": "test_statistics and 1-2-6 or far_below and minor_forward",
    "test_causal.py": "oldest_visible or one_token or first_key_in_64 or first_key_beyond "
                      "or (no_gradient or forgotten) and 2x2",
    "test_compounding.py": "not threads",
    "test_decode.py": "every_step and (2x2 or 7x3) or groups_and_gates or test_subsets and (0-3-5 or 4-6) "
                      "or negative or beyond",
    "test_cuda_backend.py": "cuda",
    "test_cuda_attention.py": "cuda",
    "test_properties.py": "statistics",
}


@pytest.fixture(scope="module")
def reruns():
    try:
        building.ensure_library(building.cuda_emulation())
    except building.BuildError as error:
        pytest.skip(str(error).splitlines()[0])
    with Reruns("cuda", SELECTED, TORUS_CUDA_EMULATE="1") as runs:
        yield runs


@pytest.mark.skipif("TORUS_CUDA_EMULATE" in os.environ, reason="the whole suite runs on the emulation")
@pytest.mark.parametrize("file", SELECTED)
def test_suite(reruns, file):
    reruns.check(file)
