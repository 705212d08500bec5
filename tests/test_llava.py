"""llava.py without transformers: what it recorded, the authors' layout by hand, a connector alone, and damaged folders."""
import json
import shutil

import pytest
import torch
from conftest import recorded, relative_error
from make_dense_folder import make_folder
from make_llava_tokenizer import make_tokenizer
from safetensors.torch import load_file, save_file

from clip import CLIPVision
from dialogue import IMAGE
from hub import InputError
from llava import load_connector
from mllm import MLLM


# --- llava-hf: recorded -----------------------------------------------------------------------------------------------

@torch.no_grad()
def test_logits_and_greedy_ids_are_those_that_transformers_gave():
    """The prompt is the one that LLaVA-1.5 was trained with; T - 16 of its tokens are text, IMAGE stands where <image> was."""
    folder, expected = recorded("llava")
    model = MLLM.from_pretrained(folder)
    assert (model.template, model.spec.mode, model.tokens_per_image) == ("vicuna_v1", "crop", 16)
    picture = expected["pixels"][0].permute(1, 2, 0).numpy()
    for name, images, question in (("picture", [picture], "What is this?"), ("text", [], "What is a cat?")):
        pixels, ids = model.prompt(images, [(question, None)])
        assert [356 if i == IMAGE else i for i in ids] == expected[f"{name}.tokens"][0].tolist()
        logits = model.llm(embeds=model.embed(torch.tensor([ids]), pixels))[:, -expected[f"{name}.logits"].shape[1]:]
        assert relative_error(logits, expected[f"{name}.logits"]) < 1e-5
        greedy = expected[f"{name}.greedy"][0].tolist()
        assert len(set(greedy)) > 3
        assert torch.stack(list(model.stream([images], [question], 12)), dim=1)[0].tolist() == greedy


@pytest.fixture
def llava_folder(tmp_path):
    return shutil.copytree(recorded("llava")[0], tmp_path / "llava")


@pytest.mark.parametrize("change, message", [
    ({"vision_feature_layer": -1}, "vision_feature_layer is -1; what can be read is -2 or 2"),
    ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\]"),
    ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'; .* 'default'"),
    ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
    ({"projector_hidden_act": "linear"}, "linear_2.weight is not the identity|linear_2.bias is not the identity"),
    ({"text_config": None}, "config.json is not that of a LLaVA"),
    ({"vision_config": {"model_type": "pixtral"}}, "'pixtral' is not a vision tower"),
    ({"text_config": {"model_type": "gemma"}}, "'gemma' is not a language model")])
def test_a_config_that_asks_for_another_model_is_an_error(llava_folder, change, message):
    config = json.loads((llava_folder / "config.json").read_text())
    (llava_folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        MLLM.from_pretrained(llava_folder)


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("multi_modal_projector.linear_1.bias"), "tensor connector.mm_projector.0.bias missing"),
    (lambda t: t.pop("language_model.lm_head.weight"), "tensor llm.lm_head.weight missing"),
    (lambda t: t.update({"image_newline": torch.zeros(32)}), "tensor image_newline left over"),
    (lambda t: t.update({"language_model.model.norm.weight": torch.zeros(31)}), "language_model.model.norm.weight has shape"),
    (lambda t: t.update({"language_model.model.norm.weight": torch.zeros(32, dtype=torch.int8)}), "has dtype torch.int8")])
