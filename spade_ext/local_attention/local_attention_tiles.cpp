#include <spade_ext/core/cpu_levels.h>
#include <spade_ext/local_attention/local_attention_tiles.h>

namespace spade_ext {

SPADE_EXT_LEVELS(LocalAttentionTiles<double>, local_attention_tiles_double)
SPADE_EXT_LEVELS(LocalAttentionTiles<float>, local_attention_tiles_float)
SPADE_EXT_LEVELS(LocalAttentionTiles<at::Half>, local_attention_tiles_half)
SPADE_EXT_LEVELS(LocalAttentionTiles<at::BFloat16>, local_attention_tiles_bfloat16)

template <>
const LocalAttentionTiles<double>& local_attention_tiles<double>() {
  return local_attention_tiles_double();
}
template <>
const LocalAttentionTiles<float>& local_attention_tiles<float>() {
  return local_attention_tiles_float();
}
template <>
const LocalAttentionTiles<at::Half>& local_attention_tiles<at::Half>() {
  return local_attention_tiles_half();
}
template <>
const LocalAttentionTiles<at::BFloat16>& local_attention_tiles<at::BFloat16>() {
  return local_attention_tiles_bfloat16();
}

}  // namespace spade_ext
