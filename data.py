"""Data sets, and the crop that moves image, CAM and label together.

A data set is a list of images: image(i) -> uint8 (H, W, 3), label(i) -> uint8 (H, W) of class indices, 255
void. `shapes` is rendered from a seed, VOC and COCO are read in their published layouts, `Folder` is any
images. Needs torch, numpy and pillow: copy this file anywhere.

    python data.py                       # writes data.png: scenes of `shapes`, their labels, crops of both
    python tools/get_data.py --help      # downloads and checks VOC and COCO

In this file, in this order:
    crops and augmentation      draw -> crop -> augment: all that the method itself needs
    reading files               open_image, open_label, squash
    VOC, COCO, folders          class tables, then one class for each layout
    shapes                      the renderer
"""

import argparse
import colorsys
import contextlib
import hashlib
import io
import json
import math
import os
import re
import secrets
import stat
import sys
import time
import traceback
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

VOID = 255                                                # label of pixels that belong to no class


# ----------------------------------------------------------------------------
# What every program does alike: errors become lines, and files are written whole


class UserError(OSError):
    """Something that a user can put right. The message is one line: what is wrong, where, what to do."""


def one_line(error):
    """The error's message without line breaks, at most 300 characters; its type if it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def report(error):
    """Print an error, a UserError or the system's OSError or any text, as `PROGRAM: LINE`; returns 2."""
    line = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else one_line(error)
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    return 2


def exit_code(main):
    """Run main(), a whole program, and return its exit code. Errors become one line on stderr.

    returns   0: done, or what main() returned. 2: something that a user can put right, also too little
              memory. 1: a number that is not finite, a lost process or, after a traceback, a mistake of ours
    """
    sys.stdout.reconfigure(errors="backslashreplace")     # names of files may be in any encoding
    try:
        return main() or 0
    except (FloatingPointError, ConnectionError) as error:
        report(error)
        return 1
    except OSError as error:                              # a UserError, or what the system refuses
        return report(error)
    except Exception as error:
        message = str(error).lower()                      # torch, the driver of a GPU and nccl: a type each
        if isinstance(error, MemoryError) or any(words in message for words in CPU_MEMORY):
            return report(f"too little memory on this machine: close other programs or ask for less (smaller "
                          f"--size, larger --accumulate, --limit): {one_line(error)}")
        if "out of memory" in message:
            return report(f"too little memory on the GPU: free it, ask for less (smaller --size, larger "
                          f"--accumulate), or use --device cpu: {one_line(error)}")
        traceback.print_exc()
        return 1


# of torch's allocator, on Linux and macOS and on Windows, and of the system
CPU_MEMORY = ("can't allocate memory", "not enough memory", "cannot allocate memory")
TEMPORARY = ".tmp"                                        # suffix of files that are being written


def write_whole(file, save, sync=True):
    """Write what save(f) writes to a temporary file and move it into place: `file` is always whole.

    sync     wait for the disk, so that a power cut does no harm either; caches do without
    raises   UserError if the file cannot be written; what stood there before stays
    """
    file, content = Path(file), io.BytesIO()
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}{TEMPORARY}")  # other processes write, too
    save(content)                                         # to memory: numpy and torch name no full disk
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(content.getbuffer())
            f.flush()
            if sync:
                os.fsync(f.fileno())
        os.replace(temporary, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{file}: cannot be written ({error.strerror}); put that right, and the same command "
                        f"goes on") from None


def remove_temporary(folder, age=600):
    """Remove what killed processes left in a folder: temporary files that nobody has touched for `age` seconds.

    Younger ones may be those of a process that is writing there now.
    """
    for file in Path(folder).glob(f"*{TEMPORARY}"):
        with contextlib.suppress(OSError):                # another process removed it first
            if file.stat().st_mtime <= time.time() - age:
                file.unlink()


# ----------------------------------------------------------------------------
# Crops and augmentation. Each number is drawn from (seed, epoch, sample), never from a process's own stream,
# so that a sample looks the same in any batch, on any process, and in a run that was resumed.

JITTER = (0.8, 0.8, 0.8, 0.2)                             # TransFGU's, as for ColorJitter; hue in turns


