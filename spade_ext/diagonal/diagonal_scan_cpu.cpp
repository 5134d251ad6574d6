// diagonal_scan: whole blocks of tokens by matrix products (diagonal_blocks.h), those that are left one at a
// time. A task is a vector of channels with some rows of the batch, both directions of time.
#include <spade_ext/core/cpu_levels.h>
#include <spade_ext/core/documents.h>
#include <spade_ext/diagonal/diagonal_blocks.h>
#include <spade_ext/diagonal/diagonal_cpu.h>
#include <torch/library.h>

#include <limits>
#include <utility>
#include <vector>

namespace spade_ext {
SPADE_EXT_LEVELS(diagonal_blocks::DiagonalBlocks<float>, diagonal_blocks_float)
SPADE_EXT_LEVELS(diagonal_blocks::DiagonalBlocks<double>, diagonal_blocks_double)
}  // namespace spade_ext

namespace spade_ext::diagonal_cpu {

using namespace diagonal_blocks;

template <class scalar_t>
const DiagonalBlocks<scalar_t>& blocks_of() {
  if constexpr (std::is_same_v<scalar_t, float>)
    return diagonal_blocks_float();
  else
    return diagonal_blocks_double();
}

// Uninitialised numbers.
template <class T>
struct Buffer {
  at::Tensor memory;
  T* data;
  explicit Buffer(int64_t size)
      : memory(at::empty({size * int64_t(sizeof(T))}, at::kByte)), data(static_cast<T*>(memory.data_ptr())) {}
  void zero() { std::fill_n(data, memory.nbytes() / sizeof(T), T(0)); }
};

// Systems h of H channels and one or two directions: channel h % H, backwards in time from h = H on.
template <class T>
struct ScanProblem : System<T> {
  int64_t B, C, H, L, directions;
  Values<T> b, c;                      // (S, N), (C, directions H, N)
  std::optional<Values<double>> skip;  // (C, H)

  ScanProblem(const at::Tensor& u, const at::Tensor& w, const at::Tensor& b_, const at::Tensor& c_,
              const OptionalTensor& log_dt, const OptionalTensor& skip_, OptionalString disc,
              bool bidirectional)
      : System<T>(w, log_dt, diagonal_shapes::parse_disc("diagonal_scan", disc, true)),
        B(u.size(0)),
        C(c_.size(0)),
        H(u.size(1)),
        L(u.size(2)),
        directions(bidirectional ? 2 : 1),
        b(b_),
        c(c_) {
    if (is_given(skip_)) skip.emplace(*skip_);
  }

  static constexpr bool pairs = !std::is_same_v<T, double>;
  // A complex state stands for itself and its conjugate.
  static constexpr double factor = pairs ? 2.0 : 1.0;
  int64_t rows() const { return pairs ? 2 * this->N : this->N; }
  int64_t systems() const { return directions * H; }
  T input_weight(int64_t h, int64_t n) const { return b.data[(h % this->S) * this->N + n]; }
};

// In type V, 0 for what would be a denormal number, which is slow, or close to one.
template <class V>
V rounded(double x) {
  return std::abs(x) < std::numeric_limits<V>::min() / std::numeric_limits<V>::epsilon() ? V(0)
                                                                                         : static_cast<V>(x);
}

// Numbers n of the channels of a vector: real parts at [n * lanes + i], imaginary ones N * lanes after them.
template <class T, class V>
T get(const V* rows, int64_t N, int64_t lanes, int64_t n, int64_t i) {
  if constexpr (std::is_same_v<T, double>)
    return rows[n * lanes + i];
  else
    return {rows[n * lanes + i], rows[(N + n) * lanes + i]};
}

template <class T, class V>
void set(V* rows, int64_t N, int64_t lanes, int64_t n, int64_t i, T value) {
  rows[n * lanes + i] = rounded<V>(real(value));
  if constexpr (!std::is_same_v<T, double>) rows[(N + n) * lanes + i] = rounded<V>(imag(value));
}

// A vector of neighbouring channels in one direction of time, from channel `first` on.
template <class T, class scalar_t>
struct Channels {
  const ScanProblem<T>& p;
  const DiagonalBlocks<scalar_t>& blocks;
  int64_t lanes, first, count, direction, rows;
  Buffer<double> abar, bbar, c, skip;  // (rows), (rows), (C, rows), (C)
  Buffer<scalar_t> tables;
  Buffer<double> powers;
  BlockSystem<scalar_t> system;

