"""A checkpoint of several files: made out of sight, and moved into the place of the one before as a whole.

While files are moved no weights are there, so that what a killed move leaves is not loaded as either. Which files are
the checkpoint's, and as they were written, is listed in one of them: the next one removes those that it does not write
itself, and touches nothing that somebody has changed or put there since.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..files import adapter

__all__ = ["check_others", "replacing"]

# What transformers reads in a folder, and so would read beside the checkpoint's own.
_READ: tuple[str, ...] = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_READ += ("chat_template.*", "additional_chat_templates/*", "*.safetensors*", "pytorch_model*")
Stamp = list[int]  # a file's size and time, which a rename leaves as they are


@contextlib.contextmanager
def replacing(folder: Path, subfolders: Iterable[str]) -> Iterator[Path]:
    """An empty folder, the files of which are those of the checkpoint in `folder` afterwards, if nothing was raised.

    Raises:
        ValueError: as `check_others` does.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=adapter.UNFINISHED) as made:
        yield Path(made)
        new = {file.relative_to(made).as_posix(): _stamp(file) for file in Path(made).rglob("*") if file.is_file()}
        check_others(folder, subfolders, new)
        _move(Path(made), folder, new)


def check_others(folder: Path, subfolders: Iterable[str], new: Iterable[str] = ()) -> None:
    """Whether a checkpoint can take the place of what is in `folder`, with files `new` and tokenizers in `subfolders`.

    Raises:
        ValueError: a file of somebody else's would be replaced, or read with the checkpoint.
        OSError: files cannot be put where they belong.
    """
    old = _listed(folder)
    names = {*old, *new} | {
        file.relative_to(folder).as_posix()
        for place in (folder, *(folder / name for name in subfolders))
        for pattern in _READ
        for file in place.glob(pattern)
    }
    for name in sorted(names):
        if os.path.lexists(folder / name) and _stamp(folder / name) not in old.get(name, []):
            raise ValueError(
                f"{folder / name} is none that save_pretrained_merged has written, or was changed since, and would be "
                "replaced or be read with what is merged: name another folder, or take it away"
            )
    for place in {(folder / name).parent for name in names}:
        if os.path.lexists(place) and not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            raise OSError(f"{place} is no folder that can be written in: name another folder")


def _move(made: Path, folder: Path, new: dict[str, Stamp]) -> None:
    old = _listed(folder)
    both = {name: [*old.get(name, []), *([new[name]] if name in new else [])] for name in {*old, *new}}
    adapter.replace(folder / adapter.MERGED, _list(both))
    for name in sorted(old, key=_is_weights, reverse=True):
        if _is_weights(name) or name not in new:
            (folder / name).unlink(missing_ok=True)
            for parent in Path(name).parents:
                with contextlib.suppress(OSError):  # there is something else in it
                    (folder / parent).rmdir()
    for name in sorted(new, key=lambda name: (_is_weights(name), name != "config.json")):  # no adapter goes beside that
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(made / name, folder / name)
    adapter.replace(folder / adapter.MERGED, _list({name: [stamp] for name, stamp in new.items()}))


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _stamp(file: Path) -> Stamp:
    state = file.lstat()
    return [state.st_size, state.st_mtime_ns]


def _list(files: dict[str, list[Stamp]]) -> bytes:
    listed = {"by": "ptuning-fast", "files": dict(sorted(files.items()))}
    return (json.dumps(listed, indent=1, ensure_ascii=False) + "\n").encode()


def _listed(folder: Path) -> dict[str, list[Any]]:
    """The files of the checkpoint in `folder` that are there, and as what; nothing outside, whatever a list says."""
    try:
        files = dict(json.loads((folder / adapter.MERGED).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}
    top = folder.resolve()
    return {
        name: stamps
        for name, stamps in files.items()
        if isinstance(stamps, list) and os.path.isfile(folder / name) and (folder / name).resolve().is_relative_to(top)
    }
