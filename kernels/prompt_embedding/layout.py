"""Where the rows stand: the layouts of the output, and the launches that find out what they need to know of the mask.

The layout needs one number per batch row, the column `start` at which the prompt stands:

    columns   0 .. start-1         start .. start+m-1        start+m .. S-1
              token column s       prompt row s - start      token column s - m

`start` is 0 except for `adjacent` rows. A packed batch has the same columns; those whose mask is 0 are not written and
the others move up. What `adjacent` and `packed` need to know of the mask before the rows can be placed comes from one
small launch over the mask, and for `packed` one more, of one program, that adds the lengths up.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .runtime import Launcher


class Placement(NamedTuple):
    """What the main launch reads of the layout; None where there is nothing to know."""

    prompt_start: Tensor | None = None  # [B] int32: the column of the prompt
    cu_seq_lens: Tensor | None = None  # [B + 1] int32: the first packed row of each sequence, and the number of rows
    token_rank: Tensor | None = None  # [B, n] int32: mask-1 columns before this one, -1 where the mask is 0
    totals: Tensor | None = None  # [2] int64: packed rows, and those of the longest sequence, where these are checked


PREPENDED = Placement()  # the prompt stands at column 0 of every row, and every row is there


@triton.jit
def load_mask(pointers, mask):
    """Mask values, 0 where there is none; narrow floats as fp32."""
    value = tl.load(pointers, mask=mask, other=0)
    if pointers.dtype.element_ty == tl.bfloat16 or pointers.dtype.element_ty == tl.float16:
        value = value.to(tl.float32)
    return value


@triton.jit
def scan_mask_kernel(
    tensors,  # attention_mask [B, n]; where asked for, [B] leading columns of mask 0, others than of mask 0, token_rank
    numbers,
    BLOCK: tl.constexpr,
):
    attention_mask, prompt_start, lengths, token_rank = tensors
    n, mask_b, mask_s = numbers
    b = tl.program_id(0).to(tl.int64)
    seen = tl.zeros([], tl.int32)
    first = tl.zeros([], tl.int32) + n
    for j0 in range(0, n, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        mask = load_mask(attention_mask + b * mask_b + j.to(tl.int64) * mask_s, mask=j < n)
        real = (mask != 0).to(tl.int32)
        if token_rank is not None:
            rank = tl.where(real != 0, seen + tl.cumsum(real, 0) - 1, -1)
            tl.store(token_rank + b * n + j, rank, mask=j < n)
        first = tl.minimum(first, tl.min(tl.where(real != 0, j, n), 0))
        seen += tl.sum(real, 0)
    if prompt_start is not None:
        tl.store(prompt_start + b, first)
    if lengths is not None:
        tl.store(lengths + b, seen)


@triton.jit
def add_lengths_kernel(
    tensors,  # in: lengths, from scan_mask_kernel; out: cu_seq_lens and totals, as in Placement
    numbers,
    BLOCK: tl.constexpr,
):
    lengths, cu_seq_lens, totals = tensors
    B, m = numbers
    rows_before = tl.zeros([], tl.int64)
    longest = tl.zeros([], tl.int32)
    for b0 in range(0, B, BLOCK):
        b = b0 + tl.arange(0, BLOCK)
        rows = tl.load(lengths + b, mask=b < B, other=-m) + m
        ends = rows_before + tl.cumsum(rows.to(tl.int64), 0)
        tl.store(cu_seq_lens + 1 + b, ends.to(tl.int32), mask=b < B)
        rows_before += tl.sum(rows.to(tl.int64), 0)
        longest = tl.maximum(longest, tl.max(rows, 0))
    tl.store(cu_seq_lens, 0)
    tl.store(totals, rows_before)
    tl.store(totals + 1, longest.to(tl.int64))


scan_mask = Launcher(scan_mask_kernel)
add_lengths = Launcher(add_lengths_kernel)

BLOCK = 512  # columns of the mask, or lengths, at a time


def place_prompts(attention_mask: Tensor) -> Placement:
    """For `adjacent` rows: the prompt behind the leading columns whose mask is 0."""
    (B, n), device = attention_mask.shape, attention_mask.device
    prompt_start = torch.empty(B, dtype=torch.int32, device=device)
    if B:
        tensors = attention_mask, prompt_start, None, None
        scan_mask(device, B, (tensors,), (), ((n, *attention_mask.stride()),), (BLOCK,))
    return Placement(prompt_start=prompt_start)


def place_sequences(attention_mask: Tensor, m: int, lengths: list[int] | None) -> tuple[Placement, int, int]:
    """For a packed batch: where its rows go, how many there are, and how many the longest sequence has.

    The latter two are those of `lengths` [B], the mask-1 columns of each row, where these are given; then the main
    launch compares them with the mask's. Else they are read from the device, the one synchronisation of a packed batch.
    """
    (B, n), device = attention_mask.shape, attention_mask.device
    if B == 0:
        return Placement(cu_seq_lens=torch.zeros(1, dtype=torch.int32, device=device)), 0, 0
    counted, cu_seq_lens = (torch.empty(size, dtype=torch.int32, device=device) for size in (B, B + 1))
    token_rank = torch.empty(B, n, dtype=torch.int32, device=device)
    totals = torch.empty(2, dtype=torch.int64, device=device)
    tensors = attention_mask, None, counted, token_rank
    scan_mask(device, B, (tensors,), (), ((n, *attention_mask.stride()),), (BLOCK,))
    add_lengths(device, 1, ((counted, cu_seq_lens, totals),), (), ((B, m),), (BLOCK,))
    if lengths is None:
        T, longest = totals.tolist()
        return Placement(cu_seq_lens=cu_seq_lens, token_rank=token_rank), T, longest
    place = Placement(cu_seq_lens=cu_seq_lens, token_rank=token_rank, totals=totals)
    return place, B * m + sum(lengths), m + max(lengths)
