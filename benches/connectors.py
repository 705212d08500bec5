"""`connectors`: on the hidden states of CLIP-L/14 at 336 (comm: and of DINOv2-L/14), to an LLM that is 4096 wide; forward alone,
and forward with the backward of its own parameters.
"""
import statistics

import torch

from benches.turns import limits, peak_memory, spread, take_turns, wait

WIDTH = 4096                                                         # of the LLM
CONNECTORS = ("linear", "mlp", "sti", "sci", "dci", "efficient", "comm")


def connector_flops(kind, N=576, D=1024, C=WIDTH):
    """FLOPs of a picture, forward: 2 for each weight that a token meets; norms, sums and pooling are left out."""
    parts = {"mlp": 1, "sti": 1, "sci": 3, "dci": 3, "efficient": 3}
    if kind == "linear":
        return 2 * N * D * C
    if kind == "comm":                                               # 24 and 6 layers, two MLPs of 4D, two widths side by side
        return 2 * N * (30 * D * D + 2 * 8 * D * D + 2 * D * C)
    return 2 * (N + 2 * (N // 8) if kind == "sti" else N) * (parts[kind] * D * C + C * C)


def one_turn(config):
    """A connector of its own process, on hidden states of CLIP-L/336 (comm: and DINOv2-L's) -> seconds forward, and forward with
    backward to its own parameters."""
    from connector import ConnectorConfig, layers_asked, make_connector
    shape, dtype = (24, 1024, 576), getattr(torch, config.dtype)
    shapes, connector_config = [shape] * (1 + (config.contender == "comm")), ConnectorConfig(config.contender)
    connector = make_connector(connector_config, shapes, WIDTH).to(config.device, dtype)
    asked = layers_asked(connector_config, [24] * len(shapes))
    hidden = [{layer: torch.randn(config.batch, 576, 1024, device=config.device).to(dtype) for layer in layers}
              for layers in asked]
    hidden = [list(states.values()) for states in hidden] if config.contender == "comm" else hidden
    found = {"forward": [], "seconds": []}
    for _ in range(4):
        start = wait(config.device)
        with torch.no_grad():
            tokens = connector(hidden)
        found["forward"].append(wait(config.device) - start)
        start = wait(config.device)
        connector(hidden).sum().backward()
        found["seconds"].append(wait(config.device) - start)
    return {key: statistics.median(times[1:]) for key, times in found.items()} | {
        "tokens": tokens.shape[1], "parameters": sum(p.numel() for p in connector.parameters()),
        "memory": peak_memory(config.device)} | limits(config)


def bench(config):
    """-> {"limits", kind: medians}. Prints a table."""
    result = take_turns(config, CONNECTORS, batch=config.batch)
    print(f"{config.batch} pictures, CLIP-L/14 at 336 (comm: and DINOv2-L/14) to an LLM of width {WIDTH}, {config.dtype}")
    for kind in CONNECTORS:
        one, flops = result[kind], config.batch * connector_flops(kind)
        one |= {"flops": flops, "of_the_limit": flops / one["forward"] / one["limit_flops"]}
        print(f"{kind:10} {one['tokens']:.0f} tokens, {one['parameters'] / 1e6:5.1f}M parameters, "
              f"{flops / config.batch / 1e9:4.0f} GFLOP a picture; forward {spread(one, 'forward')}, "
              f"{one['of_the_limit']:.0%} of the limit; with backward {spread(one)}; {one['memory'] / 2 ** 30:.1f} GiB")
    return result
