"""Launch every kernel variant both ways, past Triton's binder and through it, and compare what arrives at the driver.

    python tests/launches.py

On the stub of a GPU that the benchmarks have, in a process of its own, as Triton keeps the driver that it has found.
Prints what was compared as JSON; AssertionError where the two ways differ.
"""

import contextlib
import json
import os
import random
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
os.environ.pop("TRITON_INTERPRET", None)

import compile_ahead
import stub_gpu
import torch
import triton
from ptuning_fast.kernels import runtime
from triton import knobs
from triton.runtime import JITFunction

from ptuning_fast import prepend_prompt

ARRIVED = []  # (the launcher of the compiled kernel, grid, stream, function, metadata, arguments) of each launch


def record_arrivals():
    """What Triton calls to launch, one object a compiled kernel, records its arguments."""
    driver = triton.runtime.driver.active

    class Recording(driver.launcher_cls):
        def __call__(self, *arguments):
            # Behind the metadata come what hooks are told, and the hooks.
            ARRIVED.append((self, *arguments[:6], *arguments[9:]))
            return super().__call__(*arguments)

    driver.launcher_cls = Recording


def refuse(*_, **__):
    raise AssertionError("a launch went through Triton's binder")


def same(one, other):
    if isinstance(one, tuple):
        return isinstance(other, tuple) and len(one) == len(other) and all(map(same, one, other))
    return one is other or (type(one) is type(other) and not torch.is_tensor(one) and one == other)


COMPARED = {"launches": 0, "short": 0}
launch = runtime.Launcher.__call__


def compared(self, device, programs, *groups, short=True):
    """In place of a launch: one through the binder, then two, the second of which can do without."""
    launch(runtime.Launcher(self.kernel, **self.options), device, programs, *groups)
    launch(self, device, programs, *groups)
    with mock.patch.object(JITFunction, "run", refuse) if short and runtime.KNOWN else contextlib.nullcontext():
        launch(self, device, programs, *groups)
    plain, first, second = ARRIVED[-3:]
    assert len(plain) == len(first) == len(second)
    assert all(map(same, plain, first)) and all(map(same, plain, second)), (self.kernel, plain, second)
    COMPARED["launches"] += 1
    COMPARED["short"] += short and runtime.KNOWN


def op(ids, weight, prompt, mask=None, **options):
    """Forward and backward, the latter of a gradient that is laid out in the ordinary way and of one that is not."""
    embeds = prepend_prompt(ids, mask, weight=weight, prompt=prompt, **options)["inputs_embeds"]
    for grad in (torch.zeros_like(embeds), torch.zeros(1, 1, 1, dtype=embeds.dtype).expand(embeds.shape)):
        torch.autograd.grad(embeds, prompt, grad, retain_graph=True)


def strided(tensor, how):
    if tensor is None or how == "as it is":
        return tensor
    return tensor.T.contiguous().T if how == "transposed" else torch.stack([tensor, tensor], -1)[..., 0]


def every_variant():
    """Each variant that is compiled ahead, at batch sizes, lengths and strides that share its kernels."""
    chance = random.Random(0)
    for (
        _,
        d,
        weight_dtype,
        prompt_dtype,
        layout,
        bank,
        scale,
        ids_dtype,
        mask_dtype,
        extras,
        *rest,
    ) in compile_ahead.variants():
        weight = torch.zeros(40, d, dtype=weight_dtype)
        for _ in range(6):
            B, n, m = chance.choice([1, 2, 16, 40, 65]), chance.choice([1, 15, 16, 17, 33]), chance.choice([1, 3, 16])
            layouts = [strided(torch.ones(B, n), chance.choice(["as it is", "transposed", "sliced"])) for _ in range(3)]
            ids, mask, labels = (
                None if dtype is None else one.to(dtype)
                for one, dtype in zip(layouts, (ids_dtype, mask_dtype, torch.int64))
            )
            options = {"embed_scale": scale, "adjacent": layout == "adjacent", "packed": layout == "packed"}
            if layout == "packed" and mask is not None:
                options["lengths"] = [n] * B
            if extras:
                start = chance.choice([0, 1, 2, 16])
                options |= {"token_type_ids": labels, "labels": labels, "position_start": start}
            if rest:
                options["additive_mask"] = rest[0]
            prompt = torch.zeros(*([3] if bank else []), m, d, dtype=prompt_dtype, requires_grad=True)
            index = {"prompt_index": torch.zeros(B, dtype=ids_dtype)} if bank else {}
            op(ids, weight, prompt, mask, **options, **index)


