"""What peers that go through ``torch.compile`` share."""

from __future__ import annotations

import torch

RECOMPILE_LIMIT = 64
"""Dynamo's default of 8 would be used up by the streams of one workload, and the rest would silently run eagerly."""


def allow_recompiles() -> None:
    """Raises dynamo's limit to `RECOMPILE_LIMIT`."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
