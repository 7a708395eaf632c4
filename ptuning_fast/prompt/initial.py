"""What the rows of a prompt start as."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.embedding import device_of, rows_of

__all__ = ["initial_prompt"]


def initial_prompt(init: str | Tensor, length: int, embedding: Any, tokenizer: Any) -> Tensor:
    """The first value of a prompt, [length, d] in fp32.

    Args:
        init: `"normal"` draws from the standard normal; `"vocab"` samples rows of the token table (Lester et al. 2021,
            arXiv 2104.08691, section 3.2); a tensor [length, d] is copied; any other text is tokenised and embedded,
            repeated or cut to `length`.
        length: virtual tokens, m.
        embedding: the model's input embedding, [V, d].
        tokenizer: for a text: a tokenizer, or the hub id or folder of one.
    """
    if torch.get_default_device().type == "meta":
        raise ValueError(
            "a prompt is made here where tensors have no values, as a model's own __init__ is in from_pretrained: "
            "make it of the model when that is loaded, and load its values by load_state_dict or from_pretrained"
        )
    V, d = embedding.weight.shape
    if isinstance(init, Tensor):
        if init.shape != (length, d):
            raise ValueError(
                f"init must be [{length}, {d}] (prompt length, embedding width); it is {tuple(init.shape)}"
            )
        if not init.isfinite().all():
            raise ValueError("init has values that are not finite: nothing could be trained from there")
        return init.detach().float().clone()
    if not isinstance(init, str):
        raise TypeError(f"init must be 'normal', 'vocab', a text or a tensor, not {type(init).__name__}")
    if init == "normal":
        return torch.randn(length, d)
    if init == "vocab":
        ids = torch.randperm(V)
        ids = ids[ids != embedding.padding_idx] if getattr(embedding, "padding_idx", None) is not None else ids
    else:
        from transformers import AutoTokenizer

        if isinstance(tokenizer, (str, Path)):
            if not str(tokenizer):
                raise ValueError(
                    f"init={init!r} is neither 'normal' nor 'vocab', and a text needs the model's tokenizer, which the "
                    "model does not name: give tokenizer=..."
                )
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        ids = torch.tensor(tokenizer(init, add_special_tokens=False)["input_ids"], dtype=torch.int64)
    if len(ids) == 0:
        raise ValueError(f"init={init!r} has no tokens: give a longer text, 'normal' or 'vocab'")
    ids = ids.repeat(-(-length // len(ids)))[:length]
    with torch.no_grad():
        rows = rows_of(embedding, ids.to(device_of(embedding)))
        if not isinstance(rows, Tensor):
            raise TypeError(
                f"the input embedding, {type(embedding).__name__}, returns more than its rows ({type(rows).__name__}): "
                "a prompt cannot stand before a model that goes on with the rest"
            )
        return rows.float().cpu()
