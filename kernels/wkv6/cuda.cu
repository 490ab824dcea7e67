// WKV-6 on GPUs (CUDA, HIP, and the CPU shim of the tests): forward, backward and one decoding step.
//
// Layout: r, k, v, y and their gradients are T [B,T,H,N] (float, bf16 or fp16); log_w and its gradient are
// float [B,T,H,N]; the bonus u is float [H,N] or null; states are float [B,H,N_k,N_v]; codes are int8 [B,T]
// (0 normal, 1 reset the state first, 2 padding) or null. Everything is computed in float.
//
// Forward   S_t = diag(w_t) S_{t-1} + k_t v_t^T
//   y_t = S_t^T r_t,  with a bonus  y_t = S_{t-1}^T r_t + (r_t . u . k_t) v_t
// Backward  two scans, no division and no saved state; G_t = dL/dS_t
//   reverse   dv = G^T k,  dk = G v
//   forward   dr = S dy, the S that y reads, and the gradient of the log decay
//   without a bonus  G_t = diag(w_{t+1}) G_{t+1} + r_t dy_t^T
//     dlog_w_t = rowsum(w_t S_{t-1} G_t);  dlog_w_{t+1} = (dlog_w + k dk - r dr)_t
//   with a bonus     G_{t-1} = diag(w_t) G_t + r_t dy_t^T
//     dlog_w_t as before;  dlog_w_{t+1} = (dlog_w + k dk)_t - (r dr)_{t+1}, dk, dr those through the state;
//     beside them  dv += (r . u . k) dy,  dk += r u (v . dy),  dr += u k (v . dy),  du = sum of r k (v . dy)
// The recurrence for dlog_w starts afresh every kAnchor tokens, where the reverse scan leaves a copy of G. It
// needs k dk in float: the reverse scan leaves that in dlog_w, where the forward scan takes it from.
//
// Where there are few rows and heads, several blocks share a head, each with keys of its own, and dv, a sum
// over the keys, is added up afterwards. Every sum has a fixed order.
//
// Scratch, in floats: B*H*N*N for every kAnchor tokens (as much as k has, at N = kAnchor), and, only where
// blocks share a head, B*T*H*N for each of them.

#include "backward.cuh"
#include "forward.cuh"

namespace {

using T = TRANSMUTE_TYPE;
constexpr int N = TRANSMUTE_HEAD_SIZE;

// Warps of a block: those of a whole head, or, to fill a GPU with few heads, a half or a quarter of them.
// With HIP two at least: a wavefront may have 64 threads.
#if defined(__HIP__)
constexpr int kFewWarps = N > 64 ? 4 : 2;
#else
constexpr int kFewWarps = N > 64 ? 4 : 1;
#endif
constexpr int warps(bool split) { return split ? kFewWarps : N / 16; }
constexpr int64_t slabs(bool split) { return N / 16 / warps(split); }

// Where the parts of the backward pass's scratch begin, and its size, in floats.
struct Layout {
  int64_t anchors, du, size;
  Layout(const Shape& shape, bool split) {
    const int64_t units = shape.batch * shape.heads;
    anchors = slabs(split) > 1 ? slabs(split) * units * shape.tokens * N : 0;
    du = anchors + units * ((shape.tokens + kAnchor - 1) / kAnchor) * N * N;
    size = du + units * N;
  }
};

template <bool kSplit, bool kBonus>
int forward(const Inputs<T>& in, T* y, float* state_out, Stream stream) {
  constexpr int kWarps = warps(kSplit);
  const int64_t blocks = in.shape.batch * in.shape.heads * slabs(kSplit);
  return LAUNCH((forward_kernel<T, N, kWarps, kBonus>), blocks, 32 * kWarps, stream, in, y, state_out);
}

template <bool kSplit, bool kBonus>
int backward(const Inputs<T>& in, const T* dy, const float* dstate_out, const Gradients<T>& grad,
             float* memory, Stream stream) {
  constexpr int kWarps = warps(kSplit), kThreads = 32 * kWarps;
  constexpr int64_t kSlabs = slabs(kSplit);
  const Layout layout(in.shape, kSplit);
  const Scratch scratch{memory, memory + layout.anchors, memory + layout.du};
  const int64_t blocks = in.shape.batch * in.shape.heads * kSlabs, width = in.shape.heads * N;
  const int64_t size = in.shape.batch * in.shape.tokens * width;
  int status = LAUNCH((reverse_kernel<T, N, kWarps, kBonus>), blocks, kThreads, stream, in, dy, dstate_out,
                      grad, scratch);
  if (status == kDone && kSlabs > 1)
    status = LAUNCH(add_slabs_kernel<T>, (size / 4 + 255) / 256, 256, stream, scratch.dv, kSlabs, size,
                    grad.dv);
  if (status == kDone)
    status = LAUNCH((again_kernel<T, N, kWarps, kBonus>), blocks, kThreads, stream, in, dy, grad, scratch);
  if (status == kDone && kBonus)
    status = LAUNCH(add_rows_kernel, (width + 255) / 256, 256, stream, scratch.du, in.shape.batch, width,
                    grad.du);
  return status;
}

}  // namespace

// All return a Status; u and du are null together. With `split`, several blocks share a head.
extern "C" int wkv6_forward(int64_t batch, int64_t tokens, int64_t heads, int64_t split, void* on, const T* r,
                            const float* log_w, const T* k, const T* v, const float* u, const float* state,
                            const int8_t* codes, T* y, float* state_out) {
  const Inputs<T> in{{batch, tokens, heads}, r, k, v, log_w, u, state, codes};
  const Stream stream = static_cast<Stream>(on);
  if (split)
    return u == nullptr ? forward<true, false>(in, y, state_out, stream)
                        : forward<true, true>(in, y, state_out, stream);
  return u == nullptr ? forward<false, false>(in, y, state_out, stream)
                      : forward<false, true>(in, y, state_out, stream);
}

extern "C" int wkv6_backward(int64_t batch, int64_t tokens, int64_t heads, int64_t split, void* on,
                             const T* dy, const float* dstate_out, const T* r, const float* log_w,
                             const T* k, const T* v, const float* u, const float* state, const int8_t* codes,
                             T* dr, float* dlog_w, T* dk, T* dv, float* du, float* dstate, float* scratch) {
  const Inputs<T> in{{batch, tokens, heads}, r, k, v, log_w, u, state, codes};
  const Gradients<T> grad{dr, dk, dv, dlog_w, du, dstate};
  const Stream stream = static_cast<Stream>(on);
  if (split)
    return u == nullptr ? backward<true, false>(in, dy, dstate_out, grad, scratch, stream)
                        : backward<true, true>(in, dy, dstate_out, grad, scratch, stream);
  return u == nullptr ? backward<false, false>(in, dy, dstate_out, grad, scratch, stream)
                      : backward<false, true>(in, dy, dstate_out, grad, scratch, stream);
}

// How many floats of scratch the backward pass takes.
extern "C" int64_t wkv6_scratch(int64_t batch, int64_t tokens, int64_t heads, int64_t split) {
  return Layout({batch, tokens, heads}, split).size;
}

// One token; the state is changed in place.
extern "C" int wkv6_step(int64_t batch, int64_t, int64_t heads, int64_t, void* on, const T* r,
                         const float* log_w, const T* k, const T* v, const float* u, float* state,
                         const int8_t* codes, T* y) {
  const Inputs<T> in{{batch, 1, heads}, r, k, v, log_w, u, nullptr, codes};
  return LAUNCH((step_kernel<T, N>), batch * heads, 2 * N, static_cast<Stream>(on), in, state, y);
}
