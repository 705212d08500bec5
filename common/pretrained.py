"""Read a checkpoint: its config, and its tensors into a module.

A checkpoint is a folder in Hugging Face layout: `config.json`, and `model.safetensors` or
`model.safetensors.index.json` with its shards. It is named by its folder or by its Hugging Face id
("facebook/dinov2-large", optionally with "@revision"), which hub.py downloads.

Weights reach a module without a second copy in memory: the module is built on the meta device
(shapes, no storage), then each parameter is assigned from the memory-mapped file. A tensor that is
missing, left over or of another shape is an InputError that names it, so no parameter can silently
keep an initial value. Pickled weights (`pytorch_model.bin`) are refused, because unpickling can run
any code.

Towers, LLMs and whole models inherit from_pretrained from here. save.py writes them.
"""

import json
import math
import pkgutil
import threading
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from common import timm
from common.cli import find_class
from common.errors import InputError
from common.grid import views
from common.layouts import LLAMA, ROPE_KEYS
from common.save import save_llm, save_tower

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# on_meta exchanges a method of Tensor, which all threads see.
ONE_THREAD = threading.RLock()
LARGE = 1e9  # number of parameters from which a second copy in memory is avoided


# --- its folder and JSON files ---


def locate(folder_or_id):
    """Return the folder of a checkpoint; a Hugging Face id is downloaded. Raises InputError."""
    folder = Path(folder_or_id)
    if folder.is_dir():
        return folder
    from common import hub  # imported here: it is slow, and folders do not need it

    return hub.find(str(folder_or_id))


def read_json(path):
    """Read a JSON file that holds an object -> dict. Raises InputError."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: should hold an object, holds a {type(value).__name__}")
    return value


def read_config(folder):
    """Read a checkpoint's config.json -> dict. Raises InputError."""
    return read_json(Path(folder) / "config.json")


def fields_of(cls, config):
    """Make a dataclass from the keys of `config` that are its fields.

    A key that is missing or null keeps the field's default. A field without default is required.
    """
    names = cls.__dataclass_fields__
    return cls(**{name: config[name] for name in names if config.get(name) is not None})


def read_processor(folder):
    """Read the image processor of a checkpoint -> (its file, dict). The dict is {} without one.

    It is preprocessor_config.json, or "image_processor" in transformers 5's processor_config.json.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = Path(folder) / name
        if path.exists():
            config = read_json(path)
            return path, config.get("image_processor", config)
    return folder, {}


def read_statistics(folder):
    """Read the pixel mean and std of a checkpoint -> (mean, std): three numbers each, or None."""
    _, fields = read_processor(folder)
    return fields.get("image_mean"), fields.get("image_std")


# --- its tensors ---


def tensor_files(folder):
    """Find the file of each tensor of a checkpoint -> {tensor name: path}. Raises InputError."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        with open_safetensors(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not index.exists():
        raise InputError(
            f"{folder}: no safetensors in this folder. A run has them in its folder model. Pickled "
            "weights (.bin, .pt) can run any code: convert them, or name a revision that has "
            "safetensors (owner/name@revision)"
        )
    present = [path.name for path in folder.iterdir()]
    files = {}
    for name, shard in read_json(index).get("weight_map", {}).items():
        # in this folder: an index from outside must not lead elsewhere
        if shard not in present:
            raise InputError(f"{index}: {name} should be in {shard}, which is not in this folder")
        files[name] = folder / shard
    return files


def entries(files):
    """Yield (tensor name, its open file) of a checkpoint; files: see tensor_files."""
    for path in sorted(set(files.values())):
        with open_safetensors(path) as opened:
            for name in opened.keys():
                if files.get(name) == path:
                    yield name, opened


