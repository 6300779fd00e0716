"""The C++ kernels under the compiler's sanitizers.

    python tests/sanitize.py                       # address: parity suite and fuzzer, every instruction set
    python tests/sanitize.py --sanitizer thread    # tests/native/threads.cpp

``address`` (AddressSanitizer and UndefinedBehaviorSanitizer) builds the extension anew, beside the usual one in the
cache, and runs the tests on it. The kernels tell the sanitizer where pieces of scratch end and what tile instructions
touch (csrc/cpu/sanitize.h). PyTorch itself is not instrumented: its allocator is, being the C library's.

``thread`` (ThreadSanitizer) runs the kernels on std::threads in a program of their own, without PyTorch, whose threads
ThreadSanitizer would not understand.

Each first has to find a fault that is planted for it. Needs GCC with its runtime libraries.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

from torus_kernels import building  # noqa: E402
from torus_kernels.backends.cpu import INSTRUCTION_SETS  # noqa: E402

FLAGS = {
    "address": ("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
                "-fno-sanitize-recover=undefined"),
    "thread": ("-O1", "-g1", "-fsanitize=thread"),
}
SUITE = ("test_golden.py", "test_causal.py", "test_symmetries.py", "test_streams.py", "test_gradients.py",
         "test_precision.py", "test_properties.py", "test_robustness.py", "test_compounding.py", "test_rope.py",
         "test_decode.py", "test_decode_cache.py")
FUZZ_CASES, SAMPLED_CASES = 2000, 150

# Writes one row of tokens beyond an output that is one row too short.
OVERRUN = """
import torch
from torus_kernels import TorusLattice
from torus_kernels.backends import cpu
assert cpu.unavailable() is None, cpu.unavailable()
x = torch.zeros(1, 1, 4, 8)
torch.ops.torus_kernels.cpu_rope(x, TorusLattice(2, 2).spec, 0, False, torch.zeros(1, 1, 3, 8))
"""


class Failure(Exception):
    """What ends the program with one line and exit code 1."""


def runtime_library(compiler: building.Compiler, name: str) -> str:
    """Path of one of the compiler's libraries."""
    command = [*compiler.command, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        raise Failure(f"{compiler.command[0]} has no {name}; GCC and its sanitizer libraries are needed")
    return path


def fixed_addresses() -> list[str]:
    """What comes before a command whose addresses are not to be drawn at random; empty where that is not allowed.

    The sanitizers cannot place their shadow among addresses from a wide range.
    """
    command = ["setarch", "-R"]
    works = shutil.which(command[0]) and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if works else []


def address_environment(compiler: building.Compiler) -> dict[str, str]:
    """The environment in which Python runs with the instrumented extension."""
    # libstdc++ too: the sanitizer looks for __cxa_throw when the process starts.
    preload = [runtime_library(compiler, name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    return {
        **os.environ,
        "TORUS_CPU_CXXFLAGS": " ".join(FLAGS["address"]),
        "LD_PRELOAD": " ".join(preload),
        # Python leaves memory to the system when it ends.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:max_allocation_size_mb=8192",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": str(TESTS.parent),
        "OMP_NUM_THREADS": "1",
    }


def machine_instruction_sets(environment: dict[str, str]) -> list[str]:
    """Those that this machine runs, widest last; builds the extension of the environment if need be."""
    environment = {name: value for name, value in environment.items() if name != "TORUS_CPU_ISA"}
    # Apart, because the compiler need not run under a sanitizer.
    build_only = [sys.executable, "-c", "from torus_kernels import building; building.ensure_library(building.CPU)"]
    subprocess.run(build_only, env={name: value for name, value in environment.items() if name != "LD_PRELOAD"})
    code = "from torus_kernels.backends import cpu; print(cpu.unavailable() or cpu.instruction_set())"
    command = [*fixed_addresses(), sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    best = done.stdout.strip()
    if best not in INSTRUCTION_SETS:
        raise Failure(f"the extension does not run: {best}")
    return list(INSTRUCTION_SETS[: INSTRUCTION_SETS.index(best) + 1])


def check_address(isas: Sequence[str], sample: bool) -> None:
    compiler = building.find_compiler()
    environment = address_environment(compiler)
    available = machine_instruction_sets(environment)
    python = [*fixed_addresses(), sys.executable]
    planted = subprocess.run([*python, "-c", OVERRUN], env=environment, capture_output=True, text=True)
    if planted.returncode == 0 or "heap-buffer-overflow" not in planted.stderr:
        raise Failure(f"the planted overrun was not reported\n{planted.stderr[-2000:]}")
    print("the planted overrun is reported")
    fuzz = [*python, str(TESTS / "fuzz.py"), "--cases", str(SAMPLED_CASES if sample else FUZZ_CASES)]
    # pytest must leave file descriptor 2 alone, or a report dies with the process.
    suite = [*python, "-m", "pytest", "--capture=sys", "-x", "-q", "-p", "no:cacheprovider", "-k", "cpu",
             *(str(TESTS / name) for name in (SUITE[:1] if sample else SUITE))]
    chosen = _chosen(isas, available)
    for isa in chosen:
        for command in [fuzz] if sample and isa != chosen[-1] else [fuzz, suite]:
            _run(f"{isa}: {'fuzzer' if command is fuzz else 'suite'}", command, environment | {"TORUS_CPU_ISA": isa})


def check_thread(isas: Sequence[str], sample: bool) -> None:
    compiler = building.find_compiler()
    runtime_library(compiler, "libtsan.so")
    available = machine_instruction_sets(dict(os.environ))
    program = build_threads(compiler, _chosen(isas or available[-1:] if sample else isas, available))
    fixed = fixed_addresses()
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}
    planted = subprocess.run([*fixed, str(program), "plant"], env=environment, capture_output=True, text=True)
    if planted.returncode != 66 or "data race" not in planted.stderr:
        raise Failure(f"the planted race was not reported\n{planted.stderr[-2000:]}")
    print("the planted race is reported")
    _run("threads", [*fixed, str(program), *(["sample"] if sample else [])], environment)


def build_threads(compiler: building.Compiler, isas: Sequence[str]) -> Path:
    """tests/native/threads.cpp and the kernels for some instruction sets (those that these need included)."""
    needed = set(isas) | ({"avx512"} if "amx" in isas else set())
    csrc = building.find_csrc()
    key = repr((building.source_hash(building.CPU, csrc), FLAGS["thread"], compiler))
    folder = building.cache_dir() / f"threads-{hashlib.sha256(key.encode()).hexdigest()[:20]}"
    folder.mkdir(parents=True, exist_ok=True)

    def kernels(unit: building.Unit) -> str:
        output = folder / f"{unit.name}.o"
        if not output.is_file():
            part = output.with_suffix(f".{os.getpid()}.o")
            _compiler(compiler, *building.unit_flags(building.CPU, unit, csrc), *FLAGS["thread"], "-c",
                      str(csrc / unit.source), "-o", str(part))
            part.replace(output)
        return str(output)

    print(f"compiling in {folder}", flush=True)
    with concurrent.futures.ThreadPoolExecutor(building.max_jobs(building.CPU.bytes_per_job)) as pool:
        objects = list(pool.map(kernels, [unit for unit in building.CPU.units if unit.isa in needed]))
    program = folder / f"threads-{'-'.join(sorted(needed))}"
    _compiler(compiler, "-std=c++20", "-Wall", "-Wextra", f"-I{csrc}", *FLAGS["thread"],
              str(TESTS / "native" / "threads.cpp"), *objects, "-pthread", "-o", str(program))
    return program


def _compiler(compiler: building.Compiler, *arguments: str) -> None:
    command = [*compiler.command, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"{' '.join(command)}\n{done.stderr[-6000:]}")


def _chosen(isas: Sequence[str], available: Sequence[str]) -> list[str]:
    if missing := [isa for isa in isas if isa not in available]:
        raise Failure(f"this machine runs {', '.join(available)}, not {', '.join(missing)}")
    return list(isas or available)


def _run(what: str, command: Sequence[str], environment: dict[str, str]) -> None:
    print(f"== {what}", flush=True)
    start = time.monotonic()
    code = subprocess.run(command, env=environment).returncode
    if code:
        raise Failure(f"{what} ended with exit code {code}")
    print(f"== {what}: passed in {time.monotonic() - start:.0f} s", flush=True)


def main() -> int:
    summary, details = __doc__.split("\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sanitizer", choices=FLAGS, default="address", help="default: address")
    parser.add_argument("--isa", nargs="+", choices=INSTRUCTION_SETS, default=[], metavar="ISA",
                        help=f"of {', '.join(INSTRUCTION_SETS)} (default: all that this machine runs)")
    parser.add_argument("--sample", action="store_true",
                        help=f"what fits into continuous integration: {SAMPLED_CASES} calls of the fuzzer for each\n"
                             f"instruction set, and of the suite {SUITE[0]} on the last; with threads the\n"
                             "widest instruction set and bfloat16 only")
    arguments = parser.parse_args()
    try:
        (check_address if arguments.sanitizer == "address" else check_thread)(arguments.isa, arguments.sample)
    except (Failure, building.BuildError) as error:
        print(f"sanitize: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
