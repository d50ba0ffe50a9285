// Every instruction set of this processor against plain loops in double, in heap blocks of exactly the promised size, so that
// AddressSanitizer sees whoever reads or writes beside them.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cpu_kernels.h"

using namespace molae;

namespace {

std::mt19937 generator(0);

int64_t any(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
float normal() { return std::normal_distribution<float>()(generator); }

int failures = 0;

void expect(bool right, const char* table, const char* what) {
  if (right) return;
  if (failures++ < 10) std::printf("%s: %s\n", table, what);
}

void check_product(const Kernels& kernels) {
  const int64_t sizes[] = {1, 2, 3, 4, 5, 6, 7, 12, 13, 25, 129};
  const int64_t m = sizes[any(0, 10)], n = any(1, 100), k = any(0, 3) == 0 ? any(0, 600) : any(0, 70);
  const Element type = static_cast<Element>(any(0, 2));
  const Layout layout = any(0, 1) ? Layout::kInputsFirst : Layout::kOutputsFirst;
  const int64_t lda = k + any(0, 5), ldb = (layout == Layout::kInputsFirst ? n : k) + any(0, 5), lines = layout == Layout::kInputsFirst ? k : n;
  const int64_t ldc = (n + kPadding - 1) / kPadding * kPadding;
  // The last row ends where the numbers do: nothing promises that there is more.
  const int64_t a_size = k == 0 ? 0 : (m - 1) * lda + k;
  const int64_t b_size = lines == 0 || k == 0 ? 0 : (lines - 1) * ldb + (layout == Layout::kInputsFirst ? n : k);
  std::unique_ptr<float[]> a(new float[a_size]), b(new float[b_size]), c(new float[m * ldc]);
  std::unique_ptr<char[]> stored(new char[b_size * size_of(type)]);
  for (int64_t i = 0; i < a_size; ++i) a[i] = normal();
  for (int64_t i = 0; i < b_size; ++i) b[i] = normal();
  if (type == Element::kBfloat) {  // inputs may be rounded for such weights
    std::vector<uint16_t> rounded(a_size);
    kernels.narrow(type, a.get(), rounded.data(), a_size);
    kernels.widen(type, rounded.data(), a.get(), a_size);
  }
  kernels.narrow(type, b.get(), stored.get(), b_size);
  kernels.widen(type, stored.get(), b.get(), b_size);
  kernels.multiply({a.get(), lda, stored.get(), ldb, type, layout, m, n, k, c.get(), ldc});
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double total = 0.0;
      for (int64_t p = 0; p < k; ++p) total += double(a[i * lda + p]) * b[layout == Layout::kInputsFirst ? p * ldb + j : j * ldb + p];
      expect(std::fabs(total - c[i * ldc + j]) < 1e-4 * std::sqrt(k + 1.0), kernels.name, "a product is wrong");
    }
  }
}

// All 65536 halves and brain floats survive the way to float and back, and floats between them go to the nearer one.
void check_conversions(const Kernels& kernels) {
  for (Element type : {Element::kHalf, Element::kBfloat}) {
    std::vector<uint16_t> bits(65536), back(65536);
    std::vector<float> wide(65536);
    for (int i = 0; i < 65536; ++i) bits[i] = static_cast<uint16_t>(i);
    kernels.widen(type, bits.data(), wide.data(), 65536);
    kernels.narrow(type, wide.data(), back.data(), 65536);
    for (int i = 0; i < 65536; ++i) expect(bits[i] == back[i] || std::isnan(wide[i]), kernels.name, "a conversion is wrong");
    for (int i = 0; i < 65535; ++i) {
      if (!std::isfinite(wide[i]) || !std::isfinite(wide[i + 1])) continue;
      const float middle = static_cast<float>((double(wide[i]) + wide[i + 1]) / 2), nearer = std::nextafterf(middle, wide[i]);
      uint16_t even, down;
      kernels.narrow(type, &middle, &even, 1);
      kernels.narrow(type, &nearer, &down, 1);
      expect(even == (i % 2 ? i + 1 : i) && down == i, kernels.name, "a rounding is wrong");
    }
    const float large[] = {65519.0f, 65520.0f, 3.4e38f};
    uint16_t ends[3];
    kernels.narrow(type, large, ends, 3);
    if (type == Element::kHalf) expect(ends[0] == 0x7BFF && ends[1] == 0x7C00 && ends[2] == 0x7C00, kernels.name, "an overflow is wrong");
  }
}

void check_activations(const Kernels& kernels) {
  for (float x = -95.0f; x < 95.0f; x += 0.037f) {
    const double sigmoid = 1.0 / (1.0 + std::exp(-double(x))), silu = x * sigmoid;
    const double gelu = 0.5 * x * std::erfc(-double(x) / std::sqrt(2.0));
    const double cube = x + 0.044715 * double(x) * x * x, tanh = 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * cube));
    const double wanted[] = {x, silu, gelu, tanh, x > 0 ? x : 0.0, x > 0 ? double(x) * x : 0.0};
    for (int i = 0; i < 6; ++i) {
      Activation how;
      how.function = static_cast<Function>(i);
      float y;
      kernels.activate(how, &x, nullptr, 1, &y, 1);
      expect(std::fabs(y - wanted[i]) <= 4e-7 * (1.0 + std::fabs(wanted[i])), kernels.name, "an activation is wrong");
    }
  }
}

}  // namespace

int main(int, char** argv) {
  const int rounds = std::atoi(argv[1]);
  const Kernels* tables[kMaxTables];
  const size_t count = all_cpu_kernels(tables);
  for (size_t i = 0; i < count; ++i) {
    for (int round = 0; round < rounds; ++round) check_product(*tables[i]);
    check_conversions(*tables[i]);
    check_activations(*tables[i]);
    std::printf("%s checked\n", tables[i]->name);
  }
  return failures == 0 ? 0 : 1;
}