def open_safetensors(path):
    """Open a safetensors file, whose tensors are memory-mapped. Raises InputError."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: a truncated or damaged safetensors file ({error})") from None


def stored(folder_or_id):
    """Read file headers -> (number of parameters, whether the largest tensor has 16 bits)."""
    sizes = []
    for name, opened in entries(tensor_files(locate(folder_or_id))):
        header = opened.get_slice(name)
        sizes.append((math.prod(header.get_shape()), header.get_dtype()))
    return sum(size for size, _ in sizes), max(sizes)[1] in ("BF16", "F16")


# --- its tensors in a module ---


@contextmanager
def on_meta(where="a checkpoint"):
    """Build modules that have shapes but no storage; load_weights gives them their weights.

    A config that no module can be built from is an InputError, which names `where`.
    """
    # normal_ on the meta device would import torch's compiler: that is slower than loading a model
    no_normal = mock.patch.object(torch.Tensor, "normal_", lambda tensor, *_, **__: tensor)
    try:
        with ONE_THREAD, no_normal, torch.device("meta"):
            yield
    except InputError:
        raise
    except Exception as error:  # modules raise many kinds
        raise InputError(f"{where}: no model fits its config.json ({error!r})") from None


def import_class(classes, config, where):
    """Import the class of a config's model_type. classes: {"module.Class": model_types}."""
    # timm names the network instead, such as convnext_large_mlp; LLaMA's first files name nothing
    default = config.get("architecture", "llama").partition("_")[0]
    paths = {name: path for path, names in classes.items() for name in names}
    model_type = config.get("model_type", default)
    return pkgutil.resolve_name(find_class(paths, model_type, f"{where}: model_type"))


def build_part(classes, config, where, *statistics):
    """Build the tower or LLM that a config describes: from_config of its class."""
    return import_class(classes, config, where).from_config(config, where, *statistics)


def load_part(classes, folder, dtype=torch.float32, device="cpu"):
    """Load a tower or LLM: from_pretrained of its class. Raises InputError."""
    return import_class(classes, read_config(folder), folder).from_pretrained(folder, dtype, device)


def match(module, shapes, rename, folder):
    """Find the place of each tensor -> {tensor name: names of the parameters, in order}.

    shapes: {tensor name: shape} of the checkpoint. The module may be on the meta device.
    rename(tensor name): the parameter's name; None to leave the tensor out; a list of names for a
    tensor that is cut along its first axis (q, k and v in one matrix). Raises InputError for a
    tensor that is missing, left over or of another shape.
    """
    parameters = module.state_dict()
    places, missing, left_over = {}, set(parameters), []
    for name in shapes:
        targets = rename(name) or []
        places[name] = [targets] if isinstance(targets, str) else targets
        # also a second tensor for one parameter
        if not missing.issuperset(places[name]):
            left_over.append(name)
        missing.difference_update(places[name])
    for what, names in (("missing", missing), ("left over", left_over)):
        if names:
            raise InputError(
                f"{folder}: {len(names)} tensor(s) {what}, such as {min(names)}: this checkpoint "
                f"does not fit {type(module).__name__} as its config.json describes it"
            )
    for name, targets in places.items():
        for target in targets:
            expected = list(parameters[target].shape)
            if len(targets) > 1:
                expected[0] *= len(targets)
            if list(shapes[name]) != expected:
                shape = f"has shape {shapes[name]}, the config asks for {expected}"
                raise InputError(f"{folder}: tensor {name} {shape}")
    return places


def load_weights(module, folder, rename, dtype=torch.float32, device="cpu", files=None):
    """Assign a checkpoint's tensors to a module that was built under on_meta, and return it.

    rename: see match. dtype None: as stored. files: see tensor_files. Buffers outside state_dict
    are not loaded: modules compute them, and they move to `device` here. Raises InputError.
    """
    files = files or tensor_files(folder)
    shapes = {name: opened.get_slice(name).get_shape() for name, opened in entries(files)}
    places = match(module, shapes, rename, folder)
    loaded = {}
    for name, opened in entries(files):
        for part, target in enumerate(places[name]):
            tensor = opened.get_tensor(name)
            if len(places[name]) > 1:
                tensor = tensor.chunk(len(places[name]))[part]
            loaded[target] = tensor.to(device=device, dtype=dtype)
    # assigned only now, so that an error leaves the module as it was
    module.load_state_dict(loaded, assign=True)
    return module.to(device)


# --- towers, LLMs and whole models ---


class Pretrained(nn.Module):
    """A module that is read from a checkpoint. A subclass has from_folder and name_of."""

    @classmethod
    def from_pretrained(cls, folder_or_id, dtype=torch.float32, device="cpu"):
        """Load a folder or a Hugging Face id, ready to use; dtype None: as stored.

        Raises InputError.
        """
        folder = locate(folder_or_id)
        with on_meta(folder):
            model = cls.from_folder(folder)
        return load_weights(model, folder, model.name_of, dtype, device).eval()

    def name_of(self, name):
        """Translate a tensor's name in the file into ours. None: a tensor that is not loaded."""
        return name


