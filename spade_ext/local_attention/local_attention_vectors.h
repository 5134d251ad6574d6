// Vectors of the type of sums, for files that are compiled once a level of the CPU.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>

namespace spade_ext::CPU_CAPABILITY {
namespace {

using at::vec::Vectorized;

template <class T>
constexpr int64_t kLanes = Vectorized<T>::size();
template <class T>
constexpr int64_t kPanel = 2 * kLanes<T>;
template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// A vector of a half type is two of float32.
template <class T>
struct Pair {
  Vectorized<T> first{T(0)}, second{T(0)};
};

template <class scalar_t, class T = at::opmath_type<scalar_t>>
C10_ALWAYS_INLINE Pair<T> load_pair(const scalar_t* x) {
  if constexpr (std::is_same_v<scalar_t, T>) {
    return {Vectorized<T>::loadu(x), Vectorized<T>::loadu(x + kLanes<T>)};
  } else {
    const auto [first, second] = at::vec::convert_to_float(Vectorized<scalar_t>::loadu(x));
    return {first, second};
  }
}

// The first n numbers of an array, 0 beyond, and back.
template <class scalar_t, class T = at::opmath_type<scalar_t>>
C10_ALWAYS_INLINE Pair<T> load_pair(const scalar_t* x, int64_t n) {
  if (n >= kPanel<T>) return load_pair<scalar_t, T>(x);
  if constexpr (std::is_same_v<scalar_t, T>) {
    if (n <= kLanes<T>) return {Vectorized<T>::loadu(x, n), Vectorized<T>(T(0))};
    return {Vectorized<T>::loadu(x), Vectorized<T>::loadu(x + kLanes<T>, n - kLanes<T>)};
  } else {
    const auto [first, second] = at::vec::convert_to_float(Vectorized<scalar_t>::loadu(x, n));
    return {first, second};
  }
}

template <class scalar_t, class T = at::opmath_type<scalar_t>>
C10_ALWAYS_INLINE void store_pair(const Pair<T>& values, scalar_t* y, int64_t n) {
  if constexpr (std::is_same_v<scalar_t, T>) {
    values.first.store(y, n < kLanes<T> ? n : kLanes<T>);
    if (n > kLanes<T>) values.second.store(y + kLanes<T>, n < kPanel<T> ? n - kLanes<T> : kLanes<T>);
  } else {
    const auto halves = at::vec::convert_from_float<scalar_t>(values.first, values.second);
    n < kPanel<T> ? halves.store(y, n) : halves.store(y);
  }
}

// 1 / k! for k up to degree.
template <class T, int degree>
struct ExponentialSeries {
  T coefficient[degree + 1];
  constexpr ExponentialSeries() : coefficient{} {
    T factorial = 1;
    for (int k = 0; k <= degree; ++k) factorial *= k < 2 ? 1 : k, coefficient[k] = 1 / factorial;
  }
};

// For x up to 88, by x = n log 2 + r and Taylor's polynomial of exp(r). NaN stays; 0 below the normal
// numbers.
template <class T>
C10_ALWAYS_INLINE Vectorized<T> exponential(Vectorized<T> x) {
  using Vec = Vectorized<T>;
  using Int = at::vec::int_same_size_t<T>;
  constexpr bool single = std::is_same_v<T, float>;
  constexpr int mantissa = single ? 23 : 52, degree = single ? 6 : 13;
  constexpr T magic =
      single ? 0x1.8p23 : 0x1.8p52;  // rounds to an integer, in its lowest bits, what it is added to
  constexpr Int one = single ? 0x3f800000 : 0x3ff0000000000000;
  x = at::vec::clamp_min(x, Vec(T(single ? -88 : -709)));
  const Vec n = at::vec::fmadd(x, Vec(T(1.4426950408889634)), Vec(magic));
  const Vec r = at::vec::fmadd(n - Vec(magic), Vec(T(-0.69314718055994531)), x);
  constexpr ExponentialSeries<T, degree> series;
  Vec sum(series.coefficient[degree]);
#pragma GCC unroll 16
  for (int k = degree - 1; k >= 0; --k) sum = at::vec::fmadd(sum, r, Vec(series.coefficient[k]));
  const auto power = (at::vec::cast<Int>(n) << Vectorized<Int>(mantissa)) + Vectorized<Int>(one);
  return sum * at::vec::cast<T>(power);
}

}  // namespace
}  // namespace spade_ext::CPU_CAPABILITY
