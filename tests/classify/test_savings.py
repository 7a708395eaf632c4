"""Half precision, and all savings together: loss curves, dropout, files, refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
import zoo
from savings import FULL, base, build, logits_and_gradients, seen_in
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModel, AutoTokenizer

from ptuning_fast import FastPTuning
from ptuning_fast.attention import varlen
from ptuning_fast.reference import ReferencePTuning
from ptuning_fast.texts.docstrings import stdlib_docstrings

pytestmark = pytest.mark.usefixtures("torch_backend", "no_dropout")


@pytest.mark.parametrize("mode", ["prepend", "packed"])
@pytest.mark.parametrize("name", ["BERT", "DistilBERT", "GPT-2", "Llama"])
def test_half_precision_is_autocasts(name, mode):
    """Linear layers stored in bf16 give the bits that autocast's casts of fp32 weights give."""
    options = {"mode": mode, "prune": False}
    half, whole = build(name, precision="bf16", **options), build(name, **options)
    linears = [module for module in half.bert.modules() if isinstance(module, torch.nn.Linear)]
    assert all(module.weight.dtype == torch.bfloat16 for module in linears)
    assert half.prompt_embeddings.dtype == half.classifier.weight.dtype == torch.float32
    ids, mask = zoo.padded(zoo.texts(sorted(zoo.TEXTS)), "right")  # in the order in which they are packed
    with torch.autocast("cpu", torch.bfloat16):
        seen = seen_in(whole, ids, mask)
    assert torch.equal(seen_in(half, ids, mask)["hidden"], seen["hidden"])
    gradient = logits_and_gradients(half, ids, mask)[1]
    logits = F.linear(seen["pooled"].float(), whole.classifier.weight, whole.classifier.bias)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    (expected,) = torch.autograd.grad((logits * weight).sum(), whole.prompt_embeddings)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(
    "options", [{"mode": "packed"}, {"prune": True}, {"prune": True, "additive_mask": True}], ids=str
)
@pytest.mark.parametrize("name", FULL[:5])
def test_half_precision_with_the_other_savings(name, options):
    """All together are as far from fp32 as autocast by itself is, times three."""
    ids, mask = zoo.padded(zoo.texts(), "right")
    truth = logits_and_gradients(build(name), ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        plain = logits_and_gradients(build(name), ids, mask)
    together = build(name, precision="bf16", **options)
    assert together.prune
    for one, other, exact in zip(logits_and_gradients(together, ids, mask), plain, truth):
        assert (one - exact).abs().max() <= 3 * (other - exact).abs().max()


def test_loss_curves(minilm):
    """Real weights, real text, the reference padded: the same losses, step by step, with all exact savings at once."""
    encoder = AutoModel.from_pretrained(minilm, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    texts, labels = stdlib_docstrings()
    names = sorted(set(labels))
    losses = []
    for mode in ("reference", "packed"):
        torch.manual_seed(0)
        if mode == "reference":
            module = ReferencePTuning(encoder, 8, len(names)).train()
        else:
            module = FastPTuning(encoder, 8, len(names), mode="packed").train()
            assert module.prune
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=5e-3)
        losses.append([])
        for step in range(6):
            rows = range(step * 97, step * 97 + 64, 8)
            batch = tokenizer(
                [texts[row] for row in rows], padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            logits = module(batch["input_ids"], batch["attention_mask"])
            loss = F.cross_entropy(logits, torch.tensor([names.index(labels[row]) for row in rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][0] != losses[0][-1]
    # Roundings of another order, through six steps of AdamW, which divides by the size of a gradient.
    assert max(abs(one - other) for one, other in zip(*losses)) < 1e-4


def test_dropout(monkeypatch):
    """The attention's own dropout is handed on in training, and is off in eval mode."""
    monkeypatch.undo()  # with dropout, as built
    seen = []

    def recorded(*args):
        seen.append(args[-1].dropout)
        return by_length(*args)

    by_length = varlen.by_length
    monkeypatch.setattr(varlen, "by_length", recorded)
    fast = FastPTuning(zoo.build("BERT", attention_probs_dropout_prob=0.25), 3, 2, mode="packed", prune=False).train()
    ids, mask = zoo.padded(zoo.texts(), "right")
    seen.clear()  # of the probe
    fast(ids, mask)
    assert seen == [0.25] * 3
    seen.clear()
    fast.eval()(ids, mask)
    assert seen == [0.0] * 3


def test_refusals():
    for name in ("DeBERTa-v2", "MPNet", "Bloom"):
        with pytest.raises(TypeError, match=r"computes its attention by itself.*mode='prepend'"):
            build(name, mode="packed", pooling="mean")
    with pytest.raises(TypeError, match="mode='prepend'"):
        FastPTuning(zoo.build("T5", "T5EncoderModel"), 3, mode="packed", pooling="mean")
    with pytest.raises(ValueError, match="one row at least"):
        FastPTuning(base("BERT"), 0, mode="packed")
    with pytest.raises(ValueError, match="precision must be None, 'bf16' or 'fp16'; it is 'int8'"):
        FastPTuning(base("BERT"), 3, precision="int8")
    with pytest.raises(ValueError, match=r"is in torch.bfloat16, and precision='fp16' is for one in fp32: load"):
        FastPTuning(base("BERT").to(torch.bfloat16), 3, precision="fp16")


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("how", ["transformers", "torch"])
def test_gradient_checkpointing_of_packed_batches(how, prune):
    """By the model itself, or by torch's wrapper around its layers: the same logits and gradients, bit by bit."""
    plain, fast = (build("BERT", mode="packed", prune=prune) for _ in range(2))
    if how == "transformers":
        fast.gradient_checkpointing_enable()
    else:
        layers = fast.bert.encoder.layer
        for place, layer in enumerate(layers):
            layers[place] = checkpoint_wrapper(layer)
    ids, mask = zoo.padded(zoo.texts(), "right")
    for one, other in zip(logits_and_gradients(fast, ids, mask), logits_and_gradients(plain, ids, mask)):
        assert torch.equal(one, other)


def test_files_and_copies(tmp_path):
    fast = build("BERT", mode="packed").eval()
    ids, mask = zoo.padded(zoo.texts(), "right")
    fast.save_pretrained(tmp_path)
    loaded = FastPTuning.from_pretrained(tmp_path, base("BERT"))
    assert (loaded.mode, loaded.prune) == ("packed", True)
    assert torch.equal(loaded(ids, mask), fast(ids, mask))
    assert torch.equal(copy.deepcopy(fast)(ids, mask), fast(ids, mask))
    assert "mode='packed', prune=True, additive_mask=False, precision=None" in repr(fast)
