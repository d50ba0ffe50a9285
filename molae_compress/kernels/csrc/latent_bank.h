// The inputs and attributes of molae::LatentExperts, the same wherever it runs.
#pragma once

#include <vector>

#include "operators.h"

namespace molae {

enum Place : size_t {
  kX, kIndex, kWeight, kEncode, kEncodePivots, kCore, kUpEncode, kUpEncodePivots, kCoreUp, kCoreBias, kDown, kDecode,
  kDecodePivots, kDecodeBias, kInputCount
};

extern const Input kLatentInputs[kInputCount];

using Tensors = std::vector<Tensor>;

// What the attributes of a node say.
struct Bank {
  Bank(Element type, const Attributes& attributes);
  // The inputs of a call; throws unless their shapes are right. Reads no numbers: they may be in the memory of a GPU.
  Tensors read(const Call& call) const;

  Element type;
  int64_t experts, input_group, output_group, rank_in, rank_out;  // rank_out = 0: the second projection is dense
  bool interleaved = false;
  Activation activation;

 private:
  void check(const Tensors& in) const;
  void check_basis(const Tensor& basis, const Tensor& pivots, int64_t group, int64_t rank, int64_t hidden) const;
};

}  // namespace molae
