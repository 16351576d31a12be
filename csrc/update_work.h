// What an update is handed: parameters with everything that is read and written beside them, and the rules they follow.
#pragma once

#include <cstdint>
#include <vector>

#include "norm_ops.h"
#include "segment.h"
#include "updates.h"

namespace fusedclip {

// One parameter. All of its streams have `count` elements, in the same order of memory; states that the rule has not
// are null.
struct UpdateSegment {
  int64_t count;
  void* parameter;
  const void* gradient;
  void* states[kMostStates];
  void* master;  // by `kept`: float, uint16_t, or null
  float* step;   // steps taken so far; null if the rule does not count them
  DType parameter_type, gradient_type, state_types[kMostStates];
  Master kept;
  int32_t row;  // which of the rules and coefficients
};

// A rule with its options, and where the learning rate is if it is on the device (else null).
struct UpdateRow {
  Options options;
  const double* lr;
  bool maximize;
};

// What its gradient is multiplied by.
template <class A>
FUSEDCLIP_HD inline Factors<A> factors_of(const UpdateRow& row, double coef) {
  const Factors<A> f = factors_of<A>(coef);
  return {row.maximize ? -f.rest : f.rest, f.power};
}

struct UpdateWork {
  const std::vector<UpdateSegment>& segments;
  Update rule;
  const std::vector<UpdateRow>& rows;
  const double* coefs;  // one for each row, on the segments' device
  const float* skip;    // the same; null, or anything but 0 there: nothing is written
};

}  // namespace fusedclip
