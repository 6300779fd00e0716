"""Hugging Face transformers with ``attn_implementation="torus"``: tiny random models against the dense operator."""

import functools
import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import dense
import pytest
import torch
from support import assert_same_up_to_rounding, assert_within_budget

import torus_kernels
from torus_kernels import TorusLattice

if importlib.util.find_spec("transformers") is None:  # one that is there must work
    pytest.skip("transformers is not installed", allow_module_level=True)

import transformers

from torus_kernels.integrations import transformers as integration

LATTICE = TorusLattice(4, 5, "causal")  # N = 20: sequences here are longer
TORUS = {"n_major": 4, "n_minor": 5}
SEQ_LEN = 45
VOCABULARY = 61
OTHER_TORUS = {
    "n_major": 3, "n_minor": 7, "winding": 2, "cross_radius": [1, 2], "streams": ["minor_forward", "spiral_cw"],
}
CONFIGS = {
    "grouped": {},
    "one_kv_head": {"num_key_value_heads": 1, "attention_bias": True},
    "as_many_kv_heads": {"num_key_value_heads": 4},
    "other_lattice": {"torus": OTHER_TORUS},
    "other_scale": {"cls": "Granite", "attention_multiplier": 0.5},
}


def dense_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The operator as a PyTorch user would write it; ``attention_mask`` is the user's, zeros first."""
    first_key = None
    if attention_mask is not None:
        first_key = attention_mask.long().argmax(dim=1)[:, None].expand(-1, query.shape[2])
    lattice = TorusLattice(topology="causal", **module.config.torus)
    return dense.attention(query, key, value, lattice, scale=scaling, first_key=first_key).transpose(1, 2), None


@pytest.fixture(scope="module", autouse=True)
def names():
    """``torus`` for the choice by default, ``torus_<backend>`` for each backend, and the dense operator."""
    integration.register()
    for backend in torus_kernels.available_backends():
        integration.register(name=f"torus_{backend}", backend=backend)
    transformers.AttentionInterface.register("dense", dense_attention)
    transformers.AttentionMaskInterface.register("dense", lambda attention_mask=None, **_: attention_mask)


def make_model(attention="torus", dtype=torch.float64, cls="Llama", **changes):
    """A model in eval mode; the seed makes its weights the same under every attention."""
    torch.manual_seed(0)
    options = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "torus": TORUS, "initializer_range": 0.2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }
    config = getattr(transformers, f"{cls}Config")(**options | changes)
    model = getattr(transformers, f"{cls}ForCausalLM")._from_config(config, attn_implementation=attention)
    return model.to(dtype).eval()


def make_tokens(batch=2, seq_len=SEQ_LEN, seed=1):
    return torch.randint(3, VOCABULARY, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def padded_left(*lengths, total=SEQ_LEN):
    """An attention mask ``[B, total]``: row b ends with ``lengths[b]`` ones."""
    return torch.stack([(torch.arange(total) >= total - n).long() for n in lengths])


def padded_right(*lengths, total=SEQ_LEN):
    return padded_left(*lengths, total=total).flip(1)


def evaluate(model, tokens, attention_mask=None):
    """Logits of real tokens and the gradients of all parameters under the mean loss of next tokens."""
    real = torch.ones_like(tokens) if attention_mask is None else attention_mask
    logits = model(tokens, attention_mask=attention_mask).logits
    model.zero_grad()
    labels = tokens.masked_fill(real == 0, -100)
    labels[:, 1:][real[:, :-1] == 0] = -100  # no token is predicted from padding
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return {"out": logits.detach()[real.bool()]} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_dense_operator_in_the_same_model(backend, name, padded):
    tokens, mask = make_tokens(), padded_left(SEQ_LEN, SEQ_LEN - 9) if padded else None
    run = functools.partial(evaluate, tokens=tokens, attention_mask=mask)
    actual = run(make_model(f"torus_{backend.name}", torch.float32, **CONFIGS[name]))
    truth, plain = (run(make_model("dense", dtype, **CONFIGS[name])) for dtype in (torch.float64, torch.float32))
    assert_within_budget(actual, truth, plain)


def test_the_lattice_matters():
    tokens = make_tokens()
    outs = [make_model(**changes)(tokens).logits for changes in (
        {}, {"torus": {"n_major": 5, "n_minor": 4}}, {"torus": {**TORUS, "winding": 2}}, {"torus": OTHER_TORUS})]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(outs) for b in outs[:i])


