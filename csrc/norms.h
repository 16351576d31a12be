// The norms: of each one functor, which is all that there is to say about it. norm_ops.h is what they have in common.
//
// A functor has the order p that it is for, says how an element is lifted, and in constants what happens to lifted
// values. `Math` is an engine's own abs and pow; V a number or a vector of numbers, with GCC's operators.
// Host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "dtypes.h"

namespace fusedclip {

enum class Combining : uint8_t { kSum, kMax, kMin };
enum class Root : uint8_t { kNone, kSquare, kOfOrder };

// What holds unless a functor says otherwise: as it is here, a new norm is right, if perhaps not the fastest.
struct OfSum {
  static constexpr Combining kCombining = Combining::kSum;
  static constexpr Root kRoot = Root::kOfOrder;
  // Lifted to 1 or 0 and counted: exact in float, no multiplier changes it, and of a list it counts the tensors.
  static constexpr bool kCounts = false;
  // Lifted in fp64 whatever the dtype, and told p: bound by arithmetic, not by memory. Others lift 0 to 0, every finite
  // float to a finite double, and know their order.
  static constexpr bool kInDouble = false;
};

struct Zero : OfSum {
  static constexpr double kOrder = 0;
  static constexpr Root kRoot = Root::kNone;
  static constexpr bool kCounts = true;
  template <class Math, class V>
  FUSEDCLIP_HD static V lift(V x) {
    return x != 0 ? V{} + 1 : V{};
  }
};

struct One : OfSum {
  static constexpr double kOrder = 1;
  static constexpr Root kRoot = Root::kNone;
  template <class Math, class V>
  FUSEDCLIP_HD static V lift(V x) {
    return Math::abs(x);
  }
};

struct Two : OfSum {
  static constexpr double kOrder = 2;
  static constexpr Root kRoot = Root::kSquare;
  template <class Math, class V>
  FUSEDCLIP_HD static V lift(V x) {
    return x * x;
  }
};

// Every order that no other functor is for.
struct Power : OfSum {
  static constexpr double kOrder = std::numeric_limits<double>::quiet_NaN();
  static constexpr bool kInDouble = true;
  template <class Math, class V>
  FUSEDCLIP_HD static V lift(V x, double p) {
    return Math::pow(Math::abs(x), p);
  }
};

// Taken of the elements' bits, but for single ones at the ends of memory.
struct Max : One {
  static constexpr double kOrder = HUGE_VAL;
  static constexpr Combining kCombining = Combining::kMax;
};
struct Min : One {
  static constexpr double kOrder = -HUGE_VAL;
  static constexpr Combining kCombining = Combining::kMin;
};

// All there are: every kernel and choice that goes by norm is made from this list.
#define FUSEDCLIP_NORMS(NORM) NORM(Zero) NORM(One) NORM(Two) NORM(Power) NORM(Max) NORM(Min)

enum class Norm : uint8_t {
#define FUSEDCLIP_NAME_OF(norm) k##norm,
  FUSEDCLIP_NORMS(FUSEDCLIP_NAME_OF)
#undef FUSEDCLIP_NAME_OF
};

inline Norm norm_of(double p) {
#define FUSEDCLIP_IF_ORDER(norm) \
  if (p == norm::kOrder) return Norm::k##norm;
  FUSEDCLIP_NORMS(FUSEDCLIP_IF_ORDER)
#undef FUSEDCLIP_IF_ORDER
  return Norm::kPower;
}

// f(functor{}), for a norm that is known at run time.
template <class F>
inline auto with_norm(Norm norm, F f) {
  switch (norm) {
#define FUSEDCLIP_CASE(norm) \
  case Norm::k##norm: return f(norm{});
    FUSEDCLIP_NORMS(FUSEDCLIP_CASE)
#undef FUSEDCLIP_CASE
  }
  __builtin_unreachable();
}

template <class F>
void for_each_norm(F f) {
#define FUSEDCLIP_CALL(norm) f(norm{});
  FUSEDCLIP_NORMS(FUSEDCLIP_CALL)
#undef FUSEDCLIP_CALL
}

// What is left to know of a norm once its elements are lifted; any kernel can be handed it.
struct NormEnd {
  Combining combining;
  Root root;
  bool counts;
  double p;
};

template <class N>
FUSEDCLIP_HD inline NormEnd end_of(double p) {
  return {N::kCombining, N::kRoot, N::kCounts, p};
}

inline NormEnd end_of(double p) {
  return with_norm(norm_of(p), [p](auto n) { return end_of<decltype(n)>(p); });
}

}  // namespace fusedclip
