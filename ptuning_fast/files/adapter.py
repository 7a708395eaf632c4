"""Adapter files: small tensors and their settings, in one safetensors file that is replaced in one step."""

import contextlib
import json
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

__all__ = ["CONFIG", "WEIGHTS", "as_bytes", "check_writable", "load", "read", "replace", "save"]

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def save(folder: str | Path, tensors: dict[str, Tensor], settings: dict) -> None:
    """Write `tensors` and `settings` (JSON) into `folder`, which is made if it is not there.

    Each file is written under another name, forced to disk and renamed. A crash leaves the old adapter or the new one:
    `load` reads the safetensors file alone, settings included.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / WEIGHTS, as_bytes(tensors, settings))
    replace(folder / CONFIG, (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())


def load(folder: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors (on the CPU) and the settings that `save` wrote."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"no adapter in {folder}: there is no {WEIGHTS}")
    return read(path)


def as_bytes(tensors: dict[str, Tensor], settings: dict) -> bytes:
    """A safetensors file of `tensors`, with `settings` in its header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors_bytes(tensors, {"format": "pt", "ptuning_fast": json.dumps(settings, ensure_ascii=False)})


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors (on the CPU) and settings of one file; no settings in a file of somebody else's."""
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get("ptuning_fast", "{}"))
            if not isinstance(settings, dict):
                raise ValueError(f"{path} is damaged: its settings are a {type(settings).__name__}")
            return {name: file.get_tensor(name) for name in file.keys()}, settings  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None


def check_writable(folder: str | Path) -> None:
    """Raise OSError now if an adapter cannot be saved in `folder` later."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def replace(path: Path, content: bytes) -> None:
    """Make `content` the file at `path` in one step: written beside it, forced to disk, renamed."""
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
