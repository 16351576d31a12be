// The CPU engine's updates: the kernels over all tiles of a table, on several threads.
#pragma once

#include "../update_work.h"
#include "tiling.h"

namespace fusedclip::cpu {

// Moves every parameter by one step and counts it. `parameters` are those of the work as segments, which `tiling` is
// of. Tells whether anything was written.
bool update(const UpdateWork& work, const std::vector<Segment>& parameters, const Tiling& tiling, int max_threads);

}  // namespace fusedclip::cpu
