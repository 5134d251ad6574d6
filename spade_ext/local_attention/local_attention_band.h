// Which keys a query sees.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <spade_ext/core/parallel.h>

#include <algorithm>
#include <optional>

namespace spade_ext::local_attention_cpu {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// What holds both, of which either may be empty.
inline Range hull(Range x, Range y) {
  if (x.size() == 0) return y;
  if (y.size() == 0) return x;
  return {std::min(x.begin, y.begin), std::max(x.end, y.end)};
}
inline Range intersection(Range x, Range y) {
  const int64_t begin = std::max(x.begin, y.begin);
  return {begin, std::max(begin, std::min(x.end, y.end))};
}

// A range for each row of (B, L), or of (1, L) where all b have the same. Neither end falls from one row to
// the next.
class Ranges {
 public:
  Ranges(int64_t B, int64_t L)
      : same_(B == 1),
        length_(L),
        memory_(at::empty({B, L, 2}, at::kLong)),
        data_(memory_.data_ptr<int64_t>()) {}

  void set(int64_t b, int64_t row, Range range) {
    entry(b, row)[0] = range.begin, entry(b, row)[1] = range.end;
  }
  Range of(int64_t b, int64_t row) const { return {entry(b, row)[0], entry(b, row)[1]}; }
  // From the first row's begin to the last row's end.
  Range of(int64_t b, Range rows) const {
    return rows.size() == 0 ? Range{0, 0} : Range{of(b, rows.begin).begin, of(b, rows.end - 1).end};
  }
  bool overlaps_previous(int64_t b, int64_t row) const { return of(b, row).begin < of(b, row - 1).end; }

 private:
  bool same_;
  int64_t length_;
  at::Tensor memory_;
  int64_t* data_;

  int64_t* entry(int64_t b, int64_t row) const { return data_ + ((same_ ? 0 : b) * length_ + row) * 2; }
};

// Query i, at position i + Lk - Lq, reaches the keys from position - left to position + right that stand in
// its segment and in its chunk, and sees the real ones among them.
class Band {
 public:
  int64_t B;  // 1 where neither mask nor segments tell one row of the batch from another
  int64_t Lq, Lk, left, right;
  std::optional<int64_t> chunk_size;
  Ranges keys;        // of each query: from the first to the last key that it sees, or empty
  at::Tensor counts;  // (B, Lq) int64: how many keys it sees

  // mask (B, Lk) bool and segment_ids (B, Lk) int64, contiguous, or undefined.
  Band(int64_t B_, int64_t Lq_, int64_t Lk_, int64_t left_, int64_t right_,
       std::optional<int64_t> chunk_size_, const at::Tensor& mask, const at::Tensor& segment_ids)
      : B(mask.defined() || segment_ids.defined() ? B_ : 1),
        Lq(Lq_),
        Lk(Lk_),
        left(left_),
        right(right_),
        chunk_size(chunk_size_),
        keys(B, Lq),
        counts(at::empty({B, Lq}, at::kLong)),
        counts_(counts.data_ptr<int64_t>()),
        mask_tensor_(mask),
        mask_(mask.defined() ? mask.data_ptr<bool>() : nullptr) {
    const int64_t* ids = segment_ids.defined() ? segment_ids.data_ptr<int64_t>() : nullptr;
    parallel_for_each(B,
                      [&](int64_t b) { ids ? find_keys(b, ids + b * Lk) : find_keys(b, {0, Lk}, {0, Lq}); });
  }

  int64_t position(int64_t i) const { return i + Lk - Lq; }
  // left and right as far as there are keys.
  int64_t reach_left() const { return std::min(left, Lk - 1); }
  int64_t reach_right() const { return std::min(right, Lq - 1); }
  bool is_real(int64_t b, int64_t j) const { return !mask_ || mask_[b * Lk + j]; }

  // Of each key that is no padding, the queries that see it.
  Ranges queries() const {
    Ranges result(B, Lk);
    parallel_for_each(B, [&](int64_t b) {
      Range range{0, 0};
      for (int64_t j = 0; j < Lk; ++j) {
        while (range.begin < Lq && keys.of(b, range.begin).end <= j) ++range.begin;
        while (range.end < Lq && keys.of(b, range.end).begin <= j) ++range.end;
        result.set(b, j, range);
      }
    });
    return result;
  }

 private:
  int64_t* counts_;
  at::Tensor mask_tensor_;
  const bool* mask_;

  // Segment by segment; a query before all keys has none.
  void find_keys(int64_t b, const int64_t* ids) {
    const int64_t shift = Lq - Lk;
    for (int64_t i = 0; i < std::min(shift, Lq); ++i) set(b, i, {0, 0}, 0);
    for (Range segment{0, 0}; segment.begin < Lk; segment.begin = segment.end) {
      while (segment.end < Lk && ids[segment.end] == ids[segment.begin]) ++segment.end;
      find_keys(b, segment, {std::max<int64_t>(segment.begin + shift, 0), segment.end + shift});
    }
  }

  void find_keys(int64_t b, Range segment, Range queries) {
    if (queries.size() <= 0) return;
    int64_t origin = segment.begin;  // of the chunks: the first real key
    while (origin < segment.end && !is_real(b, origin)) ++origin;
    int64_t begin = reach(queries.begin, segment, origin).begin, end = begin, read = begin, count = 0;
    for (int64_t i = queries.begin; i < queries.end; ++i) {
      const Range range = reach(i, segment, origin);
      for (; read < range.end; ++read) {
        if (is_real(b, read)) ++count, end = read + 1;
      }
      for (; begin < segment.end && (begin < range.begin || !is_real(b, begin)); ++begin) {
        if (is_real(b, begin)) --count;
      }
      set(b, i, {begin, std::max(begin, end)}, count);
    }
  }

  Range reach(int64_t i, Range segment, int64_t origin) const {
    const int64_t p = position(i);
    Range range{std::max(segment.begin, p - left), std::min(segment.end, p + right + 1)};
    if (chunk_size) {
      const int64_t rest = (p - origin) % *chunk_size;
      const int64_t chunk = p - (rest < 0 ? rest + *chunk_size : rest);
      range = {std::max(range.begin, chunk), std::min(range.end, chunk + *chunk_size)};
    }
    return {range.begin, std::max(range.begin, range.end)};
  }

  void set(int64_t b, int64_t i, Range range, int64_t count) {
    keys.set(b, i, range);
    counts_[b * Lq + i] = count;
  }
};

}  // namespace spade_ext::local_attention_cpu
