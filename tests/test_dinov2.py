"""DINOv2, its positions, registers and mask, against what transformers computed (tests/make_tower_fixtures.py)."""
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import recorded, relative_error
from safetensors.torch import load_file

from dinov2 import DINOv2, DINOv2Config
from hub import InputError

TOLERANCE = 1e-5     # float32 parity as the project promises it; other orders of summation give about 1e-7
SMALL = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=35, patch_size=7)


def picture(side, batch=2):
    return torch.randint(0, 256, (batch, 3, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("variant, side", [
    ("dinov2", 35), ("dinov2", 28), ("dinov2", 42), ("dinov2_registers", 35), ("dinov2_registers", 28),
    ("dinov2_registers", 42), ("dinov2_swiglu", 35), ("dinov2_classifier", 35)])
@torch.no_grad()
def test_hidden_states_equal_transformers(variant, side):
    """At the resolution of the position table (35), at a smaller and at a larger one."""
    folder, expected = recorded(variant)
    tower = DINOv2.from_pretrained(folder)
    hidden = tower(expected[f"{side}.pixels"])
    assert len(hidden) == 4 and hidden[0].shape == (2, tower.num_prefix_tokens + (side // 7) ** 2, 16)
    for i, state in enumerate(hidden):
        assert relative_error(state, expected[f"{side}.hidden.{i}"]) < TOLERANCE, f"hidden[{i}]"


@pytest.mark.parametrize("variant", ["dinov2", "dinov2_registers"])
@torch.no_grad()
def test_masked_patches_equal_transformers(variant):
    folder, expected = recorded(variant)
    mask = expected["28.mask"]
    assert mask.any() and not mask.all()
    for i, state in enumerate(DINOv2.from_pretrained(folder)(expected["28.pixels"], mask=mask)):
        assert relative_error(state, expected[f"28.masked.{i}"]) < TOLERANCE, f"hidden[{i}]"


def test_a_mask_of_nothing_changes_nothing_and_a_full_mask_hides_the_picture():
    torch.manual_seed(0)
    tower = DINOv2(DINOv2Config(**SMALL)).eval()
    nothing, everything = (torch.full((2, 25), value) for value in (False, True))
    assert torch.equal(tower(picture(35), mask=nothing)[-1], tower(picture(35))[-1])
    assert torch.equal(tower(picture(35), mask=everything)[-1], tower(255 - picture(35), mask=everything)[-1])


@pytest.mark.parametrize("side", [28, 35, 42])
def test_registers_follow_the_class_token_and_have_no_position(side):
    tower = DINOv2.from_pretrained(recorded("dinov2_registers")[0])
    [first] = tower(picture(side), [0])
    assert tower.num_prefix_tokens == 5
    assert torch.equal(first[:, 1:5], tower.register_tokens.expand(2, -1, -1))
    assert torch.equal(first[:, 0], (tower.cls_token + tower.position_embeddings[:, :1]).expand(2, -1, -1)[:, 0])


def test_the_papers_case_gives_dinov2_as_many_patches_as_clip():
    """Trained at 518 with patches of 14 (37 x 37), shown 336 (24 x 24 = 576, CLIP-L/14-336's grid)."""
    tower = DINOv2(DINOv2Config(hidden_size=8, num_hidden_layers=0, num_attention_heads=1, image_size=518))
    assert tower.positions(37).shape == (1, 1 + 1369, 8)
    assert tower(picture(336, 1))[0].shape == (1, 1 + 576, 8)


def test_positions_keep_their_place_when_resized():
    """A table that says where each patch is (x, y in 0 .. 1) still does at another resolution. Bicubic weights add up to
    one, and reproduce a straight line to about a tenth of a patch (0.01); an offset or swapped axes would miss by more."""
    for registers in (0, 4):                                         # without and with antialiasing
        tower = DINOv2(DINOv2Config(**SMALL | dict(image_size=70, num_register_tokens=registers)))
        y, x = torch.meshgrid(*[(torch.arange(10.0) + 0.5) / 10] * 2, indexing="ij")     # centres of the patches, in 0 .. 1
        table = torch.stack([x, y, torch.ones(10, 10)], dim=-1).view(1, 100, 3)
        tower.position_embeddings.data[:, 1:, :3] = table
        for grid in (8, 20):
            resized = tower.positions(grid)[:, 1:, :3].view(grid, grid, 3)
            centres = (torch.arange(grid) + 0.5) / grid
            inner = slice(grid * 3 // 10, grid * 7 // 10)            # further out the border is repeated
            assert torch.allclose(resized[..., 2], torch.ones(grid, grid), atol=1e-5)
            assert torch.allclose(resized[0, inner, 0], centres[inner], atol=0.01)
            assert torch.allclose(resized[inner, 0, 1], centres[inner], atol=0.01)


def test_positions_of_a_bf16_tower_are_resized_in_float32():
    tower = DINOv2.from_pretrained(recorded("dinov2")[0], dtype=torch.bfloat16)
    table = tower.position_embeddings[:, 1:].float().view(1, 5, 5, 16).permute(0, 3, 1, 2)
    exact = F.interpolate(table, size=(6, 6), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    positions = tower.positions(6)
    assert positions.dtype == torch.bfloat16 and torch.equal(positions[:, 1:], exact.bfloat16())


@pytest.mark.parametrize("registers", [0, 4])
def test_the_position_table_learns_at_every_resolution(registers):
    tower = DINOv2(DINOv2Config(**SMALL | dict(num_register_tokens=registers)))
    for side in (28, 35, 42):
        tower.zero_grad()
        tower(picture(side))[-1].square().sum().backward()
        assert (tower.position_embeddings.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("height, width", [(36, 36), (6, 6), (0, 0), (35, 42)])
def test_a_picture_that_patches_do_not_tile_is_an_error(height, width):
    tower = DINOv2(DINOv2Config(**SMALL))
    with pytest.raises(InputError, match=f"{height} x {width} for a tower with patches of 7: make them square"):
        tower(torch.zeros(1, 3, height, width, dtype=torch.uint8))


def test_float_pixels_are_an_error():
    with pytest.raises(InputError, match="should be uint8"):
        DINOv2(DINOv2Config(**SMALL))(torch.zeros(1, 3, 35, 35))


def test_layers_come_in_the_order_asked_and_deeper_blocks_do_not_run():
    tower = DINOv2(DINOv2Config(**SMALL | dict(num_register_tokens=2))).eval()
    every = tower(picture(35))
    tower.blocks[2].register_forward_hook(lambda *_: pytest.fail("block 3 ran, hidden[2] is the deepest that was asked for"))
    for layers in ([2, 0], [1], [0, 1, 2, 1]):
        assert all(torch.equal(a, every[i]) for a, i in zip(tower(picture(35), layers), layers, strict=True))
    with pytest.raises(InputError, match=r"hidden\[4\] asked of a tower of 3 blocks"):
        tower(picture(35), [4])


def test_a_start_from_scratch_is_one_that_can_learn():
    torch.manual_seed(0)
    tower = DINOv2(DINOv2Config(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=8,
                                num_register_tokens=4, layerscale_value=0.1))
    for block in tower.blocks:
        assert (block.scale1 == 0.1).all() and (block.scale2 == 0.1).all()
    for weights in (tower.blocks[0].mlp.fc1.weight, tower.position_embeddings, tower.blocks[2].attn.q.weight):
        assert 0.018 < weights.std() < 0.022                         # 0.02, over thousands of numbers
    registers = tower.register_tokens[0]
    assert torch.unique(registers, dim=0).shape == registers.shape   # alike at the start, they would stay alike
    tower(picture(64))[-1].square().sum().backward()
    unused = {"mask_token", "norm.weight", "norm.bias"}              # no mask was given, and hidden states precede the norm
    for name, parameter in tower.named_parameters():
        assert name in unused or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("variant", ["dinov2", "dinov2_swiglu", "dinov2_registers"])
def test_saving_gives_back_names_and_values_of_the_checkpoint(variant, tmp_path):
    folder, _ = recorded(variant)
    DINOv2.from_pretrained(folder, dtype=torch.float16).save_pretrained(tmp_path)
    saved, original = (load_file(place / "model.safetensors") for place in (tmp_path, folder))
    assert saved.keys() == original.keys()
    assert all(saved[name].dtype == torch.float16 and torch.equal(saved[name], original[name]) for name in original)
    written, theirs = (json.loads((place / "config.json").read_text()) for place in (tmp_path, folder))
    assert all(theirs[key] == value for key, value in written.items() if key in theirs)
    assert DINOv2.from_pretrained(tmp_path).config == DINOv2.from_pretrained(folder).config


def test_model_type_follows_the_registers():
    assert DINOv2Config().model_type == "dinov2"
    assert DINOv2Config(num_register_tokens=4).model_type == "dinov2_with_registers"


def test_keys_that_a_config_omits_have_the_defaults_of_its_model_type(tmp_path):
    """Hugging Face's two configurations differ there: patches of 16 and four registers for the one with registers."""
    folder, _ = recorded("dinov2_registers")
    config = json.loads((folder / "config.json").read_text())
    del config["num_register_tokens"], config["patch_size"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_size": 80}))
    shutil.copy(folder / "model.safetensors", tmp_path)
    with pytest.raises(InputError, match=r"projection\.weight has shape \(16, 3, 7, 7\), the config asks for \(16, 3, 16, 16\)"):
        DINOv2.from_pretrained(tmp_path)


def test_a_dinov2_has_no_registers_whatever_its_config_mentions(tmp_path):
    folder, _ = recorded("dinov2")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_register_tokens": 4}))
    shutil.copy(folder / "model.safetensors", tmp_path)
    tower = DINOv2.from_pretrained(tmp_path)
    assert tower.num_prefix_tokens == 1 and tower.config == DINOv2.from_pretrained(folder).config


def test_another_kind_of_checkpoint_is_refused():
    with pytest.raises(InputError, match="model_type 'vit' is not dinov2 or dinov2_with_registers"):
        DINOv2.from_pretrained(recorded("vit")[0])
