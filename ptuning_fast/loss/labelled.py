"""A model's own loss, with its head on the labelled rows alone.

    hidden states [B, S, d]  ──  rows that predict a label  ──  head  ──  logits [B, L, V]  ──  loss

transformers' heads take the rows as `logits_to_keep`, its causal loss the labels of those rows as `shift_labels`
(loss/loss_utils.py); whatever a head does to its logits (softcap, scale) is still done by it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.info import ModelInfo, output_embeddings, unwrapped
from ..models.probe import off_by, tolerance
from ..models.replaced import Called, with_module
from ..models.trial import quietly, short_text
from .kinds import is_of_tokens
from .last_rows import LastRows

__all__ = ["keeps_labelled_rows", "last_rows", "on_labelled_rows", "predicting"]


def on_labelled_rows(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a causal model with `labels` [B, S], so that only rows that predict one go through its head.

    The same columns are kept in every row; which they are the host is told, which waits for the device.
    """
    targets, columns = predicting(inputs["labels"])
    if not 0 < len(columns) < targets.shape[1]:
        return inputs
    return inputs | {"logits_to_keep": columns, "shift_labels": targets[:, columns]}


def predicting(labels: Tensor) -> tuple[Tensor, Tensor]:
    """What each row predicts of `labels` [B, S], and the columns [L] that predict any; the host waits for these."""
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return targets, (targets != -100).any(0).nonzero()[:, 0]


def keeps_labelled_rows(model: Any, info: ModelInfo) -> bool:
    """Whether the loss of `on_labelled_rows` is the model's: it takes both arguments, and gives the same for a text.

    And it reads no other rows, as one over the size of all logits (Bamba's z-loss) does: those are NaN then.
    """
    inner = unwrapped(model)
    if not {"logits_to_keep", "labels"} <= info.takes or not is_of_tokens(model):
        return False
    ids, labels = _text(inner, info)
    given, columns = {"input_ids": ids, "labels": labels}, predicting(labels)[1]
    with quietly(inner):
        try:
            whole, kept = (inner(**inputs) for inputs in (given, on_labelled_rows(given)))
            alone = _without_other_rows(inner, columns)(**given).loss.float()
            off = off_by([{"logits": kept.logits.float()}], [{"logits": whole.logits[:, columns].float()}])
        except Exception:  # whatever a loss makes of arguments that it does not know
            return False
    most = 1e-4 if inner.dtype == torch.float32 else 2e-3
    losses = whole.loss.float(), kept.loss.float()
    same = torch.allclose(*losses, rtol=most) and torch.allclose(losses[0], alone, rtol=most)
    return same and off <= tolerance(inner)  # a loss may hide which rows it is of


def _text(model: Any, info: ModelInfo) -> tuple[Tensor, Tensor]:
    """One that shows what looks some rows back, where the model has so many positions."""
    return short_text(model, min(24, info.max_positions or 24))


def _without_other_rows(model: Any, columns: Tensor) -> Any:
    """`model`, whose head gives NaN but in `columns`."""
    head = output_embeddings(model)
    path = next((name for name, module in model.named_modules() if module is head), "")
    if head is None or not path:
        return model

    def on_columns(*args: Any, **kwargs: Any) -> Tensor:
        logits = head(*args, **kwargs)
        return torch.full_like(logits, float("nan")).index_copy(1, columns, logits[:, columns])

    return with_module(model, path.split("."), Called(on_columns))


def last_rows(model: Any, info: ModelInfo) -> LastRows:
    """What of the last layer can be left to the rows that predict a label, found out with a short text."""
    ids, labels = _text(unwrapped(model), info)
    return LastRows(model, on_labelled_rows({"input_ids": ids, "labels": labels}))
