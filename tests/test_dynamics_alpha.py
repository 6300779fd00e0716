"""Dynamic training: the schedule of the rates of compounding."""

import pytest
import torch
from dynamics_runs import MODEL, assert_goes_on_to_the_bit, make_config, tiny_options, write_text
from model_runs import fails_in_one_line, run

from torus_model import TorusLM, checkpoint
from torus_model.run import Run
from torus_model.train import train


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


def alpha(model) -> torch.Tensor:
    return model.blocks[1].attention.alpha().detach()


def test_alpha_follows_the_ramp(text):
    ran = Run(make_config(text, alpha_schedule=(0.2, 1.0), alpha_ramp=0.5, learning_rate=1e-12))
    initial = alpha(TorusLM(MODEL))
    factors = []
    for _ in range(8):
        factors.append((alpha(ran.model) / initial).mean().item())
        ran.advance()
    # Twelve steps, of which six are the ramp; rounding to float32.
    assert factors == pytest.approx([0.2 + 0.8 * min(1, i / 6) for i in range(8)], rel=1e-6)


def test_the_factor_reaches_what_the_model_computes(text):
    plain, half = (Run(make_config(text, alpha_schedule=factors)).model.eval() for factors in (None, (0.5, 0.5)))
    tokens = torch.randint(256, (1, 20))
    assert not torch.allclose(half(tokens), plain(tokens), rtol=1e-3)
    half.set_alpha_factor(1.0)
    assert torch.equal(half(tokens), plain(tokens))


def test_a_checkpoint_holds_the_factor(text, tmp_path):
    result = train(make_config(text, alpha_schedule=(0.2, 0.6)), tmp_path, progress=False)
    loaded = checkpoint.load_model(tmp_path, backend="reference")
    assert loaded.config.scheduled_alpha
    assert loaded.blocks[1].attention.scheduled_factor.item() == pytest.approx(0.6)
    tokens = torch.randint(256, (1, 20))
    with torch.no_grad():
        assert torch.equal(loaded(tokens), result.model(tokens))


def test_without_a_schedule_there_is_no_factor(text):
    names = Run(make_config(text)).model.state_dict()
    assert not any("factor" in name for name in names)


def test_a_run_that_is_interrupted_goes_on_to_the_bit(text, tmp_path):
    assert_goes_on_to_the_bit(make_config(text, alpha_schedule=(0.3, 1.0)), tmp_path, step=6)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"alpha_schedule": (0.5,)}, "alpha_schedule"), ({"alpha_schedule": (0.0, 1.0)}, "alpha_schedule"),
        ({"alpha_schedule": (0.5, 1.1)}, "alpha_schedule"), ({"alpha_schedule": 0.5}, "alpha_schedule"),
        ({"alpha_ramp": 0.0}, "alpha_ramp"),
    ],
)
def test_a_wrong_field_is_named(text, changes, name):
    with pytest.raises((TypeError, ValueError), match=f"^{name} must"):
        make_config(text, **changes)


def test_options_reach_the_run(text, tmp_path, capsys):
    tiny = tiny_options(text, tmp_path)
    assert run("train", "--steps", 4, *tiny, "--alpha-schedule", 0.4, 0.8, "--alpha-ramp", 0.5) == 0
    assert checkpoint.load_model(tmp_path).blocks[1].attention.scheduled_factor.item() == pytest.approx(0.8)
    capsys.readouterr()
    assert "alpha_ramp" in fails_in_one_line(capsys, "train", "--steps", 4, *tiny, "--overwrite", "--alpha-ramp", 2)
    assert run("train", "--help") == 0
    shown = capsys.readouterr().out
    assert "  --alpha-schedule " in shown and "  --alpha-ramp " in shown
