"""Forward: line streams first, then the cross flows, whose kernel mixes and compounds."""

from .launch import attention_forward

__all__ = ["attention_forward"]
