#include <spade_ext/core/cpu_levels.h>
#include <spade_ext/local_attention/local_attention_tiles.h>

namespace spade_ext {

SPADE_EXT_TYPED_LEVELS(LocalAttentionTiles, local_attention_tiles, double, double)
SPADE_EXT_TYPED_LEVELS(LocalAttentionTiles, local_attention_tiles, float, float)
SPADE_EXT_TYPED_LEVELS(LocalAttentionTiles, local_attention_tiles, at::Half, half)
SPADE_EXT_TYPED_LEVELS(LocalAttentionTiles, local_attention_tiles, at::BFloat16, bfloat16)

}  // namespace spade_ext
