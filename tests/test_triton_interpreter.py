"""The Triton kernels without a GPU: parts of the suite run again under Triton's interpreter, which takes CPU tensors.

The interpreter is slow, so these are the small cases. Everything else of the suite runs on it too, for as long as it
takes: ``TRITON_INTERPRET=1 ./run test -k triton``, with ``TORUS_TEST_CAPABILITY=90`` as if on sm_90.
"""

import os

import pytest
from reruns import Reruns

pytest.importorskip("triton")

# What of each file runs, as an expression of pytest's -k.
SELECTED = {
    "test_golden.py": "rope or float32 and (2x2 or 8x4 or 6x4 or 5x6 or 3x5 or 7x5 or loops_only or w3_T64) "
                      "or float16 and (2x2 or 7x5 or periodic_6x4)",
    "test_symmetries.py": "test_shift and 6x4 and 3-2 or reflection_of_u and 5x6 or transposition and 5x5 "
                          "or closed_loop and 5x6 and w2-2",
    "test_cylinder.py": "leaves or distances",
    "test_streams.py": "test_statistics and cylinder and 1-2-6 "
                       "or far_below and periodic and minor_forward and bfloat16 "
                       "or decay_of_a_stream_left_out and -3e+38 and (6x8 or 4x6) "
                       "or beyond_what_can_be_multiplied",
    # Channels in parts; lines that fill several blocks.
    "test_precision.py": "test_head_dimensions and 6x4 and 40 and bfloat16 or several_blocks and 128x2 and bfloat16 "
                         "or several_blocks and 16x2 and float16 "
                         "or several_blocks and 128x2 and causal and float16 or many_channels and causal and 72 "
                         "or many_channels and periodic and 128x2 and 64",
    "test_causal.py": "oldest_visible or one_token or first_key_in_64 or lowest_first_key or first_key_beyond "
                      "or (no_gradient or forgotten) and 2x2",
    "test_dispatch.py": "TestOpcheck and (packed and float32 or ema or multiscale or rope) "
                        "or test_fake_tensors and causal",
    "test_compounding.py": "not threads",
    "test_rope.py": "not test_formula or float32",
    "test_decode.py": "every_step and (2x2 or 7x3) or groups_and_gates and 2-6-2 or test_defaults "
                      "or test_subsets and (0-3-5 or 4-6) or (negative or beyond) and int64",
    "test_decode_pytorch.py": "test_autocast or test_opcheck",
}


# The same with the tiles and launches of sm_90; the interpreter's own device is an sm_80.
SELECTED_AS_90 = {
    "test_golden.py": "float16 and (2x2 or periodic_6x4)",
    "test_precision.py": "several_blocks and 128x2 and bfloat16 or several_blocks and 256x2 and float16 "
                         "or many_channels and cylinder and 72",
    "test_robustness.py": "another_head and 9x12 and bfloat16",
}


@pytest.fixture(scope="module")
def reruns():
    with Reruns("triton", SELECTED, TRITON_INTERPRET="1") as runs:
        yield runs


@pytest.fixture(scope="module")
def reruns_as_90():
    with Reruns("triton", SELECTED_AS_90, TRITON_INTERPRET="1", TORUS_TEST_CAPABILITY="90") as runs:
        yield runs


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the whole suite runs under the interpreter")
@pytest.mark.parametrize("file", SELECTED)
def test_suite(reruns, file):
    reruns.check(file)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the whole suite runs under the interpreter")
@pytest.mark.parametrize("file", SELECTED_AS_90)
def test_suite_as_on_sm_90(reruns_as_90, file):
    reruns_as_90.check(file)
