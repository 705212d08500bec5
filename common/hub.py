"""Find a checkpoint, read its config, and put its tensors into a module.

A checkpoint is a folder in Hugging Face layout: `config.json`, and `model.safetensors` or
`model.safetensors.index.json` with its shards. It is named by its folder or by its Hugging Face id
("facebook/dinov2-large", optionally with "@revision"). huggingface_hub downloads, retries and
caches, so its environment variables apply: HF_HOME (cache), HF_TOKEN (gated and private
repositories), HF_HUB_OFFLINE=1 (cache only), HF_ENDPOINT (mirror).

Weights reach a module without a second copy in memory: the module is built on the meta device
(shapes, no storage), then each parameter is assigned from the memory-mapped file. A tensor that is
missing, left over or of another shape is an InputError that names it, so no parameter can silently
keep an initial value. Pickled weights (`pytorch_model.bin`) are refused, because unpickling can run
any code.
"""

import json
import math
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from common.errors import InputError

NEEDED = [
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "*.safetensors",
    "*.safetensors.index.json",
]
# the same weights again, for other programs
IGNORED = ["*/*", "consolidated*", "open_clip*", "*fp16*"]
LARGE = 1e9  # number of parameters from which a second copy in memory is avoided


# --- find a checkpoint ---


def locate(folder_or_id):
    """Return the folder of a checkpoint; a Hugging Face id is downloaded. Raises InputError."""
    folder = Path(folder_or_id).expanduser()
    if folder.is_dir():
        return folder
    name, _, revision = str(folder_or_id).partition("@")
    if folder.is_file() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(
            f"{folder_or_id}: no such folder (and not a Hugging Face id, which is owner/name)"
        )
    try:
        return download(name, revision or None)
    except Exception as error:  # its HTTP clients raise many kinds
        raise InputError(f"{folder_or_id}: {explain(error)}") from None


def download(name, revision):
    """Download the files that we need, or find them in the cache -> folder of the snapshot."""
    import huggingface_hub as hub  # imported here: it is slow, and folders do not need it

    files = {"allow_patterns": NEEDED, "ignore_patterns": IGNORED}
    folder = Path(hub.snapshot_download(name, revision=revision, **files))
    if revision or any(folder.glob("*.safetensors")) or hub.constants.HF_HUB_OFFLINE:
        return folder
    # openai/clip-vit-large-patch14-336, for one, has safetensors only in the hub's own pull request
    for pull in hub.get_repo_discussions(name, author="SFconvertbot"):
        if pull.author == "SFconvertbot" and pull.is_pull_request:
            print(f"{name}: using its safetensors, @{pull.git_reference}", file=sys.stderr)
            return Path(hub.snapshot_download(name, revision=pull.git_reference, **files))
    return folder


def explain(error):
    """Say in one line why huggingface_hub found no checkpoint, and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return "gated repository: accept its license on the hub and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such folder or repository on the hub (a private one needs HF_TOKEN)"
    if constants.HF_HUB_OFFLINE:
        return "no such folder, not in the cache, and HF_HUB_OFFLINE forbids downloading: unset it"
    while error.__cause__ is not None:
        error = error.__cause__
    cause = " ".join(f"{type(error).__name__}: {error}".split())[:120]
    return f"no such folder, and downloading it failed ({cause}): try again, or name a folder"


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


# --- read its JSON files ---


def read_json(path):
    """Read a JSON file that holds an object -> dict. Raises InputError."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: should hold an object, holds a {type(value).__name__}")
    return value


def write_json(path, value):
    """Write a JSON file, indented."""
    Path(path).write_text(json.dumps(value, indent=2) + "\n")


def read_config(folder):
    """Read a checkpoint's config.json -> dict. Raises InputError."""
    return read_json(Path(folder) / "config.json")


def fields_of(cls, config, folder):
    """Make a dataclass from the keys of `config` that are its fields. Raises InputError.

    A key that is missing or null keeps the field's default. A field without default is required.
    """
    names = cls.__dataclass_fields__
    values = {name: config[name] for name in names if config.get(name) is not None}
    try:
        return cls(**values)
    except TypeError as error:
        raise InputError(f"{folder}/config.json: {str(error).split('__init__() ')[-1]}") from None