class PretrainedTower(Pretrained):
    """What a vision tower can do besides computing: read and write checkpoints, check, freeze.

    A subclass has a config_class and layouts.
    """

    layouts = {}  # model_type -> layouts.Layout, for each that the tower reads
    any_resolution = False  # False: takes only the image_size of its config
    # Mini-Gemini: 1 resizes larger images to image_size; 2 does so with the whole and 2 x 2 crops
    crops = 0
    after_blocks = ()  # parameters that no hidden state depends on
    save_pretrained = save_tower

    @property
    def layout(self):
        return self.layouts[self.config.model_type]

    def statistics(self, mean, std):
        """Return the mean and std of the pixels; None: the usual ones of the model_type."""
        default = self.layout.statistics
        return mean or default[0], std or default[1]

    @classmethod
    def from_config(cls, config, where, mean=None, std=None):
        """Build a tower from config.json's object, that of a whole CLIP too. Raises InputError."""
        layout = find_class(cls.layouts, config.get("model_type", ""), f"{where}: model_type")
        config = layout.defaults | config.get("vision_config", config) | layout.fixed
        return cls(fields_of(cls.config_class, config), mean, std)

    @classmethod
    def from_folder(cls, folder):
        """Build the tower that a checkpoint describes."""
        config, statistics = read_config(folder), read_statistics(folder)
        if "architecture" in config:
            config, statistics = timm.read(config, folder)
        # the weights show whether there is a head; config.json omits the default, 2 classes
        names = tensor_files(folder)
        config["distilled_head"] = "distillation_classifier.weight" in names
        has_head = any(name.endswith(("classifier.weight", "head.weight")) for name in names)
        config["num_labels"] = len(config.get("id2label", "ab")) if has_head else 0
        return cls.from_config(config, folder, *statistics)

    def name_of(self, name):
        return our_name(self.layout, name)

    def num_patches(self, side):
        """Return N for images of side x side pixels."""
        if not self.any_resolution:
            side = self.config.image_size
        return (side // self.config.patch_size) ** 2

    def shape(self, side):
        """Return L, D, N for images of side x side pixels, and model_type: connector.Tower."""
        c = self.config
        return c.num_hidden_layers, c.hidden_size, self.num_patches(side), c.model_type

    def read_pixels(self, pixels, dtype):
        """Check and normalize uint8 pixels (B, 3, R, R); with crops (see above), resize them too.

        Two crops a side make five images of each, in this order: whole, crops row by row.
        """
        shape = tuple(pixels.shape)
        if pixels.dtype != torch.uint8 or shape[1:] != (3, shape[-1], shape[-1]):
            raise InputError(f"pixels should be uint8 (B, 3, R, R), got {pixels.dtype} {shape}")
        self.check_size(shape[-1])
        x = self.normalize(pixels, torch.float32)
        if self.crops and not self.any_resolution:
            x = F.interpolate(x, self.crops * self.config.image_size, mode="bilinear")
            x = views(x, self.crops)
        return x.to(dtype)

    def check_size(self, side):
        """Raise InputError unless this tower takes images of side x side pixels."""
        R, P = self.config.image_size, self.config.patch_size
        if self.any_resolution and (side % P or not side):
            raise InputError(f"image size {side}: must be a multiple of the patch size {P}")
        if not self.any_resolution and side != R and not (self.crops and side > R):
            raise InputError(f"image size {side}: this tower takes only {R}, as in its training")

    def freeze_above(self, deepest):
        """Set requires_grad to False for all parameters that hidden[deepest] does not depend on."""
        self.blocks[deepest:].requires_grad_(False)
        for name, parameter in self.named_parameters():
            if name.startswith(self.after_blocks):
                parameter.requires_grad_(False)


def our_name(layout, name):
    """Translate a tensor's name in a layout into ours. None: a tensor that is not loaded."""
    for prefix in layout.prefixes:
        name = name.removeprefix(prefix)
    if name.startswith(tuple(layout.ignored)):
        return None
    for theirs, ours in layout.names.items():
        name = name.replace(theirs, ours)
    if ".qkv." in name:
        # one matrix, which is cut into three
        return [name.replace("qkv", part) for part in "qkv"]
    return name


def build_clip(cls, vision_class, text_class, folder):
    """Build a `cls`, which is clip.CLIP, with configs of these classes. Raises InputError."""
    config = read_config(folder)
    vision = fields_of(vision_class, config.get("vision_config", {}))
    text = fields_of(text_class, config.get("text_config", {}))
    return cls(vision, text, config.get("projection_dim", 512), *read_statistics(folder))


class PretrainedLLM(Pretrained):
    """An LLM. Parameters have the checkpoints' names without the prefix "model.".

    A subclass has a config_class with from_dict and to_dict.
    """

    save_pretrained = save_llm

    @classmethod
    def from_config(cls, config, where):
        """Build an LLM from config.json's object. Raises InputError."""
        return cls(cls.config_class.from_dict(config, where))

    @classmethod
    def from_folder(cls, folder):
        """Build the LLM that a checkpoint describes."""
        model = cls.from_config(read_config(folder), folder)
        # Some chat models list their end tokens only here.
        generation = folder / "generation_config.json"
        if generation.exists():
            c = model.config
            c.eos_token_id = read_json(generation).get("eos_token_id", c.eos_token_id)
        return model

    def name_of(self, name):
        is_copy = name == "lm_head.weight" and self.config.tie_word_embeddings
        # early files also hold RoPE's frequencies
        if is_copy or name.endswith("rotary_emb.inv_freq"):
            return None
        return name.removeprefix("model.")


def read_llama(cls, config, where):
    """Build llama.LlamaConfig, which `cls` is, from config.json's object. Raises InputError."""
    model_type = config.get("model_type", "llama")
    config = find_class(LLAMA, model_type, f"{where}: model_type") | config
    config |= read_rope(config, where)
    has_window = model_type.startswith("qwen") and config.get("use_sliding_window")
    if model_type != "mistral" and not has_window:
        config["sliding_window"] = None
    if config.get("hidden_act", "silu") != "silu":
        raise InputError(f"{where}: hidden_act is {config['hidden_act']!r}, must be silu")
    types = config.get("layer_types") or []
    first = config.get("max_window_layers", 0) if config.get("sliding_window") else len(types)
    expected = ["full_attention"] * first + ["sliding_attention"] * len(types)
    if types != expected[: len(types)]:
        raise InputError(f"{where}: layer_types must give the window to all layers from {first} on")
    return make_config(cls, config)


def read_rope(config, where):
    """Read {"rope_theta", "rope_scaling"} from config.json's object, of either age."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    keys = find_class(ROPE_KEYS, rope_type, f"{where}: rope_type")
    scaling = {"rope_type": rope_type} | {key: rope[key] for key in keys}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    return {"rope_theta": theta, "rope_scaling": None if rope_type == "default" else scaling}


def longest_text(config):
    """Return how many tokens a prompt and its answer may have together."""
    scaling = config.rope_scaling or {}
    # Linear scaling stretches the length in the file; Llama 3.1's file already has the result.
    factor = scaling["factor"] if scaling.get("rope_type") == "linear" else 1
    return int(config.max_position_embeddings * factor)


def make_config(cls, values):
    """Build the config dataclass `cls` from its fields."""
    config = fields_of(cls, values)
    # In the file, null means that no token ends a text.
    config.eos_token_id = values.get("eos_token_id", config.eos_token_id)
    return config


def check_tokens(config, tokens):
    """Raise InputError for a token of the tokenizer that has no embedding in the LLM."""
    if tokens.max() >= config.vocab_size:
        raise InputError(f"token {tokens.max()} of the tokenizer has no embedding in the LLM")


def read_parts(folder, towers, llms):
    """Build what a folder of save.save_mllm describes -> towers, LLM, config.json's object.

    towers, llms: see import_class. Raises InputError.
    """
    config, built = read_config(folder), []
    if config.get("model_type") != "mllm":
        raise InputError(f"{folder}: is not a multimodal model")
    processor = read_json(folder / "preprocessor_config.json")
    for fields, numbers in zip(config["vision"], processor["towers"], strict=True):
        built.append(build_part(towers, fields, folder, numbers["mean"], numbers["std"]))
    return built, build_part(llms, config["llm"], folder), config


def ranges_to_json(layers):
    """Write the ranges in lists of layers as [start, stop]; ranges_from_json reads them."""
    return [[[x.start, x.stop] if isinstance(x, range) else x for x in tower] for tower in layers]


def ranges_from_json(layers):
    return [[range(*x) if isinstance(x, list) else x for x in tower] for tower in layers]
