"""Options of the language model's memory and positions: momentum, several time constants, sinusoids."""

import dataclasses
import json

import pytest
import torch

import torus_model.attention as attention_module
from torus_kernels import TorusLattice, torus_attention
from torus_model import ModelConfig, TorusAttention, TorusLM
from torus_model.cache import LMCache
from torus_model.compounding import (
    ALPHA_RANGE,
    BETA_RANGE,
    INITIAL_ALPHA,
    INITIAL_BETA,
    SLOWEST_INITIAL_ALPHA,
    MomentumCompounding,
    MultiscaleCompounding,
)
from torus_model.generate import beam_search, generate, generate_batch
from torus_model.positions import SinusoidalPositions, sinusoids

MODEL = ModelConfig(vocab_size=32, width=32, layers=4, heads=2, kv_heads=1, n_major=4, n_minor=6, cross_radius=(1, 2))
WINDOW = MODEL.lattice.num_sites
OPTIONS = {
    "sinusoidal": {"sinusoidal_positions": True},
    "momentum": {"ema_momentum": True},
    "three scales": {"ema_scales": 3},
    "adaptive": {"adaptive_alpha": True},
    "all": {"sinusoidal_positions": True, "ema_scales": 2, "adaptive_alpha": True},
}
PARAMETERS = {"sinusoidal": "positions.gain", "momentum": "memory.raw_beta", "three scales": "memory.scale_logits"}


@pytest.fixture(params=OPTIONS)
def options(request):
    return OPTIONS[request.param]


def make_model(options, dtype=torch.float64, **arguments):
    """A model whose logits depend strongly on the text, with all that is learned away from its start."""
    torch.manual_seed(0)
    model = TorusLM(dataclasses.replace(MODEL, **options), backend="reference", **arguments).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("stream_gate.weight", "raw_alpha", "raw_beta", "scale_logits", "raw_decay")):
                parameter.add_(torch.randn_like(parameter))
            if name == "embedding.weight":
                parameter.mul_(20)
            if name == "positions.gain":
                parameter.fill_(0.3)
            if name == "norm.weight":  # with tied embeddings a text would repeat its last token
                parameter.normal_()
        for name, buffer in model.named_buffers():
            if name.endswith("alpha_factor"):
                buffer.fill_(0.6)
    return model


def text_of(length, seed=0):
    return torch.randint(MODEL.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def test_every_option_changes_the_logits_and_off_is_the_model_without(options):
    tokens = text_of(40)[None]
    plain = make_model({})
    with torch.no_grad():
        assert not torch.equal(make_model(options)(tokens), plain(tokens))
    off = {name: type(value)(0) if isinstance(value, bool) else 1 for name, value in options.items()}
    assert make_model(off).state_dict().keys() == plain.state_dict().keys()


def test_every_option_is_learned():
    for name, parameter in PARAMETERS.items():
        model = make_model(OPTIONS[name])
        text = text_of(30)[None]
        model.loss(text[:, :-1], text[:, 1:]).backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        assert all(gradient.abs().max() > 0 for gradient in gradients.values())
        assert any(n.endswith(parameter) for n in gradients)


def test_no_logits_depend_on_later_tokens(options):
    model = make_model(options)
    tokens = text_of(40)[None]
    other = tokens.clone()
    other[:, 25:] = (other[:, 25:] + 1) % MODEL.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(other)
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.equal(before[:, 25], after[:, 25])


@pytest.mark.parametrize("prompt_length", [1, 3 * WINDOW + 5])
def test_the_cache_gives_the_logits_of_the_whole_text_far_past_the_window(options, prompt_length):
    model = make_model(options)
    text = text_of(prompt_length + 2 * WINDOW)[None]
    with torch.no_grad():
        wanted = model(text)[:, prompt_length - 1:]
    cache = LMCache(model, 1)
    got = [cache.logits(model, text[:, :prompt_length])]
    got += [cache.logits(model, text[:, t:t + 1]) for t in range(prompt_length, text.shape[1])]
    torch.testing.assert_close(torch.stack(got, 1), wanted, rtol=0, atol=1e-10 * wanted.abs().max().item())


def test_generation_is_the_same_with_and_without_cache(options):
    model = make_model(options)
    prompts = [text_of(length, seed=length) for length in (1, 5, WINDOW + 3)]
    alone = [list(generate(model, prompt, 12, temperature=0, repetition_penalty=2.0)) for prompt in prompts]
    assert all(len(set(text)) > 3 for text in alone), "texts that repeat one token would hide mistakes"
    for use_cache in (False, True):
        together = generate_batch(model, prompts, 12, temperature=0, repetition_penalty=2.0, use_cache=use_cache)
        assert [text.tolist() for text in together] == alone
    found = [beam_search(model, prompts[1], 8, beams=3, use_cache=use_cache).tolist() for use_cache in (False, True)]
    assert found[0] == found[1]


def test_documents_in_one_sequence_are_what_they_are_alone(options):
    model = make_model(options)
    first, second = text_of(17, seed=1), text_of(20, seed=2)
    first_key = torch.tensor([0] * 17 + [17] * 20)[None]
    with torch.no_grad():
        together = model(torch.cat((first, second))[None], first_key=first_key)
        alone = model(second[None])
    torch.testing.assert_close(together[:, 17:], alone, rtol=0, atol=1e-10 * alone.abs().max().item())


def test_activation_checkpointing_gives_the_same_gradients(options):
    found = []
    for again in (False, True):
        model = make_model(options, torch.float32, activation_checkpointing=again).train()
        text = text_of(30)[None]
        model.loss(text[:, :-1], text[:, 1:]).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


@pytest.mark.slow
def test_options_compile_into_one_graph(options):
    torch._dynamo.reset()
    model = make_model(options | {"layers": 2})
    tokens = text_of(30)[None]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))


