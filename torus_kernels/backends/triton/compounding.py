"""EMA compounding: elementwise over tokens, with the gradients of gates and weights as row sums.

A program owns a block of tokens of one head. Gradients that are summed over tokens leave it as one partial sum each,
which a second pass adds in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import on_device, rows

_ELEMENTS_PER_PROGRAM = 2048
_MAX_COLUMNS = 256
_WARPS = 4


@triton.jit
def _block(heads, seq_len, BLOCK_T: tl.constexpr):
    """The batch element, head and tokens ``[BLOCK_T]`` of this program, in 64 bits."""
    blocks = tl.cdiv(seq_len, BLOCK_T)
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    token = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    return (row // heads).to(tl.int64), (row % heads).to(tl.int64), token


@triton.jit
def _rows(x, strides, batch, head, token):
    """Pointers to the first elements of the tokens' rows, ``[BLOCK_T, 1]``."""
    return x + batch * strides[0] + head * strides[1] + token[:, None] * strides[2]


@triton.jit
def _load(rows, column, visible):
    """A tile in float32, zero where nothing is."""
    return tl.load(rows + column[None, :], mask=visible, other=0.0).to(tl.float32)


@triton.jit
def _store(rows, column, tile, visible):
    tl.store(rows + column[None, :], tile.to(rows.dtype.element_ty), mask=visible)


@triton.jit
def _gate(gate, strides, batch, head, token, seq_len):
    """A gate per token, ``[BLOCK_T, 1]``; one per head has strides of zero."""
    return tl.load(_rows(gate, strides, batch, head, token), mask=(token < seq_len)[:, None], other=0.0)


