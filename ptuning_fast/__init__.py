"""Prompt tuning with the token lookup, the prompt and the mask in one GPU kernel."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import reference as reference
    from .classify.classifier import FastPTuning
    from .op import prepend_prompt
    from .prompt.prompted_model import PromptedModel
    from .prompt.soft_prompt import SoftPrompt
    from .prompt.trained_only import trained_only

__version__ = "0.1.0"

__all__ = ["FastPTuning", "PromptedModel", "SoftPrompt", "prepend_prompt", "trained_only"]

# Each name is imported when it is asked for: the op needs no transformers, and `--help` no torch.
_HOME = {
    "FastPTuning": "classify.classifier",
    "PromptedModel": "prompt.prompted_model",
    "SoftPrompt": "prompt.soft_prompt",
    "prepend_prompt": "op",
    "trained_only": "prompt.trained_only",
}


def __getattr__(name: str) -> Any:
    if name == "reference":
        return import_module(".reference", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "reference"])
