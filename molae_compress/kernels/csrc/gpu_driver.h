// The CUDA driver, opened when first needed, and the kernels embedded in this library, loaded when first launched.
#pragma once

#include <cstddef>
#include <cstdint>

namespace molae_gpu {

struct Tile {
  const char* name;
  int rows, columns, resident, from_rows;
};

// One compiled kernel: where it lies in the embedded data, and how it is launched.
struct Image {
  const char* name;   // VARIANT or VARIANT.TYPE
  const char* entry;  // of the function inside
  int architecture;   // 80, 90, 100, 120; 0: PTX
  size_t offset, packed, size;
  int shared, warps, arguments;
};

// Arguments of one launch, in the order of the kernel's source.
class Arguments {
 public:
  void pointer(const void* value) { add(reinterpret_cast<uintptr_t>(value)); }
  void integer(int64_t value) { add(static_cast<uint32_t>(static_cast<int32_t>(value))); }
  void number(float value);
  int count() const { return count_; }
  void** packed();  // with the two that Triton adds

 private:
  void add(uint64_t value);
  static constexpr int kMost = 40;
  uint64_t values_[kMost] = {};
  void* pointers_[kMost] = {};
  int count_ = 0;
};

// The constants that the kernels were compiled with.
struct Constants {
  int few_tokens, sort_block, scan_chunk, columns_block, combine_block, few_columns, few_columns_transposed, max_groups, max_rank;
  const Tile* tiles;  // by rising number of rows, the one for gathered columns last
  int tile_count;
};

// Null if the library was built without kernels.
const Constants* constants();

// Whether a variant was compiled, for whatever device.
bool has_variant(const char* name);

// Multiprocessors of the device of the current context.
int multiprocessors(int* count);

// Launches a variant in the current context on `stream`.
int launch(const char* name, unsigned grid_x, unsigned grid_y, Arguments& arguments, void* stream);

// Enqueues zeros for `bytes` of device memory.
int clear(void* data, size_t bytes, void* stream);

}  // namespace molae_gpu
