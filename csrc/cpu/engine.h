// The CPU engine: the kernels over all tiles of a list, on several threads. Segments may share memory: what they share
// is written in one order, on one thread.
#pragma once

#include <vector>

#include "../norm_ops.h"
#include "tiling.h"

namespace fusedclip::cpu {

// The part of a TensorList that the engine reads: no Python in here, so that it runs without the interpreter's lock.
struct Work {
  const std::vector<Segment>& segments;
  const Tiling& tiling;
};

// out[s] = the lifted value of segment s, for all segments. Reads every element once.
void lift(const Work& work, double p, int max_threads, double* out);

// out[row * segments + s] = the statistics of segment s, a row per member. Reads every element once.
void stats(const Work& work, int max_threads, double* out);

// The norm, then every element times the coefficient unless that is 1. One parallel region for both passes. Norm and
// rule are those of the elements times `multiplier`, which the coefficient contains. `only_finite`: a norm of NaN or
// inf has nothing written.
Clipped clip(const Work& work, double p, const ClipRule& rule, double multiplier, bool only_finite, int max_threads);

// What `clip` does after its read pass, whose lifted value of everything (over other ranks, too) is given.
Clipped settle_and_scale(const Work& work, double p, double lifted, const ClipRule& rule, double multiplier,
                         int max_threads);

// Segment s times coefs[s * stride]; 1 writes nothing. Where the coefficient is 0 and `zero`, stores zeros, so that
// inf and NaN don't survive as NaN. Tells whether anything was written.
bool scale(const Work& work, const double* coefs, int64_t stride, bool zero, int max_threads);

// Every element into [-bound, bound]. Tells of each segment whether it was written; empty if none was.
std::vector<bool> clamp(const Work& work, double bound, int max_threads);

}  // namespace fusedclip::cpu
