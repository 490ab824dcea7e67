// WKV-7 on GPUs (CUDA, HIP, and the CPU shim of the tests): forward, backward and one decoding step.
//
// Layout: r, k, v, a, b, y and their gradients are T [B,T,H,N] (float, bf16 or fp16); log_w, its gradient and
// sa are float [B,T,H,N]; states are float [B,H,N_k,N_v]; codes are int8 [B,T] (0 normal, 1 reset the state
// first, 2 padding) or null. Everything is computed in float.
//
// Forward   sa_t = S_{t-1}^T a_t (saved),  S_t = diag(w_t) S_{t-1} + b_t sa_t^T + k_t v_t^T,  y_t = S_t^T r_t
// Backward  two scans, no division and no saved state; G_t = dL/dS_t, h_t = dL/dsa_t = G_t^T b_t
//   reverse   G_t = diag(w_{t+1}) G_{t+1} + a_{t+1} h_{t+1}^T + r_t dy_t^T
//             dv = G^T k,  h = G^T b,  dk = G v,  db = G sa
//   again     forward in t, S once more, from sa: no token waits for a sum over the state
//             dr = S dy,  da_t = S_{t-1} h_t,  and the gradient of the log decay
//             dlog_w_t = rowsum(w_t S_{t-1} G_t)
//             dlog_w_{t+1} = (dlog_w + b db + k dk - r dr)_t - (a da)_{t+1}
// The recurrence for dlog_w starts afresh every kAnchor tokens, where the reverse scan leaves a copy of G. It
// needs b db + k dk in float: the reverse scan leaves that in dlog_w, where the scan after it takes it from.
//
// A block computes one (row, head). Sums over keys in the first two kernels, over values in the last one,
// stay within 8 lanes; those of dk and db are over the whole block, and completed once per chunk of tokens.

#include "backward.cuh"
#include "forward.cuh"

namespace {

template <int kOwn>
int forward(const Inputs& in, Stream stream, T* y, float* state_out, float* sa) {
  return LAUNCH(forward_kernel<kOwn>, in.shape.batch * in.shape.heads, Block<kOwn>::kThreads, stream, in, y,
                state_out, sa);
}

template <int kOwn>
int backward(const Inputs& in, Stream stream, const float* sa, const T* dy, const float* dstate_out,
             const Gradients& grad, const Scratch& scratch) {
  const int64_t blocks = in.shape.batch * in.shape.heads;
  constexpr int kThreads = Block<kOwn>::kThreads;
  const int status =
      LAUNCH(reverse_kernel<kOwn>, blocks, kThreads, stream, in, sa, dy, dstate_out, grad, scratch);
  if (status != kDone) return status;
  return LAUNCH(again_kernel<kOwn>, blocks, kThreads, stream, in, sa, dy, grad, scratch);
}

// Cells of an axis that a thread holds: fewer where there are few rows and heads, so that more threads share
// each. A head of 128 occupies 8 warps as it is.
constexpr int kFew = N > 64 ? 4 : 2, kMany = 4;

int64_t h_size(int64_t batch, int64_t tokens, int64_t heads) { return batch * tokens * heads * N; }

}  // namespace

// `split`: whether there are few rows and heads, so that more threads should share each. All entries but the
// first return a Status. In a step `tokens` is 1 and the state is changed in place.

// Floats of scratch that a backward pass needs.
extern "C" int64_t wkv7_scratch(int64_t batch, int64_t tokens, int64_t heads, int64_t /*split*/) {
  return h_size(batch, tokens, heads) + batch * heads * anchors(tokens) * N * N;
}

extern "C" int wkv7_forward(int64_t batch, int64_t tokens, int64_t heads, int64_t split, Stream stream,
                            const T* r, const float* log_w, const T* k, const T* v, const T* a, const T* b,
                            const float* state, const int8_t* codes, T* y, float* state_out, float* sa) {
  const Inputs in{{batch, tokens, heads}, r, log_w, k, v, a, b, state, codes};
  return split ? forward<kFew>(in, stream, y, state_out, sa) : forward<kMany>(in, stream, y, state_out, sa);
}

extern "C" int wkv7_backward(int64_t batch, int64_t tokens, int64_t heads, int64_t split, Stream stream,
                             const T* dy, const float* dstate_out, const T* r, const float* log_w, const T* k,
                             const T* v, const T* a, const T* b, const float* state, const int8_t* codes,
                             const float* sa, T* dr, float* dlog_w, T* dk, T* dv, T* da, T* db, float* dstate,
                             float* memory) {
  const Inputs in{{batch, tokens, heads}, r, log_w, k, v, a, b, state, codes};
  const Gradients grad{dr, dlog_w, dk, dv, da, db, dstate};
  const Scratch scratch{memory, memory + h_size(batch, tokens, heads)};
  return split ? backward<kFew>(in, stream, sa, dy, dstate_out, grad, scratch)
               : backward<kMany>(in, stream, sa, dy, dstate_out, grad, scratch);
}

extern "C" int wkv7_step(int64_t batch, int64_t tokens, int64_t heads, int64_t split, Stream stream,
                         const T* r, const float* log_w, const T* k, const T* v, const T* a, const T* b,
                         float* state, const int8_t* codes, T* y) {
  const Inputs in{{batch, tokens, heads}, r, log_w, k, v, a, b, state, codes};
  return split ? forward<kFew>(in, stream, y, state, nullptr) : forward<kMany>(in, stream, y, state, nullptr);
}
