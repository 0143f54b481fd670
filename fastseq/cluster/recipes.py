"""Arguments of DEC that suit the data sets of :mod:`fastseq.datasets`; labels played no part but in judging them."""

from __future__ import annotations

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    # Small images blur well: Gaussian noise makes a smoother code than masks do. The reconstruction (IDEC) keeps the
    # joint training from folding classes together.
    "digits": {
        "n_clusters": 10,
        "hidden_sizes": (256, 256, 512),
        "corruption": "gaussian",
        "noise": 0.4,
        "pretrain_epochs": 100,
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "reconstruction_weight": 10.0,
        "update_interval": 40,
        "max_iter": 1000,
    },
    # Adam, large batches and bfloat16 in place of the paper's 300,000 steps of SGD.
    "mnist": {
        "n_clusters": 10,
        "pretrain_epochs": 300,
        "pretrain_batch_size": 1024,
        "precision": "bfloat16",
        "update_interval": 140,
        "max_iter": 15_000,
    },
    "reuters21578": {
        "n_clusters": 4,
        "pretrain_epochs": 50,
        "update_interval": 30,
        "max_iter": 3000,
    },
}
RECIPES["reuters10k"] = RECIPES["reuters21578"]
RECIPES["reuters"] = RECIPES["reuters21578"] | {"pretrain_epochs": 5, "precision": "bfloat16", "update_interval": 2000}
RECIPES["stl10"] = RECIPES["reuters21578"] | {"n_clusters": 10}
