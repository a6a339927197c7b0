#!/bin/sh
# The C++ tests, then Python's op tests and tests/test_threads.py, with CPU kernels and bindings built for gcc's address,
# undefined behaviour and thread sanitizers. Fails on the first report. Python and PyTorch are not built for them, but
# their allocations and locks are seen. tests/csrc/gomp.cpp shows the thread sanitizer where OpenMP's threads wait.
set -eu
python=${PYTHON:-.venv/bin/python}
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
library() { "${CXX:-g++}" -print-file-name="lib$1.so"; }

# build SANITIZER: the C++ tests, which run, and a copy of the package with the module for this sanitizer
build() {
    "$python" setup.py --quiet sanitize --sanitizer "$1"
    "$python" -m ninja --quiet -C build/ninja "$1/_cpu.so"
    package=build/ninja/$1/python/grasp_kernels
    rm -rf "$package" && mkdir -p "${package%/*}" && cp -R kernels/grasp_kernels "$package" && rm -f "$package"/*.so
    cp "build/ninja/$1/_cpu.so" "$package/_cpu$suffix"
}

# run_tests SANITIZER PRELOADED TEST...
run_tests() {
    path=$PWD/build/ninja/$1/python preloaded=$2
    shift 2
    echo "python with $preloaded: $*"
    LD_PRELOAD="$preloaded $(library stdc++)" PYTHONMALLOC=malloc PYTHONPATH="$path" OMP_NUM_THREADS=2 \
        ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=halt_on_error=1 \
        "$python" -m pytest -o pythonpath="$path ." -p no:cacheprovider -q -x -rN -s "$@"
}

build address
run_tests address "$(library asan)" tests/test_threads.py --fuzz
# The quarantine of freed memory looks like a leak.
run_tests address "$(library asan)" tests/ops/test_cpu*.py tests/ops/test_ops*.py \
    tests/fuzz/test_ops.py -k 'not leak'
build thread
"${CXX:-g++}" -O1 -g1 -fPIC -shared -fsanitize=thread tests/csrc/gomp.cpp -o build/ninja/thread/gomp.so -ldl
run_tests thread "$(library tsan) $PWD/build/ninja/thread/gomp.so" tests/test_threads.py --fuzz
run_tests thread "$(library tsan) $PWD/build/ninja/thread/gomp.so" tests/ops/test_cpu.py tests/ops/test_cpu_direct.py \
    -k 'thread or concurrent'
