#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under eight minutes: builds the extension, runs `pytest -m gpu`
# (compute-sanitizer is among its tests) and the benchmarks, and leaves a log of each part and a summary in one folder.
#
#   scripts/gpu_check.sh [WHEELS]
#
# The machine brings Python 3.10 to 3.12, torch with CUDA, and nvcc; it needs no network. What else is missing
# (megatron-core, pybind11, pytest, ...) comes as wheels from the folder WHEELS (default: wheels/, if it exists); they
# are unpacked into a temporary folder on PYTHONPATH, so that nothing is installed.
#
#   OUT     folder of the results        (default benchmarks/results/<GPU>)
#   PYTHON  interpreter that has torch   (default python3)
#
# Exit code: the number of parts that failed. A part that runs out of its time fails with 124.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

wheels=${1:-wheels}
python=${PYTHON:-python3}
command -v nvcc >/dev/null || PATH=$PATH:/usr/local/cuda/bin
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr -cs 'A-Za-z0-9\n' '_')
if [ -z "$gpu" ]; then
  echo "gpu_check: nvidia-smi names no GPU; this script is for a machine that has one" >&2
  exit 1
fi
results=${OUT:-benchmarks/results/$gpu}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$results"
summary=$results/summary.txt
failed=0

# part NAME SECONDS COMMAND...: runs it within its time, its output to NAME.log, one line to the summary.
part() {
  local name=$1 limit=$2 started=$SECONDS code
  shift 2
  echo "== $name (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" >"$results/$name.log" 2>&1
  code=$?
  tail -n 5 "$results/$name.log"
  printf '%-12s exit code %3d  %4d s\n' "$name" "$code" $((SECONDS - started)) | tee -a "$summary"
  [ "$code" -eq 0 ] || failed=$((failed + 1))
}

{
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv,noheader
  nvcc --version | tail -n 1
  "$python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)'
  git rev-parse HEAD 2>/dev/null
} >"$summary" 2>&1

if [ -d "$wheels" ]; then
  # --no-deps: what the machine already has, torch above all, must stay what is imported.
  part wheels 30 "$python" -m pip install --quiet --no-index --no-deps --target "$work/packages" "$wheels"/*.whl
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}:$work/packages

K2_BUILD_CUDA=1 part build 110 "$python" setup.py build_ext --inplace
# Only the kernels' folder has tests for a GPU; the fixtures above it need packages that the machine may not have.
part tests 180 "$python" -m pytest -rs -m gpu -p no:cacheprovider --confcutdir tests/kernels tests/kernels
# Where the extension or the GPU cannot be used every test is skipped, and pytest ends with 0.
tail -n 1 "$results/tests.log" >>"$summary"
if ! grep -q '[0-9] passed' "$results/tests.log"; then
  echo "tests        none ran: see tests.log" | tee -a "$summary"
  failed=$((failed + 1))
fi
# All of K2's shapes; then fewer beside torch.compile, each of whose graphs takes seconds to compile.
part kernels 50 "$python" -m benchmarks.kernels --no-compile --results "$results"
part compiled 70 "$python" -m benchmarks.kernels --quick --results "$results/beside_torch_compile"
part train_step 30 "$python" benchmarks/train_step.py --output "$results/train_step.json"

echo "results in $results; $failed parts failed"
exit "$failed"
