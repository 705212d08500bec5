"""pretrain.py: the world's tokenizer, the three recipes in a few steps, and the checkpoints that the repository holds."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

import pretrain
import world
from clip import CLIP, CLIPVision
from conftest import ROOT
from dialogue import encode, find_template, load_tokenizer
from dinov2 import DINOv2
from hub import InputError
from images import ImageSpec
from llama import Llama
from vit import ViT

NAMES = ("clip", "dinov2", "mae", "deit", "llama")


@pytest.fixture(scope="session")
def fresh(tmp_path_factory, world_tokenizer):
    """What the recipes write after two steps of four scenes: {name: folder}."""
    root = tmp_path_factory.mktemp("fresh")
    patch = pytest.MonkeyPatch()
    for scores in ("clip_scores", "probe_scores", "llama_scores"):
        patch.setattr(pretrain, scores, lambda *args: None)          # a thousand scenes each, too slow here
    patch.setattr(pretrain, "make_tokenizer", lambda: Tokenizer.from_str(world_tokenizer.to_str()))
    for name in NAMES:
        pretrain.main([name, f"--out={root / name}", "--steps=2", "--batch=4"])
    patch.undo()
    return {name: root / name for name in NAMES}


@pytest.fixture(params=["fresh", "weights"])
def folders(request):
    """The folders just written, and those of the repository."""
    if request.param == "fresh":
        return request.getfixturevalue("fresh")
    missing = [name for name in NAMES if not (ROOT / "weights" / name / "model.safetensors").exists()]
    if missing:
        pytest.skip(f"no weights/{', weights/'.join(missing)} yet")
    return {name: ROOT / "weights" / name for name in NAMES}


# --- the tokenizer ----------------------------------------------------------------------------------------------------

def one_token(tokenizer, text):
    return len(tokenizer.encode(text, add_special_tokens=False).ids) == 1


def test_words_and_coordinates_of_the_world_are_single_tokens(world_tokenizer):
    """In a sentence, so with the space before them; a coordinate is one with its comma. A shape after the
    plural's "How many" keeps its own token."""
    words = [*world.SHAPES, *world.COLOURS, *world.SIZES, "yes", "no", "left", "right", "above", "below", "circles", "squares",
             "triangles", "crosses", "shapes", "a", "an", "and", "Is", "there", "How", "many", "are", "Where", "is", "the", "What",
             "at", "colour", "shape", "one", "or", "of", "ASSISTANT:", *"012345"]
    assert [word for word in words if not one_token(world_tokenizer, f" {word}")] == []
    boxes = [o.box_text for index in range(200) for o in world.scene("test", index)]
    assert {len(world_tokenizer.encode(f" {box}", add_special_tokens=False).ids) for box in boxes} == {6}    # [, four numbers, ]
    assert all(one_token(world_tokenizer, mark) for mark in ("USER:", "[", "]", ",", ".", "?", "\n", " [", "</s>", "<s>"))


def test_the_worlds_texts_come_back_as_they_were(world_tokenizer):
    for index in range(60):
        objects, rng = world.scene("test", index), np.random.default_rng(index)
        for text in (world.caption(objects), world.listing(objects), pretrain.drawn_in_text(objects), pretrain.clip_caption(objects, rng),
                     *(part for turn in world.dialogue(objects, rng) for part in turn)):
            assert world_tokenizer.decode(world_tokenizer.encode(text, add_special_tokens=False).ids) == text


@pytest.mark.parametrize("text", ["naïve façade", "日本語の文", "🦙🏽 and 👩‍👩‍👧", "\t tabs\r\n  and   spaces \n", "0.123456 x 10^7",
                                  "½°\x00\x7f\ufeff", "CamelCase_and-dashes", "עברית العربية"])
def test_any_text_survives(world_tokenizer, text):
    ids = world_tokenizer.encode(text, add_special_tokens=False).ids
    assert world_tokenizer.decode(ids) == text and world_tokenizer.token_to_id("<unk>") not in ids


def test_special_tokens_stand_where_the_models_expect_them(world_tokenizer):
    assert [world_tokenizer.token_to_id(token) for token in pretrain.SPECIAL] == [0, 1, pretrain.BOS, pretrain.EOS]
    ids = world_tokenizer.encode("a red circle").ids                 # CLIP's texts begin and end
    assert ids[0] == pretrain.BOS and ids[-1] == pretrain.EOS and len(ids) == 5
    assert pretrain.EOS not in world_tokenizer.encode("</ s>", add_special_tokens=False).ids


