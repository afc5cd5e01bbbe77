"""Train DMSA (Fig. 2): coarse labels once, then student and EMA teacher with ASPP, PAR and four losses.

    python train.py                                                # `shapes`, on a CPU, nothing to download
    python train.py --data voc                                     # one GPU, or the CPU
    torchrun --nproc_per_node=6 train.py --data voc                # six GPUs, the paper's setting
    python train.py --data folder --root photos --classes 10       # images of one's own, no labels

A run that was stopped, at any moment, goes on when the same command is given again: from last.pt, which is
written after every epoch, with the same random numbers, so that nothing but the begun epoch is done twice.
--batch is the global batch: the result does not depend on the number of processes but for the order of sums
(and for --dropout, which only the presets released and transfgu have).

    settings -> the method: class Trainer -> the loop: train(); coarse labels; batches
    -> what a run needs besides: caches, data, checkpoints, processes and signals, options, main()
"""

import argparse
import contextlib
import datetime
import fcntl
import hashlib
import io
import json
import math
import os
import resource
import secrets
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)          # Ctrl-C during the imports: no traceback

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import cam
import data
from aspp import DEEPLAB_RATES, dilation_rates
from data import UserError
from eval import (Progress, available, cluster_sheet, curves, enlarged, evaluate, groups, head_logits,
                  load_checkpoint, named, outside, panels, scores)
from losses import dmsa_losses, min_max, permutation_weight, pixel_counts, pseudo_label, with_background
from model import BACKBONES, DMSA, Head, VisionTransformer, backbone, normalise
from par import PAR

# ----------------------------------------------------------------------------
# Settings: COMMON, then what each data set changes. Most are options too, explained in OPTIONS below.
# "Decision N", here and below, is row N of docs/decisions.md.

COMMON = dict(
    root="data", classes=None, seed=0, accumulate=1, workers=4, device="auto", precision="auto",
    backbone="vits8", size=320, crop=160,                 # pixels: side of squashed images, of training crops
    scales=cam.THING_SCALES,                              # sides of the windows, as shares of the image
    bank=640, window=320,                                 # pixels: side of the image that they are cut from,
                                                          # side that they are resized to for the ViT
    batch=512, epochs=50, repeat=1, lr=1e-4,              # repeat: passes over the images that make an epoch
    lambdas=(0.1, 1.0, 0.3, 1.0),                         # of Eq. 6: seg, CE, un, cls (decision 16)
    threshold=0.1, teacher_weight=0.7,                    # of the background: TransFGU's; decision 11
    teacher_start=5,                                      # epochs of CAM alone
    intervals=(5, 5, 5, 5, 4, 4, 4, 4, 4, 3),             # of --teacher reset: `replacements`
    aspp="dynamic", aspp_scale=0.1, par=(1, 2, 4, 8), coarse="hard", teacher="ema", momentum=0.99,
    dropout=0.0, cam_scale="image", losses_at="crop", jitter=data.JITTER)
SETTINGS = {
    "shapes": COMMON | dict(                              # small, so that a CPU is enough (decision 26)
        backbone="tiny", size=192, crop=96, bank=128, window=96, batch=8, epochs=10, lr=5e-4, momentum=0.97,
        lambdas=(0.3, 1.0, 0.1, 1.0), teacher_start=4, intervals=(2,), jitter=(0.4, 0.4, 0.4, 0.05),
        par=(1, 2, 8, 16)),
    "voc": COMMON | dict(repeat=20, lambdas=(0.3, 1.0, 0.3, 1.0)),
    "voc-aug": COMMON | dict(epochs=150, lr=1e-5),
    "coco80": COMMON | dict(
        scales=cam.SCENE_SCALES, batch=256, epochs=200, teacher_start=3, intervals=(3, 3, 3, 2)),
    "cocostuff27": COMMON | dict(
        scales=cam.SCENE_SCALES, batch=256, epochs=200, teacher_weight=0.5, teacher_start=2, intervals=(2,)),
    "folder": COMMON | dict(backbone="vits16", window=224, batch=16, classes=20),  # decision 32
}
# Other methods: TransFGU's, and DMSA as its authors released it. In the released code ASPP never reaches the
# tokens and PAR is commented out: it is TransFGU with L_seg and another fusion weight (docs/decisions.md,
# "What the released code does"). A lambda of None is the data set's own.
RELEASED = dict(aspp="none", par=(), cam_scale="crop", teacher="reset", dropout=0.1, losses_at="patches")
PRESETS = {"dmsa": {}, "released": RELEASED,
           "transfgu": RELEASED | dict(teacher_weight=0.5, lambdas=(0.0, None, None, None))}

BANK_IMAGES, BANK_WINDOWS = 10_000, 200_000               # for k-means, at most
KEPT = 2 ** 30                                            # bytes of val's features that a process keeps
LOSSES = ("seg", "ce", "un", "cls", "all")                # of Eq. 6, and their weighted sum

