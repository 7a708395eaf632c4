"""Random calls and random files: what comes out is right, or an error that is on the list.

python tests/fuzz.py --cases 100000 [--seed N] [--first NUMBER]

A case depends on the seed and its number alone; one that fails is printed with the command that runs it again.
"""

import argparse
import contextlib
import csv
import faulthandler
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from functools import cache, partial
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "op"))

import cases
import pyarrow
import pyarrow.parquet
import zoo

from ptuning_fast import FastPTuning, SoftPrompt, prepend_prompt, reference
from ptuning_fast.files import adapter
from ptuning_fast.op import functional
from ptuning_fast.texts import tables

ERRORS = (
    ("op", (ValueError, TypeError, IndexError)),
    ("tables", (tables.InputError,)),
    ("adapters", (ValueError, FileNotFoundError)),
)
"""What may come out of each part; anything else is a bug."""

KERNELS = functional.kernels
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
TEXTS = [
    "a text",
    "another",
    "b",
    "007",
    "NA",
    'a "quoted" one, with commas',
    "two\nlines",
    "ä\u2028b",
    "\x00",
    "x" * 300,
]
NUMBERS = [0, 1, -1, 2, 3, 2**31, 10**12, 1.5]
JSON = [None, True, "", "x", "5", [], [3], {}, {"x": "y"}, {"kind": "mlp"}, "\0", "a/" * 3000, *NUMBERS, -(10**30)]


class Drawn:
    """hypothesis.strategies, as far as `cases.batch` needs them, over a random number generator."""

    def __init__(self, rng):
        self.integers = lambda low, high: partial(rng.randint, low, high)
        self.sampled_from = lambda values: partial(rng.choice, values)
        self.booleans = lambda: partial(rng.choice, [False, True])


def op(rng, folder):
    """A call of the op, two of five with an argument that may be wrong; one of six on the kernels, others in torch."""
    on_kernels = KERNELS is not None and rng.random() < 1 / 6
    device = torch.device("cuda" if on_kernels and torch.cuda.is_available() else "cpu")
    functional.kernels = KERNELS if on_kernels else None
    try:
        arguments = cases.batch(lambda draw: draw(), Drawn(rng))
        if rng.random() < 0.4:
            wrong = misfit(rng, arguments)
            if device.type == "cpu":  # an id outside the table ends the process on a GPU
                with torch.set_grad_enabled(rng.random() < 0.5):
                    out = prepend_prompt(**wrong)
                    if out["inputs_embeds"].requires_grad:
                        out["inputs_embeds"].sum().backward()
                expected = None
                with (
                    contextlib.suppress(Exception),
                    torch.no_grad(),
                ):  # it does not take all that is right, as dropped ids
                    expected = reference.prepend_prompt(**wrong)
                if expected is not None:
                    cases.assert_same(out, expected)
            return
        known = {}
        if arguments.get("packed") and rng.random() < 0.5:
            B, n = arguments["input_ids"].shape
            mask = arguments.get("attention_mask", torch.ones(B, n))
            known["lengths"] = (mask != 0).sum(1)
            known["lengths"] = known["lengths"] if rng.random() < 0.5 else known["lengths"].tolist()
        cases.compare(arguments, device, **known)
    finally:
        functional.kernels = KERNELS


def misfit(rng, arguments):
    """The arguments with one of them, or two, of another kind."""
    arguments = dict(arguments)
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice([*arguments, "lengths", "additive_mask", "token_type_ids", "attention_mask", "prompt_index"])
        value = arguments.get(name)
        changed = [None, "x", 3, [1], torch.zeros(()), torch.zeros(2, 3), torch.ones(0), torch.float64, torch.float32]
        if name in ("embed_scale", "adjacent", "packed"):  # taken as they are
            changed = [True, False] if name != "embed_scale" else [0.0, -1.0, 1e30, 2]
        elif name == "position_start":
            changed += [2**31, -(2**31), True, 1.5]
        elif isinstance(value, torch.Tensor):
            kinds = [torch.int16, torch.int64, torch.float64, torch.bool, torch.complex64]
            changed += [value[None], value[..., :-1], value[:1], value.flatten(), value.to("meta")]
            changed += [value.to(rng.choice(kinds)), value.clone()]
            if value.dtype in (torch.int32, torch.int64) and value.numel():
                bad = value.clone(memory_format=torch.contiguous_format)
                bad.view(-1)[rng.randrange(value.numel())] = rng.choice([-1, 2**31 - 1, 30, 3, -(2**31)])
                changed += [bad] * 5
            else:
                changed.append(value.detach().float().requires_grad_())
        arguments[name] = rng.choice(changed)
    return arguments


