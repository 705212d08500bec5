"""train.py: losses that are not numbers, bad pictures, and wrong input in one line."""
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import cli
import train
from data import Loader
from dinov2 import DINOv2, DINOv2Config
from hub import InputError
from mllm import MLLM
from test_train import (as_found, changed, dialogues, flags, pictures, records,
                        weights)  # noqa: F401, the fixtures, too


# --- losses that are not numbers ----------------------------------------------------------------------------------------

def spoil(monkeypatch, steps, value=math.nan):
    """Forwards number `steps` (from 0; a step is one forward here) give this loss."""
    forward, calls = MLLM.forward, []
    def spoiled(self, *batch):
        loss, number = forward(self, *batch)
        calls.append(1)
        return loss * (value if len(calls) - 1 in steps else 1), number
    monkeypatch.setattr(MLLM, "forward", spoiled)


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_a_step_without_a_finite_loss_is_skipped_and_its_samples_are_named(value, flags, monkeypatch, capsys):
    train.main(flags(out="whole", stage=1, steps1=3, batch1=2, save_every=1))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *args, **options: None)    # keep every checkpoint
        spoil(patch, [2], value)
        train.main(flags(stage=1, steps1=4, batch1=2, save_every=1, warmup=0, lr1=1e-2))
    said = capsys.readouterr().err
    line, = [line for line in said.splitlines() if "step skipped" in line]
    config = cli.parse(train.Config, flags(stage=1, steps1=4, batch1=2))
    model = train.build_model(config, torch.device("cpu"))
    loader = iter(Loader(train.build_data(config, 1), model.tokenizer, "plain", model.spec, 16, 2048, 2, 4, 1))
    expected = [name for _ in range(2) for batch in next(loader) for name in batch.ids], next(loader)[0].ids
    assert line.startswith("step 2: loss") and line.endswith("among " + ", ".join(expected[1])) and expected[0] != expected[1]
    saved = {n: [load_file(f"run/checkpoints/stage1-000000{n}/{kind}.safetensors") for kind in ("trained", "optimizer")] for n in (2, 3, 4)}
    assert not changed(saved[2][0], saved[3][0]) and not changed(saved[2][1], saved[3][1])    # weights, moments, Adam's step
    assert changed(saved[3][0], saved[4][0]) == set(saved[3][0])     # and the run goes on


def test_ten_bad_steps_in_a_row_stop_the_run_and_the_last_checkpoint_is_good(flags, monkeypatch):
    arguments = flags(stage=1, steps1=30, batch1=1)
    with monkeypatch.context() as patch:
        spoil(patch, range(5, 99))
        with pytest.raises(InputError, match="ten steps in a row without a finite loss, stopped at step 14; .* run/checkpoints is good"):
            train.main(arguments)
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["stage1-0000014"]
    train.main([*arguments, "--resume"])
    found = {record["step"]: record["loss"] is not None for record in records()}
    assert [step for step in range(30) if not found[step]] == list(range(5, 14))     # 14 was done again, and was good
    assert all(tensor.isfinite().all() for tensor in weights().values())


def test_nine_bad_steps_do_not_stop_the_run(flags, monkeypatch):
    spoil(monkeypatch, [*range(0, 9), *range(10, 19)])
    train.main(flags(stage=1, steps1=20, batch1=1))
    assert all(tensor.isfinite().all() for tensor in weights().values())


# --- bad pictures -------------------------------------------------------------------------------------------------------

def with_bad(folder, count, bad):
    names = pictures(folder, count)
    for name in names[:bad]:
        (folder / name).write_bytes((folder / name).read_bytes()[:30])
    return dialogues(folder, [(name, [("<image>\nWhat is this?", "a red circle")]) for name in names])


def test_corrupt_pictures_are_skipped_and_named(flags, tmp_path, capsys):
    data = with_bad(tmp_path, 12, 3)
    (tmp_path / "2.png").unlink()
    train.main(flags(stage=1, data1=data, template1="tiny", steps1=3))
    said = capsys.readouterr().err
    assert sorted(line.split(":")[0] for line in said.splitlines()) == ["skipped s0", "skipped s1", "skipped s2"]
    assert "2.png: no such image" in said and "0.png: not a readable image" in said
    assert records()[-1]["skipped"] == 3


