"""Decoding token by token: a cache of the trailing N keys and values, and attention of the newest token to it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .api import _autocast_dtype, _autocast_parameters, fill_defaults
from .backends import AUTO, check_name
from .lattice import TorusLattice
from .ops import decode as decode_ops
from .ops._library import refuse_transforms


class TorusKVCache:
    """Keys and values of the last N tokens, a complete cache for a causal sequence of any length.

    Visibility ends at a lag of ``N = lattice.num_sites``, so memory is N slots however long the sequence gets: the
    token at position p lives in slot ``p mod N``, where it replaces the token N positions before it. Everything is
    updated in place, and no gradient flows into the cache.

    ``len(cache)`` is the number of tokens appended since the last `reset`: the position of the next token, and so
    the offset of its `lattice_rope`. Turn keys before they are appended.

    Args:
        lattice: who sees whom; the topology must be causal.
        batch: sequences B, which advance together.
        kv_heads: key/value heads Hkv.
        head_dim: D, a multiple of 8 up to 256.
        dtype: float32, float16, bfloat16 or float64; PyTorch's default dtype by default.
        device: where the cache lives; PyTorch's default device by default.

    Attributes:
        keys: ``[B, Hkv, N, D]`` by slot. Slots not written since the last `reset` hold arbitrary numbers.
        values: likewise.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong value, or the topology is not causal.
    """

    def __init__(
        self,
        lattice: TorusLattice,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.lattice = checks.check_lattice(lattice)
        if not lattice.is_causal:
            raise ValueError(f"lattice must be causal to be decoded, got a {lattice.topology} lattice")
        self.batch = checks.check_size("batch", batch, 0)
        self.kv_heads = checks.check_size("kv_heads", kv_heads, 1)
        self.head_dim = checks.check_head_dim("head_dim must be", checks.check_size("head_dim", head_dim, 0))
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in checks.DTYPES:
            raise TypeError(f"dtype must be {' or '.join(str(d) for d in checks.DTYPES)}, got {dtype}")
        # A tensor made under inference mode could not be written outside of it.
        with torch.inference_mode(False):
            # Key and value of a slot lie side by side: decoding visits slots far apart, and finds both on one page.
            self._slots = torch.empty(batch, kv_heads, lattice.num_sites, 2, head_dim, dtype=dtype, device=device)
        self.keys, self.values = self._slots.unbind(dim=3)
        self._length = 0

    @property
    def dtype(self) -> torch.dtype:
        return self._slots.dtype

    @property
    def device(self) -> torch.device:
        return self._slots.device

    def __len__(self) -> int:
        return self._length

    def __bool__(self) -> bool:
        """True also when empty, so that ``cache or TorusKVCache(...)`` keeps an empty cache."""
        return True

    def __repr__(self) -> str:
        return (f"TorusKVCache(length={self._length}, batch={self.batch}, kv_heads={self.kv_heads}, "
                f"head_dim={self.head_dim}, dtype={self.dtype}, device='{self.device}', lattice={self.lattice})")

    def append(self, k: Tensor, v: Tensor) -> None:
        """Writes the keys and values of the next n tokens; of more than N it keeps the last N.

        Args:
            k: keys ``[B, Hkv, n, D]``, one token or many, in the cache's dtype. Any strides. Under autocast, cast to
                the cache's dtype.
            v: values, likewise.

        Raises:
            TypeError: k or v has the wrong type or dtype.
            ValueError: k or v has the wrong shape or device. The cache is left as it was.
        """
        k, v = self._check_tokens("k", k), self._check_tokens("v", v)
        count = k.shape[2]
        if count < 1:
            raise ValueError(f"k must have at least one token, got shape {list(k.shape)}")
        checks.check_shape("v", v, {"[B, Hkv, n, D] of k": tuple(k.shape)})
        num_slots = self.lattice.num_sites
        kept = min(count, num_slots)
        first = (self._length + count - kept) % num_slots
        with torch.no_grad():
            for slots, tokens in ((self.keys, k), (self.values, v)):
                if kept < count:
                    tokens = tokens.narrow(2, count - kept, kept)
                if first + kept <= num_slots:
                    slots.narrow(2, first, kept).copy_(tokens)
                else:
                    before_wrap = num_slots - first
                    slots.narrow(2, first, before_wrap).copy_(tokens.narrow(2, 0, before_wrap))
                    slots.narrow(2, 0, kept - before_wrap).copy_(tokens.narrow(2, before_wrap, kept - before_wrap))
        self._length += count

    def reset(self) -> None:
        """Forgets all tokens; the memory is kept and need not be cleared."""
        self._length = 0

    def reorder(self, indices: Tensor) -> None:
        """Sequence b becomes what sequence ``indices[b]`` was, as beam search needs it; repeats are allowed.

        Args:
            indices: ``[B]`` int32 or int64 on the cache's device, each ``0 <= indices[b] < B`` (checked on the CPU,
                where that needs no synchronisation).

        Raises:
            TypeError, ValueError: ``indices`` is not that.
        """
        checks.check_operand("indices", indices, {"[B]": (self.batch,)}, (torch.int32, torch.int64), self._slots,
                             "the cache")
        on_host = indices.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and indices.numel() > 0 and not 0 <= int(indices.min()) <= int(indices.max()) < self.batch:
            raise ValueError(f"indices must lie in [0, {self.batch}), got {indices.tolist()}")
        with torch.no_grad():
            written = self._slots.narrow(2, 0, min(self._length, self.lattice.num_sites))
            written.copy_(written.index_select(0, indices))

    def _check_tokens(self, name: str, x: object) -> Tensor:
        """Tokens ``[B, Hkv, n, D]`` for any n."""
        x = self._autocast(checks.check_tensor(name, x))
        form = "[B, Hkv, n, D]"
        x = checks.check_tokens(name, x, form)
        sizes = (self.batch, self.kv_heads, x.shape[2], self.head_dim)
        checks.check_operand(name, x, {form: sizes}, (self.dtype,), self._slots, "the cache")
        return x

    def _autocast(self, x: Tensor) -> Tensor:
        """Tokens in the cache's dtype where autocast is on; float64 is left alone."""
        if _autocast_dtype(self.device.type) is None or torch.float64 in (x.dtype, self.dtype):
            return x
        return x.to(self.dtype) if x.is_floating_point() else x


