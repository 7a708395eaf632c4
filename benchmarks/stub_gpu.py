"""A GPU that is not there: Triton's own launcher and compiled kernels, over a driver library whose calls do nothing.

    with stub_gpu.active() as stub: ...     tensors on the CPU count as the GPU's; stub.launches() were made

What a call costs the host can so be measured, and its launches be compared, where there is no GPU. Nothing is computed:
outputs hold what was in their memory. For a process of its own, as Triton keeps the driver that it has found.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

__all__ = ["Stub", "active", "obstacle"]


def obstacle() -> str | None:
    """Why there can be no stub here; None where there can."""
    try:
        import triton.backends.nvidia  # noqa: F401
    except ImportError:
        return "Triton for NVIDIA GPUs is not installed"
    if compiler() is None:
        return "there is no C compiler (cc or gcc) to build the stub of a GPU driver with"
    return None


def compiler():
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")


class Stub:
    """The library, built and loaded, with Triton's driver on it."""

    def __init__(self, folder):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaDriver

        include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
        library = Path(folder) / "libcuda.so.1"
        options = ["-O2", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", f"-I{include}", "-o", str(library)]
        subprocess.run([compiler(), *options, str(Path(__file__).with_name("stub_driver.c"))], check=True)
        library.with_name("libcuda.so").symlink_to(library.name)  # by which name Triton 3.4 links it
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        # Before Triton's own library asks for one of this name: what is loaded under it stays the one.
        self.loaded = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        self.loaded.stub_launches.restype = ctypes.c_long

        class Driver(CudaDriver):
            def __init__(self):
                super().__init__()
                self.get_current_device = lambda: 0
                self.get_current_stream = lambda device: 0
                self.get_device_capability = lambda device=0: (9, 0)

            def get_current_target(self):
                return GPUTarget("cuda", 90, 32)

        triton.runtime.driver.set_active(Driver())

    def launches(self) -> int:
        """How many launches the driver has had."""
        return self.loaded.stub_launches()


@contextlib.contextmanager
def active():
    """The stub, with the op's kernels bound to it for tensors on the CPU, and without the checks for a CPU alone."""
    from unittest import mock

    from ptuning_fast.op import checks, functional

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as changes:
        stub = Stub(folder)
        changes.enter_context(mock.patch.object(functional.kernels, "runs_on", lambda tensor: tensor.is_cpu))
        # These read the tensors, which a GPU's host does not.
        changes.enter_context(mock.patch.object(functional, "raise_for_ids", lambda *_: None))
        changes.enter_context(mock.patch.object(checks, "compare_lengths", lambda *_: None))
        assert not torch.cuda.is_available(), "there is a GPU here, and no need of a stub"
        yield stub
