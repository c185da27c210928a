#!/bin/sh
# bar-edge for an x86-64 machine with an RTX card: compile, generate and verify with TensorRT-RTX. Needs Python 3.11 to 3.13.
# Usage: docker/install-rtx.sh VENV      from a checkout; docker/rtx.Dockerfile runs it, too
set -eu
venv=${1:?the folder of the environment to make}
source=$(dirname "$0")/..
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet "$source[compile,cuda]" tensorrt-rtx-cu13
"$venv/bin/bar-edge" doctor
