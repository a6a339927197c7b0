#!/bin/sh
# Run tests/ops with each pair of supported torch and Triton releases, the oldest and the newest of both, each pair in a
# virtual environment of its own. Takes the disk and the downloads of two torch releases; not part of CI.
#
#   tests/matrix.sh [torch:triton ...]      PYTHON names the interpreter, BASE the folder of the environments.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
base=${BASE:-.venv-matrix}
if [ $# -eq 0 ]; then
    set -- 2.11:3.6 2.11:3.9 2.13:3.6 2.13:3.9
fi

failed=""
for pair in "$@"; do
    torch=${pair%:*} triton=${pair#*:}
    venv=$base/torch-$torch-triton-$triton
    test -x "$venv/bin/python" || "$python" -m venv "$venv"
    case $triton in
        3.6) numpy="numpy<2.4" ;; # its interpreter raises on run-time loop bounds with a later one
        *) numpy=numpy ;;
    esac
    "$venv/bin/python" -m pip install --quiet "torch==$torch.*" "$numpy" pytest pytest-benchmark hypothesis rich typer
    # A torch release asks for one Triton release; the pairs that it does not ask for are what this is about.
    "$venv/bin/python" -m pip install --quiet --no-deps "triton==$triton.*"
    echo "== torch $torch, Triton $triton"
    "$venv/bin/python" -m pytest -q tests/ops || failed="$failed $pair"
done
test -z "$failed" || { echo "failed:$failed"; exit 1; }
