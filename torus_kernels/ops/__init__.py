"""Operators registered with PyTorch: each schema, fake and autograd formula is stated here, once.

The library defines the operators; the backends only compute them.
"""

from . import attention, compounding, decode, rope

__all__ = ["attention", "compounding", "decode", "rope"]
