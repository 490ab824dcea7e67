// What the recurrences on the CPU share: vectors, one token's step on a tile of a state, the tokens of a row,
// and threads.
//
// A tile X is [N rows][lanes] floats. A state is [N_k,N_v]; its tile has rows over keys and lanes over
// values, or, for what is summed over values, the other way round. One thread computes a (row, head), or one
// tile of it, in a fixed order: results do not depend on the number of threads.

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
#include <vector>

namespace recurrence {

enum Status { kDone = 0, kOutOfMemory = 1, kUnknownHeadSize = 2 };
constexpr int8_t kNormal = 0, kReset = 1, kPadding = 2;  // codes, kernels/segments.py

#if defined(__AVX512F__)
constexpr int kWidth = 16, kTileVectors = 4;  // 4 x 16 lanes keep every accumulator in a register
#else
constexpr int kWidth = 8, kTileVectors = 2;
#endif
typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));
typedef float VecAny __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const VecAny*>(p); }
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

inline float sum(Vec x) {
  float total = 0;
  for (int j = 0; j < kWidth; ++j) total += x[j];
  return total;
}

template <int N>
constexpr int lanes() { return std::min(N, kTileVectors * kWidth); }

struct Update { const float *rows, *lanes; };            // X += rows (x) lanes
struct Product { const float* rows; float* lanes; };     // lanes = sum over the rows of rows * X
enum class Decay { kPerRow, kPerLane };                  // X = X * decay
enum class Order { kDecayUpdateRead, kReadDecayUpdate, kUpdateReadDecay };

// One token on a tile whose rows lie kStride floats apart: its decay, updates and products, in the given
// order (products read what the updates and the decay before them made). Products may be written where
// updates come from. Every loop but that over the rows is unrolled.
template <int N, Decay kDecay, Order kOrder = Order::kDecayUpdateRead, int kStride = lanes<N>(), int kUpdates,
          int kProducts>
[[gnu::always_inline]] inline void step(float* X, const float* decay, const Update (&updates)[kUpdates],
                                        const Product (&products)[kProducts]) {
  constexpr int V = lanes<N>() / kWidth;
  constexpr bool kPerLane = kDecay == Decay::kPerLane;
  const Vec zero = {};
  Vec D[V], U[kUpdates][V], P[kProducts][V];
  for (int j = 0; j < V; ++j) {
    D[j] = kPerLane ? load(decay + j * kWidth) : zero;
    for (int m = 0; m < kUpdates; ++m) U[m][j] = load(updates[m].lanes + j * kWidth);
    for (int m = 0; m < kProducts; ++m) P[m][j] = zero;
  }
  for (int i = 0; i < N; ++i) {
    Vec u[kUpdates], p[kProducts];
    for (int m = 0; m < kUpdates; ++m) u[m] = updates[m].rows[i] - zero;
    for (int m = 0; m < kProducts; ++m) p[m] = products[m].rows[i] - zero;
    const Vec d = kPerLane ? zero : decay[i] - zero;
    for (int j = 0; j < V; ++j) {
      float* cell = X + i * kStride + j * kWidth;
      Vec x = load(cell);
      const Vec keep = kPerLane ? D[j] : d;
      if (kOrder == Order::kReadDecayUpdate)
        for (int m = 0; m < kProducts; ++m) P[m][j] += p[m] * x;
      if (kOrder != Order::kUpdateReadDecay) x *= keep;
      for (int m = 0; m < kUpdates; ++m) x += u[m] * U[m][j];
      if (kOrder != Order::kReadDecayUpdate)
        for (int m = 0; m < kProducts; ++m) P[m][j] += p[m] * x;
      if (kOrder == Order::kUpdateReadDecay) x *= keep;
      store(cell, x);
    }
  }
  for (int m = 0; m < kProducts; ++m)
    for (int j = 0; j < V; ++j) store(products[m].lanes + j * kWidth, P[m][j]);
}

// A product alone.
template <int N, int kStride = lanes<N>()>
inline void read(const float* X, Product product) {
  constexpr int V = lanes<N>() / kWidth;
  const Vec zero = {};
  Vec P[V] = {};
  for (int i = 0; i < N; ++i) {
    const Vec p = product.rows[i] - zero;
    for (int j = 0; j < V; ++j) P[j] += p * load(X + i * kStride + j * kWidth);
  }
  for (int j = 0; j < V; ++j) store(product.lanes + j * kWidth, P[j]);
}

