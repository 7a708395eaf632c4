"""The same op in torch alone, for where Triton does not run (a CPU first of all).

`forward` and `backward` have the signatures of `ptuning_fast.kernels`, so that `functional` can take either. What makes
it faster than the reference is one buffer less: all S columns are looked up at once, straight into the output, and the
prompt is then written over its own columns.
"""

import torch
import torch.nn.functional as F


def forward(
    input_ids,
    attention_mask,
    weight,
    prompt,
    token_type_ids,
    labels,
    position_start,
    prompt_index,
    embed_scale,
    adjacent,
    packed,
    lengths,
    additive_mask,
):
    """What `ptuning_fast.kernels.forward` does, with the same arguments and results.

    Where `inputs_embeds` is put together by torch.cat, in the prompt's own dtype, it comes with torch's own gradient.
    """
    (B, n), d, m = input_ids.shape, weight.shape[1], prompt.shape[-2]

    start = cu_seq_lens = max_length = keep = column = is_prompt = None
    if packed:
        tokens = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        keep = torch.constant_pad_nd(tokens != 0, (m, 0), 1)
        rows = keep.sum(1)
        cu_seq_lens = torch.constant_pad_nd(rows.cumsum(0), (1, 0)).to(torch.int32)
        max_length = int(rows.max()) if B else 0
        start = cu_seq_lens[:B]
    elif adjacent and attention_mask is not None and n:
        start = (attention_mask != 0).cumsum(1).eq(0).sum(1)
        s = torch.arange(m + n, device=input_ids.device)
        is_prompt = (s >= start[:, None]) & (s < start[:, None] + m)
        column = torch.where(s < start[:, None], s, s - m).clamp_(min=0)

    def lay(tokens, fill):
        """[B, n] integers in the layout of the output, `fill` on the prompt rows."""
        if tokens is None:
            return None
        if column is not None:
            return tokens.gather(1, column).masked_fill_(is_prompt, fill)
        laid = torch.constant_pad_nd(tokens, (m, 0), fill)
        return laid if keep is None else laid[keep][None]

    out_mask = None if packed else lay(attention_mask, 1)
    out_types, out_labels = lay(token_type_ids, 0), lay(labels, -100)
    position_ids = _positions(input_ids, m, 0 if packed and position_start is None else position_start, out_mask, keep)
    if additive_mask is not None and out_mask is not None:
        out_mask = _additive(out_mask, additive_mask)

    same_dtype = prompt.dtype == weight.dtype
    own_gradient = same_dtype and prompt.requires_grad and torch.is_grad_enabled()
    concatenate = start is None and (m >= n or B * n * d < _SMALL[own_gradient])
    if torch.compiler.is_compiling():  # it fuses what follows by itself, and asserts ids where it looks them up so
        concatenate = start is None
    if not concatenate or not same_dtype:
        prompt = prompt.detach()
    if prompt_index is not None:
        prompt = prompt.index_select(0, prompt_index)
    if concatenate:
        inputs_embeds = F.embedding(input_ids, weight)
        inputs_embeds = inputs_embeds if embed_scale == 1.0 else inputs_embeds.mul_(embed_scale)
        prompt = prompt if same_dtype else prompt.to(weight.dtype)
        inputs_embeds = torch.cat([prompt.expand(B, m, d), inputs_embeds], dim=1)
        return inputs_embeds, out_mask, out_types, out_labels, position_ids, None, None, None

    # The prompt's columns look up id 0, to be written over.
    ids = lay(input_ids, 0).reshape(-1)
    # In its own shape, not as a view of another: autograd lets only such a result be changed in place.
    shape = (1, len(ids)) if packed else (B, m + n)
    inputs_embeds = torch.empty(*shape, d, dtype=weight.dtype, device=weight.device)
    rows = inputs_embeds.view(-1, d)
    if n or not m:
        _look_up(weight, ids, rows)
    if embed_scale != 1.0:
        rows.mul_(embed_scale)
    if start is None:
        inputs_embeds[:, :m] = prompt
    else:
        rows[_prompt_rows(start, m, 0 if packed else m + n)] = prompt.to(weight.dtype)
    return inputs_embeds, out_mask, out_types, out_labels, position_ids, cu_seq_lens, start, max_length


# Below this many elements, and where the prompt is the longer part, a second buffer costs less than looking up the
# prompt's columns only to write over them. torch.cat's own gradient is then the cheapest too; where the dtypes differ
# it would be rounded on its way, so `backward` is what gives it there as everywhere else.
_SMALL = {False: 2**16, True: 2**19}  # without and with a gradient that is torch.cat's own


def _look_up(weight, ids, out):
    """Write the rows `weight[ids]` into `out` [len(ids), d]."""
    if torch.compiler.is_compiling():
        out.copy_(F.embedding(ids, weight))
        return
    pieces = 1
    if out.numel() * out.element_size() >= _FRESH and weight.is_contiguous():
        d, size = weight.shape[1], weight.element_size()
        pieces = next((k for k in (1, 2, 4, 8, 16) if d % k == 0 and d // k * size <= _PIECE), 1)
    if pieces > 1:
        if ids.numel() and (ids.min() < 0 or ids.max() >= len(weight)):  # a product might lie inside the table again
            raise IndexError("an id is outside the table")
        ids = (ids.long()[:, None] * pieces + torch.arange(pieces, device=ids.device)).view(-1)
        weight, out = weight.view(-1, weight.shape[1] // pieces), out.view(-1, weight.shape[1] // pieces)
    torch.index_select(weight, 0, ids, out=out)


# index_select copies row by row with the C library's memcpy. From 2 to 4 KB on, glibc's is one `rep movsb`, which takes
# an eighth longer than a loop where it runs into pages that are not mapped yet; and memory from 32 MB on is mapped
# afresh at every allocation. There, rows go in pieces below that size (benchmarks/NOTES.md has the figures).
_FRESH, _PIECE = 2**25, 2048


def _additive(mask, dtype):
    """[B, 1, 1, S]: 0 where `mask` [B, S] is not 0, else the lowest number; rows a multiple of 8 elements apart."""
    B, S = mask.shape
    out = torch.zeros(B, 1, 1, -(-S // 8) * 8, dtype=dtype, device=mask.device)[..., :S]
    return out.masked_fill_((mask == 0)[:, None, None], torch.finfo(dtype).min)


def _positions(input_ids, m, position_start, out_mask, keep):
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


def _prompt_rows(start, m, stride):
    """Row numbers [B, m] of the prompt rows in the flattened output, whose batch rows are `stride` apart."""
    first = start + stride * torch.arange(len(start), device=start.device)
    return first[:, None] + torch.arange(m, device=start.device)


def backward(grad, prompt_shape, prompt_dtype, prompt_start, prompt_index, packed):
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
