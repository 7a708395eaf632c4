"""Of which kind a model's own loss is: found out with a short text, as its name says little of it."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ..models.families import has_own_forward, has_own_parts, is_written_in
from ..models.info import ModelInfo, output_embeddings, unwrapped
from ..models.trial import quietly, short_text

__all__ = [
    "check_counted",
    "goes_by_items",
    "has_causal_loss",
    "is_of_tokens",
    "is_of_transformers",
    "picks_by_mask",
    "warn_of_ignored",
    "warn_of_own",
    "warn_of_own_forward",
]


def has_causal_loss(model: Any, info: ModelInfo) -> bool:
    """Whether the loss of a token's label is that of the row before it, as transformers computes it.

    A first label counts for nothing then. Where it counts, or a loss needs more than labels, it is one of the model's
    own: Bart's decoder, XLNet, BERT in pretraining.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    inner = unwrapped(model)
    takes_labels = "labels" in info.takes and not info.has_decoder
    if not takes_labels or has_own_forward(inner):
        return False
    if getattr(inner, "loss_function", None) is not ForCausalLMLoss:
        return False
    ids, labels = short_text(inner)
    labels = torch.cat([ids[:, :1], torch.full_like(labels[:, 1:], -100)], 1)
    with quietly(inner):
        try:
            loss = inner(input_ids=ids, labels=labels).loss
        except Exception:  # whatever a model that needs more than ids does
            return bool(inner.can_generate())
    return loss is not None and not _counts(loss.item())


def _counts(loss: float) -> bool:
    """Whether a label has a part in it: transformers' mean of none is NaN. Half precision hides no label here."""
    return math.isfinite(loss) and loss != 0


def is_of_transformers(model: Any) -> bool:
    """Whether nobody else has written the forward of `model`, or of a block in it, or put a hook there.

    Else nothing is known of what comes out.
    """
    inner = unwrapped(model)
    head = output_embeddings(inner)  # which may be nowhere in it
    return not (has_own_forward(inner) or has_own_parts(model) or (head is not None and has_own_parts(head)))


def is_of_tokens(model: Any) -> bool:
    """Whether the loss is a mean over labelled tokens, as transformers' own are; of any other nothing is known."""
    function = getattr(unwrapped(model), "loss_function", None)
    return is_of_transformers(model) and is_written_in(function, "transformers.loss.")


def goes_by_items(model: Any, info: ModelInfo) -> bool:
    """Whether the loss of a short text depends on `num_items_in_batch`, by which a sum is then divided."""
    inner = unwrapped(model)
    ids, _ = short_text(inner)
    of_row = info.labels_are_rows and not info.has_decoder
    given = {"input_ids": ids, "labels": torch.zeros_like(ids[:, 0] if of_row else ids)}
    with quietly(inner):
        try:
            one, two = (inner(**given, num_items_in_batch=items).loss.item() for items in (1, 2))
        except Exception:  # whatever a loss makes of arguments that it does not know
            return False
    return one != two and one == one


def picks_by_mask(model: Any, info: ModelInfo) -> bool:
    """Whether the loss leaves out labels where the mask is 0, as XLM-RoBERTa-XL's for tokens: it reads a mask [B, n].

    A packed batch has none, and not one of its labels would count.
    """
    inner = unwrapped(model)
    ids, _ = short_text(inner)
    last = torch.arange(ids.shape[1], device=ids.device)[None] == ids.shape[1] - 1
    given = {"input_ids": ids, "attention_mask": (~last).long()}
    labels = torch.zeros_like(ids)
    none = torch.full_like(ids, -100)

    def loss(labels: Tensor) -> float:
        return inner(**given, labels=labels).loss.item()

    with quietly(inner):
        try:
            if loss(labels) != loss(labels.masked_fill(last, -100)):
                return False
            # In half precision, or of a head that is zero, the means may be the same: then that label alone says it,
            # unless -100 is a number like others (ELECTRA's loss of replaced tokens), of which no mean is the same.
            return not _counts(loss(labels.masked_fill(~last, -100))) or _counts(loss(none))
        except Exception:  # whatever a model that needs more than ids does
            return False


def check_counted(labels: Tensor | None, attention_mask: Tensor | None) -> None:
    """ValueError for labels on padding, which are left out, where somebody has counted labels."""
    if labels is None or attention_mask is None or labels.shape != attention_mask.shape:
        return
    if bool(((labels != -100) & (attention_mask == 0)).any()):
        raise ValueError(
            "labels has tokens where attention_mask is 0, which no prompt is trained on, and num_items_in_batch counts "
            "them: give -100 there, as transformers' collators do"
        )


def warn_of_ignored(model: Any, info: ModelInfo) -> None:
    """A warning where rows labelled -100 have a part in the loss, as in ELECTRA's of replaced tokens: a prompt's do."""
    inner = unwrapped(model)
    ids, _ = short_text(inner)
    with quietly(inner):
        try:
            loss = inner(input_ids=ids, labels=torch.full_like(ids, -100)).loss.item()
        except Exception:  # whatever a model that needs more than ids does
            return
    if _counts(loss):
        warnings.warn(
            f"the loss of {info.name} counts rows whose label is -100, and so those of virtual tokens: compute it from "
            "the logits of the tokens",
            stacklevel=2,
        )


def warn_of_own(model: Any, info: ModelInfo) -> None:
    """A warning where nothing is known of the loss that a packed batch, which is one row, is given to."""
    if not is_of_tokens(model):
        warnings.warn(
            f"the loss of {info.name} is not transformers' own, or a hook, forward or block of your own is in the "
            "model: where it weighs rows or columns it comes out otherwise in a packed batch, which is one row; "
            "mode='auto' is exact",
            stacklevel=2,
        )


def warn_of_own_forward(model: Any, info: ModelInfo) -> None:
    """A warning where nothing is known of what a model makes of a row, and a packed batch is one."""
    if not is_of_transformers(model):
        warnings.warn(
            f"the forward of {info.name} is not transformers' own, or a hook, forward or block of your own is in the "
            "model: what it gives for each text (pooled rows, a loss without labels) comes out of all texts at once in "
            "a packed batch, which is one row; mode='auto' is exact",
            stacklevel=2,
        )
