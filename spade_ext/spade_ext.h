// Everything of libspade_ext that a C++ program needs.
#pragma once

#include <map>
#include <string>

#include <spade_ext/diagonal/diagonal.h>
#include <spade_ext/export.h>
#include <spade_ext/linear_step/linear_step.h>
#include <spade_ext/local_attention/local_attention.h>
#include <spade_ext/long_conv/long_conv.h>
#include <spade_ext/s4/s4.h>

namespace spade_ext {

// What the library was built with: its version, torch, compiler, build type and parallel runtime.
SPADE_EXT_API std::map<std::string, std::string> build_info();

}  // namespace spade_ext
