"""What a Hugging Face model takes, and which rows of its input and output mean what."""

import contextlib
import copy
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..op import Batch
from .families import class_of, family_of
from .positions import counts_columns, max_positions, position_start, steady_length
from .replaced import Called, with_module

__all__ = [
    "ModelInfo",
    "check_tensors",
    "describe",
    "fits",
    "has_adapter",
    "has_decoder",
    "is_a",
    "output_embeddings",
    "prompts_in",
    "unwrapped",
    "uses_adapter",
]


@dataclass(frozen=True)
class ModelInfo:
    """The facts about one model that decide what it is given; it does not hold the model."""

    name: str
    takes: frozenset[str]  # the arguments of its forward
    added: frozenset[str]  # of these, what no class of transformers that it comes from takes
    position_start: int  # the position of the first real token
    max_positions: int | None  # the longest sequence, virtual tokens included; None: any
    steady_length: int | None  # the longest text whose outputs do not depend on the batch's other texts; None: any
    counts_columns: int | None  # a row of more columns has padding counted as text, and it cannot be told; None: any
    pooled: str | None  # which end of a row a sequence classifier reads: "left" (encoders), "right" (decoders)
    labels_are_rows: bool  # labels belong to whole rows, or to the decoder of an encoder-decoder, whatever their shape
    per_token: bool  # outputs and labels are one per token
    picks_labels: bool  # whether its loss seems to go by the mask; loss/kinds.py finds out, but not under torch.compile
    has_pooler: bool
    adjacent: bool  # the prompt goes next to the text, behind padding on the left; not where column 0 is read
    cache: str | None  # what its forward calls a cache; None: it takes none
    has_decoder: bool  # an encoder and a decoder
    finds_images: bool  # positions of images are found in the input_ids, of which a prompt has none

    def check_room(self, length: int, input_ids: Tensor) -> None:
        """ValueError where m = `length` and the n of [B, n] are more than the model has positions, or for other shapes.

        A warning where they are so many that outputs depend on the batch.
        """
        if not isinstance(input_ids, Tensor):
            way_out = ": give its parts, **batch" if hasattr(input_ids, "keys") else ""
            raise TypeError(f"input_ids must be a torch.Tensor, not {type(input_ids).__name__}{way_out}")
        if input_ids.dim() != 2:
            raise ValueError(
                f"input_ids must be [batch, tokens]; its shape is {tuple(input_ids.shape)} (choices, [B, C, n], are "
                "given below each other: [B * C, n])"
            )
        if input_ids.shape[:1] == (0,):
            raise ValueError("input_ids has no rows: a batch without texts has no output and no loss, so leave it out")
        most, n = self.max_positions, input_ids.shape[-1]
        if most is not None and length + n > most:
            raise ValueError(
                f"{length} virtual tokens and {n} tokens are {length + n}, and {self.name} has {most} positions: "
                f"tokenize with truncation=True, max_length={most - length}"
            )
        steady = self.steady_length
        if steady is not None and length + n > steady:
            warnings.warn(
                f"{length} virtual tokens and {n} tokens are {length + n}: beyond {steady} the outputs of {self.name} "
                "depend on how long the longest text of the batch is, with a prompt or without: tokenize with "
                f"max_length={max(steady - length, 0)}, or give it texts of one length",
                stacklevel=4,
            )

    def check_mask(self, attention_mask: Tensor | None, may_wait: bool) -> None:
        """A warning where a row has padding between its tokens; on a GPU only where the host may wait for an answer."""
        mask = attention_mask
        if mask is None or mask.dim() != 2 or torch.compiler.is_compiling() or not (may_wait or mask.is_cpu):
            return
        self.check_added(mask, may_wait)
        there = mask != 0
        begins = (there[:, 1:] & ~there[:, :-1]).sum(1) + there[:, :1].sum(1)
        if (begins > 1).any():
            warnings.warn(
                "attention_mask has padding between the tokens of a row: mode 'prepend' keeps that column (it predicts "
                "the label behind it, and counts in a sliding window), and the others leave it out: put the padding at "
                "one end for the same results in each mode",
                stacklevel=4,
            )

    def check_added(self, mask: Tensor | None, may_wait: bool) -> None:
        """ValueError for a mask as attention adds it to its scores, in which 0 is a token, and for what is no mask."""
        if not isinstance(mask, Tensor) or torch.compiler.is_compiling() or not (may_wait or mask.is_cpu):
            return
        if mask.dtype is torch.bool or not mask.numel():
            return
        least, most = mask.aminmax()
        if least < 0:
            raise ValueError(
                "attention_mask has numbers below 0, as one that is added to scores: give 1 for tokens, 0 for padding"
            )
        if most > 1:
            raise ValueError(
                f"attention_mask has the number {most.item()}: give 1 for tokens, 0 for padding; ids come first"
            )

    def check_per_token(self) -> None:
        """TypeError for a model whose outputs or labels are not one per token, as those of a packed batch are."""
        if not self.per_token:
            raise TypeError(
                f"{self.name} has other outputs than one per token, or is not known to: mode='packed' is for "
                f"models named ...{', ...'.join(_PER_TOKEN)}, so take mode='prepend' (to classify whole texts, "
                "FastPTuning has mode='packed', too)"
            )

    def check_arguments(self, given: Mapping[str, Any], input_ids: Tensor, m: int) -> None:
        """ValueError for what of `given`, arguments of the forward, goes wrong behind m virtual tokens."""
        states = given.get("encoder_outputs")
        if states is not None and states[0].shape[1] != m + input_ids.shape[1]:
            raise ValueError(
                f"encoder_outputs have {states[0].shape[1]} columns, and {m} virtual tokens and {input_ids.shape[1]} "
                f"tokens are {m + input_ids.shape[1]}: they would be those without the prompt, so leave them out, or "
                "make them of what the prompt gives, model.get_encoder()(**prompt(...))"
            )
        for name, value in given.items():
            if not torch.is_tensor(value) or name.startswith(_OF_OTHERS):
                continue
            features = value.is_floating_point() and value.dim() > 2  # images, states: as many as tokens by chance
            positions = "position" in name and not name.startswith(_OF_IMAGES)
            per_token = value.shape[:2] == input_ids.shape and not features and not name.startswith(_OF_REGIONS)
            if per_token or positions or name in _OF_COLUMNS:
                raise ValueError(
                    f"{name} is of columns that a prompt moves, and nobody knows what it is on the prompt's"
                )
            if self.finds_images:
                raise ValueError(
                    f"{self.name} finds the positions of images in the input_ids, and gets none behind a prompt: "
                    f"leave {name} out"
                )
            whole = not (value.is_floating_point() or value.dtype is torch.bool)
            if whole and m and name in self.added and "label" not in name:
                warnings.warn(
                    f"{name} is handed on as it is: where it counts columns of the text, add the prompt's {m} to it",
                    stacklevel=4,
                )

    def positions_for(self, attention_mask: Tensor | None) -> int | None:
        """`position_start` where the model takes position_ids and would else count padding."""
        return None if attention_mask is None or "position_ids" not in self.takes else self.position_start

    def check_left(self, attention_mask: Tensor | None, columns: int) -> None:
        """ValueError for padding on the left where a model counts it as text, in rows of so many columns."""
        most, mask = self.counts_columns, attention_mask
        if most is None or mask is None or mask.dim() != 2 or columns <= most:
            return
        if (mask[:, :1] == 0).any():
            raise ValueError(
                f"{self.name} counts padding on the left as text"
                + f", in rows of more than {most} columns," * bool(most)
                + " and cannot be told not to: pad on the right (tokenizer.padding_side = 'right'), or give it texts "
                "of one length"
            )

    def check_steady(self, columns: int, new: int) -> None:
        """A warning where the outputs for `columns` become others with the `new` that generate may add."""
        steady = self.steady_length
        if steady is not None and columns <= steady < columns + new:
            warnings.warn(
                f"up to {new} tokens are generated behind {columns} columns: beyond {steady} those of {self.name} have "
                "other outputs, and what is cached of them stays as it was, which a model may mend behind ids alone: "
                f"take max_new_tokens={steady - columns}",
                stacklevel=3,
            )

    def turned(self, batch: Batch, m: int) -> Batch:
        """The batch, which gets m virtual tokens, with its padding where the model wants it.

        Raises:
            ValueError: padding on the left for a model that counts columns.
        """
        mask = batch.attention_mask
        if mask is None or not fits(batch):
            return batch
        if self.has_pooler and self.adjacent and self.pooled is None and (mask[:, :1] == 0).any():
            warnings.warn(
                f"the pooler_output of {self.name} reads the first column, which padding on the left takes: "
                "pad on the right where you use it",
                stacklevel=5,
            )
        if self.pooled is not None:
            ids, *rest = batch
            n, turn = mask.shape[1], _turn(self.pooled, mask)
            columns = (torch.arange(n, device=mask.device) + turn) % max(n, 1)
            batch = Batch(
                ids.gather(1, columns), *(None if value is None else value.gather(1, columns) for value in rest)
            )
        self.check_left(batch.attention_mask, m + mask.shape[1])
        return batch

    def turned_back(self, rows: Tensor, batch: Batch, m: int, dim: int = 1) -> Tensor:
        """What came out of `turned(batch)` behind m virtual tokens, [B, m + n, ...], in the columns of `batch`.

        Args:
            dim: that of the columns.
        """
        mask = batch.attention_mask
        if mask is None or self.pooled is None:
            return rows
        columns, fixed = torch.arange(m + mask.shape[1], device=mask.device), 0 if self.adjacent else m
        turned = fixed + (columns - fixed - _turn(self.pooled, mask)) % max(len(columns) - fixed, 1)
        shape = [len(mask) if at == 0 else len(columns) if at == dim else 1 for at in range(rows.dim())]
        return rows.take_along_dim(torch.where(columns < fixed, columns, turned).view(shape), dim)


