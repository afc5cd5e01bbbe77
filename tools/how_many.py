"""How many clusters? How well k-means agrees with itself on the windows of a run on a folder, for several K.

    python tools/how_many.py runs/folder                  # prints a table, draws runs/folder/how_many.png

The run's own windows are taken, from runs/cache; without them they are computed again. For each K:

    halves   k-means on the one and on the other half of the images, in up to 64 blocks; all windows are
             assigned to the centroids of the one and of the other, and the two assignments are compared
    starts   k-means on all images from other starting points (each the best of five, as in a run)

Both are adjusted Rand indices: 1 for the same clusters, 0 for what chance gives; mean and standard deviation
of some repetitions. Of more than WINDOWS windows one of n is used. The K that is recommended is the largest
whose `halves` lies within CLOSE of the highest: beyond it other images would give other clusters.
"""

import argparse
import sys
import warnings
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    import start                                          # before torch

import numpy as np
from PIL import Image, ImageDraw
from scipy.cluster.vq import vq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cam                                                # noqa: E402
import data                                               # noqa: E402
import train                                              # noqa: E402
from eval import choose_device, confusion_matrix, load_checkpoint                     # noqa: E402
from tools.pictures import plot                           # noqa: E402

CLASSES = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30)
WINDOWS, REPEATS, CLOSE = 2000, 4, 0.1
warnings.filterwarnings("ignore", message="One of the clusters is empty")         # k-means may leave one so


def adjusted_rand(a, b, k):
    """Adjusted Rand index of two clusterings (M,) of the same windows into 0..k-1 (Hubert and Arabie 1985).

    How many pairs of windows are together in both, less what chance gives; 1 if the clusterings are the same.
    """
    def pairs(counts):
        return (counts * (counts - 1) / 2).sum().item()

    table = confusion_matrix(a, b, k).double()            # (k, k)
    both, one, other = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    chance = one * other / pairs(table.sum())
    most = (one + other) / 2
    return (both - chance) / (most - chance) if most > chance else 1.0


def agreement(bank, k, rng):
    """{"halves", "starts"}: adjusted Rand indices. bank: list of windows (M, D), each of other images.

    Raises ValueError if there are too few windows for k clusters.
    """
    every = np.concatenate(bank)

    def clusters(blocks):
        """The cluster of every window (M,), by k-means on the windows of these blocks of the bank."""
        chosen = np.concatenate([every[:0], *(bank[i] for i in blocks)])
        centroids = cam.cluster(chosen, k, rng.integers(2 ** 31))
        return vq(every, centroids)[0]

    halves = []
    for _ in range(REPEATS):
        one, other = np.array_split(rng.permutation(len(bank)), 2)
        halves.append(adjusted_rand(clusters(one), clusters(other), k))
    starts = [clusters(range(len(bank))) for _ in range(REPEATS - 1)]
    return {"halves": halves, "starts": [adjusted_rand(a, b, k) for a, b in combinations(starts, 2)]}


def recommended(halves):
    """The largest K whose index lies within CLOSE of the highest: [(K, index), ...] -> K."""
    highest = max(index for _, index in halves)
    return max(k for k, index in halves if index >= highest - CLOSE)


def window_bank(run, root):
    """About WINDOWS windows of the run in this folder: a list of (M, D), each of other images."""
    checkpoint = load_checkpoint(run / "last.pt")
    args = SimpleNamespace(**checkpoint["args"] | {"out": str(run)} | ({"root": root} if root else {}))
    device = choose_device("auto")
    source = train.open_data(args, checkpoint)["train"]
    vit, digest = train.frozen_vit(args, checkpoint, device)
    bank = []
    for shard in train.window_bank(args, source, vit, digest, device):            # (M, 1 + D)
        bank.append(shard[shard[:, 0] == train.FOREGROUND, 1:].astype(np.float32))
    total = sum(map(len, bank))
    step = -(-total // WINDOWS)
    print(f"{total} windows of {len(source)} images" + (f", one of {step} is used" if step > 1 else ""))
    return [windows[::step] for windows in bank]


def parse(argv=None):
    p = argparse.ArgumentParser(description="How stable the clusters of a run's windows are, for several K.",
                                usage=argparse.SUPPRESS, allow_abbrev=False)
    p.add_argument("run", help="folder of the run, with last.pt in it")
    p.add_argument("--root", help="folder of the images (default: the one trained with)")
    p.add_argument("--classes", type=int, nargs="+", default=CLASSES, metavar="K",
                   help=f"numbers of clusters to try, 2 or more (default: {' '.join(map(str, CLASSES))})")
    args = p.parse_args(argv)
    if min(args.classes) < 2:
        p.error(f"--classes {min(args.classes)}: must be at least 2")
    return args


def main():
    args = parse()
    bank = window_bank(Path(args.run), args.root)
    lines = {"halves": [], "starts": []}                  # [(K, mean), ...]
    print("\n|  K | halves       | starts       |\n|---|---|---|")
    for k in sorted(set(args.classes)):
        try:
            indices = agreement(bank, k, np.random.default_rng(0))
        except ValueError as error:                       # too few windows, and for a larger K too
            if not lines["halves"]:
                raise data.UserError(error) from None
            print(f"\nno larger K: {error}")
            break
        cells = [f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" for values in indices.values()]
        print(f"| {k:2} | {'  | '.join(cells)}  |", flush=True)
        for name, values in indices.items():
            lines[name].append((k, float(np.mean(values))))
    sheet = Image.new("RGB", (450, 340), "white")
    K = recommended(lines["halves"])
    plot(ImageDraw.Draw(sheet), 50, "agreement of k-means with itself", lines, axis="K", mark=(K, f"K = {K}"))
    file = Path(args.run) / "how_many.png"
    data.write_whole(file, lambda f: sheet.save(f, "PNG"))
    print(f"\nrecommended: --classes {K}, the largest K whose `halves` lies within {CLOSE} of the highest; "
          f"with more, other images would give other clusters. Wrote {file}")


if __name__ == "__main__":
    sys.exit(data.exit_code(main))
