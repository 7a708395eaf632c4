"""One changed line: a training script for the torch.cat module, run as it is and with FastPTuning in its place."""

import re
import runpy
import sys

import pytest

SCRIPT = """
import sys

import torch
from transformers import AutoTokenizer

from ptuning_fast.texts.docstrings import stdlib_docstrings
from ptuning_fast.reference import ReferencePTuning as PTuning

folder = sys.argv[1]
torch.manual_seed(0)
model = PTuning(folder, prompt_length=8, num_labels=8)
tokenizer = AutoTokenizer.from_pretrained(folder)
texts, labels = stdlib_docstrings()
names = sorted(set(labels))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
model.eval()  # no dropout, so that the curves can be compared
for step in range(6):
    rows = torch.randint(len(texts), (8,)).tolist()
    batch = tokenizer([texts[row][:120] for row in rows], padding=True, return_tensors="pt")
    targets = torch.tensor([names.index(labels[row]) for row in rows])
    loss = torch.nn.functional.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"loss {loss.item()!r}", flush=True)
"""
OLD = "from ptuning_fast.reference import ReferencePTuning as PTuning"
NEW = "from ptuning_fast import FastPTuning as PTuning"


def test_one_line_is_changed_and_the_losses_are_the_same(minilm, tmp_path, capsys, monkeypatch, torch_backend):
    changed = SCRIPT.replace(OLD, NEW)
    assert sum(one != other for one, other in zip(SCRIPT.splitlines(), changed.splitlines())) == 1
    curves = []
    for name, script in (("before.py", SCRIPT), ("after.py", changed)):
        (tmp_path / name).write_text(script)
        monkeypatch.setattr(sys, "argv", [name, minilm])
        runpy.run_path(str(tmp_path / name), run_name="__main__")
        curves.append([float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)])
    assert len(curves[0]) == 6
    assert curves[0][0] == curves[1][0], "the first step has seen no gradient: it is bit-identical"
    # Later steps have gradients whose batch rows were added up in another order, scaled up by AdamW's first steps.
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert len(set(curves[0])) == 6
