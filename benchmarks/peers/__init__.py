"""What a PyTorch user would do instead of the kernels, each called as `benchmarks.workloads.Attention` is."""

from .composition import compose, compose_compiled, compose_matmul
from .flex_attention import flex, flex_eager
from .sdpa import dense, flash

__all__ = ["compose", "compose_compiled", "compose_matmul", "dense", "flash", "flex", "flex_eager"]
