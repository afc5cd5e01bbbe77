"""Hungarian-matched scores, predictions and pictures of a trained checkpoint.

    python eval.py runs/voc/best.pt --data voc                     # per-class IoU, mIoU, accuracy, assignment
    python eval.py runs/voc/best.pt --native --par                 # at the images' own size, refined by PAR
    python eval.py runs/voc/best.pt --predict photos --out masks   # palette PNG and overlay of each image
    python eval.py runs/voc/best.pt --explain photo.jpg            # every stage of Fig. 2 for one photograph
    python eval.py A.pt --compare B.pt C.pt --predict photos       # checkpoints side by side (Figs. 3 and 4)

Clusters have no names: an assignment of clusters to classes, one to one, is found on the labelled split so
that most pixels are right (Hungarian matching), and only then is anything scored (TransFGU's protocol,
decision 20).
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from scipy.optimize import linear_sum_assignment

import cam
import data
import losses
from model import BACKBONES, DMSA, VisionTransformer, WeightsError, normalise, read_tensors
from par import PAR

GROUP = 16                                                # images of one forward pass
SOFTWARE = "DMSA in plain PyTorch, eval.py"               # marks its pictures: it replaces no others


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line for people."""


# ----------------------------------------------------------------------------
# Scores


def confusion_matrix(label, prediction, n):
    """Count pixels: (n, n) int64 [truth, prediction].

    label, prediction   equal shapes, numpy or torch integers; labels outside 0..n-1 (void) do not count
    """
    label, prediction = torch.as_tensor(label).flatten().long(), torch.as_tensor(prediction).flatten().long()
    valid = (label >= 0) & (label < n)                    # void, 255, is neither right nor wrong
    return torch.bincount(label[valid] * n + prediction[valid], minlength=n * n).view(n, n)


def hungarian(confusion):
    """For every predicted cluster its class: (n,) int64, one to one, so that most pixels are right.

    confusion (n, n) [truth, prediction]. All classes take part, the background included.
    """
    confusion = np.asarray(confusion)
    truth, cluster = linear_sum_assignment(confusion, maximize=True)
    assignment = np.empty(len(confusion), np.int64)       # indexed by cluster, as predictions are
    assignment[cluster] = truth
    return assignment


def scores(confusion):
    """Scores after Hungarian matching, percent.

    returns  {"miou", "accuracy", "iou": (n,), "assignment": (n,), "clusters": in use, "entropy": of the
             predicted shares, 0 when everything is one cluster, 1 when all are equally frequent}

    IoU = TP / (TP + FP + FN). The mean leaves out classes that are neither in truth nor in the prediction
    (NaN here); a class that is only predicted counts 0 (TransFGU; others average over the classes in truth).
    """
    confusion = np.asarray(confusion)
    assignment = hungarian(confusion)
    # IoU needs truth and prediction on the same axis of classes
    matched = np.zeros_like(confusion)
    matched[:, assignment] = confusion                                            # columns now are classes
    right, union = np.diag(matched), matched.sum(0) + matched.sum(1) - np.diag(matched)
    iou = 100 * np.divide(right, union, out=np.full(len(union), np.nan), where=union > 0)
    share = confusion.sum(0) / max(confusion.sum(), 1)    # (n,) of each cluster in the prediction
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum() / np.log(len(share))
    return {"miou": float(np.nanmean(iou)) if (union > 0).any() else 0.0,
            "accuracy": float(100 * right.sum() / max(confusion.sum(), 1)),
            "iou": iou, "assignment": assignment,
            "clusters": int((share > 0).sum()), "entropy": float(abs(entropy))}


# ----------------------------------------------------------------------------
# Checkpoint -> network -> masks


