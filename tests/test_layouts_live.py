"""The tables of the three test_layouts files against transformers: built from the same config.json on the meta device, its
class of that release has the same names and shapes, once they are told as it writes them (in memory version 5 has others).

What an index alone can show stays where it is: RoPE's tables and position ids, which only older files have, and the total size.
"""
import pytest

transformers = pytest.importorskip("transformers", reason="live parity needs transformers: pip install -r requirements-dev.txt")
core = pytest.importorskip("transformers.core_model_loading", reason="told as written: transformers 5")

import test_layouts_llm as llm
import test_layouts_mllm as mllm
import test_layouts_vision as vision
import torch

CLASSES = {"clip": "CLIPModel", "siglip": "SiglipModel", "dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel",
           "vit_mae": "ViTMAEForPreTraining", "deit": "DeiTForImageClassificationWithTeacher", "vit": "ViTForImageClassification",
           "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "phi": "PhiForCausalLM",
           "llava": "LlavaForConditionalGeneration"}


def written_by_transformers(config):
    """{tensor name: shape} of the file that save_pretrained would write, but for heads that are tied."""
    kind = config["model_type"]
    with torch.device("meta"):
        model = getattr(transformers, CLASSES[kind])(transformers.CONFIG_MAPPING[kind].from_dict(dict(config)))
    tensors = core.revert_weight_conversion(model, model.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()
            if not (config.get("tie_word_embeddings") and name == "lm_head.weight")}


@pytest.mark.parametrize("release", llm.RELEASES)
def test_a_language_models_table_is_what_transformers_has(release):
    config, names, _ = llm.RELEASES[release]
    table = {name: shape for name, shape in llm.shapes_of(config, names).items() if not name.endswith("rotary_emb.inv_freq")}
    assert written_by_transformers(config) == table


@pytest.mark.parametrize("release", [name for name, (*_, config, _) in vision.RELEASES.items() if "model_type" in config])
def test_a_towers_table_is_what_transformers_has(release):
    """timm's two aside. MAE's decoder, which we leave out, comes out of transformers' renaming under a name of no public file."""
    *_, config, shapes = vision.RELEASES[release]
    written = {name.replace("decoder_encoder.layer.", "decoder_layers."): shape
               for name, shape in written_by_transformers(config).items()}
    assert written == {name: shape for name, shape in shapes.items() if not name.endswith("position_ids")}


def test_llavas_table_is_what_transformers_has():
    """Version 5 drops a `vision_model.` that all public files have; test_llava_live.py loads what it writes."""
    written = {name.replace("vision_tower.", "vision_tower.vision_model.").replace("vision_model.vision_model.", "vision_model."): shape
               for name, shape in written_by_transformers(mllm.LLAVA_HF).items()}
    assert written == mllm.llava_hf_tensors()
