"""Load a multimodal model by its name, whoever wrote the folder.

A folder of ours, LLaVA-1.5 or 1.6 (llava-hf's or the authors' layout), Mini-Gemini, or the Dense
Connector's release.
"""

import sys
from pathlib import Path

import torch

from common.cli import pick_device
from common.errors import InputError
from common.pool import pool_tokens
from common.pretrained import load_weights, locate, open_safetensors, read_config, stored
from common.speed import speed_up
from interop import llava
from mllm import MLLM


def newest_model():
    """Return the folder of the newest multimodal model under out/. Raises InputError."""
    found = []
    for path in Path("out").rglob("config.json"):
        folder = path.parent
        if folder.suffix != ".partial" and read_config(folder).get("model_type") == "mllm":
            found.append((path.stat().st_mtime_ns, folder))
    if not found:
        raise InputError(
            "no model under out/: train one (python train.py), or name its folder (--model=...)"
        )
    return max(found)[1]


def dtype_to_answer(folder_or_id, device, bf16):
    """Choose the dtype of a model that only answers.

    bf16 None: bfloat16 on CUDA and for a checkpoint that is stored in 16 bits, else float32.
    """
    if bf16 is None:
        bf16 = device.type == "cuda" or stored(folder_or_id)[1]
    return torch.bfloat16 if bf16 else torch.float32


def load_model(folder_or_id, dtype=torch.float32, device="cpu"):
    """Load a folder or Hugging Face id, ready to generate. Raises InputError."""
    folder = locate(folder_or_id)
    config = read_config(folder)
    if "mm_vision_tower" in config or config.get("model_type") in ("llava", "llava_next"):
        return llava.load(folder, config, dtype, device)
    return MLLM.from_pretrained(folder, dtype, device)


def load_to_answer(config, pool=""):
    """Load a model that only answers -> its name, the model. Raises InputError.

    config: with the options of common.cli.ModelConfig; pool: see common.pool.
    """
    device = pick_device(config.device)
    name = config.model or str(newest_model())
    print(f"model: {name}", file=sys.stderr)
    model = load_model(name, dtype_to_answer(name, device, config.bf16), device)
    speed_up(model, "chat", compile=config.fast)
    if pool:
        pool_tokens(model, pool)
    return name, model


def start_from(model, path, mapped=False):
    """Return the model that training starts from: `model`, or the one at `path` if it has an LLM.

    path: a folder or an id. A connector alone, such as LLaVA's mm_projector, is loaded into
    `model`. mapped: leave the LLM in its files, for FSDP. Raises InputError where the connector is
    another one.
    """
    folder, places = locate(path), {}
    for file in folder.glob("*.safetensors"):
        with open_safetensors(file) as opened:
            places |= dict.fromkeys(opened.keys(), file)
    # a run's checkpoint lacks what its run did not train
    if not places or (folder / "state.json").exists():
        raise InputError(
            f"{path}: no model or connector in safetensors; a run has its model in its folder "
            "model, and a pickle (.bin, .pt) can run any code: convert it first"
        )
    device = next(model.connector.parameters()).device
    if not any(name.endswith("embed_tokens.weight") for name in places):
        # its modules, without image_newline, which LLaVA-NeXT's stage 1 does not train
        modules = torch.nn.ModuleDict(model.connector.named_children())
        load_weights(modules, folder, llava.connector_name, torch.float32, device, places)
        print(f"starting from the connector {path}")
        return model
    llm = model.llm.embed_tokens.weight
    whole = load_model(folder, None, "cpu" if mapped else llm.device)
    if not mapped:
        whole.llm.to(llm.dtype)
    expected, found = model.connector, whole.connector
    if (expected.name, expected.options) != (found.name, found.options):
        raise InputError(
            f"{path}: has the connector {found.name} with {found.options}, not {expected.name} "
            f"with {expected.options}: see --connector"
        )
    whole.vision.to(device, next(model.vision.parameters()).dtype)
    whole.connector.to(device, torch.float32)
    whole.base = str(path)  # of LoRA adapters
    print(f"starting from the model {path}: its towers, LLM, template and image size")
    return whole
