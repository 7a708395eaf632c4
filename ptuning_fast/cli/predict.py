"""`python -m ptuning_fast predict`: read texts, write labels, or what a language model goes on with."""

import contextlib
import os
import re
import stat
import sys
from argparse import Namespace
from collections.abc import Callable

import torch

from ..files import adapter
from ..texts.tables import InputError, lines_of, named_columns, read_texts, without_columns
from .tasks import ADAPTERS, check_options

__all__ = ["run"]

_LINE_BREAK = re.compile("\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # those of str.splitlines


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
    task, named = ADAPTERS[kind], named_columns(options)
    check_options(task, options)
    if options.file:
        texts = read_texts(options.file, named, *task.instead)
        _check_other(options.output, "--file", lambda: os.stat(options.file))
    else:
        without_columns("standard input", named)
        _check_other(options.output, "standard input", lambda: os.fstat(sys.stdin.fileno()))
        texts = lines_of(sys.stdin.buffer.read(), "standard input")
    try:
        model, tokenizer = task.from_adapter(options, name)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    except (OSError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise InputError((str(error).splitlines() or ["?"])[0]) from None
    cut = 0
    try:
        file = options.output
        with open(file, "w", encoding="utf-8") if file else contextlib.nullcontext(sys.stdout) as out, torch.no_grad():
            for start in range(0, len(texts), options.batch_size):
                batch = texts[start : start + options.batch_size]
                lines, cut_here = task.predicted(model, tokenizer, batch, options)
                cut += cut_here
                for line in lines:
                    print(_LINE_BREAK.sub(" ", line), file=out, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"cannot write {options.output or 'the labels'}: {error.strerror or error}") from None
    if cut:
        print(f"warning: {cut} of {len(texts)} texts cut to {model.max_length} tokens", file=sys.stderr)


def _check_other(output: str | None, name: str, read: Callable[[], os.stat_result]) -> None:
    """InputError where the file at `output` is the one that is read."""
    with contextlib.suppress(OSError):  # there is none yet, or none is read
        if output and stat.S_ISREG(read().st_mode) and os.path.samestat(read(), os.stat(output)):
            raise InputError(f"--output {output} is the {name} that is read: name another")
