"""Other people's multimodal checkpoints: what their tensors are called, what their configs say, and how they become an MLLM.

One design, LLaVA's (arXiv 2304.08485; LLaVA-1.5: 2310.03744), in two layouts. `0` stands for every block:

    ours                       llava-hf/llava-1.5-*                          liuhaotian/llava-v1.5-*, HuanjinYao/DenseConnector-*
    vision.0.blocks.0 ...      vision_tower.vision_model.encoder.layers.0    model.vision_tower.vision_tower.vision_model...
    connector.mm_projector.0   multi_modal_projector.linear_1                model.mm_projector.0
    connector.mm_projector.2   multi_modal_projector.linear_2                model.mm_projector.2
    llm.layers.0 ...           language_model.model.layers.0 ...             model.layers.0 ...
    llm.lm_head                language_model.lm_head                        lm_head
    config.json                model_type llava; vision_config, text_config  the LLM's keys, and mm_vision_tower, mm_...

transformers 5 names the same tensors of the first layout model.vision_tower..., model.language_model.layers..., lm_head; both are
read. In the second the tower may be in the file, or beside it: a folder or a Hugging Face id, mm_vision_tower says which.
The Dense Connector's releases look through SigLIP-so400m at 384, whose last block no connector reads and no file holds.
"""
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn

import mllm
from clip import CLIPVision, CLIPVisionConfig, SigLIPVision, SigLIPVisionConfig
from connector import ConnectorConfig
from dialogue import find_template, load_tokenizer
from hub import InputError, fields_of, load_weights, locate, on_meta, open_safetensors, read_config, tensor_files
from images import ImageSpec
from vit import pixel_statistics

DENSE = ("sti", "sci", "dci", "efficient")                           # mm_dense_connector_type; the last one is ours
# what transformers' LlamaConfig is without a config, and so what a text_config leaves out
VICUNA_7B = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
LLM_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2", "llava_phi": "phi"}
CLIP_L = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, patch_size=14)
KNOWN_TOWERS = {                                                     # which LLaVA's configs name without describing them
    "openai/clip-vit-large-patch14": CLIPVisionConfig(**CLIP_L, image_size=224),
    "openai/clip-vit-large-patch14-336": CLIPVisionConfig(**CLIP_L, image_size=336),
    "google/siglip-so400m-patch14-384": SigLIPVisionConfig(hidden_size=1152, num_hidden_layers=27, num_attention_heads=16,
                                                           intermediate_size=4304, image_size=384, patch_size=14)}
TOWER = "model.vision_tower.vision_tower."


class WithoutTower(nn.ModuleDict):
    """What a file holds of a model whose tower lies beside it."""


def is_foreign(config):
    """Is this config.json's object that of one of the two layouts?"""
    return "mm_vision_tower" in config or config.get("model_type") == "llava"


def load(folder, config, dtype, device):
    """A folder of either layout -> MLLM, ready to generate. Raises InputError."""
    names = tensor_files(folder)
    model, module, rename = read(folder, config, names, dtype, device)
    idle = None
    if idle_block(model.vision[0], names):
        idle = model.vision[0].blocks.pop(-1)
    load_weights(module, folder, rename, dtype, device)
    if idle is not None:                                             # zeros: x + 0, and nobody reads it
        model.vision[0].blocks.append(idle.to_empty(device=device).to(dtype))
        for parameter in idle.parameters():
            nn.init.zeros_(parameter)
    return model.eval()


def read(folder, config, names, dtype=torch.float32, device="cpu"):
    """config.json's object and the names of the tensors beside it -> MLLM on the meta device, the part of it that the file
    holds (all, or all but the tower, which is then loaded already), and the `rename` that hub.load_weights wants."""
    try:
        if "mm_vision_tower" in config:
            return read_llava(folder, config, names, dtype, device)
        return read_llava_hf(folder, config)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: config.json is not that of a LLaVA ({error!r})") from None


def expect(folder, config, key, values, default):
    """config[key], where absence means `default`. InputError unless it is one of `values`."""
    value = config.get(key, default)
    if value not in values:
        raise InputError(f"{folder}/config.json: {key} is {value!r}; what can be read is {' or '.join(map(repr, values))}")
    return value


def make_llm(config, folder):
    kind = mllm.llm_class(config.get("model_type", "llama"), folder)
    return kind(kind.config_class.from_dict(config, folder))


