"""What a Hugging Face model is and takes: facts, the table of families, the probe, and the op over its embedding."""

from .embedding import prepend
from .info import ModelInfo, describe, unwrapped

__all__ = ["ModelInfo", "describe", "prepend", "unwrapped"]
