"""Train DMSA (Fig. 2): coarse labels once, then student and EMA teacher with ASPP, PAR and four losses.

    python train.py                                                # `shapes`, on a CPU, nothing to download
    python train.py --data voc                                     # one GPU, or the CPU
    torchrun --nproc_per_node=6 train.py --data voc                # six GPUs, the paper's setting
    python train.py --data folder --root photos --classes 10       # images of one's own, no labels

A run that was stopped, at any moment, goes on when the same command is given again, from last.pt, which is
written after every epoch: the interrupted epoch is done again, with the same random numbers. --batch is the
global batch: the result does not depend on the number of processes or of micro-batches (--accumulate) but for
the order of sums.

    options -> caches -> coarse labels (Fig. 2, left) -> batches -> class Trainer (Fig. 2, right) -> train(),
    the loop -> below the line of "=": what a run needs besides

"Decision N" is row N of docs/decisions.md.
"""

import argparse
import datetime
import hashlib
import json
import math
import os
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    import tools.start                                    # Ctrl-C, and how threads wait: before torch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import cam
import data
from aspp import DEEPLAB_RATES, dilation_rates
from data import Progress, UserError, write_whole
from eval import choose_device, chunks, confusion_matrix, load_checkpoint, scores, with_names
from losses import (confident_patches, dmsa_losses, permutation_weight, pixel_counts, pseudo_masks,
                    with_background)
from model import BACKBONES, DMSA, VisionTransformer, backbone, load_vit, normalise
from par import PAR

# torchrun's numbers: of this process, of this process on its machine, and how many processes there are
RANK, LOCAL_RANK, WORLD = 0, 0, 1
if dist.is_torchelastic_launched():
    RANK, LOCAL_RANK, WORLD = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


# ----------------------------------------------------------------------------
# Options, with VOC's values; below them BY_DATA_SET, what the other data sets change

def number(kind, least, most=math.inf):
    """A type for argparse: an int or a float, `kind`, from `least` to `most`."""
    def convert(text):
        value = kind(text)
        if not least <= value <= most:                    # NaN, too
            limits = f"at least {least}" + (f" and at most {most}" if most < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text}: must be {limits}")
        return value
    convert.__name__ = kind.__name__                      # argparse says: invalid int value
    return convert


positive, zero_to_one, factor = number(int, 1), number(float, 0, 1), number(float, 0, 1e6)


