"""Models that the zoo does not cover are tried out; what cannot be served right is refused or warned of."""

import warnings
from functools import partial

import pytest
import torch
import transformers as hf
import zoo

from ptuning_fast import FastPTuning, PromptedModel, SoftPrompt

SMALL = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}


pytestmark = pytest.mark.usefixtures("torch_backend")


def build(config, kind, **settings):
    torch.manual_seed(0)
    return getattr(hf, kind)(getattr(hf, config)(**SMALL | settings)).eval().requires_grad_(False)


def same(actual, expected):
    return (actual - expected).abs().max() <= 10 * zoo.TOLERANCE * expected.abs().max()


BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
MARIAN = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
MARIAN |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "init_std": 0.3}


def test_positions_that_start_elsewhere():
    """Nystromformer's buffer of positions starts at 2, with no padding_idx to say so."""
    model = build("NystromformerConfig", "NystromformerModel", **BERT, num_landmarks=64, segment_means_seq_len=64)
    ids = torch.arange(3, 11)[None]
    inputs = SoftPrompt(model, 0)(ids, torch.ones_like(ids))
    assert inputs["position_ids"][0, 0] == 2
    assert same(model(**inputs).last_hidden_state, model(input_ids=ids).last_hidden_state)


FSMT = {"langs": ["en", "de"], "src_vocab_size": 99, "tgt_vocab_size": 99, "d_model": 32, "init_std": 0.2}
FSMT |= {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
FSMT |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 2}


@pytest.mark.parametrize(
    ("config", "kind", "settings"),
    [
        ("MarianConfig", "MarianMTModel", MARIAN | {"scale_embedding": True, "decoder_start_token_id": 0}),
        ("FSMTConfig", "FSMTForConditionalGeneration", FSMT),  # in training: its decoder has no causal mask there
        ("EsmConfig", "EsmModel", BERT | {"token_dropout": True, "mask_token_id": 5, "max_position_embeddings": 64}),
    ],
)
def test_embeddings_that_are_not_what_their_ids_become(config, kind, settings):
    model = build(config, kind, **settings)
    ids = torch.arange(6, 12)[None]
    with pytest.raises(TypeError, match=r"makes something else of inputs_embeds than of the input_ids"):
        SoftPrompt(model, 3)(ids, torch.ones_like(ids))


def test_columns_that_are_counted():
    """M2M100's sinusoids are no nn.Embedding, and it cannot be told positions either."""
    model = build("M2M100Config", "M2M100ForConditionalGeneration", **MARIAN, decoder_start_token_id=2)
    ids, mask = zoo.padded(zoo.texts(), "left")
    with pytest.raises(ValueError, match=r"pad on the right"):
        SoftPrompt(model, 3)(ids, mask)
    SoftPrompt(model, 3)(*zoo.padded(zoo.texts(), "right"))


def test_padding_that_leaks():
    """ConvBERT's convolutions run over the padding, with or without a prompt: said once, when it is tried out."""
    model = build("ConvBertConfig", "ConvBertModel", **BERT, embedding_size=32, conv_kernel_size=3, num_groups=1)
    prompt = SoftPrompt(model, 3)
    ids, mask = zoo.padded(zoo.texts(), "right")
    with pytest.warns(UserWarning, match=r"ConvBertModel depend on the padding beside a text"):
        prompt(ids, mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompt(ids, mask)


def test_other_architectures_are_served():
    """Tried out and found right; the model is left as it was, module by module."""
    sizes = BERT | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    model = build("Qwen3Config", "Qwen3ForCausalLM", **sizes).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    prompt, rows = SoftPrompt(model, zoo.M), zoo.texts()
    for mode in ("prepend", "packed", "shared"):
        for side in ("left", "right"):
            ids, mask = zoo.padded(rows, side)
            loss = model(**prompt(ids, mask, labels=ids.masked_fill(mask == 0, -100), mode=mode)).loss
            expected = model(**prompt(ids, mask, labels=ids.masked_fill(mask == 0, -100))).loss
            assert same(loss, expected), (mode, side)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "XLM-R", "ALBERT"])
