"""PromptedModel: a model and its prompt as one module, with the model's own call."""

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..files import hub
from ..models import describe, unwrapped
from ..models.families import class_of, has_own_forward
from ..models.info import check_tensors, has_adapter, output_embeddings, prompts_in
from ..modes.base import LaidOut
from ..modes.flattened import FLATTENED
from ..modes.outputs import CACHES, of_text, per_column_of_short_texts
from ..serving import heads
from .generate import count_new_tokens
from .soft_prompt import SoftPrompt
from .trained_only import marks_of_adapters, trained_only

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

__all__ = ["PromptedModel"]

_COLUMNS = ("start_positions", "end_positions")  # of the text, which the prompt moves
_NO_MATTER = ("use_cache", "return_dict")  # where the loss alone is asked for
_WITHOUT_PROMPT = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class _OfTheModel:
    """A method that has, beside its own parameters, those of the model's forward: Trainer drops other columns."""

    def __init__(self, function: Callable):
        self.function = function

    def __get__(self, instance: Any, owner: Any = None) -> Callable:
        if instance is None:
            return self.function
        method: Any = partial(self.function, instance)
        method.__signature__ = instance.__dict__["_signature"]
        method.__func__, method.__self__ = self.function, instance  # as a method has them, for Accelerate and TRL
        return method


def _signature(function: Callable, model: Any) -> inspect.Signature:
    _, *own, rest = inspect.signature(function).parameters.values()
    names = inspect.signature(model.forward).parameters.keys() - {"self", "args", "kwargs", *(one.name for one in own)}
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in sorted(names)]
    return inspect.Signature([one.replace(annotation=inspect.Parameter.empty) for one in [*own, *more, rest]])


