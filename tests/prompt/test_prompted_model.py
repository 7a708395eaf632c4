"""PromptedModel: called as the model is, with the libraries that people train with."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import sweep
import torch
import transformers
import zoo
from transformers import Trainer, TrainerCallback, TrainingArguments, pipeline
from transformers.trainer_utils import set_seed

from ptuning_fast import FastPTuning, PromptedModel, SoftPrompt, trained_only

pytestmark = pytest.mark.usefixtures("torch_backend")
CLASSES = sweep.model_types()
TEXTS = [zoo.texts([n])[0] for n in (4, 11, 3, 17, 9, 6, 13, 8, 5, 7, 12, 10)]


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
    assert same(out.loss, prompted.prompt.loss(ids, mask, labels=labels, mode=mode))
    for module in model.modules():
        module.training = False
    prompted.training = True  # without the model's dropout
    in_training = prompted(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=7)
    assert in_training.logits is None
    count = int((labels != -100).sum())
    assert same(in_training.loss, out.loss * count / 7)


def _hidden(model, prompt, ids, mask):
    inputs = prompt(ids, mask)
    return model.base_model(**inputs).last_hidden_state[:, prompt.length :][mask != 0]


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
    with pytest.warns(UserWarning, match="layer.0.output.dense.weight is trained, too, and is not written"):
        prompted.save_pretrained(tmp_path)


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
    with pytest.raises(TypeError, match="attn_mask"):
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
    with pytest.raises(ValueError, match="max_length is 9, and input_ids have 17 columns already"):
        prompted.generate(ids, mask, max_length=9)
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(causal(), peft.LoraConfig(target_modules=["lm_head"], r=2))
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


# With the Trainer.


class Curve(TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def collate(rows):
    ids, mask = zoo.padded([torch.tensor(row["input_ids"]) for row in rows], "right")
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trainer(model, folder, **options):
    settings = {"learning_rate": 0.05, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6, "use_cpu": True}
    settings |= {"logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": 5}
    rows, curve = [{"input_ids": text.tolist()} for text in TEXTS + TEXTS[::-1]], Curve()
    args = TrainingArguments(folder, **settings | options)
    return Trainer(model, args, collate, rows, rows[:4], callbacks=[curve]), curve


def causal(**settings):
    return zoo.build("Llama", tie_word_embeddings=True, **settings)


def start():
    return torch.linspace(-1, 1, 3 * zoo.D).view(3, zoo.D)


def prompted_causal(**settings):
    return PromptedModel(causal(), init=start(), length=3, **settings)


def test_trainer_has_the_curve_of_a_plain_loop(tmp_path):
    """Under gradient accumulation, with a tied model: the sum over all labels, over their number."""
    run, curve = trainer(prompted_causal(), tmp_path)
    run.train()
    prompt = SoftPrompt(causal(), 3, init=start())
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.05, weight_decay=0.0)
    set_seed(5)
    batches = list(trainer(prompted_causal(), tmp_path)[0].get_train_dataloader())
    losses = []
    for step in range(6):
        micro = batches[2 * step : 2 * step + 2]
        count = sum(int((one["labels"] != -100).sum()) for one in micro)
        total = 0.0
        for one in micro:
            out = prompt.model(**prompt(**one))
            loss = out.loss * (one["labels"] != -100).sum() / count
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    assert losses[-1] < losses[0] - 0.1
    torch.testing.assert_close(torch.tensor(curve.losses), torch.tensor(losses), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_trainer_with_gradient_checkpointing(tmp_path, reentrant):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    plain, checkpointed = (trainer(prompted_causal(), tmp_path, **more) for more in ({}, options))
    for run, _ in (plain, checkpointed):
        run.train()
    assert checkpointed[0].model.model.is_gradient_checkpointing
    assert plain[1].losses == checkpointed[1].losses


def test_trainer_resumes_and_loads_the_best(tmp_path):
    whole, curve = trainer(prompted_causal(), tmp_path / "whole")
    whole.train()
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"load_best_model_at_end": True, "save_only_model": False}
    first, first_curve = trainer(prompted_causal(), tmp_path / "run", **options)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    first.add_callback(Stop())
    first.train()
    weights = tmp_path / "run" / "checkpoint-4" / "model.safetensors"
    assert weights.stat().st_size < 2000
    second, second_curve = trainer(prompted_causal(), tmp_path / "run", **options)
    second.train(resume_from_checkpoint=True)
    assert first_curve.losses + second_curve.losses == curve.losses
    best = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())["best_model_checkpoint"]
    state = {"prompt.prompt_embeddings": second.model.prompt.prompt_embeddings.detach()}
    from safetensors.torch import load_file

    assert torch.equal(load_file(Path(best) / "model.safetensors")["prompt.prompt_embeddings"], state.popitem()[1])
    assert second.evaluate()["eval_loss"] > 0


def test_label_smoothing_is_that_of_the_next_token(tmp_path):
    """Trainer's own sum, over all tokens but the first of each text."""
    run, _ = trainer(prompted_causal(), tmp_path, label_smoothing_factor=0.1)
    batch = collate(run.train_dataset[:4])
    run.model.eval()
    logits = run.model(batch["input_ids"], batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.1
    )
    assert same(run.compute_loss(run.model, dict(batch)), expected)


