// The kernels. Each block takes its share of all segments (table.h); the dtype is the same all over a stretch, so that
// mixed dtypes share a launch. No atomics: partial results have places of their own and are combined in their order.
//
// Bytes moved, with N those of all segments: read N; clip N, and 2N more if it scales; clip_on_chip N, and N more if it
// scales; scale 2N, or 0 where the coefficient is 1; clamp N, and N more where it changes something.
#pragma once

#include <cooperative_groups.h>

#include "block_reduce.cuh"
#include "on_chip.cuh"
#include "request.h"

namespace fusedclip::cuda {

// Programmatic dependent launch: the next kernel's blocks may start, and wait here until this one's writes can be seen.
__device__ inline void let_next_launch_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void wait_for_last_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// This block's share, in memory that its threads share: one of them divides, and none needs registers for it.
template <class Table>
__device__ inline const Share& own_share(const Table& table) {
  Share& share = block_shared<Share>();
  if (threadIdx.x == 0) share = share_of(table, blockIdx.x, gridDim.x);
  __syncthreads();
  return share;
}

// What a warp takes in one step. A block would be idle but for as many threads, and take as long.
__device__ inline bool is_short(const Stretch& stretch) {
  return stretch.count * size_of(stretch.dtype) <= int64_t(kUnroll) * kWarp * int64_t(sizeof(Pack));
}

// body(team, segment, parts) for those stretches of a share that are wanted(stretch), a team each.
template <class Team, bool backwards, class Table, class Wanted, class Body>
__device__ inline void for_stretches(const Table& table, const Share& share, Wanted wanted, Body body) {
  const Team team;
#pragma unroll 1
  for (int s = backwards ? share.last - team.number : share.first + team.number;
       backwards ? s >= share.first : s <= share.last; s += kThreads / Team::size * (backwards ? -1 : 1)) {
    const Stretch stretch = stretch_of(table, share, s, kTileBytes);
    if (wanted(stretch))
      with_dtype(stretch.dtype, [&](auto t) { body(team, s, split<decltype(t)>(stretch.data, stretch.count)); });
  }
}

__device__ inline bool is_long(const Stretch& stretch) { return !is_short(stretch); }

// Long ones by the whole block, then short ones a warp each.
template <class Table, class Body>
__device__ inline void forwards(const Table& table, const Share& share, Body body) {
  for_stretches<Block, false>(table, share, is_long, body);
  for_stretches<Warp, false>(table, share, is_short, body);
}

// The same in reverse.
template <class Table, class Body>
__device__ inline void backwards(const Table& table, const Share& share, Body body) {
  for_stretches<Warp, true>(table, share, is_short, body);
  for_stretches<Block, true>(table, share, is_long, body);
}

// The single elements at the ends of stretches, fewer than a warp has threads.
template <class Table, class Body>
__device__ inline void edges(const Table& table, const Share& share, Body body) {
  for_stretches<Warp, false>(table, share, [](const Stretch&) { return true; }, body);
}

__device__ inline Combining combining_of_row(int row, Combining last, int rows) {
  return row + 1 == rows ? last : Combining::kSum;
}

// Launch 1. With `slots`: the lifted value of each pair of block and segment, in the places of table.h. Without: that
// of each block, in totals[block]. Powers are bound by arithmetic and spill in 64 registers: they get the registers of
// two.
template <class N, class Table>
__global__ void __launch_bounds__(kThreads, N::kInDouble ? 1 : kPolicy.blocks_per_sm)
    read_kernel(const __grid_constant__ Table table, double p, double* slots, double* totals) {
  let_next_launch_start();
  const Share& share = own_share(table);
  double total = identity(N::kCombining);
  forwards(table, share, [&](auto team, int s, const auto& parts) {
    total = read<N>(parts, p, team, total);
    if (!slots) return;
    total = team_reduce(team, N::kCombining, total);
    if (team.thread == 0) slots[blockIdx.x + s] = total;
    total = identity(N::kCombining);
  });
  if (slots) return;
  total = block_reduce(N::kCombining, total);
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

// Launch 1 where more than the norm is wanted: the statistics of each pair, in kStats rows of slots.
template <class Table>
__global__ void __launch_bounds__(kThreads, kPolicy.blocks_per_sm)
    stats_kernel(const __grid_constant__ Table table, double* slots) {
  let_next_launch_start();
  const Share& share = own_share(table);
  forwards(table, share, [&](auto team, int s, const auto& parts) {
    const Stats own = read_stats(parts, team);
    double* const slot = slots + blockIdx.x + s;
    const int64_t row = slots_of(table, gridDim.x);
#pragma unroll 1  // once in the code for each dtype is enough
    for (int r = 0; r < kStats; ++r) {
      const double value = team_reduce(team, combining_of_row(r, Combining::kMax, kStats), row_of(own, r));
      if (team.thread == 0) slot[r * row] = value;
    }
  });
}

// The slots of each segment to its lifted value, in each of the rows: a warp per segment and row. All rows but the last
// are sums.
template <class Table>
__global__ void __launch_bounds__(kThreads)
    combine_slots_kernel(const __grid_constant__ Table table, Combining last, int rows, const double* slots, int blocks,
                         double* out, int64_t out_row) {
  wait_for_last_launch();
  const int warp = int(blockIdx.x) * kWarps + int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int s = warp / rows, row = warp % rows;
  if (s >= table.size) return;
  const Combining how = combining_of_row(row, last, rows);
  slots += row * slots_of(table, blocks);
  const uint32_t end = slot_begin(table, s + 1, blocks);
  double lifted = identity(how);
#pragma unroll 1
  for (uint32_t i = slot_begin(table, s, blocks) + lane; i < end; i += kWarp) lifted = combine(how, lifted, slots[i]);
  lifted = warp_reduce(how, lifted);
  if (lane == 0) out[row * out_row + table.place + s] = lifted;
}

struct Coefficient {
  double value;
};

// The first warp gets the result.
__device__ inline double combine_totals(Combining how, const double* totals, int count) {
  double lifted = identity(how);
#pragma unroll 1  // one step or a few
  for (int i = int(threadIdx.x); i < count; i += kThreads) lifted = combine(how, lifted, totals[i]);
  return block_reduce(how, lifted);
}

__device__ inline void store_norm(const Results& results, double norm) {
  if (results.norm_is_double)
    *static_cast<double*>(results.norm) = norm;
  else
    *static_cast<float*>(results.norm) = float(norm);
}

// Every block computes the coefficient for itself, from the same totals in the same order: nobody waits for another
// block. Of each, one thread takes the root and divides.
__device__ inline double settle(const NormEnd& norm, const Limits& limits, const double* totals, int count,
                                const Results& results) {
  double& coef = block_shared<Coefficient>().value;
  const double lifted = combine_totals(norm.combining, totals, count);
  if (threadIdx.x == 0) {
    ClipRule rule = limits.rule;
    if (limits.max_norm) rule.max_norm = *limits.max_norm;
    const Clipped clipped = fusedclip::settle(norm, lifted, rule, limits.multiplier ? *limits.multiplier : 1.0);
    coef = clipped.coef;
    if (results.norm && blockIdx.x == 0) {
      store_norm(results, clipped.norm);
      *results.coef = clipped.coef;
    }
  }
  __syncthreads();
  return coef;
}

// One block: totals to a norm.
template <class = void>  // a template so that every file may include it
__global__ void __launch_bounds__(kThreads)
    norm_kernel(NormEnd norm, const double* totals, int count, Results results) {
  wait_for_last_launch();
  const double lifted = combine_totals(norm.combining, totals, count);
  if (threadIdx.x == 0) store_norm(results, finish(norm, lifted));
}

template <class Table, class F>
__device__ inline void rewrite_share(const Table& table, const Share& share, const F& f) {
  backwards(table, share, [&](auto team, int, const auto& parts) { rewrite(parts, f, team); });
}

// Launch 2: norm and coefficient, then everything times the coefficient unless that is 1.
template <class Table>
__global__ void __launch_bounds__(kThreads, kPolicy.blocks_per_sm)
    settle_and_scale_kernel(const __grid_constant__ Table table, Demand demand, const double* totals, int count,
                            Results results) {
  wait_for_last_launch();
  const double coef = settle(demand.norm, demand.limits, totals, count, results);
  if (coef == 1) return;
  const Share& share = own_share(table);
  rewrite_share(table, share, Scale(coef, demand.limits.rule.zero_nonfinite));
}

// Both in one cooperative launch, for what fits on the chip: what was read once is written once.
template <class N, class Table>
__global__ void __launch_bounds__(kThreads, 1)
    clip_on_chip_kernel(const __grid_constant__ Table table, Demand demand, double* totals, Results results) {
  const Share& share = own_share(table);
  const Kept kept(table, share);
  double lifted = read<N>(kept);
  edges(table, share, [&](auto team, int, const auto& parts) {
    lifted = combine(N::kCombining, lifted, read_edge<N>(parts, 0.0, team));
  });
  lifted = block_reduce(N::kCombining, lifted);
  if (threadIdx.x == 0) totals[blockIdx.x] = lifted;
  cooperative_groups::this_grid().sync();
  const double coef = settle(end_of<N>(demand.norm.p), demand.limits, totals, int(gridDim.x), results);
  if (coef == 1) return;

  const Scale scale(coef, demand.limits.rule.zero_nonfinite);
  write_home(kept, scale);
  edges(table, share, [&](auto team, int, const auto& parts) { rewrite_edge(parts, scale, team); });
}

// Segment s times coefs[s * stride]; 1 writes nothing.
template <class Table>
__global__ void __launch_bounds__(kThreads, kPolicy.blocks_per_sm)
    scale_kernel(const __grid_constant__ Table table, const double* coefs, int64_t stride, bool zero) {
  const Share& share = own_share(table);
  backwards(table, share, [&](auto team, int s, const auto& parts) {
    const double coef = coefs[(table.place + s) * stride];
    if (coef != 1) rewrite(parts, Scale(coef, zero), team);
  });
}

template <class Table>
__global__ void __launch_bounds__(kThreads, kPolicy.blocks_per_sm)
    clamp_kernel(const __grid_constant__ Table table, double bound) {
  rewrite_share(table, own_share(table), Clamp{bound});
}

}  // namespace fusedclip::cuda
