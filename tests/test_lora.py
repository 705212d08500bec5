"""lora.py: the start, the gradients, the merge; then real runs with --lora_rank=4: who learns, what is written, stops, two ranks.

Sums in float32 that are taken in another order (W x + B A x against (W + B A) x) differ by about 1e-6 relative; ORDER allows ten
times that. Losses "the same" are compared bit for bit where the arithmetic is the same.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, relative_error
from safetensors.torch import load_file
from test_train import as_found, flags, losses, near, ragged, weights        # the fixtures, too
from test_train_errors import refused

import checkpoint
import cli
import export
import lora
import train
from dialogue import IMAGE
from hub import InputError, save_checkpoint
from llama import Llama, LlamaConfig
from mllm import MLLM
from phi import Phi, PhiConfig

ORDER = 1e-5
SHAPE = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LLMS = {"llama": lambda: Llama(LlamaConfig(**SHAPE, num_key_value_heads=2)),
        "qwen2": lambda: Llama(LlamaConfig(**SHAPE, qkv_bias=True, tie_word_embeddings=True)),
        "phi": lambda: Phi(PhiConfig(**SHAPE))}
TOKENS = torch.arange(24).view(2, 12) * 3


def random_B(llm, seed=1):
    """As after some training: at the start B is zero, and nothing would be seen of A."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in lora.adapters(llm).items():
        if "lora_B" in name:
            p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))


# --- the adapter ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, per_block", [("llama", 7), ("qwen2", 7), ("phi", 6)])
@torch.no_grad()
def test_every_linear_map_of_the_blocks_is_adapted_and_the_start_is_the_base_model(kind, per_block):
    llm = LLMS[kind]()
    before, names = llm(TOKENS), set(dict(llm.named_parameters()))
    linear = {name for name, module in llm.layers.named_modules() if isinstance(module, torch.nn.Linear)}
    lora.adapt(llm, 4, 8)
    assert torch.equal(llm(TOKENS), before)                          # bit for bit: B is zero
    assert len(linear) == 2 * per_block and names | set(lora.adapters(llm)) == set(dict(llm.named_parameters()))
    assert {name.rsplit(".", 2)[0] for name in lora.adapters(llm)} == {f"layers.{name}" for name in linear}
    for name, p in lora.adapters(llm).items():
        assert p.dtype == torch.float32 and (p == 0).all() == ("lora_B" in name) and p.shape["lora_B" in name] == 4


def test_the_gradients_are_those_of_the_formula():
    """Again by hand in float64, s = alpha / rank: y = W x + b + s B A x and dL/dy = G, so that dB = s Gᵀ (x Aᵀ), dA = s Bᵀ Gᵀ x,
    dx = G (W + s B A)."""
    torch.manual_seed(0)
    layer = lora.LoRALinear(torch.nn.Linear(24, 16).requires_grad_(False), 4, 8)
    torch.nn.init.normal_(layer.lora_B.weight)
    x, G = torch.randn(5, 24, requires_grad=True), torch.randn(5, 16)
    y = layer(x)
    y.backward(G)
    W, b, A, B, X, g = (t.detach().double() for t in (layer.weight, layer.bias, layer.lora_A.weight, layer.lora_B.weight, x, G))
    s = 8 / 4
    assert relative_error(y, X @ W.T + b + s * X @ A.T @ B.T) < ORDER
    assert relative_error(layer.lora_B.weight.grad, s * g.T @ (X @ A.T)) < ORDER
    assert relative_error(layer.lora_A.weight.grad, s * B.T @ g.T @ X) < ORDER
    assert relative_error(x.grad, g @ (W + s * B @ A)) < ORDER
    assert layer.weight.grad is None and layer.bias.grad is None


@pytest.mark.parametrize("kind", LLMS)
@torch.no_grad()
def test_merged_is_a_plain_model_with_the_same_logits(kind):
    llm = LLMS[kind]()
    plain, names = llm(TOKENS), list(dict(llm.named_parameters()))
    lora.adapt(llm, 4, 8)
    random_B(llm)
    adapted = llm(TOKENS)
    lora.merge(llm)
    assert list(dict(llm.named_parameters())) == names and not lora.adapters(llm)
    assert relative_error(llm(TOKENS), adapted) < ORDER < 1e-2 < relative_error(adapted, plain)
    lora.merge(llm)                                                  # nothing left to do


