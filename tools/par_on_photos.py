"""PAR on real photographs: which dilations restore a coarse mask best at the training size.

    python tools/par_on_photos.py --root data             # all of VOC val
    python tools/par_on_photos.py --root data --limit 80  # its first 80 images, a minute on a CPU

Protocol. Image and label are squashed to 160 x 160 (label: nearest). The true mask, one channel for each
class that the label shows, is averaged over 8 x 8 pixels to the 20 x 20 cells of a ViT of patch 8, made wrong
or not, and restored to 160 x 160. Void pixels belong to no channel and are not scored. The score is the IoU
of the arg max, mean over the classes of the image, then over images, in percent, ± the standard error of
that mean. Three coarse masks:

    clean, soft    the averages themselves
    20 % wrong     a fifth of the cells, drawn from --seed and the image's number, get another class of the
                   image, one-hot: not the one that leads there. An image of one class stays clean
    blurred        each cell the mean of the 5 x 5 around it, fewer at the border

`bilinear` only enlarges the mask, as training does with --par and no number. PAR enlarges it with aligned
corners before its first iteration, as AFA's does; the columns "not aligned" enlarge it without. The last
three columns are other dilations minus 1,2,4,8, image by image: AFA's, 1,2,8,16, and AFA's with neither of
the two aligned.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    import start                                          # before torch

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data                                               # noqa: E402
from eval import confusion_matrix                         # noqa: E402
from par import DILATIONS, PAR                            # noqa: E402

SIZE, CELLS = 160, 20                                     # pixels, and cells, of a side: a ViT of patch 8
WRONG, BLUR = 0.2, 5                                      # share of the cells; cells of a side
COARSE = ("clean, soft", f"{100 * WRONG:.0f} % of the cells given another class of the image",
          f"blurred over {BLUR}×{BLUR} cells")
AFA, OURS = PAR(DILATIONS, 10), PAR((1, 2, 4, 8), 10)


def bilinear(image, masks):
    return F.interpolate(masks, size=image.shape[2:], mode="bilinear")


RESTORED = {
    "bilinear": bilinear,
    "AFA: 1,2,4,8,12,24 ×10": AFA,
    "1,2,4,8 ×10": OURS,
    "1,2,4 ×10": PAR((1, 2, 4), 10),
    "1,2,8,16 ×10": PAR((1, 2, 8, 16), 10),
    "1,2,4,8,12,24 ×3": PAR(DILATIONS, 3),
    "AFA, not aligned": lambda image, masks: AFA(image, bilinear(image, masks)),
    "1,2,4,8 ×10, not aligned": lambda image, masks: OURS(image, bilinear(image, masks)),
}
DIFFERENCES = {"AFA − 1,2,4,8": (1, 2), "1,2,8,16 − 1,2,4,8": (4, 2), "not aligned": (6, 7)}      # columns


def coarse_masks(label, classes, rng):
    """The three coarse masks of one image, in the order of COARSE: (3, C, CELLS, CELLS).

    label (SIZE, SIZE) uint8, 255 void; classes: the C values that it shows
    """
    masks = torch.from_numpy(label[None] == classes[:, None, None]).float()       # (C, SIZE, SIZE), one-hot
    clean = F.avg_pool2d(masks, SIZE // CELLS)                                    # (C, CELLS, CELLS)
    C, wrong = len(classes), clean.flatten(1).clone()                             # (C, CELLS^2)
    if C > 1:
        cells = torch.from_numpy(rng.choice(CELLS ** 2, int(WRONG * CELLS ** 2), replace=False))
        step = torch.from_numpy(rng.integers(1, C, len(cells)))                   # never 0: another class
        other = (wrong[:, cells].argmax(0) + step) % C
        wrong[:, cells] = F.one_hot(other, C).float().T
    blurred = F.avg_pool2d(clean, BLUR, stride=1, padding=BLUR // 2, count_include_pad=False)
    return torch.stack([clean, wrong.view_as(clean), blurred])


def miou(label, prediction, n):
    """Mean IoU over the n classes of one image, percent; label: index of the class, VOID is not scored."""
    confusion = confusion_matrix(label, prediction, n)
    right = confusion.diag()
    return 100 * (right / (confusion.sum(0) + confusion.sum(1) - right)).mean().item()


def scores(source, i, seed):
    """mIoU of one image, [[of each of COARSE] of each of RESTORED]; None if its label is void."""
    image = data.to_float(data.squash(source.image(i), SIZE)[None])               # (1, 3, SIZE, SIZE)
    label = data.squash(source.label(i), SIZE, "nearest")                         # (SIZE, SIZE)
    classes = np.unique(label[label != data.VOID])                                # (C,)
    if not len(classes):
        return None
    index = np.full(256, data.VOID, np.uint8)
    index[classes] = np.arange(len(classes))
    masks = coarse_masks(label, classes, np.random.default_rng((seed, i)))        # (3, C, CELLS, CELLS)
    columns = []
    for restore in RESTORED.values():
        # PAR treats every channel alike: the three masks side by side share one affinity
        restored = restore(image, masks.flatten(0, 1)[None]).unflatten(1, masks.shape[:2])[0]
        columns.append([miou(index[label], mask, len(classes)) for mask in restored.argmax(1)])
    return columns


def parse(argv=None):
    p = argparse.ArgumentParser(description="PAR on true masks made coarse, on photographs in VOC's layout.",
                                usage=argparse.SUPPRESS, allow_abbrev=False)
    p.add_argument("--root", default="data", help="folder with VOCdevkit/VOC2012 (default: data)")
    p.add_argument("--limit", type=int, default=1449, metavar="N",
                   help="first N images of val (default: 1449, all)")
    p.add_argument("--seed", type=int, default=0, help="of the wrong cells (default: 0)")
    args = p.parse_args(argv)
    if args.limit < 2 or args.seed < 0:
        p.error("--limit: at least 2, for the standard error; --seed: at least 0")
    return args


def main():
    args = parse()
    source = data.VOC(args.root, "val")
    source.limit(args.limit)
    scored = [scores(source, i, args.seed) for i in range(len(source))]
    scored = np.array([columns for columns in scored if columns is not None])     # (images, columns, 3)
    if not len(scored):
        raise data.UserError(f"{args.root}: no label of val shows a class; give another --root")
    print(f"{len(scored)} images of val at {SIZE}×{SIZE}, masks from {CELLS}×{CELLS}, mIoU over the classes "
          f"of each image, seed {args.seed}\n")
    print("| coarse mask |", " | ".join([*RESTORED, *DIFFERENCES]), "|")
    print("|---" * (1 + len(RESTORED) + len(DIFFERENCES)) + "|")
    for k, name in enumerate(COARSE):
        values = [*scored[:, :, k].T]                     # of each column (images,)
        values += [values[a] - values[b] for a, b in DIFFERENCES.values()]
        cells = [f"{v.mean():.1f} ± {v.std(ddof=1) / len(v) ** 0.5:.1f}" for v in values]
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    sys.exit(data.exit_code(main))
