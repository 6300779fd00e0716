"""What Triton kernels compile to, read without a GPU: ``python -m benchmarks.sass WORKLOAD``.

The kernels that a function launches are compiled for a compute capability instead of being run. Of each, one sees
registers, spills and shared memory, and the machine instructions (SASS) of its loops.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from torus_kernels.api import default_decay
from torus_kernels.backends import BackendError, load

from .machine_code import Code, NoDisassembler, read
from .workloads import WORKLOADS, Workload

SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one thread block may have, by compute capability (CUDA C++ Programming Guide, table of
technical specifications)."""

_L2_CACHE = {80: 40 * 2**20, 86: 6 * 2**20, 89: 72 * 2**20, 90: 50 * 2**20}
_MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132}


class _Offline:
    """Stands in for Triton's driver: a device of the capability that nothing can be launched on."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return -self._capability  # under which Triton keeps what it compiled, apart from that of real devices

    def get_current_stream(self, device: int) -> int:
        return 0


def device_properties(capability: int) -> SimpleNamespace:
    """Those of ``torch.cuda.get_device_properties`` that configurations depend on, of the data-centre or, where there
    is none, the largest part of the capability."""
    return SimpleNamespace(
        name=f"sm_{capability}", major=capability // 10, minor=capability % 10, warp_size=32,
        multi_processor_count=_MULTIPROCESSORS[capability], L2_cache_size=_L2_CACHE[capability],
        shared_memory_per_block_optin=SHARED_MEMORY[capability], total_memory=40 * 2**30,
    )


@contextlib.contextmanager
def _pretended_device(capability: int) -> Iterator[None]:
    from triton.runtime.driver import driver

    from torus_kernels.backends.triton import backward, forward, launching

    # They may know the tensors' device under another capability.
    remembered = (launching.capability, launching.l2_bytes, forward.launch._plan, backward.launch._plan)
    before = driver._active
    driver.set_active(_Offline(capability))
    for function in remembered:
        function.cache_clear()
    try:
        with (
            mock.patch("torch.cuda.get_device_properties", lambda device=None: device_properties(capability)),
            mock.patch("torch.cuda.get_device_capability", lambda device=None: divmod(capability, 10)),
            mock.patch("torch.cuda.current_device", lambda: 0),
        ):
            yield
    finally:
        driver._active = before
        for function in remembered:
            function.cache_clear()


def compile_launches(function: Callable[[], object], capability: int) -> list[Code]:
    """Calls ``function``, and compiles every Triton kernel that it launches instead of running it.

    The tensors that it passes to kernels may be on the device ``meta``, where they take no memory. Kernels that are
    launched more than once in one form are listed once.

    Args:
        function: what launches the kernels.
        capability: compute capability to compile for, such as 80 or 90.

    Raises:
        NoDisassembler: there is no cuobjdump.
    """
    from triton.runtime.jit import JITFunction

    run, found = JITFunction.run, {}

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        given = dict(zip(self.arg_names, args, strict=False)) | options
        constants = {p.name: given.get(p.name, p.default) for p in self.params if p.is_constexpr}
        found.setdefault(kernel.hash, (kernel, constants))
        return kernel

    with _pretended_device(capability), mock.patch.object(JITFunction, "run", compile_only):
        function()
    return [read(kernel, constants) for kernel, constants in found.values()]


def launch_attention(
    workload: Workload, dtype: torch.dtype, *, backward: bool, kv_heads: int | None = None
) -> None:
    """Calls the Triton backend on a workload's tensors of no memory: for `compile_launches`. Of its heads each has keys
    of its own, or ``kv_heads`` have."""
    backend = load("triton")
    lattice, heads = workload.lattice, workload.heads
    shape = (workload.batch, heads, workload.seq_len, workload.head_dim)

    def tokens(count: int = heads) -> torch.Tensor:
        return torch.empty((shape[0], count, *shape[2:]), dtype=dtype, device="meta")

    def keys() -> torch.Tensor:
        return tokens(kv_heads or heads)

    def parameters(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=torch.float32, device="meta")

    weights, decay = parameters(heads, 8), default_decay(heads, device="meta")
    operands = (weights, decay, tokens(), parameters(heads), None, lattice, workload.head_dim**-0.5)
    lse = parameters(*shape[:3], 8)
    if not backward:
        backend.attention_forward(tokens(), keys(), keys(), *operands, tokens(), None, None)
        return
    backend.attention_backward(
        tokens(), tokens(), keys(), keys(), lse, *operands, tokens(), keys(), keys(), parameters(heads, 8),
        parameters(heads, 8), tokens(), parameters(heads),
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sass",
        description="Compiles the Triton kernels of a workload without a GPU and shows their registers, spills, shared "
                    "memory and the instructions of their loops.",
    )
    parser.add_argument("workload", choices=WORKLOADS, metavar="WORKLOAD", help=f"one of {', '.join(WORKLOADS)}")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--capability", type=int, choices=SHARED_MEMORY, default=90, help="default: %(default)s")
    parser.add_argument("--backward", action="store_true", help="the kernels of the gradient")
    parser.add_argument("--listing", type=Path, metavar="DIR", help="folder for a listing of each kernel")
    arguments = parser.parse_args(argv)
    dtype = getattr(torch, arguments.dtype)
    try:
        codes = compile_launches(
            lambda: launch_attention(WORKLOADS[arguments.workload], dtype, backward=arguments.backward),
            arguments.capability,
        )
    except (ImportError, BackendError, NoDisassembler) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    for number, code in enumerate(codes):
        print(code.describe())
        if arguments.listing is not None:
            arguments.listing.mkdir(parents=True, exist_ok=True)
            text = "".join(f"{i.address:#06x} {i.text}\n" for i in code.instructions)
            (arguments.listing / f"{number}_{code.name}.sass").write_text(text)


if __name__ == "__main__":
    main()