def test_a_dialogue_of_the_world_fits_into_the_llms_context(world_tokenizer):
    """With 64 visual tokens, in training; or with the scene told in words, in pretraining."""
    for index in range(300):
        objects, rng = world.scene("train", index), world.generator("train", index, 2)
        seen = encode(world_tokenizer, [(f"{world.listing(objects)}\n", "")], "tiny")[0]
        for asked in (world.dialogue(objects, rng), pretrain.told(objects, rng, False)[1]):
            assert max(64, len(seen)) + len(encode(world_tokenizer, asked, "tiny")[0]) < 512


def test_a_drawing_in_letters_is_as_long_as_a_picture_and_shows_what_is_where(world_tokenizer):
    """64 tokens, one a cell, as a picture has 64 patches; an object is in the cells of its box and nowhere else."""
    for index in range(60):
        objects = world.scene("test", index)
        cells = world_tokenizer.encode(pretrain.drawn_in_text(objects), add_special_tokens=False).ids
        assert len(cells) == 64
        words = pretrain.drawn_in_text(objects).split()
        assert all(word == ".." or word[3:] == f"{cell // 8}{cell % 8}" for cell, word in enumerate(words))
        for o in objects:
            code = o.colour[0].upper() + o.shape[:2]
            at = [(cell % 8 * 8, cell // 8 * 8) for cell in range(64) if words[cell][:3] == code]
            assert at and all(o.x - 8 < x < o.x + o.side and o.y - 8 < y < o.y + o.side for x, y in at)
        assert {word[:3] for word in words} - {".."} == {o.colour[0].upper() + o.shape[:2] for o in objects}
    circle = world.Object("circle", "red", "small", 8.0, 0.0, 16.0)
    assert pretrain.drawn_in_text([circle]).split()[:9] == ["..", "Rci01", "Rci02", "..", "..", "..", "..", "..", ".."]


def test_a_wrong_caption_has_one_shape_or_colour_exchanged():
    rng = np.random.default_rng(0)
    for index in range(100):
        right = pretrain.clip_caption(world.scene("test", index), rng).split()
        wrong = pretrain.wrong_caption(" ".join(right), rng).split()
        (pair,) = [(a, b) for a, b in zip(right, wrong, strict=True) if a != b]
        assert set(pair) <= set(world.SHAPES) or set(pair) <= set(world.COLOURS)


def test_pretraining_begins_with_few_objects():
    config = pretrain.Config(batch=40)
    assert [pretrain.few_first(p, 0.1, 0.3) for p in (0.0, 0.09, 0.1, 0.29, 0.3, 1.0)] == [1, 1, 2, 2, 5, 5]
    assert max(len(objects) for _, objects in pretrain.scenes(config, 0, 1)) == 1
    assert max(len(objects) for _, objects in pretrain.scenes(config, 0)) == 5


def test_places_are_words_for_where_an_object_is():
    def at(x, y):
        return pretrain.place_words(world.Object("circle", "red", "small", x, y, 16.0))
    assert (at(0, 0), at(24, 0), at(48, 0)) == ("at the top left", "at the top", "at the top right")
    assert (at(0, 24), at(24, 24), at(48, 24)) == ("at the left", "in the middle", "at the right")
    assert (at(0, 48), at(24, 48), at(48, 48)) == ("at the bottom left", "at the bottom", "at the bottom right")


# --- what is learnt from --------------------------------------------------------------------------------------------------

def test_pretraining_draws_scenes_that_training_does_not():
    """train.py counts its scenes from 0; no recipe there comes near a million."""
    config = pretrain.Config(steps=5000, batch=256, seed=0)
    drawn = [index for step in (0, 1, 4999) for index, _ in pretrain.scenes(pretrain.Config(batch=3), step)]
    assert min(drawn) >= 1_000_000 and len(set(drawn)) == len(drawn)
    last_of_seed_0 = 1_000_000 + config.steps * config.batch
    assert pretrain.scenes(pretrain.Config(batch=1, seed=1), 0)[0][0] > last_of_seed_0


def test_things_drawn_anew_are_the_same_elsewhere():
    rng = np.random.default_rng(0)
    for index in range(50):
        objects = world.scene("train", index)
        anew = pretrain.drawn_anew(objects, rng)
        assert [(o.colour, o.shape) for o in anew] == [(o.colour, o.shape) for o in objects]
        for new, old in zip(anew, objects):
            assert 12 <= new.side <= min(24, 1.2 * old.side)
            assert 0 <= min(new.x, new.y) and max(new.x, new.y) + new.side <= world.SIDE
        assert all(abs(new.x - old.x) + abs(new.y - old.y) > 0 for new, old in zip(anew, objects))
    crowd = [world.Object("circle", colour, "large", 0, 0, 25.0) for colour in ("red", "green", "blue", "cyan", "white")]
    assert len(pretrain.drawn_anew(crowd, rng)) == 5                 # no room for five of that size: they shrink


def test_colours_drawn_anew_leave_shapes_and_exchange_channels():
    """A red square on black: it stays a square, and is red in about a third of those whose channels were exchanged."""
    pixels = torch.zeros(400, 3, 8, 8, dtype=torch.uint8)
    pixels[:, 0, 2:6, 2:6] = 100
    anew = pretrain.coloured_anew(pixels, torch.Generator().manual_seed(0))
    assert anew.dtype == torch.uint8 and torch.equal(anew.amax(1) > 0, pixels.amax(1) > 0)
    lit = (anew[:, :, 3, 3] > 0).float()
    grey, red = (lit.sum(1) == 3), (lit[:, 0] == 1) & (lit.sum(1) == 1)
    assert 0.1 < grey.float().mean() < 0.22                          # a fifth of four fifths
    assert 0.33 < red.float().mean() < 0.5                           # a fifth stays, of the other four fifths (0.64) a third


def test_a_part_holds_all_patches_of_its_object():
    rng = np.random.default_rng(0)
    for index in range(200):
        objects = pretrain.drawn_anew(world.scene("train", index), rng)
        part, on = pretrain.part_around(objects[0], rng), pretrain.lies_on(objects)
        rows, columns = part.reshape(4, 4)[:, 0] // 8, part.reshape(4, 4)[0] % 8
        assert (rows == np.arange(rows[0], rows[0] + 4)).all() and (columns == np.arange(columns[0], columns[0] + 4)).all()
        assert 0 <= part.min() and part.max() < 64 and set(np.flatnonzero(on == 0)) <= set(part)
        o = objects[0]
        assert columns[0] * 8 <= o.x and o.x + o.side <= columns[-1] * 8 + 8 and rows[0] * 8 <= o.y and o.y + o.side <= rows[-1] * 8 + 8
        for i, o in enumerate(objects):
            middles = [(n // 8 * 8 + 4, n % 8 * 8 + 4) for n in np.flatnonzero(on == i)]
            assert middles and all(o.y < y < o.y + o.side and o.x < x < o.x + o.side for y, x in middles)


def test_contrast_is_the_cross_entropy_among_the_keys_that_count():
    queries, keys = (F.normalize(torch.randn(n, 4, generator=torch.Generator().manual_seed(n)), dim=-1) for n in (3, 5))
    own, others = torch.tensor([4, 0, 2]), torch.rand(3, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    others[torch.arange(3), own] = True
    expected = 0
    for query, at, counts in zip(queries, own, others):
        weights = [math.exp(10 * float(query @ key)) for key in keys]
        expected -= math.log(weights[at] / sum(w for w, c in zip(weights, counts) if c)) / 3
    assert pretrain.contrast(queries, keys, own, others).item() == pytest.approx(expected, rel=1e-5)


def test_crops_are_parts_of_the_picture():
    """Of a picture that is red on the left and grows brighter downwards, a crop of the whole is the same or its mirror image."""
    pixels = torch.zeros(8, 3, 64, 64, dtype=torch.uint8)
    pixels[:, 0, :, :32] = 100
    whole = pretrain.crops(pixels, 64, (1.0, 1.0), torch.Generator().manual_seed(0))
    assert whole.shape == (8, 3, 64, 64) and whole.dtype == torch.uint8
    sides = {tuple((crop[0].float().mean(0) > 35).tolist()) for crop in whole}     # 100, a factor of at least 0.7, half of the edge
    assert sides <= {(True,) * 32 + (False,) * 32, (False,) * 32 + (True,) * 32} and len(sides) == 2
    assert pretrain.crops(pixels, 32, (0.25, 0.5), torch.Generator().manual_seed(0)).shape == (8, 3, 32, 32)


def test_portraits_show_the_largest_object_whole():
    """Of every scene the part around its largest object, cut from the picture as it is; or the whole picture."""
    drawn = [(index, world.scene("train", index)) for index in range(40)]
    whole = pretrain.pictures(drawn)
    assert torch.equal(pretrain.around_largest(drawn, world.SIDE), whole)
    parts = pretrain.around_largest(drawn, 32)
    assert parts.shape == (40, 3, 32, 32) and parts.dtype == torch.uint8
    for part, picture, (_, objects) in zip(parts, whole, drawn):
        (largest,) = [o for o in objects if o.side == max(other.side for other in objects)]
        windows = picture.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)         # (33, 33, 3, 32, 32)
        (y, x), = (windows == part).flatten(2).all(2).nonzero().tolist()
        assert x <= largest.x and largest.x + largest.side <= x + 32 and y <= largest.y and largest.y + largest.side <= y + 32


@torch.no_grad()
def test_maes_decoder_puts_what_was_seen_into_its_place():
    """Without blocks, a patch that was seen decides about its own pixels alone, and every other gets the mask token's."""
    tower = pretrain.plain_vit("vit_mae")
    decoder = pretrain.Decoder(tower, depth=0)
    decoder.positions.zero_()
    seen, places = torch.randn(2, 3, 128), torch.tensor([[5, 0, 63], [7, 8, 9]])
    said = decoder(seen, places)
    assert said.shape == (2, 64, 3 * 8 * 8)
    expected = decoder.pixels(decoder.norm(decoder.mask_token)).repeat(2, 64, 1)
    for row in range(2):
        expected[row, places[row]] = decoder.pixels(decoder.norm(decoder.embed(seen[row])))
    assert torch.allclose(said, expected, atol=1e-5)


# --- what is written --------------------------------------------------------------------------------------------------------

def test_checkpoints_load_and_say_how_they_want_their_input(folders):
    clip, tower = CLIP.from_pretrained(folders["clip"]), CLIPVision.from_pretrained(folders["clip"])
    dinov2, llama = DINOv2.from_pretrained(folders["dinov2"]), Llama.from_pretrained(folders["llama"])
    mae, deit = ViT.from_pretrained(folders["mae"]), ViT.from_pretrained(folders["deit"])
    assert (mae.config.model_type, deit.config.model_type) == ("vit_mae", "vit")
    pixels = pretrain.pictures([(0, world.scene("test", 0)), (1, world.scene("test", 1))], "test")
    with torch.no_grad():
        for vision in (tower, dinov2, mae, deit):
            hidden = vision(pixels)
            assert len(hidden) == 7 and hidden[0].shape == (2, 65, 128) and all(state.isfinite().all() for state in hidden)
            assert vision.normalize.mean.flatten().tolist() == pytest.approx(pretrain.MEAN)
        assert all(torch.equal(a, b) for a, b in zip(tower(pixels), clip.vision(pixels)))
        assert clip.similarity(pixels, ["a red circle", "a blue cross"]).shape == (2, 2)
    assert {ImageSpec.from_folder(folders[name]).size for name in ("clip", "dinov2", "mae", "deit")} == {64}
    tokenizer = load_tokenizer(folders["llama"])
    assert tokenizer.get_vocab_size() == llama.config.vocab_size and llama.config.eos_token_id == tokenizer.token_to_id("</s>")
    assert find_template(folders["llama"]) == "tiny"


def test_checkpoints_are_small(folders):
    """Half precision: the repository's five together stay below 15 MB."""
    assert sum(path.stat().st_size for folder in folders.values() for path in Path(folder).rglob("*")) < 15e6
    for folder in folders.values():
        config = json.loads((folder / "config.json").read_text())
        assert config["dtype"] == "float16"


def test_the_repositorys_llama_reads_the_worlds_words_as_single_tokens():
    folder = ROOT / "weights" / "llama"
    if not (folder / "tokenizer.json").exists():
        pytest.skip("no weights/llama yet")
    tokenizer = load_tokenizer(folder)
    words = [*world.SHAPES, *world.COLOURS, *world.SIZES, "yes", "no", "left", "right", "above", "below", *"012345"]
    assert [word for word in words if not one_token(tokenizer, f" {word}")] == []
    assert [text for text in ("0.10,", "0.55,", "0.95", " ..", " Rci00", " Wcr77") if not one_token(tokenizer, text)] == []


def test_the_repositorys_checkpoints_know_the_world():
    """Far above guessing, in a short look: the right caption of 64, and answers about scenes told in words."""
    if not (ROOT / "weights" / "clip" / "model.safetensors").exists() or not (ROOT / "weights" / "llama" / "model.safetensors").exists():
        pytest.skip("no weights/clip or weights/llama yet")
    assert min(pretrain.clip_scores(ROOT / "weights" / "clip", count=64).values()) > 0.7          # by guessing 0.016
    drawn = {task: score for task, (score, _) in pretrain.llama_scores(ROOT / "weights" / "llama", count=40).items()}
    assert drawn["presence"] > 0.7 and drawn["count"] > 0.6 and drawn["attribute"] > 0.8, drawn   # by guessing 0.5, 0.4, 0.2
    assert drawn["rec"] > 0.4 and drawn["reg"] > 0.5, drawn          # by guessing 0.03, 0.03


def test_an_unknown_model_is_one_line():
    for arguments in ([], ["vit"]):
        with pytest.raises(InputError, match=r"which model. python pretrain.py clip\|dinov2\|mae\|deit\|llama"):
            pretrain.main(arguments)
