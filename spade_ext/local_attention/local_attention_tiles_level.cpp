// Compiled once a level, with CPU_CAPABILITY naming it. Everything stands in a namespace of that name: a
// function that two levels shared could be taken from the wrong one and stop an older CPU.
#include <spade_ext/local_attention/local_attention_tiles.h>
#include <spade_ext/local_attention/local_attention_vectors.h>

namespace spade_ext::CPU_CAPABILITY {
namespace {

using local_attention_math::Activation;
using local_attention_math::Dropout;

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kRows = 12;  // 24 of 32 registers for sums
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kRows = 6;  // 12 of 16
#else
constexpr int kRows = 4;
#endif

// A register tile of a product: `sum` of rows x count vectors.
template <class T, int rows, int count>
struct Sums {
  using Vec = Vectorized<T>;
  Vec sum[rows][count];

  Sums(const T* c, bool add) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < count; ++v)
        sum[r][v] = add ? Vec::loadu(c + r * kPanel<T> + v * kLanes<T>) : Vec(T(0));
    }
  }
  // sum[r] += a[r * a_row] b
  template <int64_t a_row>
  void add_product(const T* a, const T* b) {
    Vec columns[count];
#pragma GCC unroll 2
    for (int v = 0; v < count; ++v) columns[v] = Vec::loadu(b + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Vec weight(a[r * a_row]);
#pragma GCC unroll 2
      for (int v = 0; v < count; ++v) sum[r][v] = at::vec::fmadd(weight, columns[v], sum[r][v]);
    }
  }
  void store(T* c) const {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < count; ++v) sum[r][v].store(c + r * kPanel<T> + v * kLanes<T>);
    }
  }
};

// Calls body(integral_constant<rows>, integral_constant<vectors>), rows from 1 to kRows.
template <int rows = kRows, class Body>
void with_constants(int64_t n, int64_t vectors, const Body& body) {
  if constexpr (rows > 1) {
    if (n < rows) return with_constants<rows - 1>(n, vectors, body);
  }
  using Rows = std::integral_constant<int, rows>;
  vectors == 1 ? body(Rows{}, std::integral_constant<int, 1>{})
               : body(Rows{}, std::integral_constant<int, 2>{});
}

template <class T>
void multiply(const T* a, int64_t a_panel, const T* b, T* c, int64_t rows, int64_t k_begin, int64_t k_end,
              int64_t vectors, bool add) {
  for (; rows > 0; rows -= kRows, a += kRows * kPanel<T>, c += kRows * kPanel<T>) {
    with_constants(rows, vectors, [&](auto tile_rows, auto count) {
      Sums<T, tile_rows, count> sums(c, add);
      for (int64_t k = k_begin; k < k_end;) {
        const int64_t panel = k / kPanel<T>;
        const int64_t end = (panel + 1) * kPanel<T> < k_end ? (panel + 1) * kPanel<T> : k_end;
        const T* column = a + panel * (a_panel - kPanel<T>);
        for (; k < end; ++k) sums.template add_product<kPanel<T>>(column + k, b + k * kPanel<T>);
      }
      sums.store(c);
    });
  }
}

template <class T>
void multiply_transposed(const T* a, const T* b, T* c, int64_t rows, int64_t n, int64_t vectors, bool add) {
  for (; rows > 0; rows -= kRows, a += kRows, c += kRows * kPanel<T>) {
    with_constants(rows, vectors, [&](auto tile_rows, auto count) {
      Sums<T, tile_rows, count> sums(c, add);
      for (int64_t k = 0; k < n; ++k) sums.template add_product<1>(a + k * kPanel<T>, b + k * kPanel<T>);
      sums.store(c);
    });
  }
}

// Rows of one head lie far apart, which the CPU's own prefetching does not see through: fetch the next
// tile's.
constexpr int64_t kRowsAhead = 64;

