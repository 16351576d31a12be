// What every engine is handed.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace fusedclip {

// One contiguous stretch of gradient elements.
struct Segment {
  void* data;
  int64_t count;
  DType dtype;
};

}  // namespace fusedclip
