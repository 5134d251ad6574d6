#pragma once

#define SPADE_EXT_API __attribute__((visibility("default")))
