"""Data sets, and the crop that moves image, CAM and label together.

A data set is a list of images: image(i) -> uint8 (H, W, 3), label(i) -> uint8 (H, W) of class indices, 255
void. `shapes` is rendered from a seed, VOC and COCO are read in their published layouts, `Folder` is any
images, `Masks` any images with labels. Needs torch, numpy and pillow: copy this file anywhere.

    python data.py                       # writes data.png: scenes of `shapes`, their labels, crops of both
    python tools/get_data.py --help      # downloads and checks VOC and COCO

In this file, in this order:
    crops and augmentation      draw -> crop -> augment: all that the method itself needs
    programs                    errors become lines, files are written whole, progress
    reading files               open_image, open_label, squash
    classes                     their names in VOC and COCO, their shares, their colours
    data sets on disk           one class for each layout, and a check of all files
    shapes                      the renderer
"""

import argparse
import colorsys
import contextlib
import hashlib
import io
import itertools
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

VOID = 255                                                # label of pixels that belong to no class


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
    colour jitter with probability 0.3, grayscale 0.2, Gaussian blur 0.2, which theirs draws once a batch.

    jitter    the largest change of brightness, contrast, saturation, and of hue in turns
    """
    generators = [np.random.default_rng((seed, epoch, int(sample))) for sample in samples]
    uniforms = np.array([g.random(11) for g in generators]).reshape(-1, 11)       # (B, 11) in 0..1
    (u_scale, u_y, u_x, u_flip, u_jitter, u_brightness, u_contrast, u_saturation, u_hue, u_grey,
     u_blur) = uniforms.T                                 # (B,) each
    jittered = u_jitter < 0.3
    sigma = (u_blur < 0.2) * (1 + 5 * u_blur)             # 1 to 2 where u_blur is uniform in 0..0.2, else 0

    def change(uniform, largest):                         # (B,), from -largest to largest, 0 if not jittered
        return jittered * (2 * uniform - 1) * largest

    scale = 0.4 + 0.6 * u_scale
    numbers = Draws(
        scale=scale,
        y=u_y * (1 - scale),
        x=u_x * (1 - scale),
        flip=u_flip < 0.5,
        brightness=1 + change(u_brightness, jitter[0]),
        contrast=1 + change(u_contrast, jitter[1]),
        saturation=1 + change(u_saturation, jitter[2]),
        hue=change(u_hue, jitter[3]),
        grey=u_grey < 0.2,
        sigma=sigma)
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
    zero = torch.zeros_like(draws.scale)                  # (B,)
    mirror = 1 - 2 * draws.flip                           # -1: the square is read from right to left
    centre_x = 2 * draws.x + draws.scale - 1              # of the square, in -1..1 across the image
    centre_y = 2 * draws.y + draws.scale - 1
    # the map from the result's coordinates to the image's, both in -1..1: (B, 2, 3)
    theta = torch.stack([torch.stack([draws.scale * mirror, zero, centre_x], 1),
                         torch.stack([zero, draws.scale, centre_y], 1)], 1)
    grid = F.affine_grid(theta, (len(theta), 1, size, size), align_corners=False) # (B, size, size, 2)
    exact = torch.promote_types(x.dtype, grid.dtype)      # float32, or float64
    cut = F.grid_sample(x.to(exact), grid.to(exact), mode, "border", align_corners=False)
    return cut.to(x.dtype) if x.is_floating_point() or mode == "nearest" else cut


def per_image(numbers):
    """(B,) -> (B, 1, 1, 1)"""
    return numbers.view(-1, 1, 1, 1)


def augment(image, draws):
    """Colour jitter, grayscale and blur of image (B, 3, H, W), floats in 0..1 -> same shape, type and range.

    Hue turns about the grey axis of RGB (torchvision's goes through HSV).
    """
    if not image.is_floating_point():
        raise ValueError(f"image is {image.dtype}: floats in 0..1 expected, divide by 255")
    x = image.to(torch.promote_types(image.dtype, torch.float32))                 # float32, or float64
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype).view(1, 3, 1, 1)
    luma = luma.to(x.device, non_blocking=True)           # `new_tensor` would wait for the GPU
    x = (x * per_image(draws.brightness)).clamp(0, 1)     # a factor of 1: unchanged
    mean = (x * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)             # (B, 1, 1, 1)
    x = ((x - mean) * per_image(draws.contrast) + mean).clamp(0, 1)
    shade = (x * luma).sum(1, keepdim=True)               # (B, 1, H, W); grey is saturation 0
    x = ((x - shade) * per_image(draws.saturation) * (1 - per_image(draws.grey)) + shade).clamp(0, 1)
    angle = per_image(draws.hue) * 2 * math.pi            # Rodrigues' formula
    cos, sin = angle.cos(), angle.sin()
    r, g, b = x.unbind(1)
    across = torch.stack([b - g, r - b, g - r], 1) / math.sqrt(3)                 # (B, 3, H, W)
    x = (cos * x + sin * across + (1 - cos) * x.mean(1, keepdim=True)).clamp(0, 1)
    edge = torch.exp(-0.5 / draws.sigma.clamp(min=1e-3) ** 2)                     # (B,); 0: no blur
    line = torch.stack([edge, torch.ones_like(edge), edge], 1)                    # a Gaussian of 3 pixels
    line = line / (1 + 2 * edge)[:, None]                 # (B, 3), sums to 1
    kernel = (line[:, :, None] * line[:, None]).to(x.dtype)                       # (B, 3, 3)
    # each channel of each image is a group of its own, with its image's kernel
    kernel = kernel.repeat_interleave(3, 0)[:, None]      # (3 B, 1, 3, 3)
    B, _, H, W = x.shape
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect").reshape(1, 3 * B, H + 2, W + 2)
    return F.conv2d(padded, kernel, groups=3 * B).view(B, 3, H, W).to(image.dtype)


def to_float(image, device=None):
    """uint8 (B, H, W, 3), numpy or torch -> float (B, 3, H, W) in 0..1, on `device` if given."""
    return torch.as_tensor(image).to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255


# ============================================================================
# What the method computes stands above. What follows reads files, and renders `shapes`.
# ============================================================================
# Programs: errors become lines, files are written whole, progress

TEMPORARY = ".tmp"                                        # suffix of files that are being written
# how torch and the system word a lack of memory: of the machine (Linux and macOS, Windows), of a GPU
MACHINE_IS_FULL = ("can't allocate memory", "not enough memory", "cannot allocate memory")
GPU_IS_FULL = ("out of memory", "alloc_failed")


class UserError(OSError):
    """Something that a user can put right. The message is one line: what is wrong, where, what to do."""


def one_line(error):
    """A library's message without line breaks, at most 300 characters of it; its type if it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def report(error):
    """Print an error, a UserError or the system's OSError or any text, as `PROGRAM: LINE`; returns 2."""
    line = " ".join(str(error).split())
    if getattr(error, "filename", None):                  # the system's
        line = f"{error.filename}: {error.strerror}"
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
        message = str(error).lower()                      # torch, a GPU's driver and nccl have a type each
        if isinstance(error, MemoryError) or any(words in message for words in MACHINE_IS_FULL):
            return report("too little memory on this machine; close other programs, or ask for less (smaller "
                          f"--size, larger --accumulate, --limit): {one_line(error)}")
        if any(words in message for words in GPU_IS_FULL):
            return report("too little memory on the GPU; free it, ask for less (smaller --size, larger "
                          f"--accumulate), or use --device cpu: {one_line(error)}")
        traceback.print_exc()                             # a mistake of ours
        return 1


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
    """Remove what killed processes left in a folder: temporary files that are older than `age` seconds.

    Younger ones may be those of a process that is writing there now.
    """
    for file in Path(folder).glob(f"*.{'[0-9a-f]' * 8}{TEMPORARY}"):      # `write_whole`'s names
        with contextlib.suppress(OSError):                # another process removed it first
            if file.stat().st_mtime <= time.time() - age:
                file.unlink()


def check_outside(out, photographs):
    """Raise UserError if the folder `out` lies in one of these folders or is that of one of these files."""
    place = Path(out).resolve()
    for path in map(Path, photographs):
        folder = (path if path.is_dir() else path.parent).resolve()
        if place == folder or path.is_dir() and place.is_relative_to(folder):
            raise UserError(f"--out {out}: lies in the folder of photographs {folder}, where its pictures "
                            f"would be taken for photographs; give a folder outside")


class Progress:
    """Says how far a stage of a program is and how long it will take.

    It does so each second on a terminal, which shows the last line only, else each half minute. Called with
    the number of steps that are done, of `total`.
    """

    def __init__(self, stage, total):
        self.stage, self.total = stage, total
        self.start = self.last_line = time.time()

    def __call__(self, done):
        now, terminal = time.time(), sys.stdout.isatty()
        if done == self.total:
            print(end="\x1b[K" if terminal else "", flush=True)                   # clears the line
        elif now - self.last_line > (1 if terminal else 30):
            self.last_line = now
            left = (now - self.start) / done * (self.total - done)
            print(f"{self.stage} {done} of {self.total}, {now - self.start:.0f} s, about {left:.0f} s left",
                  end="\x1b[K\r" if terminal else "\n", flush=True)


# ----------------------------------------------------------------------------
# Reading files

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jif", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")          # not EPS, say, which would be run as a program
MOST_PIXELS = 89_478_485                                  # 0.3 GB decoded; of a JPEG four times as many
REDUCED = 8192 * 6144                                     # a JPEG of more pixels is decoded at 1/2 or 1/4
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
            raise UserError(f"{path}: a folder, pipe or device, not a file; give it another name or place")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS and not isinstance(image, JpegImageFile):
                raise UserError(f"{path}: {image.width} x {image.height} pixels are too many for one {what}; "
                                "shrink it")
            yield image
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError:
        reason, advice = unread_kind(path)
        raise UserError(f"{path}: cannot read this {what} ({reason}); {advice} or leave it out") from None
    except Exception as error:                            # decoders raise a dozen kinds on damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{path}: cannot read this {what} ({reason.splitlines()[0][:100]}); "
                        "get it again or leave it out") from None


