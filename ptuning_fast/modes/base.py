"""What a mode is: how a batch behind a prompt is laid out, and the arguments that the model then gets.

    mode = MODES[name](model, info)                       checks the model, once; TypeError where it cannot be served so
    mode.obstacle(model, prompt)                          what stands against it at this call
    embedded = mode.embed(model, batch, prompt, layout)   the op, in the mode's layout
    inputs = mode.inputs(model, embedded, prompt)         model(**inputs)

A mode does not hold the model: copies and pickles of what holds a mode stay small.
"""

import warnings
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..models.families import family_of
from ..models.info import ModelInfo, unwrapped
from ..models.probe import Outcome, Served, probe
from ..op import Batch, Embedded, Layout, Prompt

__all__ = ["LaidOut", "Mode"]


class Mode:
    """The interface, and what the modes have in common."""

    name: str
    packed = False  # whether sequences share a row: then outputs and labels are one per column, and nothing else

    def __init__(self, model: nn.Module, info: ModelInfo):
        self.info = info

    def obstacle(self, model: Any, prompt: Prompt) -> str | None:
        """Why the model as it stands now (training, dropout), or this prompt, cannot be served so; None if it can."""
        return None

    def embed(self, model: Any, batch: Batch, prompt: Prompt, layout: Layout) -> Embedded:
        """The op over the model's embedding; `layout` has what the mode leaves open (`lengths`, `additive_mask`)."""
        raise NotImplementedError

    def inputs(self, model: Any, embedded: Embedded, prompt: Prompt) -> dict[str, Any]:
        """The keyword arguments for `model(...)`."""
        raise NotImplementedError

    def places(self, batch: Batch, embedded: Embedded, m: int) -> tuple[list[tuple[int, slice]], int]:
        """Where the outputs of each text stand, (row, columns), and how many columns a row of outputs has.

        In a packed row with those of its virtual tokens, which would be the first to see the text before.
        """
        raise NotImplementedError

    def of_tokens(self, rows: Tensor, inputs: dict[str, Any], batch: Batch, m: int) -> Tensor:
        """[B, n, ...]: of what a model gives for each row of `inputs`, that of the tokens, column by column."""
        raise NotImplementedError

    def of_attention(self, weights: Tensor, batch: Batch, m: int) -> Tensor:
        """[B, heads, m + n, m + n] attention weights, their columns in the order of the batch's."""
        return weights

    def probe(self, model: nn.Module) -> bool:
        """Probe an architecture that has no row in the table: whether padding on the left changes a text's outputs.

        Warns where padding on the right does.

        Raises:
            TypeError: a model that makes something else of virtual tokens than of the ids that they stand for.
        """
        inner = unwrapped(model)
        if family_of(inner) is not None:
            return False
        with warnings.catch_warnings():
            for said in ("the input embedding", "the pooler_output"):  # at the call itself
                warnings.filterwarnings("ignore", message=said)
            found = self.probe_always(inner)
        most, name = found.most, self.info.name
        if found.alone is None:
            warnings.warn(
                f"{name} could not be probed ({found.error}): nothing says that a text's outputs in a padded batch are "
                "those of the text alone, so give it batches of texts of one length",
                stacklevel=6,
            )
            return False
        if found.alone > most:
            raise TypeError(
                f"{name} makes something else of inputs_embeds than of the input_ids that they stand for (probed in "
                f"mode={self.name!r}: outputs off by {found.alone:.2g} of the largest), so a prompt would not stand "
                "before what it was trained on" + ("" if self.name == "prepend" else ": take mode='prepend'")
            )
        if found.right is not None and found.right > most:
            warnings.warn(
                f"the outputs of {name} depend on the padding beside a text (off by {found.right:.2g} of the "
                "largest): give it batches of texts of one length for the outputs of each text alone",
                stacklevel=6,
            )
            return False
        return found.left is not None and found.left > most

    def probe_always(self, model: nn.Module) -> Outcome:
        """What comes out of this mode, whether the architecture has a row or not."""

        def serve(prompt: Prompt, batch: Batch) -> Served:
            embedded = self.embed(model, batch, prompt, Layout())
            places, columns = self.places(batch, embedded, len(prompt.vectors))
            return Served(self.inputs(model, embedded, prompt), places, columns)

        return probe(model, serve, self.packed)


class LaidOut(NamedTuple):
    """A batch behind m virtual tokens: in which mode, its rows [B, n], and the arguments of the model."""

    mode: Mode
    batch: Batch
    m: int
    inputs: dict[str, Any]


def places_in_rows(attention_mask: Tensor, kept: int) -> tuple[list[tuple[int, slice]], int]:
    """The places of texts in rows that begin with `kept` columns of virtual tokens."""
    first = (attention_mask != 0).int().argmax(1).tolist()
    ends = [start + length for start, length in zip(first, (attention_mask != 0).sum(1).tolist())]
    places = [(row, slice(kept + start, kept + end)) for row, (start, end) in enumerate(zip(first, ends))]
    return places, kept + attention_mask.shape[1]
