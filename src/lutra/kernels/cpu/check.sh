#!/bin/sh
# Builds check.cpp and runs it on processors that are not here, under qemu-user:
# AArch64 with NEON, and x86-64 without AVX. Then on this one.
#   src/lutra/kernels/cpu/check.sh
# Needs g++; and for the others g++-aarch64-linux-gnu and qemu-user (Debian's names), else it says
# what it left out.
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
common="portable pool engine memory flat flat_portable:-ffp-contract=off"
flags="-std=c++17 -O2 -fno-math-errno -w"

build() { # compiler, output, units with their flags as unit:flags
  compiler=$1 output=$2
  shift 2
  objects=
  for unit in $common "$@" check; do
    name=${unit%%:*}
    case $unit in *:*) extra=${unit#*:} ;; *) extra= ;; esac
    $compiler $flags $extra -c "$name.cpp" -o "$work/$output-$name.o"
    objects="$objects $work/$output-$name.o"
  done
  $compiler $objects -static -pthread -o "$work/$output"
}

avx2="-mavx2 -mfma -mf16c"
avx512="$avx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl"
if [ "$(uname -m)" = x86_64 ]; then
  build g++ x86 "features:-DLUTRA_AMX=1 -DLUTRA_AVXVNNI=1" "avx2:$avx2" "avx512bw:$avx512" \
    "avx512vnni:$avx512 -mavx512vbmi -mavx512vnni -mgfni" "amx:$avx512 -mamx-tile -mamx-bf16" \
    "flat_avx2:$avx2 -ffp-contract=off" "flat_avxvnni:$avx2 -mavxvnni -ffp-contract=off" \
    "flat_avx512vnni:$avx512 -mavx512vnni -ffp-contract=off" \
    "flat_amx:$avx512 -mamx-tile -mamx-int8"
  echo "this processor:"
  "$work/x86"
  if command -v qemu-x86_64 >/dev/null; then
    echo "x86-64 without AVX:"
    qemu-x86_64 -cpu Nehalem "$work/x86"
  else
    echo "left out: x86-64 without AVX (no qemu-x86_64)"
  fi
fi
if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
  build aarch64-linux-gnu-g++ arm "features:-DLUTRA_NEON=1" neon
  echo "AArch64:"
  qemu-aarch64 "$work/arm"
else
  echo "left out: AArch64 (no aarch64-linux-gnu-g++ or qemu-aarch64)"
fi
