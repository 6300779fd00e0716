"""Random calls of the public API, valid and not, and the judgement of what came of them.

A call without faults must give the right answer, within the error budget of `support`. A call with faults must be
refused with the documented error, whose message begins with the name of an argument at fault.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import dense
import numpy
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn as Draw
from support import LAYOUTS, Backend
from torch import Tensor

from torus_kernels import BackendError


@dataclass(frozen=True)
class Fault:
    """Something wrong with a call: what it is, and the arguments with one of which the message must begin."""

    what: str
    names: frozenset[str]
    errors: tuple[type[Exception], ...] = (TypeError, ValueError)

    def explains(self, error: Exception) -> bool:
        return isinstance(error, self.errors) and any(
            re.match(rf"{name}\b", str(error)) for name in self.names)


@dataclass
class Call:
    """One call: ``run`` makes it and, where nothing is wrong with it, holds the result against the truth."""

    function: str
    run: Callable[[Backend], None] = field(repr=False)  # its numbers follow from the seed
    faults: list[Fault] = field(default_factory=list)


def judge(backend: Backend, call: Call) -> str:
    """Makes the call and returns its outcome: ``"right"`` or the error's name. Raises where it is neither."""
    faults = ", ".join(fault.what for fault in call.faults)
    try:
        call.run(backend)
    except (TypeError, ValueError, BackendError) as error:
        if not any(fault.explains(error) for fault in call.faults):
            raise AssertionError(f"{call.function} refused: {error!r}; wrong was: {faults or 'nothing'}") from error
        return type(error).__name__
    if call.faults:
        raise AssertionError(f"{call.function} took what it must refuse: {faults}")
    return "right"


def overlapping(x: Tensor) -> Tensor:
    """Other values of the same shape, whose rows share most of their memory."""
    strides = [1] * x.dim()
    room = x.reshape(-1)[: sum(n - 1 for n in x.shape) + 1].contiguous()
    return room.as_strided(x.shape, strides)


def repeated(x: Tensor) -> Tensor:
    """Other values of the same shape: the first batch element, or head, for all, with a stride of zero."""
    return x[:1].expand_as(x)


def negated(x: Tensor) -> Tensor:
    """The same values as a view that PyTorch remembers to negate, as the imaginary part of a conjugate is."""
    return torch._neg_view(-x)


# Of tensors of any dtype and dimension, and those that need more.
_ANY_VIEWS = {"overlapping": overlapping, "repeated": repeated, "unaligned": LAYOUTS["unaligned"]}
_FLOAT_VIEWS = {"sliced": LAYOUTS["sliced"], "gapped": LAYOUTS["gapped"], "negated": negated}
_DEEP_VIEWS = {"transposed": LAYOUTS["transposed"], "column": lambda x: x.mT.contiguous().mT}


def drawn_view(draw: Draw, x: Tensor) -> Tensor:
    """The tensor in one of the layouts that callers have; half of the time as it is."""
    if draw(st.booleans()) or not x.numel():
        return x
    views = _ANY_VIEWS | (_FLOAT_VIEWS if x.is_floating_point() else {}) | (_DEEP_VIEWS if x.dim() > 2 else {})
    return views[draw(st.sampled_from(sorted(views)))](x)