def damaged(rng, content):
    """Bytes with some of them changed, lost or doubled."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        place = rng.randrange(len(content)) if content else 0
        end = min(len(content), place + rng.choice([1, 2, 9, 100]))
        what = rng.choice(["bit", "bit", "byte", "cut", "lost", "doubled", "put in"])
        if what == "bit" and content:
            content[place] ^= 1 << rng.randrange(8)
        elif what == "byte" and content:
            content[place] = rng.choice(b'\x00\xff",\n\r{}[]\\0\t ')
        elif what == "cut":
            del content[place:]
        elif what == "lost":
            del content[place:end]
        elif what == "doubled":
            content[place:place] = content[place:end]
        else:
            content[place:place] = rng.choice([b"\xef\xbb\xbf", b'"', b"\n\n", b"\\ud800", b"1e999", b"[" * 2000])
    return bytes(content)


def table(rng, suffix):
    """A file of texts and labels, as bytes; in one of three a value is no text."""
    rows = [{"text": rng.choice(TEXTS), "label": rng.choice(TEXTS)} for _ in range(rng.randrange(1, 6))]
    if rows and rng.random() < 0.3:
        rows[-1][rng.choice(["text", "label", "other"])] = rng.choice(
            [*JSON[:9], "", " ", 3, 1.5, float("nan"), "\ud800"]
        )
    if suffix in (".parquet", ".pq"):
        with contextlib.suppress(pyarrow.ArrowException, UnicodeError):
            sink = pyarrow.BufferOutputStream()
            compression = rng.choice(["none", "snappy", "gzip", "zstd"])
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink, compression=compression)
            return sink.getvalue().to_pybytes()
        return b"PAR1"
    if suffix in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        # Python 3.10 does not write what it would have to escape, as NUL.
        writer = csv.writer(text, dialect=rng.choice(["excel", "excel-tab", "unix"]), escapechar="\\")
        writer.writerows([["text", "label"], *(row.values() for row in rows)])
    else:
        text = io.StringIO("".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) + "\n" for row in rows))
    return text.getvalue().encode(rng.choice(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "cp1252"]), "replace")


def read_table(rng, folder):
    """A file for the command line, whole or damaged, under a name that fits it or another."""
    suffixes = [*tables.TABLES, ".txt"]
    suffix = rng.choice(suffixes)
    content = table(rng, suffix)
    if rng.random() < 0.6:
        content = damaged(rng, content)
    path = folder / f"rows{suffix if rng.random() < 0.9 else rng.choice(suffixes)}"
    path.write_bytes(content)
    try:
        columns = [tables.read_texts(str(path), {})]
        if path.suffix != ".txt":
            columns = tables.read_labelled(str(path), {})
            assert tables.read_pairs(str(path), {}) == ([""] * len(columns[0]), columns[0])
    except tables.InputError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1, str(error)
        raise
    assert len({len(column) for column in columns}) == 1
    assert all(type(value) is str and value.encode() is not None for column in columns for value in column)


@cache
def models():
    """Two models, and folders of adapters as they are found: ours of each kind, older ones, PEFT's, another's."""
    torch.manual_seed(0)
    llama, bert = zoo.build("Llama"), zoo.build("BERT")
    place = tempfile.TemporaryDirectory(dir=MEMORY)  # removed with what is kept here
    folders = Path(place.name)
    for name, options in (("plain", {}), ("encoder", {"encoder": "mlp"}), ("bank", {"num_prompts": 2})):
        save_in_order(SoftPrompt(llama, 3, **options), folders / name)
    save_in_order(FastPTuning(bert, 3, id2label={0: "a", 1: "b"}), folders / "classifier")
    for name in ("plain", "encoder", "bank", "classifier"):
        shutil.copytree(folders / name, folders / f"{name}, unchecked")
        path = folders / f"{name}, unchecked" / adapter.WEIGHTS
        path.write_bytes(rewritten(path.read_bytes(), lambda metadata: metadata["ptuning_fast"]))
    with contextlib.suppress(ImportError):
        import peft

        sizes = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
        for kind in (peft.PromptTuningConfig(**sizes), peft.PromptEncoderConfig(**sizes)):
            peft.get_peft_model(zoo.build("Llama"), kind).save_pretrained(folders / f"PEFT's {kind.peft_type.value}")
        lora = peft.get_peft_model(zoo.build("Llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
        lora.save_pretrained(folders / "PEFT's LoRA")
    (folders / "a pickle").mkdir()
    (folders / "a pickle" / "adapter_model.bin").write_bytes(b"")
    whole = {}
    for name in ("plain", "encoder", "bank", "classifier"):
        content = (folders / name / adapter.WEIGHTS).read_bytes()
        load = FastPTuning if name == "classifier" else SoftPrompt
        order = (folders / name, bert) if name == "classifier" else (llama, folders / name)
        whole[content] = {key: value.clone() for key, value in load.from_pretrained(*order).named_parameters()}
    return llama, bert, sorted(folders.iterdir()), whole, place


def save_in_order(module, folder):
    """Save it with its metadata in one order: safetensors has another each time, and a case would be another."""
    metadata = None
    while metadata is None or list(metadata) != sorted(metadata):
        module.save_pretrained(folder)
        content = (folder / adapter.WEIGHTS).read_bytes()
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def rewritten(content, settings):
    """A safetensors file with other settings, and no checksum, in its header."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    metadata = header.get("__metadata__") or {}
    if "ptuning_fast" in metadata:
        header["__metadata__"] = {"format": "pt", "ptuning_fast": settings(metadata)}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def changed(rng, settings):
    """JSON with one of its values another."""
    place = settings = json.loads(settings)
    while isinstance(place, dict) and place:
        key = rng.choice(list(place))
        if not (isinstance(place[key], dict) and place[key]) or rng.random() < 0.1:
            place[key] = rng.choice(JSON)
            break
        place = place[key]
    return json.dumps(settings)


