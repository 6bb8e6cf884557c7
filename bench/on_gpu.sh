#!/usr/bin/env bash
# One command for a machine with a GPU: build, test, bench; everything under 9 minutes; results land in $OUT.
#
# usage: OUT=folder bench/on_gpu.sh [part ...]      parts, in order: build test ops
# Each part is bounded in time and can be run alone, so that a broken-off run goes on. No GPU kernel is there yet: what
# this measures today is the machine's CPU (AVX-512 and AMX, where it has them) and that everything builds beside CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:?set OUT to a folder for the results}
mkdir -p "$OUT"
parts=${*:-build test ops}

bounded() { # seconds, log name, command...
  local seconds=$1 log=$2
  shift 2
  if timeout "$seconds" "$@" >"$OUT/$log.log" 2>&1; then echo "ok      $log"; else echo "FAILED  $log (rc $?)"; tail -n 15 "$OUT/$log.log"; fi
}

for part in $parts; do
  case $part in
    build)
      bounded 120 build python3 setup.py build_ext --inplace
      bounded 120 build_cpp cmake --build "$(ls -d build/cmake-*)" --target kernels_test
      ;;
    test)
      bounded 60 test_cpp "$(ls -d build/cmake-*)/kernels_test" 400
      bounded 120 test_kernels python3 -m pytest -q -p no:cacheprovider tests/kernels -m "not long"
      ;;
    ops) bounded 240 bench_ops python3 bench/bench_ops.py --quick --json "$OUT/bench_ops.json" ;;
    *) echo "on_gpu.sh: expected parts build, test or ops, got $part" >&2; exit 2 ;;
  esac
done
nvidia-smi --query-gpu=name,clocks.sm,clocks.mem,driver_version --format=csv 2>/dev/null || echo "no GPU here"
lscpu | grep -E "Model name|Thread|^CPU\(s\)"
tail -n 40 "$OUT/bench_ops.log" 2>/dev/null || true
