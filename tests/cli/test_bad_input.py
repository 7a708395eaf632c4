"""`python -m ptuning_fast` with what cannot be used: one line that says so, and the adapter that was there stays."""

import io
import itertools
import os

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from written import write

from ptuning_fast.cli.main import main
from ptuning_fast.files import adapter


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--train-file", "{tmp}/missing.csv"], "missing.csv: there is no such file"),
        (["--train-file", "{tmp}/rows.csv", "--text-column", "body"], "no column 'body'; it has 'text', 'label'"),
        (["--train-file", "{tmp}/rows.csv", "--label-column", "stars"], "no column 'stars'"),
        (["--train-file", "{tmp}/rows.txt"], "must end in one of .csv"),
        (["--train-file", "{tmp}/nothing.csv"], "nothing.csv is empty"),
        (["--train-file", "{tmp}/header.csv"], "header.csv has no rows"),
        (["--train-file", "{tmp}/one.csv"], "one label only, 'xml'"),
        (["--train-file", "{tmp}/broken.jsonl"], "cannot read"),
        (["--train-file", "{tmp}/null.jsonl"], "row 2 has no value in column 'label'"),
        (["--train-file", "{tmp}/nested.jsonl"], "row 1 of column 'text' holds a list"),
        (["--train-file", "{tmp}/not.parquet"], "is it a whole .parquet file? Write it again"),
        (["--train-file", "{tmp}/two.csv"], "too few texts"),
        (["--train-file", "{tmp}/rows.csv", "--eval-file", "{tmp}/other.csv"], "label 'email' is held out"),
        (["--train-file", "{tmp}/rows.csv", "--model", "{tmp}/nowhere"], "cannot load the model"),
        (["--train-file", "{tmp}/rows.csv", "--prompt-length", "600"], "leaves no room for text"),
        (["--train-file", "{tmp}/rows.csv", "--init", " "], "has no tokens"),
        (["--output", "{tmp}/rows.txt/adapter"], "cannot write to the folder"),
        (["--train-file", "{tmp}/rows.csv", "--label-column", "text"], "cannot both be in the column 'text'"),
        (["--train-file", "{tmp}/twice.csv"], "has 2 columns 'text'"),
        (["--train-file", "{tmp}/blank.csv"], "row 1 is empty in column 'label'"),
        (["--train-file", "{tmp}/bytes.parquet"], "row 1 of column 'text' holds a bytes"),
        (["--train-file", "{tmp}/nan.parquet"], "row 2 has no value in column 'label'"),
        (["--train-file", "{tmp}/latin.jsonl"], "it is not UTF-8 (byte 11); it seems to be Windows-1252"),
        (["--train-file", "{tmp}/excel.csv"], "it is not UTF-8 (byte 0); it seems to be UTF-16"),
        (["--train-file", "{tmp}/german.csv"], "seem to be separated by ';', and a .csv file has ',' there: write it"),
        (
            ["--train-file", "{tmp}/tabs.csv"],
            "seem to be separated by '\\t', and a .csv file has ',' there: name it .tsv",
        ),
        (["--train-file", "{tmp}/array.json"], "item 2 is no JSON object: it is a str"),
        (["--train-file", "{tmp}/scores.csv"], "30 different numbers in column 'label' ('0.0', '0.1', "),
        (
            ["--train-file", "{tmp}/swapped.csv", "--text-column", "label", "--label-column", "text"],
            "different labels in",
        ),
        (["--task", "lm", "--train-file", "{tmp}/rows.csv"], "needs a --model and a --train-file"),
        (
            ["--train-file", "{tmp}/rows.csv", "--completion-column", "x"],
            "--completion-column is for --task lm: leave it",
        ),
        (
            ["--prompt-column", "x", "--completion-column", "y"],
            "--prompt-column and --completion-column are for --task lm",
        ),
        (["--label-column", "stars"], "the embedded text has no columns: leave --label-column out"),
        (
            ["--train-file", "{tmp}/quotes.csv"],
            "line 5: ',' expected after '\"'; in a quoted value, a quote is written",
        ),
        (["--train-file", "{tmp}/short.csv"], "line 3 has 1 fields, and the first has 2"),
        (
            ["--train-file", "{tmp}/rows.csv", "--model", "./nowhere"],
            "(--model names another): there is no such folder",
        ),
        (["--resume"], "there is no training in"),
        (["--train-file", "{tmp}/rows.csv", "--report-to", "nowhere"], "nowhere is not supported"),
        (["--train-file", "{tmp}/rows.csv", "--mode", "shared"], "mode must be one of prepend, packed; it is 'shared'"),
        (["--train-file", "{tmp}/half.jsonl"], "holds half a character"),
        (["--train-file", "{tmp}/deep.jsonl"], "line 1 is no JSON"),
        (["--train-file", "{tmp}/twice.jsonl"], "line 1 has a key twice, and the second would count"),
        (["--train-file", "{tmp}/times.parquet"], "cannot read"),
        (["--train-file", "{tmp}/rows.csv", "--max-length", "2"], "leave no room beside the 2 that the tokenizer adds"),
        (["--train-file", "{tmp}/rows.csv", "--prompt-length", "510"], "leave no room beside the 2"),
        (["--train-file", "{tmp}/rows.csv", "--learning-rate", "1e30"], "training diverged, and nothing was saved"),
    ],
)
def test_one_line_for_what_cannot_be_used(rows, tmp_path, capsys, change, message):
    write(tmp_path / "rows.csv", rows)
    write(tmp_path / "one.csv", [row for row in rows if row[1] == "xml"])
    write(tmp_path / "two.csv", [rows[0], rows[-1]])
    write(tmp_path / "other.csv", [("text", "email")])
    write(tmp_path / "header.csv", [])
    (tmp_path / "quotes.csv").write_text('text,label\n"a\n""b""",c\n\n"say "no" to it",d\n')
    (tmp_path / "short.csv").write_text("text,label\na,b\nc\n")
    (tmp_path / "rows.txt").write_text("text")
    (tmp_path / "excel.csv").write_text("text,label\na,b\n", encoding="utf-16")
    (tmp_path / "german.csv").write_text("text;label\nja, so;b\n")
    (tmp_path / "tabs.csv").write_text("text\tlabel\na\tb\n")
    (tmp_path / "array.json").write_text('[{"text": "a", "label": "b"}, "c"]')
    write(tmp_path / "scores.csv", [("text", f"{place % 30 / 10}") for place in range(120)])
    write(tmp_path / "swapped.csv", rows)
    (tmp_path / "nothing.csv").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label"\n')
    (tmp_path / "null.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": "a", "label": null}\n')
    (tmp_path / "nested.jsonl").write_text('{"text": ["a"], "label": "b"}\n')
    (tmp_path / "not.parquet").write_text("this is no Parquet file")
    (tmp_path / "twice.csv").write_text("text,text,label\na,b,c\n")
    (tmp_path / "blank.csv").write_text("text,label\na,\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a\xe9", "label": "b"}\n')
    (tmp_path / "twice.jsonl").write_text('{"text": "a", "text": "b", "label": "c"}\n')
    (tmp_path / "half.jsonl").write_text('{"text": "a\\ud800", "label": "b"}\n')
    (tmp_path / "deep.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n")
    odd = {"text": pyarrow.array([1, 2], pyarrow.duration("ns")), "label": ["b", "c"]}
    pyarrow.parquet.write_table(pyarrow.table(odd), tmp_path / "times.parquet")
    write(tmp_path / "bytes.parquet", [(b"a", "b")])
    write(tmp_path / "nan.parquet", [("a", 1.0), ("b", float("nan"))])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_text("the old one")
    options = ["--overwrite", *(option.format(tmp=tmp_path) for option in change)]
    if "--output" not in options:
        options += ["--output", str(adapter)]
    assert main(["train", *options]) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("error: ")
    assert message in printed.err.splitlines()[-1]
    assert "Traceback" not in printed.err
    assert (adapter / "adapter_model.safetensors").read_text() == "the old one"
    assert len(list(adapter.iterdir())) == 1


