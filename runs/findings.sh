#!/usr/bin/env bash
# Repeat the papers' main experiments on the toy world and write docs/findings.md. Run it from the repository's folder:
#   runs/findings.sh                   every table, three seeds: planned for 90 minutes on two CPU cores; continues after a stop
#   runs/findings.sh runs/quick.toml   one seed, fewer arms, fewer steps: at most 20 minutes
# One table alone: python -m toy.findings --table=layers (or towers, merging, dense, video)
set -euo pipefail

python -m toy.findings "$@"
python -m toy.findings --report "$@"
