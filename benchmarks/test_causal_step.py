"""Whole training steps of a small Llama-like model, with labels on every token, by everyone who does them.

Two shapes without padding, on which mode "shared" is compared, and real ragged text, on which "packed" is.
"""

import pytest
import torch
from measure import DEVICE, measure
from text import docstring_batches
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ptuning_fast import SoftPrompt

SHAPES = {"long-prompt": (8, 32, 100), "short-prompt": (8, 64, 10), "ragged": (8, None, 16)}  # B, n, m
MAX_LENGTH = 128  # tokens that a text of the ragged batches is cut to
V, D, LAYERS = 2000, 384, 6
ROUNDS = 8  # at least, so that each batch has its turn


class TorchCat(nn.Module):
    """The lines that a user writes."""

    def __init__(self, model, start):
        super().__init__()
        self.model, self.prompt_embeddings = model, nn.Parameter(start.clone())

    def forward(self, input_ids, attention_mask):
        B, m = len(input_ids), len(self.prompt_embeddings)
        prompt = self.prompt_embeddings.unsqueeze(0).expand(B, -1, -1)
        inputs_embeds = torch.cat([prompt, self.model.get_input_embeddings()(input_ids)], 1)
        mask = torch.cat([torch.ones(B, m).to(attention_mask.device), attention_mask], 1)
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        labels = torch.cat([torch.full((B, m), -100).to(input_ids.device), labels], 1)
        return self.model(inputs_embeds=inputs_embeds, attention_mask=mask, labels=labels).loss


class Peft(nn.Module):
    def __init__(self, model, start):
        super().__init__()
        peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'ptuning-fast[bench]'")
        settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(start))
        self.model = peft.get_peft_model(model, settings)
        self.prompt_embeddings = self.model.prompt_encoder["default"].embedding.weight
        self.prompt_embeddings.data.copy_(start)

    def forward(self, input_ids, attention_mask):
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss


class Fast(nn.Module):
    def __init__(self, model, start, mode="prepend"):
        super().__init__()
        self.model, self.mode = model, mode
        self.prompt = SoftPrompt(model, len(start), init=start)
        self.prompt_embeddings = self.prompt.prompt_embeddings

    def forward(self, input_ids, attention_mask):
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        return self.model(**self.prompt(input_ids, attention_mask, labels=labels, mode=self.mode)).loss


IMPLEMENTATIONS = {
    "torch.cat": TorchCat,
    "PEFT": Peft,
    "ptuning-fast, prepend": Fast,
    "ptuning-fast, packed": lambda model, start: Fast(model, start, "packed"),
    "ptuning-fast, shared": lambda model, start: Fast(model, start, "shared"),
}
# The mode that is for a shape, beside which each of the others is timed there; the other of the two is not for it.
BEST = {"long-prompt": "ptuning-fast, shared", "short-prompt": "ptuning-fast, shared", "ragged": "ptuning-fast, packed"}
CASES = [
    (shape, name) for shape in SHAPES for name in IMPLEMENTATIONS if name == BEST[shape] or name not in BEST.values()
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 12, "num_key_value_heads": 12, "intermediate_size": 4 * D}
    config = LlamaConfig(vocab_size=V, hidden_size=D, num_hidden_layers=LAYERS, pad_token_id=0, **sizes)
    return LlamaForCausalLM(config).to(DEVICE).requires_grad_(False)


@pytest.mark.parametrize(("shape", "name"), CASES)
def test_causal_step(benchmark, request, model, shape, name):
    B, n, m = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(m, D, generator=generator).to(DEVICE)
    if n is None:
        batches = [(ids % V, mask) for ids, mask, _ in docstring_batches(8, B, MAX_LENGTH)]
    else:
        batches = [(torch.randint(V, (B, n), generator=generator), torch.ones(B, n).long()) for _ in range(8)]
    batches = [(ids.to(DEVICE), mask.to(DEVICE)) for ids, mask in batches]

    def step(implementation):
        module = implementation(model, start).to(DEVICE)
        optimizer = torch.optim.AdamW([module.prompt_embeddings], lr=1e-3)

        def run(number):
            optimizer.zero_grad()
            loss = module(*batches[number % len(batches)])
            loss.backward()
            optimizer.step()
            return loss.detach()

        return module, run

    (module, run), (_, ours) = step(IMPLEMENTATIONS[name]), step(IMPLEMENTATIONS[BEST[shape]])
    results = []
    for one in (module, TorchCat(model, start)):
        loss = one(*batches[0])
        results.append((loss.detach(), torch.autograd.grad(loss, one.prompt_embeddings)[0]))
    errors = [((actual - truth).abs().max() / truth.abs().max()).item() for actual, truth in zip(*results)]
    assert max(errors) <= 1000 * torch.finfo(torch.float32).eps  # six layers of roundings in another order
    benchmark.group = f"causal training step, {shape}"
    benchmark.extra_info |= {
        "benchmark": "training step",
        "implementation": name,
        "shape": f"Llama-like, m={m}, n={n or f'real text, up to {MAX_LENGTH}'}",
        "sizes": {"B": B, "n": n or f"<= {MAX_LENGTH}", "m": m, "d": D},
        "dtype": "fp32",
        "direction": "step",
        "match": "equal" if not any(errors) else f"loss within {errors[0]:.1g}, gradients within {errors[1]:.1g}",
    }
    measure(benchmark, request.config, run, ours, least_rounds=ROUNDS)
    if "wall_us" in benchmark.extra_info:
        benchmark.extra_info["examples_per_s"] = 1e6 * B / benchmark.extra_info["wall_us"][1]
