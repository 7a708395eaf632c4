"""The probe: what a model makes of two short texts behind a prompt, against what it makes of the same tokens as ids.

It finds out what an architecture's name does not say.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..op import Batch, Prompt
from .embedding import device_of, rows_of
from .families import family_of
from .trial import BELOW, Path, call, ordinary_tokens, padded, per_column, quietly, state

__all__ = [
    "Outcome",
    "Served",
    "is_causal",
    "of_ids",
    "off_by",
    "probe",
    "takes_additive_mask",
    "tolerance",
]


class Served(NamedTuple):
    """A batch as a mode serves it: the model's arguments, and where each text's outputs stand."""

    inputs: dict[str, Any]
    places: list[tuple[int, slice]]  # of each text, with its virtual tokens or not: a row of the outputs, and columns
    columns: int  # that a row of outputs has, where they are one per column


class Outcome(NamedTuple):
    """How far outputs are from what the same tokens give as ids, relative to the largest; None where it was refused."""

    alone: float | None  # each text by itself
    right: float | None  # both in a batch, padded on the right
    left: float | None  # both in a batch, padded on the left
    error: str | None  # what the first refusal said
    most: float  # what roundings alone may make of it


LENGTH, TEXTS = 3, (6, 3)  # virtual tokens, and the tokens of the two texts where no block is longer


def probe(model: Any, serve: Callable[[Prompt, Batch], Served], of_columns: bool = False) -> Outcome:
    """`_probe` without token types, and with such where they have a part in it: whichever is further off."""
    lengths = _lengths(model.config)
    plain = _probe(model, serve, of_columns, lengths, None)
    if plain.alone is None and lengths != TEXTS:  # a "block" may be all that a model takes
        lengths = TEXTS
        plain = _probe(model, serve, of_columns, lengths, None)
    types = _types_of(model, max(lengths), device_of(model.get_input_embeddings()))
    typed = plain if types is None else _probe(model, serve, of_columns, lengths, types)
    if typed is plain or typed.alone is None:
        return plain
    if plain.alone is None:
        return typed
    alone, right, left = (_worse(one, other) for one, other in zip(plain[:3], typed[:3]))
    return Outcome(alone, right, left, plain.error or typed.error, max(plain.most, typed.most))


def _worse(one: float | None, other: float | None) -> float | None:
    return max((value for value in (one, other) if value is not None), default=None)


def _probe(
    model: Any,
    serve: Callable[[Prompt, Batch], Served],
    of_columns: bool,
    lengths: tuple[int, int],
    types: Tensor | None,
) -> Outcome:
    """What comes out where `serve` prepends three ordinary tokens, as vectors, to two short texts.

    With `of_columns` the outputs per column alone are compared (a packed row has no pooled output of each text). Of a
    model that is sharded every process must make it, as a forward is one of all.
    """
    table = model.get_input_embeddings()
    device, V = device_of(table), getattr(table, "num_embeddings", table.weight.shape[0])
    tokens = ordinary_tokens(model.config, V, LENGTH + max(lengths))
    first, texts = tokens[:LENGTH], [tokens[LENGTH : LENGTH + n] for n in lengths]
    has_pooler = getattr(model.base_model, "pooler", None) is not None  # it reads column 0, of which a call warns
    of_columns_on = {"right": of_columns, "left": of_columns or has_pooler}
    errors: list[str] = []
    with quietly(model):
        try:
            of_texts, dtypes = [], set[torch.dtype]()
            for text in texts:
                ids = torch.tensor([first + text], device=device)
                given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                if types is not None:
                    given["token_type_ids"] = F.pad(types[: len(text)], (LENGTH, 0))[None]
                with _dtypes_of_outputs(model, dtypes):
                    of_texts.append(call(model, given, ids))
            widths = [LENGTH + n for n in lengths]
            columnwise = set.intersection(*map(per_column, of_texts, widths))
            expected = {
                side: [_of_row(out, 0, slice(None), n, columnwise, only) for out, n in zip(of_texts, widths)]
                for side, only in of_columns_on.items()
            }
            prompt = Prompt(rows_of(table, torch.tensor(first, device=device)).float())
        except Exception as error:  # whatever a model that needs more than ids does
            return Outcome(None, None, None, f"it cannot be called with ids alone: {error}", 0.0)

        def off(rows: list[list[int]], side: str, truth: list[dict[str, Tensor]]) -> float | None:
            batch = padded(rows, side, tokens[-1], device)  # no virtual token: what reads the first column shows
            if types is not None:
                typed = torch.zeros_like(batch.input_ids)
                typed[batch.attention_mask != 0] = torch.cat([types[: len(row)] for row in rows])
                batch = batch._replace(token_type_ids=typed)
            try:
                served = serve(prompt, batch)
                out = call(model, served.inputs, batch.input_ids)
            except (ValueError, TypeError, IndexError, RuntimeError, NotImplementedError, AttributeError) as error:
                errors.append(str(error))
                return None
            only = of_columns_on[side]
            found = [_of_row(out, row, place, served.columns, columnwise, only) for row, place in served.places]
            pairs = [(one, _last(other, one)) for one, other in zip(found, truth)]
            return max(off_by([_shared(one, other)], [_shared(other, one)]) for one, other in pairs)

        each = [off([text], "right", [truth]) for text, truth in zip(texts, expected["right"])]
        alone = None if None in each else max(value for value in each if value is not None)
        right, left = (off(texts, side, expected[side]) for side in ("right", "left"))
    return Outcome(alone, right, left, errors[0] if errors else None, _roundings(dtypes))


def of_ids(model: Any) -> Tensor | None:
    """What `model` makes of two short texts, ids and padding; None where it needs more than these."""
    table = model.get_input_embeddings()
    tokens = ordinary_tokens(model.config, table.weight.shape[0], sum(TEXTS))
    batch = padded([tokens[: TEXTS[0]], tokens[TEXTS[0] :]], "right", tokens[0], device_of(table))
    with quietly(model):
        try:
            given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            return state(call(model, given, batch.input_ids))
        except Exception:  # whatever that may be
            return None


def is_causal(model: Any) -> bool:
    """Whether a token reaches later rows only: the first row's state, behind two different second tokens."""
    with quietly(model):
        ids = torch.tensor([[1, 2], [1, 3]], device=device_of(model.get_input_embeddings()))
        first = state(call(model, {"input_ids": ids}, ids))[:, 0].float()
    return torch.allclose(first[0], first[1], rtol=1e-5, atol=1e-6)


