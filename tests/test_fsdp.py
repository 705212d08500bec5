"""Training on several ranks with --fsdp and DDP, as torchrun starts them, with gloo on the CPU.

Ranks sum the same float32 numbers in another order than one process, and Adam turns the last bit
of a gradient near zero into a step of up to the learning rate: hence the tolerances.
"""

import os
import shutil
import signal
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from conftest import HEADS, in_process, records, refused, saved_weights, torchrun
from test_tools import most_allocated
from test_train import write_dialogues

import train
from common import cli
from common.run import Log, Ranks
from llama import Llama, LlamaConfig


def stopped(arguments):
    """Train. After "RANK STAGE STEP" this rank is killed (KILL) or asked to stop (STOP)."""
    write = Log.write

    def write_then_act(log, record):
        write(log, record)
        now = f"{os.environ['RANK']} {log.stage} {record['step']}"
        if os.environ.get("KILL") == now and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("STOP") == now:
            os.kill(os.getpid(), signal.SIGTERM)

    Log.write = write_then_act
    train.main(arguments)


def compiled(arguments):
    """Train, but generate no code, which takes a minute."""
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="eager")
    train.main(arguments)


def with_other_data(arguments):
    train.fingerprint = lambda dataset: 2**32 - 1 - int(os.environ["RANK"])
    train.main(arguments)


def apart(arguments):
    """Train in the folders of two nodes that share no disk."""
    folder = Path(f"node{os.environ['RANK']}")
    folder.mkdir()
    os.chdir(folder)
    train.main(arguments)


def measured(arguments):
    """Build a model. Print the most memory for tensors, as a share of all of it in float32."""
    config, ranks, models = cli.parse(train.Config, arguments), Ranks("cpu"), []
    most = most_allocated(lambda: models.append(train.build_stage(config, 2, None, ranks)))
    whole = sum(4 * p.numel() for p in models[0].parameters())
    print("MEASURED", most / whole)
    ranks.close()


pytestmark = pytest.mark.usefixtures("clean_run")


@pytest.fixture(scope="module")
def sharded(flags):
    """sharded(key=value, ...): a run whose global batch of 5 divides by neither 2 ranks nor 2."""

    def make(**options):
        defaults = {"batch1": 5, "batch2": 5, "micro_batch": 2, "fsdp": "true"}
        defaults |= {"lr1": 1e-3, "lr2": 1e-3, "connector_lr2": 1e-3}
        return flags(**defaults | options)

    return make


@pytest.fixture(scope="module")
def one(sharded, tmp_path_factory):
    """The folder of that run by one process, on which --fsdp has no effect."""
    folder = tmp_path_factory.mktemp("one") / "run"
    train.main(sharded(out=folder))
    return folder


def numbers(run, key):
    return {(line["stage"], line["step"]): line[key] for line in records(run) if key in line}


