"""Language models on disk: one safetensors file with weights, vocabulary and, where training may go on, its state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastseq import checkpoint
from fastseq.models.language_model import LanguageModel
from fastseq.models.text import Vocabulary

BEST, LAST = "best.safetensors", "last.safetensors"  # in the folder of a training
_KIND = "language model"


def save_language_model(
    path: str | os.PathLike[str], model: LanguageModel, vocabulary: Vocabulary, facts: Mapping[str, Any]
) -> None:
    """Writes the model in one step; see :func:`fastseq.checkpoint.save`, also for the errors and what ``facts`` may be.

    The folder is made if it does not exist.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    state = {
        "kind": _KIND,
        "config": model.config,
        "vocabulary": vocabulary.state(),
        "model": model.state_dict(),
        "facts": facts,
    }
    checkpoint.save(path, state)


def load_language_model(path: str | os.PathLike[str]) -> tuple[LanguageModel, Vocabulary, dict[str, Any]]:
    """The model, in evaluation mode on the CPU, its vocabulary, and what else was saved.

    Args:
        path: a file, or the folder of a training, whose best model is taken.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is not a language model of fastseq.
    """
    path = Path(path)
    if path.is_dir():
        path = path / BEST
    state = checkpoint.load(path)
    if state.get("kind") != _KIND:
        raise ValueError(f"{path} is a checkpoint, but not of a language model")
    try:
        model = LanguageModel(**state["config"])
        model.load_state_dict(state["model"])
        vocabulary = Vocabulary.of_state(state["vocabulary"])
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a whole checkpoint of a language model: {reason}") from None
    if len(vocabulary) != model.config["vocab_size"]:
        raise ValueError(
            f"{path}: expected {model.config['vocab_size']} tokens in the vocabulary, got {len(vocabulary)}"
        )
    return model.eval(), vocabulary, state["facts"]
