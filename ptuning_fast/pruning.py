"""Only the rows that are pooled leave the last layer: behind its attention, nothing else is computed."""

import contextlib

import torch
from torch import Tensor, nn

from .trial import trial

__all__ = ["pooled_rows_only", "prunable"]

# Where in the last layer the rows part: behind the attention, which needs them all, and before anything is added up.
# Post-norm encoders alone: where the residual goes past that point, it would keep all its rows (or be broadcast).
_LAST = {
    "BertModel": lambda model: model.encoder.layer[-1].attention.output,
    "RobertaModel": lambda model: model.encoder.layer[-1].attention.output,
    "XLMRobertaModel": lambda model: model.encoder.layer[-1].attention.output,
    "CamembertModel": lambda model: model.encoder.layer[-1].attention.output,
    "ElectraModel": lambda model: model.encoder.layer[-1].attention.output,
    "DebertaV2Model": lambda model: model.encoder.layer[-1].attention.output,
    "DistilBertModel": lambda model: model.transformer.layer[-1].sa_layer_norm,
}


def prunable(model: nn.Module) -> bool:
    """Whether `pooled_rows_only` is right for `model`: an architecture that is known, and tried out on three tokens."""
    if type(model).__name__ not in _LAST:
        return False
    with trial(model):
        table = model.get_input_embeddings()
        ids = torch.tensor([[1, 2, 3], [3, 1, 2]], device=table.weight.device)
        full = model(input_ids=ids).last_hidden_state[:, 1:2]
        with pooled_rows_only(model, torch.tensor([1, 1], device=ids.device)):
            pruned = model(input_ids=ids).last_hidden_state
    return pruned.shape == full.shape and torch.allclose(pruned, full, rtol=1e-3, atol=1e-3)


@contextlib.contextmanager
def pooled_rows_only(model: nn.Module, columns: Tensor):
    """Inside, `last_hidden_state` has the pooled rows alone.

    Args:
        columns: [B], the column of each batch row: [B, 1, d] comes out. Of a packed batch [1, T], the rows that are
            pooled: [1, len(columns), d].
    """

    def select(rows):
        if len(rows) == len(columns):
            return rows.take_along_dim(columns[:, None, None], 1)
        return rows[:, columns]

    hook = _LAST[type(model).__name__](model).register_forward_pre_hook(
        lambda module, arguments: tuple(select(rows) for rows in arguments)
    )
    try:
        yield
    finally:
        hook.remove()
