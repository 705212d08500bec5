"""The benchmarks end to end on small files in each published format: a model that knows the truth gets full marks, a real
one runs, a stopped run goes on, two processes give what one gives, and a wrong file is one line that says where."""
import base64
import io
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import benchmarks
import eval as command                                               # not over the built-in function of that name
from conftest import ROOT
from hub import InputError
from images import format_box, midpoints, open_frames, pad_box

SIZE = (60, 40)


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, (shade, 120, 200 - shade)).save(path)


def write(name, content):
    """A JSON file; JSONL if its name says so."""
    lines = [json.dumps(record) for record in content] if name.endswith(".jsonl") else [json.dumps(content)]
    Path(name).write_text("\n".join(lines) + "\n")


def ten(*answers):
    return [{"answer": (answers * 10)[i], "answer_id": i + 1, "answer_confidence": "yes"} for i in range(10)]


def shikra_files():
    for i in range(3):
        picture(Path(f"images/{i}.jpg"), 40 * i)
    rows = [{"img_path": f"{i % 3}.jpg", "expression": f"the {word}", "bbox": [5 * i, 3, 5 * i + 20, 30.5], "width": 60,
             "height": 40} for i, word in enumerate(["red dog", "small cat", "blue bus", "tall man", "old tree"])]
    write("REC_val.jsonl", rows)
    write("REC_test.jsonl", rows[:2] + [rows[1] | {"expression": "a cat that is small"}])


def make_rec():
    shikra_files()
    return ["--data=REC_val.jsonl,REC_test.jsonl"]


def make_reg():
    shikra_files()
    return ["--data=REC_test.jsonl"]


def make_caption():
    for i in range(3):
        picture(Path(f"images/COCO_{i}.jpg"))
    write("captions_val.json", {"images": [{"id": i, "file_name": f"COCO_{i}.jpg"} for i in range(3)], "annotations": [
        {"image_id": i, "caption": f"A {colour} bus stands in street number {i}."}
        for i in range(3) for colour in ("red", "big")]})
    return ["--data=captions_val.json"]


def make_pope():
    for i in range(2):
        picture(Path(f"images/COCO_{i}.jpg"))
    for split in ("random", "popular"):
        write(f"coco_pope_{split}.jsonl", [
            {"question_id": i, "image": f"COCO_{i % 2}.jpg", "text": f"Is there a {thing} in the image?",
             "label": ("yes", "no")[i % 2]} for i, thing in enumerate(["dog", "car", "tree", "cat"])])
    return ["--data=coco_pope_random.jsonl,coco_pope_popular.jsonl"]


def make_vqav2():
    for i in range(2):
        picture(Path(f"images/COCO_val2014_{i:012d}.jpg"))
    write("questions.json", {"data_subtype": "val2014", "questions": [
        {"image_id": i % 2, "question": f"How many things of kind {i}?", "question_id": 100 + i} for i in range(4)]})
    write("annotations.json", {"annotations": [
        {"question_id": 100 + i, "image_id": i % 2, "question_type": "how many", "answer_type": ("number", "other")[i % 2],
         "answers": ten("two", "2") if i else ten("red")} for i in range(4)]})
    return ["--data=questions.json", "--annotations=annotations.json"]


def make_vizwiz():
    for i in range(3):
        picture(Path(f"images/VizWiz_{i}.jpg"))
    write("val.json", [{"image": f"VizWiz_{i}.jpg", "question": "What is this?",
                        "answers": ten("unanswerable" if i else "a can", "can"), "answer_type": "other"}
                       for i in range(3)])
    return ["--data=val.json"]


def make_textvqa():
    for i in range(2):
        picture(Path(f"images/a{i}.jpg"))
    write("TextVQA.json", {"data": [{"question_id": 7 + i, "image_id": f"a{i}", "question": f"What is Written {i}?",
                                     "answers": ["STOP", "stop"] * 5} for i in range(2)]})
    write("ocr.jsonl", [{"question_id": f"a{i}", "image": f"a{i}.jpg",
                         "text": f"What is Written {i}?\nReference OCR token: STOP, IT\n"
                         "Answer the question using a single word or phrase."} for i in range(2)])
    return ["--data=TextVQA.json"]


