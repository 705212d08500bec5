"""Find a checkpoint, read its config, and put its tensors into a module.

A checkpoint is a folder in Hugging Face layout: `config.json` beside `model.safetensors`, or beside
`model.safetensors.index.json` and the shards that it lists. It is named by its folder or by its Hugging Face id
("openai/clip-vit-large-patch14-336", "@revision" may follow); an id is looked up in the local cache, then on the hub.
huggingface_hub downloads, so its environment holds: HF_HOME (where the cache is), HF_TOKEN (for gated and private
repositories), HF_HUB_OFFLINE=1 (cache only), HF_ENDPOINT (a mirror).

Weights reach a module without a second copy in memory: the module is built on the meta device (shapes, no storage),
then every parameter is *assigned* from the memory-mapped file. Nothing is initialised in between, so nothing can be left
half-initialised: a tensor that the module needs and the file lacks, one left over, or one of another shape is an
`InputError` that names it. Pickled weights (`pytorch_model.bin`) are refused, since unpickling runs code.
"""
import hashlib
import json
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: what is wrong, where, and what to do.
    Commands print it and exit with status 2."""


NEEDED = ["config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
          "tokenizer_config.json", "tokenizer.model", "added_tokens.json", "chat_template.jinja", "chat_template.json",
          "*.safetensors", "*.safetensors.index.json"]
OTHERS = ["*/*", "consolidated*", "open_clip*", "*fp16*"]            # the same weights once more, for another program
CONVERTED = "converted-to-safetensors"                               # our name in the cache for what the hub's bot converted
LARGE = 1e9                                                          # numbers from which a copy in another dtype is avoided
PAUSES = (2, 10)                                                     # seconds before trying again, where the hub itself fails


def locate(folder_or_id):
    """A folder, or a Hugging Face id with an optional @revision -> Path of a folder on this machine.
    Raises InputError if there is none."""
    folder = Path(folder_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise InputError(f"{folder}: is a file; a model is a folder (and a picture is named by --image=)")
    name, _, revision = str(folder_or_id).partition("@")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"{folder_or_id}: no such folder (and not a Hugging Face id, which looks like owner/name)")
    from huggingface_hub import constants, errors, utils             # imported here: it is slow, and folders need none of it
    try:
        folder = from_cache(name, revision)
        if folder is None:                                           # of all processes of a node, torchrun's too, the first
            lock = Path(constants.HF_HUB_CACHE, ".locks", f"{name.replace('/', '--')}.lock")     # downloads, the others wait
            lock.parent.mkdir(parents=True, exist_ok=True)           # and then find it in the cache
            with utils.WeakFileLock(lock):
                folder = from_cache(name, revision) or download(name, revision)
        return folder
    except InputError:
        raise
    except errors.HFValidationError:
        raise InputError(f"{folder_or_id}: no such folder, and not a Hugging Face id (owner/name)") from None
    except errors.GatedRepoError:
        raise InputError(f"{name}: gated repository; accept its licence on the hub, then set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{name}: this repository has no revision {revision}") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{name}: neither a folder nor a repository on the hub (private ones need HF_TOKEN)") from None
    except Exception as error:                                       # the clients of several versions raise anything at all
        if status_of(error) in (401, 403):
            raise InputError(f"{name}: the hub refuses access ({status_of(error)}): HF_TOKEN is wrong, or may not read it") from None
        if constants.HF_HUB_OFFLINE:
            raise InputError(f"{name}: no such folder, not (or not whole) in the local cache {constants.HF_HUB_CACHE}, and "
                             "HF_HUB_OFFLINE forbids downloading: unset it, or name a folder") from None
        reason = f"status {status_of(error)}" if status_of(error) else root_of(error)
        raise InputError(f"{name}: no such folder, not in the local cache, and downloading it failed ({reason}); "
                         "try again (finished files are kept), or name a folder") from None


def from_cache(name, revision):
    """The snapshot in the local cache -> its folder, or None if it is not there or not whole: whoever has used only a
    model's tokenizer, or only its weights, has less than we need."""
    import huggingface_hub
    for wanted in [revision] if revision else ["main", CONVERTED]:
        try:
            folder = Path(huggingface_hub.snapshot_download(repo_id=name, revision=wanted, local_files_only=True,
                                                            allow_patterns=NEEDED, ignore_patterns=OTHERS))
        except huggingface_hub.errors.LocalEntryNotFoundError:
            continue
        index = folder / "model.safetensors.index.json"
        weights = set(read_index(index).values()) if index.exists() else {"model.safetensors"}
        others = "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"
        if all((folder / file).exists() for file in weights) and any((folder / file).exists() for file in others):
            return folder
    return None


