"""Score answers to MM-Vet and LLaVA-Bench (in the wild) with an LLM as the judge, as officially.

    python -m benchmarks mm_vet --data=mm-vet.json --max_new_tokens=1024 --out=OUT ...
    python -m benchmarks.judge mm_vet --answers=OUT --data=mm-vet.json --rules=mm-vet_evaluator.py
    python -m benchmarks.judge llava_bench --answers=OUT --data=FOLDER --rules=rule.json

--rules has the judge's prompt: MM-Vet's mm-vet_evaluator.py (arXiv 2308.02490), or LLaVA's
llava/eval/table/rule.json (arXiv 2304.08485). The judge is any server with OpenAI's interface; its
key is the environment's OPENAI_API_KEY. Scores by two judges cannot be compared. OUT gets the
verdicts and the scores. A run that was stopped resumes.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from benchmarks.answers import read_answers, write_lines
from benchmarks.prompts import DAMAGE, Item, by_id, read_object, records
from benchmarks.scores import mean
from common import cli
from common.cli import option
from common.errors import InputError
from common.pretrained import read_json
from common.save import write_json


@dataclass
class Config:
    task: str = option("", "mm_vet or llava_bench; the first word of the command")
    answers: str = option("", "folder with the answers.jsonl of python -m benchmarks")
    data: str = option("", "mm-vet.json, or the folder of LLaVA-Bench")
    rules: str = option("", "file with the judge's prompt: mm-vet_evaluator.py, rule.json")
    judge: str = option("", "the judge's name at the server; default: the official one")
    url: str = option("https://api.openai.com/v1", "the server")


# --- MM-Vet -------------------------------------------------------------------------------


def mm_vet_items(config, answers):
    """Write the judge's prompts: a table of examples, and as its last line what is to be graded."""
    script = Path(config.rules).read_text(encoding="utf-8")
    table = re.search('prompt = """(.+?)"""', script, re.DOTALL)[1]
    for name, record in read_object(config.data).items():
        if name in answers:
            truth = record["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
            line = " | ".join([record["question"], truth, answers[name], ""])
            yield Item(name, [], f"{table}\n{line}", None, ("total", *record["capability"]))


def mm_vet_grade(ask, prompt):
    """Ask for a grade from 0 to 1, up to five times -> last reply, [grade]."""
    question = prompt
    for temperature in (0.0, 0.0, 0.5, 1.0, 1.5):
        reply = ask([{"role": "user", "content": question}], temperature, 3)
        try:
            grade = float(reply.split(" ")[0])
        except ValueError:
            grade = -1.0
        if 0 <= grade <= 1:
            return reply, [grade]
        question = f"{prompt}\nPredict the correctness of the answer (digit): "
    return reply, [0.0]


def mm_vet_score(grades):
    return {"score": mean(grade for (grade,) in grades)}


# --- LLaVA-Bench --------------------------------------------------------------------------

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."


def llava_bench_items(config, answers):
    """Write the judge's prompts: the image in words, the question, and GPT-4's answer and ours."""
    rules, folder = read_json(Path(config.rules)), Path(config.data)
    captions = {record["image"]: record["caption"] for record in records(folder / "context.jsonl")}
    references = by_id(folder / "answers_gpt4.jsonl")
    for question in records(folder / "questions.jsonl"):
        if str(question.id) in answers:
            category = f"llava_bench_{question['category']}"
            caption = captions[question["image"]]
            parts = {
                "Context": caption if isinstance(caption, str) else "\n".join(caption),
                "Question": question["text"],
                "Assistant 1": f"{references[question.id]['text']}\n\n[End of Assistant 1]",
                "Assistant 2": f"{answers[str(question.id)]}\n\n[End of Assistant 2]",
                "System": rules[category]["prompt"],
            }
            prompt = "".join(f"[{heading}]\n{text}\n\n" for heading, text in parts.items())
            yield Item(str(question.id), [], prompt, None, ("all", category))


def llava_bench_grade(ask, prompt):
    """Ask for a review -> the review, [score of GPT-4's answer, score of ours] from 1 to 10."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
    review = ask(messages, 0.2, 1024)
    return review, read_pair(review)


def read_pair(review):
    """Read the first line, two numbers with a space or comma between them, else [-1, -1]."""
    pair = re.fullmatch(r"(\d+\.?\d*)[ ,](\d+\.?\d*)", review.split("\n")[0])
    return [float(number) for number in pair.groups()] if pair else [-1, -1]


def llava_bench_score(pairs):
    """Divide the mean of our scores by that of GPT-4's. Reviews that cannot be read count, too."""
    theirs, ours = map(mean, zip(*pairs, strict=True))
    scores = {"relative score": ours / theirs, "reference": theirs / 10, "ours": ours / 10}
    return scores | {"unreadable": mean(pair == [-1, -1] for pair in pairs)}


# --- the run ------------------------------------------------------------------------------


class Judge(NamedTuple):
    items: Callable  # (config, {id: answer}) -> items with the judge's prompts
    grade: Callable  # (ask, prompt) -> reply, scores
    score: Callable  # list of scores -> {metric: value}
    name: str  # the official judge


JUDGES = {
    "mm_vet": Judge(mm_vet_items, mm_vet_grade, mm_vet_score, "gpt-4-0613"),
    "llava_bench": Judge(llava_bench_items, llava_bench_grade, llava_bench_score, "gpt-4-0314"),
}


def new_session():
    """Open an HTTP session with the key, which waits and asks again while the server is busy."""
    session, busy = requests.Session(), [429, 500, 502, 503]
    session.headers["Authorization"] = f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"
    retry = Retry(8, backoff_factor=1, status_forcelist=busy, allowed_methods=None)
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


def chat(session, url, name, messages, temperature, max_tokens):
    """Send messages to the judge -> its reply. Raises InputError."""
    request = {"model": name, "temperature": temperature, "max_tokens": max_tokens}
    try:
        url = f"{url}/chat/completions"
        reply = session.post(url, json=request | {"messages": messages}, timeout=300)
        reply.raise_for_status()
        return reply.json()["choices"][0]["message"]["content"]
    except (requests.RequestException, LookupError, TypeError) as error:
        raise InputError(f"{url}: no answer from the judge {name} ({error!r})") from None


def main(arguments):
    config = cli.parse(Config, arguments, __doc__)
    judge = cli.find_class(JUDGES, config.task, "benchmark")
    folder, name = Path(config.answers), config.judge or judge.name
    answers = {line["id"]: line["answer"] for line in read_answers(folder, []).values()}
    try:
        items = list(judge.items(config, answers))
    except DAMAGE as error:
        files = f"--data={config.data}, --rules={config.rules}"
        raise InputError(f"{files}: are these the files of {config.task}? ({error!r})") from error
    if not items:
        raise InputError(f"--answers={folder}: has no answers to the questions of {config.data}")
    ask = partial(chat, new_session(), config.url, name)
    path = folder / f"verdicts-{name.replace('/', '-')}.jsonl"
    verdicts = read_answers(folder, items, path.name)
    for item in items:
        if item.id not in verdicts:
            reply, scores = judge.grade(ask, item.prompt)
            verdict = {"id": item.id, "prompt": item.prompt, "answer": reply, "scores": scores}
            write_lines(path, [verdict])
            verdicts[item.id] = verdict
    results = {}
    for group in dict.fromkeys(group for item in items for group in item.groups):
        scores = [verdicts[item.id]["scores"] for item in items if group in item.groups]
        results[group] = {"samples": len(scores), "scores": judge.score(scores)}
        for metric, value in results[group]["scores"].items():
            print(f"{group:40} {len(scores):7,}  {metric:20} {100 * value:8.1f}")
    write_json(path.with_suffix(".scores.json"), {"task": config.task, "results": results})


if __name__ == "__main__":
    cli.run(main)
