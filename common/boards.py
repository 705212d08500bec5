"""TensorBoard and Weights & Biases: what --log adds to log.jsonl. Each gets the same numbers."""

import os
import secrets
from dataclasses import asdict


class TensorBoard:
    def __init__(self, config, run):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run)

    def write(self, record):
        for key, value in record.items():
            self.writer.add_scalar(f"stage{record['stage']}/{key}", value, record["step"])
        self.writer.flush()  # a killed run keeps what it wrote


class WandB:
    def __init__(self, config, run):
        import wandb

        # a resumed run continues its curves
        name = run / "wandb.id"
        if not name.exists():
            name.write_text(secrets.token_hex(4))
        self.run = wandb.run or wandb.init(
            project=os.environ.get("WANDB_PROJECT", "nanoMLLM"),
            id=name.read_text(),
            resume="allow",
            dir=run,
            config=asdict(config),
        )
        for stage in ("stage1", "stage2"):
            self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def write(self, record):
        self.run.log({f"stage{record['stage']}/{key}": value for key, value in record.items()})


BOARDS = {"tensorboard": TensorBoard, "wandb": WandB}
