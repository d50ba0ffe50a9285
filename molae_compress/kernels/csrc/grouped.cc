#include "grouped.h"

namespace molae {
namespace {

constexpr int64_t kFewRows = 4;          // as in cpu_kernels.inc: weights are then used as they are read
constexpr int64_t kRows = 96;            // of a tile of many rows
constexpr int64_t kWidth = 128;          // of a tile of many rows, before a gate joins two of them
constexpr int64_t kSpan = 512;           // widest tile of few rows
constexpr int64_t kReadBytes = 1 << 18;  // of weights that one row reads in one task: long enough to stream, short enough to share
constexpr int64_t kTile = kRows * kWidth;
static_assert(kTile >= kFewRows * kSpan, "few rows share the buffers of many");

int64_t padded(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

// One tile of outputs; or, where inputs are split, the share of some inputs in all columns of a weight.
struct Task {
  const Segment* segment;
  int64_t row, rows;
  int64_t begin, end;       // of outputs, or of inputs if `partial`
  float* partial = nullptr;  // [weights][rows][padded(n)]
};

// Few rows whose inputs are split: the shares to add up.
struct Split {
  const Segment* segment;
  float* partial;
  int64_t shares;
};

class Runner {
 public:
  explicit Runner(const GroupedProduct& product)
      : p_(product),
        kernels_(cpu_kernels()),
        weights_(product.up_weight == nullptr ? 1 : 2),
        item_(static_cast<int64_t>(size_of(product.type))),
        columns_per_output_(product.activation.gated && product.interleaved && weights_ == 1 ? 2 : 1) {}

  void plan(Memory& memory);
  void compute(const Task& task) const;
  void finish(const Split& split, int64_t begin, int64_t end) const;

  std::vector<Task> tasks;
  std::vector<Split> splits;

 private:
  const char* weight_of(int operand, int64_t group) const {
    return static_cast<const char*>(operand == 0 ? p_.weight : p_.up_weight) + group * p_.k * p_.n * item_;
  }
  const float* rows_of(int operand, int64_t row) const { return (operand == 0 ? p_.a : p_.up_a) + row * p_.k; }

  // c = the product of some rows with some columns of a weight, over some inputs.
  void multiply(int operand, const Task& task, int64_t column, int64_t columns, int64_t input, int64_t inputs, float* c,
                int64_t ldc) const;
  void store(int64_t group, int64_t row, int64_t begin, int64_t end, const float* gate, const float* up) const;
  void plan_few(Memory& memory, const Segment& segment);

  const GroupedProduct& p_;
  const Kernels& kernels_;
  const int weights_;
  const int64_t item_, columns_per_output_;
};

void Runner::plan(Memory& memory) {
  const int64_t width = p_.width();
  for (const Segment& segment : p_.segments) {
    if (segment.end - segment.begin <= kFewRows) {
      plan_few(memory, segment);
      continue;
    }
    const int64_t rows = segment.end - segment.begin, blocks = (rows + kRows - 1) / kRows, block = (rows + blocks - 1) / blocks;
    for (int64_t o = 0; o < width; o += kWidth)
      for (int64_t row = segment.begin; row < segment.end; row += block)
        tasks.push_back({&segment, row, std::min(block, segment.end - row), o, std::min(width, o + kWidth)});
  }
}

void Runner::plan_few(Memory& memory, const Segment& segment) {
  const int64_t rows = segment.end - segment.begin, width = p_.width();
  const bool outputs_first = p_.layout == Layout::kOutputsFirst;
  const int64_t line = std::max<int64_t>(1, (outputs_first ? p_.k : p_.n) * item_);
  int64_t lines = std::max<int64_t>(8, kReadBytes / line / 8 * 8);
  if (outputs_first || (p_.k <= lines && p_.n <= kSpan / 2)) {
    const int64_t span = std::min(outputs_first ? lines : kSpan, kSpan) / columns_per_output_;
    for (int64_t o = 0; o < width; o += span) tasks.push_back({&segment, segment.begin, rows, o, std::min(width, o + span)});
    return;
  }
  // Whole rows of the weight in each task: they follow each other in memory. More of them for more rows, whose shares of the sums
  // would be as much to write and to read again as the weights.
  lines *= rows;
  const int64_t shares = (p_.k + lines - 1) / lines, size = weights_ * rows * padded(p_.n);
  float* partial = memory.floats(shares, size);
  splits.push_back({&segment, partial, shares});
  for (int64_t i = 0; i < shares; ++i)
    tasks.push_back({&segment, segment.begin, rows, i * lines, std::min(p_.k, (i + 1) * lines), partial + i * size});
}

void Runner::multiply(int operand, const Task& task, int64_t column, int64_t columns, int64_t input, int64_t inputs, float* c,
                      int64_t ldc) const {
  const bool outputs_first = p_.layout == Layout::kOutputsFirst;
  const int64_t ldb = outputs_first ? p_.k : p_.n, offset = outputs_first ? column * ldb + input : input * ldb + column;
  kernels_.multiply({rows_of(operand, task.row) + input, p_.k, weight_of(operand, task.segment->group) + offset * item_, ldb,
                     p_.type, p_.layout, task.rows, columns, inputs, c, ldc});
}

void Runner::compute(const Task& task) const {
  if (task.partial != nullptr) {
    const int64_t ldc = padded(p_.n);
    for (int w = 0; w < weights_; ++w)
      multiply(w, task, 0, p_.n, task.begin, task.end - task.begin, task.partial + w * task.rows * ldc, ldc);
    return;
  }
  alignas(64) float first[2 * kTile], second[kTile];
  const int64_t outputs = task.end - task.begin, columns = outputs * columns_per_output_, ldc = padded(columns);
  multiply(0, task, task.begin * columns_per_output_, columns, 0, p_.k, first, ldc);
  const float* up = nullptr;
  if (columns_per_output_ == 2) {
    up = first + 1;
  } else if (p_.activation.gated) {
    multiply(weights_ - 1, task, weights_ == 2 ? task.begin : p_.width() + task.begin, columns, 0, p_.k, second, ldc);
    up = second;
  }
  for (int64_t i = 0; i < task.rows; ++i)
    store(task.segment->group, task.row + i, task.begin, task.end, first + i * ldc, up == nullptr ? nullptr : up + i * ldc);
}

void Runner::finish(const Split& split, int64_t begin, int64_t end) const {
  const int64_t rows = split.segment->end - split.segment->begin, ldc = padded(p_.n), size = weights_ * rows * ldc;
  alignas(64) float first[2 * kSpan], second[kSpan];
  auto total = [&](int64_t place, int64_t count, float* sum) {
    std::fill_n(sum, count, 0.0f);
    for (int64_t i = 0; i < split.shares; ++i) kernels_.accumulate(1.0f, split.partial + i * size + place, sum, count);
  };
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t o = begin; o < end; o += kSpan) {
      const int64_t stop = std::min(end, o + kSpan), count = stop - o;
      const float* up = nullptr;
      total(i * ldc + o * columns_per_output_, count * columns_per_output_, first);
      if (columns_per_output_ == 2) {
        up = first + 1;
      } else if (p_.activation.gated) {
        total(weights_ == 2 ? (rows + i) * ldc + o : i * ldc + p_.width() + o, count, second);
        up = second;
      }
      store(split.segment->group, split.segment->begin + i, o, stop, first, up);
    }
  }
}

void Runner::store(int64_t group, int64_t row, int64_t begin, int64_t end, const float* gate, const float* up) const {
  const Activation& how = p_.activation;
  const int64_t count = end - begin, width = p_.width(), step = columns_per_output_;
  float* out = p_.out + row * width + begin;
  alignas(64) float gate_biased[2 * kSpan], up_biased[kSpan], result[kSpan];
  if (p_.bias != nullptr) {
    const char* bias = static_cast<const char*>(p_.bias) + group * (how.gated ? 2 * width : width) * item_;
    if (how.gated && p_.interleaved) {
      alignas(64) float both[2 * kSpan];
      kernels_.widen(p_.type, bias + 2 * begin * item_, both, 2 * count);
      for (int64_t i = 0; i < count; ++i) {
        gate_biased[i * step] = gate[i * step] + both[2 * i];
        (step == 2 ? gate_biased + 1 : up_biased)[i * step] = up[i * step] + both[2 * i + 1];
      }
      up = step == 2 ? gate_biased + 1 : up_biased;
    } else {
      kernels_.widen(p_.type, bias + begin * item_, gate_biased, count);
      kernels_.accumulate(1.0f, gate, gate_biased, count);
      if (how.gated) {
        kernels_.widen(p_.type, bias + (width + begin) * item_, up_biased, count);
        kernels_.accumulate(1.0f, up, up_biased, count);
        up = up_biased;
      }
    }
    gate = gate_biased;
  }
  if (how.gated || how.function != Function::kIdentity || how.limit > 0.0f) {
    kernels_.activate(how, gate, up, step, result, count);
    gate = result;
  }
  const float factor = p_.row_weight == nullptr ? 1.0f : p_.row_weight[row];
  if (p_.add)
    kernels_.accumulate(factor, gate, out, count);
  else
    for (int64_t i = 0; i < count; ++i) out[i] = factor * gate[i];
}

}  // namespace

