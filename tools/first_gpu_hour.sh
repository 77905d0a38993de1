#!/usr/bin/env bash
# The first hour on a GPU: builds the CUDA kernels for it, tests them and measures them. Each step has a limit, all together 12
# minutes. Stops at the first step that fails and says what to send. Needs a CUDA build of torch, and nvcc of its major version.
#
# tools/first_gpu_hour.sh [FOLDER]    writes the output of every step and gpu.json to FOLDER (gpu-report)
set -uo pipefail
cd "$(dirname "$0")/.."
report=$(realpath -m "${1:-gpu-report}")
mkdir -p "$report"
number=0

# step SECONDS WHAT HINT COMMAND...
step() {
  local seconds=$1 what=$2 hint=$3 log status
  shift 3
  log="$report/$((++number))-${what// /-}.log"
  printf '%s (at most %d s) ... ' "$what" "$seconds"
  timeout --kill-after=10 "$seconds" "$@" >"$log" 2>&1
  status=$?
  ((status == 0)) && { echo "passed after $SECONDS s"; return; }
  ((status == 124)) && hint="it did not end; $hint"
  printf 'FAILED\n'
  tail -n 30 "$log"
  printf '\nStopped: %s failed (%s).\nPlease send the folder %s, which has the output of every step.\n' \
    "$what" "$hint" "$report"
  exit 1
}

step 20 "machine" "nvidia-smi, nvcc or a CUDA build of torch is missing" bash -c '
  nvidia-smi && nvcc --version &&
  python -c "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_properties(0))"'
architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
step 270 "build" "the compiler's message is above" python -m pip install -v '.[test,benchmarks,machine-code]' \
  -C cmake.define.KDDP_CUDA=ON -C "cmake.define.CMAKE_CUDA_ARCHITECTURES=$architecture"
step 30 "first launch" "the kernels do not run on this GPU or driver" bash -c 'cd tests && python -c "
import kddp_ext, torch
print(kddp_ext.build_info())
x = torch.randn(64, 100, device=\"cuda\", requires_grad=True)
kddp_ext.fused_kd_l1_loss(x, x.detach() + 1, None, alpha=1.0, backend=\"native\").backward()
print(x.grad.norm().item())"'
step 60 "streams graphs devices" "the name of the test is half of the answer; compute-sanitizer python -m pytest -m cuda \
shows where" python -m pytest -m cuda -x -q
step 180 "numbers" "a test that passes on the emulator and fails here shows where the emulator is wrong" \
  python -m pytest tests/loss tests/ops --emulated=none -k cuda --maxfail=20 -q
step 60 "does every benchmark run" "the case that failed is above" python -m benchmarks --device cuda --smoke
step 100 "loss benchmark" "the case that failed is above" python -m benchmarks --device cuda --only loss \
  --json "$report/gpu.json" --markdown "$report/gpu.md"
printf '\nAll steps passed. Please send the folder %s. docs/roadmap.md says what to run next.\n' "$report"
