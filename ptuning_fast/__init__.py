"""Prompt tuning with the token lookup, the prompt and the mask in one GPU kernel."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import reference as reference
    from .classifier import FastPTuning
    from .functional import prepend_prompt
    from .peft_forward import accelerate
    from .soft_prompt import SoftPrompt

__all__ = ["FastPTuning", "SoftPrompt", "accelerate", "prepend_prompt"]

# Each name is imported when it is asked for: the op needs no transformers, and `--help` no torch.
_HOME = {
    "FastPTuning": "classifier",
    "SoftPrompt": "soft_prompt",
    "accelerate": "peft_forward",
    "prepend_prompt": "functional",
}


def __getattr__(name):
    if name == "reference":
        return import_module(".reference", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__, "reference"])
