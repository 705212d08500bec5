"""interop: LLaVA's and the Dense Connector's folders, a connector alone, and damaged folders."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, recorded, refused, relative_error
from make_dense_folder import TinyConvNeXt, make_folder, make_mini_gemini
from make_llava_tokenizer import IMAGE_TOKEN, make_tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file
from tower_outputs import expand

from common.layouts import OPENAI
from common.pretrained import match
from dialogue import IMAGE
from interop import llava
from interop.convnext import ConvNeXt
from interop.load import load_model, start_from


@torch.no_grad()
def test_logits_and_greedy_ids_are_those_that_transformers_gave():
    folder, expected = recorded("llava")
    model = load_model(folder)
    assert (model.template, model.spec.mode, model.tokens_per_image) == ("vicuna_v1", "crop", 16)
    image = expected["pixels"][0].permute(1, 2, 0).numpy()
    cases = ("picture", [image], "What is this?"), ("text", [], "What is a cat?")
    for name, images, prompt in cases:
        pixels, ids, _ = model.prompt(images, [(prompt, None)])
        theirs = expected[f"{name}.tokens"][0].tolist()
        assert [IMAGE_TOKEN if i == IMAGE else i for i in ids] == theirs
        logits = model.llm(embeds=model.embed(torch.tensor([ids]), pixels))
        reference = expected[f"{name}.logits"]
        assert relative_error(logits[:, -reference.shape[1] :], reference) < 1e-5
        greedy = torch.stack(list(model.stream([images], [prompt], 12)), dim=1)[0].tolist()
        assert greedy == expected[f"{name}.greedy"][0].tolist() and len(set(greedy)) > 3


# dense -> name of the connector, the layers that it reads of CLIP and of SigLIP
LAYERS = {
    "dci": ("dense", [23, range(0, 12), range(12, 24)], [26, range(0, 13), range(13, 26)]),
    "sci": ("sci", [23, 7, 15], [26, 7, 15]),
    "sti": ("sti", [23, 7, 15], [26, 7, 15]),
    None: ("mlp", [23], [26]),
}


@pytest.mark.parametrize("siglip", (False, True))
@pytest.mark.parametrize("dense", LAYERS)
def test_a_release_gives_its_weights_layers_template_and_image_size(dense, siglip, tmp_path):
    tower, projector, llm = make_folder(tmp_path / "theirs", dense, siglip)
    model = load_model(tmp_path / "theirs")
    name, *layers = LAYERS[dense]
    assert (model.connector.name, model.connector.layers) == (name, [layers[siglip]])
    for ours, theirs in (
        (model.vision[0], tower),
        (model.connector.mm_projector, projector),
        (model.llm, llm),
    ):
        theirs = theirs.state_dict()
        for key, tensor in ours.state_dict().items():
            # the authors delete SigLIP's last block
            assert key.startswith("blocks.26.") or torch.equal(tensor, theirs[key]), key
    assert (model.template, model.spec.mode, model.spec.size) == ("vicuna_v1", "pad", 32)
    assert model.spec.mean == ((0.5,) * 3 if siglip else OPENAI[0])
    model.save(tmp_path / "ours")
    again = load_model(tmp_path / "ours")
    assert again.generate([None], ["What?"], 4) == model.generate([None], ["What?"], 4)


def test_the_tower_may_be_in_a_folder_of_its_own(tmp_path):
    make_folder(tmp_path, "dci", False)
    inside = load_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {name: t for name, t in tensors.items() if "vision_tower" not in name}
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text()) | {"mm_vision_tower": "tower"}
    del config["mm_vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    inside.vision[0].save_pretrained(tmp_path / "tower")
    ours, theirs = inside.state_dict(), load_model(tmp_path).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_an_anyres_release_is_read_with_its_sizes_and_its_newline(tmp_path):
    """LLaVA-1.6's layout, with the Dense Connector: pinpoints are (width, height)."""
    make_folder(tmp_path, "dci", True)
    newline = torch.randn(24)
    tensors = load_file(tmp_path / "model.safetensors") | {"model.image_newline": newline}
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
    config |= {"image_grid_pinpoints": [[32, 64], [96, 32]], "model_type": "llava_mistral"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(tmp_path)
    assert model.template == "mistral_instruct"
    assert model.spec.pinpoints == ((32, 64), (96, 32))
    assert torch.equal(model.connector.image_newline, newline)
    # a canvas of three tiles, of whose four lines of patches the first and the last are border
    image = Image.effect_noise((96, 20), 90).convert("RGB")
    pixels, ids, image_index = model.prompt([image], [("What?", None)])
    assert len(pixels) == 4 and ids.count(IMAGE) == len(image_index) == 16 + 2 * (12 + 1)
    model.save(tmp_path / "ours")
    again = load_model(tmp_path / "ours")
    assert again.spec == model.spec
    assert again.generate([image], ["What?"], 4) == model.generate([image], ["What?"], 4)


def test_a_release_that_needs_more_than_this_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(ConvNeXt, "config_class", TinyConvNeXt)
    make_mini_gemini(tmp_path / "mgm", 0, 1)
    shutil.copytree(recorded("llava")[0], tmp_path / "hf")
    make_folder(tmp_path / "authors", "dci", False)
    changes = json.loads((ROOT / "tests" / "fixtures" / "bad_releases.json").read_text())
    for layout in changes:
        path = tmp_path / layout / "config.json"
        config = json.loads(path.read_text())
        for change in changes[layout]:
            path.write_text(json.dumps(config | change))
            with refused():
                load_model(tmp_path / layout)


def test_llama_3_and_chatml_releases_get_the_templates_they_were_trained_with(tmp_path):
    llama_3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    for dense, tokens, chat, template in (
        ("dci", llama_3, "<|start_header_id|>...", "llama_3_dense"),
        (None, llama_3, "<|start_header_id|>...", "llama_3"),
        ("dci", ["<|im_start|>", "<|im_end|>"], "<|im_start|>user\n...", "chatml_direct"),
    ):
        make_folder(tmp_path, dense, False)
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens(tokens)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": chat}))
        assert load_model(tmp_path).template == template


def test_a_connector_alone_replaces_that_of_a_model_if_it_fits(tmp_path, tiny_model):
    """As LLaVA's stage 1 writes it, and as llava-hf and we name it."""
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    for prefix in ("model.", "", "connector.", "multi_modal_projector."):
        new, tensors = {}, {"model.norm.weight": torch.zeros(3)}
        for name, tensor in tiny_model.connector.state_dict().items():
            new[name] = torch.randn_like(tensor)
            saved = name
            if prefix.startswith("multi"):
                saved = name.replace("mm_projector.0", "linear_1")
                saved = saved.replace("mm_projector.2", "linear_2")
            tensors[prefix + saved] = new[name]
        save_file(tensors, tmp_path / "mm_projector.safetensors")
        start_from(tiny_model, tmp_path)
        state = tiny_model.connector.state_dict()
        assert all(torch.equal(state[name], new[name]) for name in new)
    # a wrong shape, a tensor left over, a pickle: nothing is changed
    for name in ("model.mm_projector.2.bias", "model.mm_projector.4.bias"):
        good = {f"model.{key}": tensor + 1 for key, tensor in new.items()}
        save_file(good | {name: torch.zeros(3)}, tmp_path / "mm_projector.safetensors")
        with refused("mm_projector"):
            start_from(tiny_model, tmp_path)
    (tmp_path / "mm_projector.safetensors").rename(tmp_path / "mm_projector.bin")
    for path in (tmp_path, tmp_path / "nowhere"):
        with refused():
            start_from(tiny_model, path)
    after = tiny_model.state_dict()
    assert all(torch.equal(after[f"connector.{name}"], new[name]) for name in new)
    assert all(torch.equal(before[n], after[n]) for n in before if "connector" not in n)
    tiny_model.load_state_dict(before)


RELEASES = json.loads((ROOT / "tests" / "fixtures" / "layouts_llava.json").read_text())


@pytest.mark.parametrize("name", RELEASES)
def test_every_tensor_of_a_public_release_has_its_parameter(name, tmp_path):
    config, tensors = RELEASES[name]["config"], expand(RELEASES[name]["tensors"])
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    if "preprocessor" in RELEASES[name]:
        processor = json.dumps(RELEASES[name]["preprocessor"])
        (tmp_path / "preprocessor_config.json").write_text(processor)
    model, rename, tower_folder = llava.read(tmp_path, config, list(tensors))
    assert tower_folder is None
    if llava.lacks_last_block(model.vision[0], tensors):
        model.vision[0].blocks.pop(-1)
    match(model, tensors, rename, tmp_path)
