"""`generate` behind a prompt whose keys and values are computed once for a batch, and not in every row.

    once:        p_0 .. p_{m-1}      [1, m] keys and values of each layer, repeated for the batch
    computed:    pad  x_1 .. x_n     [B, n]

transformers' generate takes a filled cache beside `inputs_embeds` of all columns, and runs those that the cache lacks.
Beside the embeddings it takes the ids of the text, for penalties and whatever else reads the tokens so far.

From call to call they are kept where the caller says so alone: what a model's weights and adapters were the last
time cannot be told.
"""

import contextlib
import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import GenerationMode

from ..models.embedding import device_of, prepend, rows_of
from ..models.families import has_own_parts, is_written_in
from ..models.info import ModelInfo, fits, unwrapped, uses_adapter
from ..models.probe import off_by, tolerance
from ..models.trial import held_by, is_changed, one_at_a_time, ordinary_tokens, padded, quietly
from ..modes.outputs import CACHES
from ..op import Batch, Layout, Prompt

__all__ = [
    "CachedPrompt",
    "check_caches",
    "check_for_ids",
    "copies_of_rows",
    "count_new_tokens",
    "generate_behind",
    "mark_caches",
    "mask_of",
    "most_new_tokens",
    "taking_embeddings",
]

_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")
# Of generate's options those that concern columns, and those beside its config that concern decoding alone.
_COLUMNS = ("output_hidden_states", "output_attentions")  # which have the prompt's
_DECODING = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer", "synced_gpus")


class CachedPrompt:
    """The prompt's part of `generate` for one model, which is probed for it."""

    def __init__(self, model: Any, info: ModelInfo):
        self.info, self.exact_sides = info, _exact_sides(model, info)
        self.kept: tuple[Tensor, Any, DynamicCache] | None = None  # a prompt [m, d], autocast's dtype, what it gave

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"kept": None}

    def inputs(self, model: Any, batch: Batch, prompt: Prompt, copies: int, keep: bool) -> dict[str, Any] | None:
        """The arguments of `model.generate` for a batch, each row `copies` times; None where they are not exact.

        Args:
            copies: of each row, for beams or several sequences.
            keep: take what was computed for the same prompt, where that was kept, and keep what is computed now.
        """
        mask, m = batch.attention_mask, prompt.vectors.shape[-2]
        if prompt.vectors.dim() != 2 or 0 in batch.input_ids.shape:
            return None
        if mask is not None and (not fits(batch) or bool((mask == 0).all(1).any())):
            return None
        padded_left = mask is not None and bool((mask[:, 0] == 0).any())
        if ("left" if padded_left else "right") not in self.exact_sides:
            return None
        config = unwrapped(model).config.get_text_config()
        windows = [window for name in _WINDOWS if (window := getattr(config, name, None))]
        if windows and (padded_left or m >= min(windows)):  # padding behind the prompt would shift a text's windows
            return None
        vectors = prompt.vectors.detach().to(model.get_input_embeddings().weight.dtype)
        known, device = self.kept if keep else None, vectors.device
        cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        if known is None or known[1] != cast or not _equal(known[0], vectors):
            known = vectors.clone(), cast, _filled(model, self.info, prompt)
        self.kept = known if keep else None
        return _behind(model, self.info, batch, prompt, known[2], copies)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)


