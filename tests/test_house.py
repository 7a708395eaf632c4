"""The rules of the house: imports run one way, and the kernels' folder stands on its own."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels" / "prompt_embedding"
PACKAGE = ROOT / "ptuning_fast"

# Each package imports from those before it alone. A new package gets its place here.
ORDER = ["kernels", "op", "attention", "models", "modes", "files", "serving", "loss", "prompt", "classify"]
ORDER += ["reference", "texts", "cli"]


def imports(file, package):
    """Every module that `file` imports, wherever in it, with relative names spelled out."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else node.module
            # `from . import x` may name a module.
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == package else {base}
    return found


def test_kernels_import_triton_and_torch_alone():
    files = sorted(KERNELS.glob("*.py"))
    assert files
    for file in files:
        tops = {name.partition(".")[0] for name in imports(file, "relative")}
        allowed = {"torch", "triton", "relative"} | set(sys.stdlib_module_names)
        assert tops <= allowed, f"{file.name} imports {tops - allowed}"


def test_kernels_import_themselves_by_relative_path():
    """Their package has another name when the folder is loaded as a Hugging Face kernel."""
    for file in KERNELS.glob("*.py"):
        assert not [name for name in imports(file, "relative") if name.startswith(("ptuning_fast", "kernels"))]


def test_imports_run_one_way():
    """From later packages to earlier ones; what stands in no package is the door to all of them."""
    for file in sorted(PACKAGE.rglob("*.py")):
        inside = file.relative_to(PACKAGE).parts[:-1]
        own = inside[0] if inside else file.stem
        if own in ("__init__", "__main__"):
            continue
        assert own in ORDER, f"{file} is in no package of {Path(__file__).name}"
        for name in imports(file, ".".join(["ptuning_fast", *inside])):
            if name.startswith("ptuning_fast."):
                other = name.split(".")[1]
                assert ORDER.index(other) <= ORDER.index(own), f"{file} imports {name}, which does not stand before it"


def test_packages_are_small():
    for package in ORDER:
        files = [file for file in (PACKAGE / package).glob("*.py") if file.name != "__init__.py"]
        assert len(files) <= 7, f"{package} has {len(files)} files"


def test_the_op_needs_no_transformers():
    for file in (PACKAGE / "op").glob("*.py"):
        assert not any(name.startswith("transformers") for name in imports(file, "ptuning_fast.op")), file


def test_names_of_architectures_stand_in_one_table():
    """A new architecture is a row of models/families.py, and each row is in the zoo."""
    import zoo

    from ptuning_fast.models.families import FAMILIES

    assert set(FAMILIES) == {kind for kind, *_ in zoo.ZOO.values()}
    for file in PACKAGE.rglob("*.py"):
        if file.name != "families.py":
            texts = {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}
            assert not texts & (set(FAMILIES) - {"bert"}), f"{file.name} names an architecture"


def test_the_command_line_is_not_imported_by_the_package():
    """The public names load what they need."""
    loaded = run("import sys; from ptuning_fast import *; print(*sorted(sys.modules))").split()
    assert "ptuning_fast.op.functional" in loaded
    assert not [name for name in loaded if name.startswith(("ptuning_fast.cli", "ptuning_fast.__main__"))]


def test_what_is_imported_when():
    """Heavy packages come with the name that needs them; a time would decide nothing, what is loaded does."""
    heavy = ("torch._dynamo", "transformers.modeling_utils", "torch.distributed.fsdp", "torch.distributed.tensor")

    def loaded(statement):
        found = set(run(f"import sys; {statement}; print(*sys.modules)").split())
        return [name for name in ("torch", "transformers", *heavy) if name in found]

    assert loaded("import ptuning_fast") == []
    assert loaded("from ptuning_fast import prepend_prompt, reference") == ["torch"]
    assert "transformers.modeling_utils" not in loaded("from ptuning_fast import FastPTuning, SoftPrompt")
    assert loaded("from ptuning_fast import FastPTuning") == ["torch"]
    help_alone = "from ptuning_fast.cli.main import parser; parser().format_help()"
    assert loaded(help_alone) == []


def test_there_is_no_package_named_kernels():
    """It would hide Hugging Face's package of that name, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_tensors_at_module_level():
    pytest.importorskip("triton", reason="Triton does not run on this platform")
    import ptuning_fast.kernels

    files = [file.stem for file in KERNELS.glob("*.py") if file.stem != "__init__"]
    modules = [ptuning_fast.kernels, *(sys.modules[f"ptuning_fast.kernels.{name}"] for name in files)]
    for module in modules:
        for name, value in vars(module).items():
            assert not isinstance(value, (torch.Tensor, torch.device, torch.Generator)), f"{module.__name__}.{name}"


def run(program, **environment):
    """What a Python of its own prints when it runs `program`."""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def test_importing_asks_no_gpu():
    """With every question about a GPU an error, the package and its kernels import, and CUDA stays uninitialised."""
    asked = run(
        """
import torch

def refuse(*args, **kwargs):
    raise SystemExit("a GPU was queried at import")

for name in ("is_available", "device_count", "current_device", "get_device_capability", "get_device_properties"):
    assert hasattr(torch.cuda, name)
    setattr(torch.cuda, name, refuse)
torch.cuda._lazy_init = refuse

import ptuning_fast
import ptuning_fast.reference
try:
    import triton
except ImportError:
    pass
else:
    import ptuning_fast.kernels
assert not torch.cuda.is_initialized()
print("imported", end="")
""",
        TRITON_INTERPRET="0",
    )
    assert asked == "imported"


def test_metadata():
    metadata = json.loads((KERNELS / "metadata.json").read_text())
    assert metadata["name"] == KERNELS.name.replace("_", "-")
    assert metadata["license"] == "Apache-2.0"
    assert metadata["python-depends"] == []
    assert metadata["backend"] == {"type": "cuda"}
    assert metadata["id"].isidentifier()
    assert isinstance(metadata["version"], int)


def test_the_folder_is_a_hugging_face_kernel():
    """Loaded by Hugging Face's `kernels`, offline and under its own module name, its forward gives what ours gives."""
    pytest.importorskip("triton", reason="Triton does not run on this platform")
    pytest.importorskip("kernels", reason="needs the package `kernels` of Hugging Face", exc_type=ImportError)
    printed = run(
        """
from pathlib import Path
import kernels, torch
import ptuning_fast.kernels as ours

theirs = kernels.get_local_kernel(Path("kernels/prompt_embedding"))
assert theirs is not ours
assert theirs.forward is not ours.forward
assert sorted(theirs.__all__) == sorted(ours.__all__)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

ids = torch.tensor([[1, 2, 3], [4, 5, 6]], device=device)
assert theirs.runs_on(ids)
mask = torch.tensor([[0, 1, 1], [1, 1, 0]], device=device)
weight, prompt = torch.randn(9, 20, device=device), torch.randn(2, 20, device=device)
arguments = (ids, mask, ids, ids), weight, (prompt, None), (2, 2.0, True, False, None, None)
results, expected = theirs.forward(*arguments), ours.forward(*arguments)
for result, value in zip(results, expected):
    assert (result is value is None) or torch.equal(result, value)
assert torch.equal(results[0][0, 1:3], prompt)
grad = torch.randn(2, 5, 20, device=device)
arguments = grad, prompt.shape, prompt.dtype, results[6], None, False
assert torch.equal(theirs.backward(*arguments), ours.backward(*arguments))
print(theirs.__name__, end="")
""",
        HF_HUB_OFFLINE="1",
    )
    assert printed == json.loads((KERNELS / "metadata.json").read_text())["id"]
