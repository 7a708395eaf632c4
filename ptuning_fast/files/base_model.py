"""The model that an adapter was trained on, and the one that it is loaded for."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..models.embedding import is_sharded
from ..models.info import unwrapped, uses_adapter
from . import weights
from .peft import Saved

__all__ = [
    "check_base",
    "load_head",
    "lost_adapter",
    "same_name",
    "settings_of",
    "warn_of_adapter",
    "warn_of_rounding",
]


def check_base(model: Any, saved: Saved, folder: str | Path, any_base: bool = False) -> None:
    """ValueError where `model` is not what the prompt was trained on: another width, type, or (not `any_base`) name."""
    config, kind = saved.config, model.config.model_type
    d, width = model.get_input_embeddings().weight.shape[1], saved.parameters["prompt_embeddings"].shape[-1]
    ours, theirs = getattr(model.config, "_name_or_path", ""), config.get("base_model_name_or_path")
    if width != d:
        raise ValueError(
            f"the prompt in {folder} is {width} wide and the embeddings of {type(model).__name__} are {d}: "
            f"it was trained on another model ({theirs})"
        )
    if ours and theirs and not any_base and not same_name(str(ours), str(theirs)):
        raise ValueError(
            f"the prompt in {folder} was trained on {theirs}, and this is {ours}: load that model, or say any_base=True"
        )
    if config.get("model_type", kind) != kind:
        raise ValueError(f"the prompt in {folder} was trained on a {config['model_type']}, and this is a {kind}")
    warn_of_adapter(model, saved.settings, folder)


def warn_of_adapter(model: Any, settings: dict[str, Any], folder: str | Path) -> None:
    """A warning where a prompt was trained on a model with an adapter of PEFT's and `model` has none, or vice versa."""
    if lost_adapter(model, settings):
        said = "with an adapter of PEFT's (LoRA), which this one has not, or disabled: unless it was merged, load it"
    elif settings.get("with_adapter") is False and uses_adapter(model):
        said = "without an adapter of PEFT's (LoRA), and this one has one: unless that is new, take the model without"
    else:
        return
    warnings.warn(f"the prompt in {folder} was trained on a model {said}", stacklevel=4)


def lost_adapter(model: Any, settings: dict[str, Any]) -> bool:
    """Whether a prompt was trained on a model with an adapter of PEFT's and `model` uses none: it may be merged."""
    return bool(settings.get("with_adapter")) and not uses_adapter(model)


def settings_of(model: Any) -> dict[str, Any]:
    """What is kept of `model` with a prompt: whether it has an adapter of PEFT's, and some of its numbers."""
    return {"with_adapter": uses_adapter(model), weights.KEY: weights.numbers_of(model)}


def same_name(ours: str, theirs: str) -> bool:
    """Whether two names may be of one model: hub ids as they are; a folder, which may have moved, by its own name.

    So `runA/checkpoint-500` may be `runB/checkpoint-500`.
    """
    hub_ids = all(name.count("/") == 1 and not Path(name).exists() for name in (ours, theirs))
    return ours == theirs if hub_ids else Path(ours).name == Path(theirs).name


def load_head(model: nn.Module, head: dict[str, Tensor], folder: str | Path) -> None:
    """Copy the saved parameters of a task head into the model, all or none; ValueError where they do not fit."""
    model = unwrapped(model)
    own = model.state_dict()
    head = {name: one for name, one in head.items() if name in own or ".base_layer." not in name}  # a LoRA was merged
    for name, tensor in head.items():
        if name not in own or own[name].shape != tensor.shape:
            found = f"has {list(own[name].shape)}" if name in own else "has none"
            raise ValueError(
                f"the adapter in {folder} holds {name} {list(tensor.shape)}, and {type(model).__name__} {found}: "
                "load the model with the class and the num_labels that it was trained with"
            )
        if own[name].device.type == "meta" or is_sharded(own[name]):
            raise ValueError(
                f"{name} of {type(model).__name__} is offloaded or sharded, and the adapter in {folder} brings its "
                "own: load the adapter before"
            )
        _check_tied(model, own, name, head, folder)
    warn_of_rounding(own, head, folder)
    before = _BROUGHT.setdefault(model, {})
    others = {name: one for name, one in before.items() if one != str(folder)}
    for name in [*(others.keys() & head.keys())][:1]:
        warnings.warn(
            f"the head of {type(model).__name__} came with the adapter in {others[name]}, and is now that of {folder}: "
            "a prompt that was loaded before is without its own; load each for a model of its own",
            stacklevel=3,
        )
    for name in sorted(others.keys() - head.keys())[:1]:
        warnings.warn(
            f"{name} of {type(model).__name__} came with the adapter in {others[name]}, and the one in {folder} brings "
            "none, so it is with another than it was trained with: load each for a model of its own",
            stacklevel=3,
        )
    with torch.no_grad():
        for name, tensor in head.items():
            own[name].copy_(tensor)
            before[name] = str(folder)


def _check_tied(
    model: nn.Module, own: Mapping[str, Tensor], name: str, head: dict[str, Tensor], folder: str | Path
) -> None:
    """ValueError where `name` is one with others, and the adapter has its own for it alone, a copy that PEFT made."""
    tied = [one for one, tensor in own.items() if tensor.data_ptr() == own[name].data_ptr() and tensor.numel()]
    apart = [one for one in tied if one not in head or not _same(head[one], head[name])]
    if apart and not _same(head[name].to(own[name]), own[name]):
        way_out = "load the model with tie_word_embeddings=False, which leaves it to the adapter"
        if getattr(model.config, "is_encoder_decoder", False):  # two of whose tables would then be new ones
            way_out = "leave the adapter to PEFT"
        raise ValueError(
            f"{name} of {type(model).__name__} is tied to {apart[0]}, and the adapter in {folder} brings its own: "
            + way_out
        )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether they are equal, NaN by NaN."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def warn_of_rounding(own: Mapping[str, Tensor], saved: dict[str, Tensor], folder: str | Path) -> None:
    """A warning where one of `saved` is not kept as it is in the parameter of that name that it is copied into."""
    rounded = [name for name, one in saved.items() if not _same(one.to(own[name].dtype).to(one.dtype), one)]
    if rounded:
        kept, dtype = own[rounded[0]].dtype, saved[rounded[0]].dtype
        warnings.warn(
            f"{rounded[0]} in {folder} is {dtype}, and is rounded to the {kept} of the model that it is loaded into",
            stacklevel=4,
        )


_BROUGHT: "WeakKeyDictionary[nn.Module, dict[str, str]]" = WeakKeyDictionary()
"""The adapters that parameters of a model came with, by their names."""
