// Checks that hold for real and for symbolic sizes, so that CPU and Meta kernels refuse the same inputs.
// Every message is one sentence: "<op>: <argument> <what it was>, expected <what>".
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <sstream>
#include <string>

namespace spade_ext {

inline std::string shape_text(const at::Tensor& t) {
  std::ostringstream text;
  text << t.sym_sizes();
  return text.str();
}

inline void check_dim(const char* op, const char* name, const at::Tensor& t, int64_t dim,
                      const char* letters) {
  TORCH_CHECK_VALUE(t.dim() == dim, op, ": ", name, " has shape ", shape_text(t), ", expected ", letters);
}

inline void check_size(const char* op, const char* name, const at::Tensor& t, int64_t dim,
                       const c10::SymInt& size, const char* letters) {
  TORCH_CHECK_VALUE(t.sym_size(dim).sym_eq(size).expect_true(__FILE__, __LINE__), op, ": ", name,
                    " has shape ", shape_text(t), ", expected ", size, " in dimension ", dim, " of ",
                    letters);
}

// Same dtype and device as `like`, the op's first argument.
inline void check_like(const char* op, const char* name, const at::Tensor& t, const char* like_name,
                       const at::Tensor& like) {
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), op, ": ", name, " is ", t.scalar_type(),
                   ", expected ", like.scalar_type(), ", the dtype of ", like_name);
  TORCH_CHECK_VALUE(t.device() == like.device(), op, ": ", name, " is on ", t.device(), ", expected ",
                    like.device(), ", the device of ", like_name);
}

// A backward op can be called by anyone: its output_mask asks only for gradients of tensors that were given.
inline void check_wanted(const char* op, const char* name, bool wanted, const std::optional<at::Tensor>& t) {
  TORCH_CHECK_VALUE(!wanted || (t.has_value() && t->defined()), op, ": output_mask wants the gradient of ",
                    name, ", which is None, expected a tensor");
}

inline void check_floating(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(at::isFloatingType(t.scalar_type()), op, ": ", name, " is ", t.scalar_type(),
                   ", expected float64, float32, float16 or bfloat16");
}

inline void check_float32_or_float64(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, op, ": ", name, " is ",
                   t.scalar_type(), ", expected float32 or float64");
}

}  // namespace spade_ext
