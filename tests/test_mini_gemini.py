"""Mini-Gemini: its own code's numbers, its release's layout, two image sizes, and a training."""

import json
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, losses, refused, relative_error, saved_weights
from make_dense_folder import TinyConvNeXt, make_mini_gemini
from safetensors.torch import load_file, save_file
from tower_outputs import random_pixels

import train
from common.grid import views
from common.pretrained import load_part
from connector import Tower, make_connector
from dialogue import IMAGE
from interop.convnext import ConvNeXt, ConvNeXtConfig
from interop.load import load_model
from mllm import TOWERS

FACTS = json.loads((ROOT / "tests" / "fixtures" / "mini_gemini.json").read_text())
# N = 4 patches of width 4; a map of width 6 with 16 positions a patch
CLIP, DETAIL = Tower(24, 4, 4, "clip_vision_model"), Tower(4, 6, 64, "convnext")


def w(shape, seed):
    """Make the numbers of the fixture."""
    i = torch.arange(torch.Size(shape).numel())
    return (((37 * i + 101 * seed) % 61 - 30) / 64).reshape(shape)


def tokens_of(maps):
    return maps.flatten(2).transpose(1, 2)


def mining(**options):
    """Build the connector with the fixture's weights, and no projector."""
    module = make_connector({"name": "mgm", **options}, [CLIP, DETAIL], 8)
    for name, seed in (("query", 1), ("aux", 11), ("val", 21)):
        norm, linear = getattr(module, f"vlm_uni_{name}_projector")
        norm.weight.data = 1 + w(norm.weight.shape, seed) / 4
        norm.bias.data = w(norm.bias.shape, seed + 1)
        linear.weight.data = w(linear.weight.shape, seed + 2)
        linear.bias.data = w(linear.bias.shape, seed + 3)
    module.mm_projector = torch.nn.Identity()
    return module


@torch.no_grad()
def test_patch_info_mining_equals_the_authors_code():
    low, detail = w((1, 4, 4), 31), w((1, 6, 8, 8), 41)
    tokens = mining()([[low], [tokens_of(detail)]])
    expected = torch.tensor(FACTS["mining"]["tokens"]).reshape(1, 4, 4)
    assert (tokens - expected).abs().max() < 1e-6
    # the Dense Connector's: the means as further channels
    means = [w((1, 4, 4), seed) for seed in (32, 33)]
    module = mining(groups=2)
    assert module.layers == [[23, range(0, 12), range(12, 24)], [4]]
    assert torch.equal(
        module([[low, *means], [tokens_of(detail)]]), torch.cat([tokens, *means], dim=2)
    )
    # HD: the fixture has four crops, then the whole
    low, detail = w((5, 4, 4), 51)[[4, 0, 1, 2, 3]], views(w((1, 6, 16, 16), 61), 2)
    CLIP_HD = [CLIP, DETAIL._replace(num_patches=256)]
    assert make_connector({"name": "mgm", "hd": True}, CLIP_HD, 8).num_tokens == 20
    module = mining()
    module.num_tokens = 20
    expected = torch.tensor(FACTS["hd"]["tokens"]).reshape(1, 20, 4)
    assert (module([[low], [tokens_of(detail)]]) - expected).abs().max() < 1e-6


@torch.no_grad()
def test_convnext_equals_the_authors_tower():
    tower = ConvNeXt(ConvNeXtConfig([1, 2, 1, 1], [4, 6, 8, 8]))
    names = FACTS["convnext"]["names"]
    assert {name: list(p.shape) for name, p in tower.named_parameters()} == names
    parameters = dict(tower.named_parameters())
    for i, name in enumerate(sorted(names)):
        value = w(names[name], i)
        is_norm = name.endswith(("norm.weight", "stem.1.weight", "downsample.0.weight"))
        scaled = 1 + value / 4 if is_norm else 2 * value if name.endswith("gamma") else value
        parameters[name].copy_(scaled)
    tower.read_pixels = lambda pixels, dtype: w((1, 3, 32, 32), 77)
    (state,) = tower(None)
    expected = torch.tensor(FACTS["convnext"]["out"]).reshape(FACTS["convnext"]["out_shape"])
    assert relative_error(state, tokens_of(expected)) < 1e-5
    with refused("hidden"):
        tower(None, [3])


