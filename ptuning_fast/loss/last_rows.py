"""The last layer's feed-forward on some rows alone, where nobody reads what comes out of the others.

    last layer   attention [B, S, d]  ──  feed-forward [B, L, d]  ──  head [B, L, V]

A feed-forward, experts or not, treats each row by itself, and behind it so do the norm and the head. Which part of the
layer does is probed, not known by its name: it is in none.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..models.info import unwrapped
from ..models.probe import off_by, tolerance
from ..models.replaced import Called, gives_more, is_plain, on_the_way, what_draws, with_module
from ..models.trial import quietly

__all__ = ["LastRows"]


class LastRows:
    """What of a model's last layer can be left to some rows.

    Args:
        model: as it is called; a wrapper of PEFT's, too.
        inputs: a call of it that gives a loss, short, with `logits_to_keep`, the columns that are read.
    """

    def __init__(self, model: Any, inputs: dict[str, Any]):
        self.path: list[str] = []
        self.around: list[nn.Module] = []
        inner = unwrapped(model)
        with quietly(inner):
            layer = _last_layer(inner.base_model)
            parts = [] if layer is None else sorted(layer.children(), key=_size, reverse=True)
            for part in parts[:2]:  # attention and feed-forward, whichever is larger
                path = next(name for name, module in model.named_modules() if module is part).split(".")
                if _goes_by_rows(model, path, inputs):
                    self.path, self.around = path, _around(model, path)
                    return

    def of(self, model: Any, columns: Tensor, count: int) -> Any:
        """`model`, or a copy that shares all it has and whose outputs are right in `columns` [L] of `count` alone."""
        if not self.path or not 0 < 2 * len(columns) <= count or gives_more(unwrapped(model)):
            return model
        try:
            around = _around(model, self.path)
        except (KeyError, StopIteration):  # the model has other layers now
            return model
        same = len(around) == len(self.around) and all(one is other for one, other in zip(around, self.around))
        part = on_the_way(model, self.path)[-1]
        if not same or not is_plain(around) or what_draws(part) is not None:
            return model

        def on_columns(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return _placed(part(hidden[:, columns], *args, **kwargs), columns, hidden, 0.0)

        return with_module(model, self.path, Called(on_columns))


def _placed(some: Tensor, columns: Tensor, hidden: Tensor, rest: float) -> Tensor:
    """[B, S, e]: the rows `some` [B, L, e] in `columns` [L], and `rest` in those others that `hidden` [B, S, d] has."""
    return some.new_full((*hidden.shape[:2], *some.shape[2:]), rest).index_copy(1, columns, some)


def _last_layer(base: nn.Module) -> nn.Module | None:
    stacks = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return max(stacks, key=_size)[-1] if stacks else None


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _around(model: Any, path: list[str]) -> list[nn.Module]:
    """Those on the way to the part, all of the last layer and the last of its stack, and what stands beside the layers.

    What is read behind the part is among them.
    """
    way = on_the_way(model, path)
    stack, layers = next((place, one) for place, one in enumerate(way) if isinstance(one, nn.ModuleList))
    beside = [child for one in way[:stack] for child in one.children() if child not in way]
    embedding = unwrapped(model).get_input_embeddings()  # which gradient checkpointing hooks
    inside = [module for one in (*beside, layers[-1]) if one is not embedding for module in one.modules()]
    return [*way, *inside]


def _goes_by_rows(model: Any, path: list[str], inputs: dict[str, Any]) -> bool:
    """Whether the part at `path` gives some rows alone the same, and the loss reads none of the others."""
    columns, part, off = inputs["logits_to_keep"], on_the_way(model, path)[-1], []

    def on_columns(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        whole, some = part(hidden, *args, **kwargs), part(hidden[:, columns], *args, **kwargs)
        off.append(off_by([{"rows": some}], [{"rows": whole[:, columns]}]))
        return _placed(some, columns, hidden, float("nan"))

    try:
        expected = model(**inputs).loss
        loss = with_module(model, path, Called(on_columns))(**inputs).loss
    except Exception:  # whatever a part makes of fewer rows
        return False
    return bool(off) and max(off) <= tolerance(unwrapped(model)) and torch.allclose(loss, expected, rtol=2e-3)
