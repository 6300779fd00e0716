"""EMA compounding, alone and over several time constants."""

import pytest
import torch
from support import LAYOUTS, assert_within_budget, label, parameter_dtype

from torus_kernels import ema_compound, ema_compound_multiscale

SHAPE = (2, 3, 5, 8)
BATCH, HEADS, SEQ_LEN, _ = SHAPE
SCALES = 4


def gate(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[None, :, None, None] if tensor.dim() == 1 else tensor[..., None]


def plain_compound(x, state, alpha, beta=None, velocity=None):
    alpha = gate(alpha).to(x.dtype)
    if beta is None:
        return state + alpha * (x - state)
    beta = gate(beta).to(x.dtype)
    velocity = beta * velocity.to(x.dtype) + (1 - beta) * (x - state)
    return state + alpha * velocity, velocity


def plain_multiscale(x, states, alphas, scale_weights):
    new_states = states + alphas[:, None, :, None, None].to(x.dtype) * (x - states)
    return (scale_weights[:, None, None, None, None].to(x.dtype) * new_states).sum(dim=0), new_states


def compound_arguments(token_gates: bool, momentum: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gates = (BATCH, HEADS, SEQ_LEN) if token_gates else (HEADS,)
    shapes = {"x": SHAPE, "state": SHAPE, "alpha": gates}
    if momentum:
        shapes |= {"beta": gates, "velocity": SHAPE}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def multiscale_arguments(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": SHAPE, "states": (SCALES, *SHAPE), "alphas": (SCALES, HEADS), "scale_weights": (SCALES,)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def cast(arguments: dict[str, torch.Tensor], dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    tokens = ("x", "state", "states")
    return {name: x.to(device, dtype if name in tokens else parameter_dtype(dtype)) for name, x in arguments.items()}


def evaluate(function, arguments: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in arguments.items()}
    outputs = function(**leaves)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    generator = torch.Generator().manual_seed(9)
    d_outputs = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype) for y in outputs]
    grads = torch.autograd.grad(outputs, tuple(leaves.values()), d_outputs)
    named = dict(zip(("out", "second"), (y.detach() for y in outputs), strict=False))
    return named | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def check(backend, function, plain, arguments, dtype) -> dict[str, torch.Tensor]:
    arguments = cast(arguments, dtype, backend.device)
    with backend.chosen():
        actual = evaluate(function, arguments)
    expected = evaluate(plain, {name: x.double() for name, x in arguments.items()})
    yardstick = evaluate(plain, arguments)
    if "second" in yardstick:  # plain PyTorch keeps the velocity in the tokens' dtype
        yardstick["second"] = yardstick["second"].to(actual["second"].dtype)
    # A gate's gradient is a sum over tokens and channels, whose rounding grows as the root of its length.
    longer = 1 + (arguments["x"].numel() / HEADS) ** 0.5 / 8
    gates = [name for name in actual if name.startswith(("d_alpha", "d_beta", "d_scale"))]
    assert_within_budget(actual, expected, yardstick, gain=dict.fromkeys(gates, longer))
    return actual


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=label)
GATES = pytest.mark.parametrize("token_gates", [False, True])
MOMENTUM = pytest.mark.parametrize("momentum", [False, True])


@DTYPES
@GATES
@MOMENTUM
def test_compound(backend, token_gates, momentum, dtype):
    results = check(backend, ema_compound, plain_compound, compound_arguments(token_gates, momentum), dtype)
    assert results["out"].dtype == dtype
    if momentum:
        assert results["second"].dtype == parameter_dtype(dtype)


@DTYPES
def test_multiscale(backend, dtype):
    results = check(backend, ema_compound_multiscale, plain_multiscale, multiscale_arguments(), dtype)
    assert results["out"].dtype == results["second"].dtype == dtype
    assert results["second"].shape == (SCALES, *SHAPE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=label)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(backend, layout, dtype):
    for arguments, function in ((compound_arguments(True, True), ema_compound),
                                (multiscale_arguments(), ema_compound_multiscale)):
        strided = cast(arguments, dtype, backend.device)
        strided = {name: LAYOUTS[layout](x) if x.dim() > 2 else x for name, x in strided.items()}
        with backend.chosen():
            actual = evaluate(function, strided)
            expected = evaluate(function, {name: x.contiguous() for name, x in strided.items()})
        for name in expected:
            assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=label)
