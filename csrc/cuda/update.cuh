// One step of an optimizer, in one pass: parameter, gradient, states and master are read, all but the gradient written.
//
// Two launches. The first finds the numbers that are the same for all elements of a segment, a thread each, and counts
// its step: nobody else reads the counter, so that none has to be the last. The second moves the elements.
//
// Bytes moved for each element: the sizes of all streams, and again of all but the gradient (28 for AdamW in fp32).
#pragma once

#include "kernels.cuh"
#include "update.h"
#include "update_table.h"

namespace fusedclip::cuda {

// --- the numbers that are the same for all elements of a segment ---

template <class U, class A>
struct Prepared {
  typename U::template Constants<A> constants;
  Factors<A> factors;  // of the gradient
};

template <class U, class A>
__device__ inline void prepare(const TableRow& row, double step, double* to) {
  static_assert(sizeof(Prepared<U, A>) <= kPreparedDoubles * sizeof(double), "what a segment has room for");
  const UpdateRow& rule = row.rule;
  auto& p = *reinterpret_cast<Prepared<U, A>*>(to);
  p.constants = U::template constants<A>(rule.options, rule.lr ? *rule.lr : rule.options[0], step);
  p.factors = factors_of<A>(rule, *row.coef);
}

__device__ inline bool is_skipped(const float* skip) { return skip && *skip != 0; }

// A warp a block: where fp64 is slow, its powers are what takes time.
template <class U, class Table>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const __grid_constant__ Table table, const float* skip, double* scratch) {
  let_next_launch_start();
  const int s = int(blockIdx.x) * kWarp + int(threadIdx.x);
  if (threadIdx.x >= kWarp || s >= table.size || is_skipped(skip)) return;
  const UpdateSegment& segment = table.segments[s];
  const float step = segment.step ? *segment.step + 1.0f : 1.0f;
  double* const to = scratch + (table.place + s) * kPreparedDoubles;
  if (segment.parameter_type == DType::kFloat64)
    prepare<U, double>(table.rows[segment.row], step, to);
  else
    prepare<U, float>(table.rows[segment.row], step, to);
  if (segment.step) *segment.step = step;
}

// --- a thread's elements of a stream ---

template <class T, int count>
struct alignas(sizeof(T) * count) Few {
  T of[count];
};

// A pack, or half of one. Of two branches the compiler would copy the results, and so wait for them.
__device__ inline Pack load_pack(const void* from, bool whole) {
  Pack pack{};
#ifdef __CUDA_ARCH__
  asm volatile(
      "{.reg .pred whole;\n"
      "setp.ne.s32 whole, %5, 0;\n"
      "@whole ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "@!whole ld.global.v2.u32 {%0, %1}, [%4];}"
      : "+r"(pack.x), "+r"(pack.y), "+r"(pack.z), "+r"(pack.w)
      : "l"(from), "r"(int(whole))
      : "memory");
#else
  memcpy(&pack, from, whole ? sizeof(pack) : sizeof(pack) / 2);
#endif
  return pack;
}

// Four, side by side and aligned: 16 bytes of a float in one instruction, 8 of what is half as wide beside it, so that
// each instruction of a warp touches whole sectors of memory, in every mixture of dtypes.
struct Together {
  static constexpr int kCount = kSide;
  using Raw = Pack;  // as they are stored; nothing waits for them before they are widened
  int64_t place;     // in fours

  __device__ Raw load(const void* stream, DType type) const {
    const bool whole = type == DType::kFloat32;
    return load_pack(static_cast<const char*>(stream) + (place << (whole ? 4 : 3)), whole);
  }

  template <class A>
  __device__ Few<A, kCount> widened(const Raw& raw, DType type) const {
    Few<A, kCount> x;
    with_dtype(type, [&](auto t) {
      using T = decltype(t);
      if constexpr (kPerPack<T> >= kCount) {
        const auto elements = bit_cast<Elements<T>>(raw);
#pragma unroll
        for (int e = 0; e < kCount; ++e) x.of[e] = widen(elements.of[e]);
      }
    });
    return x;
  }

  template <class T>
  __device__ void put(void* stream, const Few<T, kCount>& elements) const {
    if constexpr (kPerPack<T> >= kCount) static_cast<Few<T, kCount>*>(stream)[place] = elements;
  }
};

// One: what is not aligned, the end of a segment, fp64.
struct Alone {
  static constexpr int kCount = 1;
  using Raw = uint64_t;
  int64_t place;

  __device__ Raw load(const void* stream, DType type) const {
    return with_dtype(type, [&](auto t) -> Raw {
      return bit_cast<Bits<decltype(t)>>(static_cast<const decltype(t)*>(stream)[place]);
    });
  }
  template <class A>
  __device__ Few<A, 1> widened(Raw raw, DType type) const {
    return with_dtype(type,
                      [&](auto t) -> Few<A, 1> { return {A(widen(bit_cast<decltype(t)>(Bits<decltype(t)>(raw))))}; });
  }
  template <class T>
  __device__ void put(void* stream, const Few<T, 1>& element) const {
    static_cast<T*>(stream)[place] = element.of[0];
  }
};

template <class T, class A, int count>
__device__ inline Few<T, count> narrowed(const Few<A, count>& x) {
  Few<T, count> out;
#pragma unroll
  for (int e = 0; e < count; ++e) out.of[e] = narrow<T>(Wide<T>(x.of[e]));
  return out;
}

template <class Way, class Values>
__device__ inline void store(const Way& way, void* stream, DType type, const Values& x) {
  with_dtype(type, [&](auto t) { way.put(stream, narrowed<decltype(t)>(x)); });
}

