"""Train DMSA (Fig. 2): CAM pseudo labels once, then student and EMA teacher with ASPP, PAR and four losses.

    python train.py                                                # `shapes`, on a CPU, nothing to download
    python train.py --data voc                                     # one GPU, or the CPU
    torchrun --nproc_per_node=6 train.py --data voc                # six GPUs, the paper's setting
    python train.py --data folder --root photos --classes 10       # images of one's own, no labels

The same command again goes on where the run stopped, bit for bit. --batch is the global batch: the result
does not depend on the number of processes but for the order of float32 sums.
"""

import argparse
import contextlib
import datetime
import fcntl
import hashlib
import json
import math
import os
import resource
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import cam
import data
from aspp import DEEPLAB_RATES, dilation_rates
from eval import (CheckpointError, confusion_matrix, curves, evaluate, groups, load_checkpoint,
                  panels, scores)
from losses import cam_probabilities, dmsa_losses, min_max, permutation_weight, pixel_counts, pseudo_label
from model import BACKBONES, DMSA, Head, WeightsError, backbone, normalise
from par import PAR

# ----------------------------------------------------------------------------
# Settings by --data. The peers' where not said otherwise; README, "Where the paper is silent"

COMMON = dict(
    root="data", classes=20,                              # clusters, of --data folder
    backbone="vits8", size=320, crop=160,                 # pixels: of the squashed image, of training crops
    scales=cam.THING_SCALES, bank=640, window=320,        # windows: shares; pixels of the image, of crops
    batch=512, epochs=50, repeat=1, lr=1e-4,              # repeat: passes over the images that make an epoch
    lambdas=(0.1, 1.0, 0.3, 1.0),                         # of Eq. 6: seg, CE, un, cls (decision 16)
    background=0.1, teacher_weight=0.7,                   # TransFGU's threshold; decision 11
    teacher_start=5,                                      # epochs of CAM alone
    intervals=(5, 5, 5, 5, 4, 4, 4, 4, 4, 3),             # of --teacher reset, by decade of epochs
    par=(1, 2, 4, 8), cam_scale="image", aspp="dynamic", teacher="ema", momentum=0.99, dropout=0.0,
    losses_at="crop", no_seg_loss=False, jitter=data.JITTER)
SETTINGS = {
    "shapes": COMMON | dict(                              # small, so that a CPU is enough; see README's table
        backbone="tiny", size=128, crop=96, bank=128, window=96, batch=16, epochs=10, lr=5e-4,
        lambdas=(0.3, 1.0, 0.1, 1.0), teacher_start=4, intervals=(2,),
        jitter=(0.4, 0.4, 0.4, 0.05)),
    "voc": COMMON | dict(repeat=20, lambdas=(0.3, 1.0, 0.3, 1.0)),
    "voc-aug": COMMON | dict(epochs=150, lr=1e-5),
    "coco80": COMMON | dict(
        scales=cam.SCENE_SCALES, batch=256, epochs=200, teacher_start=3, intervals=(3, 3, 3, 2)),
    "cocostuff27": COMMON | dict(
        scales=cam.SCENE_SCALES, batch=256, epochs=200, teacher_weight=0.5, teacher_start=2, intervals=(2,)),
    "folder": COMMON | dict(batch=64),
}
# Rows of the paper's tables that are not DMSA. In the released code ASPP never reaches the tokens and PAR is
# commented out: it is TransFGU with L_seg and another fusion weight (README, "What the released code does").
TRANSFGU = dict(aspp="none", par=(), cam_scale="crop", teacher="reset", teacher_weight=0.5, dropout=0.1,
                losses_at="patches", no_seg_loss=True)
RELEASED = {k: v for k, v in TRANSFGU.items() if k != "teacher_weight"} | dict(no_seg_loss=False)
ROWS = {"dmsa": {}, "transfgu": TRANSFGU, "released": RELEASED}

BANK_IMAGES, BANK_WINDOWS = 10_000, 200_000               # k-means sees the windows of so many images at most
# what may differ between a run and its resumption
MAY_DIFFER = {"out", "root", "workers", "device", "accumulate", "epochs", "dry_run"}


class LostProcess(RuntimeError):
    """Another process of the run has ended."""


class RunError(ValueError):
    """Something a user can mend; the message is one line: what was wrong, where, what to do."""


