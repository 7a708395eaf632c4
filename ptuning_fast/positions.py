"""Where a model's positions start, how many it has, and whether it can be told them."""

import inspect

from torch import nn

__all__ = ["counts_columns", "max_positions", "position_start"]


def position_start(model: nn.Module) -> int:
    """The position of the first real token: `padding_idx + 1` for the RoBERTa family and MPNet, 0 elsewhere.

    Read from the module, not from the config: MPNet's table starts at its own `padding_idx`, whatever the config says.
    """
    table = _table(model)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


def max_positions(model: nn.Module) -> int | None:
    """The longest sequence that `model`'s learned position table takes, prompt included; None where it has no table.

    Read from the module as well: the RoBERTa family starts at `padding_idx + 1`, and OPT and BART keep an `offset`, so
    their tables serve fewer rows than they hold.
    """
    table = _table(model)
    if table is None:
        return None
    return table.num_embeddings - max(position_start(model), getattr(table, "offset", 0))


def counts_columns(model: nn.Module) -> bool:
    """Whether learned positions are those of the columns, padding counted, and nothing can be done about it (BART)."""
    return _table(model) is not None and "position_ids" not in inspect.signature(model.forward).parameters


def _table(model):
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES:
            return module
    return None


_TABLES = ("position_embeddings", "wpe", "embed_positions")
