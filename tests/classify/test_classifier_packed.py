"""Mode "packed" of FastPTuning: the same logits and gradients as in mode "prepend"."""

import pytest
import torch
import zoo
from savings import DECODERS, PACKABLE, PRUNABLE, assert_same, build, logits_and_gradients

from ptuning_fast import FastPTuning

pytestmark = pytest.mark.usefixtures("torch_backend", "no_dropout")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["first", "cls", "mean", "last"])
@pytest.mark.parametrize("name", PACKABLE)
def test_packed(name, pooling, side):
    """Against each text alone, in mode "prepend", where there is no padding to be told apart."""
    if name in DECODERS and pooling in ("first", "cls"):
        with pytest.raises(ValueError, match="causal"):
            build(name, pooling=pooling)
        return
    packed, plain = build(name, mode="packed", pooling=pooling), build(name, pooling=pooling)
    ids, mask = zoo.padded(zoo.texts(), side)
    actual = logits_and_gradients(packed, ids, mask)
    logits = torch.cat([plain(text[None]) for text in zoo.texts()])
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    gradients = torch.autograd.grad((logits * weight).sum(), [plain.prompt_embeddings, plain.classifier.weight])
    assert_same(actual, (logits, *gradients))
    assert packed.prune == (name in PRUNABLE and pooling != "mean")


def test_packed_without_a_mask_and_with_types():
    packed, plain = build("BERT", mode="packed"), build("BERT")
    ids = torch.randint(3, zoo.V, (3, 7))
    assert_same([packed(ids)], [plain(ids)])
    types, mask = ids % 2, torch.ones_like(ids)
    assert_same([packed(ids, mask, types)], [plain(ids, mask, types)])
    assert (packed(ids, mask, types) - packed(ids, mask)).abs().max() > 100 * zoo.TOLERANCE
    assert_same([packed(ids[:1], mask[:1])], [plain(ids[:1], mask[:1])])


@pytest.mark.parametrize("mode", ["prepend", "packed"])
def test_shapes_that_do_not_fit(mode):
    """None is cut to the other, though packed texts are sorted by their masks."""
    model, ids, mask = build("BERT", mode=mode), *zoo.padded(zoo.texts(), "right")
    for given in ((ids, mask[:2]), (ids[:2], mask), (ids, mask[:, None].expand(-1, 9, -1)), (ids, mask, ids[:2])):
        with pytest.raises(ValueError, match=r"must be \(.*as input_ids; it is \("):
            model(*given)


@pytest.mark.parametrize("pooling", ["first", "cls", "last", "mean"])
def test_texts_without_tokens(pooling):
    packed = build("BERT", mode="packed", pooling=pooling)
    ids, mask = zoo.padded(zoo.texts(), "right")
    expected = packed(ids, mask)
    mask[2] = 0
    logits = packed(ids, mask)
    assert logits.isfinite().all()
    assert_same([logits[[0, 1, 3]]], [expected[[0, 1, 3]]])


def test_others_can_use_the_encoder_in_between():
    fast = build("BERT", mode="packed")
    ids, mask = zoo.padded(zoo.texts(), "right")
    expected = fast(ids, mask)
    wrong = ids.clone()
    wrong[1, 2] = zoo.V
    with pytest.raises(IndexError, match=r"input_ids\[1, 2\] is 99"):
        fast(wrong, mask)
    assert not fast.bert._forward_pre_hooks
    plain = build("BERT")(ids, mask)
    assert_same([plain], [expected])
    assert torch.equal(fast(ids, mask), expected)


def test_attention_with_more_to_it():
    """Attention sinks and chunks: seen in the call, and in the config."""
    from transformers import GptOssConfig, GptOssModel, Llama4TextConfig, Llama4TextModel

    sizes = {"vocab_size": zoo.V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32, "num_local_experts": 2}
    sinks = GptOssModel(GptOssConfig(**sizes, num_experts_per_tok=1, pad_token_id=0))
    with pytest.raises(TypeError, match=r"asks for attention with s_aux.*mode='prepend'"):
        FastPTuning(sinks, 3, pooling="last", mode="packed")
    assert "ptuning_fast" not in sinks.config._attn_implementation
    chunks = Llama4TextModel(
        Llama4TextConfig(**sizes, attention_chunk_size=4, intermediate_size_mlp=32, pad_token_id=0)
    )
    with pytest.raises(TypeError, match="has layers of chunked_attention"):
        FastPTuning(chunks, 3, pooling="last", mode="packed")


def test_compiled():
    fast = build("BERT", mode="packed").eval()
    ids, mask = zoo.padded(zoo.texts(), "right")
    assert_same([torch.compile(fast, backend="aot_eager")(ids, mask)], [fast(ids, mask)])


@pytest.mark.parametrize("pooling", ["cls", "last"])
@pytest.mark.parametrize("mode", ["prepend", "packed"])
@pytest.mark.parametrize("name", ["BERT", "ModernBERT"])
def test_a_text_without_tokens_is_the_last_row_of_its_prompt(name, mode, pooling):
    """Whatever stands under its padding: the same classes as of the prompt alone."""
    fast = build(name, mode=mode, pooling=pooling)
    ids, mask = zoo.padded(zoo.texts(), "right")
    mask[2] = 0
    alone = fast(ids[2:3, :0], mask[2:3, :0])
    assert_same([fast(ids, mask)[2:3]], [alone])


def test_pooled_attention_of_a_double_precision_encoder():
    """Computed in its own precision, not in fp32."""
    ids, mask = zoo.padded(zoo.texts(), "right")
    whole, pruned = (build("BERT", prune=prune).double() for prune in (False, True))
    assert (pruned(ids, mask) - whole(ids, mask)).abs().max() < 1e-12
