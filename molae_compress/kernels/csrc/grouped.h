// Grouped products: rows are sorted by group and each group has a weight of its own. The one routine behind both operators.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime.h"

namespace molae {

// Neighbouring rows that share a group.
struct Segment {
  int64_t group, begin, end;
};

// out[r] = row_weight[r] * activation(a[r] weight[group of r] + bias[group of r]), for the rows of `segments`.
//
// A gated activation reads gate and up columns: halves of the weight, alternating columns of it (`interleaved`), or those of a
// second weight (`up_weight`) with inputs of its own (`up_a`). `bias` is in the order of the columns, or, with two
// weights, of gate columns followed by up columns or alternating with them.
struct GroupedProduct {
  std::vector<Segment> segments;
  const float* a = nullptr;  // rows of k
  const void* weight = nullptr;
  const float* up_a = nullptr;
  const void* up_weight = nullptr;
  Element type = Element::kFloat;
  Layout layout = Layout::kInputsFirst;
  int64_t k = 0, n = 0;  // of one weight
  const void* bias = nullptr;
  Activation activation;
  bool interleaved = false;
  const float* row_weight = nullptr;
  float* out = nullptr;  // rows of `width()`
  bool add = false;      // to what `out` holds

  int64_t width() const { return activation.gated && up_weight == nullptr ? n / 2 : n; }
};

void run(const Threads& threads, Memory& memory, const GroupedProduct& product);

// The activation that the attributes of a node describe, and whether its gate and up columns alternate.
Activation read_activation(const Attributes& attributes, bool* interleaved);

}  // namespace molae
