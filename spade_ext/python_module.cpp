// The ops are registered with torch's dispatcher when libspade_ext loads; calling build_info here is what
// makes the linker keep that library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <spade_ext/spade_ext.h>

PYBIND11_MODULE(_C, m) {
  m.doc() = "libspade_ext, loaded into Python";
  m.def("build_info", &spade_ext::build_info,
        "What the library was built with: version, torch, compiler, build type and parallel runtime.");
}
