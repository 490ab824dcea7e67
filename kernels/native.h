// What the C++ backends share: vectors, memory and threads.

#pragma once

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace native {

enum Status { kDone = 0, kOutOfMemory = 1, kUnknownHeadSize = 2 };  // as in native.py

#if defined(__AVX512F__)
constexpr int kWidth = 16, kTileVectors = 4;  // 4 x 16 lanes keep every accumulator in a register
#else
constexpr int kWidth = 8, kTileVectors = 2;
#endif
typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));
typedef float VecAny __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

typedef uint32_t BitsVec __attribute__((vector_size(kWidth * 4)));
typedef uint16_t RoundedAny __attribute__((vector_size(kWidth * 2), aligned(2), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const VecAny*>(p); }
inline Vec load(const uint16_t* p) {  // of bfloat16: the upper half of a float's bits
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const RoundedAny*>(p), BitsVec) << 16);
}
inline void store(float* p, Vec x) { *reinterpret_cast<VecAny*>(p) = x; }

// exp(x) for x <= 0: 2^n times a polynomial on |x - n ln 2| <= ln 2 / 2; 0 below -87.
inline Vec exponential(Vec x) {
  const Vec zero = {};
  const Vec shift = zero + 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  Vec scaled = x * 1.44269504088896341f;
  scaled = scaled < -127.0f ? zero - 127.0f : scaled;
  scaled = scaled > 127.0f ? zero + 127.0f : scaled;
  const Vec n = (scaled + shift) - shift;
  Vec f = x - n * 0.693145751953125f;  // ln 2 in two parts, the first exact in few bits
  f = f - n * 1.42860682030941723e-6f;
  Vec p = zero + 1.9841270e-4f;
  p = p * f + 1.3888889e-3f;
  p = p * f + 8.3333333e-3f;
  p = p * f + 4.1666667e-2f;
  p = p * f + 1.6666667e-1f;
  p = p * f + 0.5f;
  p = (p * f) * f + f + 1.0f;
  const IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec factor;
  std::memcpy(&factor, &power, sizeof factor);
  return x < -87.0f ? zero : p * factor;
}

template <int N>
inline void exponential_row(const float* x, float* out) {
  for (int i = 0; i < N; i += kWidth) store(out + i, exponential(load(x + i)));
}

// By halves: one lane after the other would be a chain of additions that wait for each other.
inline float sum(Vec x) {
  typedef float Four __attribute__((vector_size(16)));
  Four part[kWidth / 4];
  std::memcpy(part, &x, sizeof x);
  for (int half = kWidth / 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

template <int H, bool kUpper>
constexpr int half_lane(int lane) {
  return (lane % (2 * H) < H ? 0 : kWidth) + lane / (2 * H) * (2 * H) + lane % H + (kUpper ? H : 0);
}

// Of each group of 2 H lanes the lower or upper half of a, and beside it that of b.
template <int H, bool kUpper, size_t... L>
inline Vec halves(Vec a, Vec b, std::index_sequence<L...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, half_lane<H, kUpper>(L)...);
#else
  return __builtin_shuffle(a, b, IntVec{half_lane<H, kUpper>(L)...});
#endif
}

// The sums of kWidth vectors, one in each lane; x is overwritten.
template <int H = kWidth / 2>
inline Vec sums(Vec* x) {
  const auto lanes = std::make_index_sequence<kWidth>();
  for (int i = 0; i < H; ++i) x[i] = halves<H, false>(x[i], x[i + H], lanes) + halves<H, true>(x[i], x[i + H], lanes);
  if constexpr (H > 1) return sums<H / 2>(x);
  return x[0];
}

// Asks for large pages where memory that is about to be filled has room for them. Fresh memory costs a page
// fault for every 4 KiB otherwise, up to a third of a long call, and threads take them one after the other.
inline void prefer_large_pages(std::initializer_list<float*> outputs, size_t floats) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  if (floats * sizeof(float) < (size_t{4} << 20)) return;
  for (float* x : outputs) {
    if (x == nullptr) continue;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(x) + kPage - 1) / kPage * kPage;
    const uintptr_t last = reinterpret_cast<uintptr_t>(x + floats) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: failing is no error
  }
#endif
}

// Memory, 64-byte aligned; throws std::bad_alloc.
struct Scratch {
  float* data;
  explicit Scratch(size_t floats) {
    data = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
    if (data == nullptr) throw std::bad_alloc();
    prefer_large_pages({data}, floats);
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
};

// The threads of the OpenMP library that torch brought into the process, or null. After every parallel
// operator of torch they spin for milliseconds, waiting for the next: threads of our own would have to share
// the cores with them. They do not survive a fork.
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);
inline Team shared_team() {
  static std::atomic<bool> forked{false};
  static const bool watched = pthread_atfork(nullptr, nullptr, [] { forked = true; }) == 0;
  static const Team team = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return watched && !forked ? team : nullptr;
}

// Runs body on so many threads, or fewer, this one among them: bodies share their work.
template <class Body>
void on_threads(int64_t threads, Body& body) {
  if (const Team team = shared_team()) {
    team([](void* work) { (*static_cast<Body*>(work))(); }, &body, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < threads; ++i) others.emplace_back([&body] { body(); });
  } catch (const std::exception&) {
    // No more threads to be had: those running, and this one, share the work.
  }
  body();
  for (std::thread& other : others) other.join();
}

// Below, one thread does it all: waking others costs about as much as half of it. Never only some of them: an
// OpenMP library ends the threads that a smaller team leaves out.
constexpr int64_t kCellsWorthThreads = 1000000;

// Shares units 0..count-1 of `cells` multiply-adds each, about, among threads. Each thread that gets one calls make()
// once for its work(unit), which may throw for lack of memory.
template <class Make>
Status parallel(int64_t count, int64_t cells, int64_t threads, Make make) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  auto body = [&] {
    try {
      int64_t unit = next++;
      if (unit >= count) return;
      auto work = make();
      for (; unit < count; unit = next++) work(unit);
    } catch (const std::exception&) {
      failed = true;
    }
  };
  if (threads > 1 && count > 1 && count * cells >= kCellsWorthThreads) on_threads(threads, body);
  else body();
  return failed ? kOutOfMemory : kDone;
}

}  // namespace native
