"""A model's own loss on a batch that is laid out behind a prompt, by as little work as gives the same."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..models.embedding import are_several
from ..models.families import hooks_of
from ..models.info import ModelInfo, output_embeddings, unwrapped
from .chunks import has_chunks, in_chunks, is_large
from .kinds import is_of_tokens, is_of_transformers, picks_by_mask, warn_of_own, warn_of_own_forward
from .labelled import keeps_labelled_rows, last_rows, on_labelled_rows, predicting

__all__ = ["ModelLoss"]

Found = TypeVar("Found")


class ModelLoss:
    """It keeps what has been found out of a model's loss, and does not hold the model."""

    def __init__(self, info: ModelInfo):
        self.info = info
        self._found: dict[str, tuple[list[Any], Any]] = {}  # by which check: with which parts of the model, and what

    def find(self, check: Callable[[Any, ModelInfo], Found], model: Any) -> Found:
        """What `check` finds out of the model, once for each loss function, head, forwards and hooks that it has."""
        inner = unwrapped(model)
        head = output_embeddings(inner)
        parts = [getattr(inner, "loss_function", None), head]
        for one in (inner, head) if isinstance(head, nn.Module) else (inner,):
            parts += [type(one).forward, vars(one).get("forward"), *hooks_of(one)]
        found = self._found.get(check.__name__)
        same = found is not None and len(found[0]) == len(parts)
        if found is None or not same or any(one is not other for one, other in zip(found[0], parts)):
            found = self._found[check.__name__] = parts, check(model, self.info)
        return found[1]  # type: ignore[no-any-return]

    def known(self, check: Callable[[Any, ModelInfo], Found], model: Any, otherwise: Found) -> Found:
        """`find`; under torch.compile, which cannot trace a probe, `otherwise` where nothing was found before."""
        if torch.compiler.is_compiling() and check.__name__ not in self._found:
            return otherwise
        return self.find(check, model)

    def is_exact_in_one_row(self, model: Any, labels: Tensor | None, per_token: bool) -> bool:
        """Whether that is known of outputs, and of a loss of labels `per_token`, in a packed batch."""
        if labels is None:
            return is_of_transformers(model)
        return per_token and is_of_tokens(model) and not self.known(picks_by_mask, model, self.info.picks_labels)

    def check_in_one_row(self, model: Any, mode: str, per_token: bool) -> None:
        """ValueError for a loss of labels `per_token` that comes out otherwise there; a warning of what may."""
        if not per_token:
            self.known(warn_of_own_forward, model, None)
            return
        if self.known(picks_by_mask, model, self.info.picks_labels):
            raise ValueError(
                f"mode={mode!r}: the loss of {self.info.name} picks labels by attention_mask, which a packed batch has "
                "not: take mode='prepend', or compute it from the logits"
            )
        self.known(warn_of_own, model, None)

    def of(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """`model(**inputs).loss`, a scalar; where labels are one per column, on the rows alone that predict one."""
        shape = inputs["inputs_embeds"].shape[:2]
        if inputs["labels"].shape != shape or not is_of_tokens(model):  # as it is now, whatever it was when probed
            return model(**inputs).loss
        keeps = self.find(keeps_labelled_rows, model)
        called = model
        if keeps:
            called = self.find(last_rows, model).of(model, predicting(inputs["labels"])[1], shape[1])
        large = is_large(model, inputs)
        if (large or are_several()) and self.find(has_chunks, model) and large:  # a probe is one of all processes
            loss = in_chunks(called, inputs)
            if loss is not None:
                return loss
        return called(**(on_labelled_rows(inputs) if keeps else inputs)).loss
