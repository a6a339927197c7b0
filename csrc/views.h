// Python tensors in the form that the kernels take.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "dlpack.h"
#include "lowrank.h"

namespace grasp_bindings {

constexpr int32_t NO_DTYPE = -1, INDEX = -2;  // INDEX: int32, of no grasp_dtype either

// A tensor as a matrix: all leading dimensions together are its rows.
struct View {
    char *data = nullptr;
    int64_t rows = 1, columns = 0, stride = 0;
    int32_t dtype = GRASP_F32, dimensions = 0;
    const int64_t *shape = nullptr;
    bool on_cpu = true, is_matrix = true;  // false: rows without a common stride, or not contiguous

    bool overlaps() const { return rows > 1 && stride < columns; }
};

// torch.Tensor and its DLPack interface. Found once, when the module is set up: to look them up can run Python code.
struct TensorType {
    PyTypeObject *type = nullptr;
    const dlpack::ExchangeApi *api = nullptr;
};

inline TensorType tensor_type;

inline void find_tensor_type(const pybind11::handle &type) {
    const pybind11::object capsule = type.attr(dlpack::ATTRIBUTE);
    const void *api = PyCapsule_GetPointer(capsule.ptr(), dlpack::CAPSULE);
    if (api == nullptr) throw pybind11::error_already_set();
    const auto *found = static_cast<const dlpack::ExchangeApi *>(api);
    if (found->version.major != 1 || found->from_object == nullptr) throw std::runtime_error("expected DLPack 1");
    tensor_type = {reinterpret_cast<PyTypeObject *>(type.inc_ref().ptr()), found};
}

inline int32_t to_dtype(dlpack::DataType dtype) {
    if (dtype.code == dlpack::BFLOAT && dtype.bits == 16) return GRASP_BF16;
    if (dtype.code == dlpack::FLOAT && dtype.bits == 16) return GRASP_F16;
    if (dtype.code == dlpack::FLOAT && dtype.bits == 32) return GRASP_F32;
    return dtype.code == dlpack::INT && dtype.bits == 32 ? INDEX : NO_DTYPE;
}

// False, with a Python exception set, if this is no tensor or has no memory that can be read. Runs no Python code. The
// view is valid until Python code runs or the interpreter's lock is released: either can change the tensor.
inline bool read(PyObject *object, View &view) {
    if (tensor_type.type == nullptr || !PyObject_TypeCheck(object, tensor_type.type)) {
        PyErr_Format(PyExc_TypeError, "expected a tensor, got %s", Py_TYPE(object)->tp_name);
        return false;
    }
    dlpack::Tensor tensor;
    if (tensor_type.api->from_object(object, &tensor) != 0) return false;
    const int last = tensor.ndim - 1;
    view.data = static_cast<char *>(tensor.data) + tensor.byte_offset;
    view.dtype = to_dtype(tensor.dtype);
    view.dimensions = tensor.ndim;
    view.shape = tensor.shape;
    view.on_cpu = tensor.device.type == dlpack::CPU;
    if (last < 0) return true;
    view.columns = tensor.shape[last];
    view.is_matrix = view.columns <= 1 || tensor.strides[last] == 1;
    for (int i = last - 1; i >= 0; --i) {
        if (tensor.shape[i] == 1) continue;
        if (view.rows == 1) view.stride = tensor.strides[i];
        view.is_matrix = view.is_matrix && tensor.strides[i] == view.stride * view.rows;
        view.rows *= tensor.shape[i];
    }
    return true;
}

// Absent, which only a view without memory and dimensions is, or `size` elements.
inline bool is_vector(const View &view, int64_t size) {
    return view.dimensions == 1 ? view.columns == size : view.dimensions == 0 && view.data == nullptr;
}

// Whether shapes and dtypes of the factors and of the output are those of a linear of x, so that a kernel stays inside
// the tensors.
inline bool agree(const View &x, const View &U, const View &s, const View &Vh, const View &bias, const View &order,
                  const View &y) {
    const int64_t outputs = order.data ? U.rows + U.columns : U.rows;
    return U.dimensions == 2 && Vh.dimensions == 2 && U.columns == Vh.rows && Vh.columns == x.columns &&
           (U.rows > 0 || order.data) && U.columns > 0 && x.columns > 0 && is_vector(s, U.columns) &&
           is_vector(bias, outputs) && is_vector(order, outputs) &&
           (!order.data || (order.dtype == INDEX && !s.data)) && x.dtype >= 0 && U.dtype == x.dtype &&
           Vh.dtype == x.dtype && (!s.data || s.dtype == GRASP_F32 || s.dtype == x.dtype) &&
           (!bias.data || bias.dtype == x.dtype) && y.dtype == x.dtype && y.rows == x.rows && y.columns == outputs;
}

inline grasp_factors to_factors(const View &U, const View &s, const View &Vh, const View &bias, const View &order,
                                const View &y) {
    return {U.data,    Vh.data,  s.data,    bias.data, y.data,  U.stride,
            Vh.stride, y.stride, y.columns, U.columns, s.dtype, reinterpret_cast<const int32_t *>(order.data)};
}

}  // namespace grasp_bindings
