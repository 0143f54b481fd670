"""Autoencoders: plain, sparse, denoising, stacked and variational, with one way to train them."""

from __future__ import annotations

from fastseq.autoencoder.base import Autoencoder
from fastseq.autoencoder.denoising import DenoisingAutoencoder
from fastseq.autoencoder.sparse import SparseAutoencoder
from fastseq.autoencoder.stacked import StackedDenoisingAutoencoder
from fastseq.autoencoder.training import Plan
from fastseq.autoencoder.variational import VariationalAutoencoder

__all__ = [
    "Autoencoder",
    "DenoisingAutoencoder",
    "Plan",
    "SparseAutoencoder",
    "StackedDenoisingAutoencoder",
    "VariationalAutoencoder",
]