# torchrun's numbers: of this process, of this process on its machine, how many there are; -1: no number
RANK, LOCAL_RANK, WORLD = (int(value) if value.isdecimal() else -1 for value in (
    os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0"), os.environ.get("WORLD_SIZE", "1")))


# ----------------------------------------------------------------------------
# The method: pseudo labels and training step (Fig. 2), by epoch


def rates_of(args, epoch):
    """Table 1's row of this epoch, or DeepLabV3+'s rates in every epoch."""
    return DEEPLAB_RATES if args.aspp == "static" else dilation_rates(epoch)


def teacher_age(args, epoch):
    """Epochs since the teacher began to take part, from 0; None before that. `reset`: see `replacements`."""
    first = args.teacher_start + 1
    if args.teacher == "reset":                           # TransFGU's, not DMSA's
        first = max(replacements(epoch, args.teacher_start, args.intervals), default=math.inf)
    return epoch - first if args.teacher != "none" and epoch >= first else None


class Part(NamedTuple):
    """What a process computes at once: its share of a batch, or with --accumulate a part of that."""
    image: torch.Tensor          # (b, 3, S, S) in 0..1
    cams: torch.Tensor           # (b, K, h, w) in 0..1
    draws: data.Draws            # random numbers of crop and colours, (b,) each


class Target(NamedTuple):
    """What the student learns from a part: `pseudo_labels` makes it, `train_step` uses it."""
    features: tuple              # x, msa (b, D, h, w) of `DMSA.features`
    label: torch.Tensor          # (b, H, W) int64
    confident: torch.Tensor      # (b, H, W) bool, pixels of L_un


class Trainer:
    """Network, optimizer, and how far the run is. `pseudo_labels` and `train_step` are the halves of Fig. 2.

    source  the training data set; begun: what the run was begun with, {"images": identity of each split,
            "weights": SHA-256 of the file of the ViT's weights, "centroids": (K, D)}
    """

    def __init__(self, args, vit, source, begun, device):
        self.args, self.source, self.begun, self.device = args, source, begun, device
        N = n_clusters(source)
        torch.manual_seed(args.seed)                      # the same start on every process
        self.network = DMSA(vit, N, args.aspp != "none", args.dropout,
                            args.aspp_scale).to(device).train()
        self.params = list(self.network.student.parameters())
        self.optimizer = torch.optim.Adam([               # L2, not on biases and norms (decision 27)
            {"params": [p for p in self.params if p.ndim > 1], "weight_decay": 5e-4},
            {"params": [p for p in self.params if p.ndim <= 1], "weight_decay": 0.0}], lr=args.lr)
        self.par = PAR(tuple(args.par)) if args.par else None
        # labels and losses have the crop's pixels (decision 18); without PAR they may have its patches
        self.label_size = args.crop if args.par or args.losses_at == "crop" else args.crop // vit.patch_size
        # classes in this order: background if there is one, things, stuff
        first = 1 if source.background else 0             # things are the second half of L_seg (decision 13)
        self.is_thing = torch.tensor([first <= n < first + source.things for n in range(N)], device=device)
        able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self.bf16 = args.precision == "bf16" or args.precision == "auto" and able
        if self.bf16 and device.type == "cpu" and not cpu_has_bf16():
            print0("--precision bf16: this CPU has no instructions for it, fp32 is many times faster")
        self.epoch, self.scored = 0, {}                   # epochs that are done; scores of CAM, last, best
        self.assignment = [n % len(source.names) for n in range(N)]                # cluster -> class

    def low_precision(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def upsample(self, maps):
        return F.interpolate(maps, size=(self.label_size, self.label_size), mode="bilinear")

    @torch.no_grad()
    def pseudo_labels(self, parts, epoch):
        """Fig. 2, top: CAM and teacher, fused, refined by PAR; in the first epochs (`teacher_age`) CAM alone.

        Returns a Target for each Part, and their pixel counts (4,), to be added up over all processes.
        """
        args, network, targets = self.args, self.network, []
        patch, background = network.vit.patch_size, self.source.background
        for part in parts:
            # PAR sees the crop before colour jitter, the network after it (decision 24)
            image = data.crop(part.image, part.draws, args.crop)                  # (b, 3, H, W)
            cams = data.crop(part.cams, part.draws, args.crop // patch, "area")   # (b, K, h, w)
            if args.cam_scale == "crop":                  # else `cached_cams` has scaled them (decision 23)
                cams = min_max(cams)
            seen = normalise(data.augment(image, part.draws))                     # (b, 3, H, W)
            teacher = None
            with self.low_precision():
                features = network.features(seen)                                 # (b, D, h, w), twice
                if teacher_age(args, epoch) is not None:
                    teacher, _ = network.decode(network.teacher, features, rates_of(args, epoch))
                    teacher = teacher.float()                                     # (b, N, h, w) logits
            refine = partial(self.par, image) if self.par else self.upsample
            hard = args.coarse == "hard" and self.par is not None
            label, confident = pseudo_label(cams, teacher, refine, args.teacher_weight, background,
                                            args.threshold, hard)                 # (b, H, W) each
            targets.append(Target(features, label, confident))
        return targets, sum(pixel_counts(t.label, t.confident, self.is_thing) for t in targets)

    def train_step(self, targets, counts, epoch, step):
        """Fig. 2, bottom: the losses of the targets, their gradients summed over all processes, one step.

        counts   (4,) of the whole batch: with them the losses of its parts add up to the batch's (losses.py),
                 so that cutting it differently changes nothing
        step     steps before this one, from 0
        returns  {"seg", "ce", "un", "cls", "all"} of the batch
        raises   FloatingPointError, on all processes, if a loss or gradient is not finite; nothing has moved
        """
        args, network = self.args, self.network
        permutation, alpha, age = None, 0.0, teacher_age(args, epoch)
        if age is not None:                               # one for the whole batch, the same on every process
            rng = np.random.default_rng((args.seed, epoch, step))
            permutation = torch.tensor(rng.permutation(len(self.is_thing))).to(self.device, non_blocking=True)
            alpha = permutation_weight(age)
        torch.manual_seed(args.seed + 1009 * step + 31 * RANK)                    # only dropout draws from it
        self.optimizer.zero_grad()
        parts = []
        for target in targets:
            with self.low_precision():
                logits, class_embeddings = network.decode(network.student, target.features,
                                                          rates_of(args, epoch))
            loss = dmsa_losses(self.upsample(logits.float()), class_embeddings.float(), target.label,
                               target.confident, counts, self.is_thing, args.lambdas, self.source.background,
                               permutation, alpha)
            loss["all"].backward()
            parts.append(torch.stack([loss[name].detach() for name in LOSSES]))   # (5,)
        # the counts are the whole batch's: sums over parts and processes are the means over the batch
        total = all_reduce_sum(sum(parts))                                        # (5,)
        gradient = all_reduce_sum(torch.cat([p.grad.flatten() for p in self.params]))             # (P,)
        *total, norm = torch.cat([total, gradient.norm()[None]]).tolist()
        losses = dict(zip(LOSSES, total))
        if not math.isfinite(norm + sum(total)):
            raise FloatingPointError(f"step {step + 1}: {not_finite(self, losses, gradient)} not finite; the "
                                     f"last checkpoint is kept")
        gradient.clamp_(-1, 1)                                                    # elementwise, as TransFGU
        for p, g in zip(self.params, gradient.split([p.numel() for p in self.params])):
            p.grad = g.view_as(p)
        self.optimizer.step()
        if args.teacher == "ema":
            network.update_teacher(step, args.momentum)
        return losses


# ----------------------------------------------------------------------------
# The loop


def train(args, device):
    """The whole run: coarse labels, then epochs of steps, each with its scores and its checkpoint."""
    out, state = Path(args.out), resume(args)
    if state and state["epoch"] >= args.epochs and (out / "curves.png").exists():
        return print0(f"{out}: this run is finished ({state['epoch']} epochs); raise --epochs to go on, "
                      f"or use another --out")
    if state:
        named(state, out / "last.pt")                     # a mistake in names.txt is told now, not at the end
    elif (out / "names.txt").exists():
        raise UserError(f"{out}/names.txt: names the clusters of an earlier run; remove it to begin anew")
    trainer, images, labels, cams = prepare(args, state, device)      # Fig. 2, left
    (out / "curves.png").unlink(missing_ok=True)          # a run that has it is finished
    log, steps = open_log(out, trainer.epoch), len(images["train"]) * args.repeat // args.batch
    val = None if labels is None else Seen(trainer.network, images["val"])
    first, progress = trainer.epoch * steps, Progress("step", (args.epochs - trainer.epoch) * steps)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()              # peak_gb leaves out windows, CAMs
    for epoch in range(trainer.epoch + 1, args.epochs + 1):           # Table 1 counts from 1
        begin, waited, total = time.time(), 0.0, np.zeros(5)
        if args.teacher == "reset" and teacher_age(args, epoch) == 0:
            replace_teacher(trainer)
        loader = batches(args, images["train"], cams["train"], steps, epoch, device)
        for step, (parts, seconds) in enumerate(loader, (epoch - 1) * steps):
            # for all parts first: the means of the losses need the pixels of the whole batch
            targets, counts = trainer.pseudo_labels(parts, epoch)     # Fig. 2, top
            losses = trainer.train_step(targets, all_reduce_sum(counts), epoch, step)      # and bottom
            waited, total = waited + seconds, total + list(losses.values())
            if RANK == 0:
                progress(step + 1 - first)
            record = {"epoch": epoch, "step": step + 1, **losses, "rates": list(rates_of(args, epoch)),
                      "lr": args.lr}
            if step + 1 == epoch * steps:                 # the last of the epoch
                record |= speed(args, device, steps, time.time() - begin, waited)
                if labels is not None:
                    record |= score(trainer, val, labels, epoch) | trainer.scored["cam"]
            log.write(json.dumps(record) + "\n")
        trainer.epoch = epoch
        if labels is not None:
            note_scores(trainer, record)
            if trainer.scored["best"]["epoch"] == epoch:
                save_checkpoint(trainer, "best.pt")
        save_checkpoint(trainer, "last.pt")
        print0(epoch_line(args, record, dict(zip(losses, total / steps))))
    draw_and_tell(trainer, images["train" if labels is None else "val"], labels)


def prepare(args, state, device):
    """Fig. 2, left: ViT, windows, centroids and CAMs, computed once and cached, and a Trainer.

    state    checkpoint to go on from, or None
    returns  trainer; images {split: (n, S, S, 3) uint8}; labels of val (n, S, S) uint8 or None; CAMs
             {split: (n, K, h, w) in 0..1}
    """
    sources = open_data(args, state)
    vit, digest = frozen_vit(args, state, device)
    images = {split: cached_squashed(args, f"{split}-images", source, source.squashed)
              for split, source in sources.items()}
    val = sources.get("val")                              # of a folder there is none
    nearest = lambda i, size: data.squash(val.label(i), size, "nearest")
    labels = cached_squashed(args, "val-labels", val, nearest) if val else None
    centroids = state["centroids"] if state else cluster_windows(args, sources["train"], vit, digest, device)
    begun = {"images": {split: identity(source) for split, source in sources.items()},
             "weights": digest, "centroids": centroids}
    trainer = Trainer(args, vit, sources["train"], begun, device)
    if state:
        restore(trainer, state)
        print0(f"{args.out}: going on after epoch {trainer.epoch}")
    else:
        save_checkpoint(trainer, "last.pt")               # from here on k-means is not done again
    cams = cached_cams(args, sources, images, vit, digest, centroids, device)
    if labels is not None and "cam" not in trainer.scored:
        trainer.scored["cam"] = score_cam(trainer, cams["val"], labels)
    return trainer, images, labels, cams


def window_bank(args, source, vit, digest, device):
    """Windows of the training images -> CLS features, cached: a list of (M, 1 + D), each of some images.

    The first number is 0 for windows on the foreground and 1 for those on the background.
    """
    # evenly over the list, which may be sorted
    chosen = np.linspace(0, len(source) - 1, min(len(source), BANK_IMAGES)).round().astype(int)

    def features(shard):
        found = []
        for i in shard:
            image = source.squashed(chosen[i], args.bank)
            image = normalise(data.to_float(image[None], device))                 # (1, 3, bank, bank)
            kinds = cam.window_features(vit, image, args.window, args.scales, source.stuff > 0)
            found += [F.pad(cls.cpu(), (1, 0), value=kind) for kind, cls in enumerate(kinds)]
        return torch.cat(found).half().numpy()

    # not in the key: K and the seed, so that other numbers of clusters reuse the windows
    key = [identity(source), digest, args.bank, args.window, args.scales, cam.COVER, cam.CLEAR, BANK_IMAGES]
    return cached(args, "windows", key, len(chosen), features).shards


def cluster_windows(args, source, vit, digest, device):
    """k-means of the windows, things and stuff apart: centroids (K, D).

    For a new run only: afterwards the centroids are in last.pt. They depend on the images, the ViT, K and the
    seed, and also on the machine and its threads, whose sums differ in the last digits.
    """
    shards = window_bank(args, source, vit, digest, device)
    clusters = [source.things, source.stuff] if source.stuff else [source.things]
    centroids = torch.zeros(sum(clusters), vit.embed_dim, device=device)
    if RANK == 0:
        bank, found, rng = np.concatenate(shards), [], np.random.default_rng(args.seed)
        for kind, k in enumerate(clusters):
            windows = bank[bank[:, 0] == kind, 1:]                                # (M, D)
            if len(windows) > BANK_WINDOWS:
                windows = windows[np.sort(rng.choice(len(windows), BANK_WINDOWS, replace=False))]
            print0(f"k-means: {len(windows)} windows of {min(len(source), BANK_IMAGES)} images, {k} clusters")
            try:
                found.append(torch.from_numpy(cam.cluster(windows, k, args.seed)))
            except ValueError as error:                   # too few windows
                raise UserError(f"--data {args.data}: {error}") from None
        centroids += torch.cat(found).to(device)
    return all_reduce_sum(centroids).cpu()                # the others' are zero: now all have the first one's


def cached_cams(args, sources, images, vit, digest, centroids, device):
    """{split: Cache of class activation maps (n, K, h, w) float16, each image's scaled to 0..1}."""
    def maps(squashed, shard):                            # 16 images at once: COCO's shards have 1,800
        found = []
        for first in range(shard.start, shard.stop, 16):
            image = data.to_float(squashed[first:min(first + 16, shard.stop)], device)
            found.append(cam.class_activation_maps(vit, normalise(image), centroids.to(device)))
        return torch.cat([min_max(cams).half().cpu() for cams in found]).numpy()

    # the maps depend on the images, the weights and the centroids, not on how k-means found them
    key = [args.size, digest, hashlib.sha256(centroids.numpy().tobytes()).hexdigest(), cam.KEEP_MASS]
    return {split: cached(args, f"{split}-cams", [identity(source), *key], len(source),
                          partial(maps, images[split])) for split, source in sources.items()}


def batches(args, images, cams, steps, epoch, device):
    """This process's share of the batches of an epoch, loaded one ahead of use.

    yields  a list of `accumulate` Parts, seconds waited. A last, smaller batch is left out: its images would
            weigh more.
    """
    order = np.random.default_rng((args.seed, epoch)).permutation(len(images) * args.repeat)

    # a GPU fetches pinned memory by itself, and nobody waits for it
    pin = torch.Tensor.pin_memory if device.type == "cuda" else torch.Tensor.contiguous

    def load(step):
        parts = np.array_split(order[step * args.batch:(step + 1) * args.batch], args.accumulate * WORLD)
        # sample s is image s % len(images)
        stack = lambda array, samples: pin(torch.from_numpy(
            np.stack([array[s % len(images)] for s in samples])))
        return [(stack(images, samples), stack(cams, samples),
                 data.draw(args.seed, epoch, samples, args.jitter)) for samples in parts[RANK::WORLD]]

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, 0)
        for step in range(steps):
            begin = time.time()
            loaded = ahead.result()
            waited = time.time() - begin
            if step + 1 < steps:
                ahead = pool.submit(load, step + 1)
            yield [Part(data.to_float(image, device), maps.to(device, non_blocking=True).float(),
                        data.Draws(*(numbers.to(device, non_blocking=True) for numbers in draws)))
                   for image, maps, draws in loaded], waited


# ============================================================================
# What a run needs besides. Whoever reads this file beside the paper has now seen all of the method.
# ============================================================================
# Caches. A cache is a folder of arrays, the shards, each for consecutive images. A shard is written to a
# temporary name and moved into place, so that one that is there is whole: a killed run goes on at the next.

SHARDS = 64                                               # of a cache at most: each keeps a file open
VERSION = 1                                               # raise it when SHARDS or a computation changes


class Cache:
    """A cache on disk, read like an array: len(cache), cache[i], cache[a:b]."""

    def __init__(self, files, bounds):
        self.bounds, self.shards = bounds, []
        for file in files:
            if not file.exists():
                raise UserError(f"{file}: another machine's part is not there; all must share this folder")
            try:
                try:
                    self.shards.append(np.load(file, mmap_mode="r"))              # reads what is asked for
                except OSError:                           # a file system that maps no files
                    self.shards.append(np.load(file))
            except (ValueError, EOFError):
                raise UserError(f"{file}: damaged; remove it, and the same command makes it again") from None

    def __len__(self):
        return self.bounds[-1]

    def __getitem__(self, i):
        if isinstance(i, slice):
            return np.stack([self[k] for k in range(*i.indices(len(self)))])
        k = np.searchsorted(self.bounds, i, side="right") - 1
        return self.shards[k][i - self.bounds[k]]


def cached(args, name, key, n, compute):
    """The Cache of n records; each process computes its share of the shards that are not there.

    key      all that the records depend on; it names the folder
    compute  range of images -> array of their records: one each, or of windows any number each; then only the
             `shards` of the Cache can be read
    """
    digest = hashlib.sha256(json.dumps([VERSION, key]).encode()).hexdigest()[:16]
    folder = Path(args.out).parent / "cache" / f"{args.data}-{name}-{digest}"
    bounds = np.linspace(0, n, min(n, SHARDS) + 1).round().astype(int)            # the same for any WORLD
    files = [folder / f"{k:02}.npy" for k in range(len(bounds) - 1)]
    missing = [k for k, file in enumerate(files) if k % WORLD == RANK and not file.exists()]
    start, progress = time.time(), Progress(f"{name}: part", len(missing))
    for count, k in enumerate(missing, 1):
        records = compute(range(bounds[k], bounds[k + 1]))
        write_whole(files[k], lambda f: np.save(f, records), sync=False)          # a power cut costs a shard
        if RANK == 0:
            progress(count)
    barrier()
    if missing:
        print0(f"{name}: {n} images, {time.time() - start:.0f} s")
    return Cache(files, bounds)


def write_whole(file, save, sync=True):
    """Write what save(f) writes to a temporary name and move it into place: `file` is always whole.

    sync   wait for the disk, so that a power cut does no harm either; caches do without
    """
    part, content = file.with_name(f"{file.name}.{secrets.token_hex(4)}.part"), io.BytesIO()
    save(content)                                         # to memory: numpy and torch name no full disk
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            f.write(content.getbuffer())
            f.flush()
            if sync:
                os.fsync(f.fileno())
        os.replace(part, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"{file}: cannot be written ({error.strerror}); mend that, and the same command goes "
                        f"on") from None


# ----------------------------------------------------------------------------
# Data and what is computed from it once


def n_clusters(source):
    """N, the network's channels: one for each cluster, and one for the background if there is one."""
    return source.background + source.things + source.stuff


@lru_cache
def identity(source):                                     # read once: COCO has 240,000 files
    """What the files of a split are: [how many images, digest of their names and of all sizes in bytes]."""
    labels = [os.path.getsize(file) for file in source.labels if os.path.exists(file)]
    images = [os.path.getsize(file) for file in source.images]
    names = list(map(str, source.ids))
    return [len(source), hashlib.sha256(json.dumps([names, images, labels]).encode()).hexdigest()]


def open_data(args, state):
    """The splits, {"train": data set, "val": data set}; a folder has no val. state: of `resume`."""
    sources = {}
    for split in ("train",) if args.data == "folder" else ("train", "val"):
        with zero_first(RANK):                            # the first process lists COCO's images for all
            sources[split] = data.dataset(args.data, args.root, split, args.classes, args.seed,
                                          cache=Path(args.out).parent / "cache")
        if args.limit:
            sources[split].limit(args.limit)
        if args.classes and args.data != "folder":        # more clusters than classes
            if args.classes < sources[split].things:
                raise UserError(f"--classes {args.classes}: {args.data} has {sources[split].things} classes; "
                                f"give at least so many, or leave it out")
            sources[split].things = args.classes
        now = identity(sources[split])
        then = state["images"][split] if state else now
        if then != now:
            raise UserError(f"{args.out}/last.pt: the images of {split} have changed, {then[0]} then, "
                            f"{now[0]} now{' of other names or sizes' if now[0] == then[0] else ''}: use "
                            f"another --out, or give the same images to go on")
    n = len(sources["train"]) * args.repeat
    if n < args.batch:
        raise UserError(f"--batch {args.batch}: larger than an epoch of {n} images; lower it")
    return sources


def frozen_vit(args, state, device):
    """The pretrained ViT, from the checkpoint if there is one, and the SHA-256 of the file it came from."""
    if state:
        vit, digest = VisionTransformer(**BACKBONES[args.backbone][0]), state["weights"]
        vit.load_state_dict(state["vit"])
    else:
        with zero_first(LOCAL_RANK):                      # the first process of a machine fetches it for all
            vit, file, digest = backbone(args.backbone, args.weights)
        print0(f"{args.backbone}: {file}, SHA-256 {digest}")
    return vit.to(device).eval().requires_grad_(False), digest


def cached_squashed(args, name, source, read):
    """Cache of read(i, S), image or label of `source`, squashed: (n, S, S[, 3]) uint8."""
    def squashed(shard):
        return np.stack(list(pool.map(lambda i: read(i, args.size), shard)))

    with ThreadPoolExecutor(args.workers) as pool:
        return cached(args, name, [identity(source), args.size], len(source), squashed)


# ----------------------------------------------------------------------------
# TransFGU's teacher (--teacher reset): every few epochs it becomes the student, and the student starts anew


def replacements(epochs, start, intervals):
    """The epochs up to `epochs`, from 1, before which the teacher is replaced.

    start       epochs without a teacher
    intervals   of epochs 1 to 10, of 11 to 20 ...; the last holds from there on. The teacher is replaced
                before an epoch if epoch - 1 is a multiple of its interval. For VOC: 6, 11, 16, 21 ...
    """
    return [epoch for epoch in range(start + 1, epochs + 1)
            if (epoch - 1) % intervals[min((epoch - 1) // 10, len(intervals) - 1)] == 0]


def replace_teacher(trainer):
    """The teacher becomes the student, the student gets its first weights; Adam's state is kept."""
    trainer.network.teacher.load_state_dict(trainer.network.student.state_dict())
    torch.manual_seed(trainer.args.seed)                  # as Trainer.__init__
    fresh = Head(trainer.network.vit.embed_dim, n_clusters(trainer.source), trainer.args.aspp != "none")
    trainer.network.student.load_state_dict(fresh.state_dict())


# ----------------------------------------------------------------------------
# Scores, log, last words


def confusion_of(trainer, inputs, labels, predict, heads=1):
    """Confusion matrices of a split, of which every process does its share; predict as in `evaluate`."""
    share = ((inputs[g.start:g.stop], labels[g.start:g.stop]) for g in groups(len(labels), RANK, WORLD))
    total = evaluate(share, predict, len(trainer.source.names), n_clusters(trainer.source), heads)
    return all_reduce_sum(total.to(trainer.device)).cpu()


class Seen:
    """Images as the frozen ViT sees them: seen[a:b] are x, msa of `DMSA.features`, (b - a, D, h, w) each.

    Every epoch asks for the same slices, so each is computed once, as far as KEPT bytes hold them: all of
    `shapes` (59 MB), a seventh of VOC's 7 GB. The others are computed anew each time.
    """

    def __init__(self, network, images):
        self.network, self.images, self.kept, self.room = network, images, {}, KEPT

    def __getitem__(self, part):
        features = self.kept.get((part.start, part.stop))
        if features is None:
            image = data.to_float(self.images[part], self.network.vit.cls_token.device)
            features = self.network.features(normalise(image))
            self.room -= sum(x.nbytes for x in features)
            if self.room >= 0:
                self.kept[part.start, part.stop] = features
        return features


def score(trainer, val, labels, epoch):
    """Scores on val, with this epoch's rates, of the student and, once it takes part, of the teacher.

    Keeps the student's cluster -> class assignment. val: a Seen
    """
    network, rates = trainer.network.eval(), rates_of(trainer.args, epoch)
    heads = [network.student] + [network.teacher] * (teacher_age(trainer.args, epoch) is not None)

    def clusters(features, size):                         # of a group of val -> (heads, b, *size)
        return enlarged(head_logits(network, rates, features, heads), size).argmax(2).byte()

    result, *teacher = map(scores, confusion_of(trainer, val, labels, clusters, len(heads)))
    network.train()
    trainer.assignment = result["assignment"].tolist()
    return ({name: value for name, value in result.items() if name not in ("iou", "assignment")}
            | {f"teacher_{name}": found[name] for found in teacher for name in ("miou", "accuracy")})


def score_cam(trainer, cams, labels):
    """Scores of the coarse labels themselves, on val; prints them, and those of the trivial answer."""
    def clusters(maps, size):                             # (b, K, h, w) -> (1, b, *size)
        maps = torch.from_numpy(maps).to(trainer.device).float()
        masks = with_background(maps, trainer.args.threshold) if trainer.source.background else maps
        return F.interpolate(masks, size=size, mode="bilinear").argmax(1)[None]

    total = confusion_of(trainer, cams, labels, clusters)[0]
    trivial = torch.zeros_like(total)
    trivial[:, 0] = total.sum(1)                          # all pixels predicted as one cluster
    coarse, trivial = scores(total), scores(trivial)
    print0(f"coarse labels on val: mIoU {coarse['miou']:.2f} accuracy {coarse['accuracy']:.2f}; all pixels "
           f"as the most frequent class: mIoU {trivial['miou']:.2f} accuracy {trivial['accuracy']:.2f}")
    return {"cam_miou": coarse["miou"], "cam_accuracy": coarse["accuracy"]}


def note_scores(trainer, record):
    """Keep the scores of the last epoch, and of the best, which is chosen on val, as the peers do."""
    last = trainer.scored["last"] = {name: record[name] for name in ("epoch", "miou", "accuracy")}
    best = trainer.scored.setdefault("best", last)
    if last["miou"] + last["accuracy"] > best["miou"] + best["accuracy"]:
        trainer.scored["best"] = last


def not_finite(trainer, losses, gradient):
    """Names of the losses, or else of the parameters' gradients, that are not finite."""
    wrong = [name for name, value in losses.items() if not math.isfinite(value)]
    names = [name for name, _ in trainer.network.student.named_parameters()]
    gradients = zip(names, gradient.split([p.numel() for p in trainer.params]))
    wrong = wrong or ["gradient of " + name for name, g in gradients if not g.isfinite().all()]
    return ", ".join(wrong[:3]) or "norm of the gradient"


def open_log(out, epoch):
    """log.jsonl of the first process, open for appending; lines after `epoch` will be written again."""
    def epoch_of(line):
        try:
            return json.loads(line)["epoch"]
        except (ValueError, KeyError, TypeError):
            return math.inf                               # cut by a kill, or spoilt

    file = out / "log.jsonl" if RANK == 0 else Path(os.devnull)
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    kept = "".join(line + "\n" for line in lines if epoch_of(line) <= epoch)
    if RANK == 0:
        write_whole(file, lambda f: f.write(kept.encode()))
    return open(file, "a", buffering=1)                   # each line goes to the disk at once


def speed(args, device, steps, seconds, waited):
    """What an epoch of `steps` steps cost: images per second, share of waiting for data, memory in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {"images_per_s": steps * args.batch / seconds, "data_wait": waited / seconds,
            "peak_gb": peak / 1e9}


def epoch_line(args, record, means):
    words = [f"epoch {record['epoch']}/{args.epochs}"]
    words += [f"{name} {value:.4f}" for name, value in means.items()]
    if "miou" in record:
        words.append("mIoU {miou:.2f} accuracy {accuracy:.2f} clusters {clusters}".format_map(record))
    return "  ".join(words + [f"rates {record['rates']}", f"{record['images_per_s']:.0f} images/s",
                              f"wait {100 * record['data_wait']:.0f} %", f"{record['peak_gb']:.2f} GB"])


def draw_and_tell(trainer, images, labels):
    """panels.png, curves.png, of a folder clusters.png and names.txt, and the last words, by rank 0."""
    if RANK:
        return
    out, files = Path(trainer.args.out), "log.jsonl, last.pt, panels.png, curves.png"
    trainer.network.eval()
    checkpoint = named(checkpoint_of(trainer), out / "last.pt")
    truth = None if labels is None else labels[:6]
    shown = panels(trainer.network, checkpoint, images[:6], truth)
    write_whole(out / "panels.png", lambda f: shown.save(f, "PNG"))
    if trainer.args.data == "folder":
        sheet = cluster_sheet(trainer.network, checkpoint, trainer.source)
        write_whole(out / "clusters.png", lambda f: sheet.save(f, "PNG"))
        if not (out / "names.txt").exists():              # it may have been edited
            lines = ["# NUMBER = NAME, for eval.py; numbers as in clusters.png and in masks. Classes of one "
                     "name become one. Pictures show ASCII letters only"]
            lines += [f"{i} = {name}" for i, name in enumerate(checkpoint["names"])]
            write_whole(out / "names.txt", lambda f: f.write("\n".join([*lines, ""]).encode()))
        files += ", clusters.png (what each cluster shows), names.txt (name them there; eval.py reads it)"
    write_whole(out / "curves.png", lambda f: curves(out / "log.jsonl").save(f, "PNG"))
    if labels is not None:
        last, best, coarse = (trainer.scored[name] for name in ("last", "best", "cam"))
        print0(f"last epoch: mIoU {last['miou']:.2f} accuracy {last['accuracy']:.2f};  "
               f"best epoch, {best['epoch']}, chosen on val: mIoU {best['miou']:.2f} accuracy "
               f"{best['accuracy']:.2f};  coarse labels: mIoU {coarse['cam_miou']:.2f}")
        files += ", best.pt"
    print0(f"wrote {out}/: {files}")


# ----------------------------------------------------------------------------
# Checkpoints


def checkpoint_of(trainer):
    """All that going on, predicting and explaining need: tensors and plain values."""
    args, network, epoch = trainer.args, trainer.network, max(1, trainer.epoch)
    return trainer.begun | {
        "epoch": trainer.epoch, "args": vars(args), "scored": trainer.scored,
        "assignment": trainer.assignment, "names": trainer.source.names,
        "background": trainer.source.background,
        "rates": list(rates_of(args, epoch)), "teacher_on": teacher_age(args, epoch) is not None,
        "vit": network.vit.state_dict(), "student": network.student.state_dict(),
        "teacher": network.teacher.state_dict(), "optimizer": trainer.optimizer.state_dict()}


def restore(trainer, state):
    """Put what `checkpoint_of` gave into a new Trainer."""
    trainer.network.student.load_state_dict(state["student"])
    trainer.network.teacher.load_state_dict(state["teacher"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.epoch, trainer.scored, trainer.assignment = state["epoch"], state["scored"], state["assignment"]


def save_checkpoint(trainer, name):
    if RANK == 0:
        write_whole(Path(trainer.args.out) / name, lambda f: torch.save(checkpoint_of(trainer), f))


def resume(args):
    """The last checkpoint of the run in --out, or None. Raises UserError if its options were others."""
    file = Path(args.out) / "last.pt"
    state = load_checkpoint(file) if file.exists() else None
    epoch = state["epoch"] if state else -1
    if all_reduce_sum(torch.tensor(epoch, device=collective_device())).item() != epoch * WORLD:
        raise UserError(f"{args.out}: not the same on all machines: they must share this folder")
    may_differ = {"out", "root", "workers", "device", "epochs", "dry_run"}
    if not args.dropout:                                  # a dropped unit depends on how a batch is cut
        may_differ.add("accumulate")
    for name, now in vars(args).items() if state else ():
        then = state["args"].get(name)
        if name not in may_differ and then != now:
            raise UserError(f"{file}: begun with {flag(name)} {words(then)}, now {words(now)}: use another "
                            f"--out, give the same option to go on, or remove this file to begin anew")
    return state


def lock_folder(out):
    """Make the run folder and lock it against other runs, as long as the returned file is open."""
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")
    try:
        if RANK == 0:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out}: another run is writing there; wait for it, or use another --out") from None
    except OSError as error:                              # Lustre without flock, NFS without a lock daemon
        print0(f"{out}: cannot be locked ({error.strerror}): see to it that no other run writes there")
    return lock


# ----------------------------------------------------------------------------
# Processes and signals


def start_processes(device):
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs); returns this one's device."""
    cuda = available(device) == "cuda"
    if cuda and LOCAL_RANK >= torch.cuda.device_count():
        raise UserError(f"process {LOCAL_RANK} of this machine has no GPU of its own "
                        f"({torch.cuda.device_count()} here): lower --nproc_per_node")
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
        torch.backends.cudnn.allow_tf32 = False           # else convolutions in "fp32" have 10 bits
    complete = os.environ.keys() >= {"RANK", "MASTER_ADDR", "MASTER_PORT"}
    if not 0 <= RANK < WORLD or LOCAL_RANK < 0 or WORLD > 1 and not complete:
        raise UserError("of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT only some are set, or they do not "
                        "fit: start several processes with torchrun; for one process unset them")
    if WORLD > 1:
        meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        note = f"train.py: process {RANK} of {WORLD} waits for all the others, at {meeting}"
        wait = threading.Timer(5, print, [note], dict(file=sys.stderr, flush=True))
        wait.start()
        try:                                              # the longest wait is for another process's k-means
            dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=4))
            dist.barrier(device_ids=[LOCAL_RANK] if cuda else None)               # nccl connects here
        except (RuntimeError, ValueError) as error:       # a port in use, an address that does not exist
            raise UserError(f"process {RANK}: the {WORLD} processes cannot meet at {meeting} "
                            f"({one_line(error)})") from None
        finally:
            wait.cancel()
    return torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")


def collective_device():
    return "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"


def all_reduce_sum(tensor):
    """Sum of a tensor over all processes. Raises ConnectionError if one has gone.

    gloo waits and raises here. With nccl whoever reads the sum waits; there torchrun ends what is left.
    """
    if WORLD > 1:
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            if "CUDA" in str(error):                      # of this process's own GPU
                raise
            raise ConnectionError(f"process {RANK}: another process is gone, and may have said why; the last "
                                  f"checkpoint, if any, is kept ({one_line(error)})") from None
    return tensor


def barrier():
    """Until all processes are here."""
    all_reduce_sum(torch.zeros(1, device=collective_device())).item()


@contextlib.contextmanager
def zero_first(rank):
    """The process whose `rank` is 0 does what is inside first; the others then find what it left on disk."""
    if rank:
        barrier()
    yield
    if not rank:
        barrier()


def cpu_has_bf16():
    """Whether this CPU multiplies in bf16 (x86: avx512_bf16, amx_bf16); True where Linux does not tell."""
    told = Path("/proc/cpuinfo")
    return not told.exists() or "bf16" in told.read_text()


def print0(*words):
    if RANK == 0:
        print(*words, flush=True)


def one_line(error):
    return " ".join(str(error).split())


def end_on_signals():
    """SIGTERM and Ctrl-C end this process in one line, at any moment, also while it waits for others.

    Python runs its signal handlers between two steps of Python code, so none while torch waits. But it writes
    the signal's number to a pipe at once, and a thread of its own reads it there.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: None)

    def watch():
        number = os.read(read, 1)[0]
        if RANK == 0:
            print(f"train.py: signal {number}: what is finished is kept, the same command goes on",
                  file=sys.stderr, flush=True)
        os._exit(128 + number)

    threading.Thread(target=watch, daemon=True).start()


# ----------------------------------------------------------------------------
# Options. Name: type, where a tuple is choices and a list several values; least and most; unit; help.
# Their defaults stand in SETTINGS.

OPTIONS = {
    "root": (str, None, "DIR", "folder of the data sets, or of the images for --data folder"),
    "classes": (int, (2, 254), "K", "clusters to look for, without the background; by default as many as the "
                "data set has classes. More are allowed, but not for cocostuff27"),
    "backbone": (tuple(BACKBONES), None, None, "pretrained ViT"),
    "weights": (str, None, "FILE", "weights of that backbone (default: fetched once; tiny is shipped)"),
    "out": (str, None, "DIR", "run folder (default: runs/<data>); caches go beside it, to runs/cache"),
    "epochs": (int, (1, math.inf), "N", "passes over the data; one of voc takes its images 20 times"),
    "batch": (int, (1, math.inf), "IMAGES", "global batch, over all processes"),
    "accumulate": (int, (1, math.inf), "N", "parts that a process's batch is cut into, if memory is short; "
                   "the result stays the same, but for --dropout"),
    "lr": (float, (0, 1), "X", "learning rate of Adam, constant"),
    "size": (int, (1, 4096), "PIXELS", "side of the squashed image; the default is rounded up until half of "
             "it is whole patches. With another value crops have half of it, the images that windows are "
             "cut from twice it, and windows just it. Smaller is faster and worse"),
    "limit": (int, (1, math.inf), "N", "use the first N images of each split (default: all)"),
    "seed": (int, (0, 2 ** 32 - 1), "N", "of everything; for shapes also of the scenes"),
    "workers": (int, (1, math.inf), "N", "threads that squash the images, once before training"),
    "device": (("auto", "cpu", "cuda"), None, None, "auto: cuda if there is one"),
    "precision": (("auto", "fp32", "bf16"), None, None,
                  "auto: bf16 on a GPU that has it; CAM, PAR and losses stay fp32"),
    "aspp": (("dynamic", "static", "none"), None, None,
             "dynamic: Table 1's rates by epoch; static: DeepLabV3+'s in every epoch"),
    "aspp_scale": (float, (0, 1e6), "X", "factor of what ASPP adds to the tokens; the paper names none"),
    "par": ([int], (1, 1024), "PIXELS", "dilations of PAR; AFA's are 1 2 4 8 12 24. With no number there "
            "is no PAR: pseudo labels are only enlarged"),
    "coarse": (("hard", "soft"), None, None, "what PAR gets while CAM is alone: hard: 1 for the class of a "
               "patch and 0 for others; soft: CAM"),
    "teacher": (("ema", "reset", "none"), None, None,
                "ema: moving average; reset: TransFGU's copy and reset; none: CAM alone"),
    "teacher_weight": (float, (0, 1), "X", "share of the teacher in the pseudo label"),
    "teacher_start": (int, (0, math.inf), "EPOCHS", "epochs of CAM alone before the teacher takes part"),
    "momentum": (float, (0, 1), "M", "of the moving average"),
    "lambdas": ([float] * 4, (0, 1e6), ("SEG", "CE", "UN", "CLS"), "weights of Eq. 6"),
    "threshold": (float, (0, 1), "T", "where all CAMs are below half of it is background"),
    "cam_scale": (("image", "crop"), None, None,
                  "CAM's minimum and maximum, which become 0 and 1, are the image's, or as in TransFGU the "
                  "crop's"),
    "jitter": ([float] * 4, (0, 1), ("B", "C", "S", "H"),
               "largest change of brightness, contrast, saturation, and of hue in turns"),
    "dropout": (float, (0, 0.99), "P", "in the decoder; results then depend on the number of processes"),
}


def flag(name):
    return "--" + name.replace("_", "-")


def words(value):
    """A setting as it is typed."""
    if value is None:
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def option_parser():
    p = argparse.ArgumentParser(description="Train DMSA.", epilog=__doc__.split("\n\n")[1],
                                usage=argparse.SUPPRESS, allow_abbrev=False,      # errors are one line
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", choices=data.NAMES, default="shapes", help="data set (default: shapes)")
    p.add_argument("--preset", choices=tuple(PRESETS), default="dmsa",
                   help="DMSA, TransFGU, or DMSA as its authors released it (default: dmsa)")
    p.add_argument("--dry-run", action="store_true",
                   help="check options, data and weights, print the settings, and stop")
    for name, (kind, _, unit, text) in OPTIONS.items():
        if name in COMMON:                                # the default, and those of other data sets
            defaults = [words(COMMON[name])] if COMMON[name] is not None else []
            others = {k: own[name] for k, own in SETTINGS.items() if own[name] != COMMON[name]}
            defaults += [f"{k} {words(value)}" for k, value in others.items()]
            text += f" (default: {', '.join(defaults)})"
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": unit}
        if isinstance(kind, list):
            how |= {"type": kind[0], "nargs": len(kind) if len(kind) > 1 else "*"}
        p.add_argument(flag(name), help=text, **how)
    return p


def parse(argv=None):
    """Options -> one flat namespace of plain values, every setting filled in and within its limits."""
    p = option_parser()
    args = p.parse_args(argv)
    if args.data == "folder" and not args.root:
        p.error("--data folder: give the folder of images with --root")
    if args.data == "cocostuff27" and args.classes is not None:
        p.error("--classes: not for cocostuff27, which looks for things and stuff apart")
    # an option that was given wins over the preset, the preset over the data set's own setting
    own, preset = SETTINGS[args.data], PRESETS[args.preset]
    for name, value in (own | preset).items():
        if name == "lambdas":
            value = [x if given is None else given for x, given in zip(own["lambdas"], value)]
        if getattr(args, name, None) is None and name != "size":
            setattr(args, name, list(value) if isinstance(value, tuple) else value)
    patch = BACKBONES[args.backbone][0]["patch_size"]
    if args.size is None:                                 # half of it has to be whole patches
        args.size = math.ceil(own["size"] / (2 * patch)) * 2 * patch
    if args.size != own["size"]:
        args.crop, args.bank, args.window = args.size // 2, 2 * args.size, args.size
    args.out = args.out or os.path.join("runs", args.data)
    for name, (_, limits, _, _) in OPTIONS.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if limits and value is not None and not limits[0] <= value <= limits[1]:              # also NaN
                p.error(f"{flag(name)} {value}: must be at least {limits[0]}"
                        + (f" and at most {limits[1]}" if limits[1] < math.inf else ""))
    if args.size % 2 or args.crop % patch or args.size < 4 * patch:
        p.error(f"--size {args.size}: half of it must be a multiple of {args.backbone}'s patch, {patch}, "
                f"and at least {2 * patch}")
    if args.batch < WORLD * args.accumulate:
        p.error(f"--batch {args.batch}: fewer images than parts, {WORLD} processes x --accumulate "
                f"{args.accumulate}; raise --batch or lower these")
    return args


def dry_run(args):
    """Check options, data and weights, print the settings."""
    state = resume(args)
    for split, source in open_data(args, state).items():
        print0(f"{split}: {len(source)} images")
    frozen_vit(args, state, "cpu")
    print0(json.dumps(vars(args), indent=1))


def run(args):
    """Returns the exit code: 0; 2 after one line on what a user can mend; 1 after one line on a loss that is
    not finite or a process that is gone, and after a traceback."""
    try:
        device = start_processes(args.device)
        if args.data == "folder":
            outside(args.out, args.root)
        if args.dry_run:
            dry_run(args)
        else:
            with lock_folder(Path(args.out)):
                train(args, device)
        return 0
    except (FloatingPointError, ConnectionError) as error:
        data.report(error)
        return 1
    except OSError as error:                              # a UserError, or what the system refuses
        if error.errno and not error.filename:
            error.filename = args.out
        return data.report(error)
    except Exception as error:
        if "out of memory" in str(error):                 # torch, the GPU's driver and nccl have a type each
            return data.report(f"process {RANK}: not enough GPU memory; free it, or cut the batch into more "
                               f"parts with --accumulate (with --dropout in another --out): "
                               f"{one_line(error)}")
        traceback.print_exc()                             # a mistake of ours
        return 1


def main():
    args = parse()
    sys.stdout.reconfigure(errors="backslashreplace")     # names of files may be in any encoding
    end_on_signals()
    code = run(args)
    if WORLD > 1:                                         # torch's clean-up may wait for other processes, and
        sys.stdout.flush()                                # now and then aborts (3 of 40 runs)
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
