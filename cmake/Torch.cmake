# The interface target `libtorch`: headers and libraries of the torch that Python would import.
# find_package(Torch) is not used: with a CUDA wheel it fails where no CUDA toolkit is installed.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '', end='')"
  OUTPUT_VARIABLE torch_root COMMAND_ERROR_IS_FATAL ANY)
if(NOT torch_root)
  message(FATAL_ERROR "torch is not installed for ${Python_EXECUTABLE}: run `pip install torch==2.13.0`")
endif()

# A path that is the same in every build environment, so that ccache finds what it compiled before.
file(CREATE_LINK ${torch_root} ${CMAKE_BINARY_DIR}/torch SYMBOLIC)
set(torch_link ${CMAKE_BINARY_DIR}/torch)

file(STRINGS ${torch_link}/include/torch/headeronly/version.h version_lines REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
string(REGEX REPLACE "[^0-9]+([0-9]+)[^0-9]+([0-9]+)[^0-9]+([0-9]+).*" "\\1.\\2.\\3" TORCH_VERSION "${version_lines}")
if(TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "torch ${TORCH_VERSION} was found, expected 2.11 or newer")
endif()

file(GLOB libgomp ${torch_link}/lib/libgomp*.so*)
add_library(libtorch INTERFACE)
target_include_directories(libtorch SYSTEM INTERFACE
  ${torch_link}/include ${torch_link}/include/torch/csrc/api/include)
target_link_libraries(libtorch INTERFACE
  ${torch_link}/lib/libtorch_cpu.so ${torch_link}/lib/libc10.so ${libgomp})
