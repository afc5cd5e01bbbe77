"""Hungarian-matched scores and masks of a trained checkpoint.

    python eval.py runs/voc                                        # per-class IoU, mIoU, accuracy, assignment
    python eval.py runs/voc --native --par                         # at the images' own size, refined by PAR
    python eval.py runs/folder --masks masks_by_hand               # scores on photographs of one's own
    python eval.py runs/folder --predict photos --out masks        # NAME_mask.png, NAME_overlay.png of each

    confusion_matrix() -> hungarian() -> scores() -> checkpoint -> network -> masks -> the program

Clusters have no names. An assignment of clusters to classes, one to one, is found on the labelled split so
that most pixels are right (Hungarian matching), and only then is anything scored. This is TransFGU's protocol
(decision 20, which is row 20 of docs/decisions.md). A cluster here is a channel of the prediction: one of
k-means' K, or the background where there is one. A run on a folder has no labels: there clusters are classes,
and a user names them in names.txt.
"""

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    import tools.start                                    # Ctrl-C, and how threads wait: before torch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment

import data
from aspp import TABLE_1
from data import UserError
from model import BACKBONES, DMSA, VisionTransformer, WeightsError, load_vit, normalise, read_tensors
from par import PAR

CHUNK = 8                                                 # images of one forward pass
MOST = 1024                                               # pixels: longest side of masks and --native images
RATES = {",".join(map(str, row)): list(row) for row in TABLE_1.values()}          # "1,1,2,3": [1, 1, 2, 3]


# ----------------------------------------------------------------------------
# Scores


def confusion_matrix(label, prediction, n, k=None):
    """Count pixels: (n, k) int64 [truth, prediction]; n classes, k clusters (default n).

    label, prediction   equal shapes, numpy or torch integers; labels outside 0..n-1 (void) do not count
    raises              ValueError for predictions outside 0..k-1
    """
    k = k or n
    label = torch.as_tensor(label).flatten().long()
    prediction = torch.as_tensor(prediction).flatten().long()
    valid = (label >= 0) & (label < n)                    # void, 255, is neither right nor wrong
    if label.shape != prediction.shape or ((prediction < 0) | (prediction >= k))[valid].any():
        raise ValueError(f"prediction: a cluster in 0..{k - 1} expected for each of {len(label)} labels")
    return torch.bincount(label[valid] * k + prediction[valid], minlength=n * k).view(n, k)


def hungarian(confusion):
    """For every predicted cluster its class: (k,) int64, one to one, so that most pixels are right.

    confusion (n, k) [truth, prediction]. All classes take part, the background included. Clusters that are
    left over, where k > n, have -1; where k < n, some classes have no cluster.
    """
    confusion = np.asarray(confusion)
    truth, cluster = linear_sum_assignment(confusion, maximize=True)
    assignment = np.full(confusion.shape[1], -1)          # indexed by cluster, as predictions are
    assignment[cluster] = truth
    return assignment


def miou_and_accuracy(confusion, assignment):
    """Scores of a confusion matrix (n, k) if cluster c is of class assignment[c], percent.

    returns  mIoU, accuracy, IoU of each class (n,): NaN where a class is in neither truth nor prediction
    """
    n = len(confusion)
    one_hot = assignment[:, None] == np.arange(n)         # (k, n); all False for a cluster without a class
    matched = confusion @ one_hot                         # (n, n): columns are classes now, as rows are
    right = np.diag(matched)
    union = matched.sum(0) + confusion.sum(1) - right     # TP + FP + FN
    iou = 100 * np.divide(right, union, out=np.full(n, np.nan), where=union > 0)
    return float(np.nanmean(iou)), float(100 * right.sum() / confusion.sum()), iou


