#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>

// MKL's own, inside libtorch; null where torch was built without MKL. Returns the previous number, 0 for the
// default.
extern "C" int MKL_Set_Num_Threads_Local(int) __attribute__((weak));

namespace spade_ext {

// One thread for this thread's MKL calls: a lone transform's algorithm, so its bits, depends on how many MKL
// may use.
class OneMklThread {
 public:
  OneMklThread() : before_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {}
  ~OneMklThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
  }
  OneMklThread(const OneMklThread&) = delete;
  OneMklThread& operator=(const OneMklThread&) = delete;

 private:
  int before_;
};

// Calls body(i) for every i in [0, count), each call on one thread. Where count and the work of a call follow
// from shapes alone, results have the same bits for any number of threads.
template <class Body>
void parallel_for_each(int64_t count, const Body& body) {
  // A range of at least 2 opens a parallel region, in which ATen's ops stay on the thread that calls them.
  at::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t begin, int64_t end) {
    // Worker threads do not inherit the caller's dispatch state: without this they would record autograd
    // graphs.
    at::AutoDispatchBelowADInplaceOrView guard;
    OneMklThread one_mkl_thread;
    for (int64_t i = begin; i < std::min(end, count); ++i) body(i);
  });
}

}  // namespace spade_ext
