"""Every argument of `torus_attention` wrong in every way: the error, and a message that names the argument."""

import pytest
import torch
from support import make_problem

from torus_kernels import TorusLattice, torus_attention, torus_attention_with_stats

CAUSAL = TorusLattice(3, 4, "causal")
BATCH, HEADS, KV_HEADS, SEQ_LEN, HEAD_DIM = 2, 4, 2, 9, 8


@pytest.fixture
def arguments() -> dict:
    problem = make_problem(CAUSAL, SEQ_LEN, batch=BATCH, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    arguments = problem.to(torch.float32).arguments()
    arguments["first_key"] = torch.zeros(BATCH, SEQ_LEN, dtype=torch.int32)
    return arguments


@pytest.fixture(params=[torus_attention, torus_attention_with_stats], ids=lambda f: f.__name__)
def function(request):
    return request.param


TENSORS = ("q", "k", "v", "stream_weights", "decay", "ema_state", "ema_alpha", "first_key")


def test_the_arguments_are_right_to_begin_with(function, arguments):
    function(**arguments)
    function(**arguments | {"first_key": None})


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("value", [0.5, "tensor", [[1.0]], float], ids=["number", "text", "list", "class"])
def test_not_a_tensor(function, arguments, name, value):
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got {type(value).__name__}"):
        function(**arguments | {name: value})


@pytest.mark.parametrize("name", ["q", "k", "v", "lattice"])
def test_required_argument_is_none(function, arguments, name):
    with pytest.raises(TypeError, match=f"{name} must be a .*, got NoneType"):
        function(**arguments | {name: None})


@pytest.mark.parametrize("name", TENSORS)
def test_sparse(function, arguments, name):
    with pytest.raises(TypeError, match=f"{name} must be a dense tensor"):
        function(**arguments | {name: arguments[name].to_sparse()})


TOKEN_DTYPES = (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn)
WRONG_DTYPES = [
    *[("q", dtype) for dtype in TOKEN_DTYPES],
    *[(name, dtype) for name in ("k", "v", "ema_state") for dtype in (*TOKEN_DTYPES, torch.float64, torch.bfloat16)],
    *[(name, dtype) for name in ("stream_weights", "decay", "ema_alpha")
      for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.int64)],
    *[("first_key", dtype) for dtype in (torch.float32, torch.int16, torch.uint8, torch.bool)],
]


@pytest.mark.parametrize("name, dtype", WRONG_DTYPES, ids=str)
def test_dtype(function, arguments, name, dtype):
    with pytest.raises(TypeError, match=f"{name} must have dtype .*, got {dtype}"):
        function(**arguments | {name: arguments[name].to(dtype)})


@pytest.mark.parametrize("name", ["stream_weights", "decay", "ema_alpha"])
def test_float64_tokens_need_float64_parameters(function, arguments, name):
    wide = {n: x.double() if isinstance(x, torch.Tensor) and n != "first_key" else x for n, x in arguments.items()}
    function(**wide)
    with pytest.raises(TypeError, match=f"{name} must have dtype torch.float64, got torch.float32"):
        function(**wide | {name: arguments[name]})


@pytest.mark.parametrize("name", TENSORS[1:])
def test_device(function, arguments, name):
    with pytest.raises(ValueError, match=f"{name} must be on q's device cpu, got meta"):
        function(**arguments | {name: arguments[name].to("meta")})


