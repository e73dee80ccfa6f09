// The Python-facing module of a library: build facts, and Philox for the tests. Importing it registers the kernels.
// Plain C API under Py_LIMITED_API (pybind11 has no limited-API mode), so one binary serves Python 3.10 and later.

#include <Python.h>

#include "facts.h"
#include "philox.h"

#define DBK_STRING_(x) #x
#define DBK_STRING(x) DBK_STRING_(x)
#define DBK_JOIN_(a, b) a##b
#define DBK_JOIN(a, b) DBK_JOIN_(a, b)

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  const dbk::Facts facts = dbk::facts();
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:s}", "ops", facts.ops, "language", facts.language, "kernel", facts.kernel,
                       "compiler", facts.compiler, "flags", DBK_FLAGS);
}

PyObject* philox4x32(PyObject*, PyObject* args) {
  unsigned int c0, c1, c2, c3, k0, k1;
  if (!PyArg_ParseTuple(args, "IIIIII", &c0, &c1, &c2, &c3, &k0, &k1)) return nullptr;
  const dbk::Words w = dbk::philox4x32({c0, c1, c2, c3}, k0, k1);
  return Py_BuildValue("(IIII)", w.x0, w.x1, w.x2, w.x3);
}

PyObject* normals(PyObject*, PyObject* args) {
  unsigned long long group, seed;
  unsigned int offset;
  if (!PyArg_ParseTuple(args, "KKI", &group, &seed, &offset)) return nullptr;
  float n[4];
  dbk::normals_of_group<false>(group, seed, offset, n[0], n[1], n[2], n[3]);
  return Py_BuildValue("(ffff)", n[0], n[1], n[2], n[3]);
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS, "What was built: ops, language, kernel, compiler, flags."},
    {"philox4x32", philox4x32, METH_VARARGS, "Philox4x32-10 of counter words c0..c3 under key words k0, k1."},
    {"normals", normals, METH_VARARGS, "The four normals of a 64-bit group number under (seed, offset)."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, DBK_STRING(DBK_MODULE), "Compiled kernels of dbkernels.", -1, methods,
    nullptr,               nullptr,                nullptr,                           nullptr,
};

}  // namespace

PyMODINIT_FUNC DBK_JOIN(PyInit_, DBK_MODULE)(void) { return PyModule_Create(&definition); }
