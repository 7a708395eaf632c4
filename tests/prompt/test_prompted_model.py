"""PromptedModel: called as the model is, and what it writes and leaves alone."""

import copy
import pickle
import warnings

import pytest
import sweep
import torch
import transformers
import zoo
from transformers.trainer_pt_utils import LabelSmoother

from ptuning_fast import FastPTuning, PromptedModel, SoftPrompt, trained_only

pytestmark = pytest.mark.usefixtures("torch_backend")
CLASSES = sweep.model_types()


def same(actual, expected, tolerance=zoo.TOLERANCE):
    return (actual - expected).abs().max() <= 10 * tolerance * expected.abs().max()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mode", ["prepend", "packed", "shared", "auto"])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "OPT", "Gemma 2", "Mistral"])
def test_it_is_called_as_the_model_is(name, mode, side):
    """Logits of the tokens, column by column, without the prompt's; the loss alone in training."""
    model = zoo.build(name)
    prompted = PromptedModel(model, zoo.M, mode=mode).eval()
    ids, mask = zoo.padded(zoo.texts(), side)
    labels = ids.masked_fill(mask == 0, -100)
    out = prompted(input_ids=ids, attention_mask=mask, labels=labels)
    assert out.logits.shape == (*ids.shape, zoo.V)
    for row, text in enumerate(zoo.texts()):
        expected = zoo.by_hand(model, prompted.prompt.prompt_embeddings, text)[zoo.M :]
        assert same(out.logits[row][mask[row] != 0], expected)
    hidden = prompted.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert same(hidden[mask != 0], _hidden(model, prompted.prompt, ids, mask))
    counted = labels.clone()
    counted[:, :1] = -100  # which the model's own loss leaves out, too
    assert same(out.loss, prompted.prompt.loss(ids, mask, labels=counted, mode=mode))
    for module in model.modules():
        module.training = False
    prompted.training = True  # without the model's dropout
    in_training = prompted(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=7)
    assert in_training.logits is None
    count = int((counted != -100).sum())
    assert same(in_training.loss, out.loss * count / 7)


@pytest.mark.parametrize("mode", ["prepend", "packed"])
def test_token_types_without_the_head(mode):
    prompted = PromptedModel(zoo.build("BERT"), zoo.M, mode=mode).eval()
    ids, mask = zoo.padded(zoo.texts(), "right")
    types = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    rows, expected = (one(**inputs).last_hidden_state[mask != 0] for one in (prompted.base_model, prompted))
    assert same(rows, expected) and not same(rows, prompted(ids, mask).last_hidden_state[mask != 0])


def _hidden(model, prompt, ids, mask):
    inputs = prompt(ids, mask)
    return model.base_model(**inputs).last_hidden_state[:, prompt.length :][mask != 0]


