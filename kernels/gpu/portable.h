// One source for GPUs of both vendors: nvcc (CUDA), hipcc or clang (HIP), and, to check a kernel without a
// GPU, a C++17 compiler (shim.h runs a block's threads as fibers). Knows nothing of torch.
//
// A library is compiled for one head size and one type of the 16- or 32-bit tensors: TRANSMUTE_HEAD_SIZE is
// 32, 64 or 128, TRANSMUTE_TYPE is float, bf16 or fp16. Entries are extern "C" and return a Status;
// transmute_message() says what a failed launch complained of.
//
// Warps: shuffles are among 32 neighbouring threads, also where the hardware's wavefront has 64.

#pragma once

#include <cstdint>

#if defined(__HIP__)
#include <hip/hip_runtime.h>
#define TRANSMUTE_GPU
#elif defined(__CUDACC__)
#include <cuda_runtime.h>
#define TRANSMUTE_GPU
#else
#include "shim.h"
#endif

#if defined(TRANSMUTE_GPU)
#define TRANSMUTE_GLOBAL __global__
#define TRANSMUTE_DEVICE __device__ __forceinline__
#define TRANSMUTE_HOST_DEVICE __host__ __device__ inline
// Threads in a block, and 1 more where a kernel may take all registers that these leave it. A larger second
// argument would mean blocks to CUDA and wavefronts to HIP.
#define TRANSMUTE_BOUNDS(...) __launch_bounds__(__VA_ARGS__)
#define TRANSMUTE_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#endif

namespace transmute {

enum Status { kDone = 0, kLaunchFailed = 1 };

static thread_local const char* message = "";

#if defined(__HIP__)
using Stream = hipStream_t;
inline int launched() {
  const hipError_t error = hipGetLastError();
  if (error != hipSuccess) message = hipGetErrorString(error);
  return error == hipSuccess ? kDone : kLaunchFailed;
}
TRANSMUTE_DEVICE float shuffle_xor(float x, int mask, int width) { return __shfl_xor(x, mask, width); }
#elif defined(__CUDACC__)
using Stream = cudaStream_t;
inline int launched() {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) message = cudaGetErrorString(error);
  return error == cudaSuccess ? kDone : kLaunchFailed;
}
TRANSMUTE_DEVICE float shuffle_xor(float x, int mask, int width) {
  return __shfl_xor_sync(0xffffffffu, x, mask, width);
}
#endif

#if defined(TRANSMUTE_GPU)
TRANSMUTE_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
TRANSMUTE_DEVICE int64_t block_index() { return blockIdx.x; }
TRANSMUTE_DEVICE void sync_threads() { __syncthreads(); }
// Starts blocks x threads on a stream; gives a Status. A kernel with commas in its name stands in brackets.
#define LAUNCH(kernel, blocks, threads, stream, ...)                                                 \
  (kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, stream>>>(__VA_ARGS__), \
   ::transmute::launched())
#else
using Stream = void*;
inline int ran(bool whole) { return whole ? kDone : kLaunchFailed; }
#define LAUNCH(kernel, blocks, threads, stream, ...) \
  ((void)(stream),                                   \
   ::transmute::ran(                                 \
       ::transmute::shim::run(blocks, threads, [=] { kernel(__VA_ARGS__); }, ::transmute::message)))
#endif

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
#if defined(__CUDACC__) && !defined(__HIP__)
using Float4 = float4;
using Float2 = float2;
using Bits2 = uint2;
#else
struct alignas(16) Float4 { float x, y, z, w; };
struct alignas(8) Float2 { float x, y; };
struct alignas(8) Bits2 { uint32_t x, y; };
#endif

TRANSMUTE_DEVICE float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
TRANSMUTE_DEVICE uint32_t to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

