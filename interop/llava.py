"""Read LLaVA-1.5's, LLaVA-1.6's (LLaVA-NeXT), Mini-Gemini's and the Dense Connector's checkpoints.

One design (LLaVA, arXiv 2304.08485; LLaVA-1.5, 2310.03744) in two layouts. `0` is any block:

    ours                      llava-hf/llava-1.5-*, -v1.6-*    liuhaotian/llava-v1.5-*, -v1.6-*,
                                                               HuanjinYao/DenseConnector-*
    vision.0.blocks.0         vision_tower...layers.0          model.vision_tower...layers.0
    connector.mm_projector.0  multi_modal_projector.linear_1   model.mm_projector.0
    connector.mm_projector.2  multi_modal_projector.linear_2   model.mm_projector.2
    connector.image_newline   image_newline (1.6, AnyRes)      model.image_newline
    vision.1                  (Mini-Gemini: ConvNeXt)          model.vision_tower_aux
    connector.vlm_uni_*       (Mini-Gemini: patch mining)      model.vlm_uni_*
    llm.layers.0              language_model.model.layers.0    model.layers.0
    llm.lm_head               language_model.lm_head           lm_head
    config.json               vision_config, text_config       the LLM's keys, mm_vision_tower, ...

transformers 5 writes the first layout as model.vision_tower..., model.language_model.layers...,
lm_head; both are read. In the second layout the tower is in the file or in a folder or repository
that mm_vision_tower names. The Dense Connector's releases use SigLIP-so400m at 384; its last block
is in no file, since no connector reads it. Mini-Gemini (YanweiLi/MGM-7B, -HD, and with the Dense
Connector HuanjinYao/DenseConnector-with-mgm-7B) is in the second layout, its two towers included.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch.nn as nn

from clip import SigLIPVision
from common.images import ImageSpec
from common.layouts import FILE, SHAPES
from common.pretrained import (
    build_part,
    load_weights,
    locate,
    on_meta,
    read_config,
    read_statistics,
    tensor_files,
)
from connector import sparse_layers
from dialogue import find_template, load_tokenizer
from mllm import LLMS, MLLM, TOWERS

# values of mm_dense_connector_type, which are names in connector.py, too; efficient is ours
DENSE = ("sti", "sci", "dci", "efficient")
TOWER = "model.vision_tower.vision_tower."


def load(folder, config, dtype, device):
    """Load a folder of either layout, ready to generate. Raises InputError."""
    names = tensor_files(folder)
    model, rename, tower_folder = read(folder, config, names)
    tower, module = model.vision[0], model
    if tower_folder:
        load_weights(tower, tower_folder, tower.name_of, dtype, device)
        module = nn.ModuleDict({"connector": model.connector, "llm": model.llm})
    unused = tower.blocks.pop(-1) if lacks_last_block(tower, names) else None
    load_weights(module, folder, rename, dtype, device)
    if unused is not None:
        # Zeros, which no connector reads.
        tower.blocks.append(unused.to_empty(device=device).to(dtype))
        for parameter in unused.parameters():
            nn.init.zeros_(parameter)
    return model.eval()


def read(folder, config, names):
    """Build the MLLM on the meta device -> (model, `rename` of load_weights, the tower's folder).

    names: the tensors in the file. If the tower is among them, its folder is None.
    """
    reader = read_llava if "mm_vision_tower" in config else read_llava_hf
    with on_meta(folder):
        model, tower_folder = reader(folder, config, names)
    return model, partial(rename, model), tower_folder


def expect(config, key, default, *others):
    """Return config[key]. ValueError unless it is `default`, which it is if absent, or an other."""
    value, known = config.get(key, default), [default, *others]
    if value not in known:
        raise ValueError(f"{key} is {value!r}; only {' or '.join(map(repr, known))} can be read")
    return value


def rename(model, name):
    """Translate a tensor's name in either layout into ours. None: a tensor that is not loaded."""
    name = name.removeprefix("model.")
    prefixes = ("vision_tower.", "vision_tower_aux.")
    for i, (tower, prefix) in enumerate(zip(model.vision, prefixes, strict=False)):
        if name.startswith(prefix):
            ours = tower.name_of(name.replace(prefix, ""))
            return ours and f"vision.{i}.{ours}"
    ours = connector_name(name)
    if ours or name == "image_newline":
        return f"connector.{ours or name}"
    ours = model.llm.name_of(name.removeprefix("language_model."))
    return ours and f"llm.{ours}"


def connector_name(name):
    """Translate a tensor's name in any layout into the connector's; None for other parts."""
    name = name.removeprefix("model.")
    name = name.replace("multi_modal_projector.linear_1", "mm_projector.0")
    name = name.replace("multi_modal_projector.linear_2", "mm_projector.2")
    if name.startswith(("mm_projector.", "vlm_uni_")):
        return name
    return name.removeprefix("connector.") if name.startswith("connector.") else None


# ---- llava-hf ------------------------------------------------------------------------------------


def read_llava_hf(folder, config, names):
    spec = ImageSpec.from_folder(folder)
    text, vision = config["text_config"], config["vision_config"]
    if text.get("model_type", "llama") in ("llama", "mistral"):
        text = FILE["text_config"] | text
    # This key may be the whole model's.
    text = {"tie_word_embeddings": config.get("tie_word_embeddings")} | text
    expect(config, "projector_hidden_act", "gelu")
    vision = {"model_type": "clip_vision_model"} | vision
    tower = build_part(TOWERS, vision, folder, spec.mean, spec.std)
    depth = len(tower.blocks)
    layers = expect(config, "vision_feature_layer", -2, depth - 1, sparse_layers(depth))
    key = "vision_feature_select_strategy"
    expect({key: "default"} | config, key, "default" if tower.num_prefix_tokens else "full")
    llm = build_part(LLMS, text, folder)
    template = find_template(folder) or "vicuna_v1"
    if spec.mode == "anyres" and template == "chatml":
        template = "chatml_direct"
    connector = "sci" if isinstance(layers, list) else "mlp"
    return MLLM([tower], llm, connector, load_tokenizer(folder), template, spec), None


# ---- LLaVA's own ---------------------------------------------------------------------------------


def read_llava(folder, config, names):
    projector = expect(config, "mm_projector_type", "linear", "mlp2x_gelu")
    dense = expect(config, "mm_dense_connector_type", None, "none", *DENSE)
    expect(config, "mm_vision_select_feature", "patch")
    expect(config, "mm_use_im_start_end", False, None)
    connector = dense if dense in DENSE else "mlp"
    if projector == "linear":
        connector = "linear"
    is_inside = any(name.startswith(TOWER) for name in names)
    tower, tower_folder = describe_tower(folder, config, is_inside)
    is_siglip = isinstance(tower, SigLIPVision)
    if not is_siglip:
        # Of SigLIP the authors' code takes the last of 26 layers, whatever the config says.
        expect(config, "mm_vision_select_layer", -2)
    if (tower_folder / "preprocessor_config.json").exists():
        spec = ImageSpec.from_folder(tower_folder)
    else:
        mode = "stretch" if is_siglip else "crop"
        spec = ImageSpec(tower.config.image_size, mode, *map(tuple, tower.layout.statistics))
    mode = expect(config, "image_aspect_ratio", None, "pad", "square", "anyres")
    if mode in ("pad", "anyres"):
        # (width, height) here, (height, width) in llava-hf
        pinpoints = tuple(map(tuple, config.get("image_grid_pinpoints") or []))
        spec = replace(spec, mode=mode, resize_to=None, pinpoints=pinpoints)
    is_mistral = config["model_type"] == "llava_mistral"
    template = find_template(folder) or ("mistral_instruct" if is_mistral else "vicuna_v1")
    if "template" not in config:
        # The chat template is the LLM's. The authors trained with their own.
        if template == "chatml":
            template = "chatml_direct"
        if template == "llama_3" and dense in DENSE:
            template = "llama_3_dense"
    towers = [tower]
    if "mm_vision_tower_aux" in config:
        connector = read_mgm(config, tower.config.hidden_size)
        towers.append(build_part(TOWERS, {"model_type": "convnext"}, folder))
        spec = replace(spec, size=config["image_size_aux"])
    llm_type = FILE["llava_llms"].get(config["model_type"], config["model_type"])
    llm = build_part(LLMS, config | {"model_type": llm_type}, folder)
    model = MLLM(towers, llm, connector, load_tokenizer(folder), template, spec)
    # Mini-Gemini's files hold both towers.
    return model, None if is_inside or len(towers) > 1 else tower_folder


def read_mgm(config, width):
    """Return the spec of Mini-Gemini's connector; width: that of CLIP."""
    grid = expect(config, "image_grid", 1, 2)
    expect({"image_global": False} | config, "image_global", grid == 2)
    # The Dense Connector adds means as channels.
    groups = config["mm_hidden_size"] // width - 1
    return {"name": "mgm", "groups": groups, "hd": grid == 2}


def describe_tower(folder, config, is_inside):
    """Build the tower that config.json names -> (tower, its folder).

    The folder says how images are prepared: this one if the tower is in the file and known.
    """
    name, tower_folder = config["mm_vision_tower"], folder
    # interop.export describes towers that have no public name.
    named = {Path(public).name: shape for public, shape in SHAPES.items()}
    stated = config.get("mm_vision_config") or named.get(Path(name).name)
    if not (is_inside and stated):
        tower_folder = folder / name if (folder / name).is_dir() else locate(name)
        stated = read_config(tower_folder)
    return build_part(TOWERS, stated, tower_folder, *read_statistics(tower_folder)), tower_folder


def lacks_last_block(tower, names):
    """Say whether the file has the tower without its last block, as the authors' SigLIP."""
    block = TOWER + "vision_model.encoder.layers.{}.layer_norm1.weight"
    last = len(tower.blocks) - 1
    return block.format(last - 1) in names and block.format(last) not in names
