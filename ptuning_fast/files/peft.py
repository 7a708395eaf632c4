"""Soft prompts as PEFT's adapter files, with what PEFT does not know of in the same file.

    adapter_model.safetensors   prompt_embeddings [m, d] as the model sees them, and a task head: PEFT's layout;
                                under ptuning_fast.*, with an encoder or a bank, the parameters themselves, from which
                                training resumes; in the header, the settings
    adapter_config.json         PEFT's settings

PEFT passes over names that it does not know. A bank [K, m, d] has no prompt_embeddings of PEFT's: each of its prompts
has a folder of its own for PEFT: 0, 1, ... The first file is whole by itself and replaced in one step, so a crash
leaves the old adapter or the new one.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..models.info import is_a, unwrapped
from . import adapter

__all__ = [
    "Saved",
    "bank_size",
    "load",
    "peft_config",
    "remove_bank",
    "save",
    "task_of",
]

OURS = "ptuning_fast."
FIRST_VERSION = "soft_prompt.safetensors"  # beside PEFT's file, in the first version: what is now in it
PEFT_TYPES = ("PROMPT_TUNING", "P_TUNING")
OF_BANK = "of_bank"  # among the settings of an adapter that a bank has for PEFT: its place in it
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForQuestionAnsweringSimple": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def peft_config(model: Any, base_model: str, length: int, d: int, modules: set[str]) -> dict[str, Any]:
    """The settings of a PROMPT_TUNING adapter for `model`, with the keys that PEFT writes.

    Args:
        modules: those of the model that go with the prompt. PEFT saves those alone again that it knows or is told.
    """
    task, model = task_of(model), unwrapped(model)
    text = model.config.get_text_config()
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": task,
        "auto_mapping": None,
        "base_model_name_or_path": base_model or None,
        "revision": None,
        "inference_mode": True,
        "modules_to_save": sorted(modules) or None,
        "num_attention_heads": getattr(text, "num_attention_heads", 1),
        "num_layers": getattr(text, "num_hidden_layers", 1),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "token_dim": d,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
        "tokenizer_kwargs": None,
        "model_type": model.config.model_type,  # kept in the files' headers alone: PEFT does not know it
    }


def task_of(model: Any) -> str:
    """PEFT's word for what a model is for; it generates behind a prompt with language models alone."""
    model = unwrapped(model)
    of_others = "CAUSAL_LM" if model.can_generate() else "FEATURE_EXTRACTION"
    of_others = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else of_others
    return next((task for end, task in TASKS.items() if is_a(model, end)), of_others)


class Saved(NamedTuple):
    """A soft prompt on disk."""

    parameters: dict[str, Tensor]  # SoftPrompt's state_dict
    head: dict[str, Tensor]  # parameters of the model that were trained with it
    config: dict[str, Any]  # PEFT's settings, and the model's type
    settings: dict[str, Any]  # num_prompts, and the encoder's


def save(folder: str | Path, saved: Saved, rows: Tensor) -> None:
    """Write an adapter that PEFT loads; of a bank, one that we load, and one for PEFT of each prompt.

    Args:
        rows: [m, d] or [K, m, d], the prompts as the model sees them.

    Raises:
        ValueError: a folder with an adapter of another kind in it, or a model.
    """
    folder, bank = Path(folder), rows.dim() == 3
    adapter.check_others(folder)
    tensors = {f"base_model.{name}": tensor for name, tensor in saved.head.items()}
    if not bank:
        tensors["prompt_embeddings"] = rows
    if bank or len(saved.parameters) > 1:
        tensors |= {OURS + name: tensor for name, tensor in saved.parameters.items()}
    content = adapter.as_bytes(tensors, {"config": saved.config} | saved.settings)
    with adapter.saving(folder):
        before = bank_size(folder)
        for number in range(len(rows) if bank else 0):
            _check_place(folder / str(number))
        remove_bank(folder, len(rows) if bank else 0, before)  # first, as its size is in the file
        adapter.replace(folder / adapter.WEIGHTS, content)
        if bank:  # PEFT knows a folder of an adapter by its settings
            (folder / adapter.CONFIG).unlink(missing_ok=True)
        else:
            config = {key: value for key, value in saved.config.items() if key != "model_type"}
            adapter.replace(folder / adapter.CONFIG, json.dumps(config, indent=2).encode())
        (folder / FIRST_VERSION).unlink(missing_ok=True)
        for place, prompt in enumerate(rows if bank else []):
            settings = saved.settings | {"num_prompts": None, "encoder": None, OF_BANK: place}
            one = Saved({"prompt_embeddings": prompt}, saved.head, saved.config, settings)
            save(folder / str(place), one, prompt)


