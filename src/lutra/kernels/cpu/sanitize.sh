#!/bin/sh
# Builds the CPU extension with AddressSanitizer and UndefinedBehaviorSanitizer and runs its tests.
#   src/lutra/kernels/cpu/sanitize.sh [pytest arguments]
# Needs cmake, a C++ compiler, nanobind, pytest and torch in the environment of `python`.
set -eu
root=$(cd "$(dirname "$0")/../../../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(command -v python)
cmake -S "$root" -B "$work/build" -DLUTRA_SANITIZE=ON -DPython_EXECUTABLE="$python" >"$work/log" 2>&1 ||
  { cat "$work/log"; exit 1; }
cmake --build "$work/build" --parallel >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
cp -r "$root/src" "$root/tests" "$work/"
rm -f "$work"/src/lutra/kernels/cpu/_native*.so
cp "$work"/build/_native*.so "$work/src/lutra/kernels/cpu/"
cd "$work"
# Python and torch were not built with it, so its library comes first, and what they leak is theirs.
LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 OMP_NUM_THREADS=1 \
  PYTHONPATH="$work/src" python -m pytest -q -p no:cacheprovider --capture=sys tests/test_kernels_cpu.py \
  tests/test_kernels_cpu_boundary.py tests/test_kernels_cpu_token.py tests/test_kernels_flat_cpu.py "$@"
