"""`python -m ptuning_fast train`: train a prompt for text classification, measure it, keep it."""

import statistics
import time
from argparse import Namespace
from collections import Counter
from contextlib import nullcontext
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from ..classify.classifier import FastPTuning
from ..classify.precision import DTYPES
from ..classify.reference import ReferencePTuning
from ..files import adapter
from ..models import describe
from ..models.probe import is_causal
from ..modes import mode_for
from .docstrings import stdlib_docstrings
from .encoder import DEMO, load_encoder
from .tables import InputError, read_labelled

__all__ = ["run"]

Labelled = tuple[list[str], list[str]]  # texts and their labels
Row = dict[str, Any]  # a tokenised text, as the collator takes it


def run(options: Namespace) -> None:
    """Train with the options of the command line and print what came out.

    Of several processes each runs this, and the first alone prints and writes.
    """
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise InputError("training needs accelerate: pip install 'ptuning-fast[train]'") from None
    from transformers import set_seed

    from .fit import fit, processes

    state = processes(options)

    def say(line: str) -> None:
        if state.is_main_process:
            print(line, flush=True)

    try:
        if state.is_main_process:
            adapter.check_writable(options.output)
    except OSError as error:
        raise InputError(f"cannot write to the folder {options.output}: {error.strerror or error}") from None
    parts = _data(options)
    names = sorted(set(parts[0][1]))
    _check_labels(*parts, names)

    set_seed(options.seed)
    encoder, tokenizer = load_encoder(options.model or DEMO)
    try:
        model = FastPTuning(
            encoder,
            options.prompt_length,
            len(names),
            pooling=options.pooling or _pooling(encoder),
            init=options.init,
            mode=_mode(encoder, options),
            precision=None if options.precision == "fp32" else options.precision,
            id2label=dict(enumerate(names)),
        )
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None
    except (RuntimeError, MemoryError) as error:
        raise InputError(f"cannot set the prompt up: {(str(error).splitlines() or ['no memory'])[0]}") from None
    if not options.model:
        model.base_model = DEMO
    max_length: int = min(options.max_length, model.max_length or options.max_length)
    model.max_length = max_length

    table_rows = len(encoder.get_input_embeddings().weight)
    train, held_out = (_tokenize(part, tokenizer, max_length, names, table_rows) for part in parts)
    cut = sum(row["cut"] for row in train + held_out)
    say(
        f"{len(train)} texts to train on, {len(held_out)} held out, {len(names)} labels; "
        f"{cut} texts cut to {max_length} tokens"
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{trainable:,} trained parameters before a frozen {type(encoder).__name__} ({model.base_model})")

    trainer = fit(model, tokenizer, train, held_out, options)
    if not all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad):
        raise InputError("training diverged, and nothing was saved: take a smaller --learning-rate")
    try:
        if state.is_main_process:
            model.save_pretrained(options.output)
    except OSError as error:
        raise InputError(f"cannot save the adapter in {options.output}: {error.strerror or error}") from None
    accuracy = trainer.evaluate()["eval_accuracy"]
    majority, count = Counter(row["labels"] for row in held_out).most_common(1)[0]
    share = count / len(held_out)
    say(f"held-out accuracy {accuracy:.3f}; majority-class baseline ({names[majority]!r}) {share:.3f}")
    if state.num_processes == 1:
        _compare_speed(model, trainer)
    say(f"adapter saved in {options.output}")


def _pooling(encoder: Any) -> str:
    return "last" if not encoder.config.is_encoder_decoder and is_causal(encoder) else "mean"


def _mode(encoder: Any, options: Namespace) -> str:
    if options.mode != "auto":
        return options.mode
    try:
        mode_for("packed", encoder, describe(encoder))
    except TypeError:
        return "prepend"
    return "packed" if options.prompt_length else "prepend"


