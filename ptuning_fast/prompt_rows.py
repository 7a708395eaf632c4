"""In the first layer only the prompt's rows are differentiated: nothing else in front of it is trained.

Of the 24 d^2 multiplications a row and layer of a step, the gradient of queries, keys and values by the rows that they
are made from is 3 d^2; in the first layer the tokens' rows need none of them.
"""

import contextlib
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .patching import is_untouched, replaced_forward
from .pooled_attention import is_understood

__all__ = ["prompt_rows_only"]

_BERTS = {"BertModel", "CamembertModel", "ElectraModel", "RobertaModel", "XLMRobertaModel"}


@contextlib.contextmanager
def prompt_rows_only(model: nn.Module, rows: Callable[[], Tensor]):
    """Inside, the gradient by the embeddings of a frozen encoder that is recognised is right at `rows()` alone.

    On a CPU; what it saves on a GPU may be less than a launch.

    Args:
        rows: gives the numbers of the prompt's rows among those of the batch, [B, S, d] or packed [1, T, d], flattened.
    """
    attention = _first_attention(model)
    if attention is None:
        yield
        return
    with replaced_forward(attention, functools.partial(_forward, attention, attention.forward, rows())):
        yield


def _first_attention(model):
    if model.device.type != "cpu" or type(model).__name__ not in _BERTS or not torch.is_grad_enabled():
        return None
    layer = model.encoder.layer[0]
    attention = layer.attention.self
    embeddings = [child for name, child in model.named_children() if name not in ("encoder", "pooler")]
    on_the_way = [model.encoder, layer, layer.attention, attention, *(one for e in embeddings for one in e.modules())]
    if not (all(map(is_untouched, on_the_way)) and is_understood(attention)):
        return None
    trained = any(parameter.requires_grad for one in (*embeddings, attention) for parameter in one.parameters())
    return None if trained else attention


def _forward(attention, whole, rows, hidden, *args, **kwargs):
    """What `whole`, the forward of that self-attention, does; its projections have their gradient by `of_prompt`."""
    of_prompt = hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows)
    with contextlib.ExitStack() as changes:
        for linear in (attention.query, attention.key, attention.value):
            projection = functools.partial(_Projection.apply, of_prompt, rows, linear.weight, linear.bias)
            changes.enter_context(replaced_forward(linear, projection))
        return whole(hidden.detach(), *args, **kwargs)


class _Projection(torch.autograd.Function):
    """A frozen linear layer of `hidden`, whose gradient goes to `of_prompt`, `rows` of it, and not to the rest."""

    @staticmethod
    def forward(ctx, of_prompt, rows, weight, bias, hidden):
        ctx.save_for_backward(rows, weight)
        ctx.dtype = of_prompt.dtype
        return F.linear(hidden, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1]).index_select(0, rows)
        return (grad @ weight.to(grad.dtype)).to(ctx.dtype), None, None, None, None
