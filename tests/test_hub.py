"""common: what is wrong with a checkpoint is one line that names the tensor or the file."""

import json
import os
import pkgutil
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import ROOT, recorded, refused
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tower_outputs import expand

from common.pretrained import build_part, locate, match, on_meta, read_config, read_json
from common.save import replace_folder, save_checkpoint, save_in_files
from dinov2 import DINOv2
from interop.load import newest_model
from mllm import LLMS as LLM_CLASSES

TENSOR = "encoder.layer.1.mlp.fc1.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A good checkpoint, to be damaged."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(recorded("dinov2")[0] / name, tmp_path / name)
    return tmp_path


def change(folder, tensors):
    """Replace tensors of a checkpoint; None: delete."""
    tensors = load_file(folder / "model.safetensors") | tensors
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


def is_refused(folder, *parts):
    """Loading is an error of one line that names the folder and these parts."""
    with refused(str(folder)) as error:
        DINOv2.from_pretrained(folder)
    for part in parts:
        assert part in str(error.value)


def test_a_tensor_that_is_missing_left_over_or_of_another_kind_is_named(folder):
    change(folder, {"encoder.layer.9.mlp.fc1.weight": torch.zeros(3)})
    is_refused(folder, "encoder.layer.9.mlp.fc1.weight", "left over")
    change(folder, {"encoder.layer.9.mlp.fc1.weight": None, TENSOR: None})
    is_refused(folder, "blocks.1.mlp.fc1.weight", "missing")
    change(folder, {TENSOR: torch.zeros(33, 16)})
    is_refused(folder, TENSOR, "[33, 16]", "[32, 16]")
    # twice in the file, with and without its prefix
    change(folder, {"dinov2.layernorm.bias": torch.zeros(16)})
    is_refused(folder, "layernorm.bias", "left over")


def test_a_damaged_or_missing_file_is_named(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    damaged = [whole[:size] for size in (0, 5, 400, len(whole) - 1)]
    damaged += [(2**63).to_bytes(8, "little") + whole[8:], whole.replace(b"F16", b"X77")]
    for content in damaged:
        path.write_bytes(content)
        is_refused(folder, "model.safetensors")
    path.write_bytes(whole)
    config, texts = read_config(folder), [b'{"a": 1,\n"b"}', b"[]", b"\xff", b"[" * 100_000]
    wrong = {"image_size": [28, 28], "hidden_size": "16"}
    for key, value in (*wrong.items(), ("patch_size", 0), ("hidden_size", -16)):
        texts.append(json.dumps(config | {key: value}).encode())
    for text in texts:
        (folder / "config.json").write_bytes(text)
        is_refused(folder, "config.json")
    (folder / "config.json").write_text(json.dumps(config))
    # pickled weights are not read
    path.rename(folder / "pytorch_model.bin")
    is_refused(folder, "no safetensors")
    (folder / "config.json").unlink()
    is_refused(folder, "config.json")


def test_shards_give_the_same_model_and_a_wrong_index_is_an_error(folder):
    whole = DINOv2.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_in_files(folder, tensors.items(), read_config(folder), limit=9_000)
    places = read_json(folder / INDEX)["weight_map"]
    again = DINOv2.from_pretrained(folder)
    for ours, sharded in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, sharded)

    first = min(places.values())
    unlisted = {name: place for name, place in places.items() if name != TENSOR}
    for weight_map, *parts in (
        (places | {TENSOR: f"../{first}"}, TENSOR, INDEX),
        (places | {TENSOR: "model-9.safetensors"}, TENSOR, INDEX),
        (unlisted, "blocks.1.mlp.fc1.weight", "missing"),
    ):
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        is_refused(folder, *parts)


def test_training_leaves_the_mapped_file_as_it_is_and_a_model_is_saved_over_it(folder):
    before = (folder / "model.safetensors").read_bytes()
    model = DINOv2.from_pretrained(folder, dtype=None)
    for parameter in model.parameters():
        parameter.data.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before
    model.save_pretrained(folder)
    assert torch.equal(DINOv2.from_pretrained(folder, None).norm.weight, model.norm.weight)


