"""Checkpoints of a training run: after a kill at any moment, --resume continues bit for bit.

That is a promise of the CPU: on CUDA, FlashAttention's backward pass adds in any order.
A checkpoint is a folder, for example run/checkpoints/stage2-0000500, whole or not there at all:

    shard-*.safetensors   the trained parameters, AdamW's moments and steps
    state.json            stage, step, config, checksums of the files and of the data, and more;
                          the place in the data is step x batch size

Frozen parameters are not saved. The tensors are written and read by torch.distributed.checkpoint.
With --fsdp every rank writes the rows that it has, and any number of ranks can read them.
Its safetensors format unpickles nothing, unlike its default format.
"""

import re
import shutil
import warnings
import zlib
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from common.errors import InputError
from common.pretrained import read_json
from common.save import replace_folder, write_json

# Options that may differ when a run is resumed, without the number of the stage: those that do not
# change its result, the learning rates, and the names of data files, which have a fingerprint.
FREE_OPTIONS = (
    "resume out stage device wandb log_every profile save_every evaluate workers compile "
    "micro_batch fsdp fsdp_replicas activation_checkpointing memory_budget data eval_data "
    "image_dir lr connector_lr vision_lr lora_lr"
).split()
# no_dist=True is intended
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
FILE_BYTES = 2**30  # PyTorch composes a file in memory before it writes it


# ---- write and read ------------------------------------------------------------------------------


def save(run, model, optimizer, state, ranks):
    """Write a checkpoint, then delete the older ones of the stage. Raises InputError.

    All ranks call it. With FSDP each writes its rows, else rank 0 writes. state: see train.py.
    """
    import torch.distributed.checkpoint as dcp  # imported here: it takes a second

    if not (ranks.is_main or ranks.is_sharded):
        return
    folder = folder_of(run, state["stage"], state["step"])
    partial = folder.with_name(folder.name + ".partial")
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    if ranks.is_sharded:
        ranks.barrier()  # the folder exists
    tensors = named_tensors(trained_tensors(model), optimizer)
    file_index, size = {}, 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        file_index[name] = 1 + size // FILE_BYTES
    writer = dcp.HuggingFaceStorageWriter(str(partial), file_index, save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, no_dist=not ranks.is_sharded)
    except dcp.CheckpointException as error:
        raise InputError(f"{folder}: could not be written ({reason(error)})") from None
    if ranks.is_main:
        sums = {path.name: checksum(path) for path in sorted(partial.iterdir())}
        more = {"connector": model.connector.spec(), "files": sums}
        write_json(partial / "state.json", state | more)
        replace_folder(partial, folder)
        # a kill may also have left .partial and .old folders
        former = re.compile(rf"stage{state['stage']}-\d+(\.partial|\.old)?")
        for path in folder.parent.iterdir():
            if path != folder and former.fullmatch(path.name):
                shutil.rmtree(path)


def folder_of(run, stage, step):
    return Path(run) / "checkpoints" / f"stage{stage}-{step:07d}"


def reason(error):
    """Return the first rank's error of a CheckpointException."""
    return next(iter(error.failures.values()))[0]


def checksum(path):
    """Return the CRC-32 of a file, at about 3 GB/s."""
    return zlib.crc32(path.read_bytes())


def trained_tensors(model):
    """Return {name: tensor} of what training changes: parameters and BatchNorm's statistics."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | dict(model.connector.named_buffers("connector"))


def named_tensors(trained, optimizer):
    """Name all tensors of a checkpoint: trained ones {name: tensor} and AdamW's state of them."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in trained.items()}
    if optimizer:
        for name, parameter in trained.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def load(folder, model, optimizer=None):
    """Copy a checkpoint's tensors into the model (and the optimizer). Returns its state.

    Without an optimizer, parameters that the checkpoint lacks keep their values. With one, every
    trained parameter must be there. Raises InputError if the tensors do not fit.
    """
    import torch.distributed.checkpoint as dcp

    folder = Path(folder)
    state = read_json(folder / "state.json")
    check_files(folder, state["files"])
    if state["connector"] != model.connector.spec():
        raise InputError(f"{folder}: its --connector was {state['connector']}")
    saved, trained = names(folder), trained_tensors(model)
    parameters = dict(model.named_parameters()) | trained
    expected = trained.keys() if optimizer else saved & parameters.keys()
    mismatched = saved ^ expected
    if mismatched:
        raise InputError(f"{folder}: {min(mismatched)} does not fit: it is of another model")
    trained = {name: parameters[name] for name in saved}
    if optimizer:
        # AdamW has no state of a parameter that has had no gradient yet.
        stepped = names(folder, "optimizer.")
        for name, parameter in trained.items():
            if f"{name}.step" in stepped:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter.detach()),
                    "exp_avg_sq": torch.zeros_like(parameter.detach()),
                }
    tensors = named_tensors(trained, optimizer)
    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    except dcp.CheckpointException as error:
        raise InputError(f"{folder}: does not fit the model ({reason(error)})") from None
    return state


