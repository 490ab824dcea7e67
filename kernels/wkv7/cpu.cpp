// WKV-7 on the CPU: forward, backward and one decoding step, threaded over rows and heads.
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
// The recurrence for dlog_w starts afresh at every anchor token, where scan K leaves a copy of G. All scans
// share one inner step: decay, two rank-1 updates, two products.

#include "../recurrence.h"

namespace {

using namespace recurrence;

struct Inputs {
  Shape shape;
  const float *r, *log_w, *k, *v, *a, *b, *state;
  const int8_t* codes;
};

struct Gradients {
  float *dr, *dlog_w, *dk, *dv, *da, *db, *dstate;
};

// The values of one tile; `unit` counts tiles within heads within rows. sa_out may be null.
template <int N>
void forward_tile(const Inputs& in, int64_t unit, float* y, float* state_out, float* sa_out) {
  constexpr int L = lanes<N>();
  const int64_t head = unit / (N / L);
  const int lane = static_cast<int>(unit % (N / L)) * L;
  const Row row(in.shape, in.codes, head, N);
  alignas(64) float X[N * L], w[N], sa[L] = {};
  const int64_t n = row.size();
  read_tile<N>(X, in.state + head * N * N, lane, false);
  if (n > 0) read<N>(X, {in.a + row.offset[0], sa});
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = row.offset[i];
    if (row.reset[i]) {
      std::memset(X, 0, sizeof X);
      std::memset(sa, 0, sizeof sa);
    }
    if (sa_out != nullptr) std::memcpy(sa_out + at + lane, sa, sizeof sa);
    exponential_row<N>(in.log_w + at, w);
    prefetch<N>(row, i + 2, {in.r, in.log_w, in.k, in.v, in.a, in.b});
    const float* next_a = i + 1 < n ? in.a + row.offset[i + 1] : kZeros;
    step<N, Decay::kPerRow>(X, w, {{in.b + at, sa}, {in.k + at, in.v + at + lane}},
                            {{in.r + at, y + at + lane}, {next_a, sa}});
  }
  write_tile<N>(X, state_out + head * N * N, lane);
  if (lane > 0) return;
  fill_padding<N>(row, {y});
  if (sa_out != nullptr) fill_padding<N>(row, {sa_out});
}

// Backward of one (row, head); its scratch is h and w [tokens,N] and the anchors.
template <int N>
struct Backward {
  static constexpr int L = lanes<N>();
  const Inputs& in;
  const float *sa, *dy, *dstate_out;
  const Gradients& out;
  int64_t unit;
  Row row;
  int64_t spacing;
  float *w, *h, *anchors;
  int tile = 0;
  alignas(64) float X[N * L];

  static size_t scratch_floats(int64_t tokens) { return 2 * tokens * N + anchor_floats<N>(tokens); }

  Backward(const Inputs& inputs, const float* sa_, const float* dy_, const float* dstate_out_,
           const Gradients& gradients, int64_t unit_, float* scratch)
      : in(inputs), sa(sa_), dy(dy_), dstate_out(dstate_out_), out(gradients), unit(unit_),
        row(inputs.shape, inputs.codes, unit_, N), spacing(anchor_spacing(inputs.shape.tokens)), w(scratch),
        h(w + inputs.shape.tokens * N), anchors(h + inputs.shape.tokens * N) {}

  // What carries G from real token i + 1 back to token i; nothing does across a reset or past the last token.
  struct Carry { const float *w, *a, *h; };
  Carry carry(int64_t i, bool lanes_are_keys) {
    if (i + 1 < row.size() && !row.reset[i + 1])
      return {w + (i + 1) * N, in.a + row.offset[i + 1], h + (i + 1) * N};
    if (i + 1 < row.size()) std::memset(X, 0, sizeof X);
    else read_tile<N>(X, dstate_out + unit * N * N, tile, lanes_are_keys);
    return {kOnes.data, kZeros, kZeros};
  }

  void scan_values() {
    const int64_t n = row.size();
    for (int64_t i = 0; i < n; ++i) exponential_row<N>(in.log_w + row.offset[i], w + i * N);
    alignas(64) float unused[L];
    for (tile = 0; tile < N; tile += L) {
      for (int64_t i = n - 1; i >= -1; --i) {
        const Carry c = carry(i, false);
        const Update carried = {c.a, c.h == kZeros ? kZeros : c.h + tile};
        if (i < 0) {
          step<N, Decay::kPerRow>(X, c.w, {carried}, {{kZeros, unused}});
          break;
        }
        const int64_t at = row.offset[i];
        prefetch<N>(row, i - 2, {in.r, dy, in.k, in.b, in.a, out.dv});
        step<N, Decay::kPerRow>(X, c.w, {carried, {in.r + at, dy + at + tile}},
                                {{in.k + at, out.dv + at + tile}, {in.b + at, h + i * N + tile}});
      }
      write_tile<N>(X, out.dstate + unit * N * N, tile);
    }
  }

  void scan_keys_reverse() {
    for (int64_t i = row.size() - 1; i >= 0; --i) {
      const int64_t at = row.offset[i];
      const Carry c = carry(i, true);
      prefetch<N>(row, i - 2, {dy, in.r, in.v, sa, in.a, out.dk, out.db});
      const int first = c.h == kZeros ? 0 : tile;
      step<N, Decay::kPerLane>(X, c.w + first, {{c.h, c.a + first}, {dy + at, in.r + at + tile}},
                               {{in.v + at, out.dk + at + tile}, {sa + at, out.db + at + tile}});
      if (i % spacing == 0) std::memcpy(anchors + i / spacing * N * L, X, sizeof X);
    }
  }

