"""What a training run saves, so that a kill at any moment loses nothing that was saved: --resume goes on bit for bit.

A checkpoint is a folder, run/checkpoints/stage2-0000500, say, that appears whole or not at all:
    trained.safetensors     the parameters that are trained; the frozen ones are where they came from
    optimizer.safetensors   AdamW's moments and steps, and the random state
    state.json              stage, step, and the configuration; the place in the data is step x batch

With --fsdp there are N of the first two, trained-00001-of-00004.safetensors and so on: every rank writes the rows that it keeps
of each tensor, and in their order they are the whole. So any number of ranks can read them, each the rows it needs.
"""
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from hub import InputError, open_safetensors, read_json, save_safetensors
from mllm import replace_folder
from shard import rows_of


def save(folder, model, optimizer, state, ranks=None):
    """What is trained, the optimizer's moments and `state`, all in one folder that appears whole or not at all. The former
    checkpoints of the stage go only after that. ranks: all of them are here, each with its rows; None: this process has all."""
    partial, main, of = folder.with_name(folder.name + ".partial"), ranks is None or ranks.rank == 0, ""
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    if ranks:
        of = f"-{ranks.rank + 1:05d}-of-{ranks.size:05d}"
        ranks.barrier()                                              # the folder is there
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = {p: name for name, p in trained.items()}
    moments = {f"{key}.{names[p]}": value for p, values in optimizer.state.items() for key, value in values.items()}
    own = lambda tensors: {name: rows_of(tensor)[0] for name, tensor in tensors.items()}
    save_safetensors(own(trained), partial / f"trained{of}.safetensors")
    save_safetensors(own(moments) | {"random_state": torch.get_rng_state()}, partial / f"optimizer{of}.safetensors")
    if ranks:
        ranks.barrier()                                              # all rows are written
    if not main:
        return
    (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    replace_folder(partial, folder)
    for former in folder.parent.iterdir():                           # what a kill has left half written or half gone, too
        if former != folder and re.fullmatch(rf"stage{state['stage']}-\d+(\.partial|\.old)?", former.name):
            shutil.rmtree(former)


def newest_last(folder, stage):
    """The whole checkpoints of a stage, oldest first."""
    return sorted(path for path in folder.glob(f"stage{stage}-*[0-9]") if (path / "state.json").exists())


class Rows:
    """The tensors of trained.safetensors (or optimizer), or of trained-00001-of-0000N and so on, whose rows stand in order."""

    def __init__(self, folder, name):
        found = sorted(folder.glob(f"{name}-*-of-*.safetensors")) or [folder / f"{name}.safetensors"]
        if several := re.fullmatch(r".*-of-(\d+)", found[0].stem):
            wanted = [folder / f"{name}-{i + 1:05d}-of-{several[1]}.safetensors" for i in range(int(several[1]))]
            for path in wanted:
                if path not in found:
                    raise InputError(f"{path}: missing; the checkpoint is whole only with all {len(wanted)} of its kind")
            found = wanted
        self.files = [open_safetensors(path) for path in found]

    def names(self):
        return set(self.files[0].keys())

    def shape(self, name):
        shapes = [file.get_slice(name).get_shape() for file in self.files]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def whole(self, name):
        """A tensor that every rank has: a counter, the random state."""
        return self.files[0].get_tensor(name)

    @torch.no_grad()
    def read_into(self, tensor, name):
        """Its rows into `tensor`, or those that this rank keeps of it."""
        own, start, stop = rows_of(tensor)
        first = 0                                                    # of the file's rows
        for part in (file.get_slice(name) for file in self.files):
            end = first + part.get_shape()[0]
            low, high = max(start, first), min(stop, end)
            if low < high:
                own[low - start:high - start].copy_(part[low - first:high - first])
            first = end


def load(folder, model, optimizer=None):
    """Put a checkpoint's tensors into the model (and the optimizer). Returns its state. Every trained tensor must be there."""
    folder, parameters = Path(folder), dict(model.named_parameters())
    state, saved = read_json(folder / "state.json"), Rows(folder, "trained")
    expected = {name for name, p in parameters.items() if p.requires_grad} if optimizer else saved.names()
    for name in sorted(expected ^ saved.names() or saved.names() - set(parameters)):
        raise InputError(f"{folder}: tensor {name} does not fit: this is the checkpoint of another model or another stage")
    for name in sorted(saved.names()):
        if saved.shape(name) != tuple(parameters[name].shape):
            raise InputError(f"{folder}: tensor {name} has shape {saved.shape(name)}, the model's "
                             f"{tuple(parameters[name].shape)}: this is the checkpoint of another model")
        saved.read_into(parameters[name], name)
    if optimizer:
        saved = Rows(folder, "optimizer")
        torch.set_rng_state(saved.whole("random_state"))
        for name, parameter in parameters.items():
            if f"step.{name}" in saved.names():
                moments = {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
                for key, moment in moments.items():
                    saved.read_into(moment, f"{key}.{name}")
                step = saved.whole(f"step.{name}")
                optimizer.state[parameter] = {"step": step.to(parameter.device)} | moments
    return state


def check_same(config, folder):
    """A resumed run must be the run that was stopped."""
    state = read_json(folder / "state.json")
    saved = asdict(type(config)()) | state["config"]                 # an option that is newer than the run had its default
    free = ("resume", "out", "stage", "device", "log", "log_every", "save_every", "evaluate", "workers", "compile", "micro_batch",
            "fsdp")
    for key, value in asdict(config).items():
        if key not in free and saved[key] != value:
            raise InputError(f"{folder}: was trained with --{key}={saved[key]}, not {value}: resume with the "
                             "same options, or start anew with another --out")


def check_start(config, folder, state, main):
    """InputError where stage 2 would start from a checkpoint of another connector, or one that lacks what its run had learnt."""
    saved = asdict(type(config)()) | state["config"]
    plainly = lambda key, value: "dense" if (key, value) == ("connector", "dci") else value
    for key in ("connector", "groups", "merge", "dino_depth", "dino_expansion", "layer"):
        if plainly(key, saved[key]) != plainly(key, getattr(config, key)):
            raise InputError(f"{folder}: was trained with --{key}={saved[key]}, not {getattr(config, key)}: its connector means "
                             "something else")
    lacks = {"connector", *saved["train1"]} - set(saved[f"train{state['stage']}"])
    lacks |= {name.partition(".")[0] for name in {*state.get("learnt", [])} - Rows(folder, "trained").names()}
    if config.init and lacks:
        raise InputError(f"{folder}: holds what stage {state['stage']} trained, and not {', '.join(sorted(lacks))}: name the "
                         "checkpoint of the stage that trained it, or a run's model/ as --init, whose connector is taken")
    if main and saved["vision"] != config.vision:
        print(f"note: {folder} was trained with --vision={','.join(saved['vision']) or 'the tiny towers'}", flush=True)
