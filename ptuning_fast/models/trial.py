"""A model called on trial: with a few ordinary tokens, in eval mode, and with no trace left in it."""

import contextlib
import inspect
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..op import Batch
from .embedding import device_of
from .families import drop_own_hooks
from .info import has_decoder

__all__ = [
    "BELOW",
    "Path",
    "autocast_of",
    "call",
    "held_by",
    "is_changed",
    "is_read",
    "one_at_a_time",
    "ordinary_tokens",
    "padded",
    "per_column",
    "quietly",
    "short_text",
    "state",
    "tensors_of",
]

Path = tuple[Any, ...]
Held = list[tuple[dict[str, Any], dict[str, Any]]]


@contextlib.contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in eval mode and nothing is differentiated; afterwards each of its modules is as it was.

    That is more than its mode: some models change themselves in a forward (BigBird, given a short text, attends fully
    from then on; rotary positions grow with what they have seen; a classifier's config keeps what kind of labels it was
    given). One thread at a time: another would find a model that is in eval mode for the first one's sake, and leave it
    so; who changes a model for good holds `one_at_a_time` meanwhile, as it would be put back.

    Somebody's own hooks on layers, which may collect what batches give, see nothing of it. (Those on a model itself and
    on its head make its outputs what they are.)
    """
    devices = {one.device.type for one in model.parameters()} - {"meta"} or {"cpu"}  # the former: offloaded
    with one_at_a_time, torch.no_grad(), torch.autocast(min(devices), enabled=False):
        before = held_by(model)
        with _put_back(before), _put_back(before):  # again, where Ctrl-C has stopped the first in the middle
            model.eval()
            for module in model.modules():
                config: Any = getattr(module, "config", None)
                if getattr(config, "return_dict", True) is False:  # outputs are looked at by their names
                    config.return_dict = True
                # In eval mode bitsandbytes packs 4-bit weights anew for a CPU, and they have no gradient from then on.
                module.training = any(not one.is_floating_point() for one in module.parameters(recurse=False))
            layers = [part for one in model.modules() if isinstance(one, nn.ModuleList) for part in one.modules()]
            drop_own_hooks(*layers)
            yield


one_at_a_time = threading.RLock()


@contextlib.contextmanager
def _put_back(before: Held) -> Iterator[None]:
    try:
        yield
    finally:
        for held, contents in before:
            for key in held.keys() - contents.keys():
                del held[key]
            for key, (value, items) in contents.items():
                held[key] = value
                if items is not None and _exchanged(value, items):
                    value.clear()
                    value.update(items)


def held_by(model: nn.Module) -> Held:
    """What the modules of `model` and their configs hold now, beside their parameters."""
    modules = list(model.modules())
    configs = {id(one): one for module in modules if hasattr(one := getattr(module, "config", None), "__dict__")}
    return [(vars(one), _contents(vars(one))) for one in (*modules, *configs.values())]


def is_changed(before: Held) -> bool:
    """Whether a model holds anything else than `before`, such as what it keeps from one call for the next."""
    return any(
        held.keys() != contents.keys()
        or any(
            held[key] is not value or (items and _exchanged(value, items)) for key, (value, items) in contents.items()
        )
        for held, contents in before
    )


def _exchanged(now: dict, before: dict) -> bool:
    return now.keys() != before.keys() or any(now[key] is not value for key, value in before.items())


def _contents(held: dict[str, Any]) -> dict[str, tuple[Any, dict | None]]:
    """Each attribute of a module or config, and what is in those that are dictionaries (buffers, submodules).

    But for its parameters: those of FSDP are exchanged in a forward, and it keeps the account.
    """
    return {
        key: (value, dict(value) if isinstance(value, dict) and key != "_parameters" else None)
        for key, value in held.items()
    }


def ordinary_tokens(config: Any, V: int, count: int) -> list[int]:
    """`count` different ids that mean nothing special."""
    special = {value for key, value in config.to_dict().items() if key.endswith("token_id") and isinstance(value, int)}
    ordinary = [token for token in range(V - 1, -1, -1) if token not in special]
    step = max(len(ordinary) // (2 * count), 1)
    return (ordinary[len(ordinary) // 4 :: step] + ordinary)[:count]


def short_text(model: Any, n: int = 6) -> tuple[Tensor, Tensor]:
    """[1, n] ids, and labels of some of them, at distances that do not repeat."""
    device = device_of(model.get_input_embeddings())
    ids = torch.tensor([ordinary_tokens(model.config, model.config.get_text_config().vocab_size, n)], device=device)
    labelled = [place for place in (3, 5, 6, 17, 21, 22) if place < ids.shape[1]]
    labels = torch.full_like(ids, -100)
    labels[:, labelled] = ids[:, labelled]
    return ids, labels


def autocast_of(device: torch.device) -> torch.autocast:
    """Autocast as it is now, for where a trial is to be as the call (some models fail without it)."""
    return torch.autocast(device.type, torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type))


def padded(rows: list[list[int]], side: str, padding: int, device: torch.device) -> Batch:
    """Texts as a batch [B, n], padded with the token `padding` on one side."""
    n = max(map(len, rows))
    ids, mask = torch.full((len(rows), n), padding, device=device), torch.zeros(len(rows), n, device=device).long()
    for row, text in enumerate(rows):
        place = slice(0, len(text)) if side == "right" else slice(n - len(text), n)
        ids[row, place], mask[row, place] = torch.tensor(text, device=device), 1
    return Batch(ids, mask)


def call(model: Any, inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """The outputs of the model, and of what is below its head, which may not show anything (a new one is often 0).

    Of copies of `inputs`, as some models write into the embeddings that they are given (GIT, CTRL).
    """
    inputs = {name: one.clone() if torch.is_tensor(one) else one for name, one in inputs.items()}
    if has_decoder(model):  # without a cache, as in training: FSMT has another mask then
        inputs = inputs | {"decoder_input_ids": ids.new_tensor([[0, 1, 2]]).expand(len(ids), -1)}
        inputs |= {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    below, thread = [], threading.get_ident()

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        if threading.get_ident() == thread:
            below.append(out)

    hook = model.base_model.register_forward_hook(keep)
    try:
        outputs = dict(model(**inputs).items())
    finally:
        hook.remove()
    if model.base_model is not model and below and "last_hidden_state" in below[-1]:
        outputs[BELOW] = below[-1]["last_hidden_state"]
    return outputs


def state(outputs: dict[str, Any]) -> Tensor:
    """Of these, [B, n, d] or [B, n, V]."""
    return outputs.get(BELOW, outputs.get("logits", next(iter(outputs.values()))))


def tensors_of(outputs: Any, *path: Any) -> Iterator[tuple[Path, Tensor]]:
    """Each tensor among `outputs`, behind the names and numbers by which it is found there."""
    if torch.is_tensor(outputs):
        yield path, outputs
    elif isinstance(outputs, Mapping):
        for name, one in outputs.items():
            yield from tensors_of(one, *path, name)
    elif isinstance(outputs, (tuple, list)):
        for place, one in enumerate(outputs):
            yield from tensors_of(one, *path, place)


def per_column(outputs: Any, n: int, B: int = 1) -> set[Path]:
    """Which outputs have a row or a number for each of n columns of B texts (or n of something else, by chance)."""
    return {path for path, one in tensors_of(outputs) if one.shape[:2] == (B, n)}


BELOW = "last_hidden_state, below the head"


def is_read(model: Any, inputs: dict[str, Any], batch: Batch, given: dict[str, Any], name: str) -> bool | None:
    """Whether `given[name]`, a tensor of real numbers and an argument of the forward, changes anything behind `inputs`.

    Some models take images or audio with ids alone (Voxtral, Qwen2-Audio, Phi-4).

    Returns:
        None where it changes nothing with the batch's ids either, or a call behind `inputs` fails, as its own will.

    Raises:
        Exception: whatever the model says of the same arguments with ids, where it changes nothing behind `inputs`.
    """
    own = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    own |= {"token_type_ids": batch.token_type_ids}
    ids = {key: value for key, value in own.items() if value is not None}
    other = torch.arange(given[name].numel(), device=given[name].device).sin().view_as(given[name]).to(given[name])

    def changes(inputs: dict[str, Any]) -> bool:
        found = [state(call(model, inputs | given | {name: one}, batch.input_ids)) for one in (given[name], other)]
        return not torch.equal(*(one.nan_to_num() for one in found))

    cast = autocast_of(batch.input_ids.device)
    with quietly(model), cast:
        try:
            if changes(inputs):
                return True
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return None
        return False if changes(ids) else None
