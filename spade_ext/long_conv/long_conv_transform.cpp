#include <spade_ext/core/cpu_levels.h>
#include <spade_ext/long_conv/long_conv_transform.h>

namespace spade_ext {

SPADE_EXT_LEVELS(LongConvTransform<float>, long_conv_transform_float)
SPADE_EXT_LEVELS(LongConvTransform<double>, long_conv_transform_double)

template <>
const LongConvTransform<float>& long_conv_transform<float>() {
  return long_conv_transform_float();
}
template <>
const LongConvTransform<double>& long_conv_transform<double>() {
  return long_conv_transform_double();
}

}  // namespace spade_ext