class Draws(NamedTuple):
    """The random numbers of B samples, each (B,) float32: four for `crop`, six for `augment`."""
    scale: torch.Tensor                                   # side of a square, in shares of the image's
    y: torch.Tensor                                       # its top left corner, likewise
    x: torch.Tensor
    flip: torch.Tensor                                    # 1: mirrored
    brightness: torch.Tensor                              # factors; 1: unchanged
    contrast: torch.Tensor
    saturation: torch.Tensor
    hue: torch.Tensor                                     # in turns; 0: unchanged
    grey: torch.Tensor                                    # 1: without colour
    sigma: torch.Tensor                                   # of the blur, in pixels; 0: no blur


def draw(seed, epoch, samples, jitter=JITTER):
    """The Draws of `samples`, a sequence of B integers, in one epoch.

    A square of 0.4 to 1 times the image's side, anywhere in it, mirrored half the time. Then as TransFGU:
    colour jitter with probability 0.3, grayscale 0.2, Gaussian blur 0.2 (theirs is drawn once a batch).

    jitter    the largest change of brightness, contrast, saturation, and of hue in turns
    """
    u = np.array([np.random.default_rng((seed, epoch, int(s))).random(11) for s in samples]).reshape(-1, 11).T
    scale, jittered, blurred = 0.4 + 0.6 * u[0], u[4] < 0.3, u[10] < 0.2
    change = [jittered * (2 * uniform - 1) * most for uniform, most in zip(u[5:9], jitter)]
    sigma = blurred * (1 + 5 * u[10])                     # u[10] is uniform below 0.2, so sigma in 1 to 2
    numbers = (scale, u[1] * (1 - scale), u[2] * (1 - scale), u[3] < 0.5,
               1 + change[0], 1 + change[1], 1 + change[2], change[3], u[9] < 0.2, sigma)
    return Draws(*(torch.from_numpy(n.astype(np.float32)) for n in numbers))


def crop(x, draws, size, mode="bilinear"):
    """Cut and mirror x by the affine grid of `draws`; with the same draws, all that is cut moves alike.

    x         (B, C, S, S) image, CAM or label on any grid of S x S cells
    size      side of the result: the square that is cut is resized to size x size cells
    mode      bilinear (images), nearest (labels), area (CAM: a cell is the mean of 2 x 2 bilinear samples)
    returns   (B, C, size, size) in x's own type; integers that are not taken `nearest` become float32
    """
    if mode == "area":
        return F.avg_pool2d(crop(x, draws, 2 * size), 2)
    scale, zero = draws.scale, torch.zeros_like(draws.scale)                      # (B,) each
    theta = torch.stack([scale * (1 - 2 * draws.flip), zero, 2 * draws.x + scale - 1,
                         zero, scale, 2 * draws.y + scale - 1], 1)                # in -1..1 across the image
    grid = F.affine_grid(theta.view(-1, 2, 3), (len(theta), 1, size, size), align_corners=False)
    exact = torch.promote_types(x.dtype, grid.dtype)      # float32, or float64
    cut = F.grid_sample(x.to(exact), grid.to(exact), mode, "border", align_corners=False)
    return cut.to(x.dtype) if x.is_floating_point() or mode == "nearest" else cut


def augment(image, draws):
    """Colour jitter, grayscale and blur of image (B, 3, H, W), floats in 0..1 -> same shape, type and range.

    Hue turns about the grey axis of RGB (torchvision's goes through HSV).
    """
    if not image.is_floating_point():
        raise ValueError(f"image is {image.dtype}: floats in 0..1 expected, divide by 255")
    given, image = image.dtype, image.to(torch.promote_types(image.dtype, torch.float32))
    of_each = lambda numbers: numbers.view(-1, 1, 1, 1)   # (B,) -> (B, 1, 1, 1)
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=image.dtype).view(1, 3, 1, 1)
    luma = luma.to(image.device, non_blocking=True)       # `new_tensor` would wait for the GPU
    image = (image * of_each(draws.brightness)).clamp(0, 1)                       # a factor of 1: unchanged
    mean = (image * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)         # (B, 1, 1, 1)
    image = ((image - mean) * of_each(draws.contrast) + mean).clamp(0, 1)
    shade = (image * luma).sum(1, keepdim=True)           # (B, 1, H, W); grey is saturation 0
    saturation = of_each(draws.saturation)
    image = ((image - shade) * saturation * (1 - of_each(draws.grey)) + shade).clamp(0, 1)
    angle = of_each(draws.hue) * 2 * math.pi              # Rodrigues' formula
    cos, sin = angle.cos(), angle.sin()
    r, g, b = image.unbind(1)
    across = torch.stack([b - g, r - b, g - r], 1) / math.sqrt(3)                 # (B, 3, H, W)
    image = (cos * image + sin * across + (1 - cos) * image.mean(1, keepdim=True)).clamp(0, 1)
    edge = torch.exp(-0.5 / draws.sigma.clamp(min=1e-3) ** 2)                     # 3 x 3 Gaussian; 0: no blur
    line = torch.stack([edge, torch.ones_like(edge), edge], 1) / (1 + 2 * edge)[:, None]
    kernel = (line[:, :, None] * line[:, None]).repeat_interleave(3, 0)[:, None]  # (3 B, 1, 3, 3)
    B, _, H, W = image.shape                              # every channel is a group with its own kernel
    padded = F.pad(image, (1, 1, 1, 1), mode="reflect").reshape(1, 3 * B, H + 2, W + 2)
    return F.conv2d(padded, kernel.to(image.dtype), groups=3 * B).view(B, 3, H, W).to(given)


