"""Find a checkpoint, read its config, and put its tensors into a module.

A checkpoint is a folder in Hugging Face layout: `config.json` beside `model.safetensors`, or beside
`model.safetensors.index.json` and the shards that it lists. It is named by its folder or by its Hugging Face id
("openai/clip-vit-large-patch14-336", "@revision" may follow); an id is looked up in the local cache, then on the hub.

Weights reach a module without a second copy in memory: the module is built on the meta device (shapes, no storage),
then every parameter is *assigned* from the memory-mapped file. Nothing is initialised in between, so nothing can be left
half-initialised: a tensor that the module needs and the file lacks, one left over, or one of another shape is an
`InputError` that names it. Pickled weights (`pytorch_model.bin`) are refused, since unpickling runs code.
"""
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: what is wrong, where, and what to do.
    Commands print it and exit with status 2."""


def locate(folder_or_id):
    """A folder, or a Hugging Face id with an optional @revision -> Path of a folder on this machine.
    Raises InputError if there is none."""
    folder = Path(folder_or_id).expanduser()
    if folder.is_dir():
        return folder
    name, _, revision = str(folder_or_id).partition("@")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"{folder_or_id}: no such folder (and not a Hugging Face id, which looks like owner/name)")
    import huggingface_hub                                           # imported here: it is slow, and folders need none of it
    from huggingface_hub import errors
    wanted = dict(repo_id=name, revision=revision or None, allow_patterns=["*.json", "*.safetensors"])
    try:
        try:
            folder = Path(huggingface_hub.snapshot_download(**wanted, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            folder = None
        if folder and any(folder.glob("*.safetensors")):             # the cache may hold no more than, say, its tokenizer
            return folder
        return Path(huggingface_hub.snapshot_download(**wanted))
    except errors.HFValidationError:
        raise InputError(f"{folder_or_id}: no such folder, and not a Hugging Face id (owner/name)") from None
    except errors.GatedRepoError:
        raise InputError(f"{name}: gated repository; accept its licence on the hub, then set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{name}: neither a folder nor a repository on the hub (private ones need HF_TOKEN)") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"{name}: no such folder, not in the local cache, and the hub cannot be reached "
                         f"({type(error).__name__}); download it once, or name its folder") from None


def newest_model(root="out"):
    """The multimodal model under `root` that was written last -> its folder. Raises InputError if there is none."""
    written = []
    for path in Path(root).rglob("config.json"):
        if path.parent.suffix not in (".partial", ".old") and read_config(path.parent).get("model_type") == "mllm":
            written.append((path.stat().st_mtime_ns, path.parent))
    if not written:
        raise InputError(f"no model under {root}/: train one first (python train.py), or name its folder (--model=...)")
    return max(written)[1]


def read_json(path):
    """A JSON file -> its object; InputError names the file, and the line where the JSON breaks."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a checkpoint folder needs one") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON, line {error.lineno}: {error.msg}") from None
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def read_config(folder):
    """The checkpoint's config.json -> dict."""
    config = read_json(Path(folder) / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder}/config.json: should hold an object, holds a {type(config).__name__}")
    return config


def fields_of(cls, config, folder, rename={}):
    """The keys of `config` that are fields of the dataclass `cls`, as cls(**them). `rename` maps field -> key where the
    checkpoint's key differs. A field without a default that config.json lacks is an InputError."""
    values = {name: config[rename.get(name, name)] for name in cls.__dataclass_fields__
              if config.get(rename.get(name, name)) is not None}
    try:
        return cls(**values)
    except TypeError as error:
        raise InputError(f"{folder}/config.json: {str(error).split('__init__() ')[-1]}") from None


