"""The options of transfer from other runs."""

from __future__ import annotations

import argparse
from typing import Any

from ..options import add_option as add
from ..transfer import TransferConfig


def add_transfer_options(group: Any, run: TransferConfig) -> None:
    """The fields of `TransferConfig`, with the defaults of ``run``."""
    add(group, "--from", "checkpoint, or folder of a run, to begin with its model, weights and tokenizer (fine-tuning)",
        dest="initial", metavar="PATH")
    add(group, "--freeze", "parts of the model that do not learn, such as embedding,blocks.0-2 or blocks.0.attention "
        "(default: none)", type=lambda text: tuple(text.split(",")), metavar="PART,PART,...")
    add(group, "--keep-zeros", "weights of linear layers that begin at 0 stay 0, for a pruned model", "--no-keep-zeros",
        action=argparse.BooleanOptionalAction)
    add(group, "--teacher", "checkpoint, or folder of a run, whose predictions to learn from (distillation)",
        metavar="PATH")
    add(group, "--distill-weight", "part of the loss that the teacher has", run.distill_weight, type=float)
    add(group, "--distill-temperature", "of the predictions that are compared", run.distill_temperature, type=float)
