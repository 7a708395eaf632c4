"""Where Triton is not installed: in a virtual environment that has all but it."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

PROGRAM = """
import importlib.util, warnings
from importlib.metadata import PackageNotFoundError, version

warnings.simplefilter("error", UserWarning)
assert importlib.util.find_spec("triton") is None
try:
    raise SystemExit(f"triton {version('triton')} is installed")
except PackageNotFoundError:
    pass

import torch
from ptuning_fast import FastPTuning, SoftPrompt, prepend_prompt, reference
from ptuning_fast.op import functional

assert importlib.util.find_spec("ptuning_fast.kernels").origin.endswith("__init__.py")
assert functional.kernels is None
try:
    import ptuning_fast.kernels
    raise SystemExit("the kernels were imported")
except ModuleNotFoundError as error:
    assert error.name == "triton"

# The op, forward and backward, in each layout.
torch.manual_seed(0)
ids, mask = torch.randint(9, (3, 5)), torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
weight, upstream = torch.randn(9, 16), None
for options in ({}, {"adjacent": True}, {"packed": True}):
    results = []
    for op in (prepend_prompt, reference.prepend_prompt):
        prompt = torch.randn(2, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = op(ids, mask, weight=weight, prompt=prompt, labels=ids, position_start=0, **options)
        upstream = torch.randn(out["inputs_embeds"].shape, generator=torch.Generator().manual_seed(2))
        out["inputs_embeds"].backward(upstream)
        results.append((out, prompt.grad))
    (out, grad), (expected, expected_grad) = results
    assert out.keys() == expected.keys()
    assert all(torch.equal(torch.as_tensor(out[key]), torch.as_tensor(expected[key])) for key in out)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-6)  # sums of three fp32 terms

# Training steps of each module.
import zoo

ids, mask = zoo.padded(zoo.texts(), "right")
labels = ids.masked_fill(mask == 0, -100)
model = zoo.build("Llama")
for mode in ("prepend", "packed", "shared"):
    prompt = SoftPrompt(model, 3)
    before = prompt.prompt_embeddings.detach().clone()
    optimizer = torch.optim.SGD(prompt.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(**prompt(ids, mask, labels=labels, mode=mode)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0], (mode, losses)
    assert (prompt.prompt_embeddings != before).any(1).all()
classifier = FastPTuning(zoo.build("BERT"), 3)
classifier(ids, mask, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
assert classifier.prompt_embeddings.grad.abs().sum() > 0
print("all of it", end="")
"""


def all_but_triton(folder):
    """A Python whose packages are this one's, by links, without Triton."""
    venv.create(folder, symlinks=True, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    for path in map(Path, sys.path):
        if path.name not in ("site-packages", "dist-packages"):
            continue
        for entry in path.iterdir():
            # A .pth file may name a folder that has Triton; that of an editable install names the code.
            wanted = entry.suffix != ".pth" or (entry.name.startswith("__editable__") and "ptuning" in entry.name)
            if wanted and "triton" not in entry.name.lower() and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


@pytest.mark.skipif(os.name != "posix", reason="links packages as POSIX does")
def test_the_op_and_a_training_step(tmp_path):
    python = all_but_triton(tmp_path / "env")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment |= {"PYTHONPATH": str(TESTS), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([python, "-c", PROGRAM], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout == "all of it", run.stdout + run.stderr[-4000:]