def test_too_many_corrupt_pictures_stop_the_run(flags, tmp_path):
    with pytest.raises(InputError, match="4 samples with bad images, more than 1% of those seen; .*s3"):
        train.main(flags(stage=1, data1=with_bad(tmp_path, 12, 4), template1="tiny", steps1=3))
    assert not Path("run/model").exists()


def test_a_dataset_that_teaches_nothing_stops_the_run(flags, tmp_path):
    """Here no turn fits: every sample is skipped, and a loss of zero tokens is not zero."""
    with pytest.raises(InputError, match="no sample of the dataset can be learnt from; the last one: .* not even the first turn fits"):
        train.main(flags(stage=1, max_length=8))
    assert not Path("run/model").exists()


def test_a_dialogue_is_cut_to_the_llms_own_context(flags, tiny_folders, tmp_path, capsys):
    """Positions that the LLM was not made for are not trained, and it would refuse to generate there."""
    shutil.copytree(tiny_folders["llama"], "short")
    config = json.loads(Path("short/config.json").read_text())
    Path("short/config.json").write_text(json.dumps(config | {"max_position_embeddings": 50}))
    name, = pictures(tmp_path, 1)
    question, answer = "Where is the red circle?", "[0.10,0.20,0.30,0.40]"
    data = dialogues(tmp_path, [(name, [(f"<image>\n{question}", answer)] + [(question, answer)] * 9)])
    train.main(flags(stage=1, llm="short", data1=data, template1="tiny", steps1=1, batch1=1))
    record, = records()
    assert 30 < record["tokens"] <= 50 and record["supervised"] == 14     # two whole turns: [, four numbers, ], </s>


# --- wrong input, in one line -------------------------------------------------------------------------------------------

def refused(arguments):
    with pytest.raises(InputError) as error:
        train.main(arguments)
    assert "\n" not in str(error.value)
    assert not Path("run/model").exists() and not list(Path(".").rglob("stage*"))
    return str(error.value)


@pytest.mark.parametrize("options, message", {
    "mistyped recipe": (dict(connector="config/dense_7b.tml"), "config/dense_7b.tml: no such recipe; they are files that end in .toml"),
    "unknown connector": (dict(connector="dens"), "connector kind 'dens' is unknown, nearest 'dense'"),
    "layer of a dense connector": (dict(layer=3), "connector layer is 3, but only linear and mlp read a single layer, not dense"),
    "no such layer": (dict(connector="mlp", layer=7), "connector layer is 7, a tower of 6 blocks has hidden[0] to hidden[6]"),
    "unknown merge": (dict(connector="comm", merge="all"), "connector merge 'all' is unknown, nearest 'lln'"),
    "unknown template": (dict(template="vicuna"), "no template 'vicuna': there are plain, vicuna_v1"),
    "unknown template of stage 1": (dict(template1="plane"), "no template 'plane'"),
    "template without its tokens": (dict(template="chatml"), "the tokenizer has no token <|im_start|>"),
    "stage 2 first": (dict(stage=2), "stage 2 starts from stage 1's connector, and run/checkpoints has none"),
    "stage 3": (dict(stage=3), "--stage=3: 1, 2, or 0 for both"),
    "no such init": (dict(stage=2, init="nowhere"), "nowhere: no such folder"),
    "no data": (dict(data1=""), "--data1 is empty"),
    "no such data": (dict(data1="missing.json"), "missing.json: cannot be read"),
    "no such data of stage 2": (dict(data2="missing.json"), "missing.json: cannot be read"),
    "boxes of crops": (dict(data1="rec:x.jsonl", image_mode="crop"), "with --image_mode=crop they are wrong"),
    "image mode": (dict(image_mode="fold"), "--image_mode=fold: pad, crop or stretch"),
    "unknown part": (dict(train2="tower"), "--train2=tower: what learns is one or more of vision, connector, llm"),
    "nothing trained": (dict(train1=""), "--train1=: what learns is one or more of vision"),
    "a start for both stages": (dict(init="new"), "--init says where stage 2 starts: it goes with --stage=2"),
    "no such tower": (dict(vision="./nowhere"), "./nowhere: no such folder"),
    "two towers for one": (dict(connector="mlp", two=True), "connector mlp reads one tower, it was given 2"),
    "no samples": (dict(batch1=0), "--batch1=0: should be 1 or more"),
    "negative seed": (dict(seed=-3), "--seed=-3: should be 0 or more"),
    "negative norm": (dict(clip=-1), "--clip=-1.0: should be 0 or more"),
    "no learning rate": (dict(lr1="nan"), "--lr1=nan: should be 0 or more"),
    "beta of 1": (dict(beta2=1), "--beta2=1.0: should be 0 or more, and less than 1"),
    "no steps and no epochs": (dict(steps1=0, epochs1=0), "--epochs1=0.0: should be more than 0 where --steps1 is 0"),
    "a rise of 5 steps": (dict(warmup=5), "--warmup=5.0: is a share of the steps, 1 at most"),
    "another side": (dict(image_size=32), "pictures of 32 x 32 for a tower that was trained at 64 x 64: only DINOv2 takes others (--image_size=64?)"),
    "a run for a start": (dict(stage=2, init="a-run"), "a-run: is a run; name its a-run/model, or one of a-run/checkpoints"),
    "a file for a folder": (dict(out=__file__), "is a file; a run needs a folder"),
    "no such device": (dict(device="abacus"), "--device=abacus: cannot be used"),
    "unknown log": (dict(log="paper"), "--log=paper: tensorboard or wandb")}.values(), ids=lambda value: None)