WRONG_SHAPES = [
    ("q", (HEADS, SEQ_LEN, HEAD_DIM), r"q must have shape \[B, H, T, D\], got \[4, 9, 8\]"),
    ("q", (1, BATCH, HEADS, SEQ_LEN, HEAD_DIM), "q must have shape"),
    ("q", (BATCH, 0, SEQ_LEN, HEAD_DIM), "q must have at least one head"),
    ("q", (BATCH, HEADS, 0, HEAD_DIM), "q must have at least one token"),
    ("q", (BATCH, HEADS, SEQ_LEN, 0), "q must have a head dimension that is a multiple of 8 up to 256, got 0"),
    ("q", (BATCH, HEADS, SEQ_LEN, 12), "q must have a head dimension that is a multiple of 8 up to 256, got 12"),
    ("q", (BATCH, HEADS, SEQ_LEN, 264), "q must have a head dimension that is a multiple of 8 up to 256, got 264"),
    ("q", (BATCH, 3, SEQ_LEN, HEAD_DIM), "k must have a number of heads that divides q's 3, got 2"),
    ("k", (BATCH, 0, SEQ_LEN, HEAD_DIM), "k must have a number of heads that divides q's 4, got 0"),
    ("k", (BATCH, 3, SEQ_LEN, HEAD_DIM), "k must have a number of heads that divides q's 4, got 3"),
    ("k", (BATCH, 8, SEQ_LEN, HEAD_DIM), "k must have a number of heads that divides q's 4, got 8"),
    *[(name, shape, f"{name} must have shape .*{list(shape)}".replace("[", r"\[").replace("]", r"\]"))
      for name in ("k", "v") for shape in (
          (1, KV_HEADS, SEQ_LEN, HEAD_DIM), (BATCH, KV_HEADS, 1, HEAD_DIM), (BATCH, KV_HEADS, SEQ_LEN + 1, HEAD_DIM),
          (BATCH, KV_HEADS, SEQ_LEN, 16), (KV_HEADS, SEQ_LEN, HEAD_DIM))],
    ("v", (BATCH, 1, SEQ_LEN, HEAD_DIM), "v must have shape"),
    *[("stream_weights", shape, "stream_weights must have shape") for shape in (
        (8,), (HEADS, 7), (KV_HEADS, 8), (1, 8), (BATCH, HEADS, SEQ_LEN), (BATCH, HEADS, 1, 8),
        (1, HEADS, SEQ_LEN, 8), (BATCH, SEQ_LEN, HEADS, 8), ())],
    *[("decay", shape, "decay must have shape") for shape in (
        (8,), (HEADS,), (HEADS, 9), (1, 8), (BATCH, HEADS, SEQ_LEN, 8), ())],
    *[("ema_state", shape, "ema_state must have shape") for shape in (
        (HEADS, SEQ_LEN, HEAD_DIM), (BATCH, KV_HEADS, SEQ_LEN, HEAD_DIM), (1, HEADS, SEQ_LEN, HEAD_DIM),
        (BATCH, HEADS, SEQ_LEN, 16))],
    *[("ema_alpha", shape, "ema_alpha must have shape") for shape in (
        (), (1,), (KV_HEADS,), (HEADS, 1), (BATCH, HEADS), (1, HEADS, SEQ_LEN), (BATCH, HEADS, SEQ_LEN, 1))],
    *[("first_key", shape, "first_key must have shape") for shape in (
        (), (SEQ_LEN,), (1, SEQ_LEN), (BATCH, 1), (BATCH, HEADS, SEQ_LEN), (BATCH,))],
]


@pytest.mark.parametrize("name, shape, message", WRONG_SHAPES, ids=str)
def test_shape(function, arguments, name, shape, message):
    wrong = torch.zeros(shape, dtype=arguments[name].dtype)
    with pytest.raises(ValueError, match=message):
        function(**arguments | {name: wrong})


@pytest.mark.parametrize("topology", ["periodic", "cylinder"])
@pytest.mark.parametrize("seq_len", [1, 15, 17, 32])
def test_length_of_a_grid_topology(function, topology, seq_len):
    q = torch.zeros(1, 1, seq_len, 8)
    with pytest.raises(ValueError, match=f"q has sequence length {seq_len}.*{topology} lattice of 4 x 4.*16 tokens"):
        function(q, q, q, TorusLattice(4, 4, topology))


@pytest.mark.parametrize("topology", ["periodic", "cylinder"])
def test_first_key_off_the_causal_topology(function, topology):
    q = torch.zeros(1, 1, 16, 8)
    with pytest.raises(ValueError, match=f"first_key belongs to the causal topology, got a {topology} lattice"):
        function(q, q, q, TorusLattice(4, 4, topology), first_key=torch.zeros(1, 16, dtype=torch.int32))


@pytest.mark.parametrize("given, missing", [("ema_state", "ema_alpha"), ("ema_alpha", "ema_state")])
def test_only_one_of_state_and_alpha(function, arguments, given, missing):
    with pytest.raises(ValueError, match=f"ema_state and ema_alpha go together: got {given} without {missing}"):
        function(**arguments | {missing: None})


@pytest.mark.parametrize("lattice", [(3, 4), "causal", TorusLattice, 12], ids=str)
def test_lattice(function, arguments, lattice):
    with pytest.raises(TypeError, match=f"lattice must be a TorusLattice, got {type(lattice).__name__}"):
        function(**arguments | {"lattice": lattice})


@pytest.mark.parametrize("scale, error", [
    ("0.3", TypeError), (True, TypeError), (torch.tensor(0.3), TypeError), (1j, TypeError), ([0.3], TypeError),
    (float("nan"), ValueError), (float("inf"), ValueError), (-float("inf"), ValueError),
], ids=str)
def test_scale(function, arguments, scale, error):
    with pytest.raises(error, match="scale must be"):
        function(**arguments | {"scale": scale})


def test_options_are_named(arguments):
    positional = [arguments[name] for name in ("q", "k", "v", "lattice", "stream_weights")]
    with pytest.raises(TypeError, match="positional"):
        torus_attention(*positional)


def test_arguments_are_checked_before_a_backend_is_chosen(function, arguments):
    """The same mistake gives the same error whatever can run here."""
    for backend in ("reference", "cpu", "triton", "cuda"):
        with pytest.raises(ValueError, match="v must have shape"):
            function(**arguments | {"v": arguments["v"][:1], "backend": backend})
