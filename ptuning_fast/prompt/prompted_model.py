"""PromptedModel: a model and its prompt as one module, with the model's own call."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..files.checkpoint import trained_only
from ..models import unwrapped
from .loss import has_causal_loss
from .soft_prompt import LaidOut, SoftPrompt

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

__all__ = ["PromptedModel"]

# What padding-free collators give beside the ids, with which `SoftPrompt` tells the texts apart.
_FLATTENED = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# Outputs with a row for each token, where a model has them.
_OF_TOKENS = ("logits", "last_hidden_state")
_CACHES = ("past_key_values", "cache")


class PromptedModel(nn.Module):
    """A Hugging Face model behind a trainable prompt, called as the model is: for `transformers.Trainer`, TRL's
    `SFTTrainer`, Accelerate and `pipeline`.

        model = PromptedModel(AutoModelForCausalLM.from_pretrained(name), length=20)
        Trainer(model, args, train_dataset=...).train()
        model.save_pretrained("my-prompt")  # what SoftPrompt.from_pretrained and PEFT load

    `state_dict()`, and so a checkpoint, holds what is trained alone. Whatever a model has beside its forward (`config`,
    `device`, `generation_config`, `gradient_checkpointing_enable`, ...) is its own.

    Args:
        model: a transformers model, quantised or with LoRA as it comes. Where nothing of it is frozen yet it is frozen
            whole; else what is frozen stays so, and the rest is trained with the prompt (LoRA, a classifier's head).
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
        if all(parameter.requires_grad for parameter in model.parameters() if parameter.is_floating_point()):
            model.requires_grad_(False)
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
        flattened = {name: kwargs.pop(name) for name in _FLATTENED if kwargs.get(name) is not None}
        given = (input_ids, attention_mask, token_type_ids, labels, prompt_index, self.mode)
        if labels is not None and self.training and has_causal_loss(self.model):
            from transformers.modeling_outputs import CausalLMOutput

            return CausalLMOutput(loss=self.prompt.loss(*given, num_items_in_batch=num_items_in_batch, **flattened))
        laid_out = self.prompt.laid_out(*given, **flattened)
        if num_items_in_batch is not None:
            kwargs["num_items_in_batch"] = num_items_in_batch
        return self._called(self.model, laid_out, bool(flattened), kwargs)

    @property
    def base_model(self) -> Any:
        """The model without its head, behind the prompt: `last_hidden_state` [B, n, d] of the tokens.

        So whoever puts a head of their own on it, as TRL does, has the savings of the modes.
        """
        return self._backbone

    def _backbone(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> "ModelOutput":
        flattened = {name: kwargs.pop(name) for name in _FLATTENED if kwargs.get(name) is not None}
        types, index = kwargs.pop("token_type_ids", None), kwargs.pop("prompt_index", None)
        laid_out = self.prompt.laid_out(input_ids, attention_mask, types, None, index, self.mode, **flattened)
        return self._called(unwrapped(self.model).base_model, laid_out, bool(flattened), kwargs)

    def _called(self, model: Any, laid_out: LaidOut, flattened: bool, kwargs: dict[str, Any]) -> "ModelOutput":
        mode, batch, inputs = laid_out
        for name in _CACHES:
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} misses the prompt, or has it in it: what goes on from a cache is generate")
        if self.prompt.takes_cache:
            kwargs.setdefault("use_cache", False)
        out = model(**(kwargs | inputs))
        if not self.prompt.per_token:
            return out

        def of_tokens(rows: Tensor) -> Tensor:
            rows = mode.of_tokens(rows, inputs, batch, self.prompt.length)
            return rows[batch.attention_mask != 0][None] if flattened else rows

        for name in _OF_TOKENS:
            if torch.is_tensor(out.get(name)):
                out[name] = of_tokens(out[name])
        if out.get("hidden_states"):
            out["hidden_states"] = tuple(of_tokens(rows) for rows in out["hidden_states"])
        return out

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

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """What `SoftPrompt.save_pretrained` writes; of other arguments `is_main_process` alone is heeded."""
        if kwargs.get("is_main_process", True):
            self.prompt.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, model: Any, folder: str | Path, *, mode: str = "auto") -> "PromptedModel":
        """The prompt in `folder`, before `model`; errors as of `SoftPrompt.from_pretrained`."""
        return cls(model, mode=mode, prompt=SoftPrompt.from_pretrained(model, folder))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet
                raise
            return getattr(self.model, name)
