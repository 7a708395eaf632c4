"""What a model is given with a prompt in front, in each mode, and whether that is right for this model.

"prepend"   [B, m + n]                          a prompt in every row
"packed"    [1, T]                              the same without padding: packing.py
"shared"    [B, 1 + n], and m - 1 rows cached   a causal model runs the prompt once: shared.py
"""

import warnings

import torch
from torch import Tensor, nn

from . import embedding
from .packable import check_packable
from .packing import serve_packed
from .serving import Serving, unwrapped
from .shared import cache_name, cached_rows, check_shareable, left_padding_shifts
from .trial import is_known, off_by, outputs_alone_and_padded, tolerance

__all__ = ["MODES", "check", "model_inputs"]

MODES = ("prepend", "packed", "shared")


def model_inputs(
    mode: str,
    model: nn.Module,
    serving: Serving,
    tokens: dict[str, Tensor | None],
    prompt: Tensor,
    prompt_index: Tensor | None = None,
    lengths: list[int] | Tensor | None = None,
) -> dict[str, Tensor]:
    """The keyword arguments for `model(...)`.

    Args:
        tokens: `input_ids`, and `attention_mask`, `token_type_ids` and `labels` or None, [B, n] each.
        prompt: [m, d], or [K, m, d] with `prompt_index` [B].
        lengths: for `"packed"`, the number of tokens of each row where the host knows it.
    """
    table = model.get_input_embeddings()
    if mode == "packed":
        options = {"position_start": serving.position_start, "packed": True, "lengths": lengths}
        inputs = embedding.prepend(table, **tokens, prompt=prompt, prompt_index=prompt_index, **options)
        if "position_ids" not in serving.takes:  # distances alone count there, and the attention knows them
            del inputs["position_ids"]
        return inputs

    start = serving.positions_from(tokens["attention_mask"])
    tokens = serving.turned(tokens)
    cached, cache = prompt.shape[-2] - 1, None
    if mode == "shared" and cached > 0:
        _check_left(model, serving, tokens["attention_mask"])
        cache = cached_rows(unwrapped(model), prompt[..., :cached, :], len(tokens["input_ids"]), prompt_index)
        prompt, start = prompt[..., cached:, :], None if start is None else start + cached
    inputs = embedding.prepend(
        table, **tokens, prompt=prompt, prompt_index=prompt_index, adjacent=serving.adjacent, position_start=start
    )
    if cache is not None:
        inputs[cache_name(serving.takes)] = cache
        if "attention_mask" in inputs:
            mask = inputs["attention_mask"]
            inputs["attention_mask"] = torch.cat([mask.new_ones(len(mask), cached), mask], 1)
    return inputs


def _check_left(model, serving, mask):
    if serving.shifted_by_padding and mask is not None and (mask[:, :1] == 0).any():
        raise ValueError(
            f"{serving.name} {serving.shifted_by_padding}: pad on the right (tokenizer.padding_side = 'right'), "
            "or take mode='prepend'"
        )


def check(mode: str, model: nn.Module, serving: Serving) -> None:
    """Once for each mode: what the model cannot be served with is refused, with the reason.

    An architecture that the tests do not cover is tried out: two short texts, alone and padded, against what the model
    says of the same tokens given as `input_ids`.

    Raises:
        TypeError: a model that this mode is not for, or that makes something else of embeddings than of their ids.
    """
    if mode in serving.checked:
        return
    inner = unwrapped(model)
    if mode == "packed":
        serving.check_per_token()
        check_packable(inner)
        serve_packed(inner)
    if mode == "shared":
        check_shareable(inner)
        if cache_name(serving.takes) is None:
            raise TypeError(f"the forward of {serving.name} takes no cache: take mode='prepend'")
        serving.shifted_by_padding = left_padding_shifts(inner, serving.takes)
    if not is_known(inner) and mode != "packed":
        _try_out(mode, inner, serving)
    serving.checked.add(mode)


def _try_out(mode, model, serving):
    def inputs_for(prompt, ids, mask):
        tokens = {"input_ids": ids, "attention_mask": mask, "token_type_ids": None, "labels": None}
        return model_inputs(mode, model, serving, tokens, prompt), 1 if mode == "shared" else len(prompt)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the input embedding")  # is said at the call itself
        found = outputs_alone_and_padded(model, inputs_for, length=3)
    if found is None or None in found["alone"]:
        return
    off = {case: off_by(outputs, found["ids"]) for case, outputs in found.items() if None not in outputs}
    most = tolerance(model)
    if off["alone"] > most:
        raise TypeError(
            f"{serving.name} makes something else of inputs_embeds than of the input_ids that they stand for "
            f"(tried out in mode={mode!r}: outputs off by {off['alone']:.2g} of the largest), so a prompt would not "
            "stand in front of what it was trained on" + ("" if mode == "prepend" else ": take mode='prepend'")
        )
    if off.get("right", 0) > most:
        warnings.warn(
            f"the outputs of {serving.name} depend on the padding beside a text (off by {off['right']:.2g} of the "
            "largest): give it batches of texts of one length for the outputs of each text alone",
            stacklevel=4,
        )
    elif off.get("left", 0) > most and mode == "prepend":
        serving.counts_columns = True
    elif off.get("left", 0) > most:
        serving.shifted_by_padding = "gives a text other outputs behind padding on the left"
