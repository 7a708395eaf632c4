"""What a checkpoint of what is trained holds beside trained parameters, and what may be missing from it."""

import pytest
import torch
import zoo
from safetensors.torch import load_file
from torch import nn

from ptuning_fast import FastPTuning, PromptedModel, trained_only

pytestmark = pytest.mark.usefixtures("torch_backend")


def small():
    return trained_only(FastPTuning(zoo.build("BERT"), 3))


@pytest.mark.parametrize("make", [small, lambda: PromptedModel(zoo.build("Llama"), 3)])
def test_twice_is_once(make):
    """What is trained by then stays in it, too."""
    module = make()
    names = set(module.state_dict())
    late = next(name for name, parameter in module.named_parameters() if not parameter.requires_grad)
    module.get_parameter(late).requires_grad_(True)
    assert trained_only(trained_only(module)) is module
    module.requires_grad_(False)
    assert set(module.state_dict()) == {*names, late}
    module.load_state_dict(module.state_dict())


@pytest.mark.parametrize("order", ["before", "behind"])
def test_what_a_module_beside_it_lacks_is_missing(order):
    """By the same names."""
    parts = {"other": zoo.build("BERT", "BertForMaskedLM"), "prompted": small()}
    box = nn.ModuleDict(parts if order == "before" else dict(reversed(parts.items())))
    state = box.state_dict()
    assert box.load_state_dict(state) and any(name.startswith("other.bert.") for name in state)
    with pytest.raises(RuntimeError, match=r"Missing key.*other\.bert\.encoder"):
        box.load_state_dict({name: value for name, value in state.items() if not name.startswith("other.bert.")})


def test_buffers_beside_what_is_trained():
    """A normalisation's running mean."""

    def module():
        whole = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
        whole[2].requires_grad_(False)
        return trained_only(whole)

    one, other = module(), module()
    one(torch.randn(8, 4))
    kept = {"1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert set(one.state_dict()) == kept
    other.load_state_dict(one.state_dict())
    assert torch.equal(other[1].running_mean, one[1].running_mean)


def test_buffers_of_modules_without_parameters():
    """A normalisation without a scale."""

    def module():
        return trained_only(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)))

    one, other = module(), module()
    one(torch.randn(8, 4))
    other.load_state_dict(one.state_dict())
    assert torch.equal(other[1].running_mean, one[1].running_mean)


@pytest.mark.parametrize("kind", ["LoRA", "VeRA"])
def test_frozen_parts_of_an_adapter(kind):
    """LoRA-FA freezes A, which is drawn at random; VeRA has both as buffers."""
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")

    def prompted(seed):
        model = zoo.build("Llama")
        torch.manual_seed(seed)
        config = {"LoRA": peft.LoraConfig, "VeRA": peft.VeraConfig}[kind]
        model = peft.get_peft_model(model, config(r=4, target_modules=["q_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        return PromptedModel(model, length=zoo.M).eval()

    one, other = prompted(1), prompted(2)
    with torch.no_grad():
        for parameter in one.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    other.load_state_dict(one.state_dict())
    ids, mask = zoo.padded(zoo.texts(), "right")
    assert torch.equal(one(ids, mask).logits, other(ids, mask).logits)
    assert all("q_proj" in name or "vera_" in name or name == "prompt.prompt_embeddings" for name in one.state_dict())
    assert not any("base_layer" in name for name in one.state_dict())


@pytest.mark.parametrize("options", [{}, {"is_trainable": True}, {"low_cpu_mem_usage": True}], ids=str)
@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config"])
def test_an_adapter_of_pefts_around_it(tmp_path, method, options):
    """PEFT saves and loads through the state dict, and loads for inference, frozen; second ones, too."""
    peft = pytest.importorskip("peft")
    more = {"feedforward_modules": []} if method == "IA3Config" else {"r": 2}
    settings = getattr(peft, method)(target_modules=["q_proj", "v_proj"], **more)

    def made():
        model = zoo.build("Llama")
        return PromptedModel(model, 3, init=model.get_input_embeddings().weight[5:8].clone()).eval()

    around = peft.get_peft_model(made(), settings).eval()
    with torch.no_grad():
        for one in around.parameters():
            if one.requires_grad:
                one += 0.5
    ids, mask = zoo.padded(zoo.texts(), "right")
    around.save_pretrained(tmp_path / "one")
    again = peft.PeftModel.from_pretrained(made(), tmp_path / "one", **options).eval()
    expected = around(input_ids=ids, attention_mask=mask).logits
    assert not torch.allclose(made()(ids, mask).logits, expected, atol=0.1)
    assert torch.equal(again(input_ids=ids, attention_mask=mask).logits, expected)
    again.requires_grad_(False)
    again.load_adapter(tmp_path / "one", "second")
    again.set_adapter("second")
    assert torch.equal(again(input_ids=ids, attention_mask=mask).logits, expected)
    again.save_pretrained(tmp_path / "two")
    for folder in (tmp_path / "two", tmp_path / "two" / "second"):
        found = load_file(folder / "adapter_model.safetensors")
        assert found and found.keys() == load_file(tmp_path / "one" / "adapter_model.safetensors").keys()