  Channels(const ScanProblem<T>& p_, int64_t first_, int64_t direction_)
      : p(p_),
        blocks(blocks_of<scalar_t>()),
        lanes(blocks.lanes),
        first(first_),
        count(std::min(lanes, p.H - first)),
        direction(direction_),
        rows(p.rows()),
        abar(rows * lanes),
        bbar(rows * lanes),
        c(p.C * rows * lanes),
        skip(p.C * lanes),
        tables((rows * kBlock * (1 + p.C) + 2 * kBlock * p.C + rows) * lanes),
        powers(kTileBlocks * rows * lanes) {
    for (Buffer<double>* buffer : {&abar, &bbar, &c, &skip}) buffer->zero();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t h = system_of(i);
      for (int64_t n = 0; n < p.N; ++n) {
        const auto d = p.discrete(h, n);
        set(abar.data, p.N, lanes, n, i, d.abar);
        set(bbar.data, p.N, lanes, n, i, d.scale * p.input_weight(h, n));
        for (int64_t j = 0; j < p.C; ++j)
          set(c_row(j), p.N, lanes, n, i, p.factor * p.c.data[(j * p.systems() + h) * p.N + n]);
      }
      for (int64_t j = 0; j < p.C && p.skip && direction == 0; ++j)
        skip.data[j * lanes + i] = p.skip->data[j * p.H + h];
    }
    if (p.L >= kBlock) make_tables();
  }

  int64_t system_of(int64_t i) const { return direction * p.H + first + i; }
  double* c_row(int64_t j) const { return c.data + j * rows * lanes; }
  T at(const double* numbers, int64_t n, int64_t i) const { return get<T>(numbers, p.N, lanes, n, i); }
  const double* skip_row(int64_t j) const { return skip.data + j * lanes; }
  // The second direction adds to what the first has written.
  bool adds() const { return direction > 0; }
  void put(double value, scalar_t& element) const {
    element = static_cast<scalar_t>(adds() ? element + value : value);
  }

  // Channel `first` of a document of t (B, H, L) or, of t (B, C, H, L), of t[:, j], in this direction's order
  // of time.
  template <class V>
  Signal<V> signal(at::TensorAccessor<V, 3> t, const Document& d) const {
    return signal(t.data() + d.row * t.stride(0), t.stride(1), t.stride(2), d);
  }
  template <class V>
  Signal<V> signal(at::TensorAccessor<V, 4> t, const Document& d, int64_t j) const {
    return signal(t.data() + d.row * t.stride(0) + j * t.stride(1), t.stride(2), t.stride(3), d);
  }
  template <class V>
  Signal<V> signal(V* row, int64_t channel_stride, int64_t token_stride, const Document& d) const {
    const int64_t start = direction == 0 ? d.begin : std::max<int64_t>(d.end - 1, 0);
    return {row + first * channel_stride + start * token_stride, channel_stride,
            direction == 0 ? token_stride : -token_stride};
  }

  // Whether a document's states before and after it are those of its row.
  bool begins_row(const Document& d) const { return direction == 0 ? d.begin == 0 : d.end == p.L; }
  bool ends_row(const Document& d) const { return direction == 0 ? d.end == p.L : d.begin == 0; }

