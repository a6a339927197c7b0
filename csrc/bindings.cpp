// grasp_kernels._cpu: takes tensors, returns a status or tensors.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <exception>
#include <vector>

#include "direct.h"
#include "lowrank.h"
#include "views.h"

namespace py = pybind11;

namespace {

using namespace grasp_bindings;

// The parallel function of PyTorch's own OpenMP runtime, or null. PyTorch's threads spin for milliseconds after each
// parallel region, so threads of our own would compete with them for the same cores.
grasp_parallel find_parallel() { return reinterpret_cast<grasp_parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

// --- run: any call, with any instruction set -------------------------------------------------------------------------

// Thrown for a tensor that a kernel cannot read in place; the caller copies it.
struct NotInPlace {};

// A vector or a matrix. Rows must be contiguous and must not overlap, unless `may_overlap`.
View view(PyObject *object, bool may_overlap = false, bool may_be_quantised = false) {
    View result;
    if (!read(object, result)) throw py::error_already_set();
    if (!result.on_cpu || result.dimensions < 1 || result.dimensions > 2) {
        throw py::type_error("a tensor must be a vector or a matrix on the CPU");
    }
    if (result.dtype < 0 && !(may_be_quantised && bits_of(result))) {
        throw py::type_error("a tensor must be float32, float16 or bfloat16, or int8 or uint8 for quantised factors");
    }
    if (!result.is_matrix || (!may_overlap && result.overlaps())) throw NotInPlace();
    return result;
}

View optional_view(PyObject *object) { return object == Py_None ? View() : view(object); }

View order_view(PyObject *object) {
    View result;
    if (object == Py_None) return result;
    if (!read(object, result)) throw py::error_already_set();
    if (!result.on_cpu || result.dimensions != 1) throw py::type_error("an order must be a vector on the CPU");
    if (!result.is_matrix) throw NotInPlace();
    return result;
}

View scales_view(PyObject *object) {
    const View result = optional_view(object);
    if (!result.is_dense()) throw NotInPlace();
    return result;
}

GroupViews to_views(PyObject *item, PyObject *y) {
    if (!PyTuple_Check(item) || PyTuple_GET_SIZE(item) != Direct::FIELDS) {
        throw py::type_error("a group is a tuple of 7");
    }
    const Direct::Group group = &PyTuple_GET_ITEM(item, 0);
    const GroupViews views = {
        view(group[0], false, true), optional_view(group[1]), view(group[2], false, true), optional_view(group[3]),
        order_view(group[4]),        scales_view(group[5]),   scales_view(group[6]),       view(y)};
    if (!views.scales_agree()) throw NotInPlace();
    return views;
}

// With an activation (a grasp_activation; negative for none) the groups are the gate and the up projection of one
// output. Returns false, and does nothing, if a tensor cannot be read in place.
bool run(const py::handle &x_tensor, const py::tuple &groups, const py::tuple &outputs, int32_t activation,
         int32_t threads, int32_t isa) {
    static const grasp_parallel parallel = find_parallel();
    const bool gated = activation >= 0;
    if (gated ? groups.size() != 2 || outputs.size() != 1 : groups.size() != outputs.size()) {
        throw py::value_error("an output for each group, or two groups and one output with an activation");
    }
    std::vector<grasp_factors> factors(groups.size());
    grasp_input input;
    try {
        const View x = view(x_tensor.ptr(), true);
        input = {x.data, x.stride, x.rows, x.columns, x.dtype};
        for (size_t i = 0; i < factors.size(); ++i) {
            const GroupViews group =
                to_views(PyTuple_GET_ITEM(groups.ptr(), i), PyTuple_GET_ITEM(outputs.ptr(), gated ? 0 : i));
            if (!agree(x, group)) {
                throw py::value_error("shapes or dtypes of x, the factors and the output do not agree");
            }
            factors[i] = to_factors(x, group);
        }
    } catch (NotInPlace) {
        return false;
    }
    const grasp_cpu_options options = {isa, threads, parallel};
    grasp_status status;
    {
        py::gil_scoped_release release;
        status = gated
                     ? grasp_cpu_lowrank_glu(&input, &factors[0], &factors[1], activation, &options)
                     : grasp_cpu_lowrank_linear(&input, factors.data(), static_cast<int64_t>(factors.size()), &options);
    }
    check(status);
    return true;
}

// --- the direct path; None for a call that is declined ---------------------------------------------------------------

const Direct *direct = nullptr;  // never freed: it holds Python objects and could outlive the interpreter

void set_up(const py::tuple &types, const py::object &quiet, const py::object &forward_ad, const py::object &is_neg,
            const py::object &is_grad_enabled, const py::object &get_num_threads, const py::tuple &auto_rows) {
    find_tensor_type(types[0]);
    Surroundings around = {types,           quiet,           forward_ad, is_neg, types[0].attr("new_empty"),
                           is_grad_enabled, get_num_threads, {}};
    for (size_t i = 0; i < around.auto_rows.size(); ++i) around.auto_rows[i] = auto_rows[i].cast<int64_t>();
    direct = new Direct(std::move(around), find_parallel());
}

// Calls the function in Python's own calling convention; pybind11's reads more memory.
template <class Function>
PyObject *guarded(Function &&function) {
    try {
        return function();
    } catch (py::error_already_set &error) {
        error.restore();
    } catch (const py::builtin_exception &error) {
        error.set_error();
    } catch (const std::bad_alloc &) {
        PyErr_NoMemory();
    } catch (const std::exception &error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

// (x, U, s, Vh, bias, order, U_scales, Vh_scales, backend) → tensor
PyObject *lowrank_linear(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
    return guarded([&]() -> PyObject * {
        const Direct::Group group = arguments + 1;
        py::object output;
        if (!direct || count != 2 + Direct::FIELDS ||
            !direct->run(arguments[0], &group, 1, arguments[1 + Direct::FIELDS], &output)) {
            Py_RETURN_NONE;
        }
        return output.release().ptr();
    });
}

// (x, a list or tuple of groups, backend) → tuple of tensors
PyObject *lowrank_linear_grouped(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
    return guarded([&]() -> PyObject * {
        if (!direct || count != 3) Py_RETURN_NONE;
        if (!PyList_Check(arguments[1]) && !PyTuple_Check(arguments[1])) Py_RETURN_NONE;
        const auto items = py::reinterpret_steal<py::tuple>(PySequence_Tuple(arguments[1]));  // a list can change
        if (!items) throw py::error_already_set();
        const Py_ssize_t size = PyTuple_GET_SIZE(items.ptr());
        if (size > Direct::MOST_GROUPS) Py_RETURN_NONE;
        Direct::Group groups[Direct::MOST_GROUPS];
        for (Py_ssize_t i = 0; i < size; ++i) {
            PyObject *item = PyTuple_GET_ITEM(items.ptr(), i);
            if (!PyTuple_Check(item) || PyTuple_GET_SIZE(item) != Direct::FIELDS) Py_RETURN_NONE;
            groups[i] = &PyTuple_GET_ITEM(item, 0);
        }
        py::object outputs[Direct::MOST_GROUPS];
        if (!direct->run(arguments[0], groups, size, arguments[2], outputs)) Py_RETURN_NONE;
        py::tuple result(size);
        for (Py_ssize_t i = 0; i < size; ++i) PyTuple_SET_ITEM(result.ptr(), i, outputs[i].release().ptr());
        return result.release().ptr();
    });
}

// Casts to the one function type in which Python stores all calling conventions.
PyCFunction stored(PyObject *(*function)(PyObject *, PyObject *const *, Py_ssize_t)) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef METHODS[] = {
    {"lowrank_linear", stored(lowrank_linear), METH_FASTCALL, nullptr},
    {"lowrank_linear_grouped", stored(lowrank_linear_grouped), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "Low-rank linears on the CPU; see csrc/lowrank.h.";
    module.def("run", &run);
    module.def("supports", &grasp_cpu_supports);
    module.def("has_threads", [] { return find_parallel() != nullptr; });
    module.def("set_up", &set_up);
    if (PyModule_AddFunctions(module.ptr(), METHODS) != 0) throw py::error_already_set();
}
