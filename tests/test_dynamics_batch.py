"""Dynamic training: the gradient noise scale, and the batch that grows to it."""

import math

import pytest
import torch
from dynamics_runs import MODEL, STEPS, assert_goes_on_to_the_bit, make_config, tiny_options, write_text
from model_runs import fails_in_one_line, run
from torch import nn

from torus_model import TorusLM, checkpoint
from torus_model.batch_size import GradientNoise, GrowingBatch
from torus_model.data import IGNORED
from torus_model.run import Run, training_step


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture
def noisy(monkeypatch):
    """Noise a hundred times as strong as that of a tiny model's first steps, which a batch of one would do for."""
    scale = GradientNoise.scale.fget
    monkeypatch.setattr(GradientNoise, "scale", property(lambda self: 100 * scale(self)))


@pytest.mark.parametrize(("part", "whole"), [(1, 2), (2, 8), (3, 4)])
def test_expected_norms_give_the_exact_noise_scale(part, whole):
    """E |g_B|^2 = |G|^2 + tr(Sigma) / B, here with |G|^2 = 0.5 and tr(Sigma) = 6."""
    noise = GradientNoise(0.9)
    for _ in range(3):
        noise.observe(0.5 + 6 / part, 0.5 + 6 / whole, part, whole)
    assert noise.scale == pytest.approx(12)


def test_the_estimate_finds_the_noise_of_random_gradients():
    """Gradients of mean m and covariance of trace s: the ratio of averages over n steps is within a few parts in
    sqrt(n)."""
    generator = torch.Generator().manual_seed(0)
    noise, mean = GradientNoise(0.999), torch.full((1000,), 0.02)
    for _ in range(2000):
        samples = mean + 0.1 * torch.randn(8, 1000, generator=generator)
        noise.observe(float(samples[:2].mean(0).square().sum()), float(samples.mean(0).square().sum()), 2, 8)
    assert noise.scale == pytest.approx(1000 * 0.1**2 / (1000 * 0.02**2), rel=5 / math.sqrt(2000))


def test_a_gradient_lost_in_noise_has_no_scale():
    noise = GradientNoise(0.0)
    noise.observe(4.0, 1.0, 1, 2)
    assert noise.scale == math.inf
    noise.observe(1.0, 4.0, 1, 2)
    assert noise.scale == 0


def test_the_batch_follows_the_scale_in_parts_and_at_most_doubles():
    batch = GrowingBatch(4, 2, 14, 0.5)
    sizes = []
    for scale in (3.0, 100.0, 100.0, 100.0, 100.0, 5.0, 13.0, 13.0, 100.0, 100.0):
        batch.noise.observe(1 + scale, 1 + scale / batch.size, 1, batch.size)  # tr(Sigma) = scale, |G|^2 = 1
        batch.noise._trace = scale * batch.noise._squared_norm  # no average: the latest one
        batch.grow()
        sizes.append(batch.size)
    assert sizes == [4, 8, 8, 14, 14, 14, 14, 14, 14, 14]


def test_the_batch_stays_below_a_small_scale():
    batch = GrowingBatch(4, 2, 64, 0.0)
    for _ in range(5):
        batch.noise.observe(1 + 7.9 / 2, 1 + 7.9 / batch.size, 2, batch.size)
        batch.grow()
    assert batch.size == 6


