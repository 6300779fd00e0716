"""Layouts on two processes: the run of one process, shared as it says, and checkpoints that any layout continues."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import ANY, LAYOUTS, MODEL, PROCESSES, SINGLE, STEPS, make_config, run_processes, write_text

from torus_model import data
from torus_model.parallel.layout import count_targets
from torus_model.run import Run

ROUNDING = 4096 * torch.finfo(torch.float64).eps
"""Of a sum of some thousand products in another order, relative to its largest terms."""

RESUMED = [(SINGLE, "fsdp"), ("fsdp", "ddp"), ("ddp", SINGLE), ("pipeline", SINGLE), ("sequence", "pipeline")]
CASES = {
    "gated": {},
    "per head": {"model": {"token_gated": False}, "accumulate": 1},
}
SLOW_CASES = {
    "checkpointed": {"activation_checkpointing": True},
    "low": {"autocast": True, "pack_documents": False, "model": {"vocab_size": 256}},
    "many parts": {"accumulate": 4},
    "no state": {"model": {"compounding": False}},
    "other positions": {"model": {"rotary": "sequence", "graded_heads": True, "qk_gain": 2.0}},
    "fewer streams": {"model": {"streams": ("major_forward", "minor_backward", "spiral_cw")}},
}

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()),
                                reason="this PyTorch has no gloo, which processes on CPUs talk through")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "documents"
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, text) -> list[dict]:
    cases = {name: make_config(text, **changes) for name, changes in CASES.items()}
    return run_processes(tmp_path_factory.mktemp("processes"), cases, RESUMED)


@pytest.fixture(scope="module")
def slow_ranks(tmp_path_factory, text) -> list[dict]:
    cases = {name: make_config(text, **changes) for name, changes in (CASES | SLOW_CASES).items()}
    return run_processes(tmp_path_factory.mktemp("processes"), cases, itertools.product(ANY, ANY), timeout=1200)


def assert_close(found: dict, expected: dict, bound: float = ROUNDING) -> None:
    """Tensors of the same names, up to a part of the largest number among them."""
    assert found.keys() == expected.keys()
    largest = max(x.abs().max().item() for x in expected.values())
    for name, x in expected.items():
        assert (found[name] - x).abs().max().item() <= bound * largest, name


def assert_same_run(ranks, case, layout, bound=ROUNDING):
    expected = ranks[0][case, SINGLE]
    for rank in ranks:
        assert rank[case, layout]["losses"] == pytest.approx(expected["losses"], rel=bound)
        assert rank[case, layout]["bits"] == pytest.approx(expected["bits"], rel=bound)
        assert rank[case, layout]["losses"] == ranks[0][case, layout]["losses"], "the processes disagree"
    found = ranks[0][case, layout]
    for step in range(STEPS):
        for kind in ("gradients", "clipped"):
            assert_close(found[kind][step], expected[kind][step], bound)
        before, after = (torch.cat([x.flatten() for x in found[kind][step].values()]).norm()
                         for kind in ("gradients", "clipped"))
        assert after == pytest.approx(0.05, rel=1e-3) and before > 2 * after, "nothing was clipped"
    assert_close(found["end"], expected["end"], bound)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_that_of_one_process(ranks, case, layout):
    assert_same_run(ranks, case, layout)


def test_shares_have_different_numbers_of_targets(text):
    """Otherwise a mean of the shares' means would do."""
    run = Run(make_config(text))
    tokens, targets = data.random_batch(run.training, 8, 20, run.generator)
    _, targets = data.within_documents(tokens, targets, run.tokenizer)
    for shares in (targets.chunk(4), targets.chunk(PROCESSES, dim=1)):
        assert len({count_targets(share) for share in shares}) > 1


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_a_process_of_data_parallelism_sees_its_share_of_the_batch(ranks, layout):
    for rank in ranks:
        assert set(rank["gated", layout]["tokens"][:2 * STEPS]) == {(8 // 2 // PROCESSES, 20)}


def test_a_process_of_fsdp_keeps_half_of_weights_and_moments(ranks):
    whole = ranks[0]["gated", SINGLE]
    assert whole["weights"] == whole["moments"]
    for kind in ("weights", "moments"):
        shares = [rank["gated", "fsdp"][kind] for rank in ranks]
        assert sum(shares) == whole[kind]
        # Dimensions that do not divide leave a row more to one of them.
        assert max(shares) < 0.51 * whole[kind]
        assert [rank["gated", "ddp"][kind] for rank in ranks] == [whole[kind]] * PROCESSES


def test_a_stage_of_the_pipeline_keeps_its_blocks(ranks):
    first, last = (rank["gated", "pipeline"] for rank in ranks)
    assert (first["blocks"], last["blocks"]) == ([0, 1], [2])
    whole, embedding = ranks[0]["gated", SINGLE]["weights"], MODEL.vocab_size * MODEL.width
    assert first["weights"] + last["weights"] == whole + embedding == first["moments"] + last["moments"]
    assert set(first["tokens"][:2 * STEPS]) == {(4, 20)} and last["tokens"] == []


def test_a_process_of_sequence_parallelism_has_half_of_the_tokens_and_runs_half_of_the_heads(ranks):
    for rank in ranks:
        assert set(rank["gated", "sequence"]["heads"]) == {(MODEL.heads // PROCESSES, MODEL.kv_heads // PROCESSES, 20)}
        assert {shape[1] for shape in rank["gated", "sequence"]["tokens"]} == {20 // PROCESSES}
    assert set(ranks[0]["gated", SINGLE]["heads"]) == {(MODEL.heads, MODEL.kv_heads, 20)}


def test_every_process_of_a_layout_has_random_numbers_of_its_own(ranks):
    """For dropout; the first one's are those of one process."""
    for layout in LAYOUTS:
        first, second = (rank["gated", layout]["random"] for rank in ranks)
        assert first == ranks[0]["gated", SINGLE]["random"] != second


def assert_goes_on(ranks, begun, continued):
    expected, found = ranks[0]["gated", SINGLE], ranks[0][begun, continued]
    assert found["losses"] == pytest.approx(expected["losses"], rel=ROUNDING)
    assert_close(found["end"], expected["end"])


@pytest.mark.parametrize(("begun", "continued"), RESUMED)
def test_a_checkpoint_continues_under_another_layout(ranks, begun, continued):
    assert_goes_on(ranks, begun, continued)


@pytest.mark.slow
@pytest.mark.parametrize(("begun", "continued"), list(itertools.product(ANY, ANY)))
def test_a_checkpoint_continues_under_every_layout(slow_ranks, begun, continued):
    assert_goes_on(slow_ranks, begun, continued)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SLOW_CASES)
def test_options_of_training_work_in_every_layout(slow_ranks, case, layout):
    # Under autocast products are bfloat16, which keeps 8 bits.
    assert_same_run(slow_ranks, case, layout, bound=2.0**-6 if case == "low" else ROUNDING)
