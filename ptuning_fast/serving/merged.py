"""A prompt as rows of a model's vocabulary: an ordinary checkpoint, for any runtime.

The table of token embeddings gets a row for each virtual token: rows that a padded table has to spare, and then new
ones. Whatever else has an entry for each token (a head, its bias) gets the mean of its entries there: a virtual token's
logit is the mean of all logits, so it is never the largest, and its probability is 1 / V at most. A head that is tied
to the table cannot have both, and is untied.
"""

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import adapter, card
from ..models.embedding import embed_scale, unreadable
from ..models.info import describe, has_adapter, prompts_in, unwrapped
from . import checkpoint, virtual_tokens

__all__ = ["save"]


def save(
    folder: str | Path,
    model: Any,
    tokenizer: Any,
    rows: Tensor,
    names: list[str] | None = None,
    post_processor: bool = True,
) -> dict[str, str]:
    """Write `model` with `rows` [m, d] or [K, m, d] in its vocabulary, and a tokenizer that puts them in front.

    Of a bank each prompt gets a tokenizer of its own, in a folder of its name.

    Returns:
        For each name the prompt as a string: its tokens, and what the tokenizer puts before a text.
    """
    folder, bank = Path(folder), rows.dim() == 3
    prompts = rows if bank else rows[None]
    names = _checked(names, len(prompts), bank)
    model = _mergeable(model)
    _check_folder(folder, model, tokenizer, names if bank else [])
    if not rows.numel():
        raise ValueError("there are no virtual tokens to merge: model.save_pretrained is all it takes")
    tokens = [[f"<|{name}_{place}|>" for place in range(prompts.shape[1])] for name in names]
    with_tokens, ids = virtual_tokens.added(tokenizer, [token for prompt in tokens for token in prompt])
    _check_ids(model, ids)
    with_tokens.model_max_length = _max_length(tokenizer, describe(model).max_positions, prompts.shape[1])

    if model.base_model is model:
        warnings.warn(
            f"{type(model).__name__} has no head: of the merged one the first {prompts.shape[1]} hidden states are "
            "the virtual tokens', which PromptedModel leaves out, so their mean and their first row are others "
            "(docs/serving.md)",
            stacklevel=3,
        )
    saved, state = _with_rows(model, prompts.flatten(0, 1), ids)
    if describe(model).pooled == "right":
        _set_padding(saved, tokenizer)
    length, before = prompts.shape[1], virtual_tokens.text_before(tokenizer)
    strings = {}
    with adapter.saving(folder):
        _check_folder(folder, model, tokenizer, names if bank else [])  # what another has written while this one waited
        with checkpoint.replacing(folder, names if bank else []) as made:
            saved.config.save_pretrained(made)  # first, as it tells the tokenizers' class
            if bank:
                virtual_tokens.save(with_tokens, made, [], tokenizer)
            for place, (name, prompt) in enumerate(zip(names, tokens)):
                own = ids[place * length : (place + 1) * length]
                one = virtual_tokens.in_front(with_tokens, prompt, post_processor=post_processor)
                virtual_tokens.save(one, made / name if bank else made, own if post_processor else [], tokenizer)
                strings[name] = "".join(prompt) + before
                virtual_tokens.warn_of_chats(one, own, tokenizer)
                if not post_processor:
                    virtual_tokens.warn_of_strings(one, strings[name], own, tokenizer)
            saved.save_pretrained(made, state_dict=state)
        card.write_merged(folder, model, strings, length, bank)
    return strings


def _check_folder(folder: Path, model: Any, tokenizer: Any, names: list[str]) -> None:
    for place in (folder, *(folder / name for name in names)):
        for name in (model.config._name_or_path, getattr(tokenizer, "name_or_path", "")):
            if name and Path(name).is_dir() and place.resolve() == Path(name).resolve():
                raise ValueError(f"{place} is where the model itself is: it would be replaced, so name another folder")
        kind, _ = adapter.kind_of(place, {})
        if kind or (place / adapter.WEIGHTS).exists():
            raise ValueError(
                f"{place} holds {f'a {kind}' if kind else 'an'} adapter, and transformers would load its model: name "
                "another folder"
            )
    checkpoint.check_others(folder, names)


