// All that this library knows of ONNX Runtime: places in its table of functions, and the layout of the structure that describes
// a custom operator. Both only ever grow at their ends, so numbers do as well as headers, which no package of ONNX Runtime
// brings along. docs/onnx-operators.md says how they are checked against the real ones.
#pragma once

#include <cstddef>
#include <cstdint>

namespace molae {

// Every version from this one on has all of the functions below.
constexpr uint32_t kApiVersion = 22;

// --8<-- [start:functions]
#define MOLAE_ORT_FUNCTIONS(F)             \
  F(CreateStatus, 0)                       \
  F(GetErrorMessage, 2)                    \
  F(ReleaseStatus, 93)                     \
  F(CreateCustomOpDomain, 26)              \
  F(CustomOpDomain_Add, 27)                \
  F(AddCustomOpDomain, 28)                 \
  F(GetTensorMutableData, 51)              \
  F(CreateTensorTypeAndShapeInfo, 57)      \
  F(SetTensorElementType, 58)              \
  F(SetDimensions, 59)                     \
  F(GetTensorElementType, 60)              \
  F(GetDimensionsCount, 61)                \
  F(GetDimensions, 62)                     \
  F(GetSymbolicDimensions, 63)             \
  F(GetTensorTypeAndShape, 65)             \
  F(AllocatorAlloc, 75)                    \
  F(AllocatorFree, 76)                     \
  F(AllocatorGetInfo, 77)                  \
  F(KernelInfoGetAttribute_float, 85)      \
  F(KernelInfoGetAttribute_int64, 86)      \
  F(KernelInfoGetAttribute_string, 87)     \
  F(KernelContext_GetInputCount, 88)       \
  F(KernelContext_GetInput, 90)            \
  F(KernelContext_GetOutput, 91)           \
  F(ReleaseTensorTypeAndShapeInfo, 99)     \
  F(ReleaseAllocator, 132)                 \
  F(KernelContext_GetGPUComputeStream, 193)  \
  F(ShapeInferContext_GetInputCount, 267)  \
  F(ShapeInferContext_GetInputTypeShape, 268)  \
  F(ShapeInferContext_GetAttribute, 269)   \
  F(ShapeInferContext_SetOutputTypeShape, 270) \
  F(SetSymbolicDimensions, 271)            \
  F(ReadOpAttr, 272)                       \
  F(KernelContext_ParallelFor, 274)        \
  F(KernelContext_GetScratchBuffer, 277)   \
  F(KernelInfoGetAllocator, 278)
// --8<-- [end:functions]

enum class Fn : int {
#define MOLAE_ENTRY(name, index) name = index,
  MOLAE_ORT_FUNCTIONS(MOLAE_ENTRY)
#undef MOLAE_ENTRY
};

// Values of enumerations that cross the border.
enum OrtElement : int { kNoElement = 0, kOrtFloat = 1, kOrtInt32 = 6, kOrtInt64 = 7, kOrtFloat16 = 10, kOrtBfloat16 = 16 };
enum OrtCode : int { kOrtFail = 1, kOrtInvalidArgument = 2 };
enum OrtPresence : int { kRequired = 0, kOptional = 1 };
constexpr int kAttributeInt = 1;
constexpr int kMemoryDefault = 0;

struct OrtTable {
  void* functions[279];  // as far as this library looks
};

struct OrtBase {
  const OrtTable* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// What a function returns: null, or an error that has to be released.
using OrtStatusPointer = void*;

// OrtCustomOp, with its names.
struct OrtOperator {
  uint32_t version;
  void* (*CreateKernel)(const OrtOperator*, const OrtTable*, const void* info);
  const char* (*GetName)(const OrtOperator*);
  const char* (*GetExecutionProviderType)(const OrtOperator*);
  int (*GetInputType)(const OrtOperator*, size_t index);
  size_t (*GetInputTypeCount)(const OrtOperator*);
  int (*GetOutputType)(const OrtOperator*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtOperator*);
  void (*KernelCompute)(void* kernel, void* context);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const OrtOperator*, size_t index);
  int (*GetOutputCharacteristic)(const OrtOperator*, size_t index);
  int (*GetInputMemoryType)(const OrtOperator*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtOperator*);
  int (*GetVariadicInputHomogeneity)(const OrtOperator*);
  int (*GetVariadicOutputMinArity)(const OrtOperator*);
  int (*GetVariadicOutputHomogeneity)(const OrtOperator*);
  OrtStatusPointer (*CreateKernelV2)(const OrtOperator*, const OrtTable*, const void* info, void** kernel);
  OrtStatusPointer (*KernelComputeV2)(void* kernel, void* context);
  OrtStatusPointer (*InferOutputShapeFn)(const OrtOperator*, void* context);
  int (*GetStartVersion)(const OrtOperator*);
  int (*GetEndVersion)(const OrtOperator*);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};

}  // namespace molae