def _data(options: Namespace) -> tuple[Labelled, Labelled]:
    """((texts, labels), (texts, labels)): to train on, and held out."""
    columns = options.text_column, options.label_column
    if options.text_column == options.label_column:
        raise InputError(f"the texts and the labels cannot both be in the column {options.text_column!r}")
    if options.train_file:
        texts, labels = read_labelled(options.train_file, *columns)
    else:
        texts, labels = stdlib_docstrings()
    if options.eval_file:
        return (texts, labels), read_labelled(options.eval_file, *columns)
    # A fifth of each label's texts, one at least where there are two.
    places: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    random = Random(options.seed)
    held_out: set[int] = set()
    for label in sorted(places):
        random.shuffle(places[label])
        held_out.update(places[label][: max(len(places[label]) // 5, len(places[label]) > 1)])

    def part(held: bool) -> Labelled:
        chosen = [place for place in range(len(texts)) if (place in held_out) == held]
        return [texts[place] for place in chosen], [labels[place] for place in chosen]

    return part(False), part(True)


def _check_labels(train: Labelled, held_out: Labelled, names: list[str]) -> None:
    if len(names) < 2:
        raise InputError(f"there is one label only, {names[0]!r}: a classifier needs two or more")
    if not held_out[0]:
        raise InputError("there are too few texts to hold any out: give more, or an --eval-file")
    unknown = sorted(set(held_out[1]) - set(names))
    if unknown:
        raise InputError(f"the label {unknown[0]!r} is held out and is not among those trained on ({', '.join(names)})")


def _tokenize(part: Labelled, tokenizer: Any, max_length: int, names: list[str], table_rows: int) -> list[Row]:
    """Rows for the collator; `cut` says that a text was longer than the model takes."""
    texts, labels = part
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise InputError(
            f"{max_length} tokens a text leave no room beside the {special} that the tokenizer adds: take a larger "
            "--max-length or a smaller --prompt-length"
        )
    full = tokenizer(texts, truncation=False, verbose=False)["input_ids"]
    rows = tokenizer(texts, truncation=True, max_length=max_length)
    largest = max((max(ids, default=0) for ids in rows["input_ids"]), default=0)
    if largest >= table_rows:
        raise InputError(
            f"the tokenizer gives the id {largest}, and the model's table has {table_rows} rows: they do not belong "
            "together"
        )
    number = {name: place for place, name in enumerate(names)}
    return [
        {key: rows[key][i] for key in rows} | {"labels": number[labels[i]], "cut": len(full[i]) > max_length}
        for i in range(len(texts))
    ]


def _compare_speed(model: FastPTuning, trainer: Any, steps: int = 5) -> None:
    """Training steps of this model and of the torch.cat reference, in turn, on the same batches, for some seconds."""
    encoder = model.bert
    table = getattr(getattr(encoder, "embeddings", None), "word_embeddings", None)
    if table is None or table.weight.shape[1] != encoder.config.hidden_size:
        print(f"examples/s: the torch.cat reference takes no {type(encoder).__name__}, so there is nothing to compare")
        return
    device = next(encoder.parameters()).device
    # Its linear layers are in half precision already: what autocast makes of them, without the casts.
    dtype = None if model.precision is None else DTYPES[model.precision]
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    precision = "" if model.precision is None else f", both in {model.precision}"
    reference = ReferencePTuning(encoder, model.prompt_length, model.num_labels).to(device).train()
    model.train()
    batches = []
    for batch in trainer.get_train_dataloader():
        batches.append({key: value.to(device) for key, value in batch.items()})
        if len(batches) == steps:
            break

    def step(module: nn.Module, batch: dict[str, Tensor]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with autocast if module is reference else nullcontext():
            logits = module(batch["input_ids"], batch["attention_mask"])
        torch.nn.functional.cross_entropy(logits.float(), batch["labels"]).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return len(batch["labels"]) / (time.perf_counter() - start)

    pairs = []
    start = time.perf_counter()
    for turn in range(-1, 3 * len(batches)):  # the first turn warms up
        if turn > 4 and time.perf_counter() - start > 15:
            break
        pairs.append([step(module, batches[turn % len(batches)]) for module in (model, reference)])
        model.zero_grad()
        reference.zero_grad()
    pairs = pairs[1:]
    fast, slow = (statistics.median(rates) for rates in zip(*pairs))
    ratios = sorted(one / other for one, other in pairs)
    ratio = statistics.median(ratios)
    print(
        f"examples/s in training steps: {fast:.1f}, the torch.cat reference {slow:.1f}: x {ratio:.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(pairs)} pairs of steps on {device.type}, "
        f"mode {model.mode!r}{precision})"
    )