  void make_tables() {
    const int64_t block = kBlock * lanes;
    tables.zero();
    scalar_t* next = tables.data;
    auto take = [&](int64_t vectors) { return std::exchange(next, next + vectors * lanes); };
    system = {
        p.N,        rows,       p.C, take(rows * kBlock), take(p.C * rows * kBlock), take(p.C * 2 * kBlock),
        take(rows), powers.data};
    powers.zero();
    std::vector<double> lags(p.C * kBlock);
    auto entry = [&](scalar_t* table, int64_t n, int64_t token, int64_t i, T value) {
      set(table + token * lanes, p.N, block, n, i, value);
    };
    for (int64_t i = 0; i < count; ++i) {
      std::fill(lags.begin(), lags.end(), 0.0);
      for (int64_t n = 0; n < p.N; ++n) {
        const T a = at(abar.data, n, i), b = at(bbar.data, n, i);
        T power = 1;
        for (int64_t t = 0; t < kBlock; ++t) {
          entry(system.in, n, kBlock - 1 - t, i, b * power);
          for (int64_t j = 0; j < p.C; ++j) lags[j * kBlock + t] += real(at(c_row(j), n, i) * b * power);
          power *= a;
          for (int64_t j = 0; j < p.C; ++j)
            entry(system.out + j * rows * block, n, t, i, conj(at(c_row(j), n, i) * power));
        }
        set(system.power, p.N, lanes, n, i, power);
        T far = power;
        for (int64_t k = 0; k < kTileBlocks; ++k, far *= power)
          set(powers.data + k * rows * lanes, p.N, lanes, n, i, far);
      }
      for (int64_t j = 0; j < p.C; ++j) {
        lags[j * kBlock] += skip_row(j)[i];
        for (int64_t t = 0; t < kBlock; ++t)
          system.local[((2 * j + 1) * kBlock + t) * lanes + i] = rounded<scalar_t>(lags[j * kBlock + t]);
      }
    }
  }

  // The states of row b of (B, systems, N), to and from vectors.
  void load_state(const T* states, int64_t b, double* x) const {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t n = 0; n < p.N; ++n) set(x, p.N, lanes, n, i, states[state_row(b, i) + n]);
    }
  }
  void store_state(const double* x, int64_t b, T* states) const {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t n = 0; n < p.N; ++n) states[state_row(b, i) + n] = at(x, n, i);
    }
  }
  int64_t state_row(int64_t b, int64_t i) const { return (b * p.systems() + system_of(i)) * p.N; }

  // One token, its inputs at `u`.
  void advance(double* x, Signal<const scalar_t> u) const {
    for (int64_t i = 0; i < count; ++i) {
      const double input = u[i];
      for (int64_t n = 0; n < p.N; ++n)
        set(x, p.N, lanes, n, i, at(abar.data, n, i) * at(x, n, i) + at(bbar.data, n, i) * input);
    }
  }
  double output(const double* x, int64_t j, int64_t i) const {
    double sum = 0;
    for (int64_t n = 0; n < p.N; ++n) sum += real(at(c_row(j), n, i) * at(x, n, i));
    return sum;
  }
};

// Of so many tokens those that come in whole blocks.
int64_t whole_blocks(int64_t tokens) { return tokens / kBlock * kBlock; }

// Calls body(document) for each one, from the first to the last or from the last to the first.
template <class Body>
void for_each_document(const std::vector<Document>& documents, bool forwards, const Body& body) {
  forwards ? std::for_each(documents.begin(), documents.end(), body)
           : std::for_each(documents.rbegin(), documents.rend(), body);
}

// Calls body(token, blocks) for each tile of whole blocks.
template <class Body>
void for_each_tile(int64_t whole, const Body& body) {
  for (int64_t t = 0; t < whole; t += kTile) body(t, std::min(kTileBlocks, (whole - t) / kBlock));
}

template <class Body>
void for_each_tile_backwards(int64_t whole, const Body& body) {
  const int64_t last = (whole - 1) / kTile * kTile;
  for (int64_t t = last; t >= 0 && whole > 0; t -= kTile)
    body(t, std::min(kTileBlocks, (whole - t) / kBlock));
}

// Room for one tile at a time.
template <class scalar_t>
struct Workspace {
  int64_t lanes;
  Buffer<scalar_t> u, grad_u, y, scratch;

  template <class T>
  explicit Workspace(const ScanProblem<T>& p)
      : lanes(blocks_of<scalar_t>().lanes),
        u(kTile * lanes),
        grad_u(kTile * lanes),
        y(p.C * kTile * lanes),
        scratch(2 * kTileBlocks * p.rows() * lanes) {}
  scalar_t* output(int64_t j) const { return y.data + j * kTile * lanes; }
};

// Writes y (B, C, H, L) of a vector of channels, document by document in the order of time, and moves its
// states (B, systems, N) to the rows' other end.
template <class T, class scalar_t>
struct Forward {
  Channels<T, scalar_t> channels;
  int64_t length = 0;  // of a document
  Buffer<double> x;
  Signal<const scalar_t> u{};
  std::vector<Signal<scalar_t>> y;

  Forward(const ScanProblem<T>& p, int64_t first, int64_t direction)
      : channels(p, first, direction), x(channels.rows * channels.lanes), y(p.C) {}

