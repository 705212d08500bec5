"""ViT, DeiT and MAE against what transformers computed (tests/make_tower_fixtures.py), and how every tower behaves."""
import json
import shutil
import weakref

import pytest
import torch
from conftest import recorded, relative_error
from safetensors.torch import load_file, save_file

from connector import mean
from hub import InputError
from vit import ViT, ViTConfig

TOLERANCE = 1e-5     # float32 parity as the project promises it; other orders of summation give about 1e-7
SMALL = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8)


@pytest.fixture
def tower():
    torch.manual_seed(0)
    return ViT(ViTConfig(**SMALL)).eval()


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.mark.parametrize("variant", ["vit", "vit_headless", "deit", "deit_one_head", "deit_plain", "deit3", "mae"])
@torch.no_grad()
def test_hidden_states_equal_transformers(variant):
    folder, expected = recorded(variant)
    tower = ViT.from_pretrained(folder)
    hidden = tower(expected["32.pixels"])
    assert len(hidden) == 4 and hidden[0].shape == (2, (2 if variant in ("deit", "deit_one_head") else 1) + 16, 16)
    for i, state in enumerate(hidden):
        assert relative_error(state, expected[f"32.hidden.{i}"]) < TOLERANCE, f"hidden[{i}]"


@pytest.mark.parametrize("variant", ["vit", "deit", "deit_one_head", "deit_plain", "deit3"])
@torch.no_grad()
def test_logits_equal_transformers(variant):
    folder, expected = recorded(variant)
    assert relative_error(ViT.from_pretrained(folder).classify(expected["32.pixels"]), expected["32.logits"]) < TOLERANCE


def test_deit3_starts_its_layer_scale_where_timm_does_and_the_others_have_none():
    config = ViT.from_pretrained(recorded("deit3")[0]).config
    new, plain = ViT(config), ViT.from_pretrained(recorded("vit")[0])
    scales = [scale for block in new.blocks for scale in (block.scale1, block.scale2)]
    assert len(scales) == 2 * len(new.blocks) and all((scale == 1e-6).all() for scale in scales)
    assert all(block.scale1 is block.scale2 is None for block in plain.blocks)


@pytest.mark.parametrize("variant", ["vit_headless", "mae"])
def test_a_checkpoint_without_a_head_says_so(variant, pixels):
    with pytest.raises(InputError, match="no classification head"):
        ViT.from_pretrained(recorded(variant)[0]).classify(pixels)


@pytest.mark.parametrize("variant, prefix", [("vit", 1), ("deit", 2), ("deit_one_head", 2), ("deit3", 1), ("mae", 1)])
def test_prefix_tokens_do_not_depend_on_the_patches(variant, prefix):
    """hidden[0] of class and distillation tokens is a parameter and its position, whatever the picture shows."""
    folder, expected = recorded(variant)
    tower = ViT.from_pretrained(folder)
    black, white = (tower(torch.full_like(expected["32.pixels"], value), [0])[0] for value in (0, 255))
    assert tower.num_prefix_tokens == prefix
    assert torch.equal(black[:, :prefix], white[:, :prefix]) and not torch.isclose(black[:, prefix:], white[:, prefix:]).any()


@torch.no_grad()
def test_layers_come_in_the_order_asked(tower, pixels):
    every = tower(pixels)
    for layers in ([3, 1], [0], [2, 2, 0], [4], []):
        asked = tower(pixels, layers)
        assert len(asked) == len(layers) and all(torch.equal(a, every[i]) for a, i in zip(asked, layers))


