// What kernels share that carry a state of N x N numbers through the tokens of a (row, head).
//
// A thread keeps kOwn x kSummed cells of the state in registers. Eight neighbouring lanes hold the whole axis
// that a scan's main products sum over (N / 8 each), a warp 4 * kOwn positions of the other axis. Inputs come
// into shared memory a chunk of tokens at a time; the next chunk is on its way meanwhile. Every sum has a
// fixed order.

#pragma once

#include "portable.h"

namespace transmute {

constexpr int8_t kReset = 1, kPadding = 2;  // codes, kernels/segments.py
constexpr int kAnchor = 64;  // tokens between two places where the gradient of the log decay starts afresh

struct Shape { int64_t batch, tokens, heads; };

TRANSMUTE_DEVICE int smaller(int x, int y) { return x < y ? x : y; }

// Where the cells of a thread lie; kWarps warps hold a slab of one axis and all of the other one.
template <int N, int kOwn, int kWarps>
struct Tile {
  static constexpr int kThreads = 32 * kWarps, kSummed = N / 8, kSlab = 4 * kOwn * kWarps;
  static_assert(N % kSlab == 0, "a head is a whole number of slabs");
  int thread, warp, lane, own, summed;

  TRANSMUTE_DEVICE Tile() {
    thread = thread_index();
    warp = thread / 32;
    lane = thread % 8;                                           // among those that share a sum
    own = warp * 4 * kOwn + thread % 32 / 8 * kOwn;              // its first cell along the slab
    summed = lane * 4;                                           // along the other axis: see `along`
  }
  TRANSMUTE_DEVICE static int along(int i) { return i / 4 * 32 + i % 4; }
};

// The tokens of one (row, head) in memory. A row has less than 2^31 tokens; offsets may be larger.
template <int N>
struct Tokens {
  int64_t first, stride;
  int count;
  const int8_t* codes;
  TRANSMUTE_DEVICE Tokens(const Shape& shape, const int8_t* all_codes, int64_t unit) {
    const int64_t row = unit / shape.heads;
    count = static_cast<int>(shape.tokens);
    stride = shape.heads * N;
    first = row * shape.tokens * stride + unit % shape.heads * N;
    codes = all_codes == nullptr ? nullptr : all_codes + row * shape.tokens;
  }
  TRANSMUTE_DEVICE int64_t at(int token) const { return first + token * stride; }
};

// Brings kWidth numbers of each of kChunk tokens into shared memory: fetch() long before they are needed,
// put() when the place in shared memory is free.
template <class T, int kThreads, int kChunk, int kWidth>
struct Stage {
  static constexpr int kVectors = kChunk * kWidth / 4, kMine = (kVectors + kThreads - 1) / kThreads;
  Raw4<T> raw[kMine];

  template <int N>
  TRANSMUTE_DEVICE void fetch(const T* from, const Tokens<N>& tokens, int begin, int thread) {
#pragma unroll
    for (int m = 0; m < kMine; ++m) {
      const int vector = m * kThreads + thread;
      if (kVectors % kThreads != 0 && vector >= kVectors) break;
      // Past the end the last token comes once more, unused: cheaper than a branch for every tensor.
      const int token = smaller(begin + vector / (kWidth / 4), tokens.count - 1);
      raw[m] = load_raw4(from + tokens.at(token) + vector % (kWidth / 4) * 4);
    }
  }
  template <bool kExponential = false>
  TRANSMUTE_DEVICE void put(float* shared, int thread) const {
#pragma unroll
    for (int m = 0; m < kMine; ++m) {
      const int vector = m * kThreads + thread;
      if (kVectors % kThreads != 0 && vector >= kVectors) break;
      Float4 x = convert(raw[m]);
      if (kExponential) x = {expf(x.x), expf(x.y), expf(x.z), expf(x.w)};
      store4(shared + vector * 4, x);
    }
  }
};

template <int kChunk>
struct Codes {
  int code = 0;
  template <int N>
  TRANSMUTE_DEVICE void fetch(const Tokens<N>& tokens, int begin, int thread) {
    if (thread < kChunk && tokens.codes != nullptr && begin + thread < tokens.count)
      code = tokens.codes[begin + thread];
  }
  TRANSMUTE_DEVICE void put(int* shared, int thread) const {
    if (thread < kChunk) shared[thread] = code;
  }
};

// Of kCount sums, the lower lanes keep the first half, the upper ones (those with `mask` set) the second.
template <int kCount>
TRANSMUTE_DEVICE void halve(float* x, int mask, bool upper) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float mine = upper ? x[i + kCount / 2] : x[i], theirs = upper ? x[i] : x[i + kCount / 2];
    x[i] = mine + shuffle_xor(theirs, mask, 32);
  }
}

// Sums kCount numbers over kLanes >= kCount lanes; gives lane i the sum i / (kLanes / kCount).
template <int kCount, int kLanes>
TRANSMUTE_DEVICE float share_sums(float* x, int lane) {
  if constexpr (kLanes == 1) {
    return x[0];
  } else if constexpr (kCount == 1) {
    x[0] += shuffle_xor(x[0], kLanes / 2, 32);
    return share_sums<1, kLanes / 2>(x, lane);
  } else {
    halve<kCount>(x, kLanes / 2, lane & (kLanes / 2));
    return share_sums<kCount / 2, kLanes / 2>(x, lane);
  }
}

// Sums every number over 8 lanes, for all of them.
template <int kCount>
TRANSMUTE_DEVICE void sum_for_all(float (&x)[kCount]) {
#pragma unroll
  for (int mask = 4; mask > 0; mask /= 2)
#pragma unroll
    for (int j = 0; j < kCount; ++j) x[j] += shuffle_xor(x[j], mask, 32);
}

// kCount (an even number) neighbouring numbers of shared or global memory.
template <int kCount>
TRANSMUTE_DEVICE void read(const float* from, float* out) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const Float4 x = load4(from + i);
      out[i] = x.x, out[i + 1] = x.y, out[i + 2] = x.z, out[i + 3] = x.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const Float2 x = load2(from + i);
      out[i] = x.x, out[i + 1] = x.y;
    }
  }
}

// A reset, rare and the same for all threads: the empty statement makes it a branch, not a choice per number.
template <int kRows, int kColumns>
TRANSMUTE_DEVICE void clear(float (&x)[kRows][kColumns]) {
  asm volatile("");
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) x[i][j] = 0;
}

// To shared memory.
template <int kCount>
TRANSMUTE_DEVICE void put(float* to, const float* x) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) store4(to + i, Float4{x[i], x[i + 1], x[i + 2], x[i + 3]});
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) store2(to + i, Float2{x[i], x[i + 1]});
  }
}

// To global memory.
template <int kCount>
TRANSMUTE_DEVICE void write(float* to, const float* x) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) store_global4(to + i, Float4{x[i], x[i + 1], x[i + 2], x[i + 3]});
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) store_global(to + i, Float2{x[i], x[i + 1]});
  }
}

}  // namespace transmute
