"""Prompt tuning with the token lookup, the prompt and the mask in one GPU kernel."""

from .classifier import FastPTuning
from .functional import prepend_prompt

__all__ = ["FastPTuning", "prepend_prompt"]
