// WKV-7 on the CPU: forward and backward of one (row, head) at a time, threaded over rows and heads.
//
// Layout: r, log_w, k, v, a, b, y, sa and their gradients are float [B,T,H,N]; states are float
// [B,H,N_k,N_v]; codes are int8 [B,T] (0 normal, 1 reset the state first, 2 padding) or null.
//
// Forward   S_t = diag(w_t) S_{t-1} + b_t sa_t^T + k_t v_t^T,  sa_t = S_{t-1}^T a_t (saved),  y_t = S_t^T r_t
// Backward  three scans, no division and no saved state; G_t = dL/dS_t, h_t = dL/dsa_t = G_t^T b_t
//   R  reverse, lanes over values: G_t = diag(w_{t+1}) G_{t+1} + a_{t+1} h_{t+1}^T + r_t dy_t^T
//        dv = G^T k,  h = G^T b
//   K  reverse, lanes over keys, h known: the same G
//        dk = G v,  db = G sa
//   F  forward, lanes over keys: S again, from sa
//        dr = S dy,  da_t = S_{t-1} h_t,  and the gradient of the log decay
//        dlog_w_t = rowsum(w_t S_{t-1} G_t);  dlog_w_{t+1} = (dlog_w + b db + k dk - r dr)_t - (a da)_{t+1}
// The recurrence for dlog_w starts afresh at every anchor token, where scan K leaves a copy of G: rounding
// errors cannot pile up over a long row. All scans share one inner step: decay, two rank-1 updates, two
// products. One thread computes a (row, head) in a fixed order: results do not depend on the thread count.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace {

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

template <int N>
constexpr int lanes() { return std::min(N, kTileVectors * kWidth); }

// One token on a tile X [N rows][lanes]:  X = X * decay + p (x) P + q (x) Q,  then
// E = sum_rows e X,  F = sum_rows f X.
// p, q, e, f hold one number per row; P, Q, E, F one per lane; the decay one per lane or per row.
template <int N, bool kDecayPerLane>
inline void step(float* __restrict__ X, const float* __restrict__ decay, const float* __restrict__ p,
                 const float* __restrict__ P, const float* __restrict__ q, const float* __restrict__ Q,
                 const float* __restrict__ e, float* E, const float* __restrict__ f, float* F) {
  constexpr int L = lanes<N>(), V = L / kWidth;
  Vec P_[V], Q_[V], E_[V], F_[V], D_[V];
  for (int j = 0; j < V; ++j) {
    P_[j] = load(P + j * kWidth);
    Q_[j] = load(Q + j * kWidth);
    E_[j] = F_[j] = Vec{};
    D_[j] = kDecayPerLane ? load(decay + j * kWidth) : Vec{};
  }
  for (int i = 0; i < N; ++i) {
    const Vec zero = {};
    const Vec p_i = p[i] - zero, q_i = q[i] - zero, e_i = e[i] - zero, f_i = f[i] - zero;
    for (int j = 0; j < V; ++j) {
      float* cell = X + i * L + j * kWidth;
      Vec x = load(cell) * (kDecayPerLane ? D_[j] : decay[i] - zero);
      x += p_i * P_[j];
      x += q_i * Q_[j];
      store(cell, x);
      E_[j] += e_i * x;
      F_[j] += f_i * x;
    }
  }
  for (int j = 0; j < V; ++j) {
    store(E + j * kWidth, E_[j]);
    store(F + j * kWidth, F_[j]);
  }
}

struct Inputs {
  int64_t batch, tokens, heads;
  const float *r, *log_w, *k, *v, *a, *b, *state, *sa;
  const int8_t* codes;
};

struct Gradients {
  const float *dy, *dstate_out;
  float *dr, *dlog_w, *dk, *dv, *da, *db, *dstate;
};

