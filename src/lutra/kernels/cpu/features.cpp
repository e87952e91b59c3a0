// Which instruction sets this machine has, and this build.
#include "features.h"

#include "flat.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#define LUTRA_X86 1
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lutra {

// Levels that this build leaves out; the others are defined in their own units.
#ifndef LUTRA_X86
const Isa* const kAvx512Vnni = nullptr;
const Isa* const kAvx512Bw = nullptr;
const Isa* const kAvx2 = nullptr;
const FlatIsa* const kFlatAvx512Vnni = nullptr;
const FlatIsa* const kFlatAvx2 = nullptr;
#endif
#ifndef LUTRA_AVXVNNI
const FlatIsa* const kFlatAvxVnni = nullptr;
#endif
#ifndef LUTRA_AMX
const MatrixUnit* const kAmx = nullptr;
const FlatMatrix* const kFlatAmx = nullptr;
#endif
#ifndef LUTRA_NEON
const Isa* const kNeon = nullptr;
#endif

namespace {

#ifdef LUTRA_X86
// Linux gives a process the tile registers only when it asks; their state is 8 KiB per thread.
bool request_tiles() {
#if defined(__linux__)
  constexpr int kArchReqXcompPerm = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Features {
  bool avx2 = false, avx512bw = false, avx512vnni = false, amx = false;
  bool flat_avxvnni = false, flat_avx512vnni = false, flat_amx = false;
};

Features detect() {
  Features f;
#ifdef LUTRA_X86
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1, avx = c >> 28 & 1;
  if (!osxsave || !avx || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool ymm = (low & 0x6) == 0x6;         // the system saves xmm and ymm
  const bool zmm = ymm && (low & 0xe0) == 0xe0;  // and masks and zmm
  f.avx2 = ymm && fma && f16c && (b >> 5 & 1);
  const bool foundation = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1;
  f.avx512bw = zmm && f.avx2 && foundation && dq && bw && vl;
  const bool vbmi = c >> 1 & 1, gfni = c >> 8 & 1, vnni = c >> 11 & 1;
  f.avx512vnni = f.avx512bw && vbmi && gfni && vnni;
  f.flat_avx512vnni = f.avx512bw && vnni;
  const bool tiles_saved = (low & 0x60000) == 0x60000;
  const bool tiles = f.flat_avx512vnni && tiles_saved && (d >> 24 & 1) && request_tiles();
  f.amx = f.avx512vnni && tiles && (d >> 22 & 1);
  f.flat_amx = tiles && (d >> 25 & 1);
  f.flat_avxvnni = f.avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
#endif
  return f;
}

}  // namespace

int available_levels(const Isa* levels[kIsaCount]) {
  const Features f = detect();
  int n = 0;
  if (f.avx512vnni && kAvx512Vnni) levels[n++] = kAvx512Vnni;
  if (f.avx512bw && kAvx512Bw) levels[n++] = kAvx512Bw;
  if (f.avx2 && kAvx2) levels[n++] = kAvx2;
  if (kNeon) levels[n++] = kNeon;  // every AArch64 processor has it
  levels[n++] = kPortable;
  return n;
}

int available_flat_levels(FlatLevel levels[kFlatLevelCount]) {
  const Features f = detect();
  int n = 0;
  if (f.flat_avx512vnni && kFlatAvx512Vnni) {
    if (f.flat_amx && kFlatAmx) levels[n++] = {"amx", kFlatAvx512Vnni, kFlatAmx};
    levels[n++] = {kFlatAvx512Vnni->name, kFlatAvx512Vnni, nullptr};
  }
  if (f.flat_avxvnni && kFlatAvxVnni) levels[n++] = {kFlatAvxVnni->name, kFlatAvxVnni, nullptr};
  if (f.avx2 && kFlatAvx2) levels[n++] = {kFlatAvx2->name, kFlatAvx2, nullptr};
  levels[n++] = {kFlatPortable->name, kFlatPortable, nullptr};
  return n;
}

const MatrixUnit* available_matrix_unit() { return detect().amx ? kAmx : nullptr; }

}  // namespace lutra
