"""The output folder of a training: nobody else's, nothing in it written over, and a training there to go on with.

OUTPUT/checkpoints/options.json      what the training depends on: --resume compares it
OUTPUT/checkpoints/checkpoint-N      the Trainer's, until the adapter is saved
OUTPUT/checkpoints                   locked as long as a training runs
"""

import hashlib
import json
import os
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ..files import adapter
from ..texts.tables import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["begin", "checkpoints_of", "claimed", "clear", "may_fail"]

_NOT_OF_THE_TRAINING = {"command", "resume", "overwrite", "compare", "output", "report_to", "save_steps"}
_NOT_OF_THE_TRAINING |= {"train_file", "eval_file"}  # their texts are compared, and so are those of other columns
_NOT_OF_THE_TRAINING |= {"text_column", "label_column", "prompt_column", "completion_column"}

_OPTIONS = "options.json"
_BEING_WRITTEN = f".{_OPTIONS}."  # what `adapter.replace` leaves where it is killed


def checkpoints_of(options: Namespace) -> Path:
    """Where the Trainer's are as long as the training is not over, with the options that it began with."""
    return Path(options.output, "checkpoints")


@contextmanager
def claimed(options: Namespace) -> Iterator[None]:
    """The output folder, for one training at a time; InputError where there is another, or where this one would write
    over something, or could not write.

    The system ends the lock with its process. Where a folder cannot be locked, as in `adapter.saving`, there is none.
    """
    checkpoints = checkpoints_of(options)
    with ExitStack() as stack:
        with may_fail(f"write to the folder {options.output}"):
            adapter.check_writable(options.output)
            checkpoints.mkdir(exist_ok=True)
            handle = None if fcntl is None else _locked(checkpoints)
        if handle is not None:
            stack.callback(os.close, handle)
        stack.callback(_remove_if_empty, checkpoints)
        _check_output(options)
        yield


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # what is in it is left to --resume, or to whoever else has put it there
        folder.rmdir()


def _locked(folder: Path) -> int:
    """A handle that holds `folder`, which a training that ends may take away until it is held."""
    while True:
        folder.mkdir(exist_ok=True)
        with suppress(FileNotFoundError), ExitStack() as stack:
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"a training in {folder.parent} is running: wait for it, or take another --output"
                ) from None
            except OSError:  # it cannot be locked
                pass
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                stack.pop_all()
                return handle


@contextmanager
def may_fail(what: str) -> Iterator[None]:
    """InputError of one line for what the system refuses inside."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot {what}: {error.strerror or error}") from None


def _check_output(options: Namespace) -> None:
    """InputError where this training would write over something."""
    checkpoints = checkpoints_of(options)
    began = _began_with(checkpoints) is not None
    if not began and any(not one.name.startswith(_BEING_WRITTEN) for one in checkpoints.iterdir()):
        raise InputError(f"{checkpoints} holds something else than a training: move it, or take another --output")
    for one in checkpoints.glob("checkpoint-*"):  # which the Trainer removes with its own
        if not re.fullmatch(r"checkpoint-\d+", one.name):
            raise InputError(f"{one} is none of the training's, and would pass for one: move it")
    if Path(options.output, adapter.WEIGHTS).exists() and not options.overwrite:
        raise InputError(f"there is an adapter in {options.output}: --overwrite replaces it, or take another --output")
    if options.resume and not began:
        raise InputError(f"there is no training in {options.output} that --resume could go on with: leave it out")
    if began and not (options.resume or options.overwrite):
        raise InputError(
            f"a training in {options.output} was cut off: --resume goes on with it, --overwrite starts again"
        )


def _began_with(checkpoints: Path) -> dict[str, Any] | None:
    """What the training there depends on; None where there is none."""
    try:
        kept = json.loads((checkpoints / _OPTIONS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept if isinstance(kept, dict) and "texts" in kept else None


def begin(options: Namespace, pairs: Any) -> None:
    """Keep what the training depends on; InputError where the one to go on with depends on something else."""
    checkpoints = checkpoints_of(options)
    now = {key: value for key, value in vars(options).items() if key not in _NOT_OF_THE_TRAINING}
    now["texts"] = hashlib.sha256(repr(pairs).encode()).hexdigest()
    if options.resume:
        before = _began_with(checkpoints) or {}
        for key in [key for key in now if now[key] != before.get(key)]:
            other = "the texts are others" if key == "texts" else f"--{key.replace('_', '-')} was {before.get(key)}"
            raise InputError(f"{other} in the training in {options.output}: --overwrite starts again")
        return
    clear(checkpoints)
    with may_fail(f"write to the folder {options.output}"):
        adapter.replace(checkpoints / _OPTIONS, json.dumps(now, indent=2).encode())


def clear(checkpoints: Path) -> None:
    """Remove what a training has put there, and nothing else; last the options, by which it is known."""
    with may_fail(f"remove the training in {checkpoints}"):
        for one in checkpoints.iterdir():
            if re.fullmatch(r"checkpoint-\d+", one.name):
                shutil.rmtree(one)
            elif one.name.startswith(_BEING_WRITTEN):
                one.unlink()
        (checkpoints / _OPTIONS).unlink(missing_ok=True)
