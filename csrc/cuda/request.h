// What a clip is asked for and where its answers go. Host and device.
#pragma once

#include "../norm_ops.h"

namespace fusedclip::cuda {

// What a norm is held against. The pointers are to one number on the device, or null.
struct Limits {
  ClipRule rule;
  const double* max_norm;    // instead of the rule's
  const double* multiplier;  // what is clipped is the gradients times this
};

struct Demand {
  NormEnd norm;
  Limits limits;
};

struct Results {
  void* norm;  // one float or double; null: not wanted, and the coefficient neither
  bool norm_is_double;
  double* coef;
};

}  // namespace fusedclip::cuda
