"""What a variable-length attention is told beside queries, keys and values, in the groups that are handed on whole."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["Scores", "Sequences"]


class Sequences(NamedTuple):
    """Which of the T rows belong together."""

    cu_seq_lens: Tensor  # [B + 1] int32: the first row of each sequence, and T
    max_length: int  # rows of the longest; only the backends for GPUs ask for it
    prefix: int = 0  # rows of the first sequence, where every other sees it, as if each stood behind it


class Scores(NamedTuple):
    """What scores become before, and weights after the softmax."""

    causal: bool  # a row sees itself and those before it alone
    window: int | None = None  # rows as far away as this or farther are not seen
    scale: float | None = None  # factor on the scores; None: 1 / sqrt(e)
    softcap: float | None = None  # they become softcap * tanh(score / softcap), as in Gemma 2
    dropout: float = 0.0  # probability with which a weight is dropped
