#!/usr/bin/env bash
# What a GPU must show: every kernel against its reference, natively, and then the timing grid. Under 8 minutes.
#   scripts/gpu_check.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
export PYTHONPATH=src:kernels TRITON_INTERPRET=0

"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU here"; print(torch.cuda.get_device_name(0))'
# every kernel and gradient once or more; the other shapes are for whoever has the time to compile them
timeout 270 "$python" -m pytest -q -n "${JOBS:-8}" tests/kernels --ignore=tests/kernels/test_resources.py \
  -p no:cacheprovider -k "bf16 or spans or documents or step or opcheck or test_kernels or test_mla"
timeout 200 "$python" -c 'import sys; from attnzoo.cli import main; sys.exit(main())' bench --rounds 5 --lengths 4096 --head-dims 64 128
