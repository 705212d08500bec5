"""export.py beside transformers: what we write, their classes load, and compute the same with it."""
import pytest

transformers = pytest.importorskip("transformers")

import torch
from conftest import recorded, relative_error

from hub import read_config
from mllm import tower_class

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TOLERANCE = 1e-4     # relative, float32; other orders of summation give about 1e-6


@pytest.mark.parametrize("variant, name", [
    ("clip", "CLIPVisionModel"), ("siglip_vision", "SiglipVisionModel"), ("dinov2", "Dinov2Model"),
    ("dinov2_registers", "Dinov2WithRegistersModel"), ("vit", "ViTModel"), ("deit", "DeiTModel"), ("mae", "ViTMAEModel")])
@torch.no_grad()
def test_transformers_reads_a_tower_that_we_save(variant, name, tmp_path):
    """Nothing is left over, nothing is missing but a pooler that the tower never had; all hidden states are equal."""
    folder, expected = recorded(variant)
    tower_type = tower_class(read_config(folder)["model_type"], folder)[0]
    tower = tower_type.from_pretrained(folder)
    tower.save_pretrained(tmp_path)
    options = {"mask_ratio": 0.0} if name == "ViTMAEModel" else {}   # else it hides patches
    theirs, report = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all("pooler" in key for key in report["missing_keys"])
    side = next(key for key in expected if key.endswith(".pixels"))
    pixels = tower.normalize(expected[side], torch.float32)
    noise = {"noise": torch.arange(tower.config.image_size ** 2 // tower.config.patch_size ** 2)[None].float().expand(
        len(pixels), -1)} if name == "ViTMAEModel" else {}           # MAE shuffles patches by noise; this keeps their order
    hidden = theirs.eval()(pixels, output_hidden_states=True, **noise).hidden_states
    for ours, reference in zip(tower(expected[side]), hidden, strict=True):
        assert relative_error(ours, reference) < TOLERANCE
    again = tower_type.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(tower(expected[side]), again(expected[side])))
