#include <spade_ext/core/cpu_levels.h>
#include <spade_ext/long_conv/long_conv_transform.h>

namespace spade_ext {

SPADE_EXT_TYPED_LEVELS(LongConvTransform, long_conv_transform, float, float)
SPADE_EXT_TYPED_LEVELS(LongConvTransform, long_conv_transform, double, double)

}  // namespace spade_ext
