"""Checkpoints that hold what is trained, and nothing of a frozen model: kilobytes, whoever asks for a `state_dict`."""

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from ..serving.saving import Saving

__all__ = ["marks_of_adapters", "trained_only"]

Module = TypeVar("Module", bound=nn.Module)


def trained_only(module: Module, also: Iterable[str] = (), perhaps: Iterable[str] = ()) -> Module:
    """From now on `module.state_dict()` has what is trained, now or then, and `load_state_dict` misses nothing else.

    For training loops that save `state_dict()` themselves, such as `transformers.Trainer` around a module that is no
    PreTrainedModel: `Trainer(model=trained_only(FastPTuning(...)), ...)`. What is trained now stays in it when it is
    frozen later (what is unfrozen later is in it until it is frozen again, or for good if this is called once more).
    So does all of a SoftPrompt in `module`, frozen or not, which is nowhere else. Parameters that are tied to another
    are there once, under its first name, as safetensors want it.

    Args:
        also: names of further parameters to keep, frozen or not.
        perhaps: names of further parameters to write, which `load_state_dict` does not miss.

    Returns:
        `module` itself.
    """
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad} | {*also}
    if "_kept" in module.__dict__:
        module.__dict__["_kept"] |= trained
        module.__dict__["_perhaps"] |= {*perhaps}
        return module
    module.__dict__["_kept"], module.__dict__["_perhaps"] = trained, {*perhaps}
    module.register_state_dict_post_hook(_keep_trained)
    module.register_load_state_dict_pre_hook(_note_prefix)
    module.register_load_state_dict_post_hook(_miss_trained)
    return module


def marks_of_adapters(module: nn.Module) -> list[str]:
    """What the names of parameters have in them that are of PEFT's adapters, in `module` or around it: `lora_A`."""
    parts = list(module.modules())
    marks = {str(part.prefix) for part in parts if hasattr(part, "peft_config") and hasattr(part, "prefix")}
    return sorted(marks.union(*(getattr(part, "adapter_layer_names", ()) for part in parts)))


def _trained(module: nn.Module) -> set[str]:
    """Names of parameters that are trained or of an adapter of PEFT's, and of buffers that stand beside no others."""
    kept, named = module.__dict__["_kept"], list(module.named_parameters())
    marks = marks_of_adapters(module)
    whole = tuple(
        name + "." for name, part in module.named_children() if isinstance(part, Saving)
    )  # exists nowhere else
    trained = {
        name
        for name, one in named
        if one.requires_grad or name in kept or name.startswith(whole) or any(mark in name for mark in marks)
    }
    frozen = {name.rpartition(".")[0] for name, _ in named if name not in trained}
    return trained | {name for name, _ in module.named_buffers() if name.rpartition(".")[0] not in frozen}


def _keep_trained(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict) -> None:
    trained = _trained(module) | module.__dict__["_perhaps"]
    for name in [name for name in state_dict if name.startswith(prefix) and name[len(prefix) :] not in trained]:
        del state_dict[name]


def _note_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    module.__dict__["_prefix"] = prefix


def _miss_trained(module: nn.Module, incompatible: Any) -> None:
    prefix = module.__dict__.pop("_prefix")
    held = {
        name for named in (module.named_parameters, module.named_buffers) for name, _ in named(remove_duplicate=False)
    }
    frozen = {prefix + name for name in held - _trained(module)}
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in frozen]
