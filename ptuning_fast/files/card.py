"""The model card: README.md of a saved folder, as the hub shows it.

What is ours stands between two marks and is written anew with each save, as is the title above, unless somebody has
changed it; a README.md without the marks is left as it is.
"""

import json
import re
from pathlib import Path
from typing import Any

from .. import __version__
from ..models import unwrapped
from ..models.families import class_of
from . import adapter

__all__ = ["write_adapter", "write_classifier", "write_merged"]

_HEADER = re.compile(r"(\ufeff?---\r?\n)(.*?^---\r?\n)", re.DOTALL | re.MULTILINE)
_KINDS = {
    "prompt": "A soft prompt",
    "classifier": "A text classifier: a soft prompt and a head",
    "merged": "A model with a soft prompt in its vocabulary",
}
_TITLE = rf"(?P<title># (?:{'|'.join(_KINDS.values())})\s*\n\s*)?"
_OURS = re.compile(rf"{_TITLE}<!-- ptuning-fast -->\s*\n.*?<!-- end of ptuning-fast -->[^\S\n]*(?:\n|\Z)", re.DOTALL)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")


def _write(
    folder: str | Path, kind: str, base_model: str, facts: dict[str, Any], code: str, figures: dict[str, Any] | None
) -> None:
    """Write the card of what is in `folder`.

    Args:
        kind: what it is: "A soft prompt".
        facts, figures: rows of the two tables; without figures there is one.
        code: how to load it.
    """
    file = Path(folder) / adapter.CARD
    rows = [f"| {key} | {_cell(value)} |" for key, value in facts.items() if value not in (None, "")]
    text = f"{kind} for `{base_model or 'a model without a name'}`, by ptuning-fast.\n\n"
    text += "| | |\n| --- | --- |\n" + "\n".join(rows) + f"\n\n```python\n{code.strip()}\n```\n"
    if figures:
        rows = [f"| {_cell(key)} | {_cell(value)} |" for key, value in figures.items()]
        text += "\n| figure | value |\n| --- | --- |\n" + "\n".join(rows) + "\n"
    text = f"<!-- ptuning-fast -->\n{text}<!-- end of ptuning-fast -->\n"
    with adapter.saving(Path(folder)):
        old = file.read_bytes().decode(errors="surrogateescape") if file.is_file() else None
        if old is None:
            text = f"{_header(base_model)}\n# {kind}\n\n{text}"
        else:
            ours, header, before = text, _HEADER.match(old), _OURS.search(old)
            if header and before:
                named = re.search("for `(.*)`, by", before[0])
                settings = _with_base(header[2], named[1] if named else "", base_model)
                old = f"{header[1]}{settings}{old[header.end() :]}"
            text = _OURS.sub(lambda found: f"# {kind}\n\n{ours}" if found["title"] else ours, old, count=1)
        adapter.replace(file, text.encode(errors="surrogateescape"))


def _with_base(header: str, old: str, new: str) -> str:
    """The hub's settings with another base model, where the old one stands there; what else does is somebody's word."""
    line = _base_line(new)
    if not _base_line(old):  # none was written
        return header if re.search("^base_model", header, re.MULTILINE) else line + header
    spelled = rf"^base_model: *(['\"]?){re.escape(old)}\1[ \t]*\r?\n"
    return re.sub(spelled, lambda _: line, header, count=1, flags=re.MULTILINE)


def _cell(value: Any) -> str:
    return (f"{value:.4g}" if isinstance(value, float) else str(value)).replace("|", r"\|").replace("\n", " ")


def write_adapter(
    folder: str | Path, model: Any, config: dict[str, Any], settings: dict[str, Any], figures: dict[str, Any] | None
) -> None:
    """The card of a soft prompt, from the settings that are saved with it."""
    base, class_name = config["base_model_name_or_path"] or "", class_of(model).__name__
    encoder, bank = settings["encoder"] or {}, settings["num_prompts"] is not None
    given = "input_ids, attention_mask" + ", prompt_index=prompt_index" * bank
    call = f"prompt.generate({given})" if config["task_type"] == "SEQ_2_SEQ_LM" else f"model(**prompt({given}))"
    labels = _labels(model) if config["task_type"] in ("SEQ_CLS", "TOKEN_CLS") else ""
    facts = {
        "task": config["task_type"],
        "virtual tokens": config["num_virtual_tokens"],
        "width": config["token_dim"],
        "prompts": settings["num_prompts"],
        "encoder": encoder.get("kind"),
        "made with": f"ptuning-fast {__version__}",
    }
    code = f"""
from transformers import {class_name}
from ptuning_fast import SoftPrompt

model = {class_name}.from_pretrained({base or "..."!r}{labels}).requires_grad_(False)
prompt = SoftPrompt.from_pretrained(model, "path/to/this/folder")  # or its name on the hub
output = {call}
"""
    if not bank:
        code += '\n# or: peft.PeftModel.from_pretrained(model, "path/to/this/folder")\n'
    _write(folder, _KINDS["prompt"], base, facts, code, figures)


def _labels(model: Any) -> str:
    """What a classifier's checkpoint may not say, as an argument: the names of the classes, or how many there are."""
    names = unwrapped(model).config.id2label
    named = any(name != f"LABEL_{number}" for number, name in names.items())
    return f", id2label={names!r}" if named else f", num_labels={len(names)}"


def write_classifier(folder: str | Path, settings: dict[str, Any], figures: dict[str, Any] | None) -> None:
    """The card of a FastPTuning adapter, from the settings that are saved with it."""
    base, length = settings["base_model_name_or_path"] or "", settings["max_length"]
    facts = {
        "classes": ", ".join(map(str, (settings["id2label"] or {}).values())) or settings["num_labels"],
        "virtual tokens": settings["prompt_length"],
        "pooling": settings["pooling"],
        "tokens of a text, at most": length,
        "made with": f"ptuning-fast {__version__}",
    }
    encoder = "" if base else ", model_name=encoder"
    code = f"""
from transformers import AutoTokenizer
from ptuning_fast import FastPTuning

model = FastPTuning.from_pretrained("path/to/this/folder"{encoder})  # or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(model.bert.name_or_path)
logits = model(**tokenizer(["a text"], truncation=True, max_length={length}, return_tensors="pt"))
"""
    _write(folder, _KINDS["classifier"], base, facts, code, figures)


def write_merged(folder: Path, model: Any, strings: dict[str, str], length: int, bank: bool) -> None:
    """The card of a checkpoint with one or more prompts in its vocabulary."""
    auto = "AutoModelForCausalLM" if model.can_generate() else class_of(model).__name__
    folder_of_one = f', subfolder="{next(iter(strings))}"' if bank else ""
    code = f"""
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder"{folder_of_one})  # by another class: no prompt
output = model(**tokenizer("a text", return_tensors="pt"))
"""
    facts = {"virtual tokens": length, "prompts": ", ".join(strings), "made with": f"ptuning-fast {__version__}"}
    facts |= {f"`{name}` as a string": f"`{string}`" for name, string in strings.items()}
    base = str(getattr(model.config, "_name_or_path", "") or "")
    _write(folder, _KINDS["merged"], base, facts, code, None)


def _header(base_model: str) -> str:
    lines = ["library_name: transformers", "tags:", "- prompt-tuning", "- ptuning-fast"]
    return f"---\n{_base_line(base_model)}" + "\n".join(lines) + "\n---\n"


def _base_line(base_model: str) -> str:
    named = _HUB_ID.fullmatch(base_model) and not Path(base_model).exists()  # the hub refuses a name of anything else
    return f"base_model: {json.dumps(base_model)}\n" if named else ""
