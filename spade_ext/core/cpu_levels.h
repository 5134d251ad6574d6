// Tables of functions that are compiled once for each level of the CPU and chosen at run time. The tables of
// <name>_level.cpp (CMakeLists.txt, level_sources) begin with <name>. ATEN_CPU_CAPABILITY chooses another
// level, as for torch.
#pragma once

#include <ATen/Version.h>

#include <string>

// Declares the constants DEFAULT::name, AVX2::name, AVX512::name of a type, and the function name() that
// returns the one for this CPU. Stands in namespace spade_ext.
#ifdef SPADE_EXT_X86_LEVELS
#define SPADE_EXT_LEVELS(Type, name)                                                        \
  namespace DEFAULT {                                                                       \
  extern const Type name;                                                                   \
  }                                                                                         \
  namespace AVX2 {                                                                          \
  extern const Type name;                                                                   \
  }                                                                                         \
  namespace AVX512 {                                                                        \
  extern const Type name;                                                                   \
  }                                                                                         \
  inline const Type& name() {                                                               \
    static const std::string level = at::get_cpu_capability();                              \
    return level == "AVX512" ? AVX512::name : level == "AVX2" ? AVX2::name : DEFAULT::name; \
  }
#else
#define SPADE_EXT_LEVELS(Type, name) \
  namespace DEFAULT {                \
  extern const Type name;            \
  }                                  \
  inline const Type& name() { return DEFAULT::name; }
#endif

// The same for a table of each scalar type: defines function<scalar>(), with tables named function_suffix.
#define SPADE_EXT_TYPED_LEVELS(Table, function, scalar, suffix) \
  SPADE_EXT_LEVELS(Table<scalar>, function##_##suffix)          \
  template <>                                                   \
  const Table<scalar>& function<scalar>() {                     \
    return function##_##suffix();                               \
  }