  void start(const Document& d, at::TensorAccessor<const scalar_t, 3> u_, const T* states,
             at::TensorAccessor<scalar_t, 4> y_) {
    length = d.length();
    u = channels.signal(u_, d);
    for (size_t j = 0; j < y.size(); ++j) y[j] = channels.signal(y_, d, j);
    x.zero();
    if (channels.begins_row(d)) channels.load_state(states, d.row, x.data);
  }

  void tile(int64_t t, int64_t blocks, const Workspace<scalar_t>& work) {
    channels.blocks.load(u.from(t), channels.count, blocks * kBlock, work.u.data);
    channels.blocks.forward(channels.system, blocks, work.u.data, x.data, work.y.data, work.scratch.data);
    for (size_t j = 0; j < y.size(); ++j)
      channels.blocks.store(work.output(j), channels.adds(), channels.count, blocks * kBlock, y[j].from(t));
  }

  // The tokens after the last whole block.
  void tokens() {
    for (int64_t t = whole_blocks(length); t < length; ++t) {
      const auto u_t = u.from(t);
      channels.advance(x.data, u_t);
      for (size_t j = 0; j < y.size(); ++j) {
        for (int64_t i = 0; i < channels.count; ++i)
          channels.put(channels.output(x.data, j, i) + channels.skip_row(j)[i] * u_t[i], y[j].from(t)[i]);
      }
    }
  }
};

// The derivatives by abar, bbar, Channels::c and skip of a vector of channels, added up over tokens and rows.
template <class T, class scalar_t>
struct ChannelSums {
  int64_t N, C, rows, lanes, size;
  Buffer<double> abar, bbar, c, skip;  // (rows), (rows), (C, rows), (C)
  Buffer<scalar_t> recent;             // by the entries of the tables, of a few tiles
  Buffer<double> total;

  explicit ChannelSums(const Channels<T, scalar_t>& channels)
      : N(channels.p.N),
        C(channels.p.C),
        rows(channels.rows),
        lanes(channels.lanes),
        size((rows * kBlock * (1 + C) + rows + C * kBlock * kBlock) * lanes),
        abar(rows * lanes),
        bbar(rows * lanes),
        c(C * rows * lanes),
        skip(C * lanes),
        recent(size),
        total(size) {
    for (Buffer<double>* buffer : {&abar, &bbar, &c, &skip, &total}) buffer->zero();
    recent.zero();
  }

  template <class V>
  BlockGradients<V> tables(V* next) const {
    auto take = [&](int64_t vectors) { return std::exchange(next, next + vectors * lanes); };
    return {take(rows * kBlock), take(C * rows * kBlock), take(rows), take(C * kBlock * kBlock)};
  }

  // Long sums are float64.
  void fold() {
    for (int64_t i = 0; i < size; ++i) total.data[i] += recent.data[i];
    recent.zero();
  }

  void add(double* sums, int64_t n, int64_t i, T value) const {
    set(sums, N, lanes, n, i, get<T>(sums, N, lanes, n, i) + value);
  }
  double* c_row(int64_t j) const { return c.data + j * rows * lanes; }

  // From the entries of the tables to the numbers they are made of.
  void collect(const Channels<T, scalar_t>& channels) {
    fold();
    const auto by = tables(total.data);
    const int64_t block = kBlock * lanes;
    std::vector<double> lags(C * kBlock);
    auto entry = [&](const double* table, int64_t n, int64_t token, int64_t i) {
      return get<T>(table + token * lanes, N, block, n, i);
    };
    for (int64_t i = 0; i < channels.count; ++i) {
      for (int64_t j = 0; j < C; ++j) {
        for (int64_t lag = 0; lag < kBlock; ++lag) {
          double& sum = lags[j * kBlock + lag] = 0;
          for (int64_t from = 0; from + lag < kBlock; ++from)
            sum += by.pairs[((j * kBlock + from) * kBlock + from + lag) * lanes + i];
        }
        skip.data[j * lanes + i] += lags[j * kBlock];
      }
      for (int64_t n = 0; n < N; ++n) {
        const T a = channels.at(channels.abar.data, n, i), b = channels.at(channels.bbar.data, n, i);
        T power = 1, slope = 0;  // a^t and t a^(t - 1)
        T by_a = 0, by_b = 0;
        for (int64_t t = 0; t < kBlock; ++t) {
          const T by_in = entry(by.in, n, kBlock - 1 - t, i);
          T by_power = by_in * conj(b), next_power = power * a, next_slope = slope * a + power, by_next = 0;
          by_b += by_in * conj(power);
          for (int64_t j = 0; j < C; ++j) {
            const T c_j = channels.at(channels.c_row(j), n, i);
            const T by_out = conj(entry(by.out + j * rows * block, n, t, i));
            const double by_lag = lags[j * kBlock + t];
            by_power += by_lag * conj(c_j * b);
            by_b += by_lag * conj(c_j * power);
            by_next += by_out * conj(c_j);
            add(c_row(j), n, i, by_lag * conj(b * power) + by_out * conj(next_power));
          }
          by_a += by_power * conj(slope) + by_next * conj(next_slope);
          power = next_power, slope = next_slope;
        }
        by_a += get<T>(by.power, N, lanes, n, i) * conj(slope);
        add(abar.data, n, i, by_a);
        add(bbar.data, n, i, by_b);
      }
    }
  }
};

