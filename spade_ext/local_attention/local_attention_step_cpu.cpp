// One token a row against a ring of keys. A task is a row and a key head, whose keys it reads once for all
// the query heads of the group.
#include <ATen/Dispatch.h>
#include <ATen/MemoryOverlap.h>
#include <spade_ext/core/cpu_levels.h>
#include <spade_ext/local_attention/local_attention_ring.h>
#include <spade_ext/local_attention/local_attention_rows.h>
#include <torch/library.h>

namespace spade_ext {

SPADE_EXT_TYPED_LEVELS(LocalAttentionRing, local_attention_ring, double, double)
SPADE_EXT_TYPED_LEVELS(LocalAttentionRing, local_attention_ring, float, float)
SPADE_EXT_TYPED_LEVELS(LocalAttentionRing, local_attention_ring, at::Half, half)
SPADE_EXT_TYPED_LEVELS(LocalAttentionRing, local_attention_ring, at::BFloat16, bfloat16)

}  // namespace spade_ext

namespace spade_ext::local_attention_cpu {

// A cache that is written: where its rows are not contiguous, by way of a copy.
template <class scalar_t>
class Ring {
 public:
  explicit Ring(const at::Tensor& cache) : cache_(cache), rows_(cache) {}
  int64_t size() const { return cache_.size(1); }
  int64_t stride() const { return rows_.stride(); }
  const scalar_t* at(int64_t b, int64_t slot, int64_t head) const { return rows_.at(b, slot, head); }
  void set(int64_t b, int64_t slot, int64_t head, const scalar_t* row) const {
    std::copy_n(row, cache_.size(3), rows_.at(b, slot, head));
  }
  void finish() const {
    if (!rows_.tensor.is_same(cache_)) cache_.copy_(rows_.tensor);
  }

 private:
  at::Tensor cache_;
  Rows<scalar_t> rows_;
};

template <class scalar_t>
class Step {
  using acc_t = at::opmath_type<scalar_t>;
  const LocalAttentionTiles<scalar_t>& tiles_ = local_attention_tiles<scalar_t>();
  const LocalAttentionRing<scalar_t>& ring_ = local_attention_ring<scalar_t>();
  const Rows<scalar_t> q_, k_, v_, out_;
  const Ring<scalar_t> keys_, values_;
  const at::Tensor bias_, position_;
  const int64_t B_, H_, Hkv_, D_, Dv_, group_, q_width_, out_width_;
  const acc_t scale_;
  const Scratch<acc_t, 4> scratch_;

 public:
  Step(const local_attention_shapes::StepTensors& t, std::optional<double> scale, const at::Tensor& out)
      : q_(t.q),
        k_(t.k),
        v_(t.v),
        out_(out),
        keys_(t.k_cache),
        values_(t.v_cache),
        bias_(is_given(t.bias) ? Rows<scalar_t>(*t.bias).tensor : at::Tensor()),
        position_(t.position),
        B_(t.q.size(0)),
        H_(t.q.size(1)),
        Hkv_(t.k.size(1)),
        D_(t.q.size(2)),
        Dv_(t.v.size(2)),
        group_(H_ / Hkv_),
        q_width_(whole_panels(D_)),
        out_width_(whole_panels(Dv_)),
        scale_(static_cast<acc_t>(scale.value_or(1 / std::sqrt(double(D_))))),
        scratch_({B_ * H_ * q_width_, B_ * H_ * out_width_, B_ * H_, B_ * H_}) {}

  void run() const {
    parallel_for_each(B_ * Hkv_, [&](int64_t task) { attend(task / Hkv_, task % Hkv_); });
    keys_.finish(), values_.finish();
  }

 private:
  int64_t whole_panels(int64_t width) const {
    return (width + tiles_.panel - 1) / tiles_.panel * tiles_.panel;
  }

  void attend(int64_t b, int64_t head) const {
    const auto& [all_q, all_out, all_largest, all_total] = scratch_.parts;
    const int64_t first = head * group_, place = b * H_ + first;
    acc_t *const q = all_q + place * q_width_, *const out = all_out + place * out_width_;
    acc_t *const largest = all_largest + place, *const total = all_total + place;
    for (int64_t g = 0; g < group_; ++g)
      tiles_.load(q_.at(b, first + g), 0, &scale_, 1, D_, q + g * q_width_);
    std::fill_n(out, group_ * out_width_, acc_t(0));
    std::fill_n(largest, group_, -std::numeric_limits<acc_t>::infinity());
    std::fill_n(total, group_, acc_t(0));

    const int64_t position = position_.data_ptr<int64_t>()[b * position_.stride(0)];
    if (position >= 0) {
      const int64_t slots = keys_.size(), slot = position % slots;
      keys_.set(b, slot, head, k_.at(b, head));
      values_.set(b, slot, head, v_.at(b, head));
      const LocalAttentionSums<acc_t> sums{q, out, largest, total, group_, q_width_, out_width_};
      if (position >= slots) ring_.add(keys(b, head, {slot + 1, slots}, 0), sums);
      ring_.add(keys(b, head, {0, slot + 1}, slots - 1 - slot), sums);
    }
    for (int64_t g = 0; g < group_; ++g) {
      const acc_t factor = total[g] == 0 ? acc_t(0) : 1 / total[g];
      tiles_.store(out + g * out_width_, 1, &factor, 1, Dv_, out_.at(b, first + g), 0);
    }
  }

  // The keys of some slots, the first of which has this entry of the bias.
  LocalAttentionRun<scalar_t> keys(int64_t b, int64_t head, Range slots, int64_t entry) const {
    const scalar_t* bias = nullptr;
    if (bias_.defined()) bias = bias_.data_ptr<scalar_t>() + head * group_ * bias_.stride(0) + entry;
    return {keys_.at(b, slots.begin, head),
            values_.at(b, slots.begin, head),
            bias,
            keys_.stride(),
            values_.stride(),
            bias ? bias_.stride(0) : 0,
            slots.size(),
            D_,
            Dv_};
  }
};

// A cache is written, each number of it once.
void check_memory(const char* name, const at::Tensor& cache) {
  TORCH_CHECK_VALUE(at::has_internal_overlap(cache) != at::MemOverlap::Yes, "local_attention_step: ", name,
                    " has strides ", cache.strides(), ", expected no two elements in one place");
}

at::Tensor local_attention_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const OptionalTensor& bias, const at::Tensor& k_cache,
                                const at::Tensor& v_cache, const at::Tensor& position,
                                std::optional<double> scale) {
  const local_attention_shapes::StepTensors tensors{q, k, v, bias, k_cache, v_cache, position};
  local_attention_shapes::check_step(tensors, scale);
  check_memory("k_cache", k_cache);
  check_memory("v_cache", v_cache);
  const auto shared = at::get_overlap_status(k_cache, v_cache);
  TORCH_CHECK_VALUE(shared != at::MemOverlapStatus::Full && shared != at::MemOverlapStatus::Partial,
                    "local_attention_step: k_cache and v_cache share memory, expected separate tensors");
  const auto out = at::empty({q.size(0), q.size(1), v.size(2)}, q.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, q.scalar_type(), "local_attention_step",
                                  [&] { Step<scalar_t>(tensors, scale, out).run(); });
  return out;
}

TORCH_LIBRARY_IMPL(spade_ext, CPU, m) { m.impl("local_attention_step", local_attention_step); }

}  // namespace spade_ext::local_attention_cpu