def test_evaluation_gives_logits_in_columns(tmp_path):
    run, _ = trainer(prompted_causal(), tmp_path)
    found = {}

    def metrics(prediction):
        found["shape"] = prediction.predictions.shape, prediction.label_ids.shape
        return {}

    run.compute_metrics = metrics
    run.evaluate()
    assert found["shape"][0][:2] == found["shape"][1] and found["shape"][0][2] == zoo.V


def test_the_drop_in_has_small_checkpoints_too(tmp_path):
    fast = trained_only(FastPTuning(zoo.build("BERT"), 3, 2))
    assert set(fast.state_dict()) == {"prompt_embeddings", "classifier.weight", "classifier.bias"}
    args = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    rows = [{"input_ids": text, "attention_mask": torch.ones_like(text), "labels": 1} for text in zoo.texts([5] * 4)]
    Trainer(fast, args, train_dataset=rows).train()
    assert (tmp_path / "checkpoint-2" / "model.safetensors").stat().st_size < 2000
    again = trained_only(FastPTuning(zoo.build("BERT"), 3, 2))
    Trainer(again, args, train_dataset=rows).train(resume_from_checkpoint=True)
    assert torch.equal(again.prompt_embeddings, fast.prompt_embeddings)


# With other libraries.


def test_text_generation_pipeline(tokenizer):
    model = zoo.build("Llama", vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
    prompted = PromptedModel(model, 3).eval()
    generate = pipeline("text-generation", model=prompted, tokenizer=tokenizer)
    texts = ["import the module", "a class that", "return"]
    found = generate(texts, max_new_tokens=5, do_sample=False, batch_size=3)
    for text, out in zip(texts, found):
        ids = tokenizer([text], return_tensors="pt")
        new = model.generate(**prompted.prompt(ids["input_ids"], ids["attention_mask"]), max_new_tokens=5)
        assert out[0]["generated_text"] == text + tokenizer.decode(new[0], skip_special_tokens=True)


@pytest.fixture
def tokenizer():
    """A byte-level BPE, trained on this file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train([__file__], trainers.BpeTrainer(vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<end>", eos_token="<end>", padding_side="left")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("padding_free", [False, True])
def test_sft_trainer(tmp_path, tokenizer, padding_free, checkpointing):
    """TRL's loss is that of a plain loop: no text has a label on its first token, which TRL leaves out."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    lines = [line for line in Path(__file__).read_text().splitlines() if len(line) > 30][:24]
    rows = [{"prompt": line[:20], "completion": line[20:]} for line in lines]

    def built():
        model = zoo.build("Llama", vocab_size=len(tokenizer), tie_word_embeddings=True)
        return PromptedModel(model, 3, init=start())

    curve = Curve()
    settings = {"learning_rate": 0.05, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 5, "use_cpu": True}
    settings |= {"logging_steps": 1, "report_to": "none", "save_steps": 5, "disable_tqdm": True, "bf16": False}
    settings |= {"gradient_checkpointing": checkpointing, "padding_free": padding_free, "max_length": None}
    args = trl.SFTConfig(str(tmp_path), **settings)
    data = Dataset.from_list(rows)
    run = trl.SFTTrainer(built(), args, train_dataset=data, processing_class=tokenizer, callbacks=[curve])
    batches = list(run.get_train_dataloader())
    run.train()
    assert (tmp_path / "checkpoint-5" / "model.safetensors").stat().st_size < 2000

    prompt = built().prompt
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.05, weight_decay=0.0)
    losses = []
    for step in range(5):
        micro = batches[2 * step : 2 * step + 2]
        count = sum(int((one["labels"] != -100).sum()) for one in micro)
        total = 0.0
        for one in micro:
            given = {key: value for key, value in one.items() if torch.is_tensor(value)}
            loss = prompt.loss(**given, num_items_in_batch=count)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    torch.testing.assert_close(torch.tensor(curve.losses), torch.tensor(losses), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("mode", ["prepend", "packed", "shared"])
def test_with_lora(tmp_path, mode):
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(causal(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    prompted = PromptedModel(lora, 3, init=start(), mode=mode)
    trained = {name.rpartition(".")[2] for name in prompted.state_dict()}
    assert len(prompted.state_dict()) == 1 + 2 * 2 * 3 and "prompt_embeddings" in trained
    run, curve = trainer(prompted, tmp_path)
    run.train()
    assert curve.losses[-1] < curve.losses[0] - 0.1
    assert all(one.grad is None or one.grad.isfinite().all() for one in prompted.parameters())


@pytest.mark.parametrize("bits", [4, 8])
def test_with_quantised_weights(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}  # blocks of 64 weights
    causal(**wide).save_pretrained(tmp_path / "base")
    options = {"quantization_config": transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu", **options)
    prompted = PromptedModel(model, 3)
    run, curve = trainer(prompted, tmp_path)
    run.train()
    assert curve.losses[-1] < curve.losses[0] - 0.1
    assert list(prompted.state_dict()) == ["prompt.prompt_embeddings"]
