"""train.py: the loss, what is trained, ranks, and runs that compute the same. All runs are real."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import losses, records, refused, saved_weights
from PIL import Image

import train
from common.cli import parse
from common.run import Ranks
from connector import CONNECTORS
from data import Batches
from interop.load import load_model

# Other micro-batches or ranks sum float32 numbers in another order: 1e-7 a step, and it grows.
SAME = 1e-5
pytestmark = pytest.mark.usefixtures("clean_run")


def changed(before, after):
    """Return the names of the tensors that differ in any bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def assert_near(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(abs(ours[key] - theirs[key]) < SAME * theirs[key] for key in ours)


def write_dialogues(folder, count=14):
    """Write dialogues with and without images, of one to six turns, short and long answers."""
    entries = []
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (40 + i, 50), (17 * i, 255 - 9 * i, 40)).save(folder / f"{i}.png")
        answer = " ".join(["red circle square"] * (i % 4)) or "yes"
        question = "<image>\nWhat is this?" if i % 2 else "What is this?"
        messages = []
        for asked, answered in [(question, answer)] + [("And now?", "small blue cross")] * (i % 6):
            messages.append({"from": "human", "value": asked})
            messages.append({"from": "gpt", "value": answered})
        entries.append({"id": f"s{i}", "conversations": messages})
        if i % 2:
            entries[-1]["image"] = f"{i}.png"
    (folder / "data.json").write_text(json.dumps(entries))
    return folder / "data.json"


@pytest.fixture
def dialogue_flags(flags, tmp_path):
    """Return make(...): the command line of a run of stage 2 on ragged dialogues."""
    data = write_dialogues(tmp_path)

    def make(**options):
        return flags(**{"stage": 2, "init": "new", "data2": data, "steps2": 4} | options)

    return make


def test_loss_is_the_mean_over_supervised_tokens_also_of_held_out_data(dialogue_flags, tmp_path):
    """All samples are in one step, nothing changes, and the held-out data are those of training."""
    options = {"batch2": 14, "lr2": 0, "connector_lr2": 0, "steps2": 3}
    flags = dialogue_flags(save_every=2, eval_data2=tmp_path / "data.json", **options)
    train.main(flags)
    config = parse(train.Config, flags)
    model = train.build_stage(config, 2, Path("run"), Ranks("cpu")).eval()
    samples = train.build_dataset(config, 2), model.tokenizer, "tiny", model.spec
    batch = Batches(*samples, model.tokens_per_image, 512)[range(14)]
    number, loss = (batch.labels >= 0).sum().item(), records()[0]["loss"]
    assert loss == pytest.approx(model(batch).item() / number, rel=SAME)
    assert (records()[0]["supervised"], records()[0]["tokens"]) == (number, batch.tokens.numel())
    held_out = {r["step"]: r["held_out_loss"] for r in records() if "held_out_loss" in r}
    assert held_out == pytest.approx(dict.fromkeys((1, 2), loss))


