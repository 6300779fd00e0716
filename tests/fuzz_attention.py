"""Random calls of `torus_attention`, `torus_attention_with_stats` and `torus_attention_decode`."""

from __future__ import annotations

import functools
from fractions import Fraction

import decoding
import dense
import numpy
import torch
from fuzzing import (
    POISONS,
    Arguments,
    Call,
    Draw,
    Fault,
    assert_left_alone,
    assert_poison_shows,
    drawn_view,
    number_of_faults,
    rows_that_see,
    snapshot,
)
from hypothesis import strategies as st
from strategies import TOPOLOGIES, lattices, problems
from support import Backend, Problem, assert_within_budget, check_precision, error, evaluate, score_roundings

import torus_kernels
from torus_kernels import BackendError, TorusKVCache, TorusLattice, torus_attention_decode

MAX_SIDE = 6
OPTIONAL = ("stream_weights", "decay", "ema_state", "ema_alpha", "first_key")


def topologies_of(backend: Backend) -> tuple[str, ...]:
    return TOPOLOGIES if backend.has_cylinder() else TOPOLOGIES[:2]


@st.composite
def attention_calls(draw: Draw, backend: Backend) -> Call:
    problem = draw(problems(topologies_of(backend), MAX_SIDE))
    problem = problem.to(draw(st.sampled_from(backend.dtypes)), backend.device)
    name = draw(st.sampled_from(["torus_attention", "torus_attention_with_stats"]))
    if count := number_of_faults(draw):
        arguments = Arguments(problem.arguments())
        faults = [draw(_attention_faults(arguments, backend)) for _ in range(count)]
        function = getattr(torus_kernels, name)
        return Call(name, lambda _: function(**{"backend": backend.name} | arguments), faults)
    if draw(st.integers(0, 19)) == 0:
        return Call(name, functools.partial(_check_empty, _without_batch(problem)))
    if draw(st.integers(0, 19)) == 0:
        return Call(name, functools.partial(_check_meta, problem, draw(st.sampled_from([1, 2**31, 2**40]))))
    if draw(st.integers(0, 4)) == 0:
        return Call(name, functools.partial(_check_poison, problem, draw(_poisons(problem))))
    problem = draw(_in_other_layouts(problem))
    wanted = draw(st.sets(st.sampled_from(sorted(problem.tensors()))))
    with_stats = name == "torus_attention_with_stats"
    return Call(name, functools.partial(_check_attention, problem, wanted, with_stats))


@st.composite
def _in_other_layouts(draw: Draw, problem: Problem) -> Problem:
    """Every tensor with strides of its own; sometimes one tensor in two places."""
    same = {"q": problem.q} if problem.q.shape == problem.k.shape else {}
    same["k"] = problem.k
    names = [name for name in ("k", "v", "ema_state")
             if (x := getattr(problem, name)) is not None and any(x.shape == y.shape for y in same.values())]
    for name in draw(st.sets(st.sampled_from(names))) if draw(st.booleans()) else ():
        source = draw(st.sampled_from([n for n, x in same.items() if x.shape == getattr(problem, name).shape]))
        problem = problem.replace(**{name: getattr(problem, source)})
    tensors = {**problem.tensors(), "d_out": problem.d_out, "first_key": problem.first_key}
    return problem.replace(**{n: drawn_view(draw, x) for n, x in tensors.items() if x is not None})


def _check_attention(problem: Problem, wanted: set[str], with_stats: bool, backend: Backend) -> None:
    before = snapshot(vars(problem))
    # The truth reads copies: PyTorch's own products refuse some overlapping views.
    packed = problem.replace(**before)
    check_precision(backend, packed, problem.q.dtype, sums_cancel=True)
    everything = evaluate(backend.attention, problem)
    for name, value in evaluate(backend.attention, packed).items():
        assert_same(backend, everything[name], value)
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in problem.tensors().items()}
    out = backend.attention(**problem.replace(**leaves).arguments())
    assert out.requires_grad == bool(wanted)
    assert_same(backend, out.detach(), everything["out"])
    if wanted:
        grads = torch.autograd.grad(out, [leaves[name] for name in sorted(wanted)], problem.d_out)
        for name, grad in zip(sorted(wanted), grads, strict=True):
            assert_same(backend, grad, everything[f"d_{name}"])
    if with_stats:
        out, stats = backend.attention_with_stats(**problem.arguments())
        assert_same(backend, out, everything["out"])
        lse, entropy = dense.statistics(**packed.statistics_arguments())
        size = lse[lse.isfinite()].abs().max().item()
        for value, expected in ((stats.lse, lse), (stats.entropy, entropy)):
            assert torch.equal(value.isinf(), expected.isinf())
            visible = expected.isfinite()
            assert error(value[visible], expected[visible]) <= 16 * torch.finfo(torch.float32).eps * max(1.0, size)
    assert_left_alone(vars(problem), before)


