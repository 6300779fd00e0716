"""Backward: line streams, then the cross flows, whose kernels end what the lines began, then the parameters."""

from .launch import attention_backward

__all__ = ["attention_backward"]
