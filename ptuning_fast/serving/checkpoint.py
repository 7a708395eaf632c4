"""A checkpoint of several files: made out of sight, and moved into the place of the one before as a whole.

While files are moved no weights are there, so that what a killed move leaves is not loaded as either. Which files are
the checkpoint's is listed in one of them: the next one removes those that it does not write itself.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..files import adapter

__all__ = ["LIST", "check_others", "replacing"]

LIST = "merged.json"


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder, the files of which are those of the checkpoint in `folder` afterwards, if nothing was raised."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=adapter.UNFINISHED) as made:
        yield Path(made)
        _move(Path(made), folder)


def check_others(folder: Path, subfolders: Iterable[str]) -> None:
    """ValueError where a model or a tokenizer would be replaced that is none of a checkpoint's that was made so."""
    ours = _listed(folder)
    for place in (folder, *(folder / name for name in subfolders)):
        for file in (place / "config.json", place / "tokenizer_config.json", *place.glob("*.safetensors")):
            if file.is_file() and file.relative_to(folder).as_posix() not in ours:
                raise ValueError(
                    f"{place} holds a model or a tokenizer ({file.name}) that no save_pretrained_merged has written, "
                    "and it would be replaced: name another folder"
                )


def _move(made: Path, folder: Path) -> None:
    old, new = _listed(folder), {file.relative_to(made).as_posix() for file in made.rglob("*") if file.is_file()}
    adapter.replace(folder / LIST, _list(old | new))
    for name in sorted(old, key=_is_weights, reverse=True):
        if _is_weights(name) or name not in new:
            (folder / name).unlink(missing_ok=True)
            for parent in Path(name).parents:
                with contextlib.suppress(OSError):  # there is something else in it
                    (folder / parent).rmdir()
    for name in sorted(new, key=_is_weights):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(made / name, folder / name)
    adapter.replace(folder / LIST, _list(new))


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _list(names: set[str]) -> bytes:
    return (json.dumps({"by": "ptuning-fast", "files": sorted(names)}, indent=2, ensure_ascii=False) + "\n").encode()


def _listed(folder: Path) -> set[str]:
    """The files of the checkpoint in `folder`, and nothing outside of it, whatever a list from elsewhere says."""
    try:
        names = json.loads((folder / LIST).read_text(encoding="utf-8"))["files"]
        return {name for name in names if (folder / name).resolve().is_relative_to(folder.resolve())}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return set()