def to_float(image, device=None):
    """uint8 (B, H, W, 3), numpy or torch -> float (B, 3, H, W) in 0..1, on `device` if given."""
    return torch.as_tensor(image).to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255


# ----------------------------------------------------------------------------
# Reading files

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff")
# photographs that are not read; `Folder` says how many it left out
LEFT_OUT = (".heic", ".heif", ".hif", ".avif", ".gif", ".dng", ".cr2", ".cr3", ".nef", ".arw")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")          # not EPS, say, which would be run as a program
MOST_PIXELS = 89_478_485                                  # 0.3 GB decoded; of a JPEG four times as many,
REDUCED = 8192 * 6144                                     # since one of more than this is decoded smaller
TURNS = dict(zip(range(2, 9), (                           # of each EXIF orientation; 1: not turned
    Image.FLIP_LEFT_RIGHT, Image.ROTATE_180, Image.FLIP_TOP_BOTTOM, Image.TRANSPOSE,
    Image.ROTATE_270, Image.TRANSVERSE, Image.ROTATE_90)))

warnings.filterwarnings("ignore", module="PIL")           # unusable files are refused here, in one line
Image.MAX_IMAGE_PIXELS = 2 * MOST_PIXELS                  # of more than twice that Pillow reads nothing


@contextlib.contextmanager
def opened(path, what="image"):
    """The file as a Pillow image. Whatever goes wrong with it, here or in the block, is a UserError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):       # a pipe would never end
            raise UserError(f"{path}: a folder, pipe or device, not a file; rename or remove it")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS and not isinstance(image, JpegImageFile):
                raise UserError(f"{path}: {image.width} x {image.height} pixels are too many for one {what}; "
                                "shrink it")
            yield image
    except UserError:
        raise
    except Exception as error:                            # decoders raise a dozen kinds on damaged files
        reason = ("no JPEG, PNG, BMP, WebP or TIFF" if isinstance(error, UnidentifiedImageError)
                  else getattr(error, "strerror", None) or str(error) or type(error).__name__)
        raise UserError(f"{path}: cannot read this {what} ({reason.splitlines()[0][:100]}); "
                        "get it again or leave it out") from None


def orientation(image):
    """1 to 8 as EXIF has it; 1, not turned, where that cannot be read."""
    try:
        found = image.getexif().get(0x112)
        return found if found in TURNS else 1
    except Exception:                                     # broken EXIF raises a dozen kinds, too
        return 1


def open_image(path, upright=False, least=None):
    """Decode any image to RGB: uint8 (H, W, 3). Raises UserError naming the file.

    upright   turn it as its EXIF says: right for one's own photographs, wrong for data sets whose masks are
              not turned
    least     pixels a side that are enough: a picture k times as large is reduced k times, a JPEG
              already while it is decoded. A JPEG of more than REDUCED pixels is halved or quartered anyway
    """
    with opened(path) as image:
        is_16_bit = ";16" in str(image.tile[:1])
        scale = 2 ** max(0, math.ceil(math.log(image.width * image.height / REDUCED, 4)))
        image.draft(None, [min(side // scale, least or side) for side in image.size])             # JPEG alone
        image.load()                                      # Pillow turns TIFF by itself here
        turn = TURNS.get(orientation(image)) if upright else None
        unknown = UserError(f"{path}: its file does not say which value is white; save it with 8 bits")
        if image.mode[0] in "IF":                         # 16-bit grey, 32-bit integers or floats
            values = np.asarray(image)
            if image.mode == "F" or not 0 <= values.min() <= values.max() < 2 ** 16:
                raise unknown
            image, is_16_bit = Image.fromarray((values >> 8).astype(np.uint8)), True
        if image.mode != "RGB":
            image = image.convert("RGB")
        # cameras store 12 or 14 bits in 16, and the file does not say if 4095 is white or nearly black
        if is_16_bit and max(high for _, high in image.getextrema()) < 2 ** 14 >> 8:
            raise unknown
        if least:
            image = image.reduce(max(1, min(image.size) // least))
        return np.array(image if turn is None else image.transpose(turn))


def upright_size(path):
    """(W, H) of the whole photograph, which `open_image` may reduce. Decodes it only if it is no JPEG."""
    with opened(path) as image:
        if not isinstance(image, JpegImageFile):
            image.load()
        return image.size[::-1] if orientation(image) > 4 else image.size


def open_label(path, n_values=256, colours=None, gaps=()):
    """Decode a palette or grey PNG of class indices: uint8 (H, W), 255 void.

    n_values  the values 0 to n_values - 1 are in use, but for the `gaps` among them, and 255; others are an
              error
    colours   (256, 3) uint8. If given, a value that is used must have this colour, or the grey of its number,
              in the file's palette: a program that sorts palettes anew gives the classes other numbers
    Raises UserError naming the file.
    """
    with opened(path, "label") as image:
        if image.mode not in ("P", "L"):
            raise UserError(f"{path}: this label is {image.mode}; "
                            "make it an 8-bit palette or grey PNG of class indices")
        label, used = np.array(image), np.unique(image)
        given = np.array(image.getpalette() or []).reshape(-1, 3)                 # may be shorter than 256
    unknown = used[(used >= n_values) & (used != VOID) | np.isin(used, gaps)]
    if unknown.size:
        raise UserError(f"{path}: label value {unknown[0]} is not in use in this data set (0 to "
                        f"{n_values - 1}{', with gaps' if len(gaps) else ''}, and 255); correct the file, or "
                        f"choose another data set")
    for value in used[used < min(len(given), VOID)] if colours is not None else ():
        colour, known = given[value].tolist(), colours[value].tolist()
        if colour not in (known, [value] * 3):
            raise UserError(f"{path}: its palette shows label value {value} in colour {colour}, which is "
                            f"{known} in this data set: the values were changed; get the original file")
    return label


def squash(image, size, mode="bilinear", antialias=False):
    """uint8 (H, W[, 3]) -> uint8 (size, size[, 3]), aspect ignored.

    Bilinear without antialiasing, or nearest (TransFGU). `antialias`: of what is shrunk more than twice, for
    photographs of one's own.
    """
    if image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype}: uint8 expected")
    if antialias and max(image.shape[:2]) > 2 * size:
        return np.array(Image.fromarray(image).resize((size, size), Image.BILINEAR))
    x = torch.from_numpy(np.ascontiguousarray(image))
    x = x.permute(2, 0, 1)[None].float() if x.ndim == 3 else x[None, None].float()
    x = F.interpolate(x, size=(size, size), mode=mode)[0]
    return x.round().byte().permute(1, 2, 0).squeeze(2).numpy()


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

COCO_VALUES = 182                                         # raw ids of stuffthingmaps: 91 things, then stuff


def coco_table(kind):
    """256-entry table, raw stuffthingmaps id -> class; ids that no class has are void.

    kind      `coco80` (things 1..80, stuff 0) or `cocostuff27` (0..26)
    """
    table = np.full(256, VOID, np.uint8)
    if kind == "coco80":
        table[[raw for raw, name in enumerate(COCO_THINGS) if name != "-"]] = np.arange(1, 81)
        table[len(COCO_THINGS):COCO_VALUES] = 0           # stuff
    else:
        for index, raw in enumerate(STUFF27.values()):
            table[list(raw)] = index
    return table


def class_shares(pixels, names):
    """One line on the classes that labels show, and their shares of all pixels, from the largest on.

    pixels   (256,) or (n + 1,): how many pixels have each class index; void stands behind the n classes
    """
    total, shown = max(1, pixels.sum()), sorted(zip(pixels, names), key=lambda c: -c[0])
    words = [f"{name} {100 * count / total:.1f} %" for count, name in shown if count]
    words += [f"void {100 * pixels[len(names):].sum() / total:.1f} %"]
    return f"labels show {len(words) - 1} of {len(names)} classes: {', '.join(words)}"


def palette():
    """PASCAL VOC's colours: (256, 3) uint8. Class indices are spread over the bits of the three channels."""
    bit = lambda b: (np.arange(256) >> b) & 1
    colour = [sum(bit(3 * b + c) << (7 - b) for b in range(3)) for c in range(3)]
    return np.stack(colour, 1).astype(np.uint8)


