"""Options of the language model that the comparison on text is about: rotary positions, graded heads, the gain."""

import argparse
import dataclasses
import math

import pytest
import torch
from tiny_models import LANGUAGE

from torus_kernels import TorusLattice
from torus_model.attention import FAVOURED_LOGIT, NARROWEST_HEAD, SMALLEST_INITIAL_DECAY, TorusAttention
from torus_model.cache import LMCache
from torus_model.commands.train import add_arguments, configure
from torus_model.config import recommended_model
from torus_model.lm import ModelConfig, TorusLM
from torus_model.rotary import sequence_rope

OPTIONS = [{"rotary": "sequence"}, {"graded_heads": True}, {"qk_gain": 2.0},
           {"rotary": "sequence", "graded_heads": True, "qk_gain": 2.0, "token_gated": False}]


def model(**options) -> TorusLM:
    torch.manual_seed(0)
    return TorusLM(dataclasses.replace(LANGUAGE, **options)).eval()


def test_scores_of_sequence_rope_depend_on_the_lag_alone():
    q, k = torch.randn(2, 16, dtype=torch.float64)
    turned_q, turned_k = sequence_rope(q.expand(50, 16), k.expand(50, 16))
    for lag in (0, 1, 7):
        scores = (turned_q[lag:] * turned_k[: 50 - lag]).sum(-1)
        # An angle up to 50 is off by eps times that, each of 2 in a score, which is at most |q||k|.
        tolerance = 2 * 50 * torch.finfo(torch.float64).eps * (q.norm() * k.norm()).item()
        assert (scores - scores[0]).abs().max() <= 2 * tolerance
    assert not torch.allclose(turned_q[1], q)


def test_sequence_rope_is_that_of_the_paper():
    x = torch.randn(9, 4, dtype=torch.float64)
    turned, = sequence_rope(x, offset=5)
    for t in range(9):
        for i in (0, 1):
            angle = torch.tensor((t + 5) * 10000 ** (-2 * i / 4), dtype=torch.float64)
            pair = torch.complex(x[t, i], x[t, i + 2]) * torch.polar(torch.ones_like(angle), angle)
            assert torch.allclose(torch.stack((turned[t, i], turned[t, i + 2])), torch.view_as_real(pair))


def test_sequence_rope_stays_exact_far_from_the_beginning():
    q, k = torch.randn(2, 8, 16)
    near, far = (sequence_rope(q, k, offset=offset) for offset in (0, 10**8))
    scores, same = (turned_q @ turned_k.T for turned_q, turned_k in (near, far))
    # float32 rounding of sums of 16 products; angles are off by 10**8 eps of float64, which is less.
    tolerance = 16 * 4 * torch.finfo(torch.float32).eps * (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item()
    assert (scores - same).abs().max() <= tolerance


@pytest.mark.parametrize("options", OPTIONS)
def test_an_option_changes_the_model(options):
    tokens = torch.randint(LANGUAGE.vocab_size, (1, 20))
    plain = model(token_gated=options.get("token_gated", True))
    assert not torch.allclose(plain(tokens), model(**options)(tokens))


@pytest.mark.parametrize("options", OPTIONS)
def test_the_cache_gives_the_same_logits_far_past_the_lattice(options):
    lm = model(**options)
    tokens = torch.randint(LANGUAGE.vocab_size, (2, 5 * lm.config.lattice.num_sites))
    cache = LMCache(lm, 2)
    with torch.inference_mode():
        whole = lm(tokens)
        for t in range(tokens.shape[1]):
            logits = cache.logits(lm, tokens[:, t : t + 1])
            # What a few float32 layers of sums over at most 32 channels may differ by.
            assert torch.allclose(logits, whole[:, t], atol=2e-5, rtol=2e-5), t


def test_graded_heads_have_gaussian_windows_from_flat_to_narrow():
    attention = TorusAttention(64, 4, TorusLattice(8, 16, "causal"), token_gated=True)
    before = attention.decay().detach()
    attention.grade_heads()
    decay = attention.decay().detach()
    assert decay[0, 2].item() == pytest.approx(SMALLEST_INITIAL_DECAY)
    assert 16 / (math.pi * decay[-1, 2].sqrt().item()) == pytest.approx(NARROWEST_HEAD)
    ratios = decay[1:, 2] / decay[:-1, 2]
    assert torch.allclose(ratios, ratios[:1].expand(3))
    assert torch.equal(decay[:, [0, 1, 3, 4, 5, 6, 7]], before[:, [0, 1, 3, 4, 5, 6, 7]])
    weights = attention.stream_weights(torch.zeros(1, 1, 64))[0, :, 0]  # [H, 8]
    favoured = math.exp(FAVOURED_LOGIT) / (math.exp(FAVOURED_LOGIT) + 7)
    assert torch.allclose(weights[:, 2], torch.full((4,), favoured))


def test_heads_without_the_stream_stay_as_they_are():
    attention = TorusAttention(64, 4, TorusLattice(8, 16, "causal", streams=("major_forward", "minor_backward")))
    before = attention.decay().detach()
    attention.grade_heads()
    assert torch.equal(attention.decay(), before)


def test_configurations_without_the_options_are_those_of_before():
    fields = LANGUAGE.to_dict()
    for name in ("rotary", "graded_heads", "qk_gain", "compounding"):
        del fields[name]
    config = ModelConfig.from_dict(fields)
    assert (config.rotary, config.graded_heads, config.qk_gain, config.compounding) == ("lattice", False, 1.0, True)


@pytest.mark.parametrize(("options", "message"), [
    ({"rotary": "none"}, "rotary must be one of lattice, sequence"), ({"qk_gain": 0.0}, "qk_gain must be positive"),
])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LANGUAGE, **options)


def test_sequence_positions_are_for_the_causal_topology():
    with pytest.raises(ValueError, match="periodic topology"):
        TorusAttention(32, 2, TorusLattice(4, 4), rotary="sequence")


def test_the_command_line_sets_the_options():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = vars(parser.parse_args(["--rotary", "sequence", "--graded-heads", "--qk-gain", "2", "--no-compounding"]))
    given = {name: value for name, value in given.items() if name not in ("output", "resume", "overwrite")}
    config = configure("runs", False, given).model
    assert (config.rotary, config.graded_heads, config.qk_gain, config.compounding) == ("sequence", True, 2.0, False)


def test_the_recommended_model_has_the_lattice_of_its_context():
    config = recommended_model(ModelConfig(width=64, heads=2), 2048)
    assert (config.n_major, config.n_minor, config.width) == (32, 64, 64)
    assert (recommended_model(ModelConfig(), 4096).n_major, recommended_model(ModelConfig(), 4).n_major) == (64, 2)
    for context in (2, 100):
        with pytest.raises(ValueError, match="context must be a power of two"):
            recommended_model(ModelConfig(), context)
