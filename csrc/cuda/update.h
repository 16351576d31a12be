// The CUDA engine's updates, as the bindings see them; engine.h says what holds for every call.
#pragma once

#include "../update_work.h"
#include "engine.h"

namespace fusedclip::cuda {

// Doubles of scratch memory for each segment: the numbers that its kernel is told.
constexpr int kPreparedDoubles = 10;

// One step of every segment, unless the device finds that it is to be skipped. `parameters` are those of the update.
void update(const UpdateWork& update, const Work& parameters, double* scratch);

}  // namespace fusedclip::cuda
