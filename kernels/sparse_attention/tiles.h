// What forward and backward share (cpu.cpp): products of up to four rows, transposed blocks, and tiles of queries.

#pragma once

#include <cmath>
#include <limits>

#include "../native.h"

namespace sparse_attention {

using namespace native;

constexpr int kRows = 4;                           // of a product
constexpr int kColumns = kTileVectors * kWidth;    // keys that are scored at one time
constexpr int kTileRows = 64;
constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr float kLargestShare = 1e6f;              // as in lists.py

struct Sizes {
  int64_t batch, tokens, heads, size, blocks, length, groups, lists, listed;
  int64_t per_list() const { return heads / lists; }
  int64_t lists_per_group() const { return lists / groups; }
  int64_t key_stride() const { return groups * size; }
};

struct Inputs {
  Sizes s;
  const float *q, *k, *v;
  const int32_t *list, *starts, *positions;
  int64_t query(int64_t b, int64_t t, int64_t h) const { return ((b * s.tokens + t) * s.heads + h) * s.size; }
  int64_t key(int64_t b, int64_t m, int64_t c, int64_t g) const {
    return (((b * s.blocks + m) * s.length + c) * s.groups + g) * s.size;
  }
  const int32_t* entries(int64_t b, int64_t t, int64_t j) const {
    return list + ((b * s.tokens + t) * s.lists + j) * s.listed;
  }
  int64_t visible(int64_t b, int64_t t, int64_t m) const {  // keys of block m that token t sees
    const int64_t seen = int64_t{positions[b * s.tokens + t]} - starts[b * s.blocks + m] + 1;
    return std::min(std::max<int64_t>(seen, 0), s.length);
  }
};

// out[i] (+)= sum over k of a[i][k * step] * b[k * stride ...], for R rows and V vectors.
template <int R, int V>
void product_part(const float* const* a, int64_t step, const float* b, int64_t stride, int64_t inner,
                  float* const* out, int64_t column, bool add) {
  Vec sums[R][V];
  const Vec zero = {};
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < V; ++j) sums[i][j] = add ? load(out[i] + column + j * kWidth) : zero;
  for (int64_t k = 0; k < inner; ++k) {
    Vec row[V];
    for (int j = 0; j < V; ++j) row[j] = load(b + k * stride + column + j * kWidth);
    for (int i = 0; i < R; ++i) {
      const Vec factor = a[i][k * step] - zero;
      for (int j = 0; j < V; ++j) sums[i][j] += factor * row[j];
    }
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < V; ++j) store(out[i] + column + j * kWidth, sums[i][j]);
}

// The same over `columns` columns, a multiple of kWidth.
template <int R = kRows>
void product(const float* const* a, int64_t step, const float* b, int64_t stride, int64_t inner,
             float* const* out, int64_t columns, bool add) {
  int64_t at = 0;
  for (; at + kColumns <= columns; at += kColumns)
    product_part<R, kTileVectors>(a, step, b, stride, inner, out, at, add);
  for (; at < columns; at += kWidth) product_part<R, 1>(a, step, b, stride, inner, out, at, add);
}

// out[i][c] = a[i] . b[c * stride], for R rows and `columns` keys: for calls too small to transpose keys. Rows of
// `out` are padded; what is behind their end is undefined.
template <int R = kRows, class Cell = float>
void dots(const float* const* a, const Cell* b, int64_t stride, int64_t size, int64_t columns, float* const* out) {
  constexpr int kTogether = 4;
  Vec partial[R][kWidth] = {};
  for (int64_t from = 0; from < columns; from += kWidth) {
    const int64_t count = std::min<int64_t>(kWidth, columns - from);
    for (int64_t c = 0; c < count; c += kTogether) {
      const Cell* keys[kTogether];
      for (int j = 0; j < kTogether; ++j) keys[j] = b + (from + std::min(c + j, count - 1)) * stride;
      Vec products[R][kTogether] = {};
      for (int64_t n = 0; n < size; n += kWidth)
        for (int j = 0; j < kTogether; ++j) {
          const Vec key = load(keys[j] + n);
          for (int i = 0; i < R; ++i) products[i][j] += load(a[i] + n) * key;
        }
      for (int i = 0; i < R; ++i)
        for (int j = 0; j < kTogether; ++j) partial[i][c + j] = products[i][j];
    }
    for (int i = 0; i < R; ++i) store(out[i] + from, sums(partial[i]));
  }
}

inline int64_t padded(int64_t columns) { return (columns + kWidth - 1) / kWidth * kWidth; }

// Keys or values of all blocks that somebody lists, transposed to [N, padded C] for each block and group.
struct Transposed {
  const Sizes& s;
  Scratch memory;
  explicit Transposed(const Inputs& in)
      : s(in.s), memory(static_cast<size_t>(s.batch * s.blocks * s.groups * s.size * padded(s.length))) {}
  float* at(int64_t b, int64_t m, int64_t g) const {
    return memory.data + ((b * s.blocks + m) * s.groups + g) * s.size * padded(s.length);
  }
  void fill(const Inputs& in, const float* source, int64_t b, int64_t m, int64_t g) const {
    float* out = at(b, m, g);
    const int64_t width = padded(s.length);
    for (int64_t n = 0; n < s.size; n += kWidth)
      for (int64_t c = 0; c < width; ++c) {
        const float* from = source + in.key(b, m, std::min(c, s.length - 1), g) + n;
        for (int i = 0; i < kWidth; ++i) out[(n + i) * width + c] = from[i];
      }
  }
};

