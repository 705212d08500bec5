"""What the tests share: the project's root, two threads, small models, and short training runs."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path

# No test may use the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# On shared cores, spinning threads slow each other down.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def real():
    """Return the folder of real images, dialogues and tokenizers, not part of this repository."""
    folder = ROOT.parent / "shared" / "real"
    if not folder.is_dir():
        pytest.skip("no real inputs beside this repository (shared/real)")
    return folder


@contextmanager
def refused(match=None):
    """Expect an InputError of one line in which this regular expression, if any, is found."""
    from common.errors import InputError

    with pytest.raises(InputError, match=match) as error:
        yield error
    assert "\n" not in str(error.value)


def relative_error(ours, reference):
    """Return |a - b| / |b| in float64. NaN fails every comparison with it."""
    ours, reference = ours.double(), reference.double()
    return ((ours - reference).norm() / reference.norm()).item()


def recorded(variant):
    """Return tests/fixtures/<variant>: (folder, {name: tensor} that transformers computed)."""
    folder = ROOT / "tests" / "fixtures" / variant
    return folder, load_file(folder / "expected.safetensors")


@pytest.fixture(scope="session")
def world_tokenizer():
    """Return the toy world's tokenizer."""
    return Tokenizer.from_file(str(ROOT / "weights" / "llama" / "tokenizer.json"))


HEADS = {"hidden_size": 32, "num_attention_heads": 2}


@pytest.fixture(scope="session")
def tiny_folders(world_tokenizer, tmp_path_factory):
    """Write random checkpoints -> {"clip", "dinov2", "convnext", "llama": folder}.

    CLIP and DINOv2 have six and five blocks and turn 64 x 64 pixels into a grid of 4 x 4.
    """
    from clip import CLIP, CLIPTextConfig, CLIPVisionConfig
    from common.save import save_checkpoint
    from dinov2 import DINOv2, DINOv2Config
    from interop.convnext import ConvNeXt, ConvNeXtConfig
    from llama import Llama, LlamaConfig

    torch.manual_seed(0)
    root, vocabulary = tmp_path_factory.mktemp("tiny"), world_tokenizer.get_vocab_size()
    sizes = {"intermediate_size": 64, **HEADS}
    vision = CLIPVisionConfig(num_hidden_layers=6, image_size=64, patch_size=16, **sizes)
    text = CLIPTextConfig(num_hidden_layers=1, vocab_size=vocabulary, **sizes)
    CLIP(vision, text, projection_dim=16).save_pretrained(root / "clip")
    shutil.copy(ROOT / "weights" / "clip" / "preprocessor_config.json", root / "clip")
    dino = DINOv2Config(num_hidden_layers=5, mlp_ratio=2, image_size=64, patch_size=16, **HEADS)
    DINOv2(dino).save_pretrained(root / "dinov2")
    convnext = ConvNeXt(ConvNeXtConfig([1, 1, 2, 1], [4, 6, 8, 10]))
    save_checkpoint(root / "convnext", convnext.state_dict(), asdict(convnext.config))
    llama = LlamaConfig(
        vocab_size=vocabulary, num_hidden_layers=2, max_position_embeddings=512, **sizes
    )
    Llama(llama).save_pretrained(root / "llama")
    shutil.copy(ROOT / "weights" / "llama" / "tokenizer.json", root / "llama")
    config = json.loads((root / "llama" / "config.json").read_text())
    (root / "llama" / "config.json").write_text(json.dumps(config | {"template": "tiny"}))
    return {name: root / name for name in ("clip", "dinov2", "convnext", "llama")}


@pytest.fixture(scope="session")
def tiny_model(tiny_folders):
    """Return a random model of the toy world: tiny_folders' CLIP and LLM, 16 patches an image."""
    from mllm import MLLM

    torch.manual_seed(0)
    return MLLM.assemble([tiny_folders["clip"]], tiny_folders["llama"], "mlp").eval()


@pytest.fixture
def model_folder(tiny_model, tmp_path, monkeypatch):
    """Save tiny_model to out/tiny/model in an empty working directory; return that folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out" / "tiny" / "model"
    folder.parent.mkdir(parents=True)
    tiny_model.save(folder)
    return folder


@pytest.fixture
def clean_run(tmp_path, monkeypatch):
    """Run in an empty working directory and restore the signal handlers afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def flags(tiny_folders):
    """Return flags(out=..., ...): the command line of a short run on the toy world."""

    def make(**options):
        towers = str(tiny_folders["clip"])
        second = {"comm": "dinov2", "mgm": "convnext"}.get(options.get("connector"))
        if second:
            towers += f",{tiny_folders[second]}"
        defaults = {"vision": towers, "llm": tiny_folders["llama"], "connector": "dense"}
        defaults |= {"batch1": 4, "batch2": 4, "micro_batch": 4, "steps1": 2, "steps2": 6}
        defaults |= {"save_every": 2, "log_every": 1, "evaluate": "false", "device": "cpu"}
        defaults |= {"out": "run"}
        return [f"--{key}={value}" for key, value in (defaults | options).items()]

    return make


def records(run="run"):
    """Read the log of a run."""
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def losses(run="run"):
    """Return {(stage, step): loss}. Steps done again after a stop must give the same loss."""
    found = {}
    for record in records(run):
        key = record["stage"], record["step"]
        assert found.setdefault(key, record["loss"]) == record["loss"]
    return found


def saved_weights(run="run"):
    """Read the tensors of a run's model."""
    return load_file(Path(run) / "model" / "model.safetensors")


def torchrun(ranks, command, options=(), **environment):
    """Run a Python command on several ranks of this CPU, as a user starts it."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # a restart needs a new port
    return subprocess.run([*launch, *command], env=environment, capture_output=True, text=True)


# New processes are forked from one that has imported PyTorch, which takes seconds.
FORK = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
FORK.set_forkserver_preload(
    ["conftest", "train", "torch.distributed.fsdp", "torch._dynamo", "torch.distributed.checkpoint"]
)
# returncode: that of the rank that failed first
Ended = namedtuple("Ended", "returncode stdout stderr")


def enter(main, arguments, environment):
    """Run a command in this new process, as its __main__ does."""
    from common import cli

    os.environ |= environment
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if "RANK" in environment:
        torch.set_num_threads(1)
    sys.argv[1:] = arguments
    cli.run(main)


def in_process(main, arguments, ranks=None, **environment):
    """Run main(arguments) in a new process, or in one for each rank, as torchrun does -> Ended."""
    for name in ("stdout.txt", "stderr.txt"):
        Path(name).write_text("")
    if ranks:
        with socket.create_server(("localhost", 0)) as server:
            environment["MASTER_PORT"] = str(server.getsockname()[1])
        environment |= {"MASTER_ADDR": "localhost", "WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks or 1):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks else {}
        processes.append(FORK.Process(target=enter, args=(main, arguments, environment | own)))
        processes[-1].start()
    status = 0
    while waiting := [process for process in processes if process.exitcode is None]:
        wait(process.sentinel for process in waiting)
        failed = [process.exitcode for process in waiting if process.exitcode]
        if failed and not status:
            status = failed[0]
            for process in processes:
                process.kill()
    return Ended(status, Path("stdout.txt").read_text(), Path("stderr.txt").read_text())
