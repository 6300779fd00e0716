"""The expert's composition of PyTorch calls: every stream a batch of small dense attentions over gathered blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torus_kernels import TorusLattice

from .compiling import allow_recompiles
from .tiling import Blocks, Family, StreamMask, families


class _TakeRows(torch.autograd.Function):
    """``rows[index]``, whose gradient is a segmented sum over precomputed segments: far quicker on a CPU than the
    scattered additions that autograd would make of it."""

    @staticmethod
    def forward(ctx, rows: Tensor, take: Take) -> Tensor:  # [R, W] -> [*index.shape, W]
        ctx.take = take
        return F.embedding(take.index, rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        take, grad = ctx.take, grad.reshape(-1, grad.shape[-1])
        if take.is_permutation:
            return F.embedding(take.uses, grad), None
        return F.embedding_bag(take.uses, grad, take.segments, mode="sum"), None


class Take(NamedTuple):
    """Rows to take, and for the gradient where each row was used: ``uses[segments[r]:segments[r + 1]]``."""

    index: Tensor
    uses: Tensor
    segments: Tensor
    is_permutation: bool

    @classmethod
    def of(cls, index: Tensor, num_rows: int) -> Take:
        flat = index.flatten()
        counts = flat.bincount(minlength=num_rows)
        return cls(index, flat.argsort(stable=True), counts.cumsum(0) - counts, bool((counts == 1).all()))

    def __call__(self, rows: Tensor) -> Tensor:
        return _TakeRows.apply(rows, self)


def _as_view(tokens: Tensor) -> tuple[int, bool] | None:
    """``(first token, transposed)`` where blocks ``[n, Q]`` are rows, or columns, of a run of tokens; else None."""
    for transposed, order in ((False, tokens), (True, tokens.T)):
        first = int(order[0, 0])
        if torch.equal(order.flatten(), torch.arange(first, first + order.numel())):
            return first, transposed
    return None


class _Splitter:
    """Tokens ``[B, H, T, D]`` to blocks ``[B * n, H, Q, D]``: a view where rows or columns allow it, else a gather."""

    def __init__(self, tokens: Tensor, batch: int, heads: int, seq_len: int) -> None:
        self.count, self.size = tokens.shape
        self.view = _as_view(tokens)
        if self.view is None:
            offset = torch.arange(batch * heads).view(batch, 1, heads, 1) * seq_len
            index = (offset + tokens[None, :, None]).flatten(0, 1)  # [B * n, H, Q]
            self.take = Take.of(index, batch * heads * seq_len)

    def __call__(self, x: Tensor) -> Tensor:
        if self.view is None:
            return self.take(x.reshape(-1, x.shape[-1]))
        first, transposed = self.view
        x = x.narrow(2, first, self.count * self.size)
        sizes = (self.size, self.count) if transposed else (self.count, self.size)
        x = x.unflatten(2, sizes)  # [B, H, n, Q, D]
        return (x.transpose(2, 3) if transposed else x).transpose(1, 2).flatten(0, 1)


class _Mask:
    """What one stream adds to a block's scores."""

    def __init__(self, mask: StreamMask, dtype: torch.dtype) -> None:
        self.stream = mask.stream.index
        self.columns = slice(mask.first, mask.last)
        self._rho_squared = mask.rho_squared.to(dtype)
        self._hidden = torch.zeros_like(self._rho_squared).masked_fill(~mask.visible, float("-inf"))

    def bias(self, decay: Tensor, dtype: torch.dtype) -> Tensor:
        """``[H, Q, columns]``: the geodesic bias where visible, else -inf."""
        strength = decay[:, self.stream, None, None]
        return torch.addcmul(self._hidden, strength, self._rho_squared, value=-0.5).to(dtype)


class _Part:
    """Blocks that look alike, ready to be cut out of the tokens."""

    def __init__(self, blocks: Blocks, batch: int, heads: int, seq_len: int, dtype: torch.dtype) -> None:
        self.split_queries = _Splitter(blocks.queries, batch, heads, seq_len)
        same = torch.equal(blocks.queries, blocks.keys)
        self.split_keys = self.split_queries if same else _Splitter(blocks.keys, batch, heads, seq_len)
        self.num_keys = blocks.keys.shape[1]
        self.masks = tuple(_Mask(mask, dtype) for mask in blocks.masks)


