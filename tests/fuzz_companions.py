"""Random calls of the compounding functions, of `lattice_rope` and of `TorusLattice` itself."""

from __future__ import annotations

import functools
import math
import operator

import numpy
import test_compounding
import test_rope
import torch
from fuzzing import (
    Arguments,
    Call,
    Draw,
    Fault,
    assert_left_alone,
    drawn_view,
    number_of_faults,
    snapshot,
)
from hypothesis import strategies as st
from strategies import TOPOLOGIES, lattices
from support import Backend, assert_within_budget, parameter_dtype

from torus_kernels import Stream, TorusLattice, ema_compound, ema_compound_multiscale, lattice_rope

MAX_SIDE = 6
_ROPE_FAULTS = {"lattice": [None, (3, 4), "causal", TorusLattice], "offset": [-1, 0.0, True, "1", None, -(2**63)]}


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


@st.composite
def compounding_calls(draw: Draw, backend: Backend) -> Call:
    batch, heads, seq_len = draw(st.integers(0, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 12))
    channels = 8 * draw(st.integers(1, 5)) if backend.name == "cuda" else draw(st.integers(1, 40))
    tokens = (batch, heads, seq_len, channels)
    if draw(st.booleans()):
        scales = draw(st.integers(1, 4))
        shapes = {"x": tokens, "states": (scales, *tokens), "alphas": (scales, heads), "scale_weights": (scales,)}
        function, plain = ema_compound_multiscale, test_compounding.plain_multiscale
    else:
        gates = [(heads,), tokens[:3]]
        shapes = {"x": tokens, "state": tokens, "alpha": draw(st.sampled_from(gates))}
        if draw(st.booleans()):
            shapes |= {"beta": draw(st.sampled_from(gates)), "velocity": tokens}
        function, plain = ema_compound, test_compounding.plain_compound
    dtype = draw(st.sampled_from(backend.dtypes))
    arguments = Arguments(test_compounding.cast(_random(shapes, draw(st.integers(0, 999))), dtype, backend.device))
    if count := number_of_faults(draw):
        faults = [draw(_compounding_faults(arguments)) for _ in range(count)]

        def run(_):
            with backend.chosen():
                function(**arguments)

        return Call(function.__name__, run, faults)
    arguments = {name: drawn_view(draw, x) for name, x in arguments.items()}
    return Call(function.__name__, functools.partial(_check_compounding, function, plain, arguments, dtype))


def _check_compounding(function, plain, arguments: dict[str, torch.Tensor], dtype, backend: Backend) -> None:
    before = snapshot(arguments)
    x = arguments["x"]
    # Both results are rounded to their dtypes, and so are the gradients that flow into them.
    second = parameter_dtype(dtype) if "velocity" in arguments else dtype
    seconds = arguments.get("states", x).shape
    d_outputs = [d.to(backend.device, into) for d, into in zip(
        _random({"out": x.shape, "second": seconds}, seed=9).values(), (dtype, second), strict=True)]
    with backend.chosen():
        actual = _evaluate(function, arguments, d_outputs)
    if x.shape[0] == 0:
        assert actual["out"].shape == x.shape
        for name, value in arguments.items():
            assert torch.equal(actual[f"d_{name}"], torch.zeros_like(value))
        return
    expected = _evaluate(plain, {name: value.double() for name, value in before.items()}, d_outputs)
    yardstick = _evaluate(plain, before, d_outputs)
    if "second" in yardstick:  # plain PyTorch keeps the velocity in the tokens' dtype
        yardstick["second"] = yardstick["second"].to(second)
    # A gate's gradient is a sum over tokens and channels, whose rounding grows as the root of its length.
    longer = 1 + x.numel() ** 0.5 / 8
    gates = [name for name in actual if name.startswith(("d_alpha", "d_beta", "d_scale"))]
    assert_within_budget(actual, expected, yardstick, gain=dict.fromkeys(gates, longer))
    assert_left_alone(arguments, before)


def _evaluate(function, arguments: dict, d_outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in arguments.items()}
    outputs = function(**leaves)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    d_outputs = [d.to(y.dtype) for d, y in zip(d_outputs, outputs, strict=False)]
    grads = torch.autograd.grad(outputs, tuple(leaves.values()), d_outputs)
    results = dict(zip(("out", "second"), (y.detach() for y in outputs), strict=False))
    return results | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


