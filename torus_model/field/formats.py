"""The public layouts of the neural-operator Navier-Stokes datasets: ``.mat`` and ``.npy`` files of vorticity."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

PUBLIC_SUFFIXES = (".mat", ".npy")

_VARIABLE = "u"


class FieldDataError(ValueError):
    """The data asked for is not there, or cannot be used this way; the message says why."""


def read_public(path: Path) -> Tensor:
    """Vorticity of a public file, in time order.

    Args:
        path: ``.npy``, an array ``[N, H, W, T]``; or ``.mat``, the variable ``u`` of that shape. MATLAB's own format up
            to v7 is read by scipy; v7.3 is HDF5, where the axes come in reverse, ``[T, W, H, N]``, and read by h5py.

    Returns:
        ``[N, T, H, W]`` float32, contiguous.

    Raises:
        FieldDataError: the file cannot be read, holds something else, or needs a package that is not there.
    """
    try:
        if path.suffix == ".npy":
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        elif _is_hdf5(path):
            with _package("h5py", path).File(path, "r") as file:
                values = file[_VARIABLE][()].transpose()
        else:
            values = _package("scipy.io", path).loadmat(path, variable_names=[_VARIABLE])[_VARIABLE]
    except KeyError as error:
        raise FieldDataError(f"{path} has no variable {_VARIABLE!r}") from error
    except FieldDataError:
        raise
    except Exception as error:  # the readers raise whatever a broken file leads them to
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise FieldDataError(f"{path} cannot be read: {reason}") from error
    if values.ndim != 4 or values.dtype.kind != "f" or values.size == 0:
        raise FieldDataError(f"{path} must hold real numbers [N, H, W, T], got {values.dtype} {list(values.shape)}")
    in_time = np.moveaxis(values, -1, 1)  # [N, T, H, W]
    return torch.from_numpy(np.ascontiguousarray(in_time, dtype=np.float32))


def _is_hdf5(path: Path) -> bool:
    """MATLAB puts 512 bytes of its own before the HDF5 signature."""
    with path.open("rb") as file:
        head = file.read(520)
    return b"\x89HDF\r\n\x1a\n" in (head[:8], head[512:])


def _package(name: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FieldDataError(f"{path} needs {name.partition('.')[0]}: pip install 'torus-kernels[field]'") from error
