"""Launching a kernel: past Triton's argument binder where nothing that it looks at has changed.

Triton binds the arguments of every launch anew: it derives a type and a specialisation from each of them, spells both
out as a key, and looks up what it compiled for that key. That takes three times as long as the launch itself. Here a
kernel's parameters are of four kinds, in this order, each with one rule of what it is compiled for:

    tensors     tuples of tensors: their dtypes (None: absent), and that they begin at a multiple of 16 bytes
    shapes      their values, as Triton specialises on them
    numbers     tuples of numbers: that they fit into 32 bits, and no more, so that every batch is served
    constants   tl.constexpr: their values

so the first, the second and the last are the key of a dict of compiled kernels, and whatever else might matter (an
address or a number that is not as above, hooks) goes through Triton's binder as ever.
"""

from contextlib import nullcontext
from itertools import chain

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

__all__ = ["Launcher", "ordinary"]

LIMIT = 2**31  # programs of a launch, and numbers in 32 bits, are below it

# Triton's from 3.4 to 3.8 call a compiled kernel with these arguments; another is left to call its own.
KNOWN = (3, 4) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 8)


class Launcher:
    """Launches `kernel`, a `triton.jit` function with its parameters in the order above.

    Args:
        options: what its launches have as keyword arguments, such as `num_warps`.
    """

    def __init__(self, kernel, **options):
        self.kernel, self.options = kernel, options
        self.interpreted = not isinstance(kernel, JITFunction)
        self.compiled = {}

    def __call__(self, device: torch.device, programs: int, tensors, shapes, numbers, constants) -> None:
        """Launch so many programs on `device`, where the tensors are; ValueError where no GPU takes as many."""
        if programs >= LIMIT:
            raise ValueError(f"prepend_prompt: {programs} programs are more than one launch can have (2**31 - 1)")
        if self.interpreted:
            self.kernel[(programs,)](*tensors, *shapes, *numbers, *constants, **self.options)
            return
        active = driver.active
        current = active.get_current_device()
        if device.index is not None and device.index != current:  # Triton launches on the current GPU
            with _on(device):
                self(device, programs, tensors, shapes, numbers, constants)
            return

        dtypes, addresses = [], 0
        for group in tensors:
            for tensor in group:
                if tensor is None:
                    dtypes.append(None)
                else:
                    dtypes.append(tensor.dtype)
                    addresses |= tensor.data_ptr()
        key = (current, shapes, constants, *dtypes)
        kept = self.compiled.get(key)
        usual = not (addresses & 15 or max(chain.from_iterable(numbers)) >= LIMIT or _hooks_in_use(self.kernel))
        if kept is not None and usual:
            run, function, metadata = kept
            stream = active.get_current_stream(current)
            # Then what its launch tells hooks of, and those before and after it: there are none.
            run(programs, 1, 1, stream, function, metadata, None, None, None, *tensors, *shapes, *numbers, *constants)
            return
        examples = map(ordinary, numbers)
        compiled = self.kernel.warmup(*tensors, *shapes, *examples, *constants, grid=(programs,), **self.options)
        compiled[programs, 1, 1](*tensors, *shapes, *numbers, *constants)
        if usual and KNOWN and isinstance(compiled, CompiledKernel):
            self.compiled[key] = compiled.run, compiled.function, compiled.packed_metadata


def ordinary(numbers):
    """Numbers like `numbers`, in which Triton finds nothing to specialise on: no 1 and no multiple of 16.

    It does not apply `do_not_specialize` to what is in a tuple, and would compile again and again.
    """
    return tuple(3.0 if isinstance(one, float) else 3 if one < LIMIT else LIMIT + 3 for one in numbers)


def _on(device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _hooks_in_use(kernel):
    """Whether something wants to be told of launches: a profiler, or a caller of `add_pre_run_hook`."""
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):  # a function; since Triton 3.5 a chain of them
            return True
    return bool(kernel.pre_run_hooks)
