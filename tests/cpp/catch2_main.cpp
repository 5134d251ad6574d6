// Catch2 2 has no main function of its own.
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
