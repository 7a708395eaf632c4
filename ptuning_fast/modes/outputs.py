"""Of what a model gives for a batch behind a prompt, that of the text: the rows and numbers of its columns.

Outputs of transformers' own classes are known by their names and dimensions, those of others by a trial with two short
texts of two lengths.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from ..models import unwrapped
from ..models.embedding import device_of
from ..models.families import has_own_forward
from ..models.info import ModelInfo
from ..models.trial import Path, autocast_of, call, per_column, quietly, short_text, tensors_of
from .base import LaidOut

__all__ = ["CACHES", "of_text", "per_column_of_short_texts"]

Tried = dict[tuple[Path, int], bool]
CACHES = {"past_key_values", "cache", "cache_params", "state", "mems"}
_OF_IMAGES = ("vision_", "image_", "video_", "audio_")  # which may have as many rows as there are columns
_STATES = ("hidden_states", "last_hidden_state", "encoder_hidden_states", "encoder_last_hidden_state")
_NUMBERS = ("start_logits", "end_logits")  # one for each column


def of_text(out: Any, laid_out: LaidOut, model: Any, tried: Callable[[], Tried], flattened: bool) -> Any:
    """The outputs `out`, a ModelOutput of `model`, without the rows of virtual tokens.

    Args:
        tried: `per_column_of_short_texts` of the model; it is called where names do not say enough.
        flattened: whether the batch came as one row [1, T], and so do the outputs.
    """
    mode, batch, m, inputs = laid_out
    columns = inputs["inputs_embeds"].shape[:2]
    own = has_own_forward(unwrapped(model))
    names = [name for name in out if own or _is_of_text(name, mode.info.has_decoder)]
    # Whatever widths there are by chance: a trial of a sharded model is one of all processes.
    unnamed = own or any(not _by_name(name, one) for name in names for _, one in tensors_of(out[name]))
    known = tried() if unnamed else {}
    no_tensors = set[str]()

    def of_tokens(rows: Any, *path: Any) -> Any:
        if isinstance(rows, Mapping):
            laid: Any = copy.copy(rows)
            for name, one in rows.items():
                laid[name] = of_tokens(one, *path, name)
            return laid
        if isinstance(rows, (tuple, list)):
            made = getattr(type(rows), "_make", type(rows))  # the former: of a namedtuple
            return made(of_tokens(one, *path, place) for place, one in enumerate(rows))
        if not torch.is_tensor(rows):
            if own and (hasattr(rows, "ndim") or (len(path) > 2 and isinstance(rows, (Number, str)))):  # NumPy's, lists
                no_tensors.add(path[0])
            return rows
        if "attentions" in path[0] and (rows.dim() > 3 or not own):
            return mode.of_attention(rows, batch, m) if rows.dim() == 4 else rows
        if rows.shape[:2] != columns:
            return rows
        if (path, rows.dim()) in known:
            if not known[path, rows.dim()]:
                return rows
        elif own or not _by_name(path[0], rows):
            if not _untried(path[0], rows.dim() > 2 or mode.packed):
                return rows
        rows = mode.of_tokens(rows, inputs, batch, m)
        return rows[batch.attention_mask != 0][None] if flattened else rows

    unfilled = {name: _unfilled(name, out, columns) for name in names}
    for name, rows in unfilled.items():
        out[name] = of_tokens(rows, name)
    for name in sorted(no_tensors):
        warnings.warn(
            f"{name} has what is no tensor: that of virtual tokens, {m} for each text, stays in it",
            stacklevel=5,
        )
    if mode.packed and "pooler_output" in out:  # of one row, which is that of all texts
        rest = {name: value for name, value in out.items() if name != "pooler_output"}
        added = rest.keys() - getattr(out, "__dataclass_fields__", rest).keys()  # by a hook, or another forward
        out = type(out)(**{name: value for name, value in rest.items() if name not in added})
        for name in added:
            out[name] = rest[name]
    return out


def _unfilled(name: str, out: Any, columns: tuple[int, int]) -> Any:
    """Inner states in the batch's columns, where the last one is: BigBird and Pegasus-X fill blocks up behind them."""
    states = out[name]
    if name not in _STATES or not isinstance(states, tuple) or not states:
        return states
    filled, last = getattr(states[0], "shape", ())[:2], out.get(name.replace("hidden_states", "last_hidden_state"))
    if filled == columns or getattr(states[-1] if last is None else last, "shape", ())[:2] != columns:
        return states

    def cut(rows: Any) -> Any:
        if isinstance(rows, tuple):  # Pegasus-X: with the rows of its global tokens
            return tuple(map(cut, rows))
        return rows[:, : columns[1]] if torch.is_tensor(rows) and rows.shape[:2] == filled else rows

    return cut(states)


def _is_of_text(name: str, has_decoder: bool) -> bool:
    """Whether the name of an output of transformers' own leaves it open."""
    if name in CACHES:
        return False
    return name.startswith("encoder_") if has_decoder else not name.startswith(_OF_IMAGES)


def _by_name(name: str, rows: Tensor) -> bool:
    """Whether the name and dimensions of an output of transformers' own say that it has a row for each column."""
    return rows.dim() < 2 or name in _STATES or (rows.dim() == 2 if name in _NUMBERS else rows.dim() > 2)


def _untried(name: str, taken: bool) -> bool:
    """`taken`, whether an output as wide as the batch passes for one with a row for each column; a warning of it.

    It does in a packed batch, whose width is that of nothing else, and where it has three dimensions.
    """
    if name in _STATES or (taken and name == "logits"):
        return True
    if name.startswith("decoder_"):
        return False
    if torch.compiler.is_compiling():
        raise ValueError(f"call it once without torch.compile: whether {name} is of columns has to be tried")
    warnings.warn(
        f"whether {name} has a row for each column could not be tried, as short texts alone do not give it: "
        f"{'its rows' if taken else 'no rows'} on virtual tokens are taken out",
        stacklevel=6,
    )
    return taken


def per_column_of_short_texts(model: Any, info: ModelInfo) -> Tried:
    """Which outputs, of how many dimensions, have a row or a number for each column, and not as many classes.

    For texts of two lengths.
    """
    inner = unwrapped(model)
    cast = autocast_of(device_of(inner.get_input_embeddings()))
    with quietly(inner), cast:
        try:
            texts = [short_text(inner, n)[0].repeat(2, 1) for n in (6, 5)]
            found = [call(inner, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids) for ids in texts]
        except Exception:  # whatever a model that needs more than ids does
            return {}
    long, short = (per_column(out, ids.shape[1], 2) for out, ids in zip(found, texts))
    return {(path, one.dim()): path in long and path in short for path, one in tensors_of(found[0])}
