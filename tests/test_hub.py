"""hub.py: what is wrong with a checkpoint is said in one line that names the tensor or the file."""
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import hub
from hub import (InputError, dtype_to_answer, load_weights, locate, read_config, save_checkpoint, save_in_files,
                 tensor_files)
from llama import Llama, LlamaConfig

FIXTURE = Path(__file__).parent / "fixtures" / "llama_multi_head"
TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """A good checkpoint, to be damaged."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURE / name, tmp_path / name)
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder):
    """The same checkpoint as two shards and their index."""
    tensors = load_file(folder / "model.safetensors")
    names, places = sorted(tensors), {}
    for part, some in enumerate((names[:9], names[9:])):
        places |= {name: f"model-{part}.safetensors" for name in some}
        save_file({name: tensors[name] for name in some}, folder / f"model-{part}.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return places


def error_of(folder):
    with pytest.raises(InputError) as error:
        Llama.from_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_missing_tensor_is_named(folder):
    rewrite(folder, lambda tensors: tensors.pop(TENSOR))
    message = error_of(folder)
    assert "missing" in message and "layers.1.mlp.up_proj.weight" in message


def test_left_over_tensor_is_named(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(3)}))
    message = error_of(folder)
    assert "left over" in message and "model.layers.2.mlp.up_proj.weight" in message


def test_tensor_of_another_shape_is_named_with_both_shapes(folder):
    rewrite(folder, lambda tensors: tensors.update({TENSOR: torch.zeros(41, 32)}))
    message = error_of(folder)
    assert TENSOR in message and "(41, 32)" in message and "(40, 32)" in message


def test_tensor_that_is_not_made_of_floats_is_named(folder):
    rewrite(folder, lambda tensors: tensors.update({TENSOR: torch.zeros(40, 32, dtype=torch.int8)}))
    message = error_of(folder)
    assert TENSOR in message and "int8" in message


@pytest.mark.parametrize("size", [0, 5, 400, 50000])
def test_truncated_file_is_named(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "model.safetensors" in error_of(folder)


def test_a_byte_cut_off_is_named_though_every_tensor_begins_within_the_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path}: not a readable safetensors file, truncated or damaged" in error_of(folder)


def lie(path, change):
    """Rewrite the header of a safetensors file, and leave the weights behind it as they are."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


@pytest.mark.parametrize("change", [
    lambda header: header[TENSOR].update(shape=[80, 32]),            # more than its bytes
    lambda header: header[TENSOR].update(data_offsets=[0, 10 ** 9]),  # beyond the end of the file
    lambda header: header[TENSOR].update(dtype="F64"),
    lambda header: header[TENSOR].update(dtype="X7"),
    lambda header: header.update({"model.norm.weight": header[TENSOR]})])    # two tensors in one place
def test_a_header_that_lies_about_a_tensor_is_an_error(folder, change):
    lie(folder / "model.safetensors", change)
    assert "model.safetensors: not a readable safetensors file" in error_of(folder)


