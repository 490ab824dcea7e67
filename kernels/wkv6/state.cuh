// What the kernels of WKV-6 share: their arguments, and which part of the state a thread holds.
//
// No cell of the state depends on another: a thread keeps kHeld x kSummed cells in registers, 8 neighbouring
// lanes hold the whole axis that a scan's main product sums over, and a block of kWarps warps holds a slab of
// the other axis: values in the forward pass, keys in the two scans of the backward pass.

#pragma once

#include "../gpu/scan.h"

namespace {

using namespace transmute;

constexpr int kHeld = 4;  // a thread's cells along the slab's axis

template <class T>
struct Inputs {
  Shape shape;
  const T *r, *k, *v;
  const float *log_w, *u, *state;
  const int8_t* codes;
};

template <class T>
struct Gradients {
  T *dr, *dk, *dv;
  float *dlog_w, *du, *dstate;
};

// Scratch of the backward pass: what each slab of a head gives to dv where there are several, copies of G,
// and the rows' parts of du.
struct Scratch { float *dv, *anchors, *du; };

// What a thread works on: its cells, the (row, head), the slab of it, and the one of four sums that it and
// the lane beside it end up with.
template <int N, int kWarps>
struct Place : Tile<N, kHeld, kWarps> {
  using Base = Tile<N, kHeld, kWarps>;
  static constexpr int kChunk = N > 64 ? 4 : 8;  // tokens staged in shared memory at a time
  static constexpr int64_t kSlabs = N / Base::kSlab;
  int64_t unit, slab;
  int kept;
  TRANSMUTE_DEVICE Place() {
    unit = block_index() / kSlabs;
    slab = block_index() % kSlabs;
    kept = Base::own + Base::lane / 2;
  }
};

TRANSMUTE_DEVICE Float4 times(float x, Float4 y) { return {x * y.x, x * y.y, x * y.z, x * y.w}; }
TRANSMUTE_DEVICE Float4 plus(Float4 x, Float4 y) { return {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w}; }

// Rarely called: the empty assembly keeps the compiler from turning the branch into a selection per cell.
template <int kSummed>
TRANSMUTE_DEVICE void clear(float (&x)[kHeld][kSummed]) {
  asm volatile("");
#pragma unroll
  for (int j = 0; j < kHeld; ++j)
#pragma unroll
    for (int i = 0; i < kSummed; ++i) x[j][i] = 0;
}

}  // namespace
