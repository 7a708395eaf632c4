"""Attention over a packed batch: each sequence by itself, without padding, by what the device does best.

    query [T, H, e], key and value [T, G, e]  ──  cut at cu_seq_lens  ──  attention  ──  [T, H, e]

T rows of all sequences, H heads of size e, of which H / G share a key and a value (grouped-query attention).
"""

from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .by_length import by_length

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

__all__ = ["Sequences", "backend_for", "varlen_attention"]

HALF = (torch.float16, torch.bfloat16)


class Sequences:
    """Where the sequences of a packed batch begin and end.

    Args:
        cu_seq_lens: [B+1] int32, the first row of each sequence, and T.
        max_length: rows of the longest, as the host knows it; only the backends for GPUs ask for it.
    """

    def __init__(self, cu_seq_lens: Tensor, max_length: int | None = None):
        self.cu_seq_lens, self._max_length, self._groups = cu_seq_lens, max_length, None

    @property
    def max_length(self) -> int:
        if self._max_length is None:
            self._max_length = max((n for _, n in self.groups()), default=0)
        return self._max_length

    def groups(self) -> list[tuple[int, int]]:
        """(g, n) for g sequences of n rows, one behind the other: those need no padding among themselves.

        The first call waits for the device, where the rows are on one.
        """
        if self._groups is None:
            lengths = [end - start for start, end in pairwise(self.cu_seq_lens.tolist())]
            self._groups = [(len(list(same)), n) for n, same in groupby(lengths)]
        return self._groups


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    *,
    causal: bool,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """[T, H, e], in query's dtype.

    Args:
        query, key, value: [T, H, e] and twice [T, G, e], in one dtype.
        causal: whether a row sees itself and those before it alone.
        window: rows as far away as this or farther are not seen.
        scale: factor on the scores; 1 / sqrt(e) by default.
        softcap: scores become softcap * tanh(score / softcap), as in Gemma 2.
        dropout: probability with which a weight is dropped.
    """
    attention = backend_for(query, window=window, softcap=softcap)
    options = {"causal": causal, "window": window, "scale": scale, "softcap": softcap, "dropout": dropout}
    return attention(query, key, value, sequences, **options)


def backend_for(query: Tensor, *, window: int | None, softcap: float | None):
    """The function that attention is computed with for a query of this device, dtype and head size.

    - flash-attn, where it is installed, and torch's own copy of it, which knows no softcap: half precision on NVIDIA
      GPUs from compute capability 8.0 on, heads of up to 256;
    - jagged nested tensors, from which torch chooses a fused kernel for any dtype: other cases on a GPU, but windows
      and softcap;
    - one attention call for the sequences of each length: everywhere else, CPUs above all.
    """
    if query.device.type == "cuda":
        flash = query.dtype in HALF and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
        if flash and torch.version.hip is None and torch.cuda.get_device_capability(query.device) >= (8, 0):
            if flash_attn_varlen_func is not None:
                return flash_attn
            if softcap is None:
                return torch_flash
        if window is None and softcap is None:
            return jagged
    return by_length


def flash_attn(query, key, value, sequences, *, causal, window, scale, softcap, dropout):
    """The package flash-attn (Dao 2023, arXiv 2307.08691)."""
    ends, longest = sequences.cu_seq_lens, sequences.max_length
    back, ahead = _flash_window(window, causal)
    return flash_attn_varlen_func(
        *(query, key, value, ends, ends, longest, longest),
        dropout_p=dropout,
        softmax_scale=scale,
        causal=causal,
        window_size=(-1 if back is None else back, -1 if ahead is None else ahead),
        softcap=softcap or 0.0,
    )


def torch_flash(query, key, value, sequences, *, causal, window, scale, softcap, dropout):
    """The same as torch has it: `torch.nn.attention.varlen` calls this operator too, without dropout."""
    ends, longest = sequences.cu_seq_lens, sequences.max_length
    back, ahead = _flash_window(window, causal)
    return torch.ops.aten._flash_attention_forward(
        *(query, key, value, ends, ends, longest, longest, dropout, causal, False),
        scale=scale,
        window_size_left=back,
        window_size_right=ahead,
    )[0]


def _flash_window(window, causal):
    """How far back and how far ahead a row sees; None: as far as there are rows."""
    if window is None:
        return None, None
    return window - 1, 0 if causal else window - 1


def jagged(query, key, value, sequences, *, causal, window, scale, softcap, dropout):
    """torch's jagged nested tensors through its fused attention."""
    key, value = (_for_each_head(one, query) for one in (key, value))
    ends, longest = sequences.cu_seq_lens.long(), sequences.max_length
    nested = [
        torch.nested.nested_tensor_from_jagged(one, ends, min_seqlen=1, max_seqlen=longest)
        for one in (query, key, value)
    ]
    out = F.scaled_dot_product_attention(
        *(one.transpose(1, 2) for one in nested), dropout_p=dropout, is_causal=causal, scale=scale
    )
    return out.transpose(1, 2).values()


def _for_each_head(one, query):
    return one.repeat_interleave(query.shape[1] // one.shape[1], 1)
