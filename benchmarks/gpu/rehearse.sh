#!/usr/bin/env bash
# Rehearse the kit on CPUs as it runs on a machine without a network: a new environment with the packages of image.txt,
# and every other package from collected wheels alone. Run in the project's root; needs pip, and takes about 20 minutes.
#   bash benchmarks/gpu/rehearse.sh FOLDER        writes FOLDER/out/results.json
set -euo pipefail
KIT=$(cd "$(dirname "$0")" && pwd); PLACE=$(realpath -m "$1"); PY=${PYTHON:-python3}
[ ! -e "$PLACE" ] || { echo "$PLACE exists"; exit 2; }
mkdir -p "$PLACE"
$PY -m venv "$PLACE/venv"
NEW=$PLACE/venv/bin/python
# torch first, because its CPU build is chosen by the version alone
$NEW -m pip install -q --no-deps -c constraints.txt torch==2.13.0
$NEW -m pip install -q --no-deps -c constraints.txt -r "$KIT/image.txt"
$PY "$KIT/collect_wheels.py" --target "$PLACE/whl" \
  --python "$($PY -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
export WHEELS=$PLACE/whl SITE=$PLACE/site OUT=$PLACE/out GPU_WORK=$PLACE/work XDG_CACHE_HOME=$PLACE/cache
PYTHON=$NEW exec bash "$KIT/gpu_check.sh" --cpu --budget 7200