@pytest.mark.parametrize("mode", ["prepend", "packed", "shared"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_loss_that_is_computed_from_logits_is_the_models(mode, side):
    """As Trainer's label smoothing computes one."""
    ids, mask = zoo.padded(zoo.texts([5, 9, 0]), side)
    labels = ids.masked_fill(mask == 0, -100)
    prompted = PromptedModel(zoo.build("Llama"), 3, mode=mode).eval()
    out = prompted(ids, mask, labels=labels)
    found = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert abs(found - out.loss) < 1e-5
    smoothed = LabelSmoother(epsilon=0.0)(out, labels, shift_labels=True)
    assert abs(smoothed - out.loss) < 1e-5
    weights = prompted.prompt.prompt_embeddings
    gradients = [torch.autograd.grad(one, weights, retain_graph=True)[0] for one in (found, out.loss)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["prepend", "packed", "shared"])
def test_flattened_batches(mode):
    prompted = PromptedModel(zoo.build("Llama"), zoo.M, mode=mode).eval()
    ids, mask = zoo.padded(zoo.texts(), "right")
    kept = mask != 0
    positions = (mask.cumsum(1) - 1)[kept][None]
    out = prompted(input_ids=ids[kept][None], position_ids=positions)
    assert same(out.logits[0], prompted(ids, mask).logits[kept])


def test_hidden_states_and_caches():
    """Each layer's rows are those of the tokens; a cache without the prompt is not gone on from."""
    prompted = PromptedModel(zoo.build("Llama"), zoo.M).eval()
    ids, mask = zoo.padded(zoo.texts(), "right")
    out = prompted(ids, mask, output_hidden_states=True)
    assert len(out.hidden_states) == 4 and all(rows.shape[:2] == ids.shape for rows in out.hidden_states)
    assert same(out.hidden_states[-1][mask != 0], _hidden(prompted.model, prompted.prompt, ids, mask))
    assert out.past_key_values is None
    with pytest.raises(ValueError, match="what goes on from a cache is generate"):
        prompted(ids, mask, past_key_values=transformers.DynamicCache(config=prompted.config))


def test_copies():
    prompted = PromptedModel(zoo.build("Llama"), zoo.M).eval()
    ids, mask = zoo.padded(zoo.texts(), "right")
    for other in (copy.deepcopy(prompted), pickle.loads(pickle.dumps(prompted))):
        assert other.prompt.model is other.model is not prompted.model
        assert torch.equal(other(ids, mask).logits, prompted(ids, mask).logits)
        assert list(other.state_dict()) == ["prompt.prompt_embeddings"]


def test_models_with_other_outputs_than_one_per_token():
    classifier = zoo.build("BERT", "BertForSequenceClassification")
    prompted = PromptedModel(classifier, 3).eval()
    ids, mask = zoo.padded(zoo.texts(), "right")
    out = prompted(ids, mask, labels=torch.tensor([0, 1, 1, 0]))
    assert same(out.logits, classifier(**prompted.prompt(ids, mask)).logits) and out.loss.isfinite()
    assert not prompted.accepts_loss_kwargs and PromptedModel(zoo.build("Llama"), 3).accepts_loss_kwargs
    t5 = PromptedModel(zoo.build("T5"), 3).eval()
    assert t5(ids, mask, labels=ids).logits.shape == (*ids.shape, zoo.V)
    assert t5.generate(ids, mask, max_new_tokens=3).shape[1] <= 4


def test_what_is_frozen_and_what_is_saved(tmp_path):
    model = zoo.build("Llama", tie_word_embeddings=True).requires_grad_(True)
    model.model.norm.weight.requires_grad_(False)  # some architectures come with frozen parameters
    prompted = PromptedModel(model, 3)
    assert list(prompted.state_dict()) == ["prompt.prompt_embeddings"]
    assert [name for name, one in prompted.named_parameters() if one.requires_grad] == ["prompt.prompt_embeddings"]
    before = prompted.prompt.prompt_embeddings.detach().clone()
    state = {name: torch.zeros_like(value) for name, value in prompted.state_dict().items()}
    prompted.load_state_dict(state)
    assert not prompted.prompt.prompt_embeddings.any()
    with pytest.raises(RuntimeError, match=r"Missing key.*prompt_embeddings"):
        prompted.load_state_dict({})
    prompted.load_state_dict({"prompt.prompt_embeddings": before})
    prompted.save_pretrained(tmp_path)
    again = PromptedModel.from_pretrained(model, tmp_path, mode="packed")
    assert torch.equal(again.prompt.prompt_embeddings, before) and again.mode == "packed"
    with pytest.raises(ValueError, match="another model"):
        PromptedModel(zoo.build("Llama"), prompt=again.prompt)
    prompted.requires_grad_(False)  # for a second stage, or a copy
    assert list(prompted.state_dict()) == ["prompt.prompt_embeddings"]


@pytest.mark.parametrize("mode", ["prepend", "packed", "shared", "auto"])
def test_texts_of_no_token(mode):
    ids = torch.empty(2, 0, dtype=torch.long)
    assert PromptedModel(zoo.build("Llama"), 3, mode=mode).eval()(ids, ids).logits.shape == (2, 0, zoo.V)


def test_a_classifiers_head_is_trained_and_saved(tmp_path):
    """As PEFT has it; what else is trained is not in the adapter, which is said."""
    classifier = zoo.build("BERT", "BertForSequenceClassification").requires_grad_(True)
    prompted = PromptedModel(classifier, 3)
    names = ["model.classifier.weight", "model.classifier.bias", "prompt.prompt_embeddings"]
    assert sorted(prompted.state_dict()) == sorted(names)
    torch.nn.init.normal_(classifier.classifier.weight)
    prompted.save_pretrained(tmp_path)
    again = PromptedModel.from_pretrained(zoo.build("BERT", "BertForSequenceClassification"), tmp_path).eval()
    ids, mask = zoo.padded(zoo.texts(), "right")
    assert torch.equal(again(ids, mask).logits, prompted.eval()(ids, mask).logits)
    classifier.bert.encoder.layer[0].output.dense.requires_grad_(True)
    with pytest.warns(UserWarning, match="layer.0.output.dense.weight is trained, too, .*in another folder"):
        prompted.save_pretrained(tmp_path)


def test_a_head_that_no_adapter_keeps(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    for task, expected in (
        (None, "classifier.*not written with the prompt, and with PEFT's adapter only where"),
        ("SEQ_CLS", "lora_A"),
    ):
        settings = peft.LoraConfig(target_modules=["query"], task_type=task)
        model = peft.get_peft_model(zoo.build("BERT", "BertForSequenceClassification"), settings)
        model.get_base_model().classifier.requires_grad_(True)
        if task:
            model.get_base_model().classifier.original_module.requires_grad_(False)
        with pytest.warns(UserWarning, match=expected):
            PromptedModel(model, 3).save_pretrained(tmp_path)


class Toxicity(transformers.BertPreTrainedModel):
    """A head that no name tells."""

    def __init__(self, config):
        super().__init__(config)
        self.bert, self.classifier = transformers.BertModel(config), torch.nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, position_ids=None, labels=None):
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "position_ids": position_ids}
        logits = self.classifier(self.bert(attention_mask=attention_mask, **given).last_hidden_state[:, 0])
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


def test_a_head_of_a_class_of_somebodys_own(tmp_path):
    """Frozen with a warning, and trained once it is not."""
    model = Toxicity(zoo.build("BERT").config).requires_grad_(True)
    with pytest.warns(UserWarning, match=r"classifier.weight of Toxicity is frozen.*requires_grad_\(True\) on it"):
        prompted = PromptedModel(model, 3)
    assert [name for name, one in prompted.named_parameters() if one.requires_grad] == ["prompt.prompt_embeddings"]
    model.get_parameter("classifier.weight").requires_grad_(True)
    ids, mask = zoo.padded(zoo.texts(), "right")
    prompted(ids, mask, labels=torch.zeros(len(ids), dtype=torch.int64)).loss.backward()
    assert model.classifier.weight.grad.any()
    assert sorted(prompted.state_dict()) == ["model.classifier.weight", "prompt.prompt_embeddings"]
    with pytest.warns(UserWarning, match="classifier.weight is trained, too"):
        prompted.save_pretrained(tmp_path)


def test_no_head_is_warned_of_where_none_is_frozen():
    """One that is frozen already, a language model's, and whatever transformers' own classes have."""
    frozen_head = Toxicity(zoo.build("BERT").config).requires_grad_(True)
    frozen_head.classifier.requires_grad_(False)
    causal = type("Own", (transformers.LlamaForCausalLM,), {"__module__": "own"})
    models = [zoo.build("BERT", "BertForMaskedLM").requires_grad_(True), causal(zoo.build("Llama").config), frozen_head]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in models:
            PromptedModel(model, 3)


def test_small_checkpoints_of_a_part():
    """Nothing is said to be there that is missing beside it, and a frozen adapter is saved as it is."""

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.prompted = PromptedModel(zoo.build("Llama"), 3)
            self.value_head = torch.nn.Linear(2, 2)

    both = Both()
    state = both.state_dict()
    assert sorted(state) == ["prompted.prompt.prompt_embeddings", "value_head.bias", "value_head.weight"]
    both.load_state_dict(state)
    del state["value_head.weight"]
    with pytest.raises(RuntimeError, match=r"value_head\.weight"):
        both.load_state_dict(state)


def test_a_frozen_classifier_is_saved_whole(tmp_path):
    fast = trained_only(FastPTuning(zoo.build("BERT"), 3, 2)).requires_grad_(False).eval()
    fast.save_pretrained(tmp_path)
    ids, mask = zoo.padded(zoo.texts(), "right")
    assert torch.equal(FastPTuning.from_pretrained(tmp_path, zoo.build("BERT"))(ids, mask), fast(ids, mask))


def test_arguments_of_the_model_count_in_training():
    """The loss alone is for a language model that is given nothing else."""
    model = zoo.build("Llama")
    prompted = PromptedModel(model, 3).train()
    ids, mask = zoo.padded(zoo.texts(), "right")
    labels = ids.masked_fill(mask == 0, -100)
    assert prompted(ids, mask, labels=labels, output_hidden_states=True).hidden_states is not None
    with pytest.raises(ValueError, match="attn_mask is of columns that a prompt moves"):
        prompted(ids, mask, labels=labels, attn_mask=mask)
    t5 = PromptedModel(zoo.build("T5"), 3)
    own = {"decoder_input_ids": torch.ones_like(ids), "labels": ids}
    for training in (False, True):
        t5.train(training)
        for module in t5.modules():
            module.training = training and module is t5
        assert same(t5(ids, mask, **own).loss, t5.model(**t5.prompt(ids, mask), **own).loss)
    assert t5(ids, mask, **own).logits.shape == (*ids.shape, zoo.V)
    masked = PromptedModel(zoo.build("BERT", "BertForMaskedLM"), 3)
    with pytest.raises(ValueError, match="does not go by num_items_in_batch"):
        masked(ids, mask, labels=labels, num_items_in_batch=7)


@pytest.mark.parametrize("mode", ["prepend", "packed", "shared"])
def test_logits_to_keep_are_those_of_the_last_columns(mode):
    prompted = PromptedModel(zoo.build("Llama"), 3, mode=mode).eval()
    ids, mask = zoo.padded(zoo.texts(), "left")
    whole = prompted(ids, mask).logits
    assert same(prompted(ids, mask, logits_to_keep=2).logits, whole[:, -2:])
    assert same(prompted(ids, mask, logits_to_keep=torch.tensor([3, 5])).logits, whole[:, [3, 5]])


def test_questions_are_answered_in_columns_of_the_text():
    model = zoo.build("BERT", "BertForQuestionAnswering")
    prompted = PromptedModel(model, 3).eval()
    ids, mask = zoo.padded(zoo.texts(), "right")
    starts, ends = torch.tensor([1, 2, 0, 5]), torch.tensor([2, 7, 0, 9])
    out = prompted(ids, mask, start_positions=starts, end_positions=ends)
    assert out.start_logits.shape == ids.shape
    by_hand = model(**prompted.prompt(ids, mask), start_positions=starts + 3, end_positions=ends + 3)
    assert same(out.loss, by_hand.loss) and same(out.end_logits, by_hand.end_logits[:, 3:])
    below = prompted(ids, mask, start_positions=torch.tensor([1, 2, -1, 5]), end_positions=ends)
    assert same(below.loss, out.loss)  # to the model that is column 0


def test_classes_as_many_as_columns():
    """Of a class of somebody's own, which has as many classes as a batch has columns, or a number for each of these."""

    class Own(transformers.LlamaPreTrainedModel):
        def __init__(self, config, of_tokens):
            super().__init__(config)
            self.model = transformers.LlamaModel(config)
            self.head = torch.nn.Linear(config.hidden_size, 1 if of_tokens else 8)
            self.of_tokens = of_tokens
            self.post_init()

        def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None):
            rows = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds).last_hidden_state
            logits = self.head(rows)[..., 0] if self.of_tokens else self.head(rows[:, -1])
            return transformers.modeling_outputs.SequenceClassifierOutput(logits=logits)

    for of_tokens in (False, True):
        prompted = PromptedModel(Own(zoo.build("Llama").config, of_tokens), 3, mode="prepend").eval()
        for n in (4, 5, 6):
            assert prompted(torch.full((2, n), 7)).logits.shape == (2, n if of_tokens else 8)


