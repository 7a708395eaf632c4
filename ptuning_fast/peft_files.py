"""Soft prompts as PEFT's adapter files, and what PEFT's files cannot hold in a file beside them.

    adapter_model.safetensors   prompt_embeddings [m, d] as the model sees them, and a task head: PEFT's layout
    adapter_config.json         PEFT's settings
    soft_prompt.safetensors     only with an encoder or a bank: the parameters themselves, from which training resumes

PEFT ignores the third. With a bank it is the only one, and each prompt has a folder of its own for PEFT: 0, 1, ...

Every file is replaced in one step, and the third, which is whole by itself, first: it names (by SHA-256) the
adapter_model.safetensors that belongs to it and the one that was there before, so that after a crash in between it is
known for what it is, and after PEFT has written a new adapter it is known to be out of date.
"""

import hashlib
import json
from pathlib import Path

from torch import Tensor, nn

from . import adapter
from .serving import is_a, unwrapped

__all__ = ["load", "peft_config", "save", "save_bank"]

RESUME = "soft_prompt.safetensors"
PEFT_TYPES = ("PROMPT_TUNING", "P_TUNING")
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
_SUBMODULES = "num_transformer_submodules"
HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def peft_config(model: nn.Module, base_model: str, length: int, d: int) -> dict:
    """The settings of a PROMPT_TUNING adapter for `model`, with the keys that PEFT writes."""
    model = unwrapped(model)
    task = next((task for end, task in TASKS.items() if is_a(model, end)), "FEATURE_EXTRACTION")
    if model.config.is_encoder_decoder and task == "FEATURE_EXTRACTION":
        task = "SEQ_2_SEQ_LM"
    text = model.config.get_text_config()
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": task,
        "auto_mapping": None,
        "base_model_name_or_path": base_model or None,
        "revision": None,
        "inference_mode": True,
        "modules_to_save": None,
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


def head_of(model: nn.Module, task: str) -> dict[str, Tensor]:
    """The parameters outside the base model of a classifier: {"classifier.weight": ...}; none for other tasks.

    None either of a model that PEFT has wrapped (LoRA and the like): it keeps its head with its own adapter.
    """
    if task not in HEADS or hasattr(getattr(model, "_orig_mod", model), "peft_config"):
        return {}
    model = unwrapped(model)
    inner = model.base_model_prefix + "."
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inner)}


def save(folder: str | Path, rows: Tensor, head: dict[str, Tensor], config: dict, resume=None) -> None:
    """Write an adapter that PEFT loads.

    Args:
        rows: [m, d], the prompt as the model sees it.
        head: parameters of the model that were trained with it.
        resume: (tensors, settings) from which training goes on, where `rows` do not say it all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"prompt_embeddings": rows} | {f"base_model.{name}": tensor for name, tensor in head.items()}
    weights = adapter.as_bytes(tensors, config)
    if resume is not None:
        _save_resume(folder, *resume, belongs_to=hashlib.sha256(weights).hexdigest())
    adapter.replace(folder / adapter.WEIGHTS, weights)
    config = {key: value for key, value in config.items() if key != "model_type"}
    adapter.replace(folder / adapter.CONFIG, json.dumps(config, indent=2).encode())
    if resume is None:
        if (folder / RESUME).is_file():
            _remove_bank(folder, 0, _bank_size(folder))
            (folder / RESUME).unlink()
    else:  # no crash came in between: what was there before has no claim any more
        _save_resume(folder, *resume, belongs_to=_digest(folder / adapter.WEIGHTS))


def save_bank(folder: str | Path, rows: Tensor, head: dict[str, Tensor], config: dict, resume) -> None:
    """Write a bank [K, m, d]: `resume` for us, and each prompt in a folder of its own for PEFT."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    before = _bank_size(folder)
    _save_resume(folder, *resume, belongs_to=None)
    for name in (adapter.WEIGHTS, adapter.CONFIG):
        (folder / name).unlink(missing_ok=True)
    for place, prompt in enumerate(rows):
        save(folder / str(place), prompt, head, config)
    _remove_bank(folder, len(rows), before)


def _bank_size(folder):
    """How many prompts the bank has that was saved here before; 0 where there is none."""
    try:
        return adapter.read(folder / RESUME)[1].get("num_prompts") or 0
    except (OSError, ValueError):
        return 0


def _remove_bank(folder, first, end):
    """The adapters of prompts `first` to `end` of a bank that was saved here before; nothing else in their folders."""
    for number in range(first, end):
        place = folder / str(number)
        for name in (adapter.WEIGHTS, adapter.CONFIG):
            (place / name).unlink(missing_ok=True)
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()


def _save_resume(folder, tensors, settings, belongs_to):
    settings = settings | {"belongs_to": belongs_to, "replaced": _digest(folder / adapter.WEIGHTS)}
    adapter.replace(folder / RESUME, adapter.as_bytes(tensors, settings))


def load(folder: str | Path):
    """(rows, head, config, resume) as they were saved, by us or by PEFT; resume is None where there is none.

    With a bank rows is None: resume holds it.

    Raises:
        FileNotFoundError: no adapter in `folder`.
        ValueError: an adapter of another kind, or a damaged one.
    """
    folder = Path(folder)
    weights = _digest(folder / adapter.WEIGHTS)
    if (folder / RESUME).is_file():
        tensors, settings = adapter.read(folder / RESUME)
        if weights in (settings.get("belongs_to"), settings.get("replaced")):
            head = {name[5:]: tensors.pop(name) for name in list(tensors) if name.startswith("head.")}
            return None, head, settings["config"], (tensors, settings)
    if weights is None:
        if (folder / "adapter_model.bin").is_file():
            raise ValueError(
                f"the adapter in {folder} is a pickle (adapter_model.bin), which may run code when it is read: "
                "load it with PEFT and save it again, as safetensors"
            )
        raise FileNotFoundError(f"no adapter in {folder}: there is no {adapter.WEIGHTS}")
    tensors, config = adapter.read(folder / adapter.WEIGHTS)
    if not config:
        try:
            config = json.loads((folder / adapter.CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"the adapter in {folder} has no readable {adapter.CONFIG}: {error}") from None
    if config.get("peft_type") not in PEFT_TYPES or "prompt_embeddings" not in tensors:
        kind = config.get("peft_type", "of another kind")
        raise ValueError(f"the adapter in {folder} is {kind}; a SoftPrompt is {' or '.join(PEFT_TYPES)}")
    # PEFT keeps a second prompt for the decoder of an encoder-decoder, which its forward does not use.
    rows, m, copies = (tensors.pop("prompt_embeddings"), *map(config.get, ("num_virtual_tokens", _SUBMODULES)))
    if not isinstance(m, int) or rows.dim() != 2 or len(rows) not in (m, m * (copies or 1)):
        raise ValueError(
            f"the adapter in {folder} is damaged: its prompt is {list(rows.shape)}, and its settings say "
            f"num_virtual_tokens={m!r}, {_SUBMODULES}={copies!r}"
        )
    rows = rows[:m]
    head = {name.removeprefix("base_model."): tensor for name, tensor in tensors.items()}
    return rows, head, config, None


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