@st.composite
def _compounding_faults(draw: Draw, arguments: Arguments) -> Fault:
    with_momentum = [name for name in ("beta", "velocity") if arguments.get(name) is not None]
    if len(with_momentum) == 2 and draw(st.integers(0, 4)) == 0:
        missing = draw(st.sampled_from(with_momentum))
        return arguments.spoil(f"no {missing}", with_momentum, **{missing: None})
    # Any number of scales is right.
    return arguments.spoil_a_tensor(draw, "x", ["beta", "velocity"], held={"states": (1, 2, 3, 4)})


@st.composite
def rope_calls(draw: Draw, backend: Backend) -> Call:
    topologies = TOPOLOGIES if backend.has_cylinder() else TOPOLOGIES[:2]
    lattice = draw(lattices(topologies, MAX_SIDE))
    seq_len, offset = lattice.num_sites, 0
    if lattice.is_causal:
        seq_len = draw(st.integers(1, 20))
        offset = draw(st.one_of(st.integers(0, 99), st.integers(0, 2**70)))
    shape = (draw(st.integers(0, 2)), draw(st.integers(1, 3)), seq_len, 4 * draw(st.integers(1, 6)))
    dtype = draw(st.sampled_from(backend.dtypes))
    x = _random({"x": shape}, draw(st.integers(0, 999)))["x"].to(backend.device, dtype)
    arguments, faults = Arguments({"x": x, "lattice": lattice, "offset": offset}), []
    for _ in range(number_of_faults(draw)):
        kind = draw(st.sampled_from(["lattice", "offset", "head_dim", "length", "x"]))
        whole = "x" in arguments.whole()
        if kind in _ROPE_FAULTS:
            faults.append(arguments.spoil(kind, [kind], **{kind: draw(st.sampled_from(_ROPE_FAULTS[kind]))}))
        elif kind == "head_dim" and whole:
            size = draw(st.sampled_from([0, 1, 2, 6, 7]))
            faults.append(arguments.spoil(kind, ["x"], x=x.new_zeros(()).expand(*shape[:3], size)))
        elif kind == "length" and whole and not lattice.is_causal and "lattice" not in arguments.spoiled:
            length = draw(st.sampled_from([0, 1, seq_len - 1, seq_len + 1, 2**31, 2**40]))
            faults.append(arguments.spoil(kind, ["x"], x=x.new_zeros(()).expand(*shape[:2], length, shape[3])))
        else:
            wrong = [None, 1.0, [[1.0]], "x", x.to_sparse(), x.int(), x[None], torch.nested.nested_tensor([x, x])]
            faults.append(arguments.spoil("x", ["x"], x=draw(st.sampled_from(wrong))))
    if faults:

        def run(_):
            with backend.chosen():
                lattice_rope(**arguments)

        return Call("lattice_rope", run, faults)
    arguments["x"] = drawn_view(draw, x)
    return Call("lattice_rope", functools.partial(_check_rope, dict(arguments), drawn_view(draw, x)))


