"""Adapters on Hugging Face's hub."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import adapter, peft

__all__ = ["local", "push"]


def push(
    repo_id: str,
    save: Callable[[Path], Any],
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload what `save` writes into a folder; returns the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        if api.file_exists(repo_id, adapter.CARD, revision=revision):  # what others wrote in it stays
            api.hf_hub_download(repo_id, adapter.CARD, revision=revision, local_dir=folder)
        save(Path(folder))
        info = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload a soft prompt",
            create_pr=create_pr,
        )
    return info.commit_url


def local(folder: str | Path) -> Path:
    """The folder itself, or where the hub's repository of that name lies after it was downloaded.

    Raises:
        FileNotFoundError: neither is there.
    """
    if Path(folder).exists() or not isinstance(folder, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", folder):
        return Path(folder)
    from huggingface_hub import snapshot_download

    try:
        patterns = [f"*{adapter.WEIGHTS}", adapter.CONFIG, peft.FIRST_VERSION]
        return Path(snapshot_download(folder, allow_patterns=patterns))
    except Exception as error:
        raise FileNotFoundError(f"no adapter in {folder}: no such folder, and from the hub: {error}") from error
