"""Train a recipe on fake CUDA tensors: shapes, dtypes and devices, but no data and no GPU.

    python tests/fake_cuda.py config/dense_7b.toml --stage=2 --layers=2

train.train_stage runs as it is, at the recipe's shapes, as one rank of --gpus, with torch.compile
and without. The model, the batches and NCCL are fake. The last line printed is JSON about the
second step. Kernels, bytes and waits are those without torch.compile, unless --eager=false:

    kernels   number of operators that would launch at least one kernel
    bytes     {line of code: bytes that it reads and writes, matrix products excepted}
    waits     {line of code: how often the host waits for the GPU there}
    graphs    number of graphs that torch.compile would make of the blocks
    memory    {"compiled" or "eager": [bytes that PyTorch's allocator would hold at most, planned]}
    products  the same for the FLOPs of all products but the LLM's attention
    flops     {part: FLOPs of the step} by tools/plan.py
    sending   seconds, by tools/plan.py

A compiled block is traced and split into a forward and a backward pass as torch.compile does. Their
operators then run one by one. Fused kernels would need less memory while a block runs.

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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._functorch import partitioners
from torch._functorch.aot_autograd import aot_function
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.graph import _BoxedCodeGen
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import ConcatDataset
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from common import cli, distributed  # noqa: E402
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

    make_mesh, tolist = device_mesh.init_device_mesh, FakeTensor.tolist

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
        # A fake tensor would read one number after another.
        (FakeTensor, "tolist", lambda tensor: tolist(tensor.cpu())),
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
        self.flops, self.peak = 0, self.live

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
            if func.overloadpacket in flop_registry and "varlen" not in name:
                self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
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


# ---- compiled blocks -----------------------------------------------------------------------------


INPUT = "a tensor"


class Compiler:
    """Stands in for torch.compile: traces a block, and chooses what to keep for the backward pass.

    `traced` has a function for each kind of block and shape of its inputs. torch.compile makes one
    graph for all sizes from 2 on, and another where a size is 0 or 1. `graphs` counts those.
    """

    def __init__(self):
        self.traced, self.graphs = {}, set()

    def compile(self, module):
        """Exchange a module's forward, in place."""
        plain = module.forward

        def forward(*arguments):
            names, parameters = zip(*module.named_parameters(), strict=True)
            leaves, tree = tree_flatten(arguments)
            inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            others = [INPUT if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]

            def call(parameters, inputs):
                left = iter(inputs)
                restored = [next(left) if other is INPUT else other for other in others]
                with _reparametrize_module(module, dict(zip(names, parameters, strict=True))):
                    return plain(*tree_unflatten(restored, tree))

            tensors = (*parameters, *inputs)
            kind = type(module), torch.is_grad_enabled(), tuple(p.shape for p in parameters)
            kind += tuple((x.dtype, x.requires_grad) for x in tensors)
            self.graphs.add((kind, tuple(min(size, 2) for x in inputs for size in x.shape)))
            key = str((kind, [x.shape for x in inputs], others))
            if key not in self.traced:
                split = partial(partition, len(parameters))
                table = select_decomp_table()
                self.traced[key] = aot_function(call, boxed, boxed, split, table)
            return self.traced[key](parameters, inputs)

        module.forward = forward


def partition(num_parameters, graph, inputs, num_fwd_outputs, **_):
    """Split a graph into forward and backward. Parameters are in memory anyway."""
    return partitioners.min_cut_rematerialization_partition(
        graph,
        inputs,
        num_fwd_outputs=num_fwd_outputs,
        static_lifetime_input_indices=range(num_parameters),
    )


def boxed(graph, _):
    """Return a graph as a function that frees its inputs while it runs."""
    graph.graph.set_codegen(_BoxedCodeGen())
    graph.recompile()

    def call(inputs):
        return graph(inputs)

    call._boxed_call = True
    return call


# ---- the run -------------------------------------------------------------------------------------


@dataclass
class FakeConfig(plan.PlanConfig):
    layers: int = option(0, "blocks of the LLM; 0: all")
    rank: int = option(0, "which of the --gpus")
    text_only: bool = option(False, "dialogues without images")
    eager: bool = option(True, "run without torch.compile, too")


def make_fake(model, is_sharded, dtypes, device):
    """Give a model on the meta device fake tensors, as build_model leaves the real ones."""
    for prefix, module in model.named_modules():
        part = prefix.partition(".")[0]
        place = "cpu" if part == "llm" and is_sharded else device
        for name, p in module._parameters.items():
            if p is not None:
                dtype = dtypes.get(part, torch.float32)
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
    """Train two steps -> what was measured in the second one, and what was planned."""
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
        dtypes = {part: config.dtype(part, stage, ranks.device) for part in ("vision", "llm")}
        if ranks.is_sharded:
            # as in its files
            dtypes["llm"] = torch.bfloat16
        make_fake(model, ranks.is_sharded, dtypes, ranks.device)
        for owner, name, value in (
            (torch.nn.Module, "compile", lambda module, dynamic: compiler.compile(module)),
            (train, "build_model", lambda *_: model),
            (train, "data_parallel", FakeDDP),
            (train, "Loader", lambda *_, **__: Steps(step, watch)),
            (train, "fingerprint", lambda dataset: 0),
        ):
            stack.enter_context(patch.object(owner, name, value))
        compiler = Compiler()
        train.build_stage(config, stage, None, ranks)
        options = config.stage_options(stage)
        budget = config.memory_budget if options.activation_checkpointing else 0
        speed_up(model, "train", config.compile, budget or 1.0)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        train.train_stage(config, stage, model, ConcatDataset([range(10**6)]), [], folder, ranks)
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
    # Watch does not count the LLM's attention.
    without = planned._replace(load=planned.load._replace(squared=0))
    return {
        "kernels": watch.kernels,
        "bytes": dict(watch.bytes.most_common()),
        "waits": dict(watch.waits),
        "graphs": len(compiler.graphs),
        "memory": (watch.peak, plan.memory(planned)["peak"]),
        "products": (watch.flops, len(step) * sum(plan.flops(without).values())),
        "flops": {part: len(step) * number for part, number in plan.flops(planned).items()},
        "sending": plan.sending(planned._replace(config=options)),
    }


def measure(arguments):
    """Train as command-line arguments say. The guard must be loaded."""
    config = cli.parse(FakeConfig, arguments, __doc__)
    config.stage = config.stage or 2
    config.init = "new" if config.stage == 2 else ""
    config.steps1 = config.steps2 = 10
    config.connector_options = cli.parse_options(
        CONNECTORS, config.connector, config.connector_options, "--connector"
    )
    runs = {"compiled": run(replace(config, compile=True))}
    if config.eager:
        runs["eager"] = run(replace(config, compile=False))
    found = {key: {way: one[key] for way, one in runs.items()} for key in ("memory", "products")}
    # tools/bench.py models the time from plain operators.
    plain = runs.get("eager", runs["compiled"])
    return runs["compiled"] | found | {key: plain[key] for key in ("kernels", "bytes", "waits")}


def main(arguments):
    if "guard.so" not in os.environ.get("LD_PRELOAD", ""):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, *arguments]
            sys.exit(subprocess.run(command, env=environment(build(folder))).returncode)
    print(json.dumps(measure(arguments)))


if __name__ == "__main__":
    cli.run(main)
