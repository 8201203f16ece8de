#!/usr/bin/env bash
# What a GPU must show: every kernel against its reference, natively, and then the timing grid. Under 8 minutes.
#   scripts/gpu_check.sh [python]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
export PYTHONPATH=src:kernels TRITON_INTERPRET=0

"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU here"; print(torch.cuda.get_device_name(0))'
timeout 240 "$python" -m pytest -q tests/kernels --ignore=tests/kernels/test_resources.py -p no:cacheprovider
timeout 240 "$python" -c 'import sys; from attnzoo.cli import main; sys.exit(main())' bench --rounds 5 --lengths 4096 --head-dims 64 128
