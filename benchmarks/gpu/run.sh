#!/usr/bin/env bash
# On the machine with the GPU, in the root of a checkout: install what .whl/ holds, then run the stages.
#   bash benchmarks/gpu/run.sh                              the kernels, in 470 s at most
#   bash benchmarks/gpu/run.sh onnx --seconds 230           exported files in onnxruntime-gpu
#   bash benchmarks/gpu/run.sh memcheck racecheck ncu       some stages again
#   bash benchmarks/gpu/run.sh --dry                        without a GPU
# OUT is the folder of the results, gpu_results unless it is set. No network is needed, and nothing is installed for others.
set -u
python=${PYTHON:-python3}
site=/tmp/moeify_site
paths=$PWD
if ls .whl/*.whl >/dev/null 2>&1; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .whl/*.whl
  paths=$paths:$site
fi
if [ -f .whl/onnx/manifest.json ]; then
  "$python" benchmarks/gpu/onnx/unpack.py .whl/onnx "$site-onnx" && paths=$paths:$site-onnx
  # CUDA's libraries are those of the wheels beside torch, which ONNX Runtime loads after torch.
  libraries=$("$python" - <<'PYTHON'
from importlib.util import find_spec
from pathlib import Path

spec = find_spec("nvidia")
roots = list(spec.submodule_search_locations or []) if spec else []
print(":".join(str(path) for root in roots for path in sorted(Path(root).glob("*/lib"))))
PYTHON
)
  export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  free=$(df -Pk /dev/shm 2>/dev/null | awk 'NR==2 {print int($4 / 1048576)}')
  [ "${free:-0}" -ge 24 ] && export ONNX_MODELS=/dev/shm/moeify_onnx || export ONNX_MODELS=/tmp/moeify_onnx
fi
export PYTHONPATH="$paths${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m benchmarks.gpu --out "${OUT:-gpu_results}" "$@"
