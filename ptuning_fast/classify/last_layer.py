"""Only the rows that are pooled leave the last layer: behind its attention, nothing else is computed.

On a CPU nothing else is in its attention either. A score is (W_q x + b_q) . (W_k y + b_k) = (W_k' (W_q x + b_q)) . y +
a number that softmax does not see, and a weighted sum of values is W_v (weighted sum of y) + b_v. So where one row x a
text is asked for, W_k and W_v are applied to it, and not to every row y.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.by_length import groups_of
from ..models.embedding import device_of
from ..models.families import Family, family_of, has_own_parts
from ..models.replaced import Called, gives_more, is_plain, on_the_way, with_module
from ..models.trial import quietly

__all__ = ["of_pooled_rows", "prunable"]


def prunable(model: Any) -> bool:
    """Whether `of_pooled_rows` is right for `model`: an architecture that is known, and probed with three tokens."""
    family = family_of(model)
    if family is None or family.part is None or model.base_model is not model:
        return False
    with quietly(model):
        ids = torch.tensor([[1, 2, 3], [3, 1, 2]], device=device_of(model.get_input_embeddings()))
        full = model(input_ids=ids).last_hidden_state[:, 1:2]
        pruned = of_pooled_rows(model, torch.tensor([1, 1], device=ids.device))
        rows = full if pruned is None else pruned(input_ids=ids).last_hidden_state
    return pruned is not None and rows.shape == full.shape and torch.allclose(rows, full, rtol=1e-3, atol=1e-3)


def of_pooled_rows(model: Any, columns: Tensor) -> Any:
    """A copy of `model`, sharing all it has, whose `last_hidden_state` has the pooled rows alone.

    None where somebody has replaced a forward on the way there, which would go past the copy, or has put a hook or a
    block into a layer, which may want all its rows, or where the model gives the hidden states of its layers, too.

    Args:
        columns: [B], the column of each batch row: [B, 1, d] comes out. Of a packed batch [1, T], the rows that are
            pooled: [1, len(columns), d].
    """
    family = family_of(model)
    assert family is not None and family.part is not None
    path = family.part.split(".")
    *way, part = on_the_way(model, path)
    replaced = any(vars(one).get(name) for one in way for name in ("forward", "_compiled_call_impl"))
    if replaced or gives_more(model) or has_own_parts(*model.children()):
        return None
    columns = columns.long()
    # The last hidden state that was selected from, and its rows: attention and residual share it.
    chosen: list[Any] = [None, None]

    def select(rows: Tensor) -> Tensor:
        if chosen[0] is not rows:
            one_a_row = len(rows) == len(columns)
            chosen[:] = rows, rows.take_along_dim(columns[:, None, None], 1) if one_a_row else rows[:, columns]
        return chosen[1]

    attention = _self_attention(model, family)

    def part_of_rows(*arguments: Tensor) -> Tensor:
        of_attention, *rest = arguments
        out = part(of_attention if attention is not None else select(of_attention), *map(select, rest))
        chosen[:] = None, None  # a recomputation selects again
        return out

    if attention is not None:
        assert family.attention is not None
        pooled = Called(functools.partial(_pooled_attention, attention, select))
        model = with_module(model, family.attention.split("."), pooled)
    return with_module(model, path, Called(part_of_rows))


def _self_attention(model: Any, family: Family) -> nn.Module | None:
    """The last layer's, where it can be computed for the pooled rows alone; else None."""
    if device_of(model.get_input_embeddings()).type != "cpu" or family.attention is None:
        return None
    attention = on_the_way(model, family.attention.split("."))[-1]
    return attention if _is_understood(attention) and is_plain([attention]) else None


def _pooled_attention(
    attention: Any,
    select: Callable[[Tensor], Tensor],
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The forward of that self-attention: [B, 1, d], or of a packed batch [1, B, d]; and no weights."""
    rows = select(hidden)
    if cu_seq_lens_q is None:
        if attention_mask is not None:
            attention_mask = attention_mask[:, 0, :1]  # the same for every row: attention is full
            if attention_mask.dtype == torch.bool:
                attention_mask = torch.where(attention_mask, 0.0, float("-inf"))
        return _attend(attention, rows[:, 0], [hidden], [attention_mask])[:, None], None
    groups = groups_of(cu_seq_lens_q)
    texts = [text.view(g, n, -1) for (g, n), text in zip(groups, hidden[0].split([g * n for g, n in groups]))]
    return _attend(attention, rows[0], texts, [None] * len(texts))[None], None


def _is_understood(attention: nn.Module) -> bool:
    """Whether `attention` is a BERT's self-attention of plain linear layers, whose weights may be read."""
    linears = [getattr(attention, name, None) for name in ("query", "key", "value")]
    plain = all(type(one) is nn.Linear and is_plain([one]) for one in linears)
    return plain and hasattr(attention, "num_attention_heads")


def _attend(attention: Any, rows: Tensor, texts: list[Tensor], masks: list[Tensor | None]) -> Tensor:
    """[B, d], what `attention` makes of `rows`, computed in fp32 at least.

    Args:
        rows: [B, d], one of each text.
        texts: the hidden states of the texts, [g, n, d] for g texts at a time, B in all.
        masks: for each of these what is added to the scores, [g, 1, n], or None.
    """
    H, B, d = attention.num_attention_heads, len(rows), rows.shape[-1]
    dropout = attention.dropout.p if attention.training else 0.0
    dtype = rows.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        (w_q, b_q), (w_k, _), (w_v, b_v) = (
            (one.weight.to(wide), None if one.bias is None else one.bias.to(wide))
            for one in (attention.query, attention.key, attention.value)
        )
        queries = (F.linear(rows.to(wide), w_q, b_q) * attention.scaling).view(B, H, -1)
        queries = torch.einsum("bhe,hed->bhd", queries, w_k.view(H, -1, w_k.shape[1]))
        sums, totals = [], []
        for query, text, mask in zip(queries.split([len(text) for text in texts]), texts, masks):
            text = text.to(wide)
            # In this order the gradient by `text` comes out in its own layout.
            scores = torch.bmm(text, query.transpose(1, 2)).transpose(1, 2)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            sums.append(torch.bmm(weights, text))
            totals.append(weights.sum(-1, keepdim=True))  # 1, but for dropout
        out = torch.einsum("bhd,hed->bhe", torch.cat(sums), w_v.view(H, -1, d))
        if b_v is not None:
            out = out + torch.cat(totals) * b_v.view(H, -1)
    return out.reshape(B, -1).to(dtype)
