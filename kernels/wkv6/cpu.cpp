// WKV-6 on the CPU: forward, backward and one decoding step, threaded over rows and heads.
//
// Layout: r, log_w, k, v, y and their gradients are float [B,T,H,N]; the bonus u is [H,N] or null; states are
// float [B,H,N_k,N_v]; codes are int8 [B,T] (0 normal, 1 reset the state first, 2 padding) or null.
//
// Forward   S_t = diag(w_t) S_{t-1} + k_t v_t^T
//   y_t = S_t^T r_t,  with a bonus  y_t = S_{t-1}^T r_t + (r_t . u . k_t) v_t
// Backward  three scans, no division and no saved state; G_t = dL/dS_t
//   R  reverse, lanes over values   dv = G^T k
//   K  reverse, lanes over keys     dk = G v
//   F  forward, lanes over keys     dr = S dy, the S that y reads, and the gradient of the log decay
//   without a bonus  G_t = diag(w_{t+1}) G_{t+1} + r_t dy_t^T
//     dlog_w_t = rowsum(w_t S_{t-1} G_t);  dlog_w_{t+1} = (dlog_w + k dk - r dr)_t
//   with a bonus     G_{t-1} = diag(w_t) G_t + r_t dy_t^T
//     dlog_w_t as before;  dlog_w_{t+1} = (dlog_w + k dk)_t - (r dr)_{t+1}, dk, dr those through the state;
//     beside them  dv += (r . u . k) dy,  dk += r u (v . dy),  dr += u k (v . dy),  du = sum of r k (v . dy)
// The recurrence for dlog_w starts afresh at every anchor token, where scan K leaves a copy of G.

#include "../recurrence.h"

namespace {

using namespace recurrence;

struct Inputs {
  Shape shape;
  const float *r, *log_w, *k, *v, *u, *state;
  const int8_t* codes;
};

struct Gradients {
  float *dr, *dlog_w, *dk, *dv, *du, *dstate;
};

// What y reads, and in which order the reverse scans meet the same.
template <bool kBonus>
constexpr Order kForward = kBonus ? Order::kReadDecayUpdate : Order::kDecayUpdateRead;
template <bool kBonus>
constexpr Order kReverse = kBonus ? Order::kReadDecayUpdate : Order::kUpdateReadDecay;

template <int N>
inline float dot(const float* x, const float* y) {
  Vec total = {};
  for (int i = 0; i < N; i += kWidth) total += load(x + i) * load(y + i);
  return sum(total);
}

// r . u . k
template <int N>
inline float bonus(const float* r, const float* u, const float* k) {
  Vec total = {};
  for (int i = 0; i < N; i += kWidth) total += load(r + i) * load(u + i) * load(k + i);
  return sum(total);
}

template <int L>
inline void add_scaled(float* out, float factor, const float* x) {
  for (int j = 0; j < L; ++j) out[j] += factor * x[j];
}

// The values of one tile; `unit` counts tiles within heads within rows.
template <int N, bool kBonus>
void forward_tile(const Inputs& in, int64_t unit, float* y, float* state_out) {
  constexpr int L = lanes<N>();
  const int64_t head = unit / (N / L);
  const int lane = static_cast<int>(unit % (N / L)) * L;
  const Row row(in.shape, in.codes, head, N);
  alignas(64) float X[N * L], w[N];
  read_tile<N>(X, in.state + head * N * N, lane, false);
  for (int64_t i = 0; i < row.size(); ++i) {
    const int64_t at = row.offset[i];
    if (row.reset[i]) std::memset(X, 0, sizeof X);
    exponential_row<N>(in.log_w + at, w);
    prefetch<N>(row, i + 2, {in.r, in.log_w, in.k, in.v});
    step<N, Decay::kPerRow, kForward<kBonus>>(X, w, {{in.k + at, in.v + at + lane}},
                                              {{in.r + at, y + at + lane}});
    if (kBonus) {
      const float own = bonus<N>(in.r + at, in.u + head % in.shape.heads * N, in.k + at);
      add_scaled<L>(y + at + lane, own, in.v + at + lane);
    }
  }
  write_tile<N>(X, state_out + head * N * N, lane);
  if (lane == 0) fill_padding<N>(row, {y});
}

// Backward of one (row, head); its scratch is w [tokens,N], v . dy [tokens] and the anchors. `du` is this
// row's part of the bonus's gradient.
template <int N, bool kBonus>
struct Backward {
  static constexpr int L = lanes<N>();
  const Inputs& in;
  const float *dy, *dstate_out;
  const Gradients& out;
  int64_t unit;
  Row row;
  int64_t spacing;
  float *w, *anchors, *v_dy;
  const float* u;
  double* du;
  alignas(64) float X[N * L];

  static size_t scratch_floats(int64_t tokens) { return tokens * N + anchor_floats<N>(tokens) + tokens; }

