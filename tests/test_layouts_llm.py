"""The layouts of public language models, as their index lists them: every tensor has its parameter.

What of a release's config.json bears on its tensors is here, too. Names and shapes are written down, not asked of our
modules. `bytes` is the total_size that the index states (of a single file, its size without the header), so that a wrong
number in this table shows. The names of Mistral-7B, Llama-3-70B and Vicuna-7B, and the sizes of these and of Qwen2.5-7B and 3B,
were held against public copies of such indexes (of tunings of the same architecture: names equal, sizes equal but for added
tokens); the others are from the models' descriptions. test_layouts_live.py holds all names and shapes against transformers. No
weights are needed: the model is on the meta device.
"""
import math

import pytest
import torch

from hub import InputError, match
from mllm import llm_class

LLAMA = """
model.embed_tokens.weight V C
model.layers.*.input_layernorm.weight C
model.layers.*.self_attn.q_proj.weight Q C
model.layers.*.self_attn.k_proj.weight K C
model.layers.*.self_attn.v_proj.weight K C
model.layers.*.self_attn.o_proj.weight C Q
model.layers.*.post_attention_layernorm.weight C
model.layers.*.mlp.gate_proj.weight F C
model.layers.*.mlp.up_proj.weight F C
model.layers.*.mlp.down_proj.weight C F
model.norm.weight C
"""
HEAD = "lm_head.weight V C\n"
TABLES = "model.layers.*.self_attn.rotary_emb.inv_freq R\n"          # RoPE's, in the files of 2023
BIASES = """
model.layers.*.self_attn.q_proj.bias Q
model.layers.*.self_attn.k_proj.bias K
model.layers.*.self_attn.v_proj.bias K
"""
PHI = """
model.embed_tokens.weight V C
model.layers.*.input_layernorm.weight C
model.layers.*.input_layernorm.bias C
model.layers.*.self_attn.q_proj.weight Q C
model.layers.*.self_attn.q_proj.bias Q
model.layers.*.self_attn.k_proj.weight K C
model.layers.*.self_attn.k_proj.bias K
model.layers.*.self_attn.v_proj.weight K C
model.layers.*.self_attn.v_proj.bias K
model.layers.*.self_attn.dense.weight C Q
model.layers.*.self_attn.dense.bias C
model.layers.*.mlp.fc1.weight F C
model.layers.*.mlp.fc1.bias F
model.layers.*.mlp.fc2.weight C F
model.layers.*.mlp.fc2.bias C
model.final_layernorm.weight C
model.final_layernorm.bias C
lm_head.weight V C
lm_head.bias V
"""


def config(kind, V, C, F, L, H, G, **others):
    return dict(model_type=kind, vocab_size=V, hidden_size=C, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H,
                num_key_value_heads=G, tie_word_embeddings=False) | others


LLAMA3 = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
QWEN = dict(rope_theta=1e6, rms_norm_eps=1e-6, use_sliding_window=False, bos_token_id=151643, eos_token_id=151643)
# release: (config.json, names and shapes, bytes), with two bytes a number in all of them
RELEASES = {
    "lmsys/vicuna-7b-v1.5": (
        config("llama", 32000, 4096, 11008, 32, 32, 32, max_position_embeddings=4096), LLAMA + HEAD + TABLES, 13476835328),
    "meta-llama/Llama-2-7b-hf": (
        config("llama", 32000, 4096, 11008, 32, 32, 32, max_position_embeddings=4096), LLAMA + HEAD + TABLES, 13476835328),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (
        config("llama", 32000, 2048, 5632, 22, 32, 4), LLAMA + HEAD, 2200096768),
    "HuggingFaceTB/SmolLM2-135M": (
        config("llama", 49152, 576, 1536, 30, 9, 3, rope_theta=100000, tie_word_embeddings=True), LLAMA, 269030016),
    "HuggingFaceTB/SmolLM2-360M": (
        config("llama", 49152, 960, 2560, 32, 15, 5, rope_theta=100000, tie_word_embeddings=True), LLAMA, 723642240),
    "HuggingFaceTB/SmolLM2-1.7B": (
        config("llama", 49152, 2048, 8192, 24, 32, 32, rope_theta=130000, tie_word_embeddings=True), LLAMA, 3422752768),
    "meta-llama/Meta-Llama-3-8B": (
        config("llama", 128256, 4096, 14336, 32, 32, 8, rope_theta=5e5), LLAMA + HEAD, 16060522496),
    "meta-llama/Meta-Llama-3-70B": (
        config("llama", 128256, 8192, 28672, 80, 64, 8, rope_theta=5e5), LLAMA + HEAD, 141107412992),
    "meta-llama/Llama-3.2-1B": (
        config("llama", 128256, 2048, 8192, 16, 32, 8, head_dim=64, rope_theta=5e5, rope_scaling=LLAMA3,
               tie_word_embeddings=True), LLAMA, 2471628800),
    "01-ai/Yi-34B": (
        config("llama", 64000, 7168, 20480, 60, 56, 8, rope_theta=5e6), LLAMA + HEAD, 68777834496),
    "NousResearch/Nous-Hermes-2-Yi-34B": (
        config("llama", 64000, 7168, 20480, 60, 56, 8, rope_theta=5e6, eos_token_id=7), LLAMA + HEAD, 68777834496),
    "mistralai/Mistral-7B-v0.1": (
        config("mistral", 32000, 4096, 14336, 32, 32, 8, sliding_window=4096), LLAMA + HEAD, 14483464192),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        config("mistral", 32768, 4096, 14336, 32, 32, 8, sliding_window=None, rope_theta=1e6), LLAMA + HEAD, 14496047104),
    "Qwen/Qwen2.5-7B": (
        config("qwen2", 152064, 3584, 18944, 28, 28, 4, sliding_window=131072, max_window_layers=28, **QWEN),
        LLAMA + HEAD + BIASES, 15231233024),
    "Qwen/Qwen2.5-3B": (
        config("qwen2", 151936, 2048, 11008, 36, 16, 2, sliding_window=32768, max_window_layers=36, tie_word_embeddings=True,
               **QWEN), LLAMA + BIASES, 6171877376),
    "Qwen/Qwen2.5-0.5B": (
        config("qwen2", 151936, 896, 4864, 24, 14, 2, sliding_window=32768, max_window_layers=24, tie_word_embeddings=True,
               **QWEN), LLAMA + BIASES, 988065536),
    "microsoft/phi-2": (
        config("phi", 51200, 2560, 10240, 32, 32, 32, partial_rotary_factor=0.4, layer_norm_eps=1e-5, hidden_act="gelu_new",
               qk_layernorm=False, rope_scaling=None, rope_theta=10000.0, bos_token_id=50256, eos_token_id=50256), PHI, 5559367680),
}