# --- llava-hf ---------------------------------------------------------------------------------------------------------

def read_llava_hf(folder, config):
    spec, text, vision = ImageSpec.from_folder(folder), config["text_config"], config["vision_config"]
    if text.get("model_type", "llama") == "llama":
        text = VICUNA_7B | text
    tower_type, tower_config = mllm.tower_class(vision.get("model_type", "clip_vision_model"), folder)
    act = expect(folder, config, "projector_hidden_act", ("gelu", "linear"), "gelu")
    if act == "linear":
        check_identity(folder)
    with on_meta():
        tower = tower_type(fields_of(tower_config, vision, folder), spec.mean, spec.std)
        expect(folder, config, "vision_feature_layer", (-2, tower.config.num_hidden_layers - 1), -2)
        expect(folder, config, "vision_feature_select_strategy", ("default" if tower.num_prefix_tokens else "full",), "default")
        llm = make_llm(text, folder)
        model = mllm.MLLM([tower], llm, ConnectorConfig("linear" if act == "linear" else "mlp"), load_tokenizer(folder),
                          find_template(folder) or "vicuna_v1", spec)
    projector = {"linear_1": "mm_projector"} if act == "linear" else {"linear_1": "mm_projector.0", "linear_2": "mm_projector.2"}

    def rename(name):
        part, _, rest = name.removeprefix("model.").partition(".")
        if part == "vision_tower":
            return within("vision.0.", tower.name_of(rest))
        if part in ("language_model", "lm_head"):
            return within("llm.", llm.name_of(rest if part == "language_model" else name))
        if part == "multi_modal_projector":
            linear, _, leaf = rest.partition(".")
            return within("connector.", projector.get(linear) and f"{projector[linear]}.{leaf}")
        return name                                                  # ours has nothing of that name: left over
    return model, model, rename


def within(part, name):
    return None if name is None else part + name


def check_identity(folder):
    """A single linear map is written as two, the second of which does nothing (see export.py). InputError if it does."""
    for name, file in tensor_files(folder).items():
        if "multi_modal_projector.linear_2." in name:
            with open_safetensors(file) as opened:
                tensor = opened.get_tensor(name)
            idle = torch.eye(len(tensor)).to(tensor.dtype) if tensor.dim() == 2 else torch.zeros_like(tensor)
            if not torch.equal(tensor, idle):
                raise InputError(f"{file}: {name} is not the identity, and two linear maps in a row are no connector of ours")


# --- LLaVA's own ------------------------------------------------------------------------------------------------------

def read_llava(folder, config, names, dtype, device):
    projector = expect(folder, config, "mm_projector_type", ("linear", "mlp2x_gelu"), "linear")
    dense = expect(folder, config, "mm_dense_connector_type", (*DENSE, "none", None), None)
    if dense in DENSE:
        expect(folder, config, "mm_projector_type", ("mlp2x_gelu",), "linear")
    aspect = expect(folder, config, "image_aspect_ratio", ("pad", "square", None), None)
    expect(folder, config, "mm_vision_select_feature", ("patch",), "patch")
    expect(folder, config, "mm_use_im_start_end", (False, None), False)
    kind = dense if dense in DENSE else {"linear": "linear", "mlp2x_gelu": "mlp"}[projector]
    inside = any(name.startswith(TOWER) for name in names)
    tower, tower_folder = describe_tower(folder, config, inside)
    if not inside:
        tower = type(tower).from_pretrained(tower_folder, dtype, device)
    if not isinstance(tower, SigLIPVision):                          # there it says nothing: their code takes the last of 26
        expect(folder, config, "mm_vision_select_layer", (-2,), -2)
    if (tower_folder / "preprocessor_config.json").exists():
        spec = ImageSpec.from_folder(tower_folder)
    else:
        spec = ImageSpec(tower.config.image_size, "stretch" if isinstance(tower, SigLIPVision) else "crop", *tower.statistics)
    if aspect == "pad":
        spec = replace(spec, mode="pad", resize_to=None)
    template = find_template(folder) or "vicuna_v1"
    if "template" not in config and template == "chatml":            # the LLM's chat template; the authors trained with their own
        template = "chatml_direct"
    if "template" not in config and template == "llama_3" and dense in DENSE:
        template = "llama_3_dense"
    with on_meta():
        llm = make_llm(config | {"model_type": LLM_TYPES.get(config["model_type"], config["model_type"])}, folder)
        model = mllm.MLLM([tower], llm, ConnectorConfig(kind), load_tokenizer(folder), template, spec)

    def rename(name):
        if name.startswith(TOWER):
            return within("vision.0.", tower.name_of(name.removeprefix(TOWER)))
        if name.startswith("model.mm_projector."):
            return "connector." + name.removeprefix("model.")
        return within("llm.", llm.name_of(name))
    return model, model if inside else WithoutTower({"connector": model.connector, "llm": llm}), rename


