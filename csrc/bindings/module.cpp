// What Python sees of the native library: pointers and plain numbers in, nothing else.
#include <pybind11/pybind11.h>

#include "bindings/convert.h"

PYBIND11_MODULE(_native, m) {
  vpns::bind_machine(m);
  vpns::bind_select_threshold(m);
  vpns::bind_batch_norm_act(m);
  vpns::bind_prompt_conv2d(m);
  vpns::bind_sparse_conv2d(m);
  vpns::bind_gradients(m);
  vpns::bind_masked(m);
  vpns::bind_network(m);
}
