// What arithmetic needs of whoever asks for it: threads and memory. ONNX Runtime has both, and so has torch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cpu_kernels.h"

namespace molae {

class Threads {
 public:
  virtual ~Threads() = default;

  // Runs `body(i)` for all i below `count`. It must not throw.
  template <class Task>
  void parallel(int64_t count, Task&& body) const {
    if (count == 1) return body(int64_t{0});
    if (count <= 0) return;
    using Plain = std::remove_reference_t<Task>;
    auto run = [](void* data, size_t i) { (*static_cast<Plain*>(data))(static_cast<int64_t>(i)); };
    each(static_cast<size_t>(count), run, const_cast<void*>(static_cast<const void*>(&body)));
  }

  // The same in blocks of neighbours, as many to a block as make `cost` (of one) worth handing to a thread.
  template <class Task>
  void parallel_rows(int64_t count, int64_t cost, Task&& body) const {
    const int64_t block = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, cost));
    parallel((count + block - 1) / block, [&](int64_t i) {
      const int64_t end = std::min(count, (i + 1) * block);
      for (int64_t row = i * block; row < end; ++row) body(row);
    });
  }

 protected:
  using Body = void (*)(void* data, size_t i);

 private:
  static constexpr int64_t kWorthAThread = 1 << 14;  // simple operations: a few microseconds
  virtual void each(size_t count, Body body, void* data) const = 0;
};

// Memory of one call.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual float* floats(int64_t rows, int64_t width) = 0;
};

// The numbers of a tensor as floats: its own if they are floats, otherwise a copy.
const float* as_floats(const Threads& threads, Memory& memory, Element type, const void* data, int64_t rows, int64_t width);

}  // namespace molae
