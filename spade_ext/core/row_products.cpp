#include <spade_ext/core/cpu_levels.h>
#include <spade_ext/core/row_products.h>

namespace spade_ext {

SPADE_EXT_LEVELS(RowProducts<float>, row_products_float)
SPADE_EXT_LEVELS(RowProducts<double>, row_products_double)

template <>
const RowProducts<float>& row_products<float>() {
  return row_products_float();
}
template <>
const RowProducts<double>& row_products<double>() {
  return row_products_double();
}

}  // namespace spade_ext
