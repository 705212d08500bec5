"""Write small random checkpoints of the Dense Connector and of Mini-Gemini."""

import json
from dataclasses import dataclass, field

import torch
from make_llava_tokenizer import make_tokenizer
from safetensors.torch import load_file, save_file

from clip import CLIPVision, CLIPVisionConfig, SigLIPVision, SigLIPVisionConfig
from interop.convnext import ConvNeXt, ConvNeXtConfig
from llama import Llama, LlamaConfig

BLOCK = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
BLOCK |= {f"attn.{letter}.": f"self_attn.{letter}_proj." for letter in "qkv"}
OUTER = {
    "patch.weight": "embeddings.patch_embedding.weight",
    "patch.bias": "embeddings.patch_embedding.bias",
    "class_embedding": "embeddings.class_embedding",
    "position_embedding": "embeddings.position_embedding.weight",
    "norm_pre.weight": "pre_layrnorm.weight",
    "norm_pre.bias": "pre_layrnorm.bias",
    "norm_post.weight": "post_layernorm.weight",
    "norm_post.bias": "post_layernorm.bias",
}


def wide(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return module.eval()


def their_name(name):
    """Translate our name of a tower's tensor by hand."""
    if not name.startswith("blocks."):
        return OUTER[name]
    _, block, name = name.split(".", 2)
    for ours, theirs in BLOCK.items():
        name = name.replace(ours, theirs)
    return f"encoder.layers.{block}.{name}"


def make_folder(folder, dense, siglip):
    """Return tower, projector and LLM of the folder. dense: sti, sci, dci, or None for LLaVA."""
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2}
    sizes |= {"image_size": 32, "patch_size": 8, "num_hidden_layers": 27 if siglip else 24}
    tower_class, config_class = CLIPVision, CLIPVisionConfig
    if siglip:
        tower_class, config_class = SigLIPVision, SigLIPVisionConfig
    tower = wide(tower_class(config_class(**sizes)), 0)
    text = {"vocab_size": 384, "hidden_size": 24, "intermediate_size": 40}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512}
    llm = wide(Llama(LlamaConfig(**text)), 1)
    channels = 48 if dense in ("sci", "dci") else 16
    first, last = torch.nn.Linear(channels, 24), torch.nn.Linear(24, 24)
    projector = wide(torch.nn.Sequential(first, torch.nn.GELU(), last), 2)
    tensors = {}
    for name, tensor in tower.named_parameters():
        # The authors delete SigLIP's last block.
        if not name.startswith("blocks.26."):
            name = f"model.vision_tower.vision_tower.vision_model.{their_name(name)}"
            tensors[name] = tensor.detach()
    for name, tensor in llm.named_parameters():
        prefix = "" if name.startswith("lm_head.") else "model."
        tensors[prefix + name] = tensor.detach()
    for name, tensor in projector.named_parameters():
        tensors[f"model.mm_projector.{name}"] = tensor.detach()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    model_type = "siglip_vision_model" if siglip else "clip_vision_model"
    config = text | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "image_aspect_ratio": "pad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-small" if siglip else "openai/clip-small",
        "mm_vision_config": sizes | {"model_type": model_type},
    }
    if dense:
        config["mm_dense_connector_type"] = dense
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return tower, projector, llm


@dataclass
class TinyConvNeXt(ConvNeXtConfig):
    depths: list = field(default_factory=lambda: [1, 1, 2, 1])
    hidden_sizes: list = field(default_factory=lambda: [4, 6, 8, 10])


def make_mini_gemini(folder, groups, grid):
    """Return CLIP, ConvNeXt and all tensors of the folder. groups, grid: of means, of crops."""
    clip, *_ = make_folder(folder, None, False)
    convnext, width = wide(ConvNeXt(TinyConvNeXt()), 3), 16
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in convnext.named_parameters():
        tensors[f"model.vision_tower_aux.vision_{name}"] = tensor.detach()
    channels = (1 + groups) * width
    for name, (inputs, outputs) in {"query": (16, 16), "aux": (28, 16), "val": (28, 16)}.items():
        layers = torch.nn.Sequential(torch.nn.LayerNorm(inputs), torch.nn.Linear(inputs, outputs))
        for key, tensor in wide(layers, 4).named_parameters():
            tensors[f"model.vlm_uni_{name}_projector.{key}"] = tensor.detach()
    tensors["model.mm_projector.0.weight"] = 0.2 * torch.randn(24, channels)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "mgm",
        "mm_vision_tower_aux": "model_zoo/OpenAI/openclip-convnext-large-d-320-laion2B-s29B",
        "mm_hidden_size": channels,
        "mm_hidden_size_aux": 28,
        "mm_hidden_size_uni": width,
        "image_size_aux": 96 * grid,
        "image_grid": grid,
        "image_global": grid == 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return clip, convnext, tensors
