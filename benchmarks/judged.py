"""Scores of the benchmarks whose answers another model judges, from the judge's own file.

    python -m benchmarks mm_vet --data=mm-vet.json --judged=GRADES.json

The official script reads our submission, asks the judge and writes a row for every question:

    MM-Vet         {"score": [0.5]}                      a grade from 0 to 1 for each time of asking
    LLaVA-Bench    {"tuple": [8, 7]}                     1 to 10 for GPT-4's answer and for ours
    MathVista      {"extraction": "14"}                  the answer without the words around it
    video          [{"pred": "yes", "score": 4}, ...]    right or wrong, and 0 to 5
    Video-ChatGPT  [{"score": 4}, ...]

Without the judge, MathVista is scored by a rule, and video by exact match: lower bounds.
"""

import re

from benchmarks.prompts import read_object, records
from benchmarks.scores import LETTERS, mean, mmmu_letter

# The metric that is from 0 to 5; all others are from 0 to 1.
POINTS = "score (0 to 5)"


def read_verdicts(path, key):
    """Read the judge's file -> {question's id: the row's part that is scored}."""
    rows = read_object(path) or {str(record.id): record for record in records(path)}
    return {name: row[key] for name, row in rows.items()}


def mm_vet_scores(grades, targets):
    return {"score": mean(map(mean, grades))}


def llava_bench_scores(pairs, targets):
    """Divide the mean of our points by that of GPT-4's. A review without points is -1 for both."""
    reference, ours = map(mean, zip(*pairs, strict=True))
    return {"relative score": ours / reference, "reference": reference / 10, "ours": ours / 10}


def video_points(verdicts, targets):
    return {POINTS: mean(int(verdict["score"]) for verdict in verdicts)}


def video_scores(verdicts, targets):
    """Score the share of "yes" among the verdicts that are yes or no, and the points of all."""
    words = [verdict["pred"].lower() for verdict in verdicts]
    accuracy = mean("yes" in word for word in words if "yes" in word or "no" in word)
    return {"accuracy": accuracy} | video_points(verdicts, targets)


# --- MathVista (arXiv 2310.02255) ---------------------------------------------------------


def edit_distance(a, b):
    """Count the characters to insert, delete or replace between two texts (Levenshtein)."""
    row = list(range(len(b) + 1))
    for x in a:
        above, row = row, [row[0] + 1]
        for j, y in enumerate(b):
            row.append(min(row[j] + 1, above[j + 1] + 1, above[j] + (x != y)))
    return row[-1]


def mathvista_match(extraction, problem):
    """Compare an extracted answer. What is no option becomes the most similar option."""
    choices, kind = problem["choices"], problem["answer_type"]
    extraction = extraction.strip()
    if choices:
        letters = re.findall(r"\(([a-zA-Z])\)", extraction)
        letter = letters[0].upper() if letters else extraction
        options = dict(zip(LETTERS, choices, strict=False))
        nearest = min(choices, key=lambda choice: edit_distance(letter, choice))
        extraction = options.get(letter, nearest)
    elif kind != "list":
        try:
            number = float(extraction)
            number = int(number) if kind == "integer" else round(number, int(problem["precision"]))
        except (ValueError, OverflowError):
            return False
        extraction = str(number)
    return extraction == problem["answer"]


def mathvista_rule(answer, problem):
    """Compare an answer by its option letter or last number."""
    if problem["choices"]:
        answer = mmmu_letter(answer, problem["choices"]) or answer
    else:
        numbers = re.findall(r"(?:(?<!\d)-)?\d*\.?\d+", answer.replace(",", ""))
        answer = numbers[-1] if numbers else answer
    return mathvista_match(answer, problem)
