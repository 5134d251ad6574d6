// diagonal_scan's arithmetic on whole blocks of tokens, compiled once for each level of the CPU. Equations:
// README.md, "Scan by blocks". Every number is a vector of `lanes` channels; a state is N real rows, or N
// rows of real parts and N of imaginary ones.
#pragma once

#include <cstdint>

namespace spade_ext::diagonal_blocks {

constexpr int64_t kBlock = 16;                   // tokens
constexpr int64_t kTileBlocks = 8;               // blocks whose tokens and states are in cache together
constexpr int64_t kTile = kBlock * kTileBlocks;  // tokens

template <class T>
struct BlockSystem {
  int64_t N, rows, C;
  T *in, *out, *local;  // (rows, kBlock), (C, rows, kBlock), (C, 2 kBlock): lag j of a block at kBlock + j,
                        // before it 0
  T* power;             // (rows): abar^kBlock
  double* powers;       // (kTileBlocks, rows): power, its square, ...
};

// The derivatives by `in`, `out`, `power` and by every pair of tokens of a block.
template <class T>
struct BlockGradients {
  T *in, *out, *power, *pairs;  // (rows, kBlock), (C, rows, kBlock), (rows), (C, kBlock, kBlock)
};

// Channels of one row, token t of channel i at data[i * channel_stride + t * token_stride]; in brackets, of
// token 0.
template <class T>
struct Signal {
  T* data;
  int64_t channel_stride, token_stride;
  T& operator[](int64_t channel) const { return data[channel * channel_stride]; }
  Signal from(int64_t token) const { return {data + token * token_stride, channel_stride, token_stride}; }
};

template <class T>
struct DiagonalBlocks {
  int64_t lanes;
  // tile (tokens) <- signal, zeros in lanes beyond its channels; and back, added where `add`
  void (*load)(Signal<const T> signal, int64_t channels, int64_t tokens, T* tile);
  void (*store)(const T* tile, bool add, int64_t channels, int64_t tokens, Signal<T> signal);
  // Moves `state` (rows) over the tokens u (blocks, kBlock), and writes y (C, kTile) unless it is null.
  // scratch (kTileBlocks, rows)
  void (*forward)(const BlockSystem<T>& system, int64_t blocks, const T* u, double* state, T* y, T* scratch);
  // From g (C, kTile) = dL/dy, `state` before the tokens and `grad_state` after them: writes grad_u (kTile),
  // moves both states to the other end and adds to `sums`. scratch (2, kTileBlocks, rows)
  void (*backward)(const BlockSystem<T>& system, int64_t blocks, const T* u, const T* g, double* state,
                   double* grad_state, T* grad_u, const BlockGradients<T>& sums, T* scratch);
};

}  // namespace spade_ext::diagonal_blocks
