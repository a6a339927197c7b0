#!/bin/sh
# Run tests/ops with each pair of supported torch and Triton releases, the oldest and the newest of both, and the tests
# of checkpoints with the oldest transformers, whose plans for tensor parallelism work otherwise; each in a virtual
# environment of its own. Takes the disk and the downloads of two torch releases; not part of CI.
#
#   tests/matrix.sh [torch:triton | transformers:release ...]
#
# PYTHON names the interpreter, BASE the folder of the environments.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
base=${BASE:-.venv-matrix}
if [ $# -eq 0 ]; then
    set -- 2.11:3.6 2.11:3.9 2.13:3.6 2.13:3.9 transformers:5.17
fi

failed=""
for pair in "$@"; do
    if [ "${pair%:*}" = transformers ]; then
        venv=$base/transformers-${pair#*:}
        test -x "$venv/bin/python" || "$python" -m venv "$venv"
        GRASP_BUILD_CUDA=0 "$venv/bin/python" -m pip install --quiet --editable . "transformers==${pair#*:}.*" \
            pytest pytest-benchmark
        echo "== transformers ${pair#*:}"
        "$venv/bin/python" -m pytest -q tests/model/test_hf_quantizer.py tests/checkpoint/test_saving.py tests/test_grasp_autoload.py \
            tests/model/test_tensor_parallel.py || failed="$failed $pair"
        continue
    fi
    torch=${pair%:*} triton=${pair#*:}
    venv=$base/torch-$torch-triton-$triton
    test -x "$venv/bin/python" || "$python" -m venv "$venv"
    case $triton in
        3.6) numpy="numpy<2.4" ;; # its interpreter raises on run-time loop bounds with a later one
        *) numpy=numpy ;;
    esac
    GRASP_BUILD_CUDA=0 "$venv/bin/python" -m pip install --quiet --editable . "torch==$torch.*" "$numpy" \
        pytest pytest-benchmark hypothesis
    # A torch release asks for one Triton release; the pairs that it does not ask for are what this is about.
    "$venv/bin/python" -m pip install --quiet --no-deps "triton==$triton.*"
    echo "== torch $torch, Triton $triton"
    "$venv/bin/python" -m pytest -q tests/ops tests/benchmarks/gpu/test_aot.py tests/benchmarks/gpu/test_sass.py || failed="$failed $pair"
done
test -z "$failed" || { echo "failed:$failed"; exit 1; }
