"""`prepend_prompt`: the checks, the choice of a backend, and the gradient.

The work is done by `ptuning_fast.kernels` (Triton) where it runs and by `torch_backend` elsewhere; both have one
`forward(batch, weight, prompt, layout)` and one `backward` with the same signatures.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as _transforms_active
from torch.autograd import forward_ad

from . import reference, torch_backend
from .arguments import Batch, Embedded, Layout, Prompt
from .checks import check, checked_lengths, raise_for_ids

try:
    from .. import kernels
    from . import traced_kernels
except ImportError:  # no Triton for this platform
    kernels = None

__all__ = ["embed", "embed_plainly", "prepend_prompt"]


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
    lengths: Sequence[int] | Tensor | None = None,
    additive_mask: torch.dtype | None = None,
) -> dict[str, Tensor | int]:
    """Embed a batch of tokens with a trainable prompt prepended: `model(**prepend_prompt(...))`.

        prompt[0] .. prompt[m-1]  weight[input_ids[b, 0]] .. weight[input_ids[b, n-1]]     inputs_embeds[b]   [S, d]
        1         .. 1            attention_mask[b, 0]    .. attention_mask[b, n-1]        attention_mask[b]  [S]

    B rows of n token columns, a prompt of m vectors, S = m + n. On a GPU everything is written by one kernel, without a
    synchronisation. Gradient flows into `prompt` and nowhere else, summed in fp32 and returned in the prompt's dtype.

    Args:
        input_ids: [B, n] int32 or int64, any strides. Ids in [0, V).
        attention_mask: [B, n] bool, int or float; anything but 0 is a token. Left out: every column is one.
        weight: the frozen token table [V, d], fp32, fp16 or bf16.
        prompt: [m, d], or a bank [K, m, d] from which `prompt_index` chooses. Any float dtype: cast to the weight's.
        token_type_ids: [B, n] integers; the virtual tokens get 0.
        labels: [B, n] integers, one per token; the virtual tokens get -100, which losses ignore. (With `packed` and no
            virtual tokens, m = 0, a causal loss would predict a text's first token from the text before.)
        position_start: position of a row's first real column. Asks for `position_ids`, which count mask-1 columns only.
        prompt_index: [B] int32 or int64 in [0, K).
        embed_scale: factor on the token rows (not on the prompt's), as scaled embeddings have it.
        adjacent: in left-padded rows put the prompt next to the text, behind the padding.
        packed: drop the rows whose mask is 0 and concatenate the sequences.
        lengths: with `packed`, the B numbers of mask-1 tokens, as a list or a CPU tensor. Spares the one
            synchronisation that finding them out takes. On a GPU they cannot be compared with the mask without one:
            where they are wrong `inputs_embeds` is NaN throughout (an error on a CPU).
        additive_mask: fp32, fp16 or bf16: `attention_mask` then comes in that dtype, as full attention adds it to its
            scores. Not with `packed`, which has no mask.

    Returns:
        A dict that holds what was asked for:

        - `inputs_embeds` [B, S, d], the weight's dtype
        - `attention_mask` [B, S], the given mask's dtype, when one was given; 1 on virtual tokens. With `additive_mask`
          [B, 1, 1, S] in that dtype: 0 for a row that is there, the lowest number for padding, rows in memory a
          multiple of 8 elements apart, as fused attention wants them
        - `token_type_ids`, `labels` [B, S], the given dtypes, when they were given
        - `position_ids` [B, S] int64, when `position_start` was given; `position_start` on padding

        and with `packed`, T rows overall: `inputs_embeds` [1, T, d], `position_ids` [1, T] (from 0 when no
        `position_start` was given), `token_type_ids` and `labels` [1, T], `cu_seq_lens_q` and `cu_seq_lens_k` [B+1]
        int32 (one tensor), `max_length_q` and `max_length_k` (int); no mask.

    Raises:
        ValueError, TypeError: arguments that do not fit together, before anything is launched.
        IndexError: on a CPU, an id outside [0, V), named with its place. On a GPU that is a device-side assert, as
            from `torch.nn.functional.embedding`; nothing outside the table is read.
    """
    # Plain tuples: making the named ones would take longer than checking what is in them.
    batch = input_ids, attention_mask, token_type_ids, labels
    layout = position_start, embed_scale, adjacent, packed, lengths, additive_mask
    return Embedded.as_inputs(_embed(batch, weight, (prompt, prompt_index), layout))


def embed(batch: Batch, weight: Tensor, prompt: Prompt, layout: Layout) -> Embedded:
    """`prepend_prompt` in groups of arguments: the same checks, errors, values and gradient."""
    return Embedded(*_embed(batch, weight, prompt, layout))


def _embed(batch: Any, weight: Tensor, prompt: Any, layout: Any) -> Any:
    """The values of `Embedded`, in its order, of those of `Batch`, `Prompt` and `Layout`."""
    check(batch, weight, prompt, layout)
    (input_ids, _, _, _), (vectors, prompt_index) = batch, prompt
    _, _, _, packed, lengths, _ = layout
    traced = torch.compiler.is_compiling()
    if (_transforms_active() or forward_ad._current_level >= 0) and not traced:
        _warn_reference()
        return embed_plainly(Batch(*batch), weight, Prompt(*prompt), Layout(*layout))
    if lengths is not None:
        # Traced, a tensor's values are not known on the host: they are counted there, as they are without it.
        known = None if traced and isinstance(lengths, Tensor) else lengths
        lengths = None if known is None else checked_lengths(known, Batch(*batch))
        layout = (*layout[:4], lengths, layout[5])
    backend = torch_backend
    if kernels is not None and weight.dtype in kernels.dtypes and kernels.runs_on(input_ids):
        backend = traced_kernels if traced else kernels
        if input_ids.is_cpu and not traced:
            raise_for_ids(batch, weight, prompt, packed)
    elif not input_ids.is_cpu:
        _warn_torch_backend(input_ids.device.type, weight.dtype)

    try:
        outputs = backend.forward(batch, weight, prompt, layout)
    except (IndexError, RuntimeError):
        if input_ids.is_cpu:
            raise_for_ids(batch, weight, prompt, packed)
        raise
    rows = outputs[0]
    if vectors.requires_grad and torch.is_grad_enabled() and not rows.requires_grad:
        rows = _PromptGradient.apply(vectors, (rows,), backend, outputs[6], prompt_index, packed)
        outputs = (rows, *outputs[1:])
    return outputs


class _PromptGradient(torch.autograd.Function):
    """Ties inputs_embeds, already computed, to the prompt that its gradient flows into.

    `computed` is a tuple so that its one tensor counts as an output of this function and not as an input. The weight
    table does not come here at all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        vectors: Tensor,
        computed: tuple[Tensor],
        backend: ModuleType,
        prompt_start: Tensor | None,
        prompt_index: Tensor | None,
        packed: bool,
    ) -> Tensor:
        ctx.save_for_backward(prompt_start, prompt_index)
        ctx.rest = backend, vectors.shape, vectors.dtype, packed
        return computed[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        prompt_start, prompt_index = ctx.saved_tensors
        backend, shape, dtype, packed = ctx.rest
        if torch.is_grad_enabled():  # create_graph=True: torch operations, which can be differentiated again
            backend = torch_backend
        return backend.backward(grads[0], shape, dtype, prompt_start, prompt_index, packed), *[None] * 5


def embed_plainly(batch: Batch, weight: Tensor, prompt: Prompt, layout: Layout) -> Embedded:
    """The same by the reference, unchecked: plain torch operations, with a gradient for the weight as well."""
    options = layout._asdict() | {"prompt": prompt.vectors, "prompt_index": prompt.prompt_index}
    out: Any = reference.prepend_prompt(**batch._asdict(), weight=weight, **options)
    cu_seq_lens, start = out.get("cu_seq_lens_q"), None
    if layout.packed:
        start = cu_seq_lens[:-1]
    elif layout.adjacent and batch.attention_mask is not None:
        start = (batch.attention_mask != 0).cumsum(1).eq(0).sum(1)
    return Embedded(
        inputs_embeds=out["inputs_embeds"],
        attention_mask=out.get("attention_mask"),
        token_type_ids=out.get("token_type_ids"),
        labels=out.get("labels"),
        position_ids=out.get("position_ids"),
        cu_seq_lens=cu_seq_lens,
        prompt_start=start,
        max_length=out.get("max_length_q"),
    )


@cache
def _warn_reference() -> None:
    warnings.warn(
        "prepend_prompt runs as plain torch operations under torch.func and forward-mode differentiation",
        stacklevel=4,
    )


@cache
def _warn_torch_backend(device_type: str, dtype: torch.dtype) -> None:
    reason = "Triton is not available" if kernels is None else f"it takes no {dtype} weight on this device"
    warnings.warn(
        f"prepend_prompt on {device_type} runs as plain torch operations, not as the fused kernel: {reason}",
        stacklevel=4,
    )