def check_files(folder, sums):
    """Raise InputError if a file is missing or damaged. Several ranks share the work.

    PyTorch would leave the rows of a missing file as they are, without an error.
    """
    rank, size = 0, 1
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    for name in list(sums)[rank::size]:
        path = folder / name
        if not path.exists() or checksum(path) != sums[name]:
            raise InputError(f"{path}: is missing or damaged: use another checkpoint")


def names(folder, kind="model."):
    """Return the names of the trained parameters in a checkpoint, or of "optimizer." states."""
    import torch.distributed.checkpoint as dcp

    found = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name.removeprefix(kind) for name in found if name.startswith(kind)}


# ---- resume, and start stage 2 -------------------------------------------------------------------


def newest(run, stage):
    """Return the newest checkpoint of a stage in a run folder, or None."""
    # seven digits: copies have other names
    found = (Path(run) / "checkpoints").glob(f"stage{stage}-{'[0-9]' * 7}")
    return max(found, default=None)


def resume(run, model, optimizer, state, ranks):
    """Load the newest checkpoint of the stage, if there is one, and continue `state` from it."""
    stage = state["stage"]
    folder = newest(run, stage)
    # Rank 0 decides: a network disk may show the newest one late to others.
    step = int(folder.name[-7:]) if folder and ranks.is_main else 0
    step = ranks.sum(torch.tensor(step)).item()
    if not step:
        return
    folder = folder_of(run, stage, step)
    saved = load(folder, model, optimizer)
    if saved["data"] != state["data"]:
        raise InputError(f"{folder}: --data{stage} has changed: restore it, or use another --out")
    state["step"] = step
    state["interval"].update(saved["interval"])
    ranks.print(f"resumed from {folder} at step {step}")


def load_stage_1(run, model):
    """Load what stage 1 of a run trained, from which stage 2 starts. Raises InputError."""
    folder = newest(run, 1)
    if folder is None:
        raise InputError(
            f"{run}: has no stage 1: train it (--stage=1), or give --init=MODEL or new"
        )
    load(folder, model)


def check_run(config, run):
    """Raise InputError if a run would overwrite another one, or be resumed as another one."""
    saved = {stage: newest(run, stage) for stage in (1, 2)}
    is_taken = saved[2] or (config.stage != 2 and (saved[1] or (run / "model").exists()))
    if is_taken and not config.resume:
        raise InputError(f"{run}: was trained here: add --resume, or another --out for a new run")
    if config.stage == 1 and saved[2]:
        raise InputError(f"{run}: --stage=1 cannot be resumed after stage 2: drop --stage")
    for stage, folder in saved.items():
        if folder and config.stage in (0, stage):
            check_same(config, folder)


def check_same(config, folder):
    """Raise InputError if a run would be resumed with options that change its result."""
    # An option that is newer than the run has its default.
    saved = asdict(type(config)()) | read_json(folder / "state.json")["config"]
    for key, value in asdict(config).items():
        if key.rstrip("12") not in FREE_OPTIONS and last_parts(saved[key]) != last_parts(value):
            raise InputError(f"{folder}: resume it with --{key}={saved[key]}, not {value}")


def last_parts(value):
    """Drop the folders of all paths in an option: a moved checkpoint is the same one."""
    return re.sub(r"[^,/]*/", "", str(value))
