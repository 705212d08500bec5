"""The benchmarks that another model judges: what its scripts read, and what they write.

fixtures/judged.json has small files, prompts, verdicts and scores as of the official scripts.
"""

import json
from pathlib import Path

import pytest
from conftest import ROOT, refused
from PIL import Image

from benchmarks.judged import mathvista_match, mathvista_rule
from benchmarks.run import main

OFFICIAL = json.loads((ROOT / "tests/fixtures/judged.json").read_text())


def write(path, values):
    Path(path).write_text("\n".join(map(json.dumps, values)))


def scores_of(task, capsys):
    """Return {"group | metric": value} as --judged prints it."""
    capsys.readouterr()
    main([task, "--data=data", "--judged=verdicts"])
    lines = capsys.readouterr().out.splitlines()
    return {f"{line[:40].strip()} | {line[50:70].strip()}": float(line[70:]) for line in lines}


@pytest.mark.parametrize("task", OFFICIAL["cases"])
def test_the_judge_gets_its_file_and_its_answers_are_scored(task, model_folder, capsys):
    case = OFFICIAL["cases"][task]
    Image.new("RGB", (8, 8)).save("0.gif")
    write("data", case["data"])
    main([task, "--data=data", "--out=out", "--max_new_tokens=2", "--device=cpu"])
    assert "lower bound" in capsys.readouterr().out
    (path,) = Path("out").glob("submission.*")
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    assert len(lines) == len(case["data"])
    rows = [json.loads(line) for line in lines]
    assert set(case["keys"]) <= rows[0].keys()
    if task == "mathvista":
        assert [row["query"] for row in rows[0].values()] == OFFICIAL["queries"]
        assert {"response", "unit"} < rows[0]["1"].keys()
    if task == "llava_bench":
        assert rows[0]["prompt"] == "Who?" != rows[0]["text"]
    write("verdicts", case["verdicts"])
    scores = scores_of(task, capsys)
    assert case["scores"] == pytest.approx(
        {name: scores[name] for name in case["scores"]}, abs=0.051
    )


def test_mathvistas_answers_are_matched_as_officially_or_read_by_a_rule():
    for case in OFFICIAL["normalize"]:
        assert not mathvista_match(case["extraction"], case | {"answer": "other"})
        right = mathvista_match(case["extraction"], case | {"answer": case["normalized"]})
        assert right == (case["normalized"] is not None), case
    number = {"choices": None, "answer_type": "integer", "answer": "1200"}
    choice = {"choices": ["red", "dark blue"], "answer_type": "text", "answer": "dark blue"}
    assert mathvista_rule("In 2008, it was 1,200.", number)
    assert mathvista_rule("The answer is B.", choice) and not mathvista_rule("blue", choice)


def test_a_wrong_file_of_a_judge_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("data", OFFICIAL["cases"]["mm_vet"]["data"])
    for verdicts in ({"v1_9": {"score": [1]}}, {"v1_0": {}}, {"v1_0": {"score": "x"}}, []):
        write("verdicts", [verdicts])
        for task in ("mm_vet", "gqa"):
            with refused("verdicts"):
                main([task, "--data=data", "--judged=verdicts"])