@pytest.mark.parametrize("length", [0, 1, 10 ** 6, 2 ** 63])
def test_a_header_that_lies_about_its_own_size_is_an_error(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    assert "model.safetensors: not a readable safetensors file" in error_of(folder)


def test_a_shard_that_is_cut_off_is_named(folder):
    shard(folder)
    path = folder / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert str(path) in error_of(folder)


def test_a_tensor_of_another_shape_or_kind_is_named_with_its_shard(folder):
    for wrong in (torch.zeros(41, 32), torch.zeros(40, 32, dtype=torch.int8)):
        rewrite(folder, lambda tensors: tensors.update({TENSOR: wrong}))
        places = shard(folder)
        assert f"{folder}/{places[TENSOR]}: tensor {TENSOR} has" in error_of(folder)
        shutil.copy(FIXTURE / "model.safetensors", folder)


def test_a_model_is_loaded_whole_or_not_at_all(folder):
    """The last tensor of the file is the wrong one: until then all was well, and still no parameter has changed."""
    last = list(load_file(folder / "model.safetensors"))[-1]
    with torch.device("meta"):
        model = Llama(LlamaConfig.from_dict(read_config(folder), folder))
    rewrite(folder, lambda tensors: tensors.update({last: tensors[last].to(torch.int8)}))
    with pytest.raises(InputError, match="int8"):
        load_weights(model, folder, model.name_of)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_reason(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    message = error_of(folder)
    assert name in message and "pickle" in message and "safetensors" in message


def test_folder_without_checkpoint_is_an_error(folder):
    (folder / "model.safetensors").unlink()
    assert "no checkpoint" in error_of(folder)


def test_folder_without_config_is_an_error(folder):
    (folder / "config.json").unlink()
    assert "config.json" in error_of(folder)


@pytest.mark.parametrize("text, named", [('{"a": 1,\n"b"}', "line 2"), ("[]", "object"), ("\xff", "config.json"),
                                         ("[" * 100_000, "config.json"), ('{"a":' + "1" * 5000 + "}", "config.json")])
def test_config_that_is_not_an_object_is_an_error(folder, text, named):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert named in error_of(folder)


def test_name_that_is_neither_a_folder_nor_an_id_is_an_error():
    for name in ("./nowhere", "/nowhere/at/all", "nowhere"):
        with pytest.raises(InputError, match="no such folder"):
            locate(name)


def test_id_that_is_not_in_the_cache_is_an_error_without_the_network():
    with pytest.raises(InputError, match="nobody/no-such-model"):
        locate("nobody/no-such-model")


def test_id_that_the_hub_could_never_have_is_an_error():
    with pytest.raises(InputError, match="owner/na me: no such folder, and not a Hugging Face id"):
        locate("owner/na me")


def test_shards_give_the_same_model(folder):
    whole = Llama.from_pretrained(folder)
    shard(folder)
    for ours, sharded in zip(whole.parameters(), Llama.from_pretrained(folder).parameters(), strict=True):
        assert torch.equal(ours, sharded)


def test_missing_shard_is_named(folder):
    shard(folder)
    (folder / "model-1.safetensors").unlink()
    assert "model-1.safetensors" in error_of(folder)


def test_tensor_that_the_index_lists_but_no_shard_holds_is_named(folder):
    places = shard(folder)
    places["model.ghost.weight"] = "model-0.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert "model.ghost.weight" in error_of(folder)


def test_tensor_that_a_shard_holds_but_the_index_does_not_list_is_missing(folder):
    places = shard(folder)
    del places[TENSOR]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert "layers.1.mlp.up_proj.weight missing" in error_of(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {"a": 1}}'])
def test_index_without_a_map_from_tensors_to_shards_is_an_error(folder, text):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    assert f"model.safetensors.index.json: {'should hold an object' if text == '[]' else 'has no weight_map'}" in error_of(folder)


@pytest.mark.parametrize("place", ["../model-0.safetensors", "/model-0.safetensors", "sub/model-0.safetensors", "..", ""])
def test_index_that_points_outside_the_folder_is_refused(folder, place):
    places = shard(folder)
    places[TENSOR] = place
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    message = error_of(folder)
    assert "outside the folder" in message and TENSOR in message and "model.safetensors.index.json" in message


def test_parameters_are_the_mapped_file_itself(folder):
    """No second copy in memory: every parameter lies where the system has mapped the file."""
    model = Llama.from_pretrained(folder)
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not list its mapped files")
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    for name, parameter in model.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in ranges), f"{name} was copied"


def test_training_leaves_the_checkpoint_as_it_is(folder):
    """The file's pages are copied on write: training changes the model and not the file."""
    before = (folder / "model.safetensors").read_bytes()
    model = Llama.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


def test_saved_checkpoint_replaces_the_one_it_was_loaded_from(folder):
    model = Llama.from_pretrained(folder)
    with torch.no_grad():
        model.norm.weight.add_(1)
    model.save_pretrained(folder)
    assert torch.equal(Llama.from_pretrained(folder).norm.weight, model.norm.weight)
    assert not list(folder.glob("*.partial"))


def test_save_and_load_of_any_module(tmp_path):
    module = torch.nn.Linear(3, 2)
    save_checkpoint(tmp_path, {f"x.{name}": p for name, p in module.named_parameters()}, {"model_type": "linear"})
    with torch.device("meta"):
        empty = torch.nn.Linear(3, 2)
    loaded = load_weights(empty, tmp_path, lambda name: name.removeprefix("x."), dtype=torch.bfloat16)
    assert loaded.weight.dtype == torch.bfloat16 and torch.equal(loaded.weight, module.weight.bfloat16())
    assert read_config(tmp_path) == {"model_type": "linear"}


def test_a_model_is_built_without_the_compiler():
    """Random numbers on the meta device import torch's compiler, which takes ten times as long as to load the model."""
    code = ("import sys, hub\nfrom clip import *\nfrom dinov2 import *\nfrom llama import *\nfrom vit import *\n"
            "with hub.on_meta():\n    CLIP(CLIPVisionConfig(), CLIPTextConfig()); DINOv2(DINOv2Config()); ViT(ViTConfig())\n"
            "    llama = Llama(LlamaConfig(64, 32, 32, 2, 2))\n"
            "assert all(p.is_meta for p in llama.parameters()) and llama.rope_frequencies.device.type == 'cpu'\n"
            "print('torch._dynamo' in sys.modules)")
    child = subprocess.run([sys.executable, "-c", code], cwd=FIXTURE.parents[2], capture_output=True, text=True)
    assert child.stdout == "False\n", child.stderr


@pytest.mark.parametrize("stored, wanted", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16),
                                            (torch.float32, torch.float32)])
def test_a_model_that_only_answers_takes_what_its_file_takes(stored, wanted, tmp_path):
    """The largest tensor decides: a norm is float32 in many a 16-bit file."""
    save_checkpoint(tmp_path, {"norm": torch.ones(4), "weight": torch.ones(8, 8, dtype=stored)}, {})
    assert dtype_to_answer(tmp_path, "cpu") == wanted
    assert dtype_to_answer(tmp_path, "cuda") == dtype_to_answer(tmp_path, "cpu", bf16=True) == torch.bfloat16
    assert dtype_to_answer(tmp_path, "cpu", bf16=False) == torch.float32


