"""What a run makes of single images, drawn.

    python tools/show.py explain runs/voc photo.jpg       # every stage of Fig. 2 for one photograph
    python tools/show.py compare runs/voc runs/other      # runs side by side on val (Figs. 3 and 4)
    python tools/show.py compare runs/voc runs/other --predict photos
    python tools/show.py pairs runs/voc                   # which class is lost beside which other on val
    python tools/show.py clusters runs/folder             # what each cluster shows: clusters.png in there

A run is its folder (best.pt, or last.pt where there is no best) or one of its checkpoints.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    import start                                          # before torch

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data                                               # noqa: E402
from eval import open_run, open_split, restore, segment_photograph     # noqa: E402
from tools.pictures import (TILE, class_colours, cluster_sheet, grey, masks_of, page, panels,     # noqa: E402
                            stages, write)


FEWEST = 3                                                # images of a pair of classes, together and apart


def explain(args):
    """PHOTO_explain.png: every stage of Fig. 2 for one photograph, and CAMs of the five largest clusters."""
    data.check_outside(args.out, [args.photo])
    checkpoint = open_run(args.run)
    network = restore(checkpoint, args.device)
    size, names = checkpoint["args"]["size"], checkpoint["names"]
    assignment = np.array(checkpoint["assignment"])       # cluster -> class
    photo = data.open_image(args.photo, True, least=2 * size)
    image = data.squash(photo, size, antialias=True)
    stage = stages(network, checkpoint, image[None])
    first = int(checkpoint["background"])                 # map k is channel k + first; channel 0: background
    K = stage.maps.shape[1]
    pixels = np.bincount(stage.coarse.flatten(), minlength=first + K)             # of each channel
    largest = pixels[first:].argsort()[::-1][:5]
    top = [image, grey(stage.attention[0], size)]
    top += [grey(stage.maps[0, k] / stage.maps.max(), size) for k in largest]
    masks = {"coarse label": stage.coarse, "teacher": stage.teacher, "pseudo label": stage.pseudo,
             "prediction": stage.student}
    if not checkpoint["teacher_on"]:                      # an untrained head, or not yet in use
        del masks["teacher"]
    bottom = []
    for title, mask in masks.items():
        coloured = class_colours(checkpoint)[assignment[mask[0]]]
        tile = Image.fromarray(coloured).resize((TILE, TILE), Image.NEAREST)
        write(ImageDraw.Draw(tile), (4, 2), title, "white", stroke_width=1, stroke_fill="black")
        bottom.append(np.array(tile))
    titles = ["image", "attention"] + [f"CAM: {names[assignment[k + first]]}" for k in largest]
    save(page([top, bottom], titles, checkpoint), Path(args.out) / f"{Path(args.photo).stem}_explain.png")


def compare(args):
    """compare.png: the same images by several runs side by side (Figs. 3 and 4)."""
    data.check_outside(args.out, args.predict or ())
    checkpoints = [open_run(run) for run in args.runs]
    names, colours = checkpoints[0]["names"], class_colours(checkpoints[0])
    for run, checkpoint in zip(args.runs, checkpoints):
        if checkpoint["names"] != names:
            raise data.UserError(f"{run}: has other classes than {args.runs[0]}, or other names in its "
                                 f"names.txt; compare runs of the same classes, give them the same names.txt")
    networks = [restore(checkpoint, args.device) for checkpoint in checkpoints]
    source = data.Folder(args.predict) if args.predict else open_split(checkpoints[0])
    rows = []
    for i in range(min(len(source), args.limit)):
        image = source.image(i)
        masks = [segment_photograph(network, checkpoint, image)
                 for network, checkpoint in zip(networks, checkpoints)]
        label = source.label(i)                           # None without labels
        if label is not None:
            masks.append(label)
        rows.append([data.squash(image, TILE)]
                    + [colours[data.squash(mask, TILE, "nearest")] for mask in masks])
    titles = ["image", *(run if len(run) < 25 else f"..{run[-22:]}" for run in args.runs), "truth"]
    save(page(rows, titles[:len(rows[0])], checkpoints[0]), Path(args.out) / "compare.png")


def pairs(args):
    """pairs.png: of the class that is most lost beside another one on val, images with both and without."""
    checkpoint = open_run(args.run)
    if checkpoint["args"]["data"] == "folder":
        raise data.UserError(f"{args.run}: a run on a folder has no labels; pairs needs those of a data set")
    source, names = open_split(checkpoint), checkpoint["names"]
    network, size = restore(checkpoint, args.device), checkpoint["args"]["size"]
    chosen, masks = masks_of(network, checkpoint, source)                         # (n,), (n, S, S)
    labels = np.stack([data.squash(source.label(i), size, "nearest") for i in chosen])
    print("class         beside        right there, %  elsewhere, %  images")
    worst = recall_beside(labels, masks, len(names))[:10]
    for a, b, beside, elsewhere, both, alone in worst:
        print(f"{names[a]:12}  {names[b]:12}  {100 * beside:14.1f}  {100 * elsewhere:12.1f}  {both}, {alone}")
    if not worst:
        raise data.UserError(f"{args.run}: no two classes are in {FEWEST} images of val together and apart")
    a, b, *_ = worst[0]
    shows_a, shows_b = ((labels == c).any((1, 2)) for c in (a, b))
    examples = [*np.flatnonzero(shows_a & shows_b)[:3], *np.flatnonzero(shows_a & ~shows_b)[:3]]
    images = np.stack([source.squashed(chosen[i], size) for i in examples])
    save(panels(network, checkpoint, images, labels[examples]), Path(args.out) / "pairs.png")


def recall_beside(labels, masks, n):
    """How much of each class is right in images with and without another one; the most different pairs first.

    labels, masks  (images, S, S) of n classes
    returns        [(a, b, share of a's pixels that are right beside b, share elsewhere, images of both, of a
                   alone)], of all pairs that are in FEWEST images together and in FEWEST apart
    """
    def pixels(values):                                   # of each class, (n,)
        return np.bincount(values.flatten(), minlength=256)[:n]

    truth = np.stack([pixels(label) for label in labels])                         # (images, n)
    right = np.stack([pixels(label[label == mask]) for label, mask in zip(labels, masks)])
    found = []
    for a in range(n):
        for b in range(n):
            both, alone = ((truth[:, a] > 0) & with_b for with_b in (truth[:, b] > 0, truth[:, b] == 0))
            if min(both.sum(), alone.sum()) >= FEWEST:
                beside, elsewhere = (right[rows, a].sum() / truth[rows, a].sum() for rows in (both, alone))
                found.append((a, b, beside, elsewhere, both.sum(), alone.sum()))
    return sorted(found, key=lambda pair: pair[2] - pair[3])


def clusters(args):
    """clusters.png beside the checkpoint, as a run on a folder draws it at its end."""
    checkpoint = open_run(args.run)
    source = open_split(checkpoint, split="train", limit=checkpoint["args"]["limit"])
    network = restore(checkpoint, args.device)
    folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
    save(cluster_sheet(network, checkpoint, source), folder / "clusters.png")


def save(picture, file):
    data.write_whole(file, lambda f: picture.save(f, "PNG"))
    print(f"wrote {file}")


def parse(argv=None):
    p = argparse.ArgumentParser(description="Draw what a run makes of photographs.", usage=argparse.SUPPRESS,
                                allow_abbrev=False, epilog=__doc__.split("\n\n")[1],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    below = p.add_subparsers(dest="what", required=True, metavar="explain | compare | pairs | clusters")
    for draw in (explain, compare, pairs, clusters):
        own = below.add_parser(draw.__name__, description=draw.__doc__, usage=argparse.SUPPRESS,
                               allow_abbrev=False)
        own.set_defaults(draw=draw)
        if draw is compare:
            own.add_argument("runs", nargs="+", metavar="RUN", help="folders or checkpoints of runs")
            own.add_argument("--predict", nargs="+", metavar="PATH",
                help="images and folders (default: val of the first run's data set)")
            own.add_argument("--limit", type=int, default=6, metavar="N",
                help="the first N images (default: 6)")
        else:
            own.add_argument("run", metavar="RUN", help="folder or checkpoint of a run")
        if draw is explain:
            own.add_argument("photo", metavar="PHOTO")
        if draw is not clusters:
            own.add_argument("--out", default="masks", metavar="DIR",
                help="folder of the picture (default: masks)")
        own.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
            help="auto: cuda if there is one (default)")
    args = p.parse_args(argv)
    if args.what == "compare" and args.limit < 1:
        p.error(f"--limit {args.limit}: must be at least 1")
    return args


def main():
    args = parse()
    args.draw(args)


if __name__ == "__main__":
    sys.exit(data.exit_code(main))
