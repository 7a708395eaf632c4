"""PromptedModel with the libraries that people train with: Trainer, TRL, PEFT, bitsandbytes, pipelines."""

import json
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from transformers import Trainer, TrainerCallback, TrainingArguments, pipeline
from transformers.trainer_utils import set_seed

from ptuning_fast import FastPTuning, PromptedModel, SoftPrompt, trained_only

pytestmark = pytest.mark.usefixtures("torch_backend")
TEXTS = [zoo.texts([n])[0] for n in (4, 11, 3, 17, 9, 6, 13, 8, 5, 7, 12, 10)]


def same(actual, expected, tolerance=zoo.TOLERANCE):
    return (actual - expected).abs().max() <= 10 * tolerance * expected.abs().max()


class Curve(TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def collate(rows):
    ids, mask = zoo.padded([torch.tensor(row["input_ids"]) for row in rows], "right")
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


# Two batches of two texts a step, by AdamW; its losses are logged.
STEPS = {"learning_rate": 0.05, "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 0.0}
STEPS |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1, "report_to": "none"}
STEPS |= {"disable_tqdm": True, "use_cpu": True}


def plain_loop(prompt, batches, steps):
    """The losses of the same steps by hand: the sum over all labels of two batches, over their number."""
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=STEPS["learning_rate"], weight_decay=0.0)
    losses = []
    for step in range(steps):
        micro = [
            {key: one[key] for key in one if torch.is_tensor(one[key])} for one in batches[2 * step : 2 * step + 2]
        ]
        for one in micro:
            one["labels"] = one["labels"].clone()
            one["labels"][:, :1] = -100  # no model's loss counts it
        count = sum(int((one["labels"] != -100).sum()) for one in micro)
        total = 0.0
        for one in micro:
            loss = prompt.model(**prompt(**one)).loss * (one["labels"] != -100).sum() / count
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def trainer(model, folder, **options):
    settings = STEPS | {"max_steps": 6, "save_strategy": "no", "seed": 5}
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
    set_seed(5)
    batches = list(trainer(prompted_causal(), tmp_path)[0].get_train_dataloader())
    losses = plain_loop(SoftPrompt(causal(), 3, init=start()), batches, 6)
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
    with pytest.raises(FileNotFoundError, match="it is a Trainer's checkpoint"):
        PromptedModel.from_pretrained(zoo.build("Llama"), weights.parent)
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


@pytest.mark.parametrize(
    ("padding_free", "checkpointing", "whole"),
    [(False, False, False), (True, False, False), (False, True, False), (True, True, False), (False, False, True)],
)
def test_sft_trainer(tmp_path, tokenizer, padding_free, checkpointing, whole):
    """TRL's loss is that of a plain loop: no text has a label on its first token, which TRL leaves out."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    lines = [line for line in Path(__file__).read_text().splitlines() if len(line) > 30][:24]
    rows = [{"text": line} if whole else {"prompt": line[:20], "completion": line[20:]} for line in lines]

    def built():
        model = zoo.build("Llama", vocab_size=len(tokenizer), tie_word_embeddings=True)
        return PromptedModel(model, 3, init=start())

    curve = Curve()
    settings = STEPS | {"max_steps": 5, "save_steps": 5, "bf16": False}
    settings |= {"gradient_checkpointing": checkpointing, "padding_free": padding_free, "max_length": None}
    args = trl.SFTConfig(str(tmp_path), **settings)
    data = Dataset.from_list(rows)
    run = trl.SFTTrainer(built(), args, train_dataset=data, processing_class=tokenizer, callbacks=[curve])
    batches = list(run.get_train_dataloader())
    run.train()
    assert (tmp_path / "checkpoint-5" / "model.safetensors").stat().st_size < 2000

    losses = plain_loop(built().prompt, batches, 5)
    torch.testing.assert_close(torch.tensor(curve.losses), torch.tensor(losses), rtol=1e-4, atol=1e-4)


def test_others_losses_are_over_the_labels_that_they_count(tmp_path):
    """Trainer's count is of `labels[:, 1:]`; and without virtual tokens all is as without a prompt."""
    curves = {}
    for name, module, options in (
        ("plain", causal(), {}),
        ("no prompt", PromptedModel(causal(), length=0), {}),
        ("smoothed", causal(), {"label_smoothing_factor": 0.1}),
        ("smoothed, no prompt", PromptedModel(causal(), length=0), {"label_smoothing_factor": 0.1}),
    ):
        run, curves[name] = trainer(module.requires_grad_(False), tmp_path, max_steps=1, **options)
        next(iter(module.parameters())).requires_grad_(True)  # something to differentiate by
        run.train()
    assert curves["plain"].losses == pytest.approx(curves["no prompt"].losses, abs=1e-4)
    assert curves["smoothed"].losses == pytest.approx(curves["smoothed, no prompt"].losses, abs=1e-4)


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
    assert curve.losses[-1] < curve.losses[0] - 0.3
    assert list(prompted.state_dict()) == ["prompt.prompt_embeddings"]
