"""Smoke tests of toy/: the five pretrainings, the findings and the video clips."""

import json
import shutil

import pytest
import torch
from conftest import ROOT
from tokenizers import Tokenizer

from clip import CLIP
from common import cli
from common.errors import InputError
from common.images import ImageSpec
from dialogue import find_template
from dinov2 import DINOv2
from llama import Llama
from toy import findings, language, pretrain, video, world
from vit import ViT

NAMES = {"clip": CLIP, "dinov2": DINOv2, "mae": ViT, "deit": ViT, "llama": Llama}


def test_the_tokenizer_is_that_of_the_checkpoints_and_knows_the_worlds_words():
    tokenizer = language.make_tokenizer()
    for name in ("llama", "clip"):
        saved = Tokenizer.from_file(str(ROOT / "weights" / name / "tokenizer.json"))
        assert tokenizer.get_vocab() == saved.get_vocab()
    words = [*world.SHAPES, *world.COLORS, *world.SIZES, "yes", "no", "left", "above", "circles"]
    for word in [*(f" {word}" for word in words), *(f"{i / 20:.2f}," for i in range(21))]:
        assert len(language.encode_text(tokenizer, word)) == 1
    text = "any text: ÄÖ, 漢字 \n 12.5%"
    assert tokenizer.decode(language.encode_text(tokenizer, text)) == text


@pytest.mark.parametrize("name", NAMES)
def test_a_pretraining_writes_a_checkpoint_like_that_in_weights(name, tmp_path):
    pretrain.main([name, f"--out={tmp_path}", "--steps=2", "--batch=4", "--evaluate=false"])
    model = NAMES[name].from_pretrained(tmp_path)
    saved = NAMES[name].from_pretrained(ROOT / "weights" / name)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in saved.state_dict().items()}
    if name == "llama":
        assert find_template(tmp_path) == "tiny"
    else:
        spec = ImageSpec.from_folder(tmp_path)
        assert spec.size == 64 and spec.mean == pytest.approx(pretrain.MEAN)


@torch.no_grad()
def test_the_checkpoints_in_weights_know_the_world():
    weights = ROOT / "weights"
    clip = CLIP.from_pretrained(weights / "clip")
    assert pretrain.clip_scores(clip, count=64)["image to text"] > 0.6
    for name in ("dinov2", "mae"):
        scores = pretrain.probe_scores(NAMES[name].from_pretrained(weights / name), count=60)
        assert scores["hidden[3]"]["color"] > 0.6 and scores["hidden[3]"]["shape"] > 0.3
    scores = pretrain.llama_scores(Llama.from_pretrained(weights / "llama"), count=12)
    assert scores["rec"][1] > 0.8 and scores["presence"][0] > 0.9


def test_an_arm_is_trained_scored_and_not_run_again(tmp_path, capsys):
    flags = ["--table=merging", "--seeds=1", "--steps1=1", "--steps2=1", "--count=2", "--jobs=1"]
    out, saved = tmp_path / "out", ROOT / "runs" / "findings"
    out.mkdir()
    # One of the table's four arms is missing, the others are as if run with this budget.
    budget = {"steps1": 1, "steps2": 1, "count": 2}
    for arm in ("comm", "comm-mean_half", "comm-mean_all"):
        result = json.loads((saved / f"{arm}-0.json").read_text()) | {"budget": budget}
        (out / f"{arm}-0.json").write_text(json.dumps(result))
    findings.main([*flags, f"--out={out}"])
    assert "comm-layerscale-0: rec" in capsys.readouterr().out
    result = json.loads((out / "comm-layerscale-0.json").read_text())
    assert set(result["scores"]) == set(findings.TASKS) and result["tokens"] == 64
    findings.main([*flags, f"--out={out}"])
    assert "4 finished before" in capsys.readouterr().out
    with pytest.raises(InputError, match="comm"):
        findings.main([*flags, f"--out={out}", "--steps2=2"])


def test_the_report_writes_tables_between_the_marks(tmp_path):
    page = tmp_path / "findings.md"
    shutil.copy(ROOT / "docs" / "findings.md", page)
    findings.main(["--report", f"--out={ROOT / 'runs' / 'findings'}", f"--page={page}"])
    # The page in docs/ is what the command writes, with every arm in a table.
    assert page.read_text() == (ROOT / "docs" / "findings.md").read_text()
    rows = [arm for name in findings.TABLES for _, arm, _ in findings.rows_of(name)]
    quick = cli.parse(findings.Config, [str(ROOT / "runs" / "quick.toml")])
    assert set(rows) == set(findings.ARMS) and set(quick.arms) <= set(rows) and quick.seeds == 1


def test_pretraining_sees_no_held_out_scene():
    for _, objects in pretrain.scenes_of(pretrain.Config(batch=50, steps=10), 3, 0.2, 0.4):
        assert len(objects) <= 2 and not world.in_test_split({o.kind for o in objects})


def test_a_model_is_scored_on_clips(tiny_model):
    scores = video.evaluate(tiny_model, 4)
    assert scores and all(0 <= value <= 1 for value in scores.values())
