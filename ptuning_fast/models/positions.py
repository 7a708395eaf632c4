"""Where a model's positions start, how many it has, and whether it can be told them."""

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

__all__ = ["counts_columns", "max_positions", "position_start", "steady_length"]


def position_start(model: nn.Module) -> int:
    """The position of the first real token: `padding_idx + 1` for the RoBERTa family and MPNet, 0 for most others.

    Read from the module, not from the config: MPNet's table starts at its own `padding_idx`, whatever the config says,
    and Nystromformer's where a buffer of `position_ids` beside the table starts.
    """
    table = _table(model)
    if table is None:
        return 0
    if table.padding_idx is not None:
        return table.padding_idx + 1
    for module in model.modules():
        if table in module.children():
            default = getattr(module, "position_ids", None)
            if isinstance(default, Tensor) and default.numel() and default.device.type != "meta":
                return int(default.flatten()[0])
    return 0


def max_positions(model: Any) -> int | None:
    """The longest sequence that `model`'s position table takes, prompt included; None where it has no table.

    Read from the module as well: the RoBERTa family starts at `padding_idx + 1`, and OPT and BART keep an `offset`, so
    their tables serve fewer rows than they hold.
    """
    table = _table(model)
    if table is None:
        config = model.config.get_text_config()
        # Tables that are no nn.Embedding (GPT-J, CTRL), and biases made for so many positions (MPT).
        return getattr(config, "n_positions", None) or getattr(config, "max_seq_len", None)
    return table.num_embeddings - max(position_start(model), getattr(table, "offset", 0))


def steady_length(model: Any) -> int | None:
    """The length up to which a text's outputs do not depend on how long the others of its batch are; None: any.

    Rotary positions of the kinds `dynamic` and `longrope` (transformers' modeling_rope_utils.py) are others for all
    texts of a batch once one of them is longer, and BigBird attends by blocks then.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limits = []
    for one in (rope, *rope.values()):  # one for all layers, or one for each of their types
        kind = one.get("rope_type") if isinstance(one, dict) else None
        if kind == "longrope":
            limits.append(one.get("original_max_position_embeddings") or config.max_position_embeddings)
        elif kind == "dynamic":
            limits.append(config.max_position_embeddings)
    if getattr(config, "attention_type", None) == "block_sparse":
        limits.append((5 + 2 * config.num_random_blocks) * config.block_size)
    return min(limits, default=None)


def counts_columns(model: nn.Module, takes: Collection[str]) -> int | None:
    """How many columns a row may have before padding in it counts as text, and cannot be told not to; None: any number.

    0 where absolute positions are those of the columns (BART). A router that an `expert_capacity` has gives padding
    its experts' places (Switch Transformers), and layers without rotary positions that scale by the column do so from
    `floor_scale` on (Llama 4).

    Args:
        takes: the arguments that it can be told something with.
    """
    limits = []
    if "position_ids" not in takes:
        limits += [0 for name, _ in model.named_modules() if name.rpartition(".")[2] in _TABLES]
    for held in map(vars, model.modules()):
        if "expert_capacity" in held:
            limits.append(held["expert_capacity"])
        if held.get("attn_temperature_tuning") and not held.get("use_rope", True):
            limits.append(int(held["floor_scale"]) - 1)
    return min(limits, default=None)


def _table(model: nn.Module) -> Any:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES:
            return module
    return None


_TABLES = ("position_embeddings", "wpe", "embed_positions", "positions_embed")
