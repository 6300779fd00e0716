"""What a language model remembers while it writes: one `TorusKVCache` a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from torus_kernels import TorusKVCache

from .lm import TorusLM


class LMCache:
    """Keys and values of every layer for the last N tokens; memory is constant however long the text gets.

    The state of the EMA compounding goes from layer to layer within a token and needs no memory.

    Args:
        model: the model that will fill it; dtype and device are those of its weights.
        batch: texts that advance together.
    """

    def __init__(self, model: TorusLM, batch: int) -> None:
        weight = model.embedding.weight
        attentions = [block.attention for block in model.blocks]
        self.layers = [
            TorusKVCache(a.lattice, batch, a.kv_heads, a.head_dim, weight.dtype, weight.device) for a in attentions
        ]

    def __len__(self) -> int:
        """Tokens since the last `reset`: the position of the next one."""
        return len(self.layers[0])

    def __bool__(self) -> bool:
        """True also when empty, as for `TorusKVCache`."""
        return True

    def reset(self) -> None:
        """Forgets all tokens."""
        for layer in self.layers:
            layer.reset()

    def reorder(self, indices: Tensor) -> None:
        """Text b becomes what text ``indices[b]`` was, ``[B]`` int64; repeats are allowed."""
        for layer in self.layers:
            layer.reorder(indices)

    @torch.inference_mode()
    def logits(self, model: TorusLM, tokens: Tensor, first_key: Tensor | None = None) -> Tensor:
        """Reads the next tokens and returns the logits of the one after them, ``[B, vocab_size]``.

        Args:
            model: the model that this cache was made for.
            tokens: ``[B, T]`` int64: a prompt of any length into an empty cache, then one token at a time.
            first_key: ``[B]`` int64: the position, counted since the last `reset`, before which a text sees nothing.

        Raises:
            ValueError: several tokens for a cache that is not empty.
        """
        if first_key is not None:
            first_key = first_key[:, None].expand(-1, tokens.shape[1])
        return model(tokens, first_key=first_key, cache=self)[:, -1]
