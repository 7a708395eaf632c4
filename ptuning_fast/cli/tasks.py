"""What is trained: a classifier's prompt and head, or the prompt of a language model. One class each, one interface.

    task = TASKS[options.task](options)         what its options say
    pairs = task.read(file)                     (texts, labels), or (prompts, completions)
    task.check(pairs, held_out)                 before a model is loaded
    model, frozen, tokenizer = task.build()     for the Trainer, and what of it is frozen
    rows = task.rows(pairs, tokenizer)          for the collator, of task.most tokens at most
    task.baseline(trainer, rows)                of the held-out rows, before training; task.measured(trainer) behind it

`from_adapter`, `predicted` and `instead`, the columns of a table without texts, are for `predict`; `own` options are
for this task alone.
"""

import itertools
import math
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import HFValidationError
from safetensors import SafetensorError

from ..classify.classifier import FastPTuning
from ..classify.packaged import DEMO, located
from ..classify.precision import DTYPES
from ..models import describe
from ..models.probe import is_causal
from ..modes import mode_for
from ..prompt.generate import count_new_tokens
from ..prompt.prompted_model import PromptedModel
from ..prompt.soft_prompt import SoftPrompt
from ..prompt.trained_only import trained_only
from ..texts import tokens
from ..texts.docstrings import stdlib_docstrings
from ..texts.tables import InputError, named_columns, read_labelled, read_pairs, without_columns

__all__ = ["ADAPTERS", "DEMO", "TASKS", "Pairs", "Row", "check_options", "spelled"]

Pairs = tuple[list[str], list[str]]  # texts and their labels; prompts and their completions
Row = dict[str, Any]  # a tokenised text, as the collator takes it


def load(kind: Any, name: str, in_adapter: bool = False, **options: Any) -> tuple[Any, Any]:
    """(model, tokenizer) for a hub id, a folder or `DEMO`; InputError where one cannot be had."""
    try:
        path = located(str(Path(name).resolve()) if Path(name).is_dir() else name)
        model, tokenizer = kind.from_pretrained(path, **options), transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or ["?"])[0]
        if not (Path(name).is_dir() or isinstance(error, ImportError)):
            is_path = isinstance(error.__cause__, HFValidationError)  # or else it may be the name of one on the hub
            reason = "there is no such folder" + f", and from the hub: {reason}" * (not is_path)
            if in_adapter and not Path(name).is_absolute():
                reason += "; a path that an adapter names is relative to where it was trained"
        raise InputError(f"cannot load the model {name!r} (--model names another): {reason}") from None
    if "attention_mask" not in tokenizer.model_input_names:  # without it, padding would be text
        tokenizer.model_input_names = [*tokenizer.model_input_names, "attention_mask"]
    rows = model.get_input_embeddings().weight.shape[0]
    words = tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens}
    if len(words) < 2:  # as transformers makes one for a folder that has none; T5's has a space
        raise InputError(f"the tokenizer of {name!r} knows no words: its files are missing there; save it, too")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:  # any does, as the mask hides it
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError(f"the tokenizer of {name!r} has no padding token, which batches of texts need")
    return model, tokenizer


