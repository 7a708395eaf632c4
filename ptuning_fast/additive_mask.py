"""Which encoders may be given their padding mask as their attention adds it to its scores, [B, 1, 1, S].

Of a mask [B, S] such an encoder asks at every step whether there is any padding, for which the host waits, and builds
[B, 1, S, S] from it where there is; every layer then turns that into numbers again. None of this is left.
"""

import torch
from torch import nn

from .trial import trial

__all__ = ["takes_additive_mask"]

# Full attention in every layer, and transformers' own mask: where every row of a batch sees the same columns. A causal
# model or one with sliding windows would take such a mask, too, and be silently wrong.
_FULL = {
    "AlbertModel",
    "BertModel",
    "CamembertModel",
    "DistilBertModel",
    "ElectraModel",
    "RobertaModel",
    "XLMRobertaModel",
}


def takes_additive_mask(model: nn.Module) -> bool:
    """Whether `model` is such an encoder: an architecture that is known, and tried out on three tokens."""
    if type(model).__name__ not in _FULL or getattr(model.config, "is_decoder", False):
        return False
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return False
    with trial(model):
        table = model.get_input_embeddings()
        ids = torch.tensor([[1, 2, 3], [3, 1, 2]], device=table.weight.device)
        mask = torch.tensor([[1, 1, 1], [1, 1, 0]], device=ids.device)
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        lowest = torch.finfo(hidden.dtype).min
        added = torch.where(mask == 0, lowest, 0.0).to(hidden.dtype)[:, None, None]
        same = model(input_ids=ids, attention_mask=added).last_hidden_state
    real = mask != 0
    return torch.allclose(same[real], hidden[real], rtol=1e-3, atol=1e-3)
