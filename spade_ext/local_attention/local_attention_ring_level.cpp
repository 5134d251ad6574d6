// Compiled once a level, as local_attention_tiles_level.cpp is.
#include <spade_ext/local_attention/local_attention_ring.h>
#include <spade_ext/local_attention/local_attention_vectors.h>

namespace spade_ext::CPU_CAPABILITY {
namespace {

constexpr int64_t kKeys = 64;  // met at a time; all heads of the group find them in the cache of the CPU

// scores[j] = q . k_j for n keys, in whole vectors of keys; what stands after the n-th has no meaning.
template <class scalar_t, class T = at::opmath_type<scalar_t>>
void products(const T* q, const scalar_t* k, int64_t stride, int64_t n, int64_t D, T* scores) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t j = 0; j < n; j += lanes) {
    const scalar_t* row[lanes];
    Vectorized<T> sum[lanes];
#pragma GCC unroll 16
    for (int64_t l = 0; l < lanes; ++l) {
      row[l] = k + (j + l < n ? j + l : n - 1) * stride;
      sum[l] = Vectorized<T>(T(0));
    }
    auto add = [&](int64_t d, const auto& load) {
      const Pair<T> query = load_pair(q + d);
#pragma GCC unroll 16
      for (int64_t l = 0; l < lanes; ++l) {
        const Pair<T> key = load(row[l] + d);
        __builtin_prefetch(row[l] + kKeys * stride + d);
        sum[l] = at::vec::fmadd(query.second, key.second, at::vec::fmadd(query.first, key.first, sum[l]));
      }
    };
    int64_t d = 0;
    for (; d + kPanel<T> <= D; d += kPanel<T>) add(d, [](const scalar_t* x) { return load_pair(x); });
    if (d < D) add(d, [&](const scalar_t* x) { return load_pair(x, D - d); });
    T rows[lanes * lanes], columns[lanes * lanes];
#pragma GCC unroll 16
    for (int64_t l = 0; l < lanes; ++l) sum[l].store(rows + l * lanes);
    at::vec::transpose_mxn<T, lanes, lanes>(rows, lanes, columns, lanes);
    Vectorized<T> total = Vectorized<T>::loadu(columns);
    for (int64_t l = 1; l < lanes; ++l) total = total + Vectorized<T>::loadu(columns + l * lanes);
    total.store(scores + j);
  }
}

// Scores become weights exp(score - largest), largest and total take them in. Returns the factor of what was
// summed before.
template <class scalar_t, class T = at::opmath_type<scalar_t>>
T weights(T* scores, int64_t n, const scalar_t* bias, T& largest, T& total) {
  using Vec = Vectorized<T>;
  for (int64_t j = n; j % kPanel<T> != 0; ++j) scores[j] = -kInfinity<T>;
  Vec most(largest), sum(T(0));
  for (int64_t j = 0; j < n; j += kPanel<T>) {
    Pair<T> entries;
    if (bias) entries = load_pair(bias + j, n - j);
    const Vec first = Vec::loadu(scores + j) + entries.first;
    const Vec second = Vec::loadu(scores + j + kLanes<T>) + entries.second;
    most = at::vec::maximum(most, at::vec::maximum(first, second));
    first.store(scores + j), second.store(scores + j + kLanes<T>);
  }
  T lanes[kLanes<T>];
  most.store(lanes);
  T now = lanes[0];
  for (T lane : lanes) now = lane > now || lane != lane ? lane : now;
  const Vec shift(now == -kInfinity<T> ? T(0) : now);
  for (int64_t j = 0; j < n; j += kLanes<T>) {
    const Vec weight = exponential(Vec::loadu(scores + j) - shift);
    sum = sum + weight;
    weight.store(scores + j);
  }
  exponential(Vec(largest) - shift).store(lanes);
  const T factor = lanes[0];
  sum.store(lanes);
  total *= factor;
  for (T lane : lanes) total += lane;
  largest = now;
  return factor;
}

// out = factor out + sum_j weight_j v_j, in `pairs` pairs of vectors that load(v_j + d) returns.
template <int pairs, class scalar_t, class T, class Load>
void add_values(const T* weight, T factor, const scalar_t* v, int64_t stride, int64_t n, T* out,
                const Load& load) {
  Pair<T> sum[pairs];
#pragma GCC unroll 4
  for (int p = 0; p < pairs; ++p) {
    sum[p] = load_pair(out + p * kPanel<T>);
    sum[p].first = sum[p].first * Vectorized<T>(factor),
    sum[p].second = sum[p].second * Vectorized<T>(factor);
  }
  for (int64_t j = 0; j < n; ++j, v += stride) {
    const Vectorized<T> w(weight[j]);
#pragma GCC unroll 4
    for (int p = 0; p < pairs; ++p) {
      const Pair<T> values = load(v + p * kPanel<T>);
      __builtin_prefetch(v + kKeys * stride + p * kPanel<T>);
      sum[p].first = at::vec::fmadd(w, values.first, sum[p].first);
      sum[p].second = at::vec::fmadd(w, values.second, sum[p].second);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < pairs; ++p) store_pair(sum[p], out + p * kPanel<T>, kPanel<T>);
}

template <class scalar_t, class T = at::opmath_type<scalar_t>>
void add(const LocalAttentionRun<scalar_t>& run, const LocalAttentionSums<T>& sums) {
  constexpr int kPairs = 4;
  alignas(64) T scores[kKeys];
  for (int64_t begin = 0; begin < run.n; begin += kKeys) {
    const int64_t n = run.n - begin < kKeys ? run.n - begin : kKeys;
    for (int64_t g = 0; g < sums.heads; ++g) {
      products(sums.q + g * sums.q_stride, run.k + begin * run.k_stride, run.k_stride, n, run.D, scores);
      const scalar_t* bias = run.bias ? run.bias + g * run.bias_stride + begin : nullptr;
      const T factor = weights(scores, n, bias, sums.largest[g], sums.total[g]);
      const scalar_t* v = run.v + begin * run.v_stride;
      T* out = sums.out + g * sums.out_stride;
      int64_t d = 0;
      auto whole = [](const scalar_t* x) { return load_pair(x); };
      for (; d + kPairs * kPanel<T> <= run.Dv; d += kPairs * kPanel<T>)
        add_values<kPairs>(scores, factor, v + d, run.v_stride, n, out + d, whole);
      for (; d + kPanel<T> <= run.Dv; d += kPanel<T>)
        add_values<1>(scores, factor, v + d, run.v_stride, n, out + d, whole);
      if (d < run.Dv) {
        auto rest = [&](const scalar_t* x) { return load_pair(x, run.Dv - d); };
        add_values<1>(scores, factor, v + d, run.v_stride, n, out + d, rest);
      }
    }
  }
}

}  // namespace

extern const LocalAttentionRing<double> local_attention_ring_double = {add<double>};
extern const LocalAttentionRing<float> local_attention_ring_float = {add<float>};
extern const LocalAttentionRing<at::Half> local_attention_ring_half = {add<at::Half>};
extern const LocalAttentionRing<at::BFloat16> local_attention_ring_bfloat16 = {add<at::BFloat16>};

}  // namespace spade_ext::CPU_CAPABILITY