@pytest.mark.parametrize("head_dim", [1, 3, 12, 33, 130])
def test_any_head_dimension(backend, head_dim, dtype):
    def narrow(arguments, names):
        return {name: x.repeat_interleave(17, dim=-1)[..., :head_dim] if name in names else x
                for name, x in arguments.items()}

    tokens = ("x", "state", "velocity", "states")
    check(backend, ema_compound, plain_compound, narrow(compound_arguments(True, True), tokens), dtype)
    check(backend, ema_compound, plain_compound, narrow(compound_arguments(False, False), tokens), dtype)
    check(backend, ema_compound_multiscale, plain_multiscale, narrow(multiscale_arguments(), tokens), dtype)


def test_formulas_by_hand(backend):
    one = torch.ones(1, 1, 1, 8, device=backend.device)
    alpha, beta = torch.full((1,), 0.25, device=backend.device), torch.full((1,), 0.5, device=backend.device)
    with backend.chosen():
        assert torch.equal(ema_compound(8 * one, 4 * one, alpha), 5 * one)
        out, velocity = ema_compound(8 * one, 4 * one, alpha, beta=beta, velocity=12 * one)
        assert torch.equal(velocity, 8 * one)  # 0.5 * 12 + 0.5 * (8 - 4)
        assert torch.equal(out, 6 * one)
        mixed, states = ema_compound_multiscale(
            8 * one, torch.stack([4 * one, 0 * one]), torch.tensor([[0.25], [0.5]], device=backend.device),
            torch.tensor([2.0, -1.0], device=backend.device))
        assert torch.equal(states, torch.stack([5 * one, 4 * one]))
        assert torch.equal(mixed, 6 * one)


@GATES
@MOMENTUM
def test_gradients_of_compound(backend, token_gates, momentum):
    if torch.float64 not in backend.dtypes:
        pytest.skip("finite differences need float64, which a GPU leaves to reference")
    arguments = compound_arguments(token_gates, momentum)
    with backend.chosen():
        assert torch.autograd.gradcheck(
            lambda *tensors: ema_compound(**dict(zip(arguments, tensors, strict=True))),
            tuple(x.requires_grad_() for x in arguments.values()), fast_mode=True)


def test_gradients_of_multiscale(backend):
    if torch.float64 not in backend.dtypes:
        pytest.skip("finite differences need float64, which a GPU leaves to reference")
    arguments = multiscale_arguments()
    with backend.chosen():
        assert torch.autograd.gradcheck(
            ema_compound_multiscale, tuple(x.requires_grad_() for x in arguments.values()), fast_mode=True)


@MOMENTUM
def test_double_backward_raises(backend, momentum):
    arguments = cast(compound_arguments(False, momentum), torch.float32, backend.device)
    x = arguments["x"].requires_grad_()
    with backend.chosen():
        out = ema_compound(**arguments)
        grad, = torch.autograd.grad((out[0] if momentum else out).square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"ema_compound.*double backward"):
            grad.sum().backward()


def test_double_backward_of_multiscale_raises(backend):
    arguments = cast(multiscale_arguments(), torch.float32, backend.device)
    x = arguments["x"].requires_grad_()
    with backend.chosen():
        grad, = torch.autograd.grad(ema_compound_multiscale(**arguments)[0].square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"ema_compound_multiscale.*double backward"):
            grad.sum().backward()


def test_empty_batch(backend):
    for arguments, function in ((compound_arguments(False, True), ema_compound),
                                (multiscale_arguments(), ema_compound_multiscale)):
        arguments = cast(arguments, torch.float32, backend.device)
        batched = {"x": 0, "state": 0, "velocity": 0, "states": 1}
        empty = {name: x.narrow(batched[name], 0, 0) if name in batched else x for name, x in arguments.items()}
        with backend.chosen():
            for name, value in evaluate(function, empty).items():
                assert (value == 0).all(), name
                if name.removeprefix("d_") in empty:
                    assert value.shape == empty[name.removeprefix("d_")].shape


