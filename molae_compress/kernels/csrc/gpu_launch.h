// The operators of the domain `molae` on an NVIDIA GPU, from device pointers. Plain C, no CUDA header needed.
//
// The library does not link the driver: it is opened at the first call, and a machine without one gets an error code.
// The kernels inside are made by `python -m molae_compress.kernels.gpu_build`; a library built without them says so.
// Nothing here waits for the device, allocates on it or copies to it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum MolaeGpuElement { MOLAE_GPU_FLOAT16 = 0, MOLAE_GPU_BFLOAT16 = 1 };

// In the order of `gpu_tiles.ACTIVATIONS`.
enum MolaeGpuActivation {
  MOLAE_GPU_IDENTITY = 0,
  MOLAE_GPU_SILU = 1,
  MOLAE_GPU_GELU = 2,
  MOLAE_GPU_GELU_TANH = 3,
  MOLAE_GPU_RELU = 4,
  MOLAE_GPU_RELU2 = 5
};

// What functions return: 0, one of these, or a positive CUresult of the driver.
enum MolaeGpuStatus {
  MOLAE_GPU_OK = 0,
  MOLAE_GPU_NO_DRIVER = -1,        // libcuda.so.1 cannot be opened, or lacks a function
  MOLAE_GPU_NO_KERNELS = -2,       // built without kernels, or none runs on this device
  MOLAE_GPU_BAD_ARGUMENT = -3,     // a null pointer, a negative size, groups that do not divide the experts
  MOLAE_GPU_UNSUPPORTED = -4,      // a width is no multiple of 8, a pointer not aligned to 16 bytes, too many experts
  MOLAE_GPU_SCRATCH_TOO_SMALL = -5
};

// A sentence for a status; for people.
const char* molae_gpu_message(int status);

typedef struct MolaeGpuGate {
  int32_t activation;   // MolaeGpuActivation
  int32_t gated;        // the first projection has rows of gate and up
  int32_t interleaved;  // they alternate
  float alpha;          // silu: gate * sigmoid(alpha * gate)
  float limit;          // 0: none; gate <= limit, -limit <= up <= limit
  float up_offset;      // added to up after that
} MolaeGpuGate;

// molae::LatentExperts; tensors as in the documentation of the operator, contiguous, absent ones null.
typedef struct MolaeGpuLatentExperts {
  int32_t element;  // MolaeGpuElement, of all tensors but index and pivots
  int64_t tokens, hidden, intermediate, top_k, experts;
  int64_t input_group, output_group, rank_in, rank_out;
  MolaeGpuGate gate;
  const void* x;          // [T,H]
  const int64_t* index;   // [T,K]; outside 0..E-1: of no expert
  const void* weight;     // [T,K]
  const void* encode;     // [Gi*Ri,H] or [Gi*Ri,H-Ri]
  const int32_t* encode_pivots;
  const void* core;       // [E*Ri,J] or [E*Ri,I]
  const void* up_encode;
  const int32_t* up_encode_pivots;
  const void* core_up;    // [E*Ri,I]
  const void* core_bias;  // [E,J]
  const void* down;       // [E*Ro,I] or [E*H,I]
  const void* decode;     // [Go*Ro,H] or [Go*Ro,H-Ro]
  const int32_t* decode_pivots;
  const void* decode_bias;  // [E,H]
  void* y;                  // [T,H]
} MolaeGpuLatentExperts;

// Bytes of device memory that the call needs; its pointers are not read, but absent tensors must be null.
int molae_gpu_latent_experts_scratch(const MolaeGpuLatentExperts* call, size_t* bytes);

// Enqueues the operator on `stream` (a CUstream or cudaStream_t) of the current context. `scratch` is aligned to 256 bytes
// and stays untouched until the stream is past the call.
int molae_gpu_latent_experts(const MolaeGpuLatentExperts* call, void* scratch, size_t bytes, void* stream);

// molae::GroupedGemm.
typedef struct MolaeGpuGroupedGemm {
  int32_t element;
  int64_t rows, inputs, columns, groups;  // S, N, and M or M/2 columns of the output, G
  int32_t transposed;                     // b is [G,N,M], else [G,M,N]
  MolaeGpuGate gate;
  const void* a;           // [S,N]
  const void* b;
  const int32_t* ends;     // [G] in device memory
  const void* bias;        // [G,M]
  const void* row_weight;  // [S]
  void* out;               // [S,columns]; rows past the last end are left as they are
} MolaeGpuGroupedGemm;

int molae_gpu_grouped_gemm_scratch(const MolaeGpuGroupedGemm* call, size_t* bytes);
int molae_gpu_grouped_gemm(const MolaeGpuGroupedGemm* call, void* scratch, size_t bytes, void* stream);

#ifdef __cplusplus
}
#endif