// Writes grad_u (B, H, L) of a vector of channels, turns its rows of grad_states (B, systems, N) from the
// gradient of the final states into that of the initial ones, and adds up its parameters' derivatives.
template <class T, class scalar_t>
struct Backward {
  static constexpr int64_t kFoldTiles = 64;

  Channels<T, scalar_t> channels;
  ChannelSums<T, scalar_t> sums;
  int64_t size;              // numbers of a vector's states
  Buffer<double> x, grad_x;  // (kBlock, rows), (rows)
  Buffer<scalar_t> starts;   // (tiles, rows): x before each tile
  Signal<const scalar_t> u{};
  Signal<scalar_t> grad_u{};
  std::vector<Signal<const scalar_t>> g;
  int64_t length = 0;    // of a document
  int64_t unfolded = 0;  // tiles

  Backward(const ScanProblem<T>& p, int64_t first, int64_t direction)
      : channels(p, first, direction),
        sums(channels),
        size(channels.rows * channels.lanes),
        x(kBlock * size),
        grad_x(size),
        starts((p.L + kTile - 1) / kTile * size),
        g(p.C) {}

  void start(const Document& d, at::TensorAccessor<const scalar_t, 4> grad_y,
             at::TensorAccessor<const scalar_t, 3> u_, const T* states, const T* grad_states,
             at::TensorAccessor<scalar_t, 3> grad_u_) {
    length = d.length();
    u = channels.signal(u_, d);
    grad_u = channels.signal(grad_u_, d);
    for (size_t j = 0; j < g.size(); ++j) g[j] = channels.signal(grad_y, d, j);
    std::fill_n(x.data, size, 0.0);
    grad_x.zero();
    if (channels.begins_row(d)) channels.load_state(states, d.row, x.data);
    if (channels.ends_row(d)) channels.load_state(grad_states, d.row, grad_x.data);
  }

  void forward_tile(int64_t t, int64_t blocks, const Workspace<scalar_t>& work) {
    std::transform(x.data, x.data + size, starts.data + t / kTile * size, rounded<scalar_t>);
    channels.blocks.load(u.from(t), channels.count, blocks * kBlock, work.u.data);
    channels.blocks.forward(channels.system, blocks, work.u.data, x.data, nullptr, work.scratch.data);
  }

  // The tokens after the last whole block, from the state before them.
  void tokens() {
    const int64_t begin = whole_blocks(length), end = length;
    for (int64_t t = begin; t < end; ++t) {
      double* const before = x.data + (t - begin) * size;
      std::copy_n(before, size, before + size);
      channels.advance(before + size, u.from(t));
    }
    for (int64_t t = end - 1; t >= begin; --t) {
      for (int64_t i = 0; i < channels.count; ++i) backward_token(x.data + (t - begin) * size, t, i);
    }
  }