def spelled(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


class Classify:
    """Texts and their labels, with FastPTuning."""

    collator = "DataCollatorWithPadding"
    own, instead = ("label_column", "pooling", "compare", "scores"), ()

    def __init__(self, options: Namespace):
        self.options, self.names = options, [""]

    def read(self, file: str | None) -> Pairs:
        named = named_columns(self.options)
        if file is not None:
            return read_labelled(file, named)
        without_columns("the embedded text", {} if self.options.eval_file else named)
        return stdlib_docstrings()

    def check(self, train: Pairs, held_out: Pairs | None = None) -> None:
        """Take the labels' names; InputError for labels that no classifier can be made of."""
        texts, labels = train
        self.names = sorted(set(labels))
        if len(self.names) < 2:
            raise InputError(f"there is one label only, {self._some()}: a classifier needs two or more")
        numbers = all(map(_is_number, self.names))
        if len(self.names) > 20 and len(texts) < (5 if numbers else 2) * len(self.names):
            kind, column = "numbers" if numbers else "labels", self.options.label_column or "label"
            raise InputError(
                f"{len(texts)} rows have {len(self.names)} different {kind} in column {column!r} ({self._some()}), too "
                "many to tell apart: --label-column names another; to predict a number, take "
                "FastPTuning(num_labels=1) in Python"
            )
        unknown = sorted(set(held_out[1] if held_out else ()) - set(self.names))
        if unknown:
            raise InputError(f"the label {unknown[0]!r} is held out and is not among those trained on ({self._some()})")

    def _some(self) -> str:
        return ", ".join([*map(repr, self.names[:5]), "..."][: len(self.names)])

    def said(self) -> str:
        return f", {len(self.names)} labels ({self._some()})"

    def build(self) -> tuple[FastPTuning, Any, Any]:
        options = self.options
        encoder, tokenizer = load(transformers.AutoModel, options.model or DEMO)
        tokenizer.padding_side = "right"  # where mode "prepend" has it, as the reference
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
        encoder, tokenizer = load(transformers.AutoModel, name, not options.model)
        tokenizer.padding_side = "right"
        return FastPTuning.from_pretrained(options.adapter, encoder), tokenizer

    @staticmethod
    def predicted(model: Any, tokenizer: Any, texts: list[str], options: Namespace) -> tuple[list[str], int]:
        """A label for each text, with `--scores` its probability behind a tab, or the number that a regression gives;
        and how many texts were cut."""
        most = {"truncation": True, "max_length": model.max_length} if model.max_length else {}
        batch = tokenizer(texts, padding=True, return_tensors="pt", **most).to(model.prompt_embeddings.device)
        cut = sum(len(ids) > batch["input_ids"].shape[1] for ids in tokenizer(texts, verbose=False)["input_ids"])
        logits = model(**{key: value for key, value in batch.items() if key in tokenizer.model_input_names})
        if model.num_labels == 1:
            return [f"{number:.6g}" for number in logits.flatten().tolist()], cut
        scores, numbers = logits.float().softmax(-1).max(-1)
        labels = [str(number) if model.id2label is None else model.id2label[number] for number in numbers.tolist()]
        if options.scores:
            labels = [f"{label}\t{score:.4f}" for label, score in zip(labels, scores.tolist())]
        return labels, cut


class Language:
    """Texts, or prompts and their completions, before a language model that stays as it is, with PromptedModel."""

    collator = "DataCollatorForSeq2Seq"  # pads labels with -100
    own, instead = ("prompt_column", "completion_column", "max_new_tokens"), ("prompt",)
    names = ()

    def __init__(self, options: Namespace):
        self.options = options
        self.end: int | None = None  # the token that ends a text
        if not (options.model and options.train_file):
            raise InputError("--task lm needs a --model and a --train-file: none comes along for it")
        if options.prompt_length == 0:
            raise InputError("a --prompt-length of 0 leaves nothing to train")

    def read(self, file: str | None) -> Pairs:
        assert file is not None
        return read_pairs(file, named_columns(self.options))

    def check(self, *files: Pairs) -> None:
        """InputError where one has prompts and the other has none; else any text will do."""
        kinds = ["prompts and completions" if any(prompts) else "whole texts" for prompts, _ in files]
        if len(set(kinds)) > 1:
            raise InputError(f"--train-file has {kinds[0]}, and --eval-file {kinds[1]}: write both alike")
        self.kind = kinds[0]

    def said(self) -> str:
        return f", {self.kind}" + ", which no token ends" * (self.end is None)

    def build(self) -> tuple[PromptedModel, Any, Any]:
        options = self.options
        dtype: dict[str, Any] = {} if options.precision == "fp32" else {"dtype": DTYPES[options.precision]}
        language_model, tokenizer = load(transformers.AutoModelForCausalLM, options.model, **dtype)
        if not is_causal(language_model):
            raise InputError(f"{options.model!r} is no language model: its tokens see those behind them")
        model = PromptedModel(
            language_model, options.prompt_length, mode=options.mode, init=options.init, tokenizer=tokenizer
        ).train()
        config: Any = language_model.config.get_text_config()
        self.end = next(iter(tokens.ends(language_model, tokenizer)), None)
        positions = describe(language_model).max_positions or getattr(config, "max_position_embeddings", 2**31)
        self.most = min(options.max_length or 512, positions - options.prompt_length)
        if self.most < 2:
            raise InputError(f"a --prompt-length of {options.prompt_length} leaves no room for text: take less")
        # What this model or its dropout rules out is said now.
        model.prompt(torch.ones(1, 2, dtype=torch.int64), mode=options.mode)
        return model, language_model, tokenizer

    def rows(self, pairs: Pairs, tokenizer: Any) -> list[Row]:
        """Labels are on completions alone; texts that nothing stands before are continued in further rows, which begin
        with the last token of the one before.

        Tokens of a prompt are those of it alone, as when it is predicted from.
        """
        most = self.most
        end = [] if self.end is None else [self.end]
        rows: list[Row] = []
        for place, (prompt, completion, before) in enumerate(zip(*pairs, tokens.before(pairs[0], tokenizer)), 1):
            ids = before + tokens.behind(prompt, completion, tokenizer) + end
            if prompt and len(before) >= most:
                raise InputError(
                    f"row {place}: its prompt has {len(before)} tokens, and {most} are all that is taken of a row: "
                    "take a larger --max-length, or leave it out"
                )
            labels = [-100] * len(before) + ids[len(before) :] if prompt else ids
            for start in (0,) if prompt else range(0, max(len(ids) - 1, 1) if ids else 0, most - 1):
                # The first label of a row is left out, as the model's loss does: the row before has it.
                row = {"input_ids": ids[start : start + most], "labels": [-100, *labels[start + 1 : start + most]]}
                rows.append(row | {"cut": bool(prompt) and len(ids) > most})
        return rows

    def baseline(self, trainer: Any, held_out: list[Row]) -> str:
        return f"with the prompt as it began {spelled(self.measured(trainer))}"

    def measured(self, trainer: Any) -> dict[str, float]:
        loss = trainer.held_out_loss()
        return {"loss": loss, "perplexity": math.exp(min(loss, 700))}

    @staticmethod
    def from_adapter(options: Namespace, name: str) -> tuple[Any, Any]:
        model, tokenizer = load(transformers.AutoModelForCausalLM, name, not options.model)
        tokenizer.padding_side = "left"
        prompt = SoftPrompt.from_pretrained(model, options.adapter, any_base=bool(options.model))
        if prompt.num_prompts is not None:
            raise InputError(
                f"{options.adapter} holds {prompt.num_prompts} prompts, and predict is for one: in Python, "
                "SoftPrompt.generate takes prompt_index"
            )
        return PromptedModel(model, prompt=prompt), tokenizer

    @staticmethod
    def predicted(model: Any, tokenizer: Any, texts: list[str], options: Namespace) -> tuple[list[str], int]:
        """What the model goes on with behind each text, "\\n" written as a backslash and an n; none is cut."""
        rows = [{"input_ids": ids} for ids in tokens.before(texts, tokenizer)]
        batch: Any = transformers.DataCollatorWithPadding(tokenizer)(rows)
        batch = batch.to(model.device)
        given = batch["input_ids"], batch["attention_mask"]
        if not given[0].shape[1]:
            raise InputError("a text without tokens has nothing that the model could go on from")
        virtual, new, most = model.prompt.length, options.max_new_tokens or 64, model.prompt.info.max_positions
        if most and virtual + given[0].shape[1] + new - 1 > most:  # the last new token is not read
            raise InputError(
                f"a text of {given[0].shape[1]} tokens, between {virtual} virtual ones and {new} new ones, is too long "
                f"for the {most} positions of the model: leave it out, or take a smaller --max-new-tokens"
            )
        options_ = {"max_new_tokens": new, "pad_token_id": tokenizer.pad_token_id, "return_dict_in_generate": False}
        ends = tokens.ends(model.prompt.model, tokenizer)
        options_ |= {"num_beams": 1, "num_return_sequences": 1, "eos_token_id": ends or None}
        count_new_tokens(model.prompt.model, options_, given[0].shape[1])  # a min_length is not of virtual tokens
        try:
            out = model.prompt.generate(*given, do_sample=False, **options_).tolist()
        except (TypeError, ValueError) as error:
            if len(texts) > 1:  # padding on the left is what some refuse
                return [Language.predicted(model, tokenizer, [text], options)[0][0] for text in texts], 0
            raise InputError(str(error).splitlines()[0]) from None
        new_tokens = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in out]
        texts = [tokens.continued(row["input_ids"], ids, tokenizer) for row, ids in zip(rows, new_tokens)]
        return [text.replace("\r\n", "\r").replace("\n", "\\n") for text in texts], 0


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


def check_options(task: Any, options: Namespace) -> None:
    """InputError for options that another task is for."""
    for name, other in TASKS.items():
        given = [f"--{key.replace('_', '-')}" for key in other.own if other is not task and getattr(options, key, None)]
        if given:
            are, them = ("are", "them") if len(given) > 1 else ("is", "it")
            raise InputError(f"{' and '.join(given)} {are} for --task {name}: leave {them} out")


TASKS: dict[str, Any] = {"classify": Classify, "lm": Language}
ADAPTERS: dict[str, Any] = {"FastPTuning": Classify, "PROMPT_TUNING": Language, "P_TUNING": Language}
