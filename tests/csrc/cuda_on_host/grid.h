// A launch on the emulated device, between runtime.cpp, which takes it, and emulator.cpp, which runs it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda/kernels.cuh"

namespace emulator {

struct Settings {
    int capability = 90, processors = 3, occupancy = 2;
    unsigned seed = 0;
    std::string failing;  // name of the CUDA function that fails
    int error = 0;
};

// Rows that a kernel may touch.
struct Region {
    const char *begin;
    int64_t rows, stride, width;  // bytes
    bool writable;
};

struct Grid {
    void (*kernel)(grasp_cuda::Problem);
    grasp_cuda::Problem problem;
    int blocks, threads;
    bool cooperative, dependent;
    std::vector<Region> regions;
    uint32_t released = 0;  // what it depends on has ended
};

extern Settings settings;
extern std::string fault;  // the first one

// Run a grid in waves of as many blocks as the device holds; what it depends on, if anything, has not yet begun.
void run(Grid &grid, std::unique_ptr<Grid> dependency);

}  // namespace emulator
