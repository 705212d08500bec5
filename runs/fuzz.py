"""Damage data files and checkpoint folders at random: each must load or be a one-line error.

    pip install hypothesis && python runs/fuzz.py            200 damages of each file
    python runs/fuzz.py --examples=1000

One value of a JSON file is exchanged, at a random place and by a random value, or a piece of the
file's text is cut out. An exception that is not an InputError, or a message of several lines, is
printed with the file that caused it.
"""

import argparse
import copy
import functools
import json
import shutil
import sys
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from clip import CLIPVision  # noqa: E402
from common.errors import InputError  # noqa: E402
from data import DATASETS  # noqa: E402
from dialogue import load_tokenizer  # noqa: E402
from llama import Llama  # noqa: E402
from mllm import MLLM  # noqa: E402

LLAVA = [
    {
        "id": "1",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": "A cat."},
        ],
    }
]
BOX = {"img_path": "a.png", "expression": "a cat", "bbox": [1, 2, 3, 4], "width": 9, "height": 9}
COCO = {
    "questions": [{"question_id": 1, "image_id": 2, "question": "What?"}],
    "annotations": [
        {"question_id": 1, "image_id": 2, "multiple_choice_answer": "a cat", "caption": "a cat"}
    ],
    "images": [{"id": 2, "file_name": "a.png"}],
}
POINT = {"file_path": "a.png", "question": "Which?", "answer": [1, 2, 3, 4]}
POINT["candidates"] = [[0, 1, 2, 8], [1, 2, 3, 4]]
RD = {
    "img_path": "a.png",
    "question": "Is it red?",
    "question_boxes_seq": [],
    "boxes": [[1, 2, 3, 4]],
}
RD |= {"cot_with_ans": "<ph_st>The cat<ph_ed> is.", "answer_boxes_seq": [[0]]}
FORMATS = {"llava": LLAVA, "rec": BOX, "vqa": COCO, "caption": COCO, "v7w": POINT, "rd": RD}
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2) | st.sampled_from([10**30, -(2**63)]),
    st.sampled_from([0.5, 1e308, float("nan"), float("inf")]),
    st.sampled_from(["", "a", "<image>", "<image><image>", "\ud800", "../x", "/etc/passwd", "1"]),
    st.sampled_from([[], {}, [[]], [1, 2], {"a": 1}, [None], "x" * 100_000]),
)


def places(value, path=()):
    """Return the path of every value in a JSON object."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
        found.append((*path, key))
        if isinstance(child, dict | list):
            found += places(child, (*path, key))
    return found


@st.composite
def damaged(draw, text):
    """Draw the text of a JSON file with one value exchanged, or with a piece cut out."""
    if draw(st.integers(0, 4)) == 0:
        start = draw(st.integers(0, len(text)))
        return text[:start] + text[start + draw(st.integers(1, 50)) :]
    value = copy.deepcopy(json.loads(text))
    *path, last = draw(st.sampled_from(places(value)))
    parent = value
    for key in path:
        parent = parent[key]
    if draw(st.booleans()):
        parent[last] = draw(ODD)
    else:
        del parent[last]
    return json.dumps(value)


def read_all(kind, path):
    files = f"{path},{path}" if kind == "vqa" else path
    dataset = DATASETS[kind](files, path.parent)
    for index in range(len(dataset)):
        dataset[index], dataset.length(index)


def targets(folder):
    """Return {name: (file to damage, function that reads it)}."""
    weights, own = folder / "weights", folder / "own"
    shutil.copytree(ROOT / "weights", weights)
    towers = [weights / "clip", weights / "dinov2"]
    MLLM.assemble(towers, weights / "llama", "comm").save(own)
    Image.new("RGB", (9, 9)).save(folder / "a.png")
    formats = {}
    for kind, content in FORMATS.items():
        (folder / f"{kind}.json").write_text(json.dumps(content))
        formats[kind] = folder / f"{kind}.json", functools.partial(read_all, kind)
    return formats | {
        "tower": (weights / "clip/config.json", lambda _: CLIPVision.from_pretrained(towers[0])),
        "pixels": (
            weights / "clip/preprocessor_config.json",
            lambda _: CLIPVision.from_pretrained(towers[0]),
        ),
        "llm": (
            weights / "llama/config.json",
            lambda _: Llama.from_pretrained(weights / "llama"),
        ),
        "tokenizer": (
            weights / "llama/tokenizer_config.json",
            lambda _: load_tokenizer(weights / "llama"),
        ),
        "words": (
            weights / "llama/tokenizer.json",
            lambda _: load_tokenizer(weights / "llama"),
        ),
        "own model": (own / "config.json", lambda _: MLLM.from_pretrained(own)),
        "own pixels": (own / "preprocessor_config.json", lambda _: MLLM.from_pretrained(own)),
    }


def fuzz(name, path, read, examples):
    """Return the different tracebacks, {(exception, message): text of the file}."""
    text, found, num_errors = path.read_text(), {}, 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(text))
    def check(bad):
        nonlocal num_errors
        path.write_text(bad, errors="surrogatepass")
        try:
            read(path)
        except InputError as error:
            num_errors += 1
            if len(str(error).splitlines()) > 1:
                found.setdefault(("several lines", str(error)[:80]), bad[:300])
        except Exception as error:
            found.setdefault((type(error).__name__, str(error)[:80]), bad[:300])

    check()
    path.write_text(text)
    print(f"{name:10} {examples} damages, {num_errors} errors, {len(found)} kinds of traceback")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=200)
    options = parser.parse_args()
    num_found = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, (path, read) in targets(Path(folder)).items():
            for kind, text in fuzz(name, path, read, options.examples).items():
                num_found += 1
                print(f"  {': '.join(kind)}\n    {text!r}")
    sys.exit(1 if num_found else 0)


if __name__ == "__main__":
    main()
