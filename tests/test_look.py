"""look.py: colours are principal components, the attention is the modules' own, and there is a sheet for every kind of model."""
import numpy as np
import pytest
import torch
from PIL import Image

import look
from clip import CLIPVision, CLIPVisionConfig, SigLIPVision, SigLIPVisionConfig
from conftest import ROOT, recorded
from connector import ConnectorConfig
from dinov2 import DINOv2, DINOv2Config
from hub import InputError
from llama import Llama, LlamaConfig
from look import (answer_ids, boxes_in, inputs_of, llm_attention, look_back, look_through, on_patches, principal_colours,
                  tower_attention)
from mllm import MLLM
from phi import Phi, PhiConfig

WEIGHTS = [str(ROOT / "weights" / name) for name in ("clip", "dinov2", "llama")]
SMALL = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=3, image_size=64, patch_size=16)
PIXELS = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def close(ours, theirs):
    """Both in float32 and of order one: apart by rounding only."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# --- colours ----------------------------------------------------------------------------------------------------------

def test_colours_are_the_three_principal_components_of_the_patches():
    """Re-derived from the covariance's eigenvectors in numpy; a sign is free, so each channel is right side up or upside down."""
    features = torch.randn(64, 24, generator=torch.Generator().manual_seed(1)) * torch.linspace(4, 1, 24) + 5
    colours, share = principal_colours(features)
    centred = features.double().numpy() - features.double().numpy().mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred)            # ascending
    assert share == pytest.approx(values[-3:].sum() / values.sum(), rel=1e-9)
    for channel in range(3):
        scores = centred @ vectors[:, -1 - channel]
        low, high = np.percentile(scores, [2, 98])
        expected = ((scores - low) / (high - low)).clip(0, 1)
        ours = colours[:, channel].numpy()
        assert min(abs(ours - expected).max(), abs(ours - (1 - expected)).max()) < 1e-6


def test_the_few_patches_unlike_the_rest_are_bright_and_stay_so_from_layer_to_layer():
    features = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))
    features[:5] += 20
    for turned in (features, -features):                             # the same picture for the eye, the other sign for the SVD
        red = principal_colours(turned)[0][:, 0]
        assert red[:5].min() > 0.9 and red[5:].max() < 0.3
    before = 1 - principal_colours(features)[0]
    torch.testing.assert_close(principal_colours(features, before)[0], before)


@pytest.mark.parametrize("features", [torch.ones(16, 8), torch.zeros(1, 8), torch.rand(4, 2), torch.rand(4, 1).expand(4, 8)])
def test_where_nothing_varies_the_colour_is_grey(features):
    colours, share = principal_colours(features)
    assert colours.shape == (len(features), 3) and (colours[:, 2] == 0.5).all() and 0 <= share <= 1.0001


# --- attention --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tower", [CLIPVision(CLIPVisionConfig(**SMALL)), DINOv2(DINOv2Config(**SMALL, num_register_tokens=4)),
                                   SigLIPVision(SigLIPVisionConfig(**SMALL))], ids=lambda tower: type(tower).__name__)
@torch.no_grad()
def test_the_attention_recomputed_times_v_is_what_the_towers_module_gives(tower):
    module, given = tower.blocks[1].attn, []
    hook = module.register_forward_hook(lambda module, args, output: given.append(output))
    with inputs_of([module]) as seen:
        tower(PIXELS)
    hook.remove()
    weights = tower_attention(module, *seen[0])                      # (1, H, S, S)
    v = module.v(seen[0][0]).unflatten(-1, (2, 16)).transpose(1, 2)
    close(module.proj((weights @ v).transpose(1, 2).flatten(2)), given[0])
    assert not module._forward_pre_hooks                             # and nothing is left behind


LLM = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


@pytest.mark.parametrize("llm", {"LLaMA": Llama(LlamaConfig(**LLM)), "grouped": Llama(LlamaConfig(**LLM, num_key_value_heads=2)),
                                 "window": Llama(LlamaConfig(**LLM, sliding_window=5)), "Phi": Phi(PhiConfig(**LLM))}.items(),
                         ids=lambda pair: pair[0])
