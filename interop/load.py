"""Load a multimodal model by its name, whoever wrote the folder.

newest_model     finds the model that was trained last
dtype_to_answer  chooses its dtype
load_model       -> MLLM: a folder of ours, LLaVA-1.5 (llava-hf's or the authors' layout), or
                 the Dense Connector's release
load_to_answer   the same, by what --model, --device and --bf16 say
load_connector   puts a connector alone into an MLLM: LLaVA's mm_projector, or that of a model
"""

import sys
from pathlib import Path

import torch

from common.cli import pick_device
from common.errors import InputError
from common.pretrained import load_weights, locate, open_safetensors, read_config, stored
from mllm import MLLM


def newest_model(root="out"):
    """Return the folder of the newest multimodal model under `root`. Raises InputError."""
    found = []
    for path in Path(root).rglob("config.json"):
        unfinished = path.parent.suffix in (".partial", ".old")
        if not unfinished and read_config(path.parent).get("model_type") == "mllm":
            found.append((path.stat().st_mtime_ns, path.parent))
    if not found:
        raise InputError(
            f"no model under {root}/: train one (python train.py), or name its folder (--model=...)"
        )
    return max(found)[1]


def dtype_to_answer(folder_or_id, device, bf16=None):
    """Choose the dtype of a model that only answers.

    bf16 None: bfloat16 on CUDA and for a checkpoint that is stored in 16 bits, else float32.
    """
    if bf16 is None:
        bf16 = torch.device(device).type == "cuda" or stored(folder_or_id)[1]
    return torch.bfloat16 if bf16 else torch.float32


def load_model(folder_or_id, dtype=torch.float32, device="cpu"):
    """Load a folder or Hugging Face id, ready to generate. Raises InputError."""
    folder = locate(folder_or_id)
    config = read_config(folder)
    if "mm_vision_tower" in config or config.get("model_type") == "llava":
        from interop import llava

        return llava.load(folder, config, dtype, device)
    return MLLM.from_pretrained(folder, dtype, device)


def load_to_answer(name, device="auto", bf16=None):
    """Load a model that only answers -> its name, the model. Raises InputError.

    name: empty for the newest under out/; device: see common.cli.pick_device; bf16: see
    dtype_to_answer.
    """
    device = pick_device(device)
    name = str(name or newest_model())
    print(f"model: {name}", file=sys.stderr)
    return name, load_model(name, dtype_to_answer(name, device, bf16), device)


def load_connector(model, path):
    """Copy a connector from a .safetensors file, a folder or an id into `model`.

    The file may hold LLaVA's mm_projector alone or a whole model. Raises InputError where it is
    another connector.
    """
    path = Path(path)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise InputError(
            f"{path}: pickled weights can run any code: convert them with "
            "torch.load(..., weights_only=True) and safetensors.torch.save_file"
        )
    if path.suffix != ".safetensors":
        path = locate(path)
        check_spec(model, path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise InputError(
            f"{path}: has no safetensors file; name a connector, a run's model/, or a checkpoint"
        )
    places = {}
    for file in files:
        with open_safetensors(file) as opened:
            places |= dict.fromkeys(opened.keys(), file)
    first = next(model.connector.parameters())
    load_weights(model.connector, path, connector_name, first.dtype, first.device, places)


def connector_name(name):
    """Translate a checkpoint's tensor name into the connector's; None for other parts."""
    name = name.removeprefix("model.")
    name = name.replace("multi_modal_projector.linear_1", "mm_projector.0")
    name = name.replace("multi_modal_projector.linear_2", "mm_projector.2")
    if name.startswith("mm_projector."):
        return name
    return name.removeprefix("connector.") if name.startswith("connector.") else None


def check_spec(model, folder):
    """Raise InputError if a folder of ours records another connector, options or layers."""
    if not (folder / "config.json").exists():
        return
    config = read_config(folder)
    if config.get("model_type") == "mllm" and config["connector"] != model.connector.spec():
        raise InputError(
            f"{folder}: has the connector {config['connector']}, not {model.connector.spec()}"
        )
