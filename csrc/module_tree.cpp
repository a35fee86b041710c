// Whether a tree of modules is as a walk has found it. A session asks at its start, so it is one
// look at each module's dictionaries, without the lists that Python would make of them.
#include <array>
#include <memory>
#include <vector>

#include "bind.h"

namespace dreamreader {
namespace {

namespace py = pybind11;

struct Child {
  py::object name;
  PyObject* module;  // not held: it is one of the tree's modules, or None
};

struct Node {
  py::object reference;  // weak
  py::object type;
  std::vector<Child> inside;
};

using Tree = std::vector<Node>;

PyObject* interned(const char* text) {
  PyObject* name = PyUnicode_InternFromString(text);
  if (!name) throw py::error_already_set();
  return name;
}

// The object that a weak reference stands for; null where it is gone.
py::object target_of(py::handle reference) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* found = nullptr;
  if (PyWeakref_GetRef(reference.ptr(), &found) < 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
#else
  PyObject* found = PyWeakref_GetObject(reference.ptr());
  if (!found) throw py::error_already_set();
  return found == Py_None ? py::object() : py::reinterpret_borrow<py::object>(found);
#endif
}

py::object attributes_of(py::handle module) {
  PyObject* own = PyObject_GenericGetDict(module.ptr(), nullptr);
  if (!own) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(own);
}

bool holds(py::handle dictionary, PyObject* name) {
  const int found = PyDict_Contains(dictionary.ptr(), name);
  if (found < 0) throw py::error_already_set();
  return found;
}

// The dictionary of the modules inside one, borrowed; null where it is none of the plain kind.
PyObject* inside_of(py::handle own) {
  static PyObject* const name = interned("_modules");
  PyObject* inside = PyDict_GetItemWithError(own.ptr(), name);
  if (!inside && PyErr_Occurred()) throw py::error_already_set();
  return inside && PyDict_CheckExact(inside) ? inside : nullptr;
}

bool is_same_name(PyObject* a, PyObject* b) {
  if (a == b) return true;
  return PyUnicode_CheckExact(a) && PyUnicode_CheckExact(b) && PyUnicode_Compare(a, b) == 0;
}

bool has_same(PyObject* inside, const std::vector<Child>& before) {
  if (PyDict_GET_SIZE(inside) != Py_ssize_t(before.size())) return false;
  PyObject *name, *module;
  Py_ssize_t at = 0;
  for (const Child& child : before)
    if (!PyDict_Next(inside, &at, &name, &module) || module != child.module ||
        !is_same_name(name, child.name.ptr()))
      return false;
  return true;
}

// Marks that torch.compile, diffusers and gradient checkpointing leave on a module.
bool is_marked(py::handle own, PyObject* inside) {
  static const std::array<PyObject*, 3> marks{interned("_diffusers_hook"),
                                              interned("_compiled_call_impl"),
                                              interned("_gradient_checkpointing_func")};
  static PyObject* const wrapped = interned("_orig_mod");
  for (PyObject* mark : marks)
    if (holds(own, mark)) return true;
  return PyDict_GET_SIZE(inside) && holds(inside, wrapped);
}

// (all modules in order, those with marks); None where a walk would find others.
py::object look(const Tree& tree) {
  py::list every(tree.size()), marked;
  for (size_t i = 0; i < tree.size(); ++i) {
    const Node& node = tree[i];
    py::object module = target_of(node.reference);
    if (!module || reinterpret_cast<PyObject*>(Py_TYPE(module.ptr())) != node.type.ptr())
      return py::none();
    const py::object own = attributes_of(module);
    PyObject* inside = inside_of(own);
    if (!inside || !has_same(inside, node.inside)) return py::none();
    if (is_marked(own, inside)) marked.append(module);
    PyList_SET_ITEM(every.ptr(), Py_ssize_t(i), module.release().ptr());
  }
  return py::make_tuple(std::move(every), std::move(marked));
}

constexpr const char* kName = "dreamreader.module_tree";

PyObject* look_again(PyObject* self, PyObject*) {
  try {
    return look(*static_cast<Tree*>(PyCapsule_GetPointer(self, kName))).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
}

PyMethodDef look_method{"look", look_again, METH_NOARGS, "What a walk would find, or None."};

// A function that looks again at these modules, each of them once, all that they hold among them.
// None where one keeps what it holds in something else than a plain dictionary. Holds no module.
py::object module_tree_of(const py::list& modules) {
  auto tree = std::make_unique<Tree>();
  for (const py::handle module : modules) {
    Node node{py::weakref(module), py::type::of(module), {}};
    const py::object own = attributes_of(module);
    PyObject* inside = inside_of(own);
    if (!inside || inside != module.attr("_modules").ptr()) return py::none();
    PyObject *name, *child;
    for (Py_ssize_t at = 0; PyDict_Next(inside, &at, &name, &child);)
      node.inside.push_back({py::reinterpret_borrow<py::object>(name), child});
    tree->push_back(std::move(node));
  }
  const py::capsule self(tree.release(), kName, [](PyObject* capsule) {
    delete static_cast<Tree*>(PyCapsule_GetPointer(capsule, kName));
  });
  PyObject* function = PyCFunction_New(&look_method, self.ptr());
  if (!function) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(function);
}

Bind bind_module_tree([](py::module_& m) { m.def("module_tree_of", &module_tree_of); });

}  // namespace
}  // namespace dreamreader
