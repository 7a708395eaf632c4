"""FastPTuning: the drop-in for the torch.cat module, a frozen model with a prompt in front and a linear head."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from . import adapter, embedding
from .initial import initial_prompt
from .serving import Serving, is_causal

__all__ = ["FastPTuning"]

POOLINGS = ("first", "cls", "mean", "last")
MODES = ("prepend",)


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
        mode: `"prepend"`, the layout of the torch.cat module.
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
        id2label: dict[int, str] | None = None,
        max_length: int | None = None,
    ):
        super().__init__()
        if prompt_length < 0 or num_labels < 1:
            raise ValueError(
                f"prompt_length must be 0 or more and num_labels 1 or more; they are {prompt_length} and {num_labels}"
            )
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; it is {pooling!r}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; it is {mode!r}")
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
        self.bert.requires_grad_(False)
        self.prompt_length, self.num_labels = prompt_length, num_labels
        self.pooling, self.mode = pooling, mode
        self.id2label = None if id2label is None else {int(key): str(name) for key, name in id2label.items()}
        self.base_model = _base_model(self.bert.config._name_or_path if model_name is self.bert else model_name)

        table = self.bert.get_input_embeddings()
        prompt = initial_prompt(init, prompt_length, table, self.base_model)
        self.prompt_embeddings = nn.Parameter(prompt.to(table.weight.device))
        self.classifier = nn.Linear(self.bert.config.hidden_size, num_labels).to(table.weight.device)

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
    ) -> Tensor | SequenceClassifierOutput:
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
        options = {}
        if not self._as_reference:
            options = {"adjacent": True, "position_start": self._serving.positions_from(attention_mask)}
        inputs = embedding.prepend(
            self.bert.get_input_embeddings(),
            input_ids,
            attention_mask,
            prompt=self.prompt_embeddings,
            token_type_ids=token_type_ids,
            **options,
        )
        hidden = self.bert(**inputs).last_hidden_state
        logits = self.classifier(self._pool(hidden, attention_mask).to(self.classifier.weight.dtype))
        if labels is None:
            return logits
        return SequenceClassifierOutput(loss=_loss(logits, labels), logits=logits)

    def _pool(self, hidden, attention_mask):
        text = hidden[:, self.prompt_length :]
        if attention_mask is None:
            rows = {"first": hidden[:, :1], "cls": text[:, :1], "mean": text, "last": text[:, -1:]}
            return rows[self.pooling].mean(1)
        there = attention_mask != 0
        if self.pooling == "first":
            if self._as_reference:
                return hidden[:, 0]
            return _row(hidden, there.cumsum(1).eq(0).sum(1))  # behind the padding on the left
        if self.pooling == "cls":
            return _row(text, there.int().argmax(1))
        if self.pooling == "last":
            return _row(text, there.shape[1] - 1 - there.flip(1).int().argmax(1))
        there = there[:, :, None]
        return torch.where(there, text, 0).sum(1) / there.sum(1).clamp(min=1)

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
        settings = {
            "base_model_name_or_path": self.base_model,
            "prompt_length": self.prompt_length,
            "num_labels": self.num_labels,
            "pooling": self.pooling,
            "mode": self.mode,
            "id2label": self.id2label,
            "max_length": self.max_length,
        }
        tensors = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("bert.")}
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
        tensors, settings = adapter.load(folder)
        id2label = settings.get("id2label")
        try:
            name, length, labels = (settings[key] for key in ("base_model_name_or_path", "prompt_length", "num_labels"))
            wanted = {key: settings[key] for key in ("pooling", "mode")}
        except KeyError as error:
            raise ValueError(f"{folder} holds no FastPTuning adapter: its settings lack {error}") from None
        model = model_name if model_name is not None else name
        rng = torch.random.get_rng_state()
        model = cls(model, length, labels, id2label=id2label, **wanted)
        torch.random.set_rng_state(rng)
        if model_name is not None and not isinstance(model_name, nn.Module):
            model.base_model = _base_model(model_name)
        own = dict(model.named_parameters())
        for key in ("prompt_embeddings", "classifier.weight", "classifier.bias"):
            if key not in tensors or tensors[key].shape != own[key].shape:
                found = "missing" if key not in tensors else f"{list(tensors[key].shape)}"
                raise ValueError(
                    f"the adapter in {folder} does not fit {model.base_model}: {key} is {found}, "
                    f"the model needs {list(own[key].shape)} (trained on {name})"
                )
        model.load_state_dict(tensors, strict=False)
        model.max_length = settings.get("max_length", model.max_length)
        return model.eval()

    def extra_repr(self) -> str:
        return f"prompt_length={self.prompt_length}, pooling={self.pooling!r}, mode={self.mode!r}"


def _row(hidden, columns):
    """[B, d]: of each batch row the one at its column."""
    return hidden.take_along_dim(columns[:, None, None], 1)[:, 0]


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
