"""A few numbers of each of a model's parameters: kept with a prompt, they tell of other weights under the same name."""

import math
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models.info import prompts_in, unwrapped

__all__ = ["KEY", "numbers_of", "warn_of_weights", "without_adapter"]

KEY = "weights"  # among the settings in an adapter's header
_APART = 0.006  # relative, of each number: 0.004 may be rounding to bfloat16, and 0.001 that to four digits
_ROWS = [place**2 for place in range(2, 65)]  # of the token embeddings, which are trained by the rows that texts have


def numbers_of(model: Any) -> dict[str, list[float]]:
    """Of each parameter, by its name from the base model on, the first numbers of one row, four at most.

    And of the token embeddings the first of 63 more rows, all of the 4,096 first, that a wider vocabulary has as well.
    Of those that are here as they are: not quantised, sharded or offloaded. And, of an encoder without a head, without
    its pooler, which many a checkpoint lacks and few read. Of PEFT's adapters the sum of the active ones, whatever they
    are called, and what is below them under the name that it has without, unless they are merged into it.
    """
    model = unwrapped(model)
    base = "" if model.base_model is model else f"{model.base_model_prefix}."
    table = getattr(model.get_input_embeddings(), "weight", None)
    numbers: dict[str, list[float]] = {}
    prompts = prompts_in(model)
    for full_name, one in model.named_parameters():
        if full_name.startswith(prompts):
            continue
        name = without_adapter(model, full_name).removeprefix(base)
        here = type(one.data) is Tensor and one.device.type != "meta" and one.numel()
        if not (name and here and one.is_floating_point() and one.itemsize > 1) or (not base and "pooler." in name):
            continue
        some = [float(f"{number:.4g}") for number in _some_of(one.data, _ROWS if one is table else [])]
        numbers[name] = [round(sum(both), 9) for both in zip(some, numbers.get(name, [0.0] * len(some)))]
    return numbers


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


def _some_of(parameter: Tensor, rows: list[int]) -> list[float]:
    """Of its second row, as the first one of a token table may be that of the padding, and of `rows` that it has."""
    row = parameter[None]
    if parameter.dim():
        row = parameter[tuple(min(1, size - 1) for size in parameter.shape[:-1])]
    more = parameter[[place for place in rows if place < len(parameter)], 0].tolist() if rows else []
    return row[:4].tolist() + more


def warn_of_weights(model: Any, settings: dict[str, Any], folder: str | Path) -> None:
    """A warning where the weights of `model` are others than those that the prompt in `folder` was saved with.

    For after the head that goes with the prompt has been loaded: it is compared, too. Not for a model whose adapter of
    PEFT's may have been merged since.
    """
    kept = settings.get(KEY) or {}
    if not isinstance(kept, dict) or not all(map(_are_numbers, kept.values())):
        raise ValueError(f"the adapter in {folder} is damaged: its weights are {str(kept)[:100]}")
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
    return not all(math.isclose(*both, rel_tol=_APART, abs_tol=1e-6) for both in zip(ours, theirs))


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, float) for one in value)
