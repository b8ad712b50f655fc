// Whether modules of Python are still what somebody made a plan of: the plan may then stand for calling them.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "common/python_tensor.h"

namespace fastattn {

// Modules are held by weak references, since one of them will hold the plan; all else is held, so that no address can
// come to mean something else.
class WatchedModules {
 public:
  // `names` are to keep the very objects that they have now, in the instance's dict or in one of the dicts in there
  // (`container`: "_parameters", "_buffers", "_modules", or "" for none). A name that is missing counts as None.
  void watch(const pybind11::object& module, const std::string& container, const std::vector<std::string>& names) {
    namespace py = pybind11;
    Group group{weak(module),
                borrowed(reinterpret_cast<PyObject*>(Py_TYPE(module.ptr()))),
                container.empty() ? py::none() : interned(container),
                container == "_modules",
                {}};
    const py::object values = values_of(group, module);
    for (const std::string& name : names) {
      const py::object key = interned(name), value = borrowed(look_up(values, key));
      group.kept.emplace_back(key, group.holds_modules && !value.is_none() ? weak(value) : value);
      if (THPVariable_Check(value.ptr())) watch_contents(value);
    }
    groups_.push_back(std::move(group));
  }

  // `hooks` is a dict that is to stay empty.
  void watch_hooks(pybind11::object hooks) { hooks_.push_back(std::move(hooks)); }

  // Whether nobody has replaced or written anything since, and nobody watches calls by hooks.
  bool are_unchanged() const {
    for (const pybind11::object& hooks : hooks_) {
      if (PyDict_Size(hooks.ptr()) != 0) return false;
    }
    for (const Group& group : groups_) {
      if (!is_unchanged(group)) return false;
    }
    for (const Content& content : contents_) {
      const at::Tensor& tensor = THPVariable_Unpack(content.object.ptr());
      if (tensor._version() != content.version || tensor.const_data_ptr() != content.alias.const_data_ptr()) {
        return false;
      }
    }
    return true;
  }

 private:
  struct Group {
    pybind11::object module, type, container;
    bool holds_modules;
    std::vector<std::pair<pybind11::object, pybind11::object>> kept;
  };
  // The alias keeps the memory, so that other values cannot come to its address.
  struct Content {
    pybind11::object object;
    at::Tensor alias;
    uint32_t version;
  };

  void watch_contents(const pybind11::object& object) {
    const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
    TORCH_CHECK_VALUE(!tensor.is_inference(), "nothing counts the changes of a tensor made in inference mode.");
    contents_.push_back({object, tensor.detach(), static_cast<uint32_t>(tensor._version())});
  }

  static bool is_unchanged(const Group& group) {
    const pybind11::object module = referent(group.module);
    if (reinterpret_cast<PyObject*>(Py_TYPE(module.ptr())) != group.type.ptr()) return false;
    const pybind11::object values = values_of(group, module);
    if (!PyDict_Check(values.ptr())) return false;
    for (const auto& [name, value] : group.kept) {
      const PyObject* present = look_up(values, name);
      const bool weakly = group.holds_modules && !value.is_none();
      if (present != (weakly ? referent(value).ptr() : value.ptr())) return false;
    }
    return true;
  }

  static pybind11::object borrowed(PyObject* object) { return pybind11::reinterpret_borrow<pybind11::object>(object); }

  static pybind11::object interned(const std::string& name) {
    return pybind11::reinterpret_steal<pybind11::object>(PyUnicode_InternFromString(name.c_str()));
  }

  static pybind11::object weak(const pybind11::object& object) { return pybind11::weakref(object); }

  // None if it is gone.
  static pybind11::object referent(const pybind11::object& reference) {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* object = nullptr;
    if (PyWeakref_GetRef(reference.ptr(), &object) < 0) throw pybind11::error_already_set();
    return object == nullptr ? pybind11::none() : pybind11::reinterpret_steal<pybind11::object>(object);
#else
    return borrowed(PyWeakref_GetObject(reference.ptr()));
#endif
  }

  // Borrowed.
  static PyObject* look_up(const pybind11::object& dict, const pybind11::object& name) {
    PyObject* value = PyDict_GetItemWithError(dict.ptr(), name.ptr());
    return value == nullptr ? Py_None : value;
  }

  static pybind11::object values_of(const Group& group, const pybind11::object& module) {
    auto state = pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
    return group.container.is_none() ? state : borrowed(look_up(state, group.container));
  }

  std::vector<Group> groups_;
  std::vector<Content> contents_;
  std::vector<pybind11::object> hooks_;
};

}  // namespace fastattn