def load_adapter(rng, folder):
    """A folder with an adapter, whole, damaged, or put together from two."""
    llama, bert, found, whole, _ = models()
    for file in rng.choice(found).iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    for _ in range(rng.choice([0, 0, 1, 1, 1, 2])):
        file = rng.choice(sorted(folder.iterdir()) or [folder / adapter.WEIGHTS])
        what = rng.choice(["damaged", "damaged", "another's", "another's", "settings", "settings", "gone"])
        if what == "damaged" and file.exists():
            file.write_bytes(damaged(rng, file.read_bytes()))
        elif what == "another's":
            other = rng.choice([one for one in rng.choice(found).iterdir() if one.is_file()] or [file])
            shutil.copyfile(other, folder / rng.choice([other.name, adapter.WEIGHTS, "soft_prompt.safetensors"]))
        elif what == "settings" and file.suffix == ".json":
            with contextlib.suppress(ValueError, RecursionError):
                file.write_text(changed(rng, file.read_text()))
        elif what == "settings" and file.exists():
            with contextlib.suppress(ValueError, AttributeError, RecursionError):
                file.write_bytes(rewritten(file.read_bytes(), lambda metadata: changed(rng, metadata["ptuning_fast"])))
        else:
            file.unlink(missing_ok=True)
    content = (folder / adapter.WEIGHTS).read_bytes() if (folder / adapter.WEIGHTS).is_file() else b""
    expected = None if (folder / "soft_prompt.safetensors").exists() else whole.get(content)
    load = rng.choice([SoftPrompt, SoftPrompt, FastPTuning])
    loaded = load.from_pretrained(*((folder, bert) if load is FastPTuning else (llama, folder)))
    parameters = dict(loaded.named_parameters())
    if expected is not None:
        assert all(torch.equal(value, expected[key]) for key, value in parameters.items())
    elif b'"ptuning_fast.sha256"' in content and not (folder / "soft_prompt.safetensors").exists():
        raise AssertionError("a file with a checksum that is none of those that were written was loaded")
    batch = torch.tensor([[1, 2, 3]])
    if load is FastPTuning:
        loaded(batch)
    else:
        loaded(batch, prompt_index=None if loaded.num_prompts is None else torch.tensor([0]))


PARTS = {"op": op, "tables": read_table, "adapters": load_adapter}


def run(count, seed, first=0, report=lambda done, failed: None):
    """The numbers of the cases that failed, each with its traceback."""
    failed = {}
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        for number in range(first, first + count):
            rng = random.Random(f"{seed} {number}")
            part, allowed = rng.choice(ERRORS)
            folder = Path(place) / str(number)
            folder.mkdir()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    PARTS[part](rng, folder)
            except KeyboardInterrupt:
                raise
            except allowed:
                pass
            except BaseException:  # a panic in Rust is no Exception
                failed[number] = f"{part}, python tests/fuzz.py --cases 1 --seed {seed} --first {number}\n"
                failed[number] += traceback.format_exc()
            shutil.rmtree(folder)
            report(number - first + 1, failed)
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    options = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    start, shown = time.monotonic(), [0.0]

    def report(done, failed):
        elapsed = time.monotonic() - start
        number = options.first + done - 1
        if number in failed:
            print(failed[number], flush=True)
        if done == options.cases or elapsed > shown[0] + 5:
            shown[0] = elapsed
            print(f"{done:,} of {options.cases:,} cases, {len(failed)} failed, {elapsed:.0f} s", flush=True)

    raise SystemExit(bool(run(options.cases, options.seed, options.first, report)))


if __name__ == "__main__":
    main()
