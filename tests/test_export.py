"""interop.export: every format is read back as the same model, or the export is an error."""

import torch
from conftest import refused
from make_dense_folder import wide
from make_llava_tokenizer import make_tokenizer
from PIL import Image
from safetensors.torch import load_file

from clip import CLIPVision, CLIPVisionConfig, SigLIPVision, SigLIPVisionConfig
from common.images import ImageSpec
from common.pretrained import read_json
from common.save import save_tower
from dinov2 import DINOv2, DINOv2Config
from interop.export import FORMATS, export, main
from interop.load import load_model
from interop.phi import Phi, PhiConfig
from llama import Llama, LlamaConfig
from mllm import MLLM
from vit import ViT, ViTConfig

SHAPE = {"hidden_size": 16, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
TOWERS = {
    "clip": (CLIPVision, CLIPVisionConfig, {"num_hidden_layers": 6, "intermediate_size": 24}),
    "siglip": (SigLIPVision, SigLIPVisionConfig, {"num_hidden_layers": 7, "intermediate_size": 24}),
    "dinov2": (DINOv2, DINOv2Config, {"num_hidden_layers": 4, "mlp_ratio": 2}),
    "vit": (ViT, ViTConfig, {"num_hidden_layers": 4, "intermediate_size": 24}),
    "registers": (DINOv2, DINOv2Config, {"num_register_tokens": 2}),
}
LLM = {"vocab_size": 384, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
LLM |= {"num_attention_heads": 2, "max_position_embeddings": 512}
IMAGE = Image.effect_noise((32, 40), 90).convert("RGB")


def build(connector, towers=("clip",), template="vicuna_v1", mode="pad", llm=None, tokenizer=None):
    """Build a small MLLM with large random weights, so that every image changes the answer."""
    torch.manual_seed(0)
    vision = []
    for name in towers:
        cls, config, sizes = TOWERS[name]
        vision.append(cls(config(**SHAPE, **sizes)))
    llm = llm or Llama(LlamaConfig(**LLM))
    mean, std = (x.flatten().tolist() for x in (vision[0].normalize.mean, vision[0].normalize.std))
    spec = ImageSpec(32, mode, mean, std)
    tokenizer = tokenizer or make_tokenizer()
    return wide(MLLM(vision, llm, connector, tokenizer, template, spec), 4)


@torch.no_grad()
def assert_same(ours, again):
    """Template, prompt and logits are equal, bit for bit."""
    assert again.template == ours.template
    pixels, ids, index = ours.prompt([IMAGE], [("What?", None)])
    other_pixels, other_ids, other_index = again.prompt([IMAGE], [("What?", None)])
    assert (
        ids == other_ids and torch.equal(pixels, other_pixels) and torch.equal(index, other_index)
    )
    tokens = torch.tensor([ids])
    logits = ours.llm(embeds=ours.embed(tokens, pixels, index))
    assert torch.equal(again.llm(embeds=again.embed(tokens, pixels, index)), logits)


def test_the_authors_layout_is_read_back(tmp_path):
    cases = [("clip", connector) for connector in ("linear", "mlp", "sti", "sci", "efficient")]
    for tower, connector in [*cases, ("siglip", "dense"), ("clip", "dense")]:
        mode = "anyres" if (tower, connector) == ("clip", "dense") else "pad"
        ours, folder = build(connector, (tower,), mode=mode), tmp_path / tower / connector
        export(ours, folder, "llava")
        again = load_model(folder)
        assert again.connector.spec() == ours.connector.spec()
        assert_same(ours, again)


def test_transformers_layout_is_read_back_and_written_again(tmp_path):
    for connector, tower, template, mode in (
        ("mlp", "clip", "vicuna_v1", "pad"),
        ("mlp", "siglip", "llama_2", "stretch"),
        ("sci", "dinov2", "plain", "crop"),
        ("mlp", "vit", "mistral_instruct", "anyres"),
    ):
        ours = build(connector, (tower,), template, mode)
        assert export(ours, tmp_path / tower) == "llava-hf"
        again = load_model(tmp_path / tower)
        assert again.connector.name == connector
        assert_same(ours, again)
        export(again, tmp_path / "again")
        for path in (tmp_path / tower).iterdir():
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_llm_and_towers_alone_are_read_back(tmp_path):
    """Every LLM family; both towers of comm, each with its own pixel statistics."""
    families = {
        "qwen2": Llama(LlamaConfig(**LLM, qkv_bias=True)),
        "qwen3": Llama(LlamaConfig(**LLM, qk_norm=True)),
        "smollm3": Llama(LlamaConfig(**LLM, no_rope_layers=[1, 0])),
        "mistral": Llama(LlamaConfig(**LLM, sliding_window=9)),
        "phi": Phi(PhiConfig(**LLM)),
    }
    for family, llm in families.items():
        ours = build("comm", ("clip", "dinov2"), llm=llm)
        ours.vision[1].normalize.mean.fill_(0.25)
        folders = [tmp_path / f"{family}{i}" for i in range(2)]
        for vision, folder in zip(ours.vision, folders, strict=True):
            save_tower(vision, folder)
        export(ours, tmp_path / family, "llama")
        again = MLLM.assemble(folders, tmp_path / family, "comm", image_size=32)
        again.connector.load_state_dict(ours.connector.state_dict())
        assert again.llm.config == ours.llm.config
        assert_same(ours, again)
        dense = build("dense", llm=llm)
        export(dense, tmp_path / f"{family}-llava")
        assert_same(dense, load_model(tmp_path / f"{family}-llava"))


def test_a_public_tower_is_named_and_another_one_described(tmp_path):
    """The authors' code finds a tower by its name."""
    ours = build("dense")
    export(ours, tmp_path / "llava")
    config = read_json(tmp_path / "llava" / "config.json")
    assert (config["mm_dense_connector_type"], config["model_type"]) == ("dci", "llava_llama")
    assert (config["mm_vision_tower"], config["mm_hidden_size"]) == ("clip_vision_model", 48)
    assert config["mm_vision_config"]["num_hidden_layers"] == 6
    with torch.device("meta"):
        large = CLIPVision(CLIPVisionConfig(1024, 24, 16, 4096, image_size=336, patch_size=14))
        model = MLLM([large], ours.llm, "sci", ours.tokenizer, "vicuna_v1", ImageSpec(336))
    large.normalize.to_empty(device="cpu")
    _, tensors, config = FORMATS["llava"](model)
    assert config["mm_vision_tower"] == "openai/clip-vit-large-patch14-336"
    assert "mm_vision_config" not in config
    assert len([name for name in tensors if "vision_tower" in name]) == 391


def test_what_a_format_cannot_represent_is_an_error(tmp_path):
    comm = build("comm", ("clip", "dinov2"))
    for model, format in (
        (comm, "llava-hf"),
        (comm, "llava"),
        (comm, ""),
        (build("linear"), "llava-hf"),
        (build({"name": "mlp", "layer": 2}), "llava-hf"),
        (build({"name": "mlp", "layer": 6}), "llava"),
        (build("dense"), "llava-hf"),
        (build({"name": "dense", "groups": 3}), "llava"),
        (build("mlp", ("dinov2",)), "llava"),
        (build("mlp", ("registers",)), "llava-hf"),
        (build("mlp", llm=Phi(PhiConfig(**LLM))), "llava-hf"),
    ):
        with refused("--format"):
            export(model, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


def test_the_command_keeps_the_stored_dtype_and_names_wrong_options(tmp_path, capsys):
    build("mlp").bfloat16().save(tmp_path / "half")
    main([f"--model={tmp_path / 'half'}", f"--to={tmp_path / 'hf'}"])
    assert "(llava-hf)" in capsys.readouterr().out
    main([f"--model={tmp_path / 'hf'}", f"--to={tmp_path / 'llava'}", "--format=llava"])
    for folder in ("hf", "llava"):
        tensors = load_file(tmp_path / folder / "model.safetensors").values()
        assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert_same(load_model(tmp_path / "half"), load_model(tmp_path / "llava"))
    for flags in ("--to=", f"--to={tmp_path}", "--format=onnx --to=x"):
        with refused(flags.partition("=")[0]):
            main([f"--model={tmp_path / 'half'}", *flags.split()])
