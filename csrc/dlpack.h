// The part of DLPack 1's C exchange interface that reads tensors: the Python tensor's address, shape and strides in one
// call, from any framework whose tensor type has `__dlpack_c_exchange_api__`. Layouts: github.com/dmlc/dlpack.
#pragma once

#include <cstdint>

namespace dlpack {

struct Device {
    int32_t type, index;
};

struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};

constexpr int32_t CPU = 1;                                   // Device::type
constexpr uint8_t INT = 0, UINT = 1, FLOAT = 2, BFLOAT = 4;  // DataType::code
constexpr const char *ATTRIBUTE = "__dlpack_c_exchange_api__";
constexpr const char *CAPSULE = "dlpack_exchange_api";

// A view. The framework's tensor owns the memory and must stay alive and unchanged while the view is used.
struct Tensor {
    void *data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t *shape, *strides;  // strides in elements
    uint64_t byte_offset;
};

struct ExchangeApi {
    struct {
        uint32_t major, minor;
    } version;
    void *previous;
    void *allocate, *managed_from_object, *managed_to_object;  // not used here
    int (*from_object)(void *object, Tensor *tensor);          // 0, or -1 with a Python exception set
    void *current_stream;
};

}  // namespace dlpack