def check_tensors(**given: Any) -> None:
    """TypeError for what is given and is no tensor."""
    for name, one in given.items():
        if one is not None and not isinstance(one, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor of numbers, not {type(one).__name__}: torch.tensor(...)")


def fits(batch: Batch) -> bool:
    """Whether all that is given has the shape of `input_ids`; where it has not, the op says what."""
    return all(one is None or getattr(one, "shape", None) == batch.input_ids.shape for one in batch)


def describe(model: nn.Module) -> ModelInfo:
    """The facts about `model`, or about the transformers model that PEFT or torch.compile put something around.

    Raises:
        TypeError: a model that cannot be served through `inputs_embeds`, with the reason.
    """
    if hasattr(model, "peft_config") and getattr(model, "prompt_encoder", None):
        raise TypeError(f"this {type(model).__name__} prepends a prompt of PEFT's: give its .base_model")
    if getattr(model, "_prepends", False):
        raise TypeError(f"this {type(model).__name__} prepends a prompt already: give its .model")
    around, model = model, unwrapped(model)
    _refuse(model)
    takes, config = _handed_on(around) - _not_flattened(model), model.config
    pooled = _pooled_end(model)
    has_pooler = getattr(model.base_model, "pooler", None) is not None
    family, embedding_type = family_of(model), getattr(config, "position_embedding_type", "absolute")
    absolute = family is not None and family.absolute and embedding_type == "absolute"
    return ModelInfo(
        name=class_of(model).__name__,
        takes=takes,
        added=takes - _of_transformers(model),
        position_start=position_start(model),
        max_positions=max_positions(model),
        steady_length=steady_length(model),
        counts_columns=counts_columns(model, takes),
        pooled=pooled,
        labels_are_rows=not is_a(model, "ForTokenClassification") and (has_decoder(model) or pooled is not None),
        per_token=is_a(model, *_PER_TOKEN) and not is_a(model, *_PER_TEXT),
        picks_labels=any("active_loss" in getattr(code, "co_varnames", ()) for code in _codes(model)),
        has_pooler=has_pooler,
        adjacent=not (pooled == "left" or (has_pooler and absolute)),
        cache=next((name for name in ("cache", "past_key_values") if name in takes), None),
        has_decoder=has_decoder(model),
        finds_images=any(hasattr(one, "get_rope_index") for one in (model, model.base_model)),
    )


def _handed_on(model: Any) -> frozenset[str]:
    """The arguments of a model's forward, but for those that what PEFT has put around it names, and does not hand on.

    Those are the position_ids and token types of PeftModelForQuestionAnswering.
    """
    around, bare = getattr(model, "_orig_mod", model), unwrapped(model)
    takes = frozenset(inspect.signature(bare.forward).parameters)
    named = {"position_ids", "token_type_ids"} & takes & inspect.signature(around.forward).parameters.keys()
    if around is bare or not named:
        return takes
    given = {name: torch.zeros(1, 1, dtype=torch.int64) for name in named}
    arrived: set[str] = set()

    def inside(*_: Any, **arguments: Any) -> None:
        arrived.update(name for name in given if arguments.get(name) is not None)

    copied = copy.copy(bare)
    copied.__dict__["forward"] = inside
    with_module(around, ("base_model", "model"), copied).forward(**given)
    return takes - (given.keys() - arrived)


def _not_flattened(model: Any) -> set[str]:
    """The position_ids of a class for multiple choice that hands them on as [B, C, n], as DistilBERT's does."""
    if not is_a(model, "ForMultipleChoice"):
        return set()
    found: list[Any] = []

    def inside(*_: Any, position_ids: Any = None, **arguments: Any) -> None:
        found.append(position_ids)
        raise StopIteration

    choices, columns = torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, dtype=torch.int64)
    with contextlib.suppress(Exception):  # that of `inside`, or whatever a class of somebody's own does
        copied = with_module(model, (model.base_model_prefix,), Called(inside))
        type(model).forward(copied, inputs_embeds=choices, attention_mask=columns, position_ids=columns)
    return set() if found and found[0] is not None and found[0].dim() == 2 else {"position_ids"}