def load_checkpoint(file):
    """The dict that train.py saved: tensors and plain values. Raises WeightsError, CheckpointError."""
    checkpoint, _ = read_tensors(file)
    needed = {"student", "teacher", "vit", "args", "names"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise CheckpointError(f"{file}: not a checkpoint of train.py")
    return checkpoint


def restore(checkpoint):
    """The network of a checkpoint, in eval mode, on the GPU if there is one."""
    args = checkpoint["args"]                             # the options that the run was given, plain values
    vit = VisionTransformer(**BACKBONES[args["backbone"]][0])
    network = DMSA(vit, len(checkpoint["names"]), args["aspp"] != "none")
    for name in ("vit", "student", "teacher"):
        getattr(network, name).load_state_dict(checkpoint[name])
    torch.backends.cudnn.allow_tf32 = False               # full fp32 on GPUs too, as in training
    return network.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.no_grad()
def segment(network, image, rates, size, par=None):
    """Cluster of every pixel: uint8 (B, H, W, 3) -> uint8 (B, *size), by the student.

    size   (rows, columns) that the logits are enlarged to before the arg max; par: refine there with this PAR
    """
    image = data.to_float(image, network.vit.cls_token.device)                    # (B, 3, H, W)
    logits = network(normalise(image), rates)                                     # (B, N, h, w)
    if par is not None:
        return par(F.interpolate(image, size=size, mode="bilinear"), logits.softmax(1)).argmax(1).byte()
    return F.interpolate(logits, size=size, mode="bilinear").argmax(1).byte()


def groups(n, rank=0, world=1):
    """This process's share of 0..n-1, in groups that do not depend on the number of processes."""
    # sliced, not padded to equal shares as DistributedSampler does: no image counts twice
    starts = list(range(0, n, GROUP))[rank::world]
    return [range(start, min(start + GROUP, n)) for start in starts]


def evaluate(network, images, labels, rates, rank=0, world=1):
    """This process's part of the confusion matrix (N, N) of a split.

    images (n, S, S, 3), labels (n, S, S) uint8; this is process `rank` of `world`
    """
    n_classes = network.student.decoder.n_classes
    total = torch.zeros(n_classes, n_classes, dtype=torch.int64)
    for group in groups(len(labels), rank, world):
        masks = segment(network, images[group.start:group.stop], rates, labels.shape[1:])  # (b, S, S)
        total += confusion_matrix(labels[group.start:group.stop], masks.cpu(), n_classes)
    return total


def whole_patches(image, patch, most=1024):
    """Resize an image so that no pixel is beyond the last whole patch, to `most` pixels a side at most."""
    H, W = image.shape[:2]
    shrink = min(1, most / max(H, W))
    h, w = (max(patch, round(side * shrink / patch) * patch) for side in (H, W))
    return np.array(Image.fromarray(image).resize((w, h), Image.BILINEAR))


def segment_image(network, image, rates, size, native=False, par=None):
    """Clusters of one image of any size: uint8 (H, W, 3) -> uint8 (H, W).

    The network sees it squashed to size x size or, `native`, at its own size in whole patches. Masks are made
    at up to 1024 pixels a side and enlarged from there (nearest).
    """
    H, W = image.shape[:2]
    shrink = min(1, 1024 / max(H, W))
    seen = whole_patches(image, network.vit.patch_size) if native else data.squash(image, size)
    mask = segment(network, seen[None], rates, (max(1, round(H * shrink)), max(1, round(W * shrink))), par)[0]
    return np.array(Image.fromarray(mask.cpu().numpy()).resize((W, H), Image.NEAREST))


# ----------------------------------------------------------------------------
# Pictures


def stages(network, checkpoint, image, par):
    """Every stage of Fig. 2 for squashed images uint8 (B, S, S, 3), in clusters.

    returns  attention (B, h, w) in 0..1, CAM maps (B, K, h, w), CAM label, teacher label, pseudo label and
             student's prediction (B, S, S)
    """
    args, size, background = checkpoint["args"], image.shape[1:3], checkpoint["background"]
    device = network.vit.cls_token.device
    pixels = data.to_float(image, device)                                         # (B, 3, S, S)
    normalised = normalise(pixels)
    upsample = lambda p: F.interpolate(p, size=size, mode="bilinear")
    refine = upsample if par is None else lambda p: par(pixels, p)
    # the whole image at once, where training sees crops: the labels are those of an uncropped sample
    with torch.no_grad():
        _, A, _ = cam.last_attention(network.vit, normalised)
        attention = A[:, :, 1:].mean(1).unflatten(1, cam.patch_grid(network.vit, normalised))  # (B, h, w)
        maps = cam.class_activation_maps(network.vit, normalised, checkpoint["centroids"].to(device))
        features, rates = network.features(normalised), checkpoint["rates"]
        teacher = network.decode(network.teacher, features, rates)[0]             # (B, N, h, w)
        student = network.decode(network.student, features, rates)[0]             # (B, N, h, w)
        coarse, _ = losses.pseudo_label(maps, None, upsample, 0, background, args["background"])
        pseudo, _ = losses.pseudo_label(maps, teacher if checkpoint["teacher_on"] else None, refine,
                                        args["teacher_weight"], background, args["background"])
    attention = attention / attention.amax((1, 2), keepdim=True)
    masks = (coarse, upsample(teacher).argmax(1), pseudo, upsample(student).argmax(1))
    return attention.cpu(), maps.cpu(), *(m.cpu().numpy() for m in masks)


def grey(maps, size):
    """(h, w) in 0..1 -> uint8 (size, size, 3), so that the patches can be seen."""
    tile = Image.fromarray((np.asarray(maps).clip(0, 1) * 255).astype(np.uint8)).convert("RGB")
    return np.array(tile.resize((size, size), Image.NEAREST))


def page(rows, titles, names, colours, cell=160):
    """A picture of rows of uint8 (S, S, 3) tiles under titles, with a legend of the classes."""
    gap, head = 6, 24
    lines = -(-len(names) // max(1, len(titles) * 2))     # of the legend, two classes a column
    width, height = len(titles) * (cell + gap) + gap, head + len(rows) * (cell + gap) + 18 * lines + gap
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((gap + column * (cell + gap), 8), title, "black")
    for r, row in enumerate(rows):
        for column, tile in enumerate(row):
            tile = Image.fromarray(tile).resize((cell, cell), Image.NEAREST)
            sheet.paste(tile, (gap + column * (cell + gap), head + r * (cell + gap)))
    step, per_line = (cell + gap) // 2, len(titles) * 2
    for i, name in enumerate(names):
        x, y = gap + (i % per_line) * step, head + len(rows) * (cell + gap) + 18 * (i // per_line)
        pen.rectangle([x, y + 1, x + 12, y + 13], fill=tuple(colours[i].tolist()), outline="grey")
        pen.text((x + 16, y + 1), name[:11], "black")
    return sheet


def panels(network, checkpoint, images, labels, file, par=None):
    """Draw image, attention, CAM, pseudo label, prediction, truth: uint8 (B, S, S, 3), (B, S, S) or None."""
    colours, assignment, size = data.palette(), np.array(checkpoint["assignment"]), images.shape[1]
    attention, _, coarse, _, pseudo, student = stages(network, checkpoint, images, par)
    rows = []
    for i in range(len(images)):
        row = [images[i], grey(attention[i], size)]
        row += [colours[assignment[mask[i]]] for mask in (coarse, pseudo, student)]
        rows.append(row + ([colours[labels[i]]] if labels is not None else []))
    titles = ["image", "attention", "CAM", "fused + PAR" if par else "fused", "prediction", "truth"]
    page(rows, titles[:len(rows[0])], checkpoint["names"], colours).save(file)


def curves(log, file):
    """Write the losses and scores of log.jsonl by epoch as a picture with two plots."""
    epochs = {}
    for line in Path(log).read_text().splitlines():
        record = json.loads(line)
        epochs.setdefault(record["epoch"], []).append(record)

    def mean(key):
        found = {epoch: [r[key] for r in records if key in r] for epoch, records in sorted(epochs.items())}
        return [(epoch, float(np.mean(values))) for epoch, values in found.items() if values]

    plots = [("losses (mean of an epoch)", {k: mean(k) for k in ("seg", "ce", "un", "cls", "all")}),
             ("percent, on val", {k: mean(k) for k in ("miou", "accuracy", "cam_miou")})]
    plots = [(title, lines) for title, lines in plots if any(lines.values())]     # a folder has no val
    colours = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#222222")
    sheet = Image.new("RGB", (450 * len(plots), 340), "white")
    pen = ImageDraw.Draw(sheet)
    for p, (title, lines) in enumerate(plots):
        left, top, width, height = 50 + 450 * p, 40, 380, 250
        values = [v for line in lines.values() for _, v in line]
        grain = next(g for g in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if max(values) <= 6 * g or g == 100)
        marks = np.arange(np.floor(min(0.0, *values) / grain), np.ceil(max(values) / grain) + 1) * grain
        low, high, last = marks[0], marks[-1], max(epochs)
        at = lambda e, v: (left + width * e / last, top + height * (1 - (v - low) / (high - low)))
        pen.rectangle([left, top, left + width, top + height], outline="#bbbbbb")
        pen.text((left, 8), title, "black")
        for mark in marks:
            pen.text((left - 42, at(0, mark)[1] - 6), f"{mark:g}", "#666666")
            pen.line([at(0, mark), at(last, mark)], fill="#eeeeee")
        pen.text((left, top + height + 6), "epoch", "#666666")
        pen.text((left + width - 20, top + height + 6), str(last), "#666666")
        for i, (name, line) in enumerate(lines.items()):
            points = [at(*point) for point in line]
            if len(points) > 1:
                pen.line(points, fill=colours[i], width=2)
            for x, y in points:
                pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colours[i])
            pen.text((left + 70 * i, top + height + 22), name, colours[i])
    sheet.save(file)


# ----------------------------------------------------------------------------
# The program


def report(result, names):
    """Print the table of classes and the scores."""
    cluster_of = {int(c): k for k, c in enumerate(result["assignment"])}  # class -> cluster
    print("class                 cluster     IoU")
    for i, name in enumerate(names):
        iou = "absent" if np.isnan(result["iou"][i]) else f"{result['iou'][i]:6.2f}"
        print(f"{name:20}  {cluster_of[i]:7}  {iou}")
    print(f"mIoU {result['miou']:.2f}  accuracy {result['accuracy']:.2f}  "
          f"clusters in use {result['clusters']} of {len(names)}")


def written_here(file):
    """Whether a file is a picture that `write` wrote."""
    try:
        with data.opened(file) as picture:
            return picture.info.get("Software") == SOFTWARE
    except data.DataError:
        return False


def spare(file):
    """Raise DataError if there is anything else than such a picture (a photograph) where one is to go."""
    if file.exists() and not written_here(file):
        raise data.DataError(f"{file}: exists, and eval.py did not write it; choose another --out or "
                             f"--picture, or remove it")


def write(picture, file):
    """Save a PNG with the mark that `written_here` looks for; `spare` was called before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    picture.save(file, pnginfo=info)


def photographs(path):
    """The images at `path`, without the pictures that earlier calls wrote there."""
    found = data.Folder(path)
    kept = [i for i, file in enumerate(found.images) if not written_here(file)]
    found.images, found.ids = [found.images[i] for i in kept], [found.ids[i] for i in kept]
    if not kept:
        raise data.DataError(f"{path}: only pictures that eval.py wrote; give a folder of photographs")
    return found


def predict(network, checkpoint, args):
    """--predict: of each image a palette PNG of class indices at its own size, an overlay, and one legend."""
    colours, assignment = data.palette(), np.array(checkpoint["assignment"])
    found, out = photographs(args.predict), Path(args.out)
    if args.limit:
        found.limit(args.limit)
    names = Counter(["legend", *found.ids, *(f"{i}_overlay" for i in found.ids)])
    (name, times), = names.most_common(1)
    if times > 1:
        raise data.DataError(f"{args.predict}: {name}.png would be written twice (mask, and overlay "
                             f"or legend); rename that image")
    for name in names:                                    # before anything is written
        spare(out / f"{name}.png")
    write(page([], ["legend", *[""] * 5], checkpoint["names"], colours), out / "legend.png")
    unreadable = 0
    for i in range(len(found)):
        try:
            image = found.image(i)
        except data.DataError as error:                   # the others are still worth having
            print(f"eval.py: {error}", file=sys.stderr)
            unreadable += 1
            continue
        clusters = segment_image(network, image, checkpoint["rates"], checkpoint["args"]["size"],
                                 args.native, args.refine)
        mask = assignment[clusters]                                               # (H, W) of classes
        picture = Image.fromarray(mask.astype(np.uint8))
        picture.putpalette(colours.flatten().tolist())    # the file holds class indices, viewers show colours
        write(picture, out / f"{found.ids[i]}.png")
        overlay = Image.blend(Image.fromarray(image), Image.fromarray(colours[mask]), 0.5)
        write(overlay, out / f"{found.ids[i]}_overlay.png")
    n = len(found) - unreadable
    print(f"wrote {n} masks, {n} overlays and legend.png to {out}/")
    if unreadable:
        raise data.DataError(f"{args.predict}: {unreadable} of {len(found)} images have no mask, see above")


def compare(network, checkpoint, args):
    """--compare: the same images by several checkpoints side by side (Figs. 3 and 4)."""
    colours, columns = data.palette(), [(network, checkpoint)]
    for file in args.compare:
        other = load_checkpoint(file)
        if other["names"] != checkpoint["names"]:
            raise CheckpointError(f"{file}: has other classes than {args.checkpoint}; compare checkpoints of "
                                  f"one data set")
        columns.append((restore(other), other))
    if args.predict:
        source, truth = photographs(args.predict), False
    else:
        source, truth = open_split(checkpoint, args), (args.data or checkpoint["args"]["data"]) != "folder"
    rows = []                                             # each checkpoint at its own size, rates, assignment
    for i in range(min(len(source), args.limit or 6)):
        image = source.image(i)
        row = [data.squash(image, 160)]
        for net, c in columns:
            mask = segment_image(net, image, c["rates"], c["args"]["size"], args.native, args.refine)
            row.append(colours[np.array(c["assignment"])[data.squash(mask, 160, "nearest")]])
        rows.append(row + ([colours[data.squash(source.label(i), 160, "nearest")]] if truth else []))
    titles = ["image", *(str(Path(file).with_suffix(""))[-26:] for file in [args.checkpoint, *args.compare]),
              "truth"]
    write(page(rows, titles[:len(rows[0])], checkpoint["names"], colours), Path(args.picture))
    print(f"wrote {args.picture}: {len(rows)} images, {len(columns)} checkpoints")


def explain(network, checkpoint, args):
    """--explain: every stage of Fig. 2 for one photograph; CAM maps of the five largest clusters."""
    colours, assignment = data.palette(), np.array(checkpoint["assignment"])
    image = data.squash(data.open_image(args.explain, upright=True), checkpoint["args"]["size"])
    par = PAR(tuple(checkpoint["args"]["par"])) if checkpoint["args"]["par"] else None
    attention, maps, *masks = stages(network, checkpoint, image[None], par)
    # clusters count from 0, classes from the background
    size, first = image.shape[0], int(checkpoint["background"])
    found = np.bincount(masks[0].flatten(), minlength=first + maps.shape[1])[first:].argsort()[::-1][:5]
    top = [image, grey(attention[0], size), *(grey(maps[0, k] / maps.max(), size) for k in found)]
    blank = np.full_like(image, 255)
    low = []
    for title, mask in zip(("CAM label", "teacher", "fused, PAR" if par else "fused", "student"), masks):
        if title == "teacher" and not checkpoint["teacher_on"]:
            continue                                      # an untrained head, or not yet in use
        tile = Image.fromarray(colours[assignment[mask[0]]]).resize((160, 160), Image.NEAREST)
        ImageDraw.Draw(tile).text((4, 2), title, "white", stroke_width=1, stroke_fill="black")
        low.append(np.array(tile))
    titles = ["image", "attention"] + [f"CAM: {checkpoint['names'][assignment[k + first]]}" for k in found]
    titles += [""] * (4 - len(titles))
    rows = [row + [blank] * (len(titles) - len(row)) for row in (top, low)]
    write(page(rows, titles, checkpoint["names"], colours), Path(args.picture))
    print(f"wrote {args.picture}: every stage of Fig. 2 for {args.explain}")


def open_split(checkpoint, args):
    """The validation split that --data and --root name; the checkpoint's own by default."""
    trained = checkpoint["args"]
    source = data.dataset(args.data or trained["data"], args.root or trained["root"], "val",
                          trained["classes"], trained["seed"])
    if args.limit:
        source.limit(args.limit)
    if len(source.names) != len(checkpoint["names"]):
        raise CheckpointError(f"{args.checkpoint}: has {len(checkpoint['names'])} classes, the data set "
                              f"{len(source.names)}")
    return source


def parse(argv=None):
    p = argparse.ArgumentParser(description="Score, predict with, explain or compare checkpoints.",
                                allow_abbrev=False, epilog=__doc__.split("\n\n")[1],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", help="last.pt or best.pt of a run")
    p.add_argument("--data", choices=data.NAMES, help="data set to score on (default: the one trained on)")
    p.add_argument("--root", help="its folder (default: the one trained with)")
    p.add_argument("--limit", type=int, metavar="N",
        help="the first N images (default: all; 6 for --compare)")
    p.add_argument("--native", action="store_true",
        help="the images' own size instead of squares (labels too)")
    p.add_argument("--par", action="store_true", help="refine the prediction with PAR, dilations 1, 2, 4, 8")
    p.add_argument("--predict", metavar="PATH", help="segment this image or folder")
    p.add_argument("--out", default="masks", metavar="DIR", help="folder for --predict (default: masks)")
    p.add_argument("--explain", metavar="PHOTO", help="draw every stage of Fig. 2 for it")
    p.add_argument("--compare", nargs="+", metavar="CHECKPOINT",
        help="other checkpoints to put beside this one")
    p.add_argument("--picture", metavar="PNG",
        help="file of --explain and --compare (default: explain.png, compare.png)")
    args = p.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        p.error(f"--limit {args.limit}: must be at least 1")
    if "" in (args.predict, args.explain):
        p.error("--predict, --explain: an empty name")
    if args.explain and (args.predict or args.compare):
        p.error("--explain: takes one photograph; run --predict or --compare by itself")
    args.picture = args.picture or ("explain.png" if args.explain else "compare.png")
    if not args.picture.lower().endswith(".png"):
        p.error(f"--picture {args.picture}: must end in .png")
    args.refine = PAR((1, 2, 4, 8)) if args.par else None
    return args


def main():
    args = parse()
    try:
        checkpoint = load_checkpoint(args.checkpoint)
        if args.compare or args.explain:
            spare(Path(args.picture))
        network = restore(checkpoint)
        if args.compare:
            compare(network, checkpoint, args)
        elif args.explain:
            explain(network, checkpoint, args)
        elif args.predict:
            predict(network, checkpoint, args)
        elif (args.data or checkpoint["args"]["data"]) == "folder":
            raise CheckpointError(f"{args.checkpoint}: a folder has no labels: nothing to score; "
                                  f"use --predict")
        else:
            source, trained = open_split(checkpoint, args), checkpoint["args"]
            size = trained["size"]
            total = torch.zeros(len(source.names), len(source.names), dtype=torch.int64)
            for i in range(len(source)):
                image, label = source.image(i), source.label(i)
                if not args.native:
                    image, label = data.squash(image, size), data.squash(label, size, "nearest")
                mask = segment_image(network, image, checkpoint["rates"], size, args.native, args.refine)
                total += confusion_matrix(label, mask, len(source.names))
            report(scores(total), source.names)
            print(f"epoch {checkpoint['epoch']}, rates {checkpoint['rates']}, {len(source)} images at "
                  f"{'their own size' if args.native else f'{size} x {size}'}"
                  + (f" (training scored the first {trained['limit']})" if trained["limit"] else ""))
    except (data.DataError, WeightsError, CheckpointError) as error:
        sys.exit(print(f"eval.py: {error}", file=sys.stderr) or 2)
    except OSError as error:
        where, why = error.filename or args.out, error.strerror or error
        sys.exit(print(f"eval.py: {where}: {why}; mend that, or choose another --out or --picture",
                       file=sys.stderr) or 2)


if __name__ == "__main__":
    main()
