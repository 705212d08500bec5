"""hub.py finds checkpoints by name: in the cache, else on a small hub that these tests start on this machine."""
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from hub import InputError, locate

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = save({"weight": torch.arange(40000.0)})
MAIN, PULL = "a" * 40, "b" * 40                                      # the commits of revision main and of refs/pr/7
TEXTS = {"config.json": b"{}", "tokenizer.json": b"{ }", "pytorch_model.bin": b"pickled", "README.md": b"#"}


class SmallHub(ThreadingHTTPServer):
    """The part of the hub's protocol that a download needs: a revision's commit, its files, each file with its headers.

    commits: {commit: {path: bytes}}. refuse(method, path): a (status, X-Error-Code) to answer with instead, or None.
    cut: paths whose next download ends half-way. served: {path: bytes sent in place of the true ones}."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Protocol)
        self.commits = {MAIN: TEXTS | {"model.safetensors": WEIGHTS}}
        self.revisions = {"main": MAIN, "v1": MAIN, "refs/pr/7": PULL}
        self.refuse, self.cut, self.served, self.log, self.pulls = lambda method, path: None, set(), {}, [], []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def downloads(self):
        return [(path, first) for method, path, first in self.log if method == "GET" and "/resolve/" in path]


class Protocol(BaseHTTPRequestHandler):
    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0].replace("%2F", "/")
        first = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        hub.log.append((self.command, path, first))
        hub.token = self.headers.get("Authorization")
        refusal = hub.refuse(self.command, path)
        if refusal:
            return self.answer(refusal[0], b"{}", {"X-Error-Code": refusal[1]} if refusal[1] else {})
        parts = path.strip("/").split("/")
        if parts[0] == "api" and parts[-1] == "discussions":
            return self.answer(200, json.dumps({"count": len(hub.pulls), "start": 0, "discussions": hub.pulls}).encode())
        if parts[0] == "api" and "tree" in parts:
            return self.answer(200, json.dumps([self.described(*item) for item in hub.commits[parts[-1]].items()]).encode())
        if parts[0] == "api":
            revision = "/".join(parts[5:]) or "main"
            if revision not in hub.revisions:
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            commit = hub.revisions[revision]
            return self.answer(200, json.dumps({"id": "owner/name", "sha": commit, "siblings": [
                {"rfilename": name} for name in hub.commits[commit]]}).encode())
        commit, name = parts[3], "/".join(parts[4:])
        commit = hub.revisions.get(commit, commit)
        whole = hub.commits[commit][name]
        body = hub.served.get(name, whole)[first:]
        headers = {"ETag": f'"{self.described(name, whole)["oid"]}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(whole) - 1}/{len(whole)}"
        half = name in hub.cut and self.command == "GET"
        if half:
            hub.cut.discard(name)
        self.answer(206 if first else 200, body, headers, sent=len(body) // 2 if half else len(body))

    do_HEAD = do_GET

    def described(self, name, content):
        """A file as the hub lists it. Large ones (here: safetensors) are named by their SHA-256."""
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(content).hexdigest()
            return {"type": "file", "path": name, "size": len(content), "oid": digest,
                    "lfs": {"oid": digest, "size": len(content), "pointerSize": 134}}
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def answer(self, status, body, headers={}, sent=None):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])

    def log_message(self, *_):
        pass


@pytest.fixture
def environment(tmp_path):
    server = SmallHub()
    yield server, {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
                   "NO_PROXY": "127.0.0.1", "HF_TOKEN": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    server.shutdown()
    server.server_close()


@pytest.fixture
def small_hub(environment, monkeypatch):
    """A hub with the repository owner/name, and huggingface_hub imported anew: it reads its environment at import."""
    server, variables = environment
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    forget(monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)         # before another try; nothing here has to be waited for
    return server


def forget(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)


def error_of(name):
    with pytest.raises(InputError) as error:
        locate(name)
    assert "\n" not in str(error.value) and name.split("@")[0] in str(error.value)
    return str(error.value)


def test_only_the_needed_files_are_downloaded_and_found_again_without_the_hub(small_hub):
    small_hub.commits[MAIN] |= {"consolidated.safetensors": WEIGHTS, "open_clip_model.safetensors": WEIGHTS,
                                "onnx/model.safetensors": WEIGHTS, "chat_template.jinja": b"-", "tf_model.h5": b"-"}
    folder = locate("owner/name")
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    small_hub.log.clear()
    assert locate("owner/name") == folder and not small_hub.log


def test_a_download_that_is_cut_half_way_goes_on_where_it_stopped(small_hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 8)      # what arrives in part is lost: 10 MB by default
    small_hub.cut.add("model.safetensors")
    assert (locate("owner/name") / "model.safetensors").read_bytes() == WEIGHTS
    starts = [first for path, first in small_hub.downloads() if path.endswith("model.safetensors")]
    assert starts == [0, len(WEIGHTS) // 2]


def test_a_command_that_broke_off_is_resumed_without_the_files_that_are_there(small_hub):
    small_hub.refuse = lambda method, path: (404, "EntryNotFound") if path.endswith("tokenizer.json") else None
    assert "status 404" in error_of("owner/name")
    small_hub.refuse, before = lambda method, path: None, len(small_hub.downloads())
    assert (locate("owner/name") / "model.safetensors").read_bytes() == WEIGHTS
    assert [path.rpartition("/")[2] for path, _ in small_hub.downloads()[before:]] == ["tokenizer.json"]


def test_damaged_weights_are_named_deleted_and_downloaded_anew(small_hub):
    small_hub.served["model.safetensors"] = WEIGHTS[:-1] + b"\xff"   # as long as the true ones
    message = error_of("owner/name")
    assert "model.safetensors arrived damaged" in message and "SHA-256" in message and "try again" in message
    small_hub.served.clear()
    assert (locate("owner/name") / "model.safetensors").read_bytes() == WEIGHTS


def test_weights_of_another_size_are_an_error(small_hub):
    small_hub.served["model.safetensors"] = WEIGHTS + b"more"
    small_hub.refuse = lambda method, path: small_hub.served.clear() if method == "HEAD" else small_hub.served.update(
        {"model.safetensors": WEIGHTS + b"more"})                    # HEAD tells the true size, GET sends another
    assert f"should be of size {len(WEIGHTS)} but has size {len(WEIGHTS) + 4}" in error_of("owner/name")


@pytest.mark.parametrize("status, code, named", [
    (401, "RepoNotFound", "neither a folder nor a repository on the hub (private ones need HF_TOKEN)"),
    (401, None, "the hub refuses access (401): HF_TOKEN is wrong, or may not read it"),
    (404, "RepoNotFound", "neither a folder nor a repository on the hub"),
    (403, "GatedRepo", "accept its licence on the hub, then set HF_TOKEN"),
    (403, None, "the hub refuses access (403): HF_TOKEN is wrong, or may not read it"),
    (500, None, "downloading it failed (status 500)")])
def test_a_hub_that_refuses_is_one_line_with_what_to_do(small_hub, status, code, named):
    small_hub.refuse = lambda method, path: (status, code)
    assert named in error_of("owner/name")


def test_files_of_a_gated_repository_are_refused_though_it_may_be_listed(small_hub):
    small_hub.refuse = lambda method, path: (403, "GatedRepo") if "/resolve/" in path else None
    assert "gated repository" in error_of("owner/name")


@pytest.mark.parametrize("where", ["/api/models/owner/name", "/tree/", "/resolve/"])
def test_a_hub_that_fails_for_a_moment_is_asked_again(small_hub, where):
    failures = iter([(500, None), (503, None)])
    small_hub.refuse = lambda method, path: next(failures, None) if where in path else None
    assert (locate("owner/name") / "model.safetensors").read_bytes() == WEIGHTS


def test_a_revision_is_downloaded_beside_the_main_one(small_hub):
    small_hub.commits[PULL] = small_hub.commits[MAIN] | {"config.json": b'{"new": 1}'}
    assert (locate("owner/name") / "config.json").read_bytes() == b"{}"
    assert (locate("owner/name@refs/pr/7") / "config.json").read_bytes() == b'{"new": 1}'
    assert locate("owner/name@v1") == locate("owner/name")
    assert "has no revision v2" in error_of("owner/name@v2")


def test_pickled_weights_are_replaced_by_the_hubs_own_conversion(small_hub, monkeypatch, capsys):
    """As in openai/clip-vit-large-patch14-336: nothing but pytorch_model.bin on main, safetensors in the bot's pull request."""
    small_hub.commits = {MAIN: TEXTS, PULL: TEXTS | {"model.safetensors": WEIGHTS}}
    pull = dict(title="Adding `safetensors` variant of this model", num=7, status="open", isPullRequest=True,
                createdAt="2023-03-01T00:00:00.000Z", repo={"name": "owner/name", "type": "model"})
    small_hub.pulls = [pull | dict(author={"name": "somebody"}, num=3), pull | dict(author={"name": "SFconvertbot"})]
    folder = locate("owner/name")
    assert folder.name == PULL and (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert "@refs/pr/7" in capsys.readouterr().err
    assert not [path for path, _ in small_hub.downloads() if path.endswith(".bin")]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    forget(monkeypatch)
    assert locate("owner/name") == folder                            # the cache knows it under the plain name


def test_offline_the_error_says_so_and_what_to_do(small_hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    forget(monkeypatch)
    assert "HF_HUB_OFFLINE forbids downloading" in error_of("owner/name") and not small_hub.log


def test_a_cache_with_a_part_of_the_model_is_completed(small_hub):
    """Whoever has used only a model's tokenizer has its folder in the cache, without the weights."""
    from huggingface_hub import hf_hub_download
    hf_hub_download("owner/name", "tokenizer.json")
    assert (locate("owner/name") / "model.safetensors").exists()


def test_of_two_processes_one_downloads_and_the_environment_holds(environment, tmp_path):
    """As under torchrun: both ask at once. HF_HOME, HF_ENDPOINT and HF_TOKEN come from the environment alone."""
    server, variables = environment
    asking = threading.Semaphore(0)
    server.refuse = lambda method, path: "/resolve/" in path and asking.acquire(timeout=120) and asking.release()
    command = [sys.executable, "-c", "import hub; print('asking', flush=True); print(hub.locate('owner/name'))"]
    ranks = [subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                              env=os.environ | variables | {"LOCAL_RANK": str(rank), "HF_TOKEN": "hf_secret"}) for rank in (0, 1)]
    for rank in ranks:
        assert rank.stdout.readline() == "asking\n"
    asking.release()                                                 # files are served only now that both are asking
    folders = {rank.communicate(timeout=300)[0].strip() for rank in ranks}
    assert len(folders) == 1 and folders.pop().startswith(str(tmp_path)) and not any(rank.returncode for rank in ranks)
    paths = [path for path, _ in server.downloads()]
    assert len(paths) == len(set(paths)) == 3 and server.token == "Bearer hf_secret"