def make_textvqa_ocr():
    make_textvqa()
    return ["--data=ocr.jsonl", "--annotations=TextVQA.json"]


def make_gqa():
    picture(Path("images/n1.jpg"))
    write("testdev.json", {f"20{i}": {"imageId": "n1", "question": f"Is it {i}?", "answer": ("yes", "left")[i % 2],
                                      "types": {"structural": ("verify", "query")[i % 2]}} for i in range(3)})
    return ["--data=testdev.json"]


def make_scienceqa():
    picture(Path("images/5/image.png"))
    rows = [{"id": str(i), "conversations": [
        {"from": "human", "value": ("<image>\n" if i else "") + f"Which {i}?\nA. one\nB. two"},
        {"from": "gpt", "value": "The answer is B."}]} for i in range(3)]
    for row in rows[1:]:
        row["image"] = "5/image.png"
    write("llava_test_CQM-A.json", rows)
    write("problems.json", {str(i): {"answer": 1, "choices": ["one", "two"]} for i in range(3)})
    return ["--data=llava_test_CQM-A.json", "--annotations=problems.json"]


def make_mmbench():
    packed = io.BytesIO()
    Image.new("RGB", SIZE).save(packed, "JPEG")
    image = base64.b64encode(packed.getvalue()).decode()
    rows = [["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "source", "image"],
            ["0", "Which colour?", "Look & see.", "red", "green", "blue", "", "B", "colour", "seeing", "x", image],
            ["1", "How\tmany?".replace("\t", " "), "nan", "one", "two", "three", "four", "D", "count", "seeing", "x", "0"]]
    Path("mmbench.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    return ["--data=mmbench.tsv"]


def make_mme():
    rows = []
    for category, shown in (("existence", "existence/0.jpg"), ("OCR", "OCR/images/1.png")):
        picture(Path("images", shown))
        name = Path(shown).name
        rows += [{"question_id": f"{category}/{name}", "image": f"{category}/{name}", "category": category,
                  "text": f"Is there a {thing}? Please answer yes or no.\nAnswer the question using a single word or phrase."}
                 for thing in "ab"]
        answers = Path("images", category, *(["questions_answers_YN"] if category == "OCR" else []), Path(shown).stem + ".txt")
        answers.parent.mkdir(exist_ok=True)
        answers.write_text("".join(f"Is there a {thing}? Please answer yes or no.\t{truth}\n"
                                   for thing, truth in (("a", "Yes"), ("b", "No"))))
    write("llava_mme.jsonl", rows)
    return ["--data=llava_mme.jsonl", "--annotations=images"]


def make_choice():
    for i in range(2):
        picture(Path(f"images/{i}.png"))
    write("mmmu.jsonl", [{"id": "a", "question": "Is <image 2> like <image 1>?", "image": ["0.png", "1.png"],
                          "options": "['yes', 'no']", "answer": "A"},
                         {"id": "b", "text": "Which?\nA. red\nB. green", "image": "1.png", "answer": "B", "category": "art"},
                         {"id": "c", "question": "1 + 1?", "options": ["1", "2"], "answer": "B"}])
    return ["--data=mmmu.jsonl"]


def make_video():
    for i in range(12):
        picture(Path(f"images/video7/{i}.jpg"), 20 * i)
    frames = [Image.new("RGB", SIZE, (25 * i, 0, 0)) for i in range(6)]
    frames[0].save("images/clip.gif", save_all=True, append_images=frames[1:])
    write("test_q.json", [{"question": "what moves?", "video_id": 7, "id": 0},
                          {"question": "who runs?", "video_name": "clip", "question_id": "x"}])
    write("test_a.json", [{"id": 0, "answer": "ball", "type": 3}, {"question_id": "x", "answer": "dog", "type": 4}])
    return ["--data=test_q.json", "--annotations=test_a.json", "--frames=3"]


MAKE = {"rec": make_rec, "reg": make_reg, "caption": make_caption, "pope": make_pope, "vqav2": make_vqav2, "okvqa": make_vqav2,
        "vizwiz": make_vizwiz, "textvqa": make_textvqa, "gqa": make_gqa, "scienceqa": make_scienceqa, "mmbench": make_mmbench,
        "mme": make_mme, "choice": make_choice, "video": make_video}


def right_answer(task, truth):
    if task == "rec":
        box, width, height = truth
        return f"It is {format_box(pad_box(box, width, height))}."
    if task in ("mmbench", "choice"):
        return truth["letter"]
    return truth["answer"] if task == "mme" else truth if isinstance(truth, str) else truth[-1]


class Oracle:
    """In place of a model: gives these answers one after the other. Stops like a person would once it has given `patience`."""

    def __init__(self, answers, patience=None):
        self.answers, self.patience, self.asked = list(answers), patience, []

    def modules(self):
        return []                                                    # nothing in it that linear.pack could exchange

    def generate(self, images, prompts, max_new_tokens):
        if self.patience is not None and len(self.asked) >= self.patience:
            raise KeyboardInterrupt
        for shown, prompt in zip(images, prompts):
            assert all(isinstance(image, Image.Image) for image in shown)
            assert prompt.count("<image>") in (0, len(shown))
            self.asked.append((shown, prompt))
        return [self.answers.pop(0) for _ in prompts]


def run_with(monkeypatch, oracle, *flags):
    monkeypatch.setattr(command.MLLM, "from_pretrained", lambda *arguments: oracle)
    monkeypatch.setattr(command, "dtype_to_answer", lambda *arguments: None)      # there is no folder to look into
    command.main(list(flags))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, where `model` is the folder that the oracle pretends to be."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    return tmp_path


def items_of(task, flags):
    config = command.cli.parse(command.Config, [f"--task={task}", "--image_dir=images", *flags])
    return benchmarks.read(task, config)


def scores_of(folder="scored"):
    return json.loads(Path(folder, "scores.json").read_text())["results"]


@pytest.mark.parametrize("task", benchmarks.READERS)
def test_who_knows_the_truth_gets_full_marks(task, here, monkeypatch, capsys):
    flags = [f"--task={task}", "--image_dir=images", "--model=model", "--out=scored", "--batch=2", "--json", *MAKE[task]()]
    items = items_of(task, flags)
    oracle = Oracle([right_answer(task, item.truth) for item in items])
    run_with(monkeypatch, oracle, *flags)
    results = scores_of()
    assert json.loads(capsys.readouterr().out.rstrip().split("\n")[-1]) == {"task": task, "model": "model", "results": results}
    for group, result in results.items():
        (metric, value), *_ = result["scores"].items()
        full = {"CIDEr": result["scores"].get("BLEU-1"), "score": value / (4 if group == "perception" else 2)}.get(metric, value)
        assert full == pytest.approx(1), group
    assert len(oracle.asked) == len(items) and len(results) >= 1
    lines = [json.loads(line) for line in Path("scored/answers.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [item.id for item in items] and not list(Path("scored").glob("*rank*"))


@pytest.mark.parametrize("task", benchmarks.READERS)
def test_a_real_model_answers_every_benchmark(task, model_folder, capsys):
    flags = [f"--task={task}", "--image_dir=images", "--out=scored", "--max_new_tokens=2", "--device=cpu", *MAKE[task]()]
    command.main(flags)
    first = Path("scored/answers.jsonl").read_text()
    command.main(flags)                                              # everything is known: nothing is asked again
    assert "(0 of them asked now)" in capsys.readouterr().out and Path("scored/answers.jsonl").read_text() == first
    assert scores_of()


# --- prompts: as the papers ask -------------------------------------------------------------------------------------------

def test_prompts_are_the_papers(here):
    short = "\nAnswer the question using a single word or phrase."
    assert items_of("pope", make_pope())[0].prompt == "Is there a dog in the image?" + short
    assert items_of("vizwiz", make_vizwiz())[0].prompt == (
        "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + short)
    assert items_of("mme", make_mme())[0].prompt == "Is there a a? Please answer yes or no." + short
    assert items_of("scienceqa", make_scienceqa())[1].prompt == (
        "Which 1?\nA. one\nB. two\nAnswer with the option's letter from the given choices directly.")
    assert items_of("mmbench", make_mmbench())[0].prompt == (
        "Look & see.\nWhich colour?\nA. red\nB. green\nC. blue\nAnswer with the option's letter from the given choices directly.")
    assert items_of("rec", make_rec())[0].prompt == "Where is the red dog <image>? answer in [x0,y0,x1,y1] format."
    assert "[0.000,0.217,0.333,0.675]" in items_of("reg", make_reg())[0].prompt     # 60 x 40: ten rows above
    assert items_of("textvqa", make_textvqa_ocr())[0].prompt == "What is Written 0?\nReference OCR token: STOP, IT" + short
    assert items_of("choice", make_choice())[0].prompt.startswith("Is <image> like <image>?\nA. yes\nB. no\nAnswer with")
    assert items_of("rec", [*make_rec(), "--prompt=Find <expr>."])[0].prompt == "Find the red dog."


def test_pictures_stand_in_the_order_of_the_text(here):
    assert [Path(path).name for path in items_of("choice", make_choice())[0].images] == ["1.png", "0.png"]


def test_references_of_one_object_or_picture_are_gathered(here):
    assert [item.truth for item in items_of("reg", make_reg())] == [["the red dog"], ["the small cat", "a cat that is small"]]
    picture(Path("images/val2014/a.jpg"))
    write("dataset_coco.json", {"images": [
        {"filename": "a.jpg", "filepath": "val2014", "cocoid": 5, "split": split, "sentences": [{"raw": "one"}, {"raw": "two"}]}
        for split in ("train", "test")]})
    assert [(item.id, item.truth) for item in items_of("caption", ["--data=dataset_coco.json"])] == [("5", ["one", "two"])]
    write("cap.jsonl", [{"img_path": "val2014/a.jpg", "caption": text} for text in ("one", "two")])
    assert [item.truth for item in items_of("caption", ["--data=cap.jsonl"])] == [["one", "two"]]


# --- MMBench's rotations, MME's pairs, groups ---------------------------------------------------------------------------------

def test_mmbench_asks_every_rotation_and_wants_all_right(here, monkeypatch):
    flags = ["--task=mmbench", "--model=model", "--out=scored", *make_mmbench()]
    items = items_of("mmbench", flags)
    assert [item.id for item in items] == ["0", "0#1", "0#2", "1", "1#1", "1#2", "1#3"]
    assert "A. green\nB. blue\nC. red" in items[1].prompt and [item.truth["letter"] for item in items[:3]] == ["B", "A", "C"]
    run_with(monkeypatch, Oracle(["B", "A.", "blue", "D", "C", "B", "A"]), *flags)     # wrong: the third, for blue is B there
    results = scores_of()
    assert results["all"]["scores"] == {"circular accuracy": 0.5, "accuracy": 1}
    assert results["category: colour"]["scores"]["circular accuracy"] == 0
    run_with(monkeypatch, Oracle(["B", "D"]), *flags, "--out=once", "--circular=false")
    assert scores_of("once")["all"]["scores"] == {"accuracy": 1}


def test_mmbench_with_rotations_in_the_file_makes_none_of_its_own(here):
    make_mmbench()
    text = Path("mmbench.tsv").read_text().replace("\n1\t", "\n1000000\t")
    Path("mmbench.tsv").write_text(text)
    assert [(item.id, item.truth["question"], item.truth["first"]) for item in items_of("mmbench", ["--data=mmbench.tsv"])] == [
        ("0", 0, True), ("1000000", 0, False)]


def test_mmbench_sheet_is_a_workbook_with_the_predictions(here, monkeypatch):
    run_with(monkeypatch, Oracle(["B"] * 7), "--task=mmbench", "--model=model", "--out=scored", *make_mmbench())
    with zipfile.ZipFile("scored/submission.xlsx") as archive:
        for name in archive.namelist():
            ElementTree.fromstring(archive.read(name))
        sheet = ElementTree.fromstring(archive.read("xl/sheet.xml"))
    rows = [["".join(cell.itertext()) for cell in row] for row in sheet[0]]
    assert rows == [["index", "question", "A", "B", "C", "D", "answer", "prediction"],
                    ["0", "Which colour?", "red", "green", "blue", "", "B", "B"],
                    ["1", "How many?", "one", "two", "three", "four", "D", "B"]]
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl would open the sheet as Excel does")
    assert [cell.value for cell in openpyxl.load_workbook("scored/submission.xlsx").active[2]][:2] == [0, "Which colour?"]


def test_mme_sums_points_over_categories(here, monkeypatch):
    flags = ["--task=mme", "--model=model", "--out=scored", "--image_dir=images", *make_mme()]
    run_with(monkeypatch, Oracle(["Yes", "No", "yes", "yes"]), *flags)
    results = scores_of()
    assert results["existence"]["scores"]["score"] == 2 and results["OCR"]["scores"]["score"] == 0.5
    assert results["perception"] == {"samples": 4, "scores": {"score": 2.5}} and "cognition" not in results


def test_scores_are_told_per_split_and_per_kind(here, monkeypatch):
    flags = ["--model=model", "--image_dir=images"]
    run_with(monkeypatch, Oracle(["red", "x", "2", "x"]), "--task=vqav2", "--out=scored", *flags, *make_vqav2())
    results = scores_of()
    assert {group: result["samples"] for group, result in results.items()} == {
        "all": 4, "answer: number": 2, "question: how many": 4, "answer: other": 2}
    assert results["answer: number"]["scores"]["accuracy"] == 1 and results["answer: other"]["scores"]["accuracy"] == 0
    run_with(monkeypatch, Oracle(["yes"] * 8), "--task=pope", "--out=pope", *flags, *make_pope())
    assert {split: result["scores"]["accuracy"] for split, result in scores_of("pope").items()} == {
        "coco_pope_random": 0.5, "coco_pope_popular": 0.5}


# --- servers ------------------------------------------------------------------------------------------------------------------

def test_test_sets_without_answers_give_the_servers_file_and_no_score(here, monkeypatch, capsys):
    make_vqav2()
    questions = json.loads(Path("questions.json").read_text()) | {"data_subtype": "test-dev2015"}
    write("questions.json", questions)
    for i in range(2):
        picture(Path(f"images/COCO_test2015_{i:012d}.jpg"))
    flags = ["--model=model", "--image_dir=images"]
    run_with(monkeypatch, Oracle(["The Dog.", "two", "", "yes"]), "--task=vqav2", "--data=questions.json", "--out=scored", *flags)
    assert json.loads(Path("scored/submission.json").read_text()) == [
        {"question_id": 100 + i, "answer": answer} for i, answer in enumerate(["dog", "2", "", "yes"])]
    assert scores_of() == {} and "no score" in capsys.readouterr().out
    make_vizwiz()
    write("test.json", [{key: row[key] for key in ("image", "question")} for row in json.loads(Path("val.json").read_text())])
    run_with(monkeypatch, Oracle(["Unanswerable", "A can", "x"]), "--task=vizwiz", "--data=test.json", "--out=vizwiz", *flags)
    assert json.loads(Path("vizwiz/submission.json").read_text())[:2] == [
        {"image": "VizWiz_0.jpg", "answer": "unanswerable"}, {"image": "VizWiz_1.jpg", "answer": "can"}]


# --- stopping and going on ------------------------------------------------------------------------------------------------------

def test_a_stopped_run_goes_on_where_it_was(here, monkeypatch, capsys):
    flags = ["--task=pope", "--image_dir=images", "--model=model", "--out=scored", "--batch=2", *make_pope()]
    answers = ["Yes", "No", "no", "yes", "yes", "yes", "no", "no"]
    run_with(monkeypatch, Oracle(answers), *flags, "--out=whole")
    with pytest.raises(KeyboardInterrupt):
        run_with(monkeypatch, Oracle(answers, patience=4), *flags)
    assert not Path("scored/scores.json").exists()
    with open("scored/answers.rank0.jsonl", "a") as file:
        file.write('{"id": "coco_pope_popular/0", "prompt": "Is th')     # torn by a crash
    oracle = Oracle(answers[4:])
    run_with(monkeypatch, oracle, *flags)
    assert len(oracle.asked) == 4
    assert scores_of() == scores_of("whole")
    assert Path("scored/answers.jsonl").read_text() == Path("whole/answers.jsonl").read_text()


def test_limit_can_grow_and_changed_questions_are_asked_again(here, monkeypatch):
    flags = ["--task=pope", "--image_dir=images", "--model=model", "--out=scored", *make_pope()]
    run_with(monkeypatch, Oracle(["yes"] * 3), *flags, "--limit=3")
    assert scores_of()["coco_pope_random"]["samples"] == 3
    oracle = Oracle(["yes"] * 5)
    run_with(monkeypatch, oracle, *flags)
    assert len(oracle.asked) == 5
    run_with(monkeypatch, Oracle([]), *flags, "--limit=2")           # asks nothing, forgets nothing
    assert len(Path("scored/answers.jsonl").read_text().splitlines()) == 8
    oracle = Oracle(["no"] * 8)
    run_with(monkeypatch, oracle, *flags, "--prompt=Tell me: <question>")
    assert oracle.asked[0][1] == "Tell me: Is there a dog in the image?"


def test_answers_of_another_run_are_not_gone_on_with(here, monkeypatch):
    flags = ["--task=pope", "--image_dir=images", "--model=model", "--out=scored", *make_pope()]
    run_with(monkeypatch, Oracle(["yes"] * 8), *flags)
    with pytest.raises(InputError, match="scored: holds answers of a run with other max_new_tokens .128, now 5.: name"):
        run_with(monkeypatch, Oracle([]), *flags, "--max_new_tokens=5")
    file = next(flag for flag in flags if flag.startswith("--data=")).removeprefix("--data=").split(",")[0]
    stamp = os.stat(file)
    os.utime(file, (0, 0))                                           # as if it had been written again
    with pytest.raises(InputError, match="other files"):
        run_with(monkeypatch, Oracle([]), *flags)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    Path("model/model.safetensors").write_bytes(b"trained again")
    with pytest.raises(InputError, match="other weights"):
        run_with(monkeypatch, Oracle([]), *flags)


def test_a_line_that_is_no_answer_is_named(here, monkeypatch):
    flags = ["--task=pope", "--image_dir=images", "--model=model", "--out=scored", *make_pope()]
    run_with(monkeypatch, Oracle(["yes"] * 8), *flags)
    lines = Path("scored/answers.jsonl").read_text().splitlines()
    Path("scored/answers.jsonl").write_text("\n".join([lines[0], "{oops", *lines[2:]]) + "\n")
    with pytest.raises(InputError, match="answers.jsonl, line 2: not an answer"):
        run_with(monkeypatch, Oracle([]), *flags)


def test_two_processes_answer_what_one_answers(model_folder):
    flags = ["--task=pope", "--image_dir=images", "--model=out/tiny/model", "--max_new_tokens=2", "--batch=3", "--device=cpu",
             *make_pope()]
    command.main([*flags, "--out=one"])
    launched = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d",
                               "--rdzv-endpoint=localhost:0", str(ROOT / "eval.py"), *flags, "--out=two", "--json"],
                              capture_output=True, text=True, timeout=600)
    assert launched.returncode == 0, launched.stderr[-2000:]
    assert Path("two/answers.jsonl").read_text() == Path("one/answers.jsonl").read_text()
    assert json.loads(launched.stdout.rstrip().split("\n")[-1])["results"] == scores_of("one") == scores_of("two")


# --- video ----------------------------------------------------------------------------------------------------------------------

def test_frames_are_the_midpoints_of_equal_segments(here):
    assert midpoints(12, 3) == [2, 6, 10] and midpoints(8, 8) == list(range(8))
    assert midpoints(3, 8) == [0, 1, 2] and midpoints(1, 4) == [0]
    make_video()
    folder = [frame.getpixel((0, 0))[0] for frame in open_frames("images/video7", 3)]
    assert folder == pytest.approx([40, 120, 200], abs=4)            # 2, 6, 10: in the order of numbers, not of letters
    assert [frame.getpixel((0, 0))[0] for frame in open_frames("images/clip.gif", 3)] == [25, 75, 125]
    Path("images/empty").mkdir()
    with pytest.raises(InputError, match="empty: a folder without image files"):
        open_frames("images/empty", 2)
    Path("images/movie.mp4").write_bytes(b"no picture")
    with pytest.raises(InputError, match="movie.mp4: not a readable animated image"):
        open_frames("images/movie.mp4", 2)


def test_pooling_takes_a_quarter_of_the_tokens(tiny_model, model_folder):
    model = command.MLLM.from_pretrained(model_folder)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        whole = model.see(pixels)                                    # (2, 16, C): a grid of 4 x 4
        command.pool(model, 1)
        pooled = model.see(pixels)
    assert pooled.shape[1] == model.tokens_per_image == 4
    assert torch.allclose(pooled[:, 0], whole[:, [0, 1, 4, 5]].mean(1), atol=1e-5)
    command.main(["--task=video", "--image_dir=images", "--out=scored", "--max_new_tokens=2", "--pool=1", "--device=cpu",
                  *make_video()])
    with pytest.raises(InputError, match="even"):
        command.pool(model, 2)


def test_more_pictures_than_the_llm_can_read_are_refused(model_folder):
    for i in range(40):
        picture(Path(f"images/long/{i}.jpg"))
    write("q.json", [{"question": "what?", "video": "long", "id": 0, "answer": "x"}])
    with pytest.raises(InputError, match="--pool=1"):                # 40 x 16 tokens, a context of 256
        command.main(["--task=video", "--data=q.json", "--image_dir=images", "--frames=40", "--out=scored", "--device=cpu"])


# --- wrong input ------------------------------------------------------------------------------------------------------------

POPE = {"question_id": 1, "image": "0.jpg", "text": "?", "label": "no"}


@pytest.mark.parametrize("task, name, content, message", [
    ("pope", "x.jsonl", [POPE | {"label": "maybe"}], "x.jsonl, line 1: the label is 'maybe'"),
    ("pope", "x.jsonl", [POPE | {"image": "none.jpg"}], "line 1: no none.jpg in images: --image_dir="),
    ("pope", "x.jsonl", [POPE | {"image": "../x.jsonl"}], "line 1: .* outside of --image_dir"),
    ("pope", "x.jsonl", [{"question_id": 1, "image": "0.jpg", "label": "no"}], "line 1: has no 'text'; is this the file"),
    ("pope", "x.jsonl", [POPE | {"text": 5}], "line 1: 'text' should be a text, is 5"),
    ("pope", "x.jsonl", [POPE] * 2, "two questions have the id '1'"),
    ("rec", "x.jsonl", [{"img_path": "0.jpg", "expression": "x", "bbox": [1, 2, 3], "width": 9, "height": 9}],
     "line 1: .*bbox of four"),
    ("vqav2", "x.json", [{"question_id": 1}], "x.json: not VQA's questions"),
    ("vqav2", "x.json", {"questions": [{"question_id": 1, "image_id": 1}]}, "x.json, questions 0: no COCO__000000000001.jpg"),
    ("scienceqa", "x.json", [5], "x.json, sample 0: should be an object"),
    ("textvqa", "x.jsonl", [{"question_id": "a", "text": "?"}], "--annotations=TextVQA"),
    ("gqa", "x.json", {"1": []}, "x.json, question 1: should be an object"),
    ("gqa", "x.json", [1], "x.json: not GQA's"),
    ("mme", "x.jsonl", [{"question_id": "a/0.jpg", "image": "0.jpg", "text": "?", "category": "a"}],
     "line 1: no label; --annotations="),
    ("scienceqa", "x.json", [{"id": "1", "conversations": []}], "x.json, sample 0: no question"),
    ("choice", "x.jsonl", [{"id": 1, "question": "?", "options": ["one"]}], "line 1: needs two options"),
    ("choice", "x.jsonl", [{"id": 1, "question": "?", "options": "__import__('os')"}], "line 1: needs two options"),
    ("choice", "x.jsonl", [{"id": 1, "question": "?", "options": ["a", "b"], "answer": "C"}], "'C', not the letter of one of 2"),
    ("choice", "x.jsonl", [{"id": 1, "question": "<image 2>", "options": ["a", "b"], "image": "0.jpg"}],
     "speaks of image 2, and has 1"),
    ("video", "x.json", [{"id": 1, "question": "?", "video_name": "v"}], "x.json, sample 0: no v and no v.gif"),
    ("caption", "x.json", {"images": [{"id": 1, "file_name": "0.jpg"}], "annotations": [{"image_id": 2, "caption": "x"}]},
     "annotations 0: .* image 2"),
    ("nothing", "x.json", [], "no such benchmark; there are rec, reg")])
def test_wrong_files_are_named_with_the_place(task, name, content, message, here):
    picture(Path("images/0.jpg"))
    write(name, content)
    with pytest.raises(InputError, match=message):
        command.main([f"--task={task}", f"--data={name}", "--image_dir=images", "--model=model"])


def test_broken_json_is_named_with_the_line(here):
    Path("x.json").write_text('{"questions": [\n{"question_id": 1,,}]}')
    for task in ("vqav2", "textvqa", "gqa", "caption", "rec"):
        with pytest.raises(InputError, match="x.json: not JSON, line [12]"):
            command.main([f"--task={task}", "--data=x.json", "--model=model"])


@pytest.mark.parametrize("text, message", [
    ("index\tquestion\n1\twhat?\n", "line 2: needs an index"),
    ("index\tquestion\tA\tB\timage\n1\twhat?\ta\tb\t%%%\n", "line 2: the image is not base64"),
    ("index\tquestion\tA\tB\timage\tanswer\n1\twhat?\ta\tb\tAA==\tC\n", "line 2: needs an index .* answer"),
    ("index\tquestion\n1\twhat?\tx\ty\n", "line 2: has more cells")])
def test_wrong_tables_are_named_with_the_line(text, message, here):
    Path("x.tsv").write_text(text)
    with pytest.raises(InputError, match=message):
        command.main(["--task=mmbench", "--data=x.tsv", "--model=model"])


def test_a_broken_picture_names_its_question(here, monkeypatch):
    flags = ["--task=pope", "--image_dir=images", "--model=model", "--out=scored", *make_pope()]
    Path("images/COCO_1.jpg").write_bytes(b"nothing")
    with pytest.raises(InputError, match="question coco_pope_random/1: .*COCO_1.jpg: not a readable image"):
        run_with(monkeypatch, Oracle(["yes"] * 8), *flags)


@pytest.mark.parametrize("flags, message", [
    (["--task=pope"], "needs --data=FILE: POPE's"), (["--task=rec", "--data=none.jsonl"], "none.jsonl: cannot be read"),
    (["--task=pope", "--data=none.jsonl", "--batch=0"], "--batch=0"),
    (["--task=pope", "--data=none.jsonl", "--limit=0"], "--limit=0"),
    (["--task=rec", "--data=x", "--prompt=Where?"], "needs <expr>")])
def test_wrong_flags_are_one_line(flags, message, here):
    with pytest.raises(InputError, match=message):
        command.main([*flags, "--model=model"])


# --- real photographs ---------------------------------------------------------------------------------------------------------

def test_real_expressions_and_captions(real, here, monkeypatch):
    flags = ["--model=model", f"--image_dir={real}/images"]
    data = [f"--data={real}/shikra_rec.jsonl"]
    items = items_of("rec", [*data, flags[1]])
    run_with(monkeypatch, Oracle([right_answer("rec", item.truth) for item in items]), "--task=rec", *data, *flags, "--out=rec")
    scores = scores_of("rec")["shikra_rec"]
    assert scores["samples"] == 113 and scores["scores"]["accuracy at IoU 0.5"] == 1 and scores["scores"]["mean IoU"] > 0.97
    captions = json.loads((real / "captions.json").read_text())
    write("captions.jsonl", [{"img_path": name, "caption": text} for name, texts in captions.items() for text in texts[:4]])
    last = [texts[4] for texts in captions.values()]                 # people, scored as if they were models
    run_with(monkeypatch, Oracle(last), "--task=caption", "--data=captions.jsonl", *flags, "--out=caption")
    scores = scores_of("caption")["captions"]["scores"]
    assert 0.2 < scores["CIDEr"] < 2.5 and scores["BLEU-1"] > scores["BLEU-4"]
