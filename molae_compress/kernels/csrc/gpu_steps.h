// One function a launch, and the scratch memory that launches pass on to each other.
// Letters: T tokens, K experts per token, S = T*K slots, E experts, G groups, R rank, N columns of an output, K of an input.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "gpu_driver.h"
#include "gpu_launch.h"

namespace molae_gpu {

constexpr int64_t kAligned = 256, kMostRows = (int64_t{1} << 31) - 1;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Device memory in three parts: integers that live throughout, and two parts that steps write in turn. A dry run finds out
// how large each has to be.
class Scratch {
 public:
  enum Part { kIntegers, kEven, kOdd, kParts };

  void* take(Part part, int64_t bytes) {
    int64_t at = used_[part];
    used_[part] += ceil_div(std::max<int64_t>(bytes, 1), kAligned) * kAligned;
    most_[part] = std::max(most_[part], used_[part]);
    return base_ ? base_ + first_[part] + at : nullptr;
  }
  void clear(Part part) { used_[part] = 0; }
  int64_t total() const { return most_[kIntegers] + most_[kEven] + most_[kOdd]; }
  // Places the parts that `dry` measured one after the other.
  void place(const Scratch& dry, void* base) {
    base_ = static_cast<char*>(base);
    first_[kEven] = dry.most_[kIntegers];
    first_[kOdd] = dry.most_[kIntegers] + dry.most_[kEven];
  }

 private:
  char* base_ = nullptr;
  int64_t first_[kParts] = {}, used_[kParts] = {}, most_[kParts] = {};
};

struct Columns {
  const int32_t* pivots = nullptr;
  int32_t *rest = nullptr, *position = nullptr;
  int64_t rank = 0;
};

struct Slots {
  int32_t *order = nullptr, *ends = nullptr;
};

// Matrices of a product: [G,K,J] if transposed, else [G,J,K]; J = 2N with gate and up in one, else N.
struct Matrices {
  const void* weight;
  int64_t groups, N, K;
  bool transposed;
  const void* weight_up = nullptr;
  const void* bias = nullptr;
  const MolaeGpuGate* gate = nullptr;  // of the first projection only
  bool gated() const { return gate && gate->gated; }
};

struct Rows {
  int64_t count;
  const Slots* slots = nullptr;
  int64_t group_size = 0, gather = 0, scatter = 0;
};

// Which kernel has this activation and this arrangement of gate and up, as `gpu_build.variants` names them.
inline std::string form_of(const Matrices& m, bool columns) {
  std::string form = m.transposed ? "nn" : "nt";
  if (columns) return form + "_columns";
  if (!m.gate) return form;
  bool gated = m.gate->gated;
  if (gated) form += m.weight_up ? "_pair" : m.gate->interleaved && m.transposed ? "_split" : "_gate";
  int a = m.gate->activation;
  if (a == MOLAE_GPU_SILU || a == MOLAE_GPU_GELU_TANH) return form + "_1";
  return a == MOLAE_GPU_IDENTITY && !gated && m.gate->limit <= 0 ? form : form + "_2";
}

inline void add_gate(const MolaeGpuGate* gate, Arguments* args) {
  static constexpr MolaeGpuGate kNone = {MOLAE_GPU_IDENTITY, 0, 0, 1.0f, 0.0f, 0.0f};
  const MolaeGpuGate& g = gate ? *gate : kNone;
  bool silu = g.activation == MOLAE_GPU_SILU;
  args->integer(g.activation);
  args->number(silu ? g.alpha : 1.5957691216057308f);  // tanh(a) = 2 sigmoid(2a) - 1
  args->number(silu ? 0.0f : 0.07135481627260025f);
  args->number(g.limit);
  args->number(g.up_offset);
}

// The launches of one operator. Every function returns its output; after a failure nothing more is launched.
class Steps {
 public:
  Steps(int element, bool dry, void* stream) : type_(element == MOLAE_GPU_BFLOAT16 ? ".bf16" : ".fp16"), dry_(dry), stream_(stream) {
    if (!dry_) status_ = multiprocessors(&multiprocessors_);
  }