def parse(argv=None):
    """Options -> one flat namespace of plain values, every setting filled in."""
    p = argparse.ArgumentParser(description="Train DMSA.", epilog=__doc__.split("\n\n")[1],
                                formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = p.add_argument
    by_data = "(default: by --data)"
    add("--data", choices=data.NAMES, default="shapes", help="data set (default: shapes)")
    add("--root", metavar="DIR", help="folder of the data sets (default: data), or of the images for folder")
    add("--classes", type=int, metavar="K",
        help="clusters to look for, --data folder (default: 20)")
    add("--backbone", choices=tuple(BACKBONES), help=f"pretrained ViT {by_data}")
    add("--weights", metavar="FILE",
        help="DINO weights of that backbone (default: fetched once, tiny is shipped)")
    add("--out", metavar="DIR", help="run folder (default: runs/<data>); caches go beside it, to runs/cache")
    add("--preset", choices=tuple(ROWS), default="dmsa", help="a row of the paper's tables (default: dmsa)")
    add("--epochs", type=int, metavar="N",
        help=f"passes over the data; for voc each takes its images 20 times {by_data}")
    add("--batch", type=int, metavar="IMAGES", help=f"global batch over all processes {by_data}")
    add("--accumulate", type=int, default=1, metavar="N",
        help="parts that a process's batch is cut into; raise it if memory is short (default: 1)")
    add("--lr", type=float, metavar="X", help=f"learning rate of Adam, constant {by_data}")
    add("--size", type=int, metavar="PIXELS",
        help=f"side of the squashed image; of another than the default, crops are half, and the images that "
             f"windows are cut from twice as large. Smaller is faster and worse {by_data}")
    add("--limit", type=int, metavar="N", help="use the first N images of each split (default: all)")
    add("--seed", type=int, default=0, help="of everything; for shapes also of the scenes (default: 0)")
    add("--workers", type=int, default=4, metavar="N", help="threads that decode images (default: 4)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto: cuda if there is one (default: auto)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="auto: bf16 on a GPU that has it; CAM, PAR and losses stay fp32 (default: auto)")
    add("--dry-run", action="store_true",
        help="check options, data and weights, print the settings, and stop")
    m = p.add_argument_group("modules of the paper")
    m.add_argument("--no-aspp", dest="aspp", action="store_const", const="none", help="no ASPP")
    m.add_argument("--static-aspp", dest="aspp", action="store_const", const="static",
        help="DeepLabV3+'s rates in every epoch")
    m.add_argument("--no-par", dest="par", action="store_const", const=(),
        help="pseudo labels are only upsampled")
    m.add_argument("--par-dilations", dest="par", type=int, nargs="+", metavar="PIXELS",
        help="of PAR (default: 1 2 4 8; AFA's are 1 2 4 8 12 24)")
    m.add_argument("--no-seg-loss", action="store_true", default=None, help="lambda_1 = 0")
    m.add_argument("--teacher", choices=("ema", "reset", "none"),
        help="moving average; TransFGU's copy and reset; CAM alone (default: ema)")
    m.add_argument("--no-teacher", dest="teacher", action="store_const", const="none",
        help="the same as --teacher none")
    m.add_argument("--teacher-weight", type=float, metavar="X",
        help="share of the teacher in the pseudo label, 0 to 1 (default: 0.7, with stuff 0.5)")
    m.add_argument("--teacher-start", type=int, metavar="EPOCHS",
        help=f"epochs of CAM alone before the teacher takes part {by_data}")
    m.add_argument("--momentum", type=float, metavar="M",
        help="of the moving average, 0 to 1 (default: 0.99)")
    m.add_argument("--background", type=float, metavar="T",
        help="CAM below half of it is background, 0 to 1 (default: 0.1, TransFGU's)")
    m.add_argument("--cam-scale", choices=("image", "crop"),
        help="what CAM's minimum and maximum are taken of; crop is TransFGU's (default: image)")
    m.add_argument("--lambdas", type=float, nargs=4, metavar=("SEG", "CE", "UN", "CLS"),
        help=f"weights of Eq. 6 {by_data}")
    m.add_argument("--jitter", type=float, nargs=4, metavar=("B", "C", "S", "H"),
        help=f"of brightness, contrast, saturation, 0 to 1, and hue in turns {by_data}")
    m.add_argument("--dropout", type=float, metavar="P",
        help="in the decoder; results then depend on the number of processes and --accumulate (default: 0)")
    args = p.parse_args(argv)
    if args.data == "folder" and not args.root:
        p.error("--data folder: give the folder of images with --root")
    if args.data != "folder" and args.classes is not None:
        p.error(f"--classes: only for --data folder, {args.data} has its own")
    # an option that was given wins over the row, the row over the data set's own setting
    if args.lambdas is not None and args.no_seg_loss is None:
        args.no_seg_loss = False
    for name, value in (SETTINGS[args.data] | ROWS[args.preset]).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.size != SETTINGS[args.data]["size"]:
        args.crop, args.bank, args.window = args.size // 2, 2 * args.size, args.size
    if args.par:
        args.losses_at = "crop"                           # PAR's labels have its size, in every row
    if args.no_seg_loss:
        args.lambdas = (0.0, *args.lambdas[1:])
    args.out = args.out or os.path.join("runs", args.data)
    for name in ("epochs", "batch", "accumulate", "workers", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name} {getattr(args, name)}: must be at least 1")
    limits = {"teacher_weight": 1, "momentum": 1, "background": 1, "dropout": 0.99, "lr": 1,
              "seed": 2 ** 32 - 1, "teacher_start": math.inf}
    for name, high in limits.items():
        if not 0 <= getattr(args, name) <= high:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be between 0 and {high}")
    if not 2 <= args.classes <= 254:
        p.error(f"--classes {args.classes}: must be between 2 and 254: L_un compares two, masks are 8-bit")
    patch = BACKBONES[args.backbone][0]["patch_size"]
    if args.size % 2 or args.crop % patch or args.size < 4 * patch:
        p.error(f"--size {args.size}: half of it must be a multiple of {args.backbone}'s patch, {patch}, "
                f"and at least {2 * patch}")
    if args.weights and not os.path.isfile(args.weights):
        p.error(f"--weights {args.weights}: no such file")
    if not all(0 <= weight < math.inf for weight in args.lambdas):
        p.error(f"--lambdas {' '.join(map(str, args.lambdas))}: must be numbers of at least 0")
    if not all(0 <= strength <= 1 for strength in args.jitter):
        p.error(f"--jitter {' '.join(map(str, args.jitter))}: must be between 0 and 1")
    if any(d < 1 for d in args.par):
        p.error("--par-dilations: distances in pixels, at least 1")
    del args.no_seg_loss
    return argparse.Namespace(**{k: list(v) if isinstance(v, tuple) else v for k, v in vars(args).items()})


# ----------------------------------------------------------------------------
# Processes

RANK, LOCAL = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def start_processes(device):
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs); returns this one's device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: this machine shows no GPU to torch; use --device cpu")
    cuda = device == "cuda" or device == "auto" and torch.cuda.is_available()
    if cuda and LOCAL >= torch.cuda.device_count():
        raise RunError(f"process {LOCAL} of this machine has no GPU of its own "
                       f"({torch.cuda.device_count()} here): lower --nproc_per_node")
    if cuda:
        torch.cuda.set_device(LOCAL)
        torch.backends.cudnn.allow_tf32 = False           # else convolutions in "fp32" have 10 bits
    if WORLD > 1:                                         # slowest wait: another process's share of a cache
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=4))
    return torch.device("cuda", LOCAL) if cuda else torch.device("cpu")


