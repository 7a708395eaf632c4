"""The modes: how a batch behind a prompt is laid out.

"prepend"   [B, m + n]      a prompt in every row
"packed"    [1, T]          the same without padding
"shared"    [1, T']         the same with one prompt for all texts: for causal models
"auto"                      of those that are exact for the model as it stands, the one with the fewest rows
"""

from importlib import import_module

from torch import nn

from ..models.info import ModelInfo
from .base import Mode

__all__ = ["MODES", "Mode", "mode_for"]

MODES = {"prepend": "Prepend", "packed": "Packed", "shared": "Shared"}


def mode_for(name: str, model: nn.Module, info: ModelInfo) -> Mode:
    """The mode of that name for `model`, once checked; ValueError for a name of none, TypeError as the mode says."""
    if name not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; it is {name!r}")
    return getattr(import_module(f".{name}", __name__), MODES[name])(model, info)
