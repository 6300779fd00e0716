"""The dense language model that the torus is compared with."""

import dataclasses

import pytest
import torch
from tiny_models import LANGUAGE

from torus_model.dense import DenseLM, dense_config, number_of_parameters
from torus_model.lm import ModelConfig, TorusLM

CONFIG = dataclasses.replace(LANGUAGE, kv_heads=None)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DenseLM(CONFIG)


def test_no_logit_depends_on_a_later_token(model):
    tokens = torch.randint(CONFIG.vocab_size, (2, 40))
    changed = tokens.clone()
    changed[:, 25:] = (changed[:, 25:] + 1) % CONFIG.vocab_size
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.allclose(before[:, 25:], after[:, 25:])


def test_the_first_token_is_seen_from_far_beyond_the_window_of_the_torus(model):
    assert CONFIG.lattice.num_sites < 40
    tokens = torch.randint(CONFIG.vocab_size, (1, 40))
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % CONFIG.vocab_size
    assert not torch.equal(model(tokens)[:, -1], model(other)[:, -1])


@pytest.mark.parametrize("config", [
    ModelConfig(), ModelConfig(width=64, heads=2), ModelConfig(width=64, heads=2, token_gated=False),
    ModelConfig(width=128, layers=2, heads=8, compounding=False, streams=("minor_forward", "major_forward")),
])
def test_parameters_are_equal_within_one_percent(config):
    dense, torus = DenseLM(dense_config(config)), TorusLM(config)
    assert abs(number_of_parameters(dense) - number_of_parameters(torus)) <= 0.01 * number_of_parameters(torus)


def test_weights_begin_alike():
    torus, dense = TorusLM(CONFIG), DenseLM(CONFIG)
    pairs = [(torus.embedding, dense.embedding)]
    for ours, theirs in zip(torus.blocks, dense.blocks, strict=True):
        pairs += [(getattr(ours.attention, name), getattr(theirs.attention, name)) for name in ("q_proj", "out_proj")]
        pairs += [(ours.ff[i], theirs.ff[i]) for i in (0, 2)]
    for ours, theirs in pairs:
        # The standard deviation of n normal numbers is off by 1 / sqrt(2n) of itself; two of them, five times that.
        tolerance = 5 * (1 / ours.weight.numel()) ** 0.5
        assert ours.weight.std().item() == pytest.approx(theirs.weight.std().item(), rel=tolerance)


def test_documents_are_not_packed(model):
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="first_key"):
        model.loss(tokens, tokens, first_key=tokens)


def test_without_compounding_no_layer_has_a_state():
    torch.manual_seed(0)
    with_ema = TorusLM(CONFIG)
    without = TorusLM(dataclasses.replace(CONFIG, compounding=False))
    assert [block.attention.compounding for block in with_ema.blocks] == [False, True]
    assert [block.attention.compounding for block in without.blocks] == [False, False]
    without.load_state_dict({n: x for n, x in with_ema.state_dict().items() if not n.endswith("raw_alpha")})
    tokens = torch.randint(CONFIG.vocab_size, (1, 20))
    assert not torch.allclose(with_ema(tokens), without(tokens))