def test_workers_profiler_micro_batches_recomputed_and_compiled_blocks_change_nothing(
    dialogue_flags, monkeypatch
):
    train.main(dialogue_flags())
    train.main(dialogue_flags(out="same", workers=2, activation_checkpointing=True, profile=2))
    assert losses("same") == losses()
    events = json.loads(Path("same/profile2.json").read_text())["traceEvents"]
    assert {"aten::mm", "aten::_fused_adamw_"} <= {event.get("name") for event in events}
    # no code is generated, which takes 20 seconds
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    train.main(dialogue_flags(out="near", micro_batch=1, compile=True))
    assert_near(losses("near"), losses())


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    rates = [train.learning_rate(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    expected = [(1 + math.cos(math.pi * step / 90)) / 2 for step in range(90)]
    assert rates[10:] == pytest.approx(expected)


def untrained(arguments):
    """Return the tensors of the model with which a run starts."""
    return train.build_model(parse(train.Config, arguments), 1, torch.device("cpu")).state_dict()


def test_stage_1_trains_all_of_every_connector_and_stage_2_connector_and_llm(flags, tiny_folders):
    for connector in CONNECTORS:
        options = {"connector": connector, "stage": 1}
        if connector == "comm_dino":
            options["vision"] = tiny_folders["dinov2"]
        train.main(flags(out=connector, **options))
        before = untrained(flags(**options))
        trained = changed(before, saved_weights(connector))
        assert trained == {name for name in before if name.startswith("connector.")}, connector
    train.main(flags(stage=2, out="two", init="dense/model"))
    after = changed(saved_weights("dense"), saved_weights("two"))
    assert {name.partition(".")[0] for name in after} == {"connector", "llm"}
    # A model starts stage 2 whole, with the LLM that was trained.
    train.main(flags(stage=2, out="same", init="two/model", steps2=1, lr2=0, connector_lr2=0))
    assert not changed(saved_weights("two"), saved_weights("same"))
    assert load_model("same/model").connector.name == "dense"


def test_a_trained_tower_moves_as_deep_as_it_is_read_at_its_own_rate(flags):
    for connector, deepest in (("mlp", 5), ("comm", 6)):
        options = {"connector": connector, "stage": 1, "train1": "vision,connector"}
        train.main(flags(out=connector, **options))
        moved = changed(untrained(flags(**options)), saved_weights(connector))
        blocks = {int(n.split(".")[3]) for n in moved if n.startswith("vision.0.blocks.")}
        assert blocks == set(range(deepest))
        assert not any("norm_post" in name for name in moved)
    options |= {"init": "comm/model", "stage": 2, "train2": "vision,connector", "vision_lr2": 1e-3}
    train.main(flags(out="two", lr2=0, connector_lr2=0, **options))
    moved = changed(saved_weights("comm"), saved_weights("two"))
    assert moved and all(name.startswith("vision.") for name in moved)


def test_an_option_of_one_stage_overrides_the_plain_one(dialogue_flags, tmp_path):
    other = write_dialogues(Path("other")).parent.resolve()
    options = {"image_mode1": "crop", "image_dir": other, "image_dir2": tmp_path}
    config = parse(train.Config, dialogue_flags(activation_checkpointing1=True, **options))
    for stage, mode, folder in ((1, "crop", other), (2, "pad", tmp_path)):
        assert train.build_model(config, stage, torch.device("cpu")).spec.mode == mode
        (dataset,) = train.read_data(config, stage, config.data2)
        assert dataset.image_dir == str(folder)
        assert config.stage_options(stage).activation_checkpointing == (stage == 1)


def test_files_are_mixed_by_size_or_equally_and_epochs_count_steps(dialogue_flags, tmp_path):
    flags = dialogue_flags(data2=f"{tmp_path / 'data.json'},world", steps2=7)
    config = parse(train.Config, flags)
    assert len(train.build_dataset(config, 2)) == 14 + 28
    config.equal2 = True
    assert len(train.build_dataset(config, 2)) == 28 + 28
    train.main(dialogue_flags(steps2=0, epochs2=1.5))
    assert len(records()) == math.ceil(1.5 * 14 / 4)


def test_boxes_need_a_model_that_pads(flags, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    record = {"img_path": "a.png", "expression": "it", "bbox": [1, 2, 30, 20]}
    (tmp_path / "boxes.jsonl").write_text(json.dumps(record | {"width": 40, "height": 30}))
    train.main(flags(stage=1, out="one", image_mode="crop", steps1=1))
    with refused("has boxes"):
        data = f"rec:{tmp_path / 'boxes.jsonl'}"
        train.main(flags(stage=2, init="one/model", out="two", data2=data))


def test_a_run_ends_with_scores_and_what_to_do_next(flags, capsys, monkeypatch):
    monkeypatch.setattr(train.MLLM, "generate", lambda model, images, *_: ["yes"] * len(images))
    train.main(flags(evaluate=True, steps1=1, steps2=1))
    printed = capsys.readouterr().out
    assert "peak learning rates: connector 0.003, llm 0.002" in printed and "s/step" in printed
    assert "presence" in printed and "python sample.py --model=run/model" in printed
    assert Image.open("run/loss.png").size == (700, 380)


def test_stage_2_refuses_a_connector_that_means_something_else(flags):
    """Another kind, other options, and other layers, as after a change of the default ones."""
    train.main(flags(stage=1, out="one", connector="sci"))
    folder = next(Path("one/checkpoints").iterdir())
    for connector in ("dense", "mlp", "linear"):
        for options in ({"out": "one"}, {"out": "two", "init": "one/model"}):
            with refused("connector"):
                train.main(flags(stage=2, connector=connector, **options))
    state = json.loads((folder / "state.json").read_text())
    assert state["connector"]["layers"] == [[5, 1, 3]]
    state["connector"]["layers"] = [[5, 0, 1]]
    (folder / "state.json").write_text(json.dumps(state))
    with refused("connector"):
        train.main(flags(stage=2, out="one", connector="sci"))


def poison(monkeypatch, steps):
    """Make the loss infinite at these calls of the forward pass."""
    calls = iter(range(10**6))
    forward = train.MLLM.forward

    def poisoned(self, batch):
        return forward(self, batch) * (math.inf if next(calls) in steps else 1)

    monkeypatch.setattr(train.MLLM, "forward", poisoned)


def test_bad_steps_are_skipped_and_after_ten_a_lower_learning_rate_continues_from_a_good_one(
    dialogue_flags, monkeypatch, capsys
):
    options = {"steps2": 30, "save_every": 3}
    with monkeypatch.context() as patch:
        poison(patch, {1, *range(5, 40)})
        with refused("--resume"):
            train.main(dialogue_flags(**options))
    printed = capsys.readouterr().err
    assert "step 1:" in printed and "among s" in printed
    # Not the one after step 6, whose update was skipped.
    assert [folder.name for folder in Path("run/checkpoints").iterdir()] == ["stage2-0000003"]
    train.main([*dialogue_flags(**options, lr2=1e-4), "--resume"])
    assert len(losses()) == 30
    assert all(tensor.isfinite().all() for tensor in saved_weights().values())


def test_too_little_memory_is_one_line_with_the_step_and_the_tokens(dialogue_flags, monkeypatch):
    def forward(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.MLLM, "forward", forward)
    with refused("step 0: out of memory with [0-9]+ tokens: lower --micro_batch"):
        train.main(dialogue_flags())


WRONG = "connector=dance connector.groups=0 connector.layer=3 vision=nowhere"
WRONG += " device=meta llm=nowhere template=klingon image_size=65 image_mode=squash stage=3"
WRONG += " image_mode1=squash eval_data2=nowhere.json lora_dropout=1 init=run"
WRONG += " lora_dropout=0.1,memory_budget=0.3 fsdp_replicas=2 fsdp=true,fsdp_replicas=2"
WRONG += " stage=2,init=nowhere train1= train2=towers data1=nowhere.json data2=rec:data.json"
WRONG += " batch1=0 steps1=-1 steps1=0,epochs1=0 workers=-1 lr1=nan warmup=5.0 adam_beta=1"
# no answer fits into 8 tokens
WRONG += " data1=text.json max_length=8"
# errors that name what to write instead
SAYS = {"device=gpu": "=gpu: must be one of auto, cuda", "data2=cap:a.json": "caption, v7w"}


@pytest.mark.parametrize("options", [*WRONG.split(), *SAYS])
def test_a_wrong_option_is_one_line_before_anything_is_trained(options, flags, tmp_path):
    write_dialogues(tmp_path, 2)
    # Without an image the loss does not depend on the connector, which stage 1 trains.
    texts = [entry for entry in json.loads(Path("data.json").read_text()) if "image" not in entry]
    Path("text.json").write_text(json.dumps(texts))
    with refused(SAYS.get(options)):
        train.main(flags(**dict(option.split("=") for option in options.split(","))))
    assert not Path("run/checkpoints").exists()
