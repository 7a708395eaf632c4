"""The rows of everything but the embeddings: mask, token types, labels and positions of one batch row."""

import triton
import triton.language as tl

from .layout import load_mask
from .rounding import round_to


@triton.jit
def write_metadata(
    b,
    start,
    first_row,
    batch,
    out,
    S,
    m,
    T,
    numbers,
    PACKED: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Batch row `b`, whose first output row is `first_row`, and whose prompt stands at column `start`."""
    _, attention_mask, token_type_ids, labels = batch
    _, out_mask, out_types, out_labels, out_positions = out
    position_start, mask_b, mask_s, types_b, types_s, labels_b, labels_s, out_mask_b = numbers
    seen = tl.zeros([], tl.int32)  # mask-1 rows so far, the prompt's included
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        is_prompt = (s >= start) & (s < start + m)
        is_token = (s < S) & ~is_prompt
        column = tl.where(s < start, s, s - m).to(tl.int64)

        real = s < S
        if attention_mask is not None:
            mask = load_mask(attention_mask + b * mask_b + column * mask_s, mask=is_token)
            real = is_prompt | (mask != 0)
        before = seen + tl.cumsum(real.to(tl.int32), 0) - real.to(tl.int32)

        if PACKED:
            row = first_row + before
            keep = real & (row < T)
        else:
            row = first_row + s
            keep = s < S
        if out_mask is not None:
            if PADDING is None:
                value = tl.where(is_prompt, 1, mask)
            else:
                value = tl.where(real, 0.0, PADDING)
            if value.dtype == tl.float32:
                value = round_to(value, out_mask.dtype.element_ty)
            tl.store(out_mask + b * out_mask_b + s, value, mask=keep)
        if token_type_ids is not None:
            kind = tl.load(token_type_ids + b * types_b + column * types_s, mask=is_token, other=0)
            tl.store(out_types + row, kind, mask=keep)
        if labels is not None:
            label = tl.load(labels + b * labels_b + column * labels_s, mask=is_token, other=-100)
            tl.store(out_labels + row, label, mask=keep)
        if out_positions is not None:
            position = position_start + tl.where(real, before, 0).to(tl.int64)
            tl.store(out_positions + row, position, mask=keep)
        seen += tl.sum(real.to(tl.int32), 0)