@pytest.mark.parametrize("name", ["momentum", "three scales"])
def test_states_in_bfloat16_keep_their_dtypes(name):
    model = make_model(OPTIONS[name], torch.float32)
    text = text_of(30)[None]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(text[:, :-1], text[:, 1:])
    loss.backward()
    exact = model.loss(text[:, :-1], text[:, 1:])
    assert loss.item() != exact.item()
    assert loss.item() == pytest.approx(exact.item(), rel=2**-4)  # a few of bfloat16's roundings, of 2**-9 each


def attended(layers, monkeypatch):
    """What the layers attend to without compounding, their states and outputs, for tokens ``[1, 20, 32]``."""
    x, seen, states, state = torch.randn(1, 20, 32, dtype=torch.float64), [], [], None

    def watch(*arguments, **options):
        assert options.get("ema_state") is None, "compounded twice"
        seen.append(torus_attention(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(attention_module, "torus_attention", watch)
    for layer in layers:
        _, state = layer(x, state)
        states.append(state)
    return seen, states


def layers(**options):
    torch.manual_seed(0)
    lattice = TorusLattice(4, 6, "causal")
    made = [TorusAttention(32, 2, lattice, compounding=i > 0, backend="reference", **options).double()
            for i in range(4)]
    with torch.no_grad():
        for parameter in (p for layer in made for p in layer.parameters() if p.ndim <= 2 and p.shape[-1] < 32):
            parameter.add_(0.5 * torch.randn_like(parameter))
    return made


def test_momentum_is_its_formula(monkeypatch):
    made = layers(ema_momentum=True)
    seen, states = attended(made, monkeypatch)
    assert torch.equal(states[0], seen[0])
    state, velocity = seen[0], torch.zeros_like(seen[0])
    for layer, y, found in zip(made[1:], seen[1:], states[1:], strict=True):
        alpha, beta = layer.alpha()[:, None, None], layer.memory.beta()[:, None, None]
        velocity = beta * velocity + (1 - beta) * (y - state)
        state = state + alpha * velocity
        torch.testing.assert_close(found[0], state)
        torch.testing.assert_close(found[1], velocity)


def test_multiscale_is_its_formula(monkeypatch):
    made = layers(ema_scales=3)
    seen, found = attended(made, monkeypatch)
    states = [seen[0]] * 3
    for layer, y, after in zip(made[1:], seen[1:], found[1:], strict=True):
        assert layer.alpha().shape == (3, 2)
        states = [s + alpha[:, None, None] * (y - s) for s, alpha in zip(states, layer.alpha(), strict=True)]
        torch.testing.assert_close(after, torch.stack(states))
        mixed = sum(w * s for w, s in zip(layer.memory.scale_weights(), states, strict=True))
        out, _ = layer.memory(y, torch.stack(states), torch.zeros_like(layer.alpha()))  # alpha 0: states are mixed
        torch.testing.assert_close(out, mixed)


def test_initial_memory_and_its_ranges():
    momentum = TorusLM(dataclasses.replace(MODEL, ema_momentum=True)).blocks[1].attention
    torch.testing.assert_close(momentum.alpha(), torch.full((2,), INITIAL_ALPHA))
    torch.testing.assert_close(momentum.memory.beta(), torch.full((2,), INITIAL_BETA))
    scales = TorusLM(dataclasses.replace(MODEL, ema_scales=3)).blocks[1].attention
    alphas = [INITIAL_ALPHA, (INITIAL_ALPHA * SLOWEST_INITIAL_ALPHA) ** 0.5, SLOWEST_INITIAL_ALPHA]
    torch.testing.assert_close(scales.alpha(), torch.tensor(alphas)[:, None].expand(3, 2))
    torch.testing.assert_close(scales.memory.scale_weights(), torch.full((3,), 1 / 3))
    for extreme in (-1e3, 1e3):
        with torch.no_grad():
            for parameter in (scales.raw_alpha, momentum.memory.raw_beta):
                parameter.fill_(extreme)
        for value, bounds in ((scales.alpha(), ALPHA_RANGE), (momentum.memory.beta(), BETA_RANGE)):
            torch.testing.assert_close(value, torch.full_like(value, bounds[extreme > 0]))


def test_the_factor_of_an_adaptive_layer_multiplies_alpha():
    attention = TorusLM(dataclasses.replace(MODEL, adaptive_alpha=True)).blocks[1].attention
    torch.testing.assert_close(attention.alpha(), torch.full((2,), INITIAL_ALPHA))
    attention.alpha_factor.fill_(0.5)
    torch.testing.assert_close(attention.alpha(), torch.full((2,), INITIAL_ALPHA / 2))


def test_sinusoids_are_the_formula():
    positions = torch.tensor([0, 1, 7, 10**12])
    found = sinusoids(positions, 6)
    assert found.dtype == torch.float64
    for row, position in zip(found, positions.tolist(), strict=True):
        for i in range(3):
            angle = torch.tensor(position / 10000 ** (2 * i / 6), dtype=torch.float64)
            # The angle is rounded: of 1e12 radians, the sine has four digits left.
            assert row[2 * i].item() == pytest.approx(angle.sin().item(), abs=1e-3)
            assert row[2 * i + 1].item() == pytest.approx(angle.cos().item(), abs=1e-3)


def test_sinusoidal_positions_count_from_the_offset_and_the_first_key():
    module = SinusoidalPositions(8, 0.5)
    x = torch.zeros(2, 5, 8)
    wanted = 0.5 * sinusoids(torch.arange(12), 8).float()
    torch.testing.assert_close(module(x)[1], wanted[:5])
    torch.testing.assert_close(module(x, offset=7)[0], wanted[7:])
    first_key = torch.tensor([[0, 0, 2, 2, 2], [3, 3, 3, 3, 3]])
    found = module(x, first_key=first_key)
    torch.testing.assert_close(found[0], wanted[[0, 1, 0, 1, 2]])
    torch.testing.assert_close(found[1], wanted[[0, 0, 0, 0, 1]])
    assert all(module(x.to(dtype)).dtype == dtype for dtype in (torch.bfloat16, torch.float64))


def test_modules_start_again():
    for module in (MomentumCompounding(2), MultiscaleCompounding(3)):
        [(_, parameter)] = module.named_parameters()
        start = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(1.0)
        module.reset_parameters()
        assert torch.equal(parameter, start)


def test_configurations_from_before_have_none_of_the_options():
    fields = json.loads(json.dumps(MODEL.to_dict()))
    for name in ("sinusoidal_positions", "ema_momentum", "ema_scales", "adaptive_alpha"):
        del fields[name]
    assert ModelConfig.from_dict(fields) == MODEL


def test_options_that_exclude_each_other():
    with pytest.raises(ValueError, match="ema_momentum takes one time constant, got ema_scales = 2"):
        dataclasses.replace(MODEL, ema_momentum=True, ema_scales=2)
    for options in OPTIONS["momentum"], OPTIONS["three scales"], OPTIONS["adaptive"]:
        with pytest.raises(ValueError, match="need compounding"):
            dataclasses.replace(MODEL, compounding=False, **options)
    with pytest.raises(ValueError, match="ema_scales must be at least 1"):
        dataclasses.replace(MODEL, ema_scales=0)
