"""Attention over a packed batch: each sequence by itself, without padding, by what the device does best.

    query [T, H, e], key and value [T, G, e]  ──  cut at cu_seq_lens  ──  attention  ──  [T, H, e]

T rows of all sequences, H heads of size e, of which H / G share a key and a value (grouped-query attention).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import Scores, Sequences
from .by_length import by_length, under_a_mask
from .prefix import merged

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

__all__ = ["backend_for", "varlen_attention"]

HALF = (torch.float16, torch.bfloat16)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scores: Scores) -> Tensor:
    """[T, H, e], in query's dtype; under autocast in autocast's, as torch's own attention is.

    Args:
        query, key, value: [T, H, e] and twice [T, G, e], in one dtype, or under autocast in any.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):  # rotary positions make query and key fp32 there, and leave value as it is
        query, key, value = (one.to(torch.get_autocast_dtype(device)) for one in (query, key, value))
    return backend_for(query, sequences, scores)(query, key, value, sequences, scores)


def backend_for(query: Tensor, sequences: Sequences, scores: Scores) -> Callable[..., Tensor]:
    """The function that attention is computed with for a query of this device, dtype and head size.

    - flash-attn, where it is installed, and torch's own copy of it, which knows no softcap: half precision on NVIDIA
      GPUs from compute capability 8.0 on, heads of up to 256;
    - behind a prefix, on such GPUs and on CPUs, where no window, softcap or dropout is in the way: two calls of torch's
      flash attention, merged;
    - jagged nested tensors, from which torch chooses a fused kernel for any dtype: other cases on a GPU, but windows
      and softcap;
    - one attention call for the sequences of each length: everywhere else, CPUs above all; under torch.compile, which
      cannot know the lengths, one call under a mask.
    """
    gpu, traced = query.device.type == "cuda", torch.compiler.is_compiling()
    flash = gpu and query.dtype in HALF and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    flash = flash and torch.version.hip is None and torch.cuda.get_device_capability(query.device) >= (8, 0)
    if sequences.prefix:
        whole = scores.window is None or sequences.prefix + sequences.max_length <= scores.window
        plain = whole and scores.softcap is None and not scores.dropout and not traced
        # The last is what torch.nn.attention.sdpa_kernel says, on CPUs as well.
        if (flash or query.device.type == "cpu") and plain and torch.backends.cuda.flash_sdp_enabled():
            return merged
    elif flash and flash_attn_varlen_func is not None:
        return flash_attn
    elif flash and scores.softcap is None:
        return torch_flash
    elif gpu and scores.window is None and scores.softcap is None and not traced:
        return jagged
    return under_a_mask if traced else by_length


def flash_attn(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scores: Scores) -> Tensor:
    """The package flash-attn (Dao 2023, arXiv 2307.08691)."""
    cu_seq_lens, max_length, _ = sequences
    back, ahead = _flash_window(scores.window, scores.causal)
    return flash_attn_varlen_func(
        *(query, key, value, cu_seq_lens, cu_seq_lens, max_length, max_length),
        dropout_p=scores.dropout,
        softmax_scale=scores.scale,
        causal=scores.causal,
        window_size=(-1 if back is None else back, -1 if ahead is None else ahead),
        softcap=scores.softcap or 0.0,
    )


def torch_flash(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scores: Scores) -> Tensor:
    """The same as torch has it: `torch.nn.attention.varlen` calls this operator too, without dropout."""
    cu_seq_lens, max_length, _ = sequences
    back, ahead = _flash_window(scores.window, scores.causal)
    return torch.ops.aten._flash_attention_forward(
        *(query, key, value, cu_seq_lens, cu_seq_lens, max_length, max_length, scores.dropout, scores.causal, False),
        scale=scores.scale,
        window_size_left=back,
        window_size_right=ahead,
    )[0]


def _flash_window(window: int | None, causal: bool) -> tuple[int | None, int | None]:
    """How far back and how far ahead a row sees; None: as far as there are rows."""
    if window is None:
        return None, None
    return window - 1, 0 if causal else window - 1


def jagged(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scores: Scores) -> Tensor:
    """torch's jagged nested tensors through its fused attention."""
    key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    ends, max_length = sequences.cu_seq_lens.long(), sequences.max_length
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(one, ends, min_seqlen=1, max_seqlen=max_length).transpose(1, 2)
        for one in (query, key, value)
    )
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=scores.dropout, is_causal=scores.causal, scale=scores.scale)
    return out.transpose(1, 2).values()