@torch.no_grad()
@pytest.mark.parametrize(("groups", "grid"), [(0, 1), (2, 1), (0, 2)])
def test_a_release_is_read_as_its_authors_compute_it(groups, grid, tmp_path, monkeypatch):
    """CLIP sees 32 x 32 pixels, ConvNeXt three times as many a side."""
    monkeypatch.setattr(ConvNeXt, "config_class", TinyConvNeXt)
    clip, convnext, tensors = make_mini_gemini(tmp_path / "theirs", groups, grid)
    model = load_model(tmp_path / "theirs")
    assert model.spec.size == 96 * grid and model.tokens_per_image == (16, 80)[grid - 1]
    pixels = random_pixels(96 * grid)

    # CLIP's image is resized after normalization
    normal = clip.normalize(pixels, torch.float32)
    low = views(F.interpolate(normal, 32 * grid, mode="bilinear"), grid)
    clip.read_pixels = lambda pixels, dtype: low
    hidden = [x[:, 1:] for x in clip(None)]
    means = [sum(hidden[:12]) / 12, sum(hidden[12:24]) / 12] if groups else []
    (detail,) = convnext(pixels)
    detail = views(detail.mT.unflatten(2, (24 * grid, 24 * grid)), grid)
    towers = [Tower(24, 16, 16, "clip_vision_model"), Tower(4, 28, (24 * grid) ** 2, "convnext")]
    connector = make_connector({"name": "mgm", "groups": groups, "hd": grid == 2}, towers, 24)
    theirs = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    connector.load_state_dict({name: theirs[name] for name in connector.state_dict()})
    expected = connector([[hidden[23], *means], [tokens_of(detail)]])
    assert relative_error(model.see(pixels), expected) < 1e-5
    model.save(tmp_path / "ours")
    again = load_model(tmp_path / "ours")
    image = pixels[0].permute(1, 2, 0).numpy()
    _, ids, _ = again.prompt([image], [("What?", None)])
    assert ids.count(IMAGE) == model.tokens_per_image
    assert again.generate([image], ["What?"], 4) == model.generate([image], ["What?"], 4)


def test_timms_file_is_read_without_its_head(tiny_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(ConvNeXt, "config_class", TinyConvNeXt)
    tensors = load_file(tiny_folders["convnext"] / "model.safetensors")
    save_file(tensors | {"head.norm.weight": torch.ones(10)}, tmp_path / "model.safetensors")
    config = {"architecture": "convnext_large_mlp", "pretrained_cfg": {"mean": [0.5] * 3}}
    for architecture in ("convnext_large_mlp", "convnext_base", "convnextv2_large"):
        config["architecture"] = architecture
        (tmp_path / "config.json").write_text(json.dumps(config))
        with nullcontext() if architecture == "convnext_large_mlp" else refused("convnext"):
            state = load_part(TOWERS, tmp_path).state_dict()
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)


def test_it_trains_on_the_toy_world(tiny_folders, flags, clean_run):
    options = {"connector": "mgm", "connector.groups": 2, "image_size": 128}
    train.main(flags(**options, lr1=0.01, steps2=8))
    found = list(losses().values())
    assert found[-1] < found[2]
    model = load_model("run/model")
    assert model.spec.size == 128 and model.vision[0].config.image_size == 64
    before = load_file(tiny_folders["convnext"] / "model.safetensors")
    assert all(torch.equal(before[name], saved_weights()[f"vision.1.{name}"]) for name in before)
