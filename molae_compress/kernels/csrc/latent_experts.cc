// molae::LatentExperts: a bank of latent experts, from hidden states and routing to hidden states.
#include <memory>

#include "grouped.h"
#include "latent_bank.h"
#include "operators.h"
#include "routes.h"

namespace molae {
namespace {

// One call: x -> z (latent) -> h (intermediate) -> u (one row for each slot) -> v (routed sums, one row for each token and output
// basis) -> y.
class LatentCall {
 public:
  LatentCall(const Threads& threads, Memory& memory, const Bank& bank, const Tensors& in, const float* routing, int64_t I);
  void compute(void* y) const;

 private:
  GroupedProduct product_of(const Tensor& weight, const Rows& rows, int64_t k, int64_t n, Layout layout) const;
  const float* encode(const Tensor& basis, const Tensor& pivots) const;
  const float* tokens() const;
  const float* latent(const Tensor& basis, const Tensor& pivots) const;
  const float* intermediate() const;
  float* down(const float* h) const;
  const float* summed(float* u) const;
  void decode(const float* v, void* y) const;
  const float* output_bias() const;

  const Threads& threads_;
  Memory& memory_;
  const Bank& bank_;
  const Tensors& in_;
  const Kernels& kernels_ = cpu_kernels();
  const int64_t T_, H_, K_, I_;
  const int64_t* index_;
  const Rows slots_, inputs_, outputs_;  // for each token: a row an expert, an input basis, an output basis
  const float* x_;
  std::vector<float> weight_;  // of each row of slots_
};

LatentCall::LatentCall(const Threads& threads, Memory& memory, const Bank& bank, const Tensors& in, const float* routing, int64_t I)
    : threads_(threads),
      memory_(memory),
      bank_(bank),
      in_(in),
      T_(in[kX].dims[0]),
      H_(in[kX].dims[1]),
      K_(in[kIndex].dims[1]),
      I_(I),
      index_(checked_index(in[kIndex], T_, K_, bank.experts)),
      slots_(index_, T_, K_, bank.experts, 1),
      inputs_(index_, T_, K_, bank.experts, bank.input_group),
      outputs_(index_, T_, K_, bank.experts, bank.rank_out == 0 ? 1 : bank.output_group),
      x_(as_floats(threads, memory, bank.type, in[kX].data, T_, H_)),
      weight_(static_cast<size_t>(slots_.count()), 0.0f) {
  // An expert that a token names twice counts with both weights.
  for (int64_t slot = 0; slot < T_ * K_; ++slot)
    if (slots_.of_slot[slot] >= 0) weight_[slots_.of_slot[slot]] += routing[slot];
}

GroupedProduct LatentCall::product_of(const Tensor& weight, const Rows& rows, int64_t k, int64_t n, Layout layout) const {
  GroupedProduct product;
  product.segments = rows.segments;
  product.weight = weight.data;
  product.type = bank_.type;
  product.layout = layout;
  product.k = k;
  product.n = n;
  return product;
}

// [inputs_,R]: the token of each row in the basis of its group.
const float* LatentCall::encode(const Tensor& basis, const Tensor& pivots) const {
  const int64_t count = inputs_.count(), H = H_, R = bank_.rank_in, rest = basis.dims[1];
  GroupedProduct product = product_of(basis, inputs_, rest, R, Layout::kOutputsFirst);
  float* z = product.out = memory_.floats(count, R);
  product.a = x_;
  if (pivots.present || !inputs_.are_all_tokens(T_)) {
    float* a = memory_.floats(count, rest);
    const Columns columns(pivots, inputs_.segments, R, H);
    threads_.parallel_rows(count, H, [&](int64_t row) {
      const float* from = x_ + inputs_.token[row] * H;
      if (columns.empty()) {
        std::copy_n(from, H, a + row * H);
        return;
      }
      const Columns::Group& group = columns.of_row(row);
      for (int64_t i = 0; i < R; ++i) z[row * R + i] = from[group.pivots[i]];
      for (int64_t i = 0; i < rest; ++i) a[row * rest + i] = from[group.rest[i]];
    });
    product.a = a;
    product.add = pivots.present;
  }
  if (rest > 0) run(threads_, memory_, product);
  return z;
}

// [slots_,H]: the token of each row.
const float* LatentCall::tokens() const {
  if (slots_.are_all_tokens(T_)) return x_;
  float* rows = memory_.floats(slots_.count(), H_);
  threads_.parallel_rows(slots_.count(), H_, [&](int64_t row) { std::copy_n(x_ + slots_.token[row] * H_, H_, rows + row * H_); });
  return rows;
}

// [slots_,R]: encoded once for each token and basis, then handed to all experts that share the basis.
const float* LatentCall::latent(const Tensor& basis, const Tensor& pivots) const {
  const float* z = encode(basis, pivots);
  if (bank_.input_group == 1) return z;
  const int64_t R = bank_.rank_in;
  const std::vector<int64_t> source = matching(slots_, inputs_);
  float* spread = memory_.floats(slots_.count(), R);
  threads_.parallel_rows(slots_.count(), R, [&](int64_t row) { std::copy_n(z + source[row] * R, R, spread + row * R); });
  return spread;
}

// [slots_,I]
const float* LatentCall::intermediate() const {
  const int64_t k = bank_.rank_in == 0 ? H_ : bank_.rank_in, n = bank_.activation.gated && !in_[kCoreUp].present ? 2 * I_ : I_;
  GroupedProduct product = product_of(in_[kCore], slots_, k, n, bank_.core_layout);
  product.a = bank_.rank_in == 0 ? tokens() : latent(in_[kEncode], in_[kEncodePivots]);
  if (in_[kCoreUp].present) {
    product.up_a = latent(in_[kUpEncode], in_[kUpEncodePivots]);
    product.up_weight = in_[kCoreUp].data;
  }
  product.bias = in_[kCoreBias].data;
  product.activation = bank_.activation;
  product.interleaved = bank_.interleaved;
  float* h = product.out = memory_.floats(slots_.count(), I_);
  run(threads_, memory_, product);
  return h;
}

// [slots_,R_out], or [slots_,H] where the second projection is dense, with routing weights.
float* LatentCall::down(const float* h) const {
  const int64_t width = bank_.rank_out == 0 ? H_ : bank_.rank_out;
  GroupedProduct product = product_of(in_[kDown], slots_, I_, width, bank_.down_layout);
  product.a = h;
  product.row_weight = weight_.data();
  product.out = memory_.floats(slots_.count(), width);
  run(threads_, memory_, product);
  return product.out;
}

// [outputs_,R_out]: routed sums over the experts that share an output basis.
const float* LatentCall::summed(float* u) const {
  if (bank_.rank_out == 0 || bank_.output_group == 1) return u;
  const int64_t R = bank_.rank_out;
  float* v = memory_.floats(outputs_.count(), R);
  threads_.parallel_rows(outputs_.count(), K_ * R, [&](int64_t row) {
    std::fill_n(v + row * R, R, 0.0f);
    slots_.for_each_of_token(outputs_.token[row] * K_, K_, [&](int64_t slot, int64_t part) {
      if (outputs_.of_slot[slot] == row) kernels_.accumulate(1.0f, u + part * R, v + row * R, R);
    });
  });
  return v;
}

// [E,H] floats, those of the experts in use; null without a bias.
const float* LatentCall::output_bias() const {
  const Tensor& bias = in_[kDecodeBias];
  if (!bias.present || bank_.type == Element::kFloat) return bias.as<float>();
  float* wide = memory_.floats(bank_.experts, H_);
  threads_.parallel_rows(static_cast<int64_t>(slots_.segments.size()), H_, [&](int64_t i) {
    const int64_t first = slots_.segments[i].group * H_;
    kernels_.widen(bank_.type, bias.as<char>() + first * static_cast<int64_t>(size_of(bank_.type)), wide + first, H_);
  });
  return wide;
}

// y [T,H]: what the output bases make of `v`, summed, and the biases.
void LatentCall::decode(const float* v, void* y) const {
  const int64_t H = H_, R = bank_.rank_out, rest = in_[kDecodePivots].present ? H - R : H;
  const Columns columns(in_[kDecodePivots], outputs_.segments, R, H);
  const float* d = v;
  if (R > 0) {
    GroupedProduct product = product_of(in_[kDecode], outputs_, R, rest, bank_.decode_layout);
    product.a = v;
    d = product.out = memory_.floats(outputs_.count(), rest);
    run(threads_, memory_, product);
  }
  const float* bias = output_bias();
  float* sums = bank_.type == Element::kFloat ? static_cast<float*>(y) : memory_.floats(T_, H);
  threads_.parallel_rows(T_, K_ * H, [&](int64_t t) {
    float* sum = sums + t * H;
    std::fill_n(sum, H, 0.0f);
    outputs_.for_each_of_token(t * K_, K_, [&](int64_t, int64_t row) {
      const float* part = d + row * rest;
      if (columns.empty()) return kernels_.accumulate(1.0f, part, sum, H);
      const Columns::Group& group = columns.of_row(row);
      for (int64_t i = 0; i < R; ++i) sum[group.pivots[i]] += v[row * R + i];
      for (int64_t i = 0; i < rest; ++i) sum[group.rest[i]] += part[i];
    });
    if (bias != nullptr)
      slots_.for_each_of_token(t * K_, K_, [&](int64_t slot, int64_t row) {
        kernels_.accumulate(weight_[row], bias + index_[slot] * H, sum, H);
      });
    if (bank_.type != Element::kFloat)
      kernels_.narrow(bank_.type, sum, static_cast<char*>(y) + t * H * static_cast<int64_t>(size_of(bank_.type)), H);
  });
}

void LatentCall::compute(void* y) const { decode(summed(down(intermediate())), y); }

class LatentExperts : public Node {
 public:
  LatentExperts(Element type, const Attributes& attributes) : bank_(type, attributes) {}

  void compute(const Call& call) const override {
    const Tensors in = bank_.read(call);
    void* y = call.output(in[kX].dims);
    const Tensor& weight = in[kWeight];
    Scratch scratch(call);
    const float* routing = as_floats(call, scratch, bank_.type, weight.data, weight.dims[0], weight.dims[1]);
    compute_latent_experts(call, scratch, bank_, in, routing, in[kDown].dims[1], y);
  }

 private:
  Bank bank_;
};

}  // namespace

void compute_latent_experts(const Threads& threads, Memory& memory, const Bank& bank, const Tensors& in, const float* routing,
                            int64_t I, void* y) {
  LatentCall(threads, memory, bank, in, routing, I).compute(y);
}

const Operator kLatentExperts = {
    "LatentExperts", kLatentInputs, kInputCount,
    [](Element type, const Attributes& attributes) -> std::unique_ptr<Node> {
      return std::make_unique<LatentExperts>(type, attributes);
    },
    make_gpu_latent_experts,
    [](const Shape& x, const Shape&, bool (*)(const void*, const char*), const void*) { return x; }};

}  // namespace molae
