"""Launching a kernel: past Triton's argument binder where nothing that it looks at has changed.

Triton binds the arguments of every launch anew: it derives a type and a specialisation from each of them, spells both
out as a key, and looks up what it compiled for that key. That takes three times as long as the launch itself. Here a
kernel's parameters stand in four groups, in this order, each with one rule of what Triton makes of them:

    tensors     their dtypes (None: absent), and that they begin at a multiple of 16 bytes
    shapes      numbers that it specialises on: their values
    numbers     numbers named in `do_not_specialize`: that they fit into 32 bits
    constants   tl.constexpr: their values

so the first, the second and the last are the key of a dict of compiled kernels, and whatever else might matter (an
address or a number that is not as above, hooks) goes through Triton's own launcher as ever.
"""

from contextlib import nullcontext

import torch
import triton
from torch.compiler import is_compiling
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

__all__ = ["Launcher"]

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

    def __call__(self, device: torch.device, programs: int, tensors=(), shapes=(), numbers=(), constants=()) -> None:
        """Launch so many programs on `device`, where the tensors are; ValueError where no GPU takes as many."""
        if programs >= LIMIT:
            raise ValueError(f"prepend_prompt: {programs} programs are more than one launch can have (2**31 - 1)")
        if self.interpreted or is_compiling():  # what torch.compile traces is Triton's own syntax
            self.kernel[(programs,)](*tensors, *shapes, *numbers, *constants, **self.options)
            return
        active = driver.active
        current = active.get_current_device()
        if device.index is not None and device.index != current:  # Triton launches on the current GPU
            with _on(device):
                self(device, programs, tensors, shapes, numbers, constants)
            return

        dtypes, addresses = [], 0
        for tensor in tensors:
            if tensor is None:
                dtypes.append(None)
            else:
                dtypes.append(tensor.dtype)
                addresses |= tensor.data_ptr()
        key = (current, shapes, constants, *dtypes)
        kept = self.compiled.get(key)
        ordinary = not (addresses & 15 or max(numbers) >= LIMIT or _hooks_in_use(self.kernel))
        if kept is not None and ordinary:
            run, function, metadata = kept
            stream = active.get_current_stream(current)
            # Then what its launch tells hooks of, and those before and after it: there are none.
            run(programs, 1, 1, stream, function, metadata, None, None, None, *tensors, *shapes, *numbers, *constants)
            return
        compiled = self.kernel[(programs,)](*tensors, *shapes, *numbers, *constants, **self.options)
        if ordinary and KNOWN and isinstance(compiled, CompiledKernel):
            self.compiled[key] = compiled.run, compiled.function, compiled.packed_metadata


def _on(device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _hooks_in_use(kernel):
    """Whether something wants to be told of launches: a profiler, or a caller of `add_pre_run_hook`."""
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):  # a function; since Triton 3.5 a chain of them
            return True
    return bool(kernel.pre_run_hooks)
