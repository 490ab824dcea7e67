// What the kernels of WKV-7 share: their arguments and the place of a thread's cells.

#pragma once

#include "../gpu/scan.h"

namespace {

using namespace transmute;

constexpr int N = TRANSMUTE_HEAD_SIZE;
using T = TRANSMUTE_TYPE;
static_assert(N == 32 || N == 64 || N == 128, "other head sizes are not laid out");

struct Inputs {
  Shape shape;
  const T *r;
  const float* log_w;
  const T *k, *v, *a, *b;
  const float* state;
  const int8_t* codes;
};

struct Gradients {
  T* dr;
  float* dlog_w;
  T *dk, *dv, *da, *db;
  float* dstate;
};

// Scratch of the backward pass: h [B,T,H,N], and copies of G [B,H,anchors,N_k,N_v].
struct Scratch { float *h, *anchors; };

TRANSMUTE_HOST_DEVICE int64_t anchors(int64_t tokens) { return (tokens + kAnchor - 1) / kAnchor; }

template <int kOwn>
using Block = Tile<N, kOwn, N / (4 * kOwn)>;

}  // namespace
