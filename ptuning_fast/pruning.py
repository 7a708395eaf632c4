"""Only the rows that are pooled leave the last layer: behind its attention, nothing else is computed.

On a CPU nothing is in its attention either (pooled_attention.py).
"""

import contextlib
import functools
import threading
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .patching import is_untouched, replaced_forward
from .pooled_attention import attend, is_understood
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
_BERTS = {"BertModel", "CamembertModel", "ElectraModel", "RobertaModel", "XLMRobertaModel"}


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


_locks = WeakKeyDictionary()  # of the models that are changed, each for one forward of one thread


@contextlib.contextmanager
def pooled_rows_only(model: nn.Module, columns: Tensor):
    """Inside, `last_hidden_state` has the pooled rows alone.

    Args:
        columns: [B], the column of each batch row: [B, 1, d] comes out. Of a packed batch [1, T], the rows that are
            pooled: [1, len(columns), d].
    """

    columns = columns.long()
    lock, owner = _locks.setdefault(model, threading.RLock()), threading.get_ident()

    def elsewhere():
        return threading.get_ident() != owner

    chosen = [None, None]  # the last hidden state that was selected from, and its rows: attention and residual share it

    def select(rows):
        if chosen[0] is not rows:
            one_a_row = len(rows) == len(columns)
            chosen[:] = rows, rows.take_along_dim(columns[:, None, None], 1) if one_a_row else rows[:, columns]
        return chosen[1]

    with lock, contextlib.ExitStack() as changes:
        rest = _LAST[type(model).__name__](model)
        attention = _self_attention(model)
        if attention is None:

            def part(module, arguments):
                return arguments if elsewhere() else tuple(select(rows) for rows in arguments)

        else:
            pooled = functools.partial(_pooled_attention, attention, select)
            changes.enter_context(replaced_forward(attention, pooled))

            def part(module, arguments):
                return arguments if elsewhere() else (arguments[0], select(arguments[1]))

        changes.callback(rest.register_forward_pre_hook(part).remove)
        yield


def _self_attention(model):
    """The last layer's, where it can be computed for the pooled rows alone; else None."""
    if model.device.type != "cpu" or type(model).__name__ not in _BERTS:
        return None
    attention = model.encoder.layer[-1].attention.self
    return attention if is_understood(attention) and is_untouched(attention) else None


def _pooled_attention(attention, select, hidden, attention_mask=None, packed=None, cu_seq_lens_q=None, **kwargs):
    """The forward of that self-attention: [B, 1, d], or of a packed batch [1, B, d]; and no weights."""
    rows = select(hidden)
    if packed is None:
        if attention_mask is not None:
            attention_mask = attention_mask[:, 0, :1]  # the same for every row: attention is full
            if attention_mask.dtype == torch.bool:
                attention_mask = torch.where(attention_mask, 0.0, float("-inf"))
        return attend(attention, rows[:, 0], [hidden], [attention_mask])[:, None], None
    groups = packed.next_layer(cu_seq_lens_q).groups()
    texts = [text.view(g, n, -1) for (g, n), text in zip(groups, hidden[0].split([g * n for g, n in groups]))]
    return attend(attention, rows[0], texts, [None] * len(texts))[None], None
