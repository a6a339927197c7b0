// The CPU kernels against double precision, through the C interface: every instruction set, dtype and kind of call, odd
// sizes, rows with gaps, memory that ends where the last element does, concurrent callers. Built with the address and
// undefined behaviour sanitizers, or with the thread sanitizer; instructions that those do not see run into pages that
// cannot be read.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "lowrank.h"

namespace {

std::mt19937 generator(0);

double element_value(const void *p, int dtype) {
    if (dtype == GRASP_F32) {
        float value;
        std::memcpy(&value, p, 4);
        return value;
    }
    uint16_t half;
    std::memcpy(&half, p, 2);
    if (dtype == GRASP_BF16) {
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const double magnitude = exponent == 0    ? std::ldexp(fraction, -24)
                             : exponent == 31 ? (fraction ? NAN : INFINITY)
                                              : std::ldexp(1024 + fraction, exponent - 25);
    return half & 0x8000 ? -magnitude : magnitude;
}

constexpr int BYTES = -1;  // no grasp_dtype: a quantised matrix

int64_t size_of(int dtype) { return dtype == BYTES ? 1 : dtype == GRASP_F32 ? 4 : 2; }

// An element between 2^-exponent and half of that, of either sign.
uint32_t random_bits(int dtype, int exponent) {
    const uint32_t random = generator();
    if (dtype == BYTES) return random & 0xff;
    if (dtype == GRASP_F32) return (random & 0x807fffff) | (126 - exponent) << 23;
    return dtype == GRASP_BF16 ? (random & 0x807f) | (126 - exponent) << 7 : (random & 0x83ff) | (14 - exponent) << 10;
}

// A matrix whose last element is followed by memory that cannot be read, and whose rows have NaN between them.
class Matrix {
  public:
    Matrix(int64_t rows, int64_t columns, int64_t stride, int dtype, int exponent = 0)
        : columns(columns), stride(stride), dtype(dtype), size_(size_of(dtype)) {
        const int64_t page = sysconf(_SC_PAGESIZE), bytes = rows ? ((rows - 1) * stride + columns) * size_ : 0;
        length_ = (bytes + page - 1) / page * page + page;
        base_ = static_cast<char *>(mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED || mprotect(base_ + length_ - page, page, PROT_NONE) != 0) std::abort();
        data = base_ + length_ - page - bytes;
        std::memset(data, 0xff, bytes);
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t column = 0; column < columns; ++column) {
                const uint32_t bits = random_bits(dtype, exponent);
                std::memcpy(data + (row * stride + column) * size_, &bits, size_);
            }
        }
    }
    Matrix(const Matrix &) = delete;
    ~Matrix() { munmap(base_, length_); }

    double operator()(int64_t row, int64_t column) const {
        return element_value(data + (row * stride + column) * size_, dtype);
    }

    char *data;
    const int64_t columns, stride;
    const int dtype;

  private:
    const int64_t size_;
    int64_t length_;
    char *base_;
};

void run_on_threads(void (*body)(void *), void *context, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i) others.emplace_back(body, context);
    body(context);
    for (std::thread &other : others) other.join();
}

// Such that a sum of `terms` products stays near 1.
int half_log(int64_t terms) { return static_cast<int>(std::log2(static_cast<double>(terms)) / 2); }

struct Layer {
    Matrix U, Vh, s, bias, y;
    bool has_s, has_bias;

    Layer(int64_t M, int64_t N, int64_t K, int64_t R, int dtype, int64_t gap, bool has_s, bool has_bias)
        : U(N, R, R + gap, dtype, half_log(R)),
          Vh(R, K, K + gap, dtype, half_log(K)),
          s(1, R, R, has_bias ? GRASP_F32 : dtype),
          bias(1, N, N, dtype),
          y(M, N, N + gap, dtype),
          has_s(has_s),
          has_bias(has_bias) {}

    grasp_factors factors() {
        return {U.data,
                Vh.data,
                has_s ? s.data : nullptr,
                has_bias ? bias.data : nullptr,
                y.data,
                U.stride,
                Vh.stride,
                y.stride,
                bias.columns,
                s.columns,
                s.dtype,
                nullptr,
                nullptr,
                nullptr,
                0,
                0,
                0,
                0,
                0};
    }

