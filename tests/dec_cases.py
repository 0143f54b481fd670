"""A small clustering that several tests run, in this process and in others."""

import sys
from typing import Any

import numpy as np
import torch
from sklearn.datasets import make_blobs

from fastseq.cluster import DEC

SMALL: dict[str, Any] = {
    "n_clusters": 3,
    "hidden_sizes": (16,),
    "pretrain_epochs": 10,
    "pretrain_batch_size": 32,
    "pretrain_learning_rate": 5e-3,
    "n_init": 3,
    "batch_size": 32,
    "update_interval": 5,
    "max_iter": 40,
    "tol": 0.0,
    "random_state": 0,
}


def points(count: int = 150, dtype: Any = np.float32) -> tuple[Any, Any]:
    x, y = make_blobs(count, 8, centers=3, random_state=1, cluster_std=1.5)
    return (x / 5).astype(dtype), y


def results(model: DEC) -> list[Any]:
    """All numbers that a fit leaves."""
    state = [value.numpy() for value in model.autoencoder_.state_dict().values()]
    return [model.labels_, model.cluster_centers_, *state]


if __name__ == "__main__":
    # A fit that writes a checkpoint whenever it can, for a test that kills it: python dec_cases.py FILE
    torch.set_num_threads(1)
    DEC(**SMALL, checkpoint=sys.argv[1], checkpoint_interval=0).fit(points()[0])
