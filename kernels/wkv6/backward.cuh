// WKV-6: the kernels of the backward pass. The formulas are in cuda.cu.

#pragma once

#include "state.cuh"

namespace {

// A thread's copy of its cells at a token: groups of four, the block's threads side by side.
template <class At>
TRANSMUTE_DEVICE float* anchor(const Scratch& scratch, const At& at, int64_t tokens, int64_t token) {
  constexpr int64_t cells = kHeld * At::kSummed * At::kThreads;
  const int64_t anchors = (tokens + kAnchor - 1) / kAnchor, head = at.unit * At::kSlabs + at.slab;
  return scratch.anchors + (head * anchors + token / kAnchor) * cells + at.thread * 4;
}

template <class At>
TRANSMUTE_DEVICE void write_anchor(const float (&x)[kHeld][At::kSummed], float* copy) {
#pragma unroll
  for (int j = 0; j < kHeld; ++j)
#pragma unroll
    for (int i = 0; i < At::kSummed; i += 4, copy += At::kThreads * 4)
      store_global4(copy, Float4{x[j][i], x[j][i + 1], x[j][i + 2], x[j][i + 3]});
}

// The sums over the values of the copy times x; a lane gets that of the key it keeps.
template <class At>
TRANSMUTE_DEVICE float times_anchor(const float (&x)[kHeld][At::kSummed], const float* copy, int lane) {
  float product[kHeld] = {};
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
#pragma unroll
    for (int i = 0; i < At::kSummed; i += 4, copy += At::kThreads * 4) {
      const Float4 g = load4(copy);
      product[j] += x[j][i] * g.x + x[j][i + 1] * g.y + x[j][i + 2] * g.z + x[j][i + 3] * g.w;
    }
  }
  return share_sums<kHeld, 8>(product, lane);
}

