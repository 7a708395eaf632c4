"""A prompt loaded where the model's weights are others than those that it was saved with is warned of, and no other."""

import copy
import warnings

import pytest
import torch
import transformers
import zoo

from ptuning_fast import FastPTuning, SoftPrompt
from ptuning_fast.files import adapter

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")

pytestmark = pytest.mark.usefixtures("torch_backend")


def warned(load):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load()
    return any("have other numbers" in str(one.message) for one in said)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "T5", "BERT"])
def test_of_one_name(tmp_path, name):
    model = zoo.build(name)
    model.save_pretrained(tmp_path / "model")
    SoftPrompt(model, zoo.M).save_pretrained(tmp_path / "prompt")

    def load(model, **options):
        return warned(lambda: SoftPrompt.from_pretrained(model, tmp_path / "prompt", **options))

    def again(dtype=torch.float32):
        return type(model).from_pretrained(tmp_path / "model", dtype=dtype)

    assert not any(load(again(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert not load(torch.compile(again())) and not load(transformers.AutoModel.from_pretrained(tmp_path / "model"))
    resized = again()
    resized.resize_token_embeddings(zoo.V + 9)
    assert not load(resized)
    for parameter in (other := again()).parameters():
        parameter.data += 0.3 * parameter.abs().mean()
    assert load(other) and not load(other, any_base=True)


@pytest.mark.parametrize("layers", [1, 3, 7])
def test_a_lora_of_some_matrices_that_is_merged(tmp_path, layers):
    """In whatever depth."""
    model = zoo.build("Llama", num_hidden_layers=layers)
    SoftPrompt(model, zoo.M).save_pretrained(tmp_path)
    for kind in ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"):
        config = peft.LoraConfig(target_modules=[kind], init_lora_weights=False)
        merged = peft.get_peft_model(copy.deepcopy(model), config).merge_and_unload()
        assert warned(lambda merged=merged: SoftPrompt.from_pretrained(merged, tmp_path)), kind


@pytest.mark.parametrize(
    "name, part",
    [
        ("Llama", "lm_head.weight"),
        ("Llama", "model.norm.weight"),
        ("Llama", "model.layers.1.mlp.down_proj.weight"),
        ("BERT", "encoder.layer.2.attention.output.LayerNorm.bias"),
        ("GPT-2", "transformer.h.2.attn.c_attn.bias"),
    ],
)
def test_one_part_alone_that_is_trained_since(tmp_path, name, part):
    model = zoo.build(name)
    SoftPrompt(model, zoo.M).save_pretrained(tmp_path)
    other = copy.deepcopy(model)
    assert not warned(lambda: SoftPrompt.from_pretrained(other, tmp_path))
    other.get_parameter(part).data.mul_(1.03).add_(1e-3)
    assert warned(lambda: SoftPrompt.from_pretrained(other, tmp_path))


def test_some_token_embeddings_that_are_trained_since(tmp_path):
    """Those of the tokens that there are texts with, and not one of the table's first rows."""
    model = zoo.build("Llama", vocab_size=5000)
    SoftPrompt(model, zoo.M).save_pretrained(tmp_path)
    rows = torch.randperm(4000, generator=torch.Generator().manual_seed(0))[:400] + 100
    model.get_input_embeddings().weight.data[rows] += 0.05
    assert warned(lambda: SoftPrompt.from_pretrained(model, tmp_path))


def test_a_lora_that_came_since(tmp_path):
    model = zoo.build("Llama")
    SoftPrompt(model, zoo.M).save_pretrained(tmp_path)
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="trained on a model without an adapter of PEFT's"):
        SoftPrompt.from_pretrained(lora, tmp_path)
    with lora.disable_adapter(), warnings.catch_warnings():
        warnings.simplefilter("error")
        SoftPrompt.from_pretrained(lora, tmp_path)
    assert not warned(lambda: SoftPrompt.from_pretrained(lora, tmp_path))
    SoftPrompt(lora, zoo.M).save_pretrained(tmp_path / "behind")
    model.get_parameter("model.layers.1.self_attn.q_proj.base_layer.weight").data.mul_(1.02)
    assert warned(lambda: SoftPrompt.from_pretrained(lora, tmp_path)), "it has another name below a LoRA"
    with lora.disable_adapter(), pytest.warns(UserWarning, match="with an adapter of PEFT's .* has not, or disabled"):
        SoftPrompt.from_pretrained(lora, tmp_path / "behind")


def test_another_lora(tmp_path):
    """Of several the one that is active, whatever it is called."""
    model = zoo.build("Llama")
    lora = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "first"
    )
    lora.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    SoftPrompt(lora, zoo.M).save_pretrained(tmp_path / "prompt")
    lora.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model, tmp_path / "first", adapter_name="anew")
    assert not warned(lambda: SoftPrompt.from_pretrained(again, tmp_path / "prompt"))
    assert not warned(lambda: SoftPrompt.from_pretrained(lora, tmp_path / "prompt"))
    for active in ("second", ["first", "second"]):
        lora.base_model.set_adapter(active)
        assert warned(lambda: SoftPrompt.from_pretrained(lora, tmp_path / "prompt"))
    SoftPrompt(lora, zoo.M).save_pretrained(tmp_path / "both")
    for active in ("first", "second"):
        lora.set_adapter(active)
        assert warned(lambda: SoftPrompt.from_pretrained(lora, tmp_path / "both"))
    lora.base_model.set_adapter(["second", "first"])
    assert not warned(lambda: SoftPrompt.from_pretrained(lora, tmp_path / "both"))
    lora.set_adapter("first")
    lora.merge_adapter()
    assert not warned(lambda: SoftPrompt.from_pretrained(lora, tmp_path / "prompt"))
    model.get_parameter("model.layers.0.self_attn.q_proj.base_layer.weight").data.mul_(1.02)
    assert warned(lambda: SoftPrompt.from_pretrained(again, tmp_path / "prompt")), "what is below the LoRA"


