// The direct path from Python to the kernels. It runs a call at once if the kernels can read its tensors in place and
// if no other part of PyTorch must see it. It declines every other call. ops.py then runs that call with the registered
// op, which defines results and errors.
//
// Tensors are read after the last call into Python, and again after the outputs are made, which lets other threads run.
// The caller holds references to all tensors. As with PyTorch's own ops, no other thread may replace or resize a
// tensor's memory (`set_`, `resize_`, `.data =`) while a kernel runs.
//
// Weights that stream through a cache evict everything of Python from it. So it matters more that a call touches little
// memory than that it takes few instructions.
#pragma once

#include <array>
#include <new>
#include <stdexcept>

#include "views.h"

namespace grasp_bindings {

inline void check(grasp_status status) {
    if (status == GRASP_OK) return;
    if (status == GRASP_OUT_OF_MEMORY) throw std::bad_alloc();
    if (status == GRASP_UNSUPPORTED) throw std::runtime_error("this processor or this build lacks the instruction set");
    throw pybind11::value_error("a size, stride, pointer, code or order is not valid; see csrc/lowrank.h");
}

inline bool is_text(PyObject *object, const char *text) {
    return PyUnicode_Check(object) && PyUnicode_CompareWithASCIIString(object, text) == 0;
}

// PyTorch's functions, and the limits of the dispatch table; cpu.py hands them over once.
struct Surroundings {
    pybind11::tuple types;      // exact types of tensors without behaviour of their own; torch.Tensor is the first
    pybind11::tuple quiet;      // functions without arguments; a true result means that a mode or a tracer is active
    pybind11::dict forward_ad;  // the globals of torch.autograd.forward_ad
    pybind11::object is_neg, new_empty, is_grad_enabled, get_num_threads;
    std::array<int64_t, 3> auto_rows;  // most rows of x for "auto", by grasp_dtype
};

class Direct {
  public:
    static constexpr Py_ssize_t MOST_GROUPS = 8;  // as in dispatch.py

    static constexpr Py_ssize_t FIELDS = 7;
    using Group = PyObject *const *;  // U, s, Vh, bias, order, U_scales, Vh_scales

    Direct(Surroundings around, grasp_parallel parallel) : around_(std::move(around)), parallel_(parallel) {}

    // One output per group, as new references. False if the call is declined.
    bool run(PyObject *x, const Group *groups, Py_ssize_t count, PyObject *backend, pybind11::object *outputs) const {
        View x_view;
        if (count < 1 || count > MOST_GROUPS || !has_plain_type(x) || !read(x, x_view) || !x_view.on_cpu ||
            !x_view.is_matrix) {
            return decline();  // first, because every call on a GPU comes here
        }
        if (!is_quiet()) return decline();
        const bool recording = !is_no(PyObject_CallNoArgs(around_.is_grad_enabled.ptr()));
        if (!is_plain(x, recording)) return decline();
        for (Py_ssize_t i = 0; i < count; ++i) {
            for (int j = 0; j < FIELDS; ++j) {
                const bool optional = j == 1 || j > 2;
                if (!(groups[i][j] == Py_None && optional) && !is_plain(groups[i][j], recording)) return decline();
            }
        }
        const int32_t threads = count_threads();
        if (!make_outputs(x, groups, count, backend, outputs)) return decline();
        x_view = View();
        if (!read_in_place(x, x_view)) return decline();
        grasp_factors factors[MOST_GROUPS];
        for (Py_ssize_t i = 0; i < count; ++i) {
            if (!read_group(groups[i], x_view, outputs[i].ptr(), factors[i])) return decline();
        }
        const grasp_status status =
            compute({x_view.data, x_view.stride, x_view.rows, x_view.columns, x_view.dtype}, factors, count, threads);
        if (status == GRASP_BAD_ARGUMENT) return decline();  // an order that is no permutation; ops.py says so
        check(status);
        return true;
    }

  private:
    static bool decline() {
        PyErr_Clear();
        return false;
    }

    static bool is_no(PyObject *answer) {
        const bool no = answer && (answer == Py_None || PyObject_IsTrue(answer) == 0);
        Py_XDECREF(answer);
        return no;
    }

    bool is_quiet() const {
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(around_.quiet.ptr()); ++i) {
            if (!is_no(PyObject_CallNoArgs(PyTuple_GET_ITEM(around_.quiet.ptr(), i)))) return false;
        }
        static PyObject *const name = PyUnicode_InternFromString("_current_level");
        PyObject *level = PyDict_GetItem(around_.forward_ad.ptr(), name);
        return level && PyLong_CheckExact(level) && PyLong_AsLong(level) < 0;
    }

