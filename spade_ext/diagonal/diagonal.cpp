#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <spade_ext/diagonal/diagonal.h>
#include <spade_ext/diagonal/diagonal_shapes.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

namespace spade_ext {

at::Tensor diagonal_kernel(const at::Tensor& w, const at::Tensor& c, const std::optional<at::Tensor>& log_dt,
                           c10::SymInt length, std::optional<std::string_view> disc, double rate) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("spade_ext::diagonal_kernel", "")
                             .typed<decltype(diagonal_kernel)>();
  return op.call(w, c, log_dt, std::move(length), disc, rate);
}

std::tuple<at::Tensor, at::Tensor> diagonal_scan(const at::Tensor& u, const at::Tensor& w,
                                                 const at::Tensor& b, const at::Tensor& c,
                                                 const std::optional<at::Tensor>& log_dt,
                                                 const std::optional<at::Tensor>& state,
                                                 const std::optional<at::Tensor>& skip,
                                                 std::optional<std::string_view> disc, bool bidirectional,
                                                 const std::optional<at::Tensor>& segment_ids) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("spade_ext::diagonal_scan", "")
                             .typed<decltype(diagonal_scan)>();
  return op.call(u, w, b, c, log_dt, state, skip, disc, bidirectional, segment_ids);
}

at::Tensor diagonal_step(const at::Tensor& u, const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
                         const std::optional<at::Tensor>& log_dt, const at::Tensor& state,
                         std::optional<std::string_view> disc) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("spade_ext::diagonal_step", "")
                             .typed<decltype(diagonal_step)>();
  return op.call(u, w, b, c, log_dt, state, disc);
}

namespace diagonal_op {

using OptionalString = std::optional<std::string_view>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

c10::IValue to_ivalue(OptionalString text) { return text ? c10::IValue(std::string(*text)) : c10::IValue(); }

OptionalString as_string(const c10::IValue& value) {
  return value.isNone() ? OptionalString() : OptionalString(value.toStringView());
}

using KernelGrads = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

KernelGrads kernel_backward(const at::Tensor& grad_k, const at::Tensor& w, const at::Tensor& c,
                            const OptionalTensor& log_dt, OptionalString disc, double rate,
                            std::array<bool, 3> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("spade_ext::diagonal_kernel_backward", "")
                             .typed<decltype(kernel_backward)>();
  return op.call(grad_k, w, c, log_dt, disc, rate, output_mask);
}

using ScanOutputs = std::tuple<at::Tensor, at::Tensor>;
using ScanGrads =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ScanGrads scan_backward(const at::Tensor& grad_y, const at::Tensor& grad_state, const at::Tensor& u,
                        const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
                        const OptionalTensor& log_dt, const OptionalTensor& state, const OptionalTensor& skip,
                        OptionalString disc, bool bidirectional, const OptionalTensor& segment_ids,
                        std::array<bool, 7> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("spade_ext::diagonal_scan_backward", "")
                             .typed<decltype(scan_backward)>();
  return op.call(grad_y, grad_state, u, w, b, c, log_dt, state, skip, disc, bidirectional, segment_ids,
                 output_mask);
}

at::Tensor kernel_meta(const at::Tensor& w, const at::Tensor& c, const OptionalTensor& log_dt,
                       c10::SymInt length, OptionalString disc, double rate) {
  diagonal_shapes::check_kernel(w, c, log_dt, length, disc, rate);
  return at::empty_symint({c.sym_size(0), c.sym_size(1), length}, c.options());
}

KernelGrads kernel_backward_meta(const at::Tensor& grad_k, const at::Tensor& w, const at::Tensor& c,
                                 const OptionalTensor& log_dt, OptionalString disc, double rate,
                                 std::array<bool, 3> output_mask) {
  diagonal_shapes::check_kernel_backward(grad_k, w, c, log_dt, disc, rate, output_mask);
  return {empty_gradient(output_mask[0], w), empty_gradient(output_mask[1], c),
          empty_gradient(output_mask[2], log_dt)};
}

ScanOutputs scan_meta(const at::Tensor& u, const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
                      const OptionalTensor& log_dt, const OptionalTensor& state, const OptionalTensor& skip,
                      OptionalString disc, bool bidirectional, const OptionalTensor& segment_ids) {
  diagonal_shapes::check_scan(u, w, b, c, log_dt, state, skip, disc, bidirectional, segment_ids);
  return {empty_outputs(u, c.sym_size(0)),
          at::empty_symint(diagonal_shapes::state_sizes(u, w, c), u.options())};
}

ScanGrads scan_backward_meta(const at::Tensor& grad_y, const at::Tensor& grad_state, const at::Tensor& u,
                             const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
                             const OptionalTensor& log_dt, const OptionalTensor& state,
                             const OptionalTensor& skip, OptionalString disc, bool bidirectional,
                             const OptionalTensor& segment_ids, std::array<bool, 7> output_mask) {
  diagonal_shapes::check_scan_backward(grad_y, grad_state, u, w, b, c, log_dt, state, skip, disc,
                                       bidirectional, segment_ids, output_mask);
  return {output_mask[0] ? empty_signal(u) : at::Tensor(),
          empty_gradient(output_mask[1], w),
          empty_gradient(output_mask[2], b),
          empty_gradient(output_mask[3], c),
          empty_gradient(output_mask[4], log_dt),
          empty_gradient(output_mask[5], state),
          empty_gradient(output_mask[6], skip)};
}

at::Tensor step_meta(const at::Tensor& u, const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
                     const OptionalTensor& log_dt, const at::Tensor& state, OptionalString disc) {
  diagonal_shapes::check_step(u, w, b, c, log_dt, state, disc);
  return at::empty_symint({u.sym_size(0), c.sym_size(0), u.sym_size(1)}, u.options());
}

struct DiagonalKernelFunction : torch::autograd::Function<DiagonalKernelFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& w, const at::Tensor& c,
                            const OptionalTensor& log_dt, c10::SymInt length, OptionalString disc,
                            double rate) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({w, c, log_dt.value_or(at::Tensor())});
    ctx->saved_data["disc"] = to_ivalue(disc);
    ctx->saved_data["rate"] = rate;
    return diagonal_kernel(w, c, log_dt, std::move(length), disc, rate);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto mask = gradient_mask<3>(ctx, {true, true, saved[2].defined()});
    auto [grad_w, grad_c, grad_log_dt] =
        kernel_backward(grads[0], saved[0], saved[1], as_optional(saved[2]),
                        as_string(ctx->saved_data["disc"]), ctx->saved_data["rate"].toDouble(), mask);
    return {grad_w, grad_c, grad_log_dt, {}, {}, {}};
  }
};

