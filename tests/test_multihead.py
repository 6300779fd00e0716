"""`TorusMultiheadAttention`: what it computes, and that it takes the place of `torch.nn.MultiheadAttention`."""

import functools

import dense
import pytest
import torch
import torch.nn.functional as F
from support import assert_same_up_to_rounding, assert_within_budget
from torch import nn

from torus_kernels import DEFAULT_DECAY, TorusLattice
from torus_kernels.nn import TorusMultiheadAttention

EMBED, HEADS, BATCH = 32, 4, 2  # an even number of heads, as PyTorch's fast path wants it
LATTICES = {
    "periodic": (TorusLattice(4, 6, "periodic", winding=3), 24),
    "causal": (TorusLattice(3, 5, "causal", cross_radius=(1, 2), streams=("minor_forward", "spiral_cw", 6)), 23),
}
# One stream that sees everything; without decay that is dense attention.
DENSE = TorusLattice(4, 4, cross_radius=(4, 4), streams=["cross_u_to_v"])
DENSE_CAUSAL = TorusLattice(4, 4, "causal", cross_radius=(4, 4), streams=["cross_u_to_v"])
CAUSAL = LATTICES["causal"][0]


def make_module(lattice=CAUSAL, seed=0, **options):
    """A module none of whose parameters is at its start."""
    torch.manual_seed(seed)
    module = TorusMultiheadAttention(EMBED, HEADS, lattice, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return module


def tokens(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain(module, query, key, value):
    """The same layer in plain PyTorch."""
    weights = module.in_proj_weight.chunk(3)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    heads = []
    for x, weight, bias in zip((query, key, value), weights, biases, strict=True):
        x = x if module.batch_first or x.dim() == 2 else x.transpose(0, 1)
        x = x if x.dim() == 3 else x[None]
        heads.append(F.linear(x, weight, bias).unflatten(-1, (HEADS, -1)).transpose(1, 2))
    out = dense.attention(*heads, module.lattice, stream_weights=module.stream_weights, decay=module.decay)
    out = module.out_proj(out.transpose(1, 2).flatten(-2))
    return out[0] if query.dim() == 2 else out if module.batch_first else out.transpose(0, 1)


def evaluate(forward, module, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    arguments = leaves * 3 if len(leaves) == 1 else leaves
    out = forward(*arguments)
    named = dict(module.named_parameters()) | {f"input_{i}": x for i, x in enumerate(leaves)}
    grads = torch.autograd.grad(out, tuple(named.values()), tokens(*out.shape, seed=2).to(out))
    return {"out": out.detach()} | dict(zip(named, grads, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("distinct", [False, True], ids=["self", "three_tensors"])
@pytest.mark.parametrize("layout", ["batch_first", "batch_second", "unbatched"])
@pytest.mark.parametrize("topology", LATTICES)
def test_equals_plain_pytorch(backend, topology, layout, distinct, bias):
    lattice, seq_len = LATTICES[topology]
    shape = {"batch_first": (BATCH, seq_len), "batch_second": (seq_len, BATCH), "unbatched": (seq_len,)}[layout]
    make = functools.partial(make_module, lattice, batch_first=layout == "batch_first", bias=bias, backend=backend.name)
    inputs = [tokens(*shape, EMBED, seed=seed) for seed in range(3 if distinct else 1)]
    module = make().to(backend.device)
    actual = evaluate(lambda *x: module(*x)[0], module, [x.to(backend.device) for x in inputs])
    expected = {}
    for dtype in (torch.float64, torch.float32):
        other = make().to(dtype)
        expected[dtype] = evaluate(functools.partial(plain, other), other, [x.to(dtype) for x in inputs])
    actual = {name: x.cpu() for name, x in actual.items()}
    assert_within_budget(actual, expected[torch.float64], expected[torch.float32])


@pytest.mark.parametrize("lattice", [DENSE, DENSE_CAUSAL], ids=["periodic", "causal"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_is_multihead_attention_where_one_stream_sees_everything(lattice, batch_first):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(EMBED, HEADS, batch_first=batch_first, dtype=torch.float64)
    ours = TorusMultiheadAttention(EMBED, HEADS, lattice, batch_first=batch_first, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    assert ours.stream_weights[:, 6].eq(1).all()
    nn.init.zeros_(ours.decay)
    x = tokens(*((BATCH, 16) if batch_first else (16, BATCH)), EMBED, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(16, dtype=x.dtype) if lattice.is_causal else None
    arguments = {"need_weights": False, "attn_mask": mask, "is_causal": lattice.is_causal}
    actual, weights = ours(x, x, x, **arguments)
    assert weights is None
    assert_same_up_to_rounding(actual, theirs(x, x, x, **arguments)[0])


class TestState:
    def test_starts_as_multihead_attention_and_from_the_operators_defaults(self):
        torch.manual_seed(0)
        theirs = nn.MultiheadAttention(EMBED, HEADS).state_dict()
        torch.manual_seed(0)
        ours = TorusMultiheadAttention(EMBED, HEADS, LATTICES["periodic"][0]).state_dict()
        assert ours.keys() - theirs.keys() == {"stream_weights", "decay"}
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
        assert ours["stream_weights"].eq(1 / 8).all()
        assert ours["decay"].tolist() == [list(DEFAULT_DECAY)] * HEADS

    def test_loads_multihead_attention_inside_a_model(self):
        theirs = nn.ModuleDict({"a": nn.MultiheadAttention(EMBED, HEADS), "b": nn.Linear(2, 2)})
        ours = nn.ModuleDict({"a": make_module(), "b": nn.Linear(2, 2)})
        before = ours["a"].decay.clone()
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(ours["a"].in_proj_weight, theirs["a"].in_proj_weight)
        assert torch.equal(ours["a"].decay, before)

    def test_loads_its_own(self):
        expected, module = make_module(seed=3).state_dict(), make_module()
        module.load_state_dict(expected)
        assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())

    @pytest.mark.parametrize("missing", ["decay", "stream_weights", "in_proj_weight", "out_proj.bias"])
    def test_what_is_incomplete_does_not_load(self, missing):
        state = make_module().state_dict()
        del state[missing]
        with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
            make_module().load_state_dict(state)


def make_encoder_layer(lattice, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 40, dropout=0.0, batch_first=True, **options)
    layer.self_attn = make_module(lattice, batch_first=True)
    return layer


class TestEncoderLayer:
    @pytest.mark.parametrize("norm_first", [False, True])
    def test_inference_runs_the_layer_too(self, norm_first):
        lattice, seq_len = LATTICES["periodic"]
        layer = make_encoder_layer(lattice, norm_first=norm_first)
        x = tokens(BATCH, seq_len, EMBED)
        expected = layer(x).detach()
        with torch.inference_mode():
            assert_same_up_to_rounding(layer.eval()(x), expected)

    def test_trains(self):
        lattice, seq_len = LATTICES["periodic"]
        layer = make_encoder_layer(lattice)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        x, target = tokens(BATCH, seq_len, EMBED), tokens(BATCH, seq_len, EMBED, seed=5)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        before = model.layers[1].self_attn.decay.detach().clone()
        losses = []
        for _ in range(15):
            loss = F.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
        assert not torch.equal(model.layers[1].self_attn.decay, before)

    def test_causal_mask_and_padding(self):
        model = nn.TransformerEncoder(make_encoder_layer(CAUSAL), 2, enable_nested_tensor=False)
        x, mask = tokens(2, 23, EMBED), nn.Transformer.generate_square_subsequent_mask(23)
        padding = torch.arange(23) < torch.tensor([[0], [6]])
        out = model(x, mask=mask, src_key_padding_mask=padding)
        assert_same_up_to_rounding(out[:1], model(x[:1], mask=mask))
        assert_same_up_to_rounding(out[1:, 6:], model(x[1:, 6:]))

    def test_nested_tensors_are_refused(self):
        layer = nn.TransformerEncoderLayer(EMBED, HEADS, 40, dropout=0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, 1).eval()
        model.layers[0].self_attn = make_module(batch_first=True)
        padding = torch.arange(23) >= torch.tensor([[23], [16]])
        with torch.no_grad(), pytest.raises(NotImplementedError, match="enable_nested_tensor=False"):
            model(tokens(2, 23, EMBED), src_key_padding_mask=padding)


class TestPadding:
    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
    @pytest.mark.parametrize("batch_first", [False, True])
    def test_does_not_matter(self, batch_first, dtype):
        module, x = make_module(batch_first=batch_first), tokens(3, 23, EMBED)
        place = torch.arange(23)
        mask = torch.stack([place < 7, place > 17, (place < 2) | (place > 20)])
        if dtype.is_floating_point:
            mask = torch.zeros(3, 23).masked_fill(mask, -torch.inf)
        out = self.call(module, x, mask)
        for row, real in enumerate((slice(7, 23), slice(0, 18), slice(2, 21))):
            assert_same_up_to_rounding(out[row, real], self.call(module, x[row : row + 1, real])[0])

    def call(self, module, x, mask=None):
        if module.batch_first:
            return module(x, x, x, mask)[0]
        x = x.transpose(0, 1)
        return module(x, x, x, mask)[0].transpose(0, 1)

    def test_of_one_sequence(self):
        module, x = make_module(), tokens(23, EMBED)
        out, _ = module(x, x, x, torch.arange(23) < 5)
        assert_same_up_to_rounding(out[5:], module(x[5:], x[5:], x[5:])[0])

    @pytest.mark.parametrize("lattice, mask, error, message", [
        (CAUSAL, torch.eye(2, 23).bool() | (torch.arange(23) == 9), NotImplementedError, "between the tokens"),
        (CAUSAL, torch.full((2, 23), 0.5), NotImplementedError, "must be 0 or -inf"),
        (CAUSAL, torch.zeros(2, 23, dtype=torch.int64), TypeError, "dtype torch.bool"),
        (CAUSAL, torch.zeros(2, 22).bool(), ValueError, r"\[B, T\] = \[2, 23\], got \[2, 22\]"),
        (CAUSAL, [[True]], TypeError, "must be a torch.Tensor, got list"),
        (TorusLattice(23, 23), torch.zeros(2, 23).bool(), NotImplementedError, "a periodic lattice has no room"),
    ])
    def test_of_other_forms_is_refused(self, lattice, mask, error, message):
        module, x = make_module(lattice, batch_first=True), tokens(2, 23, EMBED)
        with pytest.raises(error, match=f"key_padding_mask .*{message}"):
            module(x, x, x, mask)


@pytest.mark.parametrize("options, error, message", [
    ({"dropout": 0.1}, NotImplementedError, r"dropout must be 0\.0 .*got 0\.1"),
    ({"add_bias_kv": True}, NotImplementedError, "add_bias_kv must be False"),
    ({"add_zero_attn": True}, NotImplementedError, "add_zero_attn must be False"),
    ({"kdim": 8}, NotImplementedError, "kdim must be 32 .*got 8"),
    ({"vdim": 8}, NotImplementedError, "vdim must be 32 .*got 8"),
    ({"num_heads": 5}, ValueError, "embed_dim must be a multiple of num_heads = 5, got 32"),
    ({"num_heads": 8}, ValueError, "embed_dim / num_heads must be a multiple of 8 up to 256, got 4"),
    ({"num_heads": 0}, ValueError, "num_heads must be at least 1"),
    ({"lattice": "torus"}, TypeError, "lattice must be a TorusLattice, got str"),
    ({"backend": "fast"}, ValueError, "backend must be one of"),
])
def test_making_it_wrongly(options, error, message):
    with pytest.raises(error, match=message):
        TorusMultiheadAttention(**{"embed_dim": EMBED, "num_heads": HEADS, "lattice": CAUSAL} | options)


X = tokens(23, BATCH, EMBED)


@pytest.mark.parametrize("arguments, error, message", [
    ({"need_weights": True}, NotImplementedError, "need_weights must be False"),
    ({"attn_mask": torch.zeros(23, 23)}, NotImplementedError, "attn_mask must be None"),
    ({"lattice": LATTICES["periodic"][0], "is_causal": True}, ValueError, "is_causal needs a causal lattice"),
    ({"key": X[:9]}, ValueError, r"key must have shape .*got \[9, 2, 32\]"),
    ({"value": X[..., :8]}, ValueError, r"value must have shape .*got \[23, 2, 8\]"),
    ({"query": X[None]}, ValueError, r"query must have shape \[T, B, embed_dim\] or \[T, embed_dim\]"),
    ({"query": None}, TypeError, "query must be a torch.Tensor, got NoneType"),
    ({"lattice": LATTICES["periodic"][0]}, ValueError, "needs exactly 24 tokens"),
])
def test_calling_it_wrongly(arguments, error, message):
    arguments = {"query": X, "key": X, "value": X} | arguments
    module = make_module(arguments.pop("lattice", CAUSAL))
    with pytest.raises(error, match=message):
        module(**arguments)


@pytest.mark.parametrize("how", ["module", "autocast"])
def test_bfloat16(how):
    module, x = make_module(), tokens(23, BATCH, EMBED)
    expected, _ = module.double()(*[x.double()] * 3)
    module = module.to(torch.bfloat16 if how == "module" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        x = x.to(module.decay.dtype)
        out, _ = module(x, x, x)
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).abs().max() <= 8 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_compiles_in_one_graph():
    module, x = make_module(), tokens(23, BATCH, EMBED)
    padding = torch.arange(23).expand(BATCH, 23) < 4
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, x, x, padding)[0], module(x, x, x, padding)[0])
