// The backward pass (cpu.cpp): dq tile by tile, dk and dv block by block.

#pragma once

#include "tiles.h"

namespace sparse_attention {

// Weights of four rows in some keys of a block, and the gradients of their scores.
struct Slopes {
  const Inputs& in;
  const Transposed &keys, &values;
  const float *dy, *logs, *meeting;  // meeting [B,T,H]: dy . y
  void operator()(const float* const* queries, const float* const* upstream, const int64_t* query, int64_t b,
                  int32_t m, int64_t g, int64_t from, int64_t columns, const int64_t* visible,
                  float* const* weights, float* const* slopes) const {
    const Sizes& s = in.s;
    const int64_t width = padded(columns);
    Scorer{in, &keys}.fill(queries, b, m, g, from, columns, visible, weights);
    product(upstream, 1, values.at(b, m, g) + from, padded(s.length), s.size, slopes, width, false);
    for (int i = 0; i < kRows; ++i) {
      const int64_t seen = std::min(std::max<int64_t>(visible[i] - from, 0), columns);
      exponentiate(weights[i], logs[query[i] / s.size], width);
      const float mean = meeting[query[i] / s.size];
      for (int64_t c = 0; c < width; c += kWidth)
        store(slopes[i] + c, load(weights[i] + c) * (load(slopes[i] + c) - mean));
      for (int64_t c = seen; c < width; ++c) weights[i][c] = slopes[i][c] = 0;  // also against NaN
    }
  }
};

struct QueryGradients {
  const Inputs& in;
  const Slopes& slopes;
  float* dq;
  Tile tile;
  Scratch scores, spare;
  QueryGradients(const Inputs& inputs, const Slopes& slopes_, float* dq_)
      : in(inputs), slopes(slopes_), dq(dq_), tile(inputs), scores(2 * kRows * kColumns), spare(in.s.size) {}

  void operator()(int64_t unit) {
    const Sizes& s = in.s;
    tile.move_to(unit);
    const int64_t heads = s.per_list();
    for (int64_t t = tile.first; t < tile.last; ++t)
      std::memset(dq + in.query(tile.b, t, tile.j * heads), 0, heads * s.size * sizeof(float));
    for (int32_t m : tile.touched) by_fours(tile, m, true, [&](const Four& four) { add(m, four); });
  }

  void add(int32_t m, const Four& four) {
    const Sizes& s = in.s;
    const float *queries[kRows], *upstream[kRows];
    float *weights[kRows], *slope[kRows], *out[kRows];
    int64_t at[kRows];
    const int64_t heads = s.per_list();
    for (int i = 0; i < kRows; ++i) {
      at[i] = in.query(tile.b, tile.first + four.row[i] / heads, tile.j * heads + four.row[i] % heads);
      queries[i] = in.q + at[i];
      upstream[i] = slopes.dy + at[i];
      weights[i] = scores.data + i * kColumns;
      slope[i] = scores.data + (kRows + i) * kColumns;
      out[i] = i < four.count ? dq + at[i] : spare.data;
    }
    for (int64_t from = 0; from < four.most; from += kColumns) {
      const int64_t columns = std::min<int64_t>(kColumns, four.most - from);
      slopes(queries, upstream, at, tile.b, m, tile.g, from, columns, four.visible, weights, slope);
      product(slope, 1, in.k + in.key(tile.b, m, from, tile.g), s.key_stride(), columns, out, s.size, true);
    }
  }
};

// The tokens that attend to each (row, list, block), in order.
struct Readers {
  std::vector<int64_t> begin;
  std::vector<int32_t> tokens;
  explicit Readers(const Inputs& in) : begin(in.s.batch * in.s.lists * in.s.blocks + 1, 0) {
    each(in, [&](int64_t place, int64_t) { ++begin[place + 1]; });
    for (size_t i = 1; i < begin.size(); ++i) begin[i] += begin[i - 1];
    tokens.resize(begin.back());
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    each(in, [&](int64_t place, int64_t t) { tokens[next[place]++] = static_cast<int32_t>(t); });
  }
  template <class Act>
  static void each(const Inputs& in, Act act) {
    const Sizes& s = in.s;
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t t = 0; t < s.tokens; ++t)
        for (int64_t j = 0; j < s.lists; ++j)
          for (int64_t c = 0; c < s.listed; ++c) {
            const int32_t m = in.entries(b, t, j)[c];
            if (m >= 0 && in.visible(b, t, m) > 0) act((b * s.lists + j) * s.blocks + m, t);
          }
  }
};

