"""Training: a tokenizer and a base from scratch, token heads on a base, co-occurrence counts."""

from .errors import TrainingError

__all__ = ["TrainingError"]