def norms(parts, ignored):
    """What the noise scale is told in a step, and what plain gradients say."""
    torch.manual_seed(0)
    model = TorusLM(MODEL, backend="reference").double().eval()
    tokens = torch.randint(256, (4, 25))
    targets = tokens[:, 1:].clone()
    targets[0, :ignored] = IGNORED
    seen = []

    class Recorder(GradientNoise):
        def observe(self, *told):
            seen.append(told)

    def squared_norm(chosen):
        model.zero_grad()
        model.loss(tokens[chosen, :-1], targets[chosen]).backward()
        return float(nn.utils.get_total_norm([p.grad for p in model.parameters()])) ** 2

    wanted = squared_norm(slice(0, 4 // parts)), squared_norm(slice(None))
    training_step(model, torch.optim.SGD(model.parameters(), lr=0.0), tokens[:, :-1], targets, clip=1e-3,
                  accumulate=parts, noise=Recorder(0.0))
    return seen, wanted


@pytest.mark.parametrize("ignored", [0, 20])
def test_a_step_measures_the_norms_before_clipping(ignored):
    [(of_part, of_all, part, whole)], wanted = norms(2, ignored)
    assert (part, whole) == (2, 4)
    # Sums over tens of thousands of gradients in float64, in another order.
    assert (of_part, of_all) == pytest.approx(wanted, rel=1e-10)


def test_a_run_grows_its_batch_and_counts_its_tokens(text, noisy):
    ran = Run(make_config(text, accumulate=2, max_batch_size=16, noise_smoothing=0.5))
    lines = []
    ran.on_change = lines.append
    for _ in range(STEPS):
        ran.advance()
    sizes = ran.history.batch_sizes
    assert sizes[0] == 4 and sizes[-1] > 4 and sizes == sorted(sizes) and all(size % 2 == 0 for size in sizes)
    assert ran.validate().tokens == 24 * sum(sizes)
    assert len(ran.history.noise_scales) == STEPS
    assert len(lines) == len(set(sizes)) - 1 and "sequences per step" in lines[0]


def test_without_a_maximum_the_batch_keeps_its_size(text):
    ran = Run(make_config(text, accumulate=2))
    for _ in range(3):
        ran.advance()
    assert ran.history.batch_sizes == [4] * 3 and ran.history.noise_scales == []


def test_a_run_that_is_interrupted_goes_on_to_the_bit(text, tmp_path, noisy):
    config = make_config(text, accumulate=2, max_batch_size=32, noise_smoothing=0.75)
    sizes = assert_goes_on_to_the_bit(config, tmp_path, step=6)["history"]["batch_sizes"]
    assert sizes[5] > sizes[0] and sizes[-1] > sizes[5]


def test_a_history_without_sizes_is_one_of_constant_sizes(text, tmp_path):
    ran = Run(make_config(text))
    for _ in range(2):
        ran.advance()
    ran.save(tmp_path / checkpoint.FILE_NAME)
    tensors, metadata = checkpoint.load(tmp_path)
    for name in ("batch_sizes", "seq_lens", "noise_scales"):
        del metadata["history"][name]
    for name in ("max_batch_size", "curriculum", "grow_at", "alpha_schedule", "schedule", "layer_decay"):
        del metadata["train_config"][name]
    del metadata["dynamics"], metadata["model_config"]["scheduled_alpha"]
    checkpoint.save(tmp_path / checkpoint.FILE_NAME, tensors, metadata)
    again = Run(make_config(text))
    again.restore(tmp_path / checkpoint.FILE_NAME)
    assert (again.tokens, again.history) == (ran.tokens, ran.history)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_batch_size": 8}, "max_batch_size needs accumulate"),
        ({"max_batch_size": 9, "accumulate": 2}, "max_batch_size must be a multiple of batch_size / accumulate = 2"),
        ({"max_batch_size": 2, "accumulate": 2}, "max_batch_size must"),
        ({"max_batch_size": 0, "accumulate": 2}, "max_batch_size must"),
        ({"noise_smoothing": 1}, "noise_smoothing must"),
    ],
)
def test_a_wrong_field_is_named(text, changes, said):
    with pytest.raises((TypeError, ValueError), match=f"^{said}"):
        make_config(text, **changes)


def test_options_reach_the_run(text, tmp_path, capsys):
    tiny = tiny_options(text, tmp_path)
    chosen = ["--max-batch-size", 8, "--noise-smoothing", 0.0]
    assert run("train", "--steps", 4, *tiny, "--accumulate", 2, *chosen) == 0
    found = checkpoint.load_metadata(tmp_path)
    assert found["train_config"]["max_batch_size"] == 8 and len(found["history"]["noise_scales"]) == 4
    capsys.readouterr()
    assert "accumulate" in fails_in_one_line(capsys, "train", "--steps", 4, *tiny, "--overwrite", *chosen)
    assert run("train", "--help") == 0
    shown = capsys.readouterr().out
    assert all(f"  {flag} " in shown for flag in chosen[::2])
