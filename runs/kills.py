"""Kill training runs at random moments, resume them, and compare with a run that was not killed.

    python runs/kills.py                 20 kills, about half an hour on two CPU cores
    python runs/kills.py --kills=3 --seed=1

Every kind of run is trained once to the end. Then it is started again, killed with SIGKILL (with
all of its processes) at a random moment, and resumed. The model must be equal bit for bit, and the
log in all but the times.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHORT = (
    "--steps1=10 --steps2=30 --batch1=4 --batch2=4 --save_every=5 --log_every=1 --evaluate=false"
)
RANKS = f"-m torch.distributed.run --standalone --nproc_per_node=2 {ROOT}/train.py"
KINDS = {
    "plain": f"{ROOT}/train.py",
    "workers": f"{ROOT}/train.py --workers=2",
    "comm": f"{ROOT}/train.py --connector=comm",
    "lora": f"{ROOT}/train.py --lora_rank=4 --lora_lr2=1e-3",
    "ddp": RANKS,
    "fsdp": f"{RANKS} --fsdp=true",
    "fsdp and lora": f"{RANKS} --fsdp=true --lora_rank=4 --lora_lr2=1e-3",
}
TIMES = ("seconds", "seconds_per_step", "tokens_per_second")


def train(kind, run, seconds=None, resume=False):
    """Train a run; kill it after some seconds. Return whether it ended by itself, without error."""
    command = [sys.executable, *f"{KINDS[kind]} {SHORT} --out={run}".split()]
    command += ["--resume"] if resume else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(f"{run}.txt", "a") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        return process.wait(timeout=seconds) == 0
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False


def result(run):
    """Return the hash of the model's tensors, and the log without its times."""
    model = hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return model, [{key: line[key] for key in line if key not in TIMES} for line in lines]


def has_checkpoint(run):
    return any((run / "checkpoints").glob("stage?-???????/state.json"))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, folder = random.Random(options.seed), Path(tempfile.mkdtemp())
    expected, durations, failures = {}, {}, 0
    for number in range(options.kills):
        kind = list(KINDS)[number % len(KINDS)]
        if kind not in expected:
            began, run = time.time(), folder / f"{kind} whole".replace(" ", "-")
            if not train(kind, run):
                sys.exit(f"{kind}: the run itself failed, see {run}.txt")
            durations[kind], expected[kind] = time.time() - began, result(run)
        run = folder / f"kill-{number}"
        moment = rng.uniform(0, durations[kind])
        is_finished = train(kind, run, moment)
        while not is_finished:
            # A run that was killed before its first checkpoint starts again.
            resume = has_checkpoint(run)
            if not resume:
                shutil.rmtree(run, ignore_errors=True)
            is_finished = train(kind, run, resume=resume)
            if not is_finished:
                break
        is_equal = is_finished and result(run) == expected[kind]
        failures += not is_equal
        print(f"{kind:14} killed after {moment:5.1f} s: {'equal' if is_equal else 'DIFFERENT'}")
    print(f"{options.kills - failures} of {options.kills} runs equal the run that was not killed")
    if failures:
        sys.exit(f"see {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