def test_a_large_checkpoint_is_written_in_files_and_never_held_whole(tmp_path):
    """Of ten tensors of 400 bytes at most 1000 bytes, two of them, exist at once; a tensor larger than that has its own file."""
    alive = weakref.WeakSet()
    def named():
        for i in range(10):
            tensor = torch.full((100 if i < 9 else 300,), float(i))
            alive.add(tensor.untyped_storage())
            assert len(alive) <= 3                                   # two that are held, and this one
            yield f"weight{i}", tensor
            del tensor
    save_in_files(tmp_path, named(), {"model_type": "x"}, limit=1000)
    places = tensor_files(tmp_path)
    assert len(set(places.values())) == 6 and sorted(places) == [f"weight{i}" for i in range(10)]
    assert load_file(places["weight7"])["weight7"].tolist() == [7.0] * 100 and len(load_file(places["weight9"])["weight9"]) == 300
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == 4 * 1200
    save_in_files(tmp_path / "small", [("weight", torch.ones(3))], {"model_type": "x"})
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["config.json", "model.safetensors"]


@pytest.fixture
def of_two(tmp_path, monkeypatch):
    """As in one of two processes of a node, and 1000 numbers are many. -> where copies in bfloat16 are kept."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(hub, "LARGE", 1000)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "mllm-bf16"


def copies(place):
    return sorted(path.name for path in place.iterdir() if path.is_dir()) if place.exists() else []


def test_processes_of_a_node_map_one_bfloat16_copy_of_a_large_file_of_another_kind(folder, of_two, capfd):
    shard(folder)
    wanted = Llama.from_pretrained(folder).state_dict()
    first, second = (Llama.from_pretrained(folder, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(tensor, wanted[name].bfloat16()) for model in (first, second) for name, tensor in model.state_dict().items())
    assert capfd.readouterr().out.count("not bfloat16; writing a copy") == len(copies(of_two)) == 1
    mapped = tensor_files(of_two / copies(of_two)[0])
    assert set(mapped) == set(tensor_files(folder)) and Path("/proc/self/maps").read_text().count(str(of_two)) >= len(set(mapped.values()))


@pytest.mark.parametrize("alone, dtype, stored", [(True, torch.bfloat16, None), (False, torch.float32, None),
                                                  (False, torch.bfloat16, torch.bfloat16)])
def test_no_copy_is_written_where_none_is_shared(alone, dtype, stored, folder, of_two, monkeypatch):
    """By one process alone, of what becomes float32 (whose own weights learn), or of a file that is bfloat16 already."""
    if alone:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    if stored:
        rewrite(folder, lambda tensors: tensors.update({name: tensor.to(stored) for name, tensor in tensors.items()}))
    Llama.from_pretrained(folder, dtype)
    assert copies(of_two) == []


def test_a_checkpoint_that_changed_is_copied_anew_and_half_a_copy_is_never_used(folder, of_two):
    Llama.from_pretrained(folder, torch.bfloat16)
    rewrite(folder, lambda tensors: tensors[TENSOR].zero_())
    model = Llama.from_pretrained(folder, torch.bfloat16)
    assert len(copies(of_two)) == 2 and model.get_parameter(TENSOR.removeprefix("model.")).abs().sum() == 0
    newest = max((path for path in of_two.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime_ns)
    partial = newest.rename(newest.with_suffix(".partial"))          # a process was killed while it wrote
    (partial / "model.safetensors").write_bytes(b"half")
    model = Llama.from_pretrained(folder, torch.bfloat16)
    assert not partial.exists() and model.get_parameter(TENSOR.removeprefix("model.")).abs().sum() == 0


def test_where_no_copy_can_be_written_a_process_holds_its_own_and_says_so(folder, of_two, capfd):
    of_two.parent.write_text("a file where the cache should be")
    model = Llama.from_pretrained(folder, torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert "every process holds its own copy" in capfd.readouterr().err


def test_a_damaged_tensor_is_named_by_whoever_copies_it(folder, of_two):
    rewrite(folder, lambda tensors: tensors.update({TENSOR: tensors[TENSOR].to(torch.int32)}))
    with pytest.raises(InputError, match=f"tensor {TENSOR} has dtype torch.int32"):
        Llama.from_pretrained(folder, torch.bfloat16)
    assert [name for name in copies(of_two) if not name.endswith(".partial")] == []


@pytest.mark.parametrize("fault", (OSError(28, "No space left on device"), hub.SafetensorError("I/O error: No space left on device")), ids=str)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(fault, tmp_path, monkeypatch):
    hub.save_safetensors({"x": torch.ones(3)}, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()

    def full(tensors, path, **options):
        Path(path).write_bytes(b"half")
        raise fault
    monkeypatch.setattr(hub, "save_file", full)
    with pytest.raises(InputError, match="a.safetensors: could not be written .*No space left on device"):
        hub.save_safetensors({"x": torch.zeros(3)}, tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"] and (tmp_path / "a.safetensors").read_bytes() == before
