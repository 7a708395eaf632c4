"""Which columns a model counts, and which it reads: where padding stands then matters, or is turned away."""

import dataclasses

import pytest
import sweep
import torch
import transformers
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


@pytest.mark.parametrize("name", ["BERT", "ELECTRA", "DeBERTa-v2", "DistilBERT", "RoBERTa"])
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


class OwnChoice(transformers.BertForMultipleChoice):
    def forward(self, inputs_embeds=None, attention_mask=None, position_ids=None):
        assert inputs_embeds.shape[-1] == self.bert.config.hidden_size
        return super().forward(inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids)


def test_a_class_for_choices_of_ones_own():
    """What it does with positions may not be found out: then it is given none, whatever its forward raises."""
    model = OwnChoice(zoo.build("BERT").config)
    assert "position_ids" not in describe(model).takes
    assert "position_ids" in describe(transformers.BertForMultipleChoice(model.config)).takes


@pytest.mark.parametrize("task", ["QUESTION_ANS", None])
def test_positions_that_what_is_around_a_model_does_not_hand_on(task, torch_backend):
    """PEFT's wrapper for questions has them in its signature alone, so padding on the left would count as text."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    config = peft.LoraConfig(task_type=task, target_modules=["query"], init_lora_weights=False)
    model = peft.get_peft_model(zoo.build("BERT", "BertForQuestionAnswering"), config).eval()
    assert ("position_ids" in describe(model).takes) == (task is None)
    prompt, rows = SoftPrompt(model, 3), zoo.texts([4, 11, 1])
    alone = [model(**prompt(row[None], torch.ones_like(row[None]))).start_logits[0, -len(row) :] for row in rows]
    for side in ("right", "left"):
        ids, mask = zoo.padded(rows, side)
        if task and side == "left":
            with pytest.raises(ValueError, match="counts padding on the left as text"):
                prompt(ids, mask)
            continue
        given = prompt(ids, mask)
        logits = model(**given).start_logits
        there = given["attention_mask"] != 0
        for row, text in enumerate(alone):
            torch.testing.assert_close(logits[row][there[row]][3:], text, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["LoraConfig", "AdaLoraConfig", "IA3Config", "VeraConfig", "LNTuningConfig"])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "FEATURE_EXTRACTION", None])
def test_what_is_around_a_model_hands_on_the_rest(kind, task):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    options = {
        "IA3Config": {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        "LNTuningConfig": {"target_modules": ["input_layernorm"]},
        "AdaLoraConfig": {"target_modules": ["q_proj"], "total_step": 9},
    }.get(kind, {"target_modules": ["q_proj"]})
    model = zoo.build("Llama")
    before = describe(model).takes
    around = peft.get_peft_model(model, getattr(peft, kind)(task_type=task, **options))
    assert describe(around).takes == before and "forward" not in vars(model)