def test_a_tensor_too_few_too_many_or_of_another_kind_is_named(llava_folder, change, message):
    tensors = load_file(llava_folder / "model.safetensors")
    change(tensors)
    save_file(tensors, llava_folder / "model.safetensors")
    with pytest.raises(InputError, match=message):
        MLLM.from_pretrained(llava_folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_a_file_cut_short_or_missing_is_named(llava_folder, name):
    whole = (llava_folder / name).read_bytes()
    (llava_folder / name).write_bytes(whole[:len(whole) - 9])
    with pytest.raises(InputError, match=name) as caught:
        MLLM.from_pretrained(llava_folder)
    assert "\n" not in str(caught.value)
    (llava_folder / name).unlink()
    with pytest.raises(InputError, match=name):
        MLLM.from_pretrained(llava_folder)


# --- the Dense Connector's layout: by hand ----------------------------------------------------------------------------

def by_hand(dense, hidden, siglip):
    """What the paper and its code say, for 24 blocks of CLIP and 26 of SigLIP: indices as plain numbers, the class token cut
    off by hand. hidden: list of (1, S, D) -> (1, N, D or 3D), the projector's input."""
    patches = [h if siglip else h[:, 1:] for h in hidden]
    final = patches[26] if siglip else patches[23]
    if dense is None:
        return final
    if dense == "dci":
        halves = [range(0, 13), range(13, 26)] if siglip else [range(0, 12), range(12, 24)]
        return torch.cat([final] + [sum(patches[i] for i in half) / len(half) for half in halves], dim=-1)
    if dense == "sci":
        return torch.cat([final, patches[7], patches[15]], dim=-1)
    pool = torch.nn.AvgPool1d(8, 8)
    return torch.cat([final] + [pool(patches[i].transpose(1, 2)).transpose(1, 2) for i in (7, 15)], dim=1)


@pytest.mark.parametrize("siglip", (False, True))
@pytest.mark.parametrize("dense", ("dci", "sci", "sti", None))
@torch.no_grad()
def test_a_dense_connectors_release_is_read_as_its_authors_compute_it(dense, siglip, tmp_path):
    """Towers of the published depths, 24 and (one of 27 dropped) 26; their names and config keys; logits from the parts, each
    made and kept outside the folder."""
    tower, projector, llm = make_folder(tmp_path, dense, siglip)
    model = MLLM.from_pretrained(tmp_path)
    assert model.connector_config.kind == (dense or "mlp")
    assert (model.template, model.spec.mode, model.spec.size) == ("vicuna_v1", "pad", 32)
    assert model.spec.mean == ((0.5,) * 3 if siglip else CLIPVision.statistics[0])
    picture = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    pixels, ids = model.prompt([picture.numpy()], [("What is this?", None)])
    tokens = torch.tensor([ids])
    hidden = tower(pixels, list(range(27 if siglip else 25)))
    visual = projector(by_hand(dense, hidden, siglip))[0]
    at = ids.index(IMAGE)
    text = llm.embed(tokens.clamp(min=0))[0]
    embeds = torch.cat([text[:at], visual, text[at + len(visual):]])[None]
    assert relative_error(model.llm(embeds=model.embed(tokens, pixels)), llm(embeds=embeds)) < 1e-6


@torch.no_grad()
def test_the_tower_may_lie_beside_the_file(tmp_path):
    """In a folder of the checkpoint's folder, or wherever mm_vision_tower leads (an id goes the same way, through hub.locate)."""
    make_folder(tmp_path / "inside", "dci", False)
    inside = MLLM.from_pretrained(tmp_path / "inside")
    for place in ("beside/tower", "elsewhere"):
        shutil.copytree(tmp_path / "inside", tmp_path / "beside", dirs_exist_ok=True)
        tensors = load_file(tmp_path / "inside" / "model.safetensors")
        tensors = {name: t for name, t in tensors.items() if "vision_tower" not in name}
        save_file(tensors, tmp_path / "beside" / "model.safetensors")
        config = json.loads((tmp_path / "inside" / "config.json").read_text())
        config.pop("mm_vision_config")
        name = "tower" if place == "beside/tower" else str(tmp_path / place)
        (tmp_path / "beside" / "config.json").write_text(json.dumps(config | {"mm_vision_tower": name}))
        inside.vision[0].save_pretrained(tmp_path / place)
        beside = MLLM.from_pretrained(tmp_path / "beside")
        assert beside.spec == inside.spec and list(beside.state_dict()) == list(inside.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(beside.state_dict().values(), inside.state_dict().values()))
        shutil.rmtree(tmp_path / "beside")


def test_the_idle_block_of_siglip_survives_our_own_folder(tmp_path):
    make_folder(tmp_path / "theirs", "dci", True)
    model = MLLM.from_pretrained(tmp_path / "theirs")
    assert len(model.vision[0].blocks) == 27 and not any(p.any() for p in model.vision[0].blocks[26].parameters())
    model.save(tmp_path / "ours")
    again = MLLM.from_pretrained(tmp_path / "ours")
    assert again.generate([None], ["What?"], 4) == model.generate([None], ["What?"], 4)


@pytest.mark.parametrize("change, message", [
    ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'; what can be read is 'pad' or 'square'"),
    ({"mm_dense_connector_type": "mdi"}, "mm_dense_connector_type is 'mdi'"),
    ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type is 'mlp3x_gelu'"),
    ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'; what can be read is 'mlp2x_gelu'"),
    ({"mm_vision_select_layer": -1}, "mm_vision_select_layer is -1"),
    ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
    ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
    ({"mm_dense_connector_type": None}, "tensor model.mm_projector.0.weight has shape"),
    ({"mm_vision_config": None, "mm_vision_tower": "/nowhere/tower"}, "/nowhere/tower: no such folder"),
    ({"model_type": "llava_mpt"}, "'llava_mpt' is not a language model")])
def test_a_release_that_asks_for_more_is_an_error(change, message, tmp_path):
    make_folder(tmp_path, "dci", False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        MLLM.from_pretrained(tmp_path)


def test_llama_3_releases_answer_under_the_name_they_were_trained_with(tmp_path):
    """The Dense Connector's conversation for Llama 3 puts answers under the system's header; LLaVA's puts them under the
    assistant's. The tokenizer's own chat template cannot tell, the connector's type can."""
    make_folder(tmp_path, "dci", False)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "<|start_header_id|>..."}))
    model = MLLM.from_pretrained(tmp_path)
    _, ids = model.prompt([], [("Hi", None)])
    assert model.template == "llama_3_dense"
    assert model.tokenizer.decode(ids, skip_special_tokens=False).replace("> ", ">").endswith(
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>system<|end_header_id|>\n\n")


@pytest.mark.parametrize("dense", ("dci", None))
def test_chatml_releases_have_no_newline_between_turns(dense, tmp_path):
    """LLaVA's conversation for ChatML, which the Dense Connector's 34B has, too, where the LLM's chat template has newlines."""
    make_folder(tmp_path, dense, False)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "<|im_start|>user\n...<|im_end|>\n"}))
    assert MLLM.from_pretrained(tmp_path).template == "chatml_direct"


