"""Data sets, label maps, and the crop that moves image, CAM and label together.

A data set is a list of images: image(i) -> uint8 (H, W, 3), label(i) -> uint8 (H, W) of class indices, 255
void. `shapes` is rendered from a seed, VOC and COCO are read in their published layouts, `Folder` is any
images. Needs torch, numpy and pillow: copy this file anywhere.

    python data.py                                        # writes data.png: `shapes` with labels and crops
    python data.py --check --data voc --root data         # counts, unreadable and mismatched files, by name
    python data.py --download voc --root data             # fetches and unpacks what can be fetched
"""

import argparse
import colorsys
import contextlib
import hashlib
import http.client
import math
import os
import stat
import sys
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

warnings.filterwarnings("ignore", module="PIL")           # unusable files are refused below, in one line

VOID = 255
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")          # not EPS, say, which would be run as a program
MOST_PIXELS = 89_478_485                                  # 0.3 GB decoded; up to twice that Pillow only warns


class DataError(ValueError):
    """Data that is missing or broken; the message is one line for people: what, where, what to do."""


# ----------------------------------------------------------------------------
# Classes. A data set has K clusters; with a background its class 0 is background and N = K + 1, else N = K.

VOC_NAMES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
             "motorbike person pottedplant sheep sofa train tvmonitor").split()

# the 80 COCO thing categories in order; "-" stands for an id that COCO never used
COCO_THINGS = ("person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,-,"
               "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,-,"
               "backpack,umbrella,-,-,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,"
               "baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,-,wine glass,cup,fork,"
               "knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,"
               "couch,potted plant,bed,-,dining table,-,-,toilet,-,tv,laptop,mouse,remote,keyboard,"
               "cell phone,microwave,oven,toaster,sink,refrigerator,-,book,clock,vase,scissors,teddy bear,"
               "hair drier,toothbrush,-").split(",")

# COCO-Stuff-27 (PiCIE, STEGO): 12 groups of things, 15 of stuff, each with its raw stuffthingmaps ids
# (category id - 1)
STUFF27 = {
    "electronic": range(71, 77), "appliance": range(77, 83), "food": range(51, 61),
    "furniture": range(61, 71), "indoor": range(83, 91), "kitchen": range(43, 51),
    "accessory": range(25, 33), "animal": range(15, 25), "outdoor": range(9, 15), "person": [0],
    "sports": range(33, 43), "vehicle": range(1, 9),
    "ceiling": [101, 102], "floor": [100, 113, 114, 115, 116, 117], "food-stuff": [120, 121, 152, 169],
    "furniture-stuff": [97, 106, 107, 109, 111, 122, 129, 132, 155, 160, 164],
    "raw material": [99, 131, 138, 142],
    "textile": [91, 92, 103, 104, 108, 130, 136, 140, 151, 166, 167], "wall": range(170, 177),
    "window": [179, 180], "building": [94, 95, 127, 150, 157, 165],
    "ground": [110, 124, 125, 135, 139, 143, 144, 146, 148, 153, 158],
    "plant": [93, 96, 118, 123, 128, 133, 141, 162, 168], "sky": [105, 156],
    "solid": [126, 134, 149, 159, 161, 181], "structural": [98, 112, 137, 145, 163],
    "water": [119, 147, 154, 177, 178],
}


def coco_table(kind):
    """256-entry table, raw stuffthingmaps id -> class.

    kind      `coco80` (things 1..80, stuff 0) or `cocostuff27` (0..26)
    """
    table = np.full(256, VOID, np.uint8)
    if kind == "coco80":
        used = [raw for raw, name in enumerate(COCO_THINGS) if name != "-"]
        table[used] = np.arange(1, 81)
        table[91:182] = 0                                 # stuff
    else:
        for index, raw in enumerate(STUFF27.values()):
            table[list(raw)] = index
    table[182:255] = 254                                  # no such ids: `open_label` refuses them
    return table


