"""Smoke tests of toy/: the five pretrainings, the findings and the video clips."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, refused
from tokenizers import Tokenizer

from clip import CLIP
from common import cli
from common.images import ImageSpec
from dialogue import find_template
from dinov2 import DINOv2
from llama import Llama
from toy import findings, pretrain, video, world
from vit import ViT

NAMES = {"clip": CLIP, "dinov2": DINOv2, "mae": ViT, "deit": ViT, "llama": Llama}


@pytest.mark.parametrize("name", NAMES)
def test_a_pretraining_writes_a_checkpoint_like_that_in_weights(name, tmp_path):
    pretrain.main([name, f"--out={tmp_path}", "--steps=2", "--batch=4", "--evaluate=false"])
    model = NAMES[name].from_pretrained(tmp_path)
    saved = NAMES[name].from_pretrained(ROOT / "weights" / name)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert shapes == {key: value.shape for key, value in saved.state_dict().items()}
    if name in ("llama", "clip"):
        file = Path(name, "tokenizer_config.json")
        written = json.loads((tmp_path / file.name).read_text())
        assert written == json.loads((ROOT / "weights" / file).read_text())
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        saved = Tokenizer.from_file(str(ROOT / "weights" / name / "tokenizer.json"))
        assert tokenizer.get_vocab() == saved.get_vocab()
    if name == "llama":
        assert find_template(tmp_path) == "tiny"
    else:
        spec = ImageSpec.from_folder(tmp_path)
        assert spec.size == 64 and spec.mean == pytest.approx(pretrain.MEAN)


def test_connectors_are_compared_and_finished_runs_are_not_repeated(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("eval.answer", lambda model, images, *_: [""] * len(images))
    flags = ["--connectors=comm,mlp", "--seeds=1", "--steps1=1", "--steps2=1", "--count=2"]
    flags += ["--jobs=1", f"--out={tmp_path}"]
    # comm as if run with this budget
    result = json.loads((ROOT / "runs" / "findings" / "comm-0.json").read_text())
    result["budget"] = {"steps1": 1, "steps2": 1, "count": 2}
    (tmp_path / "comm-0.json").write_text(json.dumps(result))
    findings.main(flags)
    printed = capsys.readouterr().out
    assert "2 of 2, mlp-0: rec" in printed and "| mlp | " in printed and "| comm | " in printed
    result = json.loads((tmp_path / "mlp-0.json").read_text())
    assert set(result["scores"]) == set(findings.TASKS) and result["tokens"] == 64
    findings.main(flags)
    assert "2 finished before" in capsys.readouterr().out
    with refused("comm"):
        findings.main([*flags, "--steps2=2"])
    with refused("nearest is mlp"):
        findings.main([*flags, "--connectors=nlp"])


def test_the_tables_of_the_page_are_those_of_the_finished_runs(capsys):
    findings.main([f"--out={ROOT / 'runs' / 'findings'}"])
    printed, page = capsys.readouterr().out, (ROOT / "docs" / "findings.md").read_text()
    tables = [line for line in printed.splitlines() if line.startswith(("Percent", "| "))]
    assert len(tables) > 45 and set(tables) <= set(page.splitlines())
    rows = [row[1] for name in findings.TABLES for row in findings.rows_of(name)[1:]]
    quick = cli.parse(findings.Config, [str(ROOT / "runs" / "quick.toml")])
    assert set(rows) == set(findings.ARMS) and set(quick.arms) <= set(rows) and quick.seeds == 1


def test_pretraining_sees_no_held_out_scene():
    for _, objects in pretrain.scenes_of(pretrain.Config(batch=50, steps=10), 3, 0.2, 0.4):
        assert len(objects) <= 2 and not world.in_test_split({o.kind for o in objects})


def test_a_model_is_scored_on_clips(tiny_model):
    scores = video.evaluate(tiny_model, 4)
    assert scores and all(0 <= value <= 1 for value in scores.values())
