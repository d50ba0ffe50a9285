// molae::GroupedGemm: rows sorted by group, each group with a weight of its own.
#include "grouped_gemm.h"

namespace molae {
namespace {

constexpr Input kInputs[] = {
    {"a", kNoElement, kRequired},    {"b", kNoElement, kRequired},          {"ends", kOrtInt32, kRequired},
    {"bias", kNoElement, kOptional}, {"row_weight", kNoElement, kOptional},
};

class GroupedGemm : public Node {
 public:
  GroupedGemm(Element type, const Attributes& attributes) : traits_(type, attributes) {}

  void compute(const Call& call) const override {
    const GemmInputs in(call, traits_);
    const Element type = traits_.type;
    const int64_t S = in.S, G = in.G;

    Scratch scratch(call);
    GroupedProduct product;
    int64_t end = 0;
    for (int64_t g = 0; g < G; ++g) {
      const int64_t begin = end;
      end = in.ends.as<int32_t>()[g];
      if (end < begin || end > S) fail("the input 'ends' is ", end, " at ", g, ", expected ", begin, " to ", S, ": ends ascend");
      if (end > begin) product.segments.push_back({g, begin, end});
    }
    product.a = as_floats(call, scratch, type, in.a.data, S, in.N);
    product.weight = in.b.data;
    product.type = type;
    product.layout = traits_.transposed ? Layout::kInputsFirst : Layout::kOutputsFirst;
    product.k = in.N;
    product.n = in.M;
    product.bias = in.bias.data;
    product.activation = traits_.activation;
    product.interleaved = traits_.interleaved;
    if (in.row_weight.present) product.row_weight = as_floats(call, scratch, type, in.row_weight.data, 1, S);
    const int64_t width = product.width();
    char* y = static_cast<char*>(call.output({S, width}));
    product.out = type == Element::kFloat ? reinterpret_cast<float*>(y) : scratch.floats(S, width);
    run(call, scratch, product);
    std::fill(product.out + end * width, product.out + S * width, 0.0f);  // rows of no group
    if (type == Element::kFloat) return;
    const int64_t line = width * static_cast<int64_t>(size_of(type));
    call.parallel_rows(S, width, [&](int64_t row) { cpu_kernels().narrow(type, product.out + row * width, y + row * line, width); });
  }

 private:
  GemmTraits traits_;
};

}  // namespace

GemmTraits::GemmTraits(Element type, const Attributes& attributes)
    : type(type), transposed(attributes.flag("transposed")), activation(read_activation(attributes, &interleaved)) {}

GemmInputs::GemmInputs(const Call& call, const GemmTraits& traits)
    : a(call.input(0, "a")),
      b(call.input(1, "b")),
      ends(call.input(2, "ends")),
      bias(call.input(3, "bias")),
      row_weight(call.input(4, "row_weight")) {
  const bool transposed = traits.transposed;
  a.expect_rank(2, "[S,N]");
  b.expect_rank(3, transposed ? "[G,N,M]" : "[G,M,N]");
  S = a.dims[0];
  N = a.dims[1];
  G = b.dims[0];
  M = b.dims[transposed ? 2 : 1];
  b.expect(transposed ? std::vector<int64_t>{G, N, M} : std::vector<int64_t>{G, M, N}, transposed ? "[G,N,M]" : "[G,M,N]");
  ends.expect({G}, "[G]");
  if (bias.present) bias.expect({G, M}, "[G,M]");
  if (row_weight.present) row_weight.expect({S}, "[S]");
  if (traits.activation.gated && M % 2 != 0) fail("the input 'b' has ", M, " columns, expected an even number for gate and up");
}

const Operator kGroupedGemm = {
    "GroupedGemm", kInputs, 5,
    [](Element type, const Attributes& attributes) -> std::unique_ptr<Node> {
      return std::make_unique<GroupedGemm>(type, attributes);
    },
    make_gpu_grouped_gemm,
    [](const Shape& a, const Shape& b, bool (*flag)(const void*, const char*), const void* context) {
      if (a.dims.size() != 2 || b.dims.size() != 3) return Shape{};
      const size_t columns = flag(context, "transposed") ? 2 : 1;
      Shape y{{a.dims[0], b.dims[columns]}, {a.names[0], b.names[columns]}};
      if (flag(context, "gated")) {
        y.dims[1] = y.dims[1] < 0 ? -1 : y.dims[1] / 2;
        y.names[1].clear();
      }
      return y;
    }};

}  // namespace molae
