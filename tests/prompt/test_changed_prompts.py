"""A prompt that somebody has changed: hooks on it, another forward, other parameters behind it, more or fewer rows."""

import importlib

import pytest
import torch
import zoo
from torch.nn.utils import parametrizations, parametrize, prune

from ptuning_fast import FastPTuning, PromptedModel, SoftPrompt

pytestmark = pytest.mark.usefixtures("torch_backend")
M = 4
MODES = ["prepend", "packed", "shared", "auto"]


class Scaled(SoftPrompt):
    def forward(self, *args, **kwargs):
        return scaled(self, args, super().forward(*args, **kwargs))


def scaled(prompt, args, inputs):
    return inputs | {"inputs_embeds": inputs["inputs_embeds"] * 1.5}


def by_hook(prompt):
    prompt.register_forward_hook(scaled)


def by_subclass(prompt):
    prompt.__class__ = Scaled


def by_attribute(prompt):
    whole = prompt.forward
    prompt.forward = lambda *args, **kwargs: scaled(prompt, args, whole(*args, **kwargs))


def causal():
    return zoo.build("Llama").eval().requires_grad_(False)


def batch():
    ids, mask = zoo.padded(zoo.texts(), "left")
    return ids, mask, ids.masked_fill(mask == 0, -100)


def alone(model, prompt, scale=1.0):
    """[n, V] logits of each text alone behind the rows of `prompt`."""
    ids, mask, _ = batch()
    table = model.get_input_embeddings()
    rows = [torch.cat([prompt, table(text[there != 0])])[None] * scale for text, there in zip(ids, mask)]
    return [model(inputs_embeds=one).logits[0, len(prompt) :] for one in rows]


def check(prompted, expected):
    """Of a PromptedModel the logits and both losses, with and without training, and what it generates first."""
    ids, mask, labels = batch()
    labels = labels.masked_fill(mask.cumsum(1) == 1, -100)  # first tokens, whose labels SoftPrompt.loss counts
    targets = [text[there != 0][1:] for text, there in zip(ids, mask)]
    loss = torch.nn.functional.cross_entropy(torch.cat([one[:-1] for one in expected]), torch.cat(targets))
    for training in (True, False):
        prompted.train(training)
        prompted.model.eval()
        logits = prompted(ids, mask).logits
        for text, there, found in zip(expected, mask, logits):
            assert torch.allclose(found[there != 0], text, atol=1e-5)
        assert torch.allclose(prompted(ids, mask, labels=labels).loss, loss, atol=1e-5)
    prompt = prompted.prompt
    assert torch.allclose(prompt.loss(ids, mask, labels=labels), loss, atol=1e-5)
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for more in ({}, {"keep_prompt": True}):
        first = prompt.generate(ids, mask, **options, **more).logits[0]
        assert torch.allclose(first, torch.stack([text[-1] for text in expected]), atol=1e-5)
    new = prompt.generate(ids, mask, max_new_tokens=1, do_sample=False)  # for which the prompt is computed once
    assert new[:, 0].tolist() == [int(text[-1].argmax()) for text in expected]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [by_hook, by_subclass, by_attribute])
def test_what_somebody_has_put_around_a_prompt(change, mode):
    model = causal()
    prompted = PromptedModel(model, M, mode=mode)
    change(prompted.prompt)
    check(prompted, alone(model, prompted.prompt.prompt_embeddings.detach(), 1.5))


@pytest.mark.parametrize("mode", ["prepend", "packed"])
def test_a_hook_on_the_prompt_of_a_classifier(mode):
    model = zoo.build("BERT", "BertForSequenceClassification")
    prompted = PromptedModel(model, M, mode="prepend").eval()
    ids, mask, _ = batch()
    plain = prompted(ids, mask).logits
    by_hook(prompted.prompt)
    expected = model(**prompted.prompt(ids, mask)).logits
    assert torch.equal(prompted(ids, mask).logits, expected) and not torch.allclose(expected, plain)
    fast = FastPTuning(model.bert, prompt_length=M, num_labels=2, mode=mode).eval()
    seen = []
    fast.register_forward_pre_hook(lambda module, args: seen.append(module))
    fast(ids, mask)
    assert seen == [fast]


@pytest.mark.parametrize("change", [by_hook, by_subclass, by_attribute])
def test_auto_is_prepend_for_who_knows_rows_alone(change):
    """A packed batch is one row, whose first columns are the first text's virtual tokens alone."""
    prompt = SoftPrompt(causal(), M)
    ids, mask, labels = batch()
    assert len(prompt(ids, mask, mode="auto")["inputs_embeds"]) == 1
    change(prompt)
    for given in (None, labels):
        assert len(prompt(ids, mask, labels=given, mode="auto")["inputs_embeds"]) == len(ids)
    assert len(prompt(ids, mask, mode="packed")["inputs_embeds"]) == 1


