"""Networks that the torus is compared with, built from the same `FieldConfig` and used as the same `FieldModel`."""

from .dense import DenseAttention, DenseField
from .fourier import FourierField
from .unet import UNetField
from .windows import WindowAttention, WindowField

__all__ = ["DenseAttention", "DenseField", "FourierField", "UNetField", "WindowAttention", "WindowField"]
