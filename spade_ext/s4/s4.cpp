#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <spade_ext/s4/s4.h>
#include <spade_ext/s4/s4_shapes.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

namespace spade_ext {

at::Tensor s4_kernel(const at::Tensor& w, const at::Tensor& p, const at::Tensor& b, const at::Tensor& c,
                     const at::Tensor& log_dt, c10::SymInt length, c10::SymInt nodes, double rate) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("spade_ext::s4_kernel", "").typed<decltype(s4_kernel)>();
  return op.call(w, p, b, c, log_dt, std::move(length), std::move(nodes), rate);
}

at::Tensor s4_state(const at::Tensor& u, const at::Tensor& w, const at::Tensor& p, const at::Tensor& b,
                    const at::Tensor& log_dt, const std::optional<at::Tensor>& state) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("spade_ext::s4_state", "").typed<decltype(s4_state)>();
  return op.call(u, w, p, b, log_dt, state);
}

at::Tensor s4_step(const at::Tensor& u, const at::Tensor& w, const at::Tensor& p, const at::Tensor& b,
                   const at::Tensor& c, const at::Tensor& log_dt, const at::Tensor& state) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("spade_ext::s4_step", "").typed<decltype(s4_step)>();
  return op.call(u, w, p, b, c, log_dt, state);
}

namespace s4_op {

using Grads = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

Grads kernel_backward(const at::Tensor& grad_k, const at::Tensor& w, const at::Tensor& p, const at::Tensor& b,
                      const at::Tensor& c, const at::Tensor& log_dt, c10::SymInt nodes, double rate,
                      std::array<bool, 5> output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("spade_ext::s4_kernel_backward", "")
                             .typed<decltype(kernel_backward)>();
  return op.call(grad_k, w, p, b, c, log_dt, std::move(nodes), rate, output_mask);
}

at::Tensor kernel_meta(const at::Tensor& w, const at::Tensor& p, const at::Tensor& b, const at::Tensor& c,
                       const at::Tensor& log_dt, c10::SymInt length, c10::SymInt nodes, double rate) {
  s4_shapes::check_kernel(w, p, b, c, log_dt, length, nodes, rate);
  return at::empty_symint({b.sym_size(0), c.sym_size(0), c.sym_size(1), length}, c.options());
}

Grads kernel_backward_meta(const at::Tensor& grad_k, const at::Tensor& w, const at::Tensor& p,
                           const at::Tensor& b, const at::Tensor& c, const at::Tensor& log_dt,
                           c10::SymInt nodes, double rate, std::array<bool, 5> output_mask) {
  s4_shapes::check_kernel_backward(grad_k, w, p, b, c, log_dt, nodes, rate);
  return {empty_gradient(output_mask[0], w), empty_gradient(output_mask[1], p),
          empty_gradient(output_mask[2], b), empty_gradient(output_mask[3], c),
          empty_gradient(output_mask[4], log_dt)};
}

at::Tensor state_meta(const at::Tensor& u, const at::Tensor& w, const at::Tensor& p, const at::Tensor& b,
                      const at::Tensor& log_dt, const OptionalTensor& state) {
  s4_shapes::check_state(u, w, p, b, log_dt, state);
  return at::empty_symint({u.sym_size(0), u.sym_size(1), w.sym_size(1), 2}, w.options());
}

at::Tensor step_meta(const at::Tensor& u, const at::Tensor& w, const at::Tensor& p, const at::Tensor& b,
                     const at::Tensor& c, const at::Tensor& log_dt, const at::Tensor& state) {
  s4_shapes::check_step(u, w, p, b, c, log_dt, state);
  return at::empty_symint({u.sym_size(0), c.sym_size(0), u.sym_size(1)}, u.options());
}

struct S4KernelFunction : torch::autograd::Function<S4KernelFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& w, const at::Tensor& p,
                            const at::Tensor& b, const at::Tensor& c, const at::Tensor& log_dt,
                            c10::SymInt length, c10::SymInt nodes, double rate) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({w, p, b, c, log_dt});
    ctx->saved_data["nodes"] = nodes;
    ctx->saved_data["rate"] = rate;
    return s4_kernel(w, p, b, c, log_dt, std::move(length), std::move(nodes), rate);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto mask = gradient_mask<5>(ctx, {true, true, true, true, true});
    auto [grad_w, grad_p, grad_b, grad_c, grad_log_dt] =
        kernel_backward(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4],
                        ctx->saved_data["nodes"].toSymInt(), ctx->saved_data["rate"].toDouble(), mask);
    return {grad_w, grad_p, grad_b, grad_c, grad_log_dt, {}, {}, {}};
  }
};