def off_by(actual: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> float:
    """The largest difference, relative to the largest output of its name; infinite where they do not compare.

    To the largest but for features that are one number in all rows, such as a logit that somebody has banned.
    """
    worst = 0.0
    for one, other in zip(actual, expected):
        if one.keys() != other.keys():
            return float("inf")
        for name, value in one.items():
            if value.shape != other[name].shape:
                return float("inf")
            if value.numel():
                off = ((value - other[name]).abs().max() / _largest(other[name]).clamp(min=1e-6)).item()
                if off != off:  # NaN is as far off as can be, and compares with nothing
                    return float("inf")
                worst = max(worst, off)
    return worst


def _largest(rows: Tensor) -> Tensor:
    if rows.dim() > 1 and len(rows) > 1:
        rows = rows.flatten(1)
        rows = rows[:, (rows != rows[0]).any(0)]
    return rows.abs().max() if rows.numel() else rows.new_zeros(())


def tolerance(model: Any) -> float:
    """What roundings may make `off_by` on a few tokens, by the dtype of the model's table."""
    return _roundings({model.get_input_embeddings().weight.dtype})


def _roundings(dtypes: set[torch.dtype]) -> float:
    """What they may make `off_by` on a few tokens, with room for TF32."""
    return 0.1 if dtypes & {torch.float16, torch.bfloat16} else 3e-3


def _lengths(config: Any) -> tuple[int, int]:
    """Of the two texts: one is longer than a block, where attention goes by small ones (LongT5's)."""
    sizes = [value for name, value in config.to_dict().items() if name.endswith("block_size") and type(value) is int]
    return max([TEXTS[0], *(size + 2 for size in sizes if size <= 64)]), TEXTS[1]


def _types_of(model: Any, n: int, device: torch.device) -> Tensor | None:
    """Token types of a text's first n rows, of both kinds; None where the model takes none, or knows one kind alone.

    They may be in its mask (HrmText's prefixes), and not only among its embeddings.
    """
    takes = "token_type_ids" in inspect.signature(model.forward).parameters
    if not takes or getattr(model.config, "type_vocab_size", 2) < 2:
        return None
    return (torch.arange(n, device=device) % 3 < 2).long()


@contextlib.contextmanager
def _dtypes_of_outputs(model: nn.Module, found: set[torch.dtype]) -> Iterator[None]:
    """Into `found`, those of what the modules with parameters give: autocast in a forward shows in no other way."""

    def see(module: nn.Module, args: Any, out: Any) -> None:
        if torch.is_tensor(out):
            found.add(out.dtype)

    parts = (one for one in model.modules() if any(True for _ in one.parameters(recurse=False)))
    hooks = [one.register_forward_hook(see) for one in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _last(outputs: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of `outputs`, as many last rows as there are of the others."""
    return {name: value[max(len(value) - len(others.get(name, value)), 0) :] for name, value in outputs.items()}


def _shared(outputs: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """`outputs`, but what is below the head where it is below the other's, too."""
    return {name: value for name, value in outputs.items() if name in others or name != BELOW}


def _of_row(
    out: Any, row: int, place: slice, columns: int, columnwise: set[Path], of_columns: bool
) -> dict[str, Tensor]:
    """The outputs of one row of the batch; where they are one per column, as `columnwise` are, those in `place`."""
    found = {}
    for name, value in out.items():
        if torch.is_tensor(value) and value.is_floating_point() and value.dim() >= 2 and row < len(value):
            value = value[row].float()
            if (name,) in columnwise and value.shape[0] == columns:
                found[name] = value[place]
            elif not of_columns:
                found[name] = value
    return found


def takes_additive_mask(model: Any) -> bool:
    """Whether `model` may be given its padding mask as its attention adds it to its scores, [B, 1, 1, S].

    Of a mask [B, S] an encoder asks at every step whether there is any padding, for which the host waits, and builds
    [B, 1, S, S] from it where there is; every layer then turns that into numbers again. None of this is left. For full
    attention in every layer: a causal model or one with sliding windows would take such a mask, too, and be silently
    wrong. An architecture of which that is known is probed with three tokens.
    """
    family = family_of(model)
    if family is None or not family.full_attention or getattr(model.config, "is_decoder", False):
        return False
    if model.base_model is not model or model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    with quietly(model):
        ids = torch.tensor([[1, 2, 3], [3, 1, 2]], device=device_of(model.get_input_embeddings()))
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]], device=ids.device)
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        added = torch.where(mask == 0, torch.finfo(hidden.dtype).min, 0.0).to(hidden.dtype)[:, None, None]
        same = model(input_ids=ids, attention_mask=added).last_hidden_state
    real = mask != 0
    return torch.allclose(same[real], hidden[real], rtol=1e-3, atol=1e-3)