// A block computes a slab of keys of one (row, head).
template <class T, int N, int kWarps, bool kBonus>
TRANSMUTE_GLOBAL void TRANSMUTE_BOUNDS(32 * kWarps)
    reverse_kernel(Inputs<T> in, const T* dy, const float* dstate_out, Gradients<T> grad, Scratch scratch) {
  using At = Place<N, kWarps>;
  constexpr int kSummed = At::kSummed, kChunk = At::kChunk, kSlab = At::kSlab, kThreads = At::kThreads;
  constexpr int kPart = kSummed / 4;  // sums over keys that a lane ends up with
  TRANSMUTE_SHARED(float, r_s, kChunk * kSlab);
  TRANSMUTE_SHARED(float, w_s, kChunk * kSlab);
  TRANSMUTE_SHARED(float, k_s, kChunk * kSlab);
  TRANSMUTE_SHARED(float, v_s, kChunk * N);
  TRANSMUTE_SHARED(float, dy_s, kChunk * N);
  TRANSMUTE_SHARED(float, dv_s, kChunk * kWarps * N);
  TRANSMUTE_SHARED(int, code_s, kChunk);
  const At at;
  const Tokens<N> tokens(in.shape, in.codes, at.unit);
  const int64_t own = at.slab * kSlab, cells = at.unit * N * N + (own + at.own) * N + at.summed;
  const int part = at.thread % 32 / 8 * kPart;

  float x[kHeld][kSummed], u[kHeld], u_kept = 0;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
#pragma unroll
    for (int i = 0; i < kSummed; i += 4) read<4>(dstate_out + cells + j * N + At::along(i), x[j] + i);
    u[j] = kBonus ? in.u[at.unit % in.shape.heads * N + own + at.own + j] : 0;
  }
  if (kBonus) u_kept = in.u[at.unit % in.shape.heads * N + own + at.kept];

  Stage<T, kThreads, kChunk, kSlab> r, k;
  Stage<float, kThreads, kChunk, kSlab> w;
  Stage<T, kThreads, kChunk, N> v, dy_stage;
  Codes<kChunk> codes;
  const auto fetch = [&](int64_t begin) {
    r.fetch(in.r + own, tokens, begin, at.thread);
    w.fetch(in.log_w + own, tokens, begin, at.thread);
    k.fetch(in.k + own, tokens, begin, at.thread);
    v.fetch(in.v, tokens, begin, at.thread);
    dy_stage.fetch(dy, tokens, begin, at.thread);
    codes.fetch(tokens, begin, at.thread);
  };
  const int64_t last = (tokens.count - 1) / kChunk * kChunk;
  fetch(last);
  for (int64_t begin = last; begin >= 0; begin -= kChunk) {
    r.put(r_s, at.thread);
    w.template put<true>(w_s, at.thread);
    k.put(k_s, at.thread);
    v.put(v_s, at.thread);
    dy_stage.put(dy_s, at.thread);
    codes.put(code_s, at.thread);
    sync_threads();
    if (begin > 0) fetch(begin - kChunk);
    const int count = static_cast<int>(smaller(kChunk, tokens.count - begin));
    int64_t place = tokens.at(begin + count - 1) + own + at.kept;
    for (int t = count - 1; t >= 0; --t, place -= tokens.stride) {
      const int code = code_s[t];
      float* dv_part = dv_s + (t * kWarps + at.warp) * N + at.summed + At::along(part);
      const bool anchored = t == 0 && begin % kAnchor == 0;  // chunks divide the anchors' spacing
      if (kBonus && anchored) write_anchor<At>(x, anchor(scratch, at, tokens.count, begin + t));
      if (code == kPadding) {
        if (at.lane % 2 == 0) {
          store(grad.dk + place, 0.0f);
          grad.dlog_w[place] = 0;
        }
#pragma unroll
        for (int i = 0; i < kPart; ++i) dv_part[i] = 0;
      } else {
        float r_t[kHeld], w_t[kHeld], k_t[kHeld], sum[kHeld] = {}, dv[kSummed] = {}, v_dy = 0, bonus = 0;
        read<4>(r_s + t * kSlab + at.own, r_t);
        read<4>(w_s + t * kSlab + at.own, w_t);
        read<4>(k_s + t * kSlab + at.own, k_t);
#pragma unroll
        for (int j = 0; j < kHeld; ++j) bonus += r_t[j] * u[j] * k_t[j];
#pragma unroll
        for (int first = 0; first < kSummed; first += 4) {
          const int value = at.summed + At::along(first);
          float v_t[4], dy_t[4];
          read<4>(v_s + t * N + value, v_t);
          read<4>(dy_s + t * N + value, dy_t);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& dv_i = dv[first + i];
            if (kBonus) dv_i += bonus * dy_t[i];
            if (kBonus) v_dy += v_t[i] * dy_t[i];
#pragma unroll
            for (int j = 0; j < kHeld; ++j) {
              float& cell = x[j][first + i];
              if (!kBonus) cell += r_t[j] * dy_t[i];
              sum[j] += cell * v_t[i];
              dv_i += k_t[j] * cell;
              cell *= w_t[j];
              if (kBonus) cell += r_t[j] * dy_t[i];
            }
          }
        }
        if (kBonus) v_dy = share_sums<1, 8>(&v_dy, at.lane);
        halve<kSummed>(dv, 16, at.thread & 16);
        halve<kSummed / 2>(dv, 8, at.thread & 8);
#pragma unroll
        for (int i = 0; i < kPart; ++i) dv_part[i] = dv[i];
        const float dk = share_sums<kHeld, 8>(sum, at.lane);
        if (at.lane % 2 == 0) {
          grad.dlog_w[place] = k_s[t * kSlab + at.kept] * dk;
          store(grad.dk + place, kBonus ? dk + r_s[t * kSlab + at.kept] * u_kept * v_dy : dk);
        }
        if (code == kReset) clear(x);
      }
      if (!kBonus && anchored) write_anchor<At>(x, anchor(scratch, at, tokens.count, begin + t));
    }
    sync_threads();
    for (int vector = at.thread; vector < count * N / 4; vector += At::kThreads) {
      const int t = vector / (N / 4), value = vector % (N / 4) * 4;
      Float4 total = load4(dv_s + t * kWarps * N + value);
      for (int warp = 1; warp < kWarps; ++warp)
        total = plus(total, load4(dv_s + (t * kWarps + warp) * N + value));
      const int64_t place = tokens.at(begin + t) + value;
      if (At::kSlabs == 1) store_global4(grad.dv + place, total);
      else store_global4(scratch.dv + at.slab * in.shape.batch * tokens.count * tokens.stride + place, total);
    }
  }
