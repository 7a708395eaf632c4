"""Forward: token-embedding lookup, prompt prepending and mask construction in one pass.

One launch does everything. Its programs come in two kinds:

    program   0 .. B-1        one per batch row: scans the mask row and writes the integer outputs
              B .. (the rest) one tile of embedding rows each: [ROWS, BLOCK_D] of the output

The layout needs one number per batch row, the column `start` at which the prompt stands:

    columns   0 .. start-1         start .. start+m-1        start+m .. S-1
              token column s       prompt row s - start      token column s - m

`start` is 0 except for `adjacent` rows. A packed batch has the same columns; those whose mask is 0
are not written and the others move up. What `adjacent` and `packed` need to know of the mask before
the rows can be placed comes from one small launch ahead of the main one (`scan_mask_kernel`).
"""

import torch
import triton
import triton.language as tl

from .launching import checked_grid, on
from .rounding import round_to


@triton.jit
def _load_mask(pointers, mask):
    """Mask values, 0 where there is none; narrow floats as fp32."""
    value = tl.load(pointers, mask=mask, other=0)
    if pointers.dtype.element_ty == tl.bfloat16 or pointers.dtype.element_ty == tl.float16:
        value = value.to(tl.float32)
    return value


@triton.jit(do_not_specialize=["n", "mask_b", "mask_s"])
def scan_mask_kernel(
    # inputs
    attention_mask,  # [B, n]
    # outputs, each optional
    prompt_start,  # [B] int32: leading columns whose mask is 0
    lengths,  # [B] int32: columns whose mask is not 0
    token_rank,  # [B, n] int32: mask-1 columns before this one, -1 where the mask is 0
    # sizes and strides
    n,
    mask_b,
    mask_s,
    # constants
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    seen = tl.zeros([], tl.int32)
    first = tl.zeros([], tl.int32) + n
    for j0 in range(0, n, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        mask = _load_mask(attention_mask + b * mask_b + j.to(tl.int64) * mask_s, mask=j < n)
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
def _sum_of_lengths(lengths, end, BLOCK: tl.constexpr):
    """Tokens in the packed sequences before `end`, and the longest of them."""
    total = tl.zeros([], tl.int64)
    longest = tl.zeros([], tl.int32)
    for b0 in range(0, end, BLOCK):
        b = b0 + tl.arange(0, BLOCK)
        length = tl.load(lengths + b, mask=b < end, other=0)
        total += tl.sum(length.to(tl.int64), 0)
        longest = tl.maximum(longest, tl.max(length, 0))
    return total, longest


@triton.jit
def _write_integers(
    b,
    start,
    first_row,
    attention_mask,
    token_type_ids,
    labels,
    out_mask,
    out_types,
    out_labels,
    out_positions,
    cu_seq_lens,
    S,
    m,
    T,
    position_start,
    mask_b,
    mask_s,
    types_b,
    types_s,
    labels_b,
    labels_s,
    out_mask_b,
    PACKED: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    seen = tl.zeros([], tl.int32)  # mask-1 rows so far, the prompt's included
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        is_prompt = (s >= start) & (s < start + m)
        is_token = (s < S) & ~is_prompt
        column = tl.where(s < start, s, s - m).to(tl.int64)

        real = s < S
        if attention_mask is not None:
            mask = _load_mask(attention_mask + b * mask_b + column * mask_s, mask=is_token)
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

    if cu_seq_lens is not None:
        tl.store(cu_seq_lens + b + 1, (first_row + seen).to(tl.int32))
        if b == 0:
            tl.store(cu_seq_lens, 0)


# Sizes and strides of the batch change from step to step: specialising on them would compile again and again.
@triton.jit(
    do_not_specialize=[
        *["B", "n", "m", "V", "K", "T", "max_length", "tiles", "chunks", "integer_programs"],
        *["position_start", "embed_scale", "ids_b", "ids_s", "mask_b", "mask_s"],
        *["types_b", "types_s", "labels_b", "labels_s", "index_b", "out_mask_b"],
    ]
)
def prepend_prompt_kernel(
    # inputs
    input_ids,  # [B, n]
    weight,  # [V, d]
    prompt,  # [m, d] or [K, m, d]; None when m is 0
    attention_mask,  # [B, n] or None
    token_type_ids,  # [B, n] or None
    labels,  # [B, n] or None
    prompt_index,  # [B] or None
    prompt_start,  # [B] int32, from scan_mask_kernel, or None: the prompt stands at column 0
    lengths,  # [B] int32, from scan_mask_kernel, or None: no row is dropped
    token_rank,  # [B, n] int32, from scan_mask_kernel, or None
    # outputs
    inputs_embeds,  # [B, S, d] or [T, d]
    out_mask,  # [B, S], rows out_mask_b apart, or None
    out_types,  # [B, S] or [T], or None
    out_labels,  # [B, S] or [T], or None
    out_positions,  # [B, S] or [T], int64, or None
    cu_seq_lens,  # [B + 1] int32 or None
    # sizes
    B,
    n,
    m,
    d,
    V,
    K,
    T,  # rows of inputs_embeds
    max_length,  # longest packed sequence that the host expects
    tiles,  # tiles over S
    chunks,  # chunks over d
    integer_programs,  # B, or 0 when no integer output is asked for
    # scalars
    position_start,
    embed_scale,
    # strides, in elements
    ids_b,
    ids_s,
    weight_v,
    weight_d,
    prompt_k,
    prompt_s,
    prompt_d,
    mask_b,
    mask_s,
    types_b,
    types_s,
    labels_b,
    labels_s,
    index_b,
    out_mask_b,
    # constants
    SCALED: tl.constexpr,
    PADDING: tl.constexpr,  # what out_mask has where there is no row, if 0 is what it has where there is; else None
    CHECK_LENGTHS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    pid = tl.program_id(0)
    S = m + n

    if pid < integer_programs:
        b = pid.to(tl.int64)
        start = tl.zeros([], tl.int32)
        if prompt_start is not None:
            start = tl.load(prompt_start + b)
        first_row = b * S
        if lengths is not None:
            tokens, _ = _sum_of_lengths(lengths, pid, BLOCK_B)
            first_row = b * m + tokens
        _write_integers(
            b,
            start,
            first_row,
            attention_mask,
            token_type_ids,
            labels,
            out_mask,
            out_types,
            out_labels,
            out_positions,
            cu_seq_lens,
            S,
            m,
            T,
            position_start,
            mask_b,
            mask_s,
            types_b,
            types_s,
            labels_b,
            labels_s,
            out_mask_b,
            PACKED=lengths is not None,
            PADDING=PADDING,
            BLOCK_S=BLOCK_S,
        )
        return

    pid -= integer_programs
    chunk = pid % chunks
    tile = (pid // chunks) % tiles
    b32 = pid // (chunks * tiles)
    b = b32.to(tl.int64)

    # Which row stands where.
    s = tile * ROWS + tl.arange(0, ROWS)
    start = tl.zeros([], tl.int32)
    if prompt_start is not None:
        start = tl.load(prompt_start + b)
    is_prompt = (s >= start) & (s < start + m)
    is_token = (s < S) & ~is_prompt
    column = tl.where(s < start, s, s - m).to(tl.int64)
    row = b * S + s
    readable = S  # columns from here on come out as NaN
    if lengths is not None:
        tokens, _ = _sum_of_lengths(lengths, b32, BLOCK_B)
        rank = tl.load(token_rank + b * n + column, mask=is_token, other=-1)
        is_token = is_token & (rank >= 0)
        row = b * m + tokens + tl.where(is_prompt, s, m + rank)
        if CHECK_LENGTHS:
            # The host was told the lengths. Memory outside [0, T) is never written, and a batch that does not
            # have them comes out as NaN rather than as another batch.
            total, longest = _sum_of_lengths(lengths, B, BLOCK_B)
            intact = (total + tl.cast(B, tl.int64) * m == T) & (longest + m == max_length)
            readable = tl.where(intact, S, 0)
    keep = (is_prompt | is_token) & (row < T)

    # Token rows. An id outside the table is never looked up.
    c = (chunk * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    in_row = (c < d)[None, :]
    ids = tl.load(input_ids + b * ids_b + column * ids_s, mask=is_token, other=0).to(tl.int64)
    known = (ids >= 0) & (ids < V)
    tl.device_assert(known | ~is_token, "prepend_prompt: an id in input_ids is outside the embedding table")
    value = tl.load(
        weight + ids[:, None] * weight_v + c[None, :] * weight_d,
        mask=(is_token & known & (s < readable))[:, None] & in_row,
        other=float("nan"),
    )
    if SCALED:
        value = round_to(value.to(tl.float32) * embed_scale, weight.dtype.element_ty)

    # Prompt rows, for the tiles that have any.
    if prompt is not None:
        if (tile * ROWS < start + m) & ((tile + 1) * ROWS > start):
            first = prompt
            if prompt_index is not None:
                k = tl.load(prompt_index + b * index_b).to(tl.int64)
                in_bank = (k >= 0) & (k < K)
                tl.device_assert(in_bank, "prepend_prompt: a prompt_index is outside the bank of prompts")
                first += k * prompt_k
                readable = tl.where(in_bank, readable, 0)
            vector = tl.load(
                first + (s - start).to(tl.int64)[:, None] * prompt_s + c[None, :] * prompt_d,
                mask=(is_prompt & (s < readable))[:, None] & in_row,
                other=float("nan"),
            )
            value = tl.where(is_prompt[:, None], round_to(vector, weight.dtype.element_ty), value)

    tl.store(inputs_embeds + row[:, None] * d + c[None, :], value, mask=keep[:, None] & in_row)


# Constants of the integer programs: a mask row is scanned BLOCK_S columns at a time, lengths BLOCK_B at a time. All
# programs of a launch have the registers of its neediest: with 1024 columns that would be these, nearly twice as many.
BLOCK_S = 512
BLOCK_B = 1024
# Ids are checked on the device. Triton's overflow checks, which `debug` would add to every sum, stay out.
OPTIONS = {"debug": True, "sanitize_overflow": False, "num_warps": 4}


def tile_shape(d: int) -> tuple[int, int]:
    """ROWS and BLOCK_D of the tile of embedding rows that one program copies.

    BLOCK_D is the power of two from 64 to 1024 that wastes the fewest lanes on a row of d elements (the largest of
    those that tie), so that 768 is three chunks of 256 and not one of 1024 with a quarter of it idle. ROWS fills the
    tile up to 4096 elements: with 4 warps each thread then has several independent 16-byte loads in flight, which is
    what hides the latency of the dependent lookup (id first, row after it).
    """
    block_d = min((64, 128, 256, 512, 1024), key=lambda size: (triton.cdiv(d, size) * size, -size))
    return 4096 // block_d, block_d


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
    """Allocate the outputs and launch; the arguments are `ptuning_fast.prepend_prompt`'s, already checked.

    `lengths` is a list of B ints, or None where the host does not know them. Returns
    (inputs_embeds, attention_mask, token_type_ids, labels, position_ids, cu_seq_lens, prompt_start, max_length),
    None for what was not asked for. `prompt_start` [B] is what `backward` needs to find the prompt rows again.
    """
    (B, n), (V, d), m = input_ids.shape, weight.shape, prompt.shape[-2]
    S = m + n
    device = input_ids.device
    scan = attention_mask is not None and (adjacent or packed)

    prompt_start = token_lengths = token_rank = None
    if scan:
        if packed:
            token_lengths = torch.empty(B, dtype=torch.int32, device=device)
            token_rank = torch.empty(B, n, dtype=torch.int32, device=device)
        else:
            prompt_start = torch.empty(B, dtype=torch.int32, device=device)
        if B:
            with on(device):
                scan_mask_kernel[checked_grid(B)](
                    *(attention_mask, prompt_start, token_lengths, token_rank),
                    *(n, *attention_mask.stride()),
                    BLOCK=BLOCK_S,
                )

    T, max_length, check_lengths = B * S, S if B else 0, False
    if packed and scan:
        check_lengths = lengths is not None
        if lengths is None:
            lengths = token_lengths.tolist()  # the one synchronisation, and only here
        T, max_length = B * m + sum(lengths), m + max(lengths, default=-m)

    def output(like=None, dtype=None):
        if like is None and dtype is None:
            return None
        return torch.empty((1, T) if packed else (B, S), dtype=dtype or like.dtype, device=device)

    inputs_embeds = torch.empty((1, T, d) if packed else (B, S, d), dtype=weight.dtype, device=device)
    out_mask = None if packed else output(attention_mask)
    if additive_mask is not None and out_mask is not None:
        out_mask = torch.empty(B, 1, 1, triton.cdiv(S, 8) * 8, dtype=additive_mask, device=device)[..., :S]
    out_types, out_labels = output(token_type_ids), output(labels)
    if packed and position_start is None:
        position_start = 0
    out_positions = None if position_start is None else output(dtype=torch.int64)
    cu_seq_lens = None
    if packed:
        cu_seq_lens = (torch.empty if B else torch.zeros)(B + 1, dtype=torch.int32, device=device)

    integers = (out_mask, out_types, out_labels, out_positions, cu_seq_lens)
    rows, block_d = tile_shape(d)
    tiles, chunks = triton.cdiv(S, rows), triton.cdiv(d, block_d)
    integer_programs = B if any(tensor is not None for tensor in integers) else 0
    programs = integer_programs + B * tiles * chunks
    if programs:

        def strides(tensor):
            return (0, 0) if tensor is None else tensor.stride()

        with on(device):
            prepend_prompt_kernel[checked_grid(programs)](
                *(input_ids, weight, prompt if m and d else None, attention_mask, token_type_ids, labels),
                *(prompt_index, prompt_start, token_lengths, token_rank),
                *(inputs_embeds, *integers),
                *(B, n, m, d, V, prompt.shape[0], T, max_length, tiles, chunks, integer_programs),
                *(position_start or 0, float(embed_scale)),
                *(*input_ids.stride(), *weight.stride(), *((0, 0, 0) + prompt.stride())[-3:]),
                *(*strides(attention_mask), *strides(token_type_ids), *strides(labels)),
                0 if prompt_index is None else prompt_index.stride(0),
                0 if out_mask is None else out_mask.stride(0),
                PADDING=None if additive_mask is None else torch.finfo(additive_mask).min,
                SCALED=embed_scale != 1.0,
                CHECK_LENGTHS=check_lengths,
                ROWS=rows,
                BLOCK_D=block_d,
                BLOCK_S=BLOCK_S,
                BLOCK_B=BLOCK_B,
                **OPTIONS,
            )

    if packed:
        prompt_start = cu_seq_lens[:B]
    return (inputs_embeds, *integers, prompt_start, max_length if packed else None)