@pytest.mark.parametrize("layers, runs", [([0], 0), ([2, 1], 2), ([], 0), ([4, 0], 4), (None, 4)])
def test_no_block_runs_beyond_the_deepest_layer_asked(tower, pixels, layers, runs):
    ran = []
    for i, block in enumerate(tower.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    tower(pixels, layers)
    assert ran == list(range(runs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_range_is_the_mean_of_its_hidden_states(tower, pixels, dtype):
    tower, groups = tower.to(dtype), [range(0, 2), range(2, 5), range(1, 2)]
    hidden = tower(pixels)
    last, *means = tower(pixels, [4, *groups])
    assert torch.equal(last, hidden[4])
    for group, averaged in zip(groups, means, strict=True):
        assert averaged.dtype == dtype and torch.equal(averaged, mean([hidden[i] for i in group]))    # connector.mean


@torch.no_grad()
def test_hidden_states_that_are_averaged_are_not_kept(pixels):
    """Counted while the last block runs: alive are its input and hidden[4], at any depth; the mean is a tensor of its own."""
    for depth in (6, 12):
        tower, states, alive = ViT(ViTConfig(**SMALL | {"num_hidden_layers": depth})), [], []
        for block in tower.blocks:
            block.register_forward_pre_hook(lambda module, inputs: alive.append(sum(state() is not None for state in states)))
            block.register_forward_hook(lambda module, inputs, output: states.append(weakref.ref(output)))
        tower(pixels, [4, range(0, depth + 1)])
        assert len(states) == depth and max(alive) == alive[-1] == 2
        tower(pixels)
        assert alive[-1] == depth - 1                                # so it is when all are asked for: the count is a count


@pytest.mark.parametrize("layer, named", [(-1, -1), (5, 5), (range(-1, 3), -1), (range(3, 6), 5)])
def test_a_layer_that_does_not_exist_is_an_error(tower, pixels, layer, named):
    with pytest.raises(InputError, match=rf"hidden\[{named}\] asked of a tower of 4 blocks"):
        tower(pixels, [1, layer])


@pytest.mark.parametrize("wrong, message", [
    (torch.zeros(2, 3, 32, 32), "should be uint8"), (torch.zeros(3, 32, 32, dtype=torch.uint8), "should be uint8"),
    (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), "should be uint8"),
    (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), "should be uint8"),
    (torch.zeros(2, 3, 40, 40, dtype=torch.uint8), "40 x 40 for a tower that was trained at 32 x 32")])
def test_pixels_of_another_kind_are_an_error(tower, wrong, message):
    with pytest.raises(InputError, match=message):
        tower(wrong)


@torch.no_grad()
def test_pictures_of_a_batch_do_not_see_each_other(tower, pixels):
    # one picture alone or beside another: the same numbers but for the order of summation
    assert relative_error(tower(pixels[:1])[-1], tower(pixels)[-1][:1]) < 1e-6


@torch.no_grad()
def test_bf16_halves_the_weights_and_stays_near_float32():
    folder, expected = recorded("vit")
    tower = ViT.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}
    assert tower.normalize.mean.dtype == torch.float32               # pixels are normalised before they are rounded
    hidden = tower(expected["32.pixels"])
    assert hidden[-1].dtype == torch.bfloat16
    assert relative_error(hidden[-1], expected["32.hidden.3"]) < 0.03     # bf16 rounds by up to 0.4%, dozens of times


def test_pixels_are_normalised_in_float32_whatever_the_tower_becomes():
    tower, pixels = ViT.from_pretrained(recorded("vit")[0]), torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    tower.normalize.mean.fill_(0.33)                                 # no number of eight bits
    expected = tower.normalize(pixels, torch.float32)
    for moved in (tower.to(torch.bfloat16), tower.half(), tower.to("cpu")):
        assert torch.equal(moved.normalize(pixels, torch.float32), expected)
    assert {p.dtype for p in tower.parameters()} == {torch.float16}


def test_pixels_are_normalised_as_the_checkpoint_says(tmp_path):
    folder, expected = recorded("vit")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    pixels = expected["32.pixels"]
    assert torch.equal(ViT.from_pretrained(tmp_path).normalize(pixels, torch.float32), (pixels / 255 - 0.5) / 0.5)
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics.values())
    assert torch.equal(ViT.from_pretrained(tmp_path).normalize(pixels, torch.float32), (pixels / 255 - mean) / std)


def test_two_tensors_for_one_parameter_are_an_error(tmp_path):
    """As when a file holds a model twice, with and without its prefix: which of them is meant?"""
    folder, _ = recorded("vit")
    shutil.copy(folder / "config.json", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"layernorm.bias": torch.zeros(16)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"layernorm\.bias left over"):
        ViT.from_pretrained(tmp_path)


def test_another_kind_of_checkpoint_is_refused():
    with pytest.raises(InputError, match="model_type 'clip' is not a ViT"):
        ViT.from_pretrained(recorded("clip")[0])


def test_of_timms_models_only_deit3_is_read(tmp_path):
    folder, _ = recorded("deit3")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "vit_base_patch16_224"}))
    with pytest.raises(InputError, match=r"architecture 'vit_base_patch16_224': of timm's models only DeiT III"):
        ViT.from_pretrained(tmp_path)


def test_query_key_and_value_of_a_fused_matrix_are_views_of_it():
    attn = ViT.from_pretrained(recorded("deit3")[0], dtype=torch.float16).blocks[0].attn         # the file's own dtype
    assert attn.k.weight.data_ptr() - attn.q.weight.data_ptr() == attn.q.weight.nbytes
    assert attn.v.weight.data_ptr() - attn.k.weight.data_ptr() == attn.k.weight.nbytes
