"""What a Hugging Face model takes, and which rows of its input and output mean what."""

import inspect
import warnings

import torch
from torch import Tensor, nn

from .positions import counts_columns, max_positions, position_start
from .trial import trial

__all__ = ["Serving", "is_a", "is_causal", "unwrapped"]


class Serving:
    """The facts about one model that decide what it is given; it does not hold the model.

    - `takes`: the arguments of its forward.
    - `position_start`: the position of the first real token.
    - `max_positions`: the longest sequence, prompt included, or None.
    - `counts_columns`: learned positions are those of the columns, and it cannot be told others.
    - `pooled`: which end of a row a sequence classifier reads: "left" (encoders), "right" (decoders), None otherwise.
    - `labels_are_rows`: labels belong to whole rows, or to the decoder of an encoder-decoder, whatever their shape.
    - `shifted_by_padding`: why padding between cached rows and a text matters, or None; known once mode "shared" was
      checked. `checked` has the modes that were.
    - `adjacent`: the prompt goes behind the padding on the left. Not where a pooler reads the first column, which is to
      be the prompt's, and distances play no part.

    Raises:
        TypeError: a model that cannot be served through `inputs_embeds`, with the reason.
    """

    def __init__(self, model: nn.Module):
        if hasattr(model, "peft_config") and getattr(model, "prompt_encoder", None):
            raise TypeError(f"this {type(model).__name__} puts a prompt of PEFT's in front: give its .base_model")
        model = unwrapped(model)
        _refuse(model)
        self.name = type(model).__name__
        self.takes = frozenset(inspect.signature(model.forward).parameters)
        self.position_start = position_start(model)
        self.max_positions = max_positions(model)
        self.counts_columns = counts_columns(model)
        self.pooled = _pooled_end(model)
        of_tokens = is_a(model, "ForTokenClassification")
        self.labels_are_rows = not of_tokens and (model.config.is_encoder_decoder or self.pooled is not None)
        self.has_pooler = getattr(model.base_model, "pooler", None) is not None
        self.adjacent = not (self.has_pooler and _positions_are_all(model.config))
        self.shifted_by_padding, self.checked = None, set()
        self._per_token = is_a(model, *_PER_TOKEN) and not is_a(model, *_PER_TEXT)

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
        if not self._per_token:
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
                f"{self.name} counts padding on the left as positions, and cannot be told others: "
                "pad on the right (tokenizer.padding_side = 'right')"
            )
        if self.has_pooler and self.adjacent and self.pooled is None and (mask[:, :1] == 0).any():
            warnings.warn(
                f"the pooler_output of {self.name} reads the first column, which padding on the left takes: "
                "pad on the right where you use it",
                stacklevel=4,
            )
        return tokens if self.pooled is None else _moved_to(self.pooled, tokens)


_PER_TOKEN = ("Model", "ForCausalLM", "ForMaskedLM", "ForTokenClassification")
_PER_TEXT = ("ForSequenceClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction")
_PER_TEXT += ("ForPreTraining", "DoubleHeadsModel")


def is_a(model: nn.Module, *ends: str) -> bool:
    """Whether the name of `model`'s class, or of a class of transformers that it comes from, ends in one of `ends`."""
    names = [kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.")]
    return any(name.endswith(ends) and not name.endswith("PreTrainedModel") for name in names)


def _positions_are_all(config):
    """Whether attention knows of no distances: positions are added to embeddings, and every token sees every other."""
    kinds = ("albert", "bert", "camembert", "roberta", "xlm-roberta")
    return config.model_type in kinds and getattr(config, "position_embedding_type", "absolute") == "absolute"


def is_causal(model: nn.Module) -> bool:
    """Whether a token reaches later rows only. Tried out: the first row's state, behind two different second tokens."""
    with trial(model):
        ids = torch.tensor([[1, 2], [1, 3]], device=model.get_input_embeddings().weight.device)
        first = model(input_ids=ids)[0][:, 0].float()
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
    if model.config.is_encoder_decoder and is_a(model, "ForSequenceClassification"):
        raise TypeError(f"{name} finds the token that it classifies in the input_ids; a prompt has none")


def _pooled_end(model):
    # A decoder's classifier finds the last token in the input_ids; given inputs_embeds it takes the last column.
    kinds = [kind for kind in type(model).__mro__ if kind.__name__.endswith("ForSequenceClassification")]
    if not kinds:
        return None
    codes = [inspect.unwrap(kind.forward).__code__ for kind in kinds]
    return "right" if any("last_non_pad_token" in code.co_varnames for code in codes) else "left"


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