def assert_same(backend: Backend, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit; the reference leaves its sums to BLAS, whose order may change with what is asked of it."""
    if backend.name != "reference":
        assert torch.equal(actual, expected)
    else:
        assert_within_budget({"out": actual}, {"out": expected.double()}, {"out": expected})


def _without_batch(problem: Problem) -> Problem:
    """The same with B = 0; only parameters that are not shared by the batch have it."""
    shared = {"stream_weights": 2, "decay": 2, "ema_alpha": 1}
    tensors = {**problem.tensors(), "d_out": problem.d_out, "first_key": problem.first_key}
    batched = {name: x for name, x in tensors.items() if x is not None and x.dim() != shared.get(name)}
    return problem.replace(**{name: x[:0] for name, x in batched.items()})


def _check_empty(problem: Problem, backend: Backend) -> None:
    results = evaluate(backend.attention, problem)
    assert results["out"].shape == problem.q.shape
    for name, x in problem.tensors().items():
        assert results[f"d_{name}"].shape == x.shape
        assert (results[f"d_{name}"] == 0).all()


def _check_meta(problem: Problem, factor: int, backend: Backend) -> None:
    """Shapes without memory, of any size: ``factor`` times the tokens in the causal topology, else the batch."""
    dim = 2 if problem.lattice.is_causal else 0

    def grown(x: torch.Tensor) -> torch.Tensor:
        sizes = list(x.shape)
        if x.dim() > 2:
            sizes[dim] *= factor
        return torch.empty(sizes, dtype=x.dtype, device="meta")

    names = ("q", "k", "v", "stream_weights", "decay", "ema_state", "ema_alpha")
    meta = {name: grown(x) for name in names if (x := getattr(problem, name)) is not None}
    out = torus_kernels.torus_attention(lattice=problem.lattice, scale=problem.scale, **meta)
    assert out.shape == meta["q"].shape and out.is_meta and out.dtype == problem.q.dtype


@st.composite
def _poisons(draw: Draw, problem: Problem) -> tuple[str, float, int, int, int, int]:
    """Where a NaN or infinity lies: tensor, number, batch element, head, token, channel."""
    name = draw(st.sampled_from([name for name in ("q", "k", "v", "ema_state") if getattr(problem, name) is not None]))
    # An infinite key may score -inf, which is then rightly of no weight; infinite queries likewise.
    number = draw(st.sampled_from(POISONS if name in ("v", "ema_state") else POISONS[:1]))
    return (name, number, *(draw(st.integers(0, n - 1)) for n in getattr(problem, name).shape))


def _check_poison(problem: Problem, poison: tuple, backend: Backend) -> None:
    name, number, *(batch, head, token, channel) = poison
    x = getattr(problem, name).clone()
    x[batch, head, token, channel] = number
    clean, actual = (evaluate(backend.attention, p) for p in (problem, problem.replace(**{name: x})))
    seq_len, groups = problem.q.shape[2], problem.k.shape[1]
    if name in ("k", "v"):
        group, rows = head, rows_that_see(problem.lattice, token, seq_len, problem.first_key, batch)
    else:
        group, rows = head // (problem.q.shape[1] // groups), torch.arange(seq_len) == token
        # The other heads of the group need not show it.
        shown = actual["out"][batch, head, token]
        assert not (shown if name == "q" else shown[channel]).isfinite().any(), "poison vanished"
        rows = torch.zeros_like(rows)
    channels = slice(None) if name in ("q", "k") else channel
    assert_poison_shows(actual, clean, batch, group, groups, rows, channels)


@st.composite
def _attention_faults(draw: Draw, arguments: Arguments, backend: Backend) -> Fault:
    """Spoils arguments of `torus_attention`."""
    tokens, lattice = ("q", "k", "v"), arguments["lattice"]
    kinds = ["lattice", "scale", "backend", "half_state"]
    kinds += ["tensor"] * 6 if arguments.whole() else []
    if arguments.spoiled.isdisjoint(tokens):
        kinds += ["head_dim", "no_tokens", "heads"]
        kinds += ["length"] if isinstance(lattice, TorusLattice) and not lattice.is_causal else []
    kinds += ["first_key"] if isinstance(lattice, TorusLattice) and not lattice.is_causal else []
    kind = draw(st.sampled_from(kinds))
    if kind == "lattice":
        wrong = draw(st.sampled_from([None, (3, 4), "causal", TorusLattice, 12]))
        return arguments.spoil(kind, ["lattice"], lattice=wrong)
    if kind == "scale":
        return arguments.spoil(kind, ["scale"], scale=draw(st.sampled_from(WRONG_SCALES)))
    if kind == "backend":
        elsewhere = ["cuda"] if Backend("cuda").device != backend.device else []
        wrong = draw(st.sampled_from(["CPU", "", "torch", 3, str, *elsewhere]))
        errors = (BackendError,) if wrong == "cuda" else (TypeError, ValueError)
        return arguments.spoil(kind, ["backend"], errors, backend=wrong)
    if kind == "half_state":
        state, alpha = draw(st.sampled_from([(torch.zeros(1), None), (None, torch.zeros(1))]))
        return arguments.spoil(kind, ["ema_state", "ema_alpha"], ema_state=state, ema_alpha=alpha)
    if kind == "first_key":
        return arguments.spoil(kind, ["first_key"], first_key=torch.zeros(1, 1, dtype=torch.int32))
    if kind == "tensor":
        # q's heads are held against others only where these are given.
        return arguments.spoil_a_tensor(draw, "q", OPTIONAL, held={"q": (0, 2, 3)})
    shapes = {name: list(arguments[name].shape) for name in tokens}
    if kind == "heads":
        kind = draw(st.sampled_from(["no heads", "no heads of keys", "heads that do not divide"]))
        wrong = {"no heads": (0, 0), "no heads of keys": (shapes["q"][1], 0),
                 "heads that do not divide": (shapes["q"][1], shapes["q"][1] + 1)}[kind]
        for name in tokens:
            shapes[name][1] = wrong[name != "q"]
    else:
        seq_len = shapes["q"][2]
        dim, sizes = {
            "head_dim": (3, [0, 1, 4, 12, 257, 264, 2**31]), "no_tokens": (2, [0]),
            "length": (2, [1, seq_len - 1, seq_len + 1, 2**31, 2**40]),
        }[kind]
        size = draw(st.sampled_from(sizes))
        for name in tokens:
            shapes[name][dim] = size
    wrong = {name: arguments[name].new_zeros(()).expand(shape) for name, shape in shapes.items()}
    return arguments.spoil(kind, tokens, **wrong)


WRONG_SCALES = ("0.3", True, 1j, [0.3], float("nan"), float("inf"), -float("inf"), 10**400, torch.tensor(0.3),
                numpy.ones(1))
RIGHT_SCALES = (None, 0, -1, 0.5, Fraction(1, 3), numpy.float32(0.25), numpy.float64(-0.5))


@st.composite
def decode_calls(draw: Draw, backend: Backend) -> Call:
    name = "torus_attention_decode"
    problem = draw(problems(("causal",), MAX_SIDE - 1)).to(draw(st.sampled_from(backend.dtypes)), backend.device)
    problem = problem.replace(scale=draw(st.sampled_from(RIGHT_SCALES)))
    seq_len = problem.q.shape[2]
    if count := number_of_faults(draw):
        cache = decoding.make_cache(problem)
        decoding.append(cache, problem, 0, seq_len)
        arguments = Arguments({"q": problem.q[:, :, -1:], "cache": cache, **decoding.options(problem, seq_len - 1)})
        faults = [draw(_decode_faults(arguments, problem)) for _ in range(count)]
        return Call(name, lambda _: torus_attention_decode(**{"backend": backend.name} | arguments), faults)
    cuts = sorted(draw(st.sets(st.integers(1, seq_len - 1), max_size=4))) if seq_len > 1 else []
    batch = problem.q.shape[0]
    reorders = {cut: draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch))
                for cut in cuts if draw(st.booleans())}
    return Call(name, functools.partial(_check_decode, problem, cuts, reorders, draw(st.integers(0, 9))))


def _check_decode(problem: Problem, cuts: list[int], reorders: dict[int, list[int]], forgotten: int, backend) -> None:
    """Appends the sequence in pieces, decoding and reordering on the way, and holds its last row against the truth."""
    cache, seq_len = decoding.make_cache(problem), problem.q.shape[2]
    if forgotten:  # what an earlier sequence left must not matter
        cache.append(*torch.full((2, *problem.k.shape[:2], forgotten, problem.k.shape[3]), torch.inf).to(problem.k))
        cache.reset()
    for start, stop in zip([0, *cuts], [*cuts, seq_len], strict=True):
        decoding.append(cache, problem, start, stop)
        actual = decoding.decode(backend, problem, cache, stop - 1)
        if stop in reorders:
            indices = torch.tensor(reorders[stop])
            cache.reorder(indices.to(problem.k.device))
            shuffled = {}
            for name in ("k", "v"):
                x = getattr(problem, name)
                shuffled[name] = torch.cat([x[indices, :, :stop], x[:, :, stop:]], dim=2)
            problem = problem.replace(**shuffled)
    assert len(cache) == seq_len
    if problem.scale is not None:
        problem = problem.replace(scale=float(problem.scale))
    plain = dense.attention(**problem.arguments())[:, :, -1:]
    expected = dense.attention(**problem.to(torch.float64, backend.device).arguments())[:, :, -1:]
    # Rounding is relative to the terms of the mixture, and of one row all may cancel.
    terms = problem.v.abs().max().item()
    if problem.stream_weights is not None:
        terms *= problem.stream_weights.abs().sum(dim=-1).max().item()
    gain = {"out": max(1.0, terms / expected.abs().max().item())}
    assert_within_budget({"out": actual}, {"out": expected}, {"out": plain}, score_roundings(problem), gain)


@st.composite
def _decode_faults(draw: Draw, arguments: Arguments, problem: Problem) -> Fault:
    """Spoils arguments of `torus_attention_decode`."""
    q, kv_heads = problem.q[:, :, -1:], problem.k.shape[1]
    kinds = ["cache", "empty", "scale"]
    kinds += ["tensor"] * 5 if arguments.whole() else []
    kinds += [] if "q" in arguments.spoiled else ["two_queries"] + ["heads"] * (kv_heads > 1)
    kind = draw(st.sampled_from(kinds))
    if kind == "cache":
        wrong = draw(st.sampled_from([None, problem.k, TorusKVCache, {}]))
        return arguments.spoil(kind, ["cache"], cache=wrong)
    if kind == "empty":
        return arguments.spoil(kind, ["cache"], cache=decoding.make_cache(problem))
    if kind == "scale":
        return arguments.spoil(kind, ["scale"], scale=draw(st.sampled_from(WRONG_SCALES)))
    if kind == "two_queries":
        return arguments.spoil(kind, ["q"], q=q.expand(-1, -1, 2, -1))
    if kind == "heads":
        return arguments.spoil(kind, ["q"], q=q[:, :1].expand(-1, kv_heads + 1, -1, -1))
    return arguments.spoil_a_tensor(draw, "q", OPTIONAL, held={"q": (0, 2, 3)})


@st.composite
def cache_calls(draw: Draw, backend: Backend) -> Call:
    """`TorusKVCache`: its arguments, and those of ``append``, which leaves it as it was where it refuses."""
    lattice = draw(lattices(("causal",), MAX_SIDE))
    right = {"lattice": lattice, "batch": draw(st.integers(0, 3)), "kv_heads": draw(st.integers(1, 3)),
             "head_dim": 8 * draw(st.integers(1, 4)), "dtype": draw(st.sampled_from(backend.dtypes))}
    wrong = {
        "lattice": [None, (3, 4), "causal", TorusLattice(4, 4), TorusLattice(4, 4, "cylinder")],
        "batch": [-1, 1.0, True, "2", None, -(2**40)], "kv_heads": [0, -3, 2.0, None],
        "head_dim": [0, 4, 12, 264, -8, 8.0, "8", 2**31], "dtype": [torch.int32, torch.complex64, "float32", 32],
    }
    faults = []
    if count := number_of_faults(draw):
        for name in draw(st.sets(st.sampled_from(sorted(wrong)), min_size=count, max_size=count)):
            right[name] = draw(st.sampled_from(wrong[name]))
            faults.append(Fault(f"{name} {right[name]!r}", frozenset({name})))
        return Call("TorusKVCache", lambda _: TorusKVCache(**right, device=backend.device), faults)
    cache = TorusKVCache(**right, device=backend.device)
    shape = (right["batch"], right["kv_heads"], draw(st.integers(1, 2 * lattice.num_sites)), right["head_dim"])
    k = torch.randn(shape, generator=torch.Generator().manual_seed(shape[2])).to(backend.device, cache.dtype)
    pieces = Arguments({"k": k, "v": k.neg()})
    if draw(st.booleans()):
        faults.append(pieces.spoil_a_tensor(draw, "k", held={"k": (0, 1, 3)}))

    def run(_):
        try:
            cache.append(**pieces)
        except (TypeError, ValueError):
            assert len(cache) == 0
            raise
        kept = min(shape[2], lattice.num_sites)
        slots = torch.arange(shape[2] - kept, shape[2]) % lattice.num_sites
        assert len(cache) == shape[2]
        assert torch.equal(cache.keys[:, :, slots], k[:, :, -kept:])
        assert torch.equal(cache.values[:, :, slots], -k[:, :, -kept:])

    return Call("TorusKVCache.append", run, faults)
