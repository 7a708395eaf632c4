"""A causal model's own loss in chunks of rows, so that no more logits than one chunk's are ever held.

    hidden states [B, S, d]  ──  rows that predict a label [R, d]  ──  chunk [r, d]  ──  head  ──  logits [r, V]
                                                gradient [r, d], loss []  ──┘ at once, and the logits are let go

The head of a chunk is the model's own forward, in a copy that shares all it has and in whose base model's place stands
one that hands on what it is given. So whatever it does to logits (softcap, scale) is done, and nothing is patched.
The gradient is taken in the forward, as Liger-Kernel's fused linear cross-entropy takes it: nothing is computed twice.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.info import ModelInfo, unwrapped
from ..models.replaced import Called, gives_more, is_plain, on_the_way, with_module
from ..models.trial import quietly, short_text
from .kinds import is_of_tokens

__all__ = ["has_chunks", "in_chunks", "is_large"]

LOGITS = 2**25
"""Of a chunk, at most: 128 MiB in fp32, of which a loss and its gradient hold two or three; at V = 128,000 still 256
rows, fewer of which make slower matrix products (at 140 rows the head's time grows by a tenth on a CPU)."""


def is_large(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether the logits of `inputs`, with labels one per column, are more than a chunk's; the device is not asked."""
    labels, V = inputs["labels"], getattr(model.config.get_text_config(), "vocab_size", 0)
    return labels.numel() * V > LOGITS


def in_chunks(model: Any, inputs: dict[str, Any], most: int | None = None) -> Tensor | None:
    """What `model(**inputs).loss` is, a scalar, for `labels` [B, S]; how many there are the host is told, and waits.

    None where it would not be the same as the model stands: its forward is hooked, compiled or replaced, as by FSDP,
    parameters of its head are trained, or it gives more than that (its routers' choices, and a loss over them).
    """
    inputs = dict(inputs)
    labels, items = inputs.pop("labels"), inputs.pop("num_items_in_batch", None)
    base, outputs = unwrapped(model).get_decoder(), []
    path = next(name for name, module in model.named_modules() if module is base).split(".")

    if gives_more(unwrapped(model)) or not is_plain(on_the_way(model, path)[:-1]):
        return None

    def without_rows(*args: Any, **kwargs: Any) -> Any:
        outputs.append(base(*args, **kwargs))
        return type(outputs[0])(last_hidden_state=outputs[0].last_hidden_state[:, :0])

    body = with_module(model, path, Called(without_rows))
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in body.parameters()):
        return None
    body(**inputs)
    out = outputs.pop()
    kind, hidden = type(out), out.last_hidden_state.flatten(0, 1)
    rows_as_they_are = Called(lambda *_, inputs_embeds, **__: kind(last_hidden_state=inputs_embeds))
    head = with_module(model, path, rows_as_they_are)

    def summed(rows: Tensor, targets: Tensor) -> Tensor:
        labels = targets[None]
        return head(inputs_embeds=rows[None], labels=labels, shift_labels=labels, num_items_in_batch=1).loss

    targets = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten().to(hidden.device)
    labelled = (targets != -100).nonzero()[:, 0]
    chunks = max(math.ceil(len(labelled) * model.config.get_text_config().vocab_size / (most or LOGITS)), 1)
    rows = hidden.index_select(0, labelled)
    loss = _Chunked.apply(rows, targets[labelled], summed, math.ceil(len(labelled) / chunks) or 1)
    if items is None:
        items = len(labelled)
    return loss / (items.to(loss.device) if torch.is_tensor(items) else items)


def has_chunks(model: Any, info: ModelInfo) -> bool:
    """Whether `in_chunks` gives the model's loss: for a short text, two labels at a time."""
    if not is_of_tokens(model):
        return False
    inner = unwrapped(model)
    V, (ids, _) = inner.config.get_text_config().vocab_size, short_text(inner)
    inputs = {"input_ids": ids, "labels": ids.masked_fill(ids == ids[0, 3], -100)}
    with quietly(inner):
        try:
            chunked = in_chunks(model, inputs, most=2 * V)
            if chunked is None:  # before a forward, which is one of all processes where it is sharded
                return False
            whole = model(**inputs).loss.float()
        except Exception:  # whatever a forward makes of a base model that is none
            return False
    most = 1e-4 if inner.dtype == torch.float32 else 2e-3
    return torch.allclose(whole, chunked.float(), rtol=most)


class _Chunked(torch.autograd.Function):
    """The sum of `summed` [] over chunks of `size` of rows [R, d] and targets [R]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, targets: Tensor, summed: Callable[..., Tensor], size: int) -> Tensor:
        losses, gradients = [], []
        for part in zip(rows.split(size), targets.split(size)):
            chunk = part[0].detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                loss = summed(chunk, part[1])
            if ctx.needs_input_grad[0]:
                with torch.autocast(rows.device.type, enabled=False):  # as a backward has it
                    gradients += torch.autograd.grad(loss, chunk)
            losses.append(loss.detach())
        ctx.summed = summed
        ctx.save_for_backward(rows, targets, *gradients)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, targets, *gradients = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient that is differentiated itself: all rows at once
            return torch.autograd.grad(ctx.summed(rows, targets), rows, grad, create_graph=True)[0], None, None, None
        return (torch.cat(gradients) * grad[None]).to(rows.dtype), None, None, None