def test_packed_rows_and_activation_checkpointing_give_the_same():
    """A row of two sequences scores each as it is scored alone; recomputing the blocks changes no bit of a gradient."""
    llm = LLMS["llama"]().requires_grad_(False)
    lora.adapt(llm, 4, 8)
    random_B(llm)
    packed = llm(TOKENS.view(1, -1), lengths=[12, 12]).view(2, 12, -1)
    assert relative_error(packed, llm(TOKENS)) < ORDER
    gradients = []
    for llm.gradient_checkpointing in (False, True):
        llm.train().zero_grad()
        llm(TOKENS.view(1, -1), lengths=[12, 12]).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in llm.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == lora.adapters(llm).keys()
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())


def test_peft_computes_the_same_with_what_we_save(tmp_path):
    for name in ("peft", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed: that it reads our adapters is not tested here")
    import peft
    import transformers
    llm = LLMS["llama"]()
    llm.save_pretrained(tmp_path / "base")
    lora.adapt(llm, 4, 8)
    random_B(llm)
    lora.save(lora.adapters(llm), tmp_path / "adapter", 4, 8, str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        assert relative_error(theirs(TOKENS).logits, llm(TOKENS)) < 1e-4


# --- a run ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tiny_folders, tmp_path_factory):
    """A run of both stages, of which the second trains adapters and connector -> (its arguments without --out, its folder)."""
    folder = tmp_path_factory.mktemp("lora")
    data = ragged(folder)
    arguments = [f"--vision={tiny_folders['clip']}", f"--llm={tiny_folders['llama']}", "--connector=mlp", f"--data1={data}",
                 f"--data2={data}", "--template1=tiny", "--batch1=4", "--batch2=6", "--micro_batch=2", "--steps1=2", "--steps2=6",
                 "--save_every=2", "--log_every=1", "--evaluate=false", "--device=cpu", "--lora_rank=4", "--lora_alpha=16",
                 "--lora_lr2=3e-3", "--lr2=7"]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    train.main([*arguments, f"--out={folder / 'run'}"])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return arguments, folder / "run"


def test_only_adapters_and_connector_are_trained_and_saved(run):
    """lr2 is 7, and spoils nothing: the adapters have a rate of their own. What has no adapter is bit for bit the base's."""
    arguments, folder = run
    base = train.build_model(cli.parse(train.Config, arguments), torch.device("cpu")).state_dict()
    first, second = (load_file(folder / "checkpoints" / name / "trained.safetensors")
                     for name in ("stage1-0000002", "stage2-0000006"))
    assert set(first) == {name for name in base if name.startswith("connector.")}
    adapters = {name for name in second if "lora_" in name}
    assert set(second) == set(first) | adapters and len(adapters) == 2 * 2 * 7
    assert all((second[name] != 0).any() for name in adapters)
    learnt = weights(folder)
    moved = {name for name in base if not torch.equal(base[name], learnt[name])}
    assert sorted(learnt) == sorted(base)
    assert moved == {name for name in base if name.startswith("connector.") or name.endswith("_proj.weight") and "llm" in name}


def test_the_model_is_the_base_plus_what_the_adapter_folder_says(run, tiny_folders):
    """W + alpha / rank · B A in float64, from the files alone, under peft's names."""
    _, folder = run
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 16, str(tiny_folders["llama"]))
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    base, learnt = load_file(tiny_folders["llama"] / "model.safetensors"), weights(folder)
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(found) == 2 * 2 * 7
    for name in base:
        expected, stem = base[name].double(), "base_model.model." + name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in found:
            added = 16 / 4 * found.pop(f"{stem}.lora_B.weight").double() @ found.pop(f"{stem}.lora_A.weight").double()
            assert added.norm() > 1e-3 * expected.norm()             # so that it would be missed
            expected = expected + added
        assert relative_error(learnt["llm." + name.removeprefix("model.")], expected) < 1e-7
    assert not found


def test_a_stopped_run_goes_on_bit_for_bit(run, monkeypatch):
    arguments, folder = run
    def interrupt(self, record, write=train.Log.write):
        write(self, record)
        if (record["stage"], record["step"]) == (2, 2):
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(train.Log, "write", interrupt)
        train.main([*arguments, "--out=run"])
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["stage1-0000002", "stage2-0000004"]
    assert not Path("run/adapter").exists()
    train.main([*arguments, "--out=run", "--resume"])
    assert losses() == losses(folder)
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors", "checkpoints/stage2-0000006/trained.safetensors",
                 "checkpoints/stage2-0000006/optimizer.safetensors"):
        assert Path("run", file).read_bytes() == (folder / file).read_bytes(), file


