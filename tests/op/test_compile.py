"""torch.compile(fullgraph=True) of the op: one graph for all lengths, the same values and gradient."""

import pytest
import torch
from cases import assert_same, case, to_device
from torch._dynamo.testing import CompileCounterWithBackend

from ptuning_fast import prepend_prompt

LAYOUTS = {
    "prepend": {},
    "positions": {"position_start": 2},
    "adjacent": {"position_start": 0, "adjacent": True},
    "additive": {"additive_mask": torch.float32},
    "packed": {"packed": True},
    "packed, lengths known": {"packed": True, "lengths": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_graph_serves_all_lengths(layout, backend):
    one_graph(layout, backend, dynamic=None)


@pytest.mark.parametrize("layout", ["prepend", "adjacent", "packed", "packed, lengths known"])
def test_lengths_are_symbols_at_once(layout, torch_backend):
    """Without Triton's interpreter; the operators around the kernels have symbols in the second graph above."""
    one_graph(layout, torch.device("cpu"), dynamic=True)


def one_graph(layout, backend, dynamic):
    torch._dynamo.reset()
    weight, prompt = torch.randn(50, 16, device=backend), torch.randn(4, 16, device=backend, requires_grad=True)
    options = dict(LAYOUTS[layout])
    with_lengths = options.pop("lengths", False)

    graphs = CompileCounterWithBackend("aot_eager")

    def op(ids, mask, lengths):
        known = {"lengths": lengths} if with_lengths else {}
        return prepend_prompt(ids, mask, weight=weight, prompt=prompt, labels=ids, **options, **known)

    compiled = torch.compile(op, fullgraph=True, dynamic=dynamic, backend=graphs)
    for B, n in ((3, 5), (4, 7), (2, 23), (6, 8)):
        lengths = torch.randint(1, n + 1, (B,))
        lengths[0] = n
        ids, mask = torch.randint(0, 50, (B, n)), (torch.arange(n) < lengths[:, None]).long()
        expected, actual = (one(ids.to(backend), mask.to(backend), lengths) for one in (op, compiled))
        assert_same(actual, to_device(expected, "cpu"))
        gradients = [torch.autograd.grad(one["inputs_embeds"].sin().sum(), prompt)[0] for one in (actual, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    assert graphs.frame_count <= 2  # the second time, whatever has changed becomes a symbol


@pytest.mark.parametrize(("B", "bank"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operators_are_what_they_are_declared_to_be(layout, B, bank):
    """Schema, aliases, fake outputs and graphs of the two that torch.compile sees instead of the kernels."""
    traced_kernels = pytest.importorskip("ptuning_fast.op.traced_kernels", reason="Triton does not run here")
    options = dict(LAYOUTS[layout])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = {"prompt": torch.randn(3, 2, 16), "prompt_index": torch.arange(B) % 3} if bank else {}
    arguments = to_device(case(B=B, n=4, m=2, d=16, **given), device)
    mask = arguments["attention_mask"]
    if "lengths" in options:
        options["lengths"] = (mask != 0).sum(1).tolist()
    batch = [arguments["input_ids"], mask, None, arguments["labels"]]
    prompt, index = arguments["prompt"], arguments.get("prompt_index")
    packed = options.get("packed", False)
    layout = (
        *(options.get("position_start"), 1.0, options.get("adjacent", False)),
        *(packed, options.get("lengths"), options.get("additive_mask")),
    )
    forward = batch, arguments["weight"], prompt, index, *layout
    torch.library.opcheck(traced_kernels.prepend_prompt, forward)
    outputs, _ = traced_kernels.prepend_prompt(*forward)
    start = outputs[-1][:B] if packed or options.get("adjacent") else None
    grad = torch.randn_like(outputs[0])
    torch.library.opcheck(traced_kernels.backward, (grad, prompt.shape, torch.float32, start, index, packed))
