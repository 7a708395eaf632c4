"""`python -m ptuning_fast predict`: read texts, write labels."""

import sys
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TextIO

import torch

from ..classify.classifier import FastPTuning
from ..files import adapter
from .encoder import load_encoder
from .tables import InputError, lines_of, read_texts

__all__ = ["run"]


def run(options: Namespace) -> None:
    """One label a line, in the order of the texts; with `--scores` its probability behind a tab."""
    try:
        name = options.model or adapter.load(options.adapter)[1].get("base_model_name_or_path", "")
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from None
    if options.file:
        texts = read_texts(options.file, options.text_column)
    else:
        texts = lines_of(sys.stdin.buffer.read(), "standard input")
    encoder, tokenizer = load_encoder(name)
    try:
        model = FastPTuning.from_pretrained(options.adapter, encoder)
    except (OSError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise InputError((str(error).splitlines() or ["?"])[0]) from None
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    try:
        with _output(options.output) as out:
            for start in range(0, len(texts), options.batch_size):
                for label, score in predict(model, tokenizer, texts[start : start + options.batch_size]):
                    print(f"{label}\t{score:.4f}" if options.scores else label, file=out, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"cannot write {options.output or 'the labels'}: {error.strerror or error}") from None


def _output(path: str | None) -> AbstractContextManager[TextIO]:
    if not path:
        return nullcontext(sys.stdout)
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


@torch.no_grad()
def predict(model: FastPTuning, tokenizer: Any, texts: list[str]) -> list[tuple[str, float]]:
    """[(label, probability)] for a batch of texts, those that are too long cut to `model.max_length` tokens."""
    cut = {"truncation": True, "max_length": model.max_length} if model.max_length else {}
    batch = tokenizer(texts, padding=True, return_tensors="pt", **cut).to(model.prompt_embeddings.device)
    names = tokenizer.model_input_names
    logits = model(**{key: value for key, value in batch.items() if key in names})
    scores, labels = logits.float().softmax(-1).max(-1)
    return [
        (str(label) if model.id2label is None else model.id2label[label], score)
        for label, score in zip(labels.tolist(), scores.tolist())
    ]
