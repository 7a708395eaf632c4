"""Benchmarks are run with `pytest benchmarks/`; `--benchmark-disable` runs each once, as a check."""

import os

# Timed as users run it: on a machine without a GPU the op takes its torch path, not Triton's interpreter.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
