#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under eight minutes: builds the extension for this GPU, runs
# `pytest -m gpu` (in processes beside each other, compute-sanitizer's last) and the benchmarks, and leaves a log of each part
# and a summary in one folder. OUT.tar.gz holds all of it after every part: one file to copy back.
#
#   scripts/gpu_check.sh [WHEELS]
#
# The machine brings Python 3.10 to 3.12, torch with CUDA, nvcc and g++; it needs no network. What else is missing comes
# as wheels from the folder WHEELS (default: wheels/, if it exists), unpacked into a temporary folder on PYTHONPATH, so
# that nothing is installed; `pip download --no-deps` on a machine with the same Python gets them:
#   build and tests   pybind11 setuptools>=77 pytest pluggy iniconfig packaging pygments rich numpy
#   train_step        megatron-core==0.16.1 transformers and its needs, and pydantic pydantic-core annotated-types
#                     typing-inspection orjson xxhash zstandard psutil tensorboard
#   peers to measure  liger-kernel
#
#   OUT     folder of the results        (default benchmarks/results/<GPU>)
#   PYTHON  interpreter that has torch   (default python3)
#
# Exit code: the number of parts that failed, whose failures hide no other part. A part that runs out of its time fails
# with 124, or 137 if it had to be killed; tests of which none passed, for all were skipped, with 5.
set -uo pipefail
wheels=${1:+$(realpath -m "$1")}  # from where the script is called
if [ -n "$wheels" ] && [ ! -d "$wheels" ]; then
  echo "gpu_check: the folder of wheels $wheels is not there" >&2
  exit 1
fi
cd "$(dirname "$0")/.." || exit 1

wheels=${wheels:-wheels}
python=${PYTHON:-python3}
command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
[ -x "${CUDA_HOME:-}/bin/nvcc" ] || unset CUDA_HOME  # Python packages of CUDA set it to folders without a compiler
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr -cs 'A-Za-z0-9\n' '_')
if [ -z "$gpu" ]; then
  echo "gpu_check: nvidia-smi names no GPU; this script is for a machine that has one" >&2
  exit 1
fi
results=${OUT:-benchmarks/results/$gpu}
results=${results%/}  # its archive lies beside it
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$results"
summary=$results/summary.txt
failed=0

# run NAME SECONDS COMMAND...: runs it within its time, its output to NAME.log, one line to the summary. At its end it
# is interrupted, not terminated: pytest then still tells what had failed, and Python where it was.
run() {
  local name=$1 limit=$2 started=$SECONDS code
  shift 2
  echo "== $name (at most $limit s)"
  timeout --signal=INT --kill-after=5 "$limit" "$@" >"$results/$name.log" 2>&1
  code=$?
  # Where the extension, the GPU or the sanitizer cannot be used every test is skipped, and pytest ends with 0.
  if [[ " $* " == *" -m pytest "* ]] && ! grep -q ' PASSED' "$results/$name.log"; then
    echo "$name: none passed" | tee -a "$summary"
    [ "$code" -ne 0 ] || code=5
  fi
  tail -n 5 "$results/$name.log"
  printf '%-17s exit code %3d  %4d s\n' "$name" "$code" $((SECONDS - started)) | tee -a "$summary"
  return "$code"
}
# tell LOG...: what pytest says of each part, to the summary
tell() {
  local log
  for log; do grep -h "^FAILED\|^ERROR\| passed\| skipped" "$log" | tail -n 20 >>"$summary"; done
}
pack() { tar -C "$(dirname "$results")" -czf "$results.tar.gz" "$(basename "$results")"; }

part() {
  run "$@" || failed=$((failed + 1))
  pack
}

# beside NAME SECONDS COMMAND...: a part that runs beside those after it, until `together` has waited for them all. A
# shell's background jobs ignore interrupts, and so would what they start.
running=()
beside() {
  local name=$1 limit=$2
  shift 2
  run "$name" "$limit" env --default-signal=INT "$@" &
  running+=($!)
}
together() {
  local job
  for job in "${running[@]}"; do wait "$job" || failed=$((failed + 1)); done
  running=()
  pack
}

{
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm,clocks.max.mem --format=csv,noheader
  nvcc --version | tail -n 1
  git rev-parse HEAD 2>/dev/null
} >"$summary" 2>&1

if [ -d "$wheels" ]; then
  # --no-deps: what the machine already has, torch above all, must stay what is imported.
  part wheels 20 "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/packages" "$wheels"/*.whl
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}:$work/packages

export PYTHONUNBUFFERED=1

# What is missing, by name, before anything else is tried.
part needs 20 "$python" - <<'END'
import importlib, sys, torch
print("Python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
print("GPU", torch.cuda.get_device_name(), torch.cuda.get_device_capability())
missing = []
for name in ("pybind11", "setuptools", "pytest", "rich.progress", "rich.table", "numpy"):
    try:
        importlib.import_module(name)  # which tells of what it needs itself, too
    except ImportError as error:
        missing.append(error.name or name)
if missing:
    sys.exit(f"missing: {', '.join(sorted(set(missing)))}; add their wheels")
import setuptools
print("setuptools", setuptools.__version__)
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit("setuptools must be 77 or newer (it reads pyproject.toml); add its wheel")
END
grep -h "^Python\|^GPU\|missing" "$results/needs.log" >>"$summary"
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -cd '0-9')
export K2_BUILD_CUDA=1 K2_CUDA_ARCHITECTURES=$capability
part build 75 "$python" setup.py build_ext --inplace
# Only the kernels' folder has tests for a GPU; the fixtures above it need packages that the machine may not have. Several
# processes: what an illegal access leaves behind fails every later test of its process, and of no other.
pytest=("$python" -m pytest -vv -rs --tb=short --durations=10 --continue-on-collection-errors -m gpu -p no:cacheprovider
        --confcutdir tests/kernels)
cases=tests/kernels/test_kernel_accuracy.py lists=tests/kernels/test_multi_tensor.py
beside tests_norm 110 "${pytest[@]}" -k "rms_norm" "$cases"
beside tests_elementwise 110 "${pytest[@]}" -k "swiglu or rotary" "$cases"
beside tests_lists 110 "${pytest[@]}" -k "adamw or clip or multi_tensor" "$cases" "$lists"
beside tests_loss 110 "${pytest[@]}" -k "not (rms_norm or swiglu or rotary or adamw or clip)" "$cases"
beside tests_device 110 "${pytest[@]}" tests/kernels/test_on_a_gpu.py
beside tests_rest 110 "${pytest[@]}" --ignore "$cases" --ignore "$lists" --ignore tests/kernels/test_on_a_gpu.py \
  --ignore tests/kernels/test_sanitized_gpu.py --ignore tests/kernels/emulated tests/kernels
together
tell "$results"/tests_*.log
# All of K2's shapes; then fewer beside torch.compile, each of whose graphs takes seconds to compile.
part kernels 75 "$python" -m benchmarks.kernels --no-compile --results "$results"
part compiled 65 "$python" -m benchmarks.kernels --quick --results "$results/beside_torch_compile"
part train_step 25 "$python" -m benchmarks.train_step --output "$results/train_step.json"
# Last: under the sanitizer Python alone takes half of its time to start.
for check in memcheck racecheck; do
  beside "$check" 75 "${pytest[@]}" -k "$check" tests/kernels/test_sanitized_gpu.py
done
together
tell "$results"/memcheck.log "$results"/racecheck.log
pack

echo "results in $results; $failed parts failed"
exit "$failed"
