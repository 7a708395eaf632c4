"""P-tuning v1: the prompt is what a small network makes of its parameters (Liu et al. 2021, arXiv 2103.10385)."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PromptEncoder"]


class PromptEncoder(nn.Module):
    """`kind="mlp"`: three linear layers with ReLU between; `"lstm"`: a bidirectional LSTM and two linear layers.

        [m, d] or [K, m, d]  ──  encoder  ──  the same shape

    The layers and their names are PEFT's (its `PromptEncoder`), so that one can be read as the other.

    Args:
        d: width of a prompt row, in and out.
        hidden_size: width between, by default d.
        num_layers, dropout: of the LSTM.
    """

    def __init__(self, kind: str, d: int, hidden_size: int | None = None, num_layers: int = 2, dropout: float = 0.0):
        super().__init__()
        hidden_size = d if hidden_size is None else hidden_size
        if hidden_size < 1 or num_layers < 1 or not 0 <= dropout <= 1:
            raise ValueError(
                "encoder_hidden_size and encoder_num_layers must be 1 or more and encoder_dropout between 0 and 1; "
                f"they are {hidden_size}, {num_layers} and {dropout}"
            )
        widths: tuple[int, ...]
        self.lstm_head: nn.LSTM | None = None
        if kind == "mlp":
            widths = (d, hidden_size, hidden_size, d)
        elif kind == "lstm":
            self.lstm_head = nn.LSTM(d, hidden_size, num_layers, dropout=dropout, bidirectional=True, batch_first=True)
            widths = (2 * hidden_size, 2 * hidden_size, d)
        else:
            raise ValueError(f"encoder must be None, 'mlp' or 'lstm'; it is {kind!r}")
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.mlp_head = nn.Sequential(*layers[:-1])
        self.d = d
        self.settings: dict[str, Any] = {
            "kind": kind,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "dropout": dropout,
        }

    def forward(self, parameters: Tensor) -> Tensor:
        """The prompt."""
        x = parameters if self.lstm_head is None else self.lstm_head(parameters)[0]
        return self.mlp_head(x)

    def as_read(self) -> "PromptEncoder":
        """What a file makes of this one: its settings and its parameters, and nothing else that was put there.

        Raises:
            RuntimeError: its parameters are not those that it began with, in names or in shapes.
        """
        with torch.device("meta"):
            one = PromptEncoder(d=self.d, **self.settings)
        one.load_state_dict(self.state_dict(), assign=True)
        return one.eval()
