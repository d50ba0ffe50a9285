// The steps of the operators, as launches: the same as `gpu_latent.py` takes with torch tensors.
// Letters: see gpu_steps.h.
#include "gpu_launch.h"

#include "gpu_steps.h"

namespace molae_gpu {
namespace {

struct Side {
  Matrices matrices;
  Columns columns;
  bool picked;
  int64_t group_size;
  const Columns* if_picked() const { return picked ? &columns : nullptr; }
};

Side side_of(Steps& steps, const void* weight, const int32_t* pivots, int64_t experts, int64_t group_size, int64_t rank, int64_t hidden,
             bool decode) {
  int64_t groups = experts / group_size, width = pivots ? hidden - rank : hidden;
  Columns columns;
  if (pivots) columns = steps.columns(pivots, groups, hidden, rank);
  Matrices m{weight, groups, decode ? width : rank, decode ? rank : width, decode};
  return {m, columns, pivots != nullptr, group_size};
}

// Many tokens: slots sorted by expert. A few: each slot by itself. Both leave rows where the next step looks for them.
class LatentExperts {
 public:
  LatentExperts(Steps& steps, const MolaeGpuLatentExperts& call)
      : s_(steps), c_(call), S_(call.tokens * call.top_k), few_(call.tokens <= constants()->few_tokens) {
    if (!few_) slots_ = s_.sort(c_.index, S_, c_.experts);
  }

  void run() {
    const void* z = encode(c_.encode, c_.encode_pivots);
    const void* z_up = c_.core_up ? encode(c_.up_encode, c_.up_encode_pivots) : nullptr;
    Matrices core{c_.core, c_.experts, c_.intermediate, c_.rank_in, true, c_.core_up, c_.core_bias, &c_.gate};
    void* h = s_.take(Scratch::kOdd, S_, c_.intermediate);
    if (few_)
      s_.few(z, z_up, core, S_, c_.index, c_.experts, 1, once() ? c_.top_k : 1, nullptr, h);
    else
      s_.gemm(z, z_up, core, {S_, &slots_, 1, once() ? c_.top_k : 0}, nullptr, nullptr, h);
    s_.scratch.clear(Scratch::kEven);
    int64_t rows_out = c_.rank_out ? c_.rank_out : c_.hidden;
    Matrices down{c_.down, c_.experts, rows_out, c_.intermediate, false};
    if (!c_.rank_out)
      finish(h, down, 1, Scratch::kEven);
    else
      decode(h, down);
  }

 private:
  bool once() const { return c_.input_group == c_.experts; }

  const void* encode(const void* weight, const int32_t* pivots) {
    Side side = side_of(s_, weight, pivots, c_.experts, c_.input_group, c_.rank_in, c_.hidden, false);
    int64_t rows = once() ? c_.tokens : S_;
    void* z = s_.take(Scratch::kEven, rows, c_.rank_in);
    if (few_ && once()) return s_.few(c_.x, nullptr, side.matrices, rows, nullptr, 1, 1, 1, side.if_picked(), z);
    if (few_)
      return s_.few(c_.x, nullptr, side.matrices, rows, c_.index, c_.experts, c_.input_group, c_.top_k, side.if_picked(), z);
    Rows where{rows, once() ? nullptr : &slots_, c_.input_group, once() ? 0 : c_.top_k};
    return s_.gemm(c_.x, nullptr, side.matrices, where, side.if_picked(), nullptr, z);
  }

  // The last product and the routed sum into y. `part` is free.
  void finish(const void* a, const Matrices& m, int64_t group_size, Scratch::Part part) {
    if (few_) return s_.few_combine(a, m, c_, group_size, c_.y);
    void* value = s_.gemm(a, nullptr, m, {S_, &slots_, group_size, 0, 1}, nullptr, nullptr, s_.take(part, S_, m.N));
    Steps::Terms terms;
    terms.value = value;
    terms.bias = c_.decode_bias;
    s_.combine(c_, terms, m.N, c_.y);
  }

  void decode(const void* h, const Matrices& down) {
    Side side = side_of(s_, c_.decode, c_.decode_pivots, c_.experts, c_.output_group, c_.rank_out, c_.hidden, true);
    bool one = side.matrices.groups == 1, plain = !side.picked;
    // By slot where something reads rows by slot: the sum, or the pivots of an interpolative basis.
    bool by_slot = one || side.picked;
    void* u = s_.take(Scratch::kEven, S_, c_.rank_out);
    if (few_)
      s_.few(h, nullptr, down, S_, c_.index, c_.experts, 1, 1, nullptr, u);
    else
      s_.gemm(h, nullptr, down, {S_, &slots_, 1, 0, by_slot}, nullptr, nullptr, u);
    s_.scratch.clear(Scratch::kOdd);
    if (plain && (few_ || !one)) return finish(u, side.matrices, c_.output_group, Scratch::kOdd);
    one ? decode_sum(u, side) : decode_slots(u, side);
  }