def test_a_head_that_has_a_lora_merged_into_it_is_not_saved(tmp_path):
    """Beside the LoRA it would count twice."""
    zoo.build("BERT").save_pretrained(tmp_path / "model")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "model")
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    prompt = SoftPrompt(lora, zoo.M)
    lora.merge_adapter()
    with pytest.raises(ValueError, match=r"classifier.* has an adapter merged into it for now: call unmerge_adapter"):
        prompt.save_pretrained(tmp_path / "prompt")
    assert not (tmp_path / "prompt").exists()
    lora.unmerge_adapter()
    prompt.save_pretrained(tmp_path / "prompt")


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_a_head_that_a_lora_has_in_the_place_of_a_new_one(tmp_path, task):
    """PEFT keeps the one that was there before, which is drawn anew at each load, and not used."""
    classes = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification"}
    kind = getattr(transformers, f"BertFor{classes.get(task, 'QuestionAnswering')}")
    zoo.build("BERT").save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(task_type=task, target_modules=["query"], init_lora_weights=False)
    lora = peft.get_peft_model(kind.from_pretrained(tmp_path / "model"), config)
    SoftPrompt(lora, zoo.M).save_pretrained(tmp_path / "prompt")
    lora.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "model"), tmp_path / "lora")
    assert not warned(lambda: SoftPrompt.from_pretrained(again, tmp_path / "prompt"))


def test_a_lora_that_is_merged_into_the_encoder(tmp_path):
    """What comes by the name is the encoder without it."""
    zoo.build("BERT").save_pretrained(tmp_path / "model")
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "model")
    lora = peft.get_peft_model(encoder, peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False))
    merged = lora.merge_and_unload()
    FastPTuning(merged, zoo.M).save_pretrained(tmp_path / "adapter")
    assert warned(lambda: FastPTuning.from_pretrained(tmp_path / "adapter"))
    assert not warned(lambda: FastPTuning.from_pretrained(tmp_path / "adapter", merged))


def test_what_goes_with_a_prompt_is_no_other(tmp_path):
    """The LoRA that it was trained behind, which may have been merged since; a classifier's new pooler."""
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    lora = peft.get_peft_model(zoo.build("Llama"), config)
    SoftPrompt(lora, zoo.M).save_pretrained(tmp_path / "behind")
    assert not warned(lambda: SoftPrompt.from_pretrained(lora.merge_and_unload(), tmp_path / "behind"))
    zoo.build("BERT", "BertForMaskedLM").save_pretrained(tmp_path / "model")
    models = [transformers.BertForSequenceClassification.from_pretrained(tmp_path / "model") for _ in range(3)]
    SoftPrompt(models[0], zoo.M).save_pretrained(tmp_path / "classifier")
    assert not warned(lambda: SoftPrompt.from_pretrained(models[1], tmp_path / "classifier"))
    copied = copy.deepcopy(models[0])  # without transformers' marks of what is new
    copied.config._name_or_path = ""  # nor a name that it was loaded by
    SoftPrompt(copied, zoo.M).save_pretrained(tmp_path / "copied")
    assert warned(lambda: SoftPrompt.from_pretrained(models[2], tmp_path / "copied"))
    encoders = [transformers.AutoModel.from_pretrained(tmp_path / "model") for _ in range(2)]
    FastPTuning(encoders[0], zoo.M).save_pretrained(tmp_path / "fast")
    assert not warned(lambda: FastPTuning.from_pretrained(tmp_path / "fast", encoders[1]))


@pytest.mark.parametrize("weights", ["0.5", [0.5], {"layers": 0.5}, {"layers": []}, {"layers": ["0.5"]}])
def test_damaged_numbers(tmp_path, weights):
    model = zoo.build("Llama")
    SoftPrompt(model, zoo.M).save_pretrained(tmp_path)
    tensors, settings = adapter.load(tmp_path)
    adapter.save(tmp_path, tensors, settings | {"weights": weights})
    with pytest.raises(ValueError, match="is damaged: its weights are"):
        SoftPrompt.from_pretrained(model, tmp_path)


def test_a_head_that_came_with_a_lora_that_is_merged(tmp_path):
    """It is the LoRA's, and not one that transformers has just drawn."""
    zoo.build("BERT").save_pretrained(tmp_path / "model")

    def load():
        return transformers.BertForQuestionAnswering.from_pretrained(tmp_path / "model")

    config = peft.LoraConfig(task_type="QUESTION_ANS", target_modules=["query"], init_lora_weights=False)
    lora = peft.get_peft_model(load(), config)
    SoftPrompt(lora, zoo.M).save_pretrained(tmp_path / "prompt")
    lora.save_pretrained(tmp_path / "lora")
    merged = peft.PeftModel.from_pretrained(load(), tmp_path / "lora").merge_and_unload()
    with pytest.warns(UserWarning) as said:
        SoftPrompt.from_pretrained(merged, tmp_path / "prompt")
    ours = [str(one.message) for one in said if "prompt" in str(one.message)]
    assert len(ours) == 1 and "unless it was merged" in ours[0]