  Backward(const Inputs& inputs, const float* dy_, const float* dstate_out_, const Gradients& gradients,
           int64_t unit_, float* scratch, double* du_)
      : in(inputs), dy(dy_), dstate_out(dstate_out_), out(gradients), unit(unit_),
        row(inputs.shape, inputs.codes, unit_, N), spacing(anchor_spacing(inputs.shape.tokens)), w(scratch),
        anchors(w + inputs.shape.tokens * N), v_dy(anchors + anchor_floats<N>(inputs.shape.tokens)),
        u(kBonus ? inputs.u + unit_ % inputs.shape.heads * N : nullptr), du(du_) {}

  void prepare() {
    for (int64_t i = 0; i < row.size(); ++i) {
      const int64_t at = row.offset[i];
      exponential_row<N>(in.log_w + at, w + i * N);
      if (kBonus) v_dy[i] = dot<N>(in.v + at, dy + at);
    }
    if (kBonus) std::fill(du, du + N, 0.0);
  }

  void scan_values(int tile) {
    read_tile<N>(X, dstate_out + unit * N * N, tile, false);
    for (int64_t i = row.size() - 1; i >= 0; --i) {
      const int64_t at = row.offset[i];
      prefetch<N>(row, i - 2, {in.r, dy, in.k, out.dv});
      step<N, Decay::kPerRow, kReverse<kBonus>>(X, w + i * N, {{in.r + at, dy + at + tile}},
                                                {{in.k + at, out.dv + at + tile}});
      if (kBonus) add_scaled<L>(out.dv + at + tile, bonus<N>(in.r + at, u, in.k + at), dy + at + tile);
      if (row.reset[i]) std::memset(X, 0, sizeof X);
    }
    write_tile<N>(X, out.dstate + unit * N * N, tile);
  }

  // An anchor is G_t, decayed already where the scan does that last.
  void scan_keys_reverse(int tile) {
    read_tile<N>(X, dstate_out + unit * N * N, tile, true);
    for (int64_t i = row.size() - 1; i >= 0; --i) {
      const int64_t at = row.offset[i];
      float* anchor = i % spacing == 0 ? anchors + i / spacing * N * L : nullptr;
      prefetch<N>(row, i - 2, {dy, in.r, in.v, out.dk});
      if (kBonus && anchor != nullptr) std::memcpy(anchor, X, sizeof X);
      step<N, Decay::kPerLane, kReverse<kBonus>>(X, w + i * N + tile, {{dy + at, in.r + at + tile}},
                                                 {{in.v + at, out.dk + at + tile}});
      if (!kBonus && anchor != nullptr) std::memcpy(anchor, X, sizeof X);
      if (row.reset[i]) std::memset(X, 0, sizeof X);
    }
  }

  void scan_keys_forward(int tile) {
    alignas(64) float fresh[L];
    double decay[L] = {};
    read_tile<N>(X, in.state + unit * N * N, tile, true);
    for (int64_t i = 0; i < row.size(); ++i) {
      const int64_t at = row.offset[i] + tile;
      const float *w_i = w + i * N + tile, *r = in.r + at, *k = in.k + at;
      float *dr = out.dr + at, *dk = out.dk + at;
      const bool anchored = i % spacing == 0;
      if (row.reset[i]) std::memset(X, 0, sizeof X);
      if (anchored) read_both<N>(X, anchors + i / spacing * N * L, fresh);
      prefetch<N>(row, i + 2, {in.v, in.k, dy, in.r, out.dk, out.dr, out.dlog_w});
      step<N, Decay::kPerLane, kForward<kBonus>>(X, w_i, {{in.v + row.offset[i], k}},
                                                 {{dy + row.offset[i], dr}});
      for (int j = 0; j < L; ++j) {
        const double read = static_cast<double>(r[j]) * dr[j];
        if (anchored) decay[j] = kBonus ? static_cast<double>(fresh[j]) * w_i[j] : fresh[j];
        else if (kBonus) decay[j] -= read;
        if (row.reset[i] || w_i[j] == 0) decay[j] = 0;  // what is forgotten has no gradient, rounding or not
        out.dlog_w[at + j] = static_cast<float>(decay[j]);
        decay[j] += static_cast<double>(k[j]) * dk[j] - (kBonus ? 0 : read);
        if (kBonus) {
          dk[j] += r[j] * u[tile + j] * v_dy[i];
          dr[j] += k[j] * u[tile + j] * v_dy[i];
          du[tile + j] += static_cast<double>(r[j]) * k[j] * v_dy[i];
        }
      }
    }
  }

