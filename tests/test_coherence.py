"""Cognitive coherence: what it counts, its extremes, and its formulas against the attention itself."""

import math

import pytest
import torch

from torus_kernels import Stream, TorusLattice, torus_attention_with_stats
from torus_model.coherence import Coherence, VisibleKeys, alpha_factor, measure, visible_keys
from torus_model.coherence_tracking import RATE, CoherenceTracker

CAUSAL = TorusLattice(5, 4, "causal", winding=3, cross_radius=(1, 2))
LATTICES = {
    "causal": (CAUSAL, 11),
    "past the window": (CAUSAL, 50),
    "few streams": (TorusLattice(5, 4, "causal", streams=("minor_forward", "spiral_cw")), 30),
    "periodic": (TorusLattice(6, 4, winding=2, cross_radius=(1, 2)), 24),
    "cylinder": (TorusLattice(5, 6, "cylinder", cross_radius=(2, 1)), 30),
}
HEADS, HEAD_DIM = 2, 8
ROUNDING = 32 * torch.finfo(torch.float32).eps
"""Entropies are float32 sums over a few dozen keys, of logarithms below 4."""


def geometry(lattice, seq_len, first_key=None):
    """``[8, B, T, T]``: who sees whom through each stream."""
    streams = [lattice.stream_geometry(s, seq_len)[0] & (s in lattice.streams) for s in Stream]
    visible = torch.stack(streams)[:, None]
    if first_key is not None:
        t = torch.arange(seq_len)
        visible = visible & (t >= torch.minimum(first_key, t)[..., None])
    return visible


@pytest.mark.parametrize("name", LATTICES)
def test_visible_keys_are_those_of_the_lattice(name):
    lattice, seq_len = LATTICES[name]
    found, wanted = visible_keys(lattice, seq_len), geometry(lattice, seq_len)
    assert torch.equal(found.streams.expand(1, -1, -1), wanted.sum(-1).permute(1, 2, 0))
    assert torch.equal(found.together.expand(1, -1), wanted.any(0).sum(-1))


def test_a_first_key_hides_keys():
    first_key = torch.tensor([[0] * 9 + [9] * 21, [4] * 12 + [12] * 8 + [99] * 10])
    found, wanted = visible_keys(CAUSAL, 30, first_key), geometry(CAUSAL, 30, first_key)
    assert torch.equal(found.streams, wanted.sum(-1).permute(1, 2, 0))
    assert torch.equal(found.together, wanted.any(0).sum(-1))
    assert (found.streams[:, 12] == 1).any() and (found.together[1, 20:] == 1).all()
    with pytest.raises(ValueError, match="first_key belongs to the causal topology"):
        visible_keys(TorusLattice(2, 2), 4, torch.zeros(1, 4, dtype=torch.int64))


