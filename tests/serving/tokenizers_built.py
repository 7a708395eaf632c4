"""Tokenizers that are built here, as none but a WordPiece comes in a package."""

import asyncio
import email
import functools
import json
import logging

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]
CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + '] ' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


@functools.cache
def _trained(size):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    modules = (asyncio, email, functools, json, logging)
    texts = [one.__doc__ for module in modules for one in vars(module).values() if isinstance(one.__doc__, str)]
    backend.train_from_iterator(texts, trainer)
    return backend.to_str()


def byte_level(template="<s> $A", size=400, chat=CHAT, post_processor=None):
    """A byte-level BPE, trained on docstrings of the standard library; `template` is what it puts around a text."""
    backend = Tokenizer.from_str(_trained(size))
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = post_processor or processors.TemplateProcessing(
        single=template, pair=f"{template} $B:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat, **names)
