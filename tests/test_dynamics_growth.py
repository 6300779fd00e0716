"""Dynamic training: growth that keeps the function, and the optimiser's state through it."""

import dataclasses

import pytest
import torch
from dynamics_runs import MODEL, assert_goes_on_to_the_bit, make_config, tiny_options, write_text
from model_runs import fails_in_one_line, run

from torus_model import ModelConfig, TorusLM, checkpoint, growth
from torus_model.growth import grow, grow_optimizer, grown_config
from torus_model.optimizer import make_optimizer
from torus_model.run import Run, training_step
from torus_model.train import train

SMALL = ModelConfig(vocab_size=13, width=32, layers=2, heads=4, kv_heads=2, n_major=3, n_minor=4, winding=2)
GROWING = {"grow_at": (0.25, 0.5), "grow_layers": (3, 3), "grow_width": (16, 32)}
GROWTHS = [{"layers": 5}, {"width": 64}, {"width": 96}, {"layers": 3, "width": 64}]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


def trained(config: ModelConfig = SMALL, dtype=torch.float32):
    """A model some steps from its start, with every gate and gain moved, and its optimiser."""
    torch.manual_seed(0)
    model = TorusLM(config, backend="reference").to(dtype)
    optimizer = make_optimizer(model, 1e-2, 0.1)
    for _ in range(3):
        tokens = torch.randint(config.vocab_size, (2, 15))
        training_step(model, optimizer, tokens[:, :-1], tokens[:, 1:], 1.0)
    return model.eval(), optimizer