_NO_TENSORS = (0.5, 3, "tensor", [[1.0]], float, numpy.ones(3), object())
_WRONG_DTYPES = (torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _other_dtype(draw: Draw, x: Tensor) -> Tensor:
    others = [dtype for dtype in (*_WRONG_DTYPES, *_FLOATS)
              if dtype != x.dtype and not {dtype, x.dtype} <= {torch.int32, torch.int64}]
    return x.to(draw(st.sampled_from(others)))


def _other_shape(draw: Draw, x: Tensor, dims: Collection[int] | None) -> Tensor:
    """One dimension more or less, or one of ``dims`` (default: all) longer, shorter, empty or far too long."""
    dims = list(range(x.dim())) if dims is None else sorted(dims)
    kinds = ["deeper", "longer", "huge", "empty"]
    if x.dim() > 1:
        kinds.append("flatter")
    kind = draw(st.sampled_from(kinds))
    if kind == "deeper":
        return x[None]
    if kind == "flatter":
        return x[0] if x.shape[0] else x.flatten(0, 1)
    dim = draw(st.sampled_from(dims))
    size = x.shape[dim]
    if kind == "longer":
        return torch.cat([x, x.narrow(dim, 0, 1) if size else x.new_zeros(*x.shape[:dim], 1, *x.shape[dim + 1 :])], dim)
    if kind == "empty" and size:
        return x.narrow(dim, 0, 0)
    sizes = list(x.shape)
    sizes[dim] = draw(st.sampled_from([2**31, 2**31 + 1, 2**40]))
    return x.new_zeros(()).expand(sizes)


_KINDS = ("type", "layout", "dtype", "shape", "shape", "device")


def _spoil_tensor(draw: Draw, x: Tensor, kind: str, required: bool, dims: Collection[int] | None) -> object:
    """What is not the tensor that the API asks for: one of another kind."""
    if kind == "type":
        return draw(st.sampled_from([*_NO_TENSORS, *([None] if required else [])]))
    if kind == "layout":
        # A nested tensor says that it is strided.
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        return draw(st.sampled_from([x.to_sparse(), nested]))
    if kind == "dtype":
        return _other_dtype(draw, x)
    return x.to("meta") if kind == "device" else _other_shape(draw, x, dims)


class Arguments(dict):
    """Arguments of a call, and which of them have been spoiled."""

    def __init__(self, arguments: dict) -> None:
        super().__init__(arguments)
        self.spoiled: set[str] = set()
        # Two tensors spoiled alike may go together again.
        self.kinds = list(_KINDS)

    def spoil(self, what: str, names: Collection[str], errors=(TypeError, ValueError), **values: object) -> Fault:
        """Other values, after which the message must name one of ``names``."""
        self.update(values)
        self.spoiled |= values.keys()
        return Fault(what, frozenset(names), errors)

    def whole(self) -> list[str]:
        """The tensors that are as they should be."""
        return [name for name, x in self.items() if isinstance(x, Tensor) and name not in self.spoiled]

    def spoil_a_tensor(
        self, draw: Draw, owner: str, optional: Collection[str] = (), held: dict[str, Collection[int]] | None = None
    ) -> Fault:
        """Spoils one of the tensors. A wrong ``owner`` may show in any of the others, which are held against it;
        ``held`` are a tensor's dimensions that cannot change alone (default: all)."""
        tensors = self.whole()
        name = draw(st.sampled_from(tensors))
        kind = draw(st.sampled_from(self.kinds))
        self.kinds = [other for other in self.kinds if other != kind]
        value = _spoil_tensor(draw, self[name], kind, name not in optional, (held or {}).get(name))
        return self.spoil(f"{kind} of {name}", self.keys() if name == owner else [name], **{name: value})


def number_of_faults(draw: Draw) -> int:
    return draw(st.sampled_from([0, 0, 0, 0, 0, 1, 1, 1, 1, 2]))


def snapshot(tensors: dict[str, object]) -> dict[str, Tensor]:
    """Contiguous copies of the tensors among them."""
    return {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()
            if isinstance(x, Tensor)}


def assert_left_alone(tensors: dict[str, object], before: dict[str, Tensor]) -> None:
    for name, x in before.items():
        assert torch.equal(torch.nan_to_num(tensors[name], 7.0), torch.nan_to_num(x, 7.0)), f"{name} was changed"


def assert_poison_shows(
    actual: dict[str, Tensor], clean: dict[str, Tensor], batch: int, group: int, groups: int, rows: Tensor,
    channel: int | slice,
) -> None:
    """A NaN or infinity in batch element ``batch`` and key/value head ``group`` shows in the output's ``rows``, and
    reaches no other batch element and no other group of heads."""
    out = actual["out"]
    heads = out.shape[1] // groups
    assert not out[batch, group * heads : (group + 1) * heads, rows][..., channel].isfinite().any(), "poison vanished"
    for name, value in actual.items():
        for b in range(out.shape[0] if value.dim() > 2 else 1):
            # Parameters of [H] and [H, 8] are shared by the batch, so that their gradients keep groups apart only.
            part, same = (value[b], clean[name][b]) if value.dim() > 2 else (value, clean[name])
            for g in range(groups):
                if (value.dim() <= 2 or b == batch) and g == group:
                    continue
                mine = slice(g * part.shape[0] // groups, (g + 1) * part.shape[0] // groups)
                assert torch.equal(part[mine], same[mine]), f"poison reached {name} of {b}, {g}"


def rows_that_see(lattice, key: int, seq_len: int, first_key: Tensor | None, batch: int) -> Tensor:
    """``[T]`` bool: the queries to which a stream of the lattice shows a key."""
    seen = torch.stack([dense.geometry(lattice, int(s), seq_len)[0][:, key] for s in lattice.streams]).any(dim=0)
    if first_key is not None:
        t = torch.arange(seq_len)
        seen &= key >= torch.minimum(first_key[batch].long(), t)
    return seen


POISONS = (math.nan, math.inf, -math.inf)
