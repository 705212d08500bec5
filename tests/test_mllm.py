"""mllm.py: where images enter the text, what the loss sums, what is generated, and the folder."""

import json
from pathlib import Path

import pytest
import torch
from conftest import HEADS, refused, relative_error
from PIL import Image
from tokenizers import Tokenizer

import train
from clip import CLIPVision, CLIPVisionConfig, SigLIPVision, SigLIPVisionConfig
from common import checkpoint, speed
from common.images import ImageSpec
from data import Batches, Sample
from dialogue import IGNORE, IMAGE, encode
from dinov2 import DINOv2, DINOv2Config
from llama import Llama, LlamaConfig
from mllm import MLLM
from toy import world
from vit import ViT, ViTConfig

CONNECTORS = ("linear", "mlp", "sti", "sci", "dense", "efficient", "comm")
CLIP = {"num_hidden_layers": 6, "intermediate_size": 64, "image_size": 64, "patch_size": 16} | HEADS
VIT = CLIP | {"num_hidden_layers": 4}
DINO = {"num_hidden_layers": 5, "mlp_ratio": 2, "image_size": 64, "patch_size": 16, **HEADS}
TOWERS = {
    "clip": (CLIPVision, CLIPVisionConfig, CLIP),
    "siglip": (SigLIPVision, SigLIPVisionConfig, CLIP),
    "dinov2": (DINOv2, DINOv2Config, DINO),
    "registers": (DINOv2, DINOv2Config, DINO | {"num_register_tokens": 4, "image_size": 96}),
    "vit": (ViT, ViTConfig, VIT | {"num_labels": 3}),
    "deit": (ViT, ViTConfig, VIT | {"model_type": "deit"}),
    "deit3": (ViT, ViTConfig, VIT | {"model_type": "deit3"}),
    "mae": (ViT, ViTConfig, VIT | {"model_type": "vit_mae"}),
}


@pytest.fixture(scope="module")
def build(world_tokenizer):
    """Return build(connector, towers, **llm): a small MLLM whose random weights are wide.

    With the usual narrow weights towers and LLM say nearly the same whatever they see.
    """

    def make(connector="mlp", towers=None, mode="pad", **llm):
        torch.manual_seed(1)
        names = towers or (("clip", "dinov2") if connector == "comm" else ("clip",))
        towers = []
        for name in names:
            tower_class, config_class, fields = TOWERS[name]
            towers.append(tower_class(config_class(**fields)))
        sizes = {"intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 384}
        sizes |= {"vocab_size": world_tokenizer.get_vocab_size(), **HEADS} | llm
        llm = Llama(LlamaConfig(**sizes))
        model = MLLM(towers, llm, connector, world_tokenizer, "tiny", ImageSpec(64, mode))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() >= 2:
                    p.normal_(std=0.5 if "embed" in name else 1.5 / p[0].numel() ** 0.5)
        return model.eval()

    return make


def image(index):
    return world.draw(world.scene("test", index), "test", index)


TEXT = Sample([], [("What is red?", "A color."), ("And two?", "2")], "text")
TURNS = [("<image>\nWhat is this?", "a large red circle"), ("Where?", "[0.10,0.20,0.30,0.40]")]
ONE = Sample([image(0)], TURNS, "one")
TWO = Sample([image(1), image(2)], [("Is <image> the same as <image>", "no")], "two")
TURNS = [("<image>\nWhat is this?", "a square."), ("And this: <image>?", "a cross.")]
LATER = Sample([image(3), image(4)], TURNS, "later")
ALL = (TEXT, ONE, TWO, LATER)


def batch_of(model, *samples):
    """Make the data.Batch that the loader makes of these samples."""
    spec, tokens_per_image = model.spec, model.tokens_per_image
    batches = Batches(samples, model.tokenizer, model.template, spec, tokens_per_image, 2048)
    return batches[range(len(samples))]


def loss_and_gradients(model, *batches):
    model.zero_grad()
    loss = sum(model(batch) for batch in batches)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), sum(len(batch.supervised) for batch in batches), gradients


