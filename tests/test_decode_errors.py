"""Every argument of the cache and of `torus_attention_decode` wrong: the error, and a message that names it."""

import math

import pytest
import torch

from torus_kernels import TorusKVCache, TorusLattice, torus_attention_decode

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 8
LATTICE = TorusLattice(3, 4, "causal")


@pytest.fixture
def cache() -> TorusKVCache:
    cache = TorusKVCache(LATTICE, BATCH, KV_HEADS, HEAD_DIM)
    cache.append(*torch.zeros(2, BATCH, KV_HEADS, 3, HEAD_DIM))
    return cache


@pytest.fixture
def arguments(cache) -> dict:
    shape = (BATCH, HEADS, 1, HEAD_DIM)
    return {"q": torch.zeros(shape), "cache": cache, "stream_weights": torch.zeros(HEADS, 8),
            "decay": torch.zeros(HEADS, 8), "scale": 0.5, "ema_state": torch.zeros(shape),
            "ema_alpha": torch.zeros(HEADS), "first_key": torch.zeros(BATCH, 1, dtype=torch.int64)}


@pytest.mark.parametrize("name, value, error, message", [
    ("lattice", (3, 4), TypeError, "lattice must be a TorusLattice, got tuple"),
    ("lattice", TorusLattice(4, 4), ValueError, "lattice must be causal .*, got a periodic lattice"),
    ("lattice", TorusLattice(4, 4, "cylinder"), ValueError, "lattice must be causal .*, got a cylinder lattice"),
    ("batch", 1.0, TypeError, "batch must be an integer, got float"),
    ("batch", True, TypeError, "batch must be an integer, got bool"),
    ("batch", -1, ValueError, "batch must be at least 0, got -1"),
    ("kv_heads", "2", TypeError, "kv_heads must be an integer, got str"),
    ("kv_heads", 0, ValueError, "kv_heads must be at least 1, got 0"),
    ("head_dim", 8.0, TypeError, "head_dim must be an integer, got float"),
    ("head_dim", 0, ValueError, "head_dim must be a multiple of 8 up to 256, got 0"),
    ("head_dim", 12, ValueError, "head_dim must be a multiple of 8 up to 256, got 12"),
    ("head_dim", 264, ValueError, "head_dim must be a multiple of 8 up to 256, got 264"),
    ("dtype", torch.int32, TypeError, "dtype must be torch.float32 or .*, got torch.int32"),
    ("dtype", "float32", TypeError, "dtype must be torch.float32 or .*, got float32"),
])
def test_cache(name, value, error, message):
    right = {"lattice": LATTICE, "batch": 1, "kv_heads": 1, "head_dim": 8, "dtype": torch.float32}
    TorusKVCache(**right)
    with pytest.raises(error, match=message):
        TorusKVCache(**right | {name: value})


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("change, error, message", [
    (lambda x: None, TypeError, "must be a torch.Tensor, got NoneType"),
    (lambda x: x.to_sparse(), TypeError, "must be a dense tensor"),
    (lambda x: x[0], ValueError, r"must have shape \[B, Hkv, n, D\], got \[2, 3, 8\]"),
    (lambda x: x[:1], ValueError, r"must have shape \[B, Hkv, n, D\] = \[2, 2, 3, 8\], got \[1, 2, 3, 8\]"),
    (lambda x: x[:, :1], ValueError, "must have shape"),
    (lambda x: x[..., :4], ValueError, "must have shape"),
    (lambda x: x.double(), TypeError, "must have dtype torch.float32, got torch.float64"),
    (lambda x: x.bfloat16(), TypeError, "must have dtype torch.float32, got torch.bfloat16"),
    (lambda x: x.long(), TypeError, "must have dtype .*, got torch.int64"),
    (lambda x: x.to("meta"), ValueError, "must be on the cache's device cpu, got meta"),
])
def test_append(cache, name, change, error, message):
    right = dict.fromkeys("kv", torch.zeros(BATCH, KV_HEADS, 3, HEAD_DIM))
    with pytest.raises(error, match=f"{name} {message}"):
        cache.append(**right | {name: change(right[name])})
    assert len(cache) == 3


def test_append_of_unequal_or_no_tokens(cache):
    tokens = torch.zeros(BATCH, KV_HEADS, 3, HEAD_DIM)
    with pytest.raises(ValueError, match=r"v must have shape .*2, 2, 3, 8.*, got .*2, 2, 2, 8"):
        cache.append(tokens, tokens[:, :, :2])
    with pytest.raises(ValueError, match="k must have at least one token"):
        cache.append(tokens[:, :, :0], tokens[:, :, :0])


