"""`python -m ptuning_fast train`: train a prompt, keep it, measure it."""

import gc
import itertools
import statistics
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from ..classify.classifier import FastPTuning
from ..classify.precision import DTYPES
from ..classify.reference import ReferencePTuning
from ..models.info import has_adapter
from ..texts.tables import InputError
from .output import begin, checkpoints_of, claimed, clear, may_fail
from .tasks import DEMO, TASKS, Row, check_options, spelled

__all__ = ["run"]


def run(options: Namespace) -> None:
    """Train with the options of the command line and print what came out.

    Of several processes each runs this, and the first alone prints and writes.
    """
    state = _processes(options)
    try:
        check_options(TASKS[options.task], options)
        task = TASKS[options.task](options)
        with claimed(options) if state.is_main_process else nullcontext():
            _train(task, options, state)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gc.collect()  # what still holds the process group: its threads would abort a process that ends before them
        state.destroy_process_group()


def _train(task: Any, options: Namespace, state: Any) -> None:
    def say(line: str) -> None:
        if state.is_main_process:
            print(line, flush=True)

    files = [options.train_file, *([options.eval_file] if options.eval_file else [])]
    pairs = [task.read(file) for file in files]
    task.check(*pairs)

    import transformers

    from .fit import last_checkpoint, trainer_of  # heavy: not to say that a file is not there

    transformers.set_seed(options.seed)
    try:
        model, frozen, tokenizer = task.build()
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from None
    except (RuntimeError, MemoryError) as error:
        raise InputError(f"cannot set the prompt up: {(str(error).splitlines() or ['no memory'])[0]}") from None
    if has_adapter(frozen):
        raise InputError(
            f"{options.model} holds an adapter of PEFT's (LoRA), which the prompt would depend on: merge it into its "
            "model (merge_and_unload), save that, and train on it"
        )
    rows = [task.rows(part, tokenizer) for part in pairs]
    train, held_out = rows if len(rows) == 2 else _split(rows[0], options.seed)
    if not (train and held_out):
        raise InputError("there are too few texts to hold any out: give more, or an --eval-file")
    _check_ids(train + held_out, len(frozen.get_input_embeddings().weight))
    trainer = trainer_of(model, getattr(transformers, task.collator)(tokenizer), train, held_out, options)
    if state.is_main_process:
        begin(options, pairs)
    cut = sum(row["cut"] for row in train + held_out)
    say(f"{len(train)} texts to train on, {len(held_out)} held out{task.said()}; {cut} texts cut to {task.most} tokens")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{trainable:,} trained parameters before a frozen {type(frozen).__name__} ({options.model or DEMO})")
    for doubt in _doubts(train, held_out, task.names):
        say(f"warning: {doubt}")

    last = last_checkpoint(checkpoints_of(options)) if options.resume else None
    if options.resume:
        say(f"going on from {last}" if last else "there is no checkpoint yet: starting from the beginning")
    baseline = task.baseline(trainer, held_out)
    trainer.train(resume_from_checkpoint=last)
    state.wait_for_everyone()
    diverged = not all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)
    if state.is_main_process:
        if not diverged:
            with may_fail(f"save the adapter in {options.output}"):
                model.save_pretrained(options.output)
        clear(checkpoints_of(options))
    if diverged:
        raise InputError("training diverged, and nothing was saved: take a smaller --learning-rate")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    say(f"{trainer.state.global_step} steps, loss {losses[0]:.4f} at first and {losses[-1]:.4f} in the end")
    say(f"adapter saved in {options.output}")
    figures = task.measured(trainer)
    if state.is_main_process:  # once more, with what is known now in its card
        with may_fail(f"save the adapter in {options.output} once more, with its figures"):
            model.save_pretrained(options.output, figures={f"held-out {key}": value for key, value in figures.items()})
    say(f"held-out {spelled(figures)}; {baseline}")
    demo = not options.train_file and not options.model
    if state.num_processes == 1 and (demo if options.compare is None else options.compare):
        _compare_speed(model, trainer)


def _processes(options: Namespace) -> Any:
    """This process among those that were started together; InputError for a batch that they cannot share."""
    try:
        from accelerate import PartialState
    except ImportError:
        raise InputError("training needs accelerate: pip install 'ptuning-fast[train]'") from None
    state = PartialState(cpu=not torch.accelerator.is_available())
    if options.batch_size % state.num_processes:
        raise InputError(
            f"a batch of {options.batch_size} texts cannot be split over {state.num_processes} processes: take a "
            f"--batch-size that is a multiple of {state.num_processes}"
        )
    return state


def _split(rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """A fifth of each label's rows is held out, one at least where there are two; of a language model's, of all."""
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row["labels"] if isinstance(row["labels"], int) else 0, []).append(place)
    random = Random(seed)
    held_out: set[int] = set()
    for label in sorted(places):
        random.shuffle(places[label])
        held_out.update(places[label][: max(len(places[label]) // 5, len(places[label]) > 1)])
    return [row for place, row in enumerate(rows) if place not in held_out], [rows[place] for place in sorted(held_out)]


def _doubts(train: list[Row], held_out: list[Row], names: list[str]) -> Iterator[str]:
    """Why the figures may say less than they seem to."""
    if len(held_out) < 100:
        yield f"{len(held_out)} held-out texts tell little: what is measured is rough (--eval-file gives more)"
    known = {tuple(row["input_ids"]) for row in train}
    again = sum(tuple(row["input_ids"]) in known for row in held_out)
    if again:
        yield f"{again} of {len(held_out)} held-out texts are also trained on: what is measured of these is memory"
    alike = {_plain(name): name for name in names}
    pairs = [(name, alike[_plain(name)]) for name in names]
    for one, other in [pair for pair in pairs if pair[0] != pair[1]][:1]:
        yield f"the labels {one!r} and {other!r} differ in case or spaces alone, and are told apart"


def _plain(name: str) -> str:
    return " ".join(name.split()).casefold()


def _check_ids(rows: list[Row], table_rows: int) -> None:
    largest = max(max(row["input_ids"], default=0) for row in rows)
    if largest >= table_rows:
        raise InputError(
            f"the tokenizer gives the id {largest}, and the model's table has {table_rows} rows: they do not belong "
            "together"
        )


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
    some = itertools.islice(trainer.get_train_dataloader(), steps)
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in some]

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
