"""A small random checkpoint in the layout of the Dense Connector's releases, written name by name as their code names them."""
import json

import torch
from make_llava_tokenizer import make_tokenizer
from safetensors.torch import save_file

from clip import CLIPVision, CLIPVisionConfig, SigLIPVision, SigLIPVisionConfig
from llama import Llama, LlamaConfig


def wide(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return module.eval()


def make_folder(folder, dense, siglip):
    """dense: sti, sci, dci, or None for LLaVA-1.5 itself. Returns tower, projector and LLM, whose weights are in the folder."""
    shape = dict(hidden_size=16, intermediate_size=20, num_attention_heads=2, image_size=32, patch_size=8)
    tower = (SigLIPVision(SigLIPVisionConfig(num_hidden_layers=27, **shape)) if siglip else
             CLIPVision(CLIPVisionConfig(num_hidden_layers=24, **shape)))
    llm = wide(Llama(LlamaConfig(vocab_size=384, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                                 num_attention_heads=2, max_position_embeddings=512)), 1)
    channels = 48 if dense in ("sci", "dci") else 16
    projector = wide(torch.nn.Sequential(torch.nn.Linear(channels, 24), torch.nn.GELU(), torch.nn.Linear(24, 24)), 2)
    tensors, vision = {}, "model.vision_tower.vision_tower.vision_model."
    for name, tensor in wide(tower, 0).named_parameters():
        if name.startswith("blocks.26."):
            continue                                                 # the authors delete SigLIP's last block
        if name.startswith("blocks."):
            _, block, name = name.split(".", 2)
            for ours, theirs in {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}.items():
                name = name.replace(ours, theirs)
            for letter in "qkv":
                name = name.replace(f"attn.{letter}.", f"self_attn.{letter}_proj.")
            name = f"encoder.layers.{block}.{name}"
        else:
            name = {"patch.weight": "embeddings.patch_embedding.weight", "patch.bias": "embeddings.patch_embedding.bias",
                    "class_embedding": "embeddings.class_embedding",
                    "position_embedding": "embeddings.position_embedding.weight", "norm_pre.weight": "pre_layrnorm.weight",
                    "norm_pre.bias": "pre_layrnorm.bias", "norm_post.weight": "post_layernorm.weight",
                    "norm_post.bias": "post_layernorm.bias"}[name]
        tensors[vision + name] = tensor.detach()
    for name, tensor in llm.named_parameters():
        tensors[name if name.startswith("lm_head.") else f"model.{name}"] = tensor.detach()
    for name, tensor in projector.named_parameters():
        tensors[f"model.mm_projector.{name}"] = tensor.detach()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = dict(
        architectures=["LlavaLlamaForCausalLM"], model_type="llava_llama", vocab_size=384, hidden_size=24, intermediate_size=40,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, hidden_act="silu", rms_norm_eps=1e-6,
        max_position_embeddings=512, rope_theta=10000.0, rope_scaling=None, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=2, image_aspect_ratio="pad", mm_hidden_size=channels, mm_projector_type="mlp2x_gelu",
        mm_patch_merge_type="flat", mm_use_im_patch_token=False, mm_use_im_start_end=False, mm_vision_select_feature="patch",
        mm_vision_select_layer=-2, mm_vision_tower="google/siglip-small" if siglip else "openai/clip-small",
        mm_vision_config={**shape, "num_hidden_layers": 27 if siglip else 24,
                          "model_type": "siglip_vision_model" if siglip else "clip_vision_model"})
    (folder / "config.json").write_text(json.dumps(config | ({"mm_dense_connector_type": dense} if dense else {})))
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return tower, projector, llm
