// Compiles cpu_kernels.inc for each instruction set and chooses among them.
#include "cpu_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace molae {
namespace {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

template <class To, class From>
INLINE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits are copied");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

INLINE float to_float(Bfloat x) { return same_bits<float>(static_cast<uint32_t>(x.bits) << 16); }

INLINE Bfloat to_bfloat(float x) {
  const uint32_t bits = same_bits<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return Bfloat{static_cast<uint16_t>(x != x ? quiet : rounded)};
}

INLINE float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = static_cast<uint32_t>(x.bits & 0x7FFFu) << 13;
  if (rest >= 0x0F800000u) return same_bits<float>(sign | 0x7F800000u | (rest & 0x007FFFFFu));  // infinite or NaN
  // The exponent moves by a factor of 2^112, exactly, numbers below the smallest normal half included.
  return same_bits<float>(same_bits<uint32_t>(same_bits<float>(rest) * 0x1p112f) | sign);
}

INLINE Half to_half(float x) {
  const uint32_t bits = same_bits<uint32_t>(x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (size > 0x7F800000u) {
    half = 0x7E00u;  // NaN
  } else if (size >= 0x477FF000u) {
    half = 0x7C00u;  // rounds to infinity
  } else if (size < 0x38800000u) {
    // Below the smallest normal half: adding a half rounds at its last bit.
    half = same_bits<uint32_t>(same_bits<float>(size) + 0.5f) - 0x3F000000u;
  } else {
    half = (size - 0x38000000u + 0x0FFFu + ((size >> 13) & 1u)) >> 13;
  }
  return Half{static_cast<uint16_t>(sign | half)};
}

#define LANES 4
#define ROWS 4
#define F16C 0
#define NAME "plain"
namespace plain {
#include "cpu_kernels.inc"
}
#undef LANES
#undef ROWS
#undef F16C
#undef NAME

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define LANES 8
#define ROWS 6
#define F16C 8
#define NAME "avx2"
namespace avx2 {
#include "cpu_kernels.inc"
}
#undef LANES
#undef ROWS
#undef F16C
#undef NAME
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define LANES 16
#define ROWS 12
#define F16C 16
#define NAME "avx512"
namespace avx512 {
#include "cpu_kernels.inc"
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
namespace avx512_bf16 {
#include "cpu_bf16.inc"
}
#pragma GCC pop_options

#endif

}  // namespace

size_t all_cpu_kernels(const Kernels* tables[kMaxTables]) {
  size_t count = 0;
  tables[count++] = &plain::kTable;
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return count;
  tables[count++] = &avx2::kTable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl"))
    return count;
  tables[count++] = &avx512::kTable;
  if (__builtin_cpu_supports("avx512bf16")) tables[count++] = &avx512_bf16::kTable;
#endif
  return count;
}

const Kernels& cpu_kernels() {
  static const Kernels& widest = [] () -> const Kernels& {
    const Kernels* tables[kMaxTables];
    return *tables[all_cpu_kernels(tables) - 1];
  }();
  return widest;
}

}  // namespace molae
