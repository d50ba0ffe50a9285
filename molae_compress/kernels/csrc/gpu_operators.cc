// The operators for the CUDAExecutionProvider: tensors lie in the memory of a GPU, and nothing here reads them. Shapes are
// checked as on the CPU; the numbers of index, pivots and ends are not, since the host would have to wait for them.
#include <utility>

#include "gpu_driver.h"
#include "gpu_launch.h"
#include "grouped_gemm.h"
#include "latent_bank.h"

namespace molae {
namespace {

constexpr size_t kAligned = 256;  // what the launcher asks of its scratch memory

static_assert(static_cast<int>(Function::kIdentity) == MOLAE_GPU_IDENTITY && static_cast<int>(Function::kSilu) == MOLAE_GPU_SILU &&
              static_cast<int>(Function::kGelu) == MOLAE_GPU_GELU && static_cast<int>(Function::kGeluTanh) == MOLAE_GPU_GELU_TANH &&
              static_cast<int>(Function::kRelu) == MOLAE_GPU_RELU && static_cast<int>(Function::kRelu2) == MOLAE_GPU_RELU2);

void check(int status) {
  if (status > 0) fail(molae_gpu_message(status), ": ", status);
  if (status < 0) fail(molae_gpu_message(status));
}

// What no call could change is refused when a session is created.
void check_library() {
  if (molae_gpu::constants() == nullptr)
    fail("this library holds no GPU kernels: build it with `make gpu-kernels` and `make kernels`, or create the session without "
         "the CUDAExecutionProvider");
}

int32_t element_of(Element type) { return type == Element::kHalf ? MOLAE_GPU_FLOAT16 : MOLAE_GPU_BFLOAT16; }

MolaeGpuGate gate_of(const Activation& how, bool interleaved) {
  return {static_cast<int32_t>(how.function), how.gated, interleaved, how.alpha, how.limit, how.up_offset};
}

// Null for what is absent or empty: where an empty tensor lies is up to ONNX Runtime.
template <class T>
const T* pointer_of(const Tensor& tensor) {
  const bool is_empty = std::find(tensor.dims.begin(), tensor.dims.end(), 0) != tensor.dims.end();
  return tensor.present && !is_empty ? tensor.as<T>() : nullptr;
}

void* stream_of(const Call& call) {
  void* stream = nullptr;
  call.ort()(Fn::KernelContext_GetGPUComputeStream, static_cast<const void*>(call.context()), &stream);
  return stream;
}

// Device memory of one call. It goes back when the work is enqueued, not done: the allocator hands it on to the same stream
// only, which is behind that work by then.
class DeviceMemory {
 public:
  DeviceMemory(const Call& call, size_t bytes, void* stream) : call_(call) {
    if (bytes == 0) return;
    const Ort& ort = call.ort();
    const size_t room = bytes + kAligned - 1;
    if (stream == nullptr) {
      // Asked for a scratch buffer, ONNX Runtime follows the pointer to the stream without a look at it.
      ort(Fn::AllocatorAlloc, call.allocator(), room, &block_);
    } else {
      const void* memory = nullptr;  // belongs to the allocator
      ort(Fn::AllocatorGetInfo, static_cast<const void*>(call.allocator()), &memory);
      ort(Fn::KernelContext_GetScratchBuffer, static_cast<const void*>(call.context()), memory, room, &block_);
    }
    if (block_ == nullptr) fail("no ", room, " bytes of scratch memory on the GPU");
  }
  // A scratch buffer has no owner in ONNX Runtime: whoever asked for it frees it.
  ~DeviceMemory() {
    if (block_ != nullptr) call_.ort().succeeds(call_.ort().status(Fn::AllocatorFree, call_.allocator(), block_));
  }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  void* aligned() const {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(block_) + kAligned - 1) / kAligned * kAligned);
  }

 private:
  const Call& call_;
  void* block_ = nullptr;
};

class GpuGroupedGemm : public Node {
 public:
  GpuGroupedGemm(Element type, const Attributes& attributes) : traits_(type, attributes) { check_library(); }

