// What the family's Meta and CPU kernels share: checks and the discretisation's name.
#pragma once

#include <spade_ext/core/autograd.h>
#include <spade_ext/core/checks.h>
#include <spade_ext/core/documents.h>
#include <spade_ext/core/layout.h>
#include <spade_ext/diagonal/diagonal_math.h>

#include <string_view>

namespace spade_ext::diagonal_shapes {

using OptionalString = std::optional<std::string_view>;
using diagonal_math::Disc;

inline bool has_pairs(const at::Tensor& w) { return w.dim() == 3; }

// A recurrence does not know the whole length, on which "dss" depends.
inline Disc parse_disc(const char* op, OptionalString disc, bool recurrence) {
  if (!disc) return Disc::none;
  if (*disc == "zoh") return Disc::zoh;
  if (*disc == "bilinear") return Disc::bilinear;
  if (*disc == "dss" && !recurrence) return Disc::dss;
  TORCH_CHECK_VALUE(false, op, ": disc is '", *disc, "', expected 'zoh', 'bilinear'",
                    recurrence ? " or None ('dss' depends on the whole length)" : ", 'dss' or None");
}

// What every op of the family takes: w, c and log_dt of H channels.
inline void check_system(const char* op, const at::Tensor& w, const at::Tensor& c,
                         const OptionalTensor& log_dt, OptionalString disc, bool recurrence) {
  TORCH_CHECK_VALUE(w.dim() == 2 || w.dim() == 3, op, ": w has shape ", shape_text(w),
                    ", expected (S, N, 2) or (S, N)");
  check_float32_or_float64(op, "w", w);
  const bool pairs = has_pairs(w);
  const char* c_letters = pairs ? "(C, H, N, 2)" : "(C, H, N)";
  if (pairs) check_size(op, "w", w, 2, 2, "(S, N, 2)");
  check_dim(op, "c", c, pairs ? 4 : 3, c_letters);
  check_like(op, "c", c, "w", w);
  check_size(op, "c", c, 2, w.sym_size(1), c_letters);
  if (pairs) check_size(op, "c", c, 3, 2, c_letters);

  const auto S = w.sym_size(0), H = c.sym_size(1);
  TORCH_CHECK_VALUE(S.sym_gt(0).expect_true(__FILE__, __LINE__), op, ": w has shape ", shape_text(w),
                    ", expected at least one copy S");
  TORCH_CHECK_VALUE((H % S).sym_eq(0).expect_true(__FILE__, __LINE__), op, ": w has ", S,
                    " copies S, expected a divisor of the number of channels H = ", H, " of c");
  const bool discretized = parse_disc(op, disc, recurrence) != Disc::none;
  TORCH_CHECK_VALUE(is_given(log_dt) == discretized, op, ": log_dt is ", is_given(log_dt) ? "given" : "None",
                    " and disc is ", discretized ? *disc : "None", ", expected both or neither");
  if (discretized) {
    check_dim(op, "log_dt", *log_dt, 1, "(H,)");
    check_like(op, "log_dt", *log_dt, "w", w);
    check_size(op, "log_dt", *log_dt, 0, H, "(H,)");
  }
}

inline void check_kernel(const at::Tensor& w, const at::Tensor& c, const OptionalTensor& log_dt,
                         const c10::SymInt& length, OptionalString disc, double rate) {
  constexpr const char* op = "diagonal_kernel";
  check_system(op, w, c, log_dt, disc, false);
  TORCH_CHECK_VALUE(length.sym_ge(0).expect_true(__FILE__, __LINE__), op, ": length is ", length,
                    ", expected 0 or more");
  TORCH_CHECK_VALUE(rate > 0 && std::isfinite(rate), op, ": rate is ", rate, ", expected a positive number");
}

inline void check_kernel_backward(const at::Tensor& grad_k, const at::Tensor& w, const at::Tensor& c,
                                  const OptionalTensor& log_dt, OptionalString disc, double rate,
                                  std::array<bool, 3> output_mask) {
  constexpr const char* op = "diagonal_kernel";
  check_dim(op, "grad_k", grad_k, 3, "(C, H, length)");
  check_kernel(w, c, log_dt, grad_k.sym_size(2), disc, rate);
  check_like(op, "grad_k", grad_k, "w", w);
  for (int64_t dim : {0, 1}) check_size(op, "grad_k", grad_k, dim, c.sym_size(dim), "(C, H, length)");
  check_wanted(op, "log_dt", output_mask[2], log_dt);
}

// (B, H, N) or (B, H, N, 2) of H systems, for u (B, ...) and c (C, H, N) or (C, H, N, 2).
inline c10::SymDimVector state_sizes(const at::Tensor& u, const at::Tensor& w, const at::Tensor& c) {
  c10::SymDimVector sizes{u.sym_size(0), c.sym_size(1), w.sym_size(1)};
  if (has_pairs(w)) sizes.push_back(2);
  return sizes;
}

inline void check_state(const char* op, const char* name, const at::Tensor& state, const at::Tensor& u,
                        const at::Tensor& w, const at::Tensor& c) {
  const char* letters = has_pairs(w) ? "(B, H, N, 2)" : "(B, H, N)";
  const auto sizes = state_sizes(u, w, c);
  check_dim(op, name, state, int64_t(sizes.size()), letters);
  check_like(op, name, state, "w", w);
  for (size_t dim = 0; dim < sizes.size(); ++dim) check_size(op, name, state, dim, sizes[dim], letters);
}

// u (B, H, L) of diagonal_scan or (B, H) of diagonal_step, for H systems or two for each channel.
inline void check_recurrence(const char* op, const at::Tensor& u, const char* u_letters, const at::Tensor& w,
                             const at::Tensor& b, const at::Tensor& c, const OptionalTensor& log_dt,
                             const OptionalTensor& state, OptionalString disc, bool bidirectional) {
  check_system(op, w, c, log_dt, disc, true);
  check_like(op, "u", u, "w", w);
  if (bidirectional) {
    TORCH_CHECK_VALUE(c.sym_size(1).sym_eq(2 * u.sym_size(1)).expect_true(__FILE__, __LINE__), op, ": c has ",
                      c.sym_size(1), " channels, expected ", 2 * u.sym_size(1),
                      ", two for each of u, as bidirectional is True");
  } else {
    check_size(op, "u", u, 1, c.sym_size(1), u_letters);
  }
  const char* b_letters = has_pairs(w) ? "(S, N, 2)" : "(S, N)";
  check_dim(op, "b", b, w.dim(), b_letters);
  check_like(op, "b", b, "w", w);
  for (int64_t dim = 0; dim < w.dim(); ++dim) check_size(op, "b", b, dim, w.sym_size(dim), b_letters);
  if (is_given(state)) check_state(op, "state", *state, u, w, c);
}

inline void check_scan(const at::Tensor& u, const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
                       const OptionalTensor& log_dt, const OptionalTensor& state, const OptionalTensor& skip,
                       OptionalString disc, bool bidirectional, const OptionalTensor& segment_ids) {
  constexpr const char* op = "diagonal_scan";
  check_dim(op, "u", u, 3, "(B, H, L)");
  check_recurrence(op, u, "(B, H, L)", w, b, c, log_dt, state, disc, bidirectional);
  if (is_given(skip)) {
    check_dim(op, "skip", *skip, 2, "(C, H)");
    check_like(op, "skip", *skip, "w", w);
    check_size(op, "skip", *skip, 0, c.sym_size(0), "(C, H)");
    check_size(op, "skip", *skip, 1, u.sym_size(1), "(C, H)");
  }
  check_segment_ids(op, segment_ids, u);
}

inline void check_scan_backward(const at::Tensor& grad_y, const at::Tensor& grad_state, const at::Tensor& u,
                                const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
                                const OptionalTensor& log_dt, const OptionalTensor& state,
                                const OptionalTensor& skip, OptionalString disc, bool bidirectional,
                                const OptionalTensor& segment_ids, std::array<bool, 7> output_mask) {
  constexpr const char *op = "diagonal_scan", *letters = "(B, C, H, L)";
  check_scan(u, w, b, c, log_dt, state, skip, disc, bidirectional, segment_ids);
  check_dim(op, "grad_y", grad_y, 4, letters);
  check_like(op, "grad_y", grad_y, "w", w);
  check_size(op, "grad_y", grad_y, 0, u.sym_size(0), letters);
  check_size(op, "grad_y", grad_y, 1, c.sym_size(0), letters);
  for (int64_t dim : {1, 2}) check_size(op, "grad_y", grad_y, dim + 1, u.sym_size(dim), letters);
  check_state(op, "grad_state", grad_state, u, w, c);
  check_wanted(op, "log_dt", output_mask[4], log_dt);
  check_wanted(op, "state", output_mask[5], state);
  check_wanted(op, "skip", output_mask[6], skip);
}

inline void check_step(const at::Tensor& u, const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
                       const OptionalTensor& log_dt, const at::Tensor& state, OptionalString disc) {
  check_dim("diagonal_step", "u", u, 2, "(B, H)");
  check_recurrence("diagonal_step", u, "(B, H)", w, b, c, log_dt, state, disc, false);
}

}  // namespace spade_ext::diagonal_shapes