  // Of channel i: `before` and after it are the states around token t.
  void backward_token(const double* before, int64_t t, int64_t i) {
    const int64_t N = channels.p.N;
    const double u_t = u.from(t)[i];
    double by_u = 0;
    for (size_t j = 0; j < g.size(); ++j) {
      const double g_t = g[j].from(t)[i];
      by_u += channels.skip_row(j)[i] * g_t;
      sums.skip.data[j * channels.lanes + i] += u_t * g_t;
      for (int64_t n = 0; n < N; ++n) {
        sums.add(grad_x.data, n, i, g_t * conj(channels.at(channels.c_row(j), n, i)));
        sums.add(sums.c_row(j), n, i, g_t * conj(channels.at(before + size, n, i)));
      }
    }
    for (int64_t n = 0; n < N; ++n) {
      const T by_x = channels.at(grad_x.data, n, i);
      by_u += real(conj(channels.at(channels.bbar.data, n, i)) * by_x);
      sums.add(sums.bbar.data, n, i, u_t * by_x);
      sums.add(sums.abar.data, n, i, by_x * conj(channels.at(before, n, i)));
      set(grad_x.data, N, channels.lanes, n, i, conj(channels.at(channels.abar.data, n, i)) * by_x);
    }
    channels.put(by_u, grad_u.from(t)[i]);
  }

  void tile(int64_t t, int64_t blocks, const Workspace<scalar_t>& work) {
    channels.blocks.load(u.from(t), channels.count, blocks * kBlock, work.u.data);
    for (size_t j = 0; j < g.size(); ++j)
      channels.blocks.load(g[j].from(t), channels.count, blocks * kBlock, work.output(j));
    std::copy_n(starts.data + t / kTile * size, size, x.data);
    channels.blocks.backward(channels.system, blocks, work.u.data, work.y.data, x.data, grad_x.data,
                             work.grad_u.data, sums.tables(sums.recent.data), work.scratch.data);
    channels.blocks.store(work.grad_u.data, channels.adds(), channels.count, blocks * kBlock, grad_u.from(t));
    if (++unfolded % kFoldTiles == 0) sums.fold();
  }
};

// The derivatives of all systems, a part for each part of the batch: by abar and bbar (parts, systems, N), by
// c (parts, C, systems, N) and by skip (parts, C, H).
template <class T>
struct SystemSums {
  const ScanProblem<T>& p;
  int64_t parts;
  Buffer<T> abar, bbar, c;
  Buffer<double> skip;

  SystemSums(const ScanProblem<T>& p_, int64_t parts_)
      : p(p_),
        parts(parts_),
        abar(parts * p.systems() * p.N),
        bbar(parts * p.systems() * p.N),
        c(parts * p.C * p.systems() * p.N),
        skip(parts * p.C * p.H) {}

  template <class scalar_t>
  void set(int64_t part, const Channels<T, scalar_t>& channels, const ChannelSums<T, scalar_t>& sums) {
    for (int64_t i = 0; i < channels.count; ++i) {
      const int64_t h = part * p.systems() + channels.system_of(i);
      for (int64_t n = 0; n < p.N; ++n) {
        abar.data[h * p.N + n] = channels.at(sums.abar.data, n, i);
        bbar.data[h * p.N + n] = channels.at(sums.bbar.data, n, i);
      }
      for (int64_t j = 0; j < p.C; ++j) {
        const int64_t row = (part * p.C + j) * p.systems() + channels.system_of(i);
        for (int64_t n = 0; n < p.N; ++n) c.data[row * p.N + n] = channels.at(sums.c_row(j), n, i);
        if (channels.direction == 0)
          skip.data[(part * p.C + j) * p.H + channels.first + i] = sums.skip.data[j * channels.lanes + i];
      }
    }
  }

  // The sum over the parts, in order; parts lie `size` numbers apart.
  template <class V>
  V total(const Buffer<V>& buffer, int64_t size, int64_t index) const {
    V sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += buffer.data[part * size + index];
    return sum;
  }
};

// The gradients of the parameters in float64: rows of w and b for each system, to be added over the copies.
template <class T>
struct ParameterGradients {
  Values<T> w, b, c;            // (systems, N), (systems, N), (C, systems, N)
  Values<double> log_dt, skip;  // (systems,), (C, H)

