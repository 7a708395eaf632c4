"""A result of the benchmarks: which code, commit and machine it belongs to."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS = "ptuning-fast"
AUTOCAST = "torch.cat, bf16 autocast"
COMMANDS = {"cpu": "pytest benchmarks/ --benchmark-json=RESULT.json", "cuda": "benchmarks/gpu_run.sh OUT"}


def code(device):
    """The files that the stage runs on a device ("cuda" or "cpu"), and a SHA-256 over them."""
    if device == "cuda":
        files = sorted(ROOT.glob("kernels/prompt_embedding/*.py"))
    else:
        files = sorted(ROOT.glob("ptuning_fast/op/*.py"))
    names = [file.relative_to(ROOT).as_posix() for file in files]
    return {"files": names, "sha256": digest(names)}


def digest(names):
    """SHA-256 over files of the repository, named by their paths in it."""
    return hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in names)).hexdigest()


def is_current(result):
    """Whether the code that was measured is the code that is here; it is not where one of its files is gone."""
    names = result["code"]["files"]
    return all((ROOT / name).is_file() for name in names) and digest(names) == result["code"]["sha256"]


def measured_on(result):
    machine, versions = result["machine_info"], result["machine_info"]["versions"]
    packages = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    return f"{machine_name(machine)} with {packages}, at commit {commit_name(result)}"


def machine_name(machine):
    return machine["gpu"] or f"{machine['cpu']['brand_raw']} ({machine['threads']} threads)"


def commit_name(result):
    return result["commit_info"]["id"][:10] + (" with changes" if result["commit_info"]["dirty"] else "")
