"""Mode "shared": one prompt for all texts of a batch, without padding; the same loss and gradient."""

from itertools import pairwise

import pytest
import sweep
import torch
import zoo
from torch.nn.attention import SDPBackend, sdpa_kernel

from ptuning_fast import SoftPrompt

KINDS = ["gpt2", "opt", "llama", "qwen2", "qwen3", "mistral", "phi", "gemma", "gemma2", "gemma3_text", "olmo2"]
KINDS += ["gpt_neox", "mixtral"]
CLASSES = sweep.model_types()
LENGTHS = [4, 11, 1, 17, 40]  # beyond the sliding windows of 16


def build(kind, attention="sdpa"):
    model = sweep.build(kind, CLASSES[kind], "eager" if kind == "gemma2" else attention)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.train()


def batches(side):
    for lengths in (LENGTHS, [8, 8, 3]):
        ids, mask = zoo.padded(zoo.texts(lengths), side)
        yield ids, mask, ids.masked_fill(mask == 0, -100)


def accumulated(model, prompt, side, mode):
    """The loss and the gradient over two batches, as gradient accumulation sums them."""
    prompt.zero_grad()
    count = sum((labels != -100).sum() for _, _, labels in batches(side))
    losses = []
    for ids, mask, labels in batches(side):
        loss = model(**prompt(ids, mask, labels=labels, mode=mode), num_items_in_batch=count).loss
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses), prompt.prompt_embeddings.grad.clone()


def assert_equal(actual, expected):
    for one, other in zip(actual, expected):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize(("length", "side"), [(1, "right"), (zoo.M, "left"), (20, "right")])  # 20: beyond the windows
@pytest.mark.parametrize("kind", KINDS)
def test_same_as_prepend(kind, side, length, torch_backend):
    model = build(kind)
    prompt = SoftPrompt(model, length)
    expected = accumulated(model, prompt, side, "prepend")
    assert_equal(accumulated(model, prompt, side, "shared"), expected)
    assert expected[1].abs().max() > 1e-4  # of a gradient, not of nothing


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_bit(kind, reentrant, torch_backend):
    model = build(kind)
    prompt = SoftPrompt(model, zoo.M)
    expected = accumulated(model, prompt, "right", "shared")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    actual = accumulated(model, prompt, "right", "shared")
    assert all(torch.equal(one, other) for one, other in zip(actual, expected))


@pytest.mark.parametrize("kind", ["gpt2", "opt"])  # others compute norms or softmax in fp32 whatever they are given
def test_double_precision(kind, torch_backend):
    model = build(kind).double()
    prompt = SoftPrompt(model, zoo.M).double()
    weight, found = None, []
    ids, mask, _ = next(batches("left"))
    for mode in ("prepend", "shared"):
        inputs = prompt(ids, mask, mode=mode)
        rows = model(**inputs).logits
        if mode == "prepend":
            texts = rows[:, zoo.M :][mask != 0]
        else:
            ends = inputs["cu_seq_lens_q"].tolist()
            texts = torch.cat([rows[0, start + 1 : end] for start, end in pairwise(ends[1:])])
        weight = torch.randn_like(texts) if weight is None else weight
        found.append((texts, *torch.autograd.grad((texts * weight).sum(), prompt.prompt_embeddings)))
    for one, other in zip(*found):
        assert (one - other).abs().max() <= 1e-9 * other.abs().max()


def test_rows_are_those_of_the_texts_and_of_one_prompt(torch_backend):
    model = build("llama")
    prompt = SoftPrompt(model, zoo.M)
    ids, mask, labels = next(batches("left"))
    inputs = prompt(ids, mask, labels=labels, mode="shared")
    T, prefix = zoo.M - 1 + sum(1 + n for n in LENGTHS), zoo.M - 1
    assert inputs["inputs_embeds"].shape == (1, T, model.config.hidden_size)
    ends = torch.tensor([0, prefix] + [1 + n for n in LENGTHS])
    assert inputs["cu_seq_lens_q"].tolist() == [0, prefix, *(prefix + ends[2:].cumsum(0)).tolist()]
    assert inputs["labels"][0, :prefix].eq(-100).all() and (inputs["labels"] != -100).sum() == sum(LENGTHS)
    assert torch.equal(inputs["inputs_embeds"][0, :prefix], prompt.prompt_embeddings[:-1])
    assert inputs["position_ids"][0, : prefix + 1 + LENGTHS[0]].tolist() == list(range(prefix + 1 + LENGTHS[0]))


@pytest.mark.parametrize("m", [0, 1, 2, zoo.M])
def test_where_the_texts_are(m, torch_backend):
    """The last B + 1 ends are the texts', also of a prompt that has nothing to share."""
    model = build("llama")
    prompt = SoftPrompt(model, m)
    ids, mask, _ = next(batches("right"))
    inputs = prompt(ids, mask, mode="shared")
    ends = inputs["cu_seq_lens_q"].tolist()
    assert len(ends) == len(ids) + 1 + (m > 1)
    rows, columns = model(**inputs).logits[0], model(**prompt(ids, mask)).logits[:, m:]
    for text, (start, end) in zip(range(len(ids)), pairwise(ends[-len(ids) - 1 :])):
        expected = columns[text, mask[text] != 0]
        assert (rows[start + min(m, 1) : end] - expected).abs().max() <= zoo.TOLERANCE * expected.abs().max()


def test_refusals(torch_backend):
    ids, mask = zoo.padded(zoo.texts(), "right")
    for name, reason in (("BERT", "is not causal"), ("ModernBERT", "is not causal"), ("T5", "one per token")):
        with pytest.raises(TypeError, match=reason):
            SoftPrompt(zoo.build(name), 3)(ids, mask, mode="shared")
    with pytest.raises(TypeError, match="computes its attention by itself"):
        SoftPrompt(zoo.build("Bloom"), 3)(ids, mask, mode="shared")
    with pytest.raises(ValueError, match="has dropout"):
        SoftPrompt(zoo.build("GPT-2").train(), 3)(ids, mask, mode="shared")
    bank = SoftPrompt(zoo.build("Llama"), 3, num_prompts=2)
    with pytest.raises(ValueError, match="different prompts"):
        bank(ids, mask, prompt_index=torch.tensor([0, 1, 1, 0]), mode="shared")
    mixture = sweep.build("mixtral", CLASSES["mixtral"], "sdpa")
    mixture.config.output_router_logits = True
    with pytest.raises(ValueError, match="routers' choices"):
        SoftPrompt(mixture, 3)(ids, mask, mode="shared")


def test_a_second_derivative_is_refused(torch_backend):
    model = build("llama")
    prompt = SoftPrompt(model, zoo.M)
    ids, mask, labels = next(batches("right"))
    loss = model(**prompt(ids, mask, labels=labels, mode="shared")).loss
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, prompt.prompt_embeddings, create_graph=True)
    with sdpa_kernel(SDPBackend.MATH):  # as torch's own attention, it can be told to do without flash
        loss = model(**prompt(ids, mask, labels=labels, mode="shared")).loss
        (gradient,) = torch.autograd.grad(loss, prompt.prompt_embeddings, create_graph=True)
        gradient.sum().backward()
    assert prompt.prompt_embeddings.grad.isfinite().all()
