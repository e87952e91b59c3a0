#include "token.inc"

#include <memory>

#include "pool.h"

namespace lutra {

const TokenOps* const kTokenPortable = &ops;
#if !defined(__x86_64__)
const TokenOps* const kTokenAvx2 = nullptr;
#endif

size_t token_scratch(const TokenAttention& a) {
  const size_t padded = (size_t)(a.position + kLanes) / kLanes * kLanes;
  return (size_t)(a.heads / a.kv_heads) * (2 * (size_t)a.dim + padded);
}

void token_attention(const TokenOps& ops, const TokenAttention& a, int threads) {
  constexpr size_t kWorthSharing = 1 << 17;  // multiplications for which threads are worth waking
  const int items = a.batch * a.kv_heads;
  const size_t work = (size_t)a.batch * a.heads * a.dim * (size_t)(a.position + 1);
  int team = work < kWorthSharing ? 1 : threads < kMaxThreads ? threads : kMaxThreads;
  team = team < 1 ? 1 : team;
  const size_t room = token_scratch(a);
  const std::unique_ptr<float[]> scratch(new float[room * team]);
  struct Job {
    const TokenOps& ops;
    const TokenAttention& a;
    float* scratch;
    size_t room;
  } job = {ops, a, scratch.get(), room};
  run_parallel(
      items, team,
      [](void* context, int item, int thread) {
        const Job& job = *(const Job*)context;
        job.ops.attend(job.a, item / job.a.kv_heads, item % job.a.kv_heads,
                       job.scratch + job.room * thread);
      },
      &job);
}

}  // namespace lutra