def relative_difference(model, grown) -> float:
    tokens = torch.randint(SMALL.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = model(tokens), grown(tokens)
    return ((after - before).abs().max() / before.abs().max()).item()


@pytest.mark.parametrize("config", [
    SMALL, dataclasses.replace(SMALL, token_gated=False, ff_width=40, scheduled_alpha=True),
    dataclasses.replace(SMALL, compounding=False, kv_heads=None),
    dataclasses.replace(SMALL, ema_momentum=True, adaptive_alpha=True), dataclasses.replace(SMALL, ema_scales=2),
], ids=["gated", "not gated", "without a state", "momentum", "time constants"])
@pytest.mark.parametrize("sizes", GROWTHS, ids=str)
def test_the_function_stays(config, sizes):
    model, _ = trained(config, torch.float64)
    grown = grow(model, **sizes)
    assert grown.config == grown_config(config, **sizes) and not grown.training
    assert {p.dtype for p in grown.parameters()} == {torch.float64}
    # Sums of a few thousand products in float64, in another order.
    assert relative_difference(model, grown) < 1e-12


@pytest.mark.parametrize("sizes", GROWTHS, ids=str)
def test_the_function_stays_in_float32(sizes):
    model, _ = trained()
    # The roundings of some dozens of sums on the way through the blocks; exact but for them, as in float64.
    assert relative_difference(model, grow(model, **sizes)) < 64 * torch.finfo(torch.float32).eps


def test_growth_without_its_shares_or_zeros_would_change_the_function(monkeypatch):
    """The tolerance is far below what a wrong rule does."""
    model, _ = trained(dtype=torch.float64)
    monkeypatch.setitem(growth._DIMENSIONS, "norm.weight", ("tile",))
    assert relative_difference(model, grow(model, width=64)) > 0.1
    monkeypatch.setattr(growth, "_BRANCH_ENDS", ())
    assert relative_difference(model, grow(model, layers=3)) > 1e-3


def test_all_that_is_new_learns_and_copies_part(text):
    model, optimizer = trained()
    grown = grow(model, layers=3, width=64)
    optimizer = grow_optimizer(optimizer, model, grown, lambda m: make_optimizer(m, 1e-3, 0.0))
    before = {name: p.detach().clone() for name, p in grown.named_parameters()}
    for _ in range(2):  # what lies before a zero has a gradient from the second step on
        tokens = torch.randint(SMALL.vocab_size, (2, 15))
        training_step(grown, optimizer, tokens[:, :-1], tokens[:, 1:], 1.0)
    assert all(not torch.equal(p, before[name]) for name, p in grown.named_parameters())
    copies = grown.embedding.weight.unflatten(1, (2, -1))  # [vocabulary, copies, channels]
    assert not torch.allclose(copies[:, 0], copies[:, 1], rtol=1e-4)


def test_without_noise_copies_remain_copies():
    model, optimizer = trained(dtype=torch.float64)
    grown = grow(model, width=64, noise=0.0)
    optimizer = grow_optimizer(optimizer, model, grown, lambda m: make_optimizer(m, 1e-3, 0.0))
    tokens = torch.randint(SMALL.vocab_size, (2, 15))
    training_step(grown, optimizer, tokens[:, :-1], tokens[:, 1:], 1.0)
    copies = grown.embedding.weight.unflatten(1, (2, -1))
    torch.testing.assert_close(copies[:, 0], copies[:, 1], rtol=1e-9, atol=0)


def test_moments_grow_as_gradients_do():
    """Without noise the gradients of the grown model are those of the small one under the rule for first moments."""
    model, _ = trained(dtype=torch.float64)
    grown = grow(model, width=96, noise=0.0)
    tokens = torch.randint(SMALL.vocab_size, (2, 15))
    for each in (model, grown):
        each.zero_grad()
        each.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    optimizer = make_optimizer(model, 1e-3, 0.0)
    for p in model.parameters():
        optimizer.state[p] = {"step": torch.tensor(7.0), "exp_avg": p.grad, "exp_avg_sq": p.grad.square()}
    carried = grow_optimizer(optimizer, model, grown, lambda m: make_optimizer(m, 1e-3, 0.0))
    for name, p in grown.named_parameters():
        state, largest = carried.state[p], p.grad.abs().max().item()
        assert state["step"] == 7
        torch.testing.assert_close(state["exp_avg"], p.grad, rtol=0, atol=1e-9 * largest, msg=name)
        torch.testing.assert_close(state["exp_avg_sq"], p.grad.square(), rtol=0, atol=1e-9 * largest**2, msg=name)


def test_the_optimiser_of_blocks_that_are_new_starts_anew():
    model, optimizer = trained()
    grown = grow(model, layers=3)
    carried = grow_optimizer(optimizer, model, grown, lambda m: make_optimizer(m, 1e-3, 0.0))
    for name, p in grown.named_parameters():
        state = carried.state[p]
        if name.startswith("blocks.2."):
            assert state["step"] == 0 and not state["exp_avg"].any() and not state["exp_avg_sq"].any()
        else:
            old = optimizer.state[model.get_parameter(name)]
            assert all(torch.equal(state[key], old[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_the_small_model_is_left_alone():
    model, _ = trained()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():
        for p in grow(model, layers=3, generator=torch.Generator().manual_seed(0)).parameters():
            p.zero_()
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(("sizes", "said"), [
    ({"layers": 1}, "layers must be at least the 2"), ({"width": 48}, "width must be a multiple of the present 32"),
    ({"width": 16}, "width must"), ({"noise": 1.0}, "noise must"),
])
def test_sizes_that_do_not_fit_are_refused(sizes, said):
    with pytest.raises(ValueError, match=said):
        grow(TorusLM(SMALL), **sizes)


def test_frozen_parts_stay_frozen_through_growth(text):
    ran = Run(make_config(text, freeze=("embedding",), **GROWING))
    before = ran.model.embedding.weight.detach().repeat(1, 2)
    for _ in range(8):
        ran.advance()
    assert torch.equal(ran.model.embedding.weight, before)
    assert not ran.model.embedding.weight.requires_grad and ran.model.norm.weight.requires_grad


def test_a_model_with_other_parameters_is_refused():
    with pytest.raises(ValueError, match="experts must be 1"):
        grow(TorusLM(dataclasses.replace(SMALL, experts=2)), layers=3)
    sinusoidal = TorusLM(dataclasses.replace(SMALL, sinusoidal_positions=True)).eval()
    with pytest.raises(ValueError, match="sinusoidal_positions"):
        grow(sinusoidal, width=64)
    assert relative_difference(sinusoidal, grow(sinusoidal, layers=3)) == 0
    model = TorusLM(SMALL)
    model.register_parameter("other", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match="a model with other cannot grow"):
        grow(model, width=64)


def test_a_run_grows_and_its_checkpoint_is_of_the_grown_model(text, tmp_path):
    result = train(make_config(text, **GROWING), tmp_path, progress=False)
    grown = dataclasses.replace(MODEL, layers=3, width=32, heads=4)
    assert result.model.config == grown
    loaded = checkpoint.load_model(tmp_path, backend="reference")
    assert loaded.config == grown
    tokens = torch.randint(256, (1, 20))
    with torch.no_grad():
        assert torch.equal(loaded(tokens), result.model(tokens))


def test_a_run_grows_where_it_says_without_a_jump(text):
    ran = Run(make_config(text, model=dataclasses.replace(MODEL, dropout=0.0), **GROWING))
    lines, sizes = [], []
    ran.on_change = lines.append
    for _ in range(12):
        before = ran.validate().perplexity
        rate = ran.optimizer.param_groups[0]["lr"]
        ran._grow()
        assert ran.validate().perplexity == pytest.approx(before, rel=1e-4)
        assert ran.optimizer.param_groups[0]["lr"] == rate
        sizes.append((ran.model.config.layers, ran.model.config.width))
        ran.advance()
    assert sizes == [(2, 16)] * 3 + [(3, 16)] * 3 + [(3, 32)] * 6
    assert [line.partition(",")[0] for line in lines] == [
        "step 3: 3 layers of width 16", "step 6: 3 layers of width 32"]


@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_run_that_is_interrupted_goes_on_to_the_bit(text, tmp_path, step):
    """Just before it grows, between two growths, and after the last."""
    about = assert_goes_on_to_the_bit(make_config(text, layer_decay=0.9, **GROWING), tmp_path, step=step)
    assert about["model_config"]["width"] == 32 and about["train_config"]["model"]["width"] == 16


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"grow_at": (0.5,)}, "grow_at needs"), ({"grow_at": (1.0,), "grow_layers": (3,)}, "grow_at must"),
        ({"grow_layers": (3,)}, "grow_layers must be one number for each of the 0"),
        ({"grow_at": (0.5,), "grow_layers": (1,)}, "the model cannot grow at 0.5 of the budget: layers must"),
        ({"grow_at": (0.2, 0.5), "grow_width": (32, 48)}, "the model cannot grow at 0.5 of the budget: width must"),
        ({"grow_at": (0.5,), "grow_width": (32.0,)}, "grow_width must be integers"),
        ({"grow_at": (0.5,), "grow_layers": (3,), "coherence_every": 2}, "grow_layers takes no coherence_every"),
        ({"grow_at": (0.5,), "grow_layers": (3,), "initial": "x", "keep_zeros": True}, "grow_at takes no keep_zeros"),
    ],
)
def test_a_wrong_field_is_named(text, changes, said):
    with pytest.raises((TypeError, ValueError), match=f"^{said}"):
        make_config(text, **changes)


def test_options_reach_the_run(text, tmp_path, capsys):
    tiny = tiny_options(text, tmp_path)
    chosen = ["--grow-at", 0.5, "--grow-layers", 3, "--grow-width", 32]
    assert run("train", "--steps", 4, *tiny, *chosen) == 0
    assert "step 2: 3 layers of width 32" in capsys.readouterr().err
    assert run("generate", "--checkpoint", tmp_path, "--prompt", "a", "--bytes", 2, "--backend", "reference") == 0
    capsys.readouterr()
    assert "width" in fails_in_one_line(capsys, "train", "--steps", 4, *tiny, "--overwrite", *chosen[:-1], 40)
    assert run("train", "--help") == 0
    shown = capsys.readouterr().out
    assert all(f"  {flag} " in shown for flag in chosen[::2])
