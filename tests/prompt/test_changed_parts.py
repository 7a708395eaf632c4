"""An encoder of P-tuning or a head of FastPTuning that somebody has changed: what of it a file can hold."""

import pytest
import torch
import zoo
from torch.nn.utils import parametrizations, parametrize, prune

from ptuning_fast import FastPTuning, SoftPrompt

pytestmark = pytest.mark.usefixtures("torch_backend")
M = 4


def causal():
    return zoo.build("Llama").eval().requires_grad_(False)


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(zoo.D, zoo.D)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, rows):
        return rows + self.dropout(self.layer(rows).tanh())


def another_activation(prompt):
    prompt.encoder.mlp_head[1] = torch.nn.GELU()


def a_hook(prompt):
    prompt.encoder.register_forward_hook(lambda module, args, out: out * 1.5)


def a_hook_within(prompt):
    prompt.encoder.mlp_head[0].register_forward_pre_hook(lambda module, args: (args[0] * 0.9,))


def a_forward(prompt):
    inside = prompt.encoder.forward
    prompt.encoder.forward = lambda rows: rows + inside(rows)


def another_layer(prompt):
    prompt.encoder.mlp_head.append(torch.nn.Dropout(0.5)).append(torch.nn.Linear(zoo.D, zoo.D))


def of_ones_own(prompt):
    prompt.encoder = Own()


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
@pytest.mark.parametrize("change", [another_activation, a_hook, a_hook_within, a_forward, another_layer, of_ones_own])
def test_an_encoder_that_somebody_has_changed(change, kind, tmp_path):
    """A file has P-tuning's parameters, and would give back another prompt; what is made of it once is right."""
    model = causal()
    prompt = SoftPrompt(model, M, encoder=kind)
    change(prompt)
    before = prompt.train().state_dict()
    with pytest.raises(ValueError, match="encoder is not as it was made"):
        prompt.save_pretrained(tmp_path / "prompt")
    assert not (tmp_path / "prompt").exists()
    rows = prompt.final_prompt()
    assert all(part.training for part in prompt.modules()) and before.keys() == prompt.state_dict().keys()
    assert torch.allclose(rows, prompt.eval().embeddings(), atol=1e-6)
    assert torch.equal(prompt.embeddings_for([5, 6])[:M], rows)
    SoftPrompt(model, M, init=rows).save_pretrained(tmp_path / "prompt")
    assert torch.equal(SoftPrompt.from_pretrained(model, tmp_path / "prompt").embeddings(), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_an_encoder_as_it_was_made(kind, dtype, tmp_path):
    prompt = SoftPrompt(causal(), M, encoder=kind, encoder_dropout=0.1, encoder_hidden_size=24).to(dtype)
    state = torch.random.get_rng_state()
    prompt.encoder.mlp_head[0].register_forward_hook(lambda *_: None)  # as one that looks
    prompt.save_pretrained(tmp_path)
    assert prompt.encoder.training and torch.equal(torch.random.get_rng_state(), state)
    loaded = SoftPrompt.from_pretrained(prompt.model, tmp_path)
    assert torch.allclose(loaded.embeddings(), prompt.eval().embeddings(), atol=1e-6)


@pytest.mark.parametrize("change", [prune.l1_unstructured, parametrizations.weight_norm])
def test_an_encoder_made_of_other_parameters(change, tmp_path):
    prompt = SoftPrompt(causal(), M, encoder="mlp")
    layer = prompt.encoder.mlp_head[0]
    change(layer, "weight", **({"amount": 0.5} if change is prune.l1_unstructured else {}))
    with pytest.raises(ValueError, match=r"parameters are made of others \(.*encoder\.mlp_head\.0"):
        prompt.save_pretrained(tmp_path / "prompt")
    remove = prune.remove if prune.is_pruned(layer) else parametrize.remove_parametrizations
    remove(layer, "weight")
    prompt.save_pretrained(tmp_path / "prompt")
    assert torch.equal(SoftPrompt.from_pretrained(prompt.model, tmp_path / "prompt").embeddings(), prompt.embeddings())


class Cosine(torch.nn.Linear):
    def forward(self, rows):
        return super().forward(torch.nn.functional.normalize(rows, dim=-1))


class Small(torch.nn.Linear):
    def reset_parameters(self):
        torch.nn.init.normal_(self.weight, std=0.01)
        torch.nn.init.zeros_(self.bias)


HEADS = {
    "forward": lambda fast: setattr(fast, "classifier", Cosine(zoo.D, 2)),
    "layers": lambda fast: setattr(fast, "classifier", torch.nn.Sequential(torch.nn.Linear(zoo.D, 2))),
    "labels": lambda fast: setattr(fast, "classifier", torch.nn.Linear(zoo.D, 3)),
    "bias": lambda fast: setattr(fast, "classifier", torch.nn.Linear(zoo.D, 2, bias=False)),
    "hook": lambda fast: fast.classifier.register_forward_hook(lambda module, args, out: out * 2),
    "pruned": lambda fast: prune.l1_unstructured(fast.classifier, "weight", 0.5),
    "prompt": lambda fast: prune.l1_unstructured(fast, "prompt_embeddings", 0.5),
    "norm": lambda fast: parametrizations.weight_norm(fast, "prompt_embeddings"),
}


@pytest.mark.parametrize("change", HEADS)
def test_what_a_file_of_fast_p_tuning_cannot_hold(change, tmp_path):
    model = zoo.build("BERT")
    fast = FastPTuning(model, prompt_length=M, num_labels=2)
    HEADS[change](fast)
    with pytest.raises(ValueError, match=r"weight \[2, d\] and bias of an nn\.Linear; classifier is"):
        fast.save_pretrained(tmp_path / "prompt")
    assert not (tmp_path / "prompt").exists()


def test_a_head_with_a_beginning_of_ones_own(tmp_path):
    fast = FastPTuning(zoo.build("BERT"), prompt_length=M, num_labels=2).eval()
    fast.classifier = Small(zoo.D, 2)
    fast.save_pretrained(tmp_path)
    ids, mask = zoo.padded(zoo.texts(), "right")
    assert torch.equal(FastPTuning.from_pretrained(tmp_path, fast.bert)(ids, mask), fast(ids, mask))
