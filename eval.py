"""Hungarian-matched scores, predictions and pictures of a trained checkpoint.

    python eval.py runs/voc/best.pt                                # per-class IoU, mIoU, accuracy, assignment
    python eval.py runs/voc/best.pt --native --par                 # at the images' own size, refined by PAR
    python eval.py runs/voc/best.pt --predict photos --out masks   # NAME_mask.png, NAME_overlay.png of each
    python eval.py runs/voc/best.pt --explain photo.jpg            # every stage of Fig. 2 for one photograph
    python eval.py A.pt --compare B.pt C.pt --predict photos       # checkpoints side by side (Figs. 3 and 4)
    python eval.py runs/folder/last.pt --clusters                  # what each cluster shows: RUN/clusters.png

    confusion_matrix() -> hungarian() -> scores() -> checkpoint, network, masks -> pictures -> the program

Clusters have no names. An assignment of clusters to classes, one to one, is found on the labelled split so
that most pixels are right (Hungarian matching), and only then is anything scored. This is TransFGU's protocol
(decision 20, which is row 20 of docs/decisions.md). A cluster here is a channel of the prediction, be it the
background's. A run on a folder has no labels: there clusters are classes, and a user names them in names.txt.
"""

import argparse
import json
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)          # Ctrl-C: no traceback

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from scipy.ndimage import distance_transform_edt, maximum_filter, minimum_filter
from scipy.optimize import linear_sum_assignment

import cam
import data
import losses
from aspp import TABLE_1
from data import UserError
from model import BACKBONES, DMSA, VisionTransformer, normalise, read_tensors
from par import PAR

GROUP = 8                                                 # images of one forward pass
MOST = 1024                                               # pixels: longest side of masks and --native images
ROWS = {",".join(map(str, rates)): list(rates) for rates in TABLE_1.values()}     # "1,1,2,3": [1, 1, 2, 3]
SHEET = 500                                               # images that clusters.png is made from, at most


# ----------------------------------------------------------------------------
# Scores


def confusion_matrix(label, prediction, n, k=None):
    """Count pixels: (n, k) int64 [truth, prediction]; k: how many clusters, default n.

    label, prediction   equal shapes, numpy or torch integers; labels outside 0..n-1 (void) do not count
    raises              ValueError for predictions outside 0..k-1
    """
    k = k or n
    label, prediction = torch.as_tensor(label).flatten().long(), torch.as_tensor(prediction).flatten().long()
    valid = (label >= 0) & (label < n)                    # void, 255, is neither right nor wrong
    if label.shape != prediction.shape or ((prediction < 0) | (prediction >= k))[valid].any():
        raise ValueError(f"prediction: a cluster in 0..{k - 1} expected for each of {len(label)} labels")
    return torch.bincount(label[valid] * k + prediction[valid], minlength=n * k).view(n, k)


def hungarian(confusion):
    """For every predicted cluster its class: (k,) int64, one to one, so that most pixels are right.

    confusion (n, k) [truth, prediction], k >= n. All classes take part, the background included. The k - n
    clusters that are left over have -1.
    """
    confusion = np.asarray(confusion)
    truth, cluster = linear_sum_assignment(confusion, maximize=True)
    assignment = np.full(confusion.shape[1], -1)          # indexed by cluster, as predictions are
    assignment[cluster] = truth
    return assignment


def scores(confusion):
    """Scores after Hungarian matching, percent, of a confusion matrix (n, k).

    returns  {"miou", "accuracy", "iou": (n,), "assignment": (k,), "clusters": in use, "entropy": of the
             predicted shares, 0 when everything is one cluster, 1 when all are equally frequent}
    raises   UserError if no pixel has a label

    With more clusters than classes, k > n, those left over count as wrong. They have the class of most of
    their pixels in "assignment", for pictures; and "many_miou" and "many_accuracy" are the scores if every
    cluster has the class of most of its pixels (many to one).

    IoU = TP / (TP + FP + FN). The mean leaves out classes that are neither in truth nor in the prediction
    (NaN here); a class that is only predicted counts 0 (TransFGU; others average over the classes in truth).
    """
    confusion = np.asarray(confusion)
    if not confusion.any():
        raise UserError("no labelled pixel: the labels are nothing but void (255); check their folder")
    assignment, many = hungarian(confusion), confusion.argmax(0)

    def scored(assignment):
        # columns become classes, as rows are; the pixels of clusters without a class are in none
        matched = confusion @ (assignment[:, None] == np.arange(len(confusion)))  # (n, n)
        right = np.diag(matched)
        union = matched.sum(0) + confusion.sum(1) - right
        iou = 100 * np.divide(right, union, out=np.full(len(union), np.nan), where=union > 0)
        return {"miou": float(np.nanmean(iou)), "iou": iou,
                "accuracy": float(100 * right.sum() / confusion.sum())}

    share = confusion.sum(0) / confusion.sum()            # (k,) of each cluster in the prediction
    entropy = -(share[share > 0] * np.log(share[share > 0])).sum() / np.log(len(share))
    found = scored(assignment) | {
        "assignment": np.where(assignment < 0, many, assignment),
        "clusters": int((share > 0).sum()), "entropy": float(entropy + 0.0)}                      # no -0.0
    if len(share) > len(confusion):
        found |= {f"many_{name}": scored(many)[name] for name in ("miou", "accuracy")}
    return found


