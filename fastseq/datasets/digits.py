"""scikit-learn's digits: 1,797 images of 8 by 8 pixels, which come with scikit-learn itself."""

from __future__ import annotations

from fastseq._extras import require
from fastseq.datasets.labelled import Labelled


def load_digits() -> Labelled:
    """1,797 handwritten digits of 8 by 8 pixels in [0, 1]: ``data [1797, 64]``.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    bunch = require("sklearn.datasets", "cluster", "load_digits").load_digits()
    return Labelled.of(bunch.data / 16.0, bunch.target, bunch.target_names, (8, 8))
