// What the recurrences on the CPU share: one token's step on a tile of a state, and the tokens of a row.
//
// A tile X is [N rows][lanes] floats. A state is [N_k,N_v]; its tile has rows over keys and lanes over
// values, or, for what is summed over values, the other way round. One thread computes a (row, head), or one
// tile of it, in a fixed order: results do not depend on the number of threads.

#pragma once

#include "native.h"

namespace recurrence {

using namespace native;

constexpr int8_t kNormal = 0, kReset = 1, kPadding = 2;  // codes, kernels/segments.py

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

// Calls a template of N with the head size as a constant.
template <class Call>
Status for_head_size(int64_t size, Call call) {
  if (size == 32) return call(std::integral_constant<int, 32>());
  if (size == 64) return call(std::integral_constant<int, 64>());
  return size == 128 ? call(std::integral_constant<int, 128>()) : kUnknownHeadSize;
}

}  // namespace recurrence