def _perhaps_a_head(model: Any) -> str | None:
    """Of a class of somebody's own, a parameter outside its base model that is not frozen and no language head's."""
    if class_of(model).__module__.startswith("transformers.") or model.base_model is model:
        return None
    outputs = output_embeddings(model)
    known = {*model.base_model.parameters(), *(outputs.parameters() if outputs is not None else ())}
    return next((name for name, one in model.named_parameters() if one.requires_grad and one not in known), None)


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
            is frozen, but for a classifier's head, which is trained with the prompt (as PEFT does). Heads are known by
            the names of transformers' classes; what may be one in a class of your own is warned of. One whose
            embeddings are frozen, or with an adapter of PEFT's (LoRA), stays as it is, and what is not frozen is
            trained with the prompt.
        length: virtual tokens, m.
        mode: as `SoftPrompt` takes it: `"auto"`, or `"prepend"`, `"packed"`, `"shared"`.
        prompt: a SoftPrompt of `model`, instead of a new one.
        options: `SoftPrompt`'s, for a new one.
    """

    # Trainer does not train quantised models but with an adapter on them: the prompt is one.
    _hf_peft_config_loaded = True
    _prepends = True  # so nothing else is to be put before it

    def __init__(
        self, model: Any, length: int = 20, *, mode: str = "auto", prompt: SoftPrompt | None = None, **options: Any
    ):
        super().__init__()
        describe(model)  # TypeError for what is no model
        if prompt is not None and prompt.model is not model:
            raise ValueError("prompt is for another model: give the one that it was made with")
        frozen = all(not parameter.requires_grad for parameter in model.get_input_embeddings().parameters())
        if not (frozen or has_adapter(model)):
            head = heads.head_of(model)
            unknown = None if head else _perhaps_a_head(unwrapped(model))
            if unknown is not None:
                warnings.warn(
                    f"{unknown} of {class_of(unwrapped(model)).__name__} is frozen, as it is not known to be a "
                    "head: if it is to be trained, call requires_grad_(True) on it after making the PromptedModel",
                    stacklevel=2,
                )
            prompts = prompts_in(unwrapped(model))
            for name, parameter in unwrapped(model).named_parameters():
                if name.startswith(prompts):  # they are the user's
                    continue
                if name in head and not parameter.is_floating_point():
                    raise TypeError(
                        f"{name} of {class_of(unwrapped(model)).__name__} is quantised, and heads are trained: leave "
                        f"it out (BitsAndBytesConfig(llm_int8_skip_modules=[{name.partition('.')[0]!r}], ...))"
                    )
                parameter.requires_grad_(name in head)
        self.model = model
        ours: dict[str, Any] = {"prompt": SoftPrompt(model, length, **options) if prompt is None else prompt}
        ours |= {"mode": mode, "_signature": _signature(type(self).forward, unwrapped(model))}
        for name, value in ours.items():
            super().__setattr__(name, value)  # whatever the model has by that name
        inner = unwrapped(model)
        new = {inner.get_parameter(name) for name in self.prompt._new}
        perhaps = {inner.get_parameter(name) for name in self.prompt._perhaps | heads.new_pooler(inner)}
        trained_only(
            self,
            also={name for name, one in self.named_parameters() if one in new},
            perhaps={name for name, one in self.named_parameters() if one in perhaps},
        )

    @_OfTheModel
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
        """The model's outputs, without rows for virtual tokens: `logits` are [B, n, V].

        What a mixture of experts says of its routers is that of all rows, virtual tokens' among them, and `attentions`
        [B, heads, m + n, m + n] have them, too. Logits on padding mean nothing, but in the column before a text with
        padding on its left: they predict its first token.

        The label in the first column counts for nothing, as in the model's own loss, and as Trainer and TRL count
        (`SoftPrompt.loss` has the last virtual token predict it). With labels, in training, a language model gives its
        `loss` alone, since logits that nobody reads are most of its memory; in evaluation it gives both.

        Args:
            input_ids, attention_mask, token_type_ids, labels, prompt_index: as `SoftPrompt.forward` takes them.
            num_items_in_batch: as `SoftPrompt.loss` takes it.
            kwargs: what padding-free collators give (`position_ids`, `cu_seq_lens_q`, ...), and arguments of the model.
        """
        flattened = {name: kwargs.pop(name) for name in FLATTENED if kwargs.get(name) is not None}
        self._check(input_ids, kwargs)
        check_tensors(attention_mask=attention_mask, labels=labels)
        if labels is not None and labels.shape == input_ids.shape and self.prompt.has_causal_loss:
            labels = labels.clone()
            labels[:, :1] = -100
        given = (input_ids, attention_mask, token_type_ids, labels, prompt_index, self._mode_for(kwargs))
        nothing_else = all(value is None or name in _NO_MATTER for name, value in kwargs.items())
        if labels is not None and self.training and self.prompt.has_causal_loss and nothing_else:
            from transformers.modeling_outputs import CausalLMOutput

            return CausalLMOutput(loss=self.prompt.loss(*given, num_items_in_batch=num_items_in_batch, **flattened))
        laid_out = self.prompt.laid_out(*given, **flattened)
        return self._called(
            self.model,
            laid_out,
            bool(flattened),
            kwargs | self.prompt.items(num_items_in_batch, labels, attention_mask),
        )

    def _mode_for(self, kwargs: dict[str, Any]) -> str:
        """Mode "prepend" for what is one per row, and for a loss over routers' choices, which counts a mask's."""
        of_rows = any(torch.is_tensor(value) for name, value in kwargs.items() if name != "logits_to_keep")
        asked = kwargs.get("output_router_logits") or kwargs.get("output_attentions")
        return "prepend" if of_rows or asked else self.mode

    def _check(self, input_ids: Tensor, kwargs: dict[str, Any]) -> None:
        """ValueError for arguments of the model's that go wrong behind a prompt; a warning where it is not trained."""
        if self.training and torch.is_grad_enabled():
            self._check_trained()
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds go past the prompt: give input_ids, or model(**prompt(...)) what you like")
        if "mode" in kwargs:
            raise TypeError("mode goes with PromptedModel(model, mode=...), and with calls of a SoftPrompt")
        if kwargs.get("return_dict") is False:
            raise ValueError("return_dict=False: a PromptedModel's outputs have names")
        for name, value in kwargs.items():
            if name in CACHES and value is not None:
                raise ValueError(f"{name} misses the prompt, or has it in it: what goes on from a cache is generate")
        own = (*_COLUMNS, "logits_to_keep")
        self.prompt.info.check_arguments(
            {name: kwargs[name] for name in kwargs if name not in own}, input_ids, self.prompt.length
        )

    def _check_trained(self) -> None:
        if not any(parameter.requires_grad for parameter in self.prompt.parameters()):
            warnings.warn(
                "the prompt is frozen, and stays as it is: an adapter that is put around a PromptedModel "
                "(get_peft_model, TRL's peft_config) freezes all but itself. Give the model its adapter first: "
                "PromptedModel(get_peft_model(model, ...))",
                stacklevel=4,
            )

    @property
    def base_model(self) -> Any:
        """The model without its head, behind the prompt: `last_hidden_state` [B, n, d] of the tokens.

        So whoever puts a head of their own on it, as TRL does, has the savings of the modes.
        """
        return self._backbone

    def _backbone(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> "ModelOutput":
        inner = unwrapped(self.model)
        if hasattr(output_embeddings(inner), "base_layer"):
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
        self._check(input_ids, kwargs)
        laid_out = self.prompt.laid_out(input_ids, attention_mask, types, None, index, self.mode, **flattened)
        return self._called(inner.base_model, laid_out, bool(flattened), kwargs)

    def _called(self, model: Any, laid_out: LaidOut, flattened: bool, kwargs: dict[str, Any]) -> "ModelOutput":
        m, inputs = laid_out.m, laid_out.inputs
        if self.prompt.info.cache is not None:
            kwargs.setdefault("use_cache", False)
        for name in _COLUMNS:
            value = kwargs.get(name)
            if value is not None and not self.prompt.info.has_decoder:
                # Below 0 they are 0 to transformers' models, and to others often none.
                own = has_own_forward(unwrapped(self.model))
                kwargs[name] = torch.where(value < 0, value if own else m, value + m)
        kept = None
        if "logits_to_keep" in self.prompt.info.takes and not self.prompt.info.labels_are_rows:
            kept = kwargs.pop("logits_to_keep", None)
            kept = slice(-kept if kept else None, None) if isinstance(kept, int) else kept
        self.prompt.check_read(kwargs, laid_out)
        out = model(**(kwargs | inputs))
        tried = partial(self.prompt.model_loss.known, per_column_of_short_texts, self.model, {})
        out = of_text(out, laid_out, self.model, tried, flattened)
        if kept is not None and "logits" in out:
            out["logits"] = out.logits[:, kept]
        return out

    def _get_name(self) -> str:
        """The model's class, by which Trainer's label smoothing tells whether labels are those of the next token."""
        return class_of(unwrapped(self.model)).__name__

    def __repr__(self) -> str:
        return f"{type(self).__name__}(mode={self.mode!r}, prompt={self.prompt!r})"

    @property
    def loss_type(self) -> str | None:
        """For Trainer, which leaves first labels out of its count where the loss does."""
        own = getattr(self.model, "loss_type", None)
        return "ForCausalLM" if self.prompt.has_causal_loss else None if own == "ForCausalLM" else own

    @property
    def accepts_loss_kwargs(self) -> bool:
        """For Trainer: whether the loss goes by `num_items_in_batch`."""
        return self.prompt.goes_by_items

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """As `model.generate`: a decoder's tokens begin with those of `input_ids`, and the prompt is not among them.

        (`hidden_states` and `attentions`, where asked for, have the prompt's columns.)

        Args:
            input_ids, attention_mask: [B, n], padded on the left.
            options: `generate`'s own.
        """
        if not self.prompt.info.has_decoder:
            count_new_tokens(self.model, options, input_ids.shape[1])
        out = self.prompt.generate(input_ids, attention_mask, **options)
        if self.prompt.info.has_decoder:
            return out
        new_tokens = out if torch.is_tensor(out) else out.sequences
        before = input_ids.repeat_interleave(len(new_tokens) // len(input_ids), 0)
        sequences = torch.cat([before, new_tokens], 1)
        if torch.is_tensor(out):
            return sequences
        out.sequences = sequences
        return out

    def save_pretrained(self, folder: str | Path, *, figures: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """What `SoftPrompt.save_pretrained` writes; of other arguments `is_main_process` alone is heeded.

        What else is trained, such as a LoRA, is warned of; it goes into another folder. Parameters that FSDP2 has
        sharded are gathered: every process must then call this, and the first one writes.

        Raises:
            ValueError: a folder with an adapter of another kind in it (LoRA), or a model; nothing is written.
        """
        if not kwargs.get("is_main_process", True):
            self.prompt._kept()  # where it is sharded, all processes gather it
            return
        head = {*heads.head_of(self.model), *self.prompt._new, *self.prompt._perhaps, *self.prompt._came_with}
        named = getattr(self.model, "_orig_mod", self.model).named_parameters()
        own = [*self.prompt.parameters()]  # the model may have them as well
        trained = [name for name, one in named if one.requires_grad and not any(one is each for each in own)]
        rest = [name for name in trained if name not in head]
        marks = marks_of_adapters(self.model)
        others = [name for name in rest if not any(mark in name for mark in (*marks, "modules_to_save"))]
        if marks and others:
            warnings.warn(
                f"{others[0]} is trained, too, and is not written with the prompt, and with PEFT's adapter only where "
                "its settings say so: by bias, trainable_token_indices or modules_to_save",
                stacklevel=2,
            )
        elif rest:
            warnings.warn(
                f"{rest[0]} is trained, too, and is not written with the prompt: model.save_pretrained keeps it, in "
                "another folder",
                stacklevel=2,
            )
        self.prompt.save_pretrained(folder, figures=figures)

    def push_to_hub(self, repo_id: str, *, figures: dict[str, Any] | None = None, **options: Any) -> str:
        """What `SoftPrompt.push_to_hub` does: of the prompt, not of the model; what else is trained is warned of."""
        return hub.push(repo_id, lambda folder: self.save_pretrained(folder, figures=figures), **options)

    @classmethod
    def from_pretrained(
        cls, model: Any, folder: str | Path, *, mode: str = "auto", any_base: bool = False
    ) -> "PromptedModel":
        """The prompt in `folder`, before `model`, in eval mode; the rest as of `SoftPrompt.from_pretrained`."""
        return cls(model, mode=mode, prompt=SoftPrompt.from_pretrained(model, folder, any_base=any_base)).eval()

    def __setattr__(self, name: str, value: Any) -> None:
        """What is the model's (`config`, `generation_config`, `loss_function`, ...) is set on the model."""
        model = self.__dict__.get("_modules", {}).get("model")
        if name == "model" and model is not None and value is not model:
            raise ValueError("a PromptedModel is for the model that it was made with: make one of the other model")
        ours = model is None or name in self.__dict__ or hasattr(type(self), name) or name in self._modules
        if ours or not hasattr(model, name):
            super().__setattr__(name, value)
        else:
            setattr(model, name, value)

    def _replicate_for_data_parallel(self) -> Any:
        raise TypeError(
            "a PromptedModel is not for nn.DataParallel, which transformers' Trainer takes where one process sees "
            "several GPUs: start a process for each (torchrun or accelerate launch), or show it one "
            "(CUDA_VISIBLE_DEVICES=0)"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name in _WITHOUT_PROMPT:  # the former: not there yet
                raise
            return getattr(self.model, name)
