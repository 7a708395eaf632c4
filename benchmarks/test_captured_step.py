"""Small training steps, which the CPU cannot launch as fast as a GPU does them: eager, and captured in a CUDA graph."""

import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, measure
from transformers import BertConfig, BertModel

from ptuning_fast import FastPTuning
from ptuning_fast.reference import ReferencePTuning

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")

B, N, M, NUM_LABELS = 8, 32, 16, 8
ROUNDS = 30  # at least


def eager(module):
    """A function of a batch that makes one training step and returns its loss."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, capturable=True)

    def step(ids, mask, labels):
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(module(ids, mask), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def captured(module):
    """The same, recorded once: each batch is copied to where the recorded one was, and the GPU told to go again."""
    step = eager(module)
    batch = [torch.ones(B, N).long().cuda(), torch.ones(B, N).long().cuda(), torch.zeros(B).long().cuda()]
    before = [parameter.detach().clone() for parameter in module.parameters() if parameter.requires_grad]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*batch)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(*batch)
    with torch.no_grad():  # the warm-up has trained
        for parameter, value in zip((one for one in module.parameters() if one.requires_grad), before):
            parameter.copy_(value)

    def again(*other):
        for place, value in zip(batch, other):
            place.copy_(value)
        graph.replay()
        return loss.clone()

    return again


IMPLEMENTATIONS = {
    "torch.cat": lambda encoder: eager(ReferencePTuning(encoder, M, NUM_LABELS).cuda()),
    "ptuning-fast, prepend": lambda encoder: eager(FastPTuning(encoder, M, NUM_LABELS).cuda()),
    "ptuning-fast, additive mask": lambda encoder: eager(
        FastPTuning(encoder, M, NUM_LABELS, additive_mask=True, prune=True).cuda()
    ),
    "ptuning-fast, additive mask, CUDA graph": lambda encoder: captured(
        FastPTuning(encoder, M, NUM_LABELS, additive_mask=True, prune=True).cuda()
    ),
}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return BertModel(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).cuda()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_captured_step(benchmark, request, encoder, name):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(8):
        lengths = torch.randint(8, N + 1, (B, 1), generator=generator)
        mask = (torch.arange(N) < lengths).long()
        ids, labels = (
            torch.randint(high, (B, *n), generator=generator) for high, n in ((30522, [N]), (NUM_LABELS, []))
        )
        batches.append([one.cuda() for one in (ids, mask, labels)])

    def build(which):
        torch.manual_seed(0)
        return IMPLEMENTATIONS[which](encoder)

    first, expected = build(name)(*batches[0]).item(), build("torch.cat")(*batches[0]).item()
    assert abs(first - expected) <= 1e-4 * abs(expected)  # twelve layers of fp32 roundings, summed in another order
    run, ours = build(name), build("ptuning-fast, prepend")
    benchmark.group = "small training step"
    benchmark.extra_info |= {
        "benchmark": "training step",
        "implementation": name,
        "shape": f"bert-base, B={B}, n={N}, m={M}",
        "sizes": {"B": B, "n": N, "m": M, "d": 768},
        "dtype": "fp32",
        "direction": "step",
        "match": f"loss within {abs(first - expected) / abs(expected):.1g}",
    }
    measure(
        *(benchmark, request.config),
        lambda number: run(*batches[number % len(batches)]),
        lambda number: ours(*batches[number % len(batches)]),
        least_rounds=ROUNDS,
    )
    if "wall_us" in benchmark.extra_info:
        benchmark.extra_info["examples_per_s"] = 1e6 * B / benchmark.extra_info["wall_us"][1]
