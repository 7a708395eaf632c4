"""Attention over a packed batch: each sequence by itself, without padding, by what the device does best.

    query [T, H, e], key and value [T, G, e]  ──  cut at cu_seq_lens  ──  attention  ──  [T, H, e]

T rows of all sequences, H heads of size e, of which H / G share a key and a value (grouped-query attention).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .by_length import by_length, under_a_mask

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

__all__ = ["backend_for", "varlen_attention"]

HALF = (torch.float16, torch.bfloat16)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    max_length: int,
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """[T, H, e], in query's dtype; under autocast in autocast's, as torch's own attention is.

    Args:
        query, key, value: [T, H, e] and twice [T, G, e], in one dtype, or under autocast in any.
        cu_seq_lens: [B+1] int32, the first row of each sequence, and T.
        max_length: rows of the longest sequence; only the backends for GPUs ask for it.
        causal: whether a row sees itself and those before it alone.
        window: rows as far away as this or farther are not seen.
        scale: factor on the scores; 1 / sqrt(e) by default.
        softcap: scores become softcap * tanh(score / softcap), as in Gemma 2.
        dropout: probability with which a weight is dropped.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):  # rotary positions make query and key fp32 there, and leave value as it is
        query, key, value = (one.to(torch.get_autocast_dtype(device)) for one in (query, key, value))
    attention = backend_for(query, window=window, softcap=softcap)
    options = {"causal": causal, "window": window, "scale": scale, "softcap": softcap, "dropout": dropout}
    return attention(query, key, value, cu_seq_lens, max_length, **options)


def backend_for(query: Tensor, *, window: int | None, softcap: float | None) -> Callable[..., Tensor]:
    """The function that attention is computed with for a query of this device, dtype and head size.

    - flash-attn, where it is installed, and torch's own copy of it, which knows no softcap: half precision on NVIDIA
      GPUs from compute capability 8.0 on, heads of up to 256;
    - jagged nested tensors, from which torch chooses a fused kernel for any dtype: other cases on a GPU, but windows
      and softcap;
    - one attention call for the sequences of each length: everywhere else, CPUs above all; under torch.compile, which
      cannot know the lengths, one call under a mask.
    """
    if query.device.type == "cuda":
        flash = query.dtype in HALF and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
        if flash and torch.version.hip is None and torch.cuda.get_device_capability(query.device) >= (8, 0):
            if flash_attn_varlen_func is not None:
                return flash_attn
            if softcap is None:
                return torch_flash
        if window is None and softcap is None and not torch.compiler.is_compiling():
            return jagged
    return under_a_mask if torch.compiler.is_compiling() else by_length


def flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    max_length: int,
    *,
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """The package flash-attn (Dao 2023, arXiv 2307.08691)."""
    back, ahead = _flash_window(window, causal)
    return flash_attn_varlen_func(
        *(query, key, value, cu_seq_lens, cu_seq_lens, max_length, max_length),
        dropout_p=dropout,
        softmax_scale=scale,
        causal=causal,
        window_size=(-1 if back is None else back, -1 if ahead is None else ahead),
        softcap=softcap or 0.0,
    )


def torch_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    max_length: int,
    *,
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """The same as torch has it: `torch.nn.attention.varlen` calls this operator too, without dropout."""
    back, ahead = _flash_window(window, causal)
    return torch.ops.aten._flash_attention_forward(
        *(query, key, value, cu_seq_lens, cu_seq_lens, max_length, max_length, dropout, causal, False),
        scale=scale,
        window_size_left=back,
        window_size_right=ahead,
    )[0]


def _flash_window(window: int | None, causal: bool) -> tuple[int | None, int | None]:
    """How far back and how far ahead a row sees; None: as far as there are rows."""
    if window is None:
        return None, None
    return window - 1, 0 if causal else window - 1


def jagged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    max_length: int,
    *,
    causal: bool,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """torch's jagged nested tensors through its fused attention."""
    key, value = (_for_each_head(one, query) for one in (key, value))
    ends = cu_seq_lens.long()
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(one, ends, min_seqlen=1, max_seqlen=max_length).transpose(1, 2)
        for one in (query, key, value)
    )
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, scale=scale)
    return out.transpose(1, 2).values()


def _for_each_head(one: Tensor, query: Tensor) -> Tensor:
    return one.repeat_interleave(query.shape[1] // one.shape[1], 1)
