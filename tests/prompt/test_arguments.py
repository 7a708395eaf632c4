"""Arguments of a model that a prompt moves: right behind it, or refused; and what is set on the wrapper."""

import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
import zoo
from transformers import Trainer, TrainingArguments

from ptuning_fast import PromptedModel, SoftPrompt

pytestmark = pytest.mark.usefixtures("torch_backend")


def batch(side="right"):
    ids, mask = zoo.padded(zoo.texts(), side)
    return ids, mask, ids.masked_fill(mask == 0, -100)


def test_trainer_drops_no_column_that_the_model_takes(tmp_path):
    """It goes by the names that a forward has."""
    t5 = PromptedModel(zoo.build("T5"), 3, mode="prepend")
    rows = [
        {"input_ids": ids, "labels": torch.ones(3).long(), "decoder_input_ids": torch.tensor([0, 5, 6]), "other": 1}
        for ids in zoo.texts([4, 4])
    ]
    options = TrainingArguments(str(tmp_path), report_to="none", per_device_eval_batch_size=2)
    trainer = Trainer(t5, options, eval_dataset=rows)
    found = trainer.evaluate()["eval_loss"]
    given = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels", "decoder_input_ids")}
    assert found == pytest.approx(t5.eval()(**given).loss.item(), abs=1e-6)
    assert trainer._signature_columns is not None and "other" not in trainer._signature_columns
    ids, mask, labels = batch()
    llama = PromptedModel(zoo.build("Llama"), 3).eval()
    assert llama.forward.__func__ is PromptedModel.forward and llama.forward.__self__ is llama
    again = pickle.loads(pickle.dumps(llama))
    assert torch.equal(again(ids, mask, labels=labels).logits, llama(ids, mask, labels=labels).logits)


def test_labels_on_padding_that_somebody_counted():
    ids, mask, labels = batch()
    prompted = PromptedModel(zoo.build("Llama"), 3)
    prompted(ids, mask, labels=labels, num_items_in_batch=20)
    with pytest.raises(ValueError, match="num_items_in_batch counts them: give -100"):
        prompted(ids, mask, labels=ids, num_items_in_batch=20)


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_one_per_row_is_not_packed(training, more):
    """Cross-attention to states of each row, of which there may be as many as columns of the text."""
    model = zoo.build("GPT-2", add_cross_attention=True, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    prompted = PromptedModel(model, 3).train(training)
    ids, mask, _ = batch()
    states = torch.randn(len(ids), ids.shape[1] + more, zoo.D)
    out = prompted(ids, mask, encoder_hidden_states=states)
    expected = model(**prompted.prompt(ids, mask), encoder_hidden_states=states).logits[:, 3:]
    assert zoo.same(out.logits[mask != 0], expected[mask != 0])
    with pytest.raises(TypeError, match="states of each row"):
        prompted.prompt(ids, mask, mode="packed")


def test_a_decoders_answers_are_in_its_own_columns():
    """BART's logits for questions are the decoder's, which has no prompt."""
    model = zoo.build("BART", "BartForQuestionAnswering")
    prompted = PromptedModel(model, 3).eval()
    ids, mask, _ = batch()
    places = {"start_positions": torch.tensor([1, 0, 1, 0]), "end_positions": torch.tensor([1, 1, 1, 0])}
    own = {"decoder_input_ids": ids[:, :2].clamp(min=5)}
    loss = prompted(ids, mask, **own, **places).loss
    assert zoo.same(loss, model(**prompted.prompt(ids, mask), **own, **places).loss)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mm_token_type_ids", torch.zeros(4, 7).long()),
        ("entity_position_ids", torch.zeros(4, 2, 3).long()),
        ("cls_index", torch.zeros(4).long()),
        ("lengths", torch.full((4,), 7)),
        ("image_text_alignment", torch.zeros(4, 3, 2).long()),
    ],
)
def test_columns_that_a_prompt_moves_are_refused(name, value):
    ids, mask, _ = batch()
    value = value if name != "mm_token_type_ids" else torch.zeros_like(ids)
    with pytest.raises(ValueError, match=f"{name} is of columns that a prompt moves"):
        PromptedModel(zoo.build("Llama"), 3)(ids, mask, **{name: value})


class Answers(transformers.BertForQuestionAnswering):
    """A loss that leaves out -100, as torch's own does; and columns that arguments of its own count."""

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, start_positions=None, e1=None, topic_labels=None
    ):
        out = super().forward(input_ids, attention_mask, inputs_embeds=inputs_embeds)
        if start_positions is not None:
            out["loss"] = torch.nn.functional.cross_entropy(out.start_logits, start_positions)
        return out