def every_exception():
    """What Triton's own launcher is left to: it is asked each time, and what arrives is the same."""
    ids, weight = torch.ones(2, 8, dtype=torch.int32), torch.zeros(40, 64)
    prompt, mask = torch.zeros(4, 64, requires_grad=True), torch.ones(2, 8)
    cases = {
        "ids off 16 bytes": {"ids": torch.ones(17, dtype=torch.int32)[1:].view(2, 8)},
        "table off 16 bytes": {"weight": torch.zeros(40 * 64 + 1)[1:].view(40, 64)},
        "mask off 16 bytes": {"mask": torch.ones(17)[1:].view(2, 8)},
        "a stride beyond 32 bits": {"ids": ids[:1].as_strided((1, 8), (2**31, 1)), "mask": mask[:1]},
    }
    asked = []
    run = JITFunction.run

    def counted(self, *arguments, **options):
        asked.append(self)
        return run(self, *arguments, **options)

    for name, changes in cases.items():
        arguments = {"ids": ids, "weight": weight, "prompt": prompt, "mask": mask} | changes
        once = mock.patch.object(runtime.Launcher, "__call__", lambda *groups: compared(*groups, short=False))
        with once, torch.no_grad():
            prepend_prompt(arguments["ids"], arguments["mask"], weight=arguments["weight"], prompt=prompt)
        with mock.patch.object(JITFunction, "run", counted), torch.no_grad():
            asked.clear()
            for _ in range(3):
                prepend_prompt(arguments["ids"], arguments["mask"], weight=arguments["weight"], prompt=prompt)
            assert len(asked) == 3, f"{name}: Triton's binder was asked {len(asked)} times of 3"
    return list(cases)


def every_hook():
    """Hooks on launches, of Triton as a whole and of one kernel, are called for each."""
    arguments = {"weight": torch.zeros(40, 64), "prompt": torch.zeros(4, 64)}
    kernel, called = sys.modules["ptuning_fast.kernels.forward"].prepend_prompt_kernel, []

    def launches_of_three():
        called.clear()
        for _ in range(3):
            prepend_prompt(torch.ones(2, 8, dtype=torch.int32), **arguments)
        return len(called)

    assert launches_of_three() == 0
    for name in ("launch_enter_hook", "launch_exit_hook"):
        before = getattr(knobs.runtime, name)
        if before is None:  # until Triton 3.5 a function
            setattr(knobs.runtime, name, called.append)
            assert launches_of_three() == 3
            setattr(knobs.runtime, name, None)
        else:
            before.add(called.append)
            assert launches_of_three() == 3
            before.remove(called.append)
        assert launches_of_three() == 0
    kernel.add_pre_run_hook(lambda *_, **__: called.append(1))
    assert launches_of_three() == 3
    kernel.pre_run_hooks.clear()
    assert launches_of_three() == 0


def main():
    with stub_gpu.active():
        record_arrivals()
        with mock.patch.object(runtime.Launcher, "__call__", compared):
            every_variant()
        exceptions = every_exception()
        every_hook()
    kernels = {launcher for launcher, *_ in ARRIVED}
    print(json.dumps(COMPARED | {"triton": triton.__version__, "compiled": len(kernels), "exceptions": exceptions}))


if __name__ == "__main__":
    main()
