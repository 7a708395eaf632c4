"""Small files and models for the command line."""

import csv

import pytest
import torch
from transformers import AutoTokenizer

from ptuning_fast.op import functional
from ptuning_fast.texts.docstrings import stdlib_docstrings


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch):
    """The command line as users without a GPU run it: Triton's interpreter would take minutes."""
    monkeypatch.setattr(functional, "kernels", None)


@pytest.fixture(scope="session")
def rows():
    """Short docstrings of two packages, 30 each."""
    texts, labels = stdlib_docstrings()
    short = [(text, label) for text, label in zip(texts, labels) if len(text) < 80 and label in ("asyncio", "xml")]
    return [row for label in ("asyncio", "xml") for row in [r for r in short if r[1] == label][:30]]


@pytest.fixture(scope="session")
def rows_file(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return str(path)


def _encoder(minilm, folder, dropout):
    from transformers import BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes, **rates)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def encoder(minilm, tmp_path_factory):
    """Folder of a small BERT without dropout, with MiniLM's tokenizer."""
    return _encoder(minilm, tmp_path_factory.mktemp("encoder"), 0.0)


@pytest.fixture(scope="session")
def encoder_with_dropout(minilm, tmp_path_factory):
    return _encoder(minilm, tmp_path_factory.mktemp("encoder"), 0.1)


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    """Folder of a small Llama with a byte-level BPE tokenizer, without a padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("language-model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(stdlib_docstrings()[0][:500], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=500, **sizes, eos_token_id=0, bos_token_id=0, pad_token_id=None)
    config.initializer_range = 0.2  # so that what stands before a token matters
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)