def _checked(names: list[str] | None, K: int, bank: bool) -> list[str]:
    names = names or ([f"prompt_{place}" for place in range(K)] if bank else ["prompt"])
    different = len({name.casefold() for name in names}) == K == len(names)  # folders, also where case does not count
    if not different or not all(
        re.fullmatch(r"\w[\w.-]*", one) and not one.casefold().endswith(_FILES) for one in names
    ):
        raise ValueError(
            f"names must be {K}, all different, of letters, digits, '_', '-' and '.', and not those of files; they are "
            f"{names}"
        )
    return names


_FILES = (".json", ".md", ".safetensors", ".jinja", "additional_chat_templates")  # what else stands in the folder


def _mergeable(model: Any) -> Any:
    """The transformers model itself; TypeError where its vocabulary cannot hold a prompt, with the reason."""
    bare = unwrapped(model)
    name, table = type(bare).__name__, bare.get_input_embeddings()
    if has_adapter(model):
        raise TypeError("the model has an adapter of PEFT's: merge that first (model = model.merge_and_unload())")
    if getattr(bare, "hf_quantizer", None) is not None:
        raise TypeError(f"{name} is quantized: merge into the model as it was before, and quantize the result")
    if bare.config.is_encoder_decoder:
        raise TypeError(f"the decoder of {name} has the same vocabulary, and no prompt: serve it with SoftPrompt")
    with torch.no_grad():
        obstacle = unreadable(table)
    tensors = bare.state_dict().items()
    parted = [key for key, value in tensors if value.device.type == "meta" or type(value) is not Tensor]
    if obstacle is None and parted:
        obstacle = f"{parted[0]} is not on this machine as a whole, or no plain tensor"
    if obstacle is not None:
        raise TypeError(
            f"a row of the vocabulary of {name} is not what its embedding gives, or cannot be written: {obstacle}; "
            "merge into the plain model on one device, or serve the prompt with SoftPrompt (prompt.embeddings_for)"
        )
    return bare


def _set_padding(model: Any, tokenizer: Any) -> None:
    """Have a classifier of the last token, which is given ids, tell padding as the tokenizer pads.

    ValueError where it would then pass over the token that a text ends with.
    """
    text = model.config.get_text_config()
    if tokenizer.pad_token_id is not None:
        model.config.pad_token_id = text.pad_token_id = tokenizer.pad_token_id
    padding, end = getattr(text, "pad_token_id", None), virtual_tokens.end_of_text(tokenizer)
    if padding is not None and end == tokenizer.convert_ids_to_tokens(padding):
        raise ValueError(
            f"the tokenizer ends a text with {end!r}, which a {type(model).__name__} that is given ids takes for "
            "padding: give the tokenizer another padding token"
        )


def _max_length(tokenizer: Any, positions: int | None, m: int) -> int:
    """As many tokens of a text as `tokenizer` leaves it, and a prompt before them, as far as there are positions."""
    most, endless = tokenizer.model_max_length, 10**9  # a tokenizer without a limit says 10**30
    return most if most > endless else max(most, min(most + m, positions or endless))


def _check_ids(model: Any, ids: list[int]) -> None:
    V = model.get_input_embeddings().num_embeddings
    if ids[0] > V:
        raise ValueError(
            f"the tokenizer has {ids[0]} tokens, and the vocabulary of {type(model).__name__} {V} rows: give the "
            f"model's own tokenizer, or call model.resize_token_embeddings({ids[0]}) first"
        )
    if ids[0] < 0.9 * V:
        warnings.warn(
            f"the tokenizer has {ids[0]} tokens, and the vocabulary of {type(model).__name__} {V} rows: the prompt "
            "takes the next rows, which are other tokens' if this is not the model's own tokenizer",
            stacklevel=4,
        )
    for config in (model.config.get_text_config(), getattr(model, "generation_config", None)):
        for key, value in (config.to_dict() if config is not None else {}).items():
            used = set(value if isinstance(value, list) else [value]) & set(ids) if key.endswith("_token_id") else ()
            if used:
                raise ValueError(
                    f"the model's {key} is {value}, which the tokenizer does not have: add that token first"
                )


