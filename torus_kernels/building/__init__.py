"""Compiles the C++ and CUDA libraries and finds them again.

Both ways of building go through here: ahead of time, where setup.py loads this package by its path, and on first use
(`ensure_library`). So it needs the standard library only; it imports neither torch nor the rest of torus_kernels.

The libraries use PyTorch's stable ABI (``torch/csrc/stable``) and no Python C-API: one binary serves every
torch >= 2.11 and every Python. Building one is plain: one compiler call per object, one link, run by ninja where there
is one. A library carries a hash of the sources and flags it came from, so that an outdated one is never loaded.

Environment variables:
    CXX: the C++ compiler, flags allowed (default: the first of c++, g++ and clang++).
    CUDA_HOME: where the CUDA toolkit is (default: that of the nvcc on the PATH, then /usr/local/cuda).
    MAX_JOBS: compilers at once (default: from the cores and the memory that is free).
    TORUS_CPU_CXXFLAGS, TORUS_CUDA_NVCCFLAGS: flags after all others, for every object and the link of the CPU library
        (sanitizers, another -O) and of the CUDA library.
    TORUS_CUDA_ARCHS: the GPUs to compile for, as in "80 90a" (the default). Where it is set, setup.py compiles for
        them also beside a torch without CUDA.
    TORUS_CACHE_DIR: where first use keeps what it builds (default: torus_kernels in ~/.cache).
    TORUS_SKIP_BUILD: when set, never compile; a library that is already built is still used.
    TORUS_SKIP_CUDA: the same for the CUDA library alone.
"""

from .driver import build_dir_of, build_library, cache_dir, check_ahead_of_time, ensure_library
from .libraries import (
    CPU,
    PACKAGE,
    Library,
    Unit,
    cuda,
    cuda_emulation,
    extra_flags,
    find_csrc,
    source_hash,
    unit_flags,
)
from .toolchain import BuildError, Compiler, find_compiler, find_ninja, find_nvcc, find_torch, max_jobs

__all__ = [
    "CPU", "PACKAGE", "BuildError", "Compiler", "Library", "Unit", "build_dir_of", "build_library", "cache_dir",
    "check_ahead_of_time", "cuda", "cuda_emulation", "ensure_library", "extra_flags", "find_compiler", "find_csrc",
    "find_ninja", "find_nvcc", "find_torch", "max_jobs", "source_hash", "unit_flags",
]