# --- a connector alone ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prefix", ("model.", "", "connector.", "multi_modal_projector"))
def test_a_connector_alone_replaces_that_of_a_model(prefix, tmp_path, tiny_model):
    """As LLaVA's stage 1 writes it, as llava-hf names it, and as it stands in a whole model of ours."""
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    new = {name: torch.randn_like(tensor) for name, tensor in tiny_model.connector.state_dict().items()}
    names = {name: prefix + name for name in new}
    if prefix == "multi_modal_projector":
        names = {name: name.replace("mm_projector.0", f"{prefix}.linear_1").replace("mm_projector.2", f"{prefix}.linear_2")
                 for name in new}
    save_file({names[name]: tensor for name, tensor in new.items()} | {"model.norm.weight": torch.zeros(3)},
              tmp_path / "mm_projector.safetensors")
    try:
        for path in (tmp_path, tmp_path / "mm_projector.safetensors"):
            load_connector(tiny_model, path)
            assert all(torch.equal(tiny_model.connector.state_dict()[name], new[name]) for name in new)
        after = tiny_model.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before if "connector" not in name)
    finally:
        tiny_model.load_state_dict(before)


def test_stage_2_starts_from_a_connector_alone(tmp_path, tiny_folders, monkeypatch):
    """train.py --init with LLaVA's mm_projector: at a learning rate of nearly zero the trained model still has it."""
    import train
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mm_projector").mkdir()
    generator = torch.Generator().manual_seed(5)
    start = {"0.weight": (32, 96), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    start = {f"model.mm_projector.{name}": torch.randn(shape, generator=generator) for name, shape in start.items()}
    save_file(start, tmp_path / "mm_projector" / "mm_projector.safetensors")
    parts = f"--vision={tiny_folders['clip']}", f"--llm={tiny_folders['llama']}", "--device=cpu"
    train.main(["--stage=2", "--init=mm_projector", *parts, "--lr2=1e-12", "--connector_lr2=0", "--steps2=1", "--batch2=2", "--micro_batch=2",
                "--out=run", "--evaluate=false"])
    trained = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, tensor in start.items():
        assert torch.allclose(trained[name.replace("model.", "connector.")], tensor, atol=1e-6)
    with pytest.raises(InputError, match="nothing-there: no such folder"):
        train.main(["--stage=2", "--init=nothing-there", *parts, "--out=other"])


def test_another_connector_is_an_error_and_changes_nothing(tmp_path, tiny_model):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    good = {f"model.{name}": tensor + 1 for name, tensor in tiny_model.connector.state_dict().items()}
    for change, message in (({"model.mm_projector.4.weight": torch.zeros(1)}, "mm_projector.4.weight is left over"),
                            ({"model.mm_projector.0.weight": torch.zeros(32, 96)}, r"has shape \(32, 96\), that of the mlp"),
                            ({"model.mm_projector.2.bias": None}, "tensor mm_projector.2.bias of the mlp connector is missing")):
        save_file({name: t for name, t in (good | change).items() if t is not None}, tmp_path / "c.safetensors")
        with pytest.raises(InputError, match=message):
            load_connector(tiny_model, tmp_path / "c.safetensors")
    (tmp_path / "mm_projector.bin").write_bytes(b"pickle")
    for path, message in ((tmp_path / "mm_projector.bin", "pickled"), (tmp_path / "none.safetensors", "no such file")):
        with pytest.raises(InputError, match=message):
            load_connector(tiny_model, path)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.state_dict().items())
