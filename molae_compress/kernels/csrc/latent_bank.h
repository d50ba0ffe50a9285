// The inputs and attributes of molae::LatentExperts, the same wherever it runs, and what it computes on a CPU.
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

// What the attributes of a node say. A node has encode, and its cores in the layouts of the operator; experts of transformers
// that are called without a node (cpu_entry.h) may lack the one and have others of the other.
struct Bank {
  Bank() = default;
  Bank(Element type, const Attributes& attributes);
  // The inputs of a call; throws unless their shapes are right. Reads no numbers: they may be in the memory of a GPU.
  Tensors read(const Call& call) const;

  Element type = Element::kFloat;
  int64_t experts = 1, input_group = 1, output_group = 1;
  int64_t rank_in = 0, rank_out = 0;  // 0: the projection on this side is dense
  Layout core_layout = Layout::kInputsFirst, down_layout = Layout::kOutputsFirst, decode_layout = Layout::kInputsFirst;
  bool interleaved = false;
  Activation activation;

 private:
  void check(const Tensors& in) const;
  void check_basis(const Tensor& basis, const Tensor& pivots, int64_t group, int64_t rank, int64_t hidden) const;
};

// y [T,H]: what the experts add. Of the tensors `routing` [T,K] is given as floats, and `I` is the width between the projections.
void compute_latent_experts(const Threads& threads, Memory& memory, const Bank& bank, const Tensors& in, const float* routing,
                            int64_t I, void* y);

}  // namespace molae
