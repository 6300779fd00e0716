"""`TorusAttention`, `TorusBlock` and `TorusLM`: what they compute, and that the kernels under them can be swapped."""

import dataclasses
import json

import pytest
import torch

import torus_kernels
from torus_kernels import DEFAULT_DECAY, Stream, TorusLattice
from torus_kernels.backends import reference
from torus_model import ModelConfig, TorusAttention, TorusBlock, TorusLM
from torus_model.attention import SMALLEST_INITIAL_DECAY
from torus_model.compounding import ALPHA_RANGE, INITIAL_ALPHA

# The longest sequence exceeds the lattice's 48 sites, so that every stream, the window's end included, takes part.
SMALL = ModelConfig(vocab_size=31, width=32, layers=3, heads=4, n_major=6, n_minor=8, cross_radius=(2, 3),
                    token_gated=False)
SEQ_LEN = 60

VARIANTS = {
    "plain": {},
    "grouped": {"kv_heads": 2},
    "token_gated": {"token_gated": True},
    "subset": {"streams": ("minor_forward", "spiral_cw", "cross_u_to_v")},
    "everything": {
        "kv_heads": 1, "token_gated": True, "winding": 3, "streams": ("major_forward", "minor_forward", "spiral_ccw"),
    },
}


@pytest.fixture(params=VARIANTS)
def config(request):
    return dataclasses.replace(SMALL, **VARIANTS[request.param])


