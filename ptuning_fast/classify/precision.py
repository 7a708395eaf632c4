"""Frozen linear layers kept in half precision: autocast's results without its casts at every use."""

import torch
from torch import nn

__all__ = ["DTYPES", "store_linears"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def store_linears(model: nn.Module, precision: str) -> None:
    """Keep the weights of `model`'s linear layers in `precision` ("bf16" or "fp16"), for use under autocast.

    Autocast casts a frozen weight each time it is used (its cache is for weights that require grad). Stored in that
    dtype it is cast once, here, to the same numbers. Everything else stays as it is.

    Raises:
        ValueError: a model in another half precision, which autocast to this one does not run.
    """
    dtype = DTYPES[precision]
    others = {parameter.dtype for parameter in model.parameters()} & {*DTYPES.values()} - {dtype}
    if others:
        raise ValueError(
            f"the encoder is in {others.pop()}, and precision={precision!r} is for one in fp32: load it with "
            "dtype=torch.float32, or leave precision out"
        )
    for module in model.modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":  # the latter is GPT-2's linear layer
            for parameter in (module.weight, module.bias):
                if parameter is not None:
                    parameter.data = parameter.data.to(dtype)