    std::vector<double> exact(const Matrix &x, int64_t M) const {
        std::vector<double> result(M * bias.columns);
        for (int64_t m = 0; m < M; ++m) {
            std::vector<double> h(s.columns);
            for (int64_t r = 0; r < s.columns; ++r) {
                for (int64_t k = 0; k < x.columns; ++k) h[r] += x(m, k) * Vh(r, k);
                if (has_s) h[r] *= s(0, r);
            }
            for (int64_t n = 0; n < bias.columns; ++n) {
                double sum = has_bias ? bias(0, n) : 0;
                for (int64_t r = 0; r < s.columns; ++r) sum += h[r] * U(n, r);
                result[m * bias.columns + n] = sum;
            }
        }
        return result;
    }
};

constexpr double TOLERANCE[] = {2e-6, 1e-3, 8e-3};  // by grasp_dtype

bool close(const Matrix &y, const std::vector<double> &exact, int64_t M, const char *what) {
    double error = 0, norm = 0;
    for (int64_t m = 0; m < M; ++m) {
        for (int64_t n = 0; n < y.columns; ++n) {
            const double expected = exact[m * y.columns + n], difference = y(m, n) - expected;
            error += difference * difference;
            norm += expected * expected;
        }
    }
    const bool good = std::sqrt(error) <= TOLERANCE[y.dtype] * std::sqrt(norm);  // false for NaN
    if (!good) std::printf("%s: error %g of %g\n", what, std::sqrt(error), std::sqrt(norm));
    return good;
}

double silu(double x) { return x / (1 + std::exp(-x)); }
double gelu(double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2)); }
double gelu_tanh(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }
double relu(double x) { return x > 0 ? x : 0; }

struct Shape {
    int64_t M, N, K, R, gap;
    int threads;
};

constexpr Shape SHAPES[] = {
    {1, 16, 64, 8, 0, 1},   {1, 33, 127, 5, 3, 2},  {2, 7, 1, 1, 0, 1},       {3, 63, 31, 17, 1, 1},
    {4, 70, 65, 33, 0, 2},  {5, 17, 300, 9, 2, 1},  {8, 40, 100, 50, 0, 2},   {9, 25, 33, 7, 1, 1},
    {16, 80, 64, 32, 0, 1}, {33, 49, 70, 21, 5, 2}, {48, 20, 290, 3, 0, 1},   {64, 31, 96, 25, 0, 2},
    {70, 9, 40, 4, 1, 1},   {0, 8, 8, 2, 0, 1},     {1, 200, 700, 210, 0, 3}, {17, 90, 300, 290, 0, 2},
};

bool check_linear(const Shape &shape, int isa, int dtype) {
    Matrix x(shape.M, shape.K, shape.K + shape.gap, dtype);
    Layer first(shape.M, shape.N, shape.K, shape.R, dtype, shape.gap, true, true);
    Layer second(shape.M, shape.N + 3, shape.K, shape.R + 2, dtype, 0, shape.gap > 0, false);
    const grasp_input input = {x.data, x.stride, shape.M, shape.K, dtype};
    const grasp_factors groups[] = {first.factors(), second.factors()};
    const grasp_cpu_options options = {isa, shape.threads, shape.threads > 1 ? run_on_threads : nullptr};
    return grasp_cpu_lowrank_linear(&input, groups, 2, &options) == GRASP_OK &&
           close(first.y, first.exact(x, shape.M), shape.M, "first") &&
           close(second.y, second.exact(x, shape.M), shape.M, "second");
}

