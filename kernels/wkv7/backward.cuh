// The two kernels of WKV-7's backward pass; the formulas are in cuda.cu.

#pragma once

#include "state.cuh"

namespace {

// The reverse scan; kOwn values per thread. Leaves b db + k dk in dlog_w.
template <int kOwn>
TRANSMUTE_GLOBAL void TRANSMUTE_BOUNDS(Block<kOwn>::kThreads)
    reverse_kernel(Inputs in, const float* sa, const T* dy, const float* dstate_out, Gradients grad,
                   Scratch scratch) {
  using Place = Block<kOwn>;
  constexpr int kSummed = Place::kSummed, kThreads = Place::kThreads, kWarps = kThreads / 32;
  constexpr int kChunk = N > 64 ? 2 : kOwn == 2 ? 4 : 8;  // 48 KB of shared memory at the most
  constexpr int kPart = kSummed / 2;  // sums over the warp's values that a lane ends up with
  TRANSMUTE_SHARED(float, r_s, kChunk * N);
  TRANSMUTE_SHARED(float, w_s, kChunk * N);
  TRANSMUTE_SHARED(float, k_s, kChunk * N);
  TRANSMUTE_SHARED(float, v_s, kChunk * N);
  TRANSMUTE_SHARED(float, a_s, kChunk * N);
  TRANSMUTE_SHARED(float, b_s, kChunk * N);
  TRANSMUTE_SHARED(float, sa_s, kChunk * N);
  TRANSMUTE_SHARED(float, dy_s, kChunk * N);
  TRANSMUTE_SHARED(float, parts_s, kChunk * kWarps * 2 * N);  // dk and db of a warp's values
  TRANSMUTE_SHARED(int, code_s, kChunk);
  const Place at;
  const int64_t unit = block_index(), cells = at.summed * N + at.own;
  const Tokens<N> tokens(in.shape, in.codes, unit);
  float* const copies = scratch.anchors + unit * anchors(tokens.count) * N * N + cells;
  const int part = (at.thread & 8) / 8 * kPart, kind = (at.thread & 16) / 16;

  float x[kSummed][kOwn];  // keys, values
#pragma unroll
  for (int i = 0; i < kSummed; ++i) read<kOwn>(dstate_out + unit * N * N + cells + Place::along(i) * N, x[i]);

  Stage<T, kThreads, kChunk, N> r, k, v, a, b, dy_stage;
  Stage<float, kThreads, kChunk, N> w, sa_stage;
  Codes<kChunk> codes;
  const auto fetch = [&](int begin) {
    r.fetch(in.r, tokens, begin, at.thread);
    w.fetch(in.log_w, tokens, begin, at.thread);
    k.fetch(in.k, tokens, begin, at.thread);
    v.fetch(in.v, tokens, begin, at.thread);
    a.fetch(in.a, tokens, begin, at.thread);
    b.fetch(in.b, tokens, begin, at.thread);
    sa_stage.fetch(sa, tokens, begin, at.thread);
    dy_stage.fetch(dy, tokens, begin, at.thread);
    codes.fetch(tokens, begin, at.thread);
  };
  const int last = (tokens.count - 1) / kChunk * kChunk;
  fetch(last);
  for (int begin = last; begin >= 0; begin -= kChunk) {
    sync_threads();
    r.put(r_s, at.thread);
    w.template put<true>(w_s, at.thread);
    k.put(k_s, at.thread);
    v.put(v_s, at.thread);
    a.put(a_s, at.thread);
    b.put(b_s, at.thread);
    sa_stage.put(sa_s, at.thread);
    dy_stage.put(dy_s, at.thread);
    codes.put(code_s, at.thread);
    sync_threads();
    if (begin > 0) fetch(begin - kChunk);
    const int count = smaller(kChunk, tokens.count - begin);
    for (int t = count - 1; t >= 0; --t) {
      const int code = code_s[t], keys = t * N + at.summed;
      const int64_t place = tokens.at(begin + t) + at.own;
      const bool padding = code == kPadding;
      if (!padding) {
        float dy_t[kOwn];
        read<kOwn>(dy_s + t * N + at.own, dy_t);
#pragma unroll
        for (int i = 0; i < kSummed; i += 4) {
          float r_t[4];
          read<4>(r_s + keys + Place::along(i), r_t);
#pragma unroll
          for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int j = 0; j < kOwn; ++j) x[i + m][j] += r_t[m] * dy_t[j];
        }
      }
      if ((begin + t) % kAnchor == 0) {
        float* copy = copies + static_cast<int64_t>((begin + t) / kAnchor) * (N * N);
#pragma unroll
        for (int i = 0; i < kSummed; ++i) write<kOwn>(copy + Place::along(i) * N, x[i]);
      }
      if (padding) {
        if (at.lane == 0)
#pragma unroll
          for (int j = 0; j < kOwn; ++j) store(grad.dv + place + j, 0.0f);
        continue;
      }
      float h[kOwn] = {}, dv[kOwn] = {}, v_t[kOwn], sa_t[kOwn], dk[kSummed], db[kSummed];
      read<kOwn>(v_s + t * N + at.own, v_t);
      read<kOwn>(sa_s + t * N + at.own, sa_t);
#pragma unroll
      for (int i = 0; i < kSummed; i += 4) {
        float b_t[4], k_t[4];
        read<4>(b_s + keys + Place::along(i), b_t);
        read<4>(k_s + keys + Place::along(i), k_t);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          dk[i + m] = db[i + m] = 0;
#pragma unroll
          for (int j = 0; j < kOwn; ++j) {
            h[j] += b_t[m] * x[i + m][j];
            dv[j] += k_t[m] * x[i + m][j];
            dk[i + m] += x[i + m][j] * v_t[j];
            db[i + m] += x[i + m][j] * sa_t[j];
          }
        }
      }
      sum_for_all(h);
#pragma unroll
      for (int i = 0; i < kSummed; i += 4) {
        float w_t[4], a_t[4];
        read<4>(w_s + keys + Place::along(i), w_t);
        read<4>(a_s + keys + Place::along(i), a_t);
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
          for (int j = 0; j < kOwn; ++j)
            x[i + m][j] = w_t[m] * x[i + m][j] + a_t[m] * h[j];
      }
      if (code == kReset) clear(x);
      if (at.lane == 0) write<kOwn>(scratch.h + place, h);
      const float total = share_sums<kOwn, 8>(dv, at.lane);
      if (at.lane % (8 / kOwn) == 0) store(grad.dv + place + at.lane / (8 / kOwn), total);
#pragma unroll
      for (int i = 0; i < kSummed; ++i)  // the lower half of the warp gets dk, the upper one db
        dk[i] = (kind ? db[i] : dk[i]) + shuffle_xor(kind ? dk[i] : db[i], 16, 32);
      halve<kSummed>(dk, 8, at.thread & 8);
      float* parts = parts_s + ((t * kWarps + at.warp) * 2 + kind) * N + at.summed;
      constexpr int kTogether = kPart < 4 ? kPart : 4;
#pragma unroll
      for (int i = 0; i < kPart; i += kTogether) put<kTogether>(parts + Place::along(part + i), dk + i);
    }
    sync_threads();
    for (int vector = at.thread; vector < count * N / 4; vector += kThreads) {
      const int t = vector / (N / 4), key = vector % (N / 4) * 4;
      const int64_t place = tokens.at(begin + t) + key;
      const bool padding = code_s[t] == kPadding;
      float dk[4] = {}, db[4] = {}, k_t[4], b_t[4], both[4];
      for (int warp = 0; warp < kWarps && !padding; ++warp) {
        float part_dk[4], part_db[4];
        read<4>(parts_s + (t * kWarps + warp) * 2 * N + key, part_dk);
        read<4>(parts_s + ((t * kWarps + warp) * 2 + 1) * N + key, part_db);
#pragma unroll
        for (int m = 0; m < 4; ++m) dk[m] += part_dk[m], db[m] += part_db[m];
      }
      read<4>(k_s + vector * 4, k_t);
      read<4>(b_s + vector * 4, b_t);
#pragma unroll
      for (int m = 0; m < 4; ++m) both[m] = k_t[m] * dk[m] + b_t[m] * db[m];
      store_global4(grad.dk + place, Float4{dk[0], dk[1], dk[2], dk[3]});
      store_global4(grad.db + place, Float4{db[0], db[1], db[2], db[3]});
      write<4>(grad.dlog_w + place, both);
    }
  }