@pytest.mark.parametrize("indices, error, message", [
    ([0, 1], TypeError, "indices must be a torch.Tensor, got list"),
    (torch.tensor([0.0, 1.0]), TypeError, "indices must have dtype torch.int32 or torch.int64, got torch.float32"),
    (torch.tensor([True, False]), TypeError, "indices must have dtype"),
    (torch.tensor([0]), ValueError, r"indices must have shape \[B\] = \[2\], got \[1\]"),
    (torch.tensor([[0, 1]]), ValueError, "indices must have shape"),
    (torch.tensor([0, 1], device="meta"), ValueError, "indices must be on the cache's device cpu, got meta"),
    (torch.tensor([0, 2]), ValueError, r"indices must lie in \[0, 2\), got \[0, 2\]"),
    (torch.tensor([-1, 0]), ValueError, r"indices must lie in \[0, 2\), got \[-1, 0\]"),
])
def test_reorder(cache, indices, error, message):
    with pytest.raises(error, match=message):
        cache.reorder(indices)


TENSORS = ("q", "stream_weights", "decay", "ema_state", "ema_alpha", "first_key")


def test_the_arguments_are_right_to_begin_with(arguments):
    torus_attention_decode(**arguments)


@pytest.mark.parametrize("name", TENSORS)
def test_not_a_tensor(arguments, name):
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got float"):
        torus_attention_decode(**arguments | {name: 0.5})


@pytest.mark.parametrize("name", TENSORS)
def test_dtype(arguments, name):
    with pytest.raises(TypeError, match=f"{name} must have dtype .*, got torch.float16"):
        torus_attention_decode(**arguments | {name: arguments[name].half()})


@pytest.mark.parametrize("name", TENSORS)
def test_device(arguments, name):
    with pytest.raises(ValueError, match=f"{name} must be on (q|the cache)'s device cpu, got meta"):
        torus_attention_decode(**arguments | {name: arguments[name].to("meta")})


@pytest.mark.parametrize("name, shape, message", [
    ("q", (4, 1, 8), r"q must have shape \[B, H, 1, D\], got \[4, 1, 8\]"),
    ("q", (2, 4, 2, 8), r"q must have shape \[B, H, 1, D\] = \[2, 4, 1, 8\], got \[2, 4, 2, 8\]"),
    ("q", (1, 4, 1, 8), "q must have shape"), ("q", (2, 4, 1, 16), "q must have shape"),
    ("q", (2, 4, 0, 8), "q must have shape"),
    ("q", (2, 3, 1, 8), "q must have a number of heads that is a multiple of the cache's 2, got 3"),
    ("q", (2, 0, 1, 8), "q must have a number of heads that is a multiple of the cache's 2, got 0"),
    ("stream_weights", (2, 8), "stream_weights must have shape"),
    ("stream_weights", (2, 4, 3, 8), "stream_weights must have shape"),
    ("decay", (2, 4, 1, 8), "decay must have shape"), ("ema_state", (2, 4, 8), "ema_state must have shape"),
    ("ema_state", (2, 2, 1, 8), "ema_state must have shape"), ("ema_alpha", (2,), "ema_alpha must have shape"),
    ("ema_alpha", (2, 4), "ema_alpha must have shape"), ("first_key", (2,), "first_key must have shape"),
    ("first_key", (2, 3), "first_key must have shape"),
])
def test_shape(arguments, name, shape, message):
    with pytest.raises(ValueError, match=message):
        torus_attention_decode(**arguments | {name: torch.zeros(shape, dtype=arguments[name].dtype)})


@pytest.mark.parametrize("name, value, error, message", [
    ("q", None, TypeError, "q must be a torch.Tensor, got NoneType"),
    ("cache", None, TypeError, "cache must be a TorusKVCache, got NoneType"),
    ("scale", math.inf, ValueError, "scale must be finite"), ("scale", "1", TypeError, "scale must be a number"),
    ("ema_state", None, ValueError, "ema_state and ema_alpha go together: got ema_alpha without ema_state"),
    ("ema_alpha", None, ValueError, "ema_state and ema_alpha go together: got ema_state without ema_alpha"),
    ("backend", "gpu", ValueError, "backend must be one of"), ("backend", 1, TypeError, "backend must be a string"),
])
def test_value(arguments, name, value, error, message):
    with pytest.raises(error, match=message):
        torus_attention_decode(**arguments | {name: value})


def test_empty_cache(arguments):
    arguments["cache"].reset()
    with pytest.raises(ValueError, match="cache must hold at least one token"):
        torus_attention_decode(**arguments)


def test_options_are_named(arguments):
    with pytest.raises(TypeError, match="positional"):
        torus_attention_decode(arguments["q"], arguments["cache"], arguments["stream_weights"])
