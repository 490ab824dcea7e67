// The forward kernel of WKV-7, also that of a decoding step; the formulas are in cuda.cu.

#pragma once

#include "state.cuh"

namespace {

// The forward pass; kOwn values per thread. sa_out may be null; state_out may be where the state came from.
template <int kOwn>
TRANSMUTE_GLOBAL void TRANSMUTE_BOUNDS(Block<kOwn>::kThreads)
    forward_kernel(Inputs in, T* y, float* state_out, float* sa_out) {
  using Place = Block<kOwn>;
  constexpr int kSummed = Place::kSummed, kThreads = Place::kThreads, kChunk = N > 64 ? 4 : 8;
  TRANSMUTE_SHARED(float, r_s, kChunk * N);
  TRANSMUTE_SHARED(float, w_s, kChunk * N);
  TRANSMUTE_SHARED(float, k_s, kChunk * N);
  TRANSMUTE_SHARED(float, v_s, kChunk * N);
  TRANSMUTE_SHARED(float, a_s, kChunk * N);
  TRANSMUTE_SHARED(float, b_s, kChunk * N);
  TRANSMUTE_SHARED(int, code_s, kChunk);
  const Place at;
  const int64_t unit = block_index(), cells = unit * N * N + at.own;
  const Tokens<N> tokens(in.shape, in.codes, unit);

  float x[kSummed][kOwn];  // keys, values
#pragma unroll
  for (int i = 0; i < kSummed; ++i) read<kOwn>(in.state + cells + (at.summed + Place::along(i)) * N, x[i]);

  Stage<T, kThreads, kChunk, N> r, k, v, a, b;
  Stage<float, kThreads, kChunk, N> w;
  Codes<kChunk> codes;
  const auto fetch = [&](int begin) {
    r.fetch(in.r, tokens, begin, at.thread);
    w.fetch(in.log_w, tokens, begin, at.thread);
    k.fetch(in.k, tokens, begin, at.thread);
    v.fetch(in.v, tokens, begin, at.thread);
    a.fetch(in.a, tokens, begin, at.thread);
    b.fetch(in.b, tokens, begin, at.thread);
    codes.fetch(tokens, begin, at.thread);
  };
  fetch(0);
  for (int begin = 0; begin < tokens.count; begin += kChunk) {
    sync_threads();
    r.put(r_s, at.thread);
    w.template put<true>(w_s, at.thread);
    k.put(k_s, at.thread);
    v.put(v_s, at.thread);
    a.put(a_s, at.thread);
    b.put(b_s, at.thread);
    codes.put(code_s, at.thread);
    sync_threads();
    fetch(begin + kChunk);
    const int count = smaller(kChunk, tokens.count - begin);
    for (int t = 0; t < count; ++t) {
      const int code = code_s[t], keys = t * N + at.summed;
      const int64_t place = tokens.at(begin + t) + at.own;
      float sa[kOwn] = {}, v_t[kOwn], sum[kOwn] = {};
      if (code == kPadding) {
        if (at.lane == 0) {
#pragma unroll
          for (int j = 0; j < kOwn; ++j) store(y + place + j, 0.0f);
          if (sa_out != nullptr) write<kOwn>(sa_out + place, sa);
        }
        continue;
      }
      if (code == kReset) clear(x);
#pragma unroll
      for (int i = 0; i < kSummed; i += 4) {
        float a_t[4];
        read<4>(a_s + keys + Place::along(i), a_t);
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
          for (int j = 0; j < kOwn; ++j) sa[j] += a_t[m] * x[i + m][j];
      }
      read<kOwn>(v_s + t * N + at.own, v_t);
      sum_for_all(sa);
#pragma unroll
      for (int i = 0; i < kSummed; i += 4) {
        float r_t[4], w_t[4], k_t[4], b_t[4];
        read<4>(w_s + keys + Place::along(i), w_t);
        read<4>(k_s + keys + Place::along(i), k_t);
        read<4>(b_s + keys + Place::along(i), b_t);
        read<4>(r_s + keys + Place::along(i), r_t);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
#pragma unroll
          for (int j = 0; j < kOwn; ++j) {
            x[i + m][j] = w_t[m] * x[i + m][j] + k_t[m] * v_t[j] + b_t[m] * sa[j];
            sum[j] += r_t[m] * x[i + m][j];
          }
        }
      }
      if (sa_out != nullptr && at.lane == 0) write<kOwn>(sa_out + place, sa);
      const float total = share_sums<kOwn, 8>(sum, at.lane);
      if (at.lane % (8 / kOwn) == 0) store(y + place + at.lane / (8 / kOwn), total);
    }
  }
#pragma unroll
  for (int i = 0; i < kSummed; ++i) write<kOwn>(state_out + cells + (at.summed + Place::along(i)) * N, x[i]);
}

}  // namespace
