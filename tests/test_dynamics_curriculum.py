"""Dynamic training: the curriculum of sequence lengths."""

import pytest
from dynamics_runs import STEPS, assert_goes_on_to_the_bit, make_config, tiny_options, write_text
from model_runs import fails_in_one_line, run

import torus_model.run as run_module
from torus_model import checkpoint
from torus_model.curriculum import SMOOTHING, Curriculum
from torus_model.run import Run

ALWAYS, NEVER = 100.0, 1e-3
"""Thresholds that every loss and that no loss is below."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


def lengths(curriculum, losses, budget=10):
    """Of the steps with these losses."""
    found = []
    for step, loss in enumerate(losses):
        found.append(curriculum.seq_len)
        curriculum.observe(loss, (step + 1) / budget)
    return found


def test_a_stage_ends_after_enough_steps_below_its_threshold():
    assert lengths(Curriculum((4, 8, 16), [2.0, 1.0], 2, 1.0), [1.5] * 5) == [4, 4, 8, 8, 8]
    assert lengths(Curriculum((4, 8, 16), [2.0], 2, 1.0), [1.5] * 5) == [4, 4, 8, 8, 16]


def test_the_loss_has_to_stay_there():
    # The average of 1.5 and 9 is above the threshold: the count begins again.
    assert lengths(Curriculum((4, 8), [2.0], 2, 1.0), [1.5, 9.0, 1.5, 1.5]) == [4, 4, 4, 4]


def test_the_loss_is_smoothed():
    jump = 2.0 + 0.5 / (1 - SMOOTHING)  # one step in many moves the average by half a nat
    losses = [2.0] * 39 + [jump, 2.0]
    assert lengths(Curriculum((4, 8), [2.4], 40, 1.0), losses, 100) == [4] * 41
    assert lengths(Curriculum((4, 8), [2.6], 40, 1.0), losses, 100) == [4] * 40 + [8]


def test_a_stage_ends_at_its_limit():
    assert lengths(Curriculum((4, 8, 16), [NEVER], 1, 0.3), [5.0] * 8) == [4, 4, 4, 8, 8, 8, 16, 16]


def test_without_stages_there_is_one_length():
    assert lengths(Curriculum((16,), [], 1, 0.1), [1.0] * 3) == [16] * 3


def test_steps_have_the_lengths_of_the_stages_and_tokens_are_counted(text, monkeypatch):
    seen = []
    step = run_module.training_step
    monkeypatch.setattr(run_module, "training_step",
                        lambda model, optimizer, tokens, *rest: seen.append(tokens.shape) or
                        step(model, optimizer, tokens, *rest))
    ran = Run(make_config(text, curriculum=(6, 12), curriculum_loss=(ALWAYS,), curriculum_patience=3))
    lines = []
    ran.on_change = lines.append
    for _ in range(8):
        ran.advance()
    assert [tuple(shape) for shape in seen] == [(4, 6)] * 3 + [(4, 12)] * 3 + [(4, 24)] * 2
    assert ran.history.seq_lens == [6] * 3 + [12] * 3 + [24] * 2
    assert ran.validate().tokens == ran.history.tokens == 4 * (3 * 6 + 3 * 12 + 2 * 24)
    assert lines == ["step 3: 12 tokens per sequence", "step 6: 24 tokens per sequence"]


def test_validations_have_the_full_length(text):
    short = Run(make_config(text, curriculum=(6,), curriculum_loss=(NEVER,)))
    assert short.curriculum.seq_len == 6
    assert short.validate().bits_per_byte == Run(make_config(text)).validate().bits_per_byte


def test_a_run_that_is_interrupted_goes_on_to_the_bit(text, tmp_path):
    config = make_config(text, curriculum=(6, 12), curriculum_loss=(ALWAYS, NEVER), curriculum_patience=4,
                         curriculum_limit=0.5)
    about = assert_goes_on_to_the_bit(config, tmp_path, step=3)  # within a stage
    assert about["history"]["seq_lens"] == [6] * 4 + [12] * 6 + [24] * (STEPS - 10)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"curriculum": (6,)}, "curriculum_loss must"), ({"curriculum_loss": (1.0,)}, "curriculum_loss must"),
        ({"curriculum": (6, 12), "curriculum_loss": (1.0, 1.0, 1.0)}, "curriculum_loss must"),
        ({"curriculum": (12, 6), "curriculum_loss": (1.0,)}, "curriculum must"),
        ({"curriculum": (24,), "curriculum_loss": (1.0,)}, "curriculum must stay below seq_len"),
        ({"curriculum": (1.5,), "curriculum_loss": (1.0,)}, "curriculum must"),
        ({"curriculum": (6,), "curriculum_loss": (-1.0,)}, "curriculum_loss must"),
        ({"curriculum_patience": 0}, "curriculum_patience must"), ({"curriculum_limit": 0}, "curriculum_limit must"),
    ],
)
def test_a_wrong_field_is_named(text, changes, said):
    with pytest.raises((TypeError, ValueError), match=f"^{said}"):
        make_config(text, **changes)


def test_options_reach_the_run(text, tmp_path, capsys):
    tiny = tiny_options(text, tmp_path)
    chosen = ["--curriculum", 6, 12, "--curriculum-loss", ALWAYS, "--curriculum-patience", 1, "--curriculum-limit", 0.9]
    assert run("train", "--steps", 4, *tiny, *chosen) == 0
    assert "step 1: 12 tokens per sequence" in capsys.readouterr().err
    assert checkpoint.load_metadata(tmp_path)["history"]["seq_lens"] == [6, 12, 24, 24]
    assert "curriculum_loss" in fails_in_one_line(capsys, "train", "--steps", 4, *tiny, "--overwrite", *chosen[:3])
    assert run("train", "--help") == 0
    shown = capsys.readouterr().out
    for flag in chosen:
        assert not isinstance(flag, str) or f"  {flag} " in shown
