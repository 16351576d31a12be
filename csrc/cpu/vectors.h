// Vectors of one instruction set: a load that widens to the arithmetic type, a store that narrows.
// Included inside an instruction set's namespace, so that no symbol is shared between sets.
#pragma once

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2, NEON
#endif

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
  static constexpr int size = kVectorBytes / sizeof(A);
};
template <class A>
using Vector = typename VectorOf<A>::type;

using Doubles = Vector<double>;
using Floats = Vector<float>;
using Words = Vector<uint32_t>;
using LongWords = Vector<uint64_t>;
typedef float HalfFloats __attribute__((vector_size(kVectorBytes / 2)));  // as many elements as Doubles has
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));   // as many elements as Floats has

// The type that arithmetic on T is done in: float for elements of 16 bits and less, double for the others. float32 in
// double costs nothing while memory is the limit (35 GB/s a core with AVX-512, where two cores together read 50-60),
// leaves no sum that could overflow or vanish, and makes the norm of constant gradients right to 1e-15 instead of 1e-6.
template <class T>
using Arithmetic = std::conditional_t<(sizeof(T) > 2), double, float>;
template <class T>
constexpr bool kDoubleArithmetic = std::is_same_v<Arithmetic<T>, double>;
template <class T>
using ArithmeticVector = Vector<Arithmetic<T>>;

template <class V>
inline V load_raw(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

// A compare and a select would cost half of the speed.
inline Floats magnitude(Floats v) { return (Floats)((Words)v & 0x7fffffffu); }
inline Doubles magnitude(Doubles v) { return (Doubles)((LongWords)v & 0x7fffffffffffffffu); }
inline double magnitude(double x) { return __builtin_fabs(x); }

// Of any dtype; those below are faster.
template <class T>
inline ArithmeticVector<T> load(const T* from) {
  ArithmeticVector<T> v;
  for (int i = 0; i < VectorOf<Arithmetic<T>>::size; ++i) v[i] = widen(from[i]);
  return v;
}
template <class T>
inline void store(ArithmeticVector<T> v, T* to) {
  for (int i = 0; i < VectorOf<Arithmetic<T>>::size; ++i) to[i] = narrow<T>(v[i]);
}

inline Doubles load(const double* from) { return load_raw<Doubles>(from); }
inline void store(Doubles v, double* to) { __builtin_memcpy(to, &v, sizeof(v)); }

// Widening and narrowing go through intrinsics where there are some: with what GCC 12 makes of __builtin_convertvector,
// float32 is read from the cache at 60 GB/s a core instead of 125, bfloat16 at 51 instead of 95.
#if defined(__AVX512F__)
inline Doubles widen_to_double(HalfFloats v) { return (Doubles)_mm512_cvtps_pd((__m256)v); }
inline Words widen_to_words(Halves v) { return (Words)_mm512_cvtepu16_epi32((__m256i)v); }
inline Halves narrow_to_halves(Words v) { return (Halves)_mm512_cvtepi32_epi16((__m512i)v); }
#elif defined(__AVX2__)
inline Doubles widen_to_double(HalfFloats v) { return (Doubles)_mm256_cvtps_pd((__m128)v); }
inline Words widen_to_words(Halves v) { return (Words)_mm256_cvtepu16_epi32((__m128i)v); }
inline Halves narrow_to_halves(Words v) {
  return (Halves)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
}
#else
inline Doubles widen_to_double(HalfFloats v) { return __builtin_convertvector(v, Doubles); }
inline Words widen_to_words(Halves v) { return __builtin_convertvector(v, Words); }
inline Halves narrow_to_halves(Words v) { return __builtin_convertvector(v, Halves); }
#endif

// Lanes 0 to n / 2 - 1, and the others. Through memory they would take 3 ns, which short tensors feel.
#if defined(__AVX512F__)
inline HalfFloats low_half(Floats v) { return (HalfFloats)_mm512_castps512_ps256((__m512)v); }
inline HalfFloats high_half(Floats v) { return (HalfFloats)_mm512_extractf32x8_ps((__m512)v, 1); }
#elif defined(__AVX2__)
inline HalfFloats low_half(Floats v) { return (HalfFloats)_mm256_castps256_ps128((__m256)v); }
inline HalfFloats high_half(Floats v) { return (HalfFloats)_mm256_extractf128_ps((__m256)v, 1); }
#else
inline HalfFloats low_half(Floats v) { return load_raw<HalfFloats>(&v); }
inline HalfFloats high_half(Floats v) { return load_raw<HalfFloats>(reinterpret_cast<const HalfFloats*>(&v) + 1); }
#endif

inline Doubles load(const float* from) { return widen_to_double(load_raw<HalfFloats>(from)); }
inline void store(Doubles v, float* to) {
  const HalfFloats floats = __builtin_convertvector(v, HalfFloats);
  __builtin_memcpy(to, &floats, sizeof(floats));
}

#if defined(__AVX512BW__)
// One permutation puts every element above a word of zeros. Widening and shifting, it is 45 GB/s a core from the
// second-level cache instead of 57.
inline Floats load(const BFloat16* from) {
  constexpr Words kAbove = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const __m512i elements = _mm512_castsi256_si512(load_raw<__m256i>(from));
  return (Floats)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, (__m512i)(kAbove << 16), elements);
}
#else
inline Floats load(const BFloat16* from) { return (Floats)(widen_to_words(load_raw<Halves>(from)) << 16); }
#endif
inline Halves to_bfloat16(Floats v) {
  const Words bits = (Words)v;
#if defined(__AVX512BF16__)
  // The instruction takes subnormal numbers for zeros; where there is one, or a zero, all go the long way.
  if (__builtin_expect(_mm512_testn_epi32_mask((__m512i)v, _mm512_set1_epi32(0x7f800000)) == 0, 1))
    return (Halves)_mm512_cvtneps_pbh((__m512)v);
#endif
  const Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Words quiet_nan = bits >> 16 | 0x40u;
  return narrow_to_halves(v == v ? rounded : quiet_nan);
}
inline void store(Floats v, BFloat16* to) {
  const Halves halves = to_bfloat16(v);
  __builtin_memcpy(to, &halves, sizeof(halves));
}