def test_no_answer_stays_none_where_a_loss_is_ones_own():
    ids, starts = torch.stack(zoo.texts([6, 6])), torch.tensor([2, -100])
    torch.manual_seed(0)
    model = Answers(zoo.build("BERT").config).eval()
    prompted = PromptedModel(model, 3, mode="prepend").eval()
    logits = model(**prompted.prompt(ids)).start_logits
    expected = torch.nn.functional.cross_entropy(logits[:1], starts[:1] + 3)
    assert zoo.same(prompted(ids, start_positions=starts).loss, expected)


def test_columns_that_an_argument_of_ones_own_may_count_are_warned_of():
    """Not what is a label, and nothing that transformers' own classes take."""
    ids, places = torch.stack(zoo.texts([6, 6])), torch.tensor([2, 1])
    prompted = PromptedModel(Answers(zoo.build("BERT").config), 3).eval()
    with pytest.warns(
        UserWarning, match="e1 is handed on as it is: where it counts columns of the text, add the prompt's 3"
    ):
        prompted(ids, e1=places)
    t5 = PromptedModel(zoo.build("T5"), 3).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        prompted(ids, topic_labels=places, start_positions=places)
        t5(ids, decoder_input_ids=ids[:, :2])


def test_other_ways_past_the_prompt_are_refused():
    prompted = PromptedModel(zoo.build("Llama"), 3)
    ids, mask, _ = batch()
    with pytest.raises(TypeError, match=r"mode goes with PromptedModel\(model, mode=...\)"):
        prompted(ids, mask, mode="packed")
    with pytest.raises(TypeError, match="unknown arguments: num_items_in_batch: a Trainer takes a PromptedModel"):
        prompted.prompt(ids, mask, num_items_in_batch=3)
    for name in ("mems", "state", "cache_params", "past_key_values"):
        with pytest.raises(ValueError, match=f"{name} misses the prompt"):
            prompted(ids, mask, **{name: [1]})
    with pytest.raises(ValueError, match="inputs_embeds go past the prompt"):
        prompted(ids, mask, inputs_embeds=torch.zeros(4, 7, zoo.D))
    with pytest.raises(ValueError, match="return_dict=False"):
        prompted(ids, mask, return_dict=False)


def test_images_with_positions_of_their_own_are_refused():
    """Qwen2-VL finds an image's rows and columns by the ids of its tokens."""
    prompted = PromptedModel(zoo.qwen2_vl(), 3)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert prompted(ids).logits.shape == (1, 4, 99)
    image = {"pixel_values": torch.zeros(4, 96), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    for call in (prompted, prompted.generate, prompted.prompt.generate):
        with pytest.raises(ValueError, match=r"Qwen2VL.* finds the positions of images in the input_ids"):
            call(ids, **image)
    stop = {"eos_token_id": torch.tensor([3]), "max_new_tokens": 2, "pad_token_id": 0}
    assert prompted.eval().generate(ids, torch.ones_like(ids), **stop).shape[1] > 4


TEXT = {"vocab_size": zoo.V, "hidden_size": zoo.D, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
TEXT |= {"initializer_range": 0.2, "max_position_embeddings": 600}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}
GREEDY = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


def llava():
    config = transformers.LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=TOWER | {"model_type": "clip_vision_model", "image_size": 16, "projection_dim": 32},
        image_token_index=3,
        vision_feature_layer=-1,
    )
    ids = torch.tensor([[20, *[3] * 4, 30, 31], [3, 3, 3, 3, 40, 41, 42]])
    return transformers.LlavaForConditionalGeneration(config), ids, {"pixel_values": torch.randn(2, 3, 16, 16)}


def gemma4():
    config = transformers.Gemma4Config(
        text_config=TEXT
        | {"global_head_dim": 8, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "sliding_window": 64},
        vision_config=TOWER | {"num_key_value_heads": 4, "head_dim": 8, "pooling_kernel_size": 2},
        audio_config=None,
        **{"image_token_id": 3, "video_token_id": 4, "audio_token_id": 5},
    )
    ids = torch.tensor([[20, *[3] * 4, 30, 31]])
    patches = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
    image = {"pixel_values": torch.rand(1, 16, 192), "image_position_ids": patches}
    return transformers.Gemma4ForConditionalGeneration(config), ids, image