def scores(confusion):
    """Scores after Hungarian matching, percent, of a confusion matrix (n, k).

    returns  {"miou", "accuracy", "iou": (n,), "one_to_one": (k,) of `hungarian`, "assignment": (k,),
             "clusters": in use, "entropy": of the predicted shares, 0 when everything is one cluster, 1 when
             all are equally frequent}
    raises   UserError if no pixel has a label, or if all labels are of one class

    IoU = TP / (TP + FP + FN). The mean leaves out classes that are neither in truth nor in the prediction
    (NaN here); a class that is only predicted counts 0 (TransFGU; others average over the classes in truth).

    With more clusters than classes, k > n, those left over count as wrong. They have the class of most of
    their pixels in "assignment", for pictures; and "many_miou" and "many_accuracy" are the scores if every
    cluster has the class of most of its pixels (many to one).
    """
    confusion = np.asarray(confusion)
    classes = np.flatnonzero(confusion.sum(1))            # those that the labels show
    if len(classes) < 2:
        shown = f"class {classes[0]} and void (255)" if len(classes) else "void (255)"
        raise UserError(f"the labels show nothing but {shown}: nothing to score. If 255 stands for an object "
                        f"in them, give it a class's number; else check their folder")
    one_to_one = hungarian(confusion)
    many_to_one = confusion.argmax(0)
    miou, accuracy, iou = miou_and_accuracy(confusion, one_to_one)
    share = confusion.sum(0) / confusion.sum()            # (k,) of each cluster in the prediction
    used = share[share > 0]
    entropy = -(used * np.log(used)).sum() / np.log(len(share))
    result = {"miou": miou, "iou": iou, "accuracy": accuracy, "one_to_one": one_to_one,
              "assignment": np.where(one_to_one < 0, many_to_one, one_to_one),
              "clusters": len(used), "entropy": float(entropy + 0.0)}             # no -0.0
    if len(share) > len(confusion):
        result["many_miou"], result["many_accuracy"], _ = miou_and_accuracy(confusion, many_to_one)
    return result


# ----------------------------------------------------------------------------
# Checkpoint -> network


