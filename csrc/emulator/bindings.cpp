// The Python module of emulated kernels: options and totals of a launch; the kernels come from their families' files.
#include "emulator/bindings.h"

PYBIND11_MODULE(fusedres_emulator, module) {
  using namespace fusedres::emulator;
  namespace py = pybind11;
  py::enum_<Order>(module, "Order")
      .value("forward", Order::forward)
      .value("reverse", Order::reverse)
      .value("seeded", Order::seeded);
  py::class_<Options>(module, "Options")
      .def(py::init<>())
      .def_readwrite("order", &Options::order)
      .def_readwrite("seed", &Options::seed)
      .def_readwrite("workers", &Options::workers)
      .def_readwrite("patience", &Options::patience)
      .def_readwrite("racecheck", &Options::racecheck)
      .def_readwrite("drop", &Options::drop)
      .def_readwrite("shift", &Options::shift)
      .def_readwrite("swap_registers", &Options::swap_registers);
  bind_bottleneck(module);
  bind_basic_block(module);
  bind_stem(module);
  bind_head(module);
  bind_tails(module);
}