// GCC 12 does not vectorise _Float16 (290 ms against 5 ms for 124M elements), hence the intrinsics.
#if defined(__AVX512F__)
inline Floats load(const Float16* from) { return (Floats)_mm512_cvtph_ps(load_raw<__m256i>(from)); }
inline void store(Floats v, Float16* to) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__) && defined(__F16C__)
inline Floats load(const Float16* from) { return (Floats)_mm256_cvtph_ps(load_raw<__m128i>(from)); }
inline void store(Floats v, Float16* to) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
inline Floats load(const Float16* from) { return (Floats)vcvt_f32_f16(load_raw<float16x4_t>(from)); }
inline void store(Floats v, Float16* to) {
  const float16x4_t halves = vcvt_f16_f32((float32x4_t)v);
  __builtin_memcpy(to, &halves, sizeof(halves));
}
#endif

// acc + x * x for x that came from float32, or in float from float16: the square is exact, so that one rounding (FMA)
// or two (where there is none) give the same bits. (The square of a bfloat16 may be subnormal, and is then rounded.)
#if defined(__AVX512F__)
inline Floats add_exact_square(Floats acc, Floats x) {
  return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)x, (__m512)acc);
}
inline Doubles add_exact_square(Doubles acc, Doubles x) {
  return (Doubles)_mm512_fmadd_pd((__m512d)x, (__m512d)x, (__m512d)acc);
}
#elif defined(__AVX2__)
inline Floats add_exact_square(Floats acc, Floats x) {
  return (Floats)_mm256_fmadd_ps((__m256)x, (__m256)x, (__m256)acc);
}
inline Doubles add_exact_square(Doubles acc, Doubles x) {
  return (Doubles)_mm256_fmadd_pd((__m256d)x, (__m256d)x, (__m256d)acc);
}
#else
inline Floats add_exact_square(Floats acc, Floats x) { return acc + x * x; }
inline Doubles add_exact_square(Doubles acc, Doubles x) { return acc + x * x; }
#endif
