// Whether a tensor has the form of another: a hook asks this at every visit of a module, so it is
// one look at both, without the objects that Python makes of shapes, types and devices.
#include <array>
#include <memory>

#include "bind.h"
#include "tensor_view.h"

namespace dreamreader {
namespace {

constexpr int kMost = 8;  // dimensions

struct Form {
  PyTypeObject* type = nullptr;
  DLDevice device{};
  DLDataType dtype{};
  int dims = 0;
  std::array<int64_t, kMost> sizes{}, strides{};

  bool fits(const TensorView& x) const {
    const DLDataType own = x.dtype();
    const DLDevice at = x.device();
    if (x.dims() != dims || at.type != device.type || at.id != device.id ||
        own.code != dtype.code || own.bits != dtype.bits || own.lanes != dtype.lanes)
      return false;
    for (int i = 0; i < dims; ++i)
      if (x.size(i) != sizes[i] || x.stride(i) != strides[i]) return false;
    return true;
  }
};

constexpr const char* kName = "dreamreader.form";

PyObject* has_form(PyObject* self, PyObject* x) {
  const Form& form = *static_cast<Form*>(PyCapsule_GetPointer(self, kName));
  if (Py_TYPE(x) != form.type) Py_RETURN_FALSE;
  try {
    return PyBool_FromLong(form.fits(TensorView(x)));
  } catch (pybind11::error_already_set&) {
    Py_RETURN_FALSE;  // no plain memory: sparse, on the meta device, or wrapped by torch.func
  }
}

PyMethodDef has_form_method{"has_form", has_form, METH_O, "Whether a tensor has a form."};

// A function that tells whether a tensor has the type, shape, strides, dtype and device of `like`;
// None where it has too many dimensions. A plain function of Python's own interface: calls through
// pybind11 take several times as long.
pybind11::object form_of(pybind11::handle like) {
  const TensorView x(like);
  if (x.dims() > kMost) return pybind11::none();
  auto form = std::make_unique<Form>();
  form->type = Py_TYPE(like.ptr());
  Py_INCREF(form->type);
  form->device = x.device();
  form->dtype = x.dtype();
  form->dims = x.dims();
  for (int i = 0; i < x.dims(); ++i) form->sizes[i] = x.size(i), form->strides[i] = x.stride(i);
  const pybind11::capsule self(form.release(), kName, [](PyObject* capsule) {
    const std::unique_ptr<Form> held(static_cast<Form*>(PyCapsule_GetPointer(capsule, kName)));
    Py_DECREF(held->type);
  });
  PyObject* function = PyCFunction_New(&has_form_method, self.ptr());
  if (!function) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(function);
}

Bind bind_tensor_form([](pybind11::module_& m) { m.def("form_of", &form_of); });

}  // namespace
}  // namespace dreamreader
