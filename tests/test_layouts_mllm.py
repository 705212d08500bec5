"""The layouts of public multimodal models, as their index lists them: every tensor has its parameter.

Names and shapes are written down, not asked of our modules. Two public numbers check the tables: how long the index is (in
kB, as the hub shows it: all names and shards, so a name too many or too long shows) and how large the weights are (in GB).
No weights are needed: the model is on the meta device.
"""
import json
import math

import pytest
from make_llava_tokenizer import make_tokenizer

import llava
from hub import match

LLAMA = """
model.embed_tokens.weight V C
model.layers.*.input_layernorm.weight C
model.layers.*.self_attn.q_proj.weight C C
model.layers.*.self_attn.k_proj.weight K C
model.layers.*.self_attn.v_proj.weight K C
model.layers.*.self_attn.o_proj.weight C C
model.layers.*.post_attention_layernorm.weight C
model.layers.*.mlp.gate_proj.weight F C
model.layers.*.mlp.up_proj.weight F C
model.layers.*.mlp.down_proj.weight C F
model.norm.weight C
lm_head.weight V C
"""
VISION = """
embeddings.patch_embedding.weight D 3 P P
embeddings.position_embedding.weight S D
post_layernorm.weight D
post_layernorm.bias D
encoder.layers.*.layer_norm1.weight D
encoder.layers.*.layer_norm1.bias D
encoder.layers.*.layer_norm2.weight D
encoder.layers.*.layer_norm2.bias D
encoder.layers.*.self_attn.q_proj.weight D D
encoder.layers.*.self_attn.q_proj.bias D
encoder.layers.*.self_attn.k_proj.weight D D
encoder.layers.*.self_attn.k_proj.bias D
encoder.layers.*.self_attn.v_proj.weight D D
encoder.layers.*.self_attn.v_proj.bias D
encoder.layers.*.self_attn.out_proj.weight D D
encoder.layers.*.self_attn.out_proj.bias D
encoder.layers.*.mlp.fc1.weight E D
encoder.layers.*.mlp.fc1.bias E
encoder.layers.*.mlp.fc2.weight D E
encoder.layers.*.mlp.fc2.bias D
"""
CLIP = VISION + """
embeddings.class_embedding D
pre_layrnorm.weight D
pre_layrnorm.bias D
"""
SIGLIP = VISION + "embeddings.patch_embedding.bias D\n"
PROJECTOR = """
{0}.weight C W
{0}.bias C
{1}.weight C C
{1}.bias C
"""
CLIP_L = dict(D=1024, E=4096, P=14, S=577)
SO400M = dict(D=1152, E=4304, P=14, S=729)

LLAVA_HF = dict(                                                     # config.json of llava-hf/llava-1.5-7b-hf
    architectures=["LlavaForConditionalGeneration"], ignore_index=-100, image_token_index=32000, model_type="llava",
    pad_token_id=32001, projector_hidden_act="gelu", tie_word_embeddings=False, vision_feature_layer=-2,
    text_config=dict(_name_or_path="lmsys/vicuna-7b-v1.5", architectures=["LlamaForCausalLM"], max_position_embeddings=4096,
                     model_type="llama", rms_norm_eps=1e-5, torch_dtype="float16", vocab_size=32064),
    vision_config=dict(hidden_size=1024, image_size=336, intermediate_size=4096, model_type="clip_vision_model",
                       num_attention_heads=16, num_hidden_layers=24, patch_size=14, projection_dim=768, vocab_size=32000),
    vision_feature_select_strategy="default")


def dense(V, C, F, L, H, G, **others):
    """What the Dense Connector's code writes into config.json."""
    return dict(model_type="llava_llama", vocab_size=V, hidden_size=C, intermediate_size=F, num_hidden_layers=L,
                num_attention_heads=H, num_key_value_heads=G, rms_norm_eps=1e-5, hidden_act="silu", tie_word_embeddings=False,
                mm_vision_tower="google/siglip-so400m-patch14-384", mm_hidden_size=3456, mm_projector_type="mlp2x_gelu",
                mm_dense_connector_type="dci", mm_vision_select_layer=-2, mm_vision_select_feature="patch",
                mm_patch_merge_type="flat", mm_use_im_start_end=False, mm_use_im_patch_token=False, image_aspect_ratio="pad",
                is_video=False) | others


def table(text, blocks, sizes, prefix="", head=""):
    """Lines "name letters" -> {name: shape}; `*` is every block; `prefix` goes before all names, `head` before lm_head."""
    found = {}
    for line in text.split("\n"):
        if line:
            name, *letters = line.split()
            shape = tuple(sizes[letter] if letter in sizes else int(letter) for letter in letters)
            name = (head if name.startswith("lm_head") else prefix) + name
            found |= {name.replace("*", str(i)): shape for i in range(blocks)} if "*" in name else {name: shape}
    return found