  void compute(const Call& call) const override {
    const GemmInputs in(call, traits_);
    const int64_t columns = traits_.activation.gated ? in.M / 2 : in.M;
    void* y = call.output({in.S, columns});
    if (in.S == 0 || columns == 0) return;
    void* stream = stream_of(call);
    const size_t size = static_cast<size_t>(in.S) * static_cast<size_t>(columns) * size_of(traits_.type);
    if (in.G == 0) return check(molae_gpu::clear(y, size, stream));
    MolaeGpuGroupedGemm c{};
    c.element = element_of(traits_.type);
    c.rows = in.S;
    c.inputs = in.N;
    c.columns = columns;
    c.groups = in.G;
    c.transposed = traits_.transposed;
    c.gate = gate_of(traits_.activation, traits_.interleaved);
    c.a = pointer_of<void>(in.a);
    c.b = pointer_of<void>(in.b);
    c.ends = pointer_of<int32_t>(in.ends);
    c.bias = pointer_of<void>(in.bias);
    c.row_weight = pointer_of<void>(in.row_weight);
    c.out = y;
    size_t bytes = 0;
    check(molae_gpu_grouped_gemm_scratch(&c, &bytes));
    const DeviceMemory scratch(call, bytes, stream);
    // Rows of no group are zero, and only the device knows which they are.
    check(molae_gpu::clear(y, size, stream));
    check(molae_gpu_grouped_gemm(&c, scratch.aligned(), bytes, stream));
  }

 private:
  GemmTraits traits_;
};

class GpuLatentExperts : public Node {
 public:
  GpuLatentExperts(Element type, const Attributes& attributes) : bank_(type, attributes) {
    check_library();
    if (bank_.rank_in % 8 || bank_.rank_out % 8 || bank_.experts >= molae_gpu::constants()->max_groups)
      check(MOLAE_GPU_UNSUPPORTED);
  }

  void compute(const Call& call) const override {
    const Tensors in = bank_.read(call);
    void* y = call.output(in[kX].dims);
    const int64_t T = in[kX].dims[0], H = in[kX].dims[1];
    if (T == 0) return;
    void* stream = stream_of(call);
    MolaeGpuLatentExperts c = described(in);
    c.y = y;
    if (c.top_k == 0)
      return check(molae_gpu::clear(y, static_cast<size_t>(T) * static_cast<size_t>(H) * size_of(bank_.type), stream));
    size_t bytes = 0;
    check(molae_gpu_latent_experts_scratch(&c, &bytes));
    const DeviceMemory scratch(call, bytes, stream);
    check(molae_gpu_latent_experts(&c, scratch.aligned(), bytes, stream));
  }

 private:
  MolaeGpuLatentExperts described(const Tensors& in) const {
    MolaeGpuLatentExperts c{};
    c.element = element_of(bank_.type);
    c.tokens = in[kX].dims[0];
    c.hidden = in[kX].dims[1];
    c.intermediate = in[kDown].dims[1];
    c.top_k = in[kIndex].dims[1];
    c.experts = bank_.experts;
    c.input_group = bank_.input_group;
    c.output_group = bank_.output_group;
    c.rank_in = bank_.rank_in;
    c.rank_out = bank_.rank_out;
    c.gate = gate_of(bank_.activation, bank_.interleaved);
    c.x = pointer_of<void>(in[kX]);
    c.index = pointer_of<int64_t>(in[kIndex]);
    c.weight = pointer_of<void>(in[kWeight]);
    c.encode = pointer_of<void>(in[kEncode]);
    c.encode_pivots = pointer_of<int32_t>(in[kEncodePivots]);
    c.core = pointer_of<void>(in[kCore]);
    c.up_encode = pointer_of<void>(in[kUpEncode]);
    c.up_encode_pivots = pointer_of<int32_t>(in[kUpEncodePivots]);
    c.core_up = pointer_of<void>(in[kCoreUp]);
    c.core_bias = pointer_of<void>(in[kCoreBias]);
    c.down = pointer_of<void>(in[kDown]);
    c.decode = pointer_of<void>(in[kDecode]);
    c.decode_pivots = pointer_of<int32_t>(in[kDecodePivots]);
    c.decode_bias = pointer_of<void>(in[kDecodeBias]);
    return c;
  }

  Bank bank_;
};

}  // namespace

std::unique_ptr<Node> make_gpu_grouped_gemm(Element type, const Attributes& attributes) {
  return std::make_unique<GpuGroupedGemm>(type, attributes);
}

std::unique_ptr<Node> make_gpu_latent_experts(Element type, const Attributes& attributes) {
  return std::make_unique<GpuLatentExperts>(type, attributes);
}

}  // namespace molae
