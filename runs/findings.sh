#!/usr/bin/env bash
# The papers' central experiments, small, and docs/findings.md. From the project's folder:
#   runs/findings.sh             every table, three seeds: planned for an hour and a half on two CPU cores; goes on after a stop
#   runs/findings.sh --quick     one seed, fewer arms, fewer steps: at most twenty minutes
# One table alone, each a command (what tables share is run once):
#   python findings.py --table=layers        which layer sees what
#   python findings.py --table=towers        CLIP or DINO
#   python findings.py --table=merging       how to merge
#   python findings.py --table=dense         the Dense Connector's table
#   python findings.py --table=video         models of single pictures asked about clips
set -euo pipefail

python findings.py "$@"
python findings.py --report "$@"
