// What one operator is to the library: its inputs, how a node of it is read, what it computes and what shape comes out.
#pragma once

#include <memory>

#include "runtime.h"

namespace molae {

// One node of a graph. Calls may come from several threads at once.
class Node {
 public:
  virtual ~Node() = default;
  virtual void compute(const Call& call) const = 0;
};

// Inputs of the element type of the node are marked kNoElement.
struct Input {
  const char* name;
  OrtElement element;
  OrtPresence presence;
};

// A shape as far as it is known when a graph is loaded: -1, or a name, where a dimension is not fixed.
struct Shape {
  std::vector<int64_t> dims;
  std::vector<std::string> names;
};

struct Operator {
  const char* name;
  const Input* inputs;
  size_t input_count;
  std::unique_ptr<Node> (*create)(Element type, const Attributes& attributes);
  // The same for the CUDAExecutionProvider, where tensors are in the memory of a GPU.
  std::unique_ptr<Node> (*create_for_gpu)(Element type, const Attributes& attributes);
  // The output, of the first two inputs and flags among the attributes; empty if nothing can be said.
  Shape (*infer)(const Shape& first, const Shape& second, bool (*flag)(const void* context, const char* name), const void* context);
};

extern const Operator kGroupedGemm;
extern const Operator kLatentExperts;

std::unique_ptr<Node> make_gpu_grouped_gemm(Element type, const Attributes& attributes);
std::unique_ptr<Node> make_gpu_latent_experts(Element type, const Attributes& attributes);

}  // namespace molae