struct DiagonalScanFunction : torch::autograd::Function<DiagonalScanFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& u, const at::Tensor& w,
                               const at::Tensor& b, const at::Tensor& c, const OptionalTensor& log_dt,
                               const OptionalTensor& state, const OptionalTensor& skip, OptionalString disc,
                               bool bidirectional, const OptionalTensor& segment_ids) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({u, w, b, c, log_dt.value_or(at::Tensor()), state.value_or(at::Tensor()),
                            skip.value_or(at::Tensor()), segment_ids.value_or(at::Tensor())});
    ctx->saved_data["disc"] = to_ivalue(disc);
    ctx->saved_data["bidirectional"] = bidirectional;
    auto [y, final_state] = diagonal_scan(u, w, b, c, log_dt, state, skip, disc, bidirectional, segment_ids);
    return {y, final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto log_dt = as_optional(saved[4]), state = as_optional(saved[5]), skip = as_optional(saved[6]);
    const auto mask =
        gradient_mask<7>(ctx, {true, true, true, true, is_given(log_dt), is_given(state), is_given(skip)});
    auto [grad_u, grad_w, grad_b, grad_c, grad_log_dt, grad_state, grad_skip] =
        scan_backward(grads[0], grads[1], saved[0], saved[1], saved[2], saved[3], log_dt, state, skip,
                      as_string(ctx->saved_data["disc"]), ctx->saved_data["bidirectional"].toBool(),
                      as_optional(saved[7]), mask);
    return {grad_u, grad_w, grad_b, grad_c, grad_log_dt, grad_state, grad_skip, {}, {}, {}};
  }
};

at::Tensor kernel_autograd(const at::Tensor& w, const at::Tensor& c, const OptionalTensor& log_dt,
                           c10::SymInt length, OptionalString disc, double rate) {
  return DiagonalKernelFunction::apply(w, c, log_dt, std::move(length), disc, rate);
}

ScanOutputs scan_autograd(const at::Tensor& u, const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
                          const OptionalTensor& log_dt, const OptionalTensor& state,
                          const OptionalTensor& skip, OptionalString disc, bool bidirectional,
                          const OptionalTensor& segment_ids) {
  const auto outputs =
      DiagonalScanFunction::apply(u, w, b, c, log_dt, state, skip, disc, bidirectional, segment_ids);
  return {outputs[0], outputs[1]};
}

at::Tensor step_autograd(const at::Tensor& u, const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
                         const OptionalTensor& log_dt, const at::Tensor& state, OptionalString disc) {
  refuse_gradients("diagonal_step",
                   {{"u", u}, {"w", w}, {"b", b}, {"c", c}, {"log_dt", log_dt}, {"state", state}});
  at::AutoDispatchBelowAutograd guard;
  return diagonal_step(u, w, b, c, log_dt, state, disc);
}

