"""Machine code (SASS) as a reader sees it: the instructions of compiled kernels, their loops, registers and spills."""

from __future__ import annotations

import collections
import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_PREDICATE = re.compile(r"^@!?U?P[0-9T]+\s+")
_BRANCH = re.compile(r"^BRA\b(.*?)(0x[0-9a-f]+)$")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")

# Opcodes of the tensor cores: mma.sync and, from sm_90 on, wgmma.
_TENSOR_CORE = ("HMMA", "HGMMA", "IMMA", "DMMA")


class NoDisassembler(RuntimeError):
    """Neither Triton's package nor the PATH has a cuobjdump."""


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its address, its text without the predicate that may guard it, and whether one does."""

    address: int
    text: str
    guarded: bool = False

    @property
    def opcode(self) -> str:
        """With modifiers, as in ``MUFU.EX2``."""
        return self.text.split(maxsplit=1)[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes, None for everything else."""
        match = _BRANCH.match(self.text)
        return None if match is None else int(match[2], 16)

    @property
    def goes_on(self) -> bool:
        """Whether the next instruction may follow: not behind a branch or an exit that no condition guards."""
        match = _BRANCH.match(self.text)
        if match is None:
            return self.guarded or self.opcode != "EXIT"
        return self.guarded or "P" in match[1]


def parse(listing: str) -> list[Instruction]:
    """The instructions of a listing by ``cuobjdump -sass``, without the padding that follows the last of them."""
    found = []
    for line in listing.splitlines():
        if match := _LINE.match(line):
            text = _PREDICATE.sub("", match[2])
            found.append(Instruction(int(match[1], 16), text, text != match[2]))
    while found and found[-1].opcode == "NOP":
        found.pop()
    if found and found[-1].target == found[-1].address:
        found.pop()  # the trap behind the last EXIT
    return found


@dataclass(frozen=True)
class Loop:
    """Instructions from the head of a loop to its last branch back, those of nested loops included."""

    body: tuple[Instruction, ...]
    innermost: bool

    def count(self, *opcodes: str) -> int:
        return _count(self.body, *opcodes)

    def __len__(self) -> int:
        return sum(instruction.opcode != "NOP" for instruction in self.body)


def _count(body: tuple[Instruction, ...], *opcodes: str) -> int:
    """Instructions whose opcode is one of those, or one of those with modifiers."""
    return sum(i.opcode == name or i.opcode.startswith(f"{name}.") for i in body for name in opcodes)


def find_loops(instructions: list[Instruction]) -> list[Loop]:
    """Loops in the order of their heads; branches back to one head are one loop."""
    ends: dict[int, int] = {}
    for instruction in instructions:
        target = instruction.target
        if target is not None and target <= instruction.address:
            ends[target] = max(instruction.address, ends.get(target, 0))
    spans = sorted(ends.items())
    return [
        Loop(
            tuple(i for i in instructions if head <= i.address <= end),
            innermost=not any(head <= h and e <= end and (h, e) != (head, end) for h, e in spans),
        )
        for head, end in spans
    ]


def longest_way(instructions: Sequence[Instruction]) -> int:
    """Instructions on the longest way from the first to an end that takes no branch back: each loop is gone through
    once, and of branches that exclude each other one is counted."""
    places = {instruction.address: place for place, instruction in enumerate(instructions)}
    longest = [0] * (len(instructions) + 1)
    for place, instruction in reversed(list(enumerate(instructions))):
        following = [place + 1] if instruction.goes_on else []
        target = places.get(instruction.target, len(instructions))
        if instruction.target is not None and target > place:
            following.append(target)
        work = instruction.opcode != "NOP"
        longest[place] = work + max((longest[other] for other in following), default=0)
    return longest[0]


