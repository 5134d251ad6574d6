// A task is a block of the weight's rows, which it reads once.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <spade_ext/core/cpu_levels.h>
#include <spade_ext/linear_step/linear_step_rows.h>
#include <spade_ext/linear_step/linear_step_shapes.h>
#include <torch/library.h>

#include <algorithm>

namespace spade_ext {

SPADE_EXT_TYPED_LEVELS(LinearStepRows, linear_step_rows, double, double)
SPADE_EXT_TYPED_LEVELS(LinearStepRows, linear_step_rows, float, float)
SPADE_EXT_TYPED_LEVELS(LinearStepRows, linear_step_rows, at::Half, half)
SPADE_EXT_TYPED_LEVELS(LinearStepRows, linear_step_rows, at::BFloat16, bfloat16)

}  // namespace spade_ext

namespace spade_ext::linear_step_cpu {

constexpr int64_t kNumbers = 1 << 15;  // of the weight, at least, that a thread is woken for

at::Tensor linear_step(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  linear_step_shapes::check(x, weight, bias);
  const auto out = linear_step_shapes::empty_result(x, weight);
  const int64_t N = weight.size(0), K = weight.size(1);
  if (out.numel() == 0) return out;
  const auto wide_x = x.to(at::toOpMathType(x.scalar_type())).contiguous();
  const auto rows = K <= 1 || weight.stride(1) == 1 ? weight : weight.contiguous();
  const auto biases = is_given(bias) ? bias->contiguous() : at::Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "linear_step", [&] {
    const LinearStepTask<scalar_t> task{wide_x.const_data_ptr<at::opmath_type<scalar_t>>(),
                                        rows.const_data_ptr<scalar_t>(),
                                        biases.defined() ? biases.const_data_ptr<scalar_t>() : nullptr,
                                        out.data_ptr<scalar_t>(),
                                        out.numel() / N,
                                        N,
                                        K,
                                        rows.stride(0)};
    const auto multiply = linear_step_rows<scalar_t>().multiply;
    at::parallel_for(0, N, std::max<int64_t>(1, kNumbers / std::max<int64_t>(1, K)),
                     [&](int64_t begin, int64_t end) { multiply(task, begin, end); });
  });
  return out;
}

TORCH_LIBRARY_IMPL(spade_ext, CPU, m) { m.impl("linear_step", linear_step); }

}  // namespace spade_ext::linear_step_cpu
