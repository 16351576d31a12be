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

struct Demand {
  NormEnd norm;
  Limits limits;
};

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

template <class Table, class Body>
__device__ inline void for_stretch(const Table& table, const Share& share, int segment, Body body) {
  const Stretch stretch = stretch_of(table, share, segment, kTileBytes);
  with_dtype(stretch.dtype, [&](auto t) { body(split<decltype(t)>(stretch.data, stretch.count)); });
}

// Launch 1. With `slots`: the lifted value of each pair of block and segment, in the places of table.h. Without: that
// of each block, in totals[block]. Powers are bound by arithmetic and spill in 64 registers: they get the registers of
// two.
template <class N, class Table>
__global__ void __launch_bounds__(kThreads, N::kInDouble ? 1 : kPolicy.blocks_per_sm)
    read_kernel(const __grid_constant__ Table table, double p, double* slots, double* totals) {
  let_next_launch_start();
  const Share share = share_of(table, blockIdx.x, gridDim.x);
  double total = identity(N::kCombining);
  for (int s = share.first; s <= share.last; ++s) {
    double lifted = identity(N::kCombining);
    for_stretch(table, share, s, [&](const auto& parts) { lifted = read<N>(parts, p); });
    if (!slots) {
      total = combine(N::kCombining, total, lifted);
      continue;
    }
    lifted = block_reduce(N::kCombining, lifted);
    if (threadIdx.x == 0) slots[blockIdx.x + s] = lifted;
  }
  if (slots) return;
  total = block_reduce(N::kCombining, total);
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

// The slots of each segment to its lifted value: a warp per segment.
template <class Table>
__global__ void __launch_bounds__(kThreads) combine_slots_kernel(const __grid_constant__ Table table, Combining how,
                                                                 const double* slots, int blocks, double* out) {
  wait_for_last_launch();
  const int s = int(blockIdx.x) * kWarps + int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  if (s >= table.size) return;
  const uint32_t end = slot_begin(table, s + 1, blocks);
  double lifted = identity(how);
  for (uint32_t i = slot_begin(table, s, blocks) + lane; i < end; i += kWarp) lifted = combine(how, lifted, slots[i]);
  lifted = warp_reduce(how, lifted);
  if (lane == 0) out[table.place + s] = lifted;
}

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

// Every block computes the coefficient for itself, from the same totals in the same order: nobody waits for anybody.
__device__ inline double settle(const Demand& demand, const double* totals, int count, const Results& results) {
  const Limits& limits = demand.limits;
  const double multiplier = limits.multiplier ? *limits.multiplier : 1.0;
  ClipRule rule = limits.rule;
  if (limits.max_norm) rule.max_norm = *limits.max_norm;
  const double lifted = combine_totals(demand.norm.combining, totals, count);
  const Clipped clipped = fusedclip::settle(demand.norm, lifted, rule, multiplier);
  if (results.norm && blockIdx.x == 0 && threadIdx.x == 0) {
    store_norm(results, clipped.norm);
    *results.coef = clipped.coef;
  }
  return clipped.coef;
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
__device__ inline void rewrite_share(const Table& table, const Share& share, int s, const F& f) {
  for_stretch(table, share, s, [&](const auto& parts) { rewrite(parts, f); });
}

// Launch 2: norm and coefficient, then everything times the coefficient unless that is 1.
template <class Table>
__global__ void __launch_bounds__(kThreads, kPolicy.blocks_per_sm)
    settle_and_scale_kernel(const __grid_constant__ Table table, Demand demand, const double* totals, int count,
                            Results results) {
  wait_for_last_launch();
  const double coef = settle(demand, totals, count, results);
  if (coef == 1) return;
  const Share share = share_of(table, blockIdx.x, gridDim.x);  // not before: it would hold registers, often for nothing
  const Scale scale(coef, demand.limits.rule.zero_nonfinite);
  for (int s = share.last; s >= share.first; --s) rewrite_share(table, share, s, scale);
}

// Both in one cooperative launch, for what fits on the chip: what was read once is written once.
template <class N, class Table>
__global__ void __launch_bounds__(kThreads, 1)
    clip_on_chip_kernel(const __grid_constant__ Table table, Demand demand, double* totals, Results results) {
  const Share share = share_of(table, blockIdx.x, gridDim.x);
  const int tiles = int(share.end - share.begin);
  Pack* const shared = dynamic_shared() + threadIdx.x;  // the next pack of this thread is kThreads further
  Pack kept[kInRegisters], group[kUnroll];

  Cursor<Table> ahead(table, share), cursor(table, share);
  load(ahead, kept);
  double lifted = lift<N>(cursor, kept);
  for (int k = kInRegisters; k < tiles; k += kUnroll) {
    load(ahead, group);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (k + u < tiles) shared[(k + u - kInRegisters) * kThreads] = group[u];
    lifted = combine(N::kCombining, lifted, lift<N>(cursor, group));
  }
  for (int s = share.first; s <= share.last; ++s)
    for_stretch(table, share, s,
                [&](const auto& parts) { lifted = combine(N::kCombining, lifted, read_edge<N>(parts, 0.0)); });

  lifted = block_reduce(N::kCombining, lifted);
  if (threadIdx.x == 0) totals[blockIdx.x] = lifted;
  cooperative_groups::this_grid().sync();
  const double coef = settle(demand, totals, int(gridDim.x), results);
  if (coef == 1) return;

  const Scale scale(coef, demand.limits.rule.zero_nonfinite);
  Cursor<Table> again(table, share);
  store(again, kept, scale);
  for (int k = kInRegisters; k < tiles; k += kUnroll) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (k + u < tiles) group[u] = shared[(k + u - kInRegisters) * kThreads];
    store(again, group, scale);
  }
  for (int s = share.first; s <= share.last; ++s)
    for_stretch(table, share, s, [&](const auto& parts) { rewrite_edge(parts, scale); });
}

// Segment s times coefs[s * stride]; 1 writes nothing.
template <class Table>
__global__ void __launch_bounds__(kThreads, kPolicy.blocks_per_sm)
    scale_kernel(const __grid_constant__ Table table, const double* coefs, int64_t stride, bool zero) {
  const Share share = share_of(table, blockIdx.x, gridDim.x);
  for (int s = share.last; s >= share.first; --s) {
    const double coef = coefs[(table.place + s) * stride];
    if (coef != 1) rewrite_share(table, share, s, Scale(coef, zero));
  }
}

template <class Table>
__global__ void __launch_bounds__(kThreads, kPolicy.blocks_per_sm)
    clamp_kernel(const __grid_constant__ Table table, double bound) {
  const Share share = share_of(table, blockIdx.x, gridDim.x);
  for (int s = share.last; s >= share.first; --s) rewrite_share(table, share, s, Clamp{bound});
}

}  // namespace fusedclip::cuda
