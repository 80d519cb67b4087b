// The CUDA kernels' bindings over the emulator, and what its own tests need.
#include <pybind11/pybind11.h>

#include "emulator.h"

void bind_cuda(pybind11::module_& m);    // csrc/bindings_cuda.cpp
void bind_faults(pybind11::module_& m);  // faults.cpp

PYBIND11_MODULE(_cuda_on_host, m) {
  bind_cuda(m);
  bind_faults(m);
  m.def("set_order", &emulator::set_order);
}