#pragma unroll
  for (int i = 0; i < kSummed; ++i)
    write<kOwn>(grad.dstate + unit * N * N + cells + Place::along(i) * N, x[i]);
}

// The state again, forwards; kOwn keys per thread. After the reverse scan.
template <int kOwn>
TRANSMUTE_GLOBAL void TRANSMUTE_BOUNDS(Block<kOwn>::kThreads)
    again_kernel(Inputs in, const float* sa, const T* dy, Gradients grad, Scratch scratch) {
  using Place = Block<kOwn>;
  constexpr int kSummed = Place::kSummed, kThreads = Place::kThreads, kChunk = N > 64 ? 4 : 8;
  TRANSMUTE_SHARED(float, r_s, kChunk * N);
  TRANSMUTE_SHARED(float, w_s, kChunk * N);
  TRANSMUTE_SHARED(float, k_s, kChunk * N);
  TRANSMUTE_SHARED(float, v_s, kChunk * N);
  TRANSMUTE_SHARED(float, a_s, kChunk * N);
  TRANSMUTE_SHARED(float, b_s, kChunk * N);
  TRANSMUTE_SHARED(float, sa_s, kChunk * N);
  TRANSMUTE_SHARED(float, dy_s, kChunk * N);
  TRANSMUTE_SHARED(float, h_s, kChunk * N);
  TRANSMUTE_SHARED(float, both_s, kChunk * N);
  TRANSMUTE_SHARED(int, code_s, kChunk);
  const Place at;
  const int64_t unit = block_index(), cells = at.own * N + at.summed;
  const Tokens<N> tokens(in.shape, in.codes, unit);
  const float* const copies = scratch.anchors + unit * anchors(tokens.count) * N * N + cells;
  // Of eight lanes, the first four end up with dr, the others with da, of this key.
  const bool is_da = at.lane & 4;
  const int mine = at.own + at.lane % 4 / (4 / kOwn);
  const bool writes = at.lane % (4 / kOwn) == 0;
  T* const out = is_da ? grad.da : grad.dr;

  float x[kOwn][kSummed];  // keys, values
#pragma unroll
  for (int j = 0; j < kOwn; ++j)
#pragma unroll
    for (int i = 0; i < kSummed; i += 4)
      read<4>(in.state + unit * N * N + cells + j * N + Place::along(i), x[j] + i);
  float decay = 0;

  Stage<T, kThreads, kChunk, N> r, k, v, a, b, dy_stage;
  Stage<float, kThreads, kChunk, N> w, sa_stage, h, both;
  Codes<kChunk> codes;
  const auto fetch = [&](int begin) {
    r.fetch(in.r, tokens, begin, at.thread);
    w.fetch(in.log_w, tokens, begin, at.thread);
    k.fetch(in.k, tokens, begin, at.thread);
    v.fetch(in.v, tokens, begin, at.thread);
    a.fetch(in.a, tokens, begin, at.thread);
    b.fetch(in.b, tokens, begin, at.thread);
    sa_stage.fetch(sa, tokens, begin, at.thread);
    dy_stage.fetch(dy, tokens, begin, at.thread);
    h.fetch(scratch.h, tokens, begin, at.thread);
    both.fetch(grad.dlog_w, tokens, begin, at.thread);
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
    sa_stage.put(sa_s, at.thread);
    dy_stage.put(dy_s, at.thread);
    h.put(h_s, at.thread);
    both.put(both_s, at.thread);
    codes.put(code_s, at.thread);
    sync_threads();
    fetch(begin + kChunk);
    const int count = smaller(kChunk, tokens.count - begin);
    for (int t = 0; t < count; ++t) {
      const int code = code_s[t], values = t * N + at.summed;
      const int64_t place = tokens.at(begin + t) + mine;
      const bool anchored = (begin + t) % kAnchor == 0;
      if (code == kReset) clear(x);
      float fresh = 0;  // the sum over values of S_{t-1} G_t
      if (anchored) {
        const float* copy = copies + static_cast<int64_t>((begin + t) / kAnchor) * (N * N);
        float product[2 * kOwn];
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          float total = 0;
#pragma unroll
          for (int i = 0; i < kSummed; i += 4) {
            float g[4];
            read<4>(copy + j * N + Place::along(i), g);
#pragma unroll
            for (int m = 0; m < 4; ++m) total += g[m] * x[j][i + m];
          }
          product[j] = product[kOwn + j] = total;  // wanted in both halves of the eight lanes
        }
        fresh = share_sums<2 * kOwn, 8>(product, at.lane);
      }
      if (code == kPadding) {  // like a token that does nothing, so that the recurrence goes on
        if (anchored) decay = fresh;
        if (writes) {
          store(out + place, 0.0f);
          if (!is_da) grad.dlog_w[place] = 0;
        }
        continue;
      }
      float w_t[kOwn], k_t[kOwn], b_t[kOwn], sum[2 * kOwn] = {};
      read<kOwn>(w_s + t * N + at.own, w_t);
      read<kOwn>(k_s + t * N + at.own, k_t);
      read<kOwn>(b_s + t * N + at.own, b_t);
#pragma unroll
      for (int i = 0; i < kSummed; i += 4) {
        float h_t[4], v_t[4], sa_t[4], dy_t[4];
        read<4>(h_s + values + Place::along(i), h_t);
        read<4>(sa_s + values + Place::along(i), sa_t);
        read<4>(v_s + values + Place::along(i), v_t);
        read<4>(dy_s + values + Place::along(i), dy_t);
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            sum[kOwn + j] += x[j][i + m] * h_t[m];
            x[j][i + m] = w_t[j] * x[j][i + m] + k_t[j] * v_t[m] + b_t[j] * sa_t[m];
            sum[j] += x[j][i + m] * dy_t[m];
          }
        }
      }
      const float total = share_sums<2 * kOwn, 8>(sum, at.lane), other = shuffle_xor(total, 4, 32);
      const float dr = is_da ? other : total, da = is_da ? total : other, w_mine = w_s[t * N + mine];
      if (anchored) decay = fresh * w_mine;
      else decay -= a_s[t * N + mine] * da;
      if (code == kReset || w_mine == 0) decay = 0;  // what is forgotten has no gradient, rounding or not
      if (writes) {
        store(out + place, total);
        if (!is_da) grad.dlog_w[place] = decay;
      }
      decay += both_s[t * N + mine] - r_s[t * N + mine] * dr;
    }
  }
}

}  // namespace
