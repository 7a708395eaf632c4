"""Compile every kernel variant for GPUs that are not here, and report what came out.

    python tests/prompt_embedding/compile_ahead.py [--dump FOLDER]

prints one JSON object per variant and target: registers, spilled bytes, and how wide the loads and stores of embedding
rows are. The arguments are those that the launchers themselves pass: the launches are recorded, not made. It is a
program of its own because a process in which Triton interprets kernels cannot compile them.
"""

import argparse
import gc
import inspect
import itertools
import json
import os
import re
import subprocess
import tempfile
import unittest.mock
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from ptuning_fast.kernels import backward as launch_backward
from ptuning_fast.kernels import forward as launch_forward
from ptuning_fast.kernels.runtime import Launcher, ordinary
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = [GPUTarget("cuda", capability, 32) for capability in (80, 90, 100, 120)] + [GPUTarget("hip", "gfx942", 64)]
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


REPORTED = {}  # what `report` found out, by what it compiled: variants have launches in common


def source_of(kernel, arguments):
    """What Triton's own launcher would compile for these arguments: types, constants, divisibility."""
    constants, attributes = {}, {}

    def type_of(value, parameter, *place):
        if isinstance(value, tuple):
            return tuple(type_of(one, parameter, *place, index) for index, one in enumerate(value))
        if value is None or parameter.is_constexpr or (isinstance(value, int) and value == 1):
            constants[place] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        tensor = isinstance(value, torch.Tensor)
        if tensor or value % 16 == 0:
            attributes[place] = [["tt.divisibility", 16]]
        return "*" + TYPES[value.dtype] if tensor else "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = {
        parameter.name: type_of(value, parameter, index)
        for index, (parameter, value) in enumerate(zip(kernel.params, arguments))
    }
    return ASTSource(kernel, signature, constants, attributes)


def by_name(kernel, arguments):
    """Each argument under its name, those in a tuple under the names that the kernel unpacks it into."""
    found = dict(zip(kernel.arg_names, arguments))
    for names, group in re.findall(r"^    (.+) = (\w+)$", inspect.getsource(kernel.fn), re.MULTILINE):
        if isinstance(found.get(group), tuple):
            found |= zip(names.split(", "), found[group], strict=True)
    return found


def launches(B, d, weight_dtype, prompt_dtype, layout, bank, scale, ids_dtype, mask_dtype, extras, additive=None):
    """(kernel, arguments, options) of the launches of one forward and one backward, recorded instead of made."""
    n, m, V, K = 24, 16, 64, 3
    recorded = []

    def record(launcher, device, programs, tensors, shapes, numbers, constants):
        arguments = [*tensors, *shapes, *map(ordinary, numbers), *constants]
        recorded.append((launcher.kernel, arguments, launcher.options))

    with unittest.mock.patch.object(Launcher, "__call__", record):
        ids = torch.zeros(B, n, dtype=ids_dtype)
        index = torch.zeros(B, dtype=ids_dtype) if bank else None
        mask = None if mask_dtype is None else torch.ones(B, n, dtype=mask_dtype)
        prompt = torch.zeros(*([K] if bank else []), m, d, dtype=prompt_dtype)
        lengths = [n] * B if layout == "packed" and mask is not None else None
        types, labels, start = (ids, ids, 2) if extras else (None, None, None)
        results = launch_forward(
            (ids, mask, types, labels),
            torch.zeros(V, d, dtype=weight_dtype),
            (prompt, index),
            (start, scale, layout == "adjacent", layout == "packed", lengths, additive),
        )
        launch_backward(results[0], prompt.shape, prompt_dtype, results[6], index, layout == "packed")
    return recorded


