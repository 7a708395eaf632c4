"""The op over a model's own input embedding: read directly where that is exact, called as it is everywhere else."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..op import Batch, Embedded, Layout, Prompt, embed, embed_plainly
from ..op.checks import check, raise_for_ids
from .families import class_of

__all__ = ["are_several", "device_of", "is_sharded", "prepend", "rows_of", "unreadable"]


_TRAINABLE = "its weight requires grad (freeze the model: model.requires_grad_(False))"


def prepend(embedding: nn.Module, batch: Batch, prompt: Prompt, layout: Layout) -> Embedded:
    """The op with the rows that `embedding(input_ids)` gives, scaled as it scales them.

    The table of a plain `nn.Embedding`, or of one of transformers' scaled ones, is read by the kernel; where FSDP2 has
    sharded it, after it has been gathered, with a warning. Whatever else a model has (hooks, `max_norm`, quantised,
    offloaded or trainable weights, another class) is called, and the rows are put together by plain torch operations,
    with one warning that says why.
    """
    obstacle = unreadable(embedding)
    if obstacle is None:
        weight: Any = embedding.weight
        if is_sharded(weight):
            warnings.warn(
                f"the input embedding ({type(embedding).__name__}) is sharded: its table is gathered at every call",
                stacklevel=2,
            )
            weight = weight.full_tensor()
        start, _, adjacent, packed, lengths, additive_mask = layout
        layout = Layout(start, embed_scale(embedding), adjacent, packed, lengths, additive_mask)
        return embed(batch, weight, prompt, layout)
    warnings.warn(
        f"the input embedding ({type(embedding).__name__}) is called, not read by the fused kernel: {obstacle}",
        stacklevel=2,
    )
    plain: Any = embedding.weight.detach() if type(embedding) is nn.Embedding and obstacle == _TRAINABLE else None
    if plain is not None:
        check(batch, plain, prompt, layout)
    try:
        rows = embedding(batch.input_ids)
    except IndexError:
        if plain is not None:
            raise_for_ids(batch, plain, prompt, packed=False)
        raise
    places = torch.arange(batch.input_ids.numel(), device=rows.device).view(batch.input_ids.shape)
    return embed_plainly(Batch(places, *batch[1:]), rows.flatten(0, 1), prompt, layout)


def device_of(embedding: Any) -> torch.device:
    """Where ids for `embedding` go: an offloaded table is on no device, and whoever brings it in takes them along."""
    device: torch.device = embedding.weight.device
    return torch.device("cpu") if device.type == "meta" else device


def rows_of(embedding: Any, ids: Tensor) -> Any:
    """What `embedding(ids)` returns; a table that FSDP2 has sharded is gathered, by all processes at once."""
    if is_sharded(embedding.weight) and unreadable(embedding) is None:
        return F.embedding(ids, embedding.weight.full_tensor()) * embed_scale(embedding)
    return embedding(ids)


def unreadable(embedding: Any) -> str | None:
    """Why `embedding.weight[ids] * scale` might not be what `embedding(ids)` returns, or None where it is."""
    kind = class_of(embedding)
    hooks: Any = ()
    if embedding._forward_hooks or embedding._forward_pre_hooks:
        hooks = [*embedding._forward_hooks.values(), *embedding._forward_pre_hooks.values()]
        # What gradient checkpointing adds makes the rows require grad, and those behind a prompt do; FSDP2's gather.
        hooks = [hook for hook in hooks if getattr(hook, "__name__", "") != "make_inputs_require_grads"]
        hooks = [hook for hook in hooks if type(getattr(hook, "__self__", None)).__name__ != "FSDPState"]
    if kind is not nn.Embedding:
        scaled = kind.__name__.endswith(_SCALED) and kind.__module__.startswith("transformers.")
        if not (issubclass(kind, nn.Embedding) and scaled):
            return "it is not a plain nn.Embedding"
    if hooks or "forward" in vars(embedding) or nn.Embedding.forward.__module__ != nn.Embedding.__module__:
        return "it has hooks, or a forward of its own"
    everywhere = nn.modules.module
    if (
        everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    ):
        return "there are hooks on every module"
    if embedding._backward_hooks or embedding._backward_pre_hooks:
        return "it has backward hooks"
    if embedding.max_norm is not None:
        return f"max_norm={embedding.max_norm} renormalises rows as they are looked up"
    weight = embedding.weight
    if type(weight) not in (nn.Parameter, Tensor) and not is_sharded(weight):
        return f"its weight is a {type(weight).__name__}"
    if weight.device.type == "meta" or hasattr(weight, "ds_id"):
        return "its weight is not on this device as a whole"
    if weight.requires_grad and torch.is_grad_enabled():
        return _TRAINABLE
    return None


def is_sharded(tensor: Any) -> bool:
    """Whether FSDP2 has parted it: a DTensor, whose class takes long to import."""
    return hasattr(tensor, "full_tensor")


# transformers' embeddings that multiply by `embed_scale` and do nothing else (Bart, Gemma 3, ... ).
_SCALED = "ScaledWordEmbedding"


def embed_scale(embedding: Any) -> float:
    """The factor on the rows of a readable embedding, as exact as its own forward applies it."""
    scale = getattr(embedding, "embed_scale", 1.0)
    if isinstance(scale, Tensor):
        # Gemma's is a buffer, cast to the weight's dtype; its value is also kept as a number, which costs no sync.
        number = embedding.scalar_embed_scale if hasattr(embedding, "scalar_embed_scale") else scale.item()
        scale = torch.tensor(number, dtype=embedding.weight.dtype).item()
    return scale


def are_several() -> bool:
    """Whether this is one process of several, which must make each forward of a sharded model together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