  // One basis: the routed sum is taken in latent space and decoded once for each token.
  void decode_sum(const void* u, const Side& side) {
    Steps::Terms sum, pieces, biased;
    sum.value = u;
    void* total = s_.combine(c_, sum, c_.rank_out, s_.take(Scratch::kOdd, c_.tokens, c_.rank_out));
    void* out = side.picked ? s_.take(Scratch::kOdd, c_.tokens, side.matrices.N) : c_.y;
    if (few_)
      s_.few(total, nullptr, side.matrices, c_.tokens, nullptr, 1, 1, 1, nullptr, out);
    else
      s_.gemm(total, nullptr, side.matrices, {c_.tokens}, nullptr, nullptr, out);
    if (side.picked) {
      pieces.value = out;
      pieces.kept = total;
      pieces.columns = &side.columns;
      pieces.routed = false;
      s_.combine(c_, pieces, c_.hidden, c_.y);
    }
    if (!c_.decode_bias) return;
    biased.base = c_.y;
    biased.bias = c_.decode_bias;
    s_.combine(c_, biased, c_.hidden, c_.y);
  }

  // Interpolative bases of several groups: products of slots, put together with what lies at the pivots in the sum.
  void decode_slots(const void* u, const Side& side) {
    void* other = s_.take(Scratch::kOdd, S_, side.matrices.N);
    if (few_)
      s_.few(u, nullptr, side.matrices, S_, c_.index, c_.experts, c_.output_group, 1, nullptr, other);
    else
      s_.gemm(u, nullptr, side.matrices, {S_, &slots_, c_.output_group, 1, 1}, nullptr, nullptr, other);
    Steps::Terms terms;
    terms.value = other;
    terms.kept = u;
    terms.columns = &side.columns;
    terms.group_size = c_.output_group;
    terms.bias = c_.decode_bias;
    s_.combine(c_, terms, c_.hidden, c_.y);
  }

