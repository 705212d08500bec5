"""export.py: what goes out comes in again as the same model, and what has no place in a layout is an error that says so."""
import json

import pytest
import torch
from make_dense_folder import wide
from make_llava_tokenizer import make_tokenizer
from safetensors.torch import load_file

from clip import CLIPVision, CLIPVisionConfig, SigLIPVision, SigLIPVisionConfig
from connector import ConnectorConfig
from dinov2 import DINOv2, DINOv2Config
from export import export, main
from hub import InputError
from images import ImageSpec
from llama import Llama, LlamaConfig
from mllm import MLLM
from phi import Phi, PhiConfig
from vit import IMAGENET_MEAN, IMAGENET_STD

SHAPE = dict(hidden_size=16, num_attention_heads=2, image_size=32, patch_size=8)
TOWERS = {"clip": lambda: CLIPVision(CLIPVisionConfig(num_hidden_layers=6, intermediate_size=24, **SHAPE)),
          "siglip": lambda: SigLIPVision(SigLIPVisionConfig(num_hidden_layers=7, intermediate_size=24, **SHAPE)),
          "dinov2": lambda: DINOv2(DINOv2Config(num_hidden_layers=4, mlp_ratio=2, **SHAPE))}
LLM = dict(vocab_size=384, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
           max_position_embeddings=512)
