"""Backward: the gradient of the prompt rows, and of nothing else.

    dprompt[k, s] = sum of dY[b, start_b + s] over the batch rows b whose prompt is k

Each program owns one chunk of one prompt row and adds the batch up in a fixed order, in fp32: no atomics, the same
bits every time. Where the batch is large the sum is split, and a second launch of the same kernel adds the parts.
"""

import torch
import triton
import triton.language as tl

from .forward import tile_shape
from .launching import checked_grid, on
from .rounding import round_to


@triton.jit(do_not_specialize=["B", "K", "m", "chunks", "rows_per_split", "index_b"])
def prompt_grad_kernel(
    # inputs
    grad,  # [B, S, d], or [1, T, d] with grad_b = 0 and prompt_start the first row of each sequence
    prompt_start,  # [B] int32, or None: the prompt stands at row 0
    prompt_index,  # [B], or None: there is one prompt
    # outputs
    out,  # [splits, K, m, d]
    # sizes
    B,
    K,
    m,
    d,
    chunks,  # chunks over d
    rows_per_split,  # batch rows that one program adds up
    # strides, in elements
    grad_b,
    grad_s,
    grad_d,
    index_b,
    # constants
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    chunk = pid % chunks
    s = ((pid // chunks) % m).to(tl.int64)
    k = ((pid // chunks // m) % K).to(tl.int64)
    split = pid // chunks // m // K

    c = (chunk * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    in_row = (c < d)[None, :]
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    end = tl.minimum(B, (split + 1) * rows_per_split)
    for b0 in range(split * rows_per_split, end, ROWS):
        b = (b0 + tl.arange(0, ROWS)).to(tl.int64)
        mine = b < end
        if prompt_index is not None:
            mine = mine & (tl.load(prompt_index + b * index_b, mask=mine, other=-1) == k)
        row = b * grad_b + s * grad_s
        if prompt_start is not None:
            row += tl.load(prompt_start + b, mask=mine, other=0).to(tl.int64) * grad_s
        part = tl.load(grad + row[:, None] + c[None, :] * grad_d, mask=mine[:, None] & in_row, other=0)
        total += part.to(tl.float32)

    target = ((split.to(tl.int64) * K + k) * m + s) * d
    summed = tl.sum(total, 0)
    tl.store(out + target + c, round_to(summed, out.dtype.element_ty), mask=c < d)


def grad_tile_shape(d: int) -> tuple[int, int, int]:
    """ROWS, BLOCK_D and num_warps of one program: batch rows added at a time, elements of the prompt row.

    BLOCK_D as in the forward. As few warps as leave each thread 4 elements of the sum, one 16-byte store in fp32; ROWS
    then gives each thread 32 elements to load at a time.
    """
    _, block_d = tile_shape(d)
    num_warps = min(4, max(1, block_d // 128))
    return 1024 * num_warps // block_d, block_d, num_warps


def batch_splits(B: int, programs: int) -> int:
    """Into how many parts the sum over B batch rows is split, given the programs that one part has.

    One, until a part would be more than 32 rows long and there are fewer programs than a large GPU has room for
    (about 512); the shape alone decides, so the result is the same on every run.
    """
    return max(1, min(triton.cdiv(B, 32), 512 // programs))


def backward(grad, prompt_shape, prompt_dtype, prompt_start, prompt_index, packed):
    """The gradient of a prompt of `prompt_shape` ([m, d] or [K, m, d]) in `prompt_dtype`.

    `grad` is the gradient of inputs_embeds, in any memory layout, and `prompt_start` what `forward` returned.
    Allocates nothing larger than the prompt, times the splits of the batch.
    """
    m, d = prompt_shape[-2:]
    K = prompt_shape[0] if len(prompt_shape) == 3 else 1
    B = prompt_start.shape[0] if packed else grad.shape[0]
    out = torch.empty(prompt_shape, dtype=prompt_dtype, device=grad.device)
    if out.numel() == 0 or B == 0:
        return out.zero_()

    rows, block_d, num_warps = grad_tile_shape(d)
    chunks = triton.cdiv(d, block_d)
    splits = batch_splits(B, K * m * chunks)
    parts = out if splits == 1 else torch.empty(splits, K, m, d, dtype=torch.float32, device=grad.device)
    grad_b, grad_s, grad_d = grad.stride()
    with on(grad.device):
        prompt_grad_kernel[checked_grid(splits * K * m * chunks)](
            *(grad, prompt_start, prompt_index, parts),
            *(B, K, m, d, chunks, triton.cdiv(B, splits)),
            *(0 if packed else grad_b, grad_s, grad_d),
            0 if prompt_index is None else prompt_index.stride(0),
            ROWS=rows,
            BLOCK_D=block_d,
            num_warps=num_warps,
        )
        if splits > 1:
            prompt_grad_kernel[checked_grid(K * m * chunks)](
                *(parts, None, None, out),
                *(splits, 1, K * m, d, chunks, splits),
                *(K * m * d, d, 1),
                0,
                ROWS=rows,
                BLOCK_D=block_d,
                num_warps=num_warps,
            )
    return out
