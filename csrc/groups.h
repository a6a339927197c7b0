// A group of factors from Python: a tuple of integers, read without pybind11's casters, which are slower.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "lowrank.h"

namespace grasp_bindings {

inline int64_t integer(PyObject *tuple, Py_ssize_t index) {
    const long long value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, index));
    if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return value;
}

inline void *pointer(PyObject *tuple, Py_ssize_t index) { return reinterpret_cast<void *>(integer(tuple, index)); }

// (U, s, Vh, bias, y, U_stride, Vh_stride, y_stride, N, R, s_dtype, order,
//  U_scales, Vh_scales, scales_dtype, U_bits, Vh_bits, U_group, Vh_group)
inline grasp_factors to_factors(const pybind11::handle &item) {
    PyObject *group = item.ptr();
    if (!PyTuple_Check(group) || PyTuple_GET_SIZE(group) != 19) throw pybind11::value_error("a group is a tuple of 19");
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

inline std::vector<grasp_factors> to_groups(const pybind11::tuple &groups) {
    std::vector<grasp_factors> factors;
    factors.reserve(groups.size());
    for (const pybind11::handle &group : groups) factors.push_back(to_factors(group));
    return factors;
}

}  // namespace grasp_bindings
