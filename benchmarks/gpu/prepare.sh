#!/usr/bin/env bash
# On the development machine, in the root of a checkout: put into .whl/ what a GPU machine without a network lacks.
#   bash benchmarks/gpu/prepare.sh           Liger, 1 MB
#   bash benchmarks/gpu/prepare.sh onnx      also onnxruntime-gpu, cut to sm_90: downloads 256 MB, leaves 38 MB
# .whl/ is not tracked: it must be named to whatever copies the checkout.
set -eu
test -f pyproject.toml && test -d benchmarks/gpu || { echo "run this in the root of a checkout of moeify" >&2; exit 1; }
python=${PYTHON:-python3}
liger=liger-kernel==0.8.5
onnxruntime=onnxruntime-gpu==1.31.1
# Wheels for the machine with the GPU: Python 3.12 on Linux.
platforms=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
for glibc in 39 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
download() { "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" -d "$1" "$2"; }

mkdir -p .whl
rm -f .whl/*.whl
git rev-parse --short HEAD >.whl/commit || rm -f .whl/commit # the copy there may have no history
download .whl "$liger" || echo "without $liger: the benchmark leaves it out"
if [ "${1:-}" = onnx ]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  download "$scratch" "$onnxruntime"
  "$python" -m pip install -q --target "$scratch/tools" zstandard
  PYTHONPATH="$PWD:$scratch/tools" "$python" -m benchmarks.gpu.onnx.slim "$scratch"/*.whl .whl/onnx
fi
du -sh .whl
echo "Next, on the machine with the GPU, in a copy of this checkout that holds .whl: bash benchmarks/gpu/run.sh"
