"""How many rows a model has positions for."""

from torch import nn

__all__ = ["max_positions"]


def max_positions(model: nn.Module) -> int | None:
    """The longest sequence that `model`'s learned position table takes, prompt included; None where it has no table.

    Read from the module, not from the config: the RoBERTa family starts at `padding_idx + 1`, and OPT and BART keep an
    `offset`, so their tables serve fewer rows than they hold.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES:
            used = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - max(used, getattr(module, "offset", 0))
    return None


_TABLES = ("position_embeddings", "wpe", "embed_positions")