void run(const Threads& threads, Memory& memory, const GroupedProduct& product) {
  if (product.width() == 0 || product.segments.empty()) return;
  Runner runner(product);
  runner.plan(memory);
  threads.parallel(static_cast<int64_t>(runner.tasks.size()), [&](int64_t i) { runner.compute(runner.tasks[i]); });
  const int64_t width = product.width(), spans = (width + kSpan - 1) / kSpan, splits = static_cast<int64_t>(runner.splits.size());
  threads.parallel_rows(splits * spans, 16 * kSpan, [&](int64_t i) {
    const int64_t begin = i % spans * kSpan;
    runner.finish(runner.splits[i / spans], begin, std::min(width, begin + kSpan));
  });
}

Activation read_activation(const Attributes& attributes, bool* interleaved) {
  static const std::pair<const char*, Function> kNames[] = {
      {"identity", Function::kIdentity}, {"silu", Function::kSilu}, {"gelu", Function::kGelu},
      {"gelu_tanh", Function::kGeluTanh}, {"relu", Function::kRelu}, {"relu2", Function::kRelu2}};
  Activation activation;
  const std::string name = attributes.text("activation", "identity");
  bool known = false;
  for (const auto& [text, function] : kNames) {
    if (name != text) continue;
    activation.function = function;
    known = true;
  }
  if (!known) fail("the attribute 'activation' is '", name, "', which is not one of identity, silu, gelu, gelu_tanh, relu, relu2");
  activation.gated = attributes.flag("gated");
  *interleaved = attributes.flag("interleaved");
  activation.alpha = attributes.real("alpha", 1.0f);
  activation.limit = attributes.real("limit", 0.0f);
  if (!(activation.limit >= 0.0f)) fail("the attribute 'limit' is ", activation.limit, ", expected 0 (none) or more");
  activation.up_offset = attributes.real("up_offset", 0.0f);
  return activation;
}

}  // namespace molae