template <class scalar_t, class T = at::opmath_type<scalar_t>>
void load(const scalar_t* x, int64_t stride, const T* factor, int64_t rows, int64_t width, T* panels) {
  for (int64_t r = 0; r < rows; ++r) {
    const T weight = factor ? factor[r] : T(1);
    const scalar_t* ahead = x + (r + kRowsAhead) * stride;
    for (int64_t d = 0; d < width; d += kPanel<T>) {
      __builtin_prefetch(ahead + d, 0, 2);
      T* y = panels + (d / kPanel<T> * rows + r) * kPanel<T>;
      Pair<T> values;  // a row of factor 0 may be anything
      if (weight != 0) values = load_pair<scalar_t, T>(x + r * stride + d, width - d);
      (values.first * Vectorized<T>(weight)).store(y);
      (values.second * Vectorized<T>(weight)).store(y + kLanes<T>);
    }
  }
}

template <class scalar_t, class T = at::opmath_type<scalar_t>>
void store(const T* panels, int64_t panel_rows, const T* factor, int64_t rows, int64_t width, scalar_t* y,
           int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const Vectorized<T> weight(factor ? factor[r] : T(1));
    for (int64_t d = 0; d < width; d += kPanel<T>) {
      const T* x = panels + (d / kPanel<T> * panel_rows + r) * kPanel<T>;
      __builtin_prefetch(y + (r + kRowsAhead) * stride + d, 1, 2);
      const Pair<T> values{Vectorized<T>::loadu(x) * weight, Vectorized<T>::loadu(x + kLanes<T>) * weight};
      store_pair(values, y + r * stride + d, width - d);
    }
  }
}

template <class T>
void transpose(const T* x, int64_t rows, int64_t width, T* y) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t begin = 0; begin < rows; begin += kPanel<T>, y += width * kPanel<T>) {
    for (int64_t d = 0; d < width; d += lanes) {
      const T* block = x + (d / kPanel<T> * rows + begin) * kPanel<T> + d % kPanel<T>;
      for (int64_t r = 0; r < kPanel<T>; r += lanes, block += lanes * kPanel<T>) {
        T* column = y + d * kPanel<T> + r;
        if (begin + r + lanes <= rows && d + lanes <= width) {
          at::vec::transpose_mxn<T, lanes, lanes>(block, kPanel<T>, column, kPanel<T>);
          continue;
        }
        for (int64_t e = 0; e < lanes && d + e < width; ++e) {
          for (int64_t l = 0; l < lanes; ++l)
            column[e * kPanel<T> + l] = begin + r + l < rows ? block[l * kPanel<T> + e] : T(0);
        }
      }
    }
  }
}

template <class T>
void dots(const T* x, const T* y, int64_t rows, int64_t width, T* out) {
  for (int64_t r = 0; r < rows; ++r) {
    Vectorized<T> sum(T(0));
    for (int64_t d = 0; d < width; d += kLanes<T>) {
      const int64_t at = (d / kPanel<T> * rows + r) * kPanel<T> + d % kPanel<T>;
      sum = at::vec::fmadd(Vectorized<T>::loadu(x + at), Vectorized<T>::loadu(y + at), sum);
    }
    T lanes[kLanes<T>];
    sum.store(lanes);
    out[r] = 0;
    for (T lane : lanes) out[r] += lane;
  }
}

// Calls body(v, offset, score) for every vector of scores, bias added and -inf where not seen.
template <int count, class T, class Body>
void for_each_score(const T* scores, int64_t n, const T* table, const T* key_factor, const Body& body) {
  for (int64_t j = 0; j < n; ++j, --table) {
    const bool hidden = key_factor && key_factor[j] == 0;
#pragma GCC unroll 2
    for (int v = 0; v < count; ++v) {
      const int64_t offset = j * kPanel<T> + v * kLanes<T>;
      const auto bias = Vectorized<T>::loadu(table + v * kLanes<T>);
      body(v, offset, hidden ? Vectorized<T>(-kInfinity<T>) : Vectorized<T>::loadu(scores + offset) + bias);
    }
  }
}