inline std::vector<char> listed_anywhere(const Inputs& in) {
  std::vector<char> found(in.s.batch * in.s.blocks, 0);
  const int64_t entries = in.s.tokens * in.s.lists * in.s.listed;
  for (int64_t b = 0; b < in.s.batch; ++b)
    for (int64_t i = 0; i < entries; ++i) {
      const int32_t entry = in.list[b * entries + i];
      const int32_t m = entry >= 0 ? entry : -2 - entry;
      if (m >= 0) found[b * in.s.blocks + m] = 1;
    }
  return found;
}

inline Status transpose(const Inputs& in, const std::vector<char>& wanted, const float* source, const Transposed& out,
                 int64_t threads) {
  const Sizes& s = in.s;
  return parallel(s.batch * s.blocks, s.groups * s.size * s.length, threads, [&] {
    return [&](int64_t unit) {
      if (!wanted[unit]) return;
      for (int64_t g = 0; g < s.groups; ++g) out.fill(in, source, unit / s.blocks, unit % s.blocks, g);
    };
  });
}

// A tile: tokens first..last of list j in row b, and who of them lists which block.
struct Tile {
  const Inputs& in;
  int64_t b, j, g, first, last;
  std::vector<int32_t> touched;  // blocks, in the order in which they are first listed
  struct Entry { int32_t token, column; };
  std::vector<std::vector<Entry>> who;  // by block

  explicit Tile(const Inputs& inputs) : in(inputs), who(inputs.s.blocks) {}

  static int64_t tokens_of(const Sizes& s) { return std::max<int64_t>(1, kTileRows / s.per_list()); }
  static int64_t count(const Sizes& s) {
    return s.batch * s.lists * ((s.tokens + tokens_of(s) - 1) / tokens_of(s));
  }

  void move_to(int64_t unit) {
    const Sizes& s = in.s;
    const int64_t step = tokens_of(s), tiles = (s.tokens + step - 1) / step;
    // The longest lists come last in a row; taking them first shares the work out better.
    first = (tiles - 1 - unit / (s.batch * s.lists)) * step;
    b = unit % (s.batch * s.lists) / s.lists;
    j = unit % s.lists;
    g = j / s.lists_per_group();
    last = std::min(first + step, s.tokens);
    for (int32_t m : touched) who[m].clear();
    touched.clear();
    for (int64_t t = first; t < last; ++t)
      for (int64_t c = 0; c < s.listed; ++c) {
        const int32_t entry = in.entries(b, t, j)[c], m = entry >= 0 ? entry : -2 - entry;
        if (m < 0 || in.visible(b, t, m) == 0) continue;
        if (who[m].empty()) touched.push_back(m);
        who[m].push_back({static_cast<int32_t>(t - first), static_cast<int32_t>(c)});
      }
  }
  int64_t rows() const { return (last - first) * in.s.per_list(); }
};

// Up to four rows of one block, the unused ones repeating the first.
struct Four {
  int64_t row[kRows], visible[kRows], column[kRows];
  bool attends[kRows];
  int count = 0;
  int64_t most = 0;  // keys that any of them sees
};

// Calls act(four rows) for all rows of the tile that list block m, those with attended entries only if asked.
template <class Act>
void by_fours(const Tile& tile, int32_t m, bool attended_only, Act act) {
  const int64_t heads = tile.in.s.per_list();
  Four four;
  auto flush = [&] {
    for (int i = four.count; i < kRows; ++i) {
      four.row[i] = four.row[0];
      four.visible[i] = 0;
      four.column[i] = four.column[0];
      four.attends[i] = false;
    }
    if (four.count > 0) act(four);
    four = Four();
  };
  for (const Tile::Entry& entry : tile.who[m]) {
    const int64_t t = tile.first + entry.token;
    const bool attends = tile.in.entries(tile.b, t, tile.j)[entry.column] >= 0;
    if (attended_only && !attends) continue;
    const int64_t visible = tile.in.visible(tile.b, t, m);
    for (int64_t h = 0; h < heads; ++h) {
      four.row[four.count] = entry.token * heads + h;
      four.visible[four.count] = visible;
      four.column[four.count] = entry.column;
      four.attends[four.count] = attends;
      four.most = std::max(four.most, visible);
      if (++four.count == kRows) flush();
    }
  }
  flush();
}

// Scores of four queries with keys from..from+columns of a block; those that are not visible get -inf.
struct Scorer {
  const Inputs& in;
  const Transposed* keys;  // null: too few queries to transpose for
  template <int R = kRows>
  void fill(const float* const* queries, int64_t b, int32_t m, int64_t g, int64_t from, int64_t columns,
            const int64_t* visible, float* const* out) const {
    const Sizes& s = in.s;
    const int64_t width = padded(columns);
    if (keys != nullptr)
      product<R>(queries, 1, keys->at(b, m, g) + from, padded(s.length), s.size, out, width, false);
    else
      dots<R>(queries, in.k + in.key(b, m, from, g), s.key_stride(), s.size, columns, out);
    for (int i = 0; i < R; ++i)
      for (int64_t c = std::max<int64_t>(visible[i] - from, 0); c < width; ++c) out[i][c] = kLowest;
  }
};

inline float largest(const float* x, int64_t columns) {
  Vec most = load(x);
  for (int64_t c = kWidth; c < columns; c += kWidth) {
    const Vec other = load(x + c);
    most = other > most ? other : most;
  }
  float found = most[0];
  for (int i = 1; i < kWidth; ++i) found = std::max(found, most[i]);
  return found;
}

// x = exp(x - level); their sum.
inline float exponentiate(float* x, float level, int64_t columns) {
  Vec total = {};
  for (int64_t c = 0; c < columns; c += kWidth) {
    const Vec p = exponential(load(x + c) - level);
    store(x + c, p);
    total += p;
  }
  return sum(total);
}

}  // namespace sparse_attention
