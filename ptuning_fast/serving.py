"""What a Hugging Face model takes, and which rows of its input and output mean what."""

import inspect

import torch
from torch import Tensor, nn

from .positions import counts_columns, max_positions, position_start

__all__ = ["Serving", "is_causal", "unwrapped"]


class Serving:
    """The facts about one model that decide what it is given; it does not hold the model.

    - `takes`: the arguments of its forward.
    - `position_start`: the position of the first real token.
    - `max_positions`: the longest sequence, prompt included, or None.
    - `counts_columns`: learned positions are those of the columns, and it cannot be told others.
    - `pooled`: which end of a row a sequence classifier reads: "left" (encoders), "right" (decoders), None otherwise.
    - `labels_are_rows`: labels belong to whole rows, or to the decoder of an encoder-decoder, whatever their shape.

    Raises:
        TypeError: a model that cannot be served through `inputs_embeds`, with the reason.
    """

    def __init__(self, model: nn.Module):
        model = unwrapped(model)
        _refuse(model)
        self.name = type(model).__name__
        self.takes = frozenset(inspect.signature(model.forward).parameters)
        self.position_start = position_start(model)
        self.max_positions = max_positions(model)
        self.counts_columns = counts_columns(model)
        self.pooled = _pooled_end(model)
        self.labels_are_rows = model.config.is_encoder_decoder or self.pooled is not None

    def check_room(self, length: int, n: int) -> None:
        """ValueError where `length` prompt rows and n tokens are more than the model has positions."""
        most = self.max_positions
        if most is not None and length + n > most:
            raise ValueError(
                f"{length} prompt rows and {n} tokens are {length + n}, and {self.name} has {most} positions: "
                f"tokenize with truncation=True, max_length={most - length}"
            )

    def check_per_token(self) -> None:
        """TypeError for a model whose outputs or labels are not one per token, as those of a packed batch are."""
        if not self.name.endswith(_PER_TOKEN):
            raise TypeError(
                f"{self.name} has other outputs than one per token, or is not known to: mode='packed' is for "
                f"models named ...{', ...'.join(_PER_TOKEN)}, so take mode='prepend' (to classify whole texts, "
                "FastPTuning has mode='packed', too)"
            )

    def positions_from(self, attention_mask: Tensor | None) -> int | None:
        """`position_start` where the model takes position_ids and would else count padding."""
        return None if attention_mask is None or "position_ids" not in self.takes else self.position_start

    def turned(self, tokens: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        """The [B, n] tensors, `attention_mask` among them, with the padding where the model wants it.

        Raises:
            ValueError: padding on the left for a model that counts columns.
        """
        mask = tokens["attention_mask"]
        if mask is None or mask.shape != tokens["input_ids"].shape:  # the op says what is wrong with it
            return tokens
        if self.counts_columns and (mask[:, :1] == 0).any():
            raise ValueError(
                f"{self.name} counts padding on the left as positions and takes no position_ids: "
                "pad on the right (tokenizer.padding_side = 'right')"
            )
        return tokens if self.pooled is None else _moved_to(self.pooled, tokens)


_PER_TOKEN = ("Model", "ForCausalLM", "ForMaskedLM", "ForTokenClassification")


@torch.no_grad()
def is_causal(model: nn.Module) -> bool:
    """Whether a token reaches later rows only. Tried out: the first row's state, behind two different second tokens."""
    was_training = model.training
    model.eval()
    try:
        ids = torch.tensor([[1, 2], [1, 3]], device=model.get_input_embeddings().weight.device)
        first = model(input_ids=ids).last_hidden_state[:, 0].float()
    finally:
        model.train(was_training)
    return torch.allclose(first[0], first[1], rtol=1e-5, atol=1e-6)


def unwrapped(model):
    """The transformers model inside what torch.compile or PEFT (LoRA and the like) put around it."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _refuse(model):
    name = type(model).__name__
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
        raise TypeError(f"{name} is not a transformers model")
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise TypeError(f"the forward of {name} takes no inputs_embeds, so no prompt can be put in front")
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0):
        raise TypeError(
            f"{name} embeds its tokens anew in every layer and needs their input_ids for that; a prompt has none"
        )
    if model.config.is_encoder_decoder and name.endswith("ForSequenceClassification"):
        raise TypeError(f"{name} finds the token that it classifies in the input_ids; a prompt has none")


def _pooled_end(model):
    # A decoder's classifier finds the last token in the input_ids; given inputs_embeds it takes the last column.
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return None
    forward = inspect.unwrap(type(model).forward)
    return "right" if "last_non_pad_token" in forward.__code__.co_varnames else "left"


def _moved_to(end, tokens):
    """Each row's padding turned away from `end`: its outermost token stands there."""
    mask = tokens["attention_mask"] != 0
    n = mask.shape[1]
    if n == 0:
        return tokens
    outer = mask if end == "left" else mask.flip(1)
    padding = outer.cumsum(1).eq(0).sum(1, keepdim=True)  # columns of it at that end
    columns = torch.arange(n, device=mask.device) + (padding if end == "left" else -padding)
    return {key: None if value is None else value.gather(1, columns % n) for key, value in tokens.items()}
