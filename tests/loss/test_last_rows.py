"""The last layer's feed-forward on the rows that predict a label: the same loss and gradient, or the model as it is."""

import copy
import pickle

import pytest
import torch
import transformers
import zoo
from torch import nn

from ptuning_fast import SoftPrompt
from ptuning_fast.loss import chunks, labelled
from ptuning_fast.models import describe
from ptuning_fast.modes import mode_for
from ptuning_fast.op import Prompt

pytestmark = pytest.mark.usefixtures("torch_backend")

B, N = 3, 12


def batch():
    torch.manual_seed(1)
    ids, mask = torch.randint(5, 90, (B, N)), torch.ones(B, N, dtype=torch.int64)
    mask[0, :4] = 0
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    return ids, mask, labels


def check(model, mode="auto"):
    """The loss of a prompt, and its gradient, are the model's own; returns the copy whose last layer has fewer rows."""
    ids, mask, labels = batch()
    prompt = SoftPrompt(model, zoo.M, init="normal").double()
    results = []
    for found in (
        prompt.loss(ids, mask, labels=labels, mode=mode),
        model(**prompt(ids, mask, labels=labels)).loss,
    ):
        results.append((found.detach().double(), *torch.autograd.grad(found, prompt.prompt_embeddings)))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # transformers' loss is in fp32
    return prompt


def served(prompt, model, columns=2):
    return last_rows(prompt).of(model, torch.arange(columns), N)


def last_rows(prompt):
    return labelled.last_rows(prompt.model, describe(prompt.model))


def part_of(prompt):
    path = last_rows(prompt).path
    return prompt.model.get_submodule(".".join(path)) if path else None


@pytest.fixture
def rows_seen(monkeypatch):
    """How many rows the feed-forwards of a model are given, the last one's last."""
    seen = []

    def watch(model):
        kind = type(model.model.layers[-1].mlp.act_fn)  # no block, whose other forward would be noticed
        plain = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, rows: seen.append(rows.shape[1]) or plain(self, rows))
        return seen

    return watch


