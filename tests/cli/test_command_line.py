"""`python -m ptuning_fast`: training on real files, predicting, and one line for whatever cannot be used."""

import io
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import accelerate
import pytest
import torch
from transformers import AutoModel, AutoTokenizer
from written import write

from ptuning_fast import FastPTuning
from ptuning_fast.cli import tasks, train
from ptuning_fast.cli.main import main, parser
from ptuning_fast.texts import tables
from ptuning_fast.texts.docstrings import PACKAGES, stdlib_docstrings


def test_the_embedded_text():
    texts, labels = stdlib_docstrings()
    assert 1500 < len(texts) == len(labels) < 3000
    assert set(labels) == set(PACKAGES)
    assert min(labels.count(package) for package in PACKAGES) > 100
    assert stdlib_docstrings() == (texts, labels)


def test_train_on_a_file_and_predict(rows, minilm, tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "train.csv", rows, ("review", "stars"))
    folder = tmp_path / "new/adapter"
    columns = ["--text-column", "review", "--label-column", "stars"]
    options = ["--prompt-length", "4", "--epochs", "3", "--batch-size", "8", "--output", str(folder), *columns]
    assert main(["train", "--train-file", file, *options]) == 0
    out, err = capsys.readouterr()
    printed = out.split(f"adapter saved in {folder}")[1]  # said before anything else is done
    assert "48 texts to train on, 12 held out, 2 labels ('asyncio', 'xml'); 0 texts cut to 128 tokens" in out
    assert "warning: 12 held-out texts tell little" in out and out.count("warning") == 1
    assert "held-out accuracy" in printed and "0.500" in printed
    assert "| held-out accuracy | " in (folder / "README.md").read_text()
    assert "the torch.cat reference" not in printed
    assert re.search(r"18/18 \[.*loss=0\.\d", err), "the bar has the loss"
    written = sorted(file.name for file in folder.iterdir())
    assert written == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    accuracy = float(printed.split("held-out accuracy ")[1].split(";")[0])
    assert accuracy > 0.5, "it has learned nothing"

    model = FastPTuning.from_pretrained(folder, minilm)
    texts = [row[0] for row in rows[::7]]
    batch = AutoTokenizer.from_pretrained(minilm)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = [model.id2label[number] for number in model(**batch).argmax(-1).tolist()]
    test_file = write(tmp_path / "test.parquet", [(text,) for text in texts], ("review",))
    predict = ["predict", "--adapter", str(folder)]
    assert main([*predict, "--file", test_file, "--text-column", "review"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == expected and "texts cut" not in printed.err
    (tmp_path / "link.parquet").symlink_to(test_file)
    given = [*predict, "--file", test_file, "--text-column", "review"]
    (tmp_path / "in.txt").write_text("a text\n")
    for change, message in (
        ([*given, "--output", str(tmp_path / "link.parquet")], "link.parquet is the --file that is read: name another"),
        ([*given, "--max-new-tokens", "3"], "--max-new-tokens is for --task lm: leave it out"),
        ([*predict, "--file", test_file], "it has no column 'text'; it has 'review'"),
        ([*predict, "--output", str(tmp_path / "in.txt")], "in.txt is the standard input that is read: name another"),
        ([*predict, "--text-column", "review"], "standard input has no columns: leave --text-column out"),
    ):
        with open(tmp_path / "in.txt") as file, monkeypatch.context() as patch:
            patch.setattr("sys.stdin", file)
            assert main(change) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "in.txt").read_text() == "a text\n"
    assert tables.read_texts(test_file, {"text": "review"}) == texts, "it is as it was"
    lines = "\ufeff" + "".join(f"{' '.join(text.split())}\r\n" for text in texts)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert main(["predict", "--adapter", str(folder), "--scores", "--output", str(tmp_path / "labels.tsv")]) == 0
    lines = [line.split("\t") for line in (tmp_path / "labels.tsv").read_text().splitlines()]
    assert [label for label, _ in lines] == expected
    assert all(0.5 <= float(score) <= 1 for _, score in lines)


@pytest.mark.parametrize("change", [{"model_input_names": ["input_ids"]}, {"padding_side": "left"}])
def test_padding_is_no_text_whatever_the_tokenizer_says(rows, encoder, tmp_path, capsys, change):
    tokenizer = AutoTokenizer.from_pretrained(encoder, **change)
    shutil.copytree(encoder, tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    torch.manual_seed(0)
    model = FastPTuning(tmp_path / "encoder", 3)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "texts.txt").write_text("\n".join(" ".join(text.split()) for text, _ in rows))
    predict = ["predict", "--adapter", str(tmp_path / "adapter"), "--file", str(tmp_path / "texts.txt"), "--scores"]
    printed = []
    for size in ("1", "16"):
        assert main([*predict, "--batch-size", size]) == 0
        printed.append([line.split("\t") for line in capsys.readouterr().out.splitlines()])
    for (label, score), (other, same) in zip(*printed):
        assert label == other and abs(float(score) - float(same)) <= 2e-4
    built, _, tokenizer = tasks.Classify(parser().parse_args(["train", "--model", str(tmp_path / "encoder")])).build()
    assert tokenizer.padding_side == "right" and "attention_mask" in tokenizer.model_input_names


def test_a_model_that_is_a_lora(rows_file, encoder, tmp_path, capsys):
    """transformers loads its base with it, and names the base alone."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    lora = peft.get_peft_model(AutoModel.from_pretrained(encoder), peft.LoraConfig(target_modules=["query"]))
    lora.save_pretrained(tmp_path / "lora")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "lora")
    given = ["train", "--train-file", rows_file, "--model", str(tmp_path / "lora"), "--output", str(tmp_path / "out")]
    assert main(given) == 2
    assert "lora holds an adapter of PEFT's (LoRA), which the prompt would depend on" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("mode", ["packed", "prepend"])
def test_half_precision(rows, tmp_path, capsys, monkeypatch, mode):
    monkeypatch.setattr(train, "_compare_speed", partial(train._compare_speed, steps=1))
    options = [
        "--compare",
        "--precision",
        "bf16",
        "--mode",
        mode,
        "--epochs",
        "1",
        "--batch-size",
        "4",
        "--prompt-length",
        "2",
    ]
    file, folder = write(tmp_path / "train.csv", rows[::6]), str(tmp_path / "a")
    assert main(["train", "--train-file", file, "--output", folder, "--max-length", "8", *options]) == 0
    printed = capsys.readouterr().out
    assert f"mode {mode!r}, both in bf16)" in printed and "adapter saved in" in printed


def test_what_is_worth_a_word(rows, tmp_path, capsys, monkeypatch):
    """Texts that are cut or repeat are counted, labels that look alike are named, and the last loss is said."""
    file = write(tmp_path / "train.csv", [*rows[:10], ("word " * 700, "XML "), *rows[-10:]])
    eval_file = write(tmp_path / "eval.csv", [*rows[8:12], rows[-1]])
    options = ["--epochs", "0.3", "--max-length", "999", "--prompt-length", "8", "--batch-size", "2"]
    files = ["--train-file", file, "--eval-file", eval_file]
    assert main(["train", *files, "--output", str(tmp_path / "a"), *options]) == 0
    out = capsys.readouterr().out
    assert "3 labels ('XML ', 'asyncio', 'xml'); 1 texts cut to 504 tokens" in out
    assert "warning: 3 of 5 held-out texts are also trained on: what is measured of these is memory" in out
    assert "warning: the labels 'XML ' and 'xml' differ in case or spaces alone, and are told apart" in out
    assert any("'x  y' and 'x y' differ" in doubt for doubt in train._doubts([], [], ["x  y", "z", "x y"]))
    first, last = re.search(r"4 steps, loss ([\d.]+) at first and ([\d.]+) in the end", out).groups()
    assert first != last
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"short\n" + b"word " * 700)))
    assert main(["predict", "--adapter", str(tmp_path / "a"), "--batch-size", "1"]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2
    assert printed.err.splitlines()[-1] == "warning: 1 of 2 texts cut to 504 tokens"


def test_many_labels_are_named_in_short():
    task = tasks.Classify(parser().parse_args(["train"]))
    for names, said in (("abcde", "'a', 'b', 'c', 'd', 'e'"), ("fedcba", "'a', 'b', 'c', 'd', 'e', ...")):
        task.check((["a text"] * len(names), list(names)))
        assert task.said() == f", {len(names)} labels ({said})"


def test_values_stay_as_they_are_written(tmp_path):
    """Labels that look like numbers or dates, in each format; lines end where other programs end them."""
    rows = [
        ("2024-01-01T05:00:00+02:00", "007"),
        ("1.10", "NA"),
        ("a\u2028b\x85c\x0cd", "2024-01-01"),
        ("x" * 2**21, "1"),
    ]
    for suffix in (".csv", ".tsv", ".jsonl", ".json", ".parquet"):
        texts, labels = tables.read_labelled(write(tmp_path / f"rows{suffix}", rows), {})
        assert list(zip(texts, labels)) == rows
    (tmp_path / "numbers.jsonl").write_text('{"text": 12345678901234567890, "label": 1.10}\n')
    assert tables.read_labelled(str(tmp_path / "numbers.jsonl"), {}) == (["12345678901234567890"], ["1.10"])
    (tmp_path / "rows.csv").write_bytes(b'\xef\xbb\xbftext,label\r\r\n"a\r\nb ""c""", d \r\n\r\n,e\n')
    assert tables._read(str(tmp_path / "rows.csv"), [("text", "label")], {}) == [
        ("text", ['a\r\nb "c"', ""]),
        ("label", [" d ", "e"]),
    ]
    assert tables.lines_of("\ufeffa\u2028b\r\n\nc\rd\x0ce\n".encode(), "it") == ["a\u2028b", "", "c", "d\x0ce"]
    assert tables.lines_of(b"", "it") == []
    with pytest.raises(tables.InputError, match="standard input: it is not UTF-8"):
        tables.lines_of(b"caf\351\n", "standard input")
    (tmp_path / "rows.json").write_text('\n [{"text": 1.10, "label": "007"}]')
    assert tables.read_labelled(str(tmp_path / "rows.json"), {}) == (["1.10"], ["007"])
    for name in ("rows.xls", "rows.csv.gz"):
        with pytest.raises(tables.InputError, match=r"must end in one of .*\.txt"):
            tables.read_texts(str(tmp_path / name), {})


def test_a_regression(encoder, tmp_path, capsys):
    """The numbers themselves: one label has no probability."""
    model = FastPTuning(encoder, 2, num_labels=1, pooling="mean").eval()
    model.save_pretrained(tmp_path)
    texts = ["a text", "another one"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    with torch.no_grad():
        batch = AutoTokenizer.from_pretrained(encoder)(texts, padding=True, return_tensors="pt")
        expected = model(**batch).flatten().tolist()
    given = ["predict", "--adapter", str(tmp_path), "--file", str(tmp_path / "texts.txt")]
    for change in ([], ["--scores"]):
        assert main([*given, *change]) == 0
        assert list(map(float, capsys.readouterr().out.split("\n")[:-1])) == pytest.approx(expected, rel=1e-5)


def test_a_label_is_one_line(encoder, tmp_path, capsys):
    labels = {0: "a\r\nb", 1: "a\nb", 2: "a\rb", 3: "a\x85b", 4: "a\u2028b"}
    FastPTuning(encoder, 2, num_labels=5, id2label=labels).save_pretrained(tmp_path)
    (tmp_path / "texts.csv").write_text('text\none\n\n"\n"\nthree\n')
    assert main(["predict", "--adapter", str(tmp_path), "--file", str(tmp_path / "texts.csv")]) == 0
    assert capsys.readouterr().out == "a b\n" * 3, "a blank line is no row"


def test_interrupted(monkeypatch, tmp_path, capsys):
    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupt)
    assert main(["train", "--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    (tmp_path / "checkpoints").mkdir()
    assert main(["train", "--output", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted: the same command with --resume goes on\n"


def test_logs_go_where_they_are_wanted(rows_file, encoder, tmp_path, monkeypatch):
    """`--report-to` is the Trainer's: each loss, and what is measured."""
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    logged = []

    class Journal(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            logged.extend(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "journal", Journal)
    options = ["--train-file", rows_file, "--model", encoder, "--output", str(tmp_path), "--report-to", "journal"]
    assert main(["train", *options]) == 0
    assert {"loss", "learning_rate", "grad_norm", "eval_accuracy"} <= set(logged)


def test_as_a_program(tmp_path):
    """The module runs, and a mistake is one line and exit status 2 there too."""
    command = [sys.executable, "-m", "ptuning_fast", "train", "--train-file", "missing.csv"]
    run = subprocess.run(command, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.strip() == "error: missing.csv: there is no such file"


def test_a_batch_that_cannot_be_split(rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(accelerate, "PartialState", lambda cpu: SimpleNamespace(num_processes=3))
    options = ["--train-file", write(tmp_path / "rows.csv", rows), "--output", str(tmp_path / "adapter")]
    assert main(["train", "--batch-size", "8", *options]) == 2
    assert "a batch of 8 texts cannot be split over 3 processes" in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """Folder of a small Llama with a tokenizer of its own, which has no padding token, as decoders' often have none."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("decoder")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(stdlib_docstrings()[0], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    LlamaModel(LlamaConfig(vocab_size=500, **sizes)).save_pretrained(folder)
    return str(folder)


def test_a_decoder(rows, decoder, tmp_path, capsys, monkeypatch):
    """Trained and used like an encoder; its last token is what is classified."""
    file, adapter = write(tmp_path / "rows.csv", rows), str(tmp_path / "adapter")
    assert main(["train", "--train-file", file, "--model", decoder, "--output", adapter]) == 0
    printed = capsys.readouterr().out
    assert "held-out accuracy" in printed
    model = FastPTuning.from_pretrained(adapter)
    assert model.pooling == "last"
    assert type(model.bert).__name__ == "LlamaModel"
    texts = "\n".join(text.replace("\n", " ") for text, _ in rows[:5])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(texts.encode())))
    assert main(["predict", "--adapter", adapter]) == 0
    assert set(capsys.readouterr().out.split()) <= {"asyncio", "xml"}
    options = ["--pooling", "first", "--overwrite"]
    assert main(["train", "--train-file", file, "--model", decoder, "--output", adapter, *options]) == 2
    assert "take 'last' or 'mean'" in capsys.readouterr().err
