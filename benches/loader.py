"""`loader`: one thread, JPEG files of a photograph's size and spectrum to 336 x 336. Ours gives uint8, since the towers normalise
on the device; transformers' processor gives normalised float32 (`transformers`), or uint8 if it is told to.
"""
import tempfile
import time
from pathlib import Path

import torch

from benches.turns import peak_memory, spread, take_turns

PICTURES, SIZE = 32, (640, 480)                                      # JPEG files of COCO's usual size
SIDE = 336                                                           # of the pixels that come out


def write_pictures(folder):
    """Seeded noise that falls off with the frequency, as a photograph's does; quality 90 -> bytes of all files."""
    import numpy as np
    from PIL import Image
    random, (width, height) = np.random.default_rng(0), SIZE
    for i in range(PICTURES):
        picture = np.zeros((height, width, 3))
        for octave in range(8):
            grid = random.normal(size=(2 ** octave * 3, 2 ** octave * 4, 3)) / 2 ** octave
            for channel in range(3):
                picture[..., channel] += np.asarray(Image.fromarray(grid[..., channel].astype(np.float32)).resize(SIZE, 3))
        picture = (picture - picture.min()) / np.ptp(picture) * 255
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i:02}.jpg", quality=90)
    return sum(file.stat().st_size for file in folder.iterdir())


def loader_ours(mode):
    from images import ImageSpec, open_image, to_pixels
    spec = ImageSpec(SIDE, mode)
    return lambda file: to_pixels(open_image(file), spec)


def loader_transformers(form):
    """CLIP's processor, as LLaVA uses it: resize, crop, scale and normalise, here with NumPy and PIL."""
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    plain = {"do_rescale": False, "do_normalize": False} if form == "uint8" else {}
    return lambda file: processor(Image.open(file), return_tensors="pt", **plain)["pixel_values"]


LOADS = {"ours": loader_ours, "ours_pad": loader_ours, "transformers": loader_transformers,
         "transformers_uint8": loader_transformers}


def one_turn(config):
    """One thread, all files twice, the second time counts -> seconds a picture."""
    torch.set_num_threads(1)
    name, _, form = config.contender.partition("_")
    load = LOADS[name](form or "crop" if name == "ours" else form)
    for _ in range(2):
        start = time.perf_counter()
        for file in sorted(Path(config.folder).iterdir()):
            load(file)
        seconds = time.perf_counter() - start
    return {"seconds": seconds / PICTURES, "memory": peak_memory("cpu")}


def bench(config):
    """-> {contender: medians}, and how many times as fast ours is as theirs. Prints a table."""
    contenders = [name for name in LOADS if name.startswith("ours") or config.vs]
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as folder:
        size = write_pictures(Path(folder))
        print(f"{PICTURES} JPEG files of {SIZE[0]} x {SIZE[1]}, {size / PICTURES / 1000:.0f} kB each, to {SIDE} x {SIDE}",
              flush=True)
        result = take_turns(config, contenders, folder=folder)
    for name in contenders:
        one = result[name]
        one["pictures_per_second"] = 1 / one["seconds"]
        print(f"{name:18} {spread(one, scale=1e3, unit='ms')} a picture, {one['pictures_per_second']:.0f} a second and core, "
              f"{one['memory'] / 2 ** 20:.0f} MiB")
    if config.vs:
        result["times_transformers"] = result["transformers"]["seconds"] / result["ours"]["seconds"]
        print(f"ours is {result['times_transformers']:.2f} times as fast, with the same crop")
    return result
