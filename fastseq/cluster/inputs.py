"""What the estimators take and give: arrays as scikit-learn does, and tensors that stay where they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from sklearn.utils.validation import validate_data
from torch import Tensor
from torch.utils.data import Dataset

from fastseq.errors import ShapeError


def checked(estimator: Any, X: Any, *, reset: bool, dtype: Any = "numeric", datasets: bool = False) -> Any:
    """``X`` as an array (with scikit-learn's own checks), or as the tensor or Dataset that it is.

    Raises:
        ValueError: not two-dimensional, not finite, or of another width than in ``fit``.
    """
    if datasets and isinstance(X, Dataset):
        return X
    if not isinstance(X, Tensor):
        return validate_data(estimator, X, reset=reset, dtype=dtype)
    if X.ndim != 2 or 0 in X.shape:
        raise ShapeError(f"X: expected shape [N, d] with N and d at least 1, got {list(X.shape)}")
    if reset:
        estimator.n_features_in_ = X.shape[1]
    elif X.shape[1] != estimator.n_features_in_:
        raise ShapeError(f"X: expected {estimator.n_features_in_} features, as in fit, got {X.shape[1]}")
    if not bool(X.isfinite().all()):
        raise ValueError("X: expected finite numbers, got NaN or infinity")
    return X.detach()


def as_tensor(X: Any) -> Tensor:
    """The array or tensor as a tensor; an array keeps its memory where torch can."""
    if isinstance(X, Tensor):
        return X
    return torch.from_numpy(np.require(X, requirements=["C", "W"]))


def like(result: Tensor, X: Any) -> Any:
    """A tensor for a tensor, an array for everything else."""
    return result if isinstance(X, Tensor) else result.cpu().numpy()


def seed_of(random_state: Any) -> int:
    """A seed from what scikit-learn takes as ``random_state``: an int is itself."""
    if isinstance(random_state, (int, np.integer)) and not isinstance(random_state, bool) and random_state >= 0:
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31 - 1))
