// Sparse attention on the CPU: forward and backward, threaded over tiles of queries and over blocks of keys.
//
// Layout: q, y, dy, dq are float [B,T,H,N]; k, v, dk, dv [B,M,C,G,N]; blocks int32 [B,T,J,K]; starts int32
// [B,M]; positions int32 [B,T]; share float [B,T,J,K]; logs float [B,T,H], the logarithm of each softmax's
// denominator. N is a multiple of 16.
//
// A tile is some consecutive tokens of one list; its rows are the heads of the list at these tokens. The blocks
// that a tile lists are walked one after the other, each for the rows that list it, four rows at a time, with
// a running maximum and sum (online softmax). The backward pass walks them twice: tile by tile for dq, and
// block by block, over the tokens that list it, for dk and dv. Every sum has a fixed order.

#include "backward.h"
#include "step.h"
#include "tiles.h"

namespace {

using namespace sparse_attention;

struct Forward {
  const Inputs& in;
  Scorer score;
  float *y, *share, *logs;
  Tile tile;
  std::vector<float> level, total, of_level, of_total;  // of rows; of the entries of rows
  Scratch sums, scores;

  Forward(const Inputs& inputs, const Transposed* keys, float* y_, float* share_, float* logs_)
      : in(inputs), score{inputs, keys}, y(y_), share(share_), logs(logs_), tile(inputs),
        level(rows()), total(rows()), of_level(rows() * in.s.listed), of_total(rows() * in.s.listed),
        sums((rows() + 1) * in.s.size), scores(kRows * kColumns) {}

  int64_t rows() const { return Tile::tokens_of(in.s) * in.s.per_list(); }
  int64_t query(int64_t row) const {
    const int64_t heads = in.s.per_list();
    return in.query(tile.b, tile.first + row / heads, tile.j * heads + row % heads);
  }

  void operator()(int64_t unit) {
    tile.move_to(unit);
    std::fill(level.begin(), level.end(), kLowest);
    std::fill(total.begin(), total.end(), 0.0f);
    std::fill(of_level.begin(), of_level.end(), kLowest);
    std::fill(of_total.begin(), of_total.end(), 0.0f);
    std::memset(sums.data, 0, (rows() + 1) * in.s.size * sizeof(float));
    for (int32_t m : tile.touched)
      by_fours(tile, m, false, [&](const Four& four) {
        four.count == 1 ? add<1>(m, four) : four.count == 2 ? add<2>(m, four) : add<kRows>(m, four);
      });
    finish();
  }

  template <int R>
  void add(int32_t m, const Four& four) {
    const Sizes& s = in.s;
    const float* queries[R];
    float *found[R], *out[R];
    for (int i = 0; i < R; ++i) {
      queries[i] = in.q + query(four.row[i]);
      found[i] = scores.data + i * kColumns;
      // What is only watched, and what repeats another row, adds up where nobody looks.
      out[i] = sums.data + (four.attends[i] ? four.row[i] : rows()) * s.size;
    }
    for (int64_t from = 0; from < four.most; from += kColumns) {
      const int64_t columns = std::min<int64_t>(kColumns, four.most - from), width = padded(columns);
      score.template fill<R>(queries, tile.b, m, tile.g, from, columns, four.visible, found);
      bool any = false;
      for (int i = 0; i < R; ++i) any |= weigh(four, i, found[i], width);
      const float* values = in.v + in.key(tile.b, m, from, tile.g);
      if (any) product<R>(found, 1, values, s.key_stride(), columns, out, s.size, true);
    }
  }

  // Turns scores of one row into weights relative to its running maximum; whether they count in its sum.
  bool weigh(const Four& four, int i, float* x, int64_t width) {
    const float most = i < four.count ? largest(x, width) : kLowest;
    if (most == kLowest) {
      std::memset(x, 0, width * sizeof(float));
      return false;
    }
    const int64_t row = four.row[i], entry = row * in.s.listed + four.column[i];
    const float before = level[row];
    const float own = four.attends[i] ? std::max(before, most) : std::max(of_level[entry], most);
    const float added = exponentiate(x, own, width);
    of_total[entry] = of_total[entry] * std::exp(of_level[entry] - own) + added;
    of_level[entry] = own;
    if (!four.attends[i]) {
      std::memset(x, 0, width * sizeof(float));
      return false;
    }
    if (own > before) {
      const float keep = std::exp(before - own);
      float* at = sums.data + row * in.s.size;
      for (int64_t n = 0; n < in.s.size; n += kWidth) store(at + n, load(at + n) * keep);
      total[row] *= keep;
      level[row] = own;
    }
    total[row] += added;
    return true;
  }