# ----------------------------------------------------------------------------
# Data sets on disk


class Dataset:
    """Images with labels on disk. A subclass sets

    ids, images, labels    names of the samples, and paths of their files; no labels: ()
    names                  of the classes, in this order: background, things, stuff
    things, stuff          how many clusters k-means looks for, among the windows of each
    background             whether class 0 is background, which is no cluster
    upright                whether images are turned as their EXIF says
    table, n_values, colours, gaps    class of each value in the label files; for the others see `open_label`
    """
    stuff, background, upright = 0, True, False
    table, n_values, colours, gaps = np.arange(256, dtype=np.uint8), 256, None, ()

    def __len__(self):
        return len(self.ids)

    def limit(self, n):
        """Keep the first n images."""
        self.ids, self.images, self.labels = self.ids[:n], self.images[:n], self.labels[:n]

    def summary(self):
        """One line on what was read."""
        return f"{len(self)} images"

    def image(self, i):
        """uint8 (H, W, 3). Raises UserError naming the file."""
        return open_image(self.images[i], self.upright)

    def squashed(self, i, size):
        """The image as uint8 (size, size, 3); a photograph of one's own is antialiased. Raises UserError."""
        if not self.upright:
            return squash(self.image(i), size)
        return squash(open_image(self.images[i], True, least=2 * size), size, antialias=True)

    def label(self, i):
        """uint8 (H, W), 255 void; None without labels. Raises UserError, also if not of its image's size."""
        if not self.labels:
            return None
        label = open_label(self.labels[i], self.n_values, self.colours, self.gaps)
        with opened(self.images[i]) as image:
            if image.size != label.shape[::-1]:
                mend = "its EXIF turns it: save it turned" if orientation(image) > 1 else "get the pair again"
                raise UserError(f"{self.labels[i]}: this label is {label.shape[1]} x {label.shape[0]}, "
                                f"its image {image.width} x {image.height}; {mend} or leave it out")
        return self.table[label]


