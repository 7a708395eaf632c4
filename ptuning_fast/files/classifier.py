"""What a FastPTuning adapter holds, and whether a file holds that."""

from pathlib import Path

from torch import Tensor

from . import adapter, peft, weights

__all__ = ["SETTINGS", "TENSORS", "load", "save"]

TENSORS = ("prompt_embeddings", "classifier.weight", "classifier.bias")
SETTINGS = ("prompt_length", "num_labels", "pooling", "mode", "id2label", "max_length")
"""Arguments of FastPTuning that are kept, beside the encoder's name and kind."""
_NEEDED = ("base_model_name_or_path", "prompt_length", "num_labels", "pooling", "mode")


def save(folder: str | Path, tensors: dict[str, Tensor], settings: dict) -> None:
    """`adapter.save`; of a bank of prompts that was saved here before PEFT finds nothing any more."""
    adapter.check_others(Path(folder))
    peft.remove_bank(Path(folder), 0, peft.bank_size(Path(folder)))
    adapter.save(folder, tensors, settings, unlisted=(weights.KEY,))


def load(folder: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and settings of an adapter, looked through.

    Raises:
        FileNotFoundError: no adapter in `folder`.
        ValueError: an adapter of something else, or a damaged one.
    """
    tensors, settings = adapter.load(folder)
    kind, _ = adapter.kind_of(folder, settings)
    if kind != "FastPTuning":
        raise ValueError(f"{adapter.is_another(folder, kind)}, and no FastPTuning adapter")
    lacking = [key for key in _NEEDED if key not in settings]
    if lacking:
        raise ValueError(f"{folder} holds no FastPTuning adapter: its settings lack {', '.join(map(repr, lacking))}")
    for key, least in (("prompt_length", 0), ("num_labels", 1), ("max_length", 1)):
        value = settings.get(key)
        if (type(value) is not int or not least <= value < 2**31) and (value is not None or key != "max_length"):
            raise ValueError(f"the adapter in {folder} is damaged: {key} is {value!r}")
    if not isinstance(settings.get("id2label", {}), (dict, type(None))):
        raise ValueError(f"the adapter in {folder} is damaged: id2label is {settings['id2label']!r}")
    for key in TENSORS:
        if key in tensors and not (tensors[key].is_floating_point() and tensors[key].isfinite().all()):
            raise ValueError(f"the adapter in {folder} is damaged: {key} holds what is no finite number")
    rows, length = tensors.get("prompt_embeddings", ()), settings["prompt_length"]
    if len(rows) != length:
        raise ValueError(
            f"the adapter in {folder} is damaged: prompt_length is {length}, and its prompt has {len(rows)} rows"
        )
    return tensors, settings