// A thread's own memory, 64-byte aligned; parallel() turns a failed allocation into a status.
struct Scratch {
  float* data;
  explicit Scratch(size_t floats) {
    data = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
    if (data == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
};

alignas(64) const float kZeros[128] = {};
struct Ones {
  alignas(64) float data[128];
  Ones() { std::fill(data, data + 128, 1.0f); }
};
const Ones kOnes;

// The real tokens of one row: float offsets into [B,T,H,N] tensors, and whether the state is reset first.
struct Row {
  std::vector<int64_t> offset, padding;
  std::vector<char> reset;
  Row(const Inputs& in, int64_t row, int64_t head, int N) {
    offset.reserve(in.tokens);
    reset.reserve(in.tokens);
    for (int64_t t = 0; t < in.tokens; ++t) {
      const int8_t code = in.codes == nullptr ? 0 : in.codes[row * in.tokens + t];
      const int64_t at = ((row * in.tokens + t) * in.heads + head) * N;
      (code == 2 ? padding : offset).push_back(at);
      if (code != 2) reset.push_back(code == 1);
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

// Tile <-> state [N_k,N_v]: rows over keys and lanes over values, or (lanes_are_keys) the other way round.
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

template <int N>
void forward_head(const Inputs& in, int64_t unit, float* y, float* state_out, float* sa_out) {
  constexpr int L = lanes<N>();
  const Row row(in, unit / in.heads, unit % in.heads, N);
  alignas(64) float X[N * L], w[N], sa[L];
  const int64_t n = row.size();
  for (int lane = 0; lane < N; lane += L) {
    read_tile<N>(X, in.state + unit * N * N, lane, false);
    if (n > 0)  // sa of the first token: a step that changes nothing
      step<N, false>(X, kOnes.data, kZeros, kZeros, kZeros, kZeros, kZeros, w, in.a + row.offset[0], sa);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = row.offset[i];
      if (row.reset[i]) {
        std::memset(X, 0, sizeof X);
        std::memset(sa, 0, sizeof sa);
      }
      std::memcpy(sa_out + at + lane, sa, sizeof sa);
      exponential_row<N>(in.log_w + at, w);
      prefetch<N>(row, i + 2, {in.r, in.log_w, in.k, in.v, in.a, in.b});
      const float* next_a = i + 1 < n ? in.a + row.offset[i + 1] : kZeros;
      step<N, false>(X, w, in.b + at, sa_out + at + lane, in.k + at, in.v + at + lane, in.r + at,
                     y + at + lane, next_a, sa);
    }
    write_tile<N>(X, state_out + unit * N * N, lane);
  }
  fill_padding<N>(row, {y, sa_out});
}

// Backward of one (row, head); its scratch is h and w [tokens,N] and the anchors.
template <int N>
struct Backward {
  static constexpr int L = lanes<N>();
  const Inputs& in;
  const Gradients& out;
  int64_t unit;
  Row row;
  int64_t spacing;
  float *w, *h, *anchors;
  alignas(64) float X[N * L];

  static int64_t anchor_spacing(int64_t tokens) { return std::max<int64_t>(8, (tokens + 511) / 512); }
  static size_t scratch_floats(int64_t tokens) {
    const int64_t spacing = anchor_spacing(tokens);
    return 2 * tokens * N + (tokens + spacing - 1) / spacing * N * L;
  }

  Backward(const Inputs& inputs, const Gradients& gradients, int64_t unit_, float* scratch)
      : in(inputs), out(gradients), unit(unit_), row(inputs, unit_ / inputs.heads, unit_ % inputs.heads, N),
        spacing(anchor_spacing(inputs.tokens)), w(scratch), h(scratch + inputs.tokens * N),
        anchors(scratch + 2 * inputs.tokens * N) {}

  // What carries G from real token i + 1 back to token i; nothing does across a reset or past the last token.
  struct Carry { const float *w, *a, *h; };
  Carry carry(int64_t i, bool lanes_are_keys) {
    if (i + 1 < row.size() && !row.reset[i + 1])
      return {w + (i + 1) * N, in.a + row.offset[i + 1], h + (i + 1) * N};
    if (i + 1 < row.size()) std::memset(X, 0, sizeof X);
    else read_tile<N>(X, out.dstate_out + unit * N * N, tile, lanes_are_keys);
    return {kOnes.data, kZeros, kZeros};
  }
  int tile = 0;

  void scan_values() {
    const int64_t n = row.size();
    for (int64_t i = 0; i < n; ++i) exponential_row<N>(in.log_w + row.offset[i], w + i * N);
    alignas(64) float unused[L];
    for (tile = 0; tile < N; tile += L) {
      for (int64_t i = n - 1; i >= 0; --i) {
        const int64_t at = row.offset[i];
        const Carry c = carry(i, false);
        prefetch<N>(row, i - 2, {in.r, out.dy, in.k, in.b, in.a, out.dv});
        const float* carried_h = c.h == kZeros ? kZeros : c.h + tile;
        step<N, false>(X, c.w, c.a, carried_h, in.r + at, out.dy + at + tile, in.k + at,
                       out.dv + at + tile, in.b + at, h + i * N + tile);
      }
      const Carry c = carry(-1, false);
      const float* carried_h = c.h == kZeros ? kZeros : c.h + tile;
      step<N, false>(X, c.w, c.a, carried_h, kZeros, kZeros, kZeros, unused, kZeros, unused);
      write_tile<N>(X, out.dstate + unit * N * N, tile);
    }
  }

  void scan_keys_reverse() {
    for (int64_t i = row.size() - 1; i >= 0; --i) {
      const int64_t at = row.offset[i];
      const Carry c = carry(i, true);
      prefetch<N>(row, i - 2, {out.dy, in.r, in.v, in.sa, in.a, out.dk, out.db});
      const bool carried = c.h != kZeros;
      step<N, true>(X, carried ? c.w + tile : c.w, c.h, carried ? c.a + tile : c.a, out.dy + at,
                    in.r + at + tile, in.v + at, out.dk + at + tile, in.sa + at, out.db + at + tile);
      if (i % spacing == 0) std::memcpy(anchors + i / spacing * N * L, X, sizeof X);
    }
  }

  // rowsum(w_t S_{t-1} G_t) for the tile's keys, with S_{t-1} in X and G_t in the anchor.
  void anchor_decay(int64_t i, double* decay) {
    const float* G = anchors + i / spacing * N * L;
    Vec sum[L / kWidth] = {};
    for (int row_ = 0; row_ < N; ++row_)
      for (int j = 0; j < L / kWidth; ++j)
        sum[j] += load(X + row_ * L + j * kWidth) * load(G + row_ * L + j * kWidth);
    for (int j = 0; j < L; ++j)
      decay[j] = static_cast<double>(sum[j / kWidth][j % kWidth]) * w[i * N + tile + j];
  }

  void scan_keys_forward() {
    const int64_t n = row.size();
    alignas(64) float da[L];
    double decay[L] = {};
    read_tile<N>(X, in.state + unit * N * N, tile, true);
    if (n > 0) step<N, true>(X, kOnes.data, kZeros, kZeros, kZeros, kZeros, kZeros, da, h, da);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = row.offset[i] + tile;
      if (row.reset[i]) {
        std::memset(X, 0, sizeof X);
        std::memset(da, 0, sizeof da);
        std::fill(decay, decay + L, 0.0);
      } else if (i % spacing == 0) {
        anchor_decay(i, decay);
      } else {
        for (int j = 0; j < L; ++j) decay[j] -= static_cast<double>(in.a[at + j]) * da[j];
      }
      prefetch<N>(row, i + 2, {in.sa, in.b, in.v, in.k, out.dy, in.a, in.r, out.dk, out.db, out.da, out.dr});
      std::memcpy(out.da + at, da, sizeof da);
      const float* next_h = i + 1 < n ? h + (i + 1) * N : kZeros;
      step<N, true>(X, w + i * N + tile, in.sa + row.offset[i], in.b + at, in.v + row.offset[i], in.k + at,
                    out.dy + row.offset[i], out.dr + at, next_h, da);
      for (int j = 0; j < L; ++j) {
        out.dlog_w[at + j] = static_cast<float>(decay[j]);
        decay[j] += static_cast<double>(in.b[at + j]) * out.db[at + j] +
                    static_cast<double>(in.k[at + j]) * out.dk[at + j] -
                    static_cast<double>(in.r[at + j]) * out.dr[at + j];
      }
    }
  }

  void run() {
    scan_values();
    for (tile = 0; tile < N; tile += L) {
      scan_keys_reverse();
      scan_keys_forward();
    }
    fill_padding<N>(row, {out.dr, out.dlog_w, out.dk, out.dv, out.da, out.db});
  }
};

// Shares units 0..count-1 among threads; each thread calls make() once for its work(unit). 1 on failure.
template <class Make>
int parallel(int64_t count, int64_t threads, Make make) {
  std::atomic<int64_t> next{0};
  std::atomic<int> failed{0};
  auto body = [&] {
    try {
      auto work = make();
      for (int64_t unit = next++; unit < count; unit = next++) work(unit);
    } catch (const std::exception&) {
      failed = 1;
    }
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < std::min(threads, count); ++i) others.emplace_back(body);
  } catch (const std::exception&) {
    // No more threads to be had: those running, and this one, share the work.
  }
  body();
  for (std::thread& other : others) other.join();
  return failed;
}

// Starting a thread costs about as much as 100k state cells: one thread for each 500k at most.
int64_t useful_threads(const Inputs& in, int64_t N, int64_t threads) {
  const int64_t cells = in.batch * in.heads * in.tokens * N * N;
  return std::max<int64_t>(1, std::min(threads, cells / 500000));
}

template <int N>
int forward(const Inputs& in, float* y, float* state_out, float* sa, int64_t threads) {
  return parallel(in.batch * in.heads, useful_threads(in, N, threads), [&] {
    return [&](int64_t unit) { forward_head<N>(in, unit, y, state_out, sa); };
  });
}

template <int N>
int backward(const Inputs& in, const Gradients& out, int64_t threads) {
  return parallel(in.batch * in.heads, useful_threads(in, N, threads), [&] {
    auto scratch = std::make_shared<Scratch>(Backward<N>::scratch_floats(in.tokens));
    return [&in, &out, scratch](int64_t unit) { Backward<N>(in, out, unit, scratch->data).run(); };
  });
}

}  // namespace

// Both return 0, 1 when memory ran out, or 2 for a head size that was not compiled.
extern "C" int wkv7_forward(int64_t batch, int64_t tokens, int64_t heads, int64_t head_size, int64_t threads,
                            const float* r, const float* log_w, const float* k, const float* v,
                            const float* a, const float* b, const float* state, const int8_t* codes, float* y,
                            float* state_out, float* sa) {
  const Inputs in{batch, tokens, heads, r, log_w, k, v, a, b, state, nullptr, codes};
  if (head_size == 32) return forward<32>(in, y, state_out, sa, threads);
  if (head_size == 64) return forward<64>(in, y, state_out, sa, threads);
  return head_size == 128 ? forward<128>(in, y, state_out, sa, threads) : 2;
}

extern "C" int wkv7_backward(int64_t batch, int64_t tokens, int64_t heads, int64_t head_size, int64_t threads,
                             const float* r, const float* log_w, const float* k, const float* v,
                             const float* a, const float* b, const float* state, const int8_t* codes,
                             const float* sa, const float* dy, const float* dstate_out, float* dr,
                             float* dlog_w, float* dk, float* dv, float* da, float* db, float* dstate) {
  const Inputs in{batch, tokens, heads, r, log_w, k, v, a, b, state, sa, codes};
  const Gradients out{dy, dstate_out, dr, dlog_w, dk, dv, da, db, dstate};
  if (head_size == 32) return backward<32>(in, out, threads);
  if (head_size == 64) return backward<64>(in, out, threads);
  return head_size == 128 ? backward<128>(in, out, threads) : 2;
}
