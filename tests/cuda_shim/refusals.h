// What the engine says when a call of CUDA's fails or a dtype is not known.
#pragma once

#include <cstring>

#include "calls.h"

namespace fusedclip {

inline void failing_calls_say_what_and_why() {
  shim::machine.status = cudaErrorLaunchFailure;
  for (const char* call : {"cudaLaunchKernelEx", "cudaGetDevice"}) {
    shim::machine.failing_call = call;
    List list = mixed(12);
    std::string message;
    try {
      clip(list, 2, at_most(1), Form::kTwoLaunches);
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    CHECK(message == (std::strcmp(call, "cudaGetDevice") == 0 ? "cudaGetDevice: unspecified launch failure"
                                                              : "read_kernel: unspecified launch failure"));
  }
  shim::machine.status = cudaErrorInsufficientDriver;
  shim::machine.failing_call = "cudaGetDeviceCount";
  CHECK(cuda::missing() ==
        "cudaGetDeviceCount: CUDA driver version is insufficient for CUDA runtime version "
        "(the driver knows CUDA 12.4, this was built with 13.0)");
  shim::machine.failing_call = "";
  CHECK(cuda::missing().empty());
}

inline void a_dtype_that_is_not_known_is_not_launched() {
  float element = 1;
  const std::vector<Segment> segments = {{&element, 1, DType(17)}};
  const cuda::Work work{segments, 0, nullptr};
  const double coef = 0.5;
  bool refused = false;
  try {
    cuda::scale(work, &coef, 0, false);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  CHECK(refused && element == 1);
}

}  // namespace fusedclip