def load_checkpoint(file):
    """The dict that train.py saved: tensors and plain values. Raises WeightsError, UserError."""
    checkpoint, _ = read_tensors(file)
    needed = {"student", "teacher", "vit", "args", "names", "epoch", "rates", "assignment", "centroids",
              "background", "teacher_on"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise UserError(f"{file}: not a checkpoint of train.py; give last.pt or best.pt of a run")
    return checkpoint


def open_run(path):
    """The checkpoint of a run, with the names of its names.txt. Raises WeightsError, UserError.

    path     a checkpoint, or the folder of a run: its best.pt, or last.pt where there is no best
    """
    file = Path(path)
    if file.is_dir():
        file = next((file / name for name in ("best.pt", "last.pt") if (file / name).exists()), None)
        if file is None:
            raise UserError(f"{path}: no best.pt and no last.pt in this folder; give the folder of a run")
    checkpoint = load_checkpoint(file)
    if checkpoint["epoch"] == 0:
        raise UserError(f"{file}: no epoch of this run is done; give its command again, and it goes on")
    return with_names(checkpoint, file.with_name("names.txt"))


def with_names(checkpoint, file):
    """The checkpoint with the class names that a user gave in `file`, names.txt, if it is there.

    A line is `NUMBER = NAME`, the number as in NAME_mask.png; an empty one or one with # is skipped. Classes
    of one name become one, which has the first of their numbers. Raises UserError naming file and line.
    """
    if not file.exists():
        return checkpoint
    if checkpoint["args"]["data"] != "folder":
        raise UserError(f"{file}: {checkpoint['args']['data']} has class names of its own; move this file "
                        f"away")
    names = list(checkpoint["names"])
    unnamed = {str(number) for number in range(len(names))}       # those that no line has named yet
    for count, line in enumerate(file.read_bytes().splitlines(), 1):
        text = line.decode("utf-8-sig", errors="replace").strip()
        if not text or text.startswith("#"):
            continue
        number, _, name = map(str.strip, text.partition("="))
        if number not in unnamed or not name or "\ufffd" in name:
            raise UserError(f"{file}: line {count}: {text[:40]!r}: NUMBER = NAME expected, in UTF-8, each "
                            f"number from 0 to {len(names) - 1} at most once")
        names[int(number)] = name
        unnamed.remove(number)
    return checkpoint | {"names": names, "assignment": [names.index(name) for name in names]}


def choose_device(device):
    """"cuda" or "cpu", whichever --device asks for; "auto": the GPU if there is one. Raises UserError."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine shows no GPU to torch; use --device cpu")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def restore(checkpoint, device="auto"):
    """The network of a checkpoint, in eval mode; device as for `choose_device`."""
    args = checkpoint["args"]                             # the options that the run was given, plain values
    vit = VisionTransformer(**BACKBONES[args["backbone"]][0])
    network = DMSA(vit, len(checkpoint["assignment"]), args["aspp"] != "none", aspp_scale=args["aspp_scale"])
    try:
        load_vit(vit, checkpoint["vit"])
        network.student.load_state_dict(checkpoint["student"])
        network.teacher.load_state_dict(checkpoint["teacher"])
    except (RuntimeError, TypeError, WeightsError):       # other tensors, or none
        raise UserError("the tensors of this checkpoint do not fit its own options; use another") from None
    torch.backends.cudnn.allow_tf32 = False               # full fp32 on GPUs too, as in training
    return network.to(choose_device(device)).eval()


def run_par(checkpoint):
    """The PAR that refined the pseudo labels of a run, or None."""
    dilations = checkpoint["args"]["par"]
    return PAR(tuple(dilations)) if dilations else None


# ----------------------------------------------------------------------------
# Network -> masks


@torch.no_grad()
def mask_logits(network, rates, image, mask_size, par=None, flip=False):
    """The student's logits of every pixel: uint8 (B, H, W, 3) -> (B, N, *mask_size).

    rates       of ASPP; mask_size: (rows, columns) that the logits are enlarged to
    par         a PAR, which refines probabilities at the image's size; these are returned, not logits
    flip        logits are the mean of those of the image and those of its mirror image, mirrored back
    """
    pixels = data.to_float(image, network.vit.cls_token.device)                   # (B, 3, H, W)
    masks = network(normalise(pixels), rates)                                     # (B, N, h, w)
    if flip:
        masks = (masks + network(normalise(pixels.flip(3)), rates).flip(3)) / 2
    if par is not None:
        masks = par(pixels, masks.softmax(1))                                     # (B, N, H, W)
    return F.interpolate(masks, size=mask_size, mode="bilinear")


def segment(network, rates, image, mask_size, par=None, flip=False):
    """Cluster of every pixel, the arg max of `mask_logits`: uint8 (B, *mask_size)."""
    return mask_logits(network, rates, image, mask_size, par, flip).argmax(1).byte()


def chunks(n, rank=0, world=1, size=CHUNK):
    """This process's share of 0..n-1, as slices of `size` images, whatever the number of processes is."""
    # sliced, not padded to equal shares as DistributedSampler does: no image counts twice
    starts = range(0, n, size)[rank::world]
    return [slice(start, min(start + size, n)) for start in starts]


def at_most(shape, unit=1):
    """(rows, columns) of an image of this shape at most MOST pixels a side, each in whole units of pixels."""
    shrink = min(1, MOST / max(shape[:2]))
    return tuple(max(unit, round(side * shrink / unit) * unit) for side in shape[:2])


def whole_patches(image, patch):
    """Resize an image to whole patches, of which the ViT drops none, and to at most MOST pixels a side."""
    h, w = at_most(image.shape, patch)
    return np.array(Image.fromarray(image).resize((w, h), Image.BILINEAR))


def clusters_of_photograph(network, checkpoint, image, mask_size, native=False, par=None, flip=False):
    """Clusters of one image of any size: uint8 (H, W, 3) -> uint8 (*mask_size).

    The network gets it squashed to the size that it was trained with or, `native`, in its own shape, whole
    patches and at most MOST pixels a side. mask_size, par, flip: as for `mask_logits`
    """
    if native:
        resized = whole_patches(image, network.vit.patch_size)
    else:
        resized = data.squash(image, checkpoint["args"]["size"], antialias=True)
    capped = at_most(mask_size)                           # all clusters of 12 megapixels would take 1 GB
    logits = mask_logits(network, checkpoint["rates"], resized[None], capped, par, flip)[0].cpu()
    return enlarged_argmax(logits, *mask_size)


def segment_photograph(network, checkpoint, image, native=False, par=None, flip=False):
    """Classes of one image, at its own size: uint8 (H, W, 3) -> uint8 (H, W), as `clusters_of_photograph`."""
    clusters = clusters_of_photograph(network, checkpoint, image, image.shape[:2], native, par, flip)
    return np.array(checkpoint["assignment"], np.uint8)[clusters]


def enlarged_argmax(logits, H, W):
    """Arg max of logits (N, h, w) that are enlarged to H x W, one channel at a time: uint8 (H, W).

    Only channels that are somewhere the highest of h x w take part.
    """
    best = np.zeros((H, W), np.uint8)
    highest = np.full((H, W), -np.inf, np.float32)
    for channel in logits.argmax(0).unique():
        plane = np.array(Image.fromarray(logits[channel].numpy()).resize((W, H), Image.BILINEAR))
        best[plane > highest] = channel
        np.maximum(highest, plane, out=highest)
    return best


# ----------------------------------------------------------------------------
# The program


def open_split(checkpoint, name=None, root=None, split="val", limit=None):
    """A split of the data set called `name`, below `root`; by default those that the run was trained on.

    A run on a folder has no classes of its own, so that any data set may score it.
    """
    trained = checkpoint["args"]
    cache = Path(trained["out"]).parent / "cache"         # COCO's list of samples may be there
    clusters_of_folder = len(checkpoint["names"]) - 1
    source = data.dataset(name or trained["data"], root or trained["root"], split, clusters_of_folder,
                          trained["seed"], cache if cache.is_dir() else None)
    if len(source.names) != len(checkpoint["names"]) and trained["data"] != "folder":
        raise UserError(f"this checkpoint has {len(checkpoint['names'])} classes, the data set "
                        f"{len(source.names)}; give the data set that it was trained on")
    return limited(source, limit, split)


def limited(source, limit, what):
    """The first `limit` images of a data set, or all of it. Prints what is read."""
    if limit:
        source.limit(limit)
    print(f"{what}: {source.summary()}", flush=True)
    return source


def print_scores(network, checkpoint, source, native, par, flip):
    """Print the table of classes and the scores of a labelled data set."""
    n, k, rates = len(source.names), len(checkpoint["assignment"]), checkpoint["rates"]
    size = checkpoint["args"]["size"]
    confusion = torch.zeros(n, k, dtype=torch.int64)
    progress = data.Progress("scored: image", len(source))
    pixels = np.zeros(256, np.int64)                      # of each label value
    for chunk in chunks(len(source), size=1 if native else CHUNK):
        indices = range(chunk.start, chunk.stop)
        if native:                                        # one by one, each at its own size
            image, labels = source.image(chunk.start), source.label(chunk.start)
            clusters = clusters_of_photograph(network, checkpoint, image, labels.shape, native, par, flip)
        else:
            images = np.stack([source.squashed(i, size) for i in indices])
            labels = np.stack([data.squash(source.label(i), size, "nearest") for i in indices])
            clusters = segment(network, rates, images, labels.shape[1:], par, flip).cpu()
        confusion += confusion_matrix(labels, clusters, n, k)
        pixels += np.bincount(labels.flatten(), minlength=256)
        progress(chunk.stop)
    print(data.class_shares(pixels, source.names))
    result = scores(confusion)
    cluster_of = {int(c): cluster for cluster, c in enumerate(result["one_to_one"])}      # class -> cluster
    print("class                 cluster     IoU")
    for c, name in enumerate(source.names):
        iou = "absent" if np.isnan(result["iou"][c]) else f"{result['iou'][c]:6.2f}"
        print(f"{name:20}  {cluster_of.get(c, 'none'):>7}  {iou}")        # none: fewer clusters than classes
    print(f"mIoU {result['miou']:.2f}  accuracy {result['accuracy']:.2f}  "
          f"clusters in use {result['clusters']} of {k}")
    if "many_miou" in result:
        print("many to one, each cluster as the class of most of its pixels: mIoU {many_miou:.2f}  "
              "accuracy {many_accuracy:.2f}".format_map(result))
    trained = checkpoint["args"]["limit"]
    print(f"epoch {checkpoint['epoch']}, rates {rates}, {len(source)} images at "
          f"{'their own size' if native else f'{size} x {size}'}"
          + (f" (training scored the first {trained})" if trained else ""))


def photographs_by_name(source):
    """{name: index} of a data.Folder. Raises UserError if two photographs' masks would have one name."""
    index = {}
    for i, (name, file) in enumerate(zip(source.ids, source.images)):
        other = source.images[index.setdefault(name, i)]  # a photograph that is given twice is no problem
        if other != file:
            raise UserError(f"{file}: named like {other}, and so would their masks be; rename one")
    return index


def earlier_shares(file):
    """What earlier calls wrote to predictions.json; {} without it. Raises UserError if it is damaged."""
    try:
        return dict(json.loads(file.read_text())) if file.exists() else {}
    except (ValueError, TypeError):
        raise UserError(f"{file}: damaged; move it away, or give another --out") from None


def predict(network, checkpoint, source, out, native, par, flip):
    """--predict: of each photograph a palette PNG of class indices, an overlay, and the shares of classes."""
    from tools.pictures import class_colours, legend, outlined        # all that eval.py draws
    names, colours = checkpoint["names"], class_colours(checkpoint)
    index = photographs_by_name(source)
    out.mkdir(parents=True, exist_ok=True)
    legend(checkpoint).save(out / "legend.png")
    earlier = earlier_shares(out / "predictions.json")
    shares, unreadable = {}, 0
    progress = data.Progress("masks: photograph", len(index))
    for done, (name, i) in enumerate(index.items()):
        progress(done)
        try:
            image = source.image(i)
        except UserError as error:                        # the others are still worth having
            data.report(error)
            unreadable += 1
            continue
        mask = segment_photograph(network, checkpoint, image, native, par, flip)                  # (H, W)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(mask).resize(data.upright_size(source.images[i]), Image.NEAREST)
        picture.putpalette(colours.flatten().tolist())    # it holds indices, viewers show colours
        picture.save(out / f"{name}_mask.png")
        shown = np.where(mask > 0, mask, data.VOID).astype(np.uint8) if checkpoint["background"] else mask
        # by default Pillow takes longer to compress a photograph than all else here takes
        outlined(image, shown, colours, names).save(out / f"{name}_overlay.png", compress_level=1)
        counts = np.bincount(mask.flatten(), minlength=len(names)) / mask.size
        shares[name] = {names[c]: round(float(counts[c]), 4) for c in np.flatnonzero(counts)}
    progress(len(index))
    content = json.dumps(earlier | shares, indent=1).encode()
    data.write_whole(out / "predictions.json", lambda f: f.write(content))
    print(f"wrote {len(shares)} masks, {len(shares)} overlays, legend.png and predictions.json to {out}/")
    if unreadable:
        raise UserError(f"{unreadable} of {len(index)} images have no mask, see above")


def parse(argv=None):
    p = argparse.ArgumentParser(description="Score a checkpoint, or predict masks with it.",
                                usage=argparse.SUPPRESS, allow_abbrev=False, epilog=__doc__.split("\n\n")[1],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", help="last.pt or best.pt of a run, or its folder")
    p.add_argument("--data", choices=data.NAMES, help="data set to score on (default: the one trained on)")
    p.add_argument("--root", metavar="DIR", help="its folder (default: the one trained with)")
    p.add_argument("--masks", metavar="DIR",
        help="score on the photographs of --root for which this folder has an index PNG of the same name, "
             "with the classes of its names.txt, a name a line")
    p.add_argument("--limit", type=int, metavar="N", help="the first N images (default: all)")
    p.add_argument("--native", action="store_true",
        help="the images' own size instead of squares (labels too)")
    p.add_argument("--par", action="store_true",
        help="refine the prediction with PAR, by the run's own dilations, or 1 2 4 8 if it has none")
    p.add_argument("--flip", action="store_true",
        help="logits are the mean over the image and its mirror image")
    p.add_argument("--rates", choices=("epoch", *RATES), default="epoch",
        help="of ASPP, a row of Table 1 (default: that of the checkpoint's epoch)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto: cuda if there is one (default)")
    p.add_argument("--predict", nargs="+", metavar="PATH", help="segment these images and folders")
    p.add_argument("--out", default="masks", metavar="DIR",
        help="folder that --predict writes to (default: masks)")
    args = p.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        p.error(f"--limit {args.limit}: must be at least 1")
    if "" in (args.predict or ()):
        p.error("--predict: an empty name")
    return args


def main():
    args = parse()
    checkpoint = open_run(args.checkpoint)
    if args.rates != "epoch":
        checkpoint["rates"] = RATES[args.rates]
    network = restore(checkpoint, args.device)
    par = (run_par(checkpoint) or PAR((1, 2, 4, 8))) if args.par else None
    if args.predict:
        data.check_outside(args.out, args.predict)
        source = limited(data.Folder(args.predict), args.limit, "photographs")
        predict(network, checkpoint, source, Path(args.out), args.native, par, args.flip)
        return
    if args.masks:
        photographs = data.Masks(args.root or checkpoint["args"]["root"], args.masks)
        source = limited(photographs, args.limit, "photographs with masks")
    elif (args.data or checkpoint["args"]["data"]) == "folder":
        raise UserError(f"{args.checkpoint}: a folder has no labels: nothing to score; use --predict, or "
                        f"give masks with --masks")
    else:
        source = open_split(checkpoint, args.data, args.root, limit=args.limit)
    print_scores(network, checkpoint, source, args.native, par, args.flip)


if __name__ == "__main__":
    sys.exit(data.exit_code(main))
