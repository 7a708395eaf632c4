"""The kernels under torch.compile: two operators that it does not look into, and what their outputs look like.

`forward` and `backward` have the signatures of `ptuning_fast.kernels`, which run inside as they do without it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import kernels as _kernels
from .arguments import Batch, Layout, Prompt
from .checks import raise_for_ids

kernels: Any = _kernels


@torch.library.custom_op("ptuning_fast::prepend_prompt", mutates_args=())
def prepend_prompt(
    batch: Sequence[Tensor | None],
    weight: Tensor,
    vectors: Tensor,
    prompt_index: Tensor | None,
    position_start: int | None,
    embed_scale: float,
    adjacent: bool,
    packed: bool,
    lengths: Sequence[int] | None,
    additive_mask: torch.dtype | None,
) -> tuple[list[Tensor], int]:
    """The outputs of `kernels.forward` that there are, each in memory of its own, and `max_length`, or 0."""
    columns: Any = tuple(batch)
    prompt = Prompt(vectors, prompt_index)
    if weight.is_cpu:
        raise_for_ids(columns, weight, prompt, packed)
    layout = position_start, embed_scale, adjacent, packed, lengths, additive_mask
    *outputs, cu_seq_lens, prompt_start, max_length = kernels.forward(columns, weight, prompt, layout)
    outputs.append(cu_seq_lens if packed else prompt_start)  # packed, the latter is a part of the former
    return [one for one in outputs if one is not None], max_length or 0


@prepend_prompt.register_fake
def _(batch: Any, weight: Tensor, vectors: Tensor, prompt_index: Tensor | None, *layout: Any) -> tuple[Any, Any]:
    _, _, adjacent, packed, _, _ = layout
    (B, n), (m, d) = batch[0].shape, vectors.shape[-2:]
    rows: Any = B, m + n
    max_length: Any = 0
    if packed:
        context = torch.library.get_ctx()
        rows, max_length = (1, context.new_dynamic_size()), context.new_dynamic_size()
    outputs = [one for one in kernels.empty_outputs(batch, weight, layout, *rows, d) if one is not None]
    if packed or (adjacent and batch[1] is not None):
        outputs.append(weight.new_empty(B + 1 if packed else B, dtype=torch.int32))
    return outputs, max_length


@torch.library.custom_op("ptuning_fast::prompt_gradient", mutates_args=())
def backward(
    grad: Tensor,
    prompt_shape: Sequence[int],
    prompt_dtype: torch.dtype,
    prompt_start: Tensor | None,
    prompt_index: Tensor | None,
    packed: bool,
) -> Tensor:
    """What `kernels.backward` returns, in memory of its own."""
    out = kernels.backward(grad, prompt_shape, prompt_dtype, prompt_start, prompt_index, packed)
    return out.clone() if out.data_ptr() == grad.data_ptr() else out


@backward.register_fake
def _(grad: Tensor, prompt_shape: Sequence[int], prompt_dtype: torch.dtype, *_: Any) -> Tensor:
    return grad.new_empty(prompt_shape, dtype=prompt_dtype)


def forward(batch: Batch, weight: Tensor, prompt: Prompt, layout: Layout) -> tuple:
    """What `ptuning_fast.kernels.forward` does, with the same arguments and results."""
    (vectors, prompt_index), (_, _, _, packed, _, _) = prompt, layout
    outputs, max_length = prepend_prompt(list(batch), weight, vectors.detach(), prompt_index, *layout)
    there = iter(outputs)
    asked = kernels.empty_outputs(batch, weight, layout, 0, 0, 0)
    placed = [None if one is None else next(there) for one in asked]
    start: Any = next(there, None)
    if packed:
        return *placed, start, start[:-1], max_length
    return *placed, None, start, None
