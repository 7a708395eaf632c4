"""Batches of padding-free collators (transformers' DataCollatorWithFlattening), as rows that the op takes."""

from itertools import pairwise

import torch
from torch import Tensor

from ..op import Batch

__all__ = ["FLATTENED", "as_rows"]

# What such collators add to a batch beside what tells the sequences apart; and all that they add.
_REST = {"cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
FLATTENED = {"position_ids", "cu_seq_lens_q"} | _REST


def as_rows(
    batch: Batch,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **rest: object,
) -> tuple[Batch, list[int]]:
    """A flattened batch as [B, n] tensors, padded on the right, with their `attention_mask`; and the B lengths.

    Args:
        batch: `input_ids`, and `token_type_ids` and `labels` or None, [1, T] each.
        position_ids: [1, T], which rise by one within each sequence: they tell the sequences apart where
        cu_seq_lens_q: [B+1], the first token of each sequence, and T, is not given; where both are, they must
            agree. On the CPU, as a collator makes them, nothing waits for the GPU.

    Raises:
        TypeError: an argument that no such collator gives.
        ValueError: tensors of another shape, ends of sequences that are none, or two accounts of them.
    """
    unknown = ", ".join(sorted(set(rest) - _REST))
    if unknown:
        hint = ": a Trainer takes a PromptedModel" if "num_items_in_batch" in rest else ""
        raise TypeError(f"unknown arguments: {unknown}{hint}")
    if position_ids is None and cu_seq_lens_q is None:
        raise TypeError("a batch without padding needs position_ids or cu_seq_lens_q")
    ids, mask = batch.input_ids, batch.attention_mask
    if mask is not None:
        raise ValueError("attention_mask is for padded rows, and position_ids or cu_seq_lens_q say that there are none")
    if ids.dim() != 2 or len(ids) != 1:
        raise ValueError(f"a batch without padding is [1, T]; input_ids are {list(ids.shape)}")
    T = ids.shape[1]
    ends = None if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    if position_ids is not None:
        if position_ids.shape != ids.shape:
            raise ValueError(
                f"position_ids must be {list(ids.shape)}, as input_ids; they are {list(position_ids.shape)}"
            )
        begins = (position_ids[0, 1:] != position_ids[0, :-1] + 1).nonzero()[:, 0] + 1
        counted = [0, *begins.tolist(), T]
        firsts = position_ids[0, counted[:-1]].tolist() if T else []
        if any(firsts):
            raise ValueError(
                f"position_ids of a batch without padding start at 0 in each sequence; they start at {firsts}: give "
                "cu_seq_lens_q instead, or of a padded batch the attention_mask alone"
            )
        if ends is not None and sorted({0, *ends}) != sorted({*counted}):
            raise ValueError(
                f"position_ids start again at {counted[1:-1]}, and cu_seq_lens_q says {ends}: give one of them, "
                "or mend the other"
            )
        ends = counted if ends is None else ends
    assert ends is not None
    lengths = [end - start for start, end in pairwise(ends)]
    if not lengths or ends[0] != 0 or ends[-1] != T or min(lengths) < 0:
        raise ValueError(f"cu_seq_lens_q must rise from 0 to {T}, the number of tokens; it is {ends}")
    starts = torch.tensor(ends[:-1]).to(ids.device, non_blocking=True)[:, None]
    counts = torch.tensor(lengths).to(ids.device, non_blocking=True)[:, None]
    column = torch.arange(max(lengths), device=ids.device)
    places = (starts + column).clamp_(max=max(T - 1, 0))
    there = column < counts
    types, labels = (None if value is None else value[0][places] for value in (batch.token_type_ids, batch.labels))
    if labels is not None:
        labels = labels.masked_fill(~there, -100)
    return Batch(ids[0][places], there.long(), types, labels), lengths