at::Tensor kernel_autograd(const at::Tensor& w, const at::Tensor& p, const at::Tensor& b, const at::Tensor& c,
                           const at::Tensor& log_dt, c10::SymInt length, c10::SymInt nodes, double rate) {
  return S4KernelFunction::apply(w, p, b, c, log_dt, std::move(length), std::move(nodes), rate);
}

at::Tensor step_autograd(const at::Tensor& u, const at::Tensor& w, const at::Tensor& p, const at::Tensor& b,
                         const at::Tensor& c, const at::Tensor& log_dt, const at::Tensor& state) {
  refuse_gradients("s4_step",
                   {{"u", u}, {"w", w}, {"p", p}, {"b", b}, {"c", c}, {"log_dt", log_dt}, {"state", state}});
  at::AutoDispatchBelowAutograd guard;
  return s4_step(u, w, p, b, c, log_dt, state);
}

at::Tensor step_inplace(const at::Tensor& u, const at::Tensor& w, const at::Tensor& p, const at::Tensor& b,
                        const at::Tensor& c, const at::Tensor& log_dt, const at::Tensor& state) {
  return step_in_place(state, [&] { return s4_step(u, w, p, b, c, log_dt, state); });
}

// Half-precision state space parameters diverge: autocast runs the ops in float32.
template <c10::DeviceType device>
at::Tensor wide(const at::Tensor& t) {
  return at::autocast::cached_cast(at::kFloat, t, device);
}

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor kernel_autocast(const at::Tensor& w, const at::Tensor& p, const at::Tensor& b, const at::Tensor& c,
                           const at::Tensor& log_dt, c10::SymInt length, c10::SymInt nodes, double rate) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  return s4_kernel(wide<device>(w), wide<device>(p), wide<device>(b), wide<device>(c), wide<device>(log_dt),
                   std::move(length), std::move(nodes), rate);
}

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor state_autocast(const at::Tensor& u, const at::Tensor& w, const at::Tensor& p, const at::Tensor& b,
                          const at::Tensor& log_dt, const OptionalTensor& state) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  return s4_state(wide<device>(u), wide<device>(w), wide<device>(p), wide<device>(b), wide<device>(log_dt),
                  is_given(state) ? OptionalTensor(wide<device>(*state)) : state);
}

// The state is the caller's own tensor, so it is not cast.
template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor step_autocast(const at::Tensor& u, const at::Tensor& w, const at::Tensor& p, const at::Tensor& b,
                         const at::Tensor& c, const at::Tensor& log_dt, const at::Tensor& state) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  return s4_step(wide<device>(u), wide<device>(w), wide<device>(p), wide<device>(b), wide<device>(c),
                 wide<device>(log_dt), state);
}

TORCH_LIBRARY_FRAGMENT(spade_ext, m) {
  const std::vector<at::Tag> compliant{at::Tag::pt2_compliant_tag};
  m.def(
      "s4_kernel(Tensor w, Tensor p, Tensor b, Tensor c, Tensor log_dt, SymInt length, SymInt nodes, "
      "float rate=1.0) -> Tensor",
      compliant);
  m.def(
      "s4_kernel_backward(Tensor grad_k, Tensor w, Tensor p, Tensor b, Tensor c, Tensor log_dt, SymInt "
      "nodes, "
      "float rate, bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      compliant);
  m.def("s4_state(Tensor u, Tensor w, Tensor p, Tensor b, Tensor log_dt, Tensor? state=None) -> Tensor",
        compliant);
  m.def(
      "s4_step(Tensor u, Tensor w, Tensor p, Tensor b, Tensor c, Tensor log_dt, Tensor(a!) state) -> Tensor",
      compliant);
}

TORCH_LIBRARY_IMPL(spade_ext, Meta, m) {
  m.impl("s4_kernel", kernel_meta);
  m.impl("s4_kernel_backward", kernel_backward_meta);
  m.impl("s4_state", state_meta);
  m.impl("s4_step", step_meta);
}

TORCH_LIBRARY_IMPL(spade_ext, Autograd, m) {
  m.impl("s4_kernel", kernel_autograd);
  m.impl("s4_kernel_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("s4_state", torch::autograd::autogradNotImplementedFallback());
  m.impl("s4_step", step_autograd);
}

TORCH_LIBRARY_IMPL(spade_ext, ADInplaceOrView, m) { m.impl("s4_step", step_inplace); }

TORCH_LIBRARY_IMPL(spade_ext, AutocastCPU, m) {
  m.impl("s4_kernel", kernel_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
  m.impl("s4_state", state_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
  m.impl("s4_step", step_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(spade_ext, AutocastCUDA, m) {
  m.impl("s4_kernel", kernel_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
  m.impl("s4_state", state_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
  m.impl("s4_step", step_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace s4_op
}  // namespace spade_ext