def test_a_model_that_writes_into_its_embeddings_is_tried_with_copies_of_them():
    """GIT adds positions to what it is given: once in a call, the first one with images among them."""
    ids, mask = zoo.padded(zoo.texts([6, 6]), "right")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": zoo.V}
    config = transformers.GitConfig(vision_config=TOWER | {"image_size": 16}, **sizes)
    torch.manual_seed(0)
    model = transformers.GitForCausalLM(config).eval().requires_grad_(False)
    rows = model.get_input_embeddings().weight[5:8].clone()
    expected = model(**SoftPrompt(model, 3, init=rows)(ids, mask), pixel_values=images).logits
    prompted = PromptedModel(model, 3, init=rows).eval()
    for _ in range(2):
        assert zoo.same(prompted(ids, mask, pixel_values=images).logits, expected)


def test_states_of_an_encoder_that_has_not_seen_the_prompt_are_refused():
    """They would go past it, in a call and in generate, where texts are of one length."""
    (ids, mask), start = zoo.padded(zoo.texts([6, 6]), "right"), torch.tensor([[0, 5, 6]] * 2)
    prompted = PromptedModel(zoo.build("T5"), 3).eval()
    given = prompted.prompt(ids, mask)
    states = prompted.get_encoder()(**given)
    expected = prompted(ids, mask, decoder_input_ids=start).logits
    assert zoo.same(prompted(ids, mask, decoder_input_ids=start, encoder_outputs=states).logits, expected)
    new = prompted.generate(ids, mask, max_new_tokens=3)
    assert torch.equal(prompted.generate(ids, mask, max_new_tokens=3, encoder_outputs=states), new)
    states = prompted.get_encoder()(input_ids=ids, attention_mask=mask)
    for call in (prompted, prompted.generate, prompted.prompt.generate):
        more = {"decoder_input_ids": start} if call is prompted else {}
        with pytest.raises(
            ValueError, match=r"encoder_outputs have 6 columns, and 3 virtual tokens and 6 tokens are 9"
        ):
            call(ids, mask, encoder_outputs=states, **more)


@pytest.mark.parametrize("width", [3, 6])
def test_labels_that_seq2seq_trainer_hands_to_generate(width):
    ids, mask = zoo.padded(zoo.texts([6, 6]), "right")
    prompted = PromptedModel(zoo.build("T5"), 3).eval()
    new = prompted.generate(ids, mask, max_new_tokens=3)
    assert torch.equal(prompted.generate(ids, mask, labels=torch.ones(2, width).long(), max_new_tokens=3), new)


@pytest.mark.parametrize("made", [llava, gemma4])
def test_images_behind_a_prompt(made):
    """As behind tokens that have the prompt's rows; positions of an image's patches are none of columns."""
    torch.manual_seed(0)
    model, ids, image = made()
    model.eval().requires_grad_(False)
    first = torch.arange(90, 94)
    prompted = PromptedModel(model, 4, init=model.get_input_embeddings()(first).float()).eval()
    full, mask = torch.cat([first.expand(len(ids), -1), ids], 1), torch.ones_like(ids)
    expected = model(full, attention_mask=torch.ones_like(full), **image).logits[:, 4:]
    assert zoo.same(prompted(ids, mask, **image).logits, expected)
    assert not zoo.same(prompted(ids, mask, **image | {"pixel_values": 1 - image["pixel_values"]}).logits, expected)
    found = prompted.generate(ids, mask, **image, **GREEDY)
    assert torch.equal(found, model.generate(full, attention_mask=torch.ones_like(full), **image, **GREEDY)[:, 4:])
    types = (ids == 3).long()
    for call in (prompted, prompted.generate, prompted.prompt.generate):
        with pytest.raises(ValueError, match="mm_token_type_ids is of columns that a prompt moves"):
            call(ids, mask, **image, mm_token_type_ids=types)


