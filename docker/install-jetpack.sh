#!/bin/sh
# bar-edge for a Jetson: JetPack brings the driver, CUDA with NVRTC, and TensorRT with its Python module, which the
# environment is let see. JetPack 6: Python 3.10, CUDA 12; JetPack 7: Python 3.12, CUDA 13.
# Usage: docker/install-jetpack.sh VENV 12|13      from a checkout; docker/jetpack.Dockerfile runs it, too
set -eu
venv=${1:?the folder of the environment to make}
cuda=${2:?the major version of CUDA: 12 (JetPack 6) or 13 (JetPack 7)}
source=$(dirname "$0")/..
"${PYTHON:-python3}" -m venv --system-site-packages "$venv"
case $cuda in
    12) extra=cuda12 ;;
    13) extra=cuda ;;
    *) echo "CUDA $cuda is not known; 12 or 13" >&2; exit 2 ;;
esac
"$venv/bin/pip" install --quiet "$source[compile,$extra]"
"$venv/bin/bar-edge" doctor
