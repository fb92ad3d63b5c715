// The questions of fusedres/guards.py, asked of Python's objects themselves: a network has thousands of attributes.
// Called with the interpreter's lock held, with tuples that Python made for it; what is none of that is "no" or
// undefined.
#include <Python.h>

namespace {

// A guard's fields, in order.
enum : Py_ssize_t { kKind, kState, kParts, kEmpty };
// Those of what a dictionary held.
enum : Py_ssize_t { kOf, kKeys, kValues };
// Those of what a tensor was.
enum : Py_ssize_t { kAddress, kDtype, kVersion };

// fusedres.guards._Contents.hold
bool hold(PyObject* contents) {
  PyObject *const of = PyTuple_GetItem(contents, kOf), *const values = PyTuple_GetItem(contents, kValues);
  if (PyDict_Size(of) != PyTuple_Size(values)) return false;
  Py_ssize_t at = 0;
  PyObject *key, *value;
  for (Py_ssize_t i = 0; PyDict_Next(of, &at, &key, &value); ++i) {
    if (value != PyTuple_GetItem(values, i)) return false;
  }
  return true;
}

template <typename Question>
bool all(PyObject* tuple, const Question& question) {
  for (Py_ssize_t i = 0, size = PyTuple_Size(tuple); i < size; ++i) {
    if (!question(PyTuple_GetItem(tuple, i))) return false;
  }
  return true;
}

// fusedres.guards.Guard.holds
bool holds(PyObject* guard, PyObject* module) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != PyTuple_GetItem(guard, kKind)) return false;
  PyObject* const state = PyTuple_GetItem(guard, kState);
  PyObject* const attributes = PyObject_GenericGetDict(module, nullptr);
  const bool are_same = attributes == PyTuple_GetItem(state, kOf);
  Py_XDECREF(attributes);
  return are_same && all(PyTuple_GetItem(guard, kEmpty), [](PyObject* dict) { return PyDict_Size(dict) == 0; }) &&
         hold(state) && all(PyTuple_GetItem(guard, kParts), hold);
}

bool is_equal(PyObject* value, PyObject* integer) {
  return value != nullptr && PyObject_RichCompareBool(value, integer, Py_EQ) == 1;
}

// fusedres.guards.Identity.holds
bool is_unchanged(PyObject* identity, PyObject* tensor) {
  static PyObject *const data_ptr = PyUnicode_InternFromString("data_ptr"),
                         *const dtype = PyUnicode_InternFromString("dtype"),
                         *const version = PyUnicode_InternFromString("_version");
  const auto has = [&](PyObject* value, Py_ssize_t field) {
    const bool is_same = is_equal(value, PyTuple_GetItem(identity, field));
    Py_XDECREF(value);
    return is_same;
  };
  return has(PyObject_CallMethodObjArgs(tensor, data_ptr, nullptr), kAddress) &&
         has(PyObject_GetAttr(tensor, dtype), kDtype) && has(PyObject_GetAttr(tensor, version), kVersion);
}

// question(of[i], things[i]) for every i. An error is "no".
template <typename Question>
int all_of(PyObject* of, PyObject* things, const Question& question) {
  const Py_ssize_t size = PyTuple_Size(of);
  bool answer = size >= 0 && size == PyTuple_Size(things);
  for (Py_ssize_t i = 0; answer && i < size; ++i) {
    answer = question(PyTuple_GetItem(of, i), PyTuple_GetItem(things, i));
  }
  PyErr_Clear();
  return answer;
}

}  // namespace

#define FUSEDRES_EXPORT extern "C" __attribute__((visibility("default")))

// Whether each of `modules` is as its guard says.
FUSEDRES_EXPORT int fusedres_guards_hold(PyObject* guards, PyObject* modules) { return all_of(guards, modules, holds); }

// Whether each of `tensors` lies where its identity says, and was not written to.
FUSEDRES_EXPORT int fusedres_tensors_hold(PyObject* identities, PyObject* tensors) {
  return all_of(identities, tensors, is_unchanged);
}
