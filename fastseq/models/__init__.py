"""Models over the recurrent layers: language models and encoders of sequences."""

from __future__ import annotations

from fastseq.models.cross_entropy import linear_cross_entropy
from fastseq.models.encoder import SequenceEncoder
from fastseq.models.language_model import LanguageModel
from fastseq.models.sampling import sample
from fastseq.models.saving import load_language_model
from fastseq.models.text import Vocabulary
from fastseq.models.training import Evaluation, LanguageModelTrainer, TrainingSettings, evaluate

__all__ = [
    "Evaluation",
    "LanguageModel",
    "LanguageModelTrainer",
    "SequenceEncoder",
    "TrainingSettings",
    "Vocabulary",
    "evaluate",
    "linear_cross_entropy",
    "load_language_model",
    "sample",
]
