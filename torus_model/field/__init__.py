"""Fields on periodic grids and on cylinders: models, data, training and evaluation."""

from .config import FieldConfig
from .model import FieldModel, LatticeTransformer, TorusField

__all__ = ["FieldConfig", "FieldModel", "LatticeTransformer", "TorusField"]