def test_registered_lattice_serves_models_without_one():
    expected = make_model()(make_tokens()).logits
    integration.register(LATTICE, name="torus_wound")
    assert torch.equal(make_model("torus_wound", torus=None)(make_tokens()).logits, expected)
    other = make_model("torus_wound", torus=OTHER_TORUS)(make_tokens()).logits
    assert torch.equal(other, make_model(torus=OTHER_TORUS)(make_tokens()).logits)


def test_trains():
    model = make_model(dtype=torch.float32, initializer_range=0.02).train()
    tokens = make_tokens(batch=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_gradient_checkpointing_changes_nothing():
    model = make_model().train()
    expected = evaluate(model, make_tokens(), padded_left(SEQ_LEN, 30))
    model.gradient_checkpointing_enable()
    actual = evaluate(model, make_tokens(), padded_left(SEQ_LEN, 30))
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_padding_on_the_right_is_as_if_it_were_not_there():
    model, tokens = make_model(), make_tokens(batch=1)
    expected = evaluate(model, tokens[:, :33])
    actual = evaluate(model, tokens, padded_right(33))
    for name, value in expected.items():
        assert_same_up_to_rounding(actual[name], value, name)


def test_padding_on_both_sides():
    model, tokens = make_model(), make_tokens(batch=1)
    expected = model(tokens[:, 7:37]).logits
    mask = padded_left(SEQ_LEN - 7) * padded_right(37)
    actual = model(tokens, attention_mask=mask, position_ids=torch.arange(SEQ_LEN)[None] - 7).logits
    assert_same_up_to_rounding(actual[:, 7:37], expected)


@pytest.mark.parametrize("cls", ["Llama", "Mistral"])
def test_packed_documents_do_not_see_each_other(cls):
    model, tokens = make_model(cls=cls), make_tokens()
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ((30, 1, 14), (8, 22, 15))])
    packed = model(tokens, position_ids=positions, use_cache=False).logits
    for row, lengths in enumerate(((30, 1, 14), (8, 22, 15))):
        apart = [model(document[None]).logits[0] for document in tokens[row].split(lengths)]
        assert_same_up_to_rounding(packed[row], torch.cat(apart))


class TestCache:
    @pytest.mark.parametrize("differentiated", [False, True])
    @pytest.mark.parametrize("chunks", [(44, 1), (12, *[1] * 33), (1, 44), (7, 3, 1, 20, 14)], ids=str)
    def test_cached_steps_equal_one_pass(self, backend, chunks, differentiated):
        model = make_model(f"torus_{backend.name}", backend.exact_dtype, **CONFIGS["other_scale"])
        tokens = make_tokens()
        mask = padded_left(SEQ_LEN, SEQ_LEN - 4)
        with torch.no_grad():
            expected = model(tokens, attention_mask=mask).logits
        cache, logits, seen = transformers.DynamicCache(config=model.config), [], 0
        with torch.set_grad_enabled(differentiated):
            for chunk in tokens.split(chunks, dim=1):
                seen += chunk.shape[1]
                logits.append(model(chunk, attention_mask=mask[:, :seen], past_key_values=cache).logits.detach())
        assert_same_up_to_rounding(torch.cat(logits, dim=1)[mask.bool()], expected[mask.bool()])

    def test_gradients_flow_through_cached_keys(self):
        model, tokens = make_model(), make_tokens()
        model(tokens).logits[:, 30:].square().sum().backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        cache = model(tokens[:, :30]).past_key_values
        loss = sum(model(t, past_key_values=cache).logits.square().sum() for t in tokens[:, 30:].split((1, 14), dim=1))
        loss.backward()
        for name, p in model.named_parameters():
            assert_same_up_to_rounding(p.grad, expected[name], name, ulps=2048)

    def test_a_step_reads_the_cache_only(self, monkeypatch):
        model, tokens = make_model(), make_tokens()
        with torch.no_grad():
            cache = model(tokens).past_key_values
            monkeypatch.setattr(integration, "torus_attention", None)
            assert model(tokens[:, -1:], past_key_values=cache).logits.isfinite().all()

    def test_sliding_cache_keeps_less_than_a_window(self):
        mask = padded_left(SEQ_LEN, SEQ_LEN - 24)
        expected = make_model()(make_tokens(), attention_mask=mask).logits
        model = make_model(sliding_window=LATTICE.num_sites)
        cache, logits, seen = transformers.DynamicCache(config=model.config), [], 0
        with torch.no_grad():
            for chunk in make_tokens().split((9, 1, 1, 14, *[1] * 20), dim=1):
                seen += chunk.shape[1]
                logits.append(model(chunk, attention_mask=mask[:, :seen], past_key_values=cache).logits)
        assert_same_up_to_rounding(torch.cat(logits, dim=1)[mask.bool()], expected[mask.bool()])
        assert cache.layers[0].keys.shape[2] == LATTICE.num_sites - 1

    def test_under_autocast(self):
        module = SimpleNamespace(config=SimpleNamespace(torus=TORUS), is_causal=True)
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, heads, SEQ_LEN, 8, generator=generator) for heads in (4, 2, 2))
        attend = transformers.AttentionInterface()["torus"]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected, _ = attend(module, q, k, v.bfloat16(), None)
            actual, _ = attend(module, q[:, :, -1:], k, v.bfloat16(), None)
        assert_same_up_to_rounding(actual[:, 0], expected[:, -1], ulps=8)