def test_a_checkpoint_comes_out_merged(run):
    """export.py of the last checkpoint is export.py of the model."""
    _, folder = run
    for source, to in ((folder / "model", "model"), (folder / "checkpoints" / "stage2-0000006", "checkpoint")):
        export.main([f"--model={source}", f"--to={to}"])
    for path in Path("model").iterdir():
        assert path.read_bytes() == (Path("checkpoint") / path.name).read_bytes(), path.name


@torch.no_grad()
def test_transformers_gives_the_logits_of_what_was_trained(run):
    transformers = pytest.importorskip("transformers", reason="not installed: that it loads the merged model is not tested")
    _, folder = run
    export.main([f"--model={folder / 'model'}", "--to=hf"])
    theirs, report = transformers.LlavaForConditionalGeneration.from_pretrained("hf", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = MLLM.from_pretrained(folder / "model")
    picture = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
    pixels, ids = ours.prompt([picture], [("What is this?", None)])
    image, tokens = theirs.config.image_token_index, torch.tensor([ids])
    logits = theirs.eval()(input_ids=tokens.where(tokens != IMAGE, image),
                           pixel_values=ours.vision[0].normalize(pixels, torch.float32)).logits
    expected = ours.llm(embeds=ours.embed(tokens, pixels))
    assert relative_error(logits[..., :expected.shape[-1]], expected) < 1e-4


def test_two_processes_give_the_losses_of_one(run, tmp_path):
    arguments, folder = run
    launched = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d",
                               "--rdzv-endpoint=localhost:0", str(ROOT / "train.py"), *arguments, f"--out={tmp_path / 'two'}"],
                              capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert launched.returncode == 0, launched.stderr
    assert near(losses(tmp_path / "two"), losses(folder))


def test_stage_1_may_train_adapters_and_stage_2_goes_on_with_them_or_leaves_them(run, capsys):
    arguments, _ = run
    train.main([*arguments, "--out=run", "--stage=1", "--train1=connector,llm", "--lr1=1e-2"])
    assert "connector 0.00M trained, llm 0.20M frozen, lora 0.00M trained" in capsys.readouterr().out
    first = weights()
    start, both = "--init=run/checkpoints/stage1-0000002", "--train1=connector,llm"
    for out, own in (("goes_on", ["--lora_lr2=1e-30", "--connector_lr2=1e-30"]),
                     ("leaves", ["--train2=connector", "--connector_lr2=1e-2"])):
        train.main([*arguments, f"--out={out}", "--stage=2", start, both, *own])
        second = weights(out)
        moved = {name for name in first if not torch.equal(first[name], second[name])}
        assert moved == ({name for name in first if name.startswith("connector.")} if out == "leaves" else set())
    with pytest.raises(InputError, match="stage1-0000002: was trained with --lora_alpha=16, not 8"):
        train.main([*arguments, "--out=other", "--stage=2", start, "--lora_alpha=8"])
    without = [flag for flag in arguments if "lora" not in flag]
    with pytest.raises(InputError, match="tensor llm.layers.0.mlp.down_proj.lora_A.weight does not fit"):
        train.main([*without, "--out=other", "--stage=2", start])


