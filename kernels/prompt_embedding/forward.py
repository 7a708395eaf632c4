"""Forward: token-embedding lookup, prompt prepending and mask construction in one pass.

One launch does everything. Its programs come in two kinds:

    program   0 .. B-1        one per batch row: scans the mask row and writes the metadata     metadata_rows.py
              B .. (the rest) one tile of embedding rows each: [ROWS, BLOCK_D] of the output    this file

Where a row stands is layout.py's.
"""

import torch
import triton
import triton.language as tl

from .layout import PREPENDED, place_prompts, place_sequences
from .metadata_rows import write_metadata
from .rounding import round_to
from .runtime import Launcher


@triton.jit
def prepend_prompt_kernel(
    # tensors: in
    batch,  # input_ids, attention_mask, token_type_ids and labels, [B, n], the latter three or None
    table,  # weight [V, d]; prompt [m, d] or [K, m, d], None when m is 0; prompt_index [B] or None
    place,  # Placement
    # tensors: out
    out,  # inputs_embeds [B, S, d] or [T, d]; mask, types, labels and positions [B, S] or [T], each or None
    # shapes: the width, and the strides of what is copied, in elements
    d,
    weight_v,
    weight_d,
    prompt_k,
    prompt_s,
    prompt_d,
    # numbers: sizes, values, and strides in elements
    numbers,  # of everything
    metadata,  # of the metadata alone
    # constants
    SCALED: tl.constexpr,
    PADDING: tl.constexpr,  # what the mask has where there is no row, if 0 is what it has where there is; else None
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    input_ids, _, _, _ = batch
    weight, prompt, prompt_index = table
    prompt_start, cu_seq_lens, token_rank, totals = place
    inputs_embeds, _, _, _, _ = out
    n, m, V, K, T, max_length, tiles, chunks, metadata_programs, embed_scale, ids_b, ids_s, index_b = numbers
    pid = tl.program_id(0)
    S = m + n

    if pid < metadata_programs:
        b = pid.to(tl.int64)
        start = tl.zeros([], tl.int32)
        if prompt_start is not None:
            start = tl.load(prompt_start + b)
        first_row = b * S
        if cu_seq_lens is not None:
            first_row = tl.load(cu_seq_lens + b).to(tl.int64)
        write_metadata(
            b,
            start,
            first_row,
            batch,
            out,
            S,
            m,
            T,
            metadata,
            PACKED=cu_seq_lens is not None,
            PADDING=PADDING,
            BLOCK_S=BLOCK_S,
        )
        return

    pid -= metadata_programs
    chunk = pid % chunks
    tile = (pid // chunks) % tiles
    b = (pid // (chunks * tiles)).to(tl.int64)

    # Which row stands where. The ids are on their way before anything else is known of the layout.
    s = tile * ROWS + tl.arange(0, ROWS)
    start = tl.zeros([], tl.int32)
    if prompt_start is not None:
        start = tl.load(prompt_start + b)
    is_prompt = (s >= start) & (s < start + m)
    is_token = (s < S) & ~is_prompt
    column = tl.where(s < start, s, s - m).to(tl.int64)
    ids = tl.load(input_ids + b * ids_b + column * ids_s, mask=is_token, other=0).to(tl.int64)
    row = b * S + s
    readable = S  # columns from here on come out as NaN
    if cu_seq_lens is not None:
        rank = tl.load(token_rank + b * n + column, mask=is_token, other=-1)
        is_token = is_token & (rank >= 0)
        row = tl.load(cu_seq_lens + b).to(tl.int64) + tl.where(is_prompt, s, m + rank)
        if totals is not None:
            # The host was told the lengths. Memory outside [0, T) is never written, and a batch that does not
            # have them comes out as NaN rather than as another batch.
            intact = (tl.load(totals) == T) & (tl.load(totals + 1) == max_length)
            readable = tl.where(intact, S, 0)
    keep = (is_prompt | is_token) & (row < T)

    # Token rows. An id outside the table is never looked up.
    c = (chunk * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    in_row = (c < d)[None, :]
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


# Ids are checked on the device. Triton's overflow checks, which `debug` would add to every sum, stay out.
prepend_prompt = Launcher(prepend_prompt_kernel, debug=True, sanitize_overflow=False, num_warps=4)

# A mask row is scanned so many columns at a time. All programs of a launch have the registers of its neediest: with
# 1024 columns that would be those of the metadata, nearly twice as many.
BLOCK_S = 512
NO_STRIDE = 0, 0


def tile_shape(d: int) -> tuple[int, int]:
    """ROWS and BLOCK_D of the tile of embedding rows that one program copies.

    BLOCK_D is the largest power of two from 64 to 1024 that wastes no more lanes on a row of d elements than 64 does,
    so that 768 is three chunks of 256 and not one of 1024 with a quarter of it idle. ROWS fills the tile up to 4096
    elements: with 4 warps each thread then has several independent 16-byte loads in flight, which is what hides the
    latency of the dependent lookup (id first, row after it).
    """
    pieces = -(-d // 64)
    block_d = 64 * (min(pieces & -pieces, 16) or 16)  # the power of two that divides the number of pieces
    return 4096 // block_d, block_d


def empty_outputs(batch, weight, layout, B, S, d):
    """(inputs_embeds, attention_mask, token_type_ids, labels, position_ids), None for what was not asked for.

    B rows of S columns of width d, packed one row of T; the other arguments are those of `forward`.
    """
    input_ids, mask, types, labels = batch
    position_start, _, _, packed, _, additive_mask = layout
    if packed or mask is None:
        out_mask = None
    elif additive_mask is None:
        out_mask = mask.new_empty(B, S)
    else:
        out_mask = mask.new_empty(B, 1, 1, padded(S), dtype=additive_mask)[..., :S]
    return (
        weight.new_empty(B, S, d),
        out_mask,
        None if types is None else types.new_empty(B, S),
        None if labels is None else labels.new_empty(B, S),
        input_ids.new_empty(B, S, dtype=torch.int64) if packed or position_start is not None else None,
    )


def padded(S):
    """Elements between rows of S of a mask that attention adds to its scores."""
    return -(-S // 8) * 8


def forward(batch, weight, prompt, layout):
    """Allocate the outputs and launch; the arguments are those of `ptuning_fast.op`, already checked.

    Args:
        batch: (input_ids, attention_mask, token_type_ids, labels), [B, n] each, the latter three or None.
        weight: [V, d].
        prompt: (vectors [m, d], None), or a bank (vectors [K, m, d], index [B]).
        layout: (position_start, embed_scale, adjacent, packed, lengths, additive_mask); `lengths` is a list of B ints,
            or None where the host does not know them.

    Returns:
        (inputs_embeds, attention_mask, token_type_ids, labels, position_ids, cu_seq_lens, prompt_start, max_length),
        None for what was not asked for. `prompt_start` [B] is what `backward` needs to find the virtual tokens again.
    """
    input_ids, attention_mask, token_type_ids, labels = batch
    prompt, prompt_index = prompt
    position_start, embed_scale, adjacent, packed, lengths, additive_mask = layout
    (B, n), (V, d) = input_ids.shape, weight.shape
    K, m, _ = (1, *prompt.shape) if prompt_index is None else prompt.shape
    S = m + n
    device = input_ids.device

    place, cu_seq_lens, max_length, T = PREPENDED, None, None, B * S
    if packed:
        max_length = S if B else 0
        if attention_mask is None:
            step = max(S, 1)  # of no rows at all, the ends are all 0
            cu_seq_lens = torch.arange(0, (B + 1) * step, step, dtype=torch.int32, device=device)
            cu_seq_lens = cu_seq_lens if S else cu_seq_lens * 0
        else:
            place, T, max_length = place_sequences(attention_mask, m, lengths)
            cu_seq_lens = place.cu_seq_lens
    elif adjacent and attention_mask is not None:
        place = place_prompts(attention_mask)

    out = empty_outputs(batch, weight, layout, 1, T, d) if packed else empty_outputs(batch, weight, layout, B, S, d)
    _, out_mask, out_types, out_labels, out_positions = out
    metadata_programs = 0 if out_mask is out_types is out_labels is out_positions is None else B
    rows, block_d = tile_shape(d)
    tiles, chunks = -(-S // rows), -(-d // block_d)
    programs = metadata_programs + B * tiles * chunks
    if programs:
        ids_b, ids_s = input_ids.stride()
        weight_v, weight_d = weight.stride()
        prompt_k, prompt_s, prompt_d = (0, *prompt.stride()) if prompt_index is None else prompt.stride()
        mask_b, mask_s = NO_STRIDE if attention_mask is None else attention_mask.stride()
        types_b, types_s = NO_STRIDE if token_type_ids is None else token_type_ids.stride()
        labels_b, labels_s = NO_STRIDE if labels is None else labels.stride()
        out_mask_b, scale = S if additive_mask is None else padded(S), float(embed_scale)
        (index_b,) = (0,) if prompt_index is None else prompt_index.stride()
        prepend_prompt(
            device,
            programs,
            (batch, (weight, prompt if m and d else None, prompt_index), place, out),
            (d, weight_v, weight_d, prompt_k, prompt_s, prompt_d),
            (
                (n, m, V, K, T, max_length or 0, tiles, chunks, metadata_programs, scale, ids_b, ids_s, index_b),
                (position_start or 0, mask_b, mask_s, types_b, types_s, labels_b, labels_s, out_mask_b),
            ),
            (
                embed_scale != 1.0,
                None if additive_mask is None else torch.finfo(additive_mask).min,
                rows,
                block_d,
                BLOCK_S,
            ),
        )

    prompt_start = cu_seq_lens[:B] if packed else place.prompt_start
    return out + (cu_seq_lens, prompt_start, max_length)