template <int count, class T>
void softmax(T* scores, int64_t n, const T* table, const T* key_factor, T* lse, T* factor) {
  using Vec = Vectorized<T>;
  const Vec zero(T(0)), infinity(kInfinity<T>);
  Vec largest[count], sum[count];
  for (int v = 0; v < count; ++v) largest[v] = Vec(-kInfinity<T>), sum[v] = zero;
  for_each_score<count>(scores, n, table, key_factor, [&](int v, int64_t offset, const Vec& score) {
    largest[v] = at::vec::maximum(largest[v], score);
    score.store(scores + offset);
  });
  Vec shift[count];
  for (int v = 0; v < count; ++v) shift[v] = Vec::blendv(largest[v], zero, largest[v] == Vec(-kInfinity<T>));
  for (int64_t j = 0; j < n; ++j) {
#pragma GCC unroll 2
    for (int v = 0; v < count; ++v) {
      T* x = scores + j * kPanel<T> + v * kLanes<T>;
      const Vec weight = exponential(Vec::loadu(x) - shift[v]);
      sum[v] = sum[v] + weight;
      weight.store(x);
    }
  }
  for (int v = 0; v < count; ++v) {
    const Vec none = sum[v] == zero;
    Vec::blendv(shift[v] + sum[v].log(), infinity, none).store(lse + v * kLanes<T>);
    Vec::blendv(Vec(T(1)) / sum[v], zero, none).store(factor + v * kLanes<T>);
  }
}

// An elementwise activation's weight of a score, and its derivative. A score of -inf gives 0 and 0.
template <class T>
struct Weight {
  Vectorized<T> value, slope;
};

template <class T>
C10_ALWAYS_INLINE Weight<T> relu2(Vectorized<T> score) {
  const auto positive = at::vec::clamp_min(score, Vectorized<T>(T(0)));
  return {positive * positive, positive + positive};
}

template <class T>
C10_ALWAYS_INLINE Weight<T> laplace(Vectorized<T> score) {
  using Vec = Vectorized<T>;
  constexpr double inverse_width = 1 / (0.282095 * 1.4142135623730951), inverse_sqrt_pi = 0.56418958354775629;
  const Vec x = (score - Vec(T(0.707107))) * Vec(T(inverse_width));
  return {Vec(T(0.5)) * (Vec(T(1)) + x.erf()),
          Vec(T(inverse_width * inverse_sqrt_pi)) * exponential(x.neg() * x)};
}

template <int count, class T, class Function>
void elementwise(T* scores, int64_t n, const T* table, const T* key_factor, T* lse, T* factor,
                 const Function& function) {
  for_each_score<count>(scores, n, table, key_factor, [&](int, int64_t offset, const Vectorized<T>& score) {
    function(score).value.store(scores + offset);
  });
  for (int64_t l = 0; l < count * kLanes<T>; ++l) lse[l] = 0, factor[l] = 1;
}

template <int count, class T>
void weights(Activation activation, T* scores, int64_t n, const T* table, const T* key_factor, T* lse,
             T* factor) {
  if (activation == Activation::softmax)
    softmax<count>(scores, n, table, key_factor, lse, factor);
  else if (activation == Activation::relu2)
    elementwise<count>(scores, n, table, key_factor, lse, factor,
                       [](const Vectorized<T>& score) { return relu2(score); });
  else
    elementwise<count>(scores, n, table, key_factor, lse, factor,
                       [](const Vectorized<T>& score) { return laplace(score); });
}

template <class T>
void weights(Activation activation, T* scores, int64_t n, const T* table, const T* key_factor,
             int64_t vectors, T* lse, T* factor) {
  const auto function = vectors == 1 ? weights<1, T> : weights<2, T>;
  function(activation, scores, n, table, key_factor, lse, factor);
}

