"""`prepend_prompt`: checks, choice of backend, and the gradient.

The work is done by `ptuning_fast.kernels` (Triton) where it runs and by `ptuning_fast.torch_path` elsewhere; both have
one `forward` and one `backward` with the same signatures.
"""

import warnings
from functools import cache
from operator import index

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as _transforms_active
from torch.autograd import forward_ad

from . import reference, torch_path

try:
    from . import kernels
except ImportError:  # no Triton for this platform
    kernels = None

__all__ = ["prepend_prompt"]

_INTEGERS = (torch.int64, torch.int32)
_MASKS = (torch.int64, torch.int32, torch.bool, torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MASKS += (torch.int16, torch.int8, torch.uint8)


def prepend_prompt(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    weight: Tensor,
    prompt: Tensor,
    token_type_ids: Tensor | None = None,
    labels: Tensor | None = None,
    position_start: int | None = None,
    prompt_index: Tensor | None = None,
    embed_scale: float = 1.0,
    adjacent: bool = False,
    packed: bool = False,
    lengths=None,
    additive_mask: torch.dtype | None = None,
) -> dict[str, Tensor | int]:
    """Embed a batch of tokens with a trainable prompt in front: `model(**prepend_prompt(...))`.

        prompt[0] .. prompt[m-1]  weight[input_ids[b, 0]] .. weight[input_ids[b, n-1]]     inputs_embeds[b]   [S, d]
        1         .. 1            attention_mask[b, 0]    .. attention_mask[b, n-1]        attention_mask[b]  [S]

    B rows of n token columns, a prompt of m vectors, S = m + n. On a GPU everything is written by one kernel, without a
    synchronisation. Gradient flows into `prompt` and nowhere else, summed in fp32 and returned in the prompt's dtype.

    Args:
        input_ids: [B, n] int32 or int64, any strides. Ids in [0, V).
        attention_mask: [B, n] bool, int or float; anything but 0 is a token. Left out: every column is one.
        weight: the frozen token table [V, d], fp32, fp16 or bf16.
        prompt: [m, d], or a bank [K, m, d] from which `prompt_index` chooses. Any float dtype: cast to the weight's.
        token_type_ids: [B, n] integers; the prompt rows get 0.
        labels: [B, n] integers, one per token; the prompt rows get -100, which losses ignore. (With `packed` and no
            prompt rows, m = 0, a causal loss would predict a text's first token from the text before.)
        position_start: position of a row's first real column. Asks for `position_ids`, which count mask-1 columns only.
        prompt_index: [B] int32 or int64 in [0, K).
        embed_scale: factor on the token rows (not on the prompt's), as scaled embeddings have it.
        adjacent: in left-padded rows put the prompt behind the padding, next to the text.
        packed: drop the rows whose mask is 0 and put the sequences one behind the other.
        lengths: with `packed`, the B numbers of mask-1 tokens, as a list or a CPU tensor. Spares the one
            synchronisation that finding them out takes. On a GPU they cannot be compared with the mask without one:
            where they are wrong `inputs_embeds` is NaN throughout (an error on a CPU).
        additive_mask: fp32, fp16 or bf16: `attention_mask` then comes in that dtype, as full attention adds it to its
            scores. Not with `packed`, which has no mask.

    Returns:
        A dict that holds what was asked for:

        - `inputs_embeds` [B, S, d], the weight's dtype
        - `attention_mask` [B, S], the given mask's dtype, when one was given; 1 on prompt rows. With `additive_mask`
          [B, 1, 1, S] in that dtype: 0 for a row that is there, the lowest number for padding, rows in memory a
          multiple of 8 elements apart, as fused attention wants them
        - `token_type_ids`, `labels` [B, S], the given dtypes, when they were given
        - `position_ids` [B, S] int64, when `position_start` was given; `position_start` on padding

        and with `packed`, T rows in all: `inputs_embeds` [1, T, d], `position_ids` [1, T] (from 0 when no
        `position_start` was given), `token_type_ids` and `labels` [1, T], `cu_seq_lens_q` and `cu_seq_lens_k` [B+1]
        int32 (one tensor), `max_length_q` and `max_length_k` (int); no mask.

    Raises:
        ValueError, TypeError: arguments that do not fit together, before anything is launched.
        IndexError: on a CPU, an id outside [0, V), named with its place. On a GPU that is a device-side assert, as
            from `torch.nn.functional.embedding`; nothing outside the table is read.
    """
    _check(input_ids, attention_mask, weight, prompt, token_type_ids, labels, position_start, prompt_index)
    if additive_mask is not None:
        if additive_mask not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"additive_mask must be torch.float32, float16 or bfloat16, not {additive_mask!r}")
        if packed:
            raise ValueError("additive_mask goes with a mask, and packed=True has none: leave one of them out")
    if (_transforms_active() or forward_ad._current_level >= 0) and not torch.compiler.is_compiling():
        _warn_reference()
        return reference.prepend_prompt(
            *(input_ids, attention_mask),
            **{"weight": weight, "prompt": prompt, "token_type_ids": token_type_ids, "labels": labels},
            **{"position_start": position_start, "prompt_index": prompt_index, "embed_scale": embed_scale},
            **{"adjacent": adjacent, "packed": packed, "additive_mask": additive_mask},
        )
    if lengths is not None:
        lengths = _check_lengths(lengths, input_ids, attention_mask, packed)
    backend = torch_path
    if kernels is not None and weight.dtype in kernels.dtypes and kernels.runs_on(input_ids):
        backend = kernels
        if input_ids.is_cpu:
            _raise_for_ids(input_ids, attention_mask if packed else None, weight, prompt, prompt_index)
    elif not input_ids.is_cpu:
        _warn_torch_path(input_ids.device.type, weight.dtype)

    try:
        results = backend.forward(
            input_ids,
            attention_mask,
            weight,
            prompt,
            token_type_ids,
            labels,
            position_start,
            prompt_index,
            embed_scale,
            adjacent,
            packed,
            lengths,
            additive_mask,
        )
    except (IndexError, RuntimeError):
        if input_ids.is_cpu:
            _raise_for_ids(input_ids, attention_mask if packed else None, weight, prompt, prompt_index)
        raise
    inputs_embeds, out_mask, out_types, out_labels, position_ids, cu_seq_lens, prompt_start, max_length = results
    if prompt.requires_grad and torch.is_grad_enabled() and not inputs_embeds.requires_grad:
        inputs_embeds = _PromptGradient.apply(prompt, (inputs_embeds,), backend, prompt_start, prompt_index, packed)

    out = {"inputs_embeds": inputs_embeds}
    if out_mask is not None:
        out["attention_mask"] = out_mask
    if out_types is not None:
        out["token_type_ids"] = out_types
    if out_labels is not None:
        out["labels"] = out_labels
    if position_ids is not None:
        out["position_ids"] = position_ids
    if packed:
        out["cu_seq_lens_q"] = out["cu_seq_lens_k"] = cu_seq_lens
        out["max_length_q"] = out["max_length_k"] = max_length
    return out