// U has shape.N rows, so there are shape.N + shape.R outputs.
// Without other rows R is N: a dense linear.
bool check_pivoted(const Shape &shape, int isa, int dtype, bool ascending, bool others = true) {
    const int64_t M = shape.M, R = shape.R, N = shape.N * others + R;
    Matrix x(M, shape.K, shape.K + shape.gap, dtype), U(shape.N, R, R + shape.gap, dtype, half_log(R));
    Matrix Vh(R, shape.K, shape.K, dtype, half_log(shape.K)), bias(1, N, N, dtype), y(M, N, N + shape.gap, dtype);
    std::vector<int32_t> order(N);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), generator);
    if (ascending) {
        std::sort(order.begin(), order.begin() + R);
        std::sort(order.begin() + R, order.end());
    }
    std::vector<double> exact(M * N);
    for (int64_t m = 0; m < M; ++m) {
        std::vector<double> h(N);
        for (int64_t r = 0; r < R; ++r) {
            for (int64_t k = 0; k < shape.K; ++k) h[r] += x(m, k) * Vh(r, k);
        }
        for (int64_t i = 0; i < N; ++i) {
            for (int64_t r = 0; i >= R && r < R; ++r) h[i] += U(i - R, r) * h[r];
            exact[m * N + order[i]] = h[i] + (shape.gap ? bias(0, order[i]) : 0);
        }
    }
    const grasp_input input = {x.data, x.stride, M, shape.K, dtype};
    const grasp_factors group = {others ? U.data : nullptr,
                                 Vh.data,
                                 nullptr,
                                 shape.gap ? bias.data : nullptr,
                                 y.data,
                                 U.stride,
                                 Vh.stride,
                                 y.stride,
                                 N,
                                 R,
                                 0,
                                 order.data(),
                                 nullptr,
                                 nullptr,
                                 0,
                                 0,
                                 0,
                                 0,
                                 0};
    const grasp_cpu_options options = {isa, shape.threads, shape.threads > 1 ? run_on_threads : nullptr};
    return grasp_cpu_lowrank_linear(&input, &group, 1, &options) == GRASP_OK && close(y, exact, M, "pivoted");
}

// A matrix with values of 8 or 4 bits.
struct Quantised {
    Matrix values, scales;
    int bits, group;

    Quantised(int64_t rows, int64_t depth, int bits, int group, int64_t gap, int dtype)
        : values(rows, (depth * bits + 7) / 8, (depth * bits + 7) / 8 + gap, BYTES),
          scales(rows, group ? (depth + group - 1) / group : 1, group ? (depth + group - 1) / group : 1, dtype,
                 half_log(depth) + bits - 2),
          bits(bits),
          group(group) {}

    double operator()(int64_t row, int64_t column) const {
        const uint8_t byte = values.data[row * values.stride + column * bits / 8];
        const int value = bits == 8 ? static_cast<int8_t>(byte) : (byte >> column % 2 * 4 & 15) - 8;
        return value * scales(row, group ? column / group : 0);
    }
};

bool check_quantised(const Shape &shape, int isa, int dtype, int bits, int group) {
    const int64_t M = shape.M, N = shape.N, K = shape.K, R = shape.R;
    Matrix x(M, K, K + shape.gap, dtype), bias(1, N, N, dtype), y(M, N, N, dtype);
    const Quantised U(N, R, bits, group, shape.gap, dtype), Vh(R, K, 12 - bits, group, 0, dtype);
    std::vector<double> exact(M * N);
    for (int64_t m = 0; m < M; ++m) {
        std::vector<double> h(R);
        for (int64_t r = 0; r < R; ++r) {
            for (int64_t k = 0; k < K; ++k) h[r] += x(m, k) * Vh(r, k);
        }
        for (int64_t n = 0; n < N; ++n) {
            for (int64_t r = 0; r < R; ++r) exact[m * N + n] += h[r] * U(n, r);
            exact[m * N + n] += bias(0, n);
        }
    }
    const grasp_input input = {x.data, x.stride, M, K, dtype};
    const grasp_factors factors = {U.values.data,
                                   Vh.values.data,
                                   nullptr,
                                   bias.data,
                                   y.data,
                                   U.values.stride,
                                   Vh.values.stride,
                                   y.stride,
                                   N,
                                   R,
                                   0,
                                   nullptr,
                                   U.scales.data,
                                   Vh.scales.data,
                                   dtype,
                                   U.bits,
                                   Vh.bits,
                                   group,
                                   group};
    const grasp_cpu_options options = {isa, shape.threads, shape.threads > 1 ? run_on_threads : nullptr};
    return grasp_cpu_lowrank_linear(&input, &factors, 1, &options) == GRASP_OK && close(y, exact, M, "quantised");
}