def summed(tensor):
    """Sum of a tensor over all processes. Raises LostProcess if one has gone."""
    if WORLD > 1:
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            raise LostProcess(f"process {RANK}: another process is gone, and may have said why; the last "
                              f"checkpoint, if any, is kept ({' '.join(str(error).split())[:400]})") from None
    return tensor


def wait():
    """Until all processes are here."""
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    summed(torch.zeros(1, device=torch.cuda.current_device() if nccl else "cpu")).item()


def say(*words):
    """Print, on the first process. A reader that has gone, as of `| head`, does not end the run."""
    try:
        if RANK == 0:
            print(*words, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Stop:
    """SIGTERM and SIGINT: before the training loop leave at once, from then on finish what is begun."""
    signal, finish_step = 0, False

    def __call__(self, number, frame):
        self.signal = number
        if not self.finish_step:
            os._exit(128 + number)                        # caches resume by themselves

    def summed(self, counts):
        """Sum of `counts` over all processes, and the signal that reached any of them, 0 if none did.

        A signal may reach one process only, or each at another step. It travels with the counts, so that all
        learn of it at the same step, leave together, and no message is spent on it.
        """
        signals = F.one_hot(torch.tensor(self.signal, device=counts.device), 65)
        counts, signals = summed(torch.cat([counts, signals])).split([len(counts), 65])
        reached = signals[1:].nonzero().flatten().tolist()
        return counts, reached[0] + 1 if reached else 0


# ----------------------------------------------------------------------------
# Caches: arrays on disk, one record an image, written by all processes together


def cache(folder, name, key, n, shape, dtype, compute):
    """A memory-mapped array (n, *shape) in `folder`, computed where it is not yet: compute(range) -> values.

    `key` holds all that the values depend on and is part of the file's name: another key is another file. A
    record and its mark lie in one file, so that a run that was killed goes on, and two runs may share it.
    Raises RunError if the disk is full.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    file = Path(folder) / f"{name}-{digest}.npy"
    if not file.exists() and LOCAL == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = Path(f"{file}.{RANK}-{os.getpid()}")
        try:
            record = np.dtype([("done", "<u8"), ("x", dtype, shape)])
            np.lib.format.open_memmap(part, "w+", record, (n,)).flush()
            if hasattr(os, "posix_fallocate"):            # reserve it: a full disk kills a memory map later
                with open(part, "r+b") as f:
                    os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
            with contextlib.suppress(FileExistsError):
                os.link(part, file)                       # never replaces what another run made meanwhile
        except OSError as error:
            raise RunError(f"{file}: cannot make this cache ({error.strerror}); free space or choose "
                           f"another --out") from None
        finally:
            part.unlink(missing_ok=True)
    wait()
    array = np.load(file, mmap_mode="r+")                 # all processes write into one file, each its groups
    missing = [g for g in groups(n, RANK, WORLD) if not array["done"][g.start:g.stop].all()]  # ours only
    start = time.time()
    for count, group in enumerate(missing, 1):
        array["x"][group.start:group.stop] = compute(group)
        # only now: a group that a kill cut short is computed again
        array["done"][group.start:group.stop] = 1
        if RANK == 0 and sys.stderr.isatty():
            left = (time.time() - start) / count * (len(missing) - count)
            print(f"\r{name}: {count} of {len(missing)} groups, {left:.0f} s left ", file=sys.stderr,
                  end="\n" if count == len(missing) else "")
    array.flush()
    wait()
    if not array["done"][[group[-1] for group in groups(n)]].all():
        raise RunError(f"{file}: what other machines computed is not there: all must share this folder")
    return array["x"]


def fingerprint(source):
    """What a split's files are: names, sizes and times of change; for `shapes` the scenes themselves."""
    files = [str(p) for p in (*source.images, *source.labels)]
    stats = [(f, os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files if os.path.exists(f)]
    first = b"" if files else source.image(0).tobytes()
    return hashlib.sha256(repr([source.ids, stats]).encode() + first).hexdigest()


def claim(out):
    """Make the run folder and see that it can be written to; the first process locks it against other runs.

    Returns the locked file: the lock goes with it, however the process ends. Raises RunError.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
        if RANK == 0:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunError(f"{out}: another run is writing there; wait for its end, or choose another "
                       f"--out") from None
    except OSError as error:
        raise RunError(f"{out}: cannot write there ({error.strerror}); choose another --out") from None
    return lock


def open_data(args):
    """The splits: {"train": data set, "val": data set}; a folder has no val. Raises RunError, DataError."""
    sources = {}
    for split in ("train",) if args.data == "folder" else ("train", "val"):
        if RANK:                                          # the first process lists COCO's images for all
            wait()
        sources[split] = data.dataset(args.data, args.root, split, args.classes, args.seed,
                                      cache=Path(args.out).parent / "cache")
        if not RANK:
            wait()
        if args.limit:
            sources[split].limit(args.limit)
    n = len(sources["train"]) * args.repeat
    if n < args.batch:
        raise RunError(f"--batch {args.batch}: larger than an epoch of {n} images; lower it")
    return sources


def prepare(args, sources, vit, digest, device):
    """Everything before training: images, windows, centroids, CAMs.

    returns  images {split: (n, S, S, 3) uint8}; labels of val (n, S, S) uint8 or None; CAMs in 0..1
             {split: (n, K, h, w) float16}; centroids (K, D). All arrays are memory-mapped.
    """
    folder, images, maps, labels = Path(args.out).parent / "cache", {}, {}, None
    with ThreadPoolExecutor(args.workers) as pool:
        for split, source in sources.items():
            n, S, prints = len(source), args.size, fingerprint(source)
            name = f"{args.data}-{split}"
            image = lambda i: data.squash(source.image(i), S)
            label = lambda i: data.squash(source.label(i), S, "nearest")
            squashed = lambda group: np.stack(list(pool.map(image, group)))
            images[split] = cache(folder, f"{name}-images", [prints, S], n, (S, S, 3), "u1", squashed)
            if split == "val":
                squashed = lambda group: np.stack(list(pool.map(label, group)))
                labels = cache(folder, f"{name}-labels", [prints, S, args.data], n, (S, S), "u1", squashed)
            if split == "train":
                centroids = find_centroids(args, vit, digest, device, source, prints, folder, pool)
            K, grid = len(centroids), S // vit.patch_size
            # the maps of a split depend on its images, the weights and the centroids, not on k-means' options
            key = [prints, S, digest, hashlib.sha256(centroids.numpy().tobytes()).hexdigest(), cam.KEEP_MASS]

            def camera(group):
                image = normalise(data.to_float(images[split][group.start:group.stop], device))
                return min_max(cam.class_activation_maps(vit, image, centroids.to(device))).cpu().numpy()
            maps[split] = cache(folder, f"{name}-cam", key, n, (K, grid, grid), "<f2", camera)
    return images, labels, maps, centroids


def find_centroids(args, vit, digest, device, source, prints, folder, pool):
    """Windows of the training images -> CLS features -> k-means, things and stuff apart: (K, D)."""
    # evenly over the list: it may be sorted
    chosen = np.linspace(0, len(source) - 1, min(len(source), BANK_IMAGES)).round().astype(int)
    side, kinds = args.bank // vit.patch_size, 2 if source.stuff else 1
    shape = kinds, len(cam.windows(side, side, args.scales)), vit.embed_dim  # of one image

    def features(group):
        out = np.full((len(group), *shape), np.nan, np.float16)                   # NaN: no such window
        loaded = pool.map(lambda i: data.squash(source.image(chosen[i]), args.bank), group)
        for row, image in zip(out, loaded):
            image = normalise(data.to_float(image[None], device))
            found = cam.window_features(vit, image, args.window, args.scales, kinds == 2)  # (M, D), (M', D)
            for kind in range(kinds):
                row[kind, :len(found[kind])] = found[kind].cpu().numpy()
        return out

    # not in the key: K and the seed, so that other numbers of clusters reuse the windows
    key = [prints, digest, args.bank, args.window, args.scales, kinds, cam.COVER, cam.CLEAR, len(chosen)]
    bank = cache(folder, f"{args.data}-windows", key, len(chosen), shape, "<f2", features)
    key = [*key, source.things, source.stuff, args.seed, cam.RESTARTS, BANK_WINDOWS]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    file = folder / f"{args.data}-centroids-{name}.npy"
    if not file.exists() and LOCAL == 0:
        found, rng = [], np.random.default_rng(args.seed)
        for kind, k in enumerate((source.things, source.stuff)[:kinds]):
            windows = bank[:, kind].reshape(-1, vit.embed_dim)                    # (n * windows, D)
            windows = windows[~np.isnan(windows[:, 0])].astype(np.float32)
            if len(windows) > BANK_WINDOWS:
                windows = windows[np.sort(rng.choice(len(windows), BANK_WINDOWS, replace=False))]
            say(f"k-means: {len(windows)} windows of {len(chosen)} images, {k} clusters")
            try:
                found.append(cam.cluster(windows, k, args.seed))
            except ValueError as error:                   # fewer windows than clusters
                raise RunError(f"--data {args.data}: {error}") from None
        part = Path(f"{file}.{RANK}-{os.getpid()}.npy")
        np.save(part, np.concatenate(found))
        part.replace(file)
    wait()
    return torch.from_numpy(np.load(file))


# ----------------------------------------------------------------------------
# Checkpoints


def save(checkpoint, file):
    """Write to a temporary file, sync, rename: `file` is always whole. Raises RunError, the old one stays."""
    part = Path(f"{file}.part")
    try:
        with open(part, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(file)
        folder = os.open(file.parent, os.O_RDONLY)        # the renaming itself must reach the disk
        os.fsync(folder)
        os.close(folder)
    except (OSError, RuntimeError) as error:              # torch's zip writer raises RuntimeError
        part.unlink(missing_ok=True)
        raise RunError(f"{file}: cannot write the checkpoint ({str(error).splitlines()[0][:100]}); "
                       f"the one before is kept") from None


def resume(args, out):
    """The run in `out`, or None. Raises RunError if options differ that would make going on meaningless."""
    if not (out / "last.pt").exists():
        return None
    state = load_checkpoint(out / "last.pt")
    may_differ = MAY_DIFFER - ({"accumulate"} if args.dropout else set())
    for name, value in vars(args).items():
        if name not in may_differ and state["args"].get(name) != value:
            raise RunError(f"{out}/last.pt: begun with --{name.replace('_', '-')} {state['args'].get(name)}, "
                           f"now {value}: use another --out, or the same option to go on")
    return state


# ----------------------------------------------------------------------------
# The schedule of the teacher


def replacements(epochs, start, intervals):
    """TransFGU: the epochs, from 0, at which the teacher becomes the student and the student starts anew."""
    return [e for e in range(start, epochs) if e % intervals[min(e // 10, len(intervals) - 1)] == 0]


def teacher_age(args, epoch):
    """Epochs since the teacher began (ema) or was last replaced (reset), for alpha(t); None without one."""
    if args.teacher == "reset":
        done = replacements(epoch, args.teacher_start, args.intervals)
        return epoch - 1 - done[-1] if done else None
    return epoch - 1 - args.teacher_start if args.teacher == "ema" and epoch > args.teacher_start else None


# ----------------------------------------------------------------------------
# Training


def batches(args, images, maps, epoch, first, device):
    """This process's parts of every batch of an epoch, loaded one ahead of use.

    yields  step in the epoch, list of `accumulate` parts (sample numbers, image (b, 3, S, S) in 0..1,
            CAM (b, K, h, w), draws (b, 10)), seconds waited. A last, smaller batch is left out.
    """
    n = len(images) * args.repeat                         # sample s is image s % len(images)
    order = np.random.default_rng((args.seed, epoch)).permutation(n)
    steps = n // args.batch                               # a last, smaller batch would weigh its images more

    def load(step):
        parts = np.array_split(order[step * args.batch:(step + 1) * args.batch], args.accumulate * WORLD)
        stack = lambda arrays: torch.from_numpy(np.stack(list(arrays)))
        return [(samples, stack(images[s % len(images)] for s in samples),
                 stack(maps[s % len(images)] for s in samples),
                 stack(data.draw(args.seed, epoch, int(s), args.jitter) for s in samples))
                for samples in parts[RANK::WORLD]]

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, first) if first < steps else None
        for step in range(first, steps):
            begin = time.time()
            parts = ahead.result()
            waited = time.time() - begin
            ahead = pool.submit(load, step + 1) if step + 1 < steps else None
            yield step, [(samples, data.to_float(image, device), cams.to(device).float(),
                          draws.to(device)) for samples, image, cams, draws in parts], waited


class Trainer:
    """Network, optimizer and position of a run; `pseudo_labels` and `learn` are the two halves of Fig. 2."""

    def __init__(self, args, vit, source, centroids, device, state):
        self.args, self.source, self.centroids, self.device = args, source, centroids, device
        N = len(source.names)
        torch.manual_seed(args.seed)                      # the same start on every process
        self.network = DMSA(vit, N, args.aspp != "none", args.dropout, args.momentum).to(device).train()
        self.params = list(self.network.student.parameters())
        self.optimizer = torch.optim.Adam([               # L2, not on biases and norms: as the peers
            {"params": [p for p in self.params if p.ndim > 1], "weight_decay": 5e-4},
            {"params": [p for p in self.params if p.ndim <= 1], "weight_decay": 0.0}], lr=args.lr)
        self.run = {"epoch": 0, "position": 0, "step": 0, "sums": {}, "cam": {}, "last": {}, "best": {},
                    "assignment": list(range(N))}
        if state:
            self.network.student.load_state_dict(state["student"])
            self.network.teacher.load_state_dict(state["teacher"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.run = {k: state[k] for k in self.run}
        self.par = PAR(tuple(args.par)) if args.par else None  # no parameters: nothing to save
        first = 1 if source.background else 0             # things are the second half of L_seg (decision 13)
        self.thing = torch.tensor([first <= n < first + source.things for n in range(N)], device=device)
        able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self.bf16 = args.precision == "bf16" or args.precision == "auto" and able

    def low_precision(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def upsample(self, maps):
        crop = self.args.losses_at == "crop"              # decision 18
        return F.interpolate(maps, size=(self.args.crop, self.args.crop), mode="bilinear") if crop else maps

    def rates(self, epoch):
        return DEEPLAB_RATES if self.args.aspp == "static" else dilation_rates(epoch)

    def replace_teacher(self):
        """TransFGU: the teacher becomes the student, the student starts anew; Adam's state is kept."""
        self.network.teacher.module.load_state_dict(self.network.student.state_dict())
        torch.manual_seed(self.args.seed)                 # the start that __init__ had
        fresh = Head(self.network.vit.embed_dim, len(self.source.names), self.args.aspp != "none")
        self.network.student.load_state_dict(fresh.state_dict())

    @torch.no_grad()
    def pseudo_labels(self, parts, epoch):
        """Fig. 2, top. parts of `batches` -> [(samples, features, label, foreground)] for `learn`, and their
        summed pixel counts (4,)."""
        args, network, out = self.args, self.network, []
        counts = torch.zeros(4, dtype=torch.int64, device=self.device)
        refine = self.upsample if self.par is None else lambda maps: self.par(image, maps)
        for samples, image, cams, draws in parts:
            # PAR sees the crop before colour jitter, the network after it (decision 24)
            image, cams, _ = data.crop(image, cams, draws, args.crop, network.vit.patch_size)
            seen = normalise(data.augment(image, draws))                          # (b, 3, H, W), in fp32
            with self.low_precision():
                features = network.features(seen)                                 # (b, D, h, w), twice
                teacher = None                            # (b, N, h, w) logits once the teacher takes part
                if teacher_age(args, epoch) is not None:
                    teacher = network.decode(network.teacher, features, self.rates(epoch))[0].float()
            label, foreground = pseudo_label(cams, teacher, refine, args.teacher_weight,
                                             self.source.background, args.background,
                                             args.cam_scale == "image")           # (b, H, W) each
            out.append((samples, features, label, foreground))
            counts += pixel_counts(label, foreground, self.thing)
        return out, counts

    def learn(self, parts, counts, epoch):
        """Fig. 2, bottom: losses and gradients of the parts, summed over all processes; one optimizer step.

        parts   of `pseudo_labels`; counts (4,) of the whole batch: with them the parts' losses add up to the
                batch's (losses.py), so that cutting it differently changes nothing
        returns {"seg", "ce", "un", "cls", "all"} of the batch
        raises  FloatingPointError, on all processes, if a loss or gradient is not finite; nothing has moved
        """
        args, network = self.args, self.network
        permutation, alpha, age = None, 0.0, teacher_age(args, epoch)
        if age is not None:                               # one for the whole batch, the same on every process
            rng = np.random.default_rng((args.seed, epoch, self.run["step"]))
            permutation = torch.from_numpy(rng.permutation(len(self.source.names))).to(self.device)
            alpha = permutation_weight(age)
        torch.manual_seed(args.seed + 1009 * self.run["step"] + 31 * RANK)        # only dropout draws from it
        values = torch.zeros(5, device=self.device)
        self.optimizer.zero_grad()
        for _, features, label, foreground in parts:
            with self.low_precision():
                logits, class_embeddings = network.decode(network.student, features, self.rates(epoch))
            loss = dmsa_losses(self.upsample(logits.float()), class_embeddings.float(), label, foreground,
                               counts, self.thing, args.lambdas, self.source.background, permutation, alpha)
            loss["all"].backward()
            values += torch.stack([v.detach() for v in loss.values()])
        # counts are global: the sum over processes is the mean over the batch
        sums = summed(torch.cat([p.grad.flatten() for p in self.params] + [values]))
        *gradients, values = sums.split([p.numel() for p in self.params] + [5])  # flat, as in params
        values = dict(zip(loss, values.tolist()))
        if not sums.sum().isfinite():                     # NaN and infinity reach a sum
            wrong = not_finite(values, gradients, network.student)
            names = [str(self.source.ids[s % len(self.source)]) for part in parts for s in part[0]]
            raise FloatingPointError(f"step {self.run['step'] + 1}: {wrong} not finite; the first samples of "
                                     f"process {RANK}: {', '.join(names[:8])}; the last checkpoint is kept")
        for p, gradient in zip(self.params, gradients):
            p.grad = gradient.view_as(p).clamp_(-1, 1)                            # as TransFGU
        self.optimizer.step()
        if args.teacher == "ema":
            network.teacher.update_parameters(network.student)
        return values

    def score(self, images, labels, epoch):
        """Scores of the student on val with this epoch's rates; keeps the cluster -> class assignment."""
        self.network.eval()
        total = evaluate(self.network, images, labels, self.rates(epoch), RANK, WORLD)  # (N, N), our share
        self.network.train()
        result = scores(summed(total.to(self.device)).cpu())
        self.run["assignment"] = result["assignment"].tolist()
        return {"miou": result["miou"], "accuracy": result["accuracy"], **self.run["cam"],
                "clusters": result["clusters"], "entropy": result["entropy"]}

    def checkpoint(self):
        """All that resuming, predicting and explaining need: tensors and plain values."""
        epoch = max(1, self.run["epoch"] + (self.run["position"] > 0))
        return self.run | {
            "args": vars(self.args), "names": self.source.names, "background": self.source.background,
            "centroids": self.centroids,
            "rates": list(self.rates(epoch)), "teacher_on": teacher_age(self.args, epoch) is not None,
            "vit": self.network.vit.state_dict(), "student": self.network.student.state_dict(),
            "teacher": self.network.teacher.state_dict(), "optimizer": self.optimizer.state_dict()}

    def save(self, *names):
        """Write checkpoints on the first process; if that fails, all leave together with RunError."""
        error = ""
        if RANK == 0:
            try:
                for name in names:
                    save(self.checkpoint(), Path(self.args.out) / name)
            except RunError as failure:
                error = str(failure)
        if summed(torch.tensor(len(error), device=self.device)).item():
            raise RunError(error or "the first process could not write the checkpoint")


def not_finite(values, gradients, student):
    """Names of the losses, or else of the gradients, that are not finite."""
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    named = zip(student.named_parameters(), gradients)
    wrong = wrong or ["gradient of " + name for (name, _), g in named if not g.isfinite().all()]
    return ", ".join(wrong[:3])


def score_cam(args, source, maps, labels, device):
    """mIoU and accuracy of the coarse labels on val before any training; prints the trivial answer's too."""
    total = torch.zeros(len(source.names), len(source.names), dtype=torch.int64)
    for group in groups(len(labels), RANK, WORLD):
        cams = torch.from_numpy(maps[group.start:group.stop].astype(np.float32)).to(device)   # (b, K, h, w)
        probabilities = cam_probabilities(cams, source.background, args.background, scaled=True)
        masks = F.interpolate(probabilities, size=labels.shape[1:], mode="bilinear").argmax(1)  # (b, S, S)
        total += confusion_matrix(labels[group.start:group.stop], masks.cpu(), len(source.names))
    total = summed(total.to(device)).cpu()
    coarse, trivial = scores(total), torch.zeros_like(total)
    trivial[:, 0] = total.sum(1)                          # all pixels predicted as one cluster
    trivial = scores(trivial)
    say(f"CAM labels on val: mIoU {coarse['miou']:.2f} accuracy {coarse['accuracy']:.2f}; "
        f"all pixels as the most frequent class: mIoU {trivial['miou']:.2f} "
        f"accuracy {trivial['accuracy']:.2f}")
    return {"cam_miou": coarse["miou"], "cam_accuracy": coarse["accuracy"]}


def open_log(out, state):
    """log.jsonl without the lines after the checkpoint, which will be written again."""
    log = out / "log.jsonl"
    if RANK == 0:
        lines = log.read_text().splitlines(True) if state and log.exists() else []
        whole = [line for line in lines if line.endswith("\n")]                   # a kill may cut the last
        part = Path(f"{log}.part")
        part.write_text("".join(line for line in whole if json.loads(line)["step"] <= state["step"]))
        part.replace(log)
    return log


def speed(args, device, steps, seconds, waited):
    """What an epoch of `steps` steps cost: images per second, share of waiting for data, memory in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {"images_per_s": steps * args.batch / seconds, "data_wait": waited / seconds,
            "peak_gb": peak / 1e9}


def train(args, device, stop):
    """The whole run: prepare, loop, evaluate, save. Returns the number of the signal that ended it, or 0."""
    out = Path(args.out)
    state = resume(args, out)
    step = state["step"] if state else 0
    seen, squares = summed(torch.tensor([step, step ** 2], device=device)).tolist()
    if seen ** 2 != WORLD * squares:                      # only of equal numbers
        raise RunError(f"{out}: not the same on all machines: they must share this folder")
    if state and state["epoch"] >= args.epochs and (out / "curves.png").exists():
        say(f"{out}: this run is finished ({state['epoch']} epochs); raise --epochs to go on, "
            f"or use another --out")
        return 0
    sources = open_data(args)
    source, steps = sources["train"], len(sources["train"]) * args.repeat // args.batch
    loaded = backbone(args.backbone, args.weights) if LOCAL == 0 else None        # one a machine fetches
    wait()
    vit, weights, digest = loaded or backbone(args.backbone, args.weights)
    say(f"{args.backbone}: {weights}, SHA-256 {digest}")
    if state and any(not torch.equal(value, state["vit"][name]) for name, value in vit.state_dict().items()):
        raise RunError(f"{out}/last.pt: begun with other weights than {weights}: give the same ones again, "
                       f"or use another --out")
    vit = vit.to(device).eval().requires_grad_(False)
    # up to here nothing took long; from here on everything that is computed is kept
    images, labels, maps, centroids = prepare(args, sources, vit, digest, device)
    if state and not torch.equal(centroids, state["centroids"]):                  # a cache was deleted
        raise RunError(f"{out}/last.pt: begun with other clusters; k-means gives the same ones again only on "
                       f"the same machine, with as many threads; go on there, or use another --out")
    trainer, log = Trainer(args, vit, source, centroids, device, state), open_log(out, state)
    run = trainer.run
    if state:
        say(f"{out}: going on after epoch {run['epoch']}, step {run['step']}")
    if labels is not None and not run["cam"]:
        run["cam"] = score_cam(args, source, maps["val"], labels, device)

    stop.finish_step = True                               # a signal now ends the step, saves, and leaves
    for epoch in range(run["epoch"] + 1, args.epochs + 1):           # Table 1 counts from 1
        first, begin, waited = run["position"], time.time(), 0.0
        if args.teacher == "reset" and teacher_age(args, epoch) == 0 and first == 0:
            trainer.replace_teacher()
        for position, parts, seconds in batches(args, images["train"], maps["train"], epoch, first, device):
            # for all parts first: the means of the losses need the pixels of the whole batch
            parts, counts = trainer.pseudo_labels(parts, epoch)      # Fig. 2, top
            counts, ended_by = stop.summed(counts)
            losses = trainer.learn(parts, counts, epoch)             # Fig. 2, bottom; Eq. 6
            run["step"], run["position"], waited = run["step"] + 1, position + 1, waited + seconds
            run["sums"] = {name: run["sums"].get(name, 0.0) + value for name, value in losses.items()}
            record = {"epoch": epoch, "step": run["step"], **losses, "rates": list(trainer.rates(epoch)),
                      "lr": args.lr}
            if position == steps - 1:
                record |= speed(args, device, steps - first, time.time() - begin, waited)
                if labels is not None:
                    record |= trainer.score(images["val"], labels, epoch)
            if RANK == 0:
                with open(log, "a") as f:
                    f.write(json.dumps(record) + "\n")
            if ended_by and position < steps - 1:
                trainer.save("last.pt")
                return ended_by
        means = "  ".join(f"{name} {value / steps:.4f}" for name, value in run["sums"].items())
        run["epoch"], run["position"], run["sums"], names = epoch, 0, {}, ["last.pt"]
        if labels is not None:
            run["last"] = {name: record[name] for name in ("epoch", "miou", "accuracy")}
            total = lambda scored: scored["miou"] + scored["accuracy"]
            if not run["best"] or total(run["last"]) > total(run["best"]):        # on val, as the peers
                run["best"], names = run["last"], ["best.pt", "last.pt"]
        trainer.save(*names)
        shown = "" if labels is None else (f"  mIoU {record['miou']:.2f} accuracy {record['accuracy']:.2f} "
                                           f"clusters {record['clusters']}")
        say(f"epoch {epoch}/{args.epochs}  {means}{shown}  rates {record['rates']}  "
            f"{record['images_per_s']:.0f} images/s  wait {100 * record['data_wait']:.0f} %  "
            f"{record['peak_gb']:.2f} GB")
        ended_by = ended_by or stop.summed(counts)[1]     # or while scoring
        if ended_by and epoch < args.epochs:
            return ended_by
    finish(trainer, images["train" if labels is None else "val"], labels, log)
    return 0


def finish(trainer, images, labels, log):
    """panels.png, curves.png and the last words, by the first process."""
    if RANK:
        return
    out, run = log.parent, trainer.run
    trainer.network.eval()
    panels(trainer.network, trainer.checkpoint(), np.ascontiguousarray(images[:6]),
           None if labels is None else np.ascontiguousarray(labels[:6]), out / "panels.png", trainer.par)
    curves(log, out / "curves.png")
    if labels is not None:
        last, best = run["last"], run["best"]
        say(f"last epoch: mIoU {last['miou']:.2f} accuracy {last['accuracy']:.2f};  "
            f"best epoch, {best['epoch']}, chosen on val: mIoU {best['miou']:.2f} accuracy "
            f"{best['accuracy']:.2f};  CAM labels: mIoU {run['cam']['cam_miou']:.2f}")
    say(f"wrote {out}/: log.jsonl, last.pt, {'' if labels is None else 'best.pt, '}panels.png, curves.png")


def main():
    args, stop = parse(), Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    code = 0
    try:
        if args.batch < WORLD * args.accumulate:
            raise RunError(f"--batch {args.batch}: fewer images than parts, {WORLD} processes x --accumulate "
                           f"{args.accumulate}; raise --batch or lower these")
        device = start_processes(args.device)
        if args.dry_run:
            resume(args, Path(args.out))
            for split, source in open_data(args).items():
                say(f"{split}: {len(source)} images")
            backbone(args.backbone, args.weights)
            say(json.dumps(vars(args), indent=1))
        else:
            lock = claim(Path(args.out))                  # held until this process ends
            number = train(args, device, stop)
            if number:
                say(f"signal {number}: saved, the same command goes on")
                code = 128 + number
    except (RunError, data.DataError, WeightsError, CheckpointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        code = 2
    except OSError as error:                              # a full disk, mostly
        print(f"train.py: {error.filename or args.out}: {error.strerror or error}; mend that, the same "
              f"command goes on", file=sys.stderr)
        code = 2
    except (FloatingPointError, LostProcess) as error:
        print(f"train.py: {error}", file=sys.stderr)
        code = 1
    except torch.OutOfMemoryError as error:
        print(f"train.py: process {RANK}: not enough GPU memory; raise --accumulate and go on with the same "
              f"command ({str(error).splitlines()[0][:100]})", file=sys.stderr)
        code = 2
    except Exception:                                     # a mistake of ours; leave as below all the same
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # all is written; torch's clean-up could wait for other processes, and now and then aborts (3 of 40 runs)
    if code or WORLD > 1:
        os._exit(code)


if __name__ == "__main__":
    main()