class _Plan:
    """A family with its indices for ``batch`` and ``heads``, and its distances in the dtype of the decay."""

    def __init__(self, family: Family, batch: int, heads: int, dtype: torch.dtype) -> None:
        seq_len = family.place.numel()
        self.parts = [_Part(blocks, batch, heads, seq_len, dtype) for blocks in family.blocks]
        rows = sum(blocks.queries.numel() for blocks in family.blocks)
        self.in_order = torch.equal(family.place, torch.arange(rows))
        place = torch.arange(batch)[:, None] * rows + family.place
        self.take = Take.of(place, batch * rows)

    def merge(self, outputs: list[Tensor], batch: int) -> Tensor:
        """Blocks ``[B * n, H, Q, D]`` of all parts to tokens ``[B, T, H, D]``."""
        rows = [o.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2) for o in outputs]  # [B, n * Q, H, D]
        merged = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        if self.in_order:
            return merged
        return self.take(merged.flatten(2).flatten(0, 1)).unflatten(-1, merged.shape[-2:])


@functools.lru_cache(maxsize=16)
def _plans(
    lattice: TorusLattice, batch: int, heads: int, seq_len: int, dtype: torch.dtype
) -> tuple[_Plan, ...]:
    return tuple(_Plan(family, batch, heads, dtype) for family in families(lattice, seq_len))


def _attend_sdpa(q: Tensor, k: Tensor, v: Tensor, part: _Part, weights: Tensor, decay: Tensor) -> Tensor:
    """One SDPA call per stream, on the columns that it sees."""
    mixed = None
    for mask in part.masks:
        bias = mask.bias(decay, q.dtype)[None]
        o = F.scaled_dot_product_attention(q, k[:, :, mask.columns], v[:, :, mask.columns], attn_mask=bias)
        weight = weights[:, mask.stream, None, None]
        mixed = weight * o if mixed is None else torch.addcmul(mixed, weight, o)
    return mixed


def _attend_matmul(q: Tensor, k: Tensor, v: Tensor, part: _Part, weights: Tensor, decay: Tensor) -> Tensor:
    """Scores once for all streams of the family, and one product with the values for the weighted softmaxes."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    mixed = None
    for mask in part.masks:
        unseen = (mask.columns.start, part.num_keys - mask.columns.stop)
        bias = F.pad(mask.bias(decay, q.dtype), unseen, value=float("-inf"))
        weight = weights[:, mask.stream, None, None].to(q.dtype)
        probs = (scores + bias).softmax(dim=-1)
        mixed = weight * probs if mixed is None else torch.addcmul(mixed, weight, probs)
    return mixed @ v


def _mix(
    attend: Callable[..., Tensor], plans: tuple[_Plan, ...], q: Tensor, k: Tensor, v: Tensor, weights: Tensor,
    decay: Tensor, state: Tensor, alpha: Tensor,
) -> Tensor:
    """The sum over the families, and the compounding."""
    y = None
    for plan in plans:
        outputs = []
        for part in plan.parts:
            blocks = (part.split_queries(q), part.split_keys(k), part.split_keys(v))
            outputs.append(attend(*blocks, part, weights, decay))
        merged = plan.merge(outputs, q.shape[0])
        y = merged.to(alpha.dtype) if y is None else y + merged
    y = y.transpose(1, 2)  # [B, H, T, D]
    return torch.lerp(state.to(alpha.dtype), y, alpha[:, None, None]).to(q.dtype)


def compose(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, decay: Tensor, state: Tensor, alpha: Tensor,
    lattice: TorusLattice,
) -> Tensor:
    """Torus attention by batched SDPA calls, one per stream; differentiable, any topology.

    Tokens are permuted so that rows, columns and strands (causal: residue classes, cut into runs with the window
    that precedes them) are contiguous, once for both streams of a pair; the cross flows are square query tiles
    with their halo gathered. Shapes are those of `benchmarks.workloads.Attention`.
    """
    return _mix(_attend_sdpa, _plans(lattice, *q.shape[:3], decay.dtype), q, k, v, weights, decay, state, alpha)


def compose_matmul(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, decay: Tensor, state: Tensor, alpha: Tensor,
    lattice: TorusLattice,
) -> Tensor:
    """`compose` with the attention written out: the two streams of a pair share their scores and the product with the
    values. Training is quicker so, because SDPA keeps no fused path for a mask that needs a gradient."""
    return _mix(_attend_matmul, _plans(lattice, *q.shape[:3], decay.dtype), q, k, v, weights, decay, state, alpha)


@functools.cache
def _compiled_mix() -> Callable[..., Tensor]:
    allow_recompiles()
    return torch.compile(_mix, dynamic=False)


def compose_compiled(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, decay: Tensor, state: Tensor, alpha: Tensor,
    lattice: TorusLattice,
) -> Tensor:
    """The quicker of the two compositions for the direction under ``torch.compile``, which fuses what lies between the
    products: `compose` without gradients, `compose_matmul` with them. The first call on a lattice compiles for a
    minute or so."""
    attend = _attend_matmul if torch.is_grad_enabled() else _attend_sdpa
    plans = _plans(lattice, *q.shape[:3], decay.dtype)
    return _compiled_mix()(attend, plans, q, k, v, weights, decay, state, alpha)