def test_a_wrong_option_is_one_line_before_anything_is_trained(options, message, flags, tiny_folders):
    Path("a-run/model").mkdir(parents=True)
    if options.pop("two", False):
        options |= {"vision": f"{tiny_folders['clip']},{tiny_folders['dinov2']}"}
    assert message in refused(flags(**options))


def test_pictures_that_leave_no_room_for_an_answer_stop_the_run(flags):
    """16 visual tokens, 17 in all: on two ranks or in few steps no dataset is seen to its end."""
    with pytest.raises(InputError, match="no sample of the dataset|3 steps in a row without a token to learn from, stopped at step 2; "
                                         "a picture takes 16 tokens, a dialogue may have 17"):
        train.main(flags(stage=1, max_length=17, steps1=3, data1="world", batch1=1))
    assert not Path("run/model").exists()


@pytest.mark.parametrize("first, second, message", [
    (dict(connector="mlp", layer=2), dict(connector="mlp"), "was trained with --layer=2, not None: its connector means something else"),
    (dict(connector="sci"), dict(connector="dense"), "was trained with --connector=sci, not dense"),
    (dict(connector="comm", merge="mean_half"), dict(connector="comm", merge="mean_all"), "trained with --merge=mean_half, not mean_all"),
    (dict(train1="vision"), dict(), "holds what stage 1 trained, and not connector")], ids=str)
def test_stage_2_does_not_start_from_a_connector_that_means_something_else(first, second, message, flags):
    train.main(flags(stage=1, steps1=1, out="first", **first))
    with pytest.raises(InputError, match=message):
        train.main(flags(stage=2, steps2=1, init="first/checkpoints/stage1-0000001", **second))
    assert not Path("run/model").exists()


def test_stage_2_does_not_start_from_a_checkpoint_without_the_connector_that_its_run_had_learnt(flags):
    train.main(flags(steps1=1, steps2=1, train2="llm", out="first"))
    with pytest.raises(InputError, match="stage2-0000001: holds what stage 2 trained, and not connector: name the checkpoint of the stage"):
        train.main(flags(stage=2, steps2=1, init="first/checkpoints/stage2-0000001"))
    train.main(flags(stage=2, steps2=1, init="first/model"))
    with pytest.raises(InputError, match="first/model: has another connector, .*kind='dci'.* not .*kind='sci'"):
        train.main(flags(stage=2, steps2=1, init="first/model", connector="sci", out="other"))


