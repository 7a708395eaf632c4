"""Prompt tuning with the token lookup, the prompt and the mask in one GPU kernel."""

from .classifier import FastPTuning
from .functional import prepend_prompt
from .peft_forward import accelerate
from .soft_prompt import SoftPrompt

__all__ = ["FastPTuning", "SoftPrompt", "accelerate", "prepend_prompt"]