def first_folder(root, candidates, advice):
    """The first of the candidates below root that exists. Raises UserError with the advice if none does."""
    for folder in (Path(root) / part for part in candidates):
        if folder.is_dir():
            return folder
    raise UserError(f"{Path(root) / candidates[0]}: no such folder; {advice}")


class VOC(Dataset):
    """PASCAL VOC 2012 below root, VOCdevkit or VOC2012.

    aug       train on train_aug.txt and SegmentationClassAug, which have SBD's masks, too
    """
    names, things, n_values, colours = VOC_NAMES, 20, 21, palette()

    def __init__(self, root="data", split="train", aug=False):
        aug = aug and split == "train"
        advice = f"get it with: python tools/get_data.py {'voc-aug' if aug else 'voc'} --root {root}"
        base = first_folder(root, ("VOCdevkit/VOC2012/ImageSets", "VOC2012/ImageSets", "ImageSets"),
                            f"{advice}, or give another --root").parent
        file = base / "ImageSets" / "Segmentation" / f"{'train_aug' if aug else split}.txt"
        if not file.is_file():
            raise UserError(f"{file}: no such list; {advice}")
        images = first_folder(base, ("JPEGImages",), advice)
        # UTF-16, as Windows writes it; UTF-8; or other bytes, those of the file's name or Latin-1
        content, self.ids = file.read_bytes(), []
        how = ("utf-16", "replace") if b"\0" in content else ("utf-8-sig", "surrogateescape")
        for line in filter(str.strip, content.decode(*how).splitlines()):
            # DeepLab's have "/JPEGImages/ID.jpg /SegmentationClassAug/ID.png", others a flag after the ID
            whole = re.split(r"\.(?:jpe?g|png)(?:\s|$)", line.strip(), flags=re.I)[0].rpartition("/")[2]
            latin = whole.encode("utf-8", "surrogateescape").decode("latin-1")
            names = whole, latin, *whole.split()[:1]      # the last is told if there is no such file
            self.ids.append(next((n for n in names if (images / f"{n}.jpg").exists()), names[-1]))
        if not self.ids:
            raise UserError(f"{file}: an empty list; {advice}")
        name, times = Counter(self.ids).most_common(1)[0]
        if times > 1:
            raise UserError(f"{file}: {name} is listed twice; take one out")
        labels = first_folder(base, ("SegmentationClassAug" if aug else "SegmentationClass",), advice)
        self.images = [images / f"{i}.jpg" for i in self.ids]
        self.labels = [labels / f"{i}.png" for i in self.ids]


