"""SoftPrompt: a trainable prompt for any Hugging Face model."""

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..loss.kinds import check_counted, goes_by_items, has_causal_loss, warn_of_ignored
from ..loss.model_loss import ModelLoss
from ..models import describe, unwrapped
from ..models.embedding import are_several, device_of, is_sharded
from ..models.families import has_own_hooks, has_replaced_forward, hooks_of
from ..models.info import check_tensors
from ..models.trial import is_read
from ..modes import MODES, Mode, mode_for
from ..modes.base import LaidOut
from ..modes.flattened import as_rows
from ..op import Batch, Layout, Prompt
from ..serving.heads import new_parts, perhaps_new
from ..serving.saving import Saving
from .encoder import PromptEncoder
from .generate import (
    CachedPrompt,
    check_caches,
    check_for_ids,
    copies_of_rows,
    generate_behind,
    mark_caches,
    mask_of,
    most_new_tokens,
    taking_embeddings,
)
from .initial import initial_prompt

__all__ = ["SoftPrompt"]


class SoftPrompt(Saving):
    """Trainable virtual tokens before a model's input; the model's weights are not touched, and it is no submodule.

        prompt = SoftPrompt(model, length=20)
        out = model(**prompt(input_ids, attention_mask, labels=labels))
        ids = model.generate(**prompt(input_ids, attention_mask), max_new_tokens=32)

    The same text gives the same output alone and in a padded batch, on whichever side the padding is: the prompt stands
    next to the text, and models that take `position_ids` get those of the text.

    Args:
        model: a transformers model that takes `inputs_embeds`. Freeze it yourself: `model.requires_grad_(False)`.
        length: virtual tokens of the prompt, m.
        init: what the prompt starts as: `"vocab"` (sampled token rows), `"normal"`, a text, or a tensor [m, d].
        num_prompts: K for a bank of prompts; each row of a batch then names its own with `prompt_index`.
        encoder: None, or the network that makes the prompt (P-tuning v1): `"mlp"` or `"lstm"`.
        encoder_hidden_size, encoder_num_layers, encoder_dropout: of the encoder; d, 2 and 0 by default.
        tokenizer: for `init` as a text: a tokenizer, or the name or folder of one; the model's own by default.

    `prompt_embeddings` is an fp32 parameter, [m, d] or [K, m, d], by which `length` and `num_prompts` go; `info` has
    the facts about the model that matter.
    """

    model: Any

    def __init__(
        self,
        model: Any,
        length: int = 20,
        *,
        init: str | Tensor = "vocab",
        num_prompts: int | None = None,
        encoder: str | None = None,
        encoder_hidden_size: int | None = None,
        encoder_num_layers: int = 2,
        encoder_dropout: float = 0.0,
        tokenizer: Any = None,
    ):
        super().__init__()
        if not isinstance(length, int):
            raise TypeError(f"length is the number of virtual tokens, an int; it is a {type(length).__name__}")
        if length < 0 or (num_prompts is not None and num_prompts < 1):
            raise ValueError(f"length must be 0 or more and num_prompts 1 or more; they are {length} and {num_prompts}")
        self.info = describe(model)
        self._modes: dict[str, Mode | TypeError] = {}  # those that it was checked for, or why not
        self._cached: CachedPrompt | None = None  # for generate
        self._read: set[str] = set()  # arguments that the model is known to read behind a prompt
        self.model_loss = ModelLoss(self.info)
        self.__dict__["model"] = model  # past nn.Module, which would make it a submodule
        self._new, self._perhaps = new_parts(unwrapped(model)), perhaps_new(unwrapped(model))
        self.base_model = str(getattr(model.config, "_name_or_path", "") or "")

        table = model.get_input_embeddings()
        prompts = [
            initial_prompt(init, length, table, tokenizer or self.base_model)
            for _ in range(1 if num_prompts is None else num_prompts)
        ]
        device = device_of(table)
        prompt = prompts[0] if num_prompts is None else torch.stack(prompts)
        self.prompt_embeddings = nn.Parameter(prompt.to(device))
        self.encoder = None
        if encoder is not None:
            options = (encoder_hidden_size, encoder_num_layers, encoder_dropout)
            self.encoder = PromptEncoder(encoder, prompt.shape[-1], *options).to(device)

    @property
    def length(self) -> int:
        """Virtual tokens, m."""
        return self.prompt_embeddings.shape[-2]

    @property
    def num_prompts(self) -> int | None:
        """Prompts of a bank, K; None of one prompt."""
        return None if self.prompt_embeddings.dim() == 2 else self.prompt_embeddings.shape[0]

    def embeddings(self) -> Tensor:
        """The prompt itself, [m, d] or [K, m, d]: the parameter, or what the encoder makes of it."""
        return self.prompt_embeddings if self.encoder is None else self.encoder(self.prompt_embeddings)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_index: Tensor | None = None,
        mode: str = "prepend",
        *,
        lengths: list[int] | Tensor | None = None,
        report: Callable[[LaidOut], Any] | None = None,
        **flattened: Any,
    ) -> dict[str, Any]:
        """The keyword arguments for `model(...)` or `model.generate(...)`: those that the model's forward takes.

        Args:
            input_ids, attention_mask, token_type_ids: [B, n] each, as a tokenizer returns them, padded on either side.
            labels: one per token [B, n], which get -100 on virtual tokens and padding; anything else (classes [B], the
                labels of an encoder-decoder) goes to the model as it is.
            prompt_index: [B] int64 in [0, K), with `num_prompts`.
            mode: `"prepend"`, m + n columns a row. The others are for one forward, not for `generate`; the model's
                attention must go through transformers' AttentionInterface, its outputs be one per token, and it keeps
                the attention implementation that it gets for them, under which every other call is as before.
                `"packed"`, no padding: one row of all sequences, concatenated, m + text rows each, and so are the
                outputs; `cu_seq_lens_q` [B+1] says where each begins.
                `"shared"`, for a causal model without dropout: one row of m - 1 virtual tokens, and then of each text
                with the last virtual token before it. `cu_seq_lens_q` is [B+2]: the first sequence is the prompt
                (where m < 2, there is none, and it is [B+1]).
                `"auto"`: the one of these that has the fewest rows and is exact for the model as it stands;
                `"prepend"` where somebody has put a hook or another forward on the prompt.
            lengths: for `"packed"` and `"shared"`, the number of real tokens of each row where it is known on the host,
                as `prepend_prompt` takes it.
            report: called with what is returned, the mode that `"auto"` stands for and the batch in rows.
            flattened: what a padding-free collator (transformers' `DataCollatorWithFlattening`) gives with its
                [1, T] `input_ids` and `labels`: `position_ids`, `cu_seq_lens_q`, ... Each sequence gets the prompt.

        Returns:
            `inputs_embeds` [B, m + n, d], `attention_mask`, and what else was given or is needed. Outputs of the model
            have the prompt's columns too: `logits[:, m:]` are those of the tokens, column by column. (Not of a
            classifier of whole texts, which reads one end of a row: texts that are padded there are turned round, and
            the hidden states of tokens are where the `attention_mask` that is returned says.)

        Raises:
            ValueError: more columns than the model has positions; padding that it cannot be told of.
            TypeError: a mode that the model cannot be served in, with the reason.
        """
        if (prompt_index is None) != (self.num_prompts is None):
            raise ValueError(
                "prompt_index chooses from the prompts of num_prompts: "
                + ("give one per row" if prompt_index is None else "this SoftPrompt has one prompt only")
            )
        prompt, info = Prompt(self.embeddings(), prompt_index), self.info
        m = prompt.vectors.shape[-2]
        check_tensors(attention_mask=attention_mask, labels=labels)
        if not flattened:
            info.check_room(m, input_ids)
        if info.per_token and not info.labels_are_rows and labels is not None and labels.shape != input_ids.shape:
            raise ValueError(
                f"labels must be {list(input_ids.shape)}, one per token, as input_ids; they are {list(labels.shape)}"
            )
        per_token = labels is not None and not info.labels_are_rows and labels.shape == input_ids.shape
        types = token_type_ids if "token_type_ids" in info.takes else None
        batch = Batch(input_ids, attention_mask, types, _off_padding(labels, attention_mask) if per_token else None)
        if flattened:
            if lengths is not None:
                raise ValueError("lengths is for padded rows; position_ids or cu_seq_lens_q say that there are none")
            batch, lengths = as_rows(batch, **flattened)
            info.check_room(m, batch.input_ids)
        if m and per_token:
            self.model_loss.known(warn_of_ignored, self.model, None)
        if m == 0 and per_token and self.has_causal_loss:
            batch = batch._replace(labels=_without_first(batch))
        if mode == "auto":
            exact = not self._has_own_forward and self.model_loss.is_exact_in_one_row(self.model, labels, per_token)
            served = self._fewest_rows(prompt, batch) if exact else self._mode("prepend")
        elif mode in MODES:
            served = self._mode(mode)
        else:
            raise ValueError(f"mode must be one of auto, {', '.join(MODES)}; it is {mode!r}")
        if served.packed:
            self.model_loss.check_in_one_row(self.model, mode, per_token)
        obstacle = served.obstacle(self.model, prompt)
        if obstacle is not None:
            raise ValueError(f"mode={mode!r}: {obstacle}")
        if not served.packed:
            if (
                lengths is not None
                and batch.attention_mask is None
                and any(int(one) != input_ids.shape[-1] for one in lengths)
            ):
                raise ValueError("lengths tells of padding, and no attention_mask says where it is: give it, too")
            if lengths is not None and not flattened and mode != "auto":
                raise ValueError(f"lengths is for mode='packed'; in mode={mode!r} no row is dropped")
            lengths = None
        info.check_mask(None if flattened else batch.attention_mask, served.packed and lengths is None)
        embedded = served.embed(self.model, batch, prompt, Layout(lengths=lengths))
        inputs = served.inputs(self.model, embedded, prompt)
        if labels is not None and not per_token:
            inputs["labels"] = labels
        if report is not None:
            report(LaidOut(served, batch, m, inputs))
        return inputs

    def laid_out(self, *given: Any, **flattened: Any) -> LaidOut:
        """`self(...)`, with its hooks, and how it is laid out."""
        found: list[LaidOut] = []
        inputs = self(*given, **flattened, report=found.append)
        if not found:
            raise TypeError(f"the forward of {type(self).__name__} does not hand `report` on to SoftPrompt's")
        mode, batch, m, before = found[-1]
        given, made = inputs["inputs_embeds"].shape, before["inputs_embeds"].shape
        if given[:2] != made[:2]:
            raise ValueError(
                f"a forward or hook of the {type(self).__name__} makes inputs_embeds {[*given]} of {[*made]}, and "
                "nothing says which columns are the text's then: give it more virtual tokens by embeddings()"
            )
        return LaidOut(mode, batch, m, inputs)

    @property
    def _has_own_forward(self) -> bool:
        """Whether somebody has put a forward or a hook on it, which may know rows [B, m + n] alone."""
        kind: Any = type(self)
        of_ours = kind.forward is SoftPrompt.forward and kind.__call__ is nn.Module.__call__
        return not of_ours or has_replaced_forward(self) or has_own_hooks(self)

    def loss(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_index: Tensor | None = None,
        mode: str = "auto",
        *,
        num_items_in_batch: Tensor | int | None = None,
        lengths: list[int] | Tensor | None = None,
        **flattened: Any,
    ) -> Tensor:
        """The model's own loss on a batch, a scalar: `model(**self(...)).loss`, by as little work as gives the same.

        The mode with the fewest rows, and a causal model's head on those rows alone that predict a label (checked with
        a short text at the first call; where a head cannot be told of them, on all rows). Where the logits of a batch
        are large, in chunks of rows.

        Args:
            labels: as `forward` takes them.
            num_items_in_batch: what the sum over the labels is divided by, as the Trainer gives it under gradient
                accumulation; their own number by default.

        Raises:
            ValueError: no labels; `num_items_in_batch` for a model whose loss does not go by it; what `forward` raises.
        """
        if labels is None:
            raise ValueError("a loss needs labels: one per token, or what else the model takes")
        inputs = self(
            *(input_ids, attention_mask, token_type_ids, labels, prompt_index, mode), lengths=lengths, **flattened
        )
        inputs |= self.items(num_items_in_batch, labels, attention_mask)
        loss = self.model_loss.of(self.model, inputs)
        if loss is None:
            raise ValueError(f"{self.info.name} gives no loss for labels alone: call it, model(**prompt(...), ...)")
        return loss

    def items(
        self, num_items_in_batch: Tensor | int | None, labels: Tensor | None, attention_mask: Tensor | None
    ) -> dict[str, Any]:
        """The first as an argument of the model, where given; ValueError where its loss would not go by it."""
        if num_items_in_batch is None:
            return {}
        if not self.goes_by_items:
            raise ValueError(
                f"the loss of {self.info.name} does not go by num_items_in_batch: leave it out, and weigh the "
                "batches' losses"
            )
        if not self.info.labels_are_rows:
            check_counted(labels, attention_mask)
        return {"num_items_in_batch": num_items_in_batch}

    def check_read(self, given: dict[str, Any], laid_out: LaidOut) -> None:
        """ValueError for a tensor of real numbers that the model reads with ids alone, as some do images or audio."""
        batch = laid_out.batch
        inputs = {name: value for name, value in laid_out.inputs.items() if name != "labels"}
        for name, value in given.items():
            known = not torch.is_tensor(value) or value.dim() < 2 or not value.is_floating_point() or name in self._read
            if known:
                continue
            if torch.compiler.is_compiling():
                raise ValueError(f"call it with {name} once without torch.compile: whether it is read has to be tried")
            read = is_read(unwrapped(self.model), inputs, batch, given, name)
            if read is False:
                raise ValueError(
                    f"{self.info.name} reads {name} only where it is given input_ids, and a prompt is given as "
                    "embeddings: it would change nothing, so leave it out, or take a model that reads it with "
                    "inputs_embeds"
                )
            if read:
                self._read.add(name)

    @property
    def has_causal_loss(self) -> bool:
        """Whether the loss of a token's label is that of the row before it."""
        return self.model_loss.find(has_causal_loss, self.model)

    @property
    def goes_by_items(self) -> bool:
        """Whether the model's loss is divided by `num_items_in_batch`: those of classifiers, for one, are not."""
        return self.model_loss.find(goes_by_items, self.model)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        prompt_index: Tensor | None = None,
        *,
        keep_prompt: bool = False,
        **options: Any,
    ) -> Any:
        """What `model.generate(**self(input_ids, attention_mask), **options)` returns: new tokens only.

        But that penalties and whatever else reads the tokens so far see those of the text, too.

        A causal model's keys and values of the prompt are computed once for the batch, not in every row. Where that
        would not be the same (padding on the left with sliding windows, or with `return_dict_in_generate`, from whose
        cache a next call may go on, a bank, token types, dropout, another cache, a penalty on repetitions, which reads
        the mask, hooks and blocks of yours in the model, arguments of its forward or a `generation_config` among the
        options), and where a model keeps something else, they are computed in every row.

        Args:
            input_ids, attention_mask, token_type_ids: [B, n] each, padded on the left, as `generate` wants it.
            keep_prompt: keep the prompt's keys and values for the next call, until the prompt changes. It is your word
                that the model does not: weights that were changed and adapters cannot be noticed.
            options: `generate`'s own. `max_length` and `min_length`, those of a `generation_config` too, count virtual
                tokens as well (PromptedModel's do not).

        Raises:
            TypeError: a model that generates nothing.
            ValueError: what `forward` raises; what `model.generate` does right with ids alone: `prefill_chunk_size`,
                `assistant_model`, `assistant_early_exit`, `prompt_lookup_num_tokens`.
        """
        check_tensors(attention_mask=attention_mask)
        if not self.info.has_decoder:
            check_for_ids(self.model, options)
            if attention_mask is None and torch.is_tensor(input_ids):
                attention_mask = mask_of(self.model, input_ids, options)
        given = (input_ids, attention_mask, token_type_ids, None, prompt_index)
        if not self.info.has_decoder and attention_mask is not None and bool((attention_mask[:, -1:] == 0).any()):
            warnings.warn(
                "attention_mask has padding at the end of a row, from which generate goes on: pad on the left "
                "(tokenizer.padding_side = 'left')",
                stacklevel=2,
            )
        if torch.is_tensor(input_ids):
            columns = self.length + input_ids.shape[-1]
            new = 0 if self.info.has_decoder else most_new_tokens(self.model, options, columns)
            self.info.check_left(attention_mask, columns + new)
            self.info.check_steady(columns, new)
        own = {*vars(self.model.generation_config), "labels"}  # those of Seq2SeqTrainer, which the model leaves alone
        tensors = [name for name, value in options.items() if torch.is_tensor(value) or name == "encoder_outputs"]
        beside = {name: options[name] for name in tensors if name not in own}
        if beside:
            self.info.check_arguments(beside, input_ids, self.length)
            self.check_read(beside, self.laid_out(*given, "prepend"))
        inputs = None
        # A forward of a sharded model is one of all processes, and which rows the others have nobody knows here.
        sharded = any(map(is_sharded, self.model.parameters()))
        called = hooks_of(self) or self._has_own_forward  # torch's hooks, too: that of pruning makes the prompt anew
        copies = None if sharded or called else copies_of_rows(self.model, options, attention_mask)
        if self.length and copies is not None and token_type_ids is None:
            if self._cached is None:
                self._cached = CachedPrompt(self.model, self.info)
            self.info.check_room(self.length, input_ids)
            prompt = Prompt(self.embeddings(), prompt_index)
            inputs = self._cached.inputs(self.model, Batch(input_ids, attention_mask), prompt, copies, keep_prompt)
        inputs = self(*given) if inputs is None else inputs
        prompt = Prompt(self.embeddings(), prompt_index)  # which a hook may have renewed
        check_caches(options, prompt)
        with taking_embeddings(self.model):
            if not input_ids.shape[1] or self.info.has_decoder or options.get("custom_generate") is not None:
                out = self.model.generate(**inputs, **options)
            else:
                out = generate_behind(self.model, input_ids, inputs, options)
        mark_caches(options, prompt)
        if isinstance(out, Mapping):  # custom_generate's may be anything
            mark_caches(out, prompt)
        return out

    def _mode(self, name: str) -> Mode:
        if name not in self._modes:
            try:
                self._modes[name] = mode_for(name, self.model, self.info)
            except TypeError as error:
                self._modes[name] = error
        mode = self._modes[name]
        if isinstance(mode, TypeError):
            raise mode.with_traceback(None)
        return mode

    def _fewest_rows(self, prompt: Prompt, batch: Batch) -> Mode:
        """Mode "auto": of those that can serve this model as it stands; of two with as many rows, the plainer."""
        m, (B, n), mask = prompt.vectors.shape[-2], batch.input_ids.shape, batch.attention_mask
        tokens = B * n if mask is None else int((mask != 0).sum())
        rows = {"prepend": B * (m + n), "packed": B * m + tokens, "shared": max(m - 1, 0) + B * min(m, 1) + tokens}
        if len(self._modes) < len(rows) and are_several():
            for name in rows:  # whatever rows each process has, as the probe of a sharded model is one of all
                with suppress(TypeError, ValueError):
                    self._mode(name)
        for name in sorted(rows, key=rows.__getitem__):
            try:
                mode = self._mode(name)
            except (TypeError, ValueError):
                continue
            if mode.obstacle(self.model, prompt) is None:
                return mode
        return self._mode("prepend")

    def extra_repr(self) -> str:
        return f"prompt_embeddings={[*self.prompt_embeddings.shape]}, model={type(self.model).__name__}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A prompt for the same model; copied as part of something else, which may hold both, for the model's copy. (As
        # the first thing in a tuple it cannot know of the rest: docs/models.md.)
        model = copy.deepcopy(self.model, memo) if memo else self.model
        copied = memo[id(self)] = type(self).__new__(type(self))
        found: dict[str, Any] = {"_cached": None, "model_loss": ModelLoss(self.info)}  # of the model: it is found again
        rest = {key: value for key, value in self.__dict__.items() if key not in ("model", *found)}
        copied.__dict__.update(copy.deepcopy(rest, memo), **found, model=model)
        return copied


def _off_padding(labels: Any, attention_mask: Any) -> Any:
    """-100 where the mask is 0, in each mode; what does not fit together the op says itself."""
    if attention_mask is None or attention_mask.shape != labels.shape or attention_mask.device != labels.device:
        return labels
    return labels.masked_fill(attention_mask == 0, -100)


def _without_first(batch: Batch) -> Tensor:
    """Labels for a causal loss without virtual tokens: what predicts a text's first token would be another text's."""
    assert batch.labels is not None
    there = torch.ones_like(batch.labels) if batch.attention_mask is None else (batch.attention_mask != 0).long()
    return batch.labels.masked_fill((there.cumsum(1) == 1) & (there == 1), -100)
