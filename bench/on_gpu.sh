#!/usr/bin/env bash
# One command for a machine with a GPU: build, test, sanitize, bench; under 9 minutes; two files land in $OUT.
#
# usage: OUT=folder bench/on_gpu.sh [part ...]
#   parts, in order: build test sanitize ops layers resnet18 steps resnet50 vgg16_bn table
# Without parts it runs all that the time allows and names the rest; a part can be run alone, so that a broken-off
# run goes on: each adds its rows to $OUT/gpu.json. What is printed by tests and benches goes to $OUT/log.txt.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:?set OUT to a folder for the results}
PYTHON=${PYTHON:-python3}
LIMIT_S=${LIMIT_S:-535} # of the whole; NETWORK_S, where it is set, of each network
mkdir -p "$OUT"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
parts=${*:-build test sanitize ops layers resnet18 steps resnet50 vgg16_bn table}
failed=0

bounded() { # seconds, name, command...
  local seconds=$1 name=$2 left=$((LIMIT_S - SECONDS)) started=$SECONDS rc=0
  shift 2
  if ((left < 10)); then echo "left    $name (of $LIMIT_S s none remain; run it by name)"; return; fi
  if ((seconds > left)); then seconds=$left; fi
  echo "== $name: $*" >>"$OUT/log.txt"
  timeout -k 5 "$seconds" "$@" >"$OUT/part.tmp" 2>&1 || rc=$?
  cat "$OUT/part.tmp" >>"$OUT/log.txt"
  if ((rc == 0)); then
    echo "ok      $name ($((SECONDS - started)) s)"
  else
    failed=1
    echo "FAILED  $name (rc $rc, $((SECONDS - started)) s)"
    tail -n 12 "$OUT/part.tmp"
  fi
  rm -f "$OUT/part.tmp"
}

# The settings in pyproject.toml name a plugin that such a machine may lack.
PYTEST=("$PYTHON" -m pytest -c /dev/null --rootdir . -v --tb=short -p no:cacheprovider --import-mode=importlib)
# Kernels are compiled by the CPU when they are first met: by several processes, where there is the plugin for it.
AT_ONCE=()
if "$PYTHON" -c "import xdist" 2>/dev/null; then AT_ONCE=(-n "${TEST_WORKERS:-8}"); fi
bench() { bounded "$2" "$1" "$PYTHON" -m bench.bench_gpu "$1" --json "$OUT/gpu.json" --budget "$3"; }

for part in $parts; do
  case $part in
    build) bounded 150 build "$PYTHON" setup.py build_ext --inplace ;;
    test) bounded 120 test "${PYTEST[@]}" "${AT_ONCE[@]}" --durations 8 tests/gpu tests/kernels/test_cuda.py ;;
    sanitize)
      if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null); then
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 bounded 60 sanitize "$sanitizer" --tool memcheck --error-exitcode 9 \
          "${PYTEST[@]}" tests/gpu/test_gpu_sanitized.py
      else
        echo "left    sanitize (no compute-sanitizer on PATH or in /usr/local/cuda/bin)"
      fi
      ;;
    ops) bench ops 40 25 ;;
    layers) bench layers 90 70 ;;
    resnet18) bench resnet18 "${NETWORK_S:-100}" "${NETWORK_S:-100}" ;;
    steps) bench steps 60 40 ;;
    resnet50) bench resnet50 "${NETWORK_S:-120}" "${NETWORK_S:-120}" ;;
    vgg16_bn) bench vgg16_bn "${NETWORK_S:-100}" "${NETWORK_S:-100}" ;;
    table) "$PYTHON" -m bench.bench_gpu table --json "$OUT/gpu.json" || failed=1 ;;
    *) echo "on_gpu.sh: expected parts as in its first lines, got $part" >&2; exit 2 ;;
  esac
done
nvidia-smi --query-gpu=name,clocks.sm,clocks.mem,driver_version --format=csv,noheader 2>/dev/null || echo "no GPU here"
exit $failed
