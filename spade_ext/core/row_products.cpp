#include <spade_ext/core/cpu_levels.h>
#include <spade_ext/core/row_products.h>

namespace spade_ext {

SPADE_EXT_TYPED_LEVELS(RowProducts, row_products, float, float)
SPADE_EXT_TYPED_LEVELS(RowProducts, row_products, double, double)

}  // namespace spade_ext
