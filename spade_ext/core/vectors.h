// Vectors of the type of sums, for files that are compiled once a level of the CPU.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <type_traits>

namespace spade_ext::CPU_CAPABILITY {
namespace {

using at::vec::Vectorized;

template <class T>
constexpr int64_t kLanes = Vectorized<T>::size();
template <class T>
constexpr int64_t kPanel = 2 * kLanes<T>;

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
    Pair<T> pair;  // not by convert_to_float, whose tuple GCC keeps in memory
    if constexpr (std::is_same_v<scalar_t, at::BFloat16>)
      at::vec::load_fp32_from_bf16(x, pair.first, pair.second);
    else
      at::vec::load_fp32_from_fp16(x, pair.first, pair.second);
    return pair;
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

}  // namespace
}  // namespace spade_ext::CPU_CAPABILITY
