"""A model's own loss, with its head on the labelled rows alone.

    hidden states [B, S, d]  ──  rows that predict a label  ──  head  ──  logits [B, L, V]  ──  loss

transformers' heads take the rows as `logits_to_keep`, its causal loss the labels of those rows as `shift_labels`
(loss/loss_utils.py); whatever a head does to its logits (softcap, scale) is still done by it.
"""

from typing import Any

import torch
import torch.nn.functional as F

from ..models.info import ModelInfo, unwrapped
from ..models.probe import ordinary_tokens, quietly

__all__ = ["check_items", "keeps_labelled_rows", "on_labelled_rows"]


def on_labelled_rows(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a causal model with `labels` [B, S], so that only rows that predict one go through its head.

    The same columns are kept in every row; which they are the host is told, which waits for the device.
    """
    targets = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    columns = (targets != -100).any(0).nonzero()[:, 0]
    if not 0 < len(columns) < targets.shape[1]:
        return inputs
    return inputs | {"logits_to_keep": columns, "shift_labels": targets[:, columns]}


def keeps_labelled_rows(model: Any, info: ModelInfo) -> bool:
    """Whether the loss of `on_labelled_rows` is the model's: it takes both arguments, and gives the same for a text."""
    inner = unwrapped(model)
    if "logits_to_keep" not in info.takes or getattr(inner, "loss_type", None) != "ForCausalLM":
        return False
    device = inner.get_input_embeddings().weight.device
    ids = torch.tensor([ordinary_tokens(inner.config, inner.config.get_text_config().vocab_size, 6)], device=device)
    labels = ids.masked_fill(torch.tensor([[True, True, True, False, True, False]], device=device), -100)
    given = {"input_ids": ids, "labels": labels}
    with quietly(inner):
        try:
            whole, kept = (inner(**inputs).loss.float() for inputs in (given, on_labelled_rows(given)))
        except Exception:  # whatever a loss makes of arguments that it does not know
            return False
    return torch.allclose(whole, kept, rtol=1e-4 if inner.dtype == torch.float32 else 1e-2)


def check_items(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether it can be seen from this batch that the model's loss is divided by `num_items_in_batch`.

    Raises:
        ValueError: the loss is the same whatever that is, as those of masked language models and classifiers are.
    """
    name = type(unwrapped(model)).__name__
    ignored = f"the loss of {name} does not go by num_items_in_batch: leave it out, and weigh the batches' losses"
    with quietly(model):
        try:
            one, two = (model(**inputs, num_items_in_batch=items).loss.item() for items in (1, 2))
        except TypeError as error:
            raise ValueError(f"{ignored} ({error})") from None
    if one == two and one != 0:
        raise ValueError(ignored)
    return one != two and one == one
