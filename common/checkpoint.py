"""Checkpoints of a training run: after a kill at any moment, --resume continues bit for bit.

A checkpoint is a folder, for example run/checkpoints/stage2-0000500. It appears whole
or not at all:

    shard-*.safetensors   the trained parameters, AdamW's moments and steps, the random state
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

# Options that may differ when a run is resumed: they do not change its result, or the learning
# rates. The data has a fingerprint.
FREE_OPTIONS = (
    "resume out stage device log log_every save_every evaluate workers compile micro_batch fsdp "
    "activation_checkpointing data1 data2 image_dir lr1 lr2 connector_lr2 lora_lr2"
).split()
# Of these only the last part of the path must be the same.
PATHS = ("vision", "llm", "tokenizer", "init")
STATE = {"stage": int, "step": int, "steps": int, "data": int, "interval": dict, "config": dict}
STATE |= {"connector": dict, "changed": list, "files": dict}
# no_dist=True is intended
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
FILE_BYTES = 2**30  # PyTorch composes a file in memory before it writes it


def save(run, model, optimizer, state, ranks=None):
    """Write a checkpoint, then delete the older ones of the stage. Raises InputError.

    All ranks call it. ranks: each has some rows (FSDP) and writes them. None: each has all rows,
    and rank 0 writes. state: {"stage", "step", ...}, see train.py.
    """
    import torch.distributed.checkpoint as dcp  # imported here: it takes a second

    folder = Path(run) / "checkpoints" / f"stage{state['stage']}-{state['step']:07d}"
    partial = folder.with_name(folder.name + ".partial")
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    if not is_main and not ranks:
        return
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    if ranks:
        ranks.barrier()  # the folder exists
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors = named_tensors(trained, optimizer)
    file_index, size = {}, 0
    for name, tensor in tensors.items():
        size += tensor.numel() * tensor.element_size()
        file_index[name] = 1 + size // FILE_BYTES
    writer = dcp.HuggingFaceStorageWriter(str(partial), file_index, save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, no_dist=ranks is None)
    except dcp.CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise InputError(f"{folder}: could not be written ({reason})") from None
    if is_main:
        sums = {path.name: checksum(path) for path in sorted(partial.iterdir())}
        model_state = {"connector": model.connector.spec(), "changed": sorted(model.changed)}
        write_json(partial / "state.json", state | model_state | {"files": sums})
        replace_folder(partial, folder)
        # a kill may also have left .partial and .old folders
        former = re.compile(rf"stage{state['stage']}-\d+(\.partial|\.old)?")
        for path in folder.parent.iterdir():
            if path != folder and former.fullmatch(path.name):
                shutil.rmtree(path)


def checksum(path):
    """Return the CRC-32 of a file, at about 3 GB/s."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            value = zlib.crc32(block, value)
    return value


def named_tensors(trained, optimizer):
    """Name all tensors of a checkpoint: trained parameters {name: p} and AdamW's state of them."""
    tensors = {}
    for name, parameter in trained.items():
        tensors[f"model.{name}"] = parameter.detach()
        if optimizer:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
    if optimizer:
        tensors["random_state"] = torch.get_rng_state()
    return tensors


def load(folder, model, optimizer=None):
    """Copy a checkpoint's tensors into the model (and the optimizer). Returns its state.

    Without an optimizer, parameters that the checkpoint lacks keep their values. With one, every
    trained parameter must be there. Raises InputError if the tensors do not fit.
    """
    import torch.distributed.checkpoint as dcp

    folder = Path(folder)
    state = read_state(folder)
    check_files(folder, state["files"])
    saved, names_saved = read_metadata(folder), names(folder)
    if state["connector"] != model.connector.spec():
        raise InputError(
            f"{folder}: was trained with the connector {state['connector']}, "
            f"the model has {model.connector.spec()}"
        )
    parameters = dict(model.named_parameters())
    mismatched = names_saved - set(parameters)
    if optimizer:
        mismatched |= names_saved ^ {name for name, p in parameters.items() if p.requires_grad}
    if mismatched:
        raise InputError(
            f"{folder}: tensor {min(mismatched)} does not fit: "
            "this is the checkpoint of another model or another stage"
        )
    trained = {name: parameters[name] for name in sorted(names_saved)}
    if optimizer:
        for name, parameter in trained.items():
            if f"optimizer.{name}.step" in saved:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter.detach()),
                    "exp_avg_sq": torch.zeros_like(parameter.detach()),
                }
    tensors = named_tensors(trained, optimizer)
    for name, tensor in tensors.items():
        if saved[name].size != tensor.shape:
            raise InputError(
                f"{folder}: {name} has shape {tuple(saved[name].size)}, the model's has "
                f"{tuple(tensor.shape)}: this is the checkpoint of another model"
            )
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    if optimizer:
        torch.set_rng_state(tensors["random_state"])
    return state