@torch.no_grad()
def test_the_attention_recomputed_times_v_is_what_the_llms_module_gives(llm):
    llm, given = llm[1], []
    module = llm.layers[1].self_attn
    hook = module.register_forward_hook(lambda module, args, output: given.append(output))
    with inputs_of([module]) as seen:
        llm(torch.arange(3, 15)[None])
    hook.remove()
    weights = llm_attention(module, *seen[0])                        # (1, H, T, T)
    assert (weights.triu(1) == 0).all()
    v = module.v_proj(seen[0][0]).unflatten(-1, (-1, 8)).transpose(1, 2)
    v = v.repeat_interleave(4 // v.shape[1], dim=1)
    out = module.dense if isinstance(llm, Phi) else module.o_proj
    close(out((weights @ v).transpose(1, 2).flatten(2)), given[0])


def test_the_class_tokens_rows_sum_to_one_and_cover_the_grid():
    for variant, prefix in (("clip_vision", 1), ("dinov2_registers", 5), ("dinov2", 1)):
        folder, _ = recorded(variant)
        tower = (CLIPVision if "clip" in variant else DINOv2).from_pretrained(folder)
        R, P = tower.config.image_size, tower.config.patch_size
        hidden, rows = look_through(tower, torch.randint(0, 256, (1, 3, R, R), dtype=torch.uint8))
        assert len(hidden) == tower.config.num_hidden_layers + 1
        assert {h.shape for h in hidden} == {((R // P) ** 2, tower.config.hidden_size)}
        assert rows.shape == (prefix, tower.config.num_attention_heads, prefix + (R // P) ** 2)
        close(rows.sum(-1), torch.ones(rows.shape[:2]))


# --- the answer -------------------------------------------------------------------------------------------------------

def test_the_ids_that_spell_a_box_are_found(world_tokenizer):
    text = "small red circle [0.11,0.50,0.43,0.84]; a [word], large blue cross [0.02,0.10,0.37,0.44]"
    ids = world_tokenizer.encode(text + "</s>", add_special_tokens=False).ids
    found = boxes_in(world_tokenizer, ids)
    assert [box for box, _ in found] == [[0.11, 0.5, 0.43, 0.84], [0.02, 0.1, 0.37, 0.44]]
    assert [world_tokenizer.decode([ids[i] for i in places]).strip(" ;,") for _, places in found] == \
        ["[0.11,0.50,0.43,0.84]", "[0.02,0.10,0.37,0.44]"]
    ids = world_tokenizer.encode("yes</s>", add_special_tokens=False).ids
    assert boxes_in(world_tokenizer, ids) == [(None, list(range(len(ids))))]


def test_looking_back_is_the_row_of_the_token_before(tiny_model):
    """The attention of the whole dialogue, computed in one piece, at hand-counted places."""
    picture, (question, answer) = Image.new("RGB", (64, 64), "red"), ("Where?", "yes")
    ids = tiny_model.tokenizer.encode(answer + "</s>", add_special_tokens=False).ids
    looked = look_back(tiny_model, picture, question, ids, [0, 1])
    assert looked.shape == (2, len(ids), 16) and (looked > 0).all() and (looked.sum(-1) < 1).all()
    pixels, prompt = tiny_model.prompt([picture], [(question, None)])
    tokens, first = torch.tensor([prompt + ids]), prompt.index(look.IMAGE)
    with torch.no_grad(), inputs_of([tiny_model.llm.layers[1].self_attn]) as seen:
        tiny_model.llm(embeds=tiny_model.embed(tokens, pixels))
        weights = llm_attention(tiny_model.llm.layers[1].self_attn, *seen[0])[0].mean(0)
    close(looked[1, 0], weights[len(prompt) - 1, first:first + 16])
    close(looked[1, -1], weights[-2, first:first + 16])


def test_the_answer_is_what_generate_says(tiny_model):
    picture = Image.new("RGB", (64, 64), "red")
    assert tiny_model.text(answer_ids(tiny_model, picture, "What?", 12)) == tiny_model.generate([picture], ["What?"], 12)[0]


def test_pooled_tokens_give_their_attention_back_to_their_patches():
    assert on_patches(torch.arange(16.), 64).tolist() == list(range(16))                 # efficient: a smaller grid
    for N in (16, 20):                                               # a remainder of 4 belongs to no run of 8
        weights = torch.rand(N + 2 * (N // 8))
        patches = on_patches(weights, N)
        assert patches.shape == (N,) and patches.sum() == pytest.approx(weights.sum().item())
        assert patches[8] == pytest.approx((weights[8] + (weights[N + 1] + weights[N + N // 8 + 1]) / 8).item())


# --- the sheet --------------------------------------------------------------------------------------------------------

def drawn(path="out/look.png"):
    sheet = Image.open(path)
    assert sheet.width == look.WIDTH and sheet.getpixel((2, sheet.height // 2)) == (255, 255, 255)
    return sheet


def test_without_a_model_the_towers_of_weights_are_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    look.main([])                                                    # from any folder
    said = capsys.readouterr()
    assert f"out/look.png shows what {ROOT / 'weights/clip'}, {ROOT / 'weights/dinov2'} makes of test scene 0" in said.out
    assert "no model under out/" in said.err
    assert drawn().height > 1000


def test_the_newest_model_is_asked_where_the_objects_are(model_folder, capsys):
    look.main(["--scene=3", "--max_new_tokens=4", "--device=cpu"])
    printed = capsys.readouterr().out
    assert printed.count("Where is the ") == 3 and "test scene 3" in printed
    plain = np.asarray(drawn())
    look.main(["--scene=3", "--max_new_tokens=4", "--device=cpu"])
    assert (np.asarray(drawn()) == plain).all()                      # the same picture, the same sheet


@pytest.mark.parametrize("merge", ["lln", "mean_half"])
def test_comms_weights_are_shown_where_they_are_learned(merge, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    titles, section = [], look.section
    monkeypatch.setattr(look, "section", lambda title, *rest: titles.append(title) or section(title, *rest))
    model = MLLM.assemble(WEIGHTS[:2], WEIGHTS[2], ConnectorConfig("comm", merge=merge))
    model.save(tmp_path / "comm")
    look.main([f"--model={tmp_path / 'comm'}", "--prompt=Is there a red circle?", "--max_new_tokens=4", "--out=comm.png",
               "--device=cpu"])
    drawn("comm.png")
    assert titles[0] == "Is there a red circle?"
    assert "CLIP: its patches in colour" in titles and "DINOv2: where its class token looks" in titles
    assert any("learned share" in title for title in titles) == (merge == "lln")


def test_the_bars_are_as_high_as_the_weights():
    picture = np.asarray(look.bars([5, 6], torch.tensor([0.75, 0.25]), 400)).astype(int)
    bar = (picture == (0x9c, 0xc3, 0xf5)).all(-1)
    assert bar[:, 10].sum() / bar[:, 80].sum() == pytest.approx(3, rel=0.1)


def test_a_model_answers_about_a_real_photograph(real, tiny_model, tmp_path, monkeypatch, capsys):
    """A portrait, padded: its sheet is drawn, with the boxes that the model is made to say."""
    ids = tiny_model.tokenizer.encode("[0.25,0.50,0.75,0.75]; [9.00,0.10,0.20,0.30]</s>", add_special_tokens=False).ids
    monkeypatch.setattr(look, "answer_ids", lambda *args: ids)
    tiny_model.save(tmp_path / "model")
    photograph = real / "images" / "000000000036.jpg"
    look.main([str(photograph), f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'a.png'}", "--device=cpu"])
    assert "Describe the picture.  [0.25,0.50,0.75,0.75]" in capsys.readouterr().out
    pixels = np.asarray(drawn(tmp_path / "a.png"))
    for colour in look.COLOURS[:2]:
        assert (pixels == tuple(bytes.fromhex(colour[1:]))).all(-1).sum() > 100


def test_a_tower_without_class_token_is_told_of_rather_than_refused(tmp_path, monkeypatch):
    said, write = [], look.write
    monkeypatch.setattr(look, "write", lambda draw, place, text, *rest: said.append(text) or write(draw, place, text, *rest))
    torch.manual_seed(0)
    SigLIPVision(SigLIPVisionConfig(**SMALL)).save_pretrained(tmp_path / "siglip")
    DINOv2(DINOv2Config(**SMALL, num_register_tokens=2)).save_pretrained(tmp_path / "registers")
    deit, _ = recorded("deit")
    look.main([f"--vision={tmp_path / 'siglip'},{tmp_path / 'registers'},{deit}", f"--out={tmp_path / 'towers.png'}",
               "--device=cpu"])
    drawn(tmp_path / "towers.png")
    assert "SigLIP: no class token" in said
    assert any(text.startswith("register 2, mean") for text in said) and any(text.startswith("distillation 1") for text in said)


@pytest.mark.parametrize("flags, message", [
    (["--image=missing.jpg"], "missing.jpg: no such image"),
    (["--image=out/tiny/model/config.json"], "config.json: not a readable image"),
    (["--model=nowhere/at/all"], "nowhere/at/all: no such folder"),
    (["--vision=nowhere/at/all"], "nowhere/at/all: no such folder"),
    ([f"--model={WEIGHTS[0]}"], "is not a multimodal model"),
    ([f"--vision={WEIGHTS[2]}"], "'llama' is not a vision tower"),
    (["--model=a", "--vision=b"], "choose one of the two"),
    (["--scene=-1"], "--scene=-1"),
    (["--max_new_tokens=0"], "--max_new_tokens=0"),
    (["--max_new_tokens=5000"], "exceed the model's context"),
    (["--prompt=<image> <image>"], "1 more <image> marks than pictures"),
    (["--max_new_tokens=2", "--out=sheet.docx"], "sheet.docx: the picture's name should end in .png"),
    (["--scenes=1"], "the nearest is scene"),
    (["--device=abacus"], "--device=abacus: cannot be used"),
])
def test_bad_input_is_an_input_error_that_says_what_is_wrong(flags, message, model_folder):
    with pytest.raises(InputError) as caught:
        look.main(flags)
    assert message in str(caught.value)