  void scan_keys_forward() {
    const int64_t n = row.size();
    alignas(64) float da[L], fresh[L];
    double decay[L] = {};
    read_tile<N>(X, in.state + unit * N * N, tile, true);
    if (n > 0) read<N>(X, {h, da});
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = row.offset[i] + tile;
      const float* w_i = w + i * N + tile;
      if (row.reset[i]) {
        std::memset(X, 0, sizeof X);
        std::memset(da, 0, sizeof da);
        std::fill(decay, decay + L, 0.0);
      } else if (i % spacing == 0) {
        read_both<N>(X, anchors + i / spacing * N * L, fresh);
        for (int j = 0; j < L; ++j) decay[j] = static_cast<double>(fresh[j]) * w_i[j];
      } else {
        for (int j = 0; j < L; ++j) decay[j] -= static_cast<double>(in.a[at + j]) * da[j];
      }
      prefetch<N>(row, i + 2, {sa, in.b, in.v, in.k, dy, in.a, in.r, out.dk, out.db, out.da, out.dr});
      std::memcpy(out.da + at, da, sizeof da);
      const float* next_h = i + 1 < n ? h + (i + 1) * N : kZeros;
      step<N, Decay::kPerLane>(X, w_i, {{sa + row.offset[i], in.b + at}, {in.v + row.offset[i], in.k + at}},
                               {{dy + row.offset[i], out.dr + at}, {next_h, da}});
      for (int j = 0; j < L; ++j) {
        if (w_i[j] == 0) decay[j] = 0;  // what is forgotten at once has no gradient, rounding or not
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

// One token of one (row, head); the state is changed in place.
template <int N>
void decode(const Inputs& in, int64_t unit, float* state, float* y) {
  constexpr int L = lanes<N>();
  const int8_t code = in.codes == nullptr ? kNormal : in.codes[unit / in.shape.heads];
  const int64_t at = unit * N;
  state += at * N;
  if (code == kPadding) {
    std::memset(y + at, 0, N * sizeof(float));
    return;
  }
  if (code == kReset) std::memset(state, 0, N * N * sizeof(float));
  alignas(64) float w[N], sa[L];
  exponential_row<N>(in.log_w + at, w);
  for (int lane = 0; lane < N; lane += L) {
    read<N, N>(state + lane, {in.a + at, sa});
    step<N, Decay::kPerRow, Order::kDecayUpdateRead, N>(
        state + lane, w, {{in.b + at, sa}, {in.k + at, in.v + at + lane}}, {{in.r + at, y + at + lane}});
  }
}

template <int N>
Status forward(const Inputs& in, int64_t threads, float* y, float* state_out, float* sa) {
  constexpr int64_t tiles = N / lanes<N>();
  prefer_large_pages({y, sa}, in.shape.floats(N));
  return parallel(in.shape.batch * in.shape.heads * tiles, in.shape.tokens * N * lanes<N>(), threads, [&] {
    return [&](int64_t unit) { forward_tile<N>(in, unit, y, state_out, sa); };
  });
}

template <int N>
Status backward(const Inputs& in, int64_t threads, const float* sa, const float* dy, const float* dstate_out,
                const Gradients& out) {
  prefer_large_pages({out.dr, out.dlog_w, out.dk, out.dv, out.da, out.db}, in.shape.floats(N));
  return parallel(in.shape.batch * in.shape.heads, in.shape.tokens * N * N, threads, [&] {
    return [&, scratch = std::make_unique<Scratch>(Backward<N>::scratch_floats(in.shape.tokens))](
               int64_t unit) { Backward<N>(in, sa, dy, dstate_out, out, unit, scratch->data).run(); };
  });
}

template <int N>
Status decode_all(const Inputs& in, int64_t threads, float* state, float* y) {
  return parallel(in.shape.batch * in.shape.heads, N * N, threads,
                  [&] { return [&](int64_t unit) { decode<N>(in, unit, state, y); }; });
}

}  // namespace

// All return a Status. In a step `tokens` is 1 and the state is changed in place.
extern "C" int wkv7_forward(int64_t batch, int64_t tokens, int64_t heads, int64_t head_size, int64_t threads,
                            const float* r, const float* log_w, const float* k, const float* v,
                            const float* a, const float* b, const float* state, const int8_t* codes, float* y,
                            float* state_out, float* sa) {
  const Inputs in{{batch, tokens, heads}, r, log_w, k, v, a, b, state, codes};
  return for_head_size(head_size, [&](auto N) { return forward<N>(in, threads, y, state_out, sa); });
}

extern "C" int wkv7_backward(int64_t batch, int64_t tokens, int64_t heads, int64_t head_size, int64_t threads,
                             const float* dy, const float* dstate_out, const float* r, const float* log_w,
                             const float* k, const float* v, const float* a, const float* b,
                             const float* state, const int8_t* codes, const float* sa, float* dr,
                             float* dlog_w, float* dk, float* dv, float* da, float* db, float* dstate) {
  const Inputs in{{batch, tokens, heads}, r, log_w, k, v, a, b, state, codes};
  const Gradients out{dr, dlog_w, dk, dv, da, db, dstate};
  return for_head_size(head_size,
                       [&](auto N) { return backward<N>(in, threads, sa, dy, dstate_out, out); });
}

extern "C" int wkv7_step(int64_t batch, int64_t tokens, int64_t heads, int64_t head_size, int64_t threads,
                         const float* r, const float* log_w, const float* k, const float* v, const float* a,
                         const float* b, float* state, const int8_t* codes, float* y) {
  const Inputs in{{batch, tokens, heads}, r, log_w, k, v, a, b, state, codes};
  return for_head_size(head_size, [&](auto N) { return decode_all<N>(in, threads, state, y); });
}
