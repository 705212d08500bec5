"""`towers`: CLIP-L/14 and DINOv2-L/14 at 336 pixels, a batch of 4; ours gives the layers that COMM reads, transformers all of
them, so that the same 24 blocks run. Compiled is ours block by block, theirs as a whole; packed is ours as it generates on a CPU
(linear.py).
"""
import statistics

import torch

from benches.turns import fastest, limits, peak_memory, spread, take_turns, wait

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}    # ViT-L/14
TOWERS = {"clip": LARGE | {"intermediate_size": 4096, "image_size": 336}, "dinov2": LARGE | {"image_size": 518}}
SIDE = 336                                                           # of the pictures
READ = {"clip": "comm_clip", "dinov2": "comm_dino"}                  # the connector whose layers ours is asked for


def fill(model, device, dtype):
    """Random weights for a module that was built on the meta device."""
    model = model.to_empty(device=device).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data.uniform_(-0.03, 0.03)
    return model


def tower_ours(name, device, dtype, form):
    from clip import CLIP_MEAN, CLIP_STD, CLIPVision, CLIPVisionConfig
    from connector import ConnectorConfig, layers_needed
    from dinov2 import DINOv2, DINOv2Config
    from hub import on_meta
    from compiled import compile_blocks
    from linear import by_convolution, pack
    from vit import Normalize
    kind, shape = {"clip": (CLIPVision, CLIPVisionConfig), "dinov2": (DINOv2, DINOv2Config)}[name]
    with on_meta():
        tower = kind(shape(**TOWERS[name]))
    tower = fill(tower, device, dtype)
    tower.normalize = Normalize(CLIP_MEAN, CLIP_STD).to(device)      # to_empty has forgotten it, too
    (layers,) = layers_needed(ConnectorConfig(READ[name]), [tower.config.num_hidden_layers])
    if form == "compiled":
        compile_blocks(tower.blocks)
    elif form != "packed" and dtype == torch.float32:
        by_convolution(tower)                                        # as in training

    def see(pixels):
        if form == "packed":
            pack(tower)                                              # the first time; then there is nothing left to do
        return tower(pixels, layers)
    return tower, see


def tower_transformers(name, device, dtype, form):
    import transformers

    from clip import CLIP_MEAN, CLIP_STD
    from vit import Normalize
    kind, shape = {"clip": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig),
                   "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config)}[name]
    model = kind._from_config(shape(**TOWERS[name]), attn_implementation="sdpa", dtype=dtype).to(device).eval()
    normalize = Normalize(CLIP_MEAN, CLIP_STD).to(device)
    forward = torch.compile(model) if form == "compiled" else model
    return model, lambda pixels: forward(pixel_values=normalize(pixels, dtype), output_hidden_states=True).hidden_states


SEERS = {"ours": tower_ours, "ours_compiled": tower_ours, "ours_packed": tower_ours, "transformers": tower_transformers,
         "transformers_compiled": tower_transformers}


def one_turn(config):
    """The contender's own process: build, a forward to warm up, three that are timed."""
    name, _, form = config.contender.partition("_")
    model, see = SEERS[name](config.tower, config.device, getattr(torch, config.dtype), form)
    parameters = sum(p.numel() for p in model.parameters())
    pixels = torch.randint(0, 256, (config.batch, 3, SIDE, SIDE), dtype=torch.uint8, device=config.device)
    with torch.inference_mode():
        start = wait(config.device)
        see(pixels)
        times = [wait(config.device)]
        for _ in range(3):
            see(pixels)
            times.append(wait(config.device))
    return {"warm_up": times[0] - start, "seconds": statistics.median(after - before for before, after in zip(times, times[1:])),
            "parameters": parameters, "memory": peak_memory(config.device)} | limits(config)


def tower_flops(shape, side, blocks):
    """FLOPs of a picture through the first `blocks` blocks, with one prefix token."""
    D, P = shape["hidden_size"], shape["patch_size"]
    N = (side // P) ** 2
    return 2 * N * 3 * P ** 2 * D + blocks * (2 * (N + 1) * (4 * D * D + 2 * D * shape.get("intermediate_size", 4 * D))
                                              + 4 * (N + 1) ** 2 * D)


def bench(config):
    """-> {tower: {"limits", contender: medians}}, and how many times the fastest form of theirs ours is. Prints a table."""
    contenders, result = [name for name in SEERS if name.startswith("ours") or config.vs], {"dtype": config.dtype}
    for tower, shape in {name: TOWERS[name] for name in ([config.tower] if config.tower else TOWERS)}.items():
        flops = config.batch * tower_flops(shape, SIDE, shape["num_hidden_layers"])
        found = result[tower] = take_turns(config, contenders, tower=tower, batch=config.batch) | {"flops": flops}
        for name in contenders:
            one = found[name]
            one["of_the_limit"] = flops / one["seconds"] / one["limit_flops"]
            print(f"{tower:7} {name:22} {spread(one)}, {one['of_the_limit']:.0%} of the limit for {flops / 1e12:.2f} TFLOP, "
                  f"{one['parameters'] / 1e6:.0f}M parameters, warm-up {one['warm_up']:.1f} s, {one['memory'] / 2 ** 30:.1f} GiB",
                  flush=True)
        if config.vs:
            found["times_transformers"] = fastest(found, "transformers") / fastest(found, "ours")
            print(f"{tower:7} ours is {found['times_transformers']:.2f} times as fast, the fastest form of each", flush=True)
    return result
