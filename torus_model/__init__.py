"""A reference model on `torus_kernels`: torus attention as a layer, a byte-level language model and its training.

Every layer takes ``backend=`` and hands it to the operator; nothing else depends on which kernels run.
"""

from .attention import TorusAttention
from .block import TorusBlock
from .lm import ModelConfig, TorusLM

__all__ = ["ModelConfig", "TorusAttention", "TorusBlock", "TorusLM"]
