#include <spade_ext/spade_ext.h>
#include <torch/headeronly/version.h>

namespace spade_ext {

std::map<std::string, std::string> build_info() {
  return {
      {"version", SPADE_EXT_VERSION},
      {"torch", TORCH_VERSION},
      {"compiler", __VERSION__},
      {"build_type", SPADE_EXT_BUILD_TYPE},
      {"kernels", "CPU"},
#ifdef _OPENMP
      {"parallel", "OpenMP"},
#else
      {"parallel", "none"},
#endif
  };
}

}  // namespace spade_ext
