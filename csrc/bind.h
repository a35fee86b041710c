// Every operator registers its own bindings, so that adding one changes no shared file:
//   static Bind bind_name([](pybind11::module_& m) { m.def("name_cpu", &name_cpu); });
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace dreamreader {

using Binder = void (*)(pybind11::module_&);

inline std::vector<Binder>& binders() {
  static std::vector<Binder> list;
  return list;
}

struct Bind {
  explicit Bind(Binder binder) { binders().push_back(binder); }
};

}  // namespace dreamreader