def torus_attention_decode(
    q: Tensor,
    cache: TorusKVCache,
    *,
    stream_weights: Tensor | None = None,
    decay: Tensor | None = None,
    scale: float | None = None,
    ema_state: Tensor | None = None,
    ema_alpha: Tensor | None = None,
    first_key: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The last row of `torus_attention` over the whole sequence, from the cache: the query of its newest token.

    The key and value of that token come first, by `TorusKVCache.append`. Time is that of the visible lags, whatever
    the length of the sequence. Nothing is differentiated: gradients need `torus_attention`.

    Args:
        q: queries ``[B, H, 1, D]`` in the cache's dtype, H a multiple of the cache's key/value heads.
        cache: keys and values of the sequence so far, at least one token.
        stream_weights: ``[H, 8]`` or ``[B, H, 1, 8]``; this and all other options as in `torus_attention`.
        decay: ``[H, 8]``.
        scale: factor of the scores.
        ema_state: ``[B, H, 1, D]``.
        ema_alpha: ``[H]`` or ``[B, H, 1]``.
        first_key: ``[B, 1]``, the oldest visible position, counted since the cache's last reset.
        backend: as in `torus_attention`.

    Returns:
        ``[B, H, 1, D]`` in q's dtype, without gradient. Under autocast, q and ema_state are cast to the cache's dtype.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or the cache is empty.
        BackendError: the backend asked for cannot run here.
    """
    backend = AUTO if backend is None else check_name(backend)
    checks.check_tensor("q", q)
    if not isinstance(cache, TorusKVCache):
        raise TypeError(f"cache must be a TorusKVCache, got {type(cache).__name__}")
    q = cache._autocast(q)
    if isinstance(ema_state, Tensor):
        ema_state = cache._autocast(ema_state)
    stream_weights, decay, ema_alpha = _autocast_parameters(q, stream_weights, decay, ema_alpha)
    _check_query(q, cache)
    checks.check_options(q, cache.lattice, stream_weights, decay, ema_state, ema_alpha, first_key)
    if len(cache) == 0:
        raise ValueError("cache must hold at least one token: append the newest token's key and value before its query")
    refuse_transforms("torus_attention_decode")
    with torch.no_grad():
        stream_weights, decay, scale = fill_defaults(q, stream_weights, decay, scale)
        return decode_ops.decode_op(
            q, cache.keys, cache.values, stream_weights, decay, ema_state, ema_alpha, first_key, cache.lattice.spec,
            scale, len(cache), backend,
        )


def _check_query(q: Tensor, cache: TorusKVCache) -> None:
    form = "[B, H, 1, D]"
    q = checks.check_tokens("q", q, form)
    heads = q.shape[1]
    checks.check_operand("q", q, {form: (cache.batch, heads, 1, cache.head_dim)}, (cache.dtype,), cache.keys,
                         "the cache")
    if heads < 1 or heads % cache.kv_heads != 0:
        raise ValueError(f"q must have a number of heads that is a multiple of the cache's {cache.kv_heads}, "
                         f"got {heads}")