def parse(argv=None, *parsers, **settings):
    """Options, and settings that have none, as one flat namespace of plain values.

    parsers, settings   options and values of another method (tools/transfgu.py). Its values win over the data
                        set's; an option that the user gives wins over both
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    first.add_argument("--data", choices=data.NAMES, default="shapes", help="data set (%(default)s)")
    name = first.parse_known_args(argv)[0].data
    p = argparse.ArgumentParser(parents=[first, *parsers], allow_abbrev=False, usage=argparse.SUPPRESS,
                                formatter_class=argparse.RawDescriptionHelpFormatter,
                                description=f"Train DMSA. In brackets: the defaults of --data {name}.",
                                epilog=__doc__.split("\n\n")[1])
    p.add_argument("--root", default="data", metavar="DIR",
        help="folder of the data sets, or of the images for --data folder (%(default)s)")
    p.add_argument("--classes", type=number(int, 2, 254), metavar="K",
        help="clusters to look for, without the background (as many as the data set has classes; of a folder "
             "20). More are allowed, but not for cocostuff27")
    p.add_argument("--limit", type=positive, metavar="N", help="use the first N images of each split (all)")
    p.add_argument("--out", metavar="DIR",
        help="run folder (runs/DATA SET); caches go to the folder cache beside it")
    p.add_argument("--seed", type=number(int, 0, 2 ** 32 - 1), default=0, metavar="N",
        help="of everything; for shapes also of the scenes (%(default)s)")
    p.add_argument("--dry-run", action="store_true",
        help="check options, data and weights, print the settings, and stop")

    # the frozen ViT, and what it sees
    p.add_argument("--backbone", choices=tuple(BACKBONES), default="vits8",
        help="pretrained ViT (%(default)s)")
    p.add_argument("--weights", metavar="FILE",
        help="weights of that backbone (fetched once; tiny is shipped)")
    p.add_argument("--size", type=number(int, 1, 4096), default=320, metavar="PIXELS",
        help="side of the squashed image; half of it has to be whole patches (%(default)s, or the next that "
             "is). With another value, also the next one, crops have half of it, the images that windows are "
             "cut from twice it, and windows just it. Smaller is faster and worse")
    p.set_defaults(crop=160,                              # side in pixels of training crops,
                   large=640,                             # of the images that windows are cut from,
                   window=320,                            # that windows are resized to for the ViT
                   scales=cam.THING_SCALES)               # sides of the windows, as shares of the image

    # the modules
    p.add_argument("--aspp", choices=("dynamic", "static", "none"), default="dynamic",
        help="dynamic: Table 1's rates by epoch; static: DeepLabV3+'s in every epoch (%(default)s)")
    p.add_argument("--aspp-scale", type=factor, default=0.1, metavar="X",
        help="factor of what ASPP adds to the tokens; the paper names none (%(default)s; decision 30)")
    p.add_argument("--par", type=number(int, 1, 1024), nargs="*", default=[1, 2, 4, 8], metavar="PIXELS",
        help="dilations of PAR; AFA's are 1 2 4 8 12 24. With no number there is no PAR: pseudo labels are "
             "only enlarged (%(default)s; decision 8)")
    p.add_argument("--threshold", type=zero_to_one, default=0.1, metavar="T",
        help="where all CAMs are below half of it, CAM says background; L_un counts where one is above it "
             "(%(default)s)")
    p.add_argument("--coarse", choices=("hard", "soft"), default="hard",
        help="what PAR gets while CAM is alone: hard: 1 for the class of a patch and 0 for others; soft: CAM "
             "(%(default)s; decision 31)")
    p.add_argument("--teacher", choices=("ema", "none"), default="ema",
        help="ema: moving average of the student; none: CAM alone, and L_CE without its second term "
             "(%(default)s)")
    p.add_argument("--teacher-start", type=number(int, 0), default=5, metavar="EPOCHS",
        help="epochs of CAM alone before the teacher takes part (%(default)s)")
    p.add_argument("--teacher-weight", type=zero_to_one, default=0.7, metavar="X",
        help="share of the teacher in the pseudo label (%(default)s; decision 11)")
    p.add_argument("--momentum", type=zero_to_one, default=0.99, metavar="M",
        help="of the moving average (%(default)s; decision 17)")
    p.add_argument("--balance", choices=("pixels", "classes"), default="pixels",
        help="what counts the same within each half of L_seg, foreground and background: pixels, as in AFA, "
             "or classes (%(default)s; decision 13)")
    p.add_argument("--lambdas", type=factor, nargs=4, default=[0.3, 1.0, 0.3, 1.0],
        metavar=("SEG", "CE", "UN", "CLS"), help="weights of Eq. 6 (%(default)s; decision 16)")
    p.set_defaults(method="dmsa")                         # tools/transfgu.py has others

    # optimisation
    p.add_argument("--epochs", type=positive, default=50, metavar="N",
        help="passes over the data; one of voc takes its images 20 times (%(default)s)")
    p.set_defaults(repeat=20)                             # None: see `repeats`
    p.add_argument("--batch", type=positive, default=512, metavar="IMAGES",
        help="global batch, over all processes (%(default)s)")
    p.add_argument("--lr", type=zero_to_one, default=1e-4, metavar="X",
        help="learning rate of Adam, constant (%(default)s)")
    p.add_argument("--jitter", type=zero_to_one, nargs=4, default=list(data.JITTER),
        metavar=("B", "C", "S", "H"),
        help="largest change of brightness, contrast, saturation, and of hue in turns (%(default)s)")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="auto: bf16 on a GPU that has it; CAM, PAR and losses stay fp32 (%(default)s)")

    # the machine; these do not change the result, but for rounding
    p.add_argument("--accumulate", type=positive, default=1, metavar="N",
        help="micro-batches that a process's share of a batch is cut into, if memory is short (%(default)s)")
    p.add_argument("--compile", action="store_true",
        help="PAR under torch.compile, for a GPU; on a CPU it is slower. Needs a C++ compiler, a GPU also "
             "Triton (off)")
    p.add_argument("--workers", type=positive, default=4, metavar="N",
        help="threads that squash the images, once before training (%(default)s)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto: cuda if there is one (%(default)s)")
    p.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)        # an old launcher's: ignored

    p.set_defaults(**BY_DATA_SET[name])
    p.set_defaults(**settings)
    args = p.parse_args(argv)
    del args.local_rank
    if args.out is None:
        args.out = os.path.join("runs", args.data if args.method == "dmsa" else f"{args.data}-{args.method}")
    patch = BACKBONES[args.backbone][0]["patch_size"]
    own = [p.get_default(side) for side in ("size", "crop", "large", "window")]
    args.size, args.crop, args.large, args.window = sides(args.size, own, patch)
    if args.size % 2 or args.crop % patch or args.size < 4 * patch:
        p.error(f"--size {args.size}: half of it must be a multiple of {args.backbone}'s patch, {patch}, "
                f"and at least {2 * patch}")
    if args.batch < WORLD * args.accumulate:
        p.error(f"--batch {args.batch}: fewer images than micro-batches, {WORLD} processes x --accumulate "
                f"{args.accumulate}; raise --batch or lower these")
    if args.data == "folder" and not args.root:
        p.error("--data folder: give the folder of images with --root")
    if args.data == "cocostuff27" and args.classes is not None:
        p.error("--classes: not for cocostuff27, which looks for things and stuff apart")
    return args


BY_DATA_SET = {
    "shapes": dict(backbone="tiny", size=192, crop=96, large=128, window=96, repeat=1,     # decision 26
                   epochs=10, batch=8, lr=5e-4, momentum=0.97, teacher_start=4, par=[1, 2, 8, 16],
                   balance="classes", lambdas=[0.3, 1.0, 0.1, 1.0], jitter=[0.4, 0.4, 0.4, 0.05]),
    "voc": dict(),
    "voc-aug": dict(repeat=1, epochs=150, lr=1e-5, lambdas=[0.1, 1.0, 0.3, 1.0]),
    "coco80": dict(scales=cam.SCENE_SCALES, repeat=1, epochs=200, batch=256, lambdas=[0.1, 1.0, 0.3, 1.0],
                   teacher_start=3),
    "cocostuff27": dict(scales=cam.SCENE_SCALES, repeat=1, epochs=200, batch=256,
                        lambdas=[0.1, 1.0, 0.3, 1.0], teacher_start=2, teacher_weight=0.5),
    "folder": dict(root=None, classes=20, backbone="vits16", window=224, repeat=None,      # decision 32
                   epochs=10, batch=16, lr=5e-4, teacher_start=4, balance="classes",
                   lambdas=[1.0, 1.0, 0.1, 1.0]),
}


def sides(size, own, patch):
    """The four sides of `parse`: size, crop, large, window, in pixels. own: those of the data set."""
    if size == own[0]:                                    # the next size whose half is whole patches: 320, or
        size = math.ceil(size / (2 * patch)) * 2 * patch  # with DINOv2's patches of 14 pixels 336
    return own if size == own[0] else [size, size // 2, 2 * size, size]


# ----------------------------------------------------------------------------
# Caches. A cache is a folder of files, the shards, each with what was computed from some consecutive images.
# A shard that is there is whole (`write_whole`), so that a killed run goes on at the next one.
#
# `source` is a split, a data.Dataset: its files, ids, images and labels; squashed(i, S) and label(i), which
# read one of them; background, whether class 0 is one; things and stuff, how many clusters of each there are.

SHARDS = 64                                               # of a cache at most: each keeps a file open
VERSION = 1                                               # raise it when SHARDS or a computation changes


def cached_shards(args, name, key, n, compute):
    """What compute(range of images) gives for the shards of n images: a list of arrays on disk.

    Each process computes its share of the shards that are not there. key: all that they depend on; it names
    the folder
    """
    digest = hashlib.sha256(json.dumps([VERSION, key]).encode()).hexdigest()[:16]
    folder = Path(args.out).parent / "cache" / f"{args.data}-{name}-{digest}"
    bounds = np.linspace(0, n, min(n, SHARDS) + 1).round().astype(int)            # the same for any WORLD
    files = [folder / f"{k:02}.npy" for k in range(len(bounds) - 1)]
    missing = [k for k, file in enumerate(files) if k % WORLD == RANK and not file.exists()]
    start, progress = time.time(), Progress(f"{name}: shard", len(missing))
    for done, k in enumerate(missing, 1):
        array = compute(range(bounds[k], bounds[k + 1]))
        write_whole(files[k], lambda f: np.save(f, array), sync=False)            # a power cut costs a shard
        if RANK == 0:
            progress(done)
    barrier()
    if RANK == 0:
        data.remove_temporary(folder)
    if missing:
        print0(f"{name}: {n} images, {time.time() - start:.0f} s")
    return [read_shard(file) for file in files]


def read_shard(file):
    """The array in a file, of which only what is asked for is read. Raises UserError naming the file."""
    if not file.exists():
        raise UserError(f"{file}: a shard of another machine is not there; all must share this folder")
    try:
        try:
            return np.load(file, mmap_mode="r")
        except OSError:                                   # a file system that maps no files
            return np.load(file)
    except (ValueError, EOFError):
        raise UserError(f"{file}: damaged; delete it, and the same command makes it again") from None


class PerImage:
    """Shards that have one entry for each image, read like one array: len(x), x[i], x[a:b]."""

    def __init__(self, shards):
        self.shards = shards
        self.starts = np.cumsum([0, *map(len, shards)])   # shard k has images starts[k] .. starts[k + 1] - 1

    def __len__(self):
        return self.starts[-1]

    def __getitem__(self, i):
        if isinstance(i, slice):
            return np.stack([self[image] for image in range(*i.indices(len(self)))])
        k = np.searchsorted(self.starts, i, side="right") - 1
        return self.shards[k][i - self.starts[k]]


def cached_squashed(args, name, source, read, *depends_on):
    """read(i, S), image or label of `source`, squashed: PerImage (n, S, S[, 3]) uint8."""
    def squashed(shard):
        try:
            with ThreadPoolExecutor(args.workers) as pool:
                return np.stack(list(pool.map(lambda i: read(i, args.size), shard)))
        except UserError:
            data.raise_unreadable(source)                 # one line for all bad files of the split
            raise

    key = [identity(source), args.size, *depends_on]
    return PerImage(cached_shards(args, name, key, len(source), squashed))


def fingerprint(file):
    """Size of a file in bytes; of kinds where that follows from the shape also a checksum of its middle."""
    size = os.path.getsize(file)
    if Path(file).suffix.lower() not in (".bmp", ".tif", ".tiff"):
        return size
    with open(file, "rb") as f:
        f.seek(size // 2)
        return [size, zlib.crc32(f.read(2 ** 16))]


@lru_cache                                                # COCO has 240,000 files
def identity(source):
    """What the files of a split are: [how many images, digest of their names and of all `fingerprint`s]."""
    labels = [fingerprint(file) for file in source.labels if os.path.exists(file)]
    images = [fingerprint(file) for file in source.images if os.path.exists(file)]
    names = list(map(str, source.ids))
    return [len(source), hashlib.sha256(json.dumps([names, images, labels]).encode()).hexdigest()]


# ----------------------------------------------------------------------------
# Coarse labels (Fig. 2, left): windows -> k-means -> class activation maps, once before training

BANK_IMAGES, BANK_WINDOWS = 10_000, 200_000               # for k-means, at most
FOREGROUND, BACKGROUND = 0, 1                             # kinds of windows


def window_bank(args, source, vit, digest, device):
    """Windows of the training images, cached: a list of arrays (M, 1 + D), a row for each window.

    A row is a window's kind, FOREGROUND or BACKGROUND, then its CLS feature. An image without foreground
    windows has no row of that kind: k-means knows nothing of it, but it is trained on like the others.
    digest: of the ViT's weights
    """
    # evenly over the list, which may be sorted
    chosen = np.linspace(0, len(source) - 1, min(len(source), BANK_IMAGES)).round().astype(int)

    def features(shard):
        rows = []
        for i in shard:
            image = data.to_float(source.squashed(chosen[i], args.large)[None], device)
            fore, back = cam.window_features(vit, normalise(image), size=args.window, scales=args.scales,
                                             stuff=source.stuff > 0)              # (M, D), (M', D)
            rows += [F.pad(fore.cpu(), (1, 0), value=FOREGROUND), F.pad(back.cpu(), (1, 0), value=BACKGROUND)]
        return torch.cat(rows).half().numpy()

    # not in the key: K and the seed, so that other numbers of clusters reuse the windows
    key = [identity(source), digest, args.large, args.window, args.scales, cam.COVER, cam.CLEAR, BANK_IMAGES]
    return cached_shards(args, "windows", key, len(chosen), features)


def cluster_windows(args, source, vit, digest, device):
    """k-means of the windows, things and stuff apart: centroids (K, D).

    For a new run only: afterwards the centroids are in last.pt. They depend on the images, the ViT, K and the
    seed, and also on the machine and its threads, whose sums differ in the last digits.
    """
    shards = window_bank(args, source, vit, digest, device)
    centroids = torch.zeros(source.things + source.stuff, vit.embed_dim)
    if RANK == 0:
        bank = np.concatenate(shards)                                             # (M, 1 + D)
        kinds, features = bank[:, 0], bank[:, 1:]
        rng = np.random.default_rng(args.seed)
        things = k_means(features[kinds == FOREGROUND], source.things, args, rng)
        stuff = k_means(features[kinds == BACKGROUND], source.stuff, args, rng)
        centroids += torch.cat([things, stuff])
    return all_reduce_sum(centroids)                      # the others' are zero: now all have the first one's


def k_means(features, k, args, rng):
    """Centroids (k, D) of features (M, D), of BANK_WINDOWS at most. Raises UserError if they are too few."""
    if k == 0:                                            # no stuff
        return torch.zeros(0, features.shape[1])
    if len(features) > BANK_WINDOWS:
        features = features[np.sort(rng.choice(len(features), BANK_WINDOWS, replace=False))]
    print0(f"k-means: {len(features)} windows, {k} clusters")
    try:
        return torch.from_numpy(cam.cluster(features, k, args.seed))
    except ValueError as error:                           # too few windows
        raise UserError(f"--data {args.data}: {error}") from None


def cached_cams(args, split, source, images, vit, digest, centroids, device):
    """Class activation maps, each image's scaled to 0..1 (decision 23): PerImage (n, K, h, w) float16."""
    def maps(shard):
        scaled = []
        for start in range(shard.start, shard.stop, 16):  # 16 at once: COCO's shards have 1,800
            image = data.to_float(images[start:min(start + 16, shard.stop)], device)
            cams = cam.class_activation_maps(vit, normalise(image), centroids.to(device))
            scaled.append(cam.min_max(cams).half().cpu())
        return torch.cat(scaled).numpy()

    # the maps depend on the images, the weights and the centroids, not on how k-means came to them
    key = [identity(source), args.size, digest, hashlib.sha256(centroids.numpy().tobytes()).hexdigest(),
           cam.KEEP_MASS]
    return PerImage(cached_shards(args, f"{split}-cams", key, len(source), maps))


