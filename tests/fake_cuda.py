"""Train a recipe on fake CUDA tensors: shapes, dtypes and devices, but no data and no GPU.

    python tests/fake_cuda.py config/dense_7b.toml --stage=2 --layers=2

train.train_stage runs as it is, at the recipe's shapes, as one rank of --gpus. The model, the
batches and NCCL are fake. The last line printed is JSON; kernels, bytes and waits are those of the
second step:

    kernels  number of operators that would launch at least one kernel
    bytes    {line of code: bytes that it reads and writes, matrix products excepted}
    waits    {line of code: how often the host waits for the GPU there}
    memory   {"eager": bytes that PyTorch's allocator would hold at most, with whole blocks computed
             again; "eager planned": by tools/plan.py; "compiled planned": with torch.compile}
    block    {"kept": bytes that a compiled block of the LLM keeps for its backward, "again": FLOPs
             of linear layers that it computes twice, and both as planned}; not with
             --memory_budget=0 and activation checkpointing, which keeps the input alone
    flops    {part: FLOPs of the step}, compiled, by tools/plan.py
    sending  seconds, by tools/plan.py

Nothing is compiled. One block is traced as far as torch.compile's choice of what to keep.

PyTorch for CPUs lacks a device guard for CUDA, so autograd would abort. `build` compiles one, which
must be loaded before torch. So this script starts itself again with it.
"""

import json
import os
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from common import cli, distributed, lora  # noqa: E402
from common.cli import option  # noqa: E402
from common.run import Ranks  # noqa: E402
from common.speed import speed_up  # noqa: E402
from connector import CONNECTORS  # noqa: E402
from tools import plan  # noqa: E402
from tools.bench import make_batch  # noqa: E402

GUARD = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
using namespace at;
struct FakeHooks : CUDAHooksInterface {
  FakeHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex deviceCount() const override { return 8; }
  int getNumGPUs() const override { return 8; }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, FakeHooks)
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::FakeGuardImpl<DeviceType::CUDA>)
"""


def build(folder):
    """Compile the guard and return its path. Takes half a minute. Raises CalledProcessError."""
    source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
    source.write_text(GUARD)
    torch_folder = Path(torch.__file__).parent
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O0", "-fPIC", "-shared", source]
    command += [f"-I{torch_folder}/include", f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run([*command, f"-Wl,-rpath,{torch_folder}/lib", "-o", library], check=True)
    return library


def environment(library):
    return os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}


# ---- the fake GPU --------------------------------------------------------------------------------


class Stream:
    """A CUDA stream or event that does nothing."""

    priority_range = staticmethod(lambda: (0, -1))

    def __init__(self, *_, **__):
        self.device = torch.device("cuda", 0)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: Stream()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


PROPERTIES = SimpleNamespace(name="fake", major=9, minor=0, total_memory=80e9)
CUDA = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda *_, **__: True,
    "device_count": lambda: 8,
    "get_device_capability": lambda *_: (9, 0),
    "get_device_name": lambda *_: "NVIDIA H100 80GB HBM3",
    "get_device_properties": lambda *_: PROPERTIES,
    "max_memory_allocated": lambda *_: 0,
    "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    "Stream": Stream,
    "Event": Stream,
}
NOTHING = "_lazy_init set_device set_rng_state synchronize empty_cache reset_peak_memory_stats"
for name in NOTHING.split():
    # each its own function: torch.compile tells functions apart by identity
    CUDA[name] = lambda *_: None
for name in "stream current_stream default_stream".split():
    CUDA[name] = lambda *_: Stream()


def flash_attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """Call the kernel that CUDA would choose."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]


def to_device(module, device):
    """Stand in for nn.Module.to, which refuses to exchange fake parameters."""
    for child in module.modules():
        for name, p in child._parameters.items():
            if p is not None:
                moved = torch.nn.Parameter(p.detach().to(device), p.requires_grad)
                child._parameters[name] = moved
    return module


def move(parameters, buffers, device):
    """Stand in for a function of fully_shard: assigning to .data does not move a fake tensor."""
    for tensor in (*parameters, *buffers):
        if tensor.device.type not in (device.type, "meta"):
            tensor.fake_device = device


