"""Scores of field models, against models whose errors are known, and the pictures of them."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from fields import disturbed_model, rule_model, travelling_waves
from matplotlib.axes import Axes
from PIL import Image

from torus_model.attention import TorusAttention
from torus_model.field import FieldConfig, build_model
from torus_model.field.data import FieldData, FieldDataError, Windows
from torus_model.field.evaluate import (
    equivariance_error,
    evaluate,
    one_step_error,
    seam_deviation,
    seam_mask,
    seam_ratio,
)
from torus_model.field.losses import relative_l2
from torus_model.field.pictures import write_animation, write_error_maps, write_errors_over_time, write_rollout

CONFIG = FieldConfig(grid=(8, 8), history=2, patch=2, width=16, heads=2, layers=1, cross_radius=(1, 2))


@pytest.fixture(scope="module")
def data():
    return travelling_waves(5, 6)


@pytest.fixture(scope="module")
def steps():
    """Random fields that move by one point of the second axis a frame."""
    first = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return FieldData(torch.stack([first.roll(i, -1) for i in range(6)], 1))


def relative(predicted, target):
    """The definition, written out for one sample."""
    return ((predicted - target).square().sum() / target.square().sum()).sqrt().item()


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_relative_l2_is_the_mean_over_samples_of_a_ratio_of_norms():
    target = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    predicted = torch.tensor([[[3.0, 5.0]], [[1.0, 2.0]]])
    assert relative_l2(predicted, target).item() == pytest.approx((1 / 5 + 1 / 2) / 2)
    assert relative_l2(3 * predicted, 3 * target).item() == pytest.approx((1 / 5 + 1 / 2) / 2)


@pytest.mark.parametrize(("predicted", "target"), [((2, 3), (3, 2)), ((3,), (3,)), ((0, 3), (0, 3))])
def test_relative_l2_refuses_shapes(predicted, target):
    with pytest.raises(ValueError, match="predicted and target"):
        relative_l2(torch.zeros(predicted), torch.zeros(target))


def test_true_model_has_no_error(steps):
    model = rule_model(CONFIG, lambda last: last.roll(1, -1) - last)
    scores = evaluate(model, steps)
    assert scores.one_step < 1e-6
    assert scores.rollout < 1e-6
    assert max(scores.rollout_steps) < 1e-6
    assert scores.persistence_one_step > 1
    assert scores.equivariance_points_float64 == 0.0


def test_persistence_is_the_last_frame_repeated(data):
    scores = evaluate(rule_model(CONFIG, torch.zeros_like), data)
    f = data.frames
    one_step = mean(relative(f[n, i], f[n, i + 1]) for n in range(5) for i in range(1, 5))
    rollout = mean(relative(f[n, 1:2].expand_as(f[n, 2:]), f[n, 2:]) for n in range(5))
    each = [mean(relative(f[n, 1], f[n, 2 + i]) for n in range(5)) for i in range(4)]
    assert scores.trajectories == 5
    assert scores.one_step == scores.persistence_one_step == pytest.approx(one_step, rel=1e-5)
    assert scores.rollout == scores.persistence_rollout == pytest.approx(rollout, rel=1e-5)
    assert scores.rollout_steps == scores.persistence_rollout_steps == pytest.approx(each, rel=1e-5)


def test_rollout_begins_with_the_first_frames_and_runs_to_the_end(data):
    model = disturbed_model(CONFIG, dtype=torch.float32)
    scores = evaluate(model, data)
    with torch.no_grad():
        predicted = model.rollout(data.frames[:, :2], 4)
    target = data.frames[:, 2:]
    assert scores.rollout == pytest.approx(mean(map(relative, predicted, target)), rel=1e-5)
    for step in range(4):
        expected = mean(map(relative, predicted[:, step], target[:, step]))
        assert scores.rollout_steps[step] == pytest.approx(expected, rel=1e-5)
    assert scores.rollout_steps[-1] != pytest.approx(scores.rollout_steps[0], rel=1e-2)


def test_scores_do_not_depend_on_the_batch_size(data):
    model = disturbed_model(CONFIG, dtype=torch.float32)
    together, apart = (evaluate(model, data, batch_size=n).to_dict() for n in (100, 3))
    assert one_step_error(model, data, batch_size=7) == pytest.approx(together["one_step"], rel=1e-5)
    for name, value in together.items():
        if not name.startswith("equivariance"):  # of one batch, and at rounding level
            assert apart[name] == pytest.approx(value, rel=1e-4), name


def test_evaluation_keeps_the_mode_and_drops_nothing_out(data):
    config = FieldConfig(**CONFIG.to_dict() | {"dropout": 0.5})
    model = disturbed_model(config, dtype=torch.float32).train()
    assert evaluate(model, data).one_step == evaluate(model, data).one_step == one_step_error(
        model, data, batch_size=8
    )
    assert model.training


@pytest.mark.parametrize(("topology", "seam_points"), [("periodic", 64 - 16), ("cylinder", 64 - 32)])
def test_seam_is_what_lies_within_a_patch_of_the_edges(topology, seam_points):
    config = FieldConfig(**CONFIG.to_dict() | {"topology": topology})
    mask = seam_mask(config)
    assert mask.sum() == seam_points
    assert mask[4, 1] and mask[4, 6] and not mask[4, 2] and not mask[4, 5]
    assert mask[1, 4] == mask[6, 4] == (topology == "periodic")
    assert not mask[2, 4]


@pytest.mark.parametrize("topology", ["periodic", "cylinder"])
def test_seam_ratio_is_that_of_root_mean_squares(steps, topology):
    """A model that is wrong by 3 at the seam and by 1 elsewhere, each step, on frames that do not change."""
    config = FieldConfig(**CONFIG.to_dict() | {"topology": topology})
    wrong = torch.where(seam_mask(config), 3.0, 1.0)
    frames = steps.frames[:, :1].expand(-1, 6, -1, -1, -1).contiguous()
    scores = evaluate(rule_model(config, lambda last: wrong.to(last).expand_as(last)), FieldData(frames))
    assert scores.seam_one_step == pytest.approx(3.0, rel=1e-5)
    assert scores.seam_rollout == pytest.approx(3.0, rel=1e-5)
    assert torch.allclose(scores.one_step_map, wrong.double())
    assert torch.allclose(scores.rollout_map, 4 * wrong.double())  # four steps


def test_seam_ratio_of_the_targets_is_the_control(steps):
    """Frames whose deviation from their mean is twice as large at the seam."""
    scale = torch.where(seam_mask(CONFIG), 2.0, 1.0)
    checkers = ((-1.0) ** (torch.arange(8)[:, None] + torch.arange(8))) * scale
    frames = 10 + torch.stack((checkers, -checkers)).repeat(3, 1, 1)[None, :, None]
    scores = evaluate(rule_model(CONFIG, torch.zeros_like), FieldData(frames))
    assert scores.seam_one_step_target == pytest.approx(2.0, rel=1e-4)
    assert scores.seam_rollout_target == pytest.approx(2.0, rel=1e-4)


def test_channels_count_by_their_scale(steps):
    """An error of one scale in each of two channels is as large in both, whatever their units."""
    config = FieldConfig(**CONFIG.to_dict() | {"channels": 2})
    frames = torch.cat((steps.frames, 100 * steps.frames), 2)[:, :1].expand(-1, 4, -1, -1, -1).contiguous()
    model = rule_model(config, torch.ones_like)
    model.set_scales(frames)
    assert torch.allclose(evaluate(model, FieldData(frames)).one_step_map, torch.tensor(2.0).double().sqrt())


def test_deviation_of_the_seam_ratio_is_over_all_cuts():
    config = dataclasses.replace(CONFIG, grid=(16, 16), patch=4)
    squares = torch.rand(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ratios = [seam_ratio(squares.roll((i, j), (0, 1)), config) for i in range(0, 16, 4) for j in range(0, 16, 4)]
    mean = sum(ratios) / 16
    expected = (sum((ratio - mean) ** 2 for ratio in ratios) / 16) ** 0.5
    assert seam_deviation(squares, config) == pytest.approx(expected)
    assert seam_deviation(torch.ones(16, 16), config) == pytest.approx(0.0)
    # On the cylinder the rows stay where they are.
    around = dataclasses.replace(config, topology="cylinder")
    assert seam_deviation(torch.arange(16.0)[:, None].expand(16, 16), around) == pytest.approx(0.0, abs=1e-6)
    assert seam_deviation(torch.ones(4, 4), dataclasses.replace(CONFIG, grid=(4, 4))) is None


def test_float64_scores_do_not_need_the_backend_that_was_forced(data):
    model = build_model(CONFIG)
    for module in model.modules():
        if isinstance(module, TorusAttention):
            module.backend = "reference"
    scores = evaluate(model, data)
    assert scores.equivariance_patches_float64 < 1e-9
    assert model.network.blocks[0].attention.backend == "reference"


def test_seam_ratio_needs_points_elsewhere():
    config = FieldConfig(grid=(4, 8), history=1, patch=2, width=8, heads=1, winding=2)
    assert seam_ratio(torch.ones(4, 8), config) is None


def test_equivariance_error_is_the_difference_as_a_part_of_the_change(data):
    history, static, _ = Windows(data, 2).gather(torch.arange(3))
    place = torch.arange(64.0).view(8, 8)
    model = rule_model(CONFIG, lambda last: place.to(last).expand_as(last))
    expected = ((place.roll((2, 4), (0, 1)) - place).norm() / place.norm()).item()
    assert equivariance_error(model, history, static, (2, 4)) == pytest.approx(expected, rel=1e-4)
    assert equivariance_error(model, history, static, (0, 8)) == 0.0
    still = rule_model(CONFIG, torch.zeros_like)
    assert equivariance_error(still, history, static, (2, 4)) == 0.0


def test_static_fields_are_rolled_with_the_frames():
    config = FieldConfig(**CONFIG.to_dict() | {"static_channels": 1})
    model = disturbed_model(config)
    data = travelling_waves(3, 4, static=True)
    history, static, _ = Windows(data, 2).gather(torch.arange(3))
    assert equivariance_error(model, history.double(), static.double(), (2, 4)) < 1e-13


def test_rolls_by_patches_and_by_points_are_told_apart(data):
    scores = evaluate(disturbed_model(CONFIG, dtype=torch.float32), data)
    assert scores.equivariance_patches < 1e-5
    assert scores.equivariance_patches_float64 < 1e-13
    assert scores.equivariance_points > 1e-2
    assert scores.equivariance_points_float64 > 1e-2


def test_cylinder_is_rolled_around_alone(data):
    config = FieldConfig(**CONFIG.to_dict() | {"topology": "cylinder"})
    scores = evaluate(disturbed_model(config, dtype=torch.float32), data)
    assert scores.equivariance_patches_float64 < 1e-13
    assert scores.equivariance_points > 1e-2


def test_model_that_knows_its_place_is_found_out(data):
    place = torch.linspace(0, 1, 8)[:, None].expand(8, 8)
    scores, same, other = (
        evaluate(rule_model(CONFIG, lambda last: place.to(last).expand_as(last)), data, seed=s) for s in (0, 0, 1)
    )
    assert scores.equivariance_patches > 0.1
    assert scores.equivariance_patches_float64 > 0.1
    assert scores == same
    assert scores.equivariance_patches != other.equivariance_patches


def test_data_that_does_not_fit_is_named(data):
    with pytest.raises(FieldDataError, match="grid"):
        evaluate(rule_model(CONFIG, torch.zeros_like), travelling_waves(2, 6, grid=(8, 16)))


def test_scores_are_json(data):
    scores = evaluate(rule_model(CONFIG, torch.zeros_like), data)
    written = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert written["rollout_steps"] == list(scores.rollout_steps)
    assert not any(name.endswith("_map") for name in written)


def pixels(path):
    with Image.open(path) as image:
        return torch.tensor(list(image.convert("RGB").tobytes())).view(image.height, image.width, 3)


def test_pictures_show_what_they_are_given(tmp_path, monkeypatch):
    shown = []
    imshow = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda axes, x, **kwargs: shown.append(x) or imshow(axes, x, **kwargs))
    truth, predicted = torch.rand(2, 4, 8, 8)
    for topology, row in (("periodic", 4), ("cylinder", 0)):  # the first point of a closed axis is in the middle
        shown.clear()
        write_rollout(tmp_path / "a.png", truth, predicted, [1, 3], topology)
        first = [x[row, 4].item() for x in shown]
        expected = [x[step, 0, 0].item() for step in (0, 2) for x in (truth, predicted, predicted - truth)]
        assert first == expected


def test_seam_is_marked_where_there_is_one(tmp_path):
    """Constant fields show the marks alone."""
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    constant = torch.ones(1, 8, 8)
    write_rollout(a, constant, 2 * constant, [1], "periodic")
    write_rollout(b, constant, 2 * constant, [1], "cylinder")
    assert not torch.equal(pixels(a), pixels(b))


def test_animation_has_a_frame_for_each_step(tmp_path):
    truth = torch.rand(3, 8, 8)
    write_animation(tmp_path / "a.gif", truth, 0.5 * truth, "periodic", frames_per_second=4)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 3
        assert image.info["duration"] == 250
        frames = []
        for i in range(3):
            image.seek(i)
            fields = image.crop((image.width // 10, 0, *image.size))  # without the label, which changes anyway
            frames.append(np.asarray(fields.convert("RGB"), dtype=int))
    for a, b in ((0, 1), (1, 2), (0, 2)):  # by more than palettes differ
        assert (np.abs(frames[a] - frames[b]).max(-1) > 60).mean() > 0.1


def test_curves_and_maps_are_drawn(tmp_path):
    write_errors_over_time(tmp_path / "curves.png", {"torus": [0.1, 0.2], "persistence": [0.5, 0.9]})
    write_error_maps(tmp_path / "maps.png", {"one step": torch.rand(8, 8), "end": torch.rand(8, 8)}, "cylinder")
    for name in ("curves", "maps"):
        assert pixels(tmp_path / f"{name}.png").float().std() > 1
