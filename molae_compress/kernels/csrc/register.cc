// What ONNX Runtime calls: RegisterCustomOps, and the operators as it wants them described.
#include "operators.h"

namespace molae {
namespace {

struct Variant : OrtOperator {
  const Operator* op;
  OrtElement element;
  Element type;
  bool on_gpu;
};

const Variant& variant_of(const OrtOperator* op) { return *static_cast<const Variant*>(op); }

// A node with the memory of its session.
struct Kernel {
  Kernel(const OrtTable* table, const void* info, const Variant& variant) : table(table), name(variant.op->name) {
    Ort ort(table);
    node = (variant.on_gpu ? variant.op->create_for_gpu : variant.op->create)(variant.type, Attributes(ort, info));
    ort(Fn::KernelInfoGetAllocator, info, static_cast<int>(kMemoryDefault), &allocator);
  }
  ~Kernel() {
    if (allocator != nullptr) Ort(table).release(Fn::ReleaseAllocator, allocator);
  }
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  const OrtTable* table;
  const char* name;
  std::unique_ptr<Node> node;
  void* allocator = nullptr;
};

OrtStatusPointer create(const OrtOperator* op, const OrtTable* table, const void* info, void** kernel) {
  return guarded(table, variant_of(op).op->name, [&] { *kernel = std::make_unique<Kernel>(table, info, variant_of(op)).release(); });
}

OrtStatusPointer compute(void* opaque, void* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(opaque);
  return guarded(kernel.table, kernel.name, [&] { kernel.node->compute(Call(Ort(kernel.table), context, kernel.allocator)); });
}

struct Inference {
  Ort ort;
  const void* context;
};

Shape shape_of(const Inference& at, size_t index) {
  void* info = nullptr;  // belongs to the context
  Shape shape;
  size_t rank = 0;
  at.ort(Fn::ShapeInferContext_GetInputTypeShape, at.context, index, &info);
  at.ort(Fn::GetDimensionsCount, static_cast<const void*>(info), &rank);
  shape.dims.resize(rank);
  std::vector<const char*> names(rank, "");
  at.ort(Fn::GetDimensions, static_cast<const void*>(info), shape.dims.data(), rank);
  at.ort(Fn::GetSymbolicDimensions, static_cast<const void*>(info), names.data(), rank);
  for (const char* name : names) shape.names.emplace_back(name == nullptr ? "" : name);
  return shape;
}

bool flag_of(const void* opaque, const char* name) {
  const Inference& at = *static_cast<const Inference*>(opaque);
  const void* attribute = nullptr;
  if (!at.ort.succeeds(at.ort.status(Fn::ShapeInferContext_GetAttribute, at.context, name, &attribute))) return false;
  int64_t value = 0;
  size_t size = 0;
  return at.ort.succeeds(at.ort.status(Fn::ReadOpAttr, attribute, static_cast<int>(kAttributeInt), static_cast<void*>(&value),
                                       sizeof(value), &size)) && value != 0;
}

// The table that ONNX Runtime gave at registration: shape inference is called without one.
const OrtTable* the_table = nullptr;

// Called for the first variant only, whatever the types: they come from the first input.
OrtStatusPointer infer(const OrtOperator* op, void* context) {
  const Operator& about = *variant_of(op).op;
  return guarded(the_table, about.name, [&] {
    const Inference at{Ort(the_table), context};
    void* first = nullptr;
    int element = kNoElement;
    at.ort(Fn::ShapeInferContext_GetInputTypeShape, static_cast<const void*>(context), size_t{0}, &first);
    at.ort(Fn::GetTensorElementType, static_cast<const void*>(first), &element);
    const Shape shape = about.infer(shape_of(at, 0), shape_of(at, 1), flag_of, &at);
    if (shape.dims.empty()) return;
    void* info = nullptr;
    at.ort(Fn::CreateTensorTypeAndShapeInfo, &info);
    std::vector<const char*> names;
    for (const std::string& name : shape.names) names.push_back(name.c_str());
    bool done = at.ort.succeeds(at.ort.status(Fn::SetTensorElementType, info, element)) &&
                at.ort.succeeds(at.ort.status(Fn::SetDimensions, info, shape.dims.data(), shape.dims.size())) &&
                at.ort.succeeds(at.ort.status(Fn::SetSymbolicDimensions, info, names.data(), names.size())) &&
                at.ort.succeeds(at.ort.status(Fn::ShapeInferContext_SetOutputTypeShape, static_cast<const void*>(context), size_t{0},
                                              static_cast<const void*>(info)));
    at.ort.release(Fn::ReleaseTensorTypeAndShapeInfo, info);
    if (!done) fail("the inferred shape was refused");
  });
}

OrtElement element_of(const OrtOperator* op, OrtElement element) {
  return element == kNoElement ? variant_of(op).element : element;
}

Variant variant(const Operator& op, OrtElement element, Element type, bool on_gpu) {
  Variant out{};
  out.op = &op;
  out.element = element;
  out.type = type;
  out.on_gpu = on_gpu;
  out.version = kApiVersion;
  out.GetName = [](const OrtOperator* self) { return variant_of(self).op->name; };
  out.GetExecutionProviderType = [](const OrtOperator* self) {
    return variant_of(self).on_gpu ? "CUDAExecutionProvider" : "CPUExecutionProvider";
  };
  out.GetInputType = [](const OrtOperator* self, size_t i) -> int { return element_of(self, variant_of(self).op->inputs[i].element); };
  out.GetInputTypeCount = [](const OrtOperator* self) { return variant_of(self).op->input_count; };
  out.GetOutputType = [](const OrtOperator* self, size_t) -> int { return variant_of(self).element; };
  out.GetOutputTypeCount = [](const OrtOperator*) -> size_t { return 1; };
  out.GetInputCharacteristic = [](const OrtOperator* self, size_t i) -> int { return variant_of(self).op->inputs[i].presence; };
  out.GetOutputCharacteristic = [](const OrtOperator*, size_t) -> int { return kRequired; };
  out.GetInputMemoryType = [](const OrtOperator*, size_t) -> int { return kMemoryDefault; };
  out.GetVariadicInputMinArity = out.GetVariadicOutputMinArity = [](const OrtOperator*) { return 1; };
  out.GetVariadicInputHomogeneity = out.GetVariadicOutputHomogeneity = [](const OrtOperator*) { return 1; };
  out.CreateKernelV2 = create;
  out.KernelComputeV2 = compute;
  out.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  out.InferOutputShapeFn = infer;
  out.GetStartVersion = [](const OrtOperator*) { return 1; };
  out.GetEndVersion = [](const OrtOperator*) { return std::numeric_limits<int>::max(); };
  return out;
}

// Made once for the process: sessions keep pointers to what lies in it.
void* make_domain(const OrtTable* table) {
  static std::vector<Variant> variants;
  for (const Operator* op : {&kGroupedGemm, &kLatentExperts})
    for (const bool on_gpu : {false, true})
      for (const auto& [element, type] : {std::pair(kOrtFloat, Element::kFloat), std::pair(kOrtFloat16, Element::kHalf),
                                          std::pair(kOrtBfloat16, Element::kBfloat)})
        if (!on_gpu || type != Element::kFloat) variants.push_back(variant(*op, element, type, on_gpu));
  void* domain = nullptr;
  Ort ort(table);
  ort(Fn::CreateCustomOpDomain, "molae", &domain);
  for (const Variant& each : variants) ort(Fn::CustomOpDomain_Add, domain, static_cast<const OrtOperator*>(&each));
  the_table = table;
  return domain;
}

}  // namespace
}  // namespace molae

#ifndef MOLAE_MARK
#define MOLAE_MARK "molae-sources:unknown"
#endif
// Says which sources this library was compiled from.
extern "C" {
extern __attribute__((visibility("default"))) const char molae_mark[];
const char molae_mark[] = MOLAE_MARK;
}

extern "C" __attribute__((visibility("default"))) molae::OrtStatusPointer RegisterCustomOps(void* options,
                                                                                         const molae::OrtBase* base) {
  using namespace molae;
  const OrtTable* table = base->GetApi(kApiVersion);
  if (table == nullptr) {
    const std::string text = std::string("molae: ONNX Runtime is ") + base->GetVersionString() + ", 1.22 or later is needed";
    return Ort(base->GetApi(1)).status(Fn::CreateStatus, static_cast<int>(kOrtFail), text.c_str());
  }
  return guarded(table, "RegisterCustomOps", [&] {
    static void* const domain = make_domain(table);
    const Ort ort(table);
    ort(Fn::AddCustomOpDomain, options, domain);
  });
}
