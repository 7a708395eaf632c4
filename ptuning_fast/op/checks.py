"""The op's arguments: what they must be, and what to say where they are not."""

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from .arguments import Batch, Layout, Prompt

__all__ = ["check", "checked_lengths", "compare_lengths", "raise_for_ids"]

_INTEGERS = (torch.int64, torch.int32)
_MASKS: tuple[torch.dtype, ...] = (torch.int64, torch.int32, torch.bool, torch.float32, torch.float16)
_MASKS += (torch.bfloat16, torch.float64, torch.int16, torch.int8, torch.uint8)


def check(batch: Batch, weight: Tensor, prompt: Prompt, layout: Layout) -> None:
    """ValueError or TypeError for arguments that do not fit together, naming the value, the limit and the way out."""
    # What goes into a message is looked up when there is one: this runs at every call.
    input_ids, attention_mask, token_type_ids, labels = batch
    vectors, prompt_index = prompt
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a torch.Tensor, not {type(input_ids).__name__}")
    shape, dtype, device = input_ids.shape, input_ids.dtype, input_ids.device
    if len(shape) != 2:
        raise ValueError(f"input_ids must be [batch, tokens]; its shape is {tuple(shape)}")
    if dtype is not torch.int64 and dtype is not torch.int32:
        raise TypeError(f"input_ids must be int32 or int64, not {dtype}")
    if not isinstance(weight, Tensor) or weight.device != device:
        raise _no_tensor_here("weight", weight, device)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a float table [V, d]; it is {weight.dtype} {tuple(weight.shape)}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight requires grad, but gradient flows into the prompt alone and the table would silently stay as it is:"
            " freeze it first, with weight.requires_grad_(False) or model.requires_grad_(False)"
        )
    if not isinstance(vectors, Tensor) or vectors.device != device:
        raise _no_tensor_here("prompt", vectors, device)
    if not vectors.is_floating_point():
        raise TypeError(f"prompt must be a float tensor, not {vectors.dtype}")
    if vectors.dim() != (2 if prompt_index is None else 3) or vectors.shape[-1] != weight.shape[1]:
        kind = "[m, d], or a bank [K, m, d] with prompt_index," if prompt_index is None else "a bank [K, m, d]"
        raise ValueError(
            f"prompt must be {kind} with d = {weight.shape[1]}, the width of weight; it is {tuple(vectors.shape)}"
        )
    if attention_mask is not None:
        _check_rows("attention_mask", attention_mask, device, shape)
        if attention_mask.dtype not in _MASKS:
            raise TypeError(f"attention_mask must be bool, int or float, not {attention_mask.dtype}")
    if token_type_ids is not None:
        _check_integers("token_type_ids", token_type_ids, device, shape)
    if labels is not None:
        _check_integers("labels", labels, device, shape)
    if prompt_index is not None:
        _check_integers("prompt_index", prompt_index, device, shape[:1])
    position_start, _, _, packed, lengths, additive_mask = layout
    if position_start is not None:
        if type(position_start) is not int:
            raise TypeError(f"position_start must be an int, not {type(position_start).__name__}")
        if not -(2**31) <= position_start < 2**31:
            raise ValueError(f"position_start must fit into 32 bits; it is {position_start}")
    if additive_mask is not None:
        if additive_mask not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"additive_mask must be torch.float32, float16 or bfloat16, not {additive_mask!r}")
        if packed:
            raise ValueError("additive_mask goes with a mask, and packed=True has none: leave one of them out")
    if lengths is not None and not packed:
        raise ValueError("lengths is for packed=True; without it no row is dropped")


def _no_tensor_here(name: str, tensor: object, device: torch.device) -> Exception:
    if not isinstance(tensor, Tensor):
        return TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    return ValueError(f"{name} is on {tensor.device} and input_ids on {device}: move them to one device")


def _check_rows(name: str, tensor: object, device: torch.device, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise _no_tensor_here(name, tensor, device)
    if tensor.shape != shape:
        of = "as input_ids" if len(shape) == 2 else "one per row"
        raise ValueError(f"{name} must be {tuple(shape)}, {of}; it is {tuple(tensor.shape)}")
    if tensor.device != device:
        raise _no_tensor_here(name, tensor, device)


def _check_integers(name: str, tensor: Tensor, device: torch.device, shape: tuple[int, ...]) -> None:
    _check_rows(name, tensor, device, shape)
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be int32 or int64, not {tensor.dtype}")


def checked_lengths(lengths: Sequence[int] | Tensor, batch: Batch) -> list[int]:
    """`lengths` as a list of ints; ValueError or TypeError where they are not one of each row, on a CPU the mask's."""
    if isinstance(lengths, Tensor):
        if lengths.device.type != "cpu":
            raise ValueError(f"lengths must be known on the host: a list or a CPU tensor, not one on {lengths.device}")
        lengths = lengths.tolist()
    B, n = batch.input_ids.shape
    try:
        lengths = [index(length) for length in lengths]
    except TypeError:
        raise TypeError(f"lengths must be {B} integers, one per row; it is {lengths!r}") from None
    if len(lengths) != B:
        raise ValueError(f"lengths has {len(lengths)} entries for a batch of {B} rows")
    for row, length in enumerate(lengths):
        if not 0 <= length <= n:
            raise ValueError(f"lengths[{row}] is {length}, but a row has from 0 to {n} tokens")
    if batch.input_ids.is_cpu:
        compare_lengths(lengths, batch)
    return lengths


def compare_lengths(lengths: list[int], batch: Batch) -> None:
    """On a CPU: ValueError where `lengths` are not those of the mask."""
    B, n = batch.input_ids.shape
    actual = [n] * B if batch.attention_mask is None else (batch.attention_mask != 0).sum(1).tolist()
    for row, (length, real) in enumerate(zip(lengths, actual)):
        if length != real:
            raise ValueError(f"lengths[{row}] is {length}, but the mask of that row has {real} tokens")


def raise_for_ids(batch: Batch, weight: Tensor, prompt: Prompt, packed: bool) -> None:
    """On a CPU: IndexError for the first id outside the table (packed: under the mask) or prompt outside the bank."""
    V, (input_ids, attention_mask, _, _), (vectors, prompt_index) = weight.shape[0], batch, prompt
    bad = (input_ids < 0) | (input_ids >= V)
    if packed and attention_mask is not None:
        bad &= attention_mask != 0
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise IndexError(
            f"input_ids[{row}, {column}] is {input_ids[row, column].item()}, outside the embedding table: "
            f"ids go from 0 to {V - 1} (V = {V}). Do the tokenizer and the model belong together?"
        ) from None
    if prompt_index is not None:
        K = vectors.shape[0]
        bad = (prompt_index < 0) | (prompt_index >= K)
        if bad.any():
            [row] = bad.nonzero()[0].tolist()
            raise IndexError(
                f"prompt_index[{row}] is {prompt_index[row].item()}, outside the bank: it holds prompts 0 to {K - 1}"
            ) from None