  Scratch scratch;
  int status() const { return status_; }
  void* take(Scratch::Part part, int64_t rows, int64_t width) { return scratch.take(part, rows * width * 2); }

  Slots sort(const int64_t* index, int64_t slots, int64_t experts) {
    Slots s{integers(slots), integers(experts)};
    int64_t blocks = ceil_div(slots, constants()->sort_block);
    int32_t* counts = integers((experts + 1) * blocks);
    Arguments count, scan, place;
    count.pointer(index), count.pointer(counts), count.integer(slots), count.integer(experts);
    start("count", blocks, 1, count);
    scan.pointer(counts), scan.pointer(s.ends), scan.integer(blocks), scan.integer(experts);
    start("scan", 1, 1, scan);
    place.pointer(index), place.pointer(counts), place.pointer(s.order), place.integer(slots), place.integer(experts);
    start("place", blocks, 1, place);
    return s;
  }

  Columns columns(const int32_t* pivots, int64_t groups, int64_t hidden, int64_t rank) {
    Columns c{pivots, integers(groups * (hidden - rank)), integers(groups * hidden), rank};
    Arguments args;
    args.pointer(pivots), args.pointer(c.rest), args.pointer(c.position), args.integer(hidden), args.integer(rank);
    start("columns", groups, ceil_div(hidden, constants()->columns_block), args);
    return c;
  }

  void* gemm(const void* a, const void* a_up, const Matrices& m, const Rows& rows, const Columns* columns, const void* row_weight,
             void* out) {
    if (!rows.count || !m.N) return out;
    int32_t* tiles = nullptr;
    std::string form = form_of(m, columns);
    const Tile& tile = tile_for(form, rows.count, m.groups, columns);
    if (rows.slots) {
      tiles = integers(m.groups);
      Arguments args;
      args.pointer(rows.slots->ends), args.pointer(tiles);
      args.integer(m.groups), args.integer(rows.group_size), args.integer(tile.rows);
      start("tiles", 1, 1, args);
    }
    Arguments args;
    args.pointer(a), args.pointer(a_up ? a_up : a), args.pointer(m.weight), args.pointer(m.weight_up ? m.weight_up : m.weight);
    args.pointer(out), args.pointer(rows.slots ? rows.slots->ends : nullptr), args.pointer(tiles);
    args.pointer(rows.slots ? rows.slots->order : nullptr);
    args.pointer(columns ? columns->rest : nullptr), args.pointer(columns ? columns->pivots : nullptr);
    args.pointer(m.bias), args.pointer(row_weight);
    args.integer(m.N), args.integer(m.K), args.integer(columns ? m.K + m.N : m.K), args.integer(m.N);
    args.integer(rows.count), args.integer(m.groups), args.integer(rows.slots ? rows.group_size : 0);
    args.integer(rows.gather), args.integer(rows.scatter), args.integer(row_weight ? 1 : 0), args.integer(m.bias ? 1 : 0);
    args.integer(m.gate ? m.gate->interleaved : 0);
    add_gate(m.gate, &args);
    int64_t across = ceil_div(m.N, m.gated() ? tile.columns / 2 : tile.columns);
    int64_t most = (ceil_div(rows.count, tile.rows) + std::min(m.groups, rows.count)) * across;
    int64_t programs = std::max<int64_t>(1, std::min<int64_t>(most, int64_t{multiprocessors_} * tile.resident));
    start("gemm." + form + "." + tile.name + type_, programs, 1, args);
    return out;
  }

  void* few(const void* a, const void* a_up, const Matrices& m, int64_t count, const int64_t* index, int64_t experts,
            int64_t group_size, int64_t gather, const Columns* columns, void* out) {
    if (!count || !m.N) return out;
    Arguments args;
    args.pointer(a), args.pointer(a_up ? a_up : a), args.pointer(m.weight), args.pointer(m.weight_up ? m.weight_up : m.weight);
    args.pointer(out), args.pointer(index), args.pointer(columns ? columns->rest : nullptr);
    args.pointer(columns ? columns->pivots : nullptr), args.pointer(m.bias);
    args.integer(m.N), args.integer(m.K), args.integer(columns ? m.K + m.N : m.K);
    args.integer(experts), args.integer(group_size), args.integer(gather), args.integer(index ? 1 : 0);
    args.integer(m.bias ? 1 : 0), args.integer(m.gate ? m.gate->interleaved : 0);
    add_gate(m.gate, &args);
    start("few." + form_of(m, columns) + type_, count, few_across(m), args);
    return out;
  }