  explicit ParameterGradients(const SystemSums<T>& sums)
      : w(Values<T>::zeros(sums.p.systems(), sums.p.N)),
        b(Values<T>::zeros(sums.p.systems(), sums.p.N)),
        c(at::zeros(sums.p.c.tensor.sizes(), at::kDouble)),
        log_dt(at::zeros({sums.p.systems()}, at::kDouble)),
        skip(at::zeros({sums.p.C, sums.p.H}, at::kDouble)) {
    const auto& p = sums.p;
    const int64_t H = p.systems(), N = p.N;
    parallel_for_each(H, [&](int64_t h) {
      double by_dt = 0;
      for (int64_t n = 0; n < N; ++n) {
        const auto d = p.discrete(h, n);
        const T by_abar = sums.total(sums.abar, H * N, h * N + n),
                by_bbar = sums.total(sums.bbar, H * N, h * N + n);
        const T by_scale = conj(p.input_weight(h, n)) * by_bbar;
        w.data[h * N + n] = conj(d.abar_w) * by_abar + conj(d.scale_w) * by_scale;
        b.data[h * N + n] = conj(d.scale) * by_bbar;
        by_dt += real(conj(d.abar_dt) * by_abar + conj(d.scale_dt) * by_scale);
        for (int64_t j = 0; j < p.C; ++j) {
          const int64_t index = (j * H + h) * N + n;
          c.data[index] = p.factor * sums.total(sums.c, p.C * H * N, index);
        }
      }
      log_dt.data[h] = p.dt(h) * by_dt;
    });
    for (int64_t i = 0; i < p.C * p.H; ++i) skip.data[i] = sums.total(sums.skip, p.C * p.H, i);
  }
};

// A fresh float64 copy, zeros where there is no state.
at::Tensor working_state(c10::SymIntArrayRef sizes, const OptionalTensor& state) {
  if (is_given(state)) return state->to(at::kDouble, false, true, at::MemoryFormat::Contiguous);
  return at::zeros(C10_AS_INTARRAYREF_SLOW(sizes), at::kDouble);
}

// Calls body(channels, part, rows) for groups of neighbouring channels, whose tokens share cache lines, and
// for parts of the batch, as many as keep a dozen threads busy.
struct Tasks {
  static constexpr int64_t kChannels = 16;

  struct Range {
    int64_t begin, end;
  };

  int64_t H, B, groups, parts;
  Tasks(int64_t H_, int64_t B_)
      : H(H_),
        B(B_),
        groups((H + kChannels - 1) / kChannels),
        parts(std::clamp<int64_t>(16 / std::max<int64_t>(groups, 1), 1, std::max<int64_t>(B, 1))) {}

  template <class Body>
  void run(const Body& body) const {
    parallel_for_each(groups * parts, [&](int64_t task) {
      const int64_t group = task / parts, part = task % parts;
      body(Range{group * kChannels, std::min(H, (group + 1) * kChannels)}, part,
           Range{part * B / parts, (part + 1) * B / parts});
    });
  }
};

// A Forward or a Backward for each vector of channels of a group.
template <template <class, class> class Vector, class T, class scalar_t>
std::vector<Vector<T, scalar_t>> vectors(const ScanProblem<T>& p, Tasks::Range channels, int64_t direction) {
  const int64_t lanes = blocks_of<scalar_t>().lanes;
  std::vector<Vector<T, scalar_t>> result;
  for (int64_t h = channels.begin; h < channels.end; h += lanes) result.emplace_back(p, h, direction);
  return result;
}

using ScanOutputs = std::tuple<at::Tensor, at::Tensor>;

ScanOutputs diagonal_scan(const at::Tensor& u, const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
                          const OptionalTensor& log_dt, const OptionalTensor& state,
                          const OptionalTensor& skip, OptionalString disc, bool bidirectional,
                          const OptionalTensor& segment_ids) {
  diagonal_shapes::check_scan(u, w, b, c, log_dt, state, skip, disc, bidirectional, segment_ids);
  const auto y = empty_outputs(u, c.size(0)),
             states = working_state(diagonal_shapes::state_sizes(u, w, c), state);
  dispatch(w, [&]<class T, class scalar_t>() {
    const ScanProblem<T> p(u, w, b, c, log_dt, skip, disc, bidirectional);
    const auto u_ = u.accessor<const scalar_t, 3>();
    const auto y_ = y.accessor<scalar_t, 4>();
    T* const states_ = Values<T>(states).data;
    const auto documents = spade_ext::documents(p.B, p.L, segment_ids);
    Tasks(p.H, p.B).run([&](Tasks::Range channels, int64_t, Tasks::Range rows) {
      const Workspace<scalar_t> work(p);
      for (int64_t direction = 0; direction < p.directions; ++direction) {
        auto group = vectors<Forward, T, scalar_t>(p, channels, direction);
        for (int64_t row = rows.begin; row < rows.end; ++row) {
          for_each_document(documents[row], direction == 0, [&](const Document& d) {
            for (auto& vector : group) vector.start(d, u_, states_, y_);
            for_each_tile(whole_blocks(d.length()), [&](int64_t t, int64_t blocks) {
              for (auto& vector : group) vector.tile(t, blocks, work);
            });
            for (auto& vector : group) {
              vector.tokens();
              if (vector.channels.ends_row(d)) vector.channels.store_state(vector.x.data, row, states_);
            }
          });
        }
      }
    });
  });
  return {y, states.to(u.scalar_type())};
}

