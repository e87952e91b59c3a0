#include "memory.h"

#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#define LUTRA_ARENAS 1
#endif

namespace lutra {

#ifdef LUTRA_ARENAS
namespace {

constexpr size_t kHugePage = size_t(2) << 20, kPage = 4096, kArenaBytes = size_t(64) << 20;

struct Arena {
  unsigned char* base;
  size_t size, used, blocks;
};

struct Block {
  Arena* arena;
  size_t size;
};

struct State {
  std::mutex mutex;
  std::map<unsigned char*, Block> blocks;
  Arena* filling = nullptr;
};

State& state() {
  static State* s = new State;  // never destroyed: tensors may be freed after static destructors
  return *s;
}

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

Arena* map_arena(size_t bytes) {
  const size_t size = round_up(bytes, kHugePage);
  void* p = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
                 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  unsigned char* raw = (unsigned char*)p;
  unsigned char* base = raw + (kHugePage - (uintptr_t)raw % kHugePage) % kHugePage;
  if (base > raw) munmap(raw, base - raw);
  if (base < raw + kHugePage) munmap(base + size, raw + kHugePage - base);
#ifdef MADV_HUGEPAGE
  madvise(base, size, MADV_HUGEPAGE);  // a wish: without huge pages everything works as well
#endif
  return new Arena{base, size, 0, 0};
}

}  // namespace

void* allocate_weight(size_t bytes) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  const size_t size = round_up(bytes ? bytes : 1, 64);
  Arena* arena;
  if (size > kArenaBytes / 2) {
    arena = map_arena(size);
  } else {
    if (!s.filling || s.filling->used + size > s.filling->size) s.filling = map_arena(kArenaBytes);
    arena = s.filling;
  }
  unsigned char* block = arena->base + arena->used;
  s.blocks[block] = {arena, size};
  arena->used += size;
  arena->blocks++;
  return block;
}

void free_weight(void* p) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.mutex);
  const auto found = s.blocks.find((unsigned char*)p);
  if (found == s.blocks.end()) return;
  unsigned char* block = found->first;
  const Block freed = found->second;
  s.blocks.erase(found);
  Arena* arena = freed.arena;
  if (--arena->blocks == 0) {
    // The last one: also of the arena being filled, for its blocks lie in order and are never
    // reused, so an emptied arena would only get less useful.
    if (s.filling == arena) s.filling = nullptr;
    munmap(arena->base, arena->size);
    delete arena;
    return;
  }
  unsigned char* from = arena->base + round_up(block - arena->base, kPage);
  unsigned char* to = arena->base + (block - arena->base + freed.size) / kPage * kPage;
  if (from < to) madvise(from, to - from, MADV_DONTNEED);  // other weights still lie around it
}

#else

void* allocate_weight(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, bytes ? bytes : 1) != 0) throw std::bad_alloc();
  return p;
}

void free_weight(void* block) { free(block); }

#endif

}  // namespace lutra
