"""Checkpoints that hold what is trained, and nothing of a frozen model: kilobytes, whoever asks for a `state_dict`."""

from typing import Any, TypeVar

from torch import nn

__all__ = ["trained_only"]

Module = TypeVar("Module", bound=nn.Module)


def trained_only(module: Module) -> Module:
    """From now on `module.state_dict()` has those parameters alone that require grad; `load_state_dict` takes it back.

    For training loops that save `state_dict()` themselves, such as `transformers.Trainer` around a module that is no
    PreTrainedModel: `Trainer(model=trained_only(FastPTuning(...)), ...)`. Parameters that are tied to another are there
    once, under its first name, as safetensors want it.

    Returns:
        `module` itself.
    """
    module.register_state_dict_post_hook(_keep_trained)
    module.register_load_state_dict_post_hook(_expect_trained)
    return module


def _trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def _keep_trained(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict) -> None:
    kept = {prefix + name for name in _trained(module)}
    for name in [name for name in state_dict if name.startswith(prefix) and name not in kept]:
        del state_dict[name]


def _expect_trained(module: nn.Module, incompatible: Any) -> None:
    """Frozen tensors are not missing; what was trained is."""
    trained = _trained(module)
    missing = [name for name in incompatible.missing_keys if any(name.endswith(one) for one in trained)]
    incompatible.missing_keys[:] = missing
