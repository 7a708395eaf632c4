"""One of two processes (gloo, CPU): each kind of distributed training against the same training by one process.

    accelerate launch --multi_gpu --num_processes 2 tests/distributed/worker.py RESULT.json

(That flag alone makes `accelerate launch` start more than one process; no GPU is asked for.) Both processes compute the
losses and gradients of one process by themselves, then together, each on every second text. RESULT.json says of each
case how far apart they were, relative to the largest of their kind, or what it raised.
"""

import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import sweep
import torch
import torch.distributed as dist
import zoo
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

from ptuning_fast import FastPTuning, PromptedModel, SoftPrompt
from ptuning_fast.files import adapter
from ptuning_fast.models.embedding import unreadable

STEPS = 3
TEXTS = zoo.texts([4, 11, 1, 17])  # the two processes have texts of other lengths, and other numbers of tokens
CLASSES = torch.tensor([0, 2, 1, 2])

accelerator = Accelerator(cpu=True)
rank, world = accelerator.process_index, accelerator.num_processes
OWN = slice(rank, None, world)


def frozen(name, class_name=None):
    """Without dropout, in train mode."""
    model = zoo.build(name, class_name, attention_dropout=0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def labels_of(ids, mask):
    """Every token but the first of each text, padded on the right."""
    return ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)


class Causal(PromptedModel):
    def __init__(self, model, mode):
        torch.manual_seed(1)
        super().__init__(model, zoo.M, mode=mode)

    def loss(self, texts):
        """The mean over the texts' labels, times their number."""
        ids, mask = zoo.padded(TEXTS[texts], "right")
        return self(ids, mask, labels=labels_of(ids, mask)).loss * mask[:, 1:].sum()

    total = sum(len(text) - 1 for text in TEXTS)


class Classifier:
    """FastPTuning: the mean over the texts, times their number."""

    total = len(TEXTS)

    def __init__(self, module):
        self.module = module

    def loss(self, texts):
        ids, mask = zoo.padded(TEXTS[texts], "right")
        return self.module(ids, mask, labels=CLASSES[texts]).loss * len(ids)


def curve(loss_of, texts, total, parameters, optimizer=None):
    """Losses of some steps, and the gradients of each, whole."""
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=0.05)
    shares, losses, grads = dist.get_world_size() if texts == OWN else 1, [], []
    for _ in range(STEPS):
        loss = loss_of(texts) / total * shares  # gradients are averaged over the processes, and so is this
        loss.backward()
        losses.append(loss.detach())
        whole = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone() for p in parameters]
        grads.append(torch.cat([grad.flatten() for grad in whole]))
        optimizer.step()
        optimizer.zero_grad()
    losses, grads = torch.stack(losses), torch.stack(grads)
    if shares > 1:
        dist.all_reduce(losses)
        losses /= shares
    return losses, grads


def apart(one, other):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(one, other))


ALL = slice(None)
CASES = {}


def case(*modes):
    def register(make):
        for mode in modes:
            CASES[f"{make.__name__} {mode}"] = make, mode
        return make

    return register


def whole_causal(mode):
    """What one process has."""
    module = Causal(frozen("Llama"), mode)
    return curve(module.loss, ALL, module.total, list(module.prompt.parameters()))


def sharded(model):
    """By FSDP2, layer by layer."""
    for layer in model.base_model.layers:
        fully_shard(layer)
    return fully_shard(model)


def beside(prompt, module):
    """The prompt is its own module, wrapped by itself, beside a model that is not."""

    def loss(texts):
        ids, mask = zoo.padded(TEXTS[texts], "right")
        inputs = prompt(ids, mask, labels=labels_of(ids, mask), mode=module.mode)
        return module.model(**inputs).loss * mask[:, 1:].sum()

    return loss


@case("prepend")
def by_itself(mode):
    """Nothing is averaged: what would go unseen if the comparison saw nothing."""
    module = Causal(frozen("Llama"), mode)
    return curve(module.loss, OWN, module.total, list(module.prompt.parameters()))


@case("prepend", "packed", "shared")
def ddp_prompt(mode):
    """DDP over the prompt, and the whole model in each process."""
    module = Causal(frozen("Llama"), mode)
    return curve(beside(DDP(module.prompt), module), OWN, module.total, [module.prompt.prompt_embeddings])


@case("prepend", "packed", "shared")
def ddp_both(mode):
    """DDP over a PromptedModel."""
    module = Causal(frozen("Llama"), mode)
    wrapped = DDP(module)

    def loss(texts):
        ids, mask = zoo.padded(TEXTS[texts], "right")
        return wrapped(ids, mask, labels=labels_of(ids, mask)).loss * mask[:, 1:].sum()

    return curve(loss, OWN, module.total, [module.prompt.prompt_embeddings])


@case("prepend", "packed", "shared")
def fsdp_model(mode):
    """A model that FSDP2 has sharded, and the prompt in DDP."""
    module = Causal(frozen("Llama"), mode)
    sharded(module.model)
    return curve(beside(DDP(module.prompt), module), OWN, module.total, [module.prompt.prompt_embeddings])


