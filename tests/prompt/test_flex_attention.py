"""Models with `attn_implementation="flex_attention"`: as with sdpa, or one error that says what to take."""

import pytest
import torch
import zoo

from ptuning_fast import FastPTuning, SoftPrompt

pytestmark = pytest.mark.usefixtures("torch_backend")


@pytest.fixture(autouse=True)
def uncompiled():
    """transformers compiles flex attention, for a minute where nothing is cached; it computes the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield


def pair():
    """(prompt, model) twice: with sdpa, and with flex attention."""
    found = []
    for implementation in ("sdpa", "flex_attention"):
        model = zoo.build("Llama")
        model.set_attn_implementation(implementation)
        torch.manual_seed(1)
        found.append((SoftPrompt(model, zoo.M), model))
    return found


@torch.no_grad()
@pytest.mark.parametrize("mode", ["prepend", "auto"])
def test_as_with_sdpa(mode):
    (plain_prompt, plain), (prompt, model) = pair()
    ids, mask = zoo.padded(zoo.texts(), "left")
    expected = plain(**plain_prompt(ids, mask)).logits[mask.new_ones(len(ids), zoo.M + ids.shape[1]) != 0]
    logits = model(**prompt(ids, mask, mode=mode)).logits.flatten(0, 1)
    there = prompt(ids, mask)["attention_mask"].flatten() != 0
    assert (logits - expected)[there].abs().max() <= zoo.TOLERANCE
    assert model.config._attn_implementation == "flex_attention"


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a CPU torch has no gradient of it")
def test_no_gradient_on_a_cpu():
    """torch's own error, and no gradient that leaves something out."""
    _, (prompt, model) = pair()
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        model(**prompt(*zoo.padded(zoo.texts(), "right")))


def test_packed_batches_are_refused():
    _, (prompt, model) = pair()
    with pytest.raises(ValueError, match=r"'flex_attention', which packed .* attn_implementation='sdpa'"):
        prompt(*zoo.padded(zoo.texts(), "right"), mode="packed")
    with pytest.raises(ValueError, match=r"'flex_attention', which packed .* attn_implementation='sdpa'"):
        prompt(*zoo.padded(zoo.texts(), "right"), mode="shared")
    encoder = zoo.build("BERT")
    encoder.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"'flex_attention', which packed .* attn_implementation='sdpa'"):
        FastPTuning(encoder, zoo.M, mode="packed")
    assert model.config._attn_implementation == encoder.config._attn_implementation == "flex_attention"