COMPOUND_ERRORS = [
    ("x", lambda x: x.tolist(), TypeError, "x must be a torch.Tensor"),
    ("x", lambda x: x[0], ValueError, r"x must have shape \[B, H, T, D\]"),
    ("x", lambda x: x.to(torch.int64), TypeError, "x must have dtype"),
    ("x", lambda x: x.to_sparse(), TypeError, "x must be a dense tensor"),
    ("state", lambda x: None, TypeError, "state must be a torch.Tensor"),
    ("state", lambda x: x[:, :, 1:], ValueError, "state must have shape"),
    ("state", lambda x: x.bfloat16(), TypeError, "state must have dtype"),
    ("state", lambda x: x.to("meta"), ValueError, "state must be on x's device"),
    ("alpha", lambda x: 0.5, TypeError, "alpha must be a torch.Tensor"),
    ("alpha", lambda x: x[1:], ValueError, "alpha must have shape"),
    ("alpha", lambda x: x.double(), TypeError, "alpha must have dtype"),
    ("alpha", lambda x: x.half(), TypeError, "alpha must have dtype"),
    ("alpha", lambda x: x.to("meta"), ValueError, "alpha must be on x's device"),
    ("beta", lambda x: None, ValueError, "beta and velocity go together: got velocity without beta"),
    ("beta", lambda x: x[:, None], ValueError, "beta must have shape"),
    ("beta", lambda x: x.half(), TypeError, "beta must have dtype"),
    ("beta", lambda x: x.to("meta"), ValueError, "beta must be on x's device"),
    ("velocity", lambda x: None, ValueError, "beta and velocity go together: got beta without velocity"),
    ("velocity", lambda x: x[..., :4], ValueError, "velocity must have shape"),
    ("velocity", lambda x: x.half(), TypeError, "velocity must have dtype"),
    ("velocity", lambda x: x.to("meta"), ValueError, "velocity must be on x's device"),
]


@pytest.mark.parametrize("name, change, error, message", COMPOUND_ERRORS)
def test_errors_of_compound(name, change, error, message):
    arguments = cast(compound_arguments(False, True), torch.float32, "cpu")
    ema_compound(**arguments)
    with pytest.raises(error, match=message):
        ema_compound(**arguments | {name: change(arguments[name])})


MULTISCALE_ERRORS = [
    ("x", lambda x: None, TypeError, "x must be a torch.Tensor"),
    ("x", lambda x: x[0], ValueError, r"x must have shape \[B, H, T, D\]"),
    ("states", lambda x: list(x), TypeError, "states must be a torch.Tensor"),
    ("states", lambda x: x[0], ValueError, r"states must have shape \[S, B, H, T, D\]"),
    ("states", lambda x: x[:0], ValueError, "states must have shape .*S >= 1"),
    ("states", lambda x: x[:, :1], ValueError, "states must have shape"),
    ("states", lambda x: x.double(), TypeError, "states must have dtype"),
    ("states", lambda x: x.to("meta"), ValueError, "states must be on x's device"),
    ("alphas", lambda x: x[0], ValueError, "alphas must have shape"),
    ("alphas", lambda x: x[1:], ValueError, "alphas must have shape"),
    ("alphas", lambda x: x.double(), TypeError, "alphas must have dtype"),
    ("alphas", lambda x: x.to("meta"), ValueError, "alphas must be on x's device"),
    ("scale_weights", lambda x: x.tolist(), TypeError, "scale_weights must be a torch.Tensor"),
    ("scale_weights", lambda x: x[1:], ValueError, "scale_weights must have shape"),
    ("scale_weights", lambda x: x.half(), TypeError, "scale_weights must have dtype"),
    ("scale_weights", lambda x: x.to("meta"), ValueError, "scale_weights must be on x's device"),
]


@pytest.mark.parametrize("name, change, error, message", MULTISCALE_ERRORS)
def test_errors_of_multiscale(name, change, error, message):
    arguments = cast(multiscale_arguments(), torch.float32, "cpu")
    ema_compound_multiscale(**arguments)
    with pytest.raises(error, match=message):
        ema_compound_multiscale(**arguments | {name: change(arguments[name])})


@pytest.mark.parametrize("head_dim", [3, 8, 12])
def test_threads_keep_to_their_own_rows(kernel_backend, head_dim):
    """Rows narrower than a vector or a cache line: scratch of one thread must not reach into another's."""
    generator = torch.Generator().manual_seed(0)
    x, state, velocity = (torch.randn(2, 8, 300, head_dim, generator=generator).requires_grad_() for _ in range(3))
    alpha, beta = (torch.rand(8, generator=generator).requires_grad_() for _ in range(2))

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with kernel_backend.chosen():
                out, velocity_out = ema_compound(x, state, alpha, beta=beta, velocity=velocity)
                return out, *torch.autograd.grad((out * velocity_out).sum(), [x, state, alpha, beta, velocity])
        finally:
            torch.set_num_threads(before)

    for one, several in zip(run(1), run(4), strict=True):
        assert torch.equal(one, several)