LLAMA, QWEN2 = lambda: Llama(LlamaConfig(**LLM)), lambda: Llama(LlamaConfig(**LLM, qkv_bias=True))
MISTRAL, PHI = lambda: Llama(LlamaConfig(**LLM, sliding_window=9)), lambda: Phi(PhiConfig(**LLM))
PICTURE = torch.randint(0, 256, (40, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()


def build(kind, towers=("clip",), template="vicuna_v1", mode="pad", llm=LLAMA, **connector):
    torch.manual_seed(0)
    llm = llm()
    statistics = {"clip": CLIPVision.statistics, "siglip": SigLIPVision.statistics, "dinov2": (IMAGENET_MEAN, IMAGENET_STD)}
    return wide(MLLM([TOWERS[name]() for name in towers], llm, ConnectorConfig(kind, **connector), make_tokenizer(), template,
                     ImageSpec(32, mode, *statistics[towers[0]])), 4)


@torch.no_grad()
def same(ours, again):
    """Template, picture and answer are the same: the logits of a prompt with a picture, bit for bit."""
    assert (again.template, again.spec, again.tokens_per_image) == (ours.template, ours.spec, ours.tokens_per_image)
    pixels, ids = ours.prompt([PICTURE], [("What?", None)])
    other_pixels, other_ids = again.prompt([PICTURE], [("What?", None)])
    assert ids == other_ids and torch.equal(pixels, other_pixels)
    tokens = torch.tensor([ids])
    assert torch.equal(ours.llm(embeds=ours.embed(tokens, pixels)), again.llm(embeds=again.embed(tokens, pixels)))
    assert again.generate([PICTURE], ["What?"], 8) == ours.generate([PICTURE], ["What?"], 8)


@pytest.mark.parametrize("towers", (("clip",), ("siglip",)))
@pytest.mark.parametrize("kind", ("linear", "mlp", "sti", "sci", "dci", "dense", "efficient"))
def test_what_goes_out_in_the_authors_layout_comes_in_as_the_same_model(kind, towers, tmp_path):
    """SigLIP loses its last block on the way, which no connector reads."""
    ours = build(kind, towers)
    export(ours, tmp_path / "llava", "llava")
    again = MLLM.from_pretrained(tmp_path / "llava")
    assert again.connector_config.kind == ("dci" if kind == "dense" else kind)
    same(ours, again)
    names = load_file(tmp_path / "llava" / "model.safetensors")
    assert ("model.vision_tower.vision_tower.vision_model.encoder.layers.6.layer_norm1.weight" in names) is False
    assert "model.mm_projector.weight" in names if kind == "linear" else "model.mm_projector.2.bias" in names


@pytest.mark.parametrize("kind, towers, template, mode", [
    ("mlp", ("clip",), "vicuna_v1", "pad"), ("linear", ("siglip",), "llama_2", "stretch"), ("mlp", ("dinov2",), "plain", "crop")])
def test_what_goes_out_in_transformers_layout_comes_in_as_the_same_model(kind, towers, template, mode, tmp_path):
    ours = build(kind, towers, template, mode)
    export(ours, tmp_path / "hf")
    again = MLLM.from_pretrained(tmp_path / "hf")
    assert again.connector_config.kind == kind
    same(ours, again)
    export(again, tmp_path / "again")                                # and out again as the same files
    for path in (tmp_path / "hf").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("llm", (QWEN2, MISTRAL, PHI))
def test_every_family_of_llm_goes_out_and_comes_in(llm, tmp_path):
    ours = build("dci", llm=llm)
    export(ours, tmp_path / "llava")
    same(ours, MLLM.from_pretrained(tmp_path / "llava"))
    export(ours, tmp_path / "llm", "llama")
    again = MLLM.assemble([export_tower(ours, tmp_path)], tmp_path / "llm", ConnectorConfig("dci"))
    assert again.llm.config == ours.llm.config
    assert all(torch.equal(a, b) for a, b in zip(again.llm.parameters(), ours.llm.parameters(), strict=True))


def export_tower(model, folder):
    export(model, folder / "tower", "tower")
    return folder / "tower"


def test_a_public_layout_comes_out_in_the_other(tmp_path):
    ours = build("mlp")
    export(ours, tmp_path / "hf", "llava-hf")
    export(MLLM.from_pretrained(tmp_path / "hf"), tmp_path / "llava", "llava")
    same(ours, MLLM.from_pretrained(tmp_path / "llava"))


def test_a_known_tower_is_named_and_another_is_described(tmp_path):
    """Their code finds a tower by its name, so one of a public shape keeps it; ours reads either."""
    ours = build("dci")
    export(ours, tmp_path / "llava")
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert (config["mm_dense_connector_type"], config["mm_hidden_size"], config["model_type"]) == ("dci", 48, "llava_llama")
    assert config["mm_vision_tower"] == "clip" and config["mm_vision_config"]["num_hidden_layers"] == 6
    with torch.device("meta"):
        large = CLIPVision(CLIPVisionConfig(1024, 24, 16, 4096, image_size=336, patch_size=14))
        model = MLLM([large], ours.llm, ConnectorConfig("sci"), ours.tokenizer, "vicuna_v1", ImageSpec(336))
    from export import llava
    _, tensors, config = llava(model)
    assert config["mm_vision_tower"] == "openai/clip-vit-large-patch14-336" and "mm_vision_config" not in config
    assert len([name for name in tensors if "vision_tower" in name]) == 391


@pytest.mark.parametrize("format, kind, towers, others, message", [
    ("llava-hf", "comm", ("clip", "dinov2"), {}, "connector comm has no place in the llava-hf layout"),
    ("llava", "comm", ("clip", "dinov2"), {}, "connector comm has no place in LLaVA's layout, which has one tower"),
    ("", "comm", ("clip", "dinov2"), {}, "connector comm has no place"),
    ("llava", "comm_clip", ("clip",), {}, "connector comm_clip has no place in LLaVA's layout"),
    ("llava-hf", "linear", ("clip",), dict(layer=2), r"a connector that reads hidden\[2\] is not written"),
    ("llava", "mlp", ("clip",), dict(layer=6), r"a connector that reads hidden\[6\] is not written.* LLaVA's, hidden\[5\]"),
    ("llava-hf", "dci", ("clip",), {}, "connector dci has no place .* which --format=llava has room for"),
    ("llava", "dci", ("clip",), dict(groups=3), "3 groups of layers have no place"),
    ("llava", "mlp", ("dinov2",), {}, "a dinov2 tower has no place in LLaVA's layout"),
    ("llava-hf", "mlp", ("clip",), dict(llm=PHI), "Phi has no place in the llava-hf layout: its lm_head has a bias")])
def test_what_a_layout_has_no_place_for_is_an_error(format, kind, towers, others, message, tmp_path):
    with pytest.raises(InputError, match=message):
        export(build(kind, towers, **others), tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("index, tower", ((0, CLIPVision), (1, DINOv2)))
def test_each_tower_of_comm_goes_out_alone(index, tower, tmp_path):
    model = build("comm", ("clip", "dinov2"))
    model.vision[1].normalize.mean.fill_(0.25)
    export(model, tmp_path / "tower", "tower", index)
    again = tower.from_pretrained(tmp_path / "tower")
    assert torch.equal(again.normalize.mean, model.vision[index].normalize.mean)
    ours = model.vision[index].state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(InputError, match="--tower=2: this model has 2"):
        export(model, tmp_path / "none", "tower", 2)


def test_the_llm_goes_out_alone_and_trains_again(tmp_path):
    model = build("dci")
    export(model, tmp_path / "llm", "llama")
    again = MLLM.assemble([export_tower(model, tmp_path)], tmp_path / "llm", ConnectorConfig("dci"))
    again.connector.load_state_dict(model.connector.state_dict())
    same(model, again)


# --- the command ------------------------------------------------------------------------------------------------------

def test_the_command_keeps_the_dtype_that_is_stored(tmp_path, capsys):
    build("mlp").save(tmp_path / "half", torch.bfloat16)
    main([f"--model={tmp_path / 'half'}", f"--to={tmp_path / 'hf'}"])
    assert capsys.readouterr().out == f"wrote {tmp_path / 'hf'} (llava-hf)\n"
    assert {tensor.dtype for tensor in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.bfloat16}
    main([f"--model={tmp_path / 'hf'}", f"--to={tmp_path / 'whole'}", "--dtype=float32", "--format=llava"])
    assert {tensor.dtype for tensor in load_file(tmp_path / "whole" / "model.safetensors").values()} == {torch.float32}
    same(MLLM.from_pretrained(tmp_path / "half"), MLLM.from_pretrained(tmp_path / "whole"))


def test_wrong_options_are_errors(tmp_path, model_folder):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_bytes(b"")
    for arguments, message in ((["--to="], "--to=FOLDER"), (["--to=photos"], "--to=photos: exists already; name a new folder"),
                                   ([f"--to={model_folder}"], "exists already"),
                               (["--to=x", "--format=onnx"], "--format=onnx: llava-hf, llava"),
                               (["--to=x", "--dtype=int8"], "--dtype=int8: float32")):
        with pytest.raises(InputError, match=message):
            main(arguments)


def test_a_picture_and_a_prompt_are_the_whole_command(tmp_path, model_folder, capsys):
    """sample.py with a foreign folder: nothing else is said on the command line."""
    import sample
    from PIL import Image
    Image.fromarray(PICTURE).save(tmp_path / "photo.png")
    ours = build("sti")
    export(ours, tmp_path / "theirs")
    sample.main(["--model=theirs", "--image=photo.png", "--prompt=What?", "--max_new_tokens=5"])
    expected = "".join(sample.stream_answer(ours, [PICTURE], [("What?", None)], 5))
    assert capsys.readouterr().out == expected + "\n" and expected