def fake_cuda(rank, size):
    """Return a context in which torch.cuda has eight GPUs, and NCCL `size` silent ranks."""
    from torch.distributed import device_mesh
    from torch.distributed.fsdp._fully_shard import _fsdp_init
    from torch.testing._internal.distributed.fake_pg import FakeStore

    make_mesh = device_mesh.init_device_mesh

    def connect(device):
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())

    def real_mesh(*args, **options):
        with fake_tensor.unset_fake_temporarily():
            return make_mesh(*args, **options)

    stack = ExitStack()
    for name, value in (CUDA | {"current_device": lambda: rank % 8}).items():
        stack.enter_context(patch.object(torch.cuda, name, value))
    no_init = property(lambda self: True)
    for owner, name, value in (
        (fake_tensor, "init_gpu_context", lambda device: None),
        (fake_tensor.FakeTensorMode, "avoid_device_init", no_init),
        (device_mesh, "init_device_mesh", real_mesh),
        (_fsdp_init, "_move_states_to_device", move),
        (distributed, "connect", connect),
        (torch.nn.functional, "scaled_dot_product_attention", flash_attention),
        (torch.Tensor, "is_pinned", lambda *_: True),
        (torch.nn.Module, "to", to_device),
    ):
        stack.enter_context(patch.object(owner, name, value))
    stack.enter_context(torch.autograd.set_multithreading_enabled(False))
    return stack


# ---- what is measured ----------------------------------------------------------------------------

# Operators that launch nothing.
VIEWS = set(
    "view _unsafe_view t transpose permute expand slice select unsqueeze squeeze alias detach "
    "split split_with_sizes unbind as_strided _reshape_alias unflatten lift_fresh empty empty_like "
    "new_empty empty_strided new_empty_strided record_stream set_ resize_".split()
)
PRODUCTS = set(
    "mm addmm bmm baddbmm convolution _varlen_attn _varlen_attn_backward "
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward".split()
)


class Watch(TorchDispatchMode):
    """Counts what operators on CUDA launch, move and hold, and where the host waits for them."""

    def __init__(self):
        super().__init__()
        self.held, self.live = {}, 0
        self.start()

    def start(self):
        """Set all counts to zero."""
        self.kernels, self.bytes, self.waits = 0, Counter(), Counter()
        self.peak = self.live

    def place(self):
        """Find the line of this project that called an operator."""
        frame = sys._getframe(2)
        while frame and (
            not frame.f_code.co_filename.startswith(f"{ROOT}/")
            or frame.f_code.co_filename == __file__
        ):
            frame = frame.f_back
        if not frame:
            return "autograd"
        return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any("DTensor" in kind.__name__ for kind in types):
            # PyTorch calls again with the local rows.
            return NotImplemented
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        inputs = tensors((args, kwargs))
        if name == "_local_scalar_dense":
            on_cuda = inputs[0].is_cuda
            if on_cuda:
                self.waits[self.place()] += 1
            # What is read from the GPU is 1.0, which is finite. On the CPU 0 passes every check.
            return 1.0 if on_cuda else 0
        result = func(*args, **kwargs)
        outputs = tensors(result)
        for tensor in outputs:
            self.hold(tensor)
        if len({x.device.type for x in inputs + outputs}) > 1 and not kwargs.get("non_blocking"):
            if name in ("_to_copy", "copy_"):
                self.waits[self.place()] += 1
        on_cuda = [x for x in inputs + outputs if x.is_cuda]
        if on_cuda and name not in VIEWS:
            self.kernels += 1
            if name not in PRODUCTS:
                self.bytes[self.place()] += sum(x.numel() * x.element_size() for x in on_cuda)
        return result

    def hold(self, tensor):
        if tensor.is_cuda:
            self.update(tensor.untyped_storage())

    def update(self, storage):
        """Note the size of a storage, in the allocator's blocks of 512 bytes."""
        key, size = id(storage), -(-storage.nbytes() // 512) * 512
        if key not in self.held:
            weakref.finalize(storage, self.free, key)
        self.live += size - self.held.get(key, 0)
        self.held[key] = size
        self.peak = max(self.peak, self.live)

    def free(self, key):
        self.live -= self.held.pop(key, 0)

    def __enter__(self):
        resize, watch = torch.UntypedStorage.resize_, self

        def resized(storage, size):
            resize(storage, size)
            if id(storage) in watch.held:
                watch.update(storage)
            return storage

        # FSDP frees a gathered parameter so.
        self.patch = patch.object(torch.UntypedStorage, "resize_", resized)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)


