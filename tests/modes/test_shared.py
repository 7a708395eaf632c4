"""Mode "shared": the prompt through the model once, the same outputs and gradients."""

import pytest
import torch
import zoo

from ptuning_fast import SoftPrompt

CAUSAL = ["GPT-2", "OPT", "Llama", "Qwen2", "Mistral", "Phi", "Gemma", "Gemma 2", "Gemma 3", "Bloom"]


@pytest.mark.parametrize("length", [1, zoo.M, 12])  # 12: longer than the sliding windows
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CAUSAL)
def test_same_as_prepend(name, side, length):
    model, rows = zoo.build(name), zoo.texts()
    prompt = SoftPrompt(model, length)
    ids, mask = zoo.padded(rows, side)
    labels = ids.masked_fill(mask == 0, -100)
    if side == "left" and length > 1 and getattr(model.config, "sliding_window", None):
        with pytest.raises(ValueError, match=r"sliding windows.*pad on the right"):
            prompt(ids, mask, mode="shared")
        return
    results = []
    for mode in ("prepend", "shared"):
        out = model(**prompt(ids, mask, labels=labels, mode=mode))
        (grad,) = torch.autograd.grad(out.loss, prompt.prompt_embeddings)
        results.append((out.logits[:, -ids.shape[1] :][mask == 1], out.loss, grad))
    for actual, expected in zip(*results):
        assert (actual - expected).abs().max() <= zoo.TOLERANCE
    assert results[0][2].abs().max() > 1e-3  # of a gradient, not of nothing


def test_the_prompt_runs_once():
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, zoo.M)
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))
    ids, mask = zoo.padded(zoo.texts(), "left")
    model(**prompt(ids, mask, mode="shared"))
    assert seen[-2:] == [(1, zoo.M - 1), (ids.shape[0], 1 + ids.shape[1])]


def test_bank():
    model = zoo.build("Llama")
    bank = SoftPrompt(model, zoo.M, num_prompts=3)
    ids, mask = zoo.padded(zoo.texts(), "left")
    index = torch.tensor([2, 0, 2, 0])
    expected = model(**bank(ids, mask, prompt_index=index)).logits[:, zoo.M :]
    actual = model(**bank(ids, mask, prompt_index=index, mode="shared")).logits[:, 1:]
    assert (actual - expected)[mask == 1].abs().max() <= zoo.TOLERANCE


def test_classifier():
    model = zoo.build("Llama", "LlamaForSequenceClassification", num_labels=3, pad_token_id=0)
    prompt = SoftPrompt(model, zoo.M)
    rows = zoo.texts()
    for side in ("left", "right"):
        ids, mask = zoo.padded(rows, side)
        expected = model(**prompt(ids, mask)).logits
        assert (model(**prompt(ids, mask, mode="shared")).logits - expected).abs().max() <= zoo.TOLERANCE


def test_refusals():
    ids, mask = zoo.padded(zoo.texts(), "right")
    for name in ("BERT", "ModernBERT", "T5"):
        with pytest.raises(TypeError, match="is not causal"):
            SoftPrompt(zoo.build(name), 3)(ids, mask, mode="shared")
    model = zoo.build("GPT-2").train()
    with pytest.raises(ValueError, match="has dropout"):
        SoftPrompt(model, 3)(ids, mask, mode="shared")
    model = zoo.build("Llama").train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        SoftPrompt(model, 3)(ids, mask, mode="shared")