# ----------------------------------------------------------------------------
# Batches


FOLDER_STEPS = 50                                         # of an epoch of a folder, at least: decision 32


def repeats(args, n):
    """Passes over n images that make an epoch; of a folder as many as make FOLDER_STEPS steps or more."""
    return args.repeat or math.ceil(FOLDER_STEPS * args.batch / n)


class MicroBatch(NamedTuple):
    """What a process computes at once: its share of a batch, or with --accumulate a piece of that."""
    image: torch.Tensor          # (b, 3, S, S) in 0..1
    cams: torch.Tensor           # (b, K, h, w) in 0..1
    draws: data.Draws            # random numbers of crop and colours, (b,) each


def batches(args, images, cams, steps, epoch, device):
    """This process's share of the batches of an epoch, loaded one step ahead in a thread.

    images (n, S, S, 3) uint8; cams (n, K, h, w) float16
    yields   a list of `accumulate` MicroBatches, seconds waited for them. A last, smaller batch is left out:
             its images would weigh more.

    --batch 512, six processes, --accumulate 2: a batch is cut into 12 micro-batches of 42 or 43 images, and
    process r has micro-batches r and r + 6.
    """
    n = len(images)                                       # sample s is image s % n
    order = np.random.default_rng((args.seed, epoch)).permutation(n * repeats(args, n))

    def stacked(array, samples):
        tensor = torch.from_numpy(np.stack([array[s % n] for s in samples]))
        # a GPU fetches pinned memory by itself, and nobody waits for it
        return tensor.pin_memory() if device.type == "cuda" else tensor

    def load_micro_batch(samples):
        return (stacked(images, samples), stacked(cams, samples),
                data.draw(args.seed, epoch, samples, args.jitter))

    def load_share(step):
        batch = order[step * args.batch:(step + 1) * args.batch]
        mine = np.array_split(batch, WORLD * args.accumulate)[RANK::WORLD]
        return [load_micro_batch(samples) for samples in mine]

    def on_device(image, maps, draws):
        draws = data.Draws(*(numbers.to(device, non_blocking=True) for numbers in draws))
        return MicroBatch(data.to_float(image, device), maps.to(device, non_blocking=True).float(), draws)

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load_share, 0)
        for step in range(steps):
            begin = time.time()
            loaded = ahead.result()
            waited = time.time() - begin
            if step + 1 < steps:
                ahead = pool.submit(load_share, step + 1)
            yield [on_device(*arrays) for arrays in loaded], waited