def tensors(tree):
    leaves = torch.utils._pytree.tree_leaves(tree)
    found = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            found.append(getattr(leaf, "_local_tensor", leaf))
    return found


# ---- a compiled block ----------------------------------------------------------------------------


def trace_block(config, batch, dtype, budget):
    """Choose what a compiled block of the LLM keeps -> bytes kept, FLOPs of its linear layers."""
    from torch._functorch import aot_autograd, partitioners
    from torch._functorch import config as functorch
    from torch._inductor.decomposition import select_decomp_table

    model = make_fake(shapes_of(config), False, dtype, torch.device("cuda"))
    parts = config.stage_options(config.stage).train
    if config.lora_rank and "llm" in parts:
        lora.adapt(model.llm, config.lora_rank, config.lora_alpha)
    train.freeze(model, parts)
    speed_up(model, "train")
    block, tokens = model.llm.layers[0], batch.tokens.numel()
    names, parameters = zip(*block.named_parameters(), strict=True)
    _, starts, longest = batch.packed
    width = model.llm.config.hidden_size
    x = torch.empty(1, tokens, width, dtype=dtype, device="cuda", requires_grad=True)
    angles = torch.empty(1, tokens, 1, len(model.llm.rope_frequencies), device="cuda")
    kept = flops = 0

    def forward(x, cos, sin, starts, *parameters):
        attention = (cos, sin), (starts, longest), None, None
        with torch.autocast("cuda", torch.bfloat16):
            weights = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(block, weights, (x, *attention))

    def count_flops(graph, _):
        nonlocal flops
        for node in graph.graph.nodes:
            if node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                flops += 2 * node.meta["val"].numel() * node.args[-2].meta["val"].shape[-1]
        return graph

    def count_kept(graph, inputs):
        nonlocal kept
        (*_, outputs) = graph.graph.nodes
        for node in outputs.args[0][1:]:
            kind = node.meta.get("val")
            # Neither weights nor the tables of RoPE, which all blocks share.
            is_shared = node.op == "placeholder" and node.name != "primals_1"
            if isinstance(kind, torch.Tensor) and tokens in kind.shape and not is_shared:
                kept += kind.numel() * kind.element_size()
        return count_flops(graph, inputs)

    compiled = aot_autograd.aot_function(
        forward,
        count_kept,
        count_flops,
        partitioners.min_cut_rematerialization_partition,
        select_decomp_table(),
    )
    with functorch.patch(activation_memory_budget=budget):
        compiled(x, angles, angles, starts.to("cuda"), *parameters).sum().backward()
    return kept, flops


# ---- the run -------------------------------------------------------------------------------------


@dataclass
class FakeConfig(plan.PlanConfig):
    layers: int = option(0, "blocks of the LLM; 0: all")
    rank: int = option(0, "which of the --gpus")
    text_only: bool = option(False, "dialogues without images")
    trace: bool = option(True, "trace a compiled block")


def make_fake(model, is_sharded, llm_dtype, device):
    """Give a model on the meta device fake tensors, as build_model leaves the real ones."""
    for prefix, module in model.named_modules():
        is_llm = prefix.startswith("llm")
        place = "cpu" if is_llm and is_sharded else device
        for name, p in module._parameters.items():
            if p is not None:
                dtype = llm_dtype if is_llm else torch.float32
                empty = torch.empty(p.shape, dtype=dtype, device=place)
                module._parameters[name] = torch.nn.Parameter(empty, p.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=place)
    return model


class Steps:
    """Stands in for data.Loader: two equal steps. `watch` counts the second one."""

    skipped = {}

    def __init__(self, step, watch):
        self.step, self.watch = step, watch

    def __iter__(self):
        for _ in range(2):
            self.watch.start()
            yield self.step


class FakeDDP:
    """Stands in for DDP, which cannot hold fake tensors."""

    no_sync = nullcontext

    def __init__(self, model, device):
        self.model = model

    def __call__(self, batch):
        return self.model(batch)


def shapes_of(config):
    """Build the model on the meta device, with `layers` blocks of the LLM."""
    model = plan.build(config, config.stage)
    if config.layers:
        del model.llm.layers[config.layers :]
        model.llm.config.num_hidden_layers = config.layers
    return model


