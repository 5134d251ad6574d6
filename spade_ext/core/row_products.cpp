#include <ATen/Version.h>
#include <spade_ext/core/row_products.h>

#include <string>
#include <type_traits>

namespace spade_ext {

#define SPADE_EXT_DECLARE_LEVEL(level)                  \
  namespace level {                                     \
  extern const RowProducts<float> row_products_float;   \
  extern const RowProducts<double> row_products_double; \
  }

SPADE_EXT_DECLARE_LEVEL(DEFAULT)
#ifdef SPADE_EXT_X86_LEVELS
SPADE_EXT_DECLARE_LEVEL(AVX2)
SPADE_EXT_DECLARE_LEVEL(AVX512)
#endif

template <class T>
const RowProducts<T>& row_products() {
  auto choose = [](const RowProducts<float>& f, const RowProducts<double>& d) -> const RowProducts<T>& {
    if constexpr (std::is_same_v<T, float>)
      return f;
    else
      return d;
  };
#ifdef SPADE_EXT_X86_LEVELS
  static const std::string level = at::get_cpu_capability();
  if (level == "AVX512") return choose(AVX512::row_products_float, AVX512::row_products_double);
  if (level == "AVX2") return choose(AVX2::row_products_float, AVX2::row_products_double);
#endif
  return choose(DEFAULT::row_products_float, DEFAULT::row_products_double);
}

template const RowProducts<float>& row_products<float>();
template const RowProducts<double>& row_products<double>();

}  // namespace spade_ext
