// The one check of the native code: a violated precondition becomes a Python RuntimeError that names the argument,
// what was expected and what came. The Python door has validated user input already; these guard the raw ops.
#pragma once
#include <torch/headeronly/util/Exception.h>

#define VAR_CHECK(condition, argument, expected, ...) \
  STD_TORCH_CHECK(condition, "var_kernels: ", argument, ": expected ", expected, ", got ", __VA_ARGS__)
