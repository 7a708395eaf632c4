"""Tokenizers of merged checkpoints: the virtual tokens, and then what the original gives, whatever that does."""

import copy
import json
import warnings

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers_built import CHAT, byte_level
from transformers import AutoTokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from ptuning_fast.serving import virtual_tokens

TOKENS = [f"<|prompt_{place}|>" for place in range(4)]
TEXT, PAIR = "Return  the keys\n(naïve, 42)", "and their values."


def roberta():
    """Its class makes a post-processor of its own as it loads, in place of the one that was saved."""
    model = json.loads(byte_level().backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return RobertaTokenizer(vocab=model["vocab"], merges=merges, bos_token="<s>", cls_token="<s>", unk_token="<pad>")


def sequence():
    """As Llama 3 has it: one for the offsets, one for BOS."""
    template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)])
    return byte_level(post_processor=processors.Sequence([processors.ByteLevel(trim_offsets=True), template]))


def with_bos_by_its_settings():
    """Which make a post-processor anew whenever they are set."""
    tokenizer = byte_level("$A")
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, add_bos_token=True, **names)


KINDS = {
    "nothing": lambda: byte_level("$A"),
    "BOS": byte_level,
    "BOS and EOS": lambda: byte_level("<s> $A </s>"),
    "EOS": lambda: byte_level("$A </s>"),
    "BERT's": lambda: byte_level(post_processor=processors.BertProcessing(("</s>", 2), ("<s>", 1))),
    "ByteLevel": lambda: byte_level(post_processor=processors.ByteLevel(trim_offsets=True)),
    "a sequence": sequence,
    "RoBERTa": roberta,
    "BOS by its settings": with_bos_by_its_settings,
}


@pytest.fixture(params=[*KINDS, "MiniLM"])
def original(request):
    if request.param == "MiniLM":
        return AutoTokenizer.from_pretrained(request.getfixturevalue("minilm"))
    return KINDS[request.param]()


def saved(original, folder, **options):
    """(the tokenizer as it is loaded from a folder, ids of its virtual tokens)"""
    tokenizer, ids = virtual_tokens.added(original, TOKENS)
    tokenizer = virtual_tokens.in_front(tokenizer, TOKENS, **options)
    virtual_tokens.save(tokenizer, folder, ids if options.get("post_processor", True) else [], original)
    return AutoTokenizer.from_pretrained(folder), ids


def test_what_a_text_becomes(tmp_path, original):
    """Ids, types, special tokens, offsets; one text and two; as a batch, truncated and padded."""
    before = json.loads(original.backend_tokenizer.to_str())
    theirs, ids = saved(original, tmp_path)
    assert json.loads(original.backend_tokenizer.to_str()) == before
    m = len(ids)
    assert ids == list(range(len(original), len(original) + m))
    options = {"return_token_type_ids": True, "return_special_tokens_mask": True, "return_offsets_mapping": True}
    for text in ((TEXT,), (TEXT, PAIR)):
        ours, found = original(*text, **options), theirs(*text, **options)
        assert found["input_ids"] == ids + ours["input_ids"]
        assert found["token_type_ids"] == [0] * m + ours["token_type_ids"]
        assert found["special_tokens_mask"] == [1] * m + ours["special_tokens_mask"]
        assert found["offset_mapping"] == [(0, 0)] * m + ours["offset_mapping"]
        assert (
            theirs(*text, add_special_tokens=False)["input_ids"]
            == original(*text, add_special_tokens=False)["input_ids"]
        )
        assert theirs(*text).keys() == original(*text).keys()
        for side in ("left", "right"):
            cut = theirs(*text, truncation=True, max_length=m + 6, truncation_side=side)["input_ids"]
            assert cut == ids + original(*text, truncation=True, max_length=6, truncation_side=side)["input_ids"]
        assert theirs.num_special_tokens_to_add(len(text) == 2) == m + original.num_special_tokens_to_add(
            len(text) == 2
        )
    batch, expected = (one([TEXT, "x"], padding=True, padding_side="left") for one in (theirs, original))
    n, pads = len(expected["input_ids"][1]), expected["attention_mask"][1].count(0)
    assert batch["input_ids"][1] == expected["input_ids"][1][:pads] + ids + expected["input_ids"][1][pads:]
    assert batch["attention_mask"][1] == [0] * pads + [1] * (m + n - pads)


@pytest.mark.parametrize("side", ["left", "right"])
def test_its_sides_stay(tmp_path, original, side):
    original = copy.deepcopy(original)
    original.padding_side = original.truncation_side = side
    tokenizer, _ = saved(original, tmp_path)
    assert (tokenizer.padding_side, tokenizer.truncation_side) == (side, side)


def test_what_is_decoded(tmp_path, original):
    theirs, ids = saved(original, tmp_path)
    expected = original.decode(original(TEXT)["input_ids"], skip_special_tokens=True)
    found = theirs(TEXT)["input_ids"]
    assert theirs.decode(found, skip_special_tokens=True) == expected
    assert theirs.decode(found).startswith("<|prompt_0|>")
    assert theirs.decode(ids, skip_special_tokens=True) == ""