@triton.jit(do_not_specialize=["seq_len"])
def compound_kernel(
    x, x_strides, state, state_strides, alpha, alpha_strides, beta, beta_strides, velocity, velocity_strides,
    out, out_strides, new_velocity, new_velocity_strides, heads, seq_len, head_dim,
    MOMENTUM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):
    batch, head, token = _block(heads, seq_len, BLOCK_T)
    rate = _gate(alpha, alpha_strides, batch, head, token, seq_len)
    momentum = _gate(beta, beta_strides, batch, head, token, seq_len) if MOMENTUM else rate
    x_rows = _rows(x, x_strides, batch, head, token)
    state_rows = _rows(state, state_strides, batch, head, token)
    velocity_rows = _rows(velocity, velocity_strides, batch, head, token)
    out_rows = _rows(out, out_strides, batch, head, token)
    new_velocity_rows = _rows(new_velocity, new_velocity_strides, batch, head, token)
    for start in range(0, head_dim, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        visible = (token < seq_len)[:, None] & (column < head_dim)[None, :]
        before = _load(state_rows, column, visible)
        gap = _load(x_rows, column, visible) - before
        step = gap
        if MOMENTUM:
            step = momentum * _load(velocity_rows, column, visible) + (1.0 - momentum) * gap
            _store(new_velocity_rows, column, step, visible)
        _store(out_rows, column, before + rate * step, visible)


@triton.jit(do_not_specialize=["seq_len"])
def compound_backward_kernel(
    d_out, d_out_strides, d_new_velocity, d_new_velocity_strides, x, x_strides, state, state_strides,
    alpha, alpha_strides, beta, beta_strides, velocity, velocity_strides, d_x, d_x_strides, d_state, d_state_strides,
    d_alpha, d_beta, d_velocity, d_velocity_strides, heads, seq_len, head_dim,
    MOMENTUM: tl.constexpr, TOKEN_ALPHA: tl.constexpr, TOKEN_BETA: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    batch, head, token = _block(heads, seq_len, BLOCK_T)
    rate = _gate(alpha, alpha_strides, batch, head, token, seq_len)
    momentum = _gate(beta, beta_strides, batch, head, token, seq_len) if MOMENTUM else rate
    d_out_rows = _rows(d_out, d_out_strides, batch, head, token)
    d_new_velocity_rows = _rows(d_new_velocity, d_new_velocity_strides, batch, head, token)
    x_rows = _rows(x, x_strides, batch, head, token)
    state_rows = _rows(state, state_strides, batch, head, token)
    velocity_rows = _rows(velocity, velocity_strides, batch, head, token)
    d_x_rows = _rows(d_x, d_x_strides, batch, head, token)
    d_state_rows = _rows(d_state, d_state_strides, batch, head, token)
    d_velocity_rows = _rows(d_velocity, d_velocity_strides, batch, head, token)
    d_rate = tl.zeros([BLOCK_T], tl.float32)
    d_momentum = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, head_dim, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        visible = (token < seq_len)[:, None] & (column < head_dim)[None, :]
        gap = _load(x_rows, column, visible) - _load(state_rows, column, visible)
        step, before = gap, gap
        if MOMENTUM:
            before = _load(velocity_rows, column, visible)
            step = momentum * before + (1.0 - momentum) * gap
        d_after = _load(d_out_rows, column, visible)
        d_step = rate * d_after
        d_gap = d_step
        if MOMENTUM:
            d_step += _load(d_new_velocity_rows, column, visible)
            d_momentum += tl.sum(d_step * (before - gap), axis=1)
            _store(d_velocity_rows, column, momentum * d_step, visible)
            d_gap = (1.0 - momentum) * d_step
        d_rate += tl.sum(d_after * step, axis=1)
        _store(d_x_rows, column, d_gap, visible)
        _store(d_state_rows, column, d_after - d_gap, visible)
    row = batch * heads + head
    _store_gate(d_alpha, d_rate, row, token, seq_len, TOKEN_ALPHA)
    if MOMENTUM:
        _store_gate(d_beta, d_momentum, row, token, seq_len, TOKEN_BETA)


@triton.jit
def _store_gate(d_gate, d_token, row, token, seq_len, PER_TOKEN: tl.constexpr):
    """A gate's gradient per token into ``[B, H, T]``, or its sum over the block into ``[B, H, blocks]``."""
    if PER_TOKEN:
        tl.store(d_gate + row * seq_len + token, d_token, mask=token < seq_len)
    else:
        tl.store(d_gate + tl.program_id(0), tl.sum(d_token, axis=0))  # programs are numbered in this order


@triton.jit(do_not_specialize=["seq_len", "scales"])
def multiscale_kernel(
    x, x_strides, states, states_strides, alphas, scale_weights, mixed, mixed_strides, new_states, new_states_strides,
    scales, heads, seq_len, head_dim, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):
    batch, head, token = _block(heads, seq_len, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    visible = (token < seq_len)[:, None] & (column < head_dim)[None, :]
    tokens = _load(_rows(x, x_strides, batch, head, token), column, visible)
    state_rows = _rows(states, states_strides[1:], batch, head, token)
    after_rows = _rows(new_states, new_states_strides[1:], batch, head, token)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for scale in range(scales):
        before = _load(state_rows, column, visible)
        after = before + tl.load(alphas + scale * heads + head) * (tokens - before)
        _store(after_rows, column, after, visible)
        total += tl.load(scale_weights + scale) * after
        state_rows += states_strides[0]
        after_rows += new_states_strides[0]
    _store(_rows(mixed, mixed_strides, batch, head, token), column, total, visible)


@triton.jit(do_not_specialize=["seq_len", "scales"])
def multiscale_backward_kernel(
    d_mixed, d_mixed_strides, d_new_states, d_new_states_strides, x, x_strides, states, states_strides, alphas,
    scale_weights, d_x, d_x_strides, d_states, d_states_strides, d_rates, d_weights,
    partials_stride, scales, heads, seq_len, head_dim, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """``d_rates`` and ``d_weights`` ``[S, B, H, blocks]`` take what each program adds to d_alphas and d_scale_weights.
    """
    batch, head, token = _block(heads, seq_len, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    visible = (token < seq_len)[:, None] & (column < head_dim)[None, :]
    tokens = _load(_rows(x, x_strides, batch, head, token), column, visible)
    d_total = _load(_rows(d_mixed, d_mixed_strides, batch, head, token), column, visible)
    d_tokens = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    state_rows = _rows(states, states_strides[1:], batch, head, token)
    d_after_rows = _rows(d_new_states, d_new_states_strides[1:], batch, head, token)
    d_state_rows = _rows(d_states, d_states_strides[1:], batch, head, token)
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    d_rate, d_weight = d_rates + program, d_weights + program
    for scale in range(scales):
        rate = tl.load(alphas + scale * heads + head)
        before = _load(state_rows, column, visible)
        gap = tokens - before
        d_after = tl.load(scale_weights + scale) * d_total + _load(d_after_rows, column, visible)
        tl.store(d_rate, tl.sum(d_after * gap))
        tl.store(d_weight, tl.sum(d_total * (before + rate * gap)))
        d_tokens += rate * d_after
        _store(d_state_rows, column, (1.0 - rate) * d_after, visible)
        state_rows += states_strides[0]
        d_after_rows += d_new_states_strides[0]
        d_state_rows += d_states_strides[0]
        d_rate += partials_stride
        d_weight += partials_stride
    _store(_rows(d_x, d_x_strides, batch, head, token), column, d_tokens, visible)


def _strides(x: Tensor) -> tuple[int, ...]:
    """All but the last, which is 1."""
    return x.stride()[:-1]


def _gate_strides(gate: Tensor) -> tuple[int, int, int]:
    """Strides over ``[B, H, T]`` of a gate ``[H]`` or ``[B, H, T]``."""
    return (0, gate.stride(0), 0) if gate.dim() == 1 else gate.stride()


def _blocks(head_dim: int) -> tuple[int, int]:
    """Tokens and channels of a tile."""
    columns = min(triton.next_power_of_2(head_dim), _MAX_COLUMNS)
    return max(1, _ELEMENTS_PER_PROGRAM // columns), columns


def _options(block_t: int, block_d: int) -> dict[str, int | bool]:
    return {"BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": _WARPS, "enable_fp_fusion": True}


def _partial_gate(gate: Tensor, x: Tensor, blocks: int) -> Tensor:
    """Where a kernel writes a gate's gradient that is still to be summed: ``[B, H, blocks]``."""
    return x.new_empty((*x.shape[:2], blocks), dtype=gate.dtype)


def ema_compound(
    x: Tensor, state: Tensor, alpha: Tensor, beta: Tensor | None, velocity: Tensor | None,
    out: Tensor, new_velocity: Tensor | None,
) -> None:
    """Writes ``state + alpha * step`` and, with momentum, the new velocity."""
    x, state = rows(x), rows(state)
    momentum = beta is not None
    if momentum:
        velocity = rows(velocity)
    else:  # arguments that the kernel then ignores
        beta, velocity, new_velocity = alpha, x, out
    batch, heads, seq_len, head_dim = x.shape
    block_t, block_d = _blocks(head_dim)
    with on_device(x):
        compound_kernel[(batch * heads * triton.cdiv(seq_len, block_t),)](
            x, _strides(x), state, _strides(state), alpha, _gate_strides(alpha), beta, _gate_strides(beta),
            velocity, _strides(velocity), out, _strides(out), new_velocity, _strides(new_velocity),
            heads, seq_len, head_dim, MOMENTUM=momentum, **_options(block_t, block_d),
        )


def ema_compound_backward(
    d_out: Tensor, d_new_velocity: Tensor | None,
    x: Tensor, state: Tensor, alpha: Tensor, beta: Tensor | None, velocity: Tensor | None,
    d_x: Tensor, d_state: Tensor, d_alpha: Tensor, d_beta: Tensor | None, d_velocity: Tensor | None,
) -> None:
    """Writes the gradients of `ema_compound`."""
    d_out, x, state = rows(d_out), rows(x), rows(state)
    momentum = beta is not None
    batch, heads, seq_len, head_dim = x.shape
    block_t, block_d = _blocks(head_dim)
    blocks = triton.cdiv(seq_len, block_t)
    found_alpha = d_alpha if alpha.dim() == 3 else _partial_gate(alpha, x, blocks)
    found_beta = d_beta if not momentum or beta.dim() == 3 else _partial_gate(beta, x, blocks)
    if momentum:
        velocity, d_new_velocity = rows(velocity), rows(d_new_velocity)
    else:  # arguments that the kernel then ignores
        beta, velocity, d_new_velocity, d_velocity = alpha, x, d_out, d_x
    with on_device(x):
        compound_backward_kernel[(batch * heads * blocks,)](
            d_out, _strides(d_out), d_new_velocity, _strides(d_new_velocity), x, _strides(x), state, _strides(state),
            alpha, _gate_strides(alpha), beta, _gate_strides(beta), velocity, _strides(velocity), d_x, _strides(d_x),
            d_state, _strides(d_state), found_alpha, found_beta if momentum else found_alpha, d_velocity,
            _strides(d_velocity), heads, seq_len, head_dim, MOMENTUM=momentum, TOKEN_ALPHA=alpha.dim() == 3,
            TOKEN_BETA=beta.dim() == 3, **_options(block_t, block_d),
        )
        for gate, found in ((d_alpha, found_alpha), (d_beta, found_beta)):
            if found is not gate:
                torch.sum(found, dim=(0, 2), out=gate)


def ema_multiscale(
    x: Tensor, states: Tensor, alphas: Tensor, scale_weights: Tensor, mixed: Tensor, new_states: Tensor
) -> None:
    """Writes the new states of all scales and their weighted sum."""
    x, states = rows(x), rows(states)
    scales, batch, heads, seq_len, head_dim = states.shape
    block_t, block_d = _blocks(head_dim)
    grid = (batch * heads * triton.cdiv(seq_len, block_t), triton.cdiv(head_dim, block_d))
    with on_device(x):
        multiscale_kernel[grid](
            x, _strides(x), states, _strides(states), alphas.contiguous(), scale_weights.contiguous(),
            mixed, _strides(mixed), new_states, _strides(new_states), scales, heads, seq_len, head_dim,
            **_options(block_t, block_d),
        )


def ema_multiscale_backward(
    d_mixed: Tensor, d_new_states: Tensor,
    x: Tensor, states: Tensor, alphas: Tensor, scale_weights: Tensor,
    d_x: Tensor, d_states: Tensor, d_alphas: Tensor, d_scale_weights: Tensor,
) -> None:
    """Writes the gradients of `ema_multiscale`."""
    d_mixed, d_new_states = rows(d_mixed), rows(d_new_states)
    x, states = rows(x), rows(states)
    scales, batch, heads, seq_len, head_dim = states.shape
    block_t, block_d = _blocks(head_dim)
    blocks, column_blocks = triton.cdiv(seq_len, block_t), triton.cdiv(head_dim, block_d)
    found = x.new_empty((2, scales, batch, heads, blocks * column_blocks), dtype=alphas.dtype)
    with on_device(x):
        multiscale_backward_kernel[(batch * heads * blocks, column_blocks)](
            d_mixed, _strides(d_mixed), d_new_states, _strides(d_new_states), x, _strides(x), states, _strides(states),
            alphas.contiguous(), scale_weights.contiguous(), d_x, _strides(d_x), d_states, _strides(d_states), *found,
            found.stride(1), scales, heads, seq_len, head_dim, **_options(block_t, block_d),
        )
        torch.sum(found[0], dim=(1, 3), out=d_alphas)
        torch.sum(found[1], dim=(1, 2, 3), out=d_scale_weights)
