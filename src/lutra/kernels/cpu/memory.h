// Memory for prepared weights, on huge pages where the system has them. Reading a weight is the whole
// cost of a small batch; on 4 KiB pages the processor's prefetchers stop at every page, which costs 5
// to 15 % of the bandwidth. Weights share arenas, because a layer of 2 to 6 MB of its own would
// lie mostly outside whole 2 MiB pages, or waste what it leaves of them.
#pragma once

#include <cstddef>

namespace lutra {

// Throws std::bad_alloc. The block is aligned to 64 bytes and not touched yet.
void* allocate_weight(size_t bytes);
void free_weight(void* block);

}  // namespace lutra