struct KeyGradients {
  const Inputs& in;
  const Slopes& slopes;
  const Readers& readers;
  float *dk, *dv;
  Scratch gathered, scores, sums;
  int64_t query[kTileRows], visible[kTileRows], count = 0;

  KeyGradients(const Inputs& inputs, const Slopes& slopes_, const Readers& readers_, float* dk_, float* dv_)
      : in(inputs), slopes(slopes_), readers(readers_), dk(dk_), dv(dv_), gathered(2 * kTileRows * in.s.size),
        scores(2 * kTileRows * kColumns), sums(2 * kColumns * in.s.size) {}

  void operator()(int64_t unit) {
    const Sizes& s = in.s;
    const int64_t g = unit % s.groups, m = unit / s.groups % s.blocks, b = unit / s.groups / s.blocks;
    for (int64_t from = 0; from < s.length; from += kColumns) {
      const int64_t columns = std::min<int64_t>(kColumns, s.length - from);
      std::memset(sums.data, 0, 2 * kColumns * s.size * sizeof(float));
      for (int64_t j = g * s.lists_per_group(); j < (g + 1) * s.lists_per_group(); ++j) {
        const int64_t place = (b * s.lists + j) * s.blocks + m;
        for (int64_t i = readers.begin[place]; i < readers.begin[place + 1]; ++i) {
          const int64_t t = readers.tokens[i], seen = in.visible(b, t, m);
          if (seen <= from) continue;
          for (int64_t h = 0; h < s.per_list(); ++h) {
            query[count] = in.query(b, t, j * s.per_list() + h);
            visible[count] = seen;
            if (++count == kTileRows) add(b, static_cast<int32_t>(m), g, from, columns);
          }
        }
      }
      add(b, static_cast<int32_t>(m), g, from, columns);
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t at = in.key(b, m, from + c, g);
        std::memcpy(dk + at, sums.data + c * s.size, s.size * sizeof(float));
        std::memcpy(dv + at, sums.data + (kColumns + c) * s.size, s.size * sizeof(float));
      }
    }
  }

  // What the gathered rows add.
  void add(int64_t b, int32_t m, int64_t g, int64_t from, int64_t columns) {
    const Sizes& s = in.s;
    if (count == 0) return;
    float *queries = gathered.data, *upstream = gathered.data + kTileRows * s.size;
    float *weights = scores.data, *slope = scores.data + kTileRows * kColumns;
    for (int64_t first = 0; first < count; first += kRows) {
      const float *qs[kRows], *dys[kRows];
      float *ws[kRows], *ss[kRows];
      int64_t at[kRows], seen[kRows];
      for (int i = 0; i < kRows; ++i) {
        const int64_t row = std::min(first + i, count - 1);
        at[i] = query[row];
        seen[i] = first + i < count ? visible[row] : 0;
        qs[i] = in.q + at[i];
        dys[i] = slopes.dy + at[i];
        ws[i] = weights + (first + i) * kColumns;
        ss[i] = slope + (first + i) * kColumns;
      }
      slopes(qs, dys, at, b, m, g, from, columns, seen, ws, ss);
    }
    for (int64_t row = 0; row < count; ++row) {
      std::memcpy(queries + row * s.size, in.q + query[row], s.size * sizeof(float));
      std::memcpy(upstream + row * s.size, slopes.dy + query[row], s.size * sizeof(float));
    }
    for (int64_t c = 0; c < columns; c += kRows) {
      const float *of_slopes[kRows], *of_weights[kRows];
      float *keys[kRows], *values[kRows];
      for (int i = 0; i < kRows; ++i) {
        of_slopes[i] = slope + c + i;
        of_weights[i] = weights + c + i;
        keys[i] = sums.data + (c + i) * s.size;
        values[i] = sums.data + (kColumns + c + i) * s.size;
      }
      product(of_slopes, kColumns, queries, s.size, count, keys, s.size, true);
      product(of_weights, kColumns, upstream, s.size, count, values, s.size, true);
    }
    count = 0;
  }
};

}  // namespace sparse_attention