def test_poolers(name):
    """What reads the first column finds the prompt there, on whichever side the padding is."""
    model, rows = zoo.build(name), zoo.texts()
    prompt = SoftPrompt(model, zoo.M)
    expected = [model(**prompt(text[None], torch.ones(1, len(text)))).pooler_output[0] for text in rows]
    for side in ("left", "right"):
        out = model(**prompt(*zoo.padded(rows, side)))
        for one, other in zip(out.pooler_output, expected):
            assert (one - other).abs().max() <= zoo.TOLERANCE
    with pytest.warns(UserWarning, match="pooler_output of MPNetModel reads the first column"):
        SoftPrompt(zoo.build("MPNet"), zoo.M)(*zoo.padded(rows, "left"))


def test_classes_of_other_names():
    """A user's subclass is what it comes from."""
    rows = zoo.texts()
    for name, kind, side in (("Llama", "LlamaFor", "right"), ("BERT", "BertFor", "left")):
        theirs = getattr(hf, kind + "SequenceClassification")
        model = zoo.build(name, kind + "SequenceClassification", num_labels=3)
        model.__class__ = type("Reward", (theirs,), {})
        prompt = SoftPrompt(model, zoo.M)
        logits = model(**prompt(*zoo.padded(rows, side))).logits
        for row, text in zip(logits, rows):
            assert (row - model(**prompt(text[None], torch.ones(1, len(text)))).logits[0]).abs().max() <= zoo.TOLERANCE
        with pytest.raises(TypeError, match="other outputs than one per token"):
            prompt(*zoo.padded(rows, side), mode="packed")


@pytest.mark.parametrize("mode", ["packed", "shared"])
def test_packed_inputs_are_for_one_forward(mode):
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, zoo.M)
    ids, mask = zoo.padded(zoo.texts(), "left")
    with pytest.raises((ValueError, RuntimeError)):
        model.generate(**prompt(ids, mask, mode=mode), max_new_tokens=2)


def test_models_that_cannot_share():
    ids, mask = zoo.padded(zoo.texts(), "left")
    falcon = build("FalconConfig", "FalconForSequenceClassification", **BERT, num_labels=3, alibi=True)
    neo = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    for model in (
        falcon,
        build("MambaConfig", "MambaForCausalLM", hidden_size=32, num_hidden_layers=2, state_size=4),
        build("GPTNeoConfig", "GPTNeoForCausalLM", **neo, window_size=4),
    ):
        with pytest.raises(TypeError, match="mode='prepend'"):
            SoftPrompt(model, 3)(ids, mask, mode="shared")


def test_a_prompt_before_a_prompt():
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(TypeError, match="prepends a prompt of PEFT's"):
        SoftPrompt(peft.get_peft_model(zoo.build("Llama"), settings), 3)