@torch.no_grad()
def _with_rows(model: Any, rows: Tensor, ids: list[int]) -> tuple[Any, dict[str, Tensor]]:
    """The model as it is to be saved, with `rows` at `ids`, and its tensors: those that change are new ones."""
    table, prompts = model.get_input_embeddings(), prompts_in(model)
    state = {name: one for name, one in model.state_dict().items() if not name.startswith(prompts)}
    V, headed = table.num_embeddings, model.get_output_embeddings() is not None
    wider = _config(model, V + 1, headed)
    with torch.device("meta"):
        shell = type(model)(wider)
    per_token, tables = _per_token(shell, state, V)

    # What is one tensor in the model, and not where its head is its own (Zamba's shared layers), is written as many.
    seen: dict[int, Any] = {}
    for name, parameter in shell.named_parameters(remove_duplicate=False):
        if seen.setdefault(state[name].data_ptr(), parameter) is not parameter and name not in per_token:
            state[name] = state[name].clone()

    size = max(V, ids[-1] + 1)
    for name in per_token:
        old = state[name].cpu()
        state[name] = old.new_zeros(size, *old.shape[1:])
        state[name][:V] = old
        if name in tables:
            state[name][ids] = (rows.cpu() / embed_scale(table)).to(old.dtype)
        else:
            state[name][ids] = old[: ids[0]].mean(0, dtype=torch.float32).to(old.dtype)

    # The model with other settings; its modules are the model's own, and only their names are looked at.
    saved = copy.copy(model)
    saved.config = _config(model, size, headed)
    if model.can_generate():
        saved.generation_config = copy.deepcopy(model.generation_config)
        saved.generation_config.suppress_tokens = [*(saved.generation_config.suppress_tokens or []), *ids]
        saved.generation_config.validate(strict=True)  # as saving it does, when files have been written
    return saved, state


def _config(model: Any, V: int, untied: bool) -> Any:
    """A copy of the model's settings with a vocabulary of V tokens, and a head of its own."""
    config = copy.deepcopy(model.config)
    config.get_text_config().vocab_size = V
    for one in (config, config.get_text_config()) if untied else ():
        one.tie_word_embeddings = False
    return config


def _per_token(shell: Any, state: dict[str, Tensor], V: int) -> tuple[list[str], list[str]]:
    """The names of tensors with an entry for each of V tokens, and of those the embedding's; found in a model of V + 1.

    Raises:
        TypeError: the model is more than its class and its settings say, or its head cannot be untied.
    """
    name, wider = type(shell).__name__, shell.state_dict()
    if wider.keys() != state.keys():
        raise TypeError(f"{name} as its settings say has other tensors: {sorted(wider.keys() ^ state.keys())[:3]}")
    other = [key for key, value in state.items() if value.shape != wider[key].shape]
    for key in other:
        if wider[key].shape != (V + 1, *state[key].shape[1:]) or len(state[key]) != V:
            sizes = f"{list(state[key].shape)}, and with one token more {list(wider[key].shape)}"
            raise TypeError(f"{key} of {name} is {sizes}: not a row for each of {V} tokens; serve it with SoftPrompt")
    table, head = shell.get_input_embeddings().weight, shell.get_output_embeddings()
    if head is not None and head.weight is table:
        raise TypeError(f"the head of {name} is its embedding, whatever its settings say: serve it with SoftPrompt")
    tables = [key for key, value in shell.named_parameters(remove_duplicate=False) if value is table]
    if not set(tables) <= set(other):
        raise TypeError(f"the embedding of {name} does not grow with its vocab_size: serve it with SoftPrompt")
    return other, tables