#pragma unroll
  for (int j = 0; j < kHeld; ++j)
#pragma unroll
    for (int i = 0; i < kSummed; i += 4)
      store_global4(grad.dstate + cells + j * N + At::along(i),
                    Float4{x[j][i], x[j][i + 1], x[j][i + 2], x[j][i + 3]});
}

// A block computes a slab of keys of one (row, head), after the reverse scan.
template <class T, int N, int kWarps, bool kBonus>
TRANSMUTE_GLOBAL void TRANSMUTE_BOUNDS(32 * kWarps)
    again_kernel(Inputs<T> in, const T* dy, Gradients<T> grad, Scratch scratch) {
  using At = Place<N, kWarps>;
  constexpr int kSummed = At::kSummed, kChunk = At::kChunk, kSlab = At::kSlab, kThreads = At::kThreads;
  TRANSMUTE_SHARED(float, r_s, kChunk * kSlab);
  TRANSMUTE_SHARED(float, w_s, kChunk * kSlab);
  TRANSMUTE_SHARED(float, k_s, kChunk * kSlab);
  TRANSMUTE_SHARED(float, k_dk_s, kChunk * kSlab);
  TRANSMUTE_SHARED(float, v_s, kChunk * N);
  TRANSMUTE_SHARED(float, dy_s, kChunk * N);
  TRANSMUTE_SHARED(int, code_s, kChunk);
  const At at;
  const Tokens<N> tokens(in.shape, in.codes, at.unit);
  const int64_t own = at.slab * kSlab, cells = at.unit * N * N + (own + at.own) * N + at.summed;

  float x[kHeld][kSummed];
#pragma unroll
  for (int j = 0; j < kHeld; ++j)
#pragma unroll
    for (int i = 0; i < kSummed; i += 4) read<4>(in.state + cells + j * N + At::along(i), x[j] + i);
  const float u = kBonus ? in.u[at.unit % in.shape.heads * N + own + at.kept] : 0;
  float decay = 0, du = 0, du_rest = 0;

  Stage<T, kThreads, kChunk, kSlab> r, k;
  Stage<float, kThreads, kChunk, kSlab> w, k_dk;
  Stage<T, kThreads, kChunk, N> v, dy_stage;
  Codes<kChunk> codes;
  const auto fetch = [&](int64_t begin) {
    r.fetch(in.r + own, tokens, begin, at.thread);
    w.fetch(in.log_w + own, tokens, begin, at.thread);
    k.fetch(in.k + own, tokens, begin, at.thread);
    k_dk.fetch(grad.dlog_w + own, tokens, begin, at.thread);
    v.fetch(in.v, tokens, begin, at.thread);
    dy_stage.fetch(dy, tokens, begin, at.thread);
    codes.fetch(tokens, begin, at.thread);
  };
  fetch(0);
  for (int64_t begin = 0; begin < tokens.count; begin += kChunk) {
    sync_threads();
    r.put(r_s, at.thread);
    w.template put<true>(w_s, at.thread);
    k.put(k_s, at.thread);
    k_dk.put(k_dk_s, at.thread);
    v.put(v_s, at.thread);
    dy_stage.put(dy_s, at.thread);
    codes.put(code_s, at.thread);
    sync_threads();
    fetch(begin + kChunk);
    const int count = static_cast<int>(smaller(kChunk, tokens.count - begin));
    int64_t place = tokens.at(begin) + own + at.kept;
    for (int t = 0; t < count; ++t, place += tokens.stride) {
      const int code = code_s[t];
      const int mine = t * kSlab + at.kept;
      const bool anchored = t == 0 && begin % kAnchor == 0;  // chunks divide the anchors' spacing
      float fresh = 0;
      if (anchored) fresh = times_anchor<At>(x, anchor(scratch, at, tokens.count, begin + t), at.lane);
      if (code == kPadding) {
        if (anchored) decay = fresh;
        if (at.lane % 2 == 0) {
          store(grad.dr + place, 0.0f);
          grad.dlog_w[place] = 0;
        }
        continue;
      }
      if (code == kReset) clear(x);
      float w_t[kHeld], k_t[kHeld], sum[kHeld] = {}, v_dy = 0;
      read<4>(w_s + t * kSlab + at.own, w_t);
      read<4>(k_s + t * kSlab + at.own, k_t);
#pragma unroll
      for (int first = 0; first < kSummed; first += 4) {
        const int value = at.summed + At::along(first);
        float v_t[4], dy_t[4];
        read<4>(v_s + t * N + value, v_t);
        read<4>(dy_s + t * N + value, dy_t);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (kBonus) v_dy += v_t[i] * dy_t[i];
#pragma unroll
          for (int j = 0; j < kHeld; ++j) {
            float& cell = x[j][first + i];
            if (kBonus) sum[j] += cell * dy_t[i];
            cell = cell * w_t[j] + k_t[j] * v_t[i];
            if (!kBonus) sum[j] += cell * dy_t[i];
          }
        }
      }
      if (kBonus) v_dy = share_sums<1, 8>(&v_dy, at.lane);
      const float r_mine = r_s[mine], k_mine = k_s[mine], w_mine = w_s[mine];
      const float dr = share_sums<kHeld, 8>(sum, at.lane);
      if (anchored) decay = kBonus ? fresh * w_mine : fresh;
      else if (kBonus) decay -= r_mine * dr;
      if (code == kReset || w_mine == 0) decay = 0;  // what is forgotten has no gradient, rounding or not
      if (at.lane % 2 == 0) {
        grad.dlog_w[place] = decay;
        store(grad.dr + place, kBonus ? dr + k_mine * u * v_dy : dr);
      }
      decay += k_dk_s[mine] - (kBonus ? 0 : r_mine * dr);
      if (kBonus) {  // a long sum: what rounding takes from it is added to the next term
        const float term = r_mine * k_mine * v_dy - du_rest, total = du + term;
        du_rest = (total - du) - term;
        du = total;
      }
    }
  }
  if (kBonus && at.lane % 2 == 0) scratch.du[at.unit * N + own + at.kept] = du;
}

// dv = the sum over the slabs, four numbers per thread.
template <class T>
TRANSMUTE_GLOBAL void TRANSMUTE_BOUNDS(256)
    add_slabs_kernel(const float* parts, int64_t slabs, int64_t size, T* dv) {
  const int64_t i = (block_index() * 256 + thread_index()) * 4;
  if (i >= size) return;
  Float4 total = load4(parts + i);
  for (int64_t slab = 1; slab < slabs; ++slab) total = plus(total, load4(parts + slab * size + i));
  store_global4(dv + i, total);
}

// du = the sum over the rows.
TRANSMUTE_GLOBAL void TRANSMUTE_BOUNDS(256)
    add_rows_kernel(const float* parts, int64_t rows, int64_t size, float* du) {
  const int64_t i = block_index() * 256 + thread_index();
  if (i >= size) return;
  double total = 0;
  for (int64_t row = 0; row < rows; ++row) total += parts[row * size + i];
  du[i] = static_cast<float>(total);
}

}  // namespace