def test_the_newest_model_is_found_and_folders_are_replaced_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused():
        newest_model()
    tmp_path = tmp_path / "out"
    for i, name in enumerate(("a", "b", "c.partial", "d")):
        save_checkpoint(tmp_path / name, {"x": torch.ones(i + 1)}, {"model_type": "mllm"})
        os.utime(tmp_path / name / "config.json", (i, i))
    (tmp_path / "d" / "config.json").write_text('{"model_type": "llama"}')
    assert newest_model().resolve() == tmp_path / "b"
    replace_folder(tmp_path / "c.partial", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "d"]
    assert len(load_file(tmp_path / "b" / "model.safetensors")["x"]) == 3


# --- public releases: names, shapes and configs ---

FIXTURES = ROOT / "tests" / "fixtures"
TOWERS = json.loads((FIXTURES / "layouts_vision.json").read_text())
LLMS = json.loads((FIXTURES / "layouts_llm.json").read_text())


@pytest.mark.parametrize("release", TOWERS)
def test_every_tensor_of_a_public_tower_has_its_place(release, tmp_path):
    row = TOWERS[release]
    config, tower_class = row["config"], pkgutil.resolve_name(row["class"])
    if "id2label" in config:
        config = config | {"id2label": {str(i): "" for i in range(config["id2label"])}}
    shapes = expand(row["tensors"])
    # the names show whether there is a head
    save_checkpoint(tmp_path, {name: torch.zeros(0) for name in shapes}, config)
    with on_meta():
        tower = tower_class.from_folder(tmp_path)
    match(tower, shapes, tower.name_of, release)
    count = sum(parameter.numel() for parameter in tower.parameters())
    assert count / 1e6 == pytest.approx(row["millions"][1], abs=0.06)


@pytest.mark.parametrize("release", LLMS)
def test_every_tensor_of_a_public_llm_has_its_parameter(release):
    config, shapes = LLMS[release]["config"], expand(LLMS[release]["tensors"])
    with on_meta():
        model = build_part(LLM_CLASSES, config, release)
    match(model, shapes, model.name_of, release)


# --- names: folders and Hugging Face ids ---


@pytest.fixture
def small_hub(tmp_path, monkeypatch):
    """In place of the hub: good/model, old/model, which is pickled, and broken ones."""
    reply = SimpleNamespace(headers={}, request=None)
    broken = {
        "gated/model": errors.GatedRepoError("no access", response=reply),
        "no/model": errors.RepositoryNotFoundError("unknown", response=reply),
        "down/model": ConnectionError("no route to host"),
    }

    def snapshot_download(name, revision, **patterns):
        full_name = f"{name}@{revision}" if revision else name
        if full_name in broken:
            raise broken[full_name]
        folder = tmp_path / full_name
        folder.mkdir(parents=True, exist_ok=True)
        files = ("config.json", "pytorch_model.bin", "model.safetensors", "onnx/x.json")
        for file in filter_repo_objects(files, **patterns):
            if full_name != "old/model" or "safetensors" not in file:
                (folder / file).write_text("")
        return str(folder)

    pull = SimpleNamespace(git_reference="refs/pr/7")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_repo_discussions", lambda name, **_: [pull])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return broken


def test_an_id_is_downloaded_or_one_line_says_what_to_do(small_hub, tmp_path, monkeypatch):
    for name in ("good/model", "good/model@v1", "old/model"):
        folder = locate(name)
        assert folder == tmp_path / name.replace("old/model", "old/model@refs/pr/7")
        files = sorted(path.name for path in folder.iterdir())
        assert files == ["config.json", "model.safetensors"]
    for name in (*small_hub, "./nowhere", "/nowhere/at/all", "nowhere", __file__):
        with refused(name) as error:
            locate(name)
        assert ("HF_TOKEN" in str(error.value)) == (name in ("gated/model", "no/model"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with refused("HF_HUB_OFFLINE"):
        locate("down/model")
