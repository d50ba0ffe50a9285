// The arithmetic of the CPU operators, once for each instruction set: a table of functions chosen when the library is first
// used. All activations are float; weights are read in the type they are stored in and become float in registers, but for
// bfloat16 where the processor multiplies that itself.
#pragma once

#include <cstddef>
#include <cstdint>

namespace molae {

enum class Element : int { kFloat, kHalf, kBfloat };

inline size_t size_of(Element type) { return type == Element::kFloat ? 4 : 2; }

// How the weight of a product lies in memory.
enum class Layout {
  kInputsFirst,   // [k,n]: the row of an input holds its part in every output
  kOutputsFirst,  // [n,k]: the row of an output holds the factors of all inputs
};

// One product c[m,n] = a[m,k] b. Rows of c are `ldc` floats apart, ldc >= kPadding * ceil(n / kPadding): what lies between n
// and ldc is overwritten.
struct Product {
  const float* a;
  int64_t lda;
  const void* b;
  int64_t ldb;
  Element type;
  Layout layout;
  int64_t m, n, k;
  float* c;
  int64_t ldc;
};

constexpr int64_t kPadding = 32;  // widest group of columns that any instruction set computes at once

enum class Function : int { kIdentity, kSilu, kGelu, kGeluTanh, kRelu, kRelu2 };

// What lies between the two projections: function(alpha, min(g, limit)) * (clamp(u, -limit, limit) + up_offset).
struct Activation {
  Function function = Function::kIdentity;
  bool gated = false;
  float alpha = 1.0f;
  float limit = 0.0f;  // 0: none
  float up_offset = 0.0f;
};

struct Kernels {
  const char* name;
  void (*multiply)(const Product& product);
  // y[i] = activation of g[i * step], and of u[i * step] where it is gated. y may be g if step is 1.
  void (*activate)(const Activation& activation, const float* g, const float* u, int64_t step, float* y, int64_t count);
  void (*widen)(Element type, const void* source, float* target, int64_t count);
  // Rounds to nearest, ties to even.
  void (*narrow)(Element type, const float* source, void* target, int64_t count);
  // target += factor * source
  void (*accumulate)(float factor, const float* source, float* target, int64_t count);
};

// The table of the widest instruction set of this processor.
const Kernels& cpu_kernels();

constexpr size_t kMaxTables = 4;

// Those that this processor can run, the narrowest first; for tests.
size_t all_cpu_kernels(const Kernels* tables[kMaxTables]);

}  // namespace molae
