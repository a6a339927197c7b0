// grasp_kernels._cpu: integers in, status out. What the pointers mean is checked by the Python side.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <vector>

#include "groups.h"
#include "lowrank.h"

namespace py = pybind11;

namespace {

// PyTorch's own OpenMP runtime, if its threads can be borrowed: a second set of threads beside those, which spin for
// milliseconds after each of PyTorch's parallel regions, would have to compete with them for the same cores.
grasp_parallel find_parallel() { return reinterpret_cast<grasp_parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

void check(grasp_status status) {
    if (status == GRASP_OK) return;
    if (status == GRASP_OUT_OF_MEMORY) throw std::bad_alloc();
    if (status == GRASP_UNSUPPORTED) throw std::runtime_error("this processor or this build lacks the instruction set");
    throw py::value_error("a size, stride, pointer or code is not valid; see csrc/lowrank.h");
}

// activation is a grasp_activation and `groups` the gate and the up projection, or it is negative.
void run(uintptr_t data, int64_t stride, int64_t M, int64_t K, int32_t dtype, const py::tuple &groups,
         int32_t activation, int32_t threads, int32_t isa) {
    static const grasp_parallel parallel = find_parallel();
    const grasp_input x = {reinterpret_cast<const void *>(data), stride, M, K, dtype};
    const grasp_cpu_options options = {isa, threads, parallel};
    const std::vector<grasp_factors> factors = grasp_bindings::to_groups(groups);
    if (activation >= 0 && factors.size() != 2) throw py::value_error("a gated linear unit has two groups");
    grasp_status status;
    {
        py::gil_scoped_release release;
        status = activation < 0
                     ? grasp_cpu_lowrank_linear(&x, factors.data(), static_cast<int64_t>(factors.size()), &options)
                     : grasp_cpu_lowrank_glu(&x, &factors[0], &factors[1], activation, &options);
    }
    check(status);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "Low-rank linears on the CPU; see csrc/lowrank.h.";
    module.def("run", &run);
    module.def("supports", &grasp_cpu_supports);
    module.def("has_threads", [] { return find_parallel() != nullptr; });
}
