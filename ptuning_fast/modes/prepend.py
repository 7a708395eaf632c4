"""Mode "prepend": the prompt in every row, [B, m + n], the layout that every model takes."""

import dataclasses
from typing import Any

from torch import Tensor, nn

from ..models.embedding import prepend
from ..models.info import ModelInfo
from ..op import Batch, Embedded, Layout, Prompt
from .base import Mode, places_in_rows

__all__ = ["Prepend"]


class Prepend(Mode):
    """m + n columns a row, the prompt next to the text; any model that takes `inputs_embeds`.

    Raises:
        TypeError: a model that makes something else of embeddings than of the ids that they stand for.
    """

    name = "prepend"

    def __init__(self, model: nn.Module, info: ModelInfo):
        super().__init__(model, info)
        if self.probe(model):
            self.info = dataclasses.replace(info, counts_columns=0)

    def embed(self, model: Any, batch: Batch, prompt: Prompt, layout: Layout) -> Embedded:
        info, mask = self.info, batch.attention_mask
        start, additive = info.positions_for(mask), layout.additive_mask
        layout = Layout(start, adjacent=info.adjacent, lengths=layout.lengths, additive_mask=additive)
        return prepend(model.get_input_embeddings(), info.turned(batch, prompt.vectors.shape[-2]), prompt, layout)

    def inputs(self, model: Any, embedded: Embedded, prompt: Prompt) -> dict[str, Any]:
        return embedded.as_inputs()

    def of_tokens(self, rows: Tensor, inputs: dict[str, Any], batch: Batch, m: int) -> Tensor:
        return self.info.turned_back(rows, batch, m)[:, m:]

    def of_attention(self, weights: Tensor, batch: Batch, m: int) -> Tensor:
        for dim in (2, 3):
            if weights.shape[dim] == m + batch.input_ids.shape[1]:  # not those of a window
                weights = self.info.turned_back(weights, batch, m, dim)
        return weights

    def places(self, batch: Batch, embedded: Embedded, m: int) -> tuple[list[tuple[int, slice]], int]:
        mask = self.info.turned(batch, m).attention_mask
        assert mask is not None
        return places_in_rows(mask, m)