def assert_equal_losses(ours, expected):
    """Sums in another order: 1e-7 a sum, up to 1e-5 where large terms of a gradient cancel."""
    assert ours[1] == expected[1] > 10
    assert abs(ours[0] - expected[0]) < 1e-5 * expected[0]
    assert ours[2].keys() == expected[2].keys()
    for name, gradient in ours[2].items():
        # A bias on all keys changes no attention: its gradient is only rounding.
        if not name.endswith("attn.k.bias"):
            assert relative_error(gradient, expected[2][name]) < 1e-4, name


# ---- forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("connector", CONNECTORS)
@torch.no_grad()
def test_loss_is_the_cross_entropy_of_full_logits_at_answers(build, connector):
    """Each sample alone: its tokens put together by hand, all logits, log-softmax in float64."""
    model = build(connector)
    batch = batch_of(model, *ALL)
    loss = model(batch)
    slow = count = 0
    for sample in ALL:
        embeds, targets, images = [], [], iter(sample.images)
        ids, labels = encode(model.tokenizer, sample.turns, model.template)
        for token, label in zip(ids, labels, strict=True):
            if token == IMAGE:
                pixels = torch.from_numpy(next(images)).permute(2, 0, 1)[None]
                embeds.append(model.see(pixels)[0])
                targets += [IGNORE] * model.tokens_per_image
            else:
                embeds.append(model.llm.embed_tokens.weight[token][None])
                targets.append(label)
        logits = model.llm(embeds=torch.cat(embeds)[None])[0].double().log_softmax(-1)
        for place, target in enumerate(targets[1:]):
            if target != IGNORE:
                slow -= logits[place, target].item()
                count += 1
    assert len(batch.supervised) == count > 20
    assert abs(loss.item() - slow) < 1e-5 * slow


def test_too_few_or_too_many_images_for_the_marks_are_an_error(build):
    model = build()
    batch = batch_of(model, TWO)
    for pixels in (batch.pixels[:1], torch.cat([batch.pixels, batch.pixels])):
        with pytest.raises(IndexError, match="indices"):
            model.embed(batch.tokens, pixels)


@pytest.mark.parametrize("connector", ("dense", "comm"))
def test_packed_dialogues_give_loss_and_gradients_of_each_alone(build, connector):
    model = build(connector)
    alone = loss_and_gradients(model, *(batch_of(model, sample) for sample in ALL))
    assert_equal_losses(loss_and_gradients(model, batch_of(model, *ALL)), alone)


@torch.no_grad()
def test_anyres_images_of_all_shapes_answer_together_as_alone(build, tmp_path):
    """Images have different numbers of tokens, in a batch of data, of prompts, and saved."""
    model = build("efficient", mode="anyres")
    wide, tall = Image.effect_noise((150, 60), 90), Image.effect_noise((70, 99), 90)
    samples = [TWO._replace(images=[wide, tall]), ONE._replace(images=[tall]), TEXT, ONE]
    together = model(batch_of(model, *samples))
    apart = sum(model(batch_of(model, sample)) for sample in samples)
    assert abs(together - apart) < 1e-5 * apart
    images, prompts = [wide, None, [tall, wide]], ["What is this?", "Count.", "Is <image> red?"]
    alone = [model.generate([i], [p], 12)[0] for i, p in zip(images, prompts, strict=True)]
    assert model.generate(images, prompts, 12) == alone and len(set(alone)) == 3
    with refused("elongated"):
        model.generate([Image.new("L", (3000, 20))], ["What?"], 2)
    assert_same_model(model, tmp_path / "model")


def test_logits_in_parts_give_the_loss_and_gradients_of_all_at_once(build, monkeypatch):
    model = build()
    batch = batch_of(model, TEXT, ONE, LATER)
    expected = loss_and_gradients(model, batch)
    for size in (1, 2000):
        monkeypatch.setattr(speed, "MAX_LOGITS", size)
        assert_equal_losses(loss_and_gradients(model, batch), expected)


def test_a_batch_of_text_gives_every_trained_parameter_a_zero_gradient(build):
    """DDP waits on every rank for the gradient of every trained parameter."""
    model = build("dense").requires_grad_(False)
    model.connector.requires_grad_(True)
    model(batch_of(model, TEXT)).backward()
    assert all((p.grad == 0).all() for p in model.connector.parameters())