def close():
    if dist.is_initialized():
        dist.destroy_process_group()


def run(config):
    """Train two steps -> what was measured in the second one, and the plan of it."""
    stage, device = config.stage, f"cuda:{config.rank % 8}"
    os.environ |= {"RANK": str(config.rank), "WORLD_SIZE": str(config.gpus)}
    os.environ["LOCAL_RANK"] = str(config.rank % 8)
    model = shapes_of(config)
    share = -(-config.stage_options(stage).batch // config.gpus)
    size = min(share, config.micro_batch)
    sizes = [min(size, share - start) for start in range(0, share, size)]
    options = model.spec, model.tokens_per_image
    step = [make_batch(*options, number, config.text_only) for number in sizes]
    with ExitStack() as stack:
        stack.callback(close)
        stack.enter_context(fake_cuda(config.rank, config.gpus))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        watch = stack.enter_context(Watch())
        ranks = Ranks(device)
        ranks.agree = lambda *_: None
        ranks.is_sharded = config.stage_options(stage).fsdp and config.gpus > 1
        dtype = torch.bfloat16 if ranks.is_sharded else config.llm_dtype(stage, ranks.device)
        make_fake(model, ranks.is_sharded, dtype, ranks.device)
        for owner, name, value in (
            (train, "build_model", lambda *_: model),
            (train, "data_parallel", FakeDDP),
            (train, "Loader", lambda *_, **__: Steps(step, watch)),
            (train, "fingerprint", lambda dataset: 0),
        ):
            stack.enter_context(patch.object(owner, name, value))
        train.build_stage(config, stage, None, ranks)
        speed_up(model, "train")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        train.train_stage(config, stage, model, range(10**6), [], folder, ranks)
    batch, options = step[0], config.stage_options(stage)
    squared = sum(length**2 for length in batch.lengths)
    trains_llm = "llm" in options.train
    planned = plan.Plan(
        # FakeDDP keeps no gradients between the steps.
        options if ranks.is_sharded else SimpleNamespace(**(vars(options) | {"gpus": 1})),
        shapes_of(config),
        trains_llm,
        plan.Load(sum(batch.lengths), squared, len(batch.supervised), len(batch.pixels)),
        len(step),
        True,
        config.lora_rank if trains_llm else 0,
        config.gpus // config.fsdp_replicas if ranks.is_sharded else 1,
    )
    memory = {"eager": watch.peak, "eager planned": plan.memory(planned)["peak"]}
    planned.config.compile = None
    memory["compiled planned"] = plan.memory(planned)["peak"]
    flops = {part: len(step) * number for part, number in plan.flops(planned).items()}
    found = {"kernels": watch.kernels, "bytes": dict(watch.bytes.most_common())}
    found |= {"waits": dict(watch.waits), "memory": memory, "flops": flops}
    found["sending"] = plan.sending(planned._replace(config=options))
    recompute = options.activation_checkpointing
    if config.trace and (config.memory_budget or not recompute):
        budget = config.memory_budget if recompute else 1.0
        with fake_cuda(0, config.gpus), FakeTensorMode(allow_non_fake_inputs=True):
            _, least = trace_block(config, batch, dtype, 1.0)
            kept, all_flops = trace_block(config, batch, dtype, budget)
        blocks = planned.model.llm.config.num_hidden_layers
        found["block"] = {
            "kept": kept,
            "kept planned": plan.kept_by_block(planned, dtype.itemsize),
            "again": all_flops - least,
            "again planned": plan.linear_again(planned) / blocks if recompute else 0,
        }
    return found


def measure(arguments):
    """Train as command-line arguments say. The guard must be loaded."""
    config = cli.parse(FakeConfig, arguments, __doc__)
    config.stage = config.stage or 2
    config.init = "new" if config.stage == 2 else ""
    config.steps1 = config.steps2 = 10
    config.compile = False
    config.connector_options = cli.parse_options(
        CONNECTORS, config.connector, config.connector_options, "--connector"
    )
    return run(config)


def main(arguments):
    if "guard.so" not in os.environ.get("LD_PRELOAD", ""):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, *arguments]
            sys.exit(subprocess.run(command, env=environment(build(folder))).returncode)
    print(json.dumps(measure(arguments)))


if __name__ == "__main__":
    cli.run(main)