def test_the_frozen_base_is_bfloat16_and_what_learns_float32(tiny_folders, monkeypatch):
    """As on CUDA, here on the CPU: a forward under autocast, whose gradients are float32 and near those of float32."""
    arguments = [f"--vision={tiny_folders['clip']}", f"--llm={tiny_folders['llama']}", "--connector=mlp", "--lora_rank=4",
                 "--init=new"]
    tokens, gradients = torch.tensor([[2, *[IMAGE] * 16, 5, 6, 7, 8]]), {}
    for small in (False, True):
        monkeypatch.setattr(train, "llm_dtype", lambda *_: torch.bfloat16 if small else torch.float32)
        model = train.build_stage(cli.parse(train.Config, arguments), 2, None, "cpu")
        random_B(model.llm)
        trained = train.choose_trained(model, ["connector", "llm"])
        assert set(trained) == {"connector", "lora"} and {p.dtype for part in trained.values() for p in part} == {torch.float32}
        frozen = {p.dtype for p in model.llm.parameters() if not p.requires_grad}
        assert frozen == {torch.bfloat16 if small else torch.float32} and model.llm.rope_frequencies.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=small):
            model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), tokens, tokens.clamp(min=0))[0].backward()
        gradients[small] = torch.cat([p.grad.flatten() for part in trained.values() for p in part])
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert gradients[True].dtype == torch.float32
    assert 0 < relative_error(gradients[True], gradients[False]) < 0.05      # bf16 has 8 bits


def test_only_an_llm_that_does_not_learn_itself_is_loaded_in_bfloat16():
    """So a frozen 13 GB LLM, or one under LoRA, takes 13 GB and not 26; training in float32 stays float32."""
    def dtype(stage, device, *flags):
        return train.llm_dtype(cli.parse(train.Config, [*flags]), stage, torch.device(device))
    assert dtype(1, "cuda") == dtype(2, "cuda", "--lora_rank=4") == dtype(2, "cuda", "--train2=connector") == torch.bfloat16
    assert dtype(2, "cuda") == dtype(1, "cuda", "--train1=connector,llm") == torch.float32
    assert dtype(1, "cpu", "--bf16=true") == torch.bfloat16
    assert dtype(1, "cuda", "--bf16=false") == dtype(1, "cpu") == dtype(2, "cpu", "--bf16=true") == torch.float32


@pytest.mark.parametrize("stored, large, device, wanted", [
    (torch.bfloat16, True, "cpu", True), (torch.float16, True, "cpu", True), (torch.float32, True, "cpu", False),
    (torch.bfloat16, False, "cpu", False), (torch.float32, True, "cuda", True), (torch.bfloat16, True, "mps", False)])
def test_on_a_cpu_a_large_llm_of_16_bits_trains_in_bfloat16_unasked(stored, large, device, wanted, tmp_path, monkeypatch):
    """The tiny LLM, float16 on the disk, does not: its training is float32 on every laptop. --bf16 decides where it is given."""
    save_checkpoint(tmp_path, {"weight": torch.zeros(10, 10, dtype=stored)}, {})
    monkeypatch.setattr(train, "LARGE", 100 if large else 101)
    assert train.uses_bf16(train.Config(llm=str(tmp_path)), device) is wanted
    assert train.uses_bf16(train.Config(), "cpu") is False
    assert [train.uses_bf16(train.Config(llm=str(tmp_path), bf16=given), device) for given in (True, False)] == [True, False]


GROWN = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, cli, train
from benches.turns import anonymous_memory
train.LARGE = 1e7
config = cli.parse(train.Config, sys.argv[2:])
before = anonymous_memory()
model = train.build_model(config, "cpu", 1)
with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=train.uses_bf16(config, "cpu")):
    model.llm(torch.ones(1, 4, dtype=torch.long))
