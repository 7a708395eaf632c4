"""Whole training steps of a small Llama-like model, and the first token of generate, by everyone who does them."""

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, measure
from text import docstring_batches
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ptuning_fast import SoftPrompt

MAX_LENGTH = 128  # tokens that a text of the ragged batches is cut to
D, LAYERS, HEADS = 384, 6, 6
ROUNDS = 6  # at least: as many batches


class Case(NamedTuple):
    B: int
    n: int | None  # None: real text, ragged
    m: int
    V: int = 2000
    labelled: int | None = None  # the last so many tokens of a text; None: all


CASES = {
    "ragged text": Case(8, None, 100),
    "ragged text, last 16 labelled": Case(8, None, 100, V=32000, labelled=16),
    "large vocabulary, last 4 labelled": Case(8, 64, 20, V=128256, labelled=4),
    "large vocabulary, all labelled": Case(8, None, 20, V=128256),
    "no padding, long prompt": Case(8, 32, 100),
    "no padding, short prompt": Case(8, 64, 10),
}
LARGE = "large vocabulary, all labelled"  # where losses in chunks are timed, too
CHECKPOINTED = "ragged text"  # where steps under gradient checkpointing are timed as well


class TorchCat(nn.Module):
    """The lines that a user writes."""

    def __init__(self, model, start):
        super().__init__()
        self.model, self.prompt_embeddings = model, nn.Parameter(start.clone())

    def inputs(self, input_ids, attention_mask):
        B, m = len(input_ids), len(self.prompt_embeddings)
        prompt = self.prompt_embeddings.unsqueeze(0).expand(B, -1, -1)
        inputs_embeds = torch.cat([prompt, self.model.get_input_embeddings()(input_ids)], 1)
        mask = torch.cat([torch.ones(B, m).to(attention_mask.device), attention_mask], 1)
        return {"inputs_embeds": inputs_embeds, "attention_mask": mask}

    def forward(self, input_ids, attention_mask, labels):
        filler = torch.full((len(input_ids), len(self.prompt_embeddings)), -100).to(input_ids.device)
        return self.model(**self.inputs(input_ids, attention_mask), labels=torch.cat([filler, labels], 1)).loss

    def generate(self, input_ids, attention_mask):
        return self.model.generate(**self.inputs(input_ids, attention_mask), max_new_tokens=1)


class ChunkedLoss(TorchCat):
    """The same lines with a loss without all rows' logits: `loss_of` hidden states [R, d], table [V, d], labels [R]."""

    def __init__(self, model, start, loss_of):
        super().__init__(model, start)
        self.loss_of = loss_of

    def forward(self, input_ids, attention_mask, labels):
        hidden = self.model.model(**self.inputs(input_ids, attention_mask)).last_hidden_state
        hidden, labelled = hidden[:, len(self.prompt_embeddings) - 1 : -1], labels != -100
        return self.loss_of(hidden[labelled], self.model.lm_head.weight, labels[labelled])


def torchs_loss(model, start):
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip(f"torch {torch.__version__} has no linear_cross_entropy")
    options = nn.LinearCrossEntropyOptions()
    return ChunkedLoss(model, start, lambda *rows: F.linear_cross_entropy(*rows, options=options))


def ligers_loss(model, start):
    reason = "Liger-Kernel is not installed: pip install 'ptuning-fast[bench]'"
    functional = pytest.importorskip("liger_kernel.transformers.functional", reason=reason)
    if DEVICE.type == "cpu":
        pytest.skip("Liger-Kernel's losses need a GPU")
    return ChunkedLoss(
        model,
        start,
        lambda hidden, table, labels: functional.liger_fused_linear_cross_entropy(hidden, table, labels),
    )


