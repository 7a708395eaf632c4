"""A few numbers of each of a model's parameters: kept with a prompt, they tell of other weights under the same name."""

import math
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models.info import unwrapped, uses_adapter

__all__ = ["KEY", "numbers_of", "warn_of_weights", "without_adapter"]

KEY = "weights"  # among the settings in an adapter's header
_APART = 0.005  # relative; rounding to bfloat16 makes 0.002 of it, at most


def numbers_of(model: Any) -> dict[str, list[float]]:
    """Of each parameter, by its name from the base model on, the first numbers of one row, four at most.

    Of those that are here as they are: not quantised, sharded or offloaded. And, of an encoder without a head, without
    its pooler, which many a checkpoint lacks and few read. Of PEFT's adapters those that are active, whatever they are
    called, and what is below them under the name that it has without, unless they are merged into it.
    """
    model = unwrapped(model)
    base = "" if model.base_model is model else f"{model.base_model_prefix}."
    named = ((without_adapter(model, name), one) for name, one in model.named_parameters())
    found = {name.removeprefix(base): one.data for name, one in named if name}
    if not base:
        found = {name: one for name, one in found.items() if "pooler." not in name}
    here = {name: one for name, one in found.items() if type(one) is Tensor and one.device.type != "meta"}
    floats = {name: one for name, one in here.items() if one.is_floating_point() and one.itemsize > 1}
    return {name: _some_of(one) for name, one in floats.items() if one.numel()}


def without_adapter(model: Any, name: str) -> str:
    """A parameter's name without what adapters of PEFT's put into it; "" for one that is not used or not as it was."""
    words: list[str] = []
    owner, last, part = model, "", model
    for word in name.split("."):
        if last in getattr(owner, "adapter_layer_names", ()):
            if word not in owner.active_adapters or owner.disable_adapters:
                return ""
        elif hasattr(part, "adapter_layer_names") and (word == "original_module" or getattr(part, "merged", False)):
            return ""
        elif word != "base_layer":
            words.append(word)
        owner, last, part = part, word, getattr(part, word)
    return ".".join(words)


def _some_of(parameter: Tensor) -> list[float]:
    """Of its second row, as the first one of a token table may be that of the padding."""
    row = parameter[None]
    if parameter.dim():
        row = parameter[tuple(min(1, size - 1) for size in parameter.shape[:-1])]
    return [float(f"{one:.4g}") for one in row[:4].tolist()]


def warn_of_weights(model: Any, settings: dict[str, Any], folder: str | Path) -> None:
    """A warning where the weights of `model` are others than those that the prompt in `folder` was saved with.

    For after the head that goes with the prompt has been loaded: it is compared, too.
    """
    kept = settings.get(KEY) or {}
    if not isinstance(kept, dict) or not all(map(_are_numbers, kept.values())):
        raise ValueError(f"the adapter in {folder} is damaged: its weights are {str(kept)[:100]}")
    if settings.get("with_adapter") and not uses_adapter(model):
        return  # which may have been merged
    here = numbers_of(model)
    both = [name for name in kept if name in here]
    others = [name for name in both if _differ(here[name], kept[name])]
    for name in others[:1]:
        warnings.warn(
            f"{len(others)} of {len(both)} parameters of {type(unwrapped(model)).__name__} have other numbers than "
            f"where the prompt in {folder} was trained ({name}: {here[name][0]:.4g}, ..., there {kept[name][0]:.4g}, "
            "...): it is for the weights that the model had then",
            stacklevel=3,
        )


def _differ(ours: list[float], theirs: list[float]) -> bool:
    return len(ours) != len(theirs) or math.dist(ours, theirs) > _APART * math.hypot(*theirs) + 1e-6


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, float) for one in value)
