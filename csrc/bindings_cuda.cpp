// grasp_kernels._cuda: takes integers, throws exceptions. Python has checked what the pointers point to.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "lowrank.h"

namespace py = pybind11;

namespace {

void check(grasp_status status) {
    if (status == GRASP_OK) return;
    if (status == GRASP_BAD_ARGUMENT) throw py::value_error(grasp_cuda_message());
    throw std::runtime_error(grasp_cuda_message());
}

// Read without pybind11's casters, which are slower.
int64_t integer(PyObject *tuple, Py_ssize_t index) {
    const long long value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, index));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

void *pointer(PyObject *tuple, Py_ssize_t index) { return reinterpret_cast<void *>(integer(tuple, index)); }

// (U, s, Vh, bias, y, U_stride, Vh_stride, y_stride, N, R, s_dtype, order,
//  U_scales, Vh_scales, scales_dtype, U_bits, Vh_bits, U_group, Vh_group)
grasp_factors to_factors(const py::handle &item) {
    PyObject *group = item.ptr();
    if (!PyTuple_Check(group) || PyTuple_GET_SIZE(group) != 19) throw py::value_error("a group is a tuple of 19");
    grasp_factors factors = {};
    factors.U = pointer(group, 0);
    factors.s = pointer(group, 1);
    factors.Vh = pointer(group, 2);
    factors.bias = pointer(group, 3);
    factors.y = pointer(group, 4);
    factors.U_stride = integer(group, 5);
    factors.Vh_stride = integer(group, 6);
    factors.y_stride = integer(group, 7);
    factors.N = integer(group, 8);
    factors.R = integer(group, 9);
    factors.s_dtype = static_cast<int32_t>(integer(group, 10));
    factors.order = static_cast<const int32_t *>(pointer(group, 11));
    factors.U_scales = pointer(group, 12);
    factors.Vh_scales = pointer(group, 13);
    factors.scales_dtype = static_cast<int32_t>(integer(group, 14));
    factors.U_bits = static_cast<int32_t>(integer(group, 15));
    factors.Vh_bits = static_cast<int32_t>(integer(group, 16));
    factors.U_group = static_cast<int32_t>(integer(group, 17));
    factors.Vh_group = static_cast<int32_t>(integer(group, 18));
    return factors;
}

// Holds the interpreter's lock, so that no launch of another thread comes between the two of a pair.
void run(uintptr_t data, int64_t stride, int64_t M, int64_t K, int32_t dtype, const py::tuple &groups, uintptr_t stream,
         uintptr_t workspace, int64_t workspace_bytes, uintptr_t barrier, int32_t path, int32_t splits) {
    const grasp_input x = {reinterpret_cast<const void *>(data), stride, M, K, dtype};
    const grasp_cuda_options options = {reinterpret_cast<void *>(stream),
                                        reinterpret_cast<void *>(workspace),
                                        workspace_bytes,
                                        reinterpret_cast<uint32_t *>(barrier),
                                        path,
                                        splits};
    std::vector<grasp_factors> factors;
    factors.reserve(groups.size());
    for (const py::handle &group : groups) factors.push_back(to_factors(group));
    check(grasp_cuda_lowrank_linear(&x, factors.data(), static_cast<int64_t>(factors.size()), &options));
}

int64_t workspace_bytes(int64_t M, const std::vector<int64_t> &ranks) {
    return grasp_cuda_workspace_bytes(M, ranks.data(), static_cast<int64_t>(ranks.size()));
}

// "12.4" for 12040.
std::string version_text(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// A driver runs programs of its own major version of CUDA and of earlier ones. Without a driver there is nothing to
// say.
void require_driver() {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return;
    if (driver / 1000 >= CUDART_VERSION / 1000) return;
    throw std::runtime_error("it was built with CUDA " + version_text(CUDART_VERSION) +
                             ", but the GPU's driver is for CUDA " + version_text(driver) +
                             "; update the driver, or build with an older nvcc");
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    require_driver();
    module.doc() = "Low-rank linears of few rows on CUDA; see csrc/lowrank.h.";
    module.attr("MAX_ROWS") = GRASP_CUDA_MAX_ROWS;
    module.def("run", &run);
    module.def("workspace_bytes", &workspace_bytes);
    module.def("load", [] { check(grasp_cuda_load()); });
}
