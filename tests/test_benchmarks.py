"""The benchmarks on small files in each published format, and runs of a tiny model on them."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, in_process, refused
from PIL import Image

from benchmarks.__main__ import Config, main
from benchmarks.judged import mathvista_match, mathvista_rule
from benchmarks.prompts import find_images, open_question
from benchmarks.readers import BENCHMARKS, read
from benchmarks.scores import score
from common.cli import parse
from common.errors import InputError

FIXTURES = ROOT / "tests/fixtures/benchmarks"
# For each task: options that read its files there, the first prompt, right answers.
CASES = json.loads((FIXTURES / "cases.json").read_text())


@pytest.fixture
def here(model_folder):
    """Change to a directory with the files of CASES and a tiny model, out/tiny/model."""
    shutil.copytree(FIXTURES, ".", dirs_exist_ok=True)


def command(task, *flags):
    first = [task, "--image_dir=images", "--out=scored", "--max_new_tokens=2", "--device=cpu"]
    return [*first, *CASES[task]["flags"].split(), *flags]


def items_of(task, *flags):
    flags = [*CASES[task]["flags"].split(), *flags] if task in CASES else flags
    return read(parse(Config, [task, *flags]))


def results(folder="scored"):
    return json.loads(Path(folder, "scores.json").read_text())["results"]


def answers(folder="scored"):
    return [json.loads(line) for line in Path(folder, "answers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", CASES)
def test_a_benchmark_is_read_asked_as_in_the_paper_and_scored(task, here):
    items, case = items_of(task), CASES[task]
    assert items[0].prompt == case["prompt"]
    names = [item.id for item in items if item.target]
    full = score(BENCHMARKS[task].score, items, dict(zip(names, case["right"], strict=False)))
    none = score(BENCHMARKS[task].score, items, dict.fromkeys(names, "zebra"))
    for group, result in full.items():
        (metric, value), *_ = result["scores"].items()
        assert value > none[group]["scores"][metric]
        # CIDEr and MME's score are no shares.
        assert value == 1 or metric in ("CIDEr", "score"), group


def test_other_formats_and_prompts(here):
    judged = {"mathvista", "mm_vet", "llava_bench", "video_chatgpt"}
    assert set(BENCHMARKS) == {*CASES, "okvqa", "mmbench_cn"} | judged
    assert items_of("mmbench_cn", "--data=mmbench.tsv")[0].prompt.endswith(
        "B. green\n请直接回答选项字母。"
    )
    (item,) = items_of("textvqa", "--data=textvqa.json")
    assert item.target == ["two", "2"] * 5 and item.prompt.startswith("What is It?\nAnswer")
    (item,) = items_of("caption", "--data=karpathy.json")
    assert (item.id, item.target, item.record.id) == ("5", ["one"], 5)
    assert items_of("gqa", "--prompt=Look: <question>")[0].prompt == "Look: Is it red?"
    # Frames in the order of their numbers: 1, 2, 10; no text is between them.
    ((item,), _) = find_images(items_of("video"), "images")
    images, prompt = open_question(item, 3)
    assert [image.getpixel((0, 0))[0] // 25 for image in images] == [6, 8, 7]
    assert prompt == "<image><image><image>\nwhat moves?"


def test_a_run_resumes_and_refuses_other_options(here, capsys):
    main(command("pope", "--limit=2"))
    # Answers of a second process that was killed while writing.
    Path("scored/answers.rank0.jsonl").write_text('[1]\n{"id": "3", "prompt": "Is th')
    capsys.readouterr()
    main(command("pope"))
    assert "1 of 1 questions" in capsys.readouterr().out
    assert [line["id"] for line in answers()] == ["1", "2", "3"]
    assert answers()[0]["prompt"].startswith("Is there a dog?")
    for flag in ("--prompt=Tell me: <question>", "--max_new_tokens=3"):
        with refused("run.json"):
            main(command("pope", flag))
    os.utime("pope.jsonl", (0, 0))
    with refused("run.json"):
        main(command("pope"))


def test_two_processes_answer_what_one_answers(here):
    flags = ["--model=out/tiny/model", "--batch=1"]
    main(command("pope", *flags, "--out=one"))
    done = in_process(main, command("pope", *flags), 2)
    assert done.returncode == 0, done.stderr
    assert answers() == answers("one") and list(Path("scored").glob("*rank*")) == []
    assert results() == results("one")


def test_what_has_no_readable_image_is_left_out_and_named(here, capsys):
    Path("images/1.jpg").write_bytes(b"nothing")
    Path("more.jsonl").write_text(POPE.replace("0.jpg", "none.jpg"))
    main(command("pope", "--data=pope.jsonl,more.jsonl", "--batch=1"))
    printed = capsys.readouterr().out
    assert printed.startswith("1 of 4 questions") and "none.jpg" in printed
    assert "skipped: question pope/2: images/1.jpg" in printed and "1 of 4 questions" in printed
    assert [line["id"] for line in answers()] == ["pope/1"]
    assert results()["pope"]["samples"] == 1
    items = items_of("pope", "--data=pope.jsonl,more.jsonl", "--limit=2")
    assert [item.id for item in items] == ["pope/1", "pope/2", "more/1"]


def test_llavas_question_files_without_answers_are_read(here):
    question = {"question_id": "0", "image": "0.jpg", "text": "What is it?", "category": "default"}
    write("file", [question] * 2)
    for task in ("pope", "vqav2", "vizwiz", "textvqa", "gqa", "mme", "llava_bench"):
        first, *_ = items = read(parse(Config, [task, "--data=file"]))
        assert first.prompt.startswith("What is it?")
        found = [item._replace(image=Path("images/0.jpg")) for item in items]
        assert find_images(items, "images") == (found, [])


def test_without_answers_there_is_the_servers_file_and_frames_must_fit(here):
    main(command("vqav2", "--annotations="))
    (row,) = json.loads(Path("scored/submission.json").read_text())
    assert row["question_id"] == 8 and isinstance(row["answer"], str) and results() == {}
    for i in range(40):
        Image.new("RGB", (8, 8)).save(f"images/video7/{i}.jpg")
    with refused("max_new_tokens=2.*context"):
        main(command("video", "--frames=40", "--out=frames"))
    main(command("video", "--frames=40", "--pool=grid", "--out=pooled"))
    assert len(answers("pooled")) == 1
    main(command("mmmu", "--out=mmmu"))
    assert json.loads(Path("mmmu/submission.json").read_text())["a"] in ("A", "B")


# --- benchmarks that another model judges ---

# Small files, prompts, verdicts and scores as of the official scripts.
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


# --- wrong input --------------------------------------------------------------------------

POPE = '{"question_id": 1, "image": "0.jpg", "text": "?", "label": "no"}'


def test_a_wrong_file_image_or_option_is_named(here):
    # task, content of its file, what the error names
    for task, content, place in json.loads(Path("wrong.json").read_text()):
        Path("file").write_text(content)
        with refused(place):
            main([task, "--data=file", "--image_dir=images", "--model=model"])
    for arguments, name in (
        ("pope", "--data=FILE"),
        ("rec --data=none.jsonl", "none.jsonl"),
        ("rec --data=x --prompt=Where?", "<question>"),
    ):
        with pytest.raises(InputError, match=name):
            main(arguments.split())
    write("data", OFFICIAL["cases"]["mm_vet"]["data"])
    for verdicts in ({"v1_9": {"score": [1]}}, {"v1_0": {}}, {"v1_0": {"score": "x"}}, []):
        write("verdicts", [verdicts])
        for task in ("mm_vet", "gqa"):
            with refused("verdicts"):
                main([task, "--data=data", "--judged=verdicts"])
