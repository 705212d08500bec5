"""Write checkpoints: towers and LLMs as transformers reads them, and whole models.

A file, or the folder of a whole model, appears complete or not at all.
"""

import json
import math
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from common.errors import InputError
from common.layouts import WHOLE_CLIP

# tensors and config keys of ours that transformers' towers do not have
HEADS = ("classifier.", "distillation_classifier.", "num_labels", "distilled_head")


# --- files ---


def write_json(path, value):
    """Write a JSON file, indented."""
    Path(path).write_text(json.dumps(value, indent=2) + "\n")


def save_checkpoint(folder, tensors, config):
    """Write {name: tensor} and a config as `model.safetensors` and `config.json`."""
    save_in_files(folder, tensors.items(), config, limit=math.inf)


def save_in_files(folder, named, config, limit=5e9):
    """Write a checkpoint that may not fit into memory.

    named: pairs (name, tensor), which may be made one by one. At most `limit` bytes are collected,
    then written to a file. One file is model.safetensors; several have an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map, total = {}, 0
    for number, tensors in enumerate(collect(named, limit), 1):
        path = folder / f"model-{number:05d}.safetensors"
        save_safetensors(tensors, path)
        weight_map |= dict.fromkeys(tensors, path.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if number == 1:
        path.replace(folder / "model.safetensors")
    else:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", config)


def collect(named, limit):
    """Yield dicts of at most `limit` bytes from pairs (name, tensor); one dict exists at a time."""
    group, size = {}, 0
    for name, tensor in named:
        if group and size + tensor.nbytes > limit:
            yield group
            group.clear()
            size = 0
        group[name] = tensor.cpu()
        size += tensor.nbytes
    yield group


def save_safetensors(tensors, path):
    """Write {name: tensor} to one safetensors file, whole or not at all. Raises InputError."""
    partial = Path(f"{path}.partial")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        # safetensors lets only the owner read its files
        partial.chmod(0o644)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: could not be written ({error})") from None
    partial.replace(path)


@contextmanager
def whole(folder):
    """Yield an empty folder to write to, which takes the place of `folder` at the end."""
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    replace_folder(partial, folder)


def replace_folder(partial, folder):
    """Move the finished folder `partial` to `folder`, replacing what is there.

    Every file is synced first. If the machine fails between the two renames, the former folder
    still exists with ".old" appended to its name.
    """
    for file in partial.iterdir():
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# --- models ---


def dtype_name(module):
    return str(next(module.parameters()).dtype).removeprefix("torch.")


def statistics(tower):
    """Return {"mean", "std"} of a tower's pixels, lists of three numbers."""
    normalize = tower.normalize
    return {"mean": normalize.mean.flatten().tolist(), "std": normalize.std.flatten().tolist()}


def save_tower(tower, folder):
    """Write a tower as transformers reads it: weights, config, statistics of the pixels."""
    save_checkpoint(folder, *hugging_face(tower))
    save_processor(tower, folder)


def hugging_face(tower):
    """Translate a vision tower into Hugging Face's layout -> ({name: tensor}, config dict).

    Raises InputError if transformers has no class for it.
    """
    layout, model_type = tower.layout, tower.config.model_type
    if not layout.architecture:
        raise InputError(f"transformers has no class for {model_type}, so it cannot be written")
    config = {"architectures": [layout.architecture], "dtype": dtype_name(tower)} | layout.fixed
    for key, value in asdict(tower.config).items():
        if value is not None and key not in HEADS:
            config[key] = value
    return their_tensors(tower, layout), config


def their_tensors(module, layout):
    """Return a module's tensors under a layout's names, without classification heads."""
    tensors = {}
    for name, tensor in module.state_dict().items():
        if not name.startswith(HEADS):
            for theirs, ours in reversed(layout.names.items()):
                name = name.replace(ours, theirs)
            tensors[layout.saved_prefix + name] = tensor
    return tensors


def save_processor(tower, folder):
    """Write preprocessor_config.json: how images are resized, their mean and std."""
    R, processor = tower.config.image_size, tower.layout.processor
    square = {"height": R, "width": R}
    numbers = statistics(tower)
    config = {
        "image_processor_type": processor,
        "size": {"shortest_edge": R} if processor == "CLIPImageProcessor" else square,
        "do_center_crop": True,
        "crop_size": square,
        "image_mean": numbers["mean"],
        "image_std": numbers["std"],
    }
    write_json(Path(folder) / "preprocessor_config.json", config)


def save_clip(clip, folder):
    """Write a checkpoint that transformers reads as CLIPModel, without a tokenizer."""
    width = {"projection_dim": clip.visual_projection.out_features}
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": dtype_name(clip),
        "vision_config": asdict(clip.vision.config) | width,
        "text_config": asdict(clip.text.config) | width,
    }
    save_checkpoint(folder, their_tensors(clip, WHOLE_CLIP), config | width)
    save_processor(clip.vision, folder)


def llm_tensors(llm):
    """Return {name in Hugging Face's causal language models: tensor}."""
    tensors = {}
    for name, parameter in llm.named_parameters():
        tensors[name if name.startswith("lm_head.") else f"model.{name}"] = parameter
    return tensors


def write_llama(config):
    """Return what config.json holds for a LlamaConfig. transformers reads it, too."""
    values = asdict(config)
    if config.no_rope_layers:
        name = "SmolLM3"
    elif config.qkv_bias or config.qk_norm:
        name = "Qwen2" if config.qkv_bias else "Qwen3"
        values["use_sliding_window"] = config.sliding_window is not None
    else:
        name = "Llama" if config.sliding_window is None else "Mistral"
    return {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower()} | values


def save_llm(llm, folder):
    """Write a folder that from_pretrained and transformers' AutoModelForCausalLM read."""
    config = llm.config.to_dict() | {"torch_dtype": dtype_name(llm)}
    save_checkpoint(folder, llm_tensors(llm), config)


def save_mllm(model, folder, tensors=None):
    """Write everything that MLLM.from_pretrained needs; the folder appears whole or not at all.

    tensors: pairs (name, tensor) instead of the model's own.
    """
    config = {
        "model_type": "mllm",
        "template": model.template,
        "connector": model.connector.spec(),
        "vision": [asdict(tower.config) for tower in model.vision],
        "llm": model.llm.config.to_dict(),
    }
    processor = model.spec.config() | {"towers": [statistics(tower) for tower in model.vision]}
    with whole(folder) as partial:
        save_in_files(partial, tensors or model.state_dict().items(), config)
        model.tokenizer.save(str(partial / "tokenizer.json"))
        write_json(partial / "preprocessor_config.json", processor)