@dataclass(frozen=True)
class Code:
    """A compiled kernel.

    Attributes:
        name: of the kernel's function.
        constants: its ``tl.constexpr`` arguments and those that were compiled in, by name.
        num_warps: of a program.
        registers: of a thread.
        local_bytes: of a thread, in local memory: the stack and spilled registers.
        shared_bytes: of a program.
        instructions: of the whole kernel.
    """

    name: str
    constants: dict[str, Any]
    num_warps: int
    registers: int
    local_bytes: int
    shared_bytes: int
    instructions: tuple[Instruction, ...]

    def count(self, *opcodes: str) -> int:
        """Instructions of the whole kernel with one of these opcodes, whatever their modifiers."""
        return _count(self.instructions, *opcodes)

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory."""
        return self.count("LDL", "STL")

    @property
    def uses_tensor_cores(self) -> bool:
        return self.count(*_TENSOR_CORE) > 0

    @functools.cached_property
    def loops(self) -> list[Loop]:
        return find_loops(list(self.instructions))

    def per_score(self, instructions: int, scores: int) -> float:
        """What a thread spends on each of its scores, where so many instructions make ``scores`` of them in the whole
        program. Both sides count threads: a warp's instruction is one for each of its 32."""
        return instructions * 32 * self.num_warps / scores

    def describe(self) -> str:
        """Resources, and a line for each loop: its length and what it mostly consists of."""
        constants = ", ".join(f"{name}={value}" for name, value in self.constants.items())
        lines = [
            f"{self.name}({constants})",
            f"  {self.num_warps} warps, {self.registers} registers, {self.local_bytes} bytes local, "
            f"{self.spills} spilling instructions, {self.shared_bytes} bytes shared, "
            f"{len(self.instructions)} instructions, tensor cores {'yes' if self.uses_tensor_cores else 'no'}",
        ]
        for loop in self.loops:
            kinds = collections.Counter(i.opcode.partition(".")[0] for i in loop.body)
            exps = loop.count("MUFU.EX2")
            lines.append(
                f"  {'inner' if loop.innermost else 'outer'} loop at {loop.body[0].address:#x}: {len(loop)} "
                f"instructions, {exps} exp{f' ({len(loop) / exps:.1f} each)' if exps else ''}; "
                + ", ".join(f"{kind} {n}" for kind, n in kinds.most_common(12))
            )
        return "\n".join(lines)


@functools.cache
def disassembler() -> str:
    """Path of cuobjdump: the one that Triton would use, from its package or the PATH.

    Raises:
        NoDisassembler: there is none.
    """
    from triton import knobs

    try:
        return knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        raise NoDisassembler(str(error)) from error


def read(kernel: Any, constants: dict[str, Any] | None = None) -> Code:
    """What a ``triton`` kernel that ``compile`` or ``warmup`` returned consists of.

    Raises:
        NoDisassembler: there is no cuobjdump.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [disassembler(), "-sass", "-res-usage", cubin.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, _, local = (int(n) for n in _RESOURCES.search(listing).groups())
    metadata = kernel.metadata
    return Code(metadata.name, constants or {}, metadata.num_warps, registers, stack + local, metadata.shared,
                tuple(parse(listing)))


_KERNEL = re.compile(r"\d([A-Z]\w*?Kernel)")
_ELEMENT = re.compile(r"\d(B?Float16)")
_NUMBER = re.compile(r"L[ib](\d+)E")
_SWEEP = re.compile(r"\d((?:Line|Patch)Sweep)")


def read_library(library: Path) -> dict[str, list[Code]]:
    """The kernels of a library that nvcc made, by architecture, as in ``{"sm_80": [...]}``.

    Of each, ``constants`` has its template arguments: ``element``, ``numbers`` and, where there is one, ``sweep``. How
    many warps it runs with and what shared memory it is given is not in the library.

    Raises:
        NoDisassembler: there is no cuobjdump.
    """
    command = [disassembler(), "-sass", "-res-usage", str(library)]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[Code]] = {}
    for part in re.split(r"^arch = ", dump, flags=re.MULTILINE)[1:]:
        architecture = part.split(maxsplit=1)[0]
        usage = {name: _RESOURCES.search(rest) for name, rest in re.findall(r"Function (\w+):\s*(REG:.*)", part)}
        for listing in re.split(r"^\s*Function : ", part, flags=re.MULTILINE)[1:]:
            symbol = listing.split(maxsplit=1)[0]
            element = _ELEMENT.search(symbol)
            sweep = _SWEEP.search(symbol)
            constants = {"element": element and element[1], "numbers": tuple(map(int, _NUMBER.findall(symbol))),
                         **({"sweep": sweep[1]} if sweep else {})}
            registers, stack, _, local = map(int, usage[symbol].groups())
            found.setdefault(architecture, []).append(Code(
                _KERNEL.search(symbol)[1], constants, 1, registers, stack + local, 0, tuple(parse(listing))))
    return found
