// Which pattern the engine's passes go by.
#pragma once

#include "kernels.h"

namespace fusedclip::cpu {

struct Patterns {
  Pattern read, write;
};

// Those in use: this processor's, unless use_patterns() chose others.
const Patterns& patterns();
void use_patterns(const Patterns& patterns);

}  // namespace fusedclip::cpu
