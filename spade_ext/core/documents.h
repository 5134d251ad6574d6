// Packed rows: several documents one after the other in a row, told apart by segment_ids (B, L).
#pragma once

#include <ATen/core/Tensor.h>
#include <spade_ext/core/autograd.h>
#include <spade_ext/core/checks.h>

#include <vector>

namespace spade_ext {

// The tokens [begin, end) of a row.
struct Document {
  int64_t row, begin, end;
  int64_t length() const { return end - begin; }
};

// The runs of equal ids of each row in order, or a whole row where there are no ids; one at least.
inline std::vector<std::vector<Document>> documents(int64_t B, int64_t L, const OptionalTensor& segment_ids) {
  const auto ids = is_given(segment_ids) ? segment_ids->to(at::kLong).contiguous() : at::Tensor();
  std::vector<std::vector<Document>> documents(B);
  for (int64_t row = 0; row < B; ++row) {
    const int64_t* id = ids.defined() ? ids.const_data_ptr<int64_t>() + row * L : nullptr;
    for (int64_t begin = 0, end = 0; begin == 0 || begin < L; begin = end) {
      do ++end;
      while (end < L && (id == nullptr || id[end] == id[begin]));
      documents[row].push_back({row, begin, std::min(end, L)});
    }
  }
  return documents;
}

// For u (B, H, L).
inline void check_segment_ids(const char* op, const OptionalTensor& segment_ids, const at::Tensor& u) {
  if (!is_given(segment_ids)) return;
  TORCH_CHECK_TYPE(at::isIntegralType(segment_ids->scalar_type(), /*includeBool=*/false), op,
                   ": segment_ids is ", segment_ids->scalar_type(), ", expected integers");
  check_dim(op, "segment_ids", *segment_ids, 2, "(B, L)");
  TORCH_CHECK_VALUE(segment_ids->device() == u.device(), op, ": segment_ids is on ", segment_ids->device(),
                    ", expected ", u.device(), ", the device of u");
  for (int64_t dim : {0, 1}) check_size(op, "segment_ids", *segment_ids, dim, u.sym_size(2 * dim), "(B, L)");
}

}  // namespace spade_ext