class _PromptGradient(torch.autograd.Function):
    """Ties inputs_embeds, already computed, to the prompt that its gradient flows into.

    `computed` is a tuple so that its one tensor counts as an output of this function and not as an input. The weight
    table does not come here at all.
    """

    @staticmethod
    def forward(ctx, prompt, computed, backend, prompt_start, prompt_index, packed):
        ctx.save_for_backward(prompt_start, prompt_index)
        ctx.rest = backend, prompt.shape, prompt.dtype, packed
        return computed[0]

    @staticmethod
    def backward(ctx, grad):
        prompt_start, prompt_index = ctx.saved_tensors
        backend, shape, dtype, packed = ctx.rest
        if torch.is_grad_enabled():  # create_graph=True: torch operations, which can be differentiated again
            backend = torch_path
        return backend.backward(grad, shape, dtype, prompt_start, prompt_index, packed), *[None] * 5


def _check(input_ids, attention_mask, weight, prompt, token_type_ids, labels, position_start, prompt_index):
    # What goes into a message is looked up when there is one: this runs at every call.
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a torch.Tensor, not {type(input_ids).__name__}")
    shape, dtype, device = input_ids.shape, input_ids.dtype, input_ids.device
    if len(shape) != 2:
        raise ValueError(f"input_ids must be [batch, tokens]; its shape is {tuple(shape)}")
    if dtype is not torch.int64 and dtype is not torch.int32:
        raise TypeError(f"input_ids must be int32 or int64, not {dtype}")
    if not isinstance(weight, Tensor) or weight.device != device:
        raise _no_tensor_here("weight", weight, device)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a float table [V, d]; it is {weight.dtype} {tuple(weight.shape)}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight requires grad, but gradient flows into the prompt alone and the table would silently stay as it is:"
            " freeze it first, with weight.requires_grad_(False) or model.requires_grad_(False)"
        )
    if not isinstance(prompt, Tensor) or prompt.device != device:
        raise _no_tensor_here("prompt", prompt, device)
    if not prompt.is_floating_point():
        raise TypeError(f"prompt must be a float tensor, not {prompt.dtype}")
    if prompt.dim() != (2 if prompt_index is None else 3) or prompt.shape[-1] != weight.shape[1]:
        kind = "[m, d], or a bank [K, m, d] with prompt_index," if prompt_index is None else "a bank [K, m, d]"
        raise ValueError(
            f"prompt must be {kind} with d = {weight.shape[1]}, the width of weight; it is {tuple(prompt.shape)}"
        )
    if attention_mask is not None:
        _check_rows("attention_mask", attention_mask, device, shape)
        if attention_mask.dtype not in _MASKS:
            raise TypeError(f"attention_mask must be bool, int or float, not {attention_mask.dtype}")
    if token_type_ids is not None:
        _check_integers("token_type_ids", token_type_ids, device, shape)
    if labels is not None:
        _check_integers("labels", labels, device, shape)
    if prompt_index is not None:
        _check_integers("prompt_index", prompt_index, device, shape[:1])
    if position_start is not None:
        if type(position_start) is not int:
            raise TypeError(f"position_start must be an int, not {type(position_start).__name__}")
        if not -(2**31) <= position_start < 2**31:
            raise ValueError(f"position_start must fit into 32 bits; it is {position_start}")