def _has_own_attention(model: Any) -> bool:
    """Whether it goes through somebody's own functions, which may take a whole prefill for another than a part."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = unwrapped(model).config.get_text_config()._attn_implementation
    functions = ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    return not all(is_written_in(one, "transformers.", "ptuning_fast.") for one in functions)


def copies_of_rows(model: Any, options: dict[str, Any], attention_mask: Tensor | None) -> int | None:
    """How many of each row `model.generate(**options)` makes; None where it might read the prompt's rows otherwise.

    None as well where padding is on the left and a cache is given back: a next call that goes on from it would have the
    prompt elsewhere.
    """
    settings = getattr(model, "generation_config", None)

    def option(name: str) -> Any:
        return options.get(name, getattr(settings, name, None))

    if settings is None or not all(name in vars(settings) or name in _DECODING for name in options):
        return None
    if has_own_parts(model) or _has_own_attention(model):  # which may count columns
        return None
    if any(option(name) for name in ("cache_implementation", *_COLUMNS)) or option("use_cache") is False:
        return None
    padded_left = attention_mask is not None and bool((attention_mask[..., :1] == 0).any())
    if padded_left and _settings(model, options).return_dict_in_generate:
        return None
    if option("repetition_penalty") not in (None, 1.0) or any(module.training for module in model.modules()):
        return None
    return max(option("num_beams") or 1, option("num_return_sequences") or 1)


def _settings(model: Any, options: dict[str, Any]) -> Any:
    """What generate goes by: its options, then the caller's GenerationConfig, then the model's."""
    if getattr(model, "generation_config", None) is None:
        name = type(unwrapped(model)).__name__
        raise TypeError(f"{name} generates nothing: load the model with a class that does, as AutoModelForCausalLM")
    settings = copy.copy(model.generation_config)
    for given in (vars(options.get("generation_config") or settings), options):
        known = {name: value for name, value in given.items() if value is not None and hasattr(settings, name)}
        vars(settings).update(known)
    return settings


def check_for_ids(model: Any, options: dict[str, Any]) -> None:
    """ValueError for what comes out right with ids alone: a prefill in chunks, drafts, and PEFT's activated LoRA."""
    settings = _settings(model, options)
    size = settings.prefill_chunk_size
    if size:
        raise ValueError(f"prefill_chunk_size={size} is for ids, and a prompt is given as embeddings: leave it out")
    if settings.get_generation_mode(options.get("assistant_model")) is GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            "assistant_model, assistant_early_exit and prompt_lookup_num_tokens draft from ids, and a prompt is given "
            "as embeddings, behind which transformers fails or takes wrong tokens: leave them out"
        )
    adapters = getattr(model, "peft_config", {}).values()
    if uses_adapter(model) and any(getattr(one, "alora_invocation_tokens", None) for one in adapters):
        raise ValueError(
            "a LoRA with alora_invocation_tokens finds its place by ids, and is off behind embeddings, in training as "
            "well: take a LoRA without them, or generate in its disable_adapter()"
        )


