"""Adapter files: small tensors and their settings, in one safetensors file that is replaced in one step.

The header has a checksum of the whole file, twice: were there one key, a damaged letter in it would hide it, and the
file would pass for one of those that have none, as PEFT and earlier versions write them.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ..models.embedding import is_sharded

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "CARD",
    "CONFIG",
    "MERGED",
    "UNFINISHED",
    "WEIGHTS",
    "as_bytes",
    "check_others",
    "check_whole",
    "check_writable",
    "is_another",
    "kind_of",
    "load",
]
__all__ += ["is_first", "read", "replace", "save", "saving", "whole"]

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CARD = "README.md"
MERGED = "merged.json"
"""What a checkpoint with a prompt in it (serving/checkpoint.py) lists its files in."""
UNFINISHED = ".unfinished."
"""Before a random name: what is made in a folder, to be moved into place."""
_LOADED_BY = {
    "FastPTuning": "FastPTuning.from_pretrained",
    "PROMPT_TUNING": "SoftPrompt.from_pretrained",
    "P_TUNING": "SoftPrompt.from_pretrained",
}
_RANDOM = "[a-z0-9_]" * 8  # what tempfile.mkstemp puts behind a name
_CHECKSUMS = ("ptuning_fast.sha256", "ptuning_fast.sha256.copy")
_IN_HEADER = re.compile(rb'"(ptuning_fast\.sha256(?:\.copy)?)":"([^"]*)"')


def save(folder: str | Path, tensors: dict[str, Tensor], settings: dict, unlisted: Collection[str] = ()) -> None:
    """Write `tensors` and `settings` (JSON) into `folder`, which is made if it is not there.

    The settings are in the safetensors file's header and, but for the `unlisted`, in a file for people.

    Each file is written under another name, forced to disk and renamed. A crash leaves the old adapter or the new one:
    `load` reads the safetensors file alone, settings included.

    Raises:
        ValueError: a folder with an adapter of another kind in it, or a model.
    """
    folder, content = Path(folder), as_bytes(tensors, settings)
    check_others(folder)
    with saving(folder):
        replace(folder / WEIGHTS, content)
        listed = {key: value for key, value in settings.items() if key not in unlisted}
        replace(folder / CONFIG, (json.dumps(listed, indent=2, ensure_ascii=False) + "\n").encode())


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[None]:
    """`folder`, made if it is not there, for one save at a time; what killed ones left under other names is removed.

    Other saves wait, in this process and elsewhere; one that is part of this one does not. The system ends the lock
    with its process, so nothing that is removed is still being written. Where a folder cannot be locked (Windows, some
    network file systems) saves do not wait, and leftovers stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key, held = folder.resolve(), vars(_held).setdefault("folders", [])
    if fcntl is None or key in held:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    held.append(key)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
            for name in (WEIGHTS, CONFIG, CARD, MERGED):
                for leftover in folder.glob(f".{name}.{_RANDOM}"):
                    leftover.unlink(missing_ok=True)
            for leftover in folder.glob(f"{UNFINISHED}{_RANDOM}"):
                shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        held.remove(key)
        os.close(handle)


_held = threading.local()  # `folders` that this thread has locked