template <int count, class T>
void gradients(Activation activation, T* scores, T* grad, int64_t n, const T* table, const T* key_factor,
               const T* lse, const T* delta) {
  using Vec = Vectorized<T>;
  auto elementwise = [&](const auto& function) {
    for_each_score<count>(scores, n, table, key_factor, [&](int, int64_t offset, const Vec& score) {
      const Weight<T> weight = function(score);
      weight.value.store(scores + offset);
      (Vec::loadu(grad + offset) * weight.slope).store(grad + offset);
    });
  };
  if (activation == Activation::relu2) return elementwise([](const Vec& score) { return relu2(score); });
  if (activation == Activation::laplace) return elementwise([](const Vec& score) { return laplace(score); });
  Vec lse_of[count], delta_of[count];
  for (int v = 0; v < count; ++v) {
    lse_of[v] = Vec::loadu(lse + v * kLanes<T>), delta_of[v] = Vec::loadu(delta + v * kLanes<T>);
  }
  for_each_score<count>(scores, n, table, key_factor, [&](int v, int64_t offset, const Vec& score) {
    const Vec weight = exponential(score - lse_of[v]);
    weight.store(scores + offset);
    (weight * (Vec::loadu(grad + offset) - delta_of[v])).store(grad + offset);
  });
}

template <class T>
void gradients(Activation activation, T* scores, T* grad, int64_t n, const T* table, const T* key_factor,
               int64_t vectors, const T* lse, const T* delta) {
  const auto function = vectors == 1 ? gradients<1, T> : gradients<2, T>;
  function(activation, scores, grad, n, table, key_factor, lse, delta);
}

template <class T>
void drop(const Dropout& dropout, T* scores, int64_t n, uint64_t first, uint64_t keys) {
  const T factor(dropout.factor);
  for (int64_t j = 0; j < n; ++j, ++first, scores += kPanel<T>) {
    int64_t bits[kPanel<T>];  // in a loop of their own, which becomes one of vectors
    for (int64_t i = 0; i < kPanel<T>; ++i) bits[i] = dropout.bits(first + i * keys);
    for (int64_t i = 0; i < kPanel<T>; ++i) {
      scores[i] = bits[i] >= dropout.threshold ? scores[i] * factor : T(0);
    }
  }
}

// Every `lanes`-th row in turn: sums of neighbouring rows overlap, and the CPU is slow to load across what
// it stored a moment ago.
template <class T>
void add_to_table(const T* grad, int64_t n, int64_t vectors, T* table) {
  for (int64_t first = 0; first < kLanes<T>; ++first) {
    for (int64_t j = first; j < n; j += kLanes<T>) {
      for (int64_t l = 0; l < vectors * kLanes<T>; l += kLanes<T>) {
        T* sum = table - j + l;
        (Vectorized<T>::loadu(sum) + Vectorized<T>::loadu(grad + j * kPanel<T> + l)).store(sum);
      }
    }
  }
}

template <class scalar_t, class T = at::opmath_type<scalar_t>>
constexpr LocalAttentionTiles<scalar_t> tiles() {
  return {kLanes<T>,    kPanel<T>, kRows,          load<scalar_t>,         store<scalar_t>,
          transpose<T>, dots<T>,   multiply<T>,    multiply_transposed<T>, weights<T>,
          gradients<T>, drop<T>,   add_to_table<T>};
}

}  // namespace

extern const LocalAttentionTiles<double> local_attention_tiles_double = tiles<double>();
extern const LocalAttentionTiles<float> local_attention_tiles_float = tiles<float>();
extern const LocalAttentionTiles<at::Half> local_attention_tiles_half = tiles<at::Half>();
extern const LocalAttentionTiles<at::BFloat16> local_attention_tiles_bfloat16 = tiles<at::BFloat16>();

}  // namespace spade_ext::CPU_CAPABILITY