  void run() {
    prepare();
    for (int tile = 0; tile < N; tile += L) {
      scan_values(tile);
      scan_keys_reverse(tile);
      scan_keys_forward(tile);
    }
    fill_padding<N>(row, {out.dr, out.dlog_w, out.dk, out.dv});
  }
};

// One token of one (row, head); the state is changed in place.
template <int N, bool kBonus>
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
  alignas(64) float w[N];
  exponential_row<N>(in.log_w + at, w);
  for (int lane = 0; lane < N; lane += L)
    step<N, Decay::kPerRow, kForward<kBonus>, N>(state + lane, w, {{in.k + at, in.v + at + lane}},
                                                 {{in.r + at, y + at + lane}});
  if (kBonus)
    add_scaled<N>(y + at, bonus<N>(in.r + at, in.u + unit % in.shape.heads * N, in.k + at), in.v + at);
}

template <int N, bool kBonus>
Status forward(const Inputs& in, int64_t threads, float* y, float* state_out) {
  constexpr int64_t tiles = N / lanes<N>();
  prefer_large_pages({y}, in.shape.floats(N));
  return parallel(in.shape.batch * in.shape.heads * tiles, in.shape.tokens * N * lanes<N>(), threads, [&] {
    return [&](int64_t unit) { forward_tile<N, kBonus>(in, unit, y, state_out); };
  });
}

// The rows' parts of the bonus's gradient are added in their order: the same sum on any number of threads.
void add_rows(const Shape& shape, int N, const double* parts, float* du) {
  for (int64_t i = 0; i < shape.heads * N; ++i) {
    double total = 0;
    for (int64_t row = 0; row < shape.batch; ++row) total += parts[row * shape.heads * N + i];
    du[i] = static_cast<float>(total);
  }
}

template <int N, bool kBonus>
Status backward(const Inputs& in, int64_t threads, const float* dy, const float* dstate_out,
                const Gradients& out) {
  prefer_large_pages({out.dr, out.dlog_w, out.dk, out.dv}, in.shape.floats(N));
  const int64_t units = in.shape.batch * in.shape.heads;
  const std::unique_ptr<double[]> parts(new (std::nothrow) double[kBonus ? units * N : 0]);
  if (parts == nullptr) return kOutOfMemory;
  const Status status = parallel(units, in.shape.tokens * N * N, threads, [&] {
    using Head = Backward<N, kBonus>;
    return [&, scratch = std::make_unique<Scratch>(Head::scratch_floats(in.shape.tokens))](int64_t unit) {
      Head(in, dy, dstate_out, out, unit, scratch->data, parts.get() + (kBonus ? unit * N : 0)).run();
    };
  });
  if (kBonus && status == kDone) add_rows(in.shape, N, parts.get(), out.du);
  return status;
}

template <int N, bool kBonus>
Status decode_all(const Inputs& in, int64_t threads, float* state, float* y) {
  return parallel(in.shape.batch * in.shape.heads, N * N, threads,
                  [&] { return [&](int64_t unit) { decode<N, kBonus>(in, unit, state, y); }; });
}

}  // namespace

// All return a Status; u and du are null together. In a step `tokens` is 1 and the state is changed in place.
extern "C" int wkv6_forward(int64_t batch, int64_t tokens, int64_t heads, int64_t head_size, int64_t threads,
                            const float* r, const float* log_w, const float* k, const float* v,
                            const float* u, const float* state, const int8_t* codes, float* y,
                            float* state_out) {
  const Inputs in{{batch, tokens, heads}, r, log_w, k, v, u, state, codes};
  return for_head_size(head_size, [&](auto N) {
    return u == nullptr ? forward<N, false>(in, threads, y, state_out)
                        : forward<N, true>(in, threads, y, state_out);
  });
}

extern "C" int wkv6_backward(int64_t batch, int64_t tokens, int64_t heads, int64_t head_size, int64_t threads,
                             const float* dy, const float* dstate_out, const float* r, const float* log_w,
                             const float* k, const float* v, const float* u, const float* state,
                             const int8_t* codes, float* dr, float* dlog_w, float* dk, float* dv, float* du,
                             float* dstate) {
  const Inputs in{{batch, tokens, heads}, r, log_w, k, v, u, state, codes};
  const Gradients out{dr, dlog_w, dk, dv, du, dstate};
  return for_head_size(head_size, [&](auto N) {
    return u == nullptr ? backward<N, false>(in, threads, dy, dstate_out, out)
                        : backward<N, true>(in, threads, dy, dstate_out, out);
  });
}

extern "C" int wkv6_step(int64_t batch, int64_t tokens, int64_t heads, int64_t head_size, int64_t threads,
                         const float* r, const float* log_w, const float* k, const float* v, const float* u,
                         float* state, const int8_t* codes, float* y) {
  const Inputs in{{batch, tokens, heads}, r, log_w, k, v, u, state, codes};
  return for_head_size(head_size, [&](auto N) {
    return u == nullptr ? decode_all<N, false>(in, threads, state, y)
                        : decode_all<N, true>(in, threads, state, y);
  });
}
