"""benchmarks.judge with a fake judge on this machine: prompts, verdicts, averages as officially."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from benchmarks.judge import llava_bench_score, main, read_pair
from common.errors import InputError


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """Start a judge -> its URL, the requests that it got, the replies that it will give.

    A number as a reply is an HTTP status.
    """
    requests, replies = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers["Authorization"], body))
            reply = replies.pop(0)
            self.send_response(reply if isinstance(reply, int) else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}]}).encode())

        def log_message(self, *arguments):
            pass

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", requests, replies
    server.shutdown()
    server.server_close()


def write(path, content):
    Path(path).parent.mkdir(exist_ok=True)
    lines = content if isinstance(content, list) else [content]
    Path(path).write_text("\n".join(map(json.dumps, lines)))


def answers(**texts):
    lines = [{"id": name, "prompt": "?", "answer": text} for name, text in texts.items()]
    write("out/answers.jsonl", lines)


def scores(judge):
    results = json.loads(Path(f"out/verdicts-{judge}.scores.json").read_text())["results"]
    return {group: result["scores"] for group, result in results.items()}


def test_mm_vet_is_graded_as_officially_and_resumes(judge):
    url, requests, replies = judge
    questions = {
        "v1_0": {"question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]},
        "v1_1": {"question": "And?", "answer": "a<OR>b", "capability": ["ocr"]},
        "v1_2": {"question": "Who?", "answer": "c", "capability": ["rec", "know"]},
        "v1_3": {"question": "not answered", "answer": "c", "capability": ["rec"]},
    }
    write("mm-vet.json", questions)
    Path("rules.py").write_text('import json\nprompt = """a table\n"""\n')
    answers(v1_0="x = -1", v1_1="b", v1_2="d")
    command = ["mm_vet", "--answers=out", "--data=mm-vet.json", "--rules=rules.py", f"--url={url}"]
    # A busy server is asked again; a refused key ends the run.
    replies += [429, "1.0", 401]
    with pytest.raises(InputError, match="401"):
        main(command)
    path, key, body = requests[1]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    line = "a table\n\nWhat is x? | -1 <AND> -5 | x = -1 | "
    assert body["messages"] == [{"role": "user", "content": line}]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("gpt-4-0613", 0, 3)
    # Five replies without a grade count as 0.
    replies += ["maybe", "0.5 ", "1.5", "-1", "nan", "", "good"]
    main(command)
    assert len(requests) == 10 and not replies
    again = requests[4][2]["messages"][0]["content"]
    assert again.endswith("| b | \nPredict the correctness of the answer (digit): ")
    expected = {"total": 0.5, "ocr": 0.75, "math": 1, "rec": 0, "know": 0}
    assert scores("gpt-4-0613") == {group: {"score": value} for group, value in expected.items()}


def test_llava_bench_is_reviewed_as_officially(judge):
    url, requests, replies = judge
    question = {"question_id": 0, "image": "1.jpg", "category": "conv", "text": "Q?"}
    write("bench/questions.jsonl", [question, question | {"question_id": 1, "category": "detail"}])
    write("bench/context.jsonl", {"image": "1.jpg", "caption": ["A street.", "Two cars."]})
    write("bench/answers_gpt4.jsonl", [{"question_id": i, "text": "REF"} for i in range(2)])
    write("rule.json", {f"llava_bench_{kind}": {"prompt": "RULE"} for kind in ("conv", "detail")})
    answers(**{"0": "OURS", "1": "x"})
    replies += ["8 6\nGood.", "10 9"]
    files = ["--answers=out", "--data=bench", "--rules=rule.json"]
    main(["llava_bench", *files, f"--url={url}", "--judge=other"])
    system, user = requests[0][2]["messages"]
    assert user["content"] == (
        "[Context]\nA street.\nTwo cars.\n\n[Question]\nQ?\n\n[Assistant 1]\nREF\n\n"
        "[End of Assistant 1]\n\n[Assistant 2]\nOURS\n\n[End of Assistant 2]\n\n[System]\nRULE\n\n"
    )
    assert system["content"].startswith("You are a helpful and precise assistant")
    assert (requests[0][2]["model"], requests[0][2]["temperature"]) == ("other", 0.2)
    found = scores("other")
    conv = {"relative score": 0.75, "reference": 0.8, "ours": 0.6, "unreadable": 0}
    assert found["llava_bench_conv"] == conv
    assert found["all"]["relative score"] == pytest.approx(15 / 18)


def test_reviews_are_read_by_the_official_rule():
    for review, pair in {
        "8 7\nGood.": [8, 7],
        "8,7": [8, 7],
        "9 6.5": [9, 6.5],
        "10 9\n\nBecause": [10, 9],
        "8, 7\nx": [-1, -1],
        "8  7\n": [-1, -1],
        "8 7 \nx": [-1, -1],
        "Assistant 1: 8 7": [-1, -1],
        "": [-1, -1],
    }.items():
        assert read_pair(review) == pair, review
    found = llava_bench_score([[8, 6], [9, 9], [8, 7.5], [10, 4]])
    assert [round(100 * value, 1) for value in found.values()] == [75.7, 87.5, 66.2, 0]


def test_wrong_files_are_named(judge):
    Path("rules.py").write_text("x = 1")
    write("mm-vet.json", {"v1_0": {"question": "?"}})
    answers(v1_0="x")
    for arguments, name in (
        ("mm_vet --answers=out --data=mm-vet.json --rules=rules.py", "rules.py"),
        ("mm_vet --answers=out --data=mm-vet.json", "mm-vet.json"),
        ("mm_vet --answers=none --data=none --rules=tests.py", "none"),
        ("llava_bench --answers=out --data=none --rules=none", "none"),
        ("mmvet", "mm_vet"),
    ):
        with pytest.raises(InputError, match=name):
            main(arguments.split())
