"""The forward of a PEFT prompt-tuning model, on the fused op: one line for those who stay with PEFT."""

import inspect
import warnings
from functools import cache

import torch
from torch import nn

from . import embedding
from .serving import Serving

__all__ = ["accelerate"]


def accelerate(peft_model: nn.Module, *, fix_left_padding: bool = False) -> nn.Module:
    """Let the forward of a PeftModel use the fused op; a second call undoes it, whatever its arguments.

        model = ptuning_fast.accelerate(peft.get_peft_model(base, peft.PromptTuningConfig(...)))

    Logits, loss and warnings stay those of PEFT's own forward, for PROMPT_TUNING and P_TUNING as the active adapter. A
    call that is not that of such an adapter over `input_ids` (`inputs_embeds`, `past_key_values`, tensors on several
    devices, another kind of adapter) goes to PEFT's own forward, which is decided anew at each call. `generate` is
    PEFT's own throughout: it does not come through this forward.

    Only this instance changes: its class becomes a subclass of the one it had, with another `forward`. Copies and
    pickles of it are accelerated too.

    Args:
        peft_model: a PeftModelForCausalLM, ...ForSequenceClassification, ...ForTokenClassification,
            ...ForQuestionAnswering or ...ForFeatureExtraction with at least one prompt-tuning or P-tuning adapter.
        fix_left_padding: PEFT counts the padding on the left as positions, and leaves it between the prompt and the
            text. With True the layout is that of `SoftPrompt`, where a text gives on its own columns what it gives
            alone: the prompt stands behind the padding, next to the text; a base model that takes `position_ids` is
            given those of the text; and before a sequence classifier, which reads one end of a row, the padding is
            moved to the other end. It does not reach `generate`.

    Returns:
        `peft_model` itself.

    Raises:
        TypeError: `peft_model` is no PeftModel; with `fix_left_padding`, a base model that `SoftPrompt` does not take.
        ValueError: it has no adapter that this is for, or a forward that is not PEFT's own. With `fix_left_padding`, at
            the call: padding on the left of a base model that cannot be told its positions.
        ImportError: PEFT is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("accelerate needs PEFT: pip install peft") from error
    if not isinstance(peft_model, peft.PeftModel):
        raise TypeError(
            "accelerate takes a PeftModel, as peft.get_peft_model or PeftModel.from_pretrained returns it, "
            f"not {type(peft_model).__name__}"
        )
    kind = type(peft_model)
    accelerated = isinstance(peft_model, _Accelerated)
    # disable_adapter() leaves the class's forward on the instance, bound. Anything else there is somebody else's.
    bound = kind.forward.__get__(peft_model)
    if vars(peft_model).get("forward", bound) != bound or (accelerated and _Accelerated not in kind.__bases__):
        raise ValueError(
            f"something else has replaced the forward of this {kind.__name__} (disable_adapter(), a device_map, "
            "Accelerator.prepare, ...): accelerate before that, and undo after it is gone"
        )
    if accelerated:
        vars(peft_model).pop("forward", None)
        del peft_model._serving
        peft_model.__class__ = kind._peft_kind
        return peft_model
    _refuse(peft_model, peft)
    serving = Serving(peft_model.base_model) if fix_left_padding else None
    vars(peft_model).pop("forward", None)
    peft_model.__class__ = _accelerated(kind)
    peft_model._serving = serving
    return peft_model


# The classes of PEFT whose forward is known here, and the adapters that are an embedded prompt and nothing else.
_KINDS = tuple(
    f"PeftModelFor{task}"
    for task in ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "FeatureExtraction")
)
_ADAPTERS = ("PROMPT_TUNING", "P_TUNING")


def _refuse(model, peft):
    """ValueError for a PeftModel whose forward has nothing that the op could do, with the reason."""
    name = type(model).__name__
    if isinstance(model, peft.PeftModelForSeq2SeqLM):
        raise ValueError(f"{name} is not covered: PEFT puts a prompt before encoder and decoder, each in its own way")
    if _peft_name(type(model)) is None:
        raise ValueError(f"the forward of {name} is none that is covered, which are those of {', '.join(_KINDS)}")
    types = sorted({getattr(config.peft_type, "value", config.peft_type) for config in model.peft_config.values()})
    if not set(types) & set(_ADAPTERS):
        raise ValueError(
            f"this {name} has no adapter of type {' or '.join(_ADAPTERS)} (only {', '.join(types) or 'none'}), "
            "so there is no prompt to be put in front"
        )


def _peft_name(kind):
    """Which of `_KINDS` has the forward of `kind`, or None: a subclass may have one of its own."""
    import peft

    return next((name for name in _KINDS if getattr(peft, name).forward is kind.forward), None)


class _Accelerated:
    """What tells an accelerated model's class from PEFT's, which is its `_peft_kind`.

    `_serving`, on the instance, is what the base model takes, with `fix_left_padding`; None without.
    """

    def __reduce__(self):
        # The class is not to be found by its name: a pickle has PEFT's.
        return _blank, (self._peft_kind,), vars(self)


def _blank(peft_kind):
    kind = _accelerated(peft_kind)
    return kind.__new__(kind)


@cache
def _accelerated(kind):
    """The subclass of PEFT's `kind` with the fused forward."""
    signature = inspect.signature(kind.forward)
    names = [each.name for each in signature.parameters.values() if each.kind is each.POSITIONAL_OR_KEYWORD][1:]
    peft_name = _peft_name(kind)

    def forward(self, *args, **kwargs):
        given = dict.fromkeys(names) | dict(zip(names, args)) | kwargs
        understood = len(args) <= len(names) and not any(name in kwargs for name in names[: len(args)])
        if not understood or not _is_ours(self.active_peft_config, given):
            return kind.forward(self, *args, **kwargs)
        return _forward(self, peft_name, names, given)

    # Not functools.wraps: what unwraps a model (Accelerate does) would follow it down to PEFT's forward.
    forward.__doc__, forward.__signature__ = kind.forward.__doc__, signature
    return type(kind.__name__, (_Accelerated, kind), {"forward": forward, "_peft_kind": kind})


