"""FastPTuning: the drop-in for the torch.cat module, a frozen model with a prompt in front and a linear head."""

from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import adapter, classifier_files, embedding
from .additive_mask import takes_additive_mask
from .initial import initial_prompt
from .packable import check_packable
from .packing import packed_attention, refuse_checkpointing
from .pooling import POOLINGS, mean_of_tokens, pooled_columns, pooled_rows
from .precision import DTYPES, store_linears
from .prompt_rows import prompt_rows_only
from .pruning import pooled_rows_only, prunable
from .serving import Serving, is_causal

if TYPE_CHECKING:
    from transformers.modeling_outputs import SequenceClassifierOutput

__all__ = ["FastPTuning"]

MODES = ("prepend", "packed")


class FastPTuning(nn.Module):
    """Prompt tuning for text classification: only `prompt_embeddings` and `classifier` are trained.

        prompt_embeddings [m, d]  input_ids [B, n]
                     └──── prepend ────┘
                       [B, m + n, d]  ──  bert (frozen)  ──  pooling  ──  classifier  ──  logits [B, num_labels]

    Args:
        model_name: a hub id or a folder for `AutoModel.from_pretrained`, or a loaded encoder or decoder without a head,
            which is frozen.
        prompt_length: rows of the prompt, m.
        num_labels: classes; 1 is a regression.
        pooling: the row of the last hidden state that is classified: `"first"` is row 0, the first prompt row, as the
            torch.cat module has it; `"cls"` is the text's own first token (row m, behind any padding on the left);
            `"mean"` averages the text's tokens; `"last"` is its last token. A decoder, whose first rows no text
            reaches, takes one of the latter two.
        init: what the prompt starts as: `"normal"`, `"vocab"` (sampled token rows), a text, or a tensor [m, d].
        mode: `"prepend"`, the layout of the torch.cat module; `"packed"` leaves the padding out: the sequences go
            through the encoder one behind the other, each with attention to itself.
        prune: whether behind the last layer's attention only the pooled row is computed (and on a CPU, in the first
            layer of a BERT, the gradient of the prompt's rows alone). Done where the architecture is recognised and the
            pooling is not `"mean"`; by default in mode `"packed"`, as in mode `"prepend"` the logits are else the
            reference's bit by bit.
        additive_mask: in mode `"prepend"`, whether the encoder is given its padding mask as its attention adds it, and
            so neither asks anything of it nor builds another: a step then never waits for the GPU, and can be captured
            in a CUDA graph. Done where the architecture is recognised. (Where there is no padding, leave
            `attention_mask` out altogether: then no mask is made.)
        precision: `"bf16"` or `"fp16"` keeps the encoder's frozen linear layers so, and runs it under autocast; prompt
            and head stay in fp32. It changes an encoder that is handed in.
        id2label: names of the labels by their number, kept with the adapter.
        max_length: tokens to cut texts to, kept with the adapter; by default as many as the encoder has positions for.

    The parameters, their names and the order in which they are drawn are those of `reference.ReferencePTuning`: the
    same seed gives the same module, and either loads the other's `state_dict`.
    """

    def __init__(
        self,
        model_name: str | Path | nn.Module = "bert-base-uncased",
        prompt_length: int = 10,
        num_labels: int = 2,
        *,
        pooling: str = "first",
        init: str | Tensor = "normal",
        mode: str = "prepend",
        prune: bool | None = None,
        additive_mask: bool = False,
        precision: str | None = None,
        id2label: dict[int, str] | None = None,
        max_length: int | None = None,
    ):
        from transformers import AutoModel, PreTrainedModel  # heavy: with the first module, not with the package

        super().__init__()
        if prompt_length < 0 or num_labels < 1:
            raise ValueError(
                f"prompt_length must be 0 or more and num_labels 1 or more; they are {prompt_length} and {num_labels}"
            )
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; it is {pooling!r}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; it is {mode!r}")
        if precision is not None and precision not in DTYPES:
            raise ValueError(f"precision must be None, {' or '.join(map(repr, DTYPES))}; it is {precision!r}")
        if mode == "packed" and prompt_length == 0:
            raise ValueError(
                "mode='packed' needs a prompt of one row at least: a text without tokens would have no row"
            )
        if id2label is not None and sorted(map(int, id2label)) != list(range(num_labels)):
            raise ValueError(f"id2label must name the labels 0 to {num_labels - 1}; it has {sorted(id2label)}")
        if not isinstance(model_name, (str, Path, PreTrainedModel)):
            raise TypeError(f"model_name must be a name, a folder or a loaded encoder, not {type(model_name).__name__}")
        self.bert = model_name if isinstance(model_name, nn.Module) else AutoModel.from_pretrained(model_name)
        if self.bert.base_model is not self.bert:
            raise TypeError(f"{type(self.bert).__name__} has a head of its own: give the encoder in it, .base_model")
        if self.bert.config.is_encoder_decoder:
            raise TypeError(f"{type(self.bert).__name__} is encoder and decoder: give its encoder alone")
        self._serving = Serving(self.bert)
        # The layout of the reference where that applies; any other model gets what it takes to ignore padding.
        self._as_reference = hasattr(getattr(self.bert, "embeddings", None), "word_embeddings")
        if pooling in ("first", "cls") and not self._as_reference and is_causal(self.bert):
            raise ValueError(
                f"pooling={pooling!r} reads a row that no text reaches, as {type(self.bert).__name__} is causal: "
                "take 'last' or 'mean'"
            )
        if mode == "packed":
            check_packable(self.bert)
        prune = (mode == "packed") if prune is None else prune
        self.prune = bool(prune) and pooling != "mean" and prunable(self.bert)
        self.additive_mask = additive_mask and mode == "prepend" and takes_additive_mask(self.bert)
        self.precision = precision
        self.bert.requires_grad_(False)
        if precision is not None:
            store_linears(self.bert, precision)
        self.prompt_length, self.num_labels = prompt_length, num_labels
        self.pooling, self.mode = pooling, mode
        self.id2label = None if id2label is None else {int(key): str(name) for key, name in id2label.items()}
        self.base_model = _base_model(self.bert.config._name_or_path if model_name is self.bert else model_name)

        table = self.bert.get_input_embeddings()
        prompt = initial_prompt(init, prompt_length, table, self.base_model)
        self.prompt_embeddings = nn.Parameter(prompt.to(table.weight.device))
        width = getattr(self.bert.config, "word_embed_proj_dim", self.bert.config.hidden_size)  # the former: OPT's
        self.classifier = nn.Linear(width, num_labels).to(table.weight.device)

        positions = self._serving.max_positions
        room = None if positions is None else positions - prompt_length
        if room is not None and room < 1:
            raise ValueError(
                f"prompt_length={prompt_length} leaves no room for text: "
                f"{type(self.bert).__name__} has {positions} positions"
            )
        if max_length is None:
            limit = positions or getattr(self.bert.config, "max_position_embeddings", None)
            max_length = None if limit is None else limit - prompt_length
        elif not 1 <= max_length <= (room or max_length):
            raise ValueError(f"max_length={max_length} is not between 1 and {room}, the room for text")
        self.max_length = max_length

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> "Tensor | SequenceClassifierOutput":
        """Classify a batch of tokenised texts.

        Args:
            input_ids, attention_mask, token_type_ids: [B, n] each, as a tokenizer returns them. An encoder that takes
                no token types (DistilBERT) is not given any.
            labels: [B] int64 class numbers; float [B] with `num_labels=1` for a regression, float [B, num_labels] for
                several labels at once.

        Returns:
            Logits [B, num_labels], or with `labels` a `SequenceClassifierOutput` of `loss` and `logits`.
        """
        self._serving.check_room(self.prompt_length, input_ids.shape[-1])
        if "token_type_ids" not in self._serving.takes:
            token_type_ids = None
        tokens = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        order = None
        if self.mode == "packed" and attention_mask is not None:
            # Sequences of one length side by side share one attention call.
            order = (attention_mask != 0).sum(1).argsort()
            tokens = {key: None if value is None else value[order] for key, value in tokens.items()}
        try:
            inputs = self._prepend(**tokens)
        except IndexError:
            self._prepend(input_ids, attention_mask, token_type_ids)  # the same error, with the caller's row
            raise
        input_ids, attention_mask = tokens["input_ids"], tokens["attention_mask"]
        if "position_ids" not in self._serving.takes:
            inputs.pop("position_ids", None)
        pooled = self._pool(self._encode(inputs, input_ids, attention_mask), inputs, input_ids, attention_mask)
        if order is not None:
            pooled = pooled[order.argsort()]
        logits = self.classifier(pooled.to(self.classifier.weight.dtype))
        if labels is None:
            return logits
        from transformers.modeling_outputs import SequenceClassifierOutput

        return SequenceClassifierOutput(loss=_loss(logits, labels), logits=logits)

    def _prepend(self, input_ids, attention_mask, token_type_ids):
        serving, options = self._serving, {}
        if self.mode == "packed":
            options = {"packed": True, "position_start": serving.position_start}
        elif not self._as_reference:
            options = {"adjacent": True, "position_start": serving.positions_from(attention_mask)}
        if self.additive_mask:
            options["additive_mask"] = self._compute_dtype(input_ids.device)
        return embedding.prepend(
            self.bert.get_input_embeddings(),
            input_ids,
            attention_mask,
            prompt=self.prompt_embeddings,
            token_type_ids=token_type_ids,
            **options,
        )

    def _encode(self, inputs, input_ids, attention_mask):
        """The last hidden state: all rows, [B, S, d] or packed [1, T, d], or with `prune` the pooled ones."""
        if self.mode == "packed" or self.prune:
            from .untraced import untraced  # hooks and a change of attention for one call are nothing to trace through

            refuse_checkpointing(self.bert)
            return untraced(self._encode_with_savings, inputs, input_ids, attention_mask)
        with self._precision(input_ids.device):
            return self.bert(**inputs).last_hidden_state

    def _precision(self, device):
        return nullcontext() if self.precision is None else torch.autocast(device.type, DTYPES[self.precision])

    def _compute_dtype(self, device):
        """What attention computes in: autocast's dtype, the caller's or that of `precision`, else the encoder's."""
        if self.precision is not None:
            return DTYPES[self.precision]
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.bert.get_input_embeddings().weight.dtype

    def _encode_with_savings(self, inputs, input_ids, attention_mask):
        with ExitStack() as savings:
            if self.mode == "packed":
                inputs["packed"] = savings.enter_context(packed_attention(self.bert))
            if self.prune:
                columns = self._columns(inputs, input_ids, attention_mask)
                if isinstance(columns, int):
                    columns = torch.full((len(input_ids),), columns, device=input_ids.device)
                savings.enter_context(pooled_rows_only(self.bert, columns))
                savings.enter_context(prompt_rows_only(self.bert, lambda: self._prompt_rows(inputs)))
            savings.enter_context(self._precision(input_ids.device))
            return self.bert(**inputs).last_hidden_state

    def _columns(self, inputs, input_ids, attention_mask):
        """[B], or one for all: where the pooled row of each text stands in the hidden state; not for `"mean"`."""
        n, m = input_ids.shape[1], self.prompt_length
        if self.mode == "packed":
            return pooled_rows(self.pooling, m, inputs["cu_seq_lens_q"].long())
        return pooled_columns(self.pooling, m, n, attention_mask, adjacent=not self._as_reference)

    def _prompt_rows(self, inputs):
        """[B * m]: numbers of the prompt's rows in the flattened batch, where the prompt is in front of every row."""
        embeds = inputs["inputs_embeds"]
        if self.mode == "packed":
            first = inputs["cu_seq_lens_q"][:-1].long()
        else:
            first = torch.arange(0, embeds.shape[0] * embeds.shape[1], embeds.shape[1], device=embeds.device)
        return (first[:, None] + torch.arange(self.prompt_length, device=embeds.device)).flatten()

    def _pool(self, hidden, inputs, input_ids, attention_mask):
        """[B, d]"""
        if self.prune:
            return hidden.reshape(len(input_ids), -1)
        if self.pooling == "mean":
            return mean_of_tokens(hidden, self.prompt_length, attention_mask, inputs.get("cu_seq_lens_q"))
        columns = self._columns(inputs, input_ids, attention_mask)
        if self.mode == "packed":
            return hidden[0, columns]
        if isinstance(columns, int):
            return hidden[:, columns]
        return hidden.take_along_dim(columns[:, None, None], 1)[:, 0]

    def gradient_checkpointing_enable(self, *args, **kwargs) -> None:
        """The encoder's own, which `transformers.Trainer` asks for."""
        self.bert.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The encoder's own."""
        self.bert.gradient_checkpointing_disable()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what is trained, and nothing of the encoder, into `folder`.

        `adapter_model.safetensors` holds the tensors and, in its header, the settings, so that the old adapter is
        replaced by the new one in a single step; `adapter_config.json` repeats the settings for people to read.
        """
        settings = {key: getattr(self, key) for key in classifier_files.SETTINGS}
        settings |= {"base_model_name_or_path": self.base_model, "model_type": self.bert.config.model_type}
        tensors = {name: tensor for name, tensor in self.state_dict().items() if name in classifier_files.TENSORS}
        adapter.save(folder, tensors, settings)

    @classmethod
    def from_pretrained(cls, folder: str | Path, model_name: str | Path | nn.Module | None = None) -> "FastPTuning":
        """The module that `save_pretrained` wrote, on its encoder, in eval mode.

        Args:
            folder: where the adapter is.
            model_name: the encoder, where it is not to be had under the name that the adapter was trained with.

        Raises:
            FileNotFoundError: no adapter in `folder`.
            ValueError: the file is no adapter of this class, or the encoder has another embedding width.
        """
        tensors, settings = classifier_files.load(folder)
        name, most = settings["base_model_name_or_path"], settings.get("max_length")
        if not name and model_name is None:
            raise ValueError(f"the adapter in {folder} does not name its encoder, which had no name: give model_name")
        trained_on = name or "an encoder without a name"
        wanted = {key: settings.get(key) for key in classifier_files.SETTINGS if key != "max_length"}
        model = model_name if model_name is not None else name
        rng = torch.random.get_rng_state()
        model = cls(model, **wanted)
        torch.random.set_rng_state(rng)
        if model_name is not None and not isinstance(model_name, nn.Module):
            model.base_model = _base_model(model_name)
        kinds = settings.get("model_type", model.bert.config.model_type), model.bert.config.model_type
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"the adapter in {folder} was trained on a {kinds[0]} ({trained_on}), and this is a {kinds[1]}"
            )
        own = dict(model.named_parameters())
        for key in classifier_files.TENSORS:
            if key not in tensors or tensors[key].shape != own[key].shape:
                found = "missing" if key not in tensors else f"{list(tensors[key].shape)}"
                other = model.base_model or type(model.bert).__name__
                raise ValueError(
                    f"the adapter in {folder} does not fit {other}: {key} is {found}, "
                    f"the model needs {list(own[key].shape)} (trained on {trained_on})"
                )
        model.load_state_dict({key: tensors[key] for key in classifier_files.TENSORS}, strict=False)
        model.max_length = min(filter(None, (most, model.max_length)), default=None)
        return model.eval()

    def extra_repr(self) -> str:
        return (
            f"prompt_length={self.prompt_length}, pooling={self.pooling!r}, mode={self.mode!r}, "
            f"prune={self.prune}, additive_mask={self.additive_mask}, precision={self.precision!r}"
        )


def _base_model(name):
    """The name to keep with an adapter: that of a folder must not depend on where it is read from."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else str(name)


def _loss(logits, labels):
    """The loss that transformers' sequence classifiers take for labels of this dtype and shape."""
    if not labels.is_floating_point() and logits.shape[1] > 1:
        return F.cross_entropy(logits, labels.view(-1).long())
    if logits.shape[1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.view(-1).to(logits.dtype))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