  Steps& s_;
  const MolaeGpuLatentExperts& c_;
  int64_t S_;
  bool few_;
  Slots slots_;
};

bool known(const MolaeGpuGate& gate) { return gate.activation >= MOLAE_GPU_IDENTITY && gate.activation <= MOLAE_GPU_RELU2; }

// Whether a basis is there just if it has a rank. Where all columns are pivots nothing else is stored.
bool fits(const void* weight, const int32_t* pivots, int64_t rank, int64_t hidden) {
  if (!rank) return !weight && !pivots;
  return weight || (pivots && rank == hidden);
}

int checked(const MolaeGpuLatentExperts* c) {
  if (!constants()) return MOLAE_GPU_NO_KERNELS;
  if (!c || !c->core || !c->down) return MOLAE_GPU_BAD_ARGUMENT;
  if (c->tokens && !(c->x && c->index && c->weight && c->y)) return MOLAE_GPU_BAD_ARGUMENT;
  if (c->tokens < 0 || c->hidden < 1 || c->intermediate < 1 || c->top_k < 1 || c->experts < 1) return MOLAE_GPU_BAD_ARGUMENT;
  if (c->rank_in < 1 || c->rank_in > c->hidden || c->rank_out < 0 || c->rank_out > c->hidden) return MOLAE_GPU_BAD_ARGUMENT;
  if (c->input_group < 1 || c->output_group < 1 || c->experts % c->input_group || c->experts % c->output_group)
    return MOLAE_GPU_BAD_ARGUMENT;
  bool pair = c->core_up != nullptr;
  if ((pair && !c->gate.gated) || !known(c->gate)) return MOLAE_GPU_BAD_ARGUMENT;
  if (!fits(c->encode, c->encode_pivots, c->rank_in, c->hidden)) return MOLAE_GPU_BAD_ARGUMENT;
  if (!fits(c->up_encode, c->up_encode_pivots, pair ? c->rank_in : 0, c->hidden)) return MOLAE_GPU_BAD_ARGUMENT;
  if (!fits(c->decode, c->decode_pivots, c->rank_out, c->hidden)) return MOLAE_GPU_BAD_ARGUMENT;
  if (c->element != MOLAE_GPU_FLOAT16 && c->element != MOLAE_GPU_BFLOAT16) return MOLAE_GPU_UNSUPPORTED;
  if (c->tokens > kMostRows / c->top_k || c->experts > constants()->max_groups - 1) return MOLAE_GPU_UNSUPPORTED;
  if (c->hidden > constants()->max_rank) return MOLAE_GPU_UNSUPPORTED;
  uintptr_t all = 0;
  for (int64_t width : {c->hidden, c->intermediate, c->rank_in, c->rank_out}) all |= static_cast<uintptr_t>(width) * 2;
  for (const void* p : {c->x, c->weight, c->encode, c->core, c->up_encode, c->core_up, c->core_bias, c->down, c->decode,
                        c->decode_bias, static_cast<const void*>(c->y), static_cast<const void*>(c->index),
                        static_cast<const void*>(c->encode_pivots), static_cast<const void*>(c->up_encode_pivots),
                        static_cast<const void*>(c->decode_pivots)})
    all |= reinterpret_cast<uintptr_t>(p);
  return all & 15 ? MOLAE_GPU_UNSUPPORTED : MOLAE_GPU_OK;
}

int checked(const MolaeGpuGroupedGemm* c) {
  if (!constants()) return MOLAE_GPU_NO_KERNELS;
  if (!c || !c->b || !c->ends || (c->rows && !(c->a && c->out)) || !known(c->gate)) return MOLAE_GPU_BAD_ARGUMENT;
  if (c->rows < 0 || c->inputs < 1 || c->columns < 1 || c->groups < 1) return MOLAE_GPU_BAD_ARGUMENT;
  if (c->element != MOLAE_GPU_FLOAT16 && c->element != MOLAE_GPU_BFLOAT16) return MOLAE_GPU_UNSUPPORTED;
  if (c->rows > kMostRows || c->groups > constants()->max_groups) return MOLAE_GPU_UNSUPPORTED;
  uintptr_t all = static_cast<uintptr_t>(c->inputs | c->columns) * 2;
  for (const void* p : {c->a, c->b, c->bias, c->row_weight, static_cast<const void*>(c->out), static_cast<const void*>(c->ends)})
    all |= reinterpret_cast<uintptr_t>(p);
  return all & 15 ? MOLAE_GPU_UNSUPPORTED : MOLAE_GPU_OK;
}

void enqueue(Steps& steps, const MolaeGpuLatentExperts& call) {
  if (call.tokens) LatentExperts(steps, call).run();
}

void enqueue(Steps& steps, const MolaeGpuGroupedGemm& call) {
  Slots slots{nullptr, const_cast<int32_t*>(call.ends)};
  Matrices m{call.b, call.groups, call.columns, call.inputs, call.transposed != 0, nullptr, call.bias, &call.gate};
  steps.gemm(call.a, nullptr, m, {call.rows, &slots, 1}, nullptr, call.row_weight, call.out);
}

template <class Call>
int measure(const Call* call, size_t* bytes) {
  if (!bytes) return MOLAE_GPU_BAD_ARGUMENT;
  if (int status = checked(call)) return status;
  Steps dry(call->element, true, nullptr);
  enqueue(dry, *call);
  *bytes = static_cast<size_t>(dry.scratch.total());
  return MOLAE_GPU_OK;
}

template <class Call>
int perform(const Call* call, void* scratch, size_t bytes, void* stream) {
  if (int status = checked(call)) return status;
  Steps dry(call->element, true, nullptr), steps(call->element, false, stream);
  enqueue(dry, *call);
  if (static_cast<size_t>(dry.scratch.total()) > bytes || (dry.scratch.total() && !scratch)) return MOLAE_GPU_SCRATCH_TOO_SMALL;
  if (reinterpret_cast<uintptr_t>(scratch) % kAligned) return MOLAE_GPU_BAD_ARGUMENT;
  steps.scratch.place(dry.scratch, scratch);
  if (!steps.status()) enqueue(steps, *call);
  return steps.status();
}

}  // namespace
}  // namespace molae_gpu

#define MOLAE_GPU_EXPORT extern "C" __attribute__((visibility("default")))

MOLAE_GPU_EXPORT int molae_gpu_latent_experts_scratch(const MolaeGpuLatentExperts* call, size_t* bytes) {
  return molae_gpu::measure(call, bytes);
}

MOLAE_GPU_EXPORT int molae_gpu_latent_experts(const MolaeGpuLatentExperts* call, void* scratch, size_t bytes, void* stream) {
  return molae_gpu::perform(call, scratch, bytes, stream);
}

MOLAE_GPU_EXPORT int molae_gpu_grouped_gemm_scratch(const MolaeGpuGroupedGemm* call, size_t* bytes) {
  return molae_gpu::measure(call, bytes);
}

MOLAE_GPU_EXPORT int molae_gpu_grouped_gemm(const MolaeGpuGroupedGemm* call, void* scratch, size_t bytes, void* stream) {
  return molae_gpu::perform(call, scratch, bytes, stream);
}

MOLAE_GPU_EXPORT const char* molae_gpu_message(int status) {
  switch (status) {
    case MOLAE_GPU_OK: return "done";
    case MOLAE_GPU_NO_DRIVER: return "no CUDA driver: libcuda.so.1 cannot be opened";
    case MOLAE_GPU_NO_KERNELS: return "this library holds no GPU kernel for the device, which is older than compute capability 8.0, or was built without any";
    case MOLAE_GPU_BAD_ARGUMENT: return "an input is missing, or sizes do not fit together";
    case MOLAE_GPU_UNSUPPORTED: return "the GPU kernels take float16 and bfloat16, widths and ranks that are multiples of 8, and up to 1023 experts";
    case MOLAE_GPU_SCRATCH_TOO_SMALL: return "less scratch memory than the call needs";
    default: return "the CUDA driver refused; the status is its CUresult";
  }
}