def test_a_hook_that_changes_the_number_of_columns():
    prompted = PromptedModel(causal(), M, mode="prepend")
    table = prompted.model.get_input_embeddings()

    def longer(prompt, args, inputs):
        rows = table(torch.zeros(len(inputs["inputs_embeds"]), 2, dtype=torch.long))
        mask = torch.nn.functional.pad(inputs["attention_mask"], (2, 0), value=1)
        return {"inputs_embeds": torch.cat([rows, inputs["inputs_embeds"]], 1), "attention_mask": mask}

    prompted.prompt.register_forward_hook(longer)
    ids, mask, _ = batch()
    with pytest.raises(
        ValueError, match=r"a forward or hook of the SoftPrompt makes inputs_embeds .* by embeddings\(\)"
    ):
        prompted(ids, mask)


class Called(SoftPrompt):
    def __call__(self, *args, **kwargs):
        return scaled(self, args, super().__call__(*args, **kwargs))


@pytest.mark.parametrize("mode", MODES)
def test_a_call_of_ones_own(mode):
    model = causal()
    prompt = Called(model, M)
    expected = alone(model, prompt.prompt_embeddings.detach(), 1.5)
    check(PromptedModel(model, prompt=prompt, mode=mode), expected)
    ids, mask, _ = batch()  # a text without padding, behind which the prompt would be computed once
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for text, there, logits in zip(ids, mask, expected):
        assert torch.allclose(prompt.generate(text[there != 0][None], **options).logits[0][0], logits[-1], atol=1e-5)


def test_a_forward_that_does_not_hand_on_what_it_is_given():
    prompted = PromptedModel(causal(), M)
    ids, mask, _ = batch()
    whole = prompted.prompt.forward
    prompted.prompt.forward = lambda *args, report, **kwargs: whole(*args, **kwargs)
    with pytest.raises(TypeError, match="the forward of SoftPrompt does not hand `report` on"):
        prompted(ids, mask)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [lambda *of: prune.l1_unstructured(*of, 0.5), parametrizations.weight_norm])
