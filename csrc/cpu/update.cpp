#include "update.h"

#include <algorithm>

#include "kernels.h"
#include "parallel.h"
#include "shares.h"
#include "update_kernels.h"

namespace fusedclip::cpu {
namespace {

// Of parameters, beside which there are about six times as many bytes of other streams: as engine.cpp has them of
// gradients alone.
constexpr int64_t kBytesPerThread = 192 * 1024, kBytesPerShare = 64 * 1024;

// The last bytes of a tile, which is gone through from its end: hardware sees a stream coming only after some lines of
// it, and short tensors are over then.
void prefetch(const UpdateSegment& s, int64_t first) {
  const int64_t end = std::min(first + kTileElements, s.count);
  const auto lines = [end](const void* stream, DType type) {
    const char* const after = static_cast<const char*>(stream) + end * size_of(type);
    for (int line = 1; line <= 8; ++line) __builtin_prefetch(after - 64 * line);
  };
  lines(s.parameter, s.parameter_type);
  lines(s.gradient, s.gradient_type);
  for (int k = 0; k < kMostStates; ++k)
    if (s.states[k]) lines(s.states[k], s.state_types[k]);
  if (s.master) lines(s.master, s.kept == Master::kSplit ? DType::kBFloat16 : DType::kFloat32);
}

}  // namespace

bool update(const UpdateWork& work, const std::vector<Segment>& parameters, const Tiling& tiling, int max_threads) {
  if (work.skip && *work.skip != 0) return false;
  const UpdateKernels& k = *kernels().updates;
  const int threads = static_cast<int>(std::clamp<int64_t>(tiling.bytes() / kBytesPerThread, 1, max_threads));
  Shares shares(tiling.bytes() / kBytesPerShare + 1, threads);
  const auto move = [&](int64_t s, int64_t tile) {
    const UpdateSegment& segment = work.segments[s];
    const int64_t first = (tile - tiling.first_tile[s]) * kTileElements;
    k.update(work.rule, segment, first, std::min(kTileElements, segment.count - first), work.rows[segment.row],
             segment.step ? *segment.step + 1.0f : 1.0f, work.coefs[segment.row]);
  };
  in_parallel(threads, [&](int thread, int) {
    // Backwards: the gradients that the norm has read last are still in the cache.
    shares.each(thread, Order::kBackwards, [&](int64_t share) {
      const int64_t begin = share_begin(tiling, parameters, share, shares.count());
      int64_t tile = share_begin(tiling, parameters, share + 1, shares.count());
      if (tile == begin) return;
      for (int64_t s = segment_at(tiling.first_tile, tile - 1); tile-- > begin;) {
        while (tiling.first_tile[s] > tile) --s;
        if (tile > begin) {
          const int64_t next = tiling.first_tile[s] < tile ? s : s - 1;
          prefetch(work.segments[next], (tile - 1 - tiling.first_tile[next]) * kTileElements);
        }
        move(s, tile);
      }
    });
  });
  for (const UpdateSegment& segment : work.segments)
    if (segment.step) *segment.step += 1;
  return true;
}

}  // namespace fusedclip::cpu
