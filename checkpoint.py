"""What a training run saves, so that a kill at any moment loses nothing that was saved: --resume goes on bit for bit.

A checkpoint is a folder, run/checkpoints/stage2-0000500, that appears whole or not at all:
    trained.safetensors     the parameters that are trained; the frozen ones are where they came from
    optimizer.safetensors   AdamW's moments and steps, and the random state
    state.json              stage, step, and the configuration; the place in the data is step x batch
"""
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from hub import InputError, open_safetensors, read_json, save_safetensors
from mllm import replace_folder


def save(folder, model, optimizer, state):
    """What is trained, the optimizer's moments and `state`, all in one folder that appears whole or not at all. The former
    checkpoints of the stage go only after that."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = {p: name for name, p in trained.items()}
    moments = {f"{key}.{names[p]}": value for p, values in optimizer.state.items() for key, value in values.items()}
    save_safetensors(trained, partial / "trained.safetensors")
    save_safetensors(moments | {"random_state": torch.get_rng_state()}, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    replace_folder(partial, folder)
    for former in newest_last(folder.parent, state["stage"])[:-1]:
        shutil.rmtree(former)


def newest_last(folder, stage):
    """The whole checkpoints of a stage, oldest first."""
    return sorted(path for path in folder.glob(f"stage{stage}-*[0-9]") if (path / "state.json").exists())


def load(folder, model, optimizer=None):
    """Put a checkpoint's tensors into the model (and the optimizer). Returns its state. Every trained tensor must be there."""
    folder, parameters = Path(folder), dict(model.named_parameters())
    state = read_json(folder / "state.json")
    with open_safetensors(folder / "trained.safetensors") as file:
        expected = {name for name, p in parameters.items() if p.requires_grad} if optimizer else set(file.keys())
        for name in sorted(expected ^ set(file.keys()) or set(file.keys()) - set(parameters)):
            raise InputError(f"{folder}: tensor {name} does not fit: this is the checkpoint of another model or another stage")
        with torch.no_grad():
            for name in file.keys():
                tensor = file.get_tensor(name)
                if tensor.shape != parameters[name].shape:
                    raise InputError(f"{folder}: tensor {name} has shape {tuple(tensor.shape)}, the model's "
                                     f"{tuple(parameters[name].shape)}: this is the checkpoint of another model")
                parameters[name].copy_(tensor)
    if optimizer:
        with open_safetensors(folder / "optimizer.safetensors") as file:
            torch.set_rng_state(file.get_tensor("random_state"))
            for name, parameter in parameters.items():
                if f"step.{name}" in file.keys():
                    optimizer.state[parameter] = {key: file.get_tensor(f"{key}.{name}").to(
                        parameter.device if key != "step" or parameter.is_cuda else "cpu") for key in ("step", "exp_avg", "exp_avg_sq")}
    return state


def check_same(config, folder):
    """A resumed run must be the run that was stopped."""
    state = read_json(folder / "state.json")
    saved = asdict(type(config)()) | state["config"]                 # an option that is newer than the run had its default
    free = ("resume", "out", "stage", "device", "log", "log_every", "save_every", "evaluate", "workers", "compile", "micro_batch")
    for key, value in asdict(config).items():
        if key not in free and saved[key] != value:
            raise InputError(f"{folder}: was trained with --{key}={saved[key]}, not {value}: resume with the "
                             "same options, or start anew with another --out")