class COCO(Dataset):
    """COCO 2017 with stuffthingmaps. `kind`: coco80 (background + 80) or cocostuff27 (12 things + 15 stuff).

    Samples are the images whose map shows at least one thing pixel. TransFGU takes those with an instance
    annotation, which differs where every instance is hidden in the map; no json is needed here. To find the
    samples, all maps are read once; the list is kept in `cache`, a folder, if given. An image whose map
    cannot be read is a sample, so that it is named when it is used, not dropped; such a list is not kept.
    """
    n_values, colours = COCO_VALUES, np.arange(256)[:, None].repeat(3, 1)         # the maps are grey
    # a map with one of these values counts its categories from 1, not 0
    gaps = [raw for raw, name in enumerate(COCO_THINGS) if name == "-"]

    def __init__(self, root="data", split="train", kind="coco80", cache=None):
        advice = f"get it with: python tools/get_data.py {kind} --root {root}"
        images = first_folder(root, (f"images/{split}2017", f"{split}2017"), advice)
        labels = first_folder(root, (f"annotations/{split}2017", f"stuffthingmaps/{split}2017"), advice)
        self.table, self.background = coco_table(kind), kind == "coco80"
        self.names = (["background"] + [n for n in COCO_THINGS if n != "-"] if self.background
                      else list(STUFF27))
        self.things, self.stuff = (80, 0) if self.background else (12, 15)
        names = sorted(p.stem for p in images.glob("*.jpg"))
        if not names:
            raise UserError(f"{images}: no .jpg images; {advice}")

        sizes = sorted((entry.name, entry.stat().st_size) for entry in os.scandir(labels))
        key = hashlib.sha256(json.dumps([names, sizes]).encode()).hexdigest()[:16]
        kept = Path(cache) / f"coco-{split}-{key}.json" if cache else None
        if kept and kept.is_file():
            try:
                self.ids = json.loads(kept.read_text())
            except ValueError:
                raise UserError(f"{kept}: damaged; remove it, and it is made again") from None
        else:
            def shows_thing(name):
                try:
                    return bool((open_label(labels / f"{name}.png") < len(COCO_THINGS)).any())
                except UserError:
                    return None
            with ThreadPoolExecutor() as pool:
                shown = list(pool.map(shows_thing, names))
            self.ids = [name for name, thing in zip(names, shown) if thing is not False]
            if not self.ids:
                raise UserError(f"{labels}: no map shows a thing (values 0 to 90); {advice}")
            if kept and None not in shown:
                write_whole(kept, lambda f: f.write(json.dumps(self.ids).encode()), sync=False)
        self.images = [images / f"{i}.jpg" for i in self.ids]
        self.labels = [labels / f"{i}.png" for i in self.ids]


