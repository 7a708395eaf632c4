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
from ptuning_fast.reference import ReferencePTuning

GPU = DEVICE.type == "cuda"
ENCODERS = ("bert-base",) if GPU else ("minilm",)
PROMPT_LENGTH, NUM_LABELS, BATCH_SIZE, MAX_LENGTH = 16, 8, 32, 128
ROUNDS = 8  # at least, so that each batch has its turn; a step takes seconds on a CPU


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


def fast(**options):
    def build(encoder):
        # Precision is stored in the encoder, which the others use as it is.
        encoder = copy.deepcopy(encoder) if "precision" in options else encoder
        return FastPTuning(encoder, PROMPT_LENGTH, NUM_LABELS, **options)

    return build


OURS = "ptuning-fast, packed and pruned"  # beside which each of the others is timed
AUTOCAST = "torch.cat, bf16 autocast"
IMPLEMENTATIONS = {
    "torch.cat": reference,
    "torch.compile": compiled,
    "PEFT": peft,
    AUTOCAST: reference,
    "ptuning-fast, prepend": fast(),
    "ptuning-fast, pruned": fast(prune=True),
    "ptuning-fast, packed": fast(mode="packed", prune=False),
    OURS: fast(mode="packed"),
    "ptuning-fast, packed, pruned, bf16 weights": fast(mode="packed", precision="bf16"),
}
if GPU:  # elsewhere there is nothing to wait for
    IMPLEMENTATIONS["ptuning-fast, additive mask"] = fast(additive_mask=True)


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
def batches(checked_alone):
    size = (1, 4) if checked_alone else (8, BATCH_SIZE)
    return [tuple(tensor.to(DEVICE) for tensor in batch) for batch in docstring_batches(*size, MAX_LENGTH)]


def stepper(module, name):
    """A function of a batch that makes one training step and returns its loss."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)

    def step(input_ids, attention_mask, labels):
        optimizer.zero_grad()
        with precision_of(name):
            loss = F.cross_entropy(module(input_ids, attention_mask).float(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def precision_of(name):
    return torch.autocast(DEVICE.type, torch.bfloat16) if name == AUTOCAST else contextlib.nullcontext()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_training_step(benchmark, request, encoder, batches, name):
    shape, model = encoder
    if "bf16" in name and not (GPU or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        pytest.skip("this CPU has no bf16 arithmetic: a step would take minutes")

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
    match = check(module, build(reference), batches[0], name)
    run, ours = stepper(module, name), stepper(build(IMPLEMENTATIONS[OURS]), OURS)
    if not benchmark.disabled:
        for batch in {batch[0].shape: batch for batch in batches}.values():  # torch.compile compiles for new shapes
            run(*batch)

    benchmark.group = f"training step, {shape}"
    padded = sum(mask.numel() + PROMPT_LENGTH * BATCH_SIZE for _, mask, _ in batches)
    real = sum(mask.sum().item() + PROMPT_LENGTH * BATCH_SIZE for _, mask, _ in batches)
    benchmark.extra_info |= {
        "benchmark": "training step",
        "implementation": name,
        "shape": shape,
        "sizes": {"B": BATCH_SIZE, "n": f"<= {MAX_LENGTH}", "m": PROMPT_LENGTH, "d": model.config.hidden_size},
        "dtype": "bf16" if "bf16" in name else "fp32",
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


def check(module, expected, batch, name):
    """How the first step's loss and gradients compare with the reference's; AssertionError where they are others."""
    results = []
    for one in (module, expected):
        with precision_of(name if one is module else None):
            loss = F.cross_entropy(one(*batch[:2]).float(), batch[2])
        trained = (one.prompt_embeddings, one.classifier.weight, one.classifier.bias)
        results.append((loss.detach(), *torch.autograd.grad(loss, trained)))
    # Some layers of rounding, of a few units each of fp32, or of bf16, relative to the largest gradient.
    budget = 30 * torch.finfo(torch.bfloat16).eps if "bf16" in name else 100 * torch.finfo(torch.float32).eps
    errors = [
        ((actual - truth).abs().max() / truth.abs().max().clamp(min=1e-12)).item() for actual, truth in zip(*results)
    ]
    assert max(errors) <= budget, errors
    return "equal" if not any(errors) else f"loss within {errors[0]:.1g}, gradients within {max(errors[1:]):.1g}"
