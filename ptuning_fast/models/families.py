"""The one table of architectures: what is known of them by their name, and where a name says nothing.

An architecture with a row is served without being probed, as the tests show it to be right (each row is in
tests/zoo.py); any other is probed at its first use (probe.py), and gets no savings that need to know its insides. So is
one of which somebody else than transformers has written the forward, whatever it is called.
"""

import inspect
from typing import Any, NamedTuple

from torch import nn

__all__ = [
    "FAMILIES",
    "Family",
    "class_of",
    "drop_own_hooks",
    "family_of",
    "has_own_forward",
    "has_own_hooks",
    "has_own_parts",
    "has_replaced_forward",
    "hooks_of",
    "is_written_in",
]


class Family(NamedTuple):
    """What a row says.

    - `part`, a path as models/replaced.py has them: where in the last layer the rows part: behind the attention, which
      needs them all, and before anything is added up. Post-norm encoders alone: elsewhere the residual would keep all
      its rows, or be broadcast.
    - `attention`: the last layer's self-attention, where it is a BERT's: projections named query, key and value.
    - `full_attention`: in every layer, under transformers' own mask: the same columns are seen by every row of a text.
    - `absolute`: positions are added to the embeddings and nothing else counts distances, so the prompt need not stand
      next to the text.
    - `positions_from_mask`: it takes no position_ids, and does not need them, as its biases count the mask (ALiBi).
    """

    part: str | None = None
    attention: str | None = None
    full_attention: bool = False
    absolute: bool = False
    positions_from_mask: bool = False


_BERT = Family(
    part="encoder.layer.-1.attention.output",
    attention="encoder.layer.-1.attention.self",
    full_attention=True,
    absolute=True,
)
_PLAIN = Family()

FAMILIES = {
    "albert": Family(full_attention=True, absolute=True),
    "bart": _PLAIN,
    "bert": _BERT,
    "bloom": Family(positions_from_mask=True),
    "camembert": _BERT,
    "deberta-v2": Family(part="encoder.layer.-1.attention.output"),
    "distilbert": Family(part="transformer.layer.-1.sa_layer_norm", full_attention=True),
    "electra": _BERT._replace(absolute=False),
    "gemma": _PLAIN,
    "gemma2": _PLAIN,
    "gemma3_text": _PLAIN,
    "gpt2": _PLAIN,
    "llama": _PLAIN,
    "mistral": _PLAIN,
    "modernbert": _PLAIN,
    "mpnet": _PLAIN,
    "opt": _PLAIN,
    "phi": _PLAIN,
    "qwen2": _PLAIN,
    "roberta": _BERT,
    "t5": _PLAIN,
    "xlm-roberta": _BERT,
}


def class_of(module: Any) -> type:
    """The class of `module`, of which FSDP2 makes one of its own."""
    return next(kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.distributed."))


def family_of(model: Any) -> Family | None:
    """The row of `model`'s architecture; None where there is none, or its code is not transformers' own."""
    ours = class_of(model).__module__.startswith("transformers.") and not has_own_forward(model)
    return FAMILIES.get(model.config.model_type) if ours else None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Packages whose functions and hooks leave outputs alone; one that is missing here costs a saving, and no result.
_AROUND = ("torch.", "transformers.", "accelerate.", "deepspeed.", "ptuning_fast.")


def has_own_forward(model: Any) -> bool:
    """Whether somebody else than transformers has written what `model` does: of its outputs nothing is known."""
    kind = type(model)
    of_transformers = is_written_in(kind.forward, "transformers.") and is_written_in(kind.__call__, "torch.")
    return not of_transformers or has_replaced_forward(model)


def has_replaced_forward(module: Any) -> bool:
    """Whether somebody has put another than its class's there.

    Around that there may be Accelerate's, for offloading and autocast, or torch's, for compiling.
    """
    around = vars(module).get("forward")
    if around is None:
        return False
    hook: Any = getattr(module, "_hf_hook", None)  # Accelerate's, or others' that it takes, or several in one
    if not all(type(one).__module__.startswith(_AROUND) for one in getattr(hook, "hooks", [hook]) if one is not None):
        return True
    called = inspect.unwrap(around)
    of_class = inspect.unwrap(type(module).forward)
    return not is_written_in(around, *_AROUND) or getattr(called, "__func__", called) is not of_class


def is_written_in(function: Any, *packages: str) -> bool:
    """Whether a function, and each that it is put around, is; `functools.wraps` gives another's `__module__`.

    A partial is whoever's has made it, which is known of Accelerate's hooks alone.
    """
    while function is not None:
        inside = getattr(function, "func", None)
        code = inside if getattr(inside, "__module__", "").startswith("accelerate.") else function
        names = getattr(code, "__globals__", None)
        if not (type(code).__module__ if names is None else names["__name__"]).startswith(packages):
            return False
        function = vars(function).get("__wrapped__")
    return True


def hooks_of(*modules: Any) -> list[Any]:
    """Those of their forwards and backwards, and those on every module."""
    held = [getattr(one, name) for one in modules for name in _HOOKS]
    held += [getattr(nn.modules.module, f"_global{name}") for name in _HOOKS]
    return [hook for hooks in held if hooks for hook in hooks.values()]


def drop_own_hooks(*modules: Any) -> None:
    """From the forwards of `modules` those hooks that somebody else than these packages has put there."""
    for one in modules:
        for hooks in (one._forward_hooks, one._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if not is_written_in(hook, *_AROUND)]:
                del hooks[key]


def has_own_hooks(*modules: Any) -> bool:
    """Whether somebody else than these packages has put any there."""
    return not all(is_written_in(hook, *_AROUND) for hook in hooks_of(*modules))


def has_own_parts(*modules: Any) -> bool:
    """Whether somebody else than these packages has put a hook, a forward or a block on one of `modules`, or inside.

    A block has modules in it, as what is put around a layer; a single module of another's, such as a quantised linear
    layer, goes by tokens. It is asked at each call, and so does not go by `Module.modules()`, which takes three times
    as long.
    """
    inside, hooks, blocks = [*modules], hooks_of(), set()
    while inside:
        module = inside.pop()
        held = module.__dict__
        for name in _HOOKS:
            if held[name]:
                hooks += held[name].values()
        compiled = "_orig_mod" in held["_modules"]  # by torch.compile, with a forward that calls what is inside
        if "forward" in held and not compiled and has_replaced_forward(module):
            return True
        if held["_modules"] and not compiled:
            blocks.add(type(module))
        for one in held["_modules"].values():
            if one is not None:
                inside.append(one)
    own = not all(is_written_in(one.forward, *_AROUND, "peft.", "liger_kernel.") for one in blocks)
    return own or not all(is_written_in(hook, *_AROUND) for hook in hooks)
