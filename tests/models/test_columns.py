"""Which columns a model counts, and which it reads: where padding stands then matters, or is turned away."""

import dataclasses

import pytest
import sweep
import torch
import zoo

from ptuning_fast import PromptedModel, SoftPrompt
from ptuning_fast.models import describe
from ptuning_fast.op import Batch

KINDS = sweep.model_types()


@pytest.mark.parametrize(
    ("kind", "settings", "most"),
    [("switch_transformers", {"expert_capacity": 20}, 20), ("llama4_text", {"floor_scale": 21}, 20)],
)
def test_columns_that_are_counted_from_a_length_on(kind, settings, most, torch_backend):
    """By a router that has so many places, or a temperature: up to there padding on the left changes nothing."""
    config = sweep.build(kind, KINDS[kind], "eager").config
    for name, value in (settings | {"no_rope_layers": [0, 0, 0], "layer_types": ["full_attention"] * 3}).items():
        setattr(config, name, value)
    prompt = SoftPrompt(sweep.built(config, KINDS[kind], "eager"), 3)
    ids, mask = zoo.padded(zoo.texts([most - 3, 4]), "left")
    alone, padded = (
        sweep.run(prompt.model, prompt(ids[rows, columns], mask[rows, columns]), len(mask[rows]))
        for rows, columns in ((slice(1, 2), slice(-4, None)), (slice(None), slice(None)))
    )
    torch.testing.assert_close(padded[-1, -4:], alone[-1, -4:], rtol=1e-4, atol=1e-4)
    ids, mask = zoo.padded(zoo.texts([most - 2, 4]), "left")
    with pytest.raises(ValueError, match=f"as text, in rows of more than {most} columns, and cannot be told"):
        prompt(ids, mask)
    prompt(ids.flip(1), mask.flip(1))
    if kind == "llama4_text":
        ids, mask = zoo.padded(zoo.texts([most - 9, 4]), "left")
        prompt.generate(ids, mask, max_new_tokens=6)
        with pytest.raises(ValueError, match=f"as text, in rows of more than {most} columns"):
            prompt.generate(ids, mask, max_new_tokens=7)
        prompt.generate(ids[:1], mask[:1], max_new_tokens=20)
        with pytest.raises(ValueError, match=f"as text, in rows of more than {most} columns"):
            prompt.generate(ids, mask)  # twenty, where nothing is said
        with pytest.raises(TypeError, match="Llama4ForCausalLM counts columns"):
            prompt(ids, mask, mode="packed")


def test_columns_that_are_counted_once_a_batch_is_turned(torch_backend):
    """A classifier of the last token has its padding on the left, wherever it was."""
    info = describe(zoo.build("Llama", "LlamaForSequenceClassification"))
    info = dataclasses.replace(info, counts_columns=20)
    for side in ("right", "left"):
        info.turned(Batch(*zoo.padded(zoo.texts([17, 4]), side)), 3)
        with pytest.raises(ValueError, match="as text, in rows of more than 20 columns"):
            info.turned(Batch(*zoo.padded(zoo.texts([18, 4]), side)), 3)


@pytest.mark.parametrize("name", ["BERT", "ELECTRA", "DeBERTa-v2", "RoBERTa"])
def test_multiple_choice(name, torch_backend):
    """Of choices that stand below each other: the first token is read, wherever the padding is."""
    model = zoo.build(name, type(zoo.build(name)).__name__.replace("Model", "ForMultipleChoice"))
    prompt = SoftPrompt(model, 3)
    found = []
    for side in ("right", "left"):
        inputs = prompt(*zoo.padded(zoo.texts([9, 4, 6, 2]), side))
        found.append(model(**{key: value.unflatten(0, (2, 2)) for key, value in inputs.items()}).logits)
    alone = [
        model(**{key: value[None] for key, value in prompt(text[None], torch.ones_like(text[None])).items()}).logits
        for text in zoo.texts([9, 4, 6, 2])
    ]
    with pytest.raises(ValueError, match=r"shape is \(1, 2, 3\) \(choices, \[B, C, n\], are given below"):
        PromptedModel(model, length=3)(torch.ones(1, 2, 3).long(), torch.ones(1, 2, 3).long())
    for one in found:
        torch.testing.assert_close(one.flatten(), torch.cat(alone).flatten(), rtol=1e-4, atol=1e-5)
