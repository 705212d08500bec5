"""How fast the maps of one token's step are read, in the forms that were tried: python -m benches.maps

22 blocks of TinyLlama's shape in bfloat16 (q, k and v as one map), random weights, 1.9 GB, and a copy in oneDNN's blocks; all forms
in turns, 12 turns after one to warm up. "The sums of the maps" is what reading them takes by itself, the
sum of 1 GiB what bench.py calls the limit.
"""
import statistics
import time

import torch
import torch.nn.functional as F

import linear

APART, JOINED = [(2048, 2048), (256, 2048), (256, 2048)], [(2560, 2048)]             # q, k, v
OTHERS = [(2048, 2048), (5632, 2048), (5632, 2048), (2048, 5632)]                    # o, gate, up, down


def packed(maps, rows, fewest):
    """The maps by PackedLinear, on so many rows, filled up to `fewest`."""
    linear.FEWEST = fewest
    for each, n in maps:
        each(rows[n])


def main():
    torch.manual_seed(0)
    shapes = (APART + OTHERS) * 22
    weights = [torch.randn(shape, dtype=torch.bfloat16) / 50 for shape in shapes]
    one, two, eight = ({n: torch.randn(rows, n, dtype=torch.bfloat16) for n in (2048, 5632)} for rows in (1, 2, 8))
    maps = [(linear.PackedLinear(weight), weight.shape[1]) for weight in weights]
    joined = [(linear.PackedLinear(torch.randn(shape, dtype=torch.bfloat16) / 50), shape[1]) for shape in (JOINED + OTHERS) * 22]
    product = torch.compile(lambda weight, x: (weight.float() * x.float()).sum(-1).bfloat16(), dynamic=False)
    plain = torch.ones(2 ** 28)
    ways = {"PyTorch, one row": lambda: [F.linear(one[weight.shape[1]], weight) for weight in weights],
            "without oneDNN, one row": lambda: [linear.one_row(one[weight.shape[1]], weight) for weight in weights],
            "packed, one row": lambda: packed(maps, one, 1),
            "packed, one row filled up to four": lambda: packed(maps, one, 4),
            "packed, two rows": lambda: packed(maps, two, 1),
            "packed, two rows filled up to four": lambda: packed(maps, two, 4),
            "packed, eight rows": lambda: packed(maps, eight, 4),
            "compiled sum of products, one row": lambda: [product(weight, one[weight.shape[1]]) for weight in weights],
            "q, k, v joined, one row of four": lambda: packed(joined, one, 4),
            "the sums of the maps": lambda: [weight.view(torch.float32).sum() for weight in weights],
            "the sum of 1 GiB": lambda: plain.sum()}
    read = {way: 2 * sum(a * b for a, b in shapes) for way in ways} | {"the sum of 1 GiB": 2 ** 30}      # bytes
    rates = {way: [] for way in ways}
    with torch.no_grad():
        for turn in range(13):
            for way, run in ways.items():
                start = time.perf_counter()
                run()
                rates[way] += [read[way] / (time.perf_counter() - start) / 1e9] * (turn > 0)
    for way, found in rates.items():
        print(f"{way:36} {statistics.median(found):5.1f} GB/s ({min(found):.1f} to {max(found):.1f})")


if __name__ == "__main__":
    main()
