"""Options that several commands share."""

from __future__ import annotations

import argparse

import torch

from torus_kernels.backends import BACKENDS

from ...checkpoint import load, locate
from ..data import FORCINGS, FieldData, load_data, split
from ..model import FieldModel
from ..run import fingerprint
from ..train import load_field_model
from ..train_config import FieldTrainConfig


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """``--data`` and ``--forcing``."""
    parser.add_argument("--data", required=True, metavar="FILE",
                        help="trajectories: .safetensors, or .mat or .npy in the public layout of the datasets")
    parser.add_argument("--forcing", choices=FORCINGS,
                        help="of a .mat or .npy file: the forcing that made it, as a static channel (default: none)")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """``--checkpoint``, ``--backend`` and ``--device``."""
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="checkpoint, or folder of a run")
    parser.add_argument("--backend", choices=BACKENDS, help="kernels to use (default: the best that can run)")
    parser.add_argument("--device", default="cpu", help="where to compute, cpu or cuda (default: %(default)s)")


def check_device(name: str) -> str:
    """Raises ValueError where torch has no such device."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, ValueError) as error:  # torch asserts that it was built with CUDA
        raise ValueError(f"device {name} is not to be had: {str(error).splitlines()[0]}") from error
    return name


def load_model_and_data(options: argparse.Namespace) -> tuple[FieldModel, FieldData]:
    """What `add_data_options` and `add_model_options` name."""
    device = check_device(options.device)
    return load_field_model(options.checkpoint, options.backend).to(device), load_data(options.data, options.forcing)


def held_out(checkpoint: str, data: FieldData) -> FieldData:
    """The trajectories that the run of a checkpoint tested on, or all, where the data is not that of the run."""
    _, metadata = load(locate(checkpoint), prefix="none")
    if metadata["data_fingerprint"] != fingerprint(data):
        return data
    config = FieldTrainConfig.from_dict(metadata["field_train_config"])
    return split(data, *config.trajectories(len(data)))[1]