class Trl(TorchCat):
    """TRL's head, which SFTTrainer puts into a model, in a copy of this one that shares its weights."""

    def __init__(self, model, start):
        utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed: pip install trl")
        if not hasattr(utils, "add_fused_lm_head"):
            pytest.skip("this TRL has no add_fused_lm_head: pip install 'trl>=1.16'")
        super().__init__(copy.copy(model), start)
        utils.add_fused_lm_head(self.model)

    def forward(self, input_ids, attention_mask, labels):
        filler = torch.full((len(input_ids), len(self.prompt_embeddings)), -100).to(input_ids.device)
        inputs = self.inputs(input_ids, attention_mask)
        return self.model(**inputs, labels=torch.cat([filler, labels], 1), fused_lm_head=True).loss


class Peft(nn.Module):
    def __init__(self, model, start):
        super().__init__()
        peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'ptuning-fast[bench]'")
        settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(start))
        self.model = peft.get_peft_model(model, settings)
        self.prompt_embeddings = self.model.prompt_encoder["default"].embedding.weight
        self.prompt_embeddings.data.copy_(start)

    def forward(self, input_ids, attention_mask, labels):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss

    def generate(self, input_ids, attention_mask):
        out = self.model.generate(input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=1)
        return out[:, input_ids.shape[1] :]


class Fast(nn.Module):
    def __init__(self, model, start, mode, keep_prompt=False):
        super().__init__()
        self.model, self.mode, self.keep_prompt = model, mode, keep_prompt
        self.prompt = SoftPrompt(model, len(start), init=start)
        self.prompt_embeddings = self.prompt.prompt_embeddings

    def forward(self, input_ids, attention_mask, labels):
        if self.mode == "auto":
            return self.prompt.loss(input_ids, attention_mask, labels=labels)
        return self.model(**self.prompt(input_ids, attention_mask, labels=labels, mode=self.mode)).loss

    def generate(self, input_ids, attention_mask):
        if self.mode == "auto":
            return self.prompt.generate(input_ids, attention_mask, keep_prompt=self.keep_prompt, max_new_tokens=1)
        return self.model.generate(**self.prompt(input_ids, attention_mask), max_new_tokens=1)


OURS = "ptuning-fast, auto"
IMPLEMENTATIONS = {
    "torch.cat": TorchCat,
    "PEFT": Peft,
    "ptuning-fast, prepend": lambda model, start: Fast(model, start, "prepend"),
    "ptuning-fast, packed": lambda model, start: Fast(model, start, "packed"),
    "ptuning-fast, shared": lambda model, start: Fast(model, start, "shared"),
    OURS: lambda model, start: Fast(model, start, "auto"),
}
LOSSES = {"torch.linear_cross_entropy": torchs_loss, "Liger loss": ligers_loss, "TRL": Trl}
STEPS = [(case, name, False) for case in CASES for name in IMPLEMENTATIONS]
STEPS += [(LARGE, name, False) for name in LOSSES]
STEPS += [(CHECKPOINTED, name, True) for name in ("torch.cat", OURS)]


@pytest.fixture(scope="module")
def models(checked_alone):
    """The model of a vocabulary, made once."""
    made = {}

    def model(V):
        if V not in made:
            made.clear()
            torch.manual_seed(0)
            layers = 2 if checked_alone else LAYERS
            sizes = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "intermediate_size": 4 * D}
            config = LlamaConfig(vocab_size=V, hidden_size=D, num_hidden_layers=layers, pad_token_id=0, **sizes)
            made[V] = LlamaForCausalLM(config).to(DEVICE).requires_grad_(False)
        return made[V].train()

    return model


def batches_of(case):
    """(input_ids, attention_mask, labels), ROUNDS times."""
    generator = torch.Generator().manual_seed(0)
    if case.n is None:
        found = [(ids % case.V, mask) for ids, mask, _ in docstring_batches(ROUNDS, case.B, MAX_LENGTH)]
    else:
        size = (case.B, case.n)
        found = [(torch.randint(case.V, size, generator=generator), torch.ones(size).long()) for _ in range(ROUNDS)]
    out = []
    for ids, mask in found:
        first = 0 if case.labelled is None else mask.sum(1, keepdim=True) - case.labelled
        labels = ids.masked_fill((mask == 0) | (mask.cumsum(1) <= first), -100)
        out.append(tuple(one.to(DEVICE) for one in (ids, mask, labels)))
    return out


