"""Training on several ranks with --fsdp and DDP, as torchrun starts them, with gloo on the CPU.

Ranks sum the same float32 numbers in another order than one process, and Adam turns the last bit
of a gradient near zero into a step of up to the learning rate: hence the tolerances.
"""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import records, refused, saved_weights, torchrun
from test_train import write_dialogues

import train

# KILL or STOP is "RANK STAGE STEP": this rank is killed or asked to stop after that step
DRIVER = """
import os, signal, time
import train
import torch
from common import cli
from common.run import Log
# no code is generated, which takes a minute
compile_module = torch.nn.Module.compile
torch.nn.Module.compile = lambda *x, **options: compile_module(*x, **options, backend="eager")
write, rank = Log.write, os.environ.get("RANK", "0")
def act(self, record):
    write(self, record)
    now = f"{rank} {self.stage} {record['step']}"
    if os.environ.get("KILL") == now and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("STOP") == now:
        os.kill(os.getpid(), signal.SIGTERM)
Log.write = act
if os.environ.get("OTHER"):                  # the ranks see other data
    train.fingerprint = lambda dataset: 2**32 - 1 - int(rank)
if os.environ.get("APART"):                  # the folders of two nodes that share no disk
    time.sleep = lambda seconds: None
    os.makedirs(f"node{rank}", exist_ok=True)
    os.chdir(f"node{rank}")
cli.run(train.main)
"""

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


def run_ranks(ranks, arguments, script=DRIVER, options=(), **environment):
    Path("driver.py").write_text(script)
    return torchrun(ranks, ["driver.py", *arguments], options, **environment)


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
        assert tensor.dtype == theirs[name].dtype
        assert (tensor - theirs[name]).abs().max() < weight, name


def test_two_ranks_compute_what_one_process_computes(sharded, one, tmp_path):
    """Adapters and a tower with recomputed blocks on ragged dialogues, some of only text.

    Full training: see the next test.
    """
    options = {"stage": 2, "init": "new", "train2": "vision,connector,llm", "lora_rank": 4}
    options |= {"lora_lr2": 1e-3, "activation_checkpointing": "true", "steps2": 3}
    options["data2"] = options["eval_data2"] = write_dialogues(tmp_path, 13)
    train.main(sharded(out="lora1", **options))
    done = run_ranks(2, sharded(out="lora2", **options))
    assert done.returncode == 0 and "arning" not in done.stderr, done.stderr
    assert done.stdout.count("wrote lora2/model") == 1
    assert_near("lora2", "lora1")


def test_what_two_gpus_run_computes_what_one_process_computes(sharded, one):
    """DDP in stage 1. FSDP, compiled and recomputed blocks in stage 2. Both in bfloat16."""
    options = {"bf16": True, "compile": True, "fsdp1": False, "activation_checkpointing2": True}
    done = run_ranks(2, sharded(out="half", **options))
    stages = [line for line in done.stdout.splitlines() if "2 x cpu" in line]
    assert ["FSDP" in line for line in stages] == [False, True], done.stderr
    assert_near("half", one, loss=0.02, weight=2e-2)


def test_a_run_resumes_after_a_killed_rank_and_on_any_number_of_ranks(sharded, one):
    """DDP on two ranks, of which one is killed and torchrun restarts both; FSDP on three; one."""
    arguments = [*sharded(save_every=100), "--resume"]
    held_out = ["--save_every=1", f"--eval_data2={write_dialogues(Path('held_out'), 3)}"]
    for ranks, stop, added in ((2, "0 2 1", ["--fsdp=false"]), (3, "0 2 3", held_out)):
        done = run_ranks(
            ranks, [*arguments, *added], options=["--max-restarts=1"], KILL="1 2 0", STOP=stop
        )
        assert done.returncode == 0 and not Path("run/model").exists(), done.stderr
    shutil.copytree("run", "damaged")
    next(Path("damaged/checkpoints").glob("stage2-*/shard-00002*")).unlink()
    with refused("shard-00002"):
        train.main([*sharded(out="damaged"), "--resume"])
    train.main(arguments)
    assert_near("run", one)


def test_ranks_must_share_a_disk_and_the_data(sharded):
    done = run_ranks(2, sharded(), APART="1")
    assert done.returncode and "error: rank 1" in done.stderr and "--out" in done.stderr
    done = run_ranks(2, sharded(), OTHER="1")
    assert done.returncode and "error: the ranks differ in their data" in done.stderr


MEASURE = """
import resource, sys
import torch, torch.distributed.fsdp, torch._dynamo
import train
from common import cli
from common.run import Ranks
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = cli.parse(train.Config, sys.argv[1:])
ranks = Ranks("cpu")
ranks.barrier()
before = peak()
model = train.build_stage(config, 2, None, ranks)
print("MEASURED", (peak() - before) / (4 * sum(p.numel() for p in model.parameters())))
ranks.close()
cli.leave(0)
"""


def test_no_rank_ever_holds_the_whole_model(sharded, tiny_folders, world_tokenizer, tmp_path):
    """A mapped LLM of 35 MB in bfloat16 becomes 74 MB of float32: together 1.5 times the latter."""
    from llama import Llama, LlamaConfig

    shutil.copytree(tiny_folders["llama"], tmp_path / "large")
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
    vocabulary = world_tokenizer.get_vocab_size()
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=16, **sizes)
    Llama(config).to(torch.bfloat16).save_pretrained(tmp_path / "large")
    options = {"llm": tmp_path / "large", "template": "tiny", "init": "new", "stage": 2}
    done = run_ranks(2, sharded(**options), MEASURE)
    shares = [float(x.split()[1]) for x in done.stdout.splitlines() if "MEASURED" in x]
    assert len(shares) == 2 and all(0.5 < share < 1.4 for share in shares), done
