// What an update asks of one instruction set, on a run of elements. update_kernels.cpp is compiled once per set.
#pragma once

#include "../update_work.h"

namespace fusedclip::cpu {

// Elements [first, first + count) of a segment, by a rule; `step` counts from 1, `coef` multiplies the gradient.
struct UpdateKernels {
  void (*update)(Update rule, const UpdateSegment& segment, int64_t first, int64_t count, const UpdateRow& row,
                 double step, double coef);
};

}  // namespace fusedclip::cpu
