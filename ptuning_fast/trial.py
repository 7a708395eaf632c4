"""Trying a model out, on a few tokens, to find out what its name does not say. It leaves no trace in the model."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["is_known", "off_by", "ordinary_tokens", "outputs_alone_and_padded", "tolerance", "trial"]

# What tests/zoo.py shows to be served as promised. Everything else is tried out before it is served.
_KNOWN = {"albert", "bart", "bert", "bloom", "deberta-v2", "distilbert", "electra", "gemma", "gemma2", "gemma3_text"}
_KNOWN |= {"gpt2", "llama", "mistral", "modernbert", "mpnet", "opt", "phi", "qwen2", "roberta", "t5", "xlm-roberta"}


def is_known(model: nn.Module) -> bool:
    """Whether `model` is of an architecture that the tests cover, and its code transformers' own."""
    return model.config.model_type in _KNOWN and type(model).__module__.startswith("transformers.")


@contextlib.contextmanager
def trial(model: nn.Module):
    """Inside, `model` is in eval mode and nothing is differentiated; each module's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def outputs_alone_and_padded(model: nn.Module, inputs_for: Callable, length: int) -> dict[str, list] | None:
    """What `model` says of two short texts, prompt included: alone by their ids, and in batches with the prompt.

    Args:
        inputs_for: (prompt [length, d], input_ids [2, n], attention_mask [2, n]) -> keyword arguments of `model`, and
            the columns of the prompt that its outputs have.
        length: rows of the prompt to try, which are those of `length` ordinary tokens.

    Returns:
        {"ids": ..., "alone": ..., "right": ..., "left": ...}, the latter two padded on that side: for each text a dict
        of outputs, those of its tokens or of the whole text, or None where the model refuses that; None at all where
        the model cannot be called with ids alone.
    """
    table = model.get_input_embeddings()
    if type(table.weight) not in (Tensor, nn.Parameter):  # sharded or quantised: no place for trials
        return None
    device = table.weight.device
    tokens = ordinary_tokens(model.config, table.weight.shape[0], length + 6)
    first, texts = tokens[:length], [tokens[length:], tokens[length : length + 3]]
    found = {}
    with trial(model):
        try:
            found["ids"] = []
            for text in texts:
                ids = torch.tensor([first + text], device=device)
                out = _call(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids)
                found["ids"].append(_of_row(out, 0, slice(length, None), length + len(text)))
            prompt = table(torch.tensor(first, device=device)).float()
        except Exception:  # whatever a model that needs more than ids does
            return None

        def run(rows, side):
            n = max(map(len, rows))
            ids, mask = torch.full((len(rows), n), tokens[0], device=device), torch.zeros(len(rows), n, device=device)
            for row, text in enumerate(rows):
                place = slice(0, len(text)) if side == "right" else slice(n - len(text), n)
                ids[row, place], mask[row, place] = torch.tensor(text, device=device), 1
            try:
                inputs, kept = inputs_for(prompt, ids, mask.long())
                out = _call(model, inputs, ids)
            except (ValueError, TypeError, IndexError, RuntimeError, NotImplementedError, AttributeError):
                return [None] * len(rows)
            places = [
                slice(kept, kept + len(text)) if side == "right" else slice(kept + n - len(text), kept + n)
                for text in rows
            ]
            return [_of_row(out, row, place, kept + n) for row, place in enumerate(places)]

        found["alone"] = [run([text], "right")[0] for text in texts]
        found["right"], found["left"] = run(texts, "right"), run(texts, "left")
    return found


def off_by(actual: list[dict | None], expected: list[dict | None]) -> float:
    """The largest difference, relative to the largest output of its name; infinite where they do not compare."""
    worst = 0.0
    for one, other in zip(actual, expected):
        if one is None or other is None or one.keys() != other.keys():
            return float("inf")
        for name, value in one.items():
            if value.shape != other[name].shape:
                return float("inf")
            scale = other[name].abs().max().clamp(min=1e-6)
            worst = max(worst, ((value - other[name]).abs().max() / scale).item()) if value.numel() else worst
    return worst


def tolerance(model: nn.Module) -> float:
    """What roundings may make `off_by` on a few tokens, with room for TF32."""
    dtype = model.get_input_embeddings().weight.dtype
    return 0.1 if dtype in (torch.float16, torch.bfloat16) else 3e-3


def ordinary_tokens(config, V: int, count: int) -> list[int]:
    """`count` different ids that mean nothing special."""
    special = {value for key, value in config.to_dict().items() if key.endswith("token_id") and isinstance(value, int)}
    ordinary = [token for token in range(V - 1, -1, -1) if token not in special]
    step = max(len(ordinary) // (2 * count), 1)
    return (ordinary[len(ordinary) // 4 :: step] + ordinary)[:count]


def _call(model, inputs, ids):
    if model.config.is_encoder_decoder:
        inputs = inputs | {"decoder_input_ids": ids.new_tensor([[0, 1, 2]]).expand(len(ids), -1)}
    return model(**inputs)


def _of_row(out, row, place, columns):
    """The outputs of one row of the batch; where they are one per column, those of its own columns."""
    found = {}
    for name, value in out.items():
        if torch.is_tensor(value) and value.is_floating_point() and value.dim() >= 2:
            value = value[row].float()
            per_column = value.dim() > 1 or name in ("start_logits", "end_logits")
            found[name] = value[place] if per_column and value.shape[0] == columns else value
    return found
