"""A module with another in the place of one that is in it: a copy that shares all the rest, for one call or more.

Nothing is changed in the module itself, so other threads, hooks and a later recomputation (gradient checkpointing) see
what they are called with. A copy costs some microseconds for each module on the way. And what stands against leaving
out a part of the work: hooks, outputs of inner modules that somebody asks for, dropout.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

__all__ = ["Called", "gives_more", "is_plain", "on_the_way", "what_draws", "with_module"]


class Called(nn.Module):
    """A function in a module's place."""

    def __init__(self, run: Callable[..., Any]):
        super().__init__()
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def with_module(module: Any, path: Sequence[str], other: nn.Module) -> Any:
    """A copy of `module` that has `other` at `path`.

    Args:
        path: names of submodules, `"-1"` for the last; a wrapper with one module in it needs no name.
    """
    if not path:
        return other
    name, rest = _step(module, path)
    held = vars(module)
    copied = object.__new__(type(module))
    copied.__dict__.update(held, _modules=held["_modules"] | {name: with_module(held["_modules"][name], rest, other)})
    return copied


def on_the_way(module: nn.Module, path: Sequence[str]) -> list[nn.Module]:
    """`module`, those on `path`, and the one at its end."""
    found = [module]
    while path:
        name, path = _step(found[-1], path)
        found.append(vars(found[-1])["_modules"][name])
    return found


def is_plain(modules: Iterable[nn.Module]) -> bool:
    """Whether none of them is hooked or compiled, or has had its forward replaced, as by FSDP or offloading."""
    return not any("forward" in vars(one) or any(vars(one).get(name) for name in _AROUND) for one in modules)


_AROUND = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_compiled_call_impl")


def gives_more(model: Any) -> bool:
    """Whether its config asks for the outputs of inner modules, too, which transformers catches by hooks on them."""
    configs = model.config, model.config.get_text_config()
    return any(getattr(one, f"output_{name}", False) not in (False, None) for one in configs for name in _CAUGHT)


_CAUGHT = ("hidden_states", "attentions", "router_logits")


def what_draws(model: nn.Module) -> str | None:
    """The class of a module in `model` that draws at random as it stands: dropout, or noise on a router."""
    for module in model.modules():
        if module.training and any(
            type(value) is float and value > 0 and (name == "p" or _RANDOM.search(name))
            for name, value in vars(module).items()
        ):
            return type(module).__name__
    return None


_RANDOM = re.compile("drop|jitter|noise")


def _step(module: nn.Module, path: Sequence[str]) -> tuple[str, Sequence[str]]:
    children = vars(module)["_modules"]
    if path[0] in children:
        return path[0], path[1:]
    if path[0] == "-1":
        return next(reversed(children)), path[1:]
    if len(children) != 1:
        raise KeyError(f"{type(module).__name__} has no {path[0]}")
    return next(iter(children)), path
