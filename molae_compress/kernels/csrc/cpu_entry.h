// The CPU operators for callers other than ONNX Runtime, from pointers into main memory. Plain C.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Runs `body(data)` on each of some threads and waits for them: `GOMP_parallel`, which the OpenMP runtimes of GCC and LLVM have.
typedef void (*MolaeParallel)(void (*body)(void* data), void* data, unsigned threads, unsigned flags);

typedef struct MolaeCpuPool {
  MolaeParallel parallel;  // null: the thread that calls does all
  int32_t threads;
} MolaeCpuPool;

// One product a[rows,inputs] by the matrix of each row's group: the first `ends[0]` rows are of the first group.
typedef struct MolaeCpuProduct {
  MolaeCpuPool pool;
  int32_t element;     // 0 float, 1 float16, 2 bfloat16: of all tensors
  int32_t transposed;  // weight is [G,inputs,outputs], else [G,outputs,inputs]
  int64_t rows, inputs, outputs, groups;
  const void* a;
  const void* weight;
  const int32_t* ends;  // null with one group
  void* out;            // [rows,outputs]; zeros past the last end
} MolaeCpuProduct;

// A bank of latent experts, or experts that stayed dense on one side or both; tensors contiguous, absent ones null.
typedef struct MolaeCpuExperts {
  MolaeCpuPool pool;
  int32_t element;  // as above, of all tensors but index, pivots and routing
  int32_t activation, gated, interleaved;  // `Function` of cpu_kernels.h; rows of gate and up, which alternate
  int32_t core_transposed, down_transposed, decode_transposed;  // [E or G,inputs,outputs], else [E or G,outputs,inputs]
  float alpha, limit, up_offset;
  int64_t tokens, hidden, intermediate, top_k, experts;
  int64_t input_group, output_group, rank_in, rank_out;  // a rank of 0: no basis on that side
  const void* x;         // [T,H]
  const int64_t* index;  // [T,K]; E: of no expert
  const float* routing;  // [T,K]
  const void* encode;    // [Gi*Ri,H] or [Gi*Ri,H-Ri]
  const int32_t* encode_pivots;
  const void* core;         // of the gate if there is core_up
  const void* up_encode;
  const int32_t* up_encode_pivots;
  const void* core_up;
  const void* core_bias;  // [E,J]
  const void* down;
  const void* decode;  // with pivots of H-Ro outputs
  const int32_t* decode_pivots;
  const void* decode_bias;  // [E,H]
  void* y;                  // [T,H]
} MolaeCpuExperts;

// Both return 0, or 1 after writing what is wrong to `message`.
int molae_cpu_product(const MolaeCpuProduct* call, char* message, size_t bytes);
int molae_cpu_experts(const MolaeCpuExperts* call, char* message, size_t bytes);

#ifdef __cplusplus
}
#endif