bool check_glu(const Shape &shape, int isa, int dtype, int activation) {
    constexpr double (*FUNCTIONS[])(double) = {silu, gelu, gelu_tanh, relu};
    Matrix x(shape.M, shape.K, shape.K, dtype);
    Layer gate(shape.M, shape.N, shape.K, shape.R, dtype, shape.gap, true, true);
    Layer up(shape.M, shape.N, shape.K, shape.R + 1, dtype, 0, false, false);
    const grasp_input input = {x.data, x.stride, shape.M, shape.K, dtype};
    const grasp_factors both[] = {gate.factors(), up.factors()};
    const grasp_cpu_options options = {isa, shape.threads, shape.threads > 1 ? run_on_threads : nullptr};
    if (grasp_cpu_lowrank_glu(&input, &both[0], &both[1], activation, &options) != GRASP_OK) return false;
    std::vector<double> exact = gate.exact(x, shape.M);
    const std::vector<double> factor = up.exact(x, shape.M);
    for (size_t i = 0; i < exact.size(); ++i) exact[i] = FUNCTIONS[activation](exact[i]) * factor[i];
    return close(gate.y, exact, shape.M, "gated");
}

// Callers on several threads with one x and one set of weights, each with a team of threads and an output of its own.
bool check_concurrent(int dtype) {
    const Shape shape = {2, 200, 700, 210, 0, 3};
    Matrix x(shape.M, shape.K, shape.K, dtype);
    Layer layer(shape.M, shape.N, shape.K, shape.R, dtype, 0, true, true);
    const grasp_input input = {x.data, x.stride, shape.M, shape.K, dtype};
    const grasp_cpu_options options = {GRASP_ISA_AUTO, shape.threads, run_on_threads};
    const std::vector<double> exact = layer.exact(x, shape.M);
    std::atomic<int> failures{0};
    const auto call = [&] {
        std::vector<char> y(shape.M * shape.N * sizeof(float));
        grasp_factors group = layer.factors();
        group.y = y.data();
        for (int i = 0; i < 3; ++i) failures += grasp_cpu_lowrank_linear(&input, &group, 1, &options) != GRASP_OK;
        for (size_t i = 0; i < exact.size(); ++i) {
            const double value = element_value(y.data() + i * (dtype == GRASP_F32 ? 4 : 2), dtype);
            failures += !(std::abs(value - exact[i]) <= 0.1);
        }
    };
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i) callers.emplace_back(call);
    for (std::thread &caller : callers) caller.join();
    return failures == 0;
}