@contextlib.contextmanager
def taking_embeddings(model: Any) -> Iterator[None]:
    """Inside, generate takes embeddings for a model that hands them on among the keywords of its own preparation.

    It asks for them by name (transformers' `_prepare_model_inputs`), which Gemma 3, Bamba or Falcon-H1 do not have
    there. One thread at a time for these, as the answer is put into the model.
    """
    inner, name = unwrapped(model), "prepare_inputs_for_generation"
    prepare: Any = getattr(inner, name, None)
    named = prepare is None or "inputs_embeds" in inspect.signature(prepare).parameters
    if named or name in vars(inner) or inner.config.is_encoder_decoder or not _hands_on(inner):
        yield
        return

    def by_name(*args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        return prepare(*args, inputs_embeds=inputs_embeds, **kwargs)

    with one_at_a_time:
        setattr(inner, name, by_name)
        try:
            yield
        finally:
            delattr(inner, name)


def _hands_on(model: Any) -> bool:
    """Whether what `model` prepares of embeddings are these alone, and no ids."""
    table = model.get_input_embeddings()
    ids = torch.zeros(1, 1, dtype=torch.long, device=device_of(table))
    rows = torch.zeros(1, 1, 1, dtype=model.dtype, device=ids.device)
    options = {"inputs_embeds": rows, "attention_mask": ids + 1, "is_first_iteration": True, "use_cache": False}
    try:
        prepared = model.prepare_inputs_for_generation(ids, **options)
        return prepared.get("inputs_embeds") is not None and prepared.get("input_ids") is None
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False


def mask_of(model: Any, input_ids: Tensor, options: dict[str, Any]) -> Tensor:
    """The mask that generate makes of ids alone: what is padding and cannot be an end is none of the text."""
    settings = _settings(model, options)
    padding, ends = ([] if one is None else one for one in (settings.pad_token_id, settings.eos_token_id))
    padding = set(torch.as_tensor(padding).flatten().tolist()) - set(torch.as_tensor(ends).flatten().tolist())
    there = torch.ones_like(input_ids)
    return there if not padding else (input_ids != padding.pop()).to(there)


def most_new_tokens(model: Any, options: dict[str, Any], columns: int) -> int:
    """How many tokens generate may add to so many `columns`, at most."""
    settings = _settings(model, options)
    if settings.max_new_tokens is None and settings.max_length is None:
        return _DEFAULT
    return settings.max_new_tokens or max((settings.max_length or 0) - columns, 0)


_DEFAULT = 20  # new tokens, where neither is given (transformers' `_prepare_generated_length`)


def count_new_tokens(model: Any, options: dict[str, Any], columns: int) -> None:
    """`max_length` and `min_length`, which count the `columns` of what is given, as numbers of new tokens."""
    settings = _settings(model, options)
    for name, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        length = getattr(settings, name, None)
        options.pop(name, None)
        if not length or getattr(settings, new, None) is not None:
            continue
        if name == "max_length" and length <= columns:
            raise ValueError(f"max_length is {length}, and there are {columns} columns already: take max_new_tokens")
        if length > columns:
            options[new] = length - columns


def check_caches(options: Mapping[str, Any], prompt: Prompt) -> None:
    """A warning where a filled cache is none that generate has given behind these virtual tokens, which it may lack."""
    for cache in _caches_in(options):
        before = getattr(cache, _BEHIND, None)
        if _is_filled(cache) and (before is None or not _equal(before, _rows(prompt))):
            warnings.warn(
                "the cache to go on from is not of generate behind this prompt as it is now: where it lacks it, or has "
                "another, other tokens come out",
                stacklevel=3,
            )


def mark_caches(out: Mapping[str, Any], prompt: Prompt) -> None:
    for cache in _caches_in(out):
        setattr(cache, _BEHIND, _rows(prompt))


def _caches_in(given: Mapping[str, Any]) -> list[Any]:
    return [one for name in CACHES if hasattr(one := given.get(name), "get_seq_length")]


def _is_filled(cache: Any) -> bool:
    try:
        return bool(cache.get_seq_length())
    except ValueError:  # of linear layers alone, which count nothing
        return bool(cache.has_previous_state())


def _rows(prompt: Prompt) -> Tensor:
    vectors, index = prompt.vectors.detach(), prompt.prompt_index
    return vectors.clone() if index is None else vectors[index]


_BEHIND = "_ptuning_fast_behind"  # copies of a cache have it, too


def generate_behind(model: Any, input_ids: Tensor, inputs: dict[str, Any], options: dict[str, Any]) -> Any:
    """What `model.generate(**inputs, **options)` returns, by the ids of the text, too: new tokens only."""
    n, columns = input_ids.shape[1], inputs["inputs_embeds"].shape[1]
    count_new_tokens(model, options, columns)
    out = model.generate(input_ids=input_ids, **inputs, **options)
    if torch.is_tensor(out):
        return out[:, n:]
    out.sequences = out.sequences[:, n:]
    return out


def _filled(model: Any, info: ModelInfo, prompt: Prompt) -> DynamicCache:
    inner = unwrapped(model)
    cache = DynamicCache(config=inner.config.get_text_config())
    # A copy: some models add to what they are given in place (GIT, CTRL), and that must not be the prompt itself.
    rows = prompt.vectors[None].to(inner.get_input_embeddings().weight.dtype, copy=True)
    with torch.no_grad():
        inner.base_model(inputs_embeds=rows, use_cache=True, **{str(info.cache): cache})
    return cache


def _behind(
    model: Any, info: ModelInfo, batch: Batch, prompt: Prompt, cache: DynamicCache, copies: int
) -> dict[str, Any]:
    if batch.attention_mask is None:
        batch = batch._replace(attention_mask=torch.ones_like(batch.input_ids))
    inputs: dict[str, Any] = prepend(model.get_input_embeddings(), batch, prompt, Layout()).as_inputs()
    own: Any = copy.deepcopy(cache)
    own.batch_repeat_interleave(len(batch.input_ids) * copies)
    return inputs | {str(info.cache): own}


def _exact_sides(model: Any, info: ModelInfo) -> set[str]:
    """On which sides texts may be padded for what follows them to be what follows them behind the prompt's own rows.

    On none where a model keeps something of a text for the next call (Qwen2-VL its `rope_deltas`): only what begins
    without a cache makes that anew.
    """
    inner = unwrapped(model)
    by_length = info.steady_length is not None or info.counts_columns is not None
    if info.cache is None or by_length or inner.config.is_encoder_decoder:
        return set()
    sides = ("right", "left")
    table = inner.get_input_embeddings()
    tokens, device = ordinary_tokens(inner.config, table.weight.shape[0], 9), device_of(table)
    exact = set()
    with quietly(inner), taking_embeddings(inner):
        before = held_by(inner)
        try:
            prompt = Prompt(rows_of(table, torch.tensor(tokens[:3], device=device)).float())
            cache = _filled(inner, info, prompt)
            for side in sides:
                texts = [tokens[3:], tokens[3:5] if side == "left" else tokens[:2:-1]]
                batch = padded(texts, side, tokens[0], device)
                found = _logits(inner, tokens[0], **_behind(inner, info, batch, prompt, cache, 1))
                alone = [torch.tensor([tokens[:3] + text], device=device) for text in texts]
                expected = torch.cat(
                    [_logits(inner, tokens[0], input_ids=ids, attention_mask=torch.ones_like(ids)) for ids in alone]
                )
                if off_by([{"logits": found}], [{"logits": expected}]) <= tolerance(inner):
                    exact.add(side)
        except (AttributeError, NotImplementedError, TypeError, ValueError, RuntimeError, IndexError):
            pass
        return set() if is_changed(before) else exact


def _logits(model: Any, padding: int, **inputs: Any) -> Tensor:
    """[B, 2 V], those of the next two tokens."""
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "num_beams": 1, "pad_token_id": padding}
    out = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return torch.cat(out.logits, 1).float()