class TestGenerate:
    def generate(self, model, tokens, mask=None, **options):
        mask = torch.ones_like(tokens) if mask is None else mask
        return model.generate(tokens, attention_mask=mask, **{"max_new_tokens": 30, "do_sample": False} | options)

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
    @pytest.mark.parametrize("prompt", [1, 12, SEQ_LEN])
    def test_with_the_cache_as_without(self, prompt, options):
        model, tokens = make_model(), make_tokens()[:, :prompt]
        cached = self.generate(model, tokens, use_cache=True, **options)
        assert cached.shape == (2, prompt + 30)
        assert torch.equal(cached, self.generate(model, tokens, use_cache=False, **options))
        assert len(cached[:, prompt:].unique()) > 4

    def test_follows_the_dense_operator(self):
        tokens = make_tokens()[:, :12]
        expected = self.generate(make_model("dense"), tokens, use_cache=False)
        assert torch.equal(self.generate(make_model(), tokens), expected)

    @pytest.mark.parametrize("prompt", [5, 26])
    def test_padded_on_the_left_as_alone(self, prompt):
        model, tokens = make_model(), make_tokens(seq_len=30)
        tokens[1, : 30 - prompt] = 0
        together = self.generate(model, tokens, padded_left(30, prompt, total=30))
        assert torch.equal(together[0], self.generate(model, tokens[:1])[0])
        assert torch.equal(together[1, 30:], self.generate(model, tokens[1:, 30 - prompt :])[0, prompt:])


def test_configuration_is_saved_with_the_model(tmp_path):
    model = make_model(torus=OTHER_TORUS)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="torus")
    assert loaded.config.torus == OTHER_TORUS
    assert torch.equal(loaded.double()(make_tokens()).logits, model(make_tokens()).logits)


@pytest.mark.parametrize("mask", [None, padded_left(SEQ_LEN, 30)], ids=["full", "padded"])
def test_compiles_in_one_graph(mask):
    model, tokens = make_model(), make_tokens()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    actual = compiled(tokens, attention_mask=mask, use_cache=False).logits
    assert torch.equal(actual, model(tokens, attention_mask=mask).logits)


def test_masks_are_of_linear_size():
    make = functools.partial(integration._first_keys, LATTICE, 2, SEQ_LEN, SEQ_LEN)
    assert make() is None and make(attention_mask=padded_left(SEQ_LEN, SEQ_LEN)) is None
    assert make(attention_mask=padded_right(30, 40)) is None
    made = make(attention_mask=padded_left(SEQ_LEN, 30))
    assert made.shape == (2, 1, SEQ_LEN) and made[:, 0].unique(dim=1).tolist() == [[0], [15]]


