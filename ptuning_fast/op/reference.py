"""The torch.cat path, written as plainly as can be: the ground truth in tests and the opponent in benchmarks.

Nothing here is optimised, and nothing is checked.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def prepend_prompt(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    weight: Tensor,
    prompt: Tensor,
    token_type_ids: Tensor | None = None,
    labels: Tensor | None = None,
    position_start: int | None = None,
    prompt_index: Tensor | None = None,
    embed_scale: float = 1.0,
    adjacent: bool = False,
    packed: bool = False,
    lengths: Sequence[int] | Tensor | None = None,
    additive_mask: torch.dtype | None = None,
) -> dict[str, Tensor | int]:
    """`ptuning_fast.prepend_prompt` in plain torch: the same arguments, the same results, autograd's own gradient.

    `lengths` spares the fast op a synchronisation; here it is not needed and not read.
    """
    B, n = input_ids.shape
    m = prompt.shape[-2]
    prompt = prompt if prompt_index is None else prompt[prompt_index]
    prompt = prompt.to(weight.dtype).expand(B, -1, -1)
    tokens = F.embedding(input_ids, weight)
    if embed_scale != 1.0:
        tokens = tokens * embed_scale

    def block(like: Tensor, value: int) -> Tensor:
        return torch.full((B, m), value, dtype=like.dtype, device=like.device)

    # Every output, the prompt first.
    out: dict[str, Any] = {"inputs_embeds": torch.cat([prompt, tokens], dim=1)}
    if attention_mask is not None:
        out["attention_mask"] = torch.cat([block(attention_mask, 1), attention_mask], dim=1)
    if token_type_ids is not None:
        out["token_type_ids"] = torch.cat([block(token_type_ids, 0), token_type_ids], dim=1)
    if labels is not None:
        out["labels"] = torch.cat([block(labels, -100), labels], dim=1)

    # Adjacent rows: the leading columns of mask 0 come before the prompt.
    if adjacent and attention_mask is not None:
        k = (attention_mask != 0).long().cumsum(1).eq(0).sum(1)
        order = torch.stack(
            [torch.cat([torch.arange(m, m + i), torch.arange(m), torch.arange(m + i, m + n)]) for i in k.tolist()]
            or [torch.arange(m + n)]
        )[:B].to(input_ids.device)
        out = {key: torch.stack([x[i] for x, i in zip(value, order)]) if B else value for key, value in out.items()}

    # Positions count the rows that are there.
    there = torch.ones(B, m + n, dtype=torch.bool, device=input_ids.device)
    if attention_mask is not None:
        there = out["attention_mask"] != 0
    if packed and position_start is None:
        position_start = 0
    if position_start is not None:
        before = there.long().cumsum(1) - 1
        out["position_ids"] = position_start + torch.where(there, before, 0)

    # An additive mask: 0 where there is a row, the lowest number where there is none.
    if additive_mask is not None and attention_mask is not None:
        lowest = torch.where(there, 0.0, torch.finfo(additive_mask).min)
        out["attention_mask"] = lowest.to(additive_mask)[:, None, None]

    # Packed: only the rows that are there, the sequences concatenated.
    if packed:
        out.pop("attention_mask", None)
        out = {key: value[there][None] for key, value in out.items()}
        rows = there.sum(1)
        cu_seq_lens = F.pad(rows.cumsum(0), (1, 0)).to(torch.int32)
        longest = max(rows.tolist(), default=0)
        out |= {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
        out |= {"max_length_q": longest, "max_length_k": longest}
    return out