def load(folder: str | Path) -> Saved:
    """A prompt as it was saved, by us or by PEFT.

    Raises:
        FileNotFoundError: no adapter in `folder`.
        ValueError: an adapter of another kind, or a damaged one.
    """
    folder = Path(folder)
    first = _of_first_version(folder)
    if first is not None:
        return first
    if (folder / "adapter_model.bin").is_file() and not (folder / adapter.WEIGHTS).is_file():
        raise ValueError(
            f"the adapter in {folder} is a pickle (adapter_model.bin), which may run code when it is read: "
            "load it with PEFT and save it again, as safetensors"
        )
    tensors, settings = adapter.load(folder)
    config = settings.pop("config", settings)
    if not settings and any(name.startswith(OURS) for name in tensors):
        raise ValueError(f"the adapter in {folder} is damaged: it has an encoder or a bank, and no settings of it")
    if not config:
        try:
            config = json.loads((folder / adapter.CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"the adapter in {folder} has no readable {adapter.CONFIG}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"the adapter in {folder} is damaged: its settings are a {type(config).__name__}")
    parameters = {name.removeprefix(OURS): tensors.pop(name) for name in list(tensors) if name.startswith(OURS)}
    if config.get("peft_type") not in PEFT_TYPES or not (parameters or "prompt_embeddings" in tensors):
        said = adapter.is_another(folder, adapter.kind_of(folder, config)[0])
        raise ValueError(f"{said}; a SoftPrompt is {' or '.join(PEFT_TYPES)}, with a prompt in it")
    rows = tensors.pop("prompt_embeddings", None)
    if rows is not None:
        # PEFT keeps a second prompt for the decoder of an encoder-decoder, which its forward does not use.
        m = config.get("num_virtual_tokens")
        twice = config.get("task_type") == "SEQ_2_SEQ_LM" and type(m) is int and rows.shape[:1] == (2 * m,)
        parameters.setdefault("prompt_embeddings", rows[:m] if twice else rows)
    head = {name.removeprefix("base_model."): tensor for name, tensor in tensors.items()}
    return _checked(folder, Saved(parameters, head, config, settings if settings is not config else {}))


def _checked(folder: Path, saved: Saved) -> Saved:
    """`saved`; ValueError unless its tensors are those of its settings. Files by others have no checksum."""
    prompt, m = saved.parameters.get("prompt_embeddings"), saved.config.get("num_virtual_tokens")
    K, encoder = saved.settings.get("num_prompts"), saved.settings.get("encoder")
    shape = [] if prompt is None else list(prompt.shape)
    whole = type(m) is int and (K is None or type(K) is int)
    if not whole or shape[:-1] != [*([] if K is None else [K]), m]:
        raise ValueError(
            f"the adapter in {folder} is damaged: its prompt is {shape}, and its settings say "
            f"num_virtual_tokens={m!r}, num_prompts={K!r}"
        )
    modules = saved.config.get("modules_to_save") or []
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise ValueError(f"the adapter in {folder} is damaged: its modules_to_save are {modules!r}")
    for name, tensor in saved.parameters.items():
        if not tensor.is_floating_point():
            raise ValueError(f"the adapter in {folder} is damaged: {name} is {tensor.dtype}, not a float dtype")
    most = sum(tensor.numel() for tensor in saved.parameters.values())  # no more than what is there is built
    if encoder is not None and not _is_encoder(encoder, most):
        raise ValueError(f"the adapter in {folder} is damaged: its encoder is {encoder!r}")
    return saved


def _is_encoder(settings: Any, most: int) -> bool:
    """Whether these are arguments of PromptEncoder for one of `most` parameters at most."""
    if not isinstance(settings, dict) or not settings.keys() <= {"kind", "hidden_size", "num_layers", "dropout"}:
        return False
    hidden, layers, dropout = (settings.get(key, 1) for key in ("hidden_size", "num_layers", "dropout"))
    whole = all(type(value) is int and value >= 1 for value in (hidden, layers))
    rate = type(dropout) in (int, float) and 0 <= dropout <= 1
    return settings.get("kind") in ("mlp", "lstm") and whole and hidden**2 <= most and layers <= most and rate


def bank_size(folder: Path) -> int:
    """How many prompts the bank has that was saved here before; 0 where there is none."""
    for name in (adapter.WEIGHTS, FIRST_VERSION):
        try:
            return adapter.read(folder / name)[1].get("num_prompts") or 0
        except (OSError, ValueError):
            continue
    return 0


def _is_of_bank(folder: Path) -> bool:
    """Whether the adapter in `folder` is one that a bank has there for PEFT, and not one that is elsewhere, linked."""
    try:
        return not folder.is_symlink() and OF_BANK in adapter.read(folder / adapter.WEIGHTS)[1]
    except (OSError, ValueError):
        return False


def _check_place(folder: Path) -> None:
    """ValueError where a bank would have the adapter of one of its prompts, and somebody else has one."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} is a link or a file, and a bank has a folder there for PEFT: take it away")
    adapter.check_others(folder)
    files = (adapter.CONFIG, adapter.WEIGHTS, "adapter_model.bin")  # the last one PEFT's, pickled
    if any((folder / name).exists() for name in files) and not _is_of_bank(folder):
        raise ValueError(
            f"{folder} holds an adapter that is none of a bank's, and a bank has one there for PEFT: save the bank in "
            "another folder"
        )


def remove_bank(folder: Path, first: int, end: int) -> None:
    """The adapters of prompts `first` to `end` of a bank that was saved here before; nothing else in their folders."""
    for number in range(first, end):
        place = folder / str(number)
        if place.is_dir() and not place.is_symlink():
            with adapter.saving(place):  # which removes what a killed save left there
                if _is_of_bank(place):
                    for name in (adapter.CONFIG, adapter.WEIGHTS):
                        (place / name).unlink(missing_ok=True)
                if not any(place.iterdir()):
                    place.rmdir()


def _of_first_version(folder: Path) -> Saved | None:
    """What the first version kept in a file of its own, where it belongs to PEFT's file as that is now."""
    if not (folder / FIRST_VERSION).is_file():
        return None
    weights = folder / adapter.WEIGHTS
    digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None
    tensors, settings = adapter.read(folder / FIRST_VERSION)
    if digest not in (settings.pop("belongs_to", None), settings.pop("replaced", None)):
        return None
    head = {name[5:]: tensors.pop(name) for name in list(tensors) if name.startswith("head.")}
    config = settings.pop("config", None)
    if not isinstance(config, dict):
        raise ValueError(f"{folder / FIRST_VERSION} is damaged: it has no settings of the prompt")
    return _checked(folder, Saved(tensors, head, config, settings))
