#include "latent_bank.h"

#include "grouped.h"

namespace molae {

const Input kLatentInputs[kInputCount] = {
    {"x", kNoElement, kRequired},           {"index", kOrtInt64, kRequired},        {"weight", kNoElement, kRequired},
    {"encode", kNoElement, kRequired},      {"encode_pivots", kOrtInt32, kOptional}, {"core", kNoElement, kRequired},
    {"up_encode", kNoElement, kOptional},   {"up_encode_pivots", kOrtInt32, kOptional}, {"core_up", kNoElement, kOptional},
    {"core_bias", kNoElement, kOptional},   {"down", kNoElement, kRequired},        {"decode", kNoElement, kOptional},
    {"decode_pivots", kOrtInt32, kOptional}, {"decode_bias", kNoElement, kOptional},
};

Bank::Bank(Element type, const Attributes& attributes)
    : type(type),
      experts(attributes.integer("num_experts", 1)),
      input_group(attributes.integer("input_group", 1)),
      output_group(attributes.integer("output_group", 1)),
      rank_in(attributes.integer("rank_in", 1)),
      rank_out(attributes.integer("rank_out", 0, 0)),
      activation(read_activation(attributes, &interleaved)) {
  for (const auto& [name, size] : {std::pair("input_group", input_group), std::pair("output_group", output_group)})
    if (experts % size != 0) fail("the attribute '", name, "' is ", size, ", which does not divide the ", experts, " experts");
}

void Bank::check_basis(const Tensor& basis, const Tensor& pivots, int64_t group, int64_t rank, int64_t hidden) const {
  const int64_t rows = experts / group * rank;
  if (rank > hidden) fail("the rank of '", basis.name, "' is ", rank, ", more than the hidden size ", hidden);
  basis.expect({rows, pivots.present ? hidden - rank : hidden}, pivots.present ? "[G*R,H-R]" : "[G*R,H]");
  if (pivots.present) pivots.expect({rows}, "[G*R]");
}

Tensors Bank::read(const Call& call) const {
  Tensors in;
  for (const Input& input : kLatentInputs) in.push_back(call.input(in.size(), input.name));
  check(in);
  return in;
}

void Bank::check(const Tensors& in) const {
  const bool dense = rank_out == 0, separate = in[kCoreUp].present;
  in[kX].expect_rank(2, "[T,H]");
  in[kIndex].expect_rank(2, "[T,K]");
  in[kDown].expect_rank(2, dense ? "[E*H,I]" : "[E*R_out,I]");
  const int64_t T = in[kX].dims[0], H = in[kX].dims[1], K = in[kIndex].dims[1], I = in[kDown].dims[1];
  const int64_t J = activation.gated ? 2 * I : I;
  in[kIndex].expect({T, K}, "[T,K]");
  in[kWeight].expect({T, K}, "[T,K]");
  check_basis(in[kEncode], in[kEncodePivots], input_group, rank_in, H);
  if (separate != in[kUpEncode].present) fail("'up_encode' and 'core_up' belong together: one of them is missing");
  if (!separate && in[kUpEncodePivots].present) fail("'up_encode_pivots' has no 'up_encode'");
  if (separate) {
    if (!activation.gated) fail("'core_up' needs the attribute gated = 1");
    check_basis(in[kUpEncode], in[kUpEncodePivots], input_group, rank_in, H);
    in[kCoreUp].expect({experts * rank_in, I}, "[E*R_in,I]");
  }
  in[kCore].expect({experts * rank_in, separate ? I : J}, separate ? "[E*R_in,I]" : "[E*R_in,J]");
  if (in[kCoreBias].present) in[kCoreBias].expect({experts, J}, "[E,J]");
  in[kDown].expect({experts * (dense ? H : rank_out), I}, dense ? "[E*H,I]" : "[E*R_out,I]");
  if (dense && (in[kDecode].present || in[kDecodePivots].present))
    fail("'decode' is not for a dense second projection (rank_out = 0)");
  if (!dense) check_basis(in[kDecode], in[kDecodePivots], output_group, rank_out, H);
  if (in[kDecodeBias].present) in[kDecodeBias].expect({experts, H}, "[E,H]");
}

}  // namespace molae