at::Tensor step_inplace(const at::Tensor& u, const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
                        const OptionalTensor& log_dt, const at::Tensor& state, OptionalString disc) {
  return step_in_place(state, [&] { return diagonal_step(u, w, b, c, log_dt, state, disc); });
}

// Half-precision state space parameters diverge: autocast runs the ops in float32.
template <c10::DeviceType device, c10::DispatchKey key>
struct Autocast {
  static auto cast(const at::Tensor& t) { return at::autocast::cached_cast(at::kFloat, t, device); }
  static auto cast(const OptionalTensor& t) { return at::autocast::cached_cast(at::kFloat, t, device); }

  static at::Tensor kernel(const at::Tensor& w, const at::Tensor& c, const OptionalTensor& log_dt,
                           c10::SymInt length, OptionalString disc, double rate) {
    c10::impl::ExcludeDispatchKeyGuard guard(key);
    return diagonal_kernel(cast(w), cast(c), cast(log_dt), std::move(length), disc, rate);
  }

  static ScanOutputs scan(const at::Tensor& u, const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
                          const OptionalTensor& log_dt, const OptionalTensor& state,
                          const OptionalTensor& skip, OptionalString disc, bool bidirectional,
                          const OptionalTensor& segment_ids) {
    c10::impl::ExcludeDispatchKeyGuard guard(key);
    return diagonal_scan(cast(u), cast(w), cast(b), cast(c), cast(log_dt), cast(state), cast(skip), disc,
                         bidirectional, segment_ids);
  }

  // The state is written, so it cannot be a cast copy.
  static at::Tensor step(const at::Tensor& u, const at::Tensor& w, const at::Tensor& b, const at::Tensor& c,
                         const OptionalTensor& log_dt, const at::Tensor& state, OptionalString disc) {
    c10::impl::ExcludeDispatchKeyGuard guard(key);
    return diagonal_step(cast(u), cast(w), cast(b), cast(c), cast(log_dt), state, disc);
  }
};

TORCH_LIBRARY_FRAGMENT(spade_ext, m) {
  m.def(
      "diagonal_kernel(Tensor w, Tensor c, Tensor? log_dt, SymInt length, str? disc='zoh', float rate=1.0) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "diagonal_kernel_backward(Tensor grad_k, Tensor w, Tensor c, Tensor? log_dt, str? disc, float rate, "
      "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "diagonal_scan(Tensor u, Tensor w, Tensor b, Tensor c, Tensor? log_dt, Tensor? state=None, "
      "Tensor? skip=None, str? disc='zoh', bool bidirectional=False, Tensor? segment_ids=None) -> (Tensor, "
      "Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "diagonal_scan_backward(Tensor grad_y, Tensor grad_state, Tensor u, Tensor w, Tensor b, Tensor c, "
      "Tensor? log_dt, Tensor? state, Tensor? skip, str? disc, bool bidirectional, Tensor? segment_ids, "
      "bool[7] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "diagonal_step(Tensor u, Tensor w, Tensor b, Tensor c, Tensor? log_dt, Tensor(a!) state, "
      "str? disc='zoh') -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(spade_ext, Meta, m) {
  m.impl("diagonal_kernel", kernel_meta);
  m.impl("diagonal_kernel_backward", kernel_backward_meta);
  m.impl("diagonal_scan", scan_meta);
  m.impl("diagonal_scan_backward", scan_backward_meta);
  m.impl("diagonal_step", step_meta);
}

TORCH_LIBRARY_IMPL(spade_ext, Autograd, m) {
  m.impl("diagonal_kernel", kernel_autograd);
  m.impl("diagonal_kernel_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("diagonal_scan", scan_autograd);
  m.impl("diagonal_scan_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("diagonal_step", step_autograd);
}

TORCH_LIBRARY_IMPL(spade_ext, ADInplaceOrView, m) { m.impl("diagonal_step", step_inplace); }

TORCH_LIBRARY_IMPL(spade_ext, AutocastCPU, m) {
  using Rules = Autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>;
  m.impl("diagonal_kernel", Rules::kernel);
  m.impl("diagonal_scan", Rules::scan);
  m.impl("diagonal_step", Rules::step);
}

TORCH_LIBRARY_IMPL(spade_ext, AutocastCUDA, m) {
  using Rules = Autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>;
  m.impl("diagonal_kernel", Rules::kernel);
  m.impl("diagonal_scan", Rules::scan);
  m.impl("diagonal_step", Rules::step);
}

}  // namespace diagonal_op
}  // namespace spade_ext
