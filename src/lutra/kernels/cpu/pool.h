// A small thread pool for work of some 20 to 500 microseconds.
//
// The caller works too. Every thread has a range of items of its own, so that it reads one stream,
// and takes from the others' ranges when it is done: a thread that loses its core to a neighbour
// costs one item, not a share of the whole. Workers spin for a moment after a job, because the next
// layer follows within microseconds, then sleep; pure spinning would take the core from others, and
// with more threads than cores from the caller itself.
//
// One job at a time: a second caller (another Python thread) finds the pool busy and does its job
// alone. Which thread does an item never changes what is computed.
#pragma once

namespace lutra {

using Work = void (*)(void* context, int item, int thread);

// Calls work(context, item, thread) for every item in [0, items), on at most `threads` threads
// including the caller's; 0 <= thread < threads. Returns when all is done.
void run_parallel(int items, int threads, Work work, void* context);

// The largest number of threads that a job may use.
constexpr int kMaxThreads = 256;

}  // namespace lutra