bool check_refusals() {
    Matrix x(1, 8, 8, GRASP_F32);
    Layer layer(1, 4, 8, 2, GRASP_F32, 0, false, false);
    const grasp_input input = {x.data, 8, 1, 8, GRASP_F32};
    const grasp_factors group = layer.factors();
    const grasp_cpu_options options = {GRASP_ISA_AUTO, 1, nullptr};
    grasp_factors no_U = group, short_row = group, no_rank = group;
    no_U.U = nullptr;
    short_row.Vh_stride = 7;
    no_rank.R = 0;
    const int32_t order[] = {3, 1, 2, 0}, negative[] = {3, 1, -1, 0}, large[] = {3, 1, 2, 4}, twice[] = {3, 1, 2, 3};
    grasp_factors pivoted = group;  // the first 2 of the 4 rows of U
    pivoted.order = order;
    grasp_factors below = pivoted, above = pivoted, too_many = pivoted, scaled = pivoted, repeated = pivoted;
    below.order = negative;
    above.order = large;
    repeated.order = twice;
    too_many.R = too_many.U_stride = 5;
    scaled.s = layer.s.data;
    grasp_factors eight_bits = group;  // reads the first bytes of U as values, and bias as scales
    eight_bits.U_scales = layer.bias.data;
    eight_bits.U_bits = 8;
    grasp_factors six_bits = eight_bits, no_scales = eight_bits, sixteen = eight_bits, short_bytes = eight_bits;
    grasp_factors half_scales = eight_bits, scaled_twice = group;
    six_bits.U_bits = 6;
    no_scales.U_scales = nullptr;
    sixteen.U_group = 16;
    short_bytes.U_stride = 1;
    half_scales.scales_dtype = GRASP_F16;
    scaled_twice.Vh_bits = 4;
    scaled_twice.Vh_scales = layer.bias.data;
    scaled_twice.s = layer.s.data;
    grasp_input bad_dtype = input, no_data = input;
    bad_dtype.dtype = 3;
    no_data.data = nullptr;
    const grasp_cpu_options no_threads = {GRASP_ISA_AUTO, 0, nullptr}, no_isa = {GRASP_ISA_AMX + 1, 1, nullptr};
    bool good = grasp_cpu_lowrank_linear(&input, &group, 1, &options) == GRASP_OK;
    good = good && grasp_cpu_lowrank_linear(&input, &pivoted, 1, &options) == GRASP_OK;
    good = good && grasp_cpu_lowrank_glu(&input, &pivoted, &pivoted, 0, &options) == GRASP_BAD_ARGUMENT;
    good = good && grasp_cpu_lowrank_linear(&input, &eight_bits, 1, &options) == GRASP_OK;
    for (const grasp_factors *factors : {&no_U, &short_row, &no_rank, &below, &above, &repeated, &too_many, &scaled,
                                         &six_bits, &no_scales, &sixteen, &short_bytes, &half_scales, &scaled_twice}) {
        good = good && grasp_cpu_lowrank_linear(&input, factors, 1, &options) == GRASP_BAD_ARGUMENT;
    }
    good = good && grasp_cpu_lowrank_linear(&bad_dtype, &group, 1, &options) == GRASP_BAD_ARGUMENT;
    good = good && grasp_cpu_lowrank_linear(&no_data, &group, 1, &options) == GRASP_BAD_ARGUMENT;
    good = good && grasp_cpu_lowrank_linear(&input, &group, 0, &options) == GRASP_BAD_ARGUMENT;
    good = good && grasp_cpu_lowrank_linear(&input, &group, 1, &no_threads) == GRASP_BAD_ARGUMENT;
    good = good && grasp_cpu_lowrank_linear(&input, &group, 1, &no_isa) == GRASP_BAD_ARGUMENT;
    good = good && grasp_cpu_lowrank_glu(&input, &group, &group, 4, &options) == GRASP_BAD_ARGUMENT;
    for (int isa = GRASP_ISA_AUTO; isa <= GRASP_ISA_AMX; ++isa) {
        const grasp_cpu_options named = {isa, 1, nullptr};
        const grasp_status expected = grasp_cpu_supports(isa) ? GRASP_OK : GRASP_UNSUPPORTED;
        good = good && grasp_cpu_lowrank_linear(&input, &group, 1, &named) == expected;
    }
    return good;
}

}  // namespace

int main() {
    int failures = !check_refusals(), cases = 1;
    for (int dtype = GRASP_F32; dtype <= GRASP_BF16; ++dtype, ++cases) {
        if (check_concurrent(dtype)) continue;
        ++failures;
        std::printf("failed: concurrent callers, dtype %d\n", dtype);
    }
    for (int isa = GRASP_ISA_AUTO; isa <= GRASP_ISA_AMX; ++isa) {
        if (!grasp_cpu_supports(isa)) continue;
        for (int dtype = GRASP_F32; dtype <= GRASP_BF16; ++dtype) {
            for (const Shape &shape : SHAPES) {
                const int activation = cases % 4;
                constexpr int GROUPS[] = {0, 32, 64, 128};
                for (const bool good :
                     {check_linear(shape, isa, dtype), check_pivoted(shape, isa, dtype, false),
                      check_pivoted(shape, isa, dtype, true), check_pivoted(shape, isa, dtype, true, false),
                      check_glu(shape, isa, dtype, activation),
                      check_quantised(shape, isa, dtype, cases % 2 ? 8 : 4, GROUPS[cases % 7 % 4])}) {
                    ++cases;
                    if (good) continue;
                    ++failures;
                    std::printf("failed: isa %d, dtype %d, M %ld, N %ld, K %ld, R %ld\n", isa, dtype, long(shape.M),
                                long(shape.N), long(shape.K), long(shape.R));
                }
            }
        }
    }
    std::printf("%d cases, %d failures\n", cases, failures);
    return failures != 0;
}
