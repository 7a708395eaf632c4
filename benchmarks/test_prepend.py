"""The stage alone: lookup, prompt and mask, forward and forward + backward, against the lines that a user writes."""

import pytest
import torch
import torch.nn.functional as F

from ptuning_fast import prepend_prompt

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {
    "launch-bound": (1, 16, 10, 768),
    "bert-base": (32, 128, 20, 768),
    "bert-large-long": (16, 492, 20, 1024),
    "llm" if DEVICE.type == "cuda" else "llm-2-rows": (8 if DEVICE.type == "cuda" else 2, 2048, 100, 4096),
}


def torch_cat(input_ids, attention_mask, weight, prompt):
    """What users have: an embedding call, an expanded prompt, two concatenations and a block of ones from the CPU."""
    batch_size = input_ids.shape[0]
    tokens = F.embedding(input_ids, weight)
    inputs_embeds = torch.cat([prompt.unsqueeze(0).expand(batch_size, -1, -1), tokens], dim=1)
    prompt_mask = torch.ones(batch_size, prompt.shape[0]).to(attention_mask.device)
    return inputs_embeds, torch.cat([prompt_mask, attention_mask], dim=1)


def fast(input_ids, attention_mask, weight, prompt):
    out = prepend_prompt(input_ids, attention_mask, weight=weight, prompt=prompt)
    return out["inputs_embeds"], out["attention_mask"]


@pytest.fixture(scope="module", params=SHAPES)
def shape(request):
    return SHAPES[request.param]


@pytest.fixture(scope="module")
def batches(shape):
    """Four random batches in turn, so that no cache answers, with the table and the prompt."""
    B, n, m, d = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(30522, d, generator=generator).to(DEVICE)
    prompt = torch.randn(m, d, generator=generator).to(DEVICE).requires_grad_()
    ids = [torch.randint(30522, (B, n), generator=generator).to(DEVICE) for _ in range(4)]
    lengths = torch.randint(1, n + 1, (B, 1), generator=generator)
    mask = (torch.arange(n) < lengths).long().to(DEVICE)
    return [(one, mask, weight, prompt) for one in ids]


@pytest.mark.parametrize("stage", [torch_cat, fast], ids=["torch.cat", "ptuning-fast"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_stage(benchmark, batches, stage, direction):
    turn = iter(range(10**9))

    def run():
        inputs = batches[next(turn) % len(batches)]
        if direction == "forward":
            with torch.no_grad():
                out = stage(*inputs)
        else:
            out = stage(*inputs)
            torch.autograd.grad(out[0], inputs[3], upstream)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return out

    expected = torch_cat(*batches[0])
    actual = stage(*batches[0])
    assert torch.equal(expected[0], actual[0])
    assert torch.equal(expected[1], actual[1].to(expected[1].dtype))
    upstream = torch.randn_like(expected[0])
    gradients = [torch.autograd.grad(out, batches[0][3], upstream)[0] for out in (expected[0], actual[0])]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)  # the batch added up in another order, in fp32
    benchmark.group = f"{direction} {tuple(expected[0].shape)}"
    benchmark(run)
