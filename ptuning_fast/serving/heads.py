"""Which parameters of a model go with its prompt: a classifier's head, and what its checkpoint had not."""

import itertools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..files.peft import HEADS, task_of
from ..models.info import is_a, prompts_in, unwrapped

__all__ = ["head_of", "modules_of", "new_parts", "new_pooler", "perhaps_new"]


def head_of(model: Any) -> dict[str, Tensor]:
    """The parameters outside the base model of a classifier: {"classifier.weight": ...}; none for other tasks.

    And its pooler, where that is as new: the checkpoint of a masked language model has none.

    None of a model that PEFT has wrapped (LoRA and the like): it keeps its head with its own adapter.
    """
    if hasattr(getattr(model, "_orig_mod", model), "peft_config"):
        return {}
    model = unwrapped(model)
    if not _has_head(model):
        return {}
    state = model.state_dict()
    names = new_parts(model).union(_outside(model, state))
    return {name: one for name, one in state.items() if name in names}


def _outside(model: Any, names: Iterable[str]) -> list[str]:
    """Those of `names` that are not of what the base model is in, nor of a prompt that somebody has put there."""
    inner = [model.base_model_prefix]
    if model.base_model is model:  # T5ForQuestionAnswering has encoder and decoder in it
        inner = [
            name for name, one in model.named_children() if hasattr(one, "config") or isinstance(one, nn.Embedding)
        ]
    prompts = prompts_in(model)
    return [name for name in names if name.partition(".")[0] not in inner and not name.startswith(prompts)]


def new_parts(model: Any) -> frozenset[str]:
    """Names of the parameters of a classifier's head, and of its pooler, that the checkpoint had not.

    But for those that PEFT keeps with an adapter.
    """
    if not (_has_head(model) and _marked(model)):
        return frozenset()
    new = [*_outside(model, _drawn(model)), *_of_pooler(model)]
    return frozenset(name for name in new if not _in_an_adapter(model, name))


def perhaps_new(model: Any) -> frozenset[str]:
    """Names of the parameters of a copied classifier of which nobody knows whether the checkpoint had them.

    A copy (`copy.deepcopy`) is without transformers' marks. They are its head, and a pooler with a bias of zeros, as it
    is drawn (and as some checkpoints have it), but for those that PEFT keeps with an adapter.
    """
    if not _has_head(model) or _marked(model) or not getattr(model.config, "_name_or_path", ""):
        return frozenset()
    names = [*_outside(model, dict(model.named_parameters())), *_of_pooler(model)]
    return frozenset(name for name in names if not _in_an_adapter(model, name))


def new_pooler(model: Any) -> frozenset[str]:
    """Names of the parameters of a pooler, of an encoder without a head, that the checkpoint had not.

    Few read it, so it goes with no prompt; but a module of somebody's own, whose head does, has it in its checkpoints.
    """
    return frozenset() if _has_head(model) else frozenset(_of_pooler(model))


def _of_pooler(model: Any) -> list[str]:
    pooler = "pooler." if model.base_model is model else f"{model.base_model_prefix}.pooler."
    return [name for name in _drawn(model) if name.startswith(pooler)]


def _has_head(model: Any) -> bool:
    return task_of(model) in HEADS or is_a(model, "ForMultipleChoice")


def _in_an_adapter(model: nn.Module, name: str) -> bool:
    places = itertools.accumulate(name.split(".")[:-1], "{}.{}".format)
    return any(
        type(model.get_submodule(place)).__module__.startswith("peft.") and not name.startswith(f"{place}.base_layer.")
        for place in places
    )


def _drawn(model: Any) -> set[str]:
    """The parameters that transformers has drawn, of a model that it has loaded: the checkpoint has none.

    Of a copy, without marks, those that may be: what has a bias of zeros.
    """
    parameters, marked = dict(model.named_parameters()), _marked(model)
    if marked:
        return parameters.keys() - marked
    if not getattr(model.config, "_name_or_path", ""):
        return set()
    drawn = [name.removesuffix("bias") for name, one in parameters.items() if name.endswith("bias") and _is_zero(one)]
    return {f"{name}{last}" for name in drawn for last in ("weight", "bias")} & parameters.keys()


def _marked(model: Any) -> set[str]:
    return {name for name, one in model.named_parameters() if getattr(one, _LOADED, False)}


def _is_zero(parameter: Tensor) -> bool:
    return type(parameter.data) is Tensor and parameter.device.type != "meta" and not parameter.any()


_LOADED = "_is_hf_initialized"  # transformers' mark on parameters that a checkpoint had


def modules_of(model: Any, head: dict[str, Tensor]) -> set[str]:
    """The modules that the parameters `head_of` gives are of, but for those whose names PEFT takes for others', too.

    It goes by the end of a module's name.
    """
    base = f"{unwrapped(model).base_model_prefix}."
    tops = {base * name.startswith(base) + name.removeprefix(base).partition(".")[0] for name in head}
    inside = tuple(f"{top}." for top in tops)
    others = [name for name, _ in unwrapped(model).named_modules() if not f"{name}.".startswith(inside)]
    return {top for top in tops if not any(name.endswith(top) for name in others)}
