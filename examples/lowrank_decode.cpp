// A decode step's low-rank linear without Python: y = (x · Vhᵀ) · Uᵀ by the grasp CPU kernels, checked and timed.
//
//   dir=$(python -c "import grasp_kernels; print(grasp_kernels.__path__[0])")
//   g++ -std=c++17 -O2 lowrank_decode.cpp -I"$(python -c 'import grasp_kernels as g; print(g.get_include())')"
//       "$dir/lib/libgrasp_lowrank.a" -pthread -o lowrank_decode
#include <lowrank.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

// Stands for the caller's own thread pool: the kernels start no threads themselves.
static void run_on_threads(void (*body)(void *), void *context, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; ++i) others.emplace_back(body, context);
    body(context);
    for (std::thread &other : others) other.join();
}

int main() {
    constexpr int64_t N = 2048, K = 2048, R = 102;
    std::mt19937 generator(0);
    std::normal_distribution<float> normal;
    std::vector<float> x(K), U(N * R), Vh(R * K), y(N);
    for (float &value : x) value = normal(generator);
    for (float &value : U) value = normal(generator) / std::sqrt(float(R));
    for (float &value : Vh) value = normal(generator) / std::sqrt(float(K));

    const grasp_input input = {x.data(), K, 1, K, GRASP_F32};
    grasp_factors layer = {};
    layer.U = U.data();
    layer.Vh = Vh.data();
    layer.y = y.data();
    layer.U_stride = R;
    layer.Vh_stride = K;
    layer.y_stride = N;
    layer.N = N;
    layer.R = R;
    const grasp_cpu_options options = {GRASP_ISA_AUTO, 2, run_on_threads};

    double best = 1e9;
    for (int i = 0; i < 20; ++i) {
        const auto start = std::chrono::steady_clock::now();
        if (const grasp_status status = grasp_cpu_lowrank_linear(&input, &layer, 1, &options)) {
            std::printf("grasp_cpu_lowrank_linear: status %d\n", status);
            return 1;
        }
        best = std::fmin(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }

    double error = 0, norm = 0;
    std::vector<double> h(R);
    for (int64_t r = 0; r < R; ++r) {
        for (int64_t k = 0; k < K; ++k) h[r] += double(x[k]) * Vh[r * K + k];
    }
    for (int64_t n = 0; n < N; ++n) {
        double exact = 0;
        for (int64_t r = 0; r < R; ++r) exact += h[r] * U[n * R + r];
        error += (y[n] - exact) * (y[n] - exact);
        norm += exact * exact;
    }
    std::printf("relative error %.1e, %.0f us\n", std::sqrt(error / norm), best * 1e6);
    return std::sqrt(error / norm) < 2e-6 ? 0 : 1;
}
