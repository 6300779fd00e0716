"""Models of fields: no place on the grid is special to a `TorusField`, and what every `FieldModel` promises."""

import pytest
import torch
from conftest import require_backend
from fields import disturbed_model, rule_model
from support import assert_same_up_to_rounding, assert_within_budget
from torch import nn

from torus_model.field import FieldConfig, TorusField

SMALL = {"width": 16, "layers": 2, "heads": 2, "cross_radius": (1, 2), "history": 2}
CONFIGS = {
    "points": FieldConfig(grid=(6, 4), patch=1, winding=2, **SMALL),
    "channels": FieldConfig(grid=(8, 8), patch=2, channels=3, static_channels=2, **SMALL),
    "rectangle": FieldConfig(grid=(8, 16), patch=4, channels=2, winding=2, **SMALL),
    "history": FieldConfig(grid=(8, 8), patch=2, **SMALL | {"history": 5}),
    "one frame": FieldConfig(grid=(6, 12), patch=2, static_channels=1, winding=2, **SMALL | {"history": 1}),
    "weights per head": FieldConfig(grid=(8, 8), patch=2, token_gated=False, **SMALL),
    "three layers": FieldConfig(grid=(10, 10), patch=2, winding=3, **SMALL | {"layers": 3}),
}
CYLINDERS = {
    "points": FieldConfig(grid=(5, 6), patch=1, topology="cylinder", **SMALL),
    "patches": FieldConfig(grid=(8, 12), patch=2, topology="cylinder", channels=2, static_channels=1, **SMALL),
}


def inputs_of(config, dtype=torch.float64, batch=2):
    random = torch.Generator().manual_seed(1)
    frames = torch.randn(batch, config.history, config.channels, *config.grid, generator=random, dtype=torch.float64)
    static = torch.randn(batch, config.static_channels, *config.grid, generator=random, dtype=torch.float64)
    return frames.to(dtype), static.to(dtype) if config.static_channels else None


def exact_model(config):
    model = disturbed_model(config)
    model.set_scales(*inputs_of(config))
    return model


def roll(x, shifts):
    return None if x is None else x.roll(shifts, (-2, -1))


def predictions(model, config, shifts):
    """``predict(roll(x))`` and ``roll(predict(x))``."""
    frames, static = inputs_of(config)
    with torch.no_grad():
        return model(roll(frames, shifts), roll(static, shifts)), roll(model(frames, static), shifts)


def differs(pair):
    return (pair[0] - pair[1]).abs().max() > 1e-3 * pair[1].abs().max()


@pytest.mark.parametrize("patches", [(1, 0), (0, 1), (2, -1)])
@pytest.mark.parametrize("name", CONFIGS)
def test_rolling_the_input_by_whole_patches_rolls_the_output(name, patches):
    config = CONFIGS[name]
    shifts = tuple(n * config.patch for n in patches)
    assert_same_up_to_rounding(*predictions(exact_model(config), config, shifts))


@pytest.mark.parametrize("patches", [1, 2, -1])
@pytest.mark.parametrize("name", CYLINDERS)
def test_rolling_around_the_cylinder_rolls_the_output(name, patches):
    config = CYLINDERS[name]
    assert_same_up_to_rounding(*predictions(exact_model(config), config, (0, patches * config.patch)))


@pytest.mark.parametrize("name", CYLINDERS)
def test_ends_of_the_cylinder_stay_where_they_are(name):
    config = CYLINDERS[name]
    assert differs(predictions(exact_model(config), config, (config.patch, 0)))


@pytest.mark.parametrize("shifts", [(1, 0), (0, 1)])
def test_rolling_by_parts_of_a_patch_is_another_problem(shifts):
    config = CONFIGS["channels"]
    assert differs(predictions(exact_model(config), config, shifts))


class AbsolutePositions(nn.Module):
    """A block that a lattice must not have: it adds something else at every site."""

    def forward(self, x, state):
        return x + torch.linspace(0, 1, x.shape[1], dtype=x.dtype)[:, None], state


def test_model_with_absolute_positions_is_found_out():
    config = CONFIGS["channels"]
    model = exact_model(config)
    model.network.blocks.insert(0, AbsolutePositions())
    assert differs(predictions(model, config, (config.patch, 0)))