def shapes_of(stated, names):
    """What a release's files hold -> {tensor name: shape}."""
    head_dim = stated.get("head_dim", stated["hidden_size"] // stated["num_attention_heads"])
    sizes = dict(V=stated["vocab_size"], C=stated["hidden_size"], F=stated["intermediate_size"], R=head_dim // 2,
                 Q=stated["num_attention_heads"] * head_dim, K=stated["num_key_value_heads"] * head_dim)
    shapes = {}
    for line in names.split("\n"):
        name, *letters = line.split() or [""]
        for layer in range(stated["num_hidden_layers"] if "*" in name else bool(name)):
            shapes[name.replace("*", str(layer))] = tuple(sizes[letter] for letter in letters)
    return shapes


def model_of(stated, release):
    kind = llm_class(stated["model_type"], release)
    with torch.device("meta"):
        return kind(kind.config_class.from_dict(stated, release))


@pytest.mark.parametrize("release", RELEASES)
def test_every_tensor_of_a_public_release_has_its_parameter(release):
    stated, names, size = RELEASES[release]
    shapes = shapes_of(stated, names)
    assert 2 * sum(math.prod(shape) for shape in shapes.values()) == size
    model = model_of(stated, release)
    source = match(model, shapes, model.name_of, release)            # raises for one missing, left over, or of another shape
    assert set(source) == dict(model.named_parameters()).keys()
    used = {name for name, *_ in source.values()}
    assert {name for name in shapes if name not in used} == {name for name in shapes if name.endswith("inv_freq")}


@pytest.mark.parametrize("release, window", [
    ("mistralai/Mistral-7B-v0.1", 4096), ("mistralai/Mistral-7B-Instruct-v0.3", None), ("Qwen/Qwen2.5-7B", None),
    ("meta-llama/Llama-2-7b-hf", None)])
def test_window_of_a_public_release_is_the_one_it_was_trained_with(release, window):
    assert model_of(RELEASES[release][0], release).config.sliding_window == window


@pytest.mark.parametrize("release, lacking, named", [
    ("Qwen/Qwen2.5-7B", "model.layers.3.self_attn.k_proj.bias", "layers.3.self_attn.k_proj.bias missing"),
    ("microsoft/phi-2", "lm_head.bias", "lm_head.bias missing"),
    ("meta-llama/Meta-Llama-3-8B", "lm_head.weight", "lm_head.weight missing")])
def test_release_without_one_of_its_tensors_does_not_load(release, lacking, named):
    stated, names, _ = RELEASES[release]
    shapes, model = shapes_of(stated, names), model_of(stated, release)
    del shapes[lacking]
    with pytest.raises(InputError, match=named):
        match(model, shapes, model.name_of, release)


def test_biases_that_a_llama_has_no_place_for_are_named():
    stated, names, _ = RELEASES["Qwen/Qwen2.5-7B"]
    model = model_of(stated | dict(model_type="llama"), "llama")
    with pytest.raises(InputError, match="self_attn.q_proj.bias and 83 more left over"):
        match(model, shapes_of(stated, names), model.name_of, "llama")