class Folder(Dataset):
    """Any images, without labels; `n_classes` things and a background.

    root      a folder, an image, or a list of these. Subfolders are searched, but for what starts with a dot
              and Synology's thumbnails. Links to folders, folders of thumbnails, and photographs of LEFT_OUT
              are left out, too, in a line on stderr for each kind. ids are relative to their root
    """
    upright = True

    def __init__(self, root, n_classes=20):
        self.names = ["background", *(f"cluster {k}" for k in range(1, n_classes + 1))]
        self.things = n_classes
        self.ids, self.images, self.labels = [], [], []

        def refuse(error):                                # os.walk alone would leave such a folder out
            raise UserError(f"{error.filename}: cannot read this folder ({error.strerror}); "
                            "change its permissions")

        for root in map(Path, [root] if isinstance(root, (str, os.PathLike)) else root):
            if not root.exists():
                raise UserError(f"{root}: no such file or folder; correct the path")
            found, base = ([root], root.parent) if root.is_file() else ([], root)
            left_out = defaultdict(list)                  # names by kind
            for folder, below, files in os.walk(root, onerror=refuse) if root.is_dir() else ():
                below[:] = sorted(f for f in below if not f.startswith(".") and f != "@eaDir")
                left_out["linked folders"] += [f for f in below if os.path.islink(os.path.join(folder, f))]
                thumbnails = [f for f in below if f.lower() in ("thumbnails", "thumbs")]
                left_out["folders of thumbnails"] += thumbnails
                below[:] = [f for f in below if f not in thumbnails]
                files = sorted(f for f in files if not f.startswith("."))
                for suffix in LEFT_OUT:
                    left_out[f"{suffix} files"] += [f for f in files if f.lower().endswith(suffix)]
                found += [Path(folder) / f for f in files if f.lower().endswith(SUFFIXES)]
            for kind, names in left_out.items():
                if names and os.environ.get("RANK", "0") == "0":                  # one process tells
                    report(f"{root}: {len(names)} {kind} left out, first {', '.join(names[:3])}")
            if not found:
                raise UserError(f"{root}: no images here; give a folder with any of {' '.join(SUFFIXES)}")
            self.ids += [str(file.relative_to(base).with_suffix("")) for file in found]
            self.images += found


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
    """1/f noise, grey with faint colour (`tint`: its strength).

    The same statistics in every image, so that it carries no identity.
    """
    cells = [(max(2, n * size // 96), weight)
             for n, weight in ((5, 0.5), (9, 0.7), (17, 0.6), (33, 0.5), (65, 0.35))]
    grey = _noise(rng, size, cells)[..., None]
    colour = np.stack([_noise(rng, size, cells[:4]) for _ in range(3)], 2)
    return 0.45 + 0.15 * grey + tint * (colour - colour.mean(2, keepdims=True))


def _axes(size, cx, cy, turn):
    """Each pixel's place along and across the direction `turn` from (cx, cy): two (size, size)."""
    y, x = np.mgrid[:size, :size] / (size - 1)
    cos, sin = math.cos(turn), math.sin(turn)
    return (x - cx) * cos + (y - cy) * sin, (y - cy) * cos - (x - cx) * sin


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
    size, shape = len(image), SHAPES[thing["category"]]
    u, v = _axes(size, cx, cy, thing["turn"])
    u, v = u / radius * thing["aspect"], v / radius / thing["aspect"]
    r, f, p, shade = np.hypot(u, v), thing["frequency"], thing["phase"], thing["shade"]
    if shape == "disc":                                   # inside > 0 in the object, whose radius is about 1
        inside, texture = 1 - r, np.sin(12 * f * r + p)
    elif shape == "square":
        inside, texture = 0.85 - np.maximum(abs(u), abs(v)), 3 * np.sin(7 * f * u + p) * np.sin(7 * f * v + p)
    elif shape == "triangle":
        inside = 0.55 - np.maximum(-v, np.maximum(0.866 * u + 0.5 * v, 0.5 * v - 0.866 * u))
        texture = np.sin(20 * f * v + p)
    elif shape == "star":
        inside, texture = 0.68 + 0.3 * np.cos(5 * np.arctan2(v, u)) - r, 0.5 - 0.35 * r
    else:                                                 # cross
        inside = np.maximum(np.minimum(0.36 - abs(u), 1 - abs(v)), np.minimum(0.36 - abs(v), 1 - abs(u)))
        texture = 2 * np.cos(11 * f * u) * np.cos(11 * f * v) - 0.6
    alpha = np.clip(0.5 + inside * radius * size, 0, 1)   # one pixel of smooth edge
    mix = np.clip(0.5 + 0.9 * texture, 0, 1)[..., None]
    light = np.clip(1 + 0.25 * (u * math.cos(shade) + v * math.sin(shade)), 0.5, 1.5)[..., None]
    _paint(image, alpha, (thing["light"] * mix + thing["dark"] * (1 - mix)) * light)
    label[alpha > 0.5] = thing["category"] + 1


def render(rng, objects, size, radius, tint=0.02, clutter=0.2):
    """Paint objects where they hardly overlap, on noise with small unlabelled clutter, under uneven light.

    objects   of `new_object`; radius: (least, most) of them, in shares of the image
    tint      colour of the noise; clutter: highest saturation of the clutter. Larger values make it harder
    returns   uint8 (size, size, 3), uint8 (size, size) of 0 and category + 1
    """
    image, label = _background(rng, size, tint), np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(2, 7)):                   # clutter: little grey blobs and sticks
        cx, cy, r, turn = rng.random(), rng.random(), rng.uniform(0.02, 0.06), rng.uniform(0, 2 * math.pi)
        u, v = _axes(size, cx, cy, turn)
        inside = 1 - np.hypot(u / r, v / r * rng.uniform(0.5, 4))
        colour = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, clutter), rng.uniform(0.2, 1))
        _paint(image, np.clip(0.5 + inside * r * size, 0, 1), np.array(colour))
    placed = []                                           # (x, y, radius) of the objects so far
    for thing in objects:
        for _ in range(40):                               # no room found: the scene has one object fewer
            r, (cx, cy) = rng.uniform(*radius), rng.uniform(0.2, 0.8, 2)
            if all(math.hypot(cx - a, cy - b) > 0.8 * (r + c) for a, b, c in placed):
                placed.append((cx, cy, r))
                _draw_object(image, label, thing, cx, cy, r)
                break
    towards_light, _ = _axes(size, 0.5, 0.5, rng.uniform(0, 2 * math.pi))
    image *= rng.uniform(0.8, 1.15) + rng.uniform(0, 0.7) * towards_light[..., None]
    image += rng.normal(0, 0.02, image.shape)             # the sensor's noise
    return (image.clip(0, 1) * 255).astype(np.uint8), label