def _check_rope(arguments: dict, d_out: torch.Tensor, backend: Backend) -> None:
    x = arguments["x"]
    before = snapshot(arguments)
    leaf = x.detach().requires_grad_()
    with backend.chosen():
        out = lattice_rope(**arguments | {"x": leaf})
        (d_x,) = torch.autograd.grad(out, leaf, d_out)
    expected = test_rope.formula(x, arguments["lattice"], arguments["offset"])
    wide = torch.finfo(parameter_dtype(x.dtype)).eps
    ulps = torch.finfo(x.dtype).eps / 2 + (4 + x.shape[-1] // 4) * wide
    for actual, wanted in ((out.detach(), expected), (d_x, _turned_back(arguments, d_out))):
        assert actual.dtype == x.dtype
        if wanted.numel():
            assert (actual.double() - wanted).abs().max() <= ulps * 2**0.5 * wanted.abs().max() * 2**0.5
    assert_left_alone(arguments, before)


def _turned_back(arguments: dict, d_out: torch.Tensor) -> torch.Tensor:
    """The formula's gradient: a rotation of pairs is turned back by exchanging them, turning, and exchanging again."""
    halves = d_out.double().unflatten(-1, (2, 2, -1)).flip(-2).flatten(-3)
    turned = test_rope.formula(halves, arguments["lattice"], arguments["offset"])
    return turned.unflatten(-1, (2, 2, -1)).flip(-2).flatten(-3)


_NUMBERS = (2, 3, 4, 6, 8, 9, 12, 1, 0, -1, 2**24, 2**47, 10**30, numpy.int64(6), 4.0, "6", None, True, math.nan, [4])
_RADII = ((3, 7), [2, 0], (0, 0), (10**30, 1), (numpy.int32(2), 1), (-1, 2), (1.0, 2), (3,), (1, 2, 3), 3, None, "37",
          (True, 1), (2, None))
_STREAMS = (None, range(8), {0, 5}, [Stream.major_forward, "cross_u_to_v"], (7, 7), (numpy.int64(2),))
_WRONG_STREAMS = (iter(()), [], (8,), [-1], ["spiral"], "major_forward", 3, [1.5], [None], [True])
_TOPOLOGIES = (*TOPOLOGIES, "Periodic", "", None, 1, "torus")


@st.composite
def lattice_calls(draw: Draw, backend: Backend) -> Call:
    """`TorusLattice` of anything: `wrong` says independently what is wrong with it."""
    arguments = {
        "n_major": draw(st.sampled_from(_NUMBERS[: draw(st.sampled_from([7, 7, 7, len(_NUMBERS)]))])),
        "n_minor": draw(st.sampled_from(_NUMBERS[: draw(st.sampled_from([7, 7, 7, len(_NUMBERS)]))])),
        "topology": draw(st.sampled_from(_TOPOLOGIES[: draw(st.sampled_from([3, 3, len(_TOPOLOGIES)]))])),
        "winding": draw(st.sampled_from([1] * len(_NUMBERS) + list(_NUMBERS))),
        "cross_radius": draw(st.sampled_from(_RADII[: draw(st.sampled_from([5, len(_RADII)]))])),
        "streams": draw(st.sampled_from(draw(st.sampled_from([_STREAMS, _STREAMS, _WRONG_STREAMS])))),
    }

    def run(_):
        lattice = TorusLattice(**arguments)
        assert lattice.num_sites == int(arguments["n_major"]) * int(arguments["n_minor"])
        again = TorusLattice.from_spec(lattice.spec)
        if max(lattice.cross_radius) < 2**62:
            assert again == lattice and hash(again) == hash(lattice)
        assert all(abs(number) < 2**63 for number in lattice.spec)

    return Call("TorusLattice", run, _wrong_lattice(**arguments))


def _is_integer(x: object) -> bool:
    return not isinstance(x, bool) and hasattr(x, "__index__")


def _wrong_lattice(n_major, n_minor, topology, winding, cross_radius, streams) -> list[Fault]:
    faults = []

    def wrong(what: str, *names: str) -> None:
        faults.append(Fault(what, frozenset(names)))

    for name, value, smallest in (("n_major", n_major, 2), ("n_minor", n_minor, 2), ("winding", winding, 1)):
        if not _is_integer(value) or operator.index(value) < smallest:
            wrong(f"{name} {value!r}", name)
    if not isinstance(topology, str) or topology not in TOPOLOGIES:
        wrong(f"topology {topology!r}", "topology")
    if _is_integer(n_major) and _is_integer(n_minor) and min(n_major, n_minor) >= 2:
        if n_major * n_minor > 2**48:
            wrong("too many sites", "n_major", "n_minor")
        opens = topology == "periodic" and _is_integer(winding) and winding * n_major % n_minor
        if opens or (_is_integer(winding) and winding >= n_minor):
            wrong(f"winding {winding!r}", "winding")
    pair = isinstance(cross_radius, (tuple, list)) and len(cross_radius) == 2
    if not pair or not all(_is_integer(r) and r >= 0 for r in cross_radius):
        wrong(f"cross_radius {cross_radius!r}", "cross_radius")
    if any(streams is x for x in _WRONG_STREAMS):
        wrong(f"streams {streams!r}", "streams")
    return faults