def test_a_prompt_made_of_other_parameters(change, mode, tmp_path):
    """Pruning makes it anew before each call, and not when a step was made."""
    model = causal()
    prompted = PromptedModel(model, M, mode=mode)
    prompt = prompted.prompt
    change(prompt, "prompt_embeddings")
    optimizer = torch.optim.SGD(prompt.parameters(), lr=1.0)
    ids, mask, labels = batch()
    for _ in range(2):
        prompted(ids, mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruned = prune.is_pruned(prompt)
        rows = prompt.prompt_embeddings_orig * prompt.prompt_embeddings_mask if pruned else prompt.prompt_embeddings
        check(prompted, alone(model, rows.detach()))
    with pytest.raises(ValueError, match=r"made of others \(.*prompt_embeddings.*prune\.remove"):
        prompted.save_pretrained(tmp_path / "prompt")
    assert not (tmp_path / "prompt").exists()
    with pytest.raises(ValueError, match="made of others"):
        prompt.embeddings_for([5, 6])
    optimizer.zero_grad()
    prompted(ids, mask, labels=labels).loss.backward()
    optimizer.step()
    remove = prune.remove if pruned else parametrize.remove_parametrizations
    remove(prompt, "prompt_embeddings")
    prompt.save_pretrained(tmp_path / "prompt")
    loaded = PromptedModel.from_pretrained(model, tmp_path / "prompt", mode=mode)
    assert torch.equal(loaded.prompt.prompt_embeddings, prompt.prompt_embeddings)
    check(loaded, alone(model, prompt.prompt_embeddings.detach()))


@pytest.mark.parametrize("rows", [2, 7])
@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_with_more_or_fewer_rows(mode, rows, tmp_path):
    """As one that grows with each task (Progressive Prompts, Razdaibiedina et al. 2023)."""
    model = causal()
    prompted = PromptedModel(model, M, mode=mode)
    check(prompted, alone(model, prompted.prompt.prompt_embeddings.detach()))
    grown = torch.randn(rows, zoo.D, generator=torch.Generator().manual_seed(3)) / 4
    prompted.prompt.prompt_embeddings = torch.nn.Parameter(grown)
    assert prompted.prompt.length == rows and prompted.prompt.num_prompts is None
    check(prompted, alone(model, grown))
    prompted.save_pretrained(tmp_path)
    assert SoftPrompt.from_pretrained(model, tmp_path).length == rows


class Grown(SoftPrompt):
    """The prompts of tasks before it, frozen, and then its own."""

    def embeddings(self):
        return torch.cat([self.before, super().embeddings()])


class Cut(SoftPrompt):
    def embeddings(self):
        return super().embeddings()[: len(self.before)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [Grown, Cut])
def test_other_embeddings_than_the_parameter(kind, mode, tmp_path):
    model = causal()
    prompt = kind(model, M)
    prompt.register_buffer("before", torch.randn(3, zoo.D, generator=torch.Generator().manual_seed(4)) / 4)
    expected = alone(model, prompt.embeddings().detach())
    check(PromptedModel(model, prompt=prompt, mode=mode), expected)
    for save in (prompt.save_pretrained, lambda _: prompt.embeddings_for([5]), lambda _: prompt.final_prompt()):
        with pytest.raises(ValueError, match=rf"embeddings\(\) of this {kind.__name__} is not SoftPrompt's"):
            save(tmp_path / "prompt")
    assert not (tmp_path / "prompt").exists()
    rows = prompt.embeddings().detach()
    SoftPrompt(model, len(rows), init=rows).save_pretrained(tmp_path / "prompt")
    check(PromptedModel.from_pretrained(model, tmp_path / "prompt", mode=mode), expected)


class Earlier(SoftPrompt):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.earlier = torch.nn.Parameter(torch.randn(3, zoo.D), requires_grad=False)
        self.register_buffer("scale", torch.rand(zoo.D))

    def embeddings(self):
        return torch.cat([self.earlier * self.scale, super().embeddings()])


def frozen(model, **kwargs):
    return SoftPrompt(model, M, init="normal", **kwargs).requires_grad_(False)


def frozen_encoder(model):
    prompt = SoftPrompt(model, M, init="normal", encoder="mlp")
    prompt.encoder.requires_grad_(False)
    return prompt


@pytest.mark.parametrize("make", [lambda model: Earlier(model, M), frozen, frozen_encoder])
def test_frozen_parts_of_a_prompt_are_in_checkpoints(make):
    """They are nowhere else."""
    model = causal()
    one, other = (PromptedModel(model, prompt=make(model)) for _ in range(2))
    ids, mask, _ = batch()
    assert not torch.equal(one(ids, mask).logits, other(ids, mask).logits)
    state = one.state_dict()
    assert state.keys() == {f"prompt.{name}" for name in one.prompt.state_dict()}
    other.load_state_dict(state)
    assert torch.equal(one(ids, mask).logits, other(ids, mask).logits)
    del state["prompt.prompt_embeddings"]
    with pytest.raises(RuntimeError, match=r"Missing key.*prompt\.prompt_embeddings"):
        other.load_state_dict(state)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("mode", ["prepend", "packed"])
def test_fast_p_tuning_with_more_rows(mode, pooling, tmp_path):
    ids, mask = zoo.padded(zoo.texts(), "right")
    rows = torch.randn(7, zoo.D)
    model = zoo.build("BERT")
    settings = {"num_labels": 2, "mode": mode, "pooling": pooling}
    fast, expected = (FastPTuning(model, prompt_length=m, **settings).eval() for m in (M, 7))
    fast.prompt_embeddings = torch.nn.Parameter(rows)
    expected.load_state_dict(fast.state_dict())
    assert torch.allclose(fast(ids, mask), expected(ids, mask), atol=1e-6) and fast.prompt_length == 7
    fast.save_pretrained(tmp_path)
    assert FastPTuning.from_pretrained(tmp_path, model).prompt_length == 7


def replicated(module, monkeypatch):
    """Two copies as torch.nn.DataParallel makes them on two GPUs."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")

    def copies(tensors, devices, detach):
        return [[one.clone() for one in tensors] for _ in devices]

    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copies)
    return replicate.replicate(module, [0, 1])


@pytest.mark.parametrize("mode", ["prepend", "packed"])
def test_data_parallel(mode, monkeypatch):
    with pytest.raises(TypeError, match=r"not for nn\.DataParallel, which transformers' Trainer takes"):
        replicated(PromptedModel(causal(), M, mode=mode), monkeypatch)
    fast = FastPTuning(zoo.build("BERT"), prompt_length=M, num_labels=2, mode=mode, pooling="cls").eval()
    ids, mask = zoo.padded(zoo.texts(), "right")
    parameters = [fast.prompt_embeddings, fast.classifier.weight]
    found = torch.cat([one(ids[at::2], mask[at::2]) for at, one in enumerate(replicated(fast, monkeypatch))])
    expected = torch.cat([fast(ids[at::2], mask[at::2]) for at in range(2)])
    assert torch.allclose(found, expected, atol=1e-6)
    gradients = [torch.autograd.grad(one.square().sum(), parameters) for one in (found, expected)]
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(*gradients))
