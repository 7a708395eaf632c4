"""A call that torch.compile does not trace through, in a file of its own because it imports the compiler."""

import torch

__all__ = ["untraced"]


@torch.compiler.disable
def untraced(function, *arguments):
    """`function(*arguments)`, eagerly even where the caller is compiled."""
    return function(*arguments)