@pytest.mark.parametrize("mode", ["prepend", "packed", "shared"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_fewer_rows(rows_seen, mode, checkpointed):
    model = zoo.build("Llama").double().train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    check(model, mode)
    ids, mask, labels = batch()
    prompt = SoftPrompt(model, zoo.M)
    prompt.loss(ids, mask, labels=labels, mode=mode)  # what is probed is behind us
    seen = rows_seen(model)
    prompt.loss(ids, mask, labels=labels, mode=mode).backward()
    layers = len(model.model.layers)
    once = seen[:layers]
    assert once[:-1] == [max(once)] * (layers - 1) and once[-1] == (2 if mode == "prepend" else 2 * B)
    assert seen == once + (once[::-1] if checkpointed else [])  # recomputed with as few


def test_fewer_rows_in_chunks(rows_seen, monkeypatch):
    """As where the vocabulary is large."""
    monkeypatch.setattr(chunks, "LOGITS", 2 * zoo.V)
    model = zoo.build("Llama").double()
    check(model, "prepend")
    ids, mask, labels = batch()
    prompt = SoftPrompt(model, zoo.M)
    prompt.loss(ids, mask, labels=labels, mode="prepend")
    seen = rows_seen(model)
    prompt.loss(ids, mask, labels=labels, mode="prepend")
    assert seen == [zoo.M + N] * 2 + [2]


@pytest.mark.parametrize("name", ["Qwen2", "Mistral", "Phi", "Gemma", "Gemma 2", "Gemma 3", "GPT-2"])
def test_families(name):
    model = zoo.build(name)
    prompt = check(model, "prepend")
    assert type(part_of(prompt)).__name__.endswith("MLP") and served(prompt, model) is not model


@pytest.mark.parametrize("name", ["OPT", "Bloom"])
def test_whose_feed_forward_takes_other_rows_too(name):
    """OPT's has rows in a dimension of their own, Bloom's adds its residual."""
    model = zoo.build(name)
    prompt = check(model, "prepend")
    assert served(prompt, model) is model


def test_a_part_that_is_one_layer_of_a_feed_forward():
    """BioGPT's widens its rows."""
    sizes = {"hidden_size": zoo.D, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    model = transformers.BioGptForCausalLM(transformers.BioGptConfig(vocab_size=99, **sizes)).requires_grad_(False)
    prompt = check(model.eval(), "prepend")
    assert part_of(prompt).out_features == 48


class Shifted(nn.Module):
    """A feed-forward that looks at the row before, as RWKV's does."""

    def __init__(self, mlp, weight):
        super().__init__()
        self.mlp, self.weight = mlp, weight

    def forward(self, hidden):
        return self.mlp(hidden + self.weight * hidden.roll(1, 1))


@pytest.mark.parametrize("weight", [1, 0.02])
def test_rows_that_see_each_other(weight):
    model = zoo.build("Llama").double()
    model.model.layers[-1].mlp = Shifted(model.model.layers[-1].mlp, weight)
    prompt = check(model, "prepend")
    assert not isinstance(part_of(prompt), Shifted)


def test_the_model_as_it_is_where_it_would_not_be_the_same():
    model = zoo.build("Llama").double()
    parts = last_rows(check(model))

    def served(columns=2):
        return parts.of(model, torch.arange(columns), N)

    assert served() is not model
    assert served(N) is model, "most rows are read"

    handle = model.model.layers[-1].mlp.up_proj.register_forward_hook(lambda *_: None)
    assert served() is model
    handle.remove()
    model.config.output_hidden_states = True
    assert served() is model
    model.config.output_hidden_states = False
    model.config.output_router_logits = True
    assert served() is model
    model.config.output_router_logits = False
    last = model.model.layers[-1]
    last.mlp.p = 0.5  # as dropout has it
    assert served() is not model
    model.train()
    assert served() is model
    last.mlp = nn.Sequential(copy.deepcopy(last.mlp))
    model.eval()
    assert served() is model, "another part stands there now"
    del model.model.layers[-1]
    assert served() is model


@pytest.mark.parametrize("change", ["appended", "norm", "inside", "hook", "norm's forward"])
def test_what_changes_behind_the_part_is_noticed(change):
    """Whatever stands there at the first call is what was probed."""
    model = zoo.build("Llama")
    prompt = check(model)
    layers, norm = model.model.layers, model.model.norm
    if change == "appended":
        layers.append(copy.deepcopy(layers[0]))
        layers[-1].self_attn.layer_idx = 3
        model.config.num_hidden_layers = 4
        model.config.layer_types = ["full_attention"] * 4
    elif change == "norm":
        model.model.norm = nn.Sequential(Shifted(norm, 1))
    elif change == "inside":
        layers[-1].mlp.down_proj = Shifted(layers[-1].mlp.down_proj, 1)
    elif change == "hook":
        norm.register_forward_hook(lambda module, given, out: out + out.mean(1, keepdim=True))
    else:
        norm.forward = lambda hidden: hidden + hidden.mean(1, keepdim=True)
    ids, mask, labels = batch()
    found = prompt.loss(ids, mask, labels=labels, mode="prepend")
    assert torch.allclose(found, model(**prompt(ids, mask, labels=labels)).loss, rtol=1e-5)


def test_noise_that_is_no_dropout():
    model = zoo.build("Llama")
    parts = last_rows(check(model))
    model.model.layers[-1].mlp.jitter_noise = 0.1
    assert parts.of(model, torch.arange(2), N) is not model
    model.train()
    assert parts.of(model, torch.arange(2), N) is model
    assert "dropout or noise" in mode_for("shared", zoo.build("Llama"), describe(model)).obstacle(
        model, Prompt(torch.ones(2, 4))
    )


def test_copies():
    model = zoo.build("Llama").double()
    prompt = check(model)
    copied = copy.deepcopy(prompt)
    assert copied.model is model and copied.model_loss._found == {}
    again = pickle.loads(pickle.dumps(prompt))
    ids, mask, labels = batch()
    for one in (copied, again):
        assert torch.equal(one.loss(ids, mask, labels=labels), prompt.loss(ids, mask, labels=labels))
