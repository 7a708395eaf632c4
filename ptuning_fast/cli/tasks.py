"""What is trained: a classifier's prompt and head, or the prompt of a language model. One class each, one interface.

    task = TASKS[options.task](options)         what its options say
    pairs = task.read(file)                     (texts, labels), or (prompts, completions)
    task.check(pairs, held_out)                 before a model is loaded
    model, frozen, tokenizer = task.build()     for the Trainer, and what of it is frozen
    rows = task.rows(pairs, tokenizer)          for the collator, of task.most tokens at most
    task.baseline(trainer, rows)                of the held-out rows, before training; task.measured(trainer) behind it

`from_adapter` and `predicted` are for `predict`.
"""

import math
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from ..classify.classifier import FastPTuning
from ..classify.packaged import DEMO, located
from ..classify.precision import DTYPES
from ..files.checkpoint import trained_only
from ..models import describe
from ..models.probe import is_causal
from ..modes import mode_for
from ..prompt.prompted_model import PromptedModel
from ..prompt.soft_prompt import SoftPrompt
from .docstrings import stdlib_docstrings
from .tables import InputError, read_labelled, read_pairs

__all__ = ["ADAPTERS", "DEMO", "TASKS", "Pairs", "Row", "spelled"]

Pairs = tuple[list[str], list[str]]  # texts and their labels; prompts and their completions
Row = dict[str, Any]  # a tokenised text, as the collator takes it


def load(kind: Any, name: str, **options: Any) -> tuple[Any, Any]:
    """(model, tokenizer) for a hub id, a folder or `DEMO`; InputError where one cannot be had."""
    try:
        path = located(str(Path(name).resolve()) if Path(name).is_dir() else name)
        model, tokenizer = kind.from_pretrained(path, **options), transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or ["?"])[0]
        raise InputError(f"cannot load the model {name!r} (--model names another): {reason}") from None
    if tokenizer.pad_token_id is None:  # decoders' often: any token does, as the mask hides it
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError(f"the tokenizer of {name!r} has no padding token, which batches of texts need")
    return model, tokenizer


