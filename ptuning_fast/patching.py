"""Other forwards for a model's modules, during one forward of one thread."""

import contextlib
import threading
from collections.abc import Callable

from torch import nn

__all__ = ["is_untouched", "replaced_forward"]


def is_untouched(module: nn.Module) -> bool:
    """Whether nobody has hooked into `module` or replaced its forward."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable):
    """Inside, `forward` is the module's in this thread; other threads see its own."""
    own, owner = module.forward, threading.get_ident()
    module.forward = lambda *args, **kwargs: (forward if threading.get_ident() == owner else own)(*args, **kwargs)
    try:
        yield
    finally:
        del module.forward