def start_of(case):
    return torch.randn(case.m, D, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def about(name, shape, case):
    n = case.n or f"<= {MAX_LENGTH}"
    return {"implementation": name, "shape": shape, "sizes": {"B": case.B, "n": n, "m": case.m, "V": case.V, "d": D}}


@pytest.mark.parametrize(("shape", "name", "checkpointed"), STEPS)
def test_causal_step(benchmark, request, models, checked_alone, shape, name, checkpointed):
    case = CASES[shape]
    if checked_alone:
        case = case._replace(B=2, V=min(case.V, 2000))
    model, start, batches = models(case.V), start_of(case), batches_of(case)

    def step(implementation, checkpointed=False):
        module = implementation(model, start).to(DEVICE)
        optimizer = torch.optim.AdamW([module.prompt_embeddings], lr=1e-3)

        def run(number):
            (model.gradient_checkpointing_enable if checkpointed else model.gradient_checkpointing_disable)()
            optimizer.zero_grad()
            loss = module(*batches[number % len(batches)])
            loss.backward()
            optimizer.step()
            return loss.detach()

        return module, run

    (module, run), (_, ours) = step((IMPLEMENTATIONS | LOSSES)[name], checkpointed), step(IMPLEMENTATIONS[OURS])
    model.gradient_checkpointing_disable()
    results = []
    for one in (module, TorchCat(model, start)):
        loss = one(*batches[0])
        results.append((loss.detach(), torch.autograd.grad(loss, one.prompt_embeddings)[0]))
    errors = [((actual - truth).abs().max() / truth.abs().max()).item() for actual, truth in zip(*results)]
    assert errors[0] <= (1e-6 if name in IMPLEMENTATIONS else 1e-5) and errors[1] <= 1e-5
    benchmark.group = f"causal training step, {shape}"
    benchmark.extra_info |= about(name + (", checkpointed" if checkpointed else ""), f"Llama-like, {shape}", case)
    benchmark.extra_info |= {
        "benchmark": "training step",
        "dtype": "fp32",
        "direction": "step",
        "match": "equal" if not any(errors) else f"loss within {errors[0]:.1g}, gradients within {errors[1]:.1g}",
    }
    measure(benchmark, request.config, run, ours, least_rounds=ROUNDS)
    model.gradient_checkpointing_disable()
    if "wall_us" in benchmark.extra_info:
        benchmark.extra_info["examples_per_s"] = 1e6 * case.B / benchmark.extra_info["wall_us"][1]


KEPT = "ptuning-fast, auto, prompt kept"
FIRST_TOKEN = {name: IMPLEMENTATIONS[name] for name in ("torch.cat", "PEFT", "ptuning-fast, prepend", OURS)}
FIRST_TOKEN[KEPT] = lambda model, start: Fast(model, start, "auto", keep_prompt=True)


@pytest.mark.parametrize("name", FIRST_TOKEN)
def test_first_token(benchmark, request, models, checked_alone, name):
    case = CASES["no padding, long prompt"]
    if checked_alone:
        case = case._replace(B=2)
    model, start = models(case.V).eval(), start_of(case)
    batches = [(ids, mask) for ids, mask, _ in batches_of(case)]
    module, ours, truth = (FIRST_TOKEN[which](model, start).to(DEVICE).eval() for which in (name, OURS, "torch.cat"))
    for batch in batches:
        assert torch.equal(module.generate(*batch), truth.generate(*batch))
    benchmark.group = "first token of generate"
    benchmark.extra_info |= about(name, "Llama-like, long prompt", case)
    benchmark.extra_info |= {"benchmark": "first token", "dtype": "fp32", "direction": "generate", "match": "equal"}
    runs = [lambda number, one=one: one.generate(*batches[number % len(batches)]) for one in (module, ours)]
    measure(benchmark, request.config, *runs, least_rounds=ROUNDS)
    if "wall_us" in benchmark.extra_info:
        benchmark.extra_info["examples_per_s"] = 1e6 * case.B / benchmark.extra_info["wall_us"][1]