def spelled(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


class Classify:
    """Texts and their labels, with FastPTuning."""

    collator = "DataCollatorWithPadding"

    def __init__(self, options: Namespace):
        self.options, self.names = options, [""]
        if options.text_column == options.label_column:
            raise InputError(f"the texts and the labels cannot both be in the column {options.text_column!r}")

    def read(self, file: str | None) -> Pairs:
        if file is None:
            return stdlib_docstrings()
        return read_labelled(file, self.options.text_column, self.options.label_column)

    def check(self, train: Pairs, held_out: Pairs | None = None) -> None:
        """Take the labels' names; InputError for labels that no classifier can be made of."""
        texts, labels = train
        self.names = sorted(set(labels))
        some = ", ".join(map(repr, self.names[:3]))
        if len(self.names) < 2:
            raise InputError(f"there is one label only, {some}: a classifier needs two or more")
        numbers = all(map(_is_number, self.names))
        if len(self.names) > 20 and len(texts) < (5 if numbers else 2) * len(self.names):
            kind = "numbers" if numbers else "labels"
            raise InputError(
                f"{len(texts)} rows have {len(self.names)} different {kind} in column {self.options.label_column!r} "
                f"({some}, ...), too many to tell apart: --label-column names another; to predict a number, take "
                "FastPTuning(num_labels=1) in Python"
            )
        unknown = sorted(set(held_out[1] if held_out else ()) - set(self.names))
        if unknown:
            raise InputError(
                f"the label {unknown[0]!r} is held out and is not among those trained on ({', '.join(self.names)})"
            )

    def said(self) -> str:
        return f", {len(self.names)} labels"

    def build(self) -> tuple[FastPTuning, Any, Any]:
        options = self.options
        encoder, tokenizer = load(transformers.AutoModel, options.model or DEMO)
        causal = not encoder.config.is_encoder_decoder and is_causal(encoder)
        model = FastPTuning(
            encoder,
            options.prompt_length,
            len(self.names),
            pooling=options.pooling or ("last" if causal else "mean"),
            init=options.init,
            mode=_packed_if_possible(encoder, options) if options.mode == "auto" else options.mode,
            precision=None if options.precision == "fp32" else options.precision,
            id2label=dict(enumerate(self.names)),
        )
        if not options.model:
            model.base_model = DEMO
        given = options.max_length or 128
        self.most = model.max_length = min(given, model.max_length or given)
        return trained_only(model), encoder, tokenizer

    def rows(self, pairs: Pairs, tokenizer: Any) -> list[Row]:
        """`cut` says that a text was longer than the model takes."""
        special, most = tokenizer.num_special_tokens_to_add(), self.most
        if most <= special:
            raise InputError(
                f"{most} tokens a text leave no room beside the {special} that the tokenizer adds: take a larger "
                "--max-length or a smaller --prompt-length"
            )
        texts, labels = pairs
        full = tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        rows = tokenizer(texts, truncation=True, max_length=most)
        number = {name: place for place, name in enumerate(self.names)}
        return [
            {key: rows[key][i] for key in rows} | {"labels": number[labels[i]], "cut": len(full[i]) > most}
            for i in range(len(texts))
        ]

    def baseline(self, trainer: Any, held_out: list[Row]) -> str:
        majority, count = Counter(row["labels"] for row in held_out).most_common(1)[0]
        return f"majority-class baseline ({self.names[majority]!r}) {count / len(held_out):.3f}"

    def measured(self, trainer: Any) -> dict[str, float]:
        return {"accuracy": trainer.evaluate()["eval_accuracy"]}

    @staticmethod
    def from_adapter(options: Namespace, name: str) -> tuple[Any, Any]:
        encoder, tokenizer = load(transformers.AutoModel, name)
        return FastPTuning.from_pretrained(options.adapter, encoder), tokenizer

    @staticmethod
    def predicted(model: Any, tokenizer: Any, texts: list[str], options: Namespace) -> list[str]:
        """A label for each text; with `--scores` its probability behind a tab. Texts are cut to `model.max_length`."""
        cut = {"truncation": True, "max_length": model.max_length} if model.max_length else {}
        batch = tokenizer(texts, padding=True, return_tensors="pt", **cut).to(model.prompt_embeddings.device)
        logits = model(**{key: value for key, value in batch.items() if key in tokenizer.model_input_names})
        scores, numbers = logits.float().softmax(-1).max(-1)
        labels = [str(number) if model.id2label is None else model.id2label[number] for number in numbers.tolist()]
        if not options.scores:
            return labels
        return [f"{label}\t{score:.4f}" for label, score in zip(labels, scores.tolist())]


class Language:
    """Texts, or prompts and their completions, before a language model that stays as it is, with PromptedModel."""

    collator = "DataCollatorForSeq2Seq"  # pads labels with -100

    def __init__(self, options: Namespace):
        self.options = options
        if not (options.model and options.train_file):
            raise InputError("--task lm needs a --model and a --train-file: none comes along for it")
        if options.prompt_length == 0:
            raise InputError("a --prompt-length of 0 leaves nothing to train")
        if options.pooling or options.compare:
            raise InputError("--pooling and --compare are for --task classify: leave them out")

    def read(self, file: str | None) -> Pairs:
        assert file is not None
        columns = self.options.prompt_column, self.options.completion_column
        return read_pairs(file, self.options.text_column, columns)

    def check(self, train: Pairs, held_out: Pairs | None = None) -> None:
        """Any text will do."""

    def said(self) -> str:
        return ""

    def build(self) -> tuple[PromptedModel, Any, Any]:
        options = self.options
        dtype = {} if options.precision == "fp32" else {"dtype": DTYPES[options.precision]}
        language_model, tokenizer = load(transformers.AutoModelForCausalLM, options.model, **dtype)
        if not is_causal(language_model):
            raise InputError(f"{options.model!r} is no language model: its tokens see those behind them")
        model = PromptedModel(
            language_model, options.prompt_length, mode=options.mode, init=options.init, tokenizer=tokenizer
        ).train()
        config: Any = language_model.config.get_text_config()
        positions = describe(language_model).max_positions or getattr(config, "max_position_embeddings", 2**31)
        self.most = min(options.max_length or 512, positions - options.prompt_length)
        if self.most < 2:
            raise InputError(f"a --prompt-length of {options.prompt_length} leaves no room for text: take less")
        # What this model or its dropout rules out is said now.
        model.prompt(torch.ones(1, 2, dtype=torch.int64), mode=options.mode)
        return model, language_model, tokenizer

    def rows(self, pairs: Pairs, tokenizer: Any) -> list[Row]:
        """Labels are on completions alone; texts that nothing stands before are continued in further rows.

        Tokens of both are made apart, as those of a prompt alone are when it is predicted from.
        """
        most = self.most
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        rows = []
        for place, (prompt, completion) in enumerate(zip(*pairs), 1):
            before = tokenizer(prompt, verbose=False)["input_ids"]
            before = before[:-1] if before[-1:] == end else before
            ids = before + tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"] + end
            if prompt and len(before) >= most:
                raise InputError(
                    f"row {place}: its prompt has {len(before)} tokens, and {most} are all that is taken of a row: "
                    "take a larger --max-length, or leave it out"
                )
            labels = [-100] * len(before) + ids[len(before) :] if prompt else ids
            for start in (0,) if prompt else range(0, len(ids), most):
                row = {"input_ids": ids[start : start + most], "labels": labels[start : start + most]}
                rows.append(row | {"cut": bool(prompt) and len(ids) > most})
        return rows

    def baseline(self, trainer: Any, held_out: list[Row]) -> str:
        return f"with the prompt as it began {spelled(self.measured(trainer))}"

    def measured(self, trainer: Any) -> dict[str, float]:
        loss = trainer.held_out_loss()
        return {"loss": loss, "perplexity": math.exp(min(loss, 700))}

    @staticmethod
    def from_adapter(options: Namespace, name: str) -> tuple[Any, Any]:
        if options.scores:
            raise InputError(f"--scores is for classifiers, and {options.adapter} is the prompt of a language model")
        model, tokenizer = load(transformers.AutoModelForCausalLM, name)
        tokenizer.padding_side = "left"
        prompt = SoftPrompt.from_pretrained(model, options.adapter, any_base=bool(options.model))
        return PromptedModel(model, prompt=prompt), tokenizer

    @staticmethod
    def predicted(model: Any, tokenizer: Any, texts: list[str], options: Namespace) -> list[str]:
        """What the model goes on with behind each text, its line breaks written as \\n."""
        batch = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
        given = batch["input_ids"], batch["attention_mask"]
        if not given[0].shape[1]:
            raise InputError("a text without tokens has nothing that the model could go on from")
        options_ = {"max_new_tokens": options.max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
        out = model.prompt.generate(*given, do_sample=False, **options_)
        return [text.replace("\n", "\\n") for text in tokenizer.batch_decode(out, skip_special_tokens=True)]


def _packed_if_possible(encoder: Any, options: Namespace) -> str:
    try:
        mode_for("packed", encoder, describe(encoder))
    except TypeError:
        return "prepend"
    return "packed" if options.prompt_length else "prepend"


def _is_number(text: str) -> bool:
    try:
        return float(text) is not None
    except ValueError:
        return False


TASKS: dict[str, Any] = {"classify": Classify, "lm": Language}
ADAPTERS: dict[str, Any] = {"FastPTuning": Classify, "PROMPT_TUNING": Language, "P_TUNING": Language}
