"""torch.compile(fullgraph=True) of the op as torch operations: one graph for all lengths, the same gradient.

The kernels under it are in prompt_embedding/test_launches.py.
"""

import pytest
import torch
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


@pytest.mark.parametrize("dynamic", [None, True], ids=["static, then dynamic", "dynamic"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_graph_serves_all_lengths(layout, dynamic, torch_backend):
    torch._dynamo.reset()
    weight, prompt = torch.randn(50, 16), torch.randn(4, 16, requires_grad=True)
    options = dict(LAYOUTS[layout])
    with_lengths = options.pop("lengths", False)

    graphs = CompileCounterWithBackend("aot_eager")

    def rows(ids, mask, lengths):
        known = {"lengths": lengths} if with_lengths else {}
        return prepend_prompt(ids, mask, weight=weight, prompt=prompt, labels=ids, **options, **known)["inputs_embeds"]

    compiled = torch.compile(rows, fullgraph=True, dynamic=dynamic, backend=graphs)
    for B, n in ((3, 5), (4, 7), (5, 9), (6, 11), (2, 23), (7, 8)):
        lengths = torch.randint(1, n + 1, (B,))
        lengths[0] = n
        ids, mask = torch.randint(0, 50, (B, n)), (torch.arange(n) < lengths[:, None]).long()
        expected, actual = rows(ids, mask, lengths), compiled(ids, mask, lengths)
        assert torch.equal(actual, expected)
        gradients = [torch.autograd.grad(one.sin().sum(), prompt)[0] for one in (actual, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    assert graphs.frame_count <= 2  # the second time, whatever has changed becomes a symbol