def variants():
    """Arguments of `launches`: every kind of variant, though not every combination of kinds, which would take minutes.

    Each width and each layout meets fp32 and bf16 tables; each layout has variants with and without a bank, and with
    and without a scale. A batch of 65 splits the sum of the backward in two launches, one of 8 does not.
    """
    f32, bf16, f16, i64, i32 = torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32
    yield 65, 384, f32, f32, "plain", False, 1.0, i64, i64, True
    yield 65, 768, f32, f32, "adjacent", True, 1.0, i32, torch.bool, True
    yield 8, 4096, f32, f32, "packed", False, 3.5, i64, i64, True
    yield 65, 4096, bf16, f32, "plain", True, 1.0, i64, i64, True
    yield 8, 384, bf16, f32, "adjacent", False, 3.5, i64, f32, False
    yield 8, 768, bf16, f32, "packed", True, 3.5, i32, torch.bool, True
    yield 8, 768, bf16, bf16, "plain", False, 3.5, i64, bf16, True
    yield 65, 4096, bf16, bf16, "adjacent", True, 3.5, i64, i64, True
    yield 8, 384, bf16, bf16, "packed", False, 1.0, i32, None, True
    yield 8, 768, f16, f32, "adjacent", False, 1.0, i64, i64, True
    yield 8, 768, f32, f16, "plain", True, 3.5, i64, None, False
    yield 8, 768, f32, f32, "plain", False, 1.0, i64, i64, False, f32
    yield 8, 768, bf16, f32, "adjacent", False, 1.0, i64, torch.bool, True, bf16
    yield 65, 100, f32, f32, "plain", False, 1.0, i64, i64, True


def report(kernel, arguments, options, target, dump=None):
    """Compile one launch for one target and describe the result."""
    source = source_of(kernel, arguments)
    key = source.hash(), json.dumps(options, sort_keys=True), target
    if key in REPORTED:
        return REPORTED[key]
    compiled = triton.compile(source, target=target, options=options)
    arguments = by_name(kernel, arguments)
    row = {
        "kernel": kernel.__name__,
        "target": f"{target.backend}:{target.arch}",
        "tensors": {name: TYPES[value.dtype] for name, value in arguments.items() if isinstance(value, torch.Tensor)},
        "constants": {name: value for name, value in arguments.items() if name.isupper()},
        "threads": compiled.metadata.num_warps * target.warp_size,
        "shared": compiled.metadata.shared,
    }
    if target.backend == "cuda":
        text = compiled.asm["ptx"]
        row["wide_loads"] = len(re.findall(r"ld\.global(?:\.\w+)*\.(?:v4\.b32|v2\.b64)", text))
        row["wide_stores"] = len(re.findall(r"st\.global(?:\.\w+)*\.(?:v4\.b32|v2\.b64)", text))
        row["asserts"] = len(re.findall(r"call[^;]*__assertfail,", text))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            usage = subprocess.run(
                [tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
            )
        numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout)
        row["registers"], row["stack"], row["local"] = map(int, numbers.groups())
    else:
        text = compiled.asm["amdgcn"]
        # The kernel's own code, without that of the library functions that report a failed assert.
        own = re.search(rf"^{kernel.__name__}:.*?^\.Lfunc_end", text, re.MULTILINE | re.DOTALL)[0]
        row["wide_loads"] = len(re.findall(r"(?:global|buffer)_load_dwordx4", own))
        row["wide_stores"] = len(re.findall(r"(?:global|buffer)_store_dwordx4", own))
        row["asserts"] = own.count("s_trap")
        row["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        row["local"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
        row["stack"] = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
    if dump:
        (Path(dump) / f"{kernel.__name__}-{target.backend}-{target.arch}-{source.hash()[:12]}.s").write_text(text)
    REPORTED[key] = row
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dump", help="write the assembly of each variant into this folder")
    options = parser.parse_args()
    gc.disable()  # collections would take a tenth of the time
    for number, variant in enumerate(variants()):
        for (step, launch), target in itertools.product(enumerate(launches(*variant)), TARGETS):
            row = report(*launch, target, options.dump)
            place = {"variant": number, "launch": step, "d": variant[1], "arguments": [str(part) for part in variant]}
            print(json.dumps(place | row), flush=True)


if __name__ == "__main__":
    main()
