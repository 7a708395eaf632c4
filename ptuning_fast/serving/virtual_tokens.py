"""A tokenizer whose vocabulary holds a prompt's virtual tokens, and which puts them in front of a text by itself.

    tokenizer(text)              v_0 .. v_{m-1} | what it was before: [CLS] text [SEP]
    apply_chat_template(chat)    v_0 .. v_{m-1} | what it was before, as the template itself begins with them

The first is the work of the post-processor, which a chat does not go through; the second of the template. Both are in
the tokenizer's own files, so whatever reads those needs to know nothing of prompts.
"""

import copy
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

__all__ = ["added", "end_of_text", "in_front", "save", "text_before", "warn_of_chats", "warn_of_strings"]

# What a saved tokenizer is compared on: those of one architecture normalize what the model's own may not.
_TEXTS = ("Virtual tokens stand before the text.", "naïve  42\n", " I\u0307 e\u0301 \uf900 \ufb01\t\uff11 don't ")


def added(tokenizer: Any, tokens: list[str]) -> tuple[Any, list[int]]:
    """A copy of `tokenizer` with `tokens` as special tokens behind all others, and their ids.

    Raises:
        TypeError: a tokenizer without a `tokenizers` backend ("fast").
        ValueError: a token that is in its vocabulary already; ids that have a gap, so that new tokens get old ids.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} is no fast tokenizer: its files cannot say what it puts before a text; take "
            "AutoTokenizer.from_pretrained(...), or serve the prompt with SoftPrompt"
        )
    known = tokenizer.get_vocab()
    taken = [token for token in tokens if token in known]
    if taken:
        raise ValueError(f"the tokenizer has a token {taken[0]} already: give the prompt another name (names=[...])")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    _check_new(known, dict(zip(tokens, ids)))
    return tokenizer, ids


def _check_new(known: dict[str, int], new: dict[str, int]) -> None:
    """ValueError where a new token has an id of a known one: `tokenizers` counts tokens to find a free id."""
    owners = {number: token for token, number in known.items()}
    for token, number in new.items():
        if number in owners:
            raise ValueError(
                f"the tokenizer gives {token} the id {number}, which is that of {owners[number]!r}: its {len(known)} "
                f"tokens have ids up to {max(owners)}, with a gap or a token listed twice; make it with the ids 0 to "
                f"{max(owners)} all taken, or serve the prompt with SoftPrompt"
            )


def in_front(tokenizer: Any, tokens: list[str], *, post_processor: bool = True) -> Any:
    """A copy of `tokenizer` that puts `tokens`, which it has, before each text and each chat.

    Args:
        post_processor: before each text as well; without, `tokenizer(text)` is what it was.
    """
    tokenizer = copy.deepcopy(tokenizer)
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: _template_with(template, tokens) for name, template in templates.items()}
    elif templates is not None:
        tokenizer.chat_template = _template_with(templates, tokens)
    if post_processor:
        backend = tokenizer.backend_tokenizer
        backend.post_processor = _post_processor(backend, tokens)
    return tokenizer


def text_before(tokenizer: Any) -> str:
    """The special tokens that `tokenizer` puts before a text, as a string: "<s>", "[CLS]", ""."""
    pieces = _pieces(_bare(tokenizer.backend_tokenizer), pair=False)
    return "".join(piece["SpecialToken"]["id"] for piece in pieces[: pieces.index(_A)])


def end_of_text(tokenizer: Any) -> str:
    """The last special token that `tokenizer` puts behind a text: "</s>", ""."""
    pieces = _pieces(_bare(tokenizer.backend_tokenizer), pair=False)
    return next((piece["SpecialToken"]["id"] for piece in reversed(pieces[pieces.index(_A) + 1 :])), "")


def save(tokenizer: Any, folder: Path, before: list[int], original: Any) -> None:
    """Write `tokenizer` into an empty folder, and see that what everybody will load gives `before` and `original`'s.

    Raises:
        RuntimeError: it does not.
    """
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    if before:
        # Classes of one architecture make a post-processor of their own as they load; this one takes tokenizer.json's.
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": tokenizer.model_input_names}
        settings |= {"padding_side": tokenizer.padding_side, "truncation_side": tokenizer.truncation_side}
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    loaded = AutoTokenizer.from_pretrained(folder)
    original = copy.deepcopy(original)  # a call leaves its padding behind
    for text in (*((one,) for one in _TEXTS), _TEXTS[:2]):
        found, expected = loaded(*text)["input_ids"], before + original(*text)["input_ids"]
        if found != expected:
            raise RuntimeError(
                f"{type(tokenizer).__name__}, saved and loaded again, gives {found} for {text}, not {expected}: "
                "serve the prompt with SoftPrompt, or say post_processor=False and give the prompt as a string"
            )


def warn_of_strings(tokenizer: Any, before: str, ids: list[int], original: Any) -> None:
    """A warning where a text is tokenized otherwise behind the prompt's tokens, given as a string."""
    text, original = _TEXTS[0], copy.deepcopy(original)
    found = tokenizer(before + text, add_special_tokens=False)["input_ids"]
    start = original(text_before(original), add_special_tokens=False)["input_ids"]
    expected = ids + start + original(text, add_special_tokens=False)["input_ids"]
    if found != expected:
        warnings.warn(
            f"{type(tokenizer).__name__} gives other tokens for a text that stands behind special tokens in a string "
            f"({found[len(ids) :][:5]}, not {expected[len(ids) :][:5]}): give such runtimes token ids",
            stacklevel=4,
        )


