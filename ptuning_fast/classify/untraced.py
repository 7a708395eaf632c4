"""A call that torch.compile does not trace through, in a file of its own because it imports the compiler."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["untraced"]


@torch.compiler.disable
def untraced(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, eagerly even where the caller is compiled."""
    return function(*arguments)