def tensor_files(folder):
    """Where every tensor of a checkpoint lies: {tensor name: file}. One file, or the shards of an index."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        with open_safetensors(single) as file:
            return {name: single for name in file.keys()}
    if index.exists():
        stated = read_json(index)
        weight_map = stated.get("weight_map") if isinstance(stated, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise InputError(f"{index}: has no weight_map from tensor names to shards")
        for name, shard in weight_map.items():
            if Path(shard).name != shard:
                raise InputError(f"{index}: {name} points outside the folder ({shard})")
            if not (folder / shard).exists():
                raise InputError(f"{folder}/{shard}: missing shard, the index expects {name} in it")
        listed = {name: folder / shard for name, shard in weight_map.items()}
        for shard in set(listed.values()):                           # an index may lie: hold it against the shards
            with open_safetensors(shard) as file:
                held = set(file.keys())
            for name in sorted(name for name, place in listed.items() if place == shard and name not in held):
                raise InputError(f"{shard}: tensor {name} is missing, the index expects it here")
        return listed
    pickled = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise InputError(f"{folder}: only pickled weights ({pickled[0]}); unpickling can run any code, so they are refused: "
                         "convert them to safetensors, or take a revision that has them")
    raise InputError(f"{folder}: no checkpoint in this folder (no model.safetensors, no model.safetensors.index.json)")


def open_safetensors(path, device="cpu"):
    """safe_open with an error that names the file. On CPU its tensors are views of the memory-mapped file."""
    try:
        return safe_open(path, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file, truncated or damaged ({error})") from None


def load_weights(module, folder, rename, dtype=torch.float32, device="cpu"):
    """Assign a checkpoint's tensors to `module`, which was built under `torch.device("meta")`, and return it.

    rename(name): the module's name for the checkpoint's tensor `name`, or None for one that is left out on purpose.
    Buffers are not loaded: modules build theirs from the config, on a real device, and they move to `device` here.
    Raises InputError naming the tensor that is missing, left over, or of another shape or kind."""
    parameters = dict(module.named_parameters())
    source, left_over = {}, []
    for name, file in tensor_files(folder).items():
        ours = rename(name)
        if ours is None:
            continue
        if ours not in parameters or ours in source:
            left_over.append(name)
        source[ours] = (name, file)
    missing = [ours for ours in parameters if ours not in source]
    for what, names in (("missing", missing), ("left over", left_over)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{folder}: tensor {names[0]}{more} {what}: this checkpoint does not fit "
                             f"{type(module).__name__} as its config.json describes it")

    loaded, direct = {}, torch.device(device).type in ("cpu", "cuda")  # safetensors reads straight into these two
    for file in dict.fromkeys(file for _, file in source.values()):
        with open_safetensors(file, device if direct else "cpu") as opened:
            for ours, (name, place) in source.items():
                if place == file:
                    try:
                        loaded[ours] = opened.get_tensor(name)
                    except SafetensorError as error:
                        raise InputError(f"{file}: tensor {name} cannot be read ({error})") from None
                    if loaded[ours].shape != parameters[ours].shape:
                        raise InputError(f"{file}: tensor {name} has shape {tuple(loaded[ours].shape)}, the config asks "
                                         f"for {tuple(parameters[ours].shape)}")
                    if loaded[ours].dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                        raise InputError(f"{file}: tensor {name} has dtype {loaded[ours].dtype}; only float ones are read")
                    loaded[ours] = loaded[ours].to(device=device, dtype=dtype)
    for ours, tensor in loaded.items():
        parent, _, leaf = ours.rpartition(".")
        setattr(module.get_submodule(parent), leaf, torch.nn.Parameter(tensor))
    for child in module.modules():
        for name, buffer in child._buffers.items():
            child._buffers[name] = buffer.to(device)
    return module


def renamer(pairs, skip=()):
    """A `rename` for load_weights: names that start with one of `skip` are left out; in the others every (theirs, ours)
    of `pairs` is replaced in turn. `renamer([(ours, theirs) for theirs, ours in pairs])` goes the other way."""
    def rename(name):
        if name.startswith(tuple(skip)):
            return None
        for theirs, ours in pairs:
            name = name.replace(theirs, ours)
        return name
    return rename


def save_checkpoint(folder, tensors, config):
    """Write `config.json` and `model.safetensors` ({name: tensor}). The weights are written under another name, synced, then
    renamed: a checkpoint that exists is whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_safetensors(tensors, path):
    """{name: tensor} -> one safetensors file, whole or not there at all (temporary file, fsync, rename)."""
    partial = Path(f"{path}.partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    partial.chmod(0o644)                                             # safetensors would leave it to its owner alone
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)