def load(folder: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors (on the CPU) and the settings that `save` wrote."""
    path = Path(folder) / WEIGHTS
    if path.is_file():
        return read(path)
    lacks = f"there is no {WEIGHTS}" if Path(folder).is_dir() else "there is no such folder"
    said, other = f"no adapter in {folder}: {lacks}", path.with_name("model.safetensors")
    if other.is_file() and not path.with_name("config.json").is_file():
        said += (
            "; it is a Trainer's checkpoint, which the module that was trained takes: PromptedModel(model, length=...)"
            f".load_state_dict(safetensors.torch.load_file({str(other)!r})), and save_pretrained makes an adapter of it"
        )
    raise FileNotFoundError(said)


def kind_of(folder: str | Path, settings: dict) -> tuple[str, dict]:
    """What the adapter in `folder` is, by the settings in its file or, where it is PEFT's own, beside it; and these.

    "FastPTuning" or PEFT's name of the kind ("PROMPT_TUNING", "LORA", ...); "" where nothing says it.
    """
    settings = settings or _settings_in(Path(folder) / CONFIG)
    config = settings.get("config", settings)
    config = config if isinstance(config, dict) else {}
    return str(config.get("peft_type") or ("FastPTuning" if "num_labels" in config else "")), config


def is_another(folder: str | Path, kind: str) -> str:
    """The beginning of a message about an adapter that was given in the place of another."""
    if not kind:
        return f"{folder} holds no adapter of a known kind"
    return f"{folder} holds a {kind} adapter, which {_LOADED_BY.get(kind, 'peft.PeftModel.from_pretrained')} loads"


def check_others(folder: str | Path) -> None:
    """ValueError where an adapter in `folder` would replace one of another kind, or keep a model there from loading."""
    kind, _ = kind_of(folder, {})
    if kind and kind not in _LOADED_BY:
        raise ValueError(f"{folder} holds a {kind} adapter, which would be replaced: save this one in another folder")
    if _settings_in(Path(folder, "config.json")).keys() & {"model_type", "architectures"}:  # as transformers writes it
        raise ValueError(
            f"{folder} holds a model (config.json), which would not load any more with an adapter beside it: save the "
            "adapter in another folder"
        )


def _settings_in(file: Path) -> dict[str, Any]:
    """What a JSON file says; {} where there is none, or another."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, of which those that are sharded (FSDP2) are gathered: then a call for all processes at once."""
    sharded: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
    return tensors | {name: tensor.detach().full_tensor() for name, tensor in sharded.items()}


def check_whole(prompt: Any) -> None:
    """ValueError for a prompt of which this process has its part alone, flat."""
    if prompt.dim() < 2:
        raise ValueError(
            "FullyShardedDataParallel has the prompt in parts: save it inside of its summon_full_params(module), or "
            "shard with fully_shard (FSDP2), whose parts are gathered"
        )


def is_first(tensors: Iterable[Any]) -> bool:
    """Whether this process is the one that writes `tensors`: the first of those that they are sharded over, or any."""
    return not any(any(tensor.device_mesh.get_coordinate() or ()) for tensor in tensors if is_sharded(tensor))


def as_bytes(tensors: dict[str, Tensor], settings: dict) -> bytes:
    """A safetensors file of `tensors`, with `settings` and the checksum in its header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    first = {tensor.untyped_storage().data_ptr(): name for name, tensor in reversed(tensors.items())}
    tensors = {  # safetensors refuses what shares memory, as a tied head does
        name: tensor if first[tensor.untyped_storage().data_ptr()] == name else tensor.clone()
        for name, tensor in tensors.items()
    }
    metadata = {"format": "pt", "ptuning_fast": json.dumps(settings, ensure_ascii=False)}
    content = safetensors_bytes(tensors, metadata | dict.fromkeys(_CHECKSUMS, "0" * 64))
    return _with_checksum(content, _checksum(content))


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors (on the CPU) and settings of one file; no settings in a file of somebody else's.

    Raises:
        ValueError: no safetensors file, or one with another content than was written.
    """
    content = path.read_bytes()
    found = {checksum for _, checksum in _IN_HEADER.findall(_header(content))}
    if found and found != {_checksum(content)}:
        raise ValueError(
            f"{path} is damaged: its content is not what was written, by its checksum; take another copy of it"
        )
    try:
        tensors = tensors_of(content)
        settings = json.loads((json.loads(_header(content)).get("__metadata__") or {}).get("ptuning_fast", "{}"))
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: its settings are a {type(settings).__name__}")
    return tensors, settings


def _header(content: bytes) -> bytes:
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def _with_checksum(content: bytes, checksum: bytes) -> bytes:
    header = _header(content)
    return content[:8] + _IN_HEADER.sub(rb'"\1":"' + checksum + b'"', header) + content[8 + len(header) :]


def _checksum(content: bytes) -> bytes:
    """SHA-256 of the file with zeros in the places of its checksum."""
    return hashlib.sha256(_with_checksum(content, b"0" * 64)).hexdigest().encode()


def check_writable(folder: str | Path) -> None:
    """Raise OSError now if an adapter cannot be saved in `folder` later."""
    folder = Path(folder)
    try:
        check_others(folder)
    except ValueError as error:
        raise OSError(str(error)) from None
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def replace(path: Path, content: bytes) -> None:
    """Make `content` the file at `path` in one step: written beside it, forced to disk, renamed.

    Raises:
        OSError: it cannot be written; the file that was there is as it was.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as error:
        reason = f"cannot write {path}, which is as it was before: {error.strerror or error}"
        raise OSError(error.errno, reason) from error
