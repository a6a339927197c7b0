// grasp_kernels._cpu: tensors in, status out. Dtypes and shapes were checked on the Python side.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <vector>

#include "dlpack.h"
#include "lowrank.h"

namespace py = pybind11;

namespace {

// PyTorch's own OpenMP runtime, if its threads can be borrowed: a second set of threads beside those, which spin for
// milliseconds after each of PyTorch's parallel regions, would have to compete with them for the same cores.
grasp_parallel find_parallel() { return reinterpret_cast<grasp_parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

const dlpack::ExchangeApi &find_api(PyObject *tensor) {
    const py::object capsule = py::type::of(tensor).attr(dlpack::ATTRIBUTE);
    const void *api = PyCapsule_GetPointer(capsule.ptr(), dlpack::CAPSULE);
    if (api == nullptr) throw py::error_already_set();
    const auto *found = static_cast<const dlpack::ExchangeApi *>(api);
    if (found->version.major != 1 || found->from_object == nullptr) throw std::runtime_error("expected DLPack 1");
    return *found;
}

struct View {
    char *data = nullptr;
    int64_t rows = 1, columns = 0, stride = 0;
    int32_t dtype = GRASP_F32;
};

// What a kernel cannot read in place: the caller copies it.
struct NotInPlace {};

int32_t to_dtype(dlpack::DataType dtype) {
    if (dtype.code == dlpack::BFLOAT && dtype.bits == 16) return GRASP_BF16;
    if (dtype.code == dlpack::FLOAT && dtype.bits == 16) return GRASP_F16;
    if (dtype.code == dlpack::FLOAT && dtype.bits == 32) return GRASP_F32;
    throw py::type_error("a tensor must be float32, float16 or bfloat16");
}

// A vector or a matrix. The elements of a row must be neighbours; rows must not overlap, unless `may_overlap`.
View view(PyObject *object, bool may_overlap = false) {
    static const dlpack::ExchangeApi &api = find_api(object);
    dlpack::Tensor tensor;
    if (api.from_object(object, &tensor) != 0) throw py::error_already_set();
    if (tensor.device.type != dlpack::CPU || tensor.ndim < 1 || tensor.ndim > 2) {
        throw py::type_error("a tensor must be a vector or a matrix on the CPU");
    }
    const int last = tensor.ndim - 1;
    View result;
    result.data = static_cast<char *>(tensor.data) + tensor.byte_offset;
    result.columns = tensor.shape[last];
    result.dtype = to_dtype(tensor.dtype);
    if (result.columns > 1 && tensor.strides[last] != 1) throw NotInPlace();
    if (last == 1) {
        result.rows = tensor.shape[0];
        result.stride = tensor.strides[0];
        if (!may_overlap && result.rows > 1 && result.stride < result.columns) throw NotInPlace();
    }
    return result;
}

View optional_view(PyObject *object) { return object == Py_None ? View() : view(object); }

// (U, s, Vh, bias)
grasp_factors to_factors(const py::handle &item, const View &y) {
    PyObject *group = item.ptr();
    if (!PyTuple_Check(group) || PyTuple_GET_SIZE(group) != 4) throw py::type_error("a group is a tuple of 4");
    const View U = view(PyTuple_GET_ITEM(group, 0)), Vh = view(PyTuple_GET_ITEM(group, 2));
    const View s = optional_view(PyTuple_GET_ITEM(group, 1)), bias = optional_view(PyTuple_GET_ITEM(group, 3));
    return {U.data, Vh.data, s.data, bias.data, y.data, U.stride, Vh.stride, y.stride, U.rows, U.columns, s.dtype};
}

void check(grasp_status status) {
    if (status == GRASP_OK) return;
    if (status == GRASP_OUT_OF_MEMORY) throw std::bad_alloc();
    if (status == GRASP_UNSUPPORTED) throw std::runtime_error("this processor or this build lacks the instruction set");
    throw py::value_error("a size, stride, pointer or code is not valid; see csrc/lowrank.h");
}

// With an activation (a grasp_activation; else negative) the groups are the gate and the up projection of one output.
// False, and nothing done, where a tensor cannot be read in place.
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
            factors[i] =
                to_factors(PyTuple_GET_ITEM(groups.ptr(), i), view(PyTuple_GET_ITEM(outputs.ptr(), gated ? 0 : i)));
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

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "Low-rank linears on the CPU; see csrc/lowrank.h.";
    module.def("run", &run);
    module.def("supports", &grasp_cpu_supports);
    module.def("has_threads", [] { return find_parallel() != nullptr; });
}
