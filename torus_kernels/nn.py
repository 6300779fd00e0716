"""Torus attention with the calling convention of PyTorch's own layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .api import default_decay, torus_attention
from .backends import check_name
from .lattice import NUM_STREAMS, TorusLattice
from .padding import leading_padding


class TorusMultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` with torus attention in it: the same call, the same projections, the same names.

    Self-attention only, and who sees whom is the lattice's business. Mixing weights and geodesic decay of the streams
    are learned, per head and without constraint; they start from the operator's defaults, shared among the lattice's
    streams. There are no positions but those: embed them, or turn queries and keys in a layer of your own
    (`lattice_rope`).

    A state dict of `torch.nn.MultiheadAttention` of the same sizes loads as it is and leaves the streams' parameters
    alone. In `torch.nn.TransformerEncoderLayer` the module can take the place of ``self_attn``.

    Args:
        embed_dim: size of a token.
        num_heads: heads; ``embed_dim / num_heads`` must be a multiple of 8 up to 256.
        lattice: any topology. Every sequence must fit it.
        dropout: must be 0: no attention weights are ever stored that could be dropped.
        bias: whether the projections have a bias.
        add_bias_kv, add_zero_attn: must be False, as keys have places on the lattice.
        kdim, vdim: must be ``embed_dim`` or None.
        batch_first: tokens come as ``[B, T, embed_dim]`` rather than ``[T, B, embed_dim]``.
        device, dtype: of the parameters.
        backend: as in `torus_attention`.

    Attributes:
        stream_weights: ``[num_heads, 8]``, as in `torus_attention`.
        decay: ``[num_heads, 8]``, likewise.

    Raises:
        TypeError, ValueError: a size, the lattice or ``backend`` is wrong.
        NotImplementedError: an option that torus attention does not have.
    """

    # TransformerEncoderLayer has a fast path for inference that computes dense attention from the layer's parameters
    # without calling the layer. It takes this for a reason not to.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        lattice: TorusLattice,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.lattice = checks.check_lattice(lattice)
        self.embed_dim = checks.check_size("embed_dim", embed_dim, 1)
        self.num_heads = checks.check_size("num_heads", num_heads, 1)
        if embed_dim % num_heads != 0:
            raise ValueError(f"embed_dim must be a multiple of num_heads = {num_heads}, got {embed_dim}")
        self.head_dim = checks.check_head_dim("embed_dim / num_heads must be", embed_dim // num_heads)
        for name, value, only in (
            ("dropout", dropout, 0.0), ("add_bias_kv", add_bias_kv, False), ("add_zero_attn", add_zero_attn, False),
            ("kdim", embed_dim if kdim is None else kdim, embed_dim),
            ("vdim", embed_dim if vdim is None else vdim, embed_dim),
        ):
            if value != only:
                raise NotImplementedError(f"{name} must be {only} in torus attention, got {value}")
        self.dropout = dropout
        self.batch_first = batch_first
        self.backend = None if backend is None else check_name(backend)

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **factory))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, **factory)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.stream_weights = nn.Parameter(torch.empty(num_heads, NUM_STREAMS, **factory))
        self.decay = nn.Parameter(torch.empty(num_heads, NUM_STREAMS, **factory))
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """As in `torch.nn.MultiheadAttention`, down to the random numbers drawn."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        with torch.no_grad():
            self.stream_weights.zero_()
            self.stream_weights[:, sorted(self.lattice.streams)] = 1 / len(self.lattice.streams)
            self.decay.copy_(default_decay(self.num_heads))

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], strict: bool,
        missing_keys: list[str], *rest: list[str],
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        of_streams = {f"{prefix}stream_weights", f"{prefix}decay"}
        if of_streams <= set(missing_keys) and f"{prefix}in_proj_weight" in state_dict:
            missing_keys[:] = [key for key in missing_keys if key not in of_streams]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attends; the arguments are those of `torch.nn.MultiheadAttention`, ``need_weights`` apart.

        Args:
            query: ``[T, B, embed_dim]``, ``[B, T, embed_dim]`` with ``batch_first``, or ``[T, embed_dim]``.
            key: shape of query.
            value: shape of query.
            key_padding_mask: causal topology only, ``[B, T]`` or ``[T]``: True, or -inf in a floating-point mask, for
                padding, which may lie before and after the tokens of a sequence.
            need_weights: must be False.
            attn_mask: must be None, except that the causal mask that goes with ``is_causal`` is accepted (and, as its
                values are not needed, not looked at).
            average_attn_weights: of no effect, as there are no weights.
            is_causal: whether ``attn_mask`` is the causal mask; needs a causal lattice.

        Returns:
            The output, shaped as query, and None in place of the weights.

        Raises:
            TypeError, ValueError: an argument has the wrong type, shape or value.
            NotImplementedError: torus attention does not have what is asked for.
        """
        self._check_call(query, key, value, need_weights, attn_mask, is_causal)
        is_batched = query.dim() == 3
        q, k, v = (self._heads(x, is_batched) for x in self._project(query, key, value))  # [B, H, T, D]
        wide = checks.parameter_dtype(q.dtype)
        out = torus_attention(
            q, k, v, self.lattice,
            stream_weights=self.stream_weights.to(wide),
            decay=self.decay.to(wide),
            first_key=None if key_padding_mask is None else self._first_key(key_padding_mask, q),
            backend=self.backend,
        )
        out = out.permute(0, 2, 1, 3) if self.batch_first or not is_batched else out.permute(2, 0, 1, 3)
        out = self.out_proj(out.flatten(-2))
        return (out if is_batched else out.squeeze(0)), None

    def _check_call(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, attn_mask: Tensor | None, is_causal: bool
    ) -> None:
        for name, x in (("query", query), ("key", key), ("value", value)):
            if isinstance(x, Tensor) and x.is_nested:
                raise NotImplementedError(f"{name} must not be a nested tensor: pad it (in nn.TransformerEncoder, "
                                          "enable_nested_tensor=False)")
            checks.check_tensor(name, x)
            if x.dim() not in (2, 3) or x.shape[-1] != self.embed_dim or x.shape != query.shape:
                wanted = "[B, T, embed_dim]" if self.batch_first else "[T, B, embed_dim]"
                raise ValueError(f"{name} must have shape {wanted} or [T, embed_dim], with embed_dim = "
                                 f"{self.embed_dim} and the same for query, key and value, got {list(x.shape)}")
        if need_weights:
            raise NotImplementedError("need_weights must be False: torus attention does not store its weights")
        if is_causal and not self.lattice.is_causal:
            raise ValueError(f"is_causal needs a causal lattice, this one is {self.lattice.topology}")
        if attn_mask is not None and not is_causal:
            raise NotImplementedError("attn_mask must be None, or the causal mask together with is_causal=True: who "
                                      "sees whom is up to the lattice")

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _heads(self, x: Tensor, is_batched: bool) -> Tensor:
        """``[B, H, T, D]``, a view of projected tokens in the layout of the call."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if not is_batched:
            return x.transpose(0, 1)[None]
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _first_key(self, key_padding_mask: Tensor, q: Tensor) -> Tensor | None:
        """``[B, T]``, or None where no sequence begins with padding."""
        if not self.lattice.is_causal:
            raise NotImplementedError(f"key_padding_mask must be None: a {self.lattice.topology} lattice has no room "
                                      "for padding")
        batch, _, seq_len, _ = q.shape
        mask = checks.check_tensor("key_padding_mask", key_padding_mask)
        mask = mask[None] if mask.dim() == 1 else mask
        checks.check_shape("key_padding_mask", mask, {"[B, T]": (batch, seq_len)})
        if mask.is_floating_point():
            is_padding = mask == float("-inf")
            if not torch.compiler.is_compiling() and bool((mask != 0).ne(is_padding).any()):
                raise NotImplementedError("key_padding_mask must be 0 or -inf everywhere: torus attention adds no bias")
        else:
            checks.check_dtype("key_padding_mask", mask, (torch.bool,))
            is_padding = mask
        first = leading_padding("key_padding_mask", ~is_padding)  # [B, 1]
        return None if first is None else first.expand(batch, seq_len)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, {self.lattice}, batch_first={self.batch_first}"
