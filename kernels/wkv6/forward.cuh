// WKV-6: the kernels of the forward pass and of one decoding step. The formulas are in cuda.cu.

#pragma once

#include "state.cuh"

namespace {

// A block computes a slab of values of one (row, head).
template <class T, int N, int kWarps, bool kBonus>
TRANSMUTE_GLOBAL void TRANSMUTE_BOUNDS(32 * kWarps, kBonus && N > 64)
    forward_kernel(Inputs<T> in, T* y, float* state_out) {
  using At = Place<N, kWarps>;
  constexpr int kSummed = At::kSummed, kChunk = At::kChunk, kSlab = At::kSlab, kThreads = At::kThreads;
  TRANSMUTE_SHARED(float, r_s, kChunk * N);
  TRANSMUTE_SHARED(float, w_s, kChunk * N);
  TRANSMUTE_SHARED(float, k_s, kChunk * N);
  TRANSMUTE_SHARED(float, v_s, kChunk * kSlab);
  TRANSMUTE_SHARED(float, u_s, kBonus ? N : 4);
  TRANSMUTE_SHARED(int, code_s, kChunk);
  const At at;
  const Tokens<N> tokens(in.shape, in.codes, at.unit);
  const int64_t cells = at.unit * N * N + at.slab * kSlab + at.own, own = at.slab * kSlab;

  float x[kHeld][kSummed];
#pragma unroll
  for (int i = 0; i < kSummed; ++i) {
    const Float4 four = load4(in.state + cells + (at.summed + At::along(i)) * N);
    x[0][i] = four.x, x[1][i] = four.y, x[2][i] = four.z, x[3][i] = four.w;
  }
  if (kBonus)
    for (int key = at.thread; key < N; key += kThreads) u_s[key] = in.u[at.unit % in.shape.heads * N + key];

  Stage<T, kThreads, kChunk, N> r, k;
  Stage<float, kThreads, kChunk, N> w;
  Stage<T, kThreads, kChunk, kSlab> v;
  Codes<kChunk> codes;
  const auto fetch = [&](int64_t begin) {
    r.fetch(in.r, tokens, begin, at.thread);
    w.fetch(in.log_w, tokens, begin, at.thread);
    k.fetch(in.k, tokens, begin, at.thread);
    v.fetch(in.v + own, tokens, begin, at.thread);
    codes.fetch(tokens, begin, at.thread);
  };
  fetch(0);
  for (int64_t begin = 0; begin < tokens.count; begin += kChunk) {
    sync_threads();
    r.put(r_s, at.thread);
    w.template put<true>(w_s, at.thread);
    k.put(k_s, at.thread);
    v.put(v_s, at.thread);
    codes.put(code_s, at.thread);
    sync_threads();
    fetch(begin + kChunk);
    const int count = static_cast<int>(smaller(kChunk, tokens.count - begin));
    T* out = y + tokens.at(begin) + own + at.kept;
    for (int t = 0; t < count; ++t, out += tokens.stride) {
      const int code = code_s[t];
      if (code == kPadding) {
        if (at.lane % 2 == 0) store(out, 0.0f);
        continue;
      }
      if (code == kReset) clear(x);
      float v_t[kHeld], sum[kHeld] = {}, bonus = 0;
      read<4>(v_s + t * kSlab + at.own, v_t);
#pragma unroll
      for (int first = 0; first < kSummed; first += 4) {
        const int key = at.summed + At::along(first);
        float r_t[4], w_t[4], k_t[4], u_t[4] = {};
        read<4>(r_s + t * N + key, r_t);
        read<4>(w_s + t * N + key, w_t);
        read<4>(k_s + t * N + key, k_t);
        if (kBonus) read<4>(u_s + key, u_t);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (kBonus) bonus += r_t[i] * u_t[i] * k_t[i];
#pragma unroll
          for (int j = 0; j < kHeld; ++j) {
            float& cell = x[j][first + i];
            if (kBonus) sum[j] += r_t[i] * cell;
            cell = cell * w_t[i] + k_t[i] * v_t[j];
            if (!kBonus) sum[j] += r_t[i] * cell;
          }
        }
      }
      if (kBonus)
#pragma unroll
        for (int j = 0; j < kHeld; ++j) sum[j] += bonus * v_t[j];
      const float total = share_sums<kHeld, 8>(sum, at.lane);
      if (at.lane % 2 == 0) store(out, total);
    }
  }
#pragma unroll
  for (int i = 0; i < kSummed; ++i)
    store_global4(state_out + cells + (at.summed + At::along(i)) * N,
           Float4{x[0][i], x[1][i], x[2][i], x[3][i]});
}

// One token of one (row, head); the state is changed in place. There are eight groups of N / 4 threads: a
// thread has four values, a group an eighth of the keys.
template <class T, int N>
TRANSMUTE_GLOBAL void TRANSMUTE_BOUNDS(2 * N) step_kernel(Inputs<T> in, float* state, T* y) {
  constexpr int kKeys = N / 8;
  TRANSMUTE_SHARED(float, sums, 8 * N);
  const int thread = thread_index(), value = thread % (N / 4) * 4, group = thread / (N / 4);
  const int64_t unit = block_index(), first = unit * N;
  const int code = in.codes == nullptr ? 0 : in.codes[unit / in.shape.heads];
  if (code == kPadding) {
    if (thread < N) store(y + first + thread, 0.0f);
    return;
  }
  const Float4 v = convert(load_raw4(in.v + first + value));
  float* cells = state + (first + group * kKeys) * N + value;
  Float4 x[kKeys], sum = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kKeys; ++i) x[i] = code == kReset ? sum : load4(cells + i * N);
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int64_t key = first + group * kKeys + i;
    const float r = load(in.r + key), k = load(in.k + key), w = expf(in.log_w[key]);
    const Float4 added = times(k, v);
    const Float4 after = plus(times(w, x[i]), added);
    Float4 seen = after;
    if (in.u != nullptr) seen = plus(x[i], times(in.u[unit % in.shape.heads * N + group * kKeys + i], added));
    sum = plus(sum, times(r, seen));
    store_global4(cells + i * N, after);
  }
  store4(sums + group * N + value, sum);
  sync_threads();
  if (thread >= N) return;
  float total = 0;
  for (int i = 0; i < 8; ++i) total += sums[i * N + thread];
  store(y + first + thread, total);
}

}  // namespace