HOLE = torch.tensor([[1] * 20 + [0] + [1] * 24] * 2)
REFUSED = {
    "hole": ({}, {"attention_mask": HOLE}, "attention_mask has padding between the tokens"),
    "four_dimensions": ({}, {"attention_mask": torch.ones(2, 1, 45, 45).bool()}, r"prepared \[2, 1, 45, 45\]"),
    "wrong_length": ({}, {"attention_mask": torch.ones(2, 44)}, r"attention_mask \[B, 45\], .*got \[2, 44\]"),
    "weights": ({}, {"output_attentions": True}, "output_attentions must be False"),
    "documents": ({}, {"cu_seq_lens_q": torch.tensor([0, 45])}, "packed documents by position_ids"),
    "no_lattice": ({"torus": None}, {}, "needs a lattice: set config.torus"),
    "not_a_mapping": ({"torus": [4, 5]}, {}, "config.torus must be a mapping .*, got list"),
    "unknown_argument": ({"torus": {**TORUS, "n_mayor": 3}}, {}, "config.torus = .*n_mayor"),
    "bad_lattice": ({"torus": {"n_major": 1, "n_minor": 4}}, {}, "config.torus = .*n_major must be at least 2, got 1"),
    "periodic": ({"torus": {"n_major": 4, "n_minor": 4, "topology": "periodic"}}, {}, "must be causal, got a periodic"),
    "short_window": ({"cls": "Mistral", "sliding_window": 19}, {}, "sees the last 20 tokens .*sliding_window of 19"),
    "softcap": ({"cls": "Gemma2", "head_dim": 8, "sliding_window": 20}, {}, "soft-capped scores"),
    "head_dim": ({"head_dim": 12}, {}, "head dimension that is a multiple of 8"),
    "bidirectional": ({"is_causal": False}, {}, "causal"),
    "bloom": ({"cls": "Bloom", "n_head": 4, "n_layer": 2}, {}, "the model of BloomConfig computes its attention"),
    "xglm": ({"cls": "XGLM", "d_model": 32, "attention_heads": 4, "num_layers": 1, "ffn_dim": 40}, {},
             "the model of XGLMConfig computes its attention"),
    "static_cache": ({}, {"past_key_values": "static"}, "unwritten slots"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_is_refused(name):
    changes, arguments, message = REFUSED[name]
    model = make_model(**changes)
    if "past_key_values" in arguments:
        arguments = {"past_key_values": transformers.StaticCache(config=model.config, max_cache_len=60)}
    with pytest.raises((NotImplementedError, ValueError, TypeError), match=message):
        model(make_tokens(), **arguments)


def test_dropout_is_refused_in_training_only():
    model = make_model(attention_dropout=0.1)
    assert model(make_tokens()).logits.isfinite().all()
    with pytest.raises(NotImplementedError, match=r"no dropout, got 0\.1"):
        model.train()(make_tokens())


def test_a_batch_padded_on_the_right_is_not_continued():
    model, tokens, mask = make_model(), make_tokens(), padded_right(45, 30)
    cache = model(tokens, attention_mask=mask).past_key_values
    with pytest.raises(NotImplementedError, match="padded on the left"):
        model(tokens[:, :1], attention_mask=torch.cat((mask, torch.ones(2, 1)), dim=1), past_key_values=cache)


@pytest.mark.parametrize("arguments, error, message", [
    ({"lattice": 3}, TypeError, "lattice must be a TorusLattice, got int"),
    ({"lattice": TorusLattice(4, 4)}, ValueError, "must be causal, got a periodic"),
    ({"name": "flash|x"}, ValueError, "name must be an identifier"),
    ({"name": "eager"}, ValueError, "name must not be that of another attention of transformers, got 'eager'"),
    ({"name": "sdpa"}, ValueError, "name must not be that of another"),
    ({"name": "dense"}, ValueError, "name must not be that of another"),
    ({"backend": "flash"}, ValueError, "backend must be one of"),
])
def test_registering_wrongly(arguments, error, message):
    with pytest.raises(error, match=message):
        integration.register(**arguments)


def test_importing_torus_kernels_does_not_import_transformers():
    code = "import sys, torus_kernels; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
