"""Fields on periodic grids and on cylinders: models, data, training and evaluation."""

from .config import FieldConfig
from .data import FieldData, FieldDataError, load_data, save_data
from .evaluate import FieldScores, evaluate
from .model import FieldModel, LatticeTransformer, TorusField
from .networks import NETWORKS, build_model, equal_parameters, number_of_parameters
from .train import FieldTrainingResult, load_field_model, train
from .train_config import FieldTrainConfig

__all__ = [
    "NETWORKS",
    "FieldConfig",
    "FieldData",
    "FieldDataError",
    "FieldModel",
    "FieldScores",
    "FieldTrainConfig",
    "FieldTrainingResult",
    "LatticeTransformer",
    "TorusField",
    "build_model",
    "equal_parameters",
    "evaluate",
    "load_data",
    "load_field_model",
    "number_of_parameters",
    "save_data",
    "train",
]