def assert_near(run, other, loss=1e-5, weight=2e-4):
    """Compare the losses, gradient norms and weights of two runs."""
    for key, tolerance in (("loss", loss), ("held_out_loss", loss), ("gradient_norm", 10 * loss)):
        mine, theirs = numbers(run, key), numbers(other, key)
        assert {step: mine[step] for step in theirs} == pytest.approx(theirs, rel=tolerance)
    mine, theirs = saved_weights(run), saved_weights(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        # Under autocast frozen towers are bfloat16.
        assert tensor.dtype == theirs[name].dtype or name.startswith("vision.")
        assert (tensor - theirs[name]).abs().max() < weight, name


def test_two_ranks_compute_what_one_process_computes(sharded, one, tmp_path):
    """Adapters and a tower with recomputed blocks on ragged dialogues, some of only text.

    Full training: see the next test.
    """
    options = {"stage": 2, "init": "new", "train2": "vision,connector,llm", "lora_rank": 4}
    options |= {"lora_lr2": 1e-3, "activation_checkpointing": "true", "steps2": 3}
    options["data2"] = options["eval_data2"] = write_dialogues(tmp_path, 13)
    train.main(sharded(out="lora1", **options))
    done = in_process(train.main, sharded(out="lora2", **options), 2)
    assert done.returncode == 0 and "arning" not in done.stderr, done.stderr
    assert done.stdout.count("wrote lora2/model") == 1
    assert_near("lora2", "lora1")


@pytest.fixture
def random_llm(tiny_folders, world_tokenizer, tmp_path):
    """Return random_llm(**sizes): options of a run with a random LLM of these sizes."""

    def make(**sizes):
        folder = shutil.copytree(tiny_folders["llama"], tmp_path / "random")
        config = LlamaConfig(vocab_size=world_tokenizer.get_vocab_size(), **sizes)
        Llama(config).to(torch.bfloat16).save_pretrained(folder)
        return {"llm": folder, "template": "tiny"}

    return make


def test_what_two_gpus_run_computes_what_one_process_computes(sharded, random_llm):
    """DDP in stage 1. FSDP, compiled and recomputed blocks in stage 2. Both in bfloat16.

    One block of the LLM and one of the tower are enough, since tracing takes seconds.
    """
    options = {"connector": "mlp", "connector.layer": 1, "steps2": 2}
    options |= random_llm(num_hidden_layers=1, intermediate_size=64, **HEADS)
    train.main(sharded(out="plain", **options))
    options |= {"bf16": True, "compile": True, "fsdp1": False}
    options |= {"activation_checkpointing": True, "activation_checkpointing1": False}
    done = in_process(compiled, sharded(out="half", **options), 2)
    stages = [line for line in done.stdout.splitlines() if "2 x cpu" in line]
    assert ["FSDP" in line for line in stages] == [False, True], done.stderr
    assert_near("half", "plain", loss=0.02, weight=2e-2)
    towers = [x for name, x in saved_weights("half").items() if name.startswith("vision.")]
    assert {tensor.dtype for tensor in towers} == {torch.bfloat16}


def test_a_run_resumes_after_a_killed_rank_and_on_any_number_of_ranks(sharded, one):
    """DDP on two ranks, one of which is killed and torchrun restarts both; six ranks; one.

    The six are two replicas, each sharded over three ranks, which get unequal rows.
    """
    arguments = [*sharded(save_every=100), "--resume"]
    command, options = [__file__, *arguments, "--fsdp=false"], ["--max-restarts=1"]
    done = torchrun(2, command, options, KILL="1 2 0", STOP="0 2 1")
    assert done.returncode == 0 and not Path("run/model").exists(), done.stderr
    held_out = ["--save_every=1", f"--eval_data2={write_dialogues(Path('held_out'), 3)}"]
    replicated = [*arguments, *held_out, "--fsdp_replicas=2"]
    done = in_process(stopped, replicated, 6, STOP="0 2 3")
    assert done.returncode == 0 and not Path("run/model").exists(), done.stderr
    shutil.copytree("run", "damaged")
    next(Path("damaged/checkpoints").glob("stage2-*/shard-00002*")).unlink()
    with refused("shard-00002"):
        train.main([*sharded(out="damaged"), "--resume"])
    train.main(arguments)
    assert_near("run", one)


def test_ranks_must_share_a_disk_and_the_data(sharded):
    done = in_process(apart, sharded(), 2)
    assert done.returncode and "error: rank 1" in done.stderr and "--out" in done.stderr
    done = in_process(with_other_data, sharded(), 2)
    assert done.returncode and "error: the ranks differ in their data" in done.stderr


def test_no_rank_ever_holds_the_whole_model(sharded, random_llm):
    """The mapped LLM in bfloat16 counts as a half, and a rank's rows in float32 as another."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    options = random_llm(num_hidden_layers=8, **sizes) | {"init": "new", "stage": 2}
    done = in_process(measured, sharded(**options), 2)
    shares = [float(x.split()[1]) for x in done.stdout.splitlines() if "MEASURED" in x]
    assert len(shares) == 2 and all(0.9 < share < 1.1 for share in shares), done


if __name__ == "__main__":
    cli.run(stopped)
