#!/usr/bin/env bash
# The first run on a GPU, at most 12 minutes on one of 80 GB: its tests, training steps of 1B and 7B, decoding.
# Run it from the repository's folder, after pip install -r requirements.txt. Paste out/first_gpu.md into docs/speed.md.
# The folder for temporary files ($TMPDIR) needs 60 GB.
#   bash runs/first_gpu.sh
set -uo pipefail
mkdir -p out
export PYTORCH_ALLOC_CONF=expandable_segments:True

section() {  # TITLE SECONDS COMMAND...: its output as a block of Markdown
    printf '\n### %s\n\n```\n$ %s\n' "$1" "${*:3}"
    timeout "$2" "${@:3}" 2>&1 | tail -n 60
    printf 'exit status %s\n```\n' "${PIPESTATUS[0]}"
}

{
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    python -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
    section "Tests" 210 python -m pytest -q -rs tests/test_speed.py tests/live_gpu.py
    section "A step of 1B, both stages" 120 python -m tools.bench train --size=1b --batch=16 --repeats=1 --profile=true
    section "A step of 7B, stage 1" 240 python -m tools.bench train --size=7b --batch=16 --stage=1 --repeats=1 --profile=true
    section "Decoding" 120 python -m tools.bench decode --repeats=1
} | tee out/first_gpu.md