def test_audio_that_is_read_with_ids_alone_is_refused(monkeypatch):
    """Voxtral leaves it out, without a word, where it is given embeddings."""
    audio = {"num_mel_bins": 16, "max_source_positions": 32} | {one: TOWER[one] for one in TOWER if one != "patch_size"}
    audio |= {"intermediate_size": 128}  # four frames of 32
    config = transformers.VoxtralConfig(
        text_config=TEXT | {"model_type": "llama"}, audio_config=audio, audio_token_id=5
    )
    model = transformers.VoxtralForConditionalGeneration(config)
    prompted = PromptedModel(model, 4)
    ids, sound = torch.tensor([[20, *[5] * 8, 30, 31]]), {"input_features": torch.randn(1, 16, 64)}
    prompted.eval()
    assert prompted(ids).logits.shape == (1, 11, zoo.V)
    assert not zoo.same(model(ids, **sound).logits, model(ids, input_features=-sound["input_features"]).logits)
    for call in (prompted, prompted.generate, prompted.prompt.generate, prompted.base_model):
        with pytest.raises(ValueError, match=r"Voxtral.* reads input_features only where it is given input_ids"):
            call(ids, torch.ones_like(ids), **sound)
    # What the model itself says of them with ids is said of them.
    with pytest.raises(ValueError, match="Audio features and audio tokens do not match"):
        prompted(ids.repeat(2, 1), input_features=sound["input_features"])

    # A call that fails for another reason tells nothing of the next.
    def fails(*_):
        raise torch.OutOfMemoryError("simulated")

    hook = model.get_output_embeddings().register_forward_pre_hook(fails)
    with pytest.raises(torch.OutOfMemoryError):
        prompted(ids, **sound)
    hook.remove()
    with pytest.raises(ValueError, match="it would change nothing"):
        prompted(ids, **sound)
    with monkeypatch.context() as compiling:  # which falls back to a call that is not compiled
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        with pytest.raises(ValueError, match=r"call it with input_features once without torch\.compile"):
            prompted(ids, **sound)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(ValueError, match="it would change nothing"), torch.autocast("cpu", torch.bfloat16):
        prompted.train()(ids, labels=ids, **sound)
    assert model.training and all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


class OwnLoss(transformers.LlamaForCausalLM):
    """The mean of the texts' means."""

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, position_ids=None, labels=None, **more):
        rows = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        out = super().forward(input_ids, **rows, **more)
        if labels is not None:
            losses = torch.nn.functional.cross_entropy(out.logits[:, :-1].mT, labels[:, 1:], reduction="none")
            out.loss = (losses.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()
        return out


def test_a_loss_that_a_class_computes_by_itself():
    torch.manual_seed(0)
    model = OwnLoss(zoo.build("Llama").config).eval()
    ids, mask, labels = batch()
    prompt = SoftPrompt(model, 3)
    expected = model(**prompt(ids, mask, labels=labels)).loss
    assert zoo.same(prompt.loss(ids, mask, labels=labels), expected)
    assert zoo.same(PromptedModel(model, 3, prompt=prompt)(ids, mask, labels=labels).loss, expected)


BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "is_decoder": True}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "dropout": 0.0}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("name", "settings", "more"),
    [
        ("BartForCausalLM", BART | {"is_encoder_decoder": False}, {}),
        ("XLNetLMHeadModel", XLNET, {}),
        ("BertForPreTraining", BERT, {"next_sentence_label": torch.tensor([0, 1])}),
    ],
)
def test_a_loss_that_is_not_shifted_counts_first_labels(name, settings, more):
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(vocab_size=zoo.V, pad_token_id=0, **settings)).eval()
    prompted = PromptedModel(model, 3, mode="prepend").eval()
    ids = torch.stack(zoo.texts([6, 6]))
    embeds = torch.cat([prompted.prompt.embeddings().expand(2, -1, -1), model.get_input_embeddings()(ids)], 1)
    labels = torch.cat([torch.full((2, 3), -100), ids], 1)
    expected = model(inputs_embeds=embeds, labels=labels, **more).loss
    assert zoo.same(prompted(ids, labels=ids, **more).loss, expected)
    without_first = torch.cat([torch.full((2, 4), -100), ids[:, 1:]], 1)
    assert not zoo.same(model(inputs_embeds=embeds, labels=without_first, **more).loss, expected)


def test_a_forward_that_somebody_has_replaced():
    model = zoo.build("Llama")
    prompt, (ids, mask, labels) = SoftPrompt(model, 3), batch()
    prompt.loss(ids, mask, labels=labels)  # what was found out then is not true any more
    plain = model.forward
    model.forward = lambda **inputs: transformers.utils.ModelOutput(loss=plain(**inputs).logits[0, -1].logsumexp(-1))
    assert zoo.same(prompt.loss(ids, mask, labels=labels), model(**prompt(ids, mask, labels=labels)).loss)


def test_a_hook_that_comes_later():
    model = zoo.build("Llama")
    prompt, (ids, mask, labels) = SoftPrompt(model, 3), batch()
    labels[:, :2] = -100
    prompt.loss(ids, mask, labels=labels)

    def more(module, given, out):
        out.loss = out.loss + out.logits.square().mean()

    model.register_forward_hook(more)
    assert zoo.same(
        prompt.loss(ids, mask, labels=labels, mode="prepend"), model(**prompt(ids, mask, labels=labels)).loss
    )


