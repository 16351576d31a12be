// How optimizers move a parameter: of each rule one functor, which is all that there is to say about it.
//
// A functor has a name, says how many states an element has beside value and gradient, and what moves them. Its options
// are the numbers of its rule in fusedclip/updates.py, which is the same page in Python, in the order of their names
// here; its constants are what is the same for all elements of a parameter, found in double. `Math` is an engine's own
// sqrt and max (which keeps NaN), both exact; V a number or a vector of numbers, with GCC's operators, and A the type
// of one. Every operation is rounded by itself: compile with -ffp-contract=off, or -fmad=false. Host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "dtypes.h"

namespace fusedclip {

constexpr int kMostOptions = 5, kMostStates = 3;

// All rules begin with the learning rate, which may be one on the device instead.
using Options = double[kMostOptions];

template <bool amsgrad>
struct AdamWRule {
  static constexpr const char* kName = amsgrad ? "adamw_amsgrad" : "adamw";
  static constexpr int kStates = amsgrad ? 3 : 2;
  enum { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kOptions };

  template <class A>
  struct Constants {
    A decay, beta1, weight1, beta2, weight2, scale, floor;
    bool from_m;  // which end the next m is reckoned from: the nearer one
  };

  template <class A>
  FUSEDCLIP_HD static Constants<A> constants(const Options& o, double lr, double step) {
    // m / (1 - beta1^t) over sqrt(v) / root + eps, both times root: a division less.
    const double root = sqrt(1 - pow(o[kBeta2], step));
    return {A(1 - lr * o[kWeightDecay]),
            A(o[kBeta1]),
            A(1 - o[kBeta1]),
            A(o[kBeta2]),
            A(1 - o[kBeta2]),
            A(lr / (1 - pow(o[kBeta1], step)) * root),
            A(o[kEps] * root),
            A(1 - o[kBeta1]) < A(0.5)};
  }

  // The next value; the states become the next ones.
  template <class Math, class V, class A>
  FUSEDCLIP_HD static V move(V x, V g, V* states, const Constants<A>& c) {
    V &m = states[0], &v = states[1];
    x = x * c.decay;
    m = c.from_m ? m + (g - m) * c.weight1 : g - (g - m) * c.beta1;
    v = v * c.beta2 + (g * c.weight2) * g;
    if constexpr (amsgrad) states[2] = Math::max(states[2], v);
    return x - (m * c.scale) / (Math::sqrt(states[kStates - 1]) + c.floor);
  }
};

enum class Momentum : uint8_t { kNone, kHeavyBall, kNesterov };

template <Momentum kind>
struct SGDRule {
  static constexpr const char* kName = kind == Momentum::kNone        ? "sgd"
                                       : kind == Momentum::kHeavyBall ? "sgd_momentum"
                                                                      : "sgd_nesterov";
  static constexpr int kStates = kind == Momentum::kNone ? 0 : 1;
  enum { kLr, kMomentum, kDampening, kWeightDecay, kOptions };

  template <class A>
  struct Constants {
    A lr, momentum, kept, taken, weight_decay;
  };

  template <class A>
  FUSEDCLIP_HD static Constants<A> constants(const Options& o, double lr, double step) {
    const double later = step > 1;
    return {A(lr), A(o[kMomentum]), A(o[kMomentum] * later), A(1 - o[kDampening] * later), A(o[kWeightDecay])};
  }

  template <class Math, class V, class A>
  FUSEDCLIP_HD static V move(V x, V g, V* states, const Constants<A>& c) {
    if (c.weight_decay != 0) g = g + x * c.weight_decay;
    if constexpr (kind != Momentum::kNone) {
      V& buffer = states[0];
      buffer = buffer * c.kept + g * c.taken;
      g = kind == Momentum::kNesterov ? g + buffer * c.momentum : buffer;
    }
    return x - g * c.lr;
  }
};

// All there are: every kernel and choice that goes by rule is made from this list.
#define FUSEDCLIP_UPDATES(UPDATE)                     \
  UPDATE(kAdamW, AdamWRule<false>)                    \
  UPDATE(kAdamWAmsgrad, AdamWRule<true>)              \
  UPDATE(kSGD, SGDRule<Momentum::kNone>)              \
  UPDATE(kSGDMomentum, SGDRule<Momentum::kHeavyBall>) \
  UPDATE(kSGDNesterov, SGDRule<Momentum::kNesterov>)

enum class Update : uint8_t {
#define FUSEDCLIP_NAME_OF(name, rule) name,
  FUSEDCLIP_UPDATES(FUSEDCLIP_NAME_OF)
#undef FUSEDCLIP_NAME_OF
};

// f(functor{}), for a rule that is known at run time.
template <class F>
inline auto with_update(Update update, F f) {
  switch (update) {
#define FUSEDCLIP_CASE(name, ...) \
  case Update::name: return f(__VA_ARGS__{});
    FUSEDCLIP_UPDATES(FUSEDCLIP_CASE)
#undef FUSEDCLIP_CASE
  }
  __builtin_unreachable();
}

inline Update update_of(const std::string& name) {
#define FUSEDCLIP_IF_NAME(update, ...) \
  if (name == __VA_ARGS__::kName) return Update::update;
  FUSEDCLIP_UPDATES(FUSEDCLIP_IF_NAME)
#undef FUSEDCLIP_IF_NAME
  throw std::invalid_argument("no kernel is made for the rule " + name);
}

// What a parameter has beside it: a master in fp32, or the lower 16 bits of one whose upper ones it is itself. With
// either, a bfloat16 parameter is its master rounded half away from zero, which reading can undo.
enum class Master : uint8_t { kNone, kFloat32, kSplit };

FUSEDCLIP_HD inline BFloat16 round_away(float master) {
  const uint32_t bits = bit_cast<uint32_t>(master);
  return {uint16_t(master != master ? bits >> 16 | 0x40u : (bits + 0x8000u) >> 16)};
}

FUSEDCLIP_HD inline uint16_t remainder_of(float master) {
  return master != master ? uint16_t(0) : uint16_t(bit_cast<uint32_t>(master));
}

// A zero never had a carry: one that somebody else has written must not become a NaN.
FUSEDCLIP_HD inline float join(BFloat16 parameter, uint16_t remainder) {
  const uint32_t carry = (parameter.bits & 0x7fffu) != 0 ? remainder >> 15 : 0;
  return bit_cast<float>((parameter.bits - carry) << 16 | remainder);
}

}  // namespace fusedclip
