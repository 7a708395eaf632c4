"""Checkpoints that hold what is trained, and nothing of a frozen model: kilobytes, whoever asks for a `state_dict`."""

from typing import Any, TypeVar

from torch import nn

__all__ = ["trained_only"]

Module = TypeVar("Module", bound=nn.Module)


def trained_only(module: Module) -> Module:
    """From now on `module.state_dict()` has what is trained, now or then, and `load_state_dict` misses nothing else.

    For training loops that save `state_dict()` themselves, such as `transformers.Trainer` around a module that is no
    PreTrainedModel: `Trainer(model=trained_only(FastPTuning(...)), ...)`. What is trained now stays in it when it is
    frozen later. Parameters that are tied to another are there once, under its first name, as safetensors want it.

    Returns:
        `module` itself.
    """
    module.__dict__["_kept"] = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    module.register_state_dict_post_hook(_keep_trained)
    module.register_load_state_dict_post_hook(_miss_trained)
    return module


def _trained(module: nn.Module) -> set[str]:
    kept = module.__dict__["_kept"]
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad or name in kept}


def _keep_trained(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict) -> None:
    trained = _trained(module)
    for name in [name for name in state_dict if name.startswith(prefix) and name[len(prefix) :] not in trained]:
        del state_dict[name]


def _miss_trained(module: nn.Module, incompatible: Any) -> None:
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)} | dict(module.named_buffers()).keys()
    ends = tuple("." + name for name in names - _trained(module))  # where it is a part of something else, a prefix
    missing = [name for name in incompatible.missing_keys if not ("." + name).endswith(ends)]
    incompatible.missing_keys[:] = missing
