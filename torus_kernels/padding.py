"""Padding masks of other libraries, in the form of `torus_attention`: how many tokens a sequence begins late."""

from __future__ import annotations

import torch
from torch import Tensor


def leading_padding(name: str, real: Tensor) -> Tensor | None:
    """The number of padding tokens that each causal sequence begins with: its ``first_key``.

    Padding at the end needs no mask: no token before it sees it, and what is computed there is not used.

    Args:
        name: the argument that the mask came in.
        real: ``[B, T]`` bool, False for padding, which must lie before and after the tokens of a sequence only.

    Returns:
        ``[B, 1]`` int64, or None where no sequence begins with padding. Under torch.compile the values are not looked
        at: the result is always a tensor, and a mask with holes passes unnoticed.

    Raises:
        NotImplementedError: there is padding between the tokens of a sequence.
    """
    first = real.to(torch.uint8).argmax(dim=1, keepdim=True)  # 0 where all is padding
    if torch.compiler.is_compiling() or real.numel() == 0:
        return first
    runs = real[:, 0].int() + (real[:, 1:] & ~real[:, :-1]).sum(dim=1)
    interrupted, padded = torch.stack((runs.max() > 1, first.max() > 0)).tolist()  # one synchronisation
    if interrupted:
        raise NotImplementedError(f"{name} has padding between the tokens of a sequence, and torus attention takes it "
                                  "before and after them only; a batch that is to be continued is padded on the left")
    return first if padded else None
