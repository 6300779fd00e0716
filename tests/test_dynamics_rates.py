"""Dynamic training: schedules of the learning rate, and rates for each layer."""

import math

import pytest
from dynamics_runs import MODEL, STEPS, assert_goes_on_to_the_bit, make_config, tiny_options, write_text
from model_runs import fails_in_one_line, parameters_of, run

from torus_model import TorusLM, checkpoint
from torus_model.optimizer import depth_below_top, make_optimizer
from torus_model.run import Run
from torus_model.schedules import learning_rate_factor, ramp


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


def test_linear_falls_evenly_to_the_end():
    factors = [learning_rate_factor(x, 0.2, 0.1, "linear") for x in (0.0, 0.1, 0.2, 0.6, 1.0, 2.0)]
    assert factors == pytest.approx([0.1, 0.55, 1.0, 0.55, 0.1, 0.1])


def test_steps_fall_at_their_milestones_and_no_further_than_the_end():
    factors = [learning_rate_factor(x, 0.1, 0.05, "step", (0.5, 0.75, 0.9), 0.3)
               for x in (0.05, 0.1, 0.49, 0.5, 0.74, 0.75, 0.9, 1.0)]
    assert factors == pytest.approx([0.525, 1.0, 1.0, 0.3, 0.3, 0.09, 0.05, 0.05])


def test_a_ramp_ends_where_it_says():
    assert [ramp(x, 0.2, 1.0, 0.5) for x in (0.0, 0.25, 0.5, 0.9)] == pytest.approx([0.2, 0.6, 1.0, 1.0])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "step"])
def test_a_run_follows_its_schedule(text, schedule):
    ran = Run(make_config(text, schedule=schedule, warmup=0.25, milestones=(0.5, 0.8), milestone_factor=0.5))
    rates = []
    for _ in range(STEPS):
        rates.append(ran.optimizer.param_groups[0]["lr"])
        ran.advance()
    wanted = {
        "cosine": lambda x: 0.05 + 0.95 * (1 + math.cos(math.pi * (x - 0.25) / 0.75)) / 2,
        "linear": lambda x: 0.05 + 0.95 * (1 - (x - 0.25) / 0.75),
        "step": lambda x: 1.0 if x < 0.5 else 0.5 if x < 0.8 else 0.25,
    }[schedule]
    after = [i for i in range(STEPS) if i / STEPS >= 0.25]
    assert [rates[i] for i in after] == pytest.approx([1e-2 * wanted(i / STEPS) for i in after])


def test_depth_is_counted_from_the_top():
    depths = {name: depth_below_top(name, 2) for name, _ in TorusLM(MODEL).named_parameters()}
    assert {depth for name, depth in depths.items() if name.startswith("blocks.1.")} == {0}
    assert {depth for name, depth in depths.items() if name.startswith("blocks.0.")} == {1}
    assert (depths["norm.weight"], depths["embedding.weight"]) == (0, 2)


def test_rates_fall_by_the_same_factor_from_layer_to_layer():
    model = TorusLM(MODEL)
    groups = make_optimizer(model, 1e-2, 0.1, layer_decay=0.5).param_groups
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    assert rates.keys() == dict(model.named_parameters()).keys()
    for name, rate in rates.items():
        assert rate == pytest.approx(1e-2 * 0.5 ** depth_below_top(name, 2)), name
    plain = make_optimizer(model, 1e-2, 0.1).param_groups
    assert len(plain) == 2
    decayed = {name for group in groups if group["weight_decay"] for name in group["param_names"]}
    assert decayed == set(plain[0]["param_names"])


def test_a_layer_moves_as_far_as_its_rate_says(text):
    """The first step of AdamW moves every element that has a gradient by the rate, whatever the gradient."""
    ran = Run(make_config(text, layer_decay=0.1, weight_decay=0.0, final_learning_rate=1.0))
    before = parameters_of(ran.model)
    ran.advance()
    for name, p in ran.model.named_parameters():
        moved = (p - before[name]).abs().max().item()
        assert moved == pytest.approx(1e-2 * 0.1 ** depth_below_top(name, 2), rel=1e-2), name


@pytest.mark.parametrize("changes", [{"schedule": "linear"}, {"schedule": "step"}, {"layer_decay": 0.7}])
def test_a_run_that_is_interrupted_goes_on_to_the_bit(text, tmp_path, changes):
    assert_goes_on_to_the_bit(make_config(text, **changes), tmp_path, step=6)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"schedule": "exponential"}, "schedule"), ({"milestones": (0.5, 0.2)}, "milestones"),
        ({"milestones": 0.5}, "milestones"), ({"milestones": (1.5,)}, "milestones"),
        ({"milestone_factor": 1.0}, "milestone_factor"), ({"layer_decay": 0.0}, "layer_decay"),
        ({"layer_decay": 1.5}, "layer_decay"), ({"layer_decay": math.nan}, "layer_decay"),
    ],
)
def test_a_wrong_field_is_named(text, changes, name):
    with pytest.raises((TypeError, ValueError), match=f"^{name} must"):
        make_config(text, **changes)


def test_options_reach_the_run(text, tmp_path, capsys):
    tiny = tiny_options(text, tmp_path)
    assert run("train", "--steps", 2, *tiny, "--schedule", "step", "--milestones", 0.2, 0.4, "--milestone-factor", 0.5,
               "--layer-decay", 0.9) == 0
    found = checkpoint.load_metadata(tmp_path)["train_config"]
    assert (found["schedule"], found["milestones"], found["milestone_factor"], found["layer_decay"]) == (
        "step", [0.2, 0.4], 0.5, 0.9)
    assert run("train", "--resume", "--steps", 3, "--output", tmp_path) == 0
    capsys.readouterr()
    assert "layer_decay" in fails_in_one_line(capsys, "train", "--steps", 2, *tiny, "--overwrite", "--layer-decay", 2)
    assert run("train", "--help") == 0
    shown = capsys.readouterr().out
    for flag in ("--schedule", "--milestones", "--milestone-factor", "--layer-decay"):
        assert f"  {flag} " in shown
