#!/usr/bin/env bash
# One command for a machine with a GPU: build, test, bench, sanitize; under 9 minutes; two files land in $OUT.
#
# usage: OUT=folder bench/on_gpu.sh [part ...]
#   parts, in order: build test layers resnet50 ops sanitize steps resnet18 vgg16_bn table
# Without parts it runs all that the time allows and names the rest. The bounds up to ops fill the time, so that
# those always have their turn; what they leave is for the others. A part can be run alone, so that a
# broken-off run goes on: each adds its rows to $OUT/gpu.json. What is printed by tests and benches goes to
# $OUT/log.txt.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:?set OUT to a folder for the results}
PYTHON=${PYTHON:-python3}
LIMIT_S=${LIMIT_S:-515} # of all but the table; NETWORK_S, where it is set, of each network
AT_END_S=40 # of a bench: what the job may take that is begun last
mkdir -p "$OUT"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
parts=${*:-build test layers resnet50 ops sanitize steps resnet18 vgg16_bn table}
failed=0
"$PYTHON" -c "import torch; raise SystemExit(not torch.cuda.is_available())" || {
  echo "on_gpu.sh: expected a GPU that torch can use, got none ($PYTHON)" >&2
  exit 2
}

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
if "$PYTHON" -c "import xdist" 2>/dev/null; then AT_ONCE=(-n "${TEST_WORKERS:-8}" --dist worksteal); fi
bench() { # part, seconds
  local seconds=$2 left=$((LIMIT_S - SECONDS))
  if ((seconds > left)); then seconds=$left; fi
  if ((seconds <= AT_END_S)); then echo "left    $1 (of $LIMIT_S s $left remain; run it by name)"; return; fi
  bounded "$seconds" "$1" "$PYTHON" -m bench.bench_gpu "$1" --json "$OUT/gpu.json" \
    --budget $((seconds - AT_END_S))
}

for part in $parts; do
  case $part in
    build) bounded 150 build "$PYTHON" setup.py build_ext --inplace ;;
    test)
      # Two threads for each process: all of theirs together would wait for one another.
      OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive bounded 140 test "${PYTEST[@]}" "${AT_ONCE[@]}" -m "not long" \
        --durations 8 tests/gpu tests/kernels/test_cuda.py
      ;;
    sanitize)
      if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null); then
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 bounded 60 sanitize "$sanitizer" --tool memcheck --error-exitcode 9 \
          "${PYTEST[@]}" tests/gpu/test_gpu_sanitized.py
      else
        echo "left    sanitize (no compute-sanitizer on PATH or in /usr/local/cuda/bin)"
      fi
      ;;
    layers) bench layers 80 ;;
    resnet50) bench resnet50 "${NETWORK_S:-85}" ;;
    ops) bench ops 60 ;;
    steps) bench steps 80 ;;
    resnet18 | vgg16_bn) bench "$part" "${NETWORK_S:-90}" ;;
    table) "$PYTHON" -m bench.bench_gpu table --json "$OUT/gpu.json" || failed=1 ;;
    *) echo "on_gpu.sh: expected parts as in its first lines, got $part" >&2; exit 2 ;;
  esac
done
nvidia-smi --query-gpu=name,clocks.sm,clocks.mem,driver_version --format=csv,noheader 2>/dev/null || echo "no GPU here"
exit $failed
