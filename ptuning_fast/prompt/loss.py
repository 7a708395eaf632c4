"""A model's own loss, with its head on the labelled rows alone.

    hidden states [B, S, d]  ──  rows that predict a label  ──  head  ──  logits [B, L, V]  ──  loss

transformers' heads take the rows as `logits_to_keep`, its causal loss the labels of those rows as `shift_labels`
(loss/loss_utils.py); whatever a head does to its logits (softcap, scale) is still done by it.
"""

import inspect
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.embedding import device_of
from ..models.info import ModelInfo, unwrapped
from ..models.last_rows import LastRows
from ..models.probe import ordinary_tokens, quietly
from ..models.replaced import Called, with_module

__all__ = [
    "check_counted",
    "gives_columns",
    "goes_by_items",
    "has_causal_loss",
    "is_of_tokens",
    "keeps_labelled_rows",
    "last_rows",
    "on_labelled_rows",
    "predicting",
    "warn_of_ignored",
]


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
    ids, labels = _short_text(inner)
    given = {"input_ids": ids, "labels": labels}
    with quietly(inner):
        try:
            whole, kept = (inner(**inputs).loss.float() for inputs in (given, on_labelled_rows(given)))
            alone = _without_other_rows(inner, predicting(labels)[1])(**given).loss.float()
        except Exception:  # whatever a loss makes of arguments that it does not know
            return False
    most = 1e-4 if inner.dtype == torch.float32 else 2e-3
    return torch.allclose(whole, kept, rtol=most) and torch.allclose(whole, alone, rtol=most)


def _without_other_rows(model: Any, columns: Tensor) -> Any:
    """`model`, whose head gives NaN but in `columns`."""
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is head), "")
    if head is None or not path:
        return model

    def on_columns(*args: Any, **kwargs: Any) -> Tensor:
        logits = head(*args, **kwargs)
        return torch.full_like(logits, float("nan")).index_copy(1, columns, logits[:, columns])

    return with_module(model, path.split("."), Called(on_columns))


def last_rows(model: Any, info: ModelInfo) -> LastRows:
    """What of the last layer can be left to the rows that predict a label, found out with a short text."""
    ids, labels = _short_text(unwrapped(model))
    return LastRows(model, on_labelled_rows({"input_ids": ids, "labels": labels}))


def has_causal_loss(model: Any, info: ModelInfo) -> bool:
    """Whether the loss of a token's label is that of the row before it, as transformers computes it.

    A first label counts for nothing then. Where it counts, or a loss needs more than labels, it is one of the model's
    own: Bart's decoder, XLNet, BERT in pretraining.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    inner = unwrapped(model)
    takes_labels = "labels" in info.takes and not info.has_decoder
    if not takes_labels or not _is_transformers_own(inner):
        return False
    if getattr(inner, "loss_function", None) is not ForCausalLMLoss:
        return False
    ids, labels = _short_text(inner)
    with quietly(inner):
        try:
            one, two = (inner(input_ids=ids, labels=given).loss for given in (labels, _with_first(labels, ids)))
        except Exception:  # whatever a model that needs more than ids does
            return True
    return one is not None and torch.allclose(one, two, rtol=1e-5)


def _with_first(labels: Tensor, ids: Tensor) -> Tensor:
    return torch.cat([ids[:, :1], labels[:, 1:]], 1)


def is_of_tokens(model: Any) -> bool:
    """Whether the loss is a mean over labelled tokens, as transformers' own are; of any other nothing is known."""
    inner = unwrapped(model)
    function = getattr(inner, "loss_function", None)
    return _is_transformers_own(inner) and getattr(function, "__module__", "").startswith("transformers.loss.")


def _is_transformers_own(inner: Any) -> bool:
    """Whether nobody has written another forward, whose loss may be another.

    Accelerate's, for offloading and autocast, call the one that they replace.
    """
    if not type(inner).forward.__module__.startswith("transformers."):
        return False
    if "forward" not in vars(inner):
        return True
    called = inspect.unwrap(inner.forward)
    original = getattr(called, "__func__", called) is inspect.unwrap(type(inner).forward)
    return original and (hasattr(inner, "_hf_hook") or hasattr(inner, "_original_forward"))


def goes_by_items(model: Any, info: ModelInfo) -> bool:
    """Whether the loss of a short text depends on `num_items_in_batch`, by which a sum is then divided."""
    inner = unwrapped(model)
    ids, _ = _short_text(inner)
    of_row = info.labels_are_rows and not info.has_decoder
    given = {"input_ids": ids, "labels": torch.zeros_like(ids[:, 0] if of_row else ids)}
    with quietly(inner):
        try:
            one, two = (inner(**given, num_items_in_batch=items).loss.item() for items in (1, 2))
        except Exception:  # whatever a loss makes of arguments that it does not know
            return False
    return one != two and one == one


def check_counted(labels: Tensor | None, attention_mask: Tensor | None) -> None:
    """ValueError for labels on padding, which are left out, where somebody has counted labels."""
    if labels is None or attention_mask is None or labels.shape != attention_mask.shape:
        return
    if bool(((labels != -100) & (attention_mask == 0)).any()):
        raise ValueError(
            "labels has tokens where attention_mask is 0, which no prompt is trained on, and num_items_in_batch counts "
            "them: give -100 there, as transformers' collators do"
        )


def gives_columns(model: Any, info: ModelInfo) -> bool:
    """Whether logits [B, S] are a number for each column, and not S classes: for texts of two lengths."""
    inner = unwrapped(model)
    ids, _ = _short_text(inner)
    with quietly(inner):
        try:
            return all(inner(input_ids=ids[:, :n]).logits.shape == (1, n) for n in (ids.shape[1], ids.shape[1] - 1))
        except Exception:  # whatever a model that needs more than ids does
            return False


def warn_of_ignored(model: Any, info: ModelInfo) -> None:
    """A warning where rows labelled -100 have a part in the loss, as in ELECTRA's of replaced tokens: a prompt's do."""
    inner = unwrapped(model)
    ids, _ = _short_text(inner)
    with quietly(inner):
        try:
            loss = inner(input_ids=ids, labels=torch.full_like(ids, -100)).loss.item()
        except Exception:  # whatever a model that needs more than ids does
            return
    if math.isfinite(loss) and loss != 0:
        warnings.warn(
            f"the loss of {info.name} counts rows whose label is -100, and so those of virtual tokens: compute it from "
            "the logits of the tokens",
            stacklevel=2,
        )


def _short_text(model: Any) -> tuple[Tensor, Tensor]:
    """[1, 6] ids, and labels of some of them."""
    device = device_of(model.get_input_embeddings())
    ids = torch.tensor([ordinary_tokens(model.config, model.config.get_text_config().vocab_size, 6)], device=device)
    return ids, ids.masked_fill(torch.tensor([[True, True, True, False, True, False]], device=device), -100)
