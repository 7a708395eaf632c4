"""The same op in torch alone, for where Triton does not run (a CPU first of all).

`forward` and `backward` have the signatures of `ptuning_fast.kernels`, so that `functional` can take either. What makes
it faster than the reference is one buffer less: all S columns are looked up at once, straight into the output, and the
prompt is then written over its own columns.
"""

import torch
from torch import Tensor

from .arguments import Batch, Layout, Prompt


def forward(batch: Batch, weight: Tensor, prompt: Prompt, layout: Layout) -> tuple:
    """What `ptuning_fast.kernels.forward` does, with the same arguments and results.

    Where `inputs_embeds` is put together by torch.cat it may come with torch's own gradient.
    """
    input_ids, attention_mask, token_type_ids, labels = batch
    vectors, prompt_index = prompt
    position_start, embed_scale, adjacent, packed, _, additive_mask = layout
    (B, n), d, m = input_ids.shape, weight.shape[1], vectors.shape[-2]
    if packed or (adjacent and n and attention_mask is not None):
        return _moved(batch, weight, prompt, layout)
    pad, in_front = torch.constant_pad_nd, (m, 0)
    out_mask = None if attention_mask is None else pad(attention_mask, in_front, 1)
    out_types = None if token_type_ids is None else pad(token_type_ids, in_front, 0)
    out_labels = None if labels is None else pad(labels, in_front, -100)
    position_ids = None if position_start is None else _positions(input_ids, m, position_start, out_mask, None)
    if additive_mask is not None and out_mask is not None:
        out_mask = _additive(out_mask, additive_mask)

    other_dtype = vectors.dtype != weight.dtype
    gradient = vectors.requires_grad and torch.is_grad_enabled()
    # torch.cat's own gradient is summed in fp32 where the prompt is; half precision by one sum, which is too.
    own_gradient = gradient and (vectors.dtype in _WIDE or not (other_dtype or prompt_index is not None))
    # Compiled, torch.cat is fused with what follows, and ids are asserted where they are looked up so.
    concatenate = m >= n or B * n * d < _SMALL[own_gradient] or torch.compiler.is_compiling()
    if gradient and not (concatenate and own_gradient):
        gradient, vectors = False, vectors.detach()
    if other_dtype and concatenate and not gradient:
        vectors = vectors.to(weight.dtype)
    if prompt_index is not None:
        vectors = vectors.index_select(0, prompt_index)
    else:  # for one row a view, whose gradient is cheaper than a sum over one row
        vectors = vectors.unsqueeze(0) if B == 1 else vectors.expand(B, m, d)
    if other_dtype and gradient:  # not earlier: so its gradient is cast first, and summed then
        vectors = vectors.to(weight.dtype)
    if concatenate:
        inputs_embeds = torch.embedding(weight, input_ids)
        if embed_scale != 1.0:
            inputs_embeds.mul_(embed_scale)
        inputs_embeds = torch.cat((vectors, inputs_embeds), dim=1)
    else:
        # The prompt's columns look up id 0, to be written over.
        inputs_embeds = _look_up(weight, pad(input_ids, in_front, 0), embed_scale)
        inputs_embeds[:, :m] = vectors
    return inputs_embeds, out_mask, out_types, out_labels, position_ids, None, None, None