print(anonymous_memory() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's own memory")
def test_a_frozen_llm_on_a_cpu_is_read_where_it_lies_and_takes_no_memory_of_the_processs_own(tmp_path):
    """13 GB are not 26 so, and several processes of a node share them."""
    llm = Llama(LlamaConfig(vocab_size=20_000, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8))
    llm.to(torch.bfloat16).save_pretrained(tmp_path / "llm")
    shutil.copy(ROOT / "weights" / "llama" / "tokenizer.json", tmp_path / "llm")
    size, grown = sum(2 * p.numel() for p in llm.parameters()), {}
    for flags in ("", "--bf16=true", "--bf16=false"):                # each in a process, whose heap is new
        child = subprocess.run([sys.executable, "-c", GROWN, str(ROOT), f"--llm={tmp_path / 'llm'}", *flags.split()],
                               capture_output=True, text=True)
        assert child.returncode == 0, child.stderr
        grown[flags] = int(child.stdout)
    # the connector and the towers (float32) are in all three
    assert max(grown[""], grown["--bf16=true"]) < 0.5 * size < 1.5 * size < grown["--bf16=false"]


RANKS_GROWN = """
import sys
sys.path.insert(0, sys.argv[1])
import cli, hub, torch, train
from benches.turns import anonymous_memory
hub.LARGE = train.LARGE = 1e7
before = anonymous_memory()
train.write = lambda *_: sys.stderr.write(f"GROWN {anonymous_memory() - before}\\n")      # at the end, the model still there; one write
del sys.argv[1]
cli.run(train.main)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's own memory")
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_two_ranks_that_train_a_connector_share_the_frozen_llm(stored, tmp_path):
    """DistributedDataParallel would write rank 0's weights over the mapped file of every rank, and so make each a copy. A float16
    file is not what they compute in: one of them writes a bfloat16 copy, and both map that."""
    llm = Llama(LlamaConfig(vocab_size=50_000, hidden_size=512, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=8))
    llm.to(stored).save_pretrained(tmp_path / "llm")
    shutil.copy(ROOT / "weights" / "llama" / "tokenizer.json", tmp_path / "llm")
    (tmp_path / "grown.py").write_text(RANKS_GROWN)
    size = sum(2 * p.numel() for p in llm.parameters())
    child = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", tmp_path / "grown.py",
                            str(ROOT), f"--llm={tmp_path / 'llm'}", "--connector=linear", "--stage=1", "--steps1=2", "--batch1=2",
                            "--evaluate=false", f"--out={tmp_path / 'run'}"], capture_output=True, text=True, timeout=600,
                           env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")})
    assert child.returncode == 0, child.stderr
    assert child.stdout.count("writing a copy that this machine's processes share") == (stored == torch.float16)
    grown = [int(line.split()[1]) for line in child.stderr.splitlines() if line.startswith("GROWN")]
    assert len(grown) == 2 and max(grown) < 0.75 * size, (grown, size)    # what there is: gloo, imports, a step


@pytest.mark.filterwarnings("ignore::DeprecationWarning")                # torch's own
def test_compiled_blocks_give_the_same_losses(run, monkeypatch):
    """With the backend that only traces, as in test_train.py; ragged rows share the graphs of the first ones."""
    import torch._dynamo
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend="aot_eager", **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    arguments, folder = run
    start = f"--init={folder / 'checkpoints' / 'stage1-0000002'}"
    train.main([*arguments, "--out=compiled", "--stage=2", start, "--compile=true"])
    assert near(losses("compiled"), {key: loss for key, loss in losses(folder).items() if key[0] == 2})
    assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8
    assert sorted(weights("compiled")) == sorted(weights(folder))
    torch._dynamo.reset()


# --- wrong input ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    (dict(lora_rank=-4), "--lora_rank=-4: should be 0 or more"),
    (dict(lora_rank=4, lora_alpha=-8), "--lora_alpha=-8: should be 0 or more"),
    (dict(lora_rank=4, lora_lr2=-1), "--lora_lr2=-1.0: should be 0 or more"),
    (dict(lora_alpha=8), "without --lora_rank there are none"),
    (dict(lora_lr2=1e-4), "without --lora_rank there are none"),
    (dict(lora_rank=4, train2="connector"), "--lora_rank=4: adapters are the LLM's, and neither --train1 nor")],
    ids=str)
def test_a_wrong_option_is_one_line_before_anything_is_trained(options, message, flags):
    assert message in refused(flags(**options))


def test_a_run_is_not_resumed_with_other_adapters_and_older_runs_are_resumed_without(run):
    arguments, folder = run
    config = cli.parse(train.Config, arguments)
    saved = checkpoint.newest_last(folder / "checkpoints", 2)[-1]
    checkpoint.check_same(config, saved)
    with pytest.raises(InputError, match="was trained with --lora_alpha=16, not 8: resume with the same options"):
        checkpoint.check_same(cli.parse(train.Config, [*arguments, "--lora_alpha=8"]), saved)
    older = json.loads((saved / "state.json").read_text())
    older["config"] = {key: value for key, value in older["config"].items() if not key.startswith("lora_")}
    Path("state.json").write_text(json.dumps(older))
    checkpoint.check_same(cli.parse(train.Config, [flag for flag in arguments if "lora_" not in flag]), Path("."))
