"""Triton kernels that put a trainable prompt in front of embedded tokens: forward and backward, with their launchers.

Imports torch and triton alone, by relative path, so that the folder also loads as a Hugging Face kernel.
"""

import torch

from .backward import backward
from .forward import forward
from .rounding import INTERPRETED

__all__ = ["backward", "dtypes", "forward", "runs_on"]

dtypes = (torch.float32, torch.float16, torch.bfloat16)
"""Weight and prompt dtypes that the kernels take."""


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on `device`: a GPU, or the CPU when Triton was started with TRITON_INTERPRET=1."""
    if INTERPRETED.value:
        return device.type == "cpu"
    return device.type in ("cuda", "xpu")