def read_state(folder):
    """Read state.json and check its types. Raises InputError."""
    state = read_json(folder / "state.json")
    for key, kind in STATE.items():
        if not isinstance(state.get(key), kind):
            raise InputError(f"{folder}/state.json: is damaged, {key!r} is missing or wrong")
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


def read_metadata(folder):
    """Return {tensor name: TensorStorageMetadata} of a checkpoint."""
    import torch.distributed.checkpoint as dcp

    return dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata


def names(folder):
    """Return the names of the trained parameters in a checkpoint."""
    found = set()
    for name in read_metadata(folder):
        if name.startswith("model."):
            found.add(name.removeprefix("model."))
    return found


def newest(run, stage):
    """Return the newest checkpoint of a stage in a run folder, or None."""
    found = []
    for path in (Path(run) / "checkpoints").glob(f"stage{stage}-*"):
        # copies have other names
        if re.fullmatch(r"stage\d-\d{7}", path.name) and is_checkpoint(path):
            found.append(path)
    return max(found, default=None)


def is_checkpoint(folder):
    return (Path(folder) / "state.json").exists()


def resume(run, model, optimizer, state, ranks):
    """Load the newest checkpoint of the stage, if there is one, and continue `state` from it."""
    stage = state["stage"]
    folder = newest(run, stage)
    ranks.agree("the checkpoint to resume from", int(folder.name[-7:]) if folder else 0)
    if folder is None:
        return
    saved = load(folder, model, optimizer)
    if saved["data"] != state["data"]:
        raise InputError(
            f"{folder}: was trained on other data than --data{stage} now has: restore the files, "
            "or start a new run with another --out"
        )
    state["step"] = saved["step"]
    state["interval"].update(saved["interval"])
    ranks.print(f"resumed from {folder} at step {saved['step']}")
    for key in (f"lr{stage}", f"connector_lr{stage}", f"lora_lr{stage}"):
        rate, former = state["config"].get(key), saved["config"].get(key)
        if rate != former:
            ranks.print(f"note: from here on --{key}={rate} instead of {former}")


def start_of(config, run):
    """Return what stage 2 starts from: --init, else the checkpoint of stage 1."""
    if config.init:
        return None if config.init == "new" else config.init
    folder = newest(run, 1)
    if folder is None:
        raise InputError(
            f"{run}: has no checkpoint of stage 1, from which stage 2 starts: run stage 1, or "
            "give --init=FOLDER or --init=new"
        )
    return folder


def load_start(config, folder, model, ranks):
    """Load the checkpoint from which stage 2 starts. Raises InputError."""
    state = load(folder, model)
    check_start(config, folder, state)
    model.changed.update(state["changed"])
    if state["step"] < state["steps"]:
        ranks.print(f"note: {folder} is unfinished, step {state['step']} of {state['steps']}")


def check_same(config, folder):
    """Raise InputError if a run would be resumed with options that change its result."""
    saved = saved_options(config, read_state(folder))
    for key, value in asdict(config).items():
        is_same = saved[key] == value
        if key in PATHS:
            is_same = names_of(saved[key]) == names_of(value)
        if key not in FREE_OPTIONS and not is_same:
            raise InputError(
                f"{folder}: was trained with --{key}={saved[key]}, not {value}: "
                "resume with the same options, or choose another --out"
            )


def names_of(paths):
    """Return the last part of each path: it stays when a folder is moved."""
    return [Path(path).name for path in (paths if isinstance(paths, list) else [paths])]


def check_start(config, folder, state):
    """Raise InputError if stage 2 cannot start from a checkpoint.

    All that its run trained must be in it: an earlier stage may have trained more.
    """
    saved = saved_options(config, state)
    missing = {"connector", *saved["train1"]} - set(saved[f"train{state['stage']}"])
    for name in set(state["changed"]) - names(folder):
        missing.add(name.partition(".")[0])
    if config.init and missing:
        raise InputError(
            f"{folder}: contains what stage {state['stage']} trained, but not "
            f"{', '.join(sorted(missing))}: use the checkpoint of the stage that trained it, "
            "or --init=RUN/model, which gives the connector alone"
        )
    alpha, alpha_saved = config.lora_alpha, saved["lora_alpha"]
    if alpha and alpha_saved not in (0, alpha) and "llm" in saved[f"train{state['stage']}"]:
        raise InputError(
            f"{folder}: its adapters were trained with --lora_alpha={alpha_saved}, not {alpha}"
        )


def saved_options(config, state):
    """Return the options of a saved run. An option that is newer than the run has its default."""
    return asdict(type(config)()) | state["config"]
