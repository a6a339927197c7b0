#!/bin/sh
# Run check.py in a new environment with torch and kernels alone, then with grasp from this checkout; and the benchmarks.
#
#   packages/kernel-hub/check.sh [PACKAGE]
#
# PYTHON names the interpreter, of the version that the package's modules are for; VENV the folder of the environment.
set -eu
cd "$(dirname "$0")/../.."
package=${1:-build/kernel-hub}
python=${PYTHON:-python3}
venv=${VENV:-.venv-kernels}

python_of() { # a document
    sed -n '/^```python$/,/^```$/ { /^```$/q; /^```/!p; }' "$1"
}

rm -rf "$venv"
"$python" -m venv "$venv"
# Triton comes with the torch of PyPI, but not with that for CPUs.
"$venv/bin/python" -m pip install --quiet 'kernels[benchmark]>=0.17,<0.18' 'torch>=2.11' 'triton>=3.6'
TRITON_INTERPRET=1 "$venv/bin/python" -I packages/kernel-hub/check.py "$package"
"$venv/bin/kernels" benchmark "./$package" --warmup 2 --iterations 10
python_of packages/kernel-hub/README.md >"$venv/card.py"
"$venv/bin/python" -I "$venv/card.py"
GRASP_BUILD_CUDA=0 "$venv/bin/python" -m pip install --quiet .
"$venv/bin/python" -I packages/kernel-hub/check.py "$package"
python_of docs/serve/kernel-hub.md >"$venv/page.py"
"$venv/bin/python" -I "$venv/page.py"