// 16-bit numbers travel as bits; what is rounded goes to the nearest, ties to even, and NaN stays NaN.
TRANSMUTE_DEVICE float widen(bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
TRANSMUTE_DEVICE void narrow(float x, bf16* out) {
  const uint32_t bits = to_bits(x);
  out->bits = static_cast<uint16_t>(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
#if defined(__CUDACC__) && !defined(__HIP__)
TRANSMUTE_DEVICE float widen(fp16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
TRANSMUTE_DEVICE void narrow(float x, fp16* out) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x)); }
#else
TRANSMUTE_DEVICE float widen(fp16 x) {
  _Float16 half;
  __builtin_memcpy(&half, &x.bits, sizeof half);
  return static_cast<float>(half);
}
TRANSMUTE_DEVICE void narrow(float x, fp16* out) {
  const _Float16 half = static_cast<_Float16>(x);
  __builtin_memcpy(&out->bits, &half, sizeof half);
}
#endif

TRANSMUTE_DEVICE float load(const float* p) { return *p; }
TRANSMUTE_DEVICE void store(float* p, float x) { *p = x; }
template <class T>
TRANSMUTE_DEVICE float load(const T* p) { return widen(*p); }
template <class T>
TRANSMUTE_DEVICE void store(T* p, float x) {
  T narrowed;
  narrow(x, &narrowed);
  *p = narrowed;
}

// Four numbers as they lie in memory: `load_raw4` early, `convert` late. Addresses are multiples of the size.
template <class T>
struct Raw4 { Bits2 bits; };
template <>
struct Raw4<float> { Float4 four; };

template <class T>
TRANSMUTE_DEVICE Raw4<T> load_raw4(const T* p) { return {*reinterpret_cast<const Bits2*>(p)}; }
TRANSMUTE_DEVICE Raw4<float> load_raw4(const float* p) { return {*reinterpret_cast<const Float4*>(p)}; }
TRANSMUTE_DEVICE Float4 convert(Raw4<float> raw) { return raw.four; }
template <class T>
TRANSMUTE_DEVICE Float4 convert(Raw4<T> raw) {
  const auto number = [](uint32_t bits) { return widen(T{static_cast<uint16_t>(bits)}); };
  const Bits2 bits = raw.bits;
  return {number(bits.x), number(bits.x >> 16), number(bits.y), number(bits.y >> 16)};
}

// Four numbers in shared memory; any may be loaded.
TRANSMUTE_DEVICE Float4 load4(const float* p) { return *reinterpret_cast<const Float4*>(p); }
TRANSMUTE_DEVICE void store4(float* p, Float4 x) { *reinterpret_cast<Float4*>(p) = x; }
// To global memory, in one access: nvcc takes plain stores of vectors apart where the address is computed.
#if defined(__CUDACC__) && !defined(__HIP__)
TRANSMUTE_DEVICE void store_global(void* p, Float4 x) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "f"(x.x),
               "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}
TRANSMUTE_DEVICE void store_global(void* p, Float2 x) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "f"(x.x), "f"(x.y)
               : "memory");
}
TRANSMUTE_DEVICE void store_global(void* p, Bits2 x) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(x.x), "r"(x.y)
               : "memory");
}
#else
template <class V>
TRANSMUTE_DEVICE void store_global(void* p, V x) { *static_cast<V*>(p) = x; }
#endif

// Four numbers in global memory.
TRANSMUTE_DEVICE void store_global4(float* p, Float4 x) { store_global(p, x); }
template <class T>
TRANSMUTE_DEVICE void store_global4(T* p, Float4 x) {
  T n[4];
  narrow(x.x, n), narrow(x.y, n + 1), narrow(x.z, n + 2), narrow(x.w, n + 3);
  store_global(p, Bits2{n[0].bits | static_cast<uint32_t>(n[1].bits) << 16,
                        n[2].bits | static_cast<uint32_t>(n[3].bits) << 16});
}

TRANSMUTE_DEVICE Float2 load2(const float* p) { return *reinterpret_cast<const Float2*>(p); }
TRANSMUTE_DEVICE void store2(float* p, Float2 x) { *reinterpret_cast<Float2*>(p) = x; }

}  // namespace transmute

extern "C" __attribute__((used, visibility("default"))) inline const char* transmute_message() {
  return transmute::message;
}
