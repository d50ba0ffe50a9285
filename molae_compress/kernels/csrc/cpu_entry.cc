// The CPU operators outside of ONNX Runtime.
#include "cpu_entry.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "grouped.h"
#include "latent_bank.h"

namespace molae {
namespace {

// The caller's threads. A team of any size does all tasks, so that one inside another, which has a single thread, does too.
class Pool : public Threads {
 public:
  explicit Pool(const MolaeCpuPool& pool) : pool_(pool) {}

 private:
  struct Job {
    size_t count;
    Body body;
    void* data;
    std::atomic<size_t> next;
  };

  static void work(void* opaque) {
    Job& job = *static_cast<Job*>(opaque);
    for (size_t i = job.next++; i < job.count; i = job.next++) job.body(job.data, i);
  }

  void each(size_t count, Body body, void* data) const override {
    Job job{count, body, data, {0}};
    // Never fewer threads than the caller's other work has: GCC's runtime ends those that a team leaves out.
    if (pool_.parallel != nullptr && pool_.threads > 1)
      pool_.parallel(work, &job, static_cast<unsigned>(pool_.threads), 0);
    else
      work(&job);
  }

  const MolaeCpuPool& pool_;
};

// Memory that the calling thread keeps from call to call: fresh pages would cost as much as the arithmetic on them. What a call
// needs beyond it comes from the heap, and the next call finds it kept, up to a limit.
class Kept : public Memory {
 public:
  Kept() = default;
  Kept(const Kept&) = delete;
  Kept& operator=(const Kept&) = delete;
  ~Kept() override {
    Block& block = kept();
    if (used_ <= block.size || block.size >= kMost) return;
    block.lines.reset();
    block.size = 0;
    const size_t size = std::min(used_, kMost);
    block.lines.reset(new (std::nothrow) Line[size]);
    if (block.lines != nullptr) block.size = size;
  }

  float* floats(int64_t rows, int64_t width) override {
    const size_t count = static_cast<size_t>(rows) * static_cast<size_t>(width), size = count / kFloats + 1, begin = used_;
    used_ += size;
    if (used_ <= kept().size) return kept().lines[begin].floats;
    more_.emplace_back(new Line[size]);
    return more_.back()[0].floats;
  }

 private:
  static constexpr size_t kFloats = 16;
  struct alignas(64) Line {
    float floats[kFloats];
  };
  struct Block {
    std::unique_ptr<Line[]> lines;
    size_t size = 0;
  };
  static constexpr size_t kMost = (size_t{64} << 20) / sizeof(Line);

  static Block& kept() {
    thread_local Block block;
    return block;
  }