def _moved(batch: Batch, weight: Tensor, prompt: Prompt, layout: Layout) -> tuple:
    """`forward` where a prompt is not at column 0 of its row: packed, or next to the text of left-padded rows."""
    input_ids, attention_mask, token_type_ids, labels = batch
    vectors, prompt_index = prompt
    position_start, embed_scale, _, packed, _, additive_mask = layout
    (B, n), d, m = input_ids.shape, weight.shape[1], vectors.shape[-2]

    cu_seq_lens = max_length = keep = column = is_prompt = None
    if packed:
        tokens = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        keep = torch.constant_pad_nd(tokens != 0, (m, 0), 1)
        rows = keep.sum(1)
        cu_seq_lens = torch.constant_pad_nd(rows.cumsum(0), (1, 0)).to(torch.int32)
        max_length = int(rows.max()) if B else 0
        start = cu_seq_lens[:B]
    else:
        assert attention_mask is not None
        start = (attention_mask != 0).cumsum(1).eq(0).sum(1)
        s = torch.arange(m + n, device=input_ids.device)
        is_prompt = (s >= start[:, None]) & (s < start[:, None] + m)
        column = torch.where(s < start[:, None], s, s - m).clamp_(min=0)

    def lay(tokens: Tensor, fill: int) -> Tensor:
        """[B, n] integers in the layout of the output, `fill` on the virtual tokens."""
        if column is None or is_prompt is None:  # packed
            return torch.cat([tokens.new_full((B, m), fill), tokens], 1)[keep][None]
        return tokens.gather(1, column).masked_fill_(is_prompt, fill)

    out_mask = None if packed or attention_mask is None else lay(attention_mask, 1)
    out_types = None if token_type_ids is None else lay(token_type_ids, 0)
    out_labels = None if labels is None else lay(labels, -100)
    position_ids = _positions(input_ids, m, 0 if packed and position_start is None else position_start, out_mask, keep)
    if additive_mask is not None and out_mask is not None:
        out_mask = _additive(out_mask, additive_mask)

    # The prompt's columns look up id 0, to be written over.
    inputs_embeds = _look_up(weight, lay(input_ids, 0), embed_scale)
    vectors = vectors.detach() if prompt_index is None else vectors.detach().index_select(0, prompt_index)
    rows = _prompt_rows(start, m, 0 if packed else m + n)
    inputs_embeds.view(-1, d)[rows] = vectors.to(weight.dtype)
    return inputs_embeds, out_mask, out_types, out_labels, position_ids, cu_seq_lens, start, max_length


# Below this many elements, and where the prompt is the longer part, a second buffer costs less than looking up the
# prompt's columns only to write over them. torch.cat's own gradient is then the cheapest too.
_SMALL = {False: 2**16, True: 2**19}  # without and with a gradient that is torch.cat's own
_WIDE = torch.float32, torch.float64


def _look_up(weight: Tensor, ids: Tensor, embed_scale: float) -> Tensor:
    """The rows weight[ids] [*ids.shape, d], scaled, in memory of their own."""
    rows = torch.embedding(weight, ids)
    return rows if embed_scale == 1.0 else rows.mul_(embed_scale)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, S]: 0 where `mask` [B, S] is not 0, else the lowest number; rows a multiple of 8 elements apart."""
    B, S = mask.shape
    out = torch.zeros(B, 1, 1, -(-S // 8) * 8, dtype=dtype, device=mask.device)[..., :S]
    return out.masked_fill_((mask == 0)[:, None, None], torch.finfo(dtype).min)


def _positions(
    input_ids: Tensor, m: int, position_start: int | None, out_mask: Tensor | None, keep: Tensor | None
) -> Tensor | None:
    """position_ids [B, S], or [1, T] when packed; None when `position_start` is."""
    if position_start is None:
        return None
    B, n = input_ids.shape
    real = keep if keep is not None else None if out_mask is None else out_mask != 0
    if real is None:
        positions = torch.arange(position_start, position_start + m + n, device=input_ids.device).repeat(B, 1)
    else:
        positions = (real.cumsum(1) - 1).mul_(real).add_(position_start)
    return positions if keep is None else positions[keep][None]


def _prompt_rows(start: Tensor, m: int, stride: int) -> Tensor:
    """Row numbers [B, m] of the virtual tokens in the flattened output, whose batch rows are `stride` apart."""
    first = start + stride * torch.arange(len(start), device=start.device)
    return first[:, None] + torch.arange(m, device=start.device)


def backward(
    grad: Tensor,
    prompt_shape: torch.Size,
    prompt_dtype: torch.dtype,
    prompt_start: Tensor | None,
    prompt_index: Tensor | None,
    packed: bool,
) -> Tensor:
    """What `ptuning_fast.kernels.backward` does, with the same arguments and result."""
    m = prompt_shape[-2]
    accumulate = torch.float64 if grad.dtype == torch.float64 else torch.float32
    if prompt_start is None:
        rows = grad[:, :m]
    elif packed:
        rows = grad[0][_prompt_rows(prompt_start, m, 0)]
    else:
        rows = grad.reshape(-1, grad.shape[-1])[_prompt_rows(prompt_start, m, grad.shape[1])]
    if prompt_index is None:
        return rows.sum(0, dtype=accumulate).to(prompt_dtype)
    out = torch.zeros(prompt_shape, dtype=accumulate, device=grad.device)
    return out.index_add_(0, prompt_index, rows.to(accumulate)).to(prompt_dtype)