def llava_hf_tensors():
    sizes = dict(V=32064, C=4096, K=4096, F=11008)
    return (table(LLAMA, 32, sizes, "language_model.", "language_model.")
            | table(CLIP, 24, CLIP_L, "vision_tower.vision_model.")
            | table(PROJECTOR.format("linear_1", "linear_2"), 0, dict(C=4096, W=1024), "multi_modal_projector."))


def newer(tensors):
    """The same in transformers 5's naming."""
    rename = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.",
              "vision_tower.": "model.vision_tower.", "multi_modal_projector.": "model.multi_modal_projector."}
    return {next(new + name.removeprefix(old) for old, new in rename.items() if name.startswith(old)): shape
            for name, shape in tensors.items()}


def dense_tensors(blocks, tower=SIGLIP, tower_blocks=26, vision=SO400M, W=3456, **sizes):
    return (table(LLAMA, blocks, sizes)
            | table(tower, tower_blocks, vision, "model.vision_tower.vision_tower.vision_model.")
            | table(PROJECTOR.format("mm_projector.0", "mm_projector.2"), 0, dict(C=sizes["C"], W=W), "model."))


LLAVA = dense(32000, 4096, 11008, 32, 32, 32, model_type="llava", mm_vision_tower="openai/clip-vit-large-patch14-336",
              mm_hidden_size=1024, mm_dense_connector_type=None)
# release -> config.json, tensors, shards, kB of the index, GB of the weights (None: this naming is not on the hub)
RELEASES = {
    "llava-hf/llava-1.5-7b-hf": (LLAVA_HF, llava_hf_tensors(), 3, 70.1, 14.13),
    "the same, named by transformers 5": (LLAVA_HF, newer(llava_hf_tensors()), 3, None, None),
    "HuanjinYao/DenseConnector-v1.5-7B": (dense(32000, 4096, 11008, 32, 32, 32),
                                          dense_tensors(32, V=32000, C=4096, K=4096, F=11008), 3, 77.0, 14.34),
    "HuanjinYao/DenseConnector-v1.5-13B": (dense(32000, 5120, 13824, 40, 40, 40),
                                           dense_tensors(40, V=32000, C=5120, K=5120, F=13824), 6, 82.9, 26.91),
    "HuanjinYao/DenseConnector-v1.5-8B": (dense(128256, 4096, 14336, 32, 32, 8, rope_theta=500000.0),
                                          dense_tensors(32, V=128256, C=4096, K=1024, F=14336), 4, 77.0, 16.93),
    "LLaVA-1.5 in its own layout, tower inside": (LLAVA, dense_tensors(32, CLIP, 24, CLIP_L, 1024, V=32000, C=4096, K=4096,
                                                                       F=11008), 3, None, None)}


@pytest.mark.parametrize("release", RELEASES)
def test_every_tensor_of_a_release_has_its_parameter(release, tmp_path):
    """match raises if one is missing, left over or of another shape. Of the towers that LLaVA's layout only names, depth and
    width are known; SigLIP's 27th block, which no connector reads, is in none of the files."""
    config, tensors, *_ = RELEASES[release]
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    if config is LLAVA_HF:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict(
            crop_size={"height": 336, "width": 336}, do_center_crop=True, image_processor_type="CLIPImageProcessor", resample=3,
            image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711],
            size={"shortest_edge": 336})))
    model, module, rename = llava.read(tmp_path, config, tensors)
    siglip = "siglip" in config.get("mm_vision_tower", "")
    assert module is model and llava.idle_block(model.vision[0], tensors) == siglip
    if siglip:
        model.vision[0].blocks.pop(-1)
    source = match(module, tensors, rename, tmp_path)
    assert {name for name, *_ in source.values()} == set(tensors)
    assert model.tokens_per_image == (729 if siglip else 576)
    assert (model.spec.size, model.spec.mode) == ((384, "pad") if siglip else (336, "crop" if config is LLAVA_HF else "pad"))
    assert model.spec.mean[0] == (0.5 if siglip else 0.48145466)


@pytest.mark.parametrize("release", [name for name in RELEASES if RELEASES[name][3]])
def test_the_table_is_as_long_and_as_large_as_the_public_files(release):
    """The index as transformers writes it. The hub rounds to 0.1 kB and 0.01 GB, a shard."""
    _, tensors, shards, index_kb, weights_gb = RELEASES[release]
    total = sum(2 * math.prod(shape) for shape in tensors.values())
    places = {name: f"model-00001-of-{shards:05d}.safetensors" for name in tensors}
    assert round(len(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2)) / 1000, 1) == index_kb
    assert abs(total / 1e9 - weights_gb) < 0.005 * shards