_OF_OTHERS = ("decoder_", "encoder_", "qformer_")  # what a name begins with that is of other rows than the text's
_OF_REGIONS = ("pixel_", "visual_attention_mask", "visual_token_type_ids")  # which may be as many as tokens by chance
_OF_COLUMNS = ("cls_index", "lengths", "image_text_alignment")
_OF_IMAGES = ("image_", "pixel_", "video_", "audio_")  # what a name begins with whose positions are no columns
_PER_TOKEN = ("Model", "ForCausalLM", "ForMaskedLM", "ForTokenClassification")
_PER_TEXT: tuple[str, ...] = ("ForSequenceClassification", "ForQuestionAnswering", "ForMultipleChoice")
_PER_TEXT += ("ForNextSentencePrediction", "ForPreTraining")


def _of_transformers(model: nn.Module) -> set[str]:
    """The arguments of the forwards of those classes of transformers that it comes from."""
    kinds: list[Any] = [kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.")]
    return {name for kind in kinds if "forward" in vars(kind) for name in inspect.signature(kind.forward).parameters}


def _codes(model: nn.Module) -> list[Any]:
    """The code of its forward, and of those of the classes that it comes from."""
    kinds: list[Any] = [kind for kind in type(model).__mro__ if "forward" in vars(kind)]
    return [getattr(inspect.unwrap(kind.forward), "__code__", None) for kind in kinds]


def is_a(model: nn.Module, *ends: str) -> bool:
    """Whether the name of `model`'s class, or of a class of transformers that it comes from, ends in one of `ends`."""
    names = [kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.")]
    return any(name.endswith(ends) and not name.endswith("PreTrainedModel") for name in names)


def unwrapped(model: Any) -> Any:
    """The transformers model inside what torch.compile or PEFT (LoRA and the like) put around it."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def output_embeddings(model: Any) -> Any:
    """The module that gives a language model's logits; None where it has none, or another head than its class's."""
    try:
        return model.get_output_embeddings()
    except AttributeError:  # transformers looks for it in the head that the class has
        return None


def prompts_in(model: nn.Module) -> tuple[str, ...]:
    """Where in `model` somebody has put a prompt of ours: what the names of its parameters begin with."""
    modules = model.named_modules(remove_duplicate=False)
    return tuple(f"{name}." for name, one in modules if hasattr(one, "prompt_embeddings"))


def has_adapter(model: Any) -> bool:
    """Whether PEFT has put an adapter (LoRA and the like) around `model`, or into it."""
    around = hasattr(getattr(model, "_orig_mod", model), "peft_config")
    return around or bool(getattr(unwrapped(model), "_hf_peft_config_loaded", False))


def uses_adapter(model: Any) -> bool:
    """Whether PEFT has put an adapter into `model` that is not disabled."""
    return has_adapter(model) and not any(
        getattr(part, "disable_adapters", None) is True for part in unwrapped(model).modules()
    )


def has_decoder(model: Any) -> bool:
    """Whether it is an encoder and a decoder, and not the encoder alone of such (whose config may be that of both)."""
    return model.config.is_encoder_decoder and "decoder_input_ids" in inspect.signature(model.forward).parameters


def _refuse(model: Any) -> None:
    name = class_of(model).__name__
    if not hasattr(model, "get_input_embeddings") or not hasattr(model, "config"):
        raise TypeError(f"a {name} is not a transformers model: load one, and give that")
    try:
        model.get_input_embeddings()
    except NotImplementedError:
        raise TypeError(f"{name} has no table of token embeddings, before whose rows a prompt could stand") from None
    takes = inspect.signature(model.forward).parameters.keys()
    if "inputs_embeds" not in takes:
        raise TypeError(
            f"the forward of {name} takes no inputs_embeds, so no prompt can be prepended (one that is put around "
            "another says what that takes by functools.wraps)"
        )
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0):
        raise TypeError(
            f"{name} embeds its tokens anew in every layer and needs their input_ids for that; a prompt has none"
        )
    for column in {"mc_token_ids", "question_positions"} & takes:
        raise TypeError(
            f"{name} reads columns that {column} names, or finds them in the input_ids; a prompt moves them"
        )
    if has_decoder(model) and is_a(model, "ForSequenceClassification"):
        raise TypeError(f"{name} finds the token that it classifies in the input_ids; a prompt has none")


def _pooled_end(model: Any) -> str | None:
    # A decoder's classifier finds the last token in the input_ids; given inputs_embeds it takes the last column.
    ends = ("ForSequenceClassification", "ForMultipleChoice")
    kinds: list[Any] = [kind for kind in type(model).__mro__ if kind.__name__.endswith(ends)]
    if not kinds:
        return None
    codes = [inspect.unwrap(kind.forward).__code__ for kind in kinds]
    last = any(getattr(part, "summary_type", None) == "last" for part in model.children())  # XLNet's
    return "right" if last or any("last_non_pad_token" in code.co_varnames for code in codes) else "left"


def _turn(end: str, attention_mask: Tensor) -> Tensor:
    """[B, 1], by how many columns each row is turned for its outermost token to stand at that end."""
    there = attention_mask != 0
    padding = (there if end == "left" else there.flip(1)).cumsum(1).eq(0).sum(1, keepdim=True)
    return padding if end == "left" else -padding
