// Python tensors in the form that the kernels take.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "dlpack.h"
#include "lowrank.h"

namespace grasp_bindings {

// Of no grasp_dtype: int32 of an order, int8 and uint8 of quantised matrices; two values of 4 bits are in a uint8.
constexpr int32_t NO_DTYPE = -1, INDEX = -2, INT8 = -3, INT4_PAIR = -4;

// A tensor as a matrix: all leading dimensions together are its rows.
struct View {
    char *data = nullptr;
    int64_t rows = 1, columns = 0, stride = 0;
    int32_t dtype = GRASP_F32, dimensions = 0;
    const int64_t *shape = nullptr;
    bool on_cpu = true, is_matrix = true;  // false: rows without a common stride, or not contiguous

    bool overlaps() const { return rows > 1 && stride < columns; }
    bool is_dense() const { return rows <= 1 || stride == columns; }
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
    if (dtype.code == dlpack::INT && dtype.bits == 32) return INDEX;
    if (dtype.code == dlpack::INT && dtype.bits == 8) return INT8;
    return dtype.code == dlpack::UINT && dtype.bits == 8 ? INT4_PAIR : NO_DTYPE;
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
    view.is_matrix = view.is_matrix || view.rows * view.columns == 0;  // whatever the strides are
    return true;
}

// Absent, which only a view without memory and dimensions is, or `size` elements that have memory.
inline bool is_vector(const View &view, int64_t size) {
    return view.dimensions == 1 ? view.columns == size && view.data : view.dimensions == 0 && !view.data;
}

// The tensors of a group and its output. A view without memory and dimensions stands for None.
struct GroupViews {
    View U, s, Vh, bias, order, U_scales, Vh_scales, y;

    int64_t rank() const { return Vh.rows; }
    int64_t outputs() const { return order.data ? U.rows + Vh.rows : U.rows; }
    bool scales_agree() const { return !U_scales.data || !Vh_scales.data || U_scales.dtype == Vh_scales.dtype; }
};

inline int32_t bits_of(const View &matrix) { return matrix.dtype == INT8 ? 8 : matrix.dtype == INT4_PAIR ? 4 : 0; }

// Columns per scale of a quantised matrix; 0: one scale for each row; -1: the scales do not fit.
inline int32_t group_of(const View &scales, int64_t depth) {
    if (scales.columns == 1) return 0;
    for (const int32_t group : {32, 64, 128}) {
        if (scales.columns == (depth + group - 1) / group) return group;
    }
    return -1;
}

// Whether this is a matrix of x's dtype without scales, or a quantised one whose scales fit.
inline bool fits(const View &matrix, const View &scales, int64_t depth, const View &x) {
    const int32_t bits = bits_of(matrix);
    if (matrix.dimensions != 2 || matrix.columns != (bits == 4 ? (depth + 1) / 2 : depth)) return false;
    if (bits == 0) return matrix.dtype == x.dtype && scales.dimensions == 0;
    return scales.dimensions == 2 && scales.rows == matrix.rows && group_of(scales, depth) >= 0 &&
           (scales.dtype == GRASP_F32 || scales.dtype == x.dtype);
}

// Whether shapes and dtypes of the factors and of the output are those of a linear of x, so that a kernel stays inside
// the tensors.
inline bool agree(const View &x, const GroupViews &group) {
    const auto &[U, s, Vh, bias, order, U_scales, Vh_scales, y] = group;
    const int64_t outputs = group.outputs(), R = group.rank();
    return fits(Vh, Vh_scales, x.columns, x) && fits(U, U_scales, R, x) && (U.rows > 0 || order.data) && R > 0 &&
           x.columns > 0 && is_vector(s, R) && is_vector(bias, outputs) && is_vector(order, outputs) &&
           group.scales_agree() && (!(order.data || bits_of(U) || bits_of(Vh)) || !s.data) &&
           (!order.data || order.dtype == INDEX) && x.dtype >= 0 &&
           (!s.data || s.dtype == GRASP_F32 || s.dtype == x.dtype) && (!bias.data || bias.dtype == x.dtype) &&
           y.dtype == x.dtype && y.rows == x.rows && y.columns == outputs;
}

inline grasp_factors to_factors(const View &x, const GroupViews &group) {
    grasp_factors factors = {};
    factors.U = group.U.data;
    factors.Vh = group.Vh.data;
    factors.s = group.s.data;
    factors.bias = group.bias.data;
    factors.y = group.y.data;
    factors.U_stride = group.U.stride;
    factors.Vh_stride = group.Vh.stride;
    factors.y_stride = group.y.stride;
    factors.N = group.outputs();
    factors.R = group.rank();
    factors.s_dtype = group.s.dtype;
    factors.order = reinterpret_cast<const int32_t *>(group.order.data);
    factors.U_scales = group.U_scales.data;
    factors.Vh_scales = group.Vh_scales.data;
    factors.scales_dtype = group.U_scales.data ? group.U_scales.dtype : group.Vh_scales.dtype;
    factors.U_bits = bits_of(group.U);
    factors.Vh_bits = bits_of(group.Vh);
    factors.U_group = factors.U_bits ? group_of(group.U_scales, factors.R) : 0;
    factors.Vh_group = factors.Vh_bits ? group_of(group.Vh_scales, x.columns) : 0;
    return factors;
}

}  // namespace grasp_bindings
