// molae::GroupedGemm: rows sorted by group, each group with a weight of its own.
#include "grouped.h"
#include "operators.h"

namespace molae {
namespace {

constexpr Input kInputs[] = {
    {"a", kNoElement, kRequired},    {"b", kNoElement, kRequired},          {"ends", kOrtInt32, kRequired},
    {"bias", kNoElement, kOptional}, {"row_weight", kNoElement, kOptional},
};

class GroupedGemm : public Node {
 public:
  GroupedGemm(Element type, const Attributes& attributes)
      : type_(type), transposed_(attributes.flag("transposed")), activation_(read_activation(attributes, &interleaved_)) {}

  void compute(const Call& call) const override {
    const Tensor a = call.input(0, "a"), b = call.input(1, "b"), ends = call.input(2, "ends");
    const Tensor bias = call.input(3, "bias"), row_weight = call.input(4, "row_weight");
    a.expect_rank(2, "[S,N]");
    b.expect_rank(3, transposed_ ? "[G,N,M]" : "[G,M,N]");
    const int64_t S = a.dims[0], N = a.dims[1], G = b.dims[0], M = b.dims[transposed_ ? 2 : 1];
    b.expect(transposed_ ? std::vector<int64_t>{G, N, M} : std::vector<int64_t>{G, M, N}, transposed_ ? "[G,N,M]" : "[G,M,N]");
    ends.expect({G}, "[G]");
    if (bias.present) bias.expect({G, M}, "[G,M]");
    if (row_weight.present) row_weight.expect({S}, "[S]");
    if (activation_.gated && M % 2 != 0) fail("the input 'b' has ", M, " columns, expected an even number for gate and up");

    Scratch scratch(call);
    GroupedProduct product;
    int64_t end = 0;
    for (int64_t g = 0; g < G; ++g) {
      const int64_t begin = end;
      end = ends.as<int32_t>()[g];
      if (end < begin || end > S) fail("the input 'ends' is ", end, " at ", g, ", expected ", begin, " to ", S, ": ends ascend");
      if (end > begin) product.segments.push_back({g, begin, end});
    }
    product.a = as_floats(call, scratch, type_, a.data, S, N);
    product.weight = b.data;
    product.type = type_;
    product.layout = transposed_ ? Layout::kInputsFirst : Layout::kOutputsFirst;
    product.k = N;
    product.n = M;
    product.bias = bias.data;
    product.activation = activation_;
    product.interleaved = interleaved_;
    if (row_weight.present) product.row_weight = as_floats(call, scratch, type_, row_weight.data, 1, S);
    const int64_t width = product.width();
    char* y = static_cast<char*>(call.output({S, width}));
    product.out = type_ == Element::kFloat ? reinterpret_cast<float*>(y) : scratch.floats(S, width);
    run(call, scratch, product);
    std::fill(product.out + end * width, product.out + S * width, 0.0f);  // rows of no group
    if (type_ == Element::kFloat) return;
    const int64_t line = width * static_cast<int64_t>(size_of(type_));
    call.parallel_rows(S, width, [&](int64_t row) { cpu_kernels().narrow(type_, product.out + row * width, y + row * line, width); });
  }

 private:
  Element type_;
  bool transposed_, interleaved_ = false;
  Activation activation_;
};

}  // namespace

const Operator kGroupedGemm = {
    "GroupedGemm", kInputs, 5,
    [](Element type, const Attributes& attributes) -> std::unique_ptr<Node> {
      return std::make_unique<GroupedGemm>(type, attributes);
    },
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