def make_model(config=SMALL, dtype=torch.float32, backend="reference", seed=0):
    """A model whose stream logits, decay, alpha and gains are not at their start, where some are all equal."""
    torch.manual_seed(seed)
    model = TorusLM(config, backend=backend).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("stream", "raw_", "norm")):
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def make_tokens(config=SMALL, batch=2, seq_len=SEQ_LEN, seed=1):
    return torch.randint(config.vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(model, tokens):
    logits = model(tokens[:, :-1])
    model.zero_grad()
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    return {"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("changed", [0, 1, 7, 31, SEQ_LEN - 1])
def test_no_logits_depend_on_later_tokens(config, changed):
    model = make_model(config)
    tokens = make_tokens(config)
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


def test_a_token_changes_later_logits_as_far_as_the_layers_reach():
    config = dataclasses.replace(SMALL, layers=2)
    reach = config.layers * (config.lattice.num_sites - 1)
    model = make_model(config, dtype=torch.float64)
    tokens = make_tokens(config, batch=1, seq_len=reach + 3)
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % config.vocab_size
    with torch.no_grad():
        change = (model(tokens) - model(other)).abs().amax(dim=-1)[0]
    assert change[: reach // 2].min() > 0
    assert change[reach + 1 :].max() == 0


def test_only_the_first_layer_has_no_state():
    model = make_model()
    assert [block.attention.compounding for block in model.blocks] == [False, True, True]
    gradients = loss_and_gradients(model, make_tokens())
    with_alpha = [name for name in gradients if name.endswith("raw_alpha")]
    assert with_alpha == ["blocks.1.attention.raw_alpha", "blocks.2.attention.raw_alpha"]
    for name in with_alpha:
        assert gradients[name].abs().min() > 0


def test_state_is_compounded_from_layer_to_layer():
    """The state that a layer returns is its own attention blended into the state it was given."""
    torch.manual_seed(0)
    layer = TorusAttention(32, 4, SMALL.lattice, compounding=True, backend="reference").double()
    x = torch.randn(2, SEQ_LEN, 32, dtype=torch.float64)
    state = torch.randn(2, 4, SEQ_LEN, 8, dtype=torch.float64)
    with torch.no_grad():
        _, from_zero = layer(x, torch.zeros_like(state))  # alpha * y
        projected, blended = layer(x, state)
        alpha = layer.alpha()[:, None, None]
        torch.testing.assert_close(blended, state + from_zero - alpha * state)
        torch.testing.assert_close(projected, layer.out_proj(blended.transpose(1, 2).flatten(-2)))


def test_every_parameter_gets_a_gradient(config):
    for name, gradient in loss_and_gradients(make_model(config), make_tokens(config)).items():
        assert gradient is not None and gradient.abs().max() > 0, name


def test_starts_from_the_defaults_of_the_operator():
    layer = TorusAttention(32, 4, SMALL.lattice, compounding=True)
    expected = torch.tensor(DEFAULT_DECAY).clamp(min=SMALLEST_INITIAL_DECAY).expand(4, 8)
    torch.testing.assert_close(layer.decay(), expected)
    torch.testing.assert_close(layer.stream_weights(torch.empty(0)), torch.full((4, 8), 1 / 8))
    torch.testing.assert_close(layer.alpha(), torch.full((4,), INITIAL_ALPHA))


def test_alpha_decay_and_weights_stay_in_their_ranges():
    layer = TorusAttention(32, 4, SMALL.lattice, compounding=True)
    with torch.no_grad():
        for value in (-50.0, -1.0, 0.0, 1.0, 50.0):
            layer.raw_alpha.fill_(value)
            layer.raw_decay.fill_(value)
            layer.stream_logits[:, 0] = value
            assert ALPHA_RANGE[0] - 1e-6 <= layer.alpha().min() <= layer.alpha().max() <= ALPHA_RANGE[1] + 1e-6
            assert layer.decay().min() >= 0
            torch.testing.assert_close(layer.stream_weights(torch.empty(0)).sum(dim=-1), torch.ones(4))


@pytest.mark.parametrize("token_gated", [False, True])
def test_streams_left_out_get_no_weight(token_gated):
    streams = [Stream.minor_backward, Stream.cross_v_to_u]
    lattice = TorusLattice(6, 8, "causal", streams=streams)
    torch.manual_seed(0)
    layer = TorusAttention(32, 4, lattice, token_gated=token_gated)
    if token_gated:
        torch.nn.init.normal_(layer.stream_gate.weight)
    with torch.no_grad():
        weights = layer.stream_weights(torch.randn(2, 5, 32))
    assert weights.shape == ((2, 4, 5, 8) if token_gated else (4, 8))
    left_out = [s.index for s in Stream if s not in streams]
    assert weights[..., left_out].abs().max() == 0
    assert weights[..., streams].min() > 0
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))


def test_token_gate_weighs_each_token_by_itself():
    torch.manual_seed(0)
    layer = TorusAttention(32, 4, SMALL.lattice, token_gated=True)
    torch.nn.init.normal_(layer.stream_gate.weight)
    x = torch.randn(1, 6, 32)
    other = x.clone()
    other[:, 3] += 1
    with torch.no_grad():
        same = (layer.stream_weights(x) == layer.stream_weights(other)).all(dim=-1).all(dim=1)[0]  # [T]
    assert same.tolist() == [True, True, True, False, True, True]


def test_grouped_heads_have_fewer_keys_and_values():
    layer = TorusAttention(32, 4, SMALL.lattice, kv_heads=2)
    assert layer.q_proj.out_features == 32
    assert layer.k_proj.out_features == layer.v_proj.out_features == 16


def test_packed_documents_do_not_see_each_other():
    model = make_model(dtype=torch.float64)
    tokens = make_tokens(batch=1, seq_len=40)
    boundary = 17
    first_key = torch.where(torch.arange(40) < boundary, 0, boundary)[None]
    with torch.no_grad():
        packed = model(tokens, first_key=first_key)
        torch.testing.assert_close(packed[:, :boundary], model(tokens[:, :boundary]))
        torch.testing.assert_close(packed[:, boundary:], model(tokens[:, boundary:], offset=boundary))
        assert not torch.allclose(packed, model(tokens))


def test_offset_turns_queries_and_keys_of_every_layer(monkeypatch):
    offsets = []

    def rope(x, lattice, *, offset=0):
        offsets.append(offset)
        return torus_kernels.lattice_rope(x, lattice, offset=offset)

    monkeypatch.setattr("torus_model.attention.lattice_rope", rope)
    model, tokens = make_model(dtype=torch.float64), make_tokens()
    with torch.no_grad():
        moved = model(tokens, offset=1000)
        assert offsets == [1000] * 2 * SMALL.layers
        torch.testing.assert_close(moved, model(tokens))  # only differences of positions matter


@pytest.mark.parametrize("compounding", [False, True])
def test_state_that_is_missing_or_not_wanted_is_an_error(compounding):
    layer = TorusAttention(32, 4, SMALL.lattice, compounding=compounding)
    x = torch.randn(1, 5, 32)
    with pytest.raises(ValueError, match="state"):
        layer(x, None if compounding else torch.zeros(1, 4, 5, 8))


def test_attention_runs_on_a_periodic_lattice():
    torch.manual_seed(0)
    lattice = TorusLattice(6, 4, winding=2)
    layer = TorusAttention(32, 4, lattice, backend="reference").double()
    field = torch.randn(2, 6, 4, 32, dtype=torch.float64)
    with torch.no_grad():
        out = layer(field.flatten(1, 2))[0].unflatten(1, (6, 4))
        shifted = layer(field.roll((1, 3), (1, 2)).flatten(1, 2))[0].unflatten(1, (6, 4))
    torch.testing.assert_close(shifted, out.roll((1, 3), (1, 2)))


def test_dropout_acts_in_training_only():
    model = make_model(dataclasses.replace(SMALL, dropout=0.5))
    tokens = make_tokens()
    with torch.no_grad():
        assert not torch.equal(model(tokens), model(tokens))
        assert torch.equal(model.eval()(tokens), model(tokens))


@pytest.mark.parametrize("branch", ["attention", "ff"])
def test_dropout_acts_on_both_branches(branch):
    torch.manual_seed(0)
    block = TorusBlock(32, 4, SMALL.lattice, dropout=0.5, backend="reference")
    other = block.ff[2] if branch == "attention" else block.attention.out_proj
    torch.nn.init.zeros_(other.weight)
    x = torch.randn(1, 20, 32)
    with torch.no_grad():
        assert not torch.equal(block(x)[0], block(x)[0])


def test_gradient_flows_through_the_state():
    """The gradient of the whole model along a random direction of all parameters is the slope of the loss."""
    model, tokens = make_model(dtype=torch.float64), make_tokens()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    model.loss(inputs, targets).backward()
    generator = torch.Generator().manual_seed(2)
    parameters = list(model.parameters())
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True))

    @torch.no_grad()
    def loss_at(step):
        for p, d in zip(parameters, direction, strict=True):
            p.add_(step * d)
        loss = model.loss(inputs, targets)
        for p, d in zip(parameters, direction, strict=True):
            p.sub_(step * d)
        return loss

    step = 1e-6
    torch.testing.assert_close(slope, (loss_at(step) - loss_at(-step)) / (2 * step), rtol=1e-6, atol=1e-8)