def attend(lattice, seq_len, sharpness, weights, first_key=None, decay=0.0):
    """Queries whose softmaxes are uniform at sharpness 0 and nearly one-hot at a large one; statistics of them all."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, seq_len, HEAD_DIM, generator=generator) for _ in range(3))
    _, stats = torus_attention_with_stats(
        sharpness * q, k, v, lattice, stream_weights=weights, decay=torch.full((HEADS, 8), decay), first_key=first_key,
        backend="reference",
    )
    return stats, q.double(), k.double()


def one_stream(stream):
    return torch.eye(8)[stream].expand(HEADS, 8)


EQUAL = torch.full((HEADS, 8), 1 / 8)


@pytest.mark.parametrize("name", LATTICES)
def test_uniform_attention(name):
    lattice, seq_len = LATTICES[name]
    weights = torch.tensor([(s in lattice.streams) / len(lattice.streams) for s in Stream]).expand(HEADS, 8)
    stats, _, _ = attend(lattice, seq_len, 0.0, weights)
    found = measure(stats.entropy, weights, visible_keys(lattice, seq_len))
    assert found.comprehensibility == pytest.approx(0, abs=ROUNDING)
    assert found.manageability == pytest.approx(1, abs=ROUNDING)
    assert found.cohesion == pytest.approx(1, abs=ROUNDING)
    chooses = (geometry(lattice, seq_len).sum(-1) > 1).any(-1)[:, 0]  # early in a text not all streams do
    assert torch.equal(found.aligned, chooses[:, None] & chooses) and chooses.sum() >= len(lattice.streams) - 1
    torch.testing.assert_close(found.alignment, found.aligned.double(), rtol=0, atol=ROUNDING)


def test_one_uniform_stream_alone_has_no_meaning():
    lattice = TorusLattice(5, 4, "causal", streams=("minor_forward",))
    stats, _, _ = attend(lattice, 30, 0.0, one_stream(2))
    found = measure(stats.entropy, one_stream(2), visible_keys(lattice, 30))
    assert found.meaningfulness == pytest.approx(0, abs=ROUNDING)
    assert found.score == pytest.approx(0.25, abs=ROUNDING)
    assert found.cohesion == 1, "a stream without another one"


def test_one_hot_attention():
    weights = one_stream(Stream.spiral_cw)
    stats, _, _ = attend(CAUSAL, 50, 1e6, weights)
    found = measure(stats.entropy, weights, visible_keys(CAUSAL, 50))
    assert found.comprehensibility == pytest.approx(1, abs=ROUNDING)
    assert found.manageability == pytest.approx(0, abs=ROUNDING)
    assert found.meaningfulness == pytest.approx(1, abs=ROUNDING)
    assert found.cohesion == pytest.approx(1, abs=ROUNDING)


def test_opposite_streams_are_not_aligned_and_weights_choose_whose_entropy_counts():
    visible = VisibleKeys(torch.full((1, 3, 8), 5), torch.full((1, 3), 20))
    entropy = torch.zeros(1, HEADS, 3, 8)
    entropy[..., 4:] = math.log(5)
    one_hot, uniform = (measure(entropy, one_stream(s), visible) for s in (0, 7))
    assert (one_hot.comprehensibility, one_hot.manageability) == (1, 0)
    assert (uniform.comprehensibility, uniform.manageability) == pytest.approx((0, 1), abs=ROUNDING)
    torch.testing.assert_close(one_hot.alignment[:4, 4:], torch.zeros(4, 4).double(), rtol=0, atol=ROUNDING)
    assert (one_hot.alignment[:4, :4] == 1).all()
    # 12 of the 28 pairs are of the same kind.
    assert one_hot.cohesion == pytest.approx(12 / 28, abs=ROUNDING)


def plain(entropy, weights, keys, together):
    """The formulas, a row and a pair at a time; ``weights [B, H, T, 8]``."""
    sums = {name: [0.0, 0.0] for name in ("comprehensibility", "manageability", "meaningfulness")}
    pairs = {}
    batch, heads, seq_len, _ = entropy.shape

    def add(name, value, weight):
        sums[name][0] += weight * value
        sums[name][1] += weight

    for b in range(batch):
        for h in range(heads):
            for t in range(seq_len):
                e, w = entropy[b, h, t].tolist(), weights[b, h, t].tolist()
                n = keys[b % len(keys), t].tolist()
                even = {s: e[s] / math.log(n[s]) for s in range(8) if n[s] > 1}
                for s, x in even.items():
                    add("comprehensibility", 1 - x, w[s])
                    add("manageability", (math.exp(e[s]) - 1) / (n[s] - 1), w[s])
                    for other, y in even.items():
                        pairs.setdefault((s, other), []).append(1 - abs(x - y))
                if (all_keys := together[b % len(keys), t].item()) > 1:
                    joint = sum(w[s] * (e[s] - math.log(w[s])) for s in range(8) if w[s] > 0)
                    add("meaningfulness", 1 - min(1, joint / math.log(all_keys)), 1)
    return {name: total / weight for name, (total, weight) in sums.items()}, pairs


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_measures_are_their_formulas(gated, packed):
    first_key = torch.tensor([[0] * 30, [0] * 13 + [13] * 17]) if packed else None
    shape = (2, HEADS, 30, 8) if gated else (HEADS, 8)
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1)).softmax(-1)
    stats, _, _ = attend(CAUSAL, 30, 1.5, weights, first_key, decay=1.0)
    visible = visible_keys(CAUSAL, 30, first_key)
    found = measure(stats.entropy, weights, visible)
    wanted, pairs = plain(stats.entropy, weights.expand(2, HEADS, 30, 8) if gated else
                          weights[None, :, None].expand(2, -1, 30, -1), *visible)
    for name, value in wanted.items():
        assert 0 < value < 1
        assert getattr(found, name) == pytest.approx(value, abs=ROUNDING), name
    for (s, other), values in pairs.items():
        assert found.alignment[s, other].item() == pytest.approx(sum(values) / len(values), abs=ROUNDING)
    assert torch.equal(found.alignment, found.alignment.mT)
    different = [value for (s, other), values in pairs.items() if s != other for value in [sum(values) / len(values)]]
    assert found.cohesion == pytest.approx(sum(different) / len(different), abs=ROUNDING)
    assert found.score == pytest.approx(
        0.25 * wanted["comprehensibility"] + 0.25 * wanted["manageability"] + 0.5 * wanted["meaningfulness"],
        abs=ROUNDING,
    )


@pytest.mark.parametrize("weights", [EQUAL, one_stream(6)], ids=["mixed", "one stream"])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 30.0])
def test_meaningfulness_bounds_the_concentration_of_the_mixture(weights, sharpness):
    lattice, seq_len = LATTICES["past the window"]
    stats, q, k = attend(lattice, seq_len, sharpness, weights)
    visible = geometry(lattice, seq_len)  # [8, 1, T, T]
    scores = (sharpness * q @ k.mT * HEAD_DIM**-0.5)[None].masked_fill(~visible[:, :, None], -torch.inf)
    mixture = (weights.double().T[:, None, :, None, None] * scores.softmax(-1)).sum(0)  # [B, H, T, T]
    keys = visible.any(0).sum(-1).double()[0]  # [T]
    concentration = 1 - torch.special.entr(mixture).sum(-1)[..., keys > 1] / keys[keys > 1].log()
    found = measure(stats.entropy, weights, visible_keys(lattice, seq_len)).meaningfulness
    assert found <= concentration.mean().item() + ROUNDING
    if weights is not EQUAL:
        assert found == pytest.approx(concentration.mean().item(), abs=ROUNDING)


def test_streams_left_out_do_not_count_whatever_their_statistics():
    lattice, seq_len = LATTICES["few streams"]
    weights = torch.tensor([(s in lattice.streams) / 2 for s in Stream]).expand(HEADS, 8)
    stats, _, _ = attend(lattice, seq_len, 1.0, weights)
    assert (stats.lse[..., 0] == -torch.inf).all()
    found = measure(stats.entropy, weights, visible_keys(lattice, seq_len))
    everyone = TorusLattice(5, 4, "causal")
    of_all, _, _ = attend(everyone, seq_len, 1.0, weights)
    same = measure(of_all.entropy, weights, visible_keys(everyone, seq_len))
    assert found.comprehensibility == pytest.approx(same.comprehensibility, abs=ROUNDING)
    assert found.manageability == pytest.approx(same.manageability, abs=ROUNDING)
    assert found.cohesion == pytest.approx(found.alignment[2, 4].item()) and found.cohesion != same.cohesion


def test_a_single_token_has_no_choice():
    stats, _, _ = attend(CAUSAL, 1, 1.0, EQUAL)
    found = measure(stats.entropy, EQUAL, visible_keys(CAUSAL, 1))
    assert (found.comprehensibility, found.manageability, found.meaningfulness, found.cohesion) == (1, 1, 1, 1)
    assert not found.aligned.any() and (found.alignment == 0).all()


@pytest.mark.parametrize("score, cohesion, factor", [(0, 0, 0.5), (0, 1, 0.5), (1, 0, 0.8), (1, 1, 1.0),
                                                     (0.5, 0.5, 0.7)])
def test_the_factor_of_alpha(score, cohesion, factor):
    assert alpha_factor(score, cohesion) == pytest.approx(factor)


def some(value, aligned=True):
    return Coherence(value, value, value, torch.full((8, 8), value).double(), torch.full((8, 8), aligned))


def test_averages_start_from_the_first_measurement_and_move_by_the_rate():
    tracker = CoherenceTracker(2)
    tracker.update([some(0.8), some(0.2, aligned=False)])
    assert [layer.score for layer in tracker.layers()] == pytest.approx([0.8, 0.2])
    assert [layer.cohesion for layer in tracker.layers()] == pytest.approx([0.8, 1.0])
    tracker.update([some(0.4), some(0.4)])
    tracker.update([some(0.0, aligned=False), some(0.2)])
    scores = [(0.8 + (0.4 - 0.8) * RATE) * (1 - RATE), 0.2 + 0.2 * RATE * (1 - RATE)]
    assert [layer.score for layer in tracker.layers()] == pytest.approx(scores)
    # A measurement without the pair leaves its average; the first one with it is taken as it is.
    alignments = [0.8 + (0.4 - 0.8) * RATE, 0.4 + (0.2 - 0.4) * RATE]
    assert [layer.cohesion for layer in tracker.layers()] == pytest.approx(alignments)
    other = CoherenceTracker(2)
    other.load(tracker.checkpoint_tensors())
    assert all(torch.equal(x, y) for x, y in zip(other.buffers(), tracker.buffers(), strict=True))