def test_embeddings_that_return_more_than_rows():
    from transformers import IBertConfig, IBertModel

    sizes = {"vocab_size": zoo.V, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(TypeError, match="QuantEmbedding, returns more than its rows"):
        SoftPrompt(IBertModel(IBertConfig(**sizes, intermediate_size=32)), 2)


@pytest.mark.parametrize("starts", [(3, 0), (0, 5), (2, 2)])
def test_a_flattened_batch_whose_texts_begin_elsewhere(starts):
    """Their positions would be others behind a prompt; one row of a padded batch looks like it."""
    prompt = SoftPrompt(zoo.build("GPT-2"), 2)
    ids = torch.cat(zoo.texts([4, 7]))[None]
    positions = torch.cat([torch.arange(4) + starts[0], torch.arange(7) + starts[1]])[None]
    with pytest.raises(ValueError, match=rf"start at 0 in each sequence; they start at \[{starts[0]}, {starts[1]}\]"):
        prompt(ids, position_ids=positions, mode="packed")


@pytest.mark.parametrize("mode", ["prepend", "packed", "shared", "auto"])
def test_room_in_a_flattened_batch_is_for_each_text(mode):
    """All together they are longer than the positions of the model, or than its rotary positions are steady for."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    ids, starts = torch.cat(zoo.texts([11] * 8))[None], torch.arange(0, 89, 11)
    for model in (zoo.build("GPT-2"), zoo.build("Llama", rope_parameters=rope, max_position_embeddings=64)):
        prompt = SoftPrompt(model.eval(), 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            flat = prompt.loss(ids, labels=ids, mode=mode, cu_seq_lens_q=starts)
        padded = prompt.loss(ids.view(8, 11), labels=ids.view(8, 11), mode="prepend")
        torch.testing.assert_close(flat, padded, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="3 virtual tokens and 88 tokens are 91, and GPT2LMHeadModel has 64"):
        SoftPrompt(zoo.build("GPT-2"), 3)(ids, mode=mode, cu_seq_lens_q=starts[[0, -1]])


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_on_padding_are_none_in_any_mode(side):
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, zoo.M)
    ids, mask = zoo.padded(zoo.texts(), side)
    expected = model(**prompt(ids, mask, labels=ids.masked_fill(mask == 0, -100))).loss
    for mode in ("prepend", "packed", "shared", "auto"):
        assert (prompt.loss(ids, mask, labels=ids.clone(), mode=mode) - expected).abs() <= 1e-5


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mode", ["prepend", "packed", "shared", "auto", "flattened"])
def test_without_virtual_tokens_no_text_predicts_the_next(mode, side):
    """Labels on the first token of each text, which nothing of that text predicts, count in no layout."""
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, 0)
    ids, mask = zoo.padded(zoo.texts(), side)
    labels = ids.masked_fill(mask == 0, -100)
    expected = [model(input_ids=text[None], labels=text[None]).loss * (len(text) - 1) for text in zoo.texts()]
    if mode == "flattened":
        kept = mask != 0
        ends = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        inputs = prompt(ids[kept][None], labels=labels[kept][None], cu_seq_lens_q=ends, mode="packed")
    else:
        inputs = prompt(ids, mask, labels=labels, mode=mode)
    count = int((mask.sum(1) - 1).sum())
    total = torch.stack([loss for loss in expected if loss == loss]).sum()
    assert same(model(**inputs).loss, total / count)


def test_two_accounts_of_where_texts_begin():
    prompt = SoftPrompt(zoo.build("Llama"), 3)
    ids, positions = torch.arange(1, 6)[None], torch.tensor([[0, 1, 2, 0, 1]])
    prompt(ids, position_ids=positions, cu_seq_lens_q=torch.tensor([0, 3, 5]), mode="packed")
    with pytest.raises(ValueError, match=r"start again at \[3\], and cu_seq_lens_q says \[0, 2, 5\]"):
        prompt(ids, position_ids=positions, cu_seq_lens_q=torch.tensor([0, 2, 5]), mode="packed")
    with pytest.raises(ValueError, match="lengths is for padded rows;"):
        prompt(ids, position_ids=positions, lengths=[2, 3], mode="packed")


@pytest.mark.parametrize("mode", ["prepend", "packed", "shared"])
def test_padding_between_tokens_is_warned_of(mode):
    prompt = SoftPrompt(zoo.build("Llama"), 3)
    ids, mask = zoo.padded(zoo.texts(), "left")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompt(ids, mask, mode=mode)
        prompt(ids, mask.flip(1), mode=mode)
    mask[1, -2] = 0
    with pytest.warns(UserWarning, match="padding between the tokens of a row"):
        prompt(ids, mask, mode=mode)


def test_columns_that_a_prompt_would_move():
    with pytest.raises(TypeError, match="mc_token_ids"):
        SoftPrompt(zoo.build("GPT-2", "GPT2DoubleHeadsModel"), 3)


def test_attention_weights_are_not_there_in_a_packed_call():
    model = zoo.build("Llama")
    ids, mask = zoo.padded(zoo.texts(), "right")
    with pytest.raises(TypeError, match="output_attentions"):
        model(**SoftPrompt(model, 3)(ids, mask, mode="packed"), output_attentions=True)


@pytest.mark.parametrize("mode", ["prepend", "packed", "shared", "auto"])
def test_batches_of_nothing_and_labels_of_another_shape(mode):
    prompt = SoftPrompt(zoo.build("Llama"), 3)
    none = torch.zeros(0, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match="input_ids has no rows"):
        prompt(none, torch.ones_like(none), mode=mode)
    ids, mask = zoo.padded(zoo.texts(), "right")
    with pytest.raises(ValueError, match=r"labels must be \[4, 17\], one per token, as input_ids; they are \[4, 3\]"):
        prompt(ids, mask, labels=ids[:, :3], mode=mode)
    with pytest.raises(TypeError, match=r"input_ids must be a torch\.Tensor, not list"):
        prompt(ids.tolist(), mode=mode)


@pytest.mark.parametrize(
    ("class_name", "mode"),
    [
        *(("BertModel", mode) for mode in ("prepend", "packed", "auto")),
        *(("BertForSequenceClassification", mode) for mode in ("prepend", "auto")),
    ],
)
def test_shapes_that_do_not_fit(class_name, mode):
    """None is cut to the size of the others, also where a classifier's padding is moved to the end that it reads."""
    prompt, (ids, mask) = SoftPrompt(zoo.build("BERT", class_name), zoo.M), zoo.padded(zoo.texts(), "left")
    (B, n), types = ids.shape, torch.zeros_like(ids)
    for shape in ((B + 1, n), (B - 1, n), (1, n), (B, n + 1), (B, n - 1), (B, 1), (B, 1, n), (n,)):
        other = torch.ones(shape, dtype=torch.int64)
        for given in ((ids, other, types), (ids, mask, other)):
            with pytest.raises(ValueError, match=r"must be \(.*as input_ids; it is \("):
                prompt(*given, mode=mode)


@pytest.mark.parametrize("mode", ["prepend", "packed", "shared", "auto"])
def test_masks_that_are_added_are_refused(mode):
    """0 is a token there, and padding here."""
    ids, mask = zoo.padded(zoo.texts(), "right")
    added = (1 - mask.float()) * torch.finfo(torch.float32).min
    for call in (partial(SoftPrompt(zoo.build("Llama"), 3), mode=mode), FastPTuning(zoo.build("BERT"), 3)):
        with pytest.raises(ValueError, match="attention_mask has numbers below 0, as one that is added to scores"):
            call(ids, added)
        with pytest.raises(ValueError, match=rf"attention_mask has the number {ids.max()}: .*; ids come first"):
            call(mask, ids)
        for kind in (torch.float32, torch.bool, torch.uint8):
            call(ids, mask.to(kind))


@pytest.mark.parametrize("kind", [SoftPrompt, PromptedModel])
def test_a_prompt_before_a_prompt_of_ours(kind):
    model = zoo.build("Llama")
    prompted = PromptedModel(model, 3)
    with pytest.raises(TypeError, match=r"this PromptedModel prepends a prompt already: give its \.model"):
        kind(prompted, 2)
    assert prompted.prompt.prompt_embeddings.requires_grad


def test_masks_and_labels_that_are_no_tensors():
    ids, mask = zoo.padded(zoo.texts(), "right")
    models = zoo.build("Llama"), zoo.build("BERT", "BertForSequenceClassification")
    for call in (
        *(kind(one, 3) for one in models for kind in (SoftPrompt, PromptedModel)),
        FastPTuning(zoo.build("BERT"), 3),
    ):
        for labels in ([0, 1, 0, 1], ["good"] * 4):
            with pytest.raises(TypeError, match=r"labels must be a torch\.Tensor of numbers, not list"):
                call(ids, mask, labels=labels)
        for other in (mask.tolist(), mask.numpy()):
            with pytest.raises(TypeError, match=r"attention_mask must be a torch\.Tensor"):
                call(ids, other)


def test_lengths_that_are_no_number():
    with pytest.raises(TypeError, match=r"length is the number of virtual tokens, an int; it is a float"):
        SoftPrompt(zoo.build("Llama"), 2.5)


def test_generate_warns_of_padding_at_the_end():
    prompt = SoftPrompt(zoo.build("Llama"), 3)
    ids, mask = zoo.padded(zoo.texts(), "right")
    with pytest.warns(UserWarning, match="padding at the end of a row"):
        prompt.generate(ids, mask, max_new_tokens=1)
