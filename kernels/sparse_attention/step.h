// One token of each row of a pool of blocks (models/block_pool.py): takes it over, evicting where need be,
// chooses the blocks that it sees (models/mixers/block_choice.py), attends, and remembers which were attended.

#pragma once

#include "tiles.h"

namespace sparse_attention {

constexpr int32_t kNowhere = 1 << 30;  // where a block starts that is not there: EMPTY
constexpr float kEnded = -1, kFree = -2;  // how much places are wanted that no token of this document fills

// What a token sees, and what stays: models.mixers.block_choice.Sight, and BlockPool's counts.
struct Sight {
  int64_t sinks, near, best, first, kept, half_lives;
};

// The pool's tensors; index is [B,M,P,F,W]. The last place takes what nobody is to see.
template <class Cell>  // of the index: float, or uint16_t for bfloat16, where a part is one token
struct Pool {
  int64_t parts, heads, width;
  float *keys, *values;
  Cell* index;
  int32_t* starts;
  int64_t* documents;
  float* attention;
  int64_t* counts;
};

struct Token {
  const float *q, *k, *v, *asks, *index;
};

inline void add(float* cell, float x) { *cell += x; }
inline void add(uint16_t* cell, float x) {  // to a zero; x has no bits that would be lost
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  *cell = static_cast<uint16_t>(bits >> 16);
}

template <class Cell>
class Step {
 public:
  Step(const Sizes& sizes, const Sight& sight, const Pool<Cell>& pool, const Token& token, std::vector<int32_t>& listed,
       std::vector<int32_t>& positions)
      : s(sizes), sight(sight), pool(pool), token(token), listed(listed), positions(positions),
        found(kRows * padded(pool.parts)), scores(s.lists * s.blocks), order(s.blocks) {}

  void operator()(int64_t row) {
    b = row;
    starts = pool.starts + b * s.blocks;
    documents = pool.documents + b * s.blocks;
    attention = pool.attention + b * s.blocks;
    int64_t* counts = pool.counts + 3 * b;
    position = counts[0]++;
    document = counts[1];
    if (position % s.length == 0) counts[2] = open();
    write(counts[2]);
    positions[b] = static_cast<int32_t>(position);
    choose();
  }

  static int64_t listed_by(const Sizes& s, const Sight& sight) {
    return sees_all(s, sight) ? s.blocks : sight.sinks + sight.near + 1 + sight.best;
  }

  static int64_t cost(const Sizes& s, const Pool<Cell>& pool) { return s.blocks * pool.parts * pool.width * s.lists; }

 private:
  const Sizes& s;
  const Sight& sight;
  const Pool<Cell>& pool;
  const Token& token;
  std::vector<int32_t>&listed, &positions;
  Scratch found;
  std::vector<float> scores;
  std::vector<int32_t> order;
  int64_t b, position, document;
  int32_t* starts;
  int64_t* documents;
  float* attention;

  static bool sees_all(const Sizes& s, const Sight& sight) {
    return sight.best < 0 || s.blocks - 1 <= sight.sinks + sight.near + 1 + sight.best;
  }

  int64_t number(int64_t m) const { return starts[m] / s.length; }
  bool same(int64_t m) const { return documents[m] >= 0 && documents[m] == document; }

  // The place that is wanted least begins another block.
  int64_t open() {
    int64_t newest = -1, least = 0;
    for (int64_t m = 0; m < s.blocks; ++m)
      if (same(m)) newest = std::max(newest, number(m));
    float lowest = -kLowest;
    for (int64_t m = 0; m + 1 < s.blocks; ++m) {
      const bool needed = same(m) && (number(m) < sight.first || number(m) > newest - sight.kept);
      const float wanted = documents[m] < 0 ? kFree : !same(m) ? kEnded : needed ? -kLowest : attention[m];
      if (wanted < lowest) {
        lowest = wanted;
        least = m;
      }
    }
    starts[least] = static_cast<int32_t>(position);
    documents[least] = document;
    attention[least] = 0;
    const int64_t cells = pool.parts * pool.heads * pool.width;
    std::fill_n(pool.index + (b * s.blocks + least) * cells, cells, Cell(0));
    return least;
  }