def describe_tower(folder, config, inside):
    """The tower that config.json names -> it on the meta device, and the folder that says how it wants its pictures: for one
    in the file the checkpoint's own, else the one where it lies."""
    name = config["mm_vision_tower"]
    known = next((shape for known, shape in KNOWN_TOWERS.items() if Path(known).name == Path(name).name), None)
    stated = config.get("mm_vision_config")                          # export.py's, for towers that have no public name
    if inside and (stated or known):
        tower_folder = folder
    else:
        tower_folder = folder / name if (folder / name).is_dir() else locate(name)
        stated = read_config(tower_folder)
    kind = stated["model_type"] if stated else known.model_type
    tower_type, tower_config = mllm.tower_class(kind, tower_folder)
    shape = fields_of(tower_config, stated.get("vision_config", stated), tower_folder) if stated else known
    if not issubclass(tower_type, CLIPVision):
        raise InputError(f"{folder}: its tower {name} is {kind}; in this layout CLIP and SigLIP can be read")
    with on_meta():
        return tower_type(shape, *pixel_statistics(tower_folder, *tower_type.statistics)), tower_folder


def idle_block(tower, names):
    """Does the file leave out SigLIP's last block? The authors drop it, since hidden[L-1] is the deepest that is read."""
    last = f"vision_model.encoder.layers.{len(tower.blocks) - 1}.layer_norm1.weight"
    return isinstance(tower, SigLIPVision) and any(n.startswith(TOWER) for n in names) and TOWER + last not in names


# --- a connector alone ------------------------------------------------------------------------------------------------

def load_connector(model, path):
    """A connector alone into an MLLM's: LLaVA's mm_projector as safetensors, or the connector of a whole checkpoint. `path`: a
    .safetensors file, a folder with some, or a Hugging Face id. Raises InputError where it is another connector."""
    pickled = ".bin", ".pt", ".pth"
    path = Path(path) if Path(path).suffix in (".safetensors", *pickled) else locate(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files and (path / "model").is_dir():
        raise InputError(f"{path}: is a run; name its {path}/model, or one of {path}/checkpoints")
    if path.suffix in pickled or not files:
        raise InputError(f"{path}: a connector is read from safetensors; pickled ones (mm_projector.bin) can run any code: "
                         "convert it with torch.load(..., weights_only=True) and safetensors.torch.save_file")
    if not files[0].exists():
        raise InputError(f"{path}: no such file or folder")
    parameters, found = dict(model.connector.named_parameters()), {}
    for file in files:
        with open_safetensors(file) as opened:
            for name in opened.keys():
                ours = name.removeprefix("model.").replace("multi_modal_projector.linear_1", "connector.mm_projector.0")
                ours = ours.replace("multi_modal_projector.linear_2", "connector.mm_projector.2")
                if ours.startswith(("mm_projector.", "connector.")):
                    found[ours.removeprefix("connector.")] = name, opened.get_tensor(name)
    kind = f"the {model.connector_config.kind} connector"
    config = read_config(path) if path.is_dir() and (path / "config.json").exists() else {}
    if config.get("model_type") == "mllm":                           # our own says more than names and shapes do
        theirs, here = (replace(of, kind=of.kind.replace("dense", "dci")) for of in
                        (ConnectorConfig(**config["connector"]), model.connector_config))
        if theirs != here:
            raise InputError(f"{path}: has another connector, {theirs}, not {here}")
    for name in parameters.keys() - found.keys():
        raise InputError(f"{path}: tensor {name} of {kind} is missing")
    for ours, (name, tensor) in found.items():
        if ours not in parameters:
            raise InputError(f"{path}: tensor {name} is left over: this is not {kind}")
        if tensor.shape != parameters[ours].shape:
            raise InputError(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, that of {kind} here "
                             f"{tuple(parameters[ours].shape)}")
    with torch.no_grad():
        for ours, (_, tensor) in found.items():
            parameters[ours].copy_(tensor)
