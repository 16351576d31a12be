// The plain loops that passes over memory are held against: they add up its words, or change and store them.
// Compiled for the machine that it runs on; threads as in csrc/cpu/parallel.h, from the runtime that torch has loaded.
#include <cstdint>

namespace {

typedef uint64_t Line __attribute__((vector_size(64), aligned(8), may_alias));
constexpr int64_t kLine = 64, kPage = 4096;

enum Ahead { kNothing, kLines, kPages };

// So many stretches of `each` lines one behind the other, turn about. Stores every word with the bits of `key` flipped.
template <int streams, Ahead mode, bool stores>
uint64_t run(char* x, int64_t each, int64_t ahead, uint64_t key) {
  Line sums[streams] = {};
  for (int64_t i = 0; i < each * kLine; i += kLine) {
#pragma GCC unroll 8
    for (int s = 0; s < streams; ++s) {
      char* const at = x + s * each * kLine + i;
      if (mode == kLines || (mode == kPages && uintptr_t(at) % kPage < kLine)) __builtin_prefetch(at + ahead);
      Line& line = *reinterpret_cast<Line*>(at);
      if (stores)
        line ^= key;
      else
        sums[s] += line;
    }
  }
  for (int s = 1; s < streams; ++s) sums[0] += sums[s];
  return sums[0][0];
}

template <int streams, bool stores>
uint64_t with_mode(char* x, int64_t lines, int64_t ahead, bool by_page, uint64_t key) {
  const auto loop = ahead == 0 ? run<streams, kNothing, stores>
                    : by_page  ? run<streams, kPages, stores>
                               : run<streams, kLines, stores>;
  return loop(x, lines / streams, ahead, key);
}

template <bool stores>
uint64_t with_streams(int streams, char* x, int64_t lines, int64_t ahead, bool by_page, uint64_t key) {
  const auto loop = streams == 8   ? with_mode<8, stores>
                    : streams == 4 ? with_mode<4, stores>
                    : streams == 2 ? with_mode<2, stores>
                                   : with_mode<1, stores>;
  return loop(x, lines, ahead, by_page, key);
}

}  // namespace

// Each thread its share of the lines, but for those that don't divide by the streams; a `key` of 0 changes nothing.
extern "C" uint64_t go_through(char* x, int64_t bytes, int threads, int streams, int64_t ahead, bool by_page,
                               bool stores, uint64_t key) {
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total) if (threads > 1)
  for (int t = 0; t < threads; ++t) {
    const int64_t begin = bytes / kLine * t / threads, end = bytes / kLine * (t + 1) / threads;
    const auto loop = stores ? with_streams<true> : with_streams<false>;
    total += loop(streams, x + begin * kLine, end - begin, ahead, by_page, key);
  }
  return total;
}
