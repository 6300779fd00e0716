"""What the Triton kernels of the workloads take, kept as numbers that may only fall:
``python -m benchmarks.triton_resources``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import machine_code, sass
from .workloads import WORKLOADS, Workload

CAPABILITIES = (80, 90)


class Recorded(NamedTuple):
    """A workload as it is compiled; its query heads share ``kv_heads`` where that is given."""

    workload: Workload
    dtypes: tuple[torch.dtype, ...]
    kv_heads: int | None = None


_BF16 = (torch.bfloat16,)
_FIELD = WORKLOADS["field-4k"]

RECORDED = {
    # The workloads of the targets, in all their dtypes.
    **{name: Recorded(WORKLOADS[name], WORKLOADS[name].dtypes)
       for name in ("seed-512", "field-4k", "field-16k", "field-64k", "text-4k", "text-32k")},
    # What compiles to something else: lines that fill no block, the third topology, shared keys, other rows.
    **{name: Recorded(WORKLOADS[name], _BF16) for name in ("field-60x36", "field-90x180")},
    "cylinder-4k": Recorded(WORKLOADS["cylinder-4k"], (torch.bfloat16, torch.float32)),
    "field-4k-grouped": Recorded(_FIELD, (torch.bfloat16, torch.float32), kv_heads=2),
    "text-4k-grouped": Recorded(WORKLOADS["text-4k"], _BF16, kv_heads=4),
    "field-4k-d32": Recorded(dataclasses.replace(_FIELD, head_dim=32), _BF16),
    "field-4k-d128": Recorded(dataclasses.replace(_FIELD, head_dim=128), _BF16),
    "field-4k-d256": Recorded(dataclasses.replace(_FIELD, head_dim=256), _BF16),
    "text-4k-d256": Recorded(dataclasses.replace(WORKLOADS["text-4k"], head_dim=256), _BF16),
}
"""What is compiled, by name."""

RECORD = Path(__file__).resolve().parents[1] / "tests/data/triton_resources.json"
"""``{"triton": version, "cases": {case: {kernel: {"per_score": n, "spills": n}}}}``, see `case_name`."""

_MIN_EXPONENTIALS = 4
"""Exponentials of a thread, in a loop that makes a tile of scores."""


def case_name(workload: str, dtype: torch.dtype, capability: int, backward: bool) -> str:
    """As in ``field-16k bfloat16 sm_90 forward``."""
    return f"{workload} {str(dtype).removeprefix('torch.')} sm_{capability} {'backward' if backward else 'forward'}"


def cases(names: Sequence[str] = tuple(RECORDED)) -> Iterator[tuple[str, torch.dtype, int, bool]]:
    """``(workload, dtype, capability, backward)`` of everything that is recorded."""
    for name in names:
        for dtype in RECORDED[name].dtypes:
            for capability in CAPABILITIES:
                yield from ((name, dtype, capability, backward) for backward in (False, True))


def compile_case(name: str, dtype: torch.dtype, capability: int, backward: bool) -> list[machine_code.Code]:
    """The kernels of a pass over a workload, in its default configurations."""
    workload, _, kv_heads = RECORDED[name]
    return sass.compile_launches(
        lambda: sass.launch_attention(workload, dtype, backward=backward, kv_heads=kv_heads), capability)


def _scores(code: machine_code.Code) -> int:
    """Scores that a program makes in one turn of its last inner loop: a tile of queries by a block of keys. Folded, the
    block is two halves of a line."""
    sides = {side: code.constants.get(side, 1) for side in ("BLOCK_M", "BLOCK_N", "TILE_U", "TILE_V", "ROWS")}
    if code.constants.get("FOLD"):
        sides["BLOCK_N"] = 2 * code.constants["BLOCK_C"]
    return math.prod(sides.values())


def per_score(code: machine_code.Code) -> float | None:
    """Instructions for each score in the costliest inner loop that makes scores; where a program makes its scores once
    and without a loop, those of the longest way through the kernel, loads and stores and all; None for a kernel that
    makes none."""
    scores = _scores(code)
    loops = [loop for loop in code.loops if loop.innermost and loop.count("MUFU.EX2") >= _MIN_EXPONENTIALS]
    if loops:
        # Of the two sweeps of `lines_by_queries` the first may go by longer steps.
        blocks = code.constants.get("SUMMED_N", 0) // code.constants.get("BLOCK_N", 1)
        return max(
            code.per_score(len(loop), scores * (blocks if blocks > 1 and place % 2 == 0 else 1))
            for place, loop in enumerate(loops)
        )
    if code.count("MUFU.EX2") < _MIN_EXPONENTIALS:
        return None
    return code.per_score(machine_code.longest_way(code.instructions), scores)


def resources(codes: Sequence[machine_code.Code]) -> dict[str, dict[str, int]]:
    """The worst of each kernel over its launches: instructions for each score, rounded up, and spilling instructions of
    a thread."""
    found: dict[str, dict[str, int]] = {}
    for code in codes:
        worst = found.setdefault(code.name, {"spills": 0})
        worst["spills"] = max(worst["spills"], code.spills)
        cost = per_score(code)
        if cost is not None:
            worst["per_score"] = max(worst.get("per_score", 0), math.ceil(cost))
    return found


def rises(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What takes more than before, in words; cases and kernels that only one of them has are no rise."""
    return [
        f"{case}: {kernel}: {what} {before[case][kernel][what]} to {number}"
        for case, kernels in after.items() if case in before
        for kernel, numbers in kernels.items() if kernel in before[case]
        for what, number in numbers.items() if number > before[case][kernel].get(what, number)
    ]


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    import triton

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.triton_resources",
        description="Compiles the Triton kernels of workloads without a GPU, for compute capabilities "
                    f"{' and '.join(map(str, CAPABILITIES))}, and records what they take: instructions for each score, "
                    "and spills. Half a minute for each case; tests hold the kernels to the record.",
    )
    parser.add_argument("--workloads", nargs="+", choices=RECORDED, default=tuple(RECORDED), metavar="WORKLOAD",
                        help=f"those to compile, of {', '.join(RECORDED)} (default: all); others keep their numbers")
    parser.add_argument("--record", type=Path, default=RECORD, metavar="FILE.json", help="default: %(default)s")
    parser.add_argument("--allow-rise", action="store_true",
                        help="record numbers that rose too, as another version of Triton may need")
    arguments = parser.parse_args(argv)
    record = json.loads(arguments.record.read_text()) if arguments.record.exists() else {"cases": {}}
    found = {}
    for case in cases(arguments.workloads):
        found[case_name(*case)] = resources(compile_case(*case))
        print(case_name(*case), found[case_name(*case)], flush=True)
    risen = rises(record["cases"], found)
    for line in risen:
        print(f"rose: {line}")
    if risen and not arguments.allow_rise:
        parser.exit(1, f"{parser.prog}: nothing is recorded: {len(risen)} numbers rose\n")
    record = {"triton": triton.__version__, "cases": dict(sorted((record["cases"] | found).items()))}
    arguments.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