def test_static_fields_must_be_rolled_too():
    config = CONFIGS["channels"]
    model, (frames, static) = exact_model(config), inputs_of(config)
    shifts = (config.patch, 0)
    with torch.no_grad():
        assert differs((model(roll(frames, shifts), static), roll(model(frames, static), shifts)))


@pytest.mark.parametrize("config", [CONFIGS["rectangle"], CYLINDERS["patches"]], ids=["periodic", "cylinder"])
def test_backends_agree_in_output_and_gradients(config):
    backend = require_backend("cpu")
    backend.require(config.lattice)
    frames, static = inputs_of(config)

    def evaluate(name, dtype):
        model = disturbed_model(config, name, dtype)
        out = model(frames.to(dtype), None if static is None else static.to(dtype))
        out.square().mean().backward()
        return {"out": out.detach(), **{n: p.grad for n, p in model.named_parameters()}}

    assert_within_budget(
        evaluate("cpu", torch.float32), evaluate("reference", torch.float64), evaluate("reference", torch.float32)
    )


def test_patches_become_points_where_they_came_from():
    """Without attention, a change of one point of one channel changes the points of its own patch and no others."""
    config = CONFIGS["rectangle"]
    model = exact_model(config)
    model.network.blocks = nn.ModuleList()
    frames, _ = inputs_of(config, batch=1)
    with torch.no_grad():
        before = model(frames)
        frames[0, 0, 1, 5, 14] += 1.0
        changed = (model(frames) != before).all(1)[0]
    expected = torch.zeros(config.grid, dtype=torch.bool)
    expected[4:8, 12:16] = True
    assert torch.equal(changed, expected)


def test_untrained_model_predicts_that_nothing_changes():
    config = CONFIGS["channels"]
    frames, static = inputs_of(config, torch.float32)
    assert torch.equal(TorusField(config, backend="reference")(frames, static), frames[:, -1])


def test_units_of_the_data_do_not_matter():
    config = CONFIGS["channels"]
    frames, static = inputs_of(config)
    model, other = exact_model(config), exact_model(config)
    units = torch.tensor([1e-3, 1.0, 50.0], dtype=torch.float64)[:, None, None]
    other.set_scales(units * frames, 7.0 * static)
    with torch.no_grad():
        assert_same_up_to_rounding(other(units * frames, 7.0 * static) / units, model(frames, static))


def test_scale_is_the_root_mean_square_of_a_channel():
    config = FieldConfig(grid=(2, 2), channels=3, static_channels=1, patch=1, width=8, heads=1)
    frames = torch.tensor([3.0, 4.0, 0.0])[:, None, None].expand(5, 3, 2, 2).clone()
    frames[:, 0, 0] = -1.0
    model = rule_model(config, torch.zeros_like)
    model.set_scales(frames, torch.full((1, 1, 2, 2), -2.0))
    assert model.frame_scale.tolist() == pytest.approx([5**0.5, 4.0, 1.0])  # 1 where a channel is zero
    assert model.static_scale.tolist() == [2.0]


def test_rollout_feeds_predictions_back():
    config = CONFIGS["channels"]
    model, (frames, static) = exact_model(config), inputs_of(config)
    with torch.no_grad():
        rollout = model.rollout(frames, 3, static)
        for step in range(3):
            following = model(frames, static)
            assert torch.equal(rollout[:, step], following)
            frames = torch.cat((frames[:, 1:], following[:, None]), 1)


@pytest.mark.parametrize(
    ("frames", "static", "name"),
    [
        ((2, 3, 3, 8, 8), (2, 2, 8, 8), "frames"), ((2, 2, 3, 8, 4), (2, 2, 8, 8), "frames"),
        ((2, 3, 8, 8), (2, 2, 8, 8), "frames"), ((2, 2, 3, 8, 8), None, "static"),
        ((2, 2, 3, 8, 8), (2, 1, 8, 8), "static"),
    ],
)
def test_wrong_shapes_are_named(frames, static, name):
    model = TorusField(CONFIGS["channels"], backend="reference")
    with pytest.raises(ValueError, match=name):
        model(torch.zeros(frames), None if static is None else torch.zeros(static))
    with pytest.raises(ValueError, match="no static channels"):
        TorusField(CONFIGS["history"], backend="reference")(torch.zeros(2, 5, 1, 8, 8), torch.zeros(1, 1, 8, 8))