def read_processor(folder):
    """Read the image processor of a checkpoint -> (its file, dict). Without one: (None, {}).

    It is preprocessor_config.json, or "image_processor" in transformers 5's processor_config.json.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = Path(folder) / name
        if path.exists():
            config = read_json(path)
            fields = config.get("image_processor", config)
            if not isinstance(fields, dict):
                raise InputError(f"{path}: image_processor should be an object")
            return path, fields
    return None, {}


def read_statistics(folder):
    """Read the pixel mean and std of a checkpoint -> (mean, std): three numbers each, or None.

    Raises InputError.
    """
    path, fields = read_processor(folder)
    for key in ("image_mean", "image_std"):
        values = fields.get(key)
        if values and not (isinstance(values, list) and len(values) == 3):
            raise InputError(f"{path}: {key} should be three numbers")
    return fields.get("image_mean"), fields.get("image_std")


# --- read its tensors ---


def tensor_files(folder):
    """Find the file of each tensor of a checkpoint -> {tensor name: path}. Raises InputError."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        with open_safetensors(single) as file:
            return dict.fromkeys(file.keys(), single)
    if index.exists():
        return files_of_index(index)
    pickled = [path.name for path in sorted(folder.glob("*")) if path.suffix in PICKLED]
    if pickled:
        raise InputError(
            f"{folder}: has only pickled weights ({pickled[0]}), which can run any code: "
            "convert them to safetensors, or name a revision that has them (owner/name@revision)"
        )
    if (folder / "checkpoints").is_dir():
        raise InputError(
            f"{folder}: is a run: its model is {folder}/model when it has finished "
            f"(until then: train.py --resume --out={folder})"
        )
    raise InputError(f"{folder}: no safetensors in this folder (pickles are not downloaded)")


PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def files_of_index(index):
    """Read model.safetensors.index.json -> {tensor name: shard}, checked against the shards."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: has no weight_map from tensor names to shards")
    present = [path.name for path in index.parent.iterdir()]
    files = {}
    for name, shard in weight_map.items():
        # in this folder: an index from outside must not lead elsewhere
        if shard not in present:
            raise InputError(f"{index}: {name} should be in {shard}, which is not in this folder")
        files[name] = index.parent / shard
    missing = sorted(files.keys() - {name for name, _, _ in headers(files)})
    if missing:
        place = files[missing[0]]
        raise InputError(f"{place}: tensor {missing[0]} is missing, the index expects it here")
    return files


def headers(files):
    """Yield (tensor name, its shape, its dtype) from file headers; files: see tensor_files."""
    for path in sorted(set(files.values())):
        with open_safetensors(path) as opened:
            for name in opened.keys():
                if files.get(name) == path:
                    header = opened.get_slice(name)
                    yield name, header.get_shape(), header.get_dtype()


def open_safetensors(path, device="cpu"):
    """Open a safetensors file; on CPU its tensors are memory-mapped. Raises InputError."""
    try:
        return safe_open(path, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: not a readable safetensors file, truncated or damaged ({error})"
        ) from None


def read_tensor(opened, name, file):
    """Read one tensor of an opened file, in its stored dtype. Raises InputError."""
    try:
        tensor = opened.get_tensor(name)
    except SafetensorError as error:
        raise InputError(f"{file}: tensor {name} cannot be read ({error})") from None
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise InputError(f"{file}: tensor {name} has dtype {tensor.dtype}; only floats are read")
    return tensor


def stored(folder_or_id):
    """Read file headers -> (number of parameters, whether the largest tensor has 16 bits)."""
    total, largest, is_16_bit = 0, 0, False
    for _, shape, dtype in headers(tensor_files(locate(folder_or_id))):
        count = math.prod(shape)
        total += count
        if count > largest:
            largest, is_16_bit = count, dtype in ("BF16", "F16")
    return total, is_16_bit


def dtype_to_answer(folder_or_id, device, bf16=None):
    """Choose the dtype of a model that only answers.

    bf16 None: bfloat16 on CUDA and for a checkpoint that is stored in 16 bits, else float32.
    """
    if bf16 is None:
        bf16 = torch.device(device).type == "cuda" or stored(folder_or_id)[1]
    return torch.bfloat16 if bf16 else torch.float32


# --- put them into a module ---


class NoInitialization(TorchFunctionMode):
    """Skip in-place initialization (normal_, zeros_, ...) of tensors on the meta device.

    The first random number on that device would import torch's compiler, which takes longer than
    loading a model.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        name = getattr(function, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place and isinstance(tensor, torch.Tensor) and tensor.is_meta:
            return tensor
        return function(*args, **kwargs)


@contextmanager
def on_meta():
    """Build modules that have shapes but no storage; load_weights gives them their weights."""
    with NoInitialization(), torch.device("meta"):
        yield


def match(module, shapes, rename, folder, files=None):
    """Find the source of each parameter -> {parameter: (tensor name, part, number of parts)}.

    shapes: {tensor name: shape} of the checkpoint. The module may be on the meta device.
    rename(tensor name): the parameter's name; None to leave the tensor out; a list of names for a
    tensor that is cut along its first axis (q, k and v in one matrix). files: {tensor name: file},
    for the messages. Raises InputError for a tensor that is missing, left over or of another shape.
    """
    parameters = dict(module.named_parameters())
    source, left_over = {}, []
    for name in shapes:
        targets = rename(name) or []
        if isinstance(targets, str):
            targets = [targets]
        for part, target in enumerate(targets):
            if target not in parameters or target in source:
                left_over.append(name)
            source[target] = (name, part, len(targets))
    missing = [target for target in parameters if target not in source]
    for what, names in (("missing", missing), ("left over", left_over)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(
                f"{folder}: tensor {names[0]}{more} {what}: this checkpoint does not fit "
                f"{type(module).__name__} as its config.json describes it"
            )
    for target, (name, _, parts) in source.items():
        expected = list(parameters[target].shape)
        if parts > 1:
            expected[0] *= parts
        if list(shapes[name]) != expected:
            place = (files or {}).get(name, folder)
            raise InputError(
                f"{place}: tensor {name} has shape {tuple(shapes[name])}, "
                f"the config asks for {tuple(expected)}"
            )
    return source


def load_weights(module, folder, rename, dtype=torch.float32, device="cpu"):
    """Assign a checkpoint's tensors to a module that was built under on_meta(), and return it.

    rename: see match. dtype None: as stored. Buffers are not loaded: modules compute theirs from
    the config, and they move to `device` here. Raises InputError.
    """
    files = tensor_files(folder)
    shapes = {name: shape for name, shape, _ in headers(files)}
    source = match(module, shapes, rename, folder, files)
    # safetensors reads straight into these devices
    read_device = device if torch.device(device).type in ("cpu", "cuda") else "cpu"
    loaded = {}
    for path in sorted(set(files.values())):
        with open_safetensors(path, read_device) as opened:
            for target, (name, part, parts) in source.items():
                if files[name] != path:
                    continue
                tensor = read_tensor(opened, name, path)
                if parts > 1:
                    tensor = tensor.chunk(parts)[part]
                loaded[target] = tensor.to(device=device, dtype=dtype)
    # assigned only now, so that an error leaves the module as it was
    for target, tensor in loaded.items():
        parent, _, leaf = target.rpartition(".")
        setattr(module.get_submodule(parent), leaf, torch.nn.Parameter(tensor))
    for child in module.modules():
        for name, buffer in child._buffers.items():
            child._buffers[name] = buffer.to(device)
    return module


# --- write a checkpoint ---


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
        group[name] = tensor.detach().cpu()
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
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: could not be written ({error})") from None
    partial.replace(path)


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


def ranges_to_json(layers):
    """Write the ranges in lists of layers as [start, stop]; ranges_from_json reads them."""
    return [[[x.start, x.stop] if isinstance(x, range) else x for x in tower] for tower in layers]


def ranges_from_json(layers):
    return [[range(*x) if isinstance(x, list) else x for x in tower] for tower in layers]
