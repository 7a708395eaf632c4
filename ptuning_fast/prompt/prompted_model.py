"""PromptedModel: a model and its prompt as one module, with the model's own call."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..files import peft
from ..files.checkpoint import trained_only
from ..models import unwrapped
from ..models.info import is_a
from ..modes.flattened import FLATTENED
from .loss import has_causal_loss
from .soft_prompt import LaidOut, SoftPrompt

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

__all__ = ["PromptedModel"]

_CACHES = {"past_key_values", "cache"}
_COLUMNS = ("start_positions", "end_positions")  # of the text, which the prompt moves
_NO_MATTER = ("use_cache", "return_dict")  # where the loss alone is asked for
_WITHOUT_PROMPT = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class PromptedModel(nn.Module):
    """A Hugging Face model behind a trainable prompt, called as the model is: for `transformers.Trainer`, TRL's
    `SFTTrainer`, Accelerate and `pipeline`.

        model = PromptedModel(AutoModelForCausalLM.from_pretrained(name), length=20)
        Trainer(model, args, train_dataset=...).train()
        model.save_pretrained("my-prompt")  # what SoftPrompt.from_pretrained and PEFT load

    `state_dict()`, and so a checkpoint, holds what is trained alone. Whatever a model has beside its forward (`config`,
    `device`, `generation_config`, `gradient_checkpointing_enable`, ...) is its own.

    Args:
        model: a transformers model, quantised or with LoRA as it comes. One whose token embeddings are not frozen yet
            is frozen, but for a classifier's head, which is trained with the prompt (as PEFT does). One whose
            embeddings are frozen stays as it is, and what is not frozen is trained with the prompt (LoRA).
        length: virtual tokens, m.
        mode: as `SoftPrompt` takes it: `"auto"`, or `"prepend"`, `"packed"`, `"shared"`.
        prompt: a SoftPrompt of `model`, instead of a new one.
        options: `SoftPrompt`'s, for a new one.
    """

    # Trainer leaves a row's first label out of its count where a model's loss does; here the prompt predicts it.
    loss_type = None
    # Trainer does not train quantised models but with an adapter on them: the prompt is one.
    _hf_peft_config_loaded = True

    def __init__(
        self, model: Any, length: int = 20, *, mode: str = "auto", prompt: SoftPrompt | None = None, **options: Any
    ):
        super().__init__()
        if prompt is not None and prompt.model is not model:
            raise ValueError("prompt is for another model: give the one that it was made with")
        if any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters()):
            model.requires_grad_(False)
            head = peft.head_of(model, peft.task_of(model))
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in head)
        self.model = model
        self.prompt = SoftPrompt(model, length, **options) if prompt is None else prompt
        self.mode = mode
        trained_only(self)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_index: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> "ModelOutput":
        """The model's outputs, without rows for virtual tokens: `logits` are [B, n, V], 0 on padding.

        With labels, in training, a language model gives its `loss` alone, since logits that nobody reads are most of
        its memory; in evaluation it gives both.

        Args:
            input_ids, attention_mask, token_type_ids, labels, prompt_index: as `SoftPrompt.forward` takes them.
            num_items_in_batch: as `SoftPrompt.loss` takes it.
            kwargs: what padding-free collators give (`position_ids`, `cu_seq_lens_q`, ...), and arguments of the model.
        """
        flattened = {name: kwargs.pop(name) for name in FLATTENED if kwargs.get(name) is not None}
        given = (input_ids, attention_mask, token_type_ids, labels, prompt_index, self._mode_for(kwargs))
        nothing_else = all(value is None or name in _NO_MATTER for name, value in kwargs.items())
        if labels is not None and self.training and has_causal_loss(self.model) and nothing_else:
            from transformers.modeling_outputs import CausalLMOutput

            return CausalLMOutput(loss=self.prompt.loss(*given, num_items_in_batch=num_items_in_batch, **flattened))
        laid_out = self.prompt.laid_out(*given, **flattened)
        return self._called(self.model, laid_out, bool(flattened), kwargs | self.prompt.items(num_items_in_batch))

    def _mode_for(self, kwargs: dict[str, Any]) -> str:
        """A loss over routers' choices counts the rows of a mask, which is there in mode "prepend" alone."""
        return "prepend" if kwargs.get("output_router_logits") else self.mode

    @property
    def base_model(self) -> Any:
        """The model without its head, behind the prompt: `last_hidden_state` [B, n, d] of the tokens.

        So whoever puts a head of their own on it, as TRL does, has the savings of the modes.
        """
        return self._backbone

    def _backbone(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> "ModelOutput":
        inner = unwrapped(self.model)
        if hasattr(inner.get_output_embeddings(), "base_layer"):
            raise TypeError(
                "the head has an adapter, which whoever takes its weight alone leaves out: adapt other modules"
            )
        if kwargs.get("output_router_logits") or getattr(inner.config, "output_router_logits", False):
            raise TypeError(
                "a loss over routers' choices would count other rows than the texts': set router_aux_loss_coef=0 where "
                "you train, or train with transformers' Trainer"
            )
        flattened = {name: kwargs.pop(name) for name in FLATTENED if kwargs.get(name) is not None}
        types, index = kwargs.pop("token_type_ids", None), kwargs.pop("prompt_index", None)
        laid_out = self.prompt.laid_out(input_ids, attention_mask, types, None, index, self.mode, **flattened)
        return self._called(inner.base_model, laid_out, bool(flattened), kwargs)

    def _called(self, model: Any, laid_out: LaidOut, flattened: bool, kwargs: dict[str, Any]) -> "ModelOutput":
        mode, batch, inputs = laid_out
        m, columns = self.prompt.length, inputs["inputs_embeds"].shape[:2]
        for name in _CACHES:
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} misses the prompt, or has it in it: what goes on from a cache is generate")
        if self.prompt.takes_cache:
            kwargs.setdefault("use_cache", False)
        for name in _COLUMNS:
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name] + m
        kept = kwargs.pop("logits_to_keep", 0)
        out = model(**(kwargs | inputs))
        if unwrapped(self.model).config.is_encoder_decoder:
            return out

        def of_tokens(rows: Any) -> Any:
            if isinstance(rows, tuple):
                return tuple(map(of_tokens, rows))
            if (
                not torch.is_tensor(rows)
                or rows.shape[:2] != columns
                or (rows.dim() == 2 and not self._columns_are_out)
            ):
                return rows
            rows = mode.of_tokens(rows, inputs, batch, m)
            return rows[batch.attention_mask != 0][None] if flattened else rows

        for name in out.keys() - _CACHES:
            if name != "attentions":
                out[name] = of_tokens(out[name])
        if "logits" in out and (torch.is_tensor(kept) or kept):
            out["logits"] = out.logits[:, kept if torch.is_tensor(kept) else slice(-kept, None)]
        return out

    @property
    def _columns_are_out(self) -> bool:
        """Whether an output [B, S] has a number for each column, and not S classes."""
        return not is_a(unwrapped(self.model), "ForSequenceClassification", "ForNextSentencePrediction")

    def _get_name(self) -> str:
        """The model's class, by which Trainer's label smoothing tells whether labels are those of the next token."""
        return type(unwrapped(self.model)).__name__

    def __repr__(self) -> str:
        return f"{type(self).__name__}(mode={self.mode!r}, prompt={self.prompt!r})"

    @property
    def accepts_loss_kwargs(self) -> bool:
        """For Trainer: whether the loss goes by `num_items_in_batch`."""
        return self.prompt.goes_by_items

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """As `model.generate`: a decoder's tokens begin with those of `input_ids`, and the prompt is not among them.

        Args:
            input_ids, attention_mask: [B, n], padded on the left.
            options: `generate`'s own.
        """
        if options.get("max_length") is not None and not self.model.config.is_encoder_decoder:
            most, n = options.pop("max_length"), input_ids.shape[1]
            if most <= n:
                raise ValueError(f"max_length is {most}, and input_ids have {n} columns already: take max_new_tokens")
            options.setdefault("max_new_tokens", most - n)
        out = self.prompt.generate(input_ids, attention_mask, **options)
        if self.model.config.is_encoder_decoder:
            return out
        new_tokens = out if torch.is_tensor(out) else out.sequences
        before = input_ids.repeat_interleave(len(new_tokens) // len(input_ids), 0)
        sequences = torch.cat([before, new_tokens], 1)
        if torch.is_tensor(out):
            return sequences
        out.sequences = sequences
        return out

    def save_pretrained(self, folder: str | Path, *, figures: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """What `SoftPrompt.save_pretrained` writes; of other arguments `is_main_process` alone is heeded."""
        if not kwargs.get("is_main_process", True):
            return
        head = peft.head_of(self.model, peft.task_of(self.model))
        rest = [name for name, one in self.model.named_parameters() if one.requires_grad and name not in head]
        if rest:
            warnings.warn(
                f"{rest[0]} is trained, too, and is not written with the prompt: model.save_pretrained keeps it",
                stacklevel=2,
            )
        self.prompt.save_pretrained(folder, figures=figures)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """What `SoftPrompt.push_to_hub` does: of the prompt, not of the model."""
        return self.prompt.push_to_hub(repo_id, **options)

    @classmethod
    def from_pretrained(cls, model: Any, folder: str | Path, *, mode: str = "auto") -> "PromptedModel":
        """The prompt in `folder`, before `model`; errors as of `SoftPrompt.from_pretrained`."""
        return cls(model, mode=mode, prompt=SoftPrompt.from_pretrained(model, folder))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name in _WITHOUT_PROMPT:  # the former: not there yet
                raise
            return getattr(self.model, name)
