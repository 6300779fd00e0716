"""Losses of predicted fields."""

from __future__ import annotations

from torch import Tensor


def relative_l2(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean over samples of ``||predicted - target|| / ||target||``, the error of the neural-operator literature.

    Source: Li et al., "Fourier Neural Operator for Parametric Partial Differential Equations", ICLR 2021.

    Args:
        predicted, target: ``[N, ...]``, floating point; the norm of a sample is over all axes but the first.

    Returns:
        A scalar; differentiable. Not finite where a target is zero everywhere.

    Raises:
        ValueError: the shapes differ, or there is no sample.
    """
    if predicted.shape != target.shape or target.ndim < 2 or len(target) == 0:
        raise ValueError(f"predicted and target must have one shape [N, ...] with N >= 1, "
                         f"got {list(predicted.shape)} and {list(target.shape)}")
    error = (predicted - target).flatten(1).norm(dim=1)  # [N]
    return (error / target.flatten(1).norm(dim=1)).mean()
