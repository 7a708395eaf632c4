"""`python -m ptuning_fast predict`: read texts, write labels, or what a language model goes on with."""

import sys
from argparse import Namespace
from contextlib import AbstractContextManager, nullcontext
from typing import TextIO

import torch

from ..files import adapter
from .tables import InputError, lines_of, read_texts
from .tasks import ADAPTERS

__all__ = ["run"]


def run(options: Namespace) -> None:
    """One line a text, in the order of the texts."""
    try:
        settings = adapter.load(options.adapter)[1]
    except (OSError, ValueError) as error:
        raise InputError(str(error)) from None
    kind, config = adapter.kind_of(options.adapter, settings)
    if kind not in ADAPTERS or config.get("task_type", "CAUSAL_LM") != "CAUSAL_LM":
        raise InputError(f"{adapter.is_another(options.adapter, kind)}; predict is for what train writes")
    name = options.model or config.get("base_model_name_or_path") or ""
    if options.file:
        texts = read_texts(options.file, options.text_column)
    else:
        texts = lines_of(sys.stdin.buffer.read(), "standard input")
    try:
        model, tokenizer = ADAPTERS[kind].from_adapter(options, name)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    except InputError:
        raise
    except (OSError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise InputError((str(error).splitlines() or ["?"])[0]) from None
    try:
        with _output(options.output) as out, torch.no_grad():
            for start in range(0, len(texts), options.batch_size):
                batch = texts[start : start + options.batch_size]
                for line in ADAPTERS[kind].predicted(model, tokenizer, batch, options):
                    print(line, file=out, flush=True)
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
