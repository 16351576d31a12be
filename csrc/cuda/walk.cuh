// A team's way through a stretch of elements: reading it forwards, rewriting it backwards. Packs are counted in 32
// bits, which spares registers: a block's share is far below the 32 GB that these reach.
#pragma once

#include "block_reduce.cuh"
#include "lift.cuh"
#include "table.h"

namespace fusedclip::cuda {

// The lifted value of the single elements that this thread takes care of.
template <class N, class T, class Team>
__device__ inline double read_edge(const Split<T>& s, double p, Team team) {
  const T* const edge = edge_of(s, team.thread);
  return edge ? lift_one<N>(double(widen(*edge)), p) : identity(N::kCombining);
}

// `lifted`, and with it the lifted value of what this thread reads of a stretch.
template <class N, class T, class Team>
__device__ inline double read(const Split<T>& s, double p, Team team, double lifted) {
  constexpr int unroll = kZeroIsNeutral<N> ? kUnroll : 1;
  lifted = combine(N::kCombining, lifted, read_edge<N>(s, p, team));
#pragma unroll 1
  for (int i = team.thread; i < s.count; i += unroll * team.size) {
    const Pack* const here = s.packs + i;
    const int left = s.count - i;
    Pack batch[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) batch[u] = u == 0 || u * team.size < left ? here[u * team.size] : Pack{};
    lifted = combine(N::kCombining, lifted, lift<N, T>(batch, p));
  }
  return lifted;
}

// Two sums, a maximum and two counts have the registers of the other half: with 4 loads in flight they spill. 32 KB an
// SM are enough but for a B200 (launch_policy.h), which will read a little slower than for the norm alone.
constexpr int kStatsUnroll = (kUnroll + 1) / 2;

// The statistics of what this thread reads of a stretch.
template <class T, class Team>
__device__ inline Stats read_stats(const Split<T>& s, Team team) {
  Counted<T> counted;
  const T* const edge = edge_of(s, team.thread);
  if (edge) add(counted, *edge);
#pragma unroll 1
  for (int i = team.thread; i < s.count; i += kStatsUnroll * team.size) {
    const Pack* const here = s.packs + i;
    const int left = s.count - i;
    Pack batch[kStatsUnroll];
#pragma unroll
    for (int u = 0; u < kStatsUnroll; ++u) {
      const bool inside = u == 0 || u * team.size < left;
      batch[u] = inside ? here[u * team.size] : Pack{};
      counted.zeros -= inside ? 0 : kPerPack<T>;
    }
    add(counted, batch);
  }
  return counted.stats();
}

// What happens to an element of T when it is written; `kAlways`: even to those that it leaves as they are.
class Scale {
 public:
  static constexpr bool kAlways = true;

  // `zeros`: where the coefficient is 0, inf and NaN must not survive as NaN.
  __device__ Scale(double coef, bool zero)
      : coef_(coef), factors_(factors_of<float>(coef)), zeros_(zero && coef == 0) {}

  template <class T>
  __device__ float apply(float x) const {
    return zeros_ ? 0.0f : x * factors_.rest * factors_.power;
  }
  template <class T>
  __device__ double apply(double x) const {
    return zeros_ ? 0.0 : x * coef_;
  }

 private:
  double coef_;
  Factors<float> factors_;
  bool zeros_;
};

struct Clamp {
  static constexpr bool kAlways = false;
  double bound;

  template <class T, class A>
  __device__ A apply(A x) const {
    const A high = rounded_to<T>(bound);
    x = x < -high ? -high : x;
    return x > high ? high : x;  // NaN stays: it is neither
  }
};

template <class T, class F>
__device__ inline Pack rewritten(Pack pack, const F& f) {
  auto x = bit_cast<Elements<T>>(pack);
#pragma unroll
  for (int e = 0; e < kPerPack<T>; ++e) x.of[e] = narrow<T>(f.template apply<T>(widen(x.of[e])));
  return bit_cast<Pack>(x);
}

template <class T, class F, class Team>
__device__ inline void rewrite_edge(const Split<T>& s, const F& f, Team team) {
  T* const edge = edge_of(s, team.thread);
  if (edge) *edge = narrow<T>(f.template apply<T>(widen(*edge)));
}

__device__ inline bool same(Pack a, Pack b) { return a.x == b.x && a.y == b.y && a.z == b.z && a.w == b.w; }

// Backwards: what the read pass saw last is still in the second-level cache.
template <class T, class F, class Team>
__device__ inline void rewrite(const Split<T>& s, const F& f, Team team) {
  constexpr int step = kWriteUnroll * Team::size;  // a power of two: counts are cut down to multiples of it
#pragma unroll 1
  for (int i = ((s.count - 1) & -step) + team.thread; i >= 0; i -= step) {
    Pack* const here = s.packs + i;
    const int left = s.count - i;
    Pack batch[kWriteUnroll];
#pragma unroll
    for (int u = 0; u < kWriteUnroll; ++u)
      if (u * team.size < left) batch[u] = here[u * team.size];
#pragma unroll
    for (int u = 0; u < kWriteUnroll; ++u) {
      if (u * team.size >= left) continue;
      const Pack written = rewritten<T>(batch[u], f);
      if (F::kAlways || !same(written, batch[u])) here[u * team.size] = written;
    }
  }
  rewrite_edge(s, f, team);
}

}  // namespace fusedclip::cuda