def test_outputs_of_other_names():
    ids, mask = zoo.padded(zoo.texts(), "right")
    pretraining = PromptedModel(zoo.build("BERT", "BertForPreTraining"), 3).eval()(ids, mask)
    assert pretraining.prediction_logits.shape[:2] == ids.shape and pretraining.seq_relationship_logits.shape == (4, 2)
    electra = PromptedModel(zoo.build("ELECTRA", "ElectraForPreTraining"), 3).eval()(ids, mask)
    assert electra.logits.shape == ids.shape
    classes = PromptedModel(zoo.build("BERT", "BertForSequenceClassification", num_labels=ids.shape[1] + 3), 3).eval()
    assert classes(ids, mask).logits.shape == (4, ids.shape[1] + 3)


def test_what_would_go_past_the_prompt():
    prompted = PromptedModel(zoo.build("Llama"), 3).eval()
    assert not hasattr(prompted, "generate_batch")
    ids, mask = zoo.padded(zoo.texts(), "left")
    assert prompted.generate(ids, mask, max_length=ids.shape[1] + 4).shape[1] == ids.shape[1] + 4
    with pytest.raises(ValueError, match="max_length is 9, and there are 17 columns already"):
        prompted.generate(ids, mask, max_length=9)
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(zoo.build("Llama"), peft.LoraConfig(target_modules=["lm_head"], r=2))
    with pytest.raises(TypeError, match="the head has an adapter"):
        PromptedModel(lora, 3).base_model(ids, mask)
    mixture = sweep.build("mixtral", CLASSES["mixtral"], "sdpa")
    mixture.config.output_router_logits = True
    with pytest.raises(TypeError, match="router_aux_loss_coef=0"):
        PromptedModel(mixture, 3).base_model(ids, mask)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2, "num_return_sequences": 2}, {"return_dict_in_generate": True}]
)
def test_generate_begins_with_the_input(options):
    prompted = PromptedModel(zoo.build("Llama"), 3)
    ids, mask = zoo.padded(zoo.texts(), "left")
    out = prompted.generate(ids, mask, max_new_tokens=4, **options)
    out = out if torch.is_tensor(out) else out.sequences
    new = prompted.prompt.generate(ids, mask, max_new_tokens=4, **options)
    new = new if torch.is_tensor(new) else new.sequences
    assert torch.equal(out[:, ids.shape[1] :], new)
    assert torch.equal(out[:: len(out) // len(ids), : ids.shape[1]], ids)


@pytest.mark.parametrize(
    ("class_name", "sizes", "head"),
    [
        (
            "T5ForQuestionAnswering",
            {"d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
            "qa_outputs",
        ),
        ("XLNetForQuestionAnsweringSimple", {"n_layer": 1, "n_head": 4, "d_inner": 48}, "qa_outputs"),
    ],
)
def test_heads_of_classes_of_other_names_or_with_no_base(class_name, sizes, head, tmp_path):
    kind = getattr(transformers, class_name)
    prompted = PromptedModel(kind(kind.config_class(**sizes, d_model=32, vocab_size=zoo.V)), 3)
    trained = {name for name, one in prompted.named_parameters() if one.requires_grad}
    assert trained == {"prompt.prompt_embeddings", f"model.{head}.weight", f"model.{head}.bias"}
    prompted.save_pretrained(tmp_path)
    again = PromptedModel.from_pretrained(kind(prompted.config), tmp_path)
    assert torch.equal(getattr(again.model, head).weight, getattr(prompted.model, head).weight)


def test_a_loss_of_another_class_is_counted_as_it_counts():
    """Nobody knows whether it leaves first labels out, so Trainer's count has them, and so has the loss."""

    class Other(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, inputs_embeds=None, labels=None, **kwargs):
            return super().forward(input_ids, inputs_embeds=inputs_embeds, labels=labels, **kwargs)

    model = Other(zoo.build("Llama").config)
    model.loss_type = "ForCausalLM"
    assert PromptedModel(model, 3).loss_type is None and PromptedModel(zoo.build("Llama"), 3).loss_type == "ForCausalLM"


@pytest.mark.parametrize(("name", "class_name"), [("Llama", None), ("BERT", "BertForSequenceClassification")])
def test_a_prompt_that_somebody_has_put_into_its_model(tmp_path, name, class_name, torch_backend):
    """So that one optimizer sees both: it is none before the model, no part of its head, and stays what it is."""
    ids, mask = zoo.padded(zoo.texts(), "right")
    model = zoo.build(name, class_name).requires_grad_(True)
    model.prompt, model.mode = SoftPrompt(model, zoo.M), "theirs"
    model.the_best = model.prompt
    prompted = PromptedModel(model, prompt=model.prompt)
    assert prompted.prompt is model.prompt and model.prompt.prompt_embeddings.requires_grad
    expected = prompted(ids, mask).logits
    model.second = SoftPrompt(model, 2)
    PromptedModel(model.requires_grad_(True), prompt=model.prompt)
    assert model.second.prompt_embeddings.requires_grad  # which is trained next
    del model.second
    other = PromptedModel(model, 2, mode="prepend")
    assert other(ids, mask).logits.shape == expected.shape and not torch.equal(other(ids, mask).logits, expected)
    assert (other.mode, model.mode) == ("prepend", "theirs")
    assert torch.equal(prompted(ids, mask).logits, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompted.save_pretrained(tmp_path / "prompt")
        again = PromptedModel.from_pretrained(zoo.build(name, class_name), tmp_path / "prompt")
        with torch.no_grad():
            prompted.prompt.prompt_embeddings.mul_(2)  # in no checkpoint of the model, and none of its weights
        SoftPrompt.from_pretrained(model, tmp_path / "prompt")
    assert torch.equal(again(ids, mask).logits, expected)
