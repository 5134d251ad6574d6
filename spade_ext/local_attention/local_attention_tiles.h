// The arithmetic of tiles, compiled once for each level of the CPU and chosen at run time.
#pragma once

#include <ATen/OpMathType.h>
#include <spade_ext/local_attention/local_attention_math.h>

#include <cstdint>

namespace spade_ext {

// Matrices are kept in panels of `panel` columns: element (r, c) of one with R rows stands at
// (c / panel * R + r) * panel + c % panel. What a panel's last columns hold beyond the matrix has no meaning.
// Scores are transposed, a key a row and a query a column, so that vectors run over queries.
template <class scalar_t>
struct LocalAttentionTiles {
  using T = at::opmath_type<scalar_t>;
  int64_t lanes;  // elements of a vector
  int64_t panel;  // 2 lanes
  int64_t rows;   // of a result, whose sums stay in registers

  // Panels of `rows` rows of x times factor (1 where null); a row of factor 0 is not read.
  void (*load)(const scalar_t* x, int64_t stride, const T* factor, int64_t rows, int64_t width, T* panels);
  // y <- rows of panels, of which there are panel_rows, times factor (1 where null).
  void (*store)(const T* panels, int64_t panel_rows, const T* factor, int64_t rows, int64_t width,
                scalar_t* y, int64_t stride);
  // The (width, rows) panels of (rows, width) panels; 0 in the columns after the last row.
  void (*transpose)(const T* x, int64_t rows, int64_t width, T* y);
  // out[r] = x[r] . y[r]
  void (*dots)(const T* x, const T* y, int64_t rows, int64_t width, T* out);

  // One panel of a product, of which `vectors` vectors of columns are wanted, 1 or 2: c = a b, or c += a b
  // where add. a stands in panels `a_panel` elements apart; columns k_begin to k_end of a count, and those
  // rows of b.
  void (*multiply)(const T* a, int64_t a_panel, const T* b, T* c, int64_t rows, int64_t k_begin,
                   int64_t k_end, int64_t vectors, bool add);
  // c = a^T b, or c += a^T b: a is n rows of one panel, of whose columns the first `rows` count.
  void (*multiply_transposed)(const T* a, const T* b, T* c, int64_t rows, int64_t n, int64_t vectors,
                              bool add);

  // Below, `scores` are the products of n keys with a panel of queries. The bias of key j and the panel's
  // first query is table[-j], that of the next query the next entry, -inf where the band ends. A key of
  // factor 0 is not seen.

  // Scores become weights. Of softmax not normalised: they are to be multiplied by factor, 0 where all
  // scores are -inf, in which case lse is +inf.
  void (*weights)(local_attention_math::Activation activation, T* scores, int64_t n, const T* table,
                  const T* key_factor, int64_t vectors, T* lse, T* factor);
  // Scores become weights, and `grad`, the gradients of weights, those of scores.
  void (*gradients)(local_attention_math::Activation activation, T* scores, T* grad, int64_t n,
                    const T* table, const T* key_factor, int64_t vectors, const T* lse, const T* delta);
  // scores <- keep scores / (1 - p). Key j and the panel's query i are pair first + j + i keys.
  void (*drop)(const local_attention_math::Dropout& dropout, T* scores, int64_t n, uint64_t first,
               uint64_t keys);
  // The transpose of adding a bias: table[-j + i] += grad[j][i].
  void (*add_to_table)(const T* grad, int64_t n, int64_t vectors, T* table);
};

// The functions for this CPU: double, float, at::Half or at::BFloat16.
template <class scalar_t>
const LocalAttentionTiles<scalar_t>& local_attention_tiles();

}  // namespace spade_ext