def unread_kind(path):
    """What a file is that Pillow does not know, by its first bytes, and what to do with it."""
    with open(path, "rb") as file:
        start = file.read(12)
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "a TIFF of more bands or longer numbers than are supported", "save three bands with 8 bits"
    if start[4:8] == b"ftyp":
        return "HEIC, AVIF or a film", "convert it to JPEG"
    return "no JPEG, PNG, BMP, WebP or TIFF", "get it again"


def orientation(image):
    """1 to 8 as EXIF has it; 1, not turned, where that cannot be read."""
    try:
        value = image.getexif().get(0x112)
        return value if value in TURNS else 1
    except Exception:                                     # broken EXIF raises a dozen kinds, too
        return 1


def has_alpha(image):
    """Whether some pixels may be transparent. The fourth band of a TIFF may as well be infrared."""
    return image.has_transparency_data and image.format != "TIFF"


def to_rgb(image):
    """A Pillow image in RGB, 8 bits; what is transparent lies on white, as viewers show it."""
    if has_alpha(image):
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        return page.convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def high_bytes(image, path):
    """A Pillow image of 16 bits in 8: the high byte of each value; of colours Pillow keeps these alone.

    Raises UserError where the scale is a guess: for floats, 32 bits, and pictures that use 14 bits at most:
    cameras store 12 or 14 bits in 16, and the file does not say if 4095 is white or nearly black.
    """
    unknown = UserError(f"{path}: its file does not say which value is white; save it with 8 bits")
    if image.mode[0] in "IF":                             # one band
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise unknown
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if np.asarray(image.convert("RGB")).max() < 64:       # 14 bits
        raise unknown
    return image