# ----------------------------------------------------------------------------
# The method: pseudo labels and training step (Fig. 2, right)


def n_channels(source):
    """N, the network's channels: one for each cluster, and one for the background if there is one."""
    return source.background + source.things + source.stuff


LOSSES = ("seg", "ce", "un", "cls", "all")                # of Eq. 6, and their weighted sum


class Target(NamedTuple):
    """What the student learns from a micro-batch: `pseudo_labels` makes it, `train_step` uses it."""
    features: tuple              # x, msa (b, D, h, w) of `DMSA.features`
    label: torch.Tensor          # (b, H, W) int64
    confident: torch.Tensor      # (b, H, W) bool, pixels of L_un


class Trainer:
    """Network, optimizer, and how far the run is. `pseudo_labels` and `train_step` are the halves of Fig. 2.

    source   the training data set, of which: background, whether class 0 is one; things, stuff, how many
             clusters of each; names of the classes
    inputs   what the run was computed from: {"images": identity of each split, "weights": SHA-256 of the file
             of the ViT's weights, "centroids": (K, D)}
    """
    # options that may be others when a run goes on
    may_differ = {"out", "root", "workers", "device", "epochs", "accumulate", "dry_run", "compile"}

    def __init__(self, args, vit, source, inputs, device):
        self.args, self.source, self.inputs, self.device = args, source, inputs, device
        N = n_channels(source)
        torch.manual_seed(args.seed)                      # the same start on every process
        self.network = DMSA(vit, N, args.aspp != "none", aspp_scale=args.aspp_scale).to(device).train()
        self.params = list(self.network.student.parameters())
        self.optimizer = torch.optim.Adam([               # L2, not on biases and norms (decision 27)
            {"params": [p for p in self.params if p.ndim > 1], "weight_decay": 5e-4},
            {"params": [p for p in self.params if p.ndim <= 1], "weight_decay": 0.0}], lr=args.lr)
        self.par = PAR(tuple(args.par), compile=args.compile) if args.par else None
        # the N channels are the background, if there is one, and the clusters of things, then of stuff
        is_thing = [False] * source.background + [True] * source.things + [False] * source.stuff
        self.is_thing = torch.tensor(is_thing, device=device)                     # (N,)
        self.bf16 = use_bf16(args.precision, device)
        self.epoch = 0                                    # how many are done
        # on val: scores of "cam", "last", "best" epoch; of a folder: "clusters" in use
        self.results = {}
        # cluster -> class: a folder's clusters are its classes; else `score_val` finds it after each epoch
        self.assignment = list(range(N)) if args.data == "folder" else [0] * N

    def rates(self, epoch):
        """Table 1's row of this epoch, or DeepLabV3+'s in every epoch; a checkpoint keeps its epoch's."""
        return DEEPLAB_RATES if self.args.aspp == "static" else dilation_rates(epoch)

    def teacher_age(self, epoch):
        """Epochs since the teacher began to take part, from 0; None while it takes no part."""
        age = epoch - self.args.teacher_start - 1         # epochs count from 1
        return age if self.args.teacher != "none" and age >= 0 else None

    def low_precision(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def pseudo_labels(self, micro_batches, epoch):
        """Fig. 2, top: CAM and teacher, fused, refined by PAR; in the first epochs (`teacher_age`) CAM alone.

        Returns a Target for each MicroBatch, and their `pixel_counts`, to be added up over all processes.
        """
        args, network, background = self.args, self.network, self.source.background
        H = args.crop                                     # pixels of a side of a crop (VOC: 160),
        h = H // network.vit.patch_size                   # and patches (20)
        # while CAM is alone PAR gets one class a patch; without PAR it stays as it is (decision 31)
        hard = args.coarse == "hard" and self.par is not None
        targets = []
        for batch in micro_batches:
            # PAR sees the crop before colour jitter, the network after it (decision 24)
            image = data.crop(batch.image, batch.draws, H)                        # (b, 3, H, H) in 0..1
            # the same square of the maps: its mean over each of h x h patches
            cams = data.crop(batch.cams, batch.draws, h, "area")                  # (b, K, h, h)
            seen = normalise(data.augment(image, batch.draws))                    # (b, 3, H, H)
            teacher_logits = None
            with self.low_precision():
                features = network.features(seen)         # (b, D, h, h) each
                if self.teacher_age(epoch) is not None:
                    logits, _ = network.decode(network.teacher, features, self.rates(epoch))
                    teacher_logits = logits.float()                               # (b, N, h, h)
            fused = pseudo_masks(cams, teacher_logits, args.teacher_weight, background, args.threshold, hard)
            if self.par is not None:
                refined = self.par(image, fused)          # (b, N, H, H): PAR enlarges the masks by itself
            else:
                refined = enlarged(fused, (H, H))
            confident = confident_patches(cams, background, args.threshold)       # (b, h, h)
            confident = F.interpolate(confident[:, None].float(), (H, H), mode="nearest")[:, 0].bool()
            targets.append(Target(features, refined.argmax(1), confident))
        N = n_channels(self.source)
        return targets, sum(pixel_counts(t.label, t.confident, N) for t in targets)

    def train_step(self, targets, counts, epoch, step):
        """Fig. 2, bottom: the losses of the targets, their gradients summed over all processes, one step.

        counts   of the whole batch: with them the losses of its micro-batches add up to the batch's
                 (losses.py), so that cutting it differently changes nothing
        step     steps before this one, from 0
        returns  {"seg", "ce", "un", "cls", "all"} of the batch
        raises   FloatingPointError, on all processes, if a loss or gradient is not finite; nothing has moved
        """
        args, network = self.args, self.network
        # L_CE's second term, - alpha * CE(logits, permutation[label]), begins with the teacher: on VOC alpha
        # is 0.03 in epoch 6 and grows to 0.1 in epoch 13 (losses.py: `permuted`)
        permutation, alpha, age = None, 0.0, self.teacher_age(epoch)
        if age is not None:                               # one for the whole batch, the same on every process
            rng = np.random.default_rng((args.seed, epoch, step))
            permutation = torch.tensor(rng.permutation(n_channels(self.source)))
            permutation = permutation.to(self.device, non_blocking=True)                  # (N,)
            alpha = permutation_weight(age)

        self.optimizer.zero_grad()
        of_micro_batches = []                             # (5,) each
        for target in targets:
            with self.low_precision():
                logits, class_embeddings = network.decode(network.student, target.features, self.rates(epoch))
            logits = enlarged(logits.float(), target.label.shape[1:])             # (b, N, H, W)
            loss = dmsa_losses(logits, class_embeddings.float(), target.label, target.confident, counts,
                               self.is_thing, args.balance == "classes", args.lambdas, self.source.background,
                               permutation, alpha)
            loss["all"].backward()
            of_micro_batches.append(torch.stack([loss[name].detach() for name in LOSSES]))

        # sums over micro-batches and processes are the batch's means, since `counts` are the whole batch's
        of_batch = all_reduce_sum(sum(of_micro_batches))                          # (5,)
        # all gradients in one vector: one message between processes
        gradient = all_reduce_sum(torch.cat([p.grad.flatten() for p in self.params]))             # (P,)
        *values, norm = torch.cat([of_batch, gradient.norm()[None]]).tolist()     # a GPU is waited for once
        losses = dict(zip(LOSSES, values))
        if not all(map(math.isfinite, [*values, norm])):
            raise FloatingPointError(f"step {step + 1}: {self.not_finite(losses, gradient)} not finite; the "
                                     f"last checkpoint is kept")
        gradient.clamp_(-1, 1)                                                    # elementwise, as TransFGU
        for p, g in zip(self.params, gradient.split([p.numel() for p in self.params])):
            p.grad = g.view_as(p)
        self.optimizer.step()
        if args.teacher == "ema":
            network.update_teacher(step, args.momentum)
        return losses

    def not_finite(self, losses, gradient):
        """Names of the losses, or else of the parameters' gradients, that are not finite."""
        wrong = [name for name, value in losses.items() if not math.isfinite(value)]
        names = [name for name, _ in self.network.student.named_parameters()]
        gradients = zip(names, gradient.split([p.numel() for p in self.params]))
        wrong = wrong or ["gradient of " + name for name, g in gradients if not g.isfinite().all()]
        return ", ".join(wrong[:3]) or "norm of the gradient"


def enlarged(maps, size):
    """(b, N, h, w) -> (b, N, *size), bilinear (decision 18)."""
    return F.interpolate(maps, size=size, mode="bilinear")


# ----------------------------------------------------------------------------
# The loop


def train(args, sources, vit, digest, state, device, trainer_class=Trainer):
    """The whole run: coarse labels, then epochs of steps, each with its scores and its checkpoint.

    sources  {"train", "val": data.Dataset}; of a folder there is no val
    vit      the frozen ViT; digest: SHA-256 of its weights
    state    what `checkpoint_of` put into last.pt, where a run goes on; None for a new one
    """
    # coarse labels: images -> windows -> centroids -> CAMs (Fig. 2, left)
    images = {split: cached_squashed(args, f"{split}-images", source, source.squashed)
              for split, source in sources.items()}       # (n, S, S, 3) uint8 each
    labels = cached_labels(args, sources["val"]) if "val" in sources else None    # (n, S, S) uint8
    centroids = state["centroids"] if state else cluster_windows(args, sources["train"], vit, digest, device)
    inputs = {"images": {split: identity(source) for split, source in sources.items()},
              "weights": digest, "centroids": centroids}
    trainer = trainer_class(args, vit, sources["train"], inputs, device)
    if state:
        load_state(trainer, state)
        print0(f"{args.out}: {trainer.epoch} of {args.epochs} epochs are done"
               + ("; raise --epochs to train on" if trainer.epoch >= args.epochs else ", going on"))
    else:
        save_checkpoint(trainer, "last.pt")               # from here on k-means is not done again
    cams = {split: cached_cams(args, split, source, images[split], vit, digest, centroids, device)
            for split, source in sources.items()}         # (n, K, h, w) in 0..1 each
    if labels is not None and "cam" not in trainer.results:
        trainer.results["cam"] = score_cams(trainer, cams["val"], labels)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()              # peak_gb leaves out windows and CAMs
    steps = len(images["train"]) * repeats(args, len(images["train"])) // args.batch      # of an epoch
    first = trainer.epoch * steps
    progress = Progress("step", args.epochs * steps - first)
    log = Log(Path(args.out), trainer.epoch)
    kept = {}                                             # features of scored images, from epoch to epoch
    fastest = 0.0                                         # images per second of an epoch
    for epoch in range(trainer.epoch + 1, args.epochs + 1):           # Table 1 counts from 1
        begin, waited, total = time.time(), 0.0, np.zeros(5)
        loader = batches(args, images["train"], cams["train"], steps, epoch, device)
        for step, (micro_batches, seconds) in enumerate(loader, (epoch - 1) * steps):
            # for all micro-batches first: the means of the losses need the pixels of the whole batch
            targets, counts = trainer.pseudo_labels(micro_batches, epoch)                 # Fig. 2, top
            counts = all_reduce_sum(counts)
            losses = trainer.train_step(targets, counts, epoch, step)                     # and bottom
            waited, total = waited + seconds, total + [losses[name] for name in LOSSES]
            if RANK == 0:
                progress(step + 1 - first)
            log.step({"epoch": epoch, "step": step + 1, **losses, "rates": list(trainer.rates(epoch)),
                      "lr": args.lr})
        record = {"epoch": epoch, "rates": list(trainer.rates(epoch)),
                  **speed(args, device, steps, time.time() - begin, waited)}
        if labels is None:
            record["clusters"] = clusters_in_use(trainer, images["train"], epoch, kept)
        else:
            of_val, trainer.assignment = score_val(trainer, images["val"], labels, epoch, kept)
            record |= of_val | trainer.results["cam"]     # miou, accuracy, iou, clusters in use ..
        log.epoch(record)
        finish_epoch(trainer, record)
        print0(epoch_line(args, record, dict(zip(LOSSES, total / steps))))
        fastest = max(fastest, record["images_per_s"])
        if record["images_per_s"] < fastest / 2:
            print0(f"{fastest / record['images_per_s']:.0f} times slower than the fastest epoch: does other "
                   f"work use this machine? See \"A busy CPU\" in docs/usage.md")
    show_results(trainer, images["train" if labels is None else "val"], labels)


# ============================================================================
# What a run needs besides. The method stands above, but for Hungarian matching, which is eval.py's.
# ============================================================================
# Data and ViT


def open_data(args, state):
    """The splits, {"train": data set, "val": data set}; a folder has no val. state: of `resume`."""
    sources = {}
    for split in ("train",) if args.data == "folder" else ("train", "val"):
        # the first process lists COCO's images for all
        source = zero_first(RANK, lambda: data.dataset(args.data, args.root, split, args.classes, args.seed,
                                                       cache=Path(args.out).parent / "cache"))
        if args.limit:
            source.limit(args.limit)
        if args.classes and args.data != "folder":        # more clusters than classes
            if args.classes < source.things:
                raise UserError(f"--classes {args.classes}: {args.data} has {source.things} classes; give at "
                                f"least so many, or leave it out. Classes of one's own stand in a names.txt "
                                f"beside VOC's lists")
            source.things = args.classes
        if RANK == 0:
            print(f"{split}: {source.summary()}", flush=True)
        if source.things == 1:                            # L_un compares two
            raise UserError(f"--data {args.data}: one class beside the background is too few; --classes 2 or "
                            f"more looks for so many kinds of it")
        now = identity(source)
        then = state["images"][split] if state else now
        if then != now:
            raise UserError(f"{args.out}/last.pt: the images or labels of {split} have changed, {then[0]} "
                            f"then, {now[0]} {'others ' if now[0] == then[0] else ''}now: use another --out, "
                            f"or give the same ones to go on")
        if state and state["names"] != source.names:
            raise UserError(f"{args.out}/last.pt: the class names of {args.data} have changed: use another "
                            f"--out, or give the same names.txt to go on")
        sources[split] = source
    n = len(sources["train"])
    if n * repeats(args, n) < args.batch:
        raise UserError(f"--batch {args.batch}: larger than an epoch of {n * repeats(args, n)} images; lower "
                        f"it")
    return sources


def cached_labels(args, source):
    """The labels of a split, squashed: PerImage (n, S, S) uint8, 255 void. Prints what they show."""
    # which values a label may have depends on the classes
    labels = cached_squashed(args, "val-labels", source,
                             lambda i, size: data.squash(source.label(i), size, "nearest"), source.names)
    if RANK == 0:
        pixels = sum(np.bincount(labels[i].flatten(), minlength=256) for i in range(len(labels)))
        print(f"val: {data.class_shares(pixels, source.names)}", flush=True)
    return labels


def frozen_vit(args, state, device):
    """The pretrained ViT, from the checkpoint if there is one, and the SHA-256 of the file it came from."""
    if state:
        vit, digest = VisionTransformer(**BACKBONES[args.backbone][0]), state["weights"]
        load_vit(vit, state["vit"])
    else:
        # the first process of each machine fetches it
        vit, file, digest = zero_first(LOCAL_RANK, lambda: backbone(args.backbone, args.weights))
        print0(f"{args.backbone}: {file}, SHA-256 {digest}")
    return vit.to(device).eval().requires_grad_(False), digest


# ----------------------------------------------------------------------------
# Checkpoints


def checkpoint_of(trainer):
    """All that going on, predicting and explaining need: tensors and plain values."""
    args, network = trainer.args, trainer.network
    epoch = max(1, trainer.epoch)                         # before the first one, its rates
    return trainer.inputs | {                             # images, weights, centroids
        "epoch": trainer.epoch, "args": vars(args), "results": trainer.results,
        "assignment": trainer.assignment, "names": trainer.source.names,
        "background": trainer.source.background,
        "rates": list(trainer.rates(epoch)), "teacher_on": trainer.teacher_age(epoch) is not None,
        "vit": network.vit.state_dict(), "student": network.student.state_dict(),
        "teacher": network.teacher.state_dict(), "optimizer": trainer.optimizer.state_dict()}


def load_state(trainer, state):
    """Put what `checkpoint_of` gave into a new Trainer."""
    trainer.network.student.load_state_dict(state["student"])
    trainer.network.teacher.load_state_dict(state["teacher"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.epoch, trainer.results, trainer.assignment = state["epoch"], state["results"], state["assignment"]


def save_checkpoint(trainer, name):
    if RANK == 0:
        write_whole(Path(trainer.args.out) / name, lambda f: torch.save(checkpoint_of(trainer), f))


def resume(args, trainer_class=Trainer):
    """The last checkpoint of the run in --out, or None. Raises UserError if its options were others."""
    file, best, names = (Path(args.out) / name for name in ("last.pt", "best.pt", "names.txt"))
    state = load_checkpoint(file) if file.exists() else None
    epoch = state["epoch"] if state else -1
    if all_reduce_sum(torch.tensor(epoch)).item() != epoch * WORLD:               # some found another one
        raise UserError(f"{args.out}: not the same on all machines: they must share this folder")
    if state is None:
        for left in (best, names):
            if left.exists():
                raise UserError(f"{left}: of an earlier run, whose last.pt is gone; move it away, too, to "
                                f"start anew")
        return None
    with_names(state, names)                              # a mistake in names.txt is told now, not at the end
    for name, now in vars(args).items():
        then = state["args"].get(name)
        if name not in trainer_class.may_differ and then != now:
            raise UserError(f"{file}: was started with --{name.replace('_', '-')} {as_typed(then)}, now "
                            f"{as_typed(now)}: use another --out, give the same option to go on, or move "
                            f"{args.out} away to start anew")
    return state


def as_typed(value):
    """A setting as it is typed."""
    if value is None:
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


# ----------------------------------------------------------------------------
# Scores, log, last words

KEPT = 2 ** 30                                            # bytes of features that a process keeps
IN_USE = 128                                              # images in which a folder's clusters are counted


def kept_features(network, images, chunk, kept):
    """x, msa of `DMSA.features` of a chunk of images; the ViT is frozen, so `kept` holds as many as it can.

    kept   {start of a chunk: features}, KEPT bytes at most: all of `shapes` (59 MB), a seventh of VOC's 7 GB
    """
    if chunk.start in kept:
        return kept[chunk.start]
    pixels = data.to_float(images[chunk], network.vit.cls_token.device)
    features = network.features(normalise(pixels))
    if sum(x.nbytes for pair in (*kept.values(), features) for x in pair) <= KEPT:
        kept[chunk.start] = features
    return features


@torch.no_grad()
def score_val(trainer, images, labels, epoch, kept):
    """Scores on val, with this epoch's rates, of the student and, once it takes part, of the teacher.

    Returns them, a dict, and the class of each of the student's clusters: one to one by Hungarian matching on
    all pixels of val; of clusters that are left over the class of most of their pixels (eval.py: `scores`).
    It is kept in trainer.assignment and the checkpoint, for predictions; eval.py matches anew what it scores.
    (Of a folder, which has no labels, clusters are classes.) kept: see `kept_features`
    """
    network, rates = trainer.network.eval(), trainer.rates(epoch)
    n_classes, N = len(trainer.source.names), n_channels(trainer.source)
    heads = [network.student]
    if trainer.teacher_age(epoch) is not None:
        heads.append(network.teacher)
    confusion = torch.zeros(len(heads), n_classes, N, dtype=torch.int64)
    for chunk in chunks(len(labels), RANK, WORLD):
        features, truth = kept_features(network, images, chunk, kept), labels[chunk]
        for h, head in enumerate(heads):
            logits, _ = network.decode(head, features, rates)                     # (b, N, h, w)
            clusters = enlarged(logits, truth.shape[1:]).argmax(1)                # (b, S, S)
            confusion[h] += confusion_matrix(truth, clusters.cpu(), n_classes, N)
    network.train()
    student, *teacher = [scores(of_head) for of_head in all_reduce_sum(confusion)]
    assignment = student.pop("assignment").tolist()
    # JSON has no NaN, the IoU of a class that is absent
    student["iou"] = [None if math.isnan(iou) else iou for iou in student["iou"].tolist()]
    del student["one_to_one"]
    for result in teacher:
        student |= {"teacher_miou": result["miou"], "teacher_accuracy": result["accuracy"]}
    return student, assignment


@torch.no_grad()
def clusters_in_use(trainer, images, epoch, kept):
    """How many clusters, the background among them, have a patch in the first IN_USE images (of a folder)."""
    network, N = trainer.network.eval(), n_channels(trainer.source)
    patches = torch.zeros(N, dtype=torch.int64)
    for chunk in chunks(min(len(images), IN_USE), RANK, WORLD):
        features = kept_features(network, images, chunk, kept)
        logits, _ = network.decode(network.student, features, trainer.rates(epoch))       # (b, N, h, w)
        patches += torch.bincount(logits.argmax(1).flatten().cpu(), minlength=N)
    network.train()
    trainer.results["clusters"] = int((all_reduce_sum(patches) > 0).sum())
    return trainer.results["clusters"]


def score_cams(trainer, cams, labels):
    """Scores of the coarse labels themselves, on val; prints them, and those of the trivial answer."""
    n_classes, N = len(trainer.source.names), n_channels(trainer.source)
    confusion = torch.zeros(n_classes, N, dtype=torch.int64)
    for chunk in chunks(len(labels), RANK, WORLD):
        maps = torch.from_numpy(cams[chunk]).to(trainer.device).float()
        masks = with_background(maps, trainer.args.threshold) if trainer.source.background else maps
        truth = labels[chunk]                                                     # (b, S, S)
        clusters = enlarged(masks, truth.shape[1:]).argmax(1)                     # (b, S, S)
        confusion += confusion_matrix(truth, clusters.cpu(), n_classes, N)
    confusion = all_reduce_sum(confusion)
    trivial = torch.zeros_like(confusion)
    trivial[:, 0] = confusion.sum(1)                      # all pixels predicted as one cluster
    coarse, trivial_scores = scores(confusion), scores(trivial)
    print0(f"coarse labels on val: mIoU {coarse['miou']:.2f} accuracy {coarse['accuracy']:.2f}; all pixels "
           f"as the most frequent class: mIoU {trivial_scores['miou']:.2f} accuracy "
           f"{trivial_scores['accuracy']:.2f}")
    return {"cam_miou": coarse["miou"], "cam_accuracy": coarse["accuracy"]}


def finish_epoch(trainer, record):
    """Keep and save the last epoch and the best, which is chosen on val, as the peers do."""
    trainer.epoch = record["epoch"]
    if "miou" in record:
        last = {name: record[name] for name in ("epoch", "miou", "accuracy")}
        best = trainer.results.get("best", last)
        if last["miou"] + last["accuracy"] > best["miou"] + best["accuracy"]:
            best = last
        trainer.results |= {"last": last, "best": best}
        if best is last:
            save_checkpoint(trainer, "best.pt")
    save_checkpoint(trainer, "last.pt")


class Log:
    """log.jsonl of the first process: a line for each step; an epoch's last one has its scores, too.

    So a line is written when the next step, or the epoch, is done. Of the file that is there the lines after
    `epoch` go: they will be written again.
    """

    def __init__(self, out, epoch):
        self.last = None                                  # record of the last step
        self.file = open(os.devnull, "w")
        if RANK == 0:
            file = out / "log.jsonl"
            lines = file.read_text(errors="replace").splitlines() if file.exists() else []
            kept = "".join(line + "\n" for line in lines if self.epoch_of(line) <= epoch)
            write_whole(file, lambda f: f.write(kept.encode()))
            self.file = open(file, "a", buffering=1)      # each line goes to the disk at once

    @staticmethod
    def epoch_of(line):
        try:
            return json.loads(line)["epoch"]
        except (ValueError, KeyError, TypeError):
            return math.inf                               # cut by a kill, or damaged

    def step(self, record):
        if self.last is not None:
            self.file.write(json.dumps(self.last) + "\n")
        self.last = record

    def epoch(self, record):
        self.file.write(json.dumps(self.last | record) + "\n")
        self.last = None


def speed(args, device, steps, seconds, waited):
    """What an epoch of `steps` steps cost: images per second, share of waiting for data, memory in GB."""
    cost = {"images_per_s": steps * args.batch / seconds, "data_wait": waited / seconds}
    status = Path("/proc/self/status")                    # Linux's; not every Linux's has the peak, in KB
    peak = status.read_text().partition("VmHWM:")[2].split() if status.exists() else []
    if device.type == "cuda":
        cost["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    elif peak:
        cost["peak_gb"] = int(peak[0]) * 1024 / 1e9
    return cost


def epoch_line(args, record, means):
    words = [f"epoch {record['epoch']}/{args.epochs}"]
    words += [f"{name} {value:.4f}" for name, value in means.items()]
    if "miou" in record:
        words.append("mIoU {miou:.2f} accuracy {accuracy:.2f}".format_map(record))
    words += [f"clusters {record['clusters']}", f"rates {record['rates']}",
              f"{record['images_per_s']:.0f} images/s", f"wait {100 * record['data_wait']:.0f} %"]
    if "peak_gb" in record:
        words.append(f"{record['peak_gb']:.2f} GB")
    return "  ".join(words)


def show_results(trainer, images, labels):
    """Pictures of a run that is done, of a folder names.txt, and the last words, by the first process."""
    if RANK:
        return
    from tools import pictures                            # all that draws
    out = Path(trainer.args.out)
    trainer.network.eval()
    checkpoint = with_names(checkpoint_of(trainer), out / "names.txt")
    files = ["log.jsonl", "last.pt", *pictures.of_run(out, trainer.network, checkpoint, images, labels,
                                                      trainer.source)]
    if trainer.args.data == "folder" and not (out / "names.txt").exists():        # it may have been edited
        lines = ["# NUMBER = NAME, for eval.py; numbers as in clusters.png and in masks. Classes of one name "
                 "become one"]
        lines += [f"{i} = {name}" for i, name in enumerate(checkpoint["names"])]
        write_whole(out / "names.txt", lambda f: f.write("\n".join([*lines, ""]).encode()))
    if labels is not None:
        last, best, coarse = (trainer.results[name] for name in ("last", "best", "cam"))
        print0(f"last epoch: mIoU {last['miou']:.2f} accuracy {last['accuracy']:.2f};  "
               f"best epoch, {best['epoch']}, chosen on val by mIoU + accuracy: mIoU {best['miou']:.2f} "
               f"accuracy {best['accuracy']:.2f};  coarse labels: mIoU {coarse['cam_miou']:.2f}")
        files.append("best.pt")
        next_step = f"python eval.py {out}"
    else:
        files.append("names.txt")
        next_step = f"name the clusters of clusters.png there, then python eval.py {out} --predict PHOTOS"
        N, in_use = n_channels(trainer.source), trainer.results["clusters"]
        advice = "" if in_use == N else "; more images, fewer --classes or another --seed may keep the others"
        print0(f"{in_use} of {N} clusters, the background among them, are in use{advice}")
    print0(f"wrote {out}/: {', '.join(files)}; next: {next_step}")


# ----------------------------------------------------------------------------
# Processes


def start_processes(device):
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs); returns this one's device."""
    cuda = choose_device(device) == "cuda"
    if cuda and LOCAL_RANK >= torch.cuda.device_count():
        raise UserError(f"process {LOCAL_RANK} of this machine has no GPU of its own "
                        f"({torch.cuda.device_count()} here): lower --nproc_per_node")
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
        torch.backends.cudnn.allow_tf32 = False           # else convolutions in "fp32" have 10 bits
    if WORLD > 1:                                         # the longest wait is for another process's k-means
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=4))
    return torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")


def all_reduce_sum(tensor):
    """Sum of a tensor over all processes, in place. Raises ConnectionError if one has gone.

    gloo waits and raises here. With nccl whoever reads the sum waits; there torchrun ends what is left.
    """
    if WORLD > 1:
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            if "CUDA" in str(error):                      # of this process's own GPU
                raise
            raise ConnectionError(f"process {RANK}: another process is gone, and may have said why; the last "
                                  f"checkpoint, if any, is kept ({data.one_line(error)})") from None
    return tensor


def barrier():
    """Until all processes are here."""
    all_reduce_sum(torch.zeros(1))


def zero_first(rank, work):
    """What work() gives. The process whose `rank` is 0 is first; the others find what it left on disk."""
    if rank == 0:
        done = work()
    barrier()
    return done if rank == 0 else work()


def print0(*words):
    if RANK == 0:
        print(*words, flush=True)


def use_bf16(precision, device):
    """Whether the networks compute in bf16: if it is asked for, or on a GPU that has it."""
    if precision == "bf16" and device.type == "cpu":
        instructions = Path("/proc/cpuinfo")              # Linux's; x86: avx512_bf16, amx_bf16
        if instructions.exists() and "bf16" not in instructions.read_text():
            print0("--precision bf16: this CPU has no instructions for it, fp32 is many times faster")
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16" or precision == "auto" and able


def check_compiler(device):
    """Compile a sum, before hours of windows and maps. Raises UserError saying what is missing."""
    try:
        torch.compile(lambda x: x + x.sin())(torch.ones(8, device=device))
    except (RuntimeError, OSError) as error:
        raise UserError(f"--compile: torch.compile does not work here: {str(error).partition(chr(10))[0]}; "
                        f"leave --compile out, or install a C++ compiler, and for a GPU Triton") from None


def main(args, trainer_class=Trainer):
    """A whole run. trainer_class: Trainer, or that of another method."""
    if args.data == "folder":
        data.check_outside(args.out, [args.root])
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")   # set by srun alone
    if WORLD == 1 and tasks != "1":
        raise UserError(f"srun started {tasks} tasks, which do not know each other: let it start torchrun, "
                        f"or one task")
    if RANK == 0 and not args.dry_run:
        Path(args.out).mkdir(parents=True, exist_ok=True)         # what cannot be made is told now
        data.remove_temporary(args.out, age=0)            # of writes that were killed
    device = start_processes(args.device)
    if args.compile:
        check_compiler(device)
    state = resume(args, trainer_class)
    sources = open_data(args, state)
    vit, digest = frozen_vit(args, state, device)
    if args.dry_run:                                      # options, data and weights have been tried
        print0(json.dumps(vars(args), indent=1))
    else:
        train(args, sources, vit, digest, state, device, trainer_class)


def launch(args, trainer_class=Trainer):
    """Run main() and end this process with its exit code (data.exit_code)."""
    code = data.exit_code(lambda: main(args, trainer_class))
    if WORLD > 1:                                         # torch's clean-up may wait for other processes, and
        sys.stdout.flush()                                # now and then aborts (3 of 40 runs)
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    launch(parse())
