// ONNX Runtime as the operators see it: tensors, attributes, memory and threads, with errors as exceptions. Exceptions never
// leave this library: `guarded` turns them into what ONNX Runtime takes for an error.
#pragma once

#include <cstring>
#include <exception>
#include <limits>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cpu_kernels.h"
#include "ort_abi.h"
#include "work.h"

namespace molae {

struct Failure : std::exception {
  explicit Failure(std::string text) : message(std::move(text)) {}
  const char* what() const noexcept override { return message.c_str(); }
  std::string message;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Failure(text.str());
}

std::string to_text(const std::vector<int64_t>& dims);

class Ort {
 public:
  explicit Ort(const OrtTable* table) : table_(table) {}

  // Calls a function that returns a status, and throws what it says.
  template <class... Args>
  void operator()(Fn index, Args... args) const {
    check(status(index, args...));
  }

  template <class... Args>
  OrtStatusPointer status(Fn index, Args... args) const {
    return reinterpret_cast<OrtStatusPointer (*)(Args...)>(table_->functions[static_cast<int>(index)])(args...);
  }

  template <class... Args>
  void release(Fn index, Args... args) const {
    reinterpret_cast<void (*)(Args...)>(table_->functions[static_cast<int>(index)])(args...);
  }

  // Whether a call succeeded, whose failure is an answer too.
  bool succeeds(OrtStatusPointer status) const;

 private:
  void check(OrtStatusPointer status) const;
  const OrtTable* table_;
};

// Runs `body`; what it throws becomes a status with the name of the operator in front.
template <class Body>
OrtStatusPointer guarded(const OrtTable* table, const char* name, Body&& body) {
  const char* reason;
  std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = std::string("molae::") + name + ": " + error.what();
    reason = message.c_str();
  } catch (...) {
    reason = "molae: unknown error";
  }
  return Ort(table).status(Fn::CreateStatus, static_cast<int>(kOrtInvalidArgument), reason);
}

// The attributes of a node.
class Attributes {
 public:
  Attributes(Ort ort, const void* info) : ort_(ort), info_(info) {}

  // An int between `low` and 2^31 - 1.
  int64_t integer(const char* name, int64_t low) const;
  int64_t integer(const char* name, int64_t low, int64_t absent) const;
  bool flag(const char* name) const { return integer_at_most(name, 1) != 0; }
  float real(const char* name, float absent) const;
  std::string text(const char* name, const char* absent) const;

 private:
  int64_t integer_at_most(const char* name, int64_t high) const;
  bool has_integer(const char* name, int64_t* value) const;
  bool has_real(const char* name, float* value) const;
  bool has_text(const char* name, std::string* value) const;
  Ort ort_;
  const void* info_;
};

// A tensor of the call: absent if `data` and `dims` are empty and `present` is false.
struct Tensor {
  const char* name = "";
  bool present = false;
  const void* data = nullptr;
  std::vector<int64_t> dims;

  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }

  // Throws unless the dimensions are these.
  void expect(const std::vector<int64_t>& wanted, const char* meaning) const;
  void expect_rank(size_t rank, const char* meaning) const;
};

// One call of an operator, and the threads of its session.
class Call : public Threads {
 public:
  Call(Ort ort, void* context, void* allocator) : ort_(ort), context_(context), allocator_(allocator) {}

  Tensor input(size_t index, const char* name) const;
  void* output(const std::vector<int64_t>& dims) const;

  const Ort& ort() const { return ort_; }
  void* context() const { return context_; }
  void* allocator() const { return allocator_; }

 private:
  void each(size_t count, Body body, void* data) const override {
    ort_(Fn::KernelContext_ParallelFor, static_cast<const void*>(context_), body, count, size_t{0}, data);
  }

  Ort ort_;
  void* context_;
  void* allocator_;
};

// Memory of one call, from the session's own allocator: its arena has it ready, where fresh pages would cost as much as the
// arithmetic on them.
class Scratch : public Memory {
 public:
  explicit Scratch(const Call& call) : call_(call) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() override;

  float* floats(int64_t rows, int64_t width) override;

 private:
  const Call& call_;
  std::vector<void*> blocks_;
};

}  // namespace molae