def download(name, revision):
    """The files that we need from the hub -> folder of the snapshot. Where the repository's own weights are pickled, those
    of the pull request in which the hub's bot offers them as safetensors: true of some of the oldest, most used ones."""
    import huggingface_hub
    folder = snapshot(name, revision or "main")
    if revision or any(folder.glob("*.safetensors")) or huggingface_hub.constants.HF_HUB_OFFLINE:
        return folder
    for pull in huggingface_hub.get_repo_discussions(name, author="SFconvertbot", discussion_type="pull_request"):
        if pull.author == "SFconvertbot" and pull.title == "Adding `safetensors` variant of this model":
            print(f"{name}: pickled weights; taking the hub's conversion to safetensors, @{pull.git_reference}", file=sys.stderr)
            folder = snapshot(name, pull.git_reference)
            (folder.parents[1] / "refs" / CONVERTED).write_text(folder.name)       # so that the cache knows it offline
            break
    return folder


def snapshot(name, revision):
    """snapshot_download, tried again where the hub itself fails (5xx), and its weights held against their checksums."""
    import huggingface_hub
    for pause in (*PAUSES, None):
        try:
            folder = Path(huggingface_hub.snapshot_download(repo_id=name, revision=revision, allow_patterns=NEEDED,
                                                            ignore_patterns=OTHERS))
            break
        except Exception as error:
            if pause is None or (status_of(error) or 0) < 500:
                raise
            time.sleep(pause)
    for link in folder.glob("*.safetensors"):                        # the cache names a large file by its SHA-256 and links
        if link.is_symlink() and len(digest := Path(os.readlink(link)).name) == 64:    # to it; the client checks sizes only
            with open(link, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == digest:
                    continue
            (folder / os.readlink(link)).unlink()
            link.unlink()
            raise InputError(f"{name}: {link.name} arrived damaged (its SHA-256 is not {digest[:12]}...) and was deleted: try again")
    return folder


def status_of(error):
    """The HTTP status behind an exception of huggingface_hub, or None."""
    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    return error and error.response.status_code


def root_of(error):
    """What an exception goes back to, in a few words: the client wraps "no route to host" in a paragraph of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]


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
        read = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a checkpoint folder needs one") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON, line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError, OSError) as error:           # no UTF-8, numbers or nesting beyond Python's limits
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not isinstance(read, dict):
        raise InputError(f"{path}: should hold an object, holds a {type(read).__name__}")
    return read


def read_config(folder):
    """The checkpoint's config.json -> dict."""
    return read_json(Path(folder) / "config.json")


def fields_of(cls, config, folder):
    """The keys of `config` that are fields of the dataclass `cls`, as cls(**them). A field without a default that config.json lacks
    is an InputError."""
    values = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
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
        weight_map = read_index(index)
        for name, shard in weight_map.items():
            if Path(shard).name != shard or shard in ("", ".."):
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
    if (folder / "model" / "config.json").exists():
        raise InputError(f"{folder}: is a run; its model is {folder / 'model'}")
    if (folder / "checkpoints").is_dir():
        raise InputError(f"{folder}: is a run that has not come to its end: train.py --resume --out={folder}")
    raise InputError(f"{folder}: no checkpoint in this folder (no model.safetensors, no model.safetensors.index.json; "
                     "pickled weights are not even downloaded)")


def read_index(path):
    """model.safetensors.index.json -> {tensor name: name of the shard that holds it}."""
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{path}: has no weight_map from tensor names to shards")
    return weight_map


def open_safetensors(path, device="cpu"):
    """safe_open with an error that names the file. On CPU its tensors are views of the memory-mapped file."""
    try:
        return safe_open(path, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file, truncated or damaged ({error})") from None


class NothingToFill(TorchFunctionMode):
    """On the meta device, whatever would fill a tensor in place (normal_, zeros_, ...) does nothing, quickly: the first
    random number on that device would import torch's compiler, which takes longer than to load a model."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        tensor, name = args[0] if args else (kwargs or {}).get("tensor"), getattr(function, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and isinstance(tensor, torch.Tensor) and tensor.is_meta:
            return tensor
        return function(*args, **(kwargs or {}))


@contextmanager
def on_meta():
    """Modules built in here have shapes, but neither storage nor initial values: load_weights gives them both."""
    with NothingToFill(), torch.device("meta"):
        yield


def match(module, shapes, rename, folder, files={}):
    """Which tensor becomes which parameter of `module` -> {parameter: (tensor name, part, parts)}. Needs no weights: `shapes`
    is {tensor name: shape}, and the module may be on the meta device.

    rename(name): the module's name for the checkpoint's tensor `name`; None for one that is left out on purpose; several
    names for one that is cut along its first axis into as many equal parts (q, k and v in one matrix).
    Raises InputError naming the tensor that is missing, left over, or of another shape, and its file of `files`."""
    parameters = dict(module.named_parameters())
    source, left_over = {}, []
    for name in shapes:
        ours = rename(name)
        parts = [ours] if isinstance(ours, str) else ours or []
        for part, ours in enumerate(parts):
            if ours not in parameters or ours in source:
                left_over.append(name)
            source[ours] = (name, part, len(parts))
    missing = [ours for ours in parameters if ours not in source]
    for what, names in (("missing", missing), ("left over", left_over)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{folder}: tensor {names[0]}{more} {what}: this checkpoint does not fit "
                             f"{type(module).__name__} as its config.json describes it")
    for ours, (name, _, parts) in source.items():
        wanted = tuple(parameters[ours].shape)
        if parts > 1:
            wanted = (parts * wanted[0], *wanted[1:])
        if tuple(shapes[name]) != wanted:
            raise InputError(f"{files.get(name, folder)}: tensor {name} has shape {tuple(shapes[name])}, the config asks "
                             f"for {wanted}")
    return source


def load_weights(module, folder, rename, dtype=torch.float32, device="cpu"):
    """Assign a checkpoint's tensors to `module`, which was built under `on_meta()`, and return it. `rename`: see
    match. dtype None: as stored. Buffers are not loaded: modules build theirs from the config, on a real device, and they move to
    `device` here. Raises InputError naming the tensor that is missing, left over, or of another shape or kind."""
    files, shapes, kinds = tensor_files(folder), {}, {}
    for file in dict.fromkeys(files.values()):                       # headers alone: nothing is read that does not fit
        with open_safetensors(file) as opened:
            headers = {name: opened.get_slice(name) for name in opened.keys() if files.get(name) == file}
            shapes |= {name: header.get_shape() for name, header in headers.items()}
            kinds |= {name: header.get_dtype() for name, header in headers.items()}
    source = match(module, shapes, rename, folder, files)
    others = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1 and dtype == torch.bfloat16 and torch.device(device).type == "cpu"
    if others and sum(math.prod(shapes[name]) for name, *_ in source.values() if kinds[name] != "BF16") >= LARGE:
        files = in_bf16({name: files[name] for name, *_ in source.values()})

    loaded, direct = {}, torch.device(device).type in ("cpu", "cuda")  # safetensors reads straight into these two
    for file in dict.fromkeys(files[name] for name, *_ in source.values()):
        with open_safetensors(file, device if direct else "cpu") as opened:
            for ours, (name, part, parts) in source.items():
                if files[name] == file:
                    tensor = read(opened, name, file)
                    loaded[ours] = (tensor.chunk(parts)[part] if parts > 1 else tensor).to(device=device, dtype=dtype)
    for ours, tensor in loaded.items():
        parent, _, leaf = ours.rpartition(".")
        setattr(module.get_submodule(parent), leaf, torch.nn.Parameter(tensor))
    for child in module.modules():
        for name, buffer in child._buffers.items():
            child._buffers[name] = buffer.to(device)
    return module


def read(opened, name, file):
    """One tensor of an opened file, as stored."""
    try:
        tensor = opened.get_tensor(name)
    except SafetensorError as error:
        raise InputError(f"{file}: tensor {name} cannot be read ({error})") from None
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise InputError(f"{file}: tensor {name} has dtype {tensor.dtype}; only float ones are read")
    return tensor


def in_bf16(files):
    """{tensor name: file} -> the same of a bfloat16 copy on the disk, which the first of a node's processes writes and keeps: all
    of them map it, where each would else hold a copy of its own. Without room on the disk each does."""
    from huggingface_hub import constants, utils
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in dict.fromkeys(files.values())]
    folder = Path(constants.HF_HOME, "mllm-bf16", hashlib.sha256(repr(states + sorted(files)).encode()).hexdigest()[:16])
    partial = folder.with_suffix(".partial")

    def tensors():
        for file in dict.fromkeys(files.values()):
            with open_safetensors(file) as opened:
                yield from ((name, read(opened, name, file).to(torch.bfloat16)) for name in files if files[name] == file)

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with utils.WeakFileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                print(f"{states[0][0]}: not bfloat16; writing a copy that this machine's processes share to {folder}", flush=True)
                shutil.rmtree(partial, ignore_errors=True)           # of a process that was killed
                save_in_files(partial, tensors(), {}, limit=1e8)
                partial.rename(folder)
    except (OSError, InputError) as error:
        print(f"{folder}: cannot be written ({error}); every process holds its own copy", file=sys.stderr, flush=True)
        shutil.rmtree(partial, ignore_errors=True)
        return files
    return tensor_files(folder)


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


def dtype_to_answer(folder_or_id, device, bf16=None):
    """In what a model that learns nothing is loaded -> torch.bfloat16 on CUDA, and where the checkpoint's largest tensor takes 16
    bits a number on the disk: 13 GB would be 26 in float32. Else torch.float32. `bf16` true or false decides it."""
    if bf16 is not None or torch.device(device).type == "cuda":
        return torch.float32 if bf16 is False else torch.bfloat16
    return torch.bfloat16 if stored(folder_or_id)[1] else torch.float32


def stored(folder_or_id):
    """What the headers of a checkpoint's files say -> (how many numbers it has, whether its largest tensor has 16 bits each)."""
    numbers, largest, halved = 0, 0, False
    for path in dict.fromkeys(tensor_files(locate(folder_or_id)).values()):
        with open_safetensors(path) as file:
            for name in file.keys():
                header = file.get_slice(name)
                count = math.prod(header.get_shape())
                numbers += count
                if count > largest:
                    largest, halved = count, header.get_dtype() in ("BF16", "F16")
    return numbers, halved


def save_checkpoint(folder, tensors, config):
    """Write `config.json` and `model.safetensors` ({name: tensor}). The weights are written under another name, synced, then
    renamed: a checkpoint that exists is whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_in_files(folder, named, config, limit=5e9):
    """As save_checkpoint, for a model that may not fit into memory: of `named`, pairs (name, tensor) that are made one by one, at
    most `limit` bytes are held, then written to a file of their own. Several come with an index; one is model.safetensors."""
    folder, held, files = Path(folder), {}, []
    folder.mkdir(parents=True, exist_ok=True)
    size = lambda tensors: sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def write():
        path = folder / f"model-{len(files) + 1:05d}.safetensors"
        save_safetensors(held, path)
        files.append((path, list(held), size(held.values())))
        held.clear()

    for name, tensor in named:
        if held and size([*held.values(), tensor]) > limit:
            write()
        held[name] = tensor.detach().cpu()
    write()
    if len(files) == 1:
        files[0][0].rename(folder / "model.safetensors")
    else:
        index = {"metadata": {"total_size": sum(written for *_, written in files)},
                 "weight_map": {name: path.name for path, names, _ in files for name in names}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_safetensors(tensors, path):
    """{name: tensor} -> one safetensors file, whole or not there at all (temporary file, fsync, rename)."""
    partial = Path(f"{path}.partial")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
        partial.chmod(0o644)                                         # safetensors would leave it to its owner alone
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:                      # no room on the disk, above all
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: could not be written ({error})") from None
    partial.replace(path)