def test_without_the_post_processor(tmp_path, original):
    """What a text becomes stays as it was, by which converters know a tokenizer; the prompt comes as a string."""
    theirs, ids = saved(original, tmp_path, post_processor=False)
    assert theirs.encode(TEXT) == original.encode(TEXT)
    string = "".join(TOKENS) + virtual_tokens.text_before(original)
    found = theirs(string + TEXT, add_special_tokens=False)["input_ids"]
    whole = original(TEXT)["input_ids"]
    text = original(TEXT, add_special_tokens=False)["input_ids"]
    assert found == ids + whole[: whole.index(text[0]) + len(text)]


def test_a_string_that_is_tokenized_otherwise(tmp_path):
    """SentencePiece's space before a text, which is not put behind a token: said, as it cannot be mended."""
    names = ["<pad>", "<s>", "</s>", "▁", *map(chr, range(33, 127))]
    backend = Tokenizer(models.BPE({name: place for place, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    original = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer, ids = virtual_tokens.added(original, TOKENS)
    with pytest.warns(UserWarning, match="gives other tokens for a text that stands behind special tokens"):
        virtual_tokens.warn_of_strings(tokenizer, "".join(TOKENS), ids, original)
    theirs, ids = saved(original, tmp_path)
    assert theirs(TEXT)["input_ids"] == ids + original(TEXT)["input_ids"]  # the post-processor does it right
    asks = "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    plain = "user: {{ messages[0].content }}"
    of_parts = "user: {{ messages[0].content[0].text[0] }}{{ messages[0].content[0].text }}"
    for template in (plain, asks + plain, of_parts, {"tools": plain}, {"default": "{{ bos_token }}", "tools": plain}):
        original.chat_template = template
        theirs, ids = saved(original, tmp_path)
        with pytest.warns(UserWarning, match="gives other tokens for a chat that stands behind special tokens"):
            virtual_tokens.warn_of_chats(theirs, ids, original)
    original.chat_template = "{{ bos_token }} user: {{ messages[0].content }}"
    theirs, ids = saved(original, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        virtual_tokens.warn_of_chats(theirs, ids, original)


def test_chats_that_are_cut_on_the_left(tmp_path):
    original = byte_level()
    original.chat_template = None
    original.truncation_side = "left"
    theirs, ids = saved(original, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        virtual_tokens.warn_of_chats(theirs, ids, original)  # there are none
    original.chat_template = "{{ bos_token }} user: {{ messages[0].content }}"
    theirs, ids = saved(original, tmp_path)
    with pytest.warns(UserWarning, match="cuts texts on the left, and of a chat that is the prompt"):
        virtual_tokens.warn_of_chats(theirs, ids, original)


@pytest.mark.parametrize("post_processor", [True, False])
def test_chats(tmp_path, post_processor):
    """They go past the post-processor, and begin with the prompt, then BOS, once each."""
    original = byte_level()
    theirs, ids = saved(original, tmp_path, post_processor=post_processor)
    messages = [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": TEXT}]
    for options in ({}, {"add_generation_prompt": True}, {"continue_final_message": True}):
        found = theirs.apply_chat_template(messages, **options)["input_ids"]
        assert found == ids + original.apply_chat_template(messages, **options)["input_ids"]
        assert found[len(ids)] == original.bos_token_id and found.count(original.bos_token_id) == 1
        text = theirs.apply_chat_template(messages, tokenize=False, **options)
        assert text == "".join(TOKENS) + original.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize(
    "template",
    [
        "  {% for message in messages %}\n{{ message.content }}\n{% endfor %}\n",
        "\n\n  text {{ messages[0].content }}",
        "{%- set first = messages[0] -%}\n  {{- first.content }}",
        "  {{- messages[0].content }}",
        "{# a comment #}\n  {{ messages[0].content }}",
    ],
)
def test_white_space_of_a_template_stays(tmp_path, template):
    original = byte_level(chat=template)
    theirs, ids = saved(original, tmp_path)
    messages = [{"role": "user", "content": "x"}]
    found, expected = (one.apply_chat_template(messages, tokenize=False) for one in (theirs, original))
    assert found == "".join(TOKENS) + expected


def test_several_templates(tmp_path):
    original = byte_level(chat={"default": CHAT, "tools": "tools: " + CHAT})
    theirs, ids = saved(original, tmp_path)
    messages = [{"role": "user", "content": "x"}]
    for name in ("default", "tools"):
        found = theirs.apply_chat_template(messages, chat_template=name)["input_ids"]
        assert found == ids + original.apply_chat_template(messages, chat_template=name)["input_ids"]


def test_a_class_that_normalizes_as_the_original_does_not(tmp_path):
    """AutoTokenizer takes Qwen2's for a model of that type, whatever the files name, and it composes letters."""
    transformers.Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="saved and loaded again, gives"):
        saved(byte_level(), tmp_path)


def test_what_does_not_load_is_noticed(tmp_path, monkeypatch):
    """A tokenizer that gives something else once it is loaded."""
    original = byte_level()
    tokenizer, ids = virtual_tokens.added(original, TOKENS)
    with pytest.raises(RuntimeError, match=r"saved and loaded again, gives .* post_processor=False"):
        virtual_tokens.save(copy.deepcopy(tokenizer), tmp_path, ids, original)