def decoded_size(size, least):
    """Pixels (W, H) that are enough of `size`: `least` a side; of more than REDUCED a half or a quarter."""
    halvings = max(0, math.ceil(math.log(math.prod(size) / REDUCED, 4)))
    return [min(side // 2 ** halvings, least or side) for side in size]


def open_image(path, upright=False, least=None):
    """Decode any image to RGB: uint8 (H, W, 3). Raises UserError naming the file.

    upright   turn it as its EXIF says: right for one's own photographs, wrong for data sets whose masks are
              not turned
    least     pixels a side that are enough: a picture k times as large is reduced k times, a JPEG
              already while it is decoded. A JPEG of more than REDUCED pixels is halved or quartered anyway
    """
    with opened(path) as image:
        is_16_bit = image.mode[0] in "IF" or ";16" in str(image.tile[:1])
        image.draft(None, decoded_size(image.size, least))        # a JPEG is decoded smaller, not below this
        image.load()                                      # Pillow turns TIFF by itself here
        turn = TURNS.get(orientation(image)) if upright else None
        rgb = to_rgb(high_bytes(image, path) if is_16_bit else image)
        if least:
            rgb = rgb.reduce(max(1, min(rgb.size) // least))
        return np.array(rgb if turn is None else rgb.transpose(turn))


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
        image.load()
        kind = "a JPEG, which changes values" if isinstance(image, JpegImageFile) else image.mode
        if kind not in ("P", "L"):
            raise UserError(f"{path}: this label is {kind}; "
                            "make it an 8-bit palette or grey PNG of class indices")
        label = np.array(image)
        file_colours = np.array(image.getpalette() or []).reshape(-1, 3)          # may be fewer than 256
    used = np.unique(label)
    unknown = used[(used >= n_values) & (used != VOID) | np.isin(used, gaps)]
    if unknown.size:
        raise UserError(f"{path}: label value {unknown[0]} is not in use in this data set (0 to "
                        f"{n_values - 1}{', with gaps' if len(gaps) else ''}, and 255); correct the file, or "
                        f"choose another data set")
    if colours is None:
        return label
    for value in used[used < min(len(file_colours), VOID)]:
        colour, expected = file_colours[value].tolist(), colours[value].tolist()
        if colour not in (expected, [value] * 3):
            raise UserError(f"{path}: its palette shows label value {value} in colour {colour}, which is "
                            f"{expected} in this data set: the values were changed; get the original file")
    return label


def read_lines(file):
    """The lines of a text file that are not empty, stripped. Raises UserError if there are none.

    It may be UTF-8 or, as Windows writes it, UTF-16. Other bytes stay what they are in names of files.
    """
    content = file.read_bytes()
    encoding, errors = ("utf-16", "replace") if b"\0" in content else ("utf-8-sig", "surrogateescape")
    lines = [line.strip() for line in content.decode(encoding, errors).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{file}: an empty list; write a name a line")
    return lines


def read_list(file, known):
    """The names of samples in a list. A line and its name:

        2007_000032                                                               2007_000032
        2007_000032 1                                                             2007_000032
        /JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png         2007_000032
        a holiday.2                                                               a holiday.2 (if known)

    known     names that exist, of which a line in Latin-1 may be one, too
    Raises UserError if the list is empty or has a name twice.
    """
    suffix = rf"(?:{'|'.join(map(re.escape, SUFFIXES))})(?:\s|$)"
    names = []
    for line in read_lines(file):
        path = re.split(suffix, line, maxsplit=1, flags=re.IGNORECASE)[0]
        name = re.split(r"[/\\]", path)[-1]
        from_latin_1 = name.encode("utf-8", "surrogateescape").decode("latin-1")
        first_word = (name.split() or [name])[0]
        names.append(next((n for n in (name, from_latin_1) if n in known), first_word))
    most_frequent, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise UserError(f"{file}: {most_frequent} is listed twice; take one out")
    return names


def read_class_names(file):
    """Names of classes in a file of one's own, one a line, from number 0 on. Raises UserError."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; write the names of the classes there, a line each, from 0 on")
    names = read_lines(file)
    if not 2 <= len(names) <= VOID or not all(name.isprintable() for name in names):
        raise UserError(f"{file}: {len(names)} lines; 2 to {VOID} expected, in UTF-8, one for each class")
    return names


def in_words(counts, most=10):
    """What a Counter has, the most frequent first: "30 .jpg, 7 .png"; rare kinds are added up."""
    words = [f"{n} {kind}" for kind, n in counts.most_common(most)]
    others = counts.total() - sum(n for _, n in counts.most_common(most))
    return ", ".join(words + [f"{others} others"] * (others > 0))


def squash(image, size, mode="bilinear", antialias=False):
    """uint8 (H, W[, 3]) -> uint8 (size, size[, 3]), aspect ignored.

    Bilinear without antialiasing, or nearest (TransFGU). `antialias`: of what is shrunk more than twice, for
    photographs of one's own.
    """
    if image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype}: uint8 expected")
    if antialias and max(image.shape[:2]) > 2 * size:
        return np.array(Image.fromarray(image).resize((size, size), Image.BILINEAR))
    x = torch.from_numpy(np.ascontiguousarray(image)).float()
    x = x.permute(2, 0, 1)[None] if x.ndim == 3 else x[None, None]                # (1, 3 or 1, H, W)
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
    """One line on the classes that labels show, and their shares of all pixels, the largest first.

    pixels   (256,) or (n + 1,): how many pixels have each class index; the last is void
    """
    total = max(1, pixels.sum())
    shown = sorted(((n / total, name) for n, name in zip(pixels, names) if n), reverse=True)
    shares = shown[:12]
    if len(shown) > 12:
        shares.append((sum(share for share, _ in shown[12:]), f"{len(shown) - 12} others"))
    shares.append((pixels[-1] / total, "void"))
    return (f"labels show {len(shown)} of {len(names)} classes: "
            + ", ".join(f"{name} {100 * share:.1f} %" for share, name in shares))


def palette():
    """PASCAL VOC's colours: (256, 3) uint8. Class indices are spread over the bits of the three channels."""
    index, colours = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(8):                                  # bit 0, 3, 6 is red's, from its highest bit on
        colours[:, bit % 3] |= ((index >> bit & 1) << 7 - bit // 3).astype(np.uint8)
    return colours


# ----------------------------------------------------------------------------
# Data sets on disk


class Dataset:
    """Images with labels on disk. A subclass sets

    ids, images, labels    names of the samples, and paths of their files; no labels: ()
    names                  of the classes, in this order: background, things, stuff
    things, stuff          how many clusters k-means looks for, among the windows of each
    background             whether class 0 is background, which is no cluster
    upright                whether images are turned as their EXIF says
    table                  class of each value in the label files
    n_values, colours, gaps    of these files: arguments of `open_label`
    command                that gets the data set; with --check it names every file that is bad
    """
    stuff, background, upright, command = 0, True, False, "python tools/get_data.py"
    table, n_values, colours, gaps = np.arange(256, dtype=np.uint8), 256, None, ()

    def __len__(self):
        return len(self.ids)

    def limit(self, n):
        """Keep the first n images."""
        self.ids, self.images, self.labels = self.ids[:n], self.images[:n], self.labels[:n]

    def summary(self):
        """One line on what is read: how many images, of which suffixes and in which folders."""
        suffixes = Counter(file.suffix.lower() for file in self.images)
        folders = Counter(str(file.parent) for file in self.images)
        where = self.images[0].parent
        if len(folders) > 1:
            where = f"{len(folders)} folders: {in_words(folders, 4)}"
        labels = f", labels in {self.labels[0].parent}" if self.labels else ""
        return f"{len(self)} images ({in_words(suffixes)}) in {where}{labels}"

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
            turned = orientation(image) > 1
            size = upright_size(self.images[i]) if self.upright else image.size
        if label.shape != size[::-1]:
            advice = "its EXIF turns it: save both as they are shown" if turned else "get the pair again"
            raise UserError(f"{self.labels[i]}: this label is {label.shape[1]} x {label.shape[0]}, "
                            f"its image {size[0]} x {size[1]}; {advice} or leave it out")
        return self.table[label]


def first_folder(root, candidates, advice):
    """The first of the candidates below root that exists. Raises UserError with the advice if none does."""
    for folder in (Path(root) / candidate for candidate in candidates):
        if folder.is_dir():
            return folder
    raise UserError(f"{Path(root) / candidates[0]}: no such folder{those_in(root)}; {advice}")


def those_in(folder, pattern="*"):
    """" (here: NAMES)", the first names that a folder has; "" without any."""
    names = sorted(file.name for file in Path(folder).glob(pattern))
    return f" (here: {', '.join(names[:8])}{', ...' * (len(names) > 8)})" if names else ""


def by_stem(folder, preferred):
    """{name without suffix: path} of a folder's images; where two have one name, the preferred suffix."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES]
    return {file.stem: file for file in sorted(files, key=lambda file: file.suffix == preferred)}


class VOC(Dataset):
    """PASCAL VOC 2012 below root, VOCdevkit or VOC2012; or data of one's own in this layout.

    aug       train on train_aug.txt and SegmentationClassAug, which have SBD's masks, too
    A file names.txt beside the lists has the classes of data of one's own: a name a line, the first is
    background. There are as many clusters as further lines.
    """
    names, things, n_values, colours = VOC_NAMES, 20, 21, palette()

    def __init__(self, root="data", split="train", aug=False):
        aug = aug and split == "train"
        self.command = f"python tools/get_data.py {'voc-aug' if aug else 'voc'} --root {root}"
        advice = f"get it with: {self.command}"
        base = first_folder(root, ("VOCdevkit/VOC2012/ImageSets", "VOC2012/ImageSets", "ImageSets"),
                            f"{advice}, or give another --root").parent
        lists = first_folder(base, ("ImageSets/Segmentation",), advice)
        files = [lists / f"{name}.txt" for name in (("train_aug", "trainaug") if aug else (split,))]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise UserError(f"{files[0]}: no such list{those_in(lists, '*.txt')}; write it, or {advice}")
        if (lists / "names.txt").is_file():
            self.names = read_class_names(lists / "names.txt")
            self.things, self.n_values, self.colours = len(self.names) - 1, len(self.names), None
        images = first_folder(base, ("JPEGImages",), advice)
        labels = first_folder(base, ("SegmentationClassAug" if aug else "SegmentationClass",), advice)
        image_of, label_of = by_stem(images, ".jpg"), by_stem(labels, ".png")
        self.ids = read_list(file, image_of)
        self.images = [image_of.get(i, images / f"{i}.jpg") for i in self.ids]
        self.labels = [label_of.get(i, labels / f"{i}.png") for i in self.ids]


def shows_thing(file):
    """Whether a map of COCO shows a thing; None if it cannot be read."""
    try:
        return bool((open_label(file) < len(COCO_THINGS)).any())
    except UserError:
        return None


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
        self.command = f"python tools/get_data.py {kind} --root {root}"
        advice = f"get it with: {self.command}"
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
        try:
            self.ids = json.loads(kept.read_bytes()) if kept else []
        except (OSError, ValueError):                     # not there yet, or damaged by a power cut
            self.ids = []
        if not self.ids:
            with ThreadPoolExecutor() as pool:
                shown = list(pool.map(shows_thing, (labels / f"{name}.png" for name in names)))
            self.ids = [name for name, thing in zip(names, shown) if thing is not False]
            if not self.ids:
                raise UserError(f"{labels}: no map shows a thing (values 0 to 90); {advice}")
            if kept and None not in shown:
                write_whole(kept, lambda f: f.write(json.dumps(self.ids).encode()), sync=False)
        self.images = [images / f"{i}.jpg" for i in self.ids]
        self.labels = [labels / f"{i}.png" for i in self.ids]


def images_below(folder, left_out):
    """Paths of the images in a folder, then of those in its subfolders, sorted by name.

    What starts with a dot and Synology's thumbnails are passed over. left_out, a Counter, gets the kinds of
    what else is no image. Raises UserError if a folder cannot be read.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:                              # os.walk would leave such a folder out
        raise UserError(f"{folder}: cannot read this folder ({error.strerror}); "
                        "change its permissions") from None
    images, below = [], []
    for entry in entries:
        kind = Path(entry.name).suffix.lower()
        if entry.name.startswith(".") or entry.name == "@eaDir":
            continue
        if not os.path.isdir(entry):
            if kind in SUFFIXES:
                images.append(Path(entry.path))
            else:
                left_out[kind or "without suffix"] += 1
        elif os.path.islink(entry):                       # it may lead back here
            left_out["linked folders"] += 1
        elif entry.name.lower() in ("thumbnails", "thumbs"):
            left_out["folders of thumbnails"] += 1
        else:
            below += images_below(entry.path, left_out)
    return images + below


def surprises(file):
    """What the header of an image says that its user may not expect, as a list of words."""
    try:
        with opened(file) as image:
            words = {"with a palette, as label maps have": image.mode == "P",
                     "in grey": image.mode[:1] in ("1", "L", "I"),
                     "with alpha, laid on white": has_alpha(image),
                     "with several pages, the first is used": not isinstance(image, JpegImageFile)
                     and getattr(image, "n_frames", 1) > 1}
            return [word for word, holds in words.items() if holds]
    except UserError:
        return ["that cannot be read"]


class Folder(Dataset):
    """Any images, without labels; `n_classes` things and a background.

    root      a folder, an image, or a list of these. Subfolders are searched as in `images_below`; `summary`
              says what is left out. ids are relative to their root
    """
    upright = True

    def __init__(self, root, n_classes=20):
        self.names = ["background", *(f"cluster {k}" for k in range(1, n_classes + 1))]
        self.things = n_classes
        self.ids, self.images, self.labels, self.left_out = [], [], [], Counter()
        for path in map(Path, [root] if isinstance(root, (str, os.PathLike)) else root):
            self.command = f"python tools/get_data.py folder --root {path}"
            if not path.exists():
                raise UserError(f"{path}: no such file or folder; correct the path")
            images = images_below(path, self.left_out) if path.is_dir() else [path]
            if not images:
                raise UserError(f"{path}: no images here{self.what_is_left_out()}; give a folder with any of "
                                f"{' '.join(SUFFIXES)}")
            base = path if path.is_dir() else path.parent
            self.ids += [str(file.relative_to(base).with_suffix("")) for file in images]
            self.images += images

    def what_is_left_out(self):
        words = in_words(self.left_out)
        return f"; left out: {words} (convert pictures among these to JPEG)" if words else ""

    def summary(self):
        with ThreadPoolExecutor() as pool:
            notes = Counter(word for words in pool.map(surprises, self.images) for word in words)
        notes_in_words = "".join(f"; {n} {word}" for word, n in notes.items())
        return super().summary() + notes_in_words + self.what_is_left_out()


def common_endings(names):
    """What all names end with, from a _ or - on, shortest first: a_1_RGB, b_2_RGB -> "", _RGB. No numbers."""
    endings = set.intersection(*({name[m.start():] for m in re.finditer("[_-]|$", name)} for name in names))
    return sorted((e for e in endings if "/" not in e and not any(map(str.isdigit, re.split("[_-]", e)))),
                  key=len)


def pair_names(names, label_names):
    """{photograph's name: its mask's}. All photographs may have one ending, and all masks another.

    Taken are the two endings with which most names pair up; if several do, the shortest.
    """
    most = {}
    for ending, label_ending in itertools.product(common_endings(names), common_endings(label_names)):
        label_of = {name.removesuffix(label_ending): name for name in label_names}
        stem_of = {name: name.removesuffix(ending) for name in names}
        pairs = {name: label_of[stem] for name, stem in stem_of.items() if stem in label_of}
        most = max(most, pairs, key=len)                  # the earlier one if they are equal
    return most


class Masks(Folder):
    """Photographs of one's own with labels: those for which the folder `masks` has an index PNG.

    A mask has the name of its photograph and lies in the same subfolder; or all photographs have one ending
    and all masks another: a_RGB.tif, a_label.png. Line v + 1 of names.txt, in `masks`, names value v; 255 is
    void.
    """

    def __init__(self, root, masks):
        super().__init__(root)
        self.names = read_class_names(Path(masks) / "names.txt")
        self.things, self.n_values = len(self.names) - 1, len(self.names)
        labels = Folder(masks)
        mask_of, file_of = pair_names(self.ids, labels.ids), dict(zip(labels.ids, labels.images))
        pairs = [(i, image, file_of[mask_of[i]]) for i, image in zip(self.ids, self.images) if i in mask_of]
        if not pairs:
            raise UserError(f"{masks}: no mask is named like a photograph (the first are {labels.ids[0]} and "
                            f"{self.ids[0]}); give them the same names, and subfolders")
        self.unpaired = (f"; {len(self.ids) - len(pairs)} photographs have no mask, "
                         f"{len(labels) - len(set(mask_of.values()))} masks have no photograph")
        self.ids, self.images, self.labels = map(list, zip(*pairs))

    def summary(self):
        return super().summary() + self.unpaired


def raise_unreadable(source):
    """Raise one UserError that names all images and labels that cannot be read; for a run that met one."""
    def error_of(i):
        try:
            source.squashed(i, 64)                        # small, for many at once
            source.label(i)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        errors = [error for error in pool.map(error_of, range(len(source))) if error]
    if len(errors) == 1:
        raise UserError(errors[0])
    if errors:
        files = [error.partition(": ")[0] for error in errors]
        more = f" and {len(files) - 10} more" if len(files) > 10 else ""
        raise UserError(f"{len(files)} files cannot be used: {', '.join(files[:10])}{more}; "
                        f"what is wrong with each: {source.command} --check")


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
    shape = SHAPES[thing["category"]]
    frequency, phase, shade = thing["frequency"], thing["phase"], thing["shade"]
    along, across = _axes(len(image), cx, cy, thing["turn"])
    u, v = along / radius * thing["aspect"], across / radius / thing["aspect"]
    r = np.hypot(u, v)
    if shape == "disc":                                   # inside > 0 in the object, whose radius is about 1
        inside = 1 - r
        texture = np.sin(12 * frequency * r + phase)
    elif shape == "square":
        inside = 0.85 - np.maximum(abs(u), abs(v))
        texture = 3 * np.sin(7 * frequency * u + phase) * np.sin(7 * frequency * v + phase)
    elif shape == "triangle":
        inside = 0.55 - np.maximum(-v, np.maximum(0.866 * u + 0.5 * v, 0.5 * v - 0.866 * u))
        texture = np.sin(20 * frequency * v + phase)
    elif shape == "star":
        inside = 0.68 + 0.3 * np.cos(5 * np.arctan2(v, u)) - r
        texture = 0.5 - 0.35 * r
    else:                                                 # cross
        inside = np.maximum(np.minimum(0.36 - abs(u), 1 - abs(v)), np.minimum(0.36 - abs(v), 1 - abs(u)))
        texture = 2 * np.cos(11 * frequency * u) * np.cos(11 * frequency * v) - 0.6
    alpha = np.clip(0.5 + inside * radius * len(image), 0, 1)             # one pixel of smooth edge
    mix = np.clip(0.5 + 0.9 * texture, 0, 1)[..., None]
    light = np.clip(1 + 0.25 * (u * math.cos(shade) + v * math.sin(shade)), 0.5, 1.5)[..., None]
    _paint(image, alpha, (thing["light"] * mix + thing["dark"] * (1 - mix)) * light)
    label[alpha > 0.5] = thing["category"] + 1


def _free_place(rng, placed, radius):
    """A place (x, y, radius) that hardly overlaps those in `placed`; None if 40 tries give none."""
    for _ in range(40):
        r = rng.uniform(*radius)
        cx, cy = rng.uniform(0.2, 0.8, 2)
        if all(math.hypot(cx - x, cy - y) > 0.8 * (r + other) for x, y, other in placed):
            return cx, cy, r
    return None


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
        place = _free_place(rng, placed, radius)
        if place:                                         # else the scene has one object less
            placed.append(place)
            _draw_object(image, label, thing, *place)
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

    def summary(self):
        return f"{len(self)} scenes rendered from seed {self.ids[0][0]}"

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
    classes   clusters of `folder`
    seed      of the scenes of `shapes`
    cache     folder for COCO's list of samples
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
    titles = ("scene", "its label", "crop 1", "its label", "crop 2", "its label", "crop 3", "its label")
    page = Image.new("RGB", (128 * len(titles), 20 + 128 * len(rows)), "white")
    page.paste(Image.fromarray(np.concatenate(rows)), (0, 20))
    for column, title in enumerate(titles):
        ImageDraw.Draw(page).text((4 + 128 * column, 4), title, "black", font_size=12)
    page.save("data.png")
    print("wrote data.png: per row a scene, its label, and three training crops, recoloured, with theirs")
    print("classes:", ", ".join(f"{i} {n}" for i, n in enumerate(Shapes.names)))


if __name__ == "__main__":
    sys.exit(exit_code(main))