def _is_ours(config, given):
    input_ids = given["input_ids"]
    if config.peft_type not in _ADAPTERS or input_ids is None:
        return False
    if given["inputs_embeds"] is not None or given.get("past_key_values") is not None:
        return False
    devices = {getattr(given.get(name), "device", None) for name in ("attention_mask", "token_type_ids", "labels")}
    return devices <= {None, getattr(input_ids, "device", None)}


def _forward(self, peft_name, names, given):
    """PEFT's forward for prompt tuning: `given` is handed on to the base model, with the prompt in front."""
    tokens = {"input_ids": given.pop("input_ids"), "attention_mask": given["attention_mask"]}
    # What PEFT's forward has by name without handing it on. token_type_ids and position_ids are among these for
    # question answering: they get lost there.
    for name in ("inputs_embeds", "task_ids", "token_type_ids", "position_ids"):
        if name in names:
            del given[name]
    extends_types = peft_name in ("PeftModelForSequenceClassification", "PeftModelForTokenClassification")
    if given.get("position_ids") is not None:
        warnings.warn(
            "Position ids are not supported for parameter efficient tuning. Ignoring position ids.", stacklevel=2
        )
        given["position_ids"] = None
    if given.get("token_type_ids") is not None and not extends_types:
        warnings.warn(
            "Token type ids are not supported for parameter efficient tuning. Ignoring token type ids", stacklevel=2
        )
        given["token_type_ids"] = None
    if given["return_dict"] is None and peft_name not in ("PeftModelForCausalLM", "PeftModelForFeatureExtraction"):
        config = self.config
        given["return_dict"] = getattr(config, "return_dict", True) and not getattr(config, "torchscript", False)

    # Labels of tokens are the caller's business for token classification: PEFT expects m + n of them there.
    if extends_types and given.get("token_type_ids") is not None:
        tokens["token_type_ids"] = given["token_type_ids"].long()
    if peft_name == "PeftModelForCausalLM" and given["labels"] is not None:
        labels = given["labels"]  # torch.cat with -100 makes them int64
        tokens["labels"] = labels.to(torch.promote_types(labels.dtype, torch.int64))
    layout = {}
    if self._serving is not None:
        layout["position_start"] = self._serving.positions_from(tokens["attention_mask"])
        # A pooler reads the first column, and has nothing but its positions to be told.
        layout["adjacent"] = getattr(self.base_model, "pooler", None) is None
        tokens = self._serving.turned(tokens)
    inputs = embedding.prepend(self.word_embeddings, prompt=_prompt(self), **tokens, **layout)
    return self.base_model(**(given | inputs))


def _prompt(self):
    """[m, d]: what `get_prompt` repeats for each row, without its copy from the host, for which the GPU is waited."""
    encoder = self.prompt_encoder[self.active_adapter]
    table = encoder.embedding.weight
    if self.active_peft_config.inference_mode:
        return table
    tokens = torch.arange(len(self.prompt_tokens[self.active_adapter]), device=table.device)
    return encoder(tokens[None])[0]
