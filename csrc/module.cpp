// The Python-facing module of a library: build facts, and Philox for the tests. Importing it registers the kernels, which
// don't depend on Python: they use torch's stable ABI, and only this file is built for one version of Python.

#include <cstdint>

#include <pybind11/pybind11.h>

#include "facts.h"
#include "philox.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace {

py::dict build_info() {
  const dbk::Facts facts = dbk::facts();
  return py::dict("ops"_a = facts.ops, "language"_a = facts.language, "kernel"_a = facts.kernel,
                  "compiler"_a = facts.compiler, "flags"_a = DBK_FLAGS);
}

py::tuple philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  const dbk::Words w = dbk::philox4x32({c0, c1, c2, c3}, k0, k1);
  return py::make_tuple(w.x0, w.x1, w.x2, w.x3);
}

py::tuple normals(uint64_t group, uint64_t seed, uint32_t offset) {
  float n[4];
  dbk::normals_of_group<false>(group, seed, offset, n[0], n[1], n[2], n[3]);
  return py::make_tuple(n[0], n[1], n[2], n[3]);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of dbkernels.";
  m.def("build_info", &build_info, "Return the build facts: ops, language, kernel, compiler, flags.");
  m.def("philox4x32", &philox4x32, "c0"_a, "c1"_a, "c2"_a, "c3"_a, "k0"_a, "k1"_a,
        "Compute Philox4x32-10 of counter words c0..c3 under key words k0, k1.");
  m.def("normals", &normals, "group"_a, "seed"_a, "offset"_a,
        "Return the four normals of a 64-bit group number under (seed, offset).");
}