def warn_of_chats(tokenizer: Any, ids: list[int], original: Any) -> None:
    """A warning where a chat is tokenized otherwise behind the prompt's tokens, which its template begins with."""
    templates = original.chat_template
    if templates and tokenizer.truncation_side == "left":
        warnings.warn(
            f"{type(tokenizer).__name__} cuts texts on the left, and of a chat that is the prompt, which its template "
            "begins with: truncate chats on the right (truncation_side='right'), or drop their first messages",
            stacklevel=4,
        )
    for name, chat in itertools.product(templates if isinstance(templates, dict) else [None], _CHATS):
        try:
            expected = ids + original.apply_chat_template(chat, chat_template=name)["input_ids"]
        except Exception:  # no template, or one that wants another chat
            continue
        found = tokenizer.apply_chat_template(chat, chat_template=name)["input_ids"]
        if found != expected:
            warnings.warn(
                f"{type(tokenizer).__name__} gives other tokens for a chat that stands behind special tokens "
                f"({found[len(ids) :][:5]}, not {expected[len(ids) :][:5]}): begin its template with a special token, "
                "and train with that, or give runtimes token ids",
                stacklevel=4,
            )
            return


_USER: dict[str, Any] = {"role": "user", "content": _TEXTS[0]}
_SYSTEM: dict[str, Any] = {"role": "system", "content": _TEXTS[0]}
_PARTS: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": _TEXTS[0]}]}
_CHATS = [_USER], [_SYSTEM, _USER], [_PARTS], [_SYSTEM, _PARTS]
"""What templates ask for: a system message or none, texts or lists of parts."""


def _template_with(template: str, tokens: list[str]) -> str:
    # A line of its own: whether a template's first line begins the text decides what Jinja strips of it.
    return f"{{{{ {json.dumps(''.join(tokens), ensure_ascii=False)} }}}}{{# the trained prompt #}}\n{template}"


_A = {"Sequence": {"id": "A", "type_id": 0}}


def _post_processor(backend: Any, tokens: list[str]) -> Any:
    """The backend's own post-processor, with `tokens` first."""
    first = [{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens]
    bare = _bare(backend)
    single, pair = (first + _pieces(bare, pair) for pair in (False, True))
    special = {piece["SpecialToken"]["id"] for piece in single + pair if "SpecialToken" in piece}
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": {
            token: {"id": token, "ids": [backend.token_to_id(token)], "tokens": [token]} for token in sorted(special)
        },
    }
    spec = json.loads(Tokenizer(models.WordLevel({}, unk_token="")).to_str())
    spec["post_processor"] = {"type": "Sequence", "processors": [*_trimming(bare), template]}
    return Tokenizer.from_str(json.dumps(spec)).post_processor


def _bare(backend: Any) -> Any:
    backend = copy.deepcopy(backend)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _pieces(backend: Any, pair: bool) -> list[dict]:
    """What `backend` makes of a text, or two, as a TemplateProcessing says it; found by looking at what it does."""
    text = next(text for text in ("a", *backend.get_vocab()) if backend.encode(text, add_special_tokens=False).ids)
    encoding = backend.encode(text, text if pair else None)
    pieces: list[dict] = []
    for token, type_id, sequence in zip(encoding.tokens, encoding.type_ids, encoding.sequence_ids):
        if sequence is None:
            pieces.append({"SpecialToken": {"id": token, "type_id": type_id}})
        elif {"Sequence": {"id": "AB"[sequence], "type_id": type_id}} not in pieces[-1:]:
            pieces.append({"Sequence": {"id": "AB"[sequence], "type_id": type_id}})
    return pieces


def _trimming(backend: Any) -> list[dict]:
    """Those of the backend's post-processors that move the offsets of byte-level tokens, and add none."""
    processor = json.loads(backend.to_str())["post_processor"] or {}
    processors = processor.get("processors", [processor])
    keys = ("add_prefix_space", "trim_offsets")
    return [
        {"type": "ByteLevel", "use_regex": True} | {key: one[key] for key in keys}
        for one in processors
        if keys[1] in one
    ]