def test_predict_without_an_adapter(tmp_path, capsys):
    assert main(["predict", "--adapter", str(tmp_path)]) == 2
    assert "no adapter in" in capsys.readouterr().err


def test_damaged_adapters(minilm, tmp_path, capsys, monkeypatch):
    """Whatever a file holds, predict says in one line what is wrong with it."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a text\n")))
    tensors = {"prompt_embeddings": torch.zeros(4, 384), "classifier.weight": torch.zeros(2, 384)}
    tensors |= {"classifier.bias": torch.zeros(2)}
    whole = {"base_model_name_or_path": minilm, "prompt_length": 4, "num_labels": 2, "pooling": "mean"}
    whole |= {"mode": "packed"}
    for change in (
        {"prompt_length": "4"},
        {"prompt_length": 1.5},
        {"prompt_length": 10**9},
        {"prompt_length": 3},
        {"num_labels": None},
        {"num_labels": 3},
        {"max_length": "x"},
        {"max_length": -3},
        {"pooling": "max"},
        {"id2label": "x"},
        {"id2label": {"x": "y"}},
    ):
        adapter.save(tmp_path, tensors, whole | change)
        assert main(["predict", "--adapter", str(tmp_path)]) == 2, change
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: "), change
    for settings in ([], "text", None, 3):
        adapter.replace(tmp_path / adapter.WEIGHTS, adapter.as_bytes(tensors, settings))
        assert main(["predict", "--adapter", str(tmp_path)]) == 2, settings
        assert "is damaged: its settings are a" in capsys.readouterr().err
    adapter.save(tmp_path, tensors | {"prompt_embeddings": torch.full((4, 384), float("nan"))}, whole)
    assert main(["predict", "--adapter", str(tmp_path)]) == 2
    assert "prompt_embeddings holds what is no finite number" in capsys.readouterr().err
    adapter.save(tmp_path, tensors, whole)
    if os.path.exists("/dev/full"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a text\n")))
        assert main(["predict", "--adapter", str(tmp_path), "--output", "/dev/full"]) == 2
        assert "cannot write /dev/full" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--epochs", "0"], ["--batch-size", "0"], ["--mode", "x"], ["--learning-rate", "nan"]]
)
def test_bad_options(options, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", *options])
    assert stop.value.code == 2
    assert "error: argument" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["BertModel", "GPT2LMHeadModel"])
def test_a_model_without_its_tokenizer(rows, kind, tmp_path, capsys):
    """For which transformers makes a tokenizer that knows no words."""
    model, file = str(tmp_path / "model"), write(tmp_path / "rows.csv", rows)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, kind).config_class
    getattr(transformers, kind)(config(vocab_size=99, **sizes)).save_pretrained(model)
    task = ["--task", "lm", "--text-column", "text"] if "LM" in kind else []
    assert main(["train", "--train-file", file, "--model", model, "--output", str(tmp_path / "adapter"), *task]) == 2
    assert "knows no words: its files are missing there" in capsys.readouterr().err
    assert not any((tmp_path / "adapter").iterdir())


def test_a_tokenizer_of_other_words(tmp_path):
    """None of them English."""
    words = ["[PAD]", "[UNK]", *map("".join, itertools.product("ACGT", repeat=3))]
    backend = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    model, file = tmp_path / "model", write(tmp_path / "rows.csv", [("ACG TTT GCA", "a"), ("CCC TTA", "b")] * 10)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    assert main(["train", "--train-file", file, "--model", str(model), "--output", str(tmp_path / "adapter")]) == 0