@lru_cache(500)                                           # both splits: windows and labels need scenes again
def shapes(seed, size=128):
    """One scene: uint8 (size, size, 3), (size, size) of 0 background, 1..5 `SHAPES`; two or three objects."""
    rng = np.random.default_rng(seed)
    categories = rng.choice(len(SHAPES), rng.integers(2, 4), replace=False)
    return render(rng, [new_object(rng, int(k)) for k in categories], size, (0.16, 0.28))


class Shapes(Dataset):
    """Scenes of `shapes`: 400 for training, 100 for validation; another `seed` gives other scenes of both."""
    names, things, images, labels = ["background", *SHAPES], len(SHAPES), (), ()

    def __init__(self, split="train", seed=0):
        self.ids = [(seed, int(split == "val"), i) for i in range(400 if split == "train" else 100)]

    def image(self, i):
        return shapes(self.ids[i])[0].copy()

    def label(self, i):
        return shapes(self.ids[i])[1].copy()


# ----------------------------------------------------------------------------

NAMES = ("shapes", "voc", "voc-aug", "coco80", "cocostuff27", "folder")


def dataset(name, root="data", split="train", classes=20, seed=0, cache=None):
    """The data set called `name`, one of NAMES. Raises UserError if it is missing or broken.

    root      folder of the data set, or the images of `folder`
    split     train or val; `folder` has no split
    classes   clusters of `folder`; seed: of the scenes of `shapes`; cache: folder for COCO's list of samples
    """
    if name not in NAMES:
        raise UserError(f"{name}: no such data set; choose from {', '.join(NAMES)}")
    if name == "shapes":
        return Shapes(split, seed)
    if name in ("voc", "voc-aug"):
        return VOC(root, split, name == "voc-aug")
    if name == "folder":
        return Folder(root, classes)
    return COCO(root, split, name, cache)


def main():
    """Write data.png: per row a scene, its label, and three crops of it with the label cut alike."""
    argparse.ArgumentParser(description=main.__doc__, epilog="Data sets: python tools/get_data.py --help",
                            usage=argparse.SUPPRESS, allow_abbrev=False).parse_args()
    colour, rows = palette(), []
    for scene in range(5):
        image, label = shapes((0, 0, scene))
        x, y = to_float(image[None]), torch.from_numpy(label)[None, None]         # (1, 3, S, S), (1, 1, S, S)
        row = [image, colour[label]]
        for epoch in range(1, 4):
            draws = draw(0, epoch, [scene])
            cut, mask = augment(crop(x, draws, 128), draws), crop(y, draws, 128, "nearest")
            row += [(cut[0] * 255).byte().permute(1, 2, 0).numpy(), colour[mask[0, 0].byte().numpy()]]
        rows.append(np.concatenate(row, 1))
    try:
        Image.fromarray(np.concatenate(rows)).save("data.png")
    except OSError as error:
        sys.exit(report(error))
    print("wrote data.png: per row a scene, its label, and three training crops, recoloured, with theirs")
    print("classes:", ", ".join(f"{i} {n}" for i, n in enumerate(Shapes.names)))


if __name__ == "__main__":
    main()
