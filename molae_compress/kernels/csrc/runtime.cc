#include "runtime.h"

namespace molae {

std::string to_text(const std::vector<int64_t>& dims) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < dims.size(); ++i) text << (i ? "," : "") << dims[i];
  text << ']';
  return text.str();
}

bool Ort::succeeds(OrtStatusPointer status) const {
  if (status == nullptr) return true;
  release(Fn::ReleaseStatus, status);
  return false;
}

void Ort::check(OrtStatusPointer status) const {
  if (status == nullptr) return;
  using Message = const char* (*)(const void*);
  const std::string message = reinterpret_cast<Message>(table_->functions[static_cast<int>(Fn::GetErrorMessage)])(status);
  release(Fn::ReleaseStatus, status);
  fail("ONNX Runtime refuses a call: ", message);
}

bool Attributes::has_integer(const char* name, int64_t* value) const {
  return ort_.succeeds(ort_.status(Fn::KernelInfoGetAttribute_int64, info_, name, value));
}

bool Attributes::has_real(const char* name, float* value) const {
  return ort_.succeeds(ort_.status(Fn::KernelInfoGetAttribute_float, info_, name, value));
}

bool Attributes::has_text(const char* name, std::string* value) const {
  size_t size = 0;
  if (!ort_.succeeds(ort_.status(Fn::KernelInfoGetAttribute_string, info_, name, static_cast<char*>(nullptr), &size))) return false;
  std::vector<char> characters(size + 1, '\0');
  if (!ort_.succeeds(ort_.status(Fn::KernelInfoGetAttribute_string, info_, name, characters.data(), &size))) return false;
  *value = characters.data();
  return true;
}

int64_t Attributes::integer(const char* name, int64_t low) const {
  int64_t value = 0;
  if (!has_integer(name, &value)) fail("the attribute '", name, "' is missing, or no int");
  if (value < low || value > std::numeric_limits<int32_t>::max())
    fail("the attribute '", name, "' is ", value, ", expected ", low, " or more");
  return value;
}

int64_t Attributes::integer(const char* name, int64_t low, int64_t absent) const {
  float real;
  std::string text;
  int64_t value;
  // One that is there but of another type must not pass for absent.
  return has_integer(name, &value) || has_real(name, &real) || has_text(name, &text) ? integer(name, low) : absent;
}

int64_t Attributes::integer_at_most(const char* name, int64_t high) const {
  const int64_t value = integer(name, 0, 0);
  if (value > high) fail("the attribute '", name, "' is ", value, ", expected 0 to ", high);
  return value;
}

float Attributes::real(const char* name, float absent) const {
  float value = 0.0f;
  if (has_real(name, &value)) return value;
  int64_t integer;
  std::string text;
  if (has_integer(name, &integer) || has_text(name, &text)) fail("the attribute '", name, "' is no float");
  return absent;
}

std::string Attributes::text(const char* name, const char* absent) const {
  std::string value;
  if (has_text(name, &value)) return value;
  int64_t integer;
  float real;
  if (has_integer(name, &integer) || has_real(name, &real)) fail("the attribute '", name, "' is no string");
  return absent;
}

void Tensor::expect(const std::vector<int64_t>& wanted, const char* meaning) const {
  if (!present) fail("the input '", name, "' is missing, expected ", meaning, " = ", to_text(wanted));
  if (dims != wanted) fail("the input '", name, "' is ", to_text(dims), ", expected ", meaning, " = ", to_text(wanted));
}

void Tensor::expect_rank(size_t rank, const char* meaning) const {
  if (!present) fail("the input '", name, "' is missing, expected ", meaning);
  if (dims.size() != rank) fail("the input '", name, "' is ", to_text(dims), ", expected ", meaning);
}

Tensor Call::input(size_t index, const char* name) const {
  Tensor tensor;
  tensor.name = name;
  size_t count = 0;
  ort_(Fn::KernelContext_GetInputCount, static_cast<const void*>(context_), &count);
  if (index >= count) return tensor;
  const void* value = nullptr;
  ort_(Fn::KernelContext_GetInput, static_cast<const void*>(context_), index, &value);
  if (value == nullptr) return tensor;
  void* info = nullptr;
  ort_(Fn::GetTensorTypeAndShape, value, &info);
  size_t rank = 0;
  OrtStatusPointer status = ort_.status(Fn::GetDimensionsCount, static_cast<const void*>(info), &rank);
  if (status == nullptr) {
    tensor.dims.resize(rank);
    status = ort_.status(Fn::GetDimensions, static_cast<const void*>(info), tensor.dims.data(), rank);
  }
  ort_.release(Fn::ReleaseTensorTypeAndShapeInfo, info);
  if (!ort_.succeeds(status)) fail("the shape of the input '", name, "' cannot be read");
  void* data = nullptr;
  ort_(Fn::GetTensorMutableData, const_cast<void*>(value), &data);
  tensor.present = true;
  tensor.data = data;
  return tensor;
}

void* Call::output(const std::vector<int64_t>& dims) const {
  void *value = nullptr, *data = nullptr;
  ort_(Fn::KernelContext_GetOutput, context_, size_t{0}, dims.data(), dims.size(), &value);
  ort_(Fn::GetTensorMutableData, value, &data);
  return data;
}

Scratch::~Scratch() {
  for (void* block : blocks_) call_.ort().succeeds(call_.ort().status(Fn::AllocatorFree, call_.allocator(), block));
}

float* Scratch::floats(int64_t rows, int64_t width) {
  // At least one: an empty block may be null, which kernels take for absent.
  const size_t count = std::max<size_t>(1, static_cast<size_t>(rows) * static_cast<size_t>(width));
  blocks_.reserve(blocks_.size() + 1);
  void* block = nullptr;
  call_.ort()(Fn::AllocatorAlloc, call_.allocator(), count * sizeof(float), &block);
  blocks_.push_back(block);
  return static_cast<float*>(block);
}

const float* as_floats(const Threads& threads, Memory& memory, Element type, const void* data, int64_t rows, int64_t width) {
  if (type == Element::kFloat) return static_cast<const float*>(data);
  float* copy = memory.floats(rows, width);
  threads.parallel_rows(rows, width, [&](int64_t row) {
    const char* source = static_cast<const char*>(data) + row * width * static_cast<int64_t>(size_of(type));
    cpu_kernels().widen(type, source, copy + row * width, width);
  });
  return copy;
}

}  // namespace molae