def palette(n=256):
    """PASCAL VOC's colours: (n, 3) uint8. Class indices are spread over the bits of the three channels."""
    index = np.arange(n)
    bit = lambda i, b: (i >> b) & 1
    colour = [sum(bit(index, 3 * b + c) << (7 - b) for b in range(8 // 3 + 1)) for c in range(3)]
    return np.stack(colour, 1).astype(np.uint8)


# ----------------------------------------------------------------------------
# Reading files


@contextlib.contextmanager
def opened(path, what="image"):
    """The file as a Pillow image; whatever goes wrong with it is a DataError naming the file."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):       # a pipe would never end
            raise DataError(f"{path}: a folder, pipe or device, not a file; rename or remove it")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise DataError(f"{path}: {image.width} x {image.height} pixels are too many for one {what}; "
                                "shrink it")
            yield image
    except DataError:
        raise
    except Exception as error:                            # decoders raise a dozen kinds on damaged files
        raise DataError(f"{path}: cannot read this {what} ({_reason(error)}); "
                        "get it again or leave it out") from None


def open_image(path, upright=False):
    """Decode any image to RGB: uint8 (H, W, 3). Raises DataError naming the file.

    upright   turn it as its EXIF says (photographs of one's own); off for data sets whose masks are not
              turned
    """
    with opened(path) as image:
        if upright:
            image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode == "I" and np.asarray(image).max() > 65535:
            raise DataError(f"{path}: its range of values is not known; make it an 8-bit image")
        if image.mode.startswith("I;16") or image.mode == "I":                    # 16-bit grey
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        return np.array(image.convert("RGB"))


def open_label(path, table=None, n_classes=256):
    """Decode a palette or grey PNG of class indices: uint8 (H, W), 255 void.

    Raises DataError naming the file.

    table      (256,) uint8 applied to the raw values; n_classes: values from here on (but 255) are an error
    """
    with opened(path, "label") as image:
        if image.mode not in ("P", "L"):
            raise DataError(f"{path}: this label is {image.mode}; "
                            "make it an 8-bit palette or grey PNG of class indices")
        raw = np.array(image)
    label = raw if table is None else table[raw]
    wrong = raw[(label >= n_classes) & (label != VOID)]
    if wrong.size:
        raise DataError(f"{path}: label value {wrong[0]} is none of the {n_classes} classes; "
                        "correct the file, or --data")
    return label


def _reason(error):
    if isinstance(error, UnidentifiedImageError):
        return "no JPEG, PNG, BMP, WebP or TIFF"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:100]


def squash(image, size, mode="bilinear"):
    """uint8 (H, W[, 3]) -> uint8 (size, size[, 3]), aspect ignored.

    Bilinear without antialiasing, or nearest (TransFGU).
    """
    x = torch.from_numpy(np.ascontiguousarray(image))
    x = x.permute(2, 0, 1)[None].float() if x.ndim == 3 else x[None, None].float()
    x = F.interpolate(x, size=(size, size), mode=mode)[0]
    return x.round().byte().permute(1, 2, 0).squeeze(2).numpy()


# ----------------------------------------------------------------------------
# Data sets


class Dataset:
    """Images with labels on disk.

    Subclasses set `ids`, `images`, `labels` (paths), `names`, `things`, `stuff`.

    names     class names; things, stuff: clusters of either kind, found separately
    background  class 0 is background, no cluster
    """
    table, stuff, background, upright = None, 0, True, False

    def __len__(self):
        return len(self.ids)

    def limit(self, n):
        """Keep the first n images."""
        self.ids, self.images, self.labels = self.ids[:n], self.images[:n], self.labels[:n]

    def image(self, i):
        return open_image(self.images[i], self.upright)

    def label(self, i):
        """uint8 (H, W), 255 void; None without labels. Raises DataError, also if not of its image's size."""
        if not self.labels:
            return None
        label = open_label(self.labels[i], self.table, len(self.names))
        with opened(self.images[i]) as image:
            if image.size != label.shape[::-1]:
                raise DataError(f"{self.labels[i]}: this label is {label.shape[1]} x {label.shape[0]}, "
                                f"its image {image.width} x {image.height}; "
                                "get the pair again or leave it out")
        return label


def _folder(root, tried, how):
    """The first of `tried` below root that exists; DataError otherwise."""
    for part in tried:
        if (Path(root) / part).is_dir():
            return Path(root) / part
    raise DataError(f"{Path(root) / tried[0]}: no such folder; {how}")


class VOC(Dataset):
    """PASCAL VOC 2012 below root, VOCdevkit or VOC2012.

    `aug`: train on train_aug.txt and SegmentationClassAug.
    """
    names, things = VOC_NAMES, 20
    published = {"train": 1464, "val": 1449, "train_aug": 10582}

    def __init__(self, root="data", split="train", aug=False):
        name, masks = (("train_aug", "SegmentationClassAug") if aug and split == "train"
                       else (split, "SegmentationClass"))
        how = f"get it with: python data.py --download voc --root {root}"
        base = _folder(root, ("VOCdevkit/VOC2012", "VOC2012", "."), f"{how}, or give another --root")
        file = base / "ImageSets" / "Segmentation" / f"{name}.txt"
        if not file.is_file():
            raise DataError(f"{file}: no such list; " + (
                "the augmented set (SBD) is not on VOC's host, see README, Data"
                if name == "train_aug" else how))
        lines = file.read_text("utf-8-sig", errors="replace").splitlines()
        # DeepLab's lists have "/JPEGImages/ID.jpg /SegmentationClassAug/ID.png", the devkit's others flags
        self.ids = [Path(line.split()[0]).name.removesuffix(".jpg") for line in lines if line.strip()]
        self.split, ordered = name, sorted(self.ids)
        twice = next((a for a, b in zip(ordered, ordered[1:]) if a == b), None)
        if twice or not self.ids:
            raise DataError(
                f"{file}: {f'{twice} is listed twice; take one out' if twice else f'an empty list; {how}'}")
        for part in ("JPEGImages", masks):
            _folder(base, (part,), "see README, Data, for the layout")
        self.images = [base / "JPEGImages" / f"{i}.jpg" for i in self.ids]
        self.labels = [base / masks / f"{i}.png" for i in self.ids]


class COCO(Dataset):
    """COCO 2017 with stuffthingmaps. `kind`: coco80 (background + 80) or cocostuff27 (12 things + 15 stuff).

    Samples are the images whose map shows at least one thing pixel. TransFGU takes those with an instance
    annotation, which differs where every instance is hidden in the map; no json is needed here. The maps are
    all read once, and the list is kept in `cache` (a folder) if given. An unreadable map counts as a sample,
    so that it is named when it is used, not dropped; the list is kept only without one.
    """
    published = {"train": 117266, "val": 4952}

    def __init__(self, root="data", split="train", kind="coco80", cache=None):
        how = f"get it with: python data.py --download {kind} --root {root}"
        images = _folder(root, (f"images/{split}2017", f"{split}2017"), how)
        labels = _folder(root, (f"annotations/{split}2017", f"stuffthingmaps/{split}2017"), how)
        self.split, self.table, self.background = split, coco_table(kind), kind == "coco80"
        self.names = (["background"] + [n for n in COCO_THINGS if n != "-"] if self.background
                      else list(STUFF27))
        self.things, self.stuff = (80, 0) if self.background else (12, 15)
        self.all = sorted(p.stem for p in images.glob("*.jpg"))
        if not self.all:
            raise DataError(f"{images}: no .jpg images; {how}")
        listed = None
        if cache:
            stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(labels.glob("*.png"))]
            key = hashlib.sha256(repr([str(labels.resolve()), self.all, stats]).encode()).hexdigest()[:16]
            listed = Path(cache) / f"coco-{split}-{key}.txt"
        if listed and listed.is_file():
            self.ids = listed.read_text().splitlines()
        else:
            def shows_thing(i):
                try:
                    return bool((open_label(labels / f"{i}.png") <= 90).any())
                except DataError:
                    return None
            with ThreadPoolExecutor() as pool:
                shown = list(pool.map(shows_thing, self.all))
            self.ids = [i for i, thing in zip(self.all, shown) if thing is not False]
            if not self.ids:
                raise DataError(f"{labels}: no map shows a thing (values 0 to 90); {how}")
            if listed and None not in shown:
                listed.parent.mkdir(parents=True, exist_ok=True)
                part = listed.with_suffix(f".{os.getpid()}")
                part.write_text("\n".join(self.ids))
                part.replace(listed)
        self.images = [images / f"{i}.jpg" for i in self.ids]
        self.labels = [labels / f"{i}.png" for i in self.ids]


class Folder(Dataset):
    """Any images below a folder (or one image), without labels; `n_classes` things and a background."""
    labels, upright = (), True

    def __init__(self, root, n_classes=20):
        root = Path(root)
        self.split, self.things = "all", n_classes
        self.names = ["background"] + [f"cluster {k}" for k in range(1, n_classes + 1)]
        if not root.exists():
            raise DataError(f"{root}: no such file or folder; correct the path")

        def refuse(error):                                # os.walk alone would leave such a folder out
            raise DataError(f"{error.filename}: cannot read this folder ({_reason(error)}); "
                            "change its permissions")

        found = [root] if root.is_file() else []
        walk = os.walk(root, onerror=refuse) if root.is_dir() else ()             # without links to folders
        for folder, below, files in walk:
            below.sort()                                  # a folder named like an image is refused on use
            found += [Path(folder) / f for f in sorted(below + files)
                      if f.lower().endswith(SUFFIXES) and not f.startswith(".")]  # macOS adds ._NAME
        if not found:
            raise DataError(f"{root}: no images here; give a folder with any of {' '.join(SUFFIXES)}")
        self.images = found
        self.ids = [str((p.relative_to(root) if p != root else Path(p.name)).with_suffix("")) for p in found]
        first = {}
        twice = [(p, first[i]) for i, p in zip(self.ids, found) if first.setdefault(i, p) != p]
        if twice:
            more = f" (and {len(twice) - 1} more such pairs)" if twice[1:] else ""
            raise DataError(f"{twice[0][0]}: the same name as {twice[0][1]}{more}: their predictions would "
                            "overwrite each other; rename one")


# ----------------------------------------------------------------------------
# `shapes`: textured objects on grey noise, rendered from a seed

SHAPES = ("disc", "square", "triangle", "star", "cross")
HUES = (0.0, 0.6, 0.4, 0.2, 0.8)                          # as far apart as can be, or neighbours swap class


def _noise(rng, size, cells):
    """Smooth noise (size, size): random grids of several sizes, enlarged and added, mean 0, deviation 1."""
    field = sum(weight * np.asarray(Image.fromarray(rng.random((n, n), np.float32)).resize(
                    (size, size), Image.BICUBIC))
                for n, weight in cells)
    return (field - field.mean()) / (field.std() + 1e-6)


def _background(rng, size, tint):
    """1/f noise, grey with faint colour (`tint`: its standard deviation).

    The same statistics in every image, so that it carries no identity.
    """
    cells = [(max(2, n * size // 96), weight)
             for n, weight in ((5, 0.5), (9, 0.7), (17, 0.6), (33, 0.5), (65, 0.35))]
    grey = _noise(rng, size, cells)[..., None]
    colour = np.stack([_noise(rng, size, cells[:4]) for _ in range(3)], 2)
    return 0.45 + 0.15 * grey + tint * (colour - colour.mean(2, keepdims=True))


def _paint(image, alpha, colour):
    image[:] = alpha[..., None] * colour + (1 - alpha[..., None]) * image


def new_object(rng, category):
    """What an object keeps in every picture: category, two colours, texture, and how it is turned and lit."""
    hue, saturation, value = HUES[category] + rng.normal(0, 0.02), rng.uniform(0.6, 1), rng.uniform(0.65, 1)
    dark = (hue + rng.normal(0, 0.02), saturation * rng.uniform(0.5, 1), value * rng.uniform(0.35, 0.6))
    turn, phase, shade = rng.uniform(0, 2 * math.pi, 3)
    return {"category": category, "turn": turn, "phase": phase, "shade": shade,
            "frequency": rng.uniform(0.8, 1.25), "aspect": rng.uniform(0.85, 1.18),
            "light": np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value)),
            "dark": np.array(colorsys.hsv_to_rgb(dark[0] % 1, dark[1], dark[2]))}


def _draw_object(image, label, thing, cx, cy, radius):
    """Paint one object at (cx, cy) with this radius, all in shares of the image."""
    size = len(image)
    y, x = np.mgrid[:size, :size] / (size - 1)
    turn, aspect, shade = thing["turn"], thing["aspect"], thing["shade"]
    u = ((x - cx) * math.cos(turn) + (y - cy) * math.sin(turn)) / radius * aspect
    v = ((y - cy) * math.cos(turn) - (x - cx) * math.sin(turn)) / radius / aspect
    r, k, f, p = np.hypot(u, v), thing["category"], thing["frequency"], thing["phase"]
    if k == 0:                                            # > 0 inside; the object's own radius is about 1
        inside, texture = 1 - r, np.sin(12 * f * r + p)
    elif k == 1:
        inside, texture = 0.85 - np.maximum(abs(u), abs(v)), 3 * np.sin(7 * f * u + p) * np.sin(7 * f * v + p)
    elif k == 2:
        inside = 0.55 - np.maximum(-v, np.maximum(0.866 * u + 0.5 * v, 0.5 * v - 0.866 * u))
        texture = np.sin(20 * f * v + p)
    elif k == 3:
        inside, texture = 0.68 + 0.3 * np.cos(5 * np.arctan2(v, u)) - r, 0.5 - 0.35 * r
    else:
        inside = np.maximum(np.minimum(0.36 - abs(u), 1 - abs(v)), np.minimum(0.36 - abs(v), 1 - abs(u)))
        texture = 2 * np.cos(11 * f * u) * np.cos(11 * f * v) - 0.6
    alpha = np.clip(0.5 + inside * radius * size, 0, 1)   # one pixel of smooth edge
    mix = np.clip(0.5 + 0.9 * texture, 0, 1)[..., None]
    light = np.clip(1 + 0.25 * (u * math.cos(shade) + v * math.sin(shade)), 0.5, 1.5)[..., None]
    _paint(image, alpha, (thing["light"] * mix + thing["dark"] * (1 - mix)) * light)
    label[alpha > 0.5] = k + 1


def render(rng, things, size, radius, tint=0.02, clutter=0.2):
    """Paint objects where they hardly overlap, on noise with small unlabelled clutter, under uneven light.

    things    of `new_object`; radius: (least, most) of them, in shares of the image
    tint      colour of the noise; clutter: highest saturation of the clutter. Larger values make it harder
    returns   uint8 (size, size, 3), uint8 (size, size) of 0 and category + 1
    """
    image, label = _background(rng, size, tint), np.zeros((size, size), np.uint8)
    y, x = np.mgrid[:size, :size] / (size - 1)
    for _ in range(rng.integers(2, 7)):                   # clutter: little grey blobs and sticks
        cx, cy, r, turn = rng.random(), rng.random(), rng.uniform(0.02, 0.06), rng.uniform(0, 2 * math.pi)
        u = ((x - cx) * math.cos(turn) + (y - cy) * math.sin(turn)) / r
        v = ((y - cy) * math.cos(turn) - (x - cx) * math.sin(turn)) / r * rng.uniform(0.5, 4)
        colour = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, clutter), rng.uniform(0.2, 1))
        _paint(image, np.clip(0.5 + (1 - np.hypot(u, v)) * r * size, 0, 1), np.array(colour))
    placed = []                                           # (x, y, radius) of the objects so far
    for thing in things:
        for _ in range(40):                               # no room found: the scene has one object fewer
            r, (cx, cy) = rng.uniform(*radius), rng.uniform(0.2, 0.8, 2)
            if all(math.hypot(cx - a, cy - b) > 0.8 * (r + c) for a, b, c in placed):
                placed.append((cx, cy, r))
                _draw_object(image, label, thing, cx, cy, r)
                break
    turn = rng.uniform(0, 2 * math.pi)
    image *= rng.uniform(0.8, 1.15) + rng.uniform(0, 0.7) * (
        (x - 0.5) * math.cos(turn) + (y - 0.5) * math.sin(turn))[..., None]
    image += rng.normal(0, 0.02, image.shape)             # the sensor's noise
    return (image.clip(0, 1) * 255).astype(np.uint8), label


def shapes(seed, size=128):
    """One scene: uint8 (size, size, 3), (size, size) of 0 background, 1..5 `SHAPES`; two or three objects."""
    rng = np.random.default_rng(seed)
    categories = rng.choice(len(SHAPES), rng.integers(2, 4), replace=False)
    return render(rng, [new_object(rng, int(k)) for k in categories], size, (0.16, 0.28))


class Shapes(Dataset):
    """Scenes of `shapes`: 400 for training, 200 for validation; another `seed` gives other scenes of both."""
    names, things, images, labels = ["background", *SHAPES], len(SHAPES), (), ()
    published = {"train": 400, "val": 200}

    def __init__(self, split="train", seed=0):
        self.split = split
        self.ids = [(seed, int(split == "val"), i) for i in range(self.published[split])]

    def image(self, i):
        return shapes(self.ids[i])[0]

    def label(self, i):
        return shapes(self.ids[i])[1]


NAMES = ("shapes", "voc", "voc-aug", "coco80", "cocostuff27", "folder")


def dataset(name, root="data", split="train", classes=20, seed=0, cache=None):
    """A data set by its --data name. `classes` is for folder, `seed` for shapes, `cache` for COCO."""
    if name not in NAMES:
        raise DataError(f"{name}: no such data set; choose from {', '.join(NAMES)}")
    if name == "shapes":
        return Shapes(split, seed)
    if name in ("voc", "voc-aug"):
        return VOC(root, split, name == "voc-aug")
    if name == "folder":
        return Folder(root, classes)
    return COCO(root, split, name, cache)


# ----------------------------------------------------------------------------
# Crops and augmentation: every number is drawn from (seed, epoch, sample), never from a process's own stream


# of brightness, contrast, saturation; hue in turns (TransFGU)
JITTER = (0.8, 0.8, 0.8, 0.2)


def draw(seed, epoch, sample, jitter=JITTER):
    """The random numbers of one sample in one epoch: (10,) float32.

    scale, y, x, flip: a square of 0.4 to 1.0 of the image, uniformly placed, mirrored half the time
    brightness, contrast, saturation, hue, grey, blur: as ColorJitter(*jitter) with probability .3,
    grayscale .2, Gaussian blur of sigma 1 to 2 with .2 (TransFGU; theirs are drawn once a batch)
    """
    rng = np.random.default_rng((seed, epoch, sample))
    u = rng.random(11)
    scale, changed = 0.4 + 0.6 * u[0], u[4] < 0.3         # side, not area, of the square
    return np.array([scale, u[1] * (1 - scale), u[2] * (1 - scale), u[3] < 0.5,
                     *(1 + changed * (2 * u[5:8] - 1) * jitter[:3]), changed * (2 * u[8] - 1) * jitter[3],
                     u[9] < 0.2, (u[10] < 0.2) * (1 + 5 * u[10])], np.float32)


def to_float(image, device=None):
    """uint8 (B, H, W, 3), numpy or torch -> float (B, 3, H, W) in 0..1, on `device` if given."""
    return torch.as_tensor(image, device=device).permute(0, 3, 1, 2).float() / 255


def crop(image, cam, draws, size, patch, label=None):
    """Cut and mirror image, CAM and label alike, by one affine grid.

    image (B, 3, S, S), square (`squash`), cam (B, K, h, w), label (B, S, S) or None; draws (B, 10) of `draw`;
    size a multiple of patch, both in pixels
    returns  (B, 3, size, size), (B, K, size / patch, size / patch) averaged over patches, (B, size, size) or
             None
    """
    scale, y, x, flip = draws[:, :4].T                                            # (B,) each
    zero = torch.zeros_like(scale)
    rows = [torch.stack([scale * (1 - 2 * flip), zero, 2 * x + scale - 1], 1),    # -1..1 across the image
            torch.stack([zero, scale, 2 * y + scale - 1], 1)]
    theta = torch.stack(rows, 1)                                                  # (B, 2, 3)

    def sample(t, side, mode):
        grid = F.affine_grid(theta, (len(t), 1, side, side), align_corners=False).to(t.dtype)
        return F.grid_sample(t, grid, mode, "border", align_corners=False)

    cam = F.avg_pool2d(sample(cam, 2 * size // patch, "bilinear"), 2)             # 2 x 2 a patch, as RoIAlign
    if label is not None:
        label = sample(label[:, None].float(), size, "nearest")[:, 0].to(label.dtype)  # (B, size, size)
    return sample(image, size, "bilinear"), cam, label


def augment(image, draws):
    """Colour jitter, grayscale, blur of image (B, 3, H, W) in 0..1 by draws (B, 10) -> same shape and range.

    Hue turns about the grey axis of RGB (torchvision's goes through HSV).
    """
    brightness, contrast, saturation, hue, grey, sigma = (d.view(-1, 1, 1, 1) for d in draws[:, 4:].T)
    luma = image.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    image = (image * brightness).clamp(0, 1)              # a factor of 1 changes nothing
    mean = (image * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)         # (B, 1, 1, 1)
    image = ((image - mean) * contrast + mean).clamp(0, 1)
    shade = (image * luma).sum(1, keepdim=True)           # (B, 1, H, W); grey is saturation 0
    image = ((image - shade) * saturation * (1 - grey) + shade).clamp(0, 1)
    cos, sin = (hue * 2 * math.pi).cos(), (hue * 2 * math.pi).sin()               # hue: Rodrigues' formula
    r, g, b = image.unbind(1)
    across = torch.stack([b - g, r - b, g - r], 1) / math.sqrt(3)                 # (B, 3, H, W)
    image = (cos * image + sin * across + (1 - cos) * image.mean(1, keepdim=True)).clamp(0, 1)
    edge = torch.exp(-0.5 / sigma.clamp(min=1e-3) ** 2).flatten()                 # 3 x 3 Gaussian; 0: no blur
    line = torch.stack([edge, torch.ones_like(edge), edge], 1) / (1 + 2 * edge)[:, None]
    kernel = (line[:, :, None] * line[:, None]).repeat_interleave(3, 0)[:, None]  # (3 B, 1, 3, 3)
    B, _, H, W = image.shape                              # every channel is a group with its own kernel
    padded = F.pad(image, (1, 1, 1, 1), mode="reflect").reshape(1, 3 * B, H + 2, W + 2)
    return F.conv2d(padded, kernel, groups=3 * B).view(B, 3, H, W)


# ----------------------------------------------------------------------------
# Checking and downloading


def check(data):
    """Every problem of a data set, one line each: missing, unreadable, mismatched files."""
    def look(i):
        found = []
        for read in (data.image, data.label):
            try:
                read(i)
            except DataError as error:
                found.append(str(error))
        return dict.fromkeys(found)                       # once, though a broken image is met by both
    with ThreadPoolExecutor() as pool:
        return [problem for problems in pool.map(look, range(len(data))) for problem in problems]


# name: (address, MD5 where one is published, folder below root to unpack in) of each file
FILES = {
    "voc": [("http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
             "6cd6e144f989b92b3379bac3b3de84fd", ".")],
    "coco80": [("http://images.cocodataset.org/zips/train2017.zip", None, "images"),
               ("http://images.cocodataset.org/zips/val2017.zip", None, "images"),
               ("http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/"
                "stuffthingmaps_trainval2017.zip", None, "annotations")],
}
FILES["cocostuff27"] = FILES["coco80"]


def _md5(file):
    digest = hashlib.md5()
    with open(file, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(url, file, md5=None):
    """Download to `file`, going on where an earlier try stopped, with a progress line. Returns its MD5.

    Raises DataError if the host cannot be reached, sends less than it announced, or the MD5 differs.
    """
    part = Path(f"{file}.part")
    have = part.stat().st_size if part.exists() else 0    # bytes of an earlier try
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with (urllib.request.urlopen(request, timeout=60) as reply,
              open(part, "ab" if reply.status == 206 else "wb") as out):
            have = out.tell()                             # 0 without 206: this host starts from the beginning
            total = have + int(reply.headers.get("Content-Length") or 0)
            try:
                while chunk := reply.read(1 << 20):
                    out.write(chunk)
                    have += len(chunk)
                    print(f"\r{file.name}: {have >> 20} of {total >> 20} MB", end="", file=sys.stderr)
            finally:
                print(file=sys.stderr)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise DataError(f"{url}: {error}; give another address with --url") from None
        whole = (error.headers.get("Content-Range") or "").rpartition("/")[2]
        if whole.isdigit() and int(whole) != have:        # 416: nothing missing, or there never was as much
            part.unlink()
            raise DataError(f"{url}: has {whole} bytes, {part} had {have} and was removed; "
                            "run the same command again") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataError(f"{url}: {_reason(getattr(error, 'reason', error))}; {have >> 20} MB are kept, "
                        "the same command goes on; another address is given with --url, "
                        "or unpack it yourself (README, Data)") from None
    else:
        if have < total:
            raise DataError(f"{url}: broke off after {have} of {total} bytes; "
                            "the same command goes on from there")
    digest = _md5(part)
    if md5 and digest != md5:
        part.unlink()
        raise DataError(f"{url}: MD5 {digest}, expected {md5}; "
                        "the file was removed, try again or another --url")
    part.replace(file)
    return digest


def unpack(file, folder):
    """Unpack a .tar or .zip below `folder`. Raises DataError on a damaged archive or path that leads out."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if tarfile.is_tarfile(file):
            with tarfile.open(file) as archive:
                archive.extractall(folder, filter="data")  # refuses absolute paths, "..", links out, devices
        else:
            with zipfile.ZipFile(file) as archive:
                for name in archive.namelist():
                    if not (folder / name).resolve().is_relative_to(folder.resolve()):
                        raise DataError(f"{file}: {name} leads out of the folder; "
                                        "nothing was unpacked, try another --url")
                archive.extractall(folder)
    except DataError:
        raise
    except Exception as error:                            # zlib, lzma, zipfile, tarfile each have their own
        if getattr(error, "errno", None):                 # of the disk, not of the archive
            raise DataError(f"{file}: cannot unpack into {folder} ({_reason(error)}); mend that, "
                            "the same command goes on") from None
        raise DataError(f"{file}: cannot unpack ({_reason(error)}); remove it and get it again") from None


def download(name, root, url=None):
    """Fetch and unpack the files of data set `name` below root, or only the one at `url`.

    Under the name of a published file it must have the published MD5; under another (voc only) it is taken as
    it is.
    """
    if name not in FILES:
        raise DataError(f"{name}: nothing to download; " + (
            "VOC comes with --download voc; SegmentationClassAug and train_aug.txt (SBD) lie on file-sharing "
            "links, see README, Data" if name == "voc-aug" else "it has no files of its own"))
    file_name = lambda address: Path(urllib.parse.urlsplit(address).path).name
    files = FILES[name]
    if url:
        names = {file_name(address): (md5, below) for address, md5, below in files}
        if not file_name(url) or file_name(url) not in names and len(files) > 1:
            raise DataError(f"{url}: which file is this? the address must end in {' or '.join(names)}")
        files = [(url, *names.get(file_name(url), (None, files[0][2])))]
    for address, md5, below in files:
        file = Path(root) / file_name(address)
        file.parent.mkdir(parents=True, exist_ok=True)
        digest = _md5(file) if file.exists() else fetch(address, file, md5)
        if md5 and digest != md5:
            raise DataError(f"{file}: MD5 {digest}, expected {md5}; remove it and run the same command again")
        print(f"{file}: MD5 {digest}, {'as published' if md5 else 'nothing published to compare with'}; "
              "unpacking")
        unpack(file, Path(root) / below)


# ----------------------------------------------------------------------------


def sheet():
    """Write data.png: scenes, their labels in colour, and three crops of each with the label cut alike."""
    colour, rows = palette(), []
    for seed in range(5):
        image, label = shapes((0, 0, seed))
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        row = [image, colour[label]]
        for epoch in range(1, 4):
            draws = torch.from_numpy(draw(0, epoch, seed))[None]
            cut, _, mask = crop(x, torch.zeros(1, 1, 16, 16), draws, 128, 8, torch.from_numpy(label)[None])
            row += [(augment(cut, draws)[0] * 255).byte().permute(1, 2, 0).numpy(), colour[mask[0].numpy()]]
        rows.append(np.concatenate(row, 1))
    Image.fromarray(np.concatenate(rows)).save("data.png")
    print("wrote data.png: per row a scene, its label, and three training crops with theirs")
    print("classes:", ", ".join(f"{i} {n}" for i, n in enumerate(Shapes.names)))


def main():
    p = argparse.ArgumentParser(description="Show, check or download data sets.",
                                epilog=__doc__.split("\n\n")[2], allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true",
        help="read every file of --data and name each that is missing or broken")
    p.add_argument("--download", metavar="DATA", choices=tuple(FILES) + ("voc-aug",),
        help="fetch and unpack: voc, coco80, cocostuff27")
    p.add_argument("--url",
        help="another address for --download, when a host has moved: fetches only this file. Under the "
             "name of a published file it must have the published MD5, where there is one; under another "
             "name (voc only) it is taken as it is and its MD5 shown")
    p.add_argument("--data", choices=NAMES, default="shapes", help="data set to check (default: shapes)")
    p.add_argument("--root", default="data",
        help="folder of the data sets, or of the images for folder (default: data)")
    args = p.parse_args()
    if args.data != "shapes" and not args.check or args.url and not args.download:
        p.error("--data goes with --check, --url with --download")
    try:
        if args.download:
            download(args.download, args.root, args.url)
        elif args.check:
            wrong = 0
            for split in ("all",) if args.data == "folder" else ("train", "val"):
                data = dataset(args.data, args.root, split)
                problems, published = check(data), getattr(data, "published", {}).get(data.split)
                expected = f", {published} published" if published else ""
                print(f"{args.data} {data.split}: {len(data)} images{expected}, {len(problems)} problems")
                print("".join(f"  {p}\n" for p in problems), end="")
                wrong += len(problems)
            sys.exit(2 if wrong else 0)
        else:
            sheet()
    except (DataError, OSError) as error:
        sys.exit(print(f"data.py: {error}", file=sys.stderr) or 2)


if __name__ == "__main__":
    main()