def _no_tensor_here(name, tensor, device):
    if not isinstance(tensor, Tensor):
        return TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    return ValueError(f"{name} is on {tensor.device} and input_ids on {device}: move them to one device")


def _check_rows(name, tensor, device, shape):
    if not isinstance(tensor, Tensor):
        raise _no_tensor_here(name, tensor, device)
    if tensor.shape != shape:
        of = "as input_ids" if len(shape) == 2 else "one per row"
        raise ValueError(f"{name} must be {tuple(shape)}, {of}; it is {tuple(tensor.shape)}")
    if tensor.device != device:
        raise _no_tensor_here(name, tensor, device)


def _check_integers(name, tensor, device, shape):
    _check_rows(name, tensor, device, shape)
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be int32 or int64, not {tensor.dtype}")


def _check_lengths(lengths, input_ids, attention_mask, packed):
    """`lengths` as a list of ints, or None where no mask makes them redundant."""
    if not packed:
        raise ValueError("lengths is for packed=True; without it no row is dropped")
    if isinstance(lengths, Tensor):
        if lengths.device.type != "cpu":
            raise ValueError(f"lengths must be known on the host: a list or a CPU tensor, not one on {lengths.device}")
        lengths = lengths.tolist()
    B, n = input_ids.shape
    try:
        lengths = [index(length) for length in lengths]
    except TypeError:
        raise TypeError(f"lengths must be {B} integers, one per row; it is {lengths!r}") from None
    if len(lengths) != B:
        raise ValueError(f"lengths has {len(lengths)} entries for a batch of {B} rows")
    for row, length in enumerate(lengths):
        if not 0 <= length <= n:
            raise ValueError(f"lengths[{row}] is {length}, but a row has from 0 to {n} tokens")
    if input_ids.device.type == "cpu":
        _compare_lengths(lengths, input_ids, attention_mask)
    return lengths


def _compare_lengths(lengths, input_ids, attention_mask):
    """On a CPU: ValueError where they are not the mask's."""
    B, n = input_ids.shape
    actual = [n] * B if attention_mask is None else (attention_mask != 0).sum(1).tolist()
    for row, (length, real) in enumerate(zip(lengths, actual)):
        if length != real:
            raise ValueError(f"lengths[{row}] is {length}, but the mask of that row has {real} tokens")


def _raise_for_ids(input_ids, attention_mask, weight, prompt, prompt_index):
    """On a CPU: IndexError for the first id outside the table (packed: under the mask) or prompt outside the bank."""
    V = weight.shape[0]
    bad = (input_ids < 0) | (input_ids >= V)
    if attention_mask is not None:
        bad &= attention_mask != 0
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise IndexError(
            f"input_ids[{row}, {column}] is {input_ids[row, column].item()}, outside the embedding table: "
            f"ids go from 0 to {V - 1} (V = {V}). Do the tokenizer and the model belong together?"
        ) from None
    if prompt_index is not None:
        K = prompt.shape[0]
        bad = (prompt_index < 0) | (prompt_index >= K)
        if bad.any():
            row = bad.nonzero()[0].item()
            raise IndexError(
                f"prompt_index[{row}] is {prompt_index[row].item()}, outside the bank: it holds prompts 0 to {K - 1}"
            ) from None


@cache
def _warn_reference():
    warnings.warn(
        "prepend_prompt runs as plain torch operations under torch.func and forward-mode differentiation",
        stacklevel=3,
    )


@cache
def _warn_torch_path(device_type, dtype):
    reason = "Triton is not available" if kernels is None else f"it takes no {dtype} weight on this device"
    warnings.warn(
        f"prepend_prompt on {device_type} runs as plain torch operations, not as the fused kernel: {reason}",
        stacklevel=3,
    )
