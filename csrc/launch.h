// Declares a CPU launcher in the namespace of every instruction set; bindings.cpp picks one at run time.
#pragma once

#define GRADCLUST_CPU_LAUNCHER(name, ...)        \
  namespace baseline { void name(__VA_ARGS__); } \
  namespace avx2 { void name(__VA_ARGS__); }     \
  namespace avx512 { void name(__VA_ARGS__); }