  void few_combine(const void* a, const Matrices& m, const MolaeGpuLatentExperts& c, int64_t group_size, void* out) {
    Arguments args;
    args.pointer(a), args.pointer(m.weight), args.pointer(out), args.pointer(c.index), args.pointer(c.weight);
    args.pointer(c.decode_bias), args.integer(m.N), args.integer(m.K), args.integer(c.top_k), args.integer(c.experts);
    args.integer(group_size), args.integer(c.decode_bias ? 1 : 0);
    const char* form = !m.transposed ? "nt" : m.groups == 1 ? "nn_one" : "nn";
    start(std::string("few_combine.") + form + type_, c.tokens, few_across(m), args);
  }

  // Sums over the experts of a token; see `combine_kernel`. Without `routed` a token has one slot of weight 1.
  struct Terms {
    const void *value = nullptr, *kept = nullptr, *bias = nullptr, *base = nullptr;
    const Columns* columns = nullptr;
    int64_t group_size = 1;
    bool routed = true;
  };
  void* combine(const MolaeGpuLatentExperts& c, const Terms& t, int64_t width, void* out) {
    Arguments args;
    args.pointer(t.value), args.pointer(t.kept), args.pointer(t.columns ? t.columns->position : nullptr);
    args.pointer(t.routed ? c.index : nullptr), args.pointer(t.routed ? c.weight : nullptr);
    args.pointer(t.bias), args.pointer(t.base), args.pointer(out);
    args.integer(width), args.integer(t.columns ? t.columns->rank : 0), args.integer(t.routed ? c.top_k : 1);
    args.integer(t.routed ? c.experts : 1), args.integer(t.group_size), args.integer(t.routed), args.integer(t.routed);
    args.integer(t.value != nullptr), args.integer(t.bias != nullptr), args.integer(t.base != nullptr);
    std::string name = t.columns ? "combine.columns" : "combine.rows";
    start(name + type_, c.tokens, ceil_div(width, constants()->combine_block), args);
    return out;
  }

 private:
  int32_t* integers(int64_t count) { return static_cast<int32_t*>(scratch.take(Scratch::kIntegers, count * 4)); }

  int64_t few_across(const Matrices& m) const {
    return ceil_div(m.N, m.transposed ? constants()->few_columns_transposed : constants()->few_columns);
  }

  // As `gpu_tiles.tile_for`, or the one tile there is for a form that few models have.
  const Tile& tile_for(const std::string& form, int64_t rows, int64_t groups, bool gathered) const {
    const Constants& c = *constants();
    if (gathered) return c.tiles[c.tile_count - 1];
    int64_t hit = std::max<int64_t>(1, std::min(groups, rows));
    int chosen = c.tile_count - 2;
    while (chosen > 0 && rows < c.tiles[chosen].from_rows * hit) --chosen;
    for (int tried = chosen, i = 0; i < c.tile_count - 1; tried = (tried + 1) % (c.tile_count - 1), ++i)
      if (has_variant(("gemm." + form + "." + c.tiles[tried].name + type_).c_str())) return c.tiles[tried];
    return c.tiles[chosen];
  }

  void start(const std::string& name, int64_t grid_x, int64_t grid_y, Arguments& arguments) {
    if (dry_ || status_ || grid_x <= 0 || grid_y <= 0) return;
    status_ = launch(name.c_str(), static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y), arguments, stream_);
  }

  std::string type_;
  bool dry_;
  void* stream_;
  int status_ = MOLAE_GPU_OK, multiprocessors_ = 1;
};

}  // namespace molae_gpu