def test_lengths_without_a_mask():
    model = zoo.build("BERT", "BertForMaskedLM")
    prompt, (ids, mask, labels) = SoftPrompt(model, 3), batch()
    with pytest.raises(ValueError, match="no attention_mask says where it is"):
        prompt.loss(ids, labels=labels, lengths=mask.sum(1))


@pytest.mark.filterwarnings("ignore:.*peft_config.*:UserWarning")
def test_an_adapter_around_it_freezes_the_prompt():
    peft = pytest.importorskip("peft")
    ids, mask, labels = batch()
    prompted = PromptedModel(zoo.build("Llama"), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompted.train()(ids, mask, labels=labels)
    adapted = peft.get_peft_model(prompted, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match=r"the prompt is frozen.*PromptedModel\(get_peft_model\(model"):
        adapted.train()(input_ids=ids, attention_mask=mask, labels=labels)


def test_another_model():
    prompted = PromptedModel(zoo.build("Llama"), 3)
    with pytest.raises(ValueError, match="for the model that it was made with"):
        prompted.model = zoo.build("Llama")


@pytest.mark.parametrize("how", ["target_modules", "modules_to_save"])
def test_an_adapter_on_the_embeddings_is_trained(how):
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    options = {"target_modules": ["q_proj"]} | {how: ["embed_tokens"]}
    model = peft.get_peft_model(zoo.build("Llama"), peft.LoraConfig(r=2, **options))
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the embedding is called
        prompted = PromptedModel(model, 3)
        assert sum(parameter.requires_grad for parameter in prompted.parameters()) == trained + 1
        prompted(*batch()[:2], labels=batch()[2]).loss.backward()


def test_lengths_of_generate_count_the_input():
    model = zoo.build("Llama", eos_token_id=None)
    prompted = PromptedModel(model, 3).eval()
    ids, mask, _ = batch("left")
    n = ids.shape[1]
    for options in ({"max_length": n + 2}, {"min_length": n + 6, "max_length": n + 6}):
        assert prompted.generate(ids, mask, **options).shape[1] == max(options.values())
        assert prompted.generate(ids, mask, generation_config=transformers.GenerationConfig(**options)).shape[1] == max(
            options.values()
        )
    prompted.generation_config = transformers.GenerationConfig(max_length=n + 3)
    assert model.generation_config.max_length == n + 3, "what is the model's is set on the model"
    assert prompted.generate(ids, mask).shape[1] == n + 3
    model.generation_config.eos_token_id = list(range(5, 90))
    assert prompted.generate(ids, mask, min_length=n + 2).shape[1] == n + 3
    with pytest.raises(ValueError, match="max_length is 2, and there are"):
        prompted.generate(ids, mask, max_length=2)


def test_lengths_of_the_models_config_beside_one_of_the_callers():
    model = zoo.build("Llama")
    prompted, ids = PromptedModel(model, 3).eval(), torch.stack(zoo.texts([5]))
    for own, given, columns in (({"max_length": 12}, {}, 12), ({"max_length": 12}, {"max_length": 9}, 9)):
        vars(model.generation_config).update(own)
        config = transformers.GenerationConfig(do_sample=False, eos_token_id=None, **given)
        assert prompted.generate(ids, generation_config=config).shape == (1, columns)
        assert model.generate(ids, generation_config=config).shape == (1, columns)


def test_a_loss_function_set_on_the_wrapper_is_the_models():
    prompted = PromptedModel(zoo.build("Llama"), 3).eval()
    ids, mask, labels = batch()
    prompted.loss_function = lambda **_: torch.tensor(7.0)
    assert prompted(ids, mask, labels=labels).loss.item() == 7
    prompted.mode = "prepend"
    assert "mode" not in vars(prompted.model)


def test_a_model_that_was_packed_is_unpickled_elsewhere(tmp_path):
    prompted = PromptedModel(zoo.build("Llama"), 3, mode="packed").eval()
    ids, mask, _ = batch()
    torch.save((prompted, (ids, mask), prompted(ids, mask).logits), tmp_path / "model")
    code = "import sys, torch; m, given, expected = torch.load(sys.argv[1], weights_only=False)\n"
    code += "assert torch.allclose(m(*given).logits, expected, atol=1e-5)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=True)