  void finish() {
    const Sizes& s = in.s;
    const int64_t heads = s.per_list();
    for (int64_t row = 0; row < tile.rows(); ++row) {
      float* out = y + query(row);
      const float scale = total[row] > 0 ? 1 / total[row] : 0.0f;
      for (int64_t n = 0; n < s.size; n += kWidth) store(out + n, load(sums.data + row * s.size + n) * scale);
      if (logs != nullptr) logs[query(row) / s.size] = level[row] + std::log(total[row]);
    }
    for (int64_t t = tile.first; t < tile.last; ++t)
      for (int64_t c = 0; c < s.listed; ++c) {
        float mean = 0;
        for (int64_t h = 0; h < heads; ++h) {
          const int64_t row = (t - tile.first) * heads + h, entry = row * s.listed + c;
          if (of_total[entry] > 0 && total[row] > 0)
            mean += std::min(of_total[entry] / total[row] * std::exp(of_level[entry] - level[row]), kLargestShare);
        }
        share[((tile.b * s.tokens + t) * s.lists + tile.j) * s.listed + c] = mean / heads;
      }
  }
};

// About how many multiply-adds a tile, or what is listed for it, costs.
int64_t tile_cost(const Sizes& s) {
  return Tile::tokens_of(s) * s.per_list() * s.listed * s.length * s.size;
}

Status forward(const Inputs& in, int64_t threads, float* y, float* share, float* logs) {
  const Sizes& s = in.s;
  std::unique_ptr<Transposed> keys;
  if (s.tokens * s.per_list() > 2 * kRows) {
    keys = std::make_unique<Transposed>(in);
    const Status status = transpose(in, listed_anywhere(in), in.k, *keys, threads);
    if (status != kDone) return status;
  }
  return parallel(Tile::count(s), tile_cost(s), threads, [&] { return Forward(in, keys.get(), y, share, logs); });
}

Status backward(const Inputs& in, int64_t threads, const float* dy, const float* y, const float* logs, float* dq,
                float* dk, float* dv) {
  const Sizes& s = in.s;
  const Transposed keys(in), values(in);
  const std::vector<char> wanted = listed_anywhere(in);
  Status status = transpose(in, wanted, in.k, keys, threads);
  if (status == kDone) status = transpose(in, wanted, in.v, values, threads);
  if (status != kDone) return status;
  const Scratch meeting(static_cast<size_t>(s.batch * s.tokens * s.heads));
  for (int64_t row = 0; row < s.batch * s.tokens * s.heads; ++row) {
    Vec total = {};
    for (int64_t n = 0; n < s.size; n += kWidth) total += load(dy + row * s.size + n) * load(y + row * s.size + n);
    meeting.data[row] = sum(total);
  }
  const Slopes slopes{in, keys, values, dy, logs, meeting.data};
  status = parallel(Tile::count(s), 3 * tile_cost(s), threads, [&] { return QueryGradients(in, slopes, dq); });
  if (status != kDone) return status;
  const Readers readers(in);
  return parallel(s.batch * s.blocks * s.groups, tile_cost(s), threads,
                  [&] { return KeyGradients(in, slopes, readers, dk, dv); });
}

// y [B,1,H,N] of one token of each row; the pool is changed.
template <class Cell>
Status step(Sizes s, const Sight& sight, const Pool<Cell>& pool, const Token& token, int64_t threads, float* y) {
  s.listed = Step<Cell>::listed_by(s, sight);
  std::vector<int32_t> listed(s.batch * s.lists * s.listed), positions(s.batch);
  Status status = parallel(s.batch, Step<Cell>::cost(s, pool), threads,
                           [&] { return Step<Cell>(s, sight, pool, token, listed, positions); });
  if (status != kDone) return status;
  std::vector<float> share(listed.size());
  const Inputs in{s, token.q, pool.keys, pool.values, listed.data(), pool.starts, positions.data()};
  status = forward(in, threads, y, share.data(), nullptr);
  if (status == kDone) remember(s, sight, pool, listed.data(), share.data());
  return status;
}

}  // namespace

#define SIZES                                                                                                \
  int64_t batch, int64_t tokens, int64_t heads, int64_t size, int64_t blocks, int64_t length, int64_t groups, \
      int64_t lists, int64_t listed, int64_t threads
#define INPUTS \
  const float *q, const float *k, const float *v, const int32_t *list, const int32_t *starts, const int32_t *positions
#define GIVEN {{batch, tokens, heads, size, blocks, length, groups, lists, listed}, q, k, v, list, starts, positions}

extern "C" int sparse_attention_forward(SIZES, INPUTS, float* y, float* share, float* logs) {
  try {
    return forward(GIVEN, threads, y, share, logs);
  } catch (const std::exception&) {
    return kOutOfMemory;
  }
}

extern "C" int sparse_attention_backward(SIZES, const float* dy, INPUTS, const float* y, const float* logs,
                                         float* dq, float* dk, float* dv) {
  try {
    return backward(GIVEN, threads, dy, y, logs, dq, dk, dv);
  } catch (const std::exception&) {
    return kOutOfMemory;
  }
}

extern "C" int sparse_attention_step(int64_t batch, int64_t tokens, int64_t heads, int64_t size, int64_t blocks,
                                     int64_t length, int64_t groups, int64_t lists, int64_t parts,
                                     int64_t index_heads, int64_t width, int64_t cell_bytes, int64_t sinks,
                                     int64_t near, int64_t best, int64_t first, int64_t kept,
                                     int64_t half_lives, int64_t threads, const float* q, const float* k,
                                     const float* v, const float* asks, const float* index_key,
                                     float* keys, float* values, void* index, int32_t* starts, int64_t* documents,
                                     float* attention, int64_t* counts, float* y) {
  const Sizes s{batch, tokens, heads, size, blocks, length, groups, lists, 0};
  const Sight sight{sinks, near, best, first, kept, half_lives};
  const Token token{q, k, v, asks, index_key};
  const auto run = [&](auto* cells) {
    const Pool<std::remove_pointer_t<decltype(cells)>> pool{
        parts, index_heads, width, keys, values, cells, starts, documents, attention, counts};
    return step(s, sight, pool, token, threads, y);
  };
  try {
    return cell_bytes == 2 ? run(static_cast<uint16_t*>(index)) : run(static_cast<float*>(index));
  } catch (const std::exception&) {
    return kOutOfMemory;
  }
}
