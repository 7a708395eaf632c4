"""Input embeddings that the fused op must not read: they are called, with a warning that says why."""

import warnings

import pytest
import torch
import zoo
from torch import nn

from ptuning_fast import SoftPrompt
from ptuning_fast.models.embedding import unreadable


def assert_called(model, prompt, reason):
    """The output is that of each text by hand, and one warning names the reason."""
    ids, mask = zoo.padded(zoo.texts(), "left")
    with pytest.warns(UserWarning, match=f"is called, not read by the fused kernel: .*{reason}") as caught:
        inputs = prompt(ids, mask, labels=ids)
    assert len([one for one in caught if "fused kernel" in str(one.message)]) == 1
    out = zoo.rows_out(model, {key: value for key, value in inputs.items() if key != "labels"})
    for row, text in enumerate(zoo.texts()):
        alone = zoo.by_hand(model, prompt.prompt_embeddings, text)
        assert (zoo.real_rows(model, out, inputs, row) - alone).abs().max() <= zoo.TOLERANCE
    assert torch.equal(inputs["labels"][:, zoo.M :][mask == 1], ids[mask == 1])
    inputs["inputs_embeds"].sum().backward()
    assert torch.allclose(prompt.prompt_embeddings.grad, torch.full((zoo.M, zoo.D), 4.0))


def test_plain_embeddings_are_read():
    for name in ("BERT", "Llama", "Gemma 3", "BART"):
        assert unreadable(zoo.build(name).get_input_embeddings()) is None
        prompt = SoftPrompt(zoo.build(name), zoo.M)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(fused kernel|gathered).*")
            prompt(*zoo.padded(zoo.texts(), "right"))


def test_forward_hook():
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, zoo.M)
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: 2 * out)
    assert_called(model, prompt, "hooks")


def test_max_norm():
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, zoo.M)
    model.get_input_embeddings().max_norm = 0.5
    assert_called(model, prompt, "max_norm=0.5")


def test_trainable_table():
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, zoo.M)
    model.get_input_embeddings().weight.requires_grad_(True)
    assert_called(model, prompt, "requires grad")
    assert model.get_input_embeddings().weight.grad is not None  # of the tokens: it is being trained, too


def test_trainable_tables_have_the_same_checks():
    """What cannot be used is said as of a frozen table, and the warning says that this one is none."""
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, zoo.M)
    for ids in (torch.tensor([[1, 10**6]]), torch.tensor([[1.0, 2.0]])):
        said = []
        for trainable in (False, True):
            model.requires_grad_(trainable)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with pytest.raises((IndexError, TypeError, ValueError)) as error:
                    prompt(ids)
            said.append((error.type, str(error.value)))
            assert (
                any(
                    "requires grad (freeze the model: model.requires_grad_(False))" in str(one.message)
                    for one in caught
                )
                == trainable
            )
        assert said[0] == said[1]


def test_lora():
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, zoo.M)
    settings = peft.LoraConfig(target_modules=["embed_tokens"], r=2, init_lora_weights=False)
    peft.inject_adapter_in_model(settings, model)
    assert_called(model, prompt, "not a plain nn.Embedding")


class Quantised(nn.Module):
    """An embedding in 8 bits with a scale a row, as quantisation libraries put one in the place of the table."""

    def __init__(self, table):
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.weight.shape
        scale = table.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (table.weight / scale).round().to(torch.int8))

    def forward(self, ids):
        return self.weight[ids] * self.scale[ids]


@pytest.mark.parametrize("when", ["before", "after"])
def test_quantised(when):
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, zoo.M)
    model.set_input_embeddings(Quantised(model.get_input_embeddings()))
    if when == "before":
        prompt = SoftPrompt(model, zoo.M)
        seen = model.get_input_embeddings()(torch.arange(zoo.V))
        assert all((seen == row).all(1).any() for row in prompt.prompt_embeddings)
    assert_called(model, prompt, "not a plain nn.Embedding")


@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded(when):
    """accelerate keeps the weights elsewhere: on the meta device until a hook brings them in."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, zoo.M)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.get_input_embeddings().weight.device.type == "meta"
    if when == "before":
        prompt = SoftPrompt(model, zoo.M)
    assert prompt.prompt_embeddings.device.type == "cpu"
    assert_called(model, prompt, "hooks")


def test_meta_weights():
    """Never materialised: refused by the embedding itself, before anything wrong comes out."""
    model = zoo.build("Llama").to("meta")
    with pytest.warns(UserWarning, match="not on this device"), pytest.raises((RuntimeError, NotImplementedError)):
        SoftPrompt(model, zoo.M, init=torch.zeros(zoo.M, zoo.D))(torch.zeros(1, 3, dtype=torch.int64)).popitem()[
            1
        ].sum().item()


def test_hooks_on_every_module():
    model = zoo.build("Llama")
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 2 if module is model.get_input_embeddings() else None
    )
    try:
        assert_called(model, SoftPrompt(model, zoo.M), "hooks on every module")
    finally:
        handle.remove()


def test_a_class_that_is_only_named_like_a_scaled_one():
    class TheirScaledWordEmbedding(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 3

    model = zoo.build("Llama")
    model.get_input_embeddings().__class__ = TheirScaledWordEmbedding
    assert_called(model, SoftPrompt(model, zoo.M), "not a plain nn.Embedding")