    bool has_plain_type(PyObject *tensor) const {
        PyObject *type = reinterpret_cast<PyObject *>(Py_TYPE(tensor));
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(around_.types.ptr()); ++i) {
            if (PyTuple_GET_ITEM(around_.types.ptr(), i) == type) return true;
        }
        return false;
    }

    bool is_plain(PyObject *tensor, bool recording) const {
        if (!has_plain_type(tensor) || !is_no(PyObject_CallOneArg(around_.is_neg.ptr(), tensor))) return false;
        static PyObject *const name = PyUnicode_InternFromString("requires_grad");
        return !recording || is_no(PyObject_GetAttr(tensor, name));
    }

    static bool read_in_place(PyObject *tensor, View &view) {
        return tensor == Py_None || (read(tensor, view) && view.on_cpu && view.is_matrix);
    }

    // Whether the factors and the output agree with x and the kernel can use them in place.
    static bool read_group(Group group, const View &x, PyObject *output, grasp_factors &factors) {
        GroupViews views;
        auto &[U, s, Vh, bias, order, U_scales, Vh_scales, y] = views;
        if (!read_in_place(group[0], U) || !read_in_place(group[1], s) || !read_in_place(group[2], Vh) ||
            !read_in_place(group[3], bias) || !read_in_place(group[4], order) || !read_in_place(group[5], U_scales) ||
            !read_in_place(group[6], Vh_scales) || !read_in_place(output, y) || !agree(x, views)) {
            return false;
        }
        factors = to_factors(x, views);
        return !U.overlaps() && !Vh.overlaps() && !y.overlaps() && U_scales.is_dense() && Vh_scales.is_dense();
    }

    // As the dispatch table decides: "auto" uses this backend for few rows.
    bool serves(PyObject *backend, const View &x) const {
        if (x.dtype < 0 || x.dimensions < 1 || x.dimensions > MOST_DIMENSIONS) return false;
        return is_text(backend, "auto") ? x.rows <= around_.auto_rows[x.dtype] : is_text(backend, "cpu");
    }

    // Not initialized; the leading dimensions of x and the width of each U. False, without all outputs, on failure.
    bool make_outputs(PyObject *x, const Group *groups, Py_ssize_t count, PyObject *backend,
                      pybind11::object *outputs) const {
        View x_view;
        if (!read_in_place(x, x_view) || !serves(backend, x_view)) return false;
        pybind11::object sizes[MOST_DIMENSIONS];
        PyObject *arguments[1 + MOST_DIMENSIONS] = {x};
        const int last = x_view.dimensions - 1;
        for (int i = 0; i < last; ++i) {
            sizes[i] = pybind11::int_(x_view.shape[i]);
            arguments[1 + i] = sizes[i].ptr();
        }
        for (Py_ssize_t i = 0; i < count; ++i) {
            View U, Vh;
            if (!read(groups[i][0], U) || U.dimensions != 2 || !read(groups[i][2], Vh)) return false;
            sizes[last] = pybind11::int_(groups[i][4] == Py_None ? U.rows : U.rows + Vh.rows);
            arguments[1 + last] = sizes[last].ptr();
            outputs[i] = pybind11::reinterpret_steal<pybind11::object>(
                PyObject_Vectorcall(around_.new_empty.ptr(), arguments, 2 + last, nullptr));
            if (!outputs[i]) return false;
        }
        return true;
    }

    int32_t count_threads() const {
        const pybind11::object answer =
            pybind11::reinterpret_steal<pybind11::object>(PyObject_CallNoArgs(around_.get_num_threads.ptr()));
        if (!answer) throw pybind11::error_already_set();
        return static_cast<int32_t>(PyLong_AsLong(answer.ptr()));
    }

    grasp_status compute(const grasp_input &x, const grasp_factors *factors, int64_t count, int32_t threads) const {
        const grasp_cpu_options options = {GRASP_ISA_AUTO, threads, parallel_};
        PyThreadState *state = PyEval_SaveThread();
        const grasp_status status = grasp_cpu_lowrank_linear(&x, factors, count, &options);
        PyEval_RestoreThread(state);
        return status;
    }

    static constexpr int MOST_DIMENSIONS = 8;  // as in dispatch.py

    const Surroundings around_;
    const grasp_parallel parallel_;
};

}  // namespace grasp_bindings