// --- a step ---

struct UpdateMath {
  __device__ static float sqrt(float x) { return sqrtf(x); }
  __device__ static double sqrt(double x) { return ::sqrt(x); }
  template <class A>
  __device__ static A max(A a, A b) {
    return a > b || a != a ? a : b;
  }
};

// A remainder is read as if it were a bfloat16: widening keeps all bits, in the upper half.
__device__ inline uint16_t upper(float x) { return uint16_t(bit_cast<uint32_t>(x) >> 16); }

template <class Way, int count>
__device__ inline void store_with_master(const Way& way, const UpdateSegment& s, const Few<float, count>& x) {
  Few<uint16_t, count> remainders;
  Few<BFloat16, count> rounded;
#pragma unroll
  for (int e = 0; e < count; ++e) remainders.of[e] = remainder_of(x.of[e]), rounded.of[e] = round_away(x.of[e]);
  if (s.kept == Master::kSplit)
    way.put(s.master, remainders);
  else
    way.put(s.master, x);
  if (s.parameter_type == DType::kBFloat16)
    way.put(s.parameter, rounded);
  else
    store(way, s.parameter, s.parameter_type, x);
}

template <class U, class A, class Way>
__device__ inline void move(const UpdateSegment& s, const Prepared<U, A>& p, const Way& way) {
  constexpr bool has_masters = std::is_same_v<A, float>;
  const bool whole = has_masters && s.kept == Master::kFloat32, split = has_masters && s.kept == Master::kSplit;
  const DType value_type = whole ? DType::kFloat32 : s.parameter_type;
  using Raw = typename Way::Raw;
  const Raw value = way.load(whole ? s.master : s.parameter, value_type);
  const Raw low = split ? way.load(s.master, DType::kBFloat16) : Raw{};
  const Raw gradient = way.load(s.gradient, s.gradient_type);
  Raw raw[U::kStates + 1];
#pragma unroll
  for (int k = 0; k < U::kStates; ++k) raw[k] = way.load(s.states[k], s.state_types[k]);

  using Values = Few<A, Way::kCount>;
  Values x = way.template widened<A>(value, value_type), states[U::kStates + 1];
  if constexpr (has_masters)
    if (split) {
      const Values lower = way.template widened<A>(low, DType::kBFloat16);
#pragma unroll
      for (int e = 0; e < Way::kCount; ++e) x.of[e] = join({upper(x.of[e])}, upper(lower.of[e]));
    }
  const Values g = way.template widened<A>(gradient, s.gradient_type);
#pragma unroll
  for (int k = 0; k < U::kStates; ++k) states[k] = way.template widened<A>(raw[k], s.state_types[k]);
#pragma unroll
  for (int e = 0; e < Way::kCount; ++e) {
    A own[U::kStates + 1];
#pragma unroll
    for (int k = 0; k < U::kStates; ++k) own[k] = states[k].of[e];
    x.of[e] = U::template move<UpdateMath>(x.of[e], g.of[e] * p.factors.rest * p.factors.power, own, p.constants);
#pragma unroll
    for (int k = 0; k < U::kStates; ++k) states[k].of[e] = own[k];
  }

#pragma unroll
  for (int k = 0; k < U::kStates; ++k) store(way, s.states[k], s.state_types[k], states[k]);
  if constexpr (has_masters)
    if (whole || split) return store_with_master(way, s, x);
  store(way, s.parameter, s.parameter_type, x);
}

// This warp takes the chunks `turn`, `turn` + kWarps, ... of a range; which of the next one it begins with is returned:
// dealt out so, short segments keep all warps busy, too.
template <class U, class A>
__device__ inline int move_range(const UpdateSegment& s, bool wide, const Range& range, const double* prepared,
                                 int turn) {
  const auto& p = *reinterpret_cast<const Prepared<U, A>*>(prepared);
  const int lane = int(threadIdx.x) % kWarp, chunks = (range.count + kChunk - 1) / kChunk;
#pragma unroll 1
  for (; turn < chunks; turn += kWarps) {
    const int64_t chunk = range.first_chunk + uint32_t(turn);
    const int left = range.count - turn * kChunk;
    if constexpr (std::is_same_v<A, float>)
      if (wide && left >= kChunk) {
        move<U, A>(s, p, Together{chunk * kWarp + lane});
        continue;
      }
#pragma unroll 1
    for (int at = lane, end = left < kChunk ? left : kChunk; at < end; at += kWarp)
      move<U, A>(s, p, Alone{chunk * kChunk + at});
  }
  return turn - chunks;
}

// Backwards: the gradients that the norm has read last are still in the second-level cache.
template <class U, class Table>
__global__ void __launch_bounds__(kThreads, kPolicy.blocks_per_sm)
    update_kernel(const __grid_constant__ Table table, const float* skip, const double* scratch) {
  const Share& share = own_share(table);
  wait_for_last_launch();
  if (is_skipped(skip)) return;
  int turn = int(threadIdx.x) / kWarp;
#pragma unroll 1
  for (int s = share.last; s >= share.first; --s) {
    const Range range = range_of(table, share, s);
    const UpdateSegment& segment = table.segments[s];
    const double* const prepared = scratch + (table.place + s) * kPreparedDoubles;
    turn = segment.parameter_type == DType::kFloat64
               ? move_range<U, double>(segment, false, range, prepared, turn)
               : move_range<U, float>(segment, table.wide[s], range, prepared, turn);
  }
}

}  // namespace fusedclip::cuda