def test_embeddings_are_tied():
    model = make_model()
    assert "embedding.weight" in dict(model.named_parameters())
    assert not any("head" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        before = model(make_tokens())
        model.embedding.weight[5] = 0
        assert before[..., 5].abs().max() > 0
        assert model(make_tokens())[..., 5].abs().max() == 0


def test_loss_is_the_cross_entropy_of_the_next_token():
    model = make_model()
    tokens = make_tokens()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():
        likelihood = model(inputs).log_softmax(dim=-1).gather(-1, targets[..., None])
        torch.testing.assert_close(model.loss(inputs, targets), -likelihood.mean())


def test_low_precision_model_keeps_its_gates_in_float32(config):
    model = make_model(config).to(torch.bfloat16)
    tokens = make_tokens(config)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_autocast(config):
    model = make_model(config)
    tokens = make_tokens(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens)
    with torch.no_grad():
        exact = model.double()(tokens)
        plain = model.to(torch.bfloat16)(tokens)
    budget = 2 * (plain - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (logits - exact).abs().max() <= budget


def spied_calls(monkeypatch):
    """Counts the calls that reach the reference backend."""
    calls = []
    forward = reference.attention_forward
    monkeypatch.setattr(reference, "attention_forward", lambda *args: calls.append(1) or forward(*args))
    return calls


def test_backend_argument_reaches_the_operator_of_every_layer(monkeypatch):
    monkeypatch.setenv("TORUS_BACKEND", "triton")  # the argument overrules the variable
    calls = spied_calls(monkeypatch)
    model = make_model(backend="reference")
    monkeypatch.setattr("torus_model.attention.lattice_rope", lambda x, lattice, *, offset=0: x)
    model(make_tokens())
    assert len(calls) == SMALL.layers


def test_backend_variable_reaches_the_operator_of_every_layer(monkeypatch):
    monkeypatch.setenv("TORUS_BACKEND", "reference")
    calls = spied_calls(monkeypatch)
    tokens = make_tokens()
    logits = make_model(backend=None)(tokens)
    assert len(calls) == SMALL.layers
    assert torch.equal(logits, make_model(backend="reference")(tokens))


def test_backend_that_cannot_run_says_why():
    missing = [name for name in ("triton", "cuda") if name not in torus_kernels.available_backends()]
    for name in missing:
        with pytest.raises(torus_kernels.BackendError, match=name):
            make_model(backend=name)(make_tokens())
    with pytest.raises(ValueError, match="backend"):
        TorusLM(SMALL, backend="abacus")


def test_backends_agree_on_the_model(config):
    """Logits and all gradients of every other backend, against float64, within twice the error of ``reference``."""
    others = [name for name in torus_kernels.available_backends() if name != "reference"]
    if not others:
        pytest.skip("only the reference backend runs here")
    tokens = make_tokens(config)
    weights = make_model(config).state_dict()

    def evaluate(backend, dtype, device="cpu"):
        model = TorusLM(config, backend=backend)
        model.load_state_dict(weights)
        return {k: x.cpu() for k, x in loss_and_gradients(model.to(device, dtype), tokens.to(device)).items()}

    exact = evaluate("reference", torch.float64)
    plain = evaluate("reference", torch.float32)
    for backend in others:
        actual = evaluate(backend, torch.float32, "cpu" if backend == "cpu" else "cuda")
        for name, value in actual.items():
            largest = exact[name].abs().max()
            budget = 2 * (plain[name] - exact[name]).abs().max() + 16 * torch.finfo(torch.float32).eps * largest
            assert (value - exact[name]).abs().max() <= budget, f"{backend}: {name}"


def compiled_matches_eager(config, compiler):
    torch._dynamo.reset()
    model = make_model(config, dtype=torch.float64)
    tokens = make_tokens(config)
    eager = loss_and_gradients(model, tokens)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    logits = compiled(tokens[:, :-1])
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    torch.testing.assert_close(logits, eager["logits"])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, eager[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_compiles_into_one_graph(variant):
    compiled_matches_eager(dataclasses.replace(SMALL, **VARIANTS[variant]), "aot_eager")


@pytest.mark.slow
def test_compiles_with_inductor(config):
    compiled_matches_eager(config, "inductor")


def test_config_survives_json(config):
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("width", 33, ValueError), ("width", 0, ValueError), ("width", 32.0, TypeError), ("heads", 3, ValueError),
        ("heads", True, TypeError), ("kv_heads", 3, ValueError), ("kv_heads", 0, ValueError),
        ("layers", 0, ValueError), ("vocab_size", -1, ValueError), ("ff_width", 0, ValueError),
        ("dropout", 1.0, ValueError), ("dropout", -0.1, ValueError), ("n_major", 1, ValueError),
        ("winding", 8, ValueError), ("cross_radius", (-1, 2), ValueError), ("streams", ("sideways",), ValueError),
        ("streams", (), ValueError),
    ],
)
def test_config_names_the_field_that_is_wrong(field, value, error):
    with pytest.raises(error, match=field):
        dataclasses.replace(SMALL, **{field: value})


def test_heads_wider_than_the_operator_takes_are_an_error():
    with pytest.raises(ValueError, match="width / heads"):
        dataclasses.replace(SMALL, width=512, heads=1)
