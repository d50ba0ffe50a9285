// The inputs and attributes of molae::GroupedGemm, the same wherever it runs.
#pragma once

#include "grouped.h"
#include "operators.h"

namespace molae {

struct GemmTraits {
  GemmTraits(Element type, const Attributes& attributes);

  Element type;
  bool transposed, interleaved = false;
  Activation activation;
};

struct GemmInputs {
  // Throws unless the shapes are right. Reads no numbers: they may be in the memory of a GPU.
  GemmInputs(const Call& call, const GemmTraits& traits);

  Tensor a, b, ends, bias, row_weight;
  int64_t S, N, G, M;
};

}  // namespace molae