// out[j] = sum over the rows of X * Y, for two tiles.
template <int N>
inline void read_both(const float* X, const float* Y, float* out) {
  constexpr int L = lanes<N>(), V = L / kWidth;
  Vec P[V] = {};
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < V; ++j) P[j] += load(X + i * L + j * kWidth) * load(Y + i * L + j * kWidth);
  for (int j = 0; j < V; ++j) store(out + j * kWidth, P[j]);
}

alignas(64) const float kZeros[128] = {};
struct Ones {
  alignas(64) float data[128];
  Ones() { std::fill(data, data + 128, 1.0f); }
};
const Ones kOnes;

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

struct Shape {
  int64_t batch, tokens, heads;
  size_t floats(int N) const { return static_cast<size_t>(batch * tokens * heads * N); }
};

// The real tokens of one (row, head): float offsets into [B,T,H,N] tensors, and whether the state is reset
// first; and the offsets of its padding.
struct Row {
  std::vector<int64_t> offset, padding;
  std::vector<char> reset;
  Row(const Shape& shape, const int8_t* codes, int64_t unit, int N) {
    const int64_t row = unit / shape.heads, head = unit % shape.heads;
    offset.reserve(shape.tokens);
    reset.reserve(shape.tokens);
    for (int64_t t = 0; t < shape.tokens; ++t) {
      const int8_t code = codes == nullptr ? kNormal : codes[row * shape.tokens + t];
      const int64_t at = ((row * shape.tokens + t) * shape.heads + head) * N;
      (code == kPadding ? padding : offset).push_back(at);
      if (code != kPadding) reset.push_back(code == kReset);
    }
  }
  int64_t size() const { return static_cast<int64_t>(offset.size()); }
};

// Fetches real token i of some tensors ahead of its use: tokens lie H*N floats apart, too far for the
// hardware to foresee when there are many heads. Always inlined: GCC drops calls that "have no effect".
template <int N>
[[gnu::always_inline]] inline void prefetch(const Row& row, int64_t i,
                                            std::initializer_list<const float*> tensors) {
  if (i < 0 || i >= row.size()) return;
  for (const float* x : tensors)
    for (int j = 0; j < N; j += 16) __builtin_prefetch(x + row.offset[i] + j);
}

template <int N>
void fill_padding(const Row& row, std::initializer_list<float*> outputs) {
  for (float* out : outputs)
    for (int64_t at : row.padding) std::memset(out + at, 0, N * sizeof(float));
}

template <int N>
void read_tile(float* X, const float* state, int first_lane, bool lanes_are_keys) {
  constexpr int L = lanes<N>();
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < L; ++j)
      X[i * L + j] = lanes_are_keys ? state[(first_lane + j) * N + i] : state[i * N + first_lane + j];
}

template <int N>
void write_tile(const float* X, float* state, int first_lane) {
  constexpr int L = lanes<N>();
  for (int i = 0; i < N; ++i) std::memcpy(state + i * N + first_lane, X + i * L, L * sizeof(float));
}

// The gradient of the log decay is a running sum, which starts afresh from a copy of the state's gradient at
// every so many tokens: rounding errors cannot pile up over a long row.
inline int64_t anchor_spacing(int64_t tokens) { return std::max<int64_t>(16, (tokens + 511) / 512); }
template <int N>
size_t anchor_floats(int64_t tokens) {
  const int64_t spacing = anchor_spacing(tokens);
  return (tokens + spacing - 1) / spacing * N * lanes<N>();
}

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

// Shares units 0..count-1 of `cells` state cells each among threads. Each thread that gets one calls make()
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

// Calls a template of N with the head size as a constant.
template <class Call>
Status for_head_size(int64_t size, Call call) {
  if (size == 32) return call(std::integral_constant<int, 32>());
  if (size == 64) return call(std::integral_constant<int, 64>());
  return size == 128 ? call(std::integral_constant<int, 128>()) : kUnknownHeadSize;
}

}  // namespace recurrence