def test_adapters_on_an_llm_that_had_learnt_before_are_no_start_and_no_adapter(flags, capsys):
    """Stage 2's checkpoint holds its adapters, and the LLM under them is stage 1's: it lies in neither the checkpoint nor --llm."""
    train.main(flags(stage=1, steps1=1, train1="connector,llm", out="first"))
    train.main(flags(stage=2, steps2=1, train1="connector,llm", lora_rank=2, out="first"))
    assert "note: no first/adapter" in capsys.readouterr().out and not Path("first/adapter").exists()
    with pytest.raises(InputError, match="stage2-0000001: holds what stage 2 trained, and not llm: name the checkpoint of the stage"):
        train.main(flags(stage=2, steps2=1, train1="connector,llm", lora_rank=2, init="first/checkpoints/stage2-0000001"))


def test_a_run_is_not_resumed_on_other_data(flags, tmp_path):
    name, = pictures(tmp_path, 1)
    data = dialogues(tmp_path, [(name, [("<image>\nWhat is this?", "a red circle")])] * 9)
    arguments = flags(stage=1, data1=data, template1="tiny", steps1=4)
    train.main(arguments)
    dialogues(tmp_path, [(name, [("<image>\nWhat is this?", "a red circle")])] * 7)
    shutil.rmtree("run/model")
    with pytest.raises(InputError, match="stage1-0000004: was trained on 9 samples, and the data now has 7: its order would be another"):
        train.main([*arguments, "--resume"])


def test_nothing_to_resume_and_nothing_to_go_on_with_are_named(flags):
    arguments = [flag for flag in flags() if not flag.startswith("--out")]
    assert "nothing to go on with under out/dense" in refused([*arguments, "--resume"])
    assert "nothing to go on with under out/dense" in refused([*arguments, "--stage=2"])


def test_folders_that_hold_no_usable_checkpoint_are_named(flags, tiny_folders, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty/config.json: no such file" in refused(flags(vision="empty"))
    shutil.copytree(tiny_folders["llama"], "mute")
    os.remove("mute/tokenizer.json")
    assert "mute: no tokenizer.json, and no tokenizer.model: a language model needs its tokenizer" in refused(flags(llm="mute"))
    assert "empty: no tokenizer.json" in refused(flags(tokenizer="empty"))
    shutil.copytree(tiny_folders["llama"], "hollow")
    os.remove("hollow/model.safetensors")
    assert "hollow: no checkpoint in this folder" in refused(flags(llm="hollow"))
    Path("hollow/checkpoints").mkdir()
    assert "hollow: is a run that has not come to its end: train.py --resume --out=hollow" in refused(flags(llm="hollow"))
    shutil.copytree(tiny_folders["llama"], "hollow/model")
    assert "hollow: is a run; its model is hollow/model" in refused(flags(llm="hollow"))
    assert "config.json: is a file; a model is a folder" in refused(flags(llm="hollow/config.json"))
    shutil.copytree(tiny_folders["llama"], "pickled")
    os.rename("pickled/model.safetensors", "pickled/pytorch_model.bin")
    assert "pickled: only pickled weights (pytorch_model.bin)" in refused(flags(llm="pickled"))
    shutil.copytree(tiny_folders["clip"], "short")
    whole = Path("short/model.safetensors").read_bytes()
    Path("short/model.safetensors").write_bytes(whole[:len(whole) // 2])
    assert "short/model.safetensors: not a readable safetensors file, truncated" in refused(flags(vision="short"))


def test_towers_whose_grids_differ_are_an_error_under_comm(flags, tiny_folders):
    DINOv2(DINOv2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=64, patch_size=8)).save_pretrained("fine")
    message = refused(flags(connector="comm", vision=f"{tiny_folders['clip']},fine"))
    assert "grids differ: CLIP gives 4x4 (16 patches), DINOv2 8x8 (64 patches)" in message
    assert "swap the two towers" in refused(flags(connector="comm", vision=f"{tiny_folders['dinov2']},{tiny_folders['clip']}"))