using ScanGrads =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ScanGrads diagonal_scan_backward(const at::Tensor& grad_y, const at::Tensor& grad_state, const at::Tensor& u,
                                 const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
                                 const OptionalTensor& log_dt, const OptionalTensor& state,
                                 const OptionalTensor& skip, OptionalString disc, bool bidirectional,
                                 const OptionalTensor& segment_ids, std::array<bool, 7> output_mask) {
  diagonal_shapes::check_scan_backward(grad_y, grad_state, u, w, b, c, log_dt, state, skip, disc,
                                       bidirectional, segment_ids, output_mask);
  const auto grad_u = empty_signal(u);
  const auto sizes = diagonal_shapes::state_sizes(u, w, c);
  const auto states = working_state(sizes, state), grad_states = working_state(sizes, grad_state);
  return dispatch(w, [&]<class T, class scalar_t>() -> ScanGrads {
    const ScanProblem<T> p(u, w, b, c, log_dt, skip, disc, bidirectional);
    const Tasks tasks(p.H, p.B);
    SystemSums<T> sums(p, tasks.parts);
    const auto grad_y_ = grad_y.accessor<const scalar_t, 4>();
    const auto u_ = u.accessor<const scalar_t, 3>();
    const auto grad_u_ = grad_u.accessor<scalar_t, 3>();
    T *const states_ = Values<T>(states).data, *const grad_states_ = Values<T>(grad_states).data;
    const auto documents = spade_ext::documents(p.B, p.L, segment_ids);
    tasks.run([&](Tasks::Range channels, int64_t part, Tasks::Range rows) {
      const Workspace<scalar_t> work(p);
      for (int64_t direction = 0; direction < p.directions; ++direction) {
        auto group = vectors<Backward, T, scalar_t>(p, channels, direction);
        for (int64_t row = rows.begin; row < rows.end; ++row) {
          for_each_document(documents[row], direction == 1, [&](const Document& d) {
            const int64_t whole = whole_blocks(d.length());
            for (auto& vector : group) vector.start(d, grad_y_, u_, states_, grad_states_, grad_u_);
            for_each_tile(whole, [&](int64_t t, int64_t blocks) {
              for (auto& vector : group) vector.forward_tile(t, blocks, work);
            });
            for (auto& vector : group) vector.tokens();
            for_each_tile_backwards(whole, [&](int64_t t, int64_t blocks) {
              for (auto& vector : group) vector.tile(t, blocks, work);
            });
            for (auto& vector : group) {
              if (vector.channels.begins_row(d))
                vector.channels.store_state(vector.grad_x.data, row, grad_states_);
            }
          });
        }
        for (auto& vector : group) {
          vector.sums.collect(vector.channels);
          sums.set(part, vector.channels, vector.sums);
        }
      }
    });
    const ParameterGradients<T> gradients(sums);
    return {output_mask[0] ? grad_u : at::Tensor(),
            gradient(output_mask[1], p.sum_over_channels(gradients.w, p.systems()), w),
            gradient(output_mask[2], p.sum_over_channels(gradients.b, p.systems()), w),
            gradient(output_mask[3], gradients.c.tensor, w),
            gradient(output_mask[4], gradients.log_dt.tensor, w),
            gradient(output_mask[5], grad_states, w),
            gradient(output_mask[6], gradients.skip.tensor, w)};
  });
}

TORCH_LIBRARY_IMPL(spade_ext, CPU, m) {
  m.impl("diagonal_scan", diagonal_scan);
  m.impl("diagonal_scan_backward", diagonal_scan_backward);
}

}  // namespace spade_ext::diagonal_cpu