  void write(int64_t place) {
    const int64_t offset = position % s.length, cells = s.groups * s.size, at = b * s.blocks + place;
    std::copy_n(token.k + b * cells, cells, pool.keys + (at * s.length + offset) * cells);
    std::copy_n(token.v + b * cells, cells, pool.values + (at * s.length + offset) * cells);
    const int64_t part = s.length / pool.parts, wide = pool.heads * pool.width;
    Cell* mean = pool.index + (at * pool.parts + offset / part) * wide;
    for (int64_t i = 0; i < wide; ++i) add(mean + i, token.index[b * wide + i] / static_cast<float>(part));
  }

  void choose() {
    const int64_t own = position / s.length, count = listed_by(s, sight);
    const bool all = sees_all(s, sight);
    order.clear();
    for (int64_t m = 0; m < s.blocks; ++m) {
      const bool always = number(m) <= own && (number(m) < sight.sinks || number(m) >= own - sight.near);
      const bool past = same(m) && number(m) < own, seen = same(m) && (all || always) && number(m) <= own;
      for (int64_t j = 0; j < s.lists; ++j) scores[j * s.blocks + m] = seen ? -kLowest : kLowest;
      if (seen || past) order.push_back(static_cast<int32_t>(m));
      if (past && !seen) score(m);
    }
    for (int64_t j = 0; j < s.lists; ++j) {
      const float* of = scores.data() + j * s.blocks;
      const int64_t taken = std::min<int64_t>(count, order.size());
      const auto better = [of](int32_t m, int32_t n) { return of[m] != of[n] ? of[m] > of[n] : m < n; };
      if (taken < static_cast<int64_t>(order.size()))
        std::nth_element(order.begin(), order.begin() + taken, order.end(), better);
      int32_t* out = listed.data() + (b * s.lists + j) * count;
      std::copy_n(order.begin(), taken, out);
      std::fill(out + taken, out + count, -1);
    }
  }

  // log of the sum of exp over a block's parts, for every list.
  void score(int64_t m) {
    const int64_t per_head = s.lists / pool.heads, stride = pool.heads * pool.width, wide = padded(pool.parts);
    const Cell* keys = pool.index + (b * s.blocks + m) * pool.parts * stride;
    for (int64_t f = 0; f < pool.heads; ++f)
      for (int64_t from = 0; from < per_head; from += kRows) {
        const int64_t rows = std::min<int64_t>(kRows, per_head - from), j = f * per_head + from;
        const float* asks[kRows];
        float* out[kRows];
        for (int64_t i = 0; i < kRows; ++i) {
          asks[i] = token.asks + (b * s.lists + j + std::min(i, rows - 1)) * pool.width;
          out[i] = found.data + i * wide;
        }
        const auto products = rows == 1 ? dots<1, Cell> : rows == 2 ? dots<2, Cell> : dots<kRows, Cell>;
        products(asks, keys + f * pool.width, stride, pool.width, pool.parts, out);
        for (int64_t i = 0; i < rows; ++i) scores[(j + i) * s.blocks + m] = log_sum(out[i], wide);
      }
  }

  float log_sum(float* x, int64_t wide) const {
    if (pool.parts == 1) return x[0];
    std::fill(x + pool.parts, x + wide, kLowest);
    const float level = largest(x, wide);
    return level + std::log(exponentiate(x, level, wide));
  }
};

// What the blocks have been paid counts less with every token, and a block that was attended gets its share.
template <class Cell>
void remember(const Sizes& s, const Sight& sight, const Pool<Cell>& pool, const int32_t* listed, const float* share) {
  const float decay = std::exp2(-static_cast<float>(sight.half_lives) / static_cast<float>(s.blocks * s.length));
  for (int64_t b = 0; b < s.batch; ++b) {
    float* paid = pool.attention + b * s.blocks;
    for (int64_t m = 0; m < s.blocks; ++m) paid[m] *= decay;
    for (int64_t i = b * s.lists * s.listed; i < (b + 1) * s.lists * s.listed; ++i)
      if (listed[i] >= 0) paid[listed[i]] += share[i] / static_cast<float>(s.lists);
  }
}

}  // namespace sparse_attention