# ----------------------------------------------------------------------------
# Checkpoint -> network -> masks


def load_checkpoint(file, rates="epoch"):
    """The dict that train.py saved: tensors and plain values. Raises WeightsError, UserError.

    rates    those of ASPP to use, as ROWS has them; "epoch": of the epoch that the checkpoint is of
    """
    checkpoint, _ = read_tensors(file)
    needed = {"student", "teacher", "vit", "args", "names", "epoch", "rates", "assignment", "centroids",
              "background", "teacher_on"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise UserError(f"{file}: not a checkpoint of train.py; give last.pt or best.pt of a run")
    checkpoint["args"] = {"aspp_scale": 1.0, "coarse": "soft"} | checkpoint["args"]               # older runs
    if rates != "epoch":
        checkpoint["rates"] = ROWS[rates]
    return checkpoint


def available(device):
    """"cuda" or "cpu", whichever --device asks for; "auto": the GPU if there is one. Raises UserError."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine shows no GPU to torch; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def named(checkpoint, file):
    """The checkpoint with the class names that a user gave in names.txt beside its file, if it is there.

    A line is `NUMBER = NAME`, the number as in NAME_mask.png; an empty one or one with # is skipped. Classes
    of one name become one, which has the first of their numbers. Raises UserError naming file and line.
    """
    file, names = Path(file).with_name("names.txt"), list(checkpoint["names"])
    if not file.exists():
        return checkpoint
    if checkpoint["args"]["data"] != "folder":
        raise UserError(f"{file}: {checkpoint['args']['data']} has class names of its own; remove this file")
    index = {str(i): i for i in range(len(names))}
    for n, line in enumerate(file.read_bytes().splitlines(), 1):
        line = line.decode("utf-8-sig", errors="replace").strip()
        number, _, name = map(str.strip, line.partition("="))
        if line and not line.startswith("#"):
            if number not in index or not name or "\ufffd" in name:
                raise UserError(f"{file}: line {n}: {line[:40]!r}: NUMBER = NAME expected, in UTF-8, each "
                                f"number from 0 to {len(names) - 1} at most once")
            names[index.pop(number)] = name
    return checkpoint | {"names": names, "assignment": [names.index(name) for name in names]}


def restore(checkpoint, device="auto"):
    """The network of a checkpoint, in eval mode; device as in `available`."""
    args = checkpoint["args"]                             # the options that the run was given, plain values
    vit = VisionTransformer(**BACKBONES[args["backbone"]][0])
    network = DMSA(vit, len(checkpoint["assignment"]), args["aspp"] != "none", aspp_scale=args["aspp_scale"])
    try:
        for name in ("vit", "student", "teacher"):
            getattr(network, name).load_state_dict(checkpoint[name])
    except (RuntimeError, TypeError):                     # other tensors, or none
        raise UserError(f"this checkpoint's {name} does not fit its own options; use another one") from None
    torch.backends.cudnn.allow_tf32 = False               # full fp32 on GPUs too, as in training
    return network.to(available(device)).eval()


@torch.no_grad()
def head_logits(network, rates, features, heads=None):
    """Logits of each head, default the student's alone: x, msa of `DMSA.features` -> (heads, B, N, h, w)."""
    return torch.stack([network.decode(head, features, rates)[0] for head in heads or [network.student]])


def enlarged(logits, size):
    """Logits or probabilities (heads, B, N, h, w) -> (heads, B, N, *size), size (rows, columns)."""
    return torch.stack([F.interpolate(of_head, size=size, mode="bilinear") for of_head in logits])


@torch.no_grad()
def mask_logits(network, rates, image, mask_size, par=None, flip=False, heads=None):
    """Logits of every pixel by each head: uint8 (B, H, W, 3) -> (heads, B, N, *mask_size).

    rates       of ASPP; mask_size: (rows, columns) that the logits are enlarged to
    par         a PAR; the probabilities that it refines, at the image's size, are returned instead of logits
    flip        logits are the mean of those of the image and those of its mirror image, mirrored back
    heads       of the network; default the student's alone
    """
    logits_of = lambda image: head_logits(network, rates, network.features(normalise(image)), heads)
    image = data.to_float(image, network.vit.cls_token.device)                    # (B, 3, H, W)
    logits = logits_of(image)                             # (heads, B, N, h, w)
    if flip:
        logits = (logits + logits_of(image.flip(3)).flip(4)) / 2
    if par is not None:
        logits = torch.stack([par(image, of_head.softmax(1)) for of_head in logits])
    return enlarged(logits, mask_size)


def segment(*inputs, **options):
    """Cluster of every pixel, the arg max of `mask_logits`: uint8 (heads, B, *mask_size)."""
    return mask_logits(*inputs, **options).argmax(2).byte()


def groups(n, rank=0, world=1):
    """This process's share of 0..n-1, in groups that do not depend on the number of processes."""
    # sliced, not padded to equal shares as DistributedSampler does: no image counts twice
    starts = range(0, n, GROUP)[rank::world]
    return [range(start, min(start + GROUP, n)) for start in starts]


class Progress:
    """Says how far a stage is and how long it will take: on a terminal each second, else each half minute.

    Called with the number of steps that are done, of `total`. A terminal shows the last line only.
    """

    def __init__(self, stage, total):
        self.stage, self.total, self.start = stage, total, time.time()
        self.told = self.start

    def __call__(self, done):
        now, terminal = time.time(), sys.stdout.isatty()
        if done == self.total:
            print(end="\x1b[K" if terminal else "", flush=True)               # clears the line
        elif now - self.told > (1 if terminal else 30):
            self.told, left = now, (now - self.start) / done * (self.total - done)
            print(f"{self.stage} {done} of {self.total}, {now - self.start:.0f} s, about {left:.0f} s left",
                  end="\x1b[K\r" if terminal else "\n", flush=True)


def evaluate(labelled, predict, n, k=None, heads=1):
    """Confusion matrices over `labelled`: pairs of what `predict` takes and labels (b, H, W) uint8.

    predict   (inputs, (H, W)) -> clusters (heads, b, H, W): `segment` with a network, or what else is scored
    n, k      how many classes; how many clusters, default n
    returns   (heads, n, k) int64
    """
    total = torch.zeros(heads, n, k or n, dtype=torch.int64)
    for inputs, labels in labelled:
        for head, clusters in enumerate(predict(inputs, labels.shape[1:]).cpu()):
            total[head] += confusion_matrix(labels, clusters, n, k)
    return total


def reduced(image, unit=1):
    """(rows, columns) of an image (H, W, 3) at most MOST pixels a side, each in whole units of pixels."""
    shrink = min(1, MOST / max(image.shape[:2]))
    return tuple(max(unit, round(side * shrink / unit) * unit) for side in image.shape[:2])


def whole_patches(image, patch):
    """Resize an image to whole patches, of which the ViT drops none, and to at most MOST pixels a side."""
    h, w = reduced(image, patch)
    return np.array(Image.fromarray(image).resize((w, h), Image.BILINEAR))


def segment_photograph(network, image, checkpoint, native=False, **how):
    """Classes of one image of any size: uint8 (H, W, 3) -> uint8 (H, W).

    The network sees it squashed to the size that it was trained with or, `native`, in its own shape, whole
    patches and at most MOST pixels a side. Logits, or with PAR probabilities, are made at up to MOST pixels a
    side and enlarged from there, one cluster at a time: all at once a photograph of 12 megapixels and 20
    clusters would take 1 GB.
    how: as `mask_logits`
    """
    if native:
        seen = whole_patches(image, network.vit.patch_size)
    else:
        seen = data.squash(image, checkpoint["args"]["size"], antialias=True)
    logits = mask_logits(network, checkpoint["rates"], seen[None], reduced(image), **how)[0, 0].cpu()
    mask = np.zeros(image.shape[:2], np.uint8)            # (H, W); logits (N, h, w)
    most = np.full(mask.shape, -np.inf, np.float32)
    for cluster in logits.argmax(0).unique():             # those that are anywhere the most likely
        plane = np.asarray(Image.fromarray(logits[cluster].numpy()).resize(mask.shape[::-1], Image.BILINEAR))
        mask[plane > most] = checkpoint["assignment"][cluster]
        np.maximum(most, plane, out=most)
    return mask


# ----------------------------------------------------------------------------
# Pictures


class Stages(NamedTuple):
    """Every stage of Fig. 2 for B images, on the CPU; labels in clusters."""
    attention: torch.Tensor      # (B, h, w) in 0..1
    maps: torch.Tensor           # (B, K, h, w), Eq. 5
    coarse: np.ndarray           # (B, S, S), CAM alone
    teacher: np.ndarray          # (B, S, S)
    pseudo: np.ndarray           # (B, S, S), fused, refined
    student: np.ndarray          # (B, S, S)


@torch.no_grad()
def stages(network, checkpoint, image):
    """The Stages of squashed images uint8 (B, S, S, 3), whole, where training sees crops."""
    args, background = checkpoint["args"], checkpoint["background"]
    device, rates = network.vit.cls_token.device, checkpoint["rates"]
    pixels = data.to_float(image, device)                                         # (B, 3, S, S)
    normalised = normalise(pixels)
    enlarge = lambda masks: F.interpolate(masks, size=pixels.shape[2:], mode="bilinear")
    par = run_par(checkpoint)
    refine = partial(par, pixels) if par else enlarge
    _, A = network.vit(normalised)                                                # (B, heads, 1 + hw)
    attention = A[:, :, 1:].mean(1).unflatten(1, network.vit.grid(normalised))    # (B, h, w)
    maps = cam.class_activation_maps(network.vit, normalised, checkpoint["centroids"].to(device))
    features, scaled = network.features(normalised), losses.min_max(maps)         # (B, K, h, w)
    teacher, _ = network.decode(network.teacher, features, rates)                 # (B, N, h, w)
    student, _ = network.decode(network.student, features, rates)                 # (B, N, h, w)
    how = args["teacher_weight"], background, args["threshold"]
    coarse, _ = losses.pseudo_label(scaled, None, enlarge, *how)                  # (B, S, S)
    pseudo, _ = losses.pseudo_label(scaled, teacher if checkpoint["teacher_on"] else None, refine, *how,
                                    par is not None and args["coarse"] == "hard")
    masks = coarse, enlarge(teacher).argmax(1), pseudo, enlarge(student).argmax(1)
    return Stages((attention / attention.amax((1, 2), keepdim=True)).cpu(), maps.cpu(),
                  *(mask.cpu().numpy() for mask in masks))


def run_par(checkpoint):
    """The PAR that a run's pseudo labels were refined by, or None."""
    return PAR(tuple(checkpoint["args"]["par"])) if checkpoint["args"]["par"] else None


def grey(maps, size):
    """(h, w) in 0..1 -> uint8 (size, size, 3), so that the patches can be seen."""
    tile = Image.fromarray((np.asarray(maps).clip(0, 1) * 255).astype(np.uint8)).convert("RGB")
    return np.array(tile.resize((size, size), Image.NEAREST))


def page(rows, titles, names, cell=160):
    """A picture of rows of uint8 (S, S, 3) tiles under titles, with a legend of the classes."""
    gap, head, columns, colours = 6, 24, len(titles), data.palette()
    legend = [i for i, name in enumerate(names) if names.index(name) == i]        # see `named`
    lines = -(-len(legend) // columns)
    width, height = columns * (cell + gap) + gap, head + len(rows) * (cell + gap) + 18 * lines + gap
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((gap + column * (cell + gap), 8), title, "black")
    for r, row in enumerate(rows):
        for column, tile in enumerate(row):
            tile = Image.fromarray(tile).resize((cell, cell), Image.NEAREST)
            sheet.paste(tile, (gap + column * (cell + gap), head + r * (cell + gap)))
    for place, i in enumerate(legend):
        line, column = divmod(place, columns)
        x, y = gap + column * (cell + gap), head + len(rows) * (cell + gap) + 18 * line
        pen.rectangle([x, y + 1, x + 12, y + 13], fill=tuple(colours[i].tolist()), outline="grey")
        pen.text((x + 16, y + 1), names[i][:24], "black")
    return sheet


def outlined(image, mask, names=None):
    """A photograph with its mask: uint8 (H, W, 3), classes (H, W), or VOID -> a picture of its size.

    Classes are tinted and outlined, with a white line around. Where the mask is VOID the photograph stays as
    it is. With `names` each class of more than 0.2 % is named where it is widest.
    """
    size, longest, tint = np.array(mask.shape[::-1]), max(mask.shape), data.palette()[mask]
    picture = np.array(Image.blend(Image.fromarray(image), Image.fromarray(tint), 0.4))
    width, letters, step = 1 + 2 * max(1, longest // 400), max(10, longest // 40), 1 + longest // 256
    edge, rest = maximum_filter(mask, width) != minimum_filter(mask, width), mask == data.VOID
    picture[edge], picture[rest], picture[edge & rest] = tint[edge], image[rest], 255
    picture, small = Image.fromarray(picture), np.pad(mask[::step, ::step], 1, constant_values=data.VOID)
    pen = ImageDraw.Draw(picture)
    pixels = np.bincount(small.flatten(), minlength=256)[:data.VOID]
    for c in np.flatnonzero(500 * pixels > small.size) if names else ():          # specks have no name
        y, x = np.unravel_index(distance_transform_edt(small == c).argmax(), small.shape)
        half = np.array([pen.textlength(names[c], font_size=letters) / 2, letters])   # keep it inside
        at = np.clip([(x - 1) * step, (y - 1) * step], half, np.maximum(size - half, half))
        pen.text(tuple(at), names[c], "white", anchor="mm", font_size=letters, stroke_width=letters // 8,
                 stroke_fill="black")
    return picture


def cluster_sheet(network, checkpoint, source, cell=160, columns=6):
    """A picture: of each class number, name and share, and the images that show it most, the rest darkened.

    source     training data set, whose images are squashed as in training. Each weighs the same; of more than
               SHEET every n-th is taken
    """
    names, assignment = checkpoint["names"], np.array(checkpoint["assignment"], np.uint8)
    chosen, size, rows = np.arange(0, len(source), -(-len(source) // SHEET)), checkpoint["args"]["size"], []
    masks = np.concatenate([segment(
        network, checkpoint["rates"], np.stack([source.squashed(i, size) for i in chosen[group]]),
        (size, size))[0].cpu() for group in groups(len(chosen))])
    masks = assignment[masks]                             # (n, S, S)
    pixels = np.stack([np.bincount(mask.flatten(), minlength=len(names)) for mask in masks])      # (n, N)
    for c in np.unique(assignment):
        text = Image.new("RGB", (cell, cell), tuple(data.palette()[c].tolist()))
        ImageDraw.Draw(text).text(
            (8, 8), f"{c}\n{names[c][:20]}\n{100 * pixels[:, c].sum() / pixels.sum():.1f} % of all pixels\n"
            f"in {(pixels[:, c] > 0).sum()} of {len(chosen)} images", "white", font_size=14, stroke_width=2,
            stroke_fill="black")
        rows.append([np.array(text)])
        for i in (-pixels[:, c]).argsort(kind="stable")[:min(columns, (pixels[:, c] > 0).sum())]:
            photo = Image.fromarray(source.image(chosen[i]))
            photo.thumbnail((cell, cell))
            mask = np.array(Image.fromarray(masks[i]).resize(photo.size, Image.NEAREST))
            tile = outlined(np.array(photo), np.where(mask == c, data.VOID, 0).astype(np.uint8))
            rows[-1].append(np.array(ImageOps.pad(tile, (cell, cell), color="white")))
    return page(rows, ["class", "images that show it most", *[""] * (columns - 1)], [], cell)


def panels(network, checkpoint, images, labels):
    """A picture of image, attention, coarse and pseudo label, prediction and truth.

    images uint8 (B, S, S, 3); labels (B, S, S) or None
    """
    colours, found = data.palette(), stages(network, checkpoint, images)
    coloured = lambda clusters: colours[np.array(checkpoint["assignment"])[clusters]]
    rows = []
    for i in range(len(images)):
        row = [images[i], grey(found.attention[i], images.shape[1])]
        row += [coloured(mask[i]) for mask in (found.coarse, found.pseudo, found.student)]
        rows.append(row + ([colours[labels[i]]] if labels is not None else []))
    titles = ["image", "attention", "coarse label", "pseudo label", "prediction", "truth"]
    return page(rows, titles[:len(rows[0])], checkpoint["names"])


def curves(log):
    """A picture of the losses and scores of log.jsonl by epoch, in two plots."""
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
    sheet = Image.new("RGB", (450 * len(plots), 340), "white")
    for p, (title, lines) in enumerate(plots):
        plot(ImageDraw.Draw(sheet), 50 + 450 * p, title, lines)
    return sheet


def plot(pen, left, title, lines, axis="epoch"):
    """One plot of lines {name: [(epoch, value), ...]} with its axes, drawn by `pen`."""
    top, width, height = 40, 380, 250
    colours = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#222222")
    values = [value for line in lines.values() for _, value in line]
    epochs = sorted({epoch for line in lines.values() for epoch, _ in line})
    last = epochs[-1]
    grain = next(g for g in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if max(values) <= 6 * g or g == 100)
    marks = np.arange(np.floor(min(0.0, *values) / grain), np.ceil(max(values) / grain) + 1) * grain
    low, high = marks[0], marks[-1]
    at = lambda epoch, value: (left + width * epoch / last, top + height * (1 - (value - low) / (high - low)))
    pen.rectangle([left, top, left + width, top + height], outline="#bbbbbb")
    pen.text((left, 8), title, "black")
    for mark in marks:
        pen.text((left - 42, at(0, mark)[1] - 6), f"{mark:g}", "#666666")
        pen.line([at(0, mark), at(last, mark)], fill="#eeeeee")
    pen.text((left - 42, top + height + 6), axis, "#666666")
    for epoch in epochs[::-len(epochs) // 12]:            # twelve at most, from the last back
        pen.text((at(epoch, low)[0] - 3 * len(str(epoch)), top + height + 6), str(epoch), "#666666")
    for i, (name, line) in enumerate(lines.items()):
        points = [at(*point) for point in line]
        if len(points) > 1:
            pen.line(points, fill=colours[i], width=2)
        for x, y in points:
            pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colours[i])
        pen.text((left + 70 * i, top + height + 22), name, colours[i])


# ----------------------------------------------------------------------------
# The program


def open_split(checkpoint, args, split="val"):
    """The split of the data set that --data and --root name; the checkpoint's own by default."""
    trained = checkpoint["args"]
    source = data.dataset(args.data or trained["data"], args.root or trained["root"], split,
                          len(checkpoint["names"]) - 1, trained["seed"])          # of a folder, K
    if args.limit:
        source.limit(args.limit)
    if len(source.names) != len(checkpoint["names"]):
        raise UserError(f"{args.checkpoint}: has {len(checkpoint['names'])} classes, the data set "
                        f"{len(source.names)}; give the data set that it was trained on")
    return source


def score(network, checkpoint, args):
    """Print the table of classes and the scores on the validation split."""
    source, size = open_split(checkpoint, args), checkpoint["args"]["size"]

    if args.native:                                       # one by one, each at its own size
        labelled = ((whole_patches(source.image(i), network.vit.patch_size)[None], source.label(i)[None])
                    for i in range(len(source)))
    else:
        labelled = ((np.stack([source.squashed(i, size) for i in group]),
                     np.stack([data.squash(source.label(i), size, "nearest") for i in group]))
                    for group in groups(len(source)))
    predict = partial(segment, network, checkpoint["rates"], **args.how)
    confusion = evaluate(labelled, predict, len(source.names), len(checkpoint["assignment"]))[0]
    result = scores(confusion)
    cluster_of = {int(c): k for k, c in enumerate(hungarian(confusion))}  # class -> cluster
    print("class                 cluster     IoU")
    for i, name in enumerate(source.names):
        iou = "absent" if np.isnan(result["iou"][i]) else f"{result['iou'][i]:6.2f}"
        print(f"{name:20}  {cluster_of[i]:7}  {iou}")
    print(f"mIoU {result['miou']:.2f}  accuracy {result['accuracy']:.2f}  "
          f"clusters in use {result['clusters']} of {len(checkpoint['assignment'])}")
    if "many_miou" in result:
        print("many to one, each cluster as the class of most of its pixels: mIoU {many_miou:.2f}  "
              "accuracy {many_accuracy:.2f}".format_map(result))
    trained = checkpoint["args"]["limit"]
    print(f"epoch {checkpoint['epoch']}, rates {checkpoint['rates']}, {len(source)} images at "
          f"{'their own size' if args.native else f'{size} x {size}'}"
          + (f" (training scored the first {trained})" if trained else ""))


def outside(out, *photographs):
    """Raise UserError if the folder `out` lies in one of these folders or is that of one of these files."""
    for path in map(Path, photographs):
        folder = (path if path.is_dir() else path.parent).resolve()
        place = Path(out).resolve()
        if place == folder or path.is_dir() and place.is_relative_to(folder):
            raise UserError(f"--out {out}: lies in the folder of photographs {folder}, where its pictures "
                            f"would be taken for photographs; give a folder outside")


def out_folder(args, *photographs):
    """--out, made if it is not there, outside the photographs."""
    outside(args.out, *photographs)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    return Path(args.out)


def predict(network, checkpoint, args):
    """--predict: of each image a palette PNG of class indices of its size, an overlay, shares of classes."""
    colours, names, found = data.palette(), checkpoint["names"], data.Folder(args.predict)
    if args.limit:
        found.limit(args.limit)
    number_of = {name: i for i, name in enumerate(found.ids)}                     # one given twice: once
    for name, file in zip(found.ids, found.images):
        other = found.images[number_of[name]]
        if other != file:
            raise UserError(f"{file}: named like {other}, and so would their masks be; rename one")
    out, shares = out_folder(args, *args.predict), {}
    page([], ["legend", *[""] * 5], names).save(out / "legend.png")
    progress = Progress("masks: photograph", len(number_of))
    for done, (name, i) in enumerate(number_of.items()):
        progress(done)
        try:
            image = found.image(i)
        except UserError as error:                        # the others are still worth having
            data.report(error)
            continue
        mask = segment_photograph(network, image, checkpoint, args.native, **args.how)            # (H, W)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(mask).resize(data.upright_size(found.images[i]), Image.NEAREST)
        picture.putpalette(colours.flatten().tolist())    # the file holds class indices, viewers show colours
        picture.save(out / f"{name}_mask.png")
        shown = np.where(mask > 0, mask, data.VOID).astype(np.uint8) if checkpoint["background"] else mask
        # by default Pillow takes longer to compress a photograph than all else here takes
        outlined(image, shown, names).save(out / f"{name}_overlay.png", compress_level=1)
        counts = np.bincount(mask.flatten(), minlength=len(names)) / mask.size
        shares[name] = {names[c]: round(float(counts[c]), 4) for c in np.flatnonzero(counts)}
    progress(len(number_of))
    (out / "predictions.json").write_text(json.dumps(shares, indent=1))
    print(f"wrote {len(shares)} masks, {len(shares)} overlays, legend.png and predictions.json to {out}/")
    if len(shares) < len(number_of):
        raise UserError(f"{len(number_of) - len(shares)} of {len(number_of)} images have no mask, see above")


def compare(network, checkpoint, args):
    """--compare: the same images by several checkpoints side by side (Figs. 3 and 4)."""
    colours, columns = data.palette(), [(network, checkpoint)]
    for file in args.compare:
        other = named(load_checkpoint(file, args.rates), file)
        if other["names"] != checkpoint["names"]:
            raise UserError(f"{file}: has other classes than {args.checkpoint}; compare checkpoints of one "
                            f"data set")
        columns.append((restore(other, args.device), other))
    source = data.Folder(args.predict) if args.predict else open_split(checkpoint, args)
    rows = []
    for i in range(min(len(source), args.limit or 6)):
        image = source.image(i)
        masks = [*(segment_photograph(net, image, c, args.native, **args.how) for net, c in columns),
                 source.label(i)]                         # None without labels
        tiles = [colours[data.squash(mask, 160, "nearest")] for mask in masks if mask is not None]
        rows.append([data.squash(image, 160), *tiles])
    runs = [str(Path(file).with_suffix("")) for file in [args.checkpoint, *args.compare]]
    titles = ["image", *(run if len(run) < 25 else f"..{run[-22:]}" for run in runs), "truth"]
    file = out_folder(args, *args.predict or ()) / "compare.png"
    page(rows, titles[:len(rows[0])], checkpoint["names"]).save(file)
    print(f"wrote {file}: {len(rows)} images, {len(columns)} checkpoints")


def clusters(network, checkpoint, args):
    """--clusters: clusters.png beside the checkpoint, as a run on a folder draws it at its end."""
    args.limit = args.limit or checkpoint["args"]["limit"]
    file = Path(args.checkpoint).with_name("clusters.png")
    cluster_sheet(network, checkpoint, open_split(checkpoint, args, "train")).save(file)
    print(f"wrote {file}: what each cluster shows in the training images")


def explain(network, checkpoint, args):
    """--explain: every stage of Fig. 2 for one photograph; CAM maps of the five largest, background aside."""
    colours, assignment, names = data.palette(), np.array(checkpoint["assignment"]), checkpoint["names"]
    size = checkpoint["args"]["size"]
    image = data.squash(data.open_image(args.explain, True, least=2 * size), size, antialias=True)
    found = stages(network, checkpoint, image[None])
    first = int(checkpoint["background"])                 # map k is channel k + first; channel 0: background
    K = found.maps.shape[1]
    largest = np.bincount(found.coarse.flatten(), minlength=first + K)[first:].argsort()[::-1][:5]
    top = [image, grey(found.attention[0], size)]
    top += [grey(found.maps[0, k] / found.maps.max(), size) for k in largest]
    masks = {"coarse label": found.coarse, "teacher": found.teacher, "pseudo label": found.pseudo,
             "prediction": found.student}
    if not checkpoint["teacher_on"]:
        del masks["teacher"]                              # an untrained head, or not yet in use
    low = []
    for title, mask in masks.items():
        tile = Image.fromarray(colours[assignment[mask[0]]]).resize((160, 160), Image.NEAREST)
        ImageDraw.Draw(tile).text((4, 2), title, "white", stroke_width=1, stroke_fill="black")
        low.append(np.array(tile))
    titles = ["image", "attention"] + [f"CAM: {names[assignment[k + first]]}" for k in largest]
    file = out_folder(args, args.explain) / "explain.png"
    page([top, low], titles, names).save(file)
    print(f"wrote {file}: every stage of Fig. 2 for {args.explain}")


def parse(argv=None):
    p = argparse.ArgumentParser(description="Score, predict with, explain or compare checkpoints.",
                                usage=argparse.SUPPRESS, allow_abbrev=False, epilog=__doc__.split("\n\n")[1],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", help="last.pt or best.pt of a run")
    p.add_argument("--data", choices=data.NAMES, help="data set to score on (default: the one trained on)")
    p.add_argument("--root", help="its folder (default: the one trained with)")
    p.add_argument("--limit", type=int, metavar="N",
        help="the first N images (default: all; 6 for --compare; the run's own for --clusters)")
    p.add_argument("--native", action="store_true",
        help="the images' own size instead of squares (labels too)")
    p.add_argument("--par", action="store_true",
        help="refine the prediction with PAR, by the run's own dilations, or 1 2 4 8 if it has none (with "
             "--compare all by those of the first)")
    p.add_argument("--flip", action="store_true",
        help="logits are the mean over the image and its mirror image")
    p.add_argument("--rates", choices=("epoch", *ROWS), default="epoch",
        help="of ASPP, a row of Table 1 (default: that of the checkpoint's epoch)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto: cuda if there is one (default)")
    p.add_argument("--predict", nargs="+", metavar="PATH", help="segment these images and folders")
    p.add_argument("--explain", metavar="PHOTO", help="draw every stage of Fig. 2 for it: explain.png")
    p.add_argument("--clusters", action="store_true",
        help="draw the training images that show each cluster most: clusters.png beside the checkpoint")
    p.add_argument("--compare", nargs="+", metavar="CHECKPOINT",
        help="other checkpoints to put beside this one: compare.png")
    p.add_argument("--out", default="masks", metavar="DIR",
        help="folder for all else that is written (default: masks)")
    args = p.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        p.error(f"--limit {args.limit}: must be at least 1")
    if "" in (args.predict or [args.explain]):
        p.error("--predict, --explain: an empty name")
    if bool(args.explain) + args.clusters + bool(args.predict or args.compare) > 1:
        p.error("--explain, --clusters, or --predict and --compare: one of the three at a time")
    return args


def main():
    args = parse()
    sys.stdout.reconfigure(errors="backslashreplace")     # names of files may be in any encoding
    try:
        checkpoint = named(load_checkpoint(args.checkpoint, args.rates), args.checkpoint)
        network = restore(checkpoint, args.device)
        par = (run_par(checkpoint) or PAR((1, 2, 4, 8))) if args.par else None
        args.how = {"par": par, "flip": args.flip}
        if args.compare:
            compare(network, checkpoint, args)
        elif args.clusters:
            clusters(network, checkpoint, args)
        elif args.explain:
            explain(network, checkpoint, args)
        elif args.predict:
            predict(network, checkpoint, args)
        elif (args.data or checkpoint["args"]["data"]) == "folder":
            raise UserError(f"{args.checkpoint}: a folder has no labels: nothing to score; use --predict")
        else:
            score(network, checkpoint, args)
    except OSError as error:
        sys.exit(data.report(error))
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        sys.exit(data.report(f"not enough GPU memory; free it, or use --device cpu ({str(error)[:200]!r})"))


if __name__ == "__main__":
    main()