# ---- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("connector", ("mlp", "sti", "comm"))
def test_a_batch_answers_as_each_prompt_alone(build, connector):
    model = build(connector)
    images = [image(0), None, [image(1), image(2)], Image.fromarray(image(3))]
    prompts = ["What is this?", "Count.", "Is <image> like <image>?", [("A?", "b"), ("C?", None)]]
    together = model.generate(images, prompts, 12)
    alone = [model.generate([i], [p], 12)[0] for i, p in zip(images, prompts, strict=True)]
    assert together == alone and len(set(together)) == 4


@torch.no_grad()
def test_generation_is_greedy_decoding_by_whole_forwards_to_an_end_token(build):
    model = build("dense")
    pixels, ids, _ = model.prompt([image(0)], [("What is this?", None)])
    steps = torch.stack(list(model.stream([image(0)], ["What is this?"], 10)))[:, 0].tolist()
    for token in steps:
        logits = model.llm(embeds=model.embed(torch.tensor([ids]), pixels))
        assert logits[0, -1].argmax() == token
        ids.append(token)
    model.llm.config.eos_token_id = [steps[3], 2]
    shorter = torch.stack(list(model.stream([image(0)], ["What is this?"], 10)))[:, 0].tolist()
    assert shorter == steps[: steps.index(steps[3]) + 1]


def test_what_cannot_be_generated_is_one_line(build, tmp_path):
    model = build()
    cases = [([None], ["word " * 400]), ([image(0)], ["<image> <image>"])]
    cases.append(([str(tmp_path / "none.png")], ["What?"]))
    # A token without an embedding is only an error where it occurs.
    model.tokenizer = Tokenizer.from_str(model.tokenizer.to_str())
    model.tokenizer.add_special_tokens(["<new>"])
    assert model.generate([None], ["What?"], 1)
    cases.append(([None], ["What <new>?"]))
    for images, prompts in cases:
        with refused():
            model.generate(images, prompts, 8)


# ---- training with AnyRes ------------------------------------------------------------------------


def test_image_newline_is_trained_in_stage_2(clean_run, flags):
    train.main(flags(image_mode="anyres", steps2=4))
    name, folder = "connector.image_newline", Path("run/checkpoints")
    assert name in checkpoint.names(folder / "stage2-0000004")
    assert name not in checkpoint.names(folder / "stage1-0000002")


# ---- the folder ----------------------------------------------------------------------------------


def assert_same_model(model, folder):
    model.save(folder)
    again = MLLM.from_pretrained(folder)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert (again.spec, again.template) == (model.spec, model.template)
    assert again.connector.spec() == model.connector.spec()
    assert again.generate(image(0), "What?", 8) == model.generate([image(0)], ["What?"], 8)[0]


def test_a_saved_model_is_the_same_model(build, tmp_path):
    for connector in CONNECTORS:
        assert_same_model(build(connector), tmp_path / connector)
    for tower in TOWERS:
        assert_same_model(build("mlp", towers=(tower,)), tmp_path / tower)
    grouped = {"num_key_value_heads": 1, "head_dim": 24, "attention_bias": True}
    for i, llm in enumerate(({"tie_word_embeddings": True}, grouped)):
        assert_same_model(build("mlp", **llm), tmp_path / f"llm{i}")
    # The layers that it was trained on, not the default ones.
    assert_same_model(build({"name": "sci", "layers": [[5, 0, 1]]}), tmp_path / "layers")
    assert MLLM.from_pretrained(tmp_path / "layers").connector.layers == [[5, 0, 1]]


def test_damaged_folders_are_one_line_that_names_the_file(build, tmp_path):
    folder = tmp_path / "model"
    build().save(folder)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        with refused(name):
            MLLM.from_pretrained(folder)
        (folder / name).unlink()
        with refused():
            MLLM.from_pretrained(folder)
        (folder / name).write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    for key in ("connector", "vision", "llm", "template"):
        less = {k: v for k, v in config.items() if k != key}
        (folder / "config.json").write_text(json.dumps(less))
        with refused(str(folder)):
            MLLM.from_pretrained(folder)
