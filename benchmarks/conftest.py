"""`pytest benchmarks/` measures; `--benchmark-disable` runs each case once, as a check. measure.py says how.

pytest-benchmark's options work as ever. At the end stand the ratios, and `--benchmark-json` takes everything along.
"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

# Timed as users run it: on a machine without a GPU the op takes its torch path, not Triton's interpreter.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import figures
import provenance
import pytest
import torch

MEASURED = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[MEASURED] = []


@pytest.fixture(scope="session")
def checked_alone(pytestconfig):
    """Whether nothing is timed: then small sizes do."""
    return pytestconfig.getoption("benchmark_disable")


@pytest.fixture(autouse=True)
def collected(request):
    """Keep the figures of each case that was timed for the table at the end."""
    yield
    benchmark = (request.node.funcargs or {}).get("benchmark")  # none of them where a case is interrupted
    if benchmark is not None and not benchmark.disabled and benchmark.extra_info:
        request.config.stash[MEASURED].append(benchmark.extra_info)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    if config.stash[MEASURED]:
        terminalreporter.write_line(figures.text(config.stash[MEASURED]))


def pytest_benchmark_update_machine_info(config, machine_info):
    packages = ("torch", "triton", "transformers", "peft", "liger-kernel")
    machine_info["versions"] = {"python": platform.python_version()}
    for package in packages:
        try:
            machine_info["versions"][package] = version(package)
        except PackageNotFoundError:
            machine_info["versions"][package] = None
    machine_info["threads"] = torch.get_num_threads()
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None


def pytest_benchmark_update_commit_info(config, commit_info):
    # A copy without git's history cannot know its commit; whoever made the copy can.
    commit_info["id"] = os.environ.get("COMMIT") or commit_info["id"]


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["code"] = provenance.code("cuda" if torch.cuda.is_available() else "cpu")