@case("prepend")
def fsdp_table(mode):
    """FSDP2 has sharded the table by itself: hooks on it are seen; and a model in shards is probed."""
    module = Causal(frozen("Llama"), mode)
    table = fully_shard(module.model.get_input_embeddings())
    sharded(module.model)
    assert isinstance(table.weight, DTensor)
    assert type(module.prompt(*zoo.padded(TEXTS, "right"))["inputs_embeds"]) is torch.Tensor
    found = curve(beside(DDP(module.prompt), module), OWN, module.total, [module.prompt.prompt_embeddings])
    table.register_forward_hook(lambda module, args, out: 2 * out)
    assert "hooks" in unreadable(table)

    windowed = sharded(sweep.build("qwen2_moe", "Qwen2MoeForCausalLM", "sdpa"))
    refused = r"\bQwen2MoeForCausalLM, probed, .* a sliding window is in its mask alone"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TypeError, match=refused):
            SoftPrompt(windowed, zoo.M)(*zoo.padded(TEXTS, "left"), mode="packed")
    return found


@case("prepend", "packed", "shared")
def fsdp_base(mode):
    """FSDP2 has sharded what is under the head."""
    module = Causal(frozen("Llama"), mode)
    sharded(module.model.model)
    return curve(beside(DDP(module.prompt), module), OWN, module.total, [module.prompt.prompt_embeddings])


@case("prepend", "packed", "shared")
def fsdp_both(mode):
    """FSDP2 has sharded the model, and the prompt by itself."""
    module = Causal(frozen("Llama"), mode)
    sharded(module.model)
    prompt = fully_shard(module.prompt)
    return curve(beside(prompt, module), OWN, module.total, list(prompt.parameters()))


@case("prepend")
def saved_by_fsdp(mode):
    """A prompt that FSDP2 has sharded, saved by both processes at once and loaded by each, also where it computes in
    half precision, and behind a forward; and so are a classifier, and encoders that have gradients."""
    module, model = Causal(frozen("Llama"), mode), classifier("prepend")
    start = model.prompt_embeddings.detach().clone()
    fully_shard(module.prompt, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    folder = Path(sys.argv[1]).with_name("saved")
    with torch.no_grad():
        ids, mask = zoo.padded(TEXTS, "right")
        model.eval()(ids, mask)
        module.prompt(ids, mask)
    model.save_pretrained(folder.with_name("classifier"))
    module.save_pretrained(folder)
    dist.barrier()
    assert torch.equal(adapter.load(folder.with_name("classifier"))[0]["prompt_embeddings"], start)
    module.prompt = SoftPrompt.from_pretrained(module.model, folder)
    for kind in ("mlp", "lstm"):
        prompt, place = SoftPrompt(module.model, zoo.M, encoder=kind), folder.with_name(kind)
        for one in prompt.parameters():
            dist.broadcast(one.data, 0)
        expected = prompt.embeddings().detach()
        fully_shard(prompt)
        prompt(ids, mask)["inputs_embeds"].sum().backward()
        prompt.save_pretrained(place)
        dist.barrier()
        assert torch.allclose(SoftPrompt.from_pretrained(module.model, place).embeddings(), expected, atol=1e-6)
    return curve(beside(DDP(module.prompt), module), OWN, module.total, [module.prompt.prompt_embeddings])


@case("prepend", "packed", "shared")
def accelerate_prompt(mode):
    """`Accelerator.prepare` of the prompt and its optimizer."""
    module = Causal(frozen("Llama"), mode)
    optimizer = torch.optim.AdamW(module.prompt.parameters(), lr=0.05)
    prompt, optimizer = accelerator.prepare(module.prompt, optimizer)
    return curve(beside(prompt, module), OWN, module.total, list(module.prompt.parameters()), optimizer)


def classifier(mode):
    torch.manual_seed(1)
    return FastPTuning(frozen("BERT"), zoo.M, 3, mode=mode).train()


def trained(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def whole_classifier(mode):
    module = classifier(mode)
    return curve(Classifier(module).loss, ALL, Classifier.total, trained(module))


@case("prepend", "packed")
def ddp_classifier(mode):
    module = DDP(classifier(mode))
    return curve(Classifier(module).loss, OWN, Classifier.total, trained(module))


@case("prepend", "packed")
def fsdp_classifier(mode):
    """FSDP2 over the encoder's layers, and over all of the rest."""
    module = classifier(mode)
    for layer in module.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(module)
    return curve(Classifier(module).loss, OWN, Classifier.total, trained(module))


@case("prepend", "packed")
def accelerate_classifier(mode):
    module = classifier(mode)
    optimizer = torch.optim.AdamW(trained(module), lr=0.05)
    prepared, optimizer = accelerator.prepare(module, optimizer)
    return curve(Classifier(prepared).loss, OWN, Classifier.total, trained(module), optimizer)


def main(file):
    expected, results = {}, {}
    for name, (make, mode) in CASES.items():
        whole = whole_classifier if "classifier" in name else whole_causal
        if (whole, mode) not in expected:
            expected[whole, mode] = whole(mode)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                results[name] = {"apart": apart(make(mode), expected[whole, mode])}
            except Exception as error:
                results[name] = {"error": f"{type(error).__name__}: {error}"}
                traceback.print_exc()
        results[name]["warnings"] = sorted({str(one.message) for one in said if "ptuning_fast" in one.filename})
    gathered = [None] * world
    dist.all_gather_object(gathered, results)
    if rank == 0:
        Path(file).write_text(json.dumps(gathered))
    dist.barrier()
    dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads have been seen to abort an interpreter that ends


if __name__ == "__main__":
    main(sys.argv[1])
