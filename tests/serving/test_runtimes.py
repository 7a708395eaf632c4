"""A merged checkpoint in other runtimes: the tokens that SoftPrompt generates."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from tokenizers_built import byte_level
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptuning_fast import SoftPrompt

NEW = 24
TEXTS = ["Return a list of the keys", "What is this function for?\nNothing.", "x"]


@pytest.fixture(scope="module")
def prompt():
    tokenizer = byte_level()
    model = zoo.build("Llama", vocab_size=len(tokenizer), max_position_embeddings=128, eos_token_id=None)
    torch.manual_seed(2)
    return SoftPrompt(model, zoo.M, init=torch.randn(zoo.M, zoo.D))


def tokens_of(prompt, ids):
    ids = torch.tensor([ids])
    with torch.no_grad():
        out = prompt.model.generate(**prompt(ids, torch.ones_like(ids)), max_new_tokens=NEW, do_sample=False)
    return out[0].tolist()


def served(path):
    """llama.cpp's server on a GGUF, with keys and values in fp32: how to ask it for something."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp comes with the package xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.use_jinja = 128, 1, False, True
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # not in half precision, as it comes
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)

    def post(path, **request):
        request = urllib.request.Request(server.listening_address + path, json.dumps(request).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    return post


GREEDY = {"n_predict": NEW, "temperature": 0, "return_tokens": True, "ignore_eos": True}


def test_llama_cpp(tmp_path, prompt):
    """As GGUF, with the prompt as a string before a text, and in the chat template."""
    pytest.importorskip("gguf", reason="GGUF files need the package gguf")
    from to_gguf import convert

    tokenizer = byte_level()
    strings = prompt.save_pretrained_merged(tmp_path, tokenizer, post_processor=False)
    convert(tmp_path, tmp_path / "model.gguf", add_bos=False)
    post = served(tmp_path / "model.gguf")
    for text in TEXTS:
        found = post("/completion", prompt=strings["prompt"] + text, **GREEDY)
        ids = tokenizer(text)["input_ids"]
        assert found["tokens_evaluated"] == zoo.M + len(ids)
        assert found["tokens"] == tokens_of(prompt, ids)

    messages = [{"role": "user", "content": TEXTS[1]}]
    rendered = post("/apply-template", messages=messages)["prompt"]
    found = post("/completion", prompt=rendered, **GREEDY)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert found["tokens"] == tokens_of(prompt, ids)
    found = post("/v1/chat/completions", messages=messages, max_tokens=1, temperature=0)
    assert found["usage"]["prompt_tokens"] == zoo.M + len(ids)


@pytest.mark.parametrize("name, architecture", [("gpt-2", "GPT-2"), ("llama-bpe", "Llama"), ("qwen2", "Qwen2")])
def test_convert_hf_to_gguf(tmp_path, name, architecture):
    """llama.cpp's own converter, and the vocabularies of real models that come with it."""
    llama_cpp = os.environ.get("LLAMA_CPP")
    if llama_cpp is None:
        pytest.skip("convert_hf_to_gguf.py comes with llama.cpp's sources: LLAMA_CPP says where they are")
    llama_cpp = Path(llama_cpp)
    tokenizer = AutoTokenizer.from_pretrained(llama_cpp / "models", gguf_file=f"ggml-vocab-{name}.gguf")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"n_positions": 128, "n_ctx": 128} if name == "gpt-2" else {"max_position_embeddings": 128}
    model = zoo.build(architecture, vocab_size=len(tokenizer), **ends, **sizes)
    torch.manual_seed(2)
    prompt = SoftPrompt(model, zoo.M, init=torch.randn(zoo.M, zoo.D))
    strings = prompt.save_pretrained_merged(tmp_path, tokenizer, post_processor=False)
    command = [sys.executable, llama_cpp / "convert_hf_to_gguf.py", tmp_path, "--outfile", tmp_path / "model.gguf"]
    paths = os.pathsep.join([str(llama_cpp / "gguf-py"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([*command, "--outtype", "f32"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    post = served(tmp_path / "model.gguf")
    for text in [*TEXTS, " and a space", "33 things"]:
        found = post("/completion", prompt=strings["prompt"] + text, **GREEDY)
        assert found["tokens_evaluated"] == zoo.M + len(tokenizer(text)["input_ids"])
        assert found["tokens"] == tokens_of(prompt, tokenizer(text)["input_ids"])


def test_onnx(tmp_path, prompt):
    """Exported by torch.onnx from what transformers loads, with nothing of ours in it."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="torch.onnx needs the packages onnx and onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX files are run by the package onnxruntime")
    prompt.save_pretrained_merged(tmp_path, byte_level())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    model.config.use_cache = False

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids=input_ids).logits

    columns = zoo.M + 40 + NEW  # a row is filled up on the right, which no token sees
    with torch.no_grad():
        program = torch.onnx.export(
            Logits().eval(), (torch.zeros(1, columns, dtype=torch.int64),), dynamo=True, verbose=False
        )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (name,) = (one.name for one in session.get_inputs())
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        start = len(ids)
        for _ in range(NEW):
            row = np.zeros((1, columns), dtype=np.int64)
            row[0, : len(ids)] = ids
            logits = session.run(None, {name: row})[0][0, len(ids) - 1]
            logits[model.generation_config.suppress_tokens] = -np.inf
            ids.append(int(logits.argmax()))
        assert ids[start:] == tokens_of(prompt, byte_level()(text)["input_ids"])