  size_t used_ = 0;
  std::vector<std::unique_ptr<Line[]>> more_;
};

template <class Body>
int answered(char* message, size_t bytes, Body&& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    if (bytes > 0) {
      std::strncpy(message, error.what(), bytes - 1);
      message[bytes - 1] = '\0';
    }
    return 1;
  }
}

Layout layout_of(int32_t transposed) { return transposed ? Layout::kInputsFirst : Layout::kOutputsFirst; }

void multiply(const MolaeCpuProduct& c) {
  const Pool threads(c.pool);
  Kept memory;
  const Element type = static_cast<Element>(c.element);
  const int64_t item = static_cast<int64_t>(size_of(type)), line = c.outputs * item;
  GroupedProduct product;
  int64_t end = 0;
  for (int64_t g = 0; g < c.groups; ++g) {
    const int64_t begin = end;
    end = c.ends == nullptr ? c.rows : c.ends[g];
    if (end < begin || end > c.rows) fail("the end of group ", g, " is ", end, ", expected ", begin, " to ", c.rows);
    if (end > begin) product.segments.push_back({g, begin, end});
  }
  product.a = as_floats(threads, memory, type, c.a, c.rows, c.inputs);
  product.weight = c.weight;
  product.type = type;
  product.layout = layout_of(c.transposed);
  product.k = c.inputs;
  product.n = c.outputs;
  char* out = static_cast<char*>(c.out);
  product.out = type == Element::kFloat ? static_cast<float*>(c.out) : memory.floats(c.rows, c.outputs);
  run(threads, memory, product);
  std::memset(out + end * line, 0, static_cast<size_t>((c.rows - end) * line));
  if (type == Element::kFloat) return;
  threads.parallel_rows(end, c.outputs, [&](int64_t row) {
    cpu_kernels().narrow(type, product.out + row * c.outputs, out + row * line, c.outputs);
  });
}

Tensor tensor_of(const char* name, const void* data, std::vector<int64_t> dims) {
  Tensor tensor;
  tensor.name = name;
  tensor.present = data != nullptr;
  tensor.data = data;
  tensor.dims = std::move(dims);
  return tensor;
}

Bank bank_of(const MolaeCpuExperts& c) {
  Bank bank;
  bank.type = static_cast<Element>(c.element);
  bank.experts = c.experts;
  bank.input_group = c.input_group;
  bank.output_group = c.output_group;
  bank.rank_in = c.rank_in;
  bank.rank_out = c.rank_out;
  bank.core_layout = layout_of(c.core_transposed);
  bank.down_layout = layout_of(c.down_transposed);
  bank.decode_layout = layout_of(c.decode_transposed);
  bank.interleaved = c.interleaved != 0;
  bank.activation = {static_cast<Function>(c.activation), c.gated != 0, c.alpha, c.limit, c.up_offset};
  return bank;
}

void compute(const MolaeCpuExperts& c) {
  const Pool threads(c.pool);
  Kept memory;
  auto basis_of = [&](const char* name, const void* data, const int32_t* pivots, int64_t groups, int64_t rank) {
    return tensor_of(name, data, {groups * rank, pivots == nullptr ? c.hidden : c.hidden - rank});
  };
  const int64_t inputs = c.experts / c.input_group, outputs = c.experts / c.output_group;
  Tensors in(kInputCount);
  in[kX] = tensor_of("x", c.x, {c.tokens, c.hidden});
  in[kIndex] = tensor_of("index", c.index, {c.tokens, c.top_k});
  in[kEncode] = basis_of("encode", c.encode, c.encode_pivots, inputs, c.rank_in);
  in[kEncodePivots] = tensor_of("encode_pivots", c.encode_pivots, {inputs * c.rank_in});
  in[kUpEncode] = basis_of("up_encode", c.up_encode, c.up_encode_pivots, inputs, c.rank_in);
  in[kUpEncodePivots] = tensor_of("up_encode_pivots", c.up_encode_pivots, {inputs * c.rank_in});
  in[kDecode] = basis_of("decode", c.decode, c.decode_pivots, outputs, c.rank_out);
  in[kDecodePivots] = tensor_of("decode_pivots", c.decode_pivots, {outputs * c.rank_out});
  // Of these the numbers alone are read.
  in[kCore] = tensor_of("core", c.core, {});
  in[kCoreUp] = tensor_of("core_up", c.core_up, {});
  in[kCoreBias] = tensor_of("core_bias", c.core_bias, {});
  in[kDown] = tensor_of("down", c.down, {});
  in[kDecodeBias] = tensor_of("decode_bias", c.decode_bias, {});
  compute_latent_experts(threads, memory, bank_of(c), in, c.routing, c.intermediate, c.y);
}

}  // namespace
}  // namespace molae

extern "C" __attribute__((visibility("default"))) int molae_cpu_product(const MolaeCpuProduct* call, char* message, size_t bytes) {
  return molae::answered(message, bytes, [&] { molae::multiply(*call); });
}

extern "C" __attribute__((visibility("default"))) int molae_cpu_experts(const MolaeCpuExperts* call, char* message, size_t bytes) {
  return molae::answered(message, bytes, [&] { molae::compute(*call); });
}
