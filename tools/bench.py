"""What DMSA's expensive stages cost beside their textbook forms: one table, within five minutes on two cores.

    python tools/bench.py                                 # median of up to six calls each
    python tools/bench.py --quick                         # of up to three
    python tools/bench.py --only PAR                      # the cases whose name contains the word
    python tools/bench.py --stages                        # the stages of a VOC run on this GPU, and a profile
    python tools/bench.py --whole made --processes 2      # train.py on made-up images, as many as VOC's

Textbook forms, written plainly below: PAR that holds all neighbours of all channels (AFA); class activation
maps by one backward pass through the whole ViT for each class (TransFGU); attention as an explicit n x n
softmax (DINO); a training step whose student and teacher each run the frozen ViT, without ASPP and PAR
(TransFGU); images decoded and augmented one by one. The ViT is ViT-S/8 with random weights, which change
neither time nor memory.

How it is measured. A case is a child process, in which its forms take turns, so that a machine that becomes
slow is slow for all of them; the cores should have nothing else to do. The first call of a form is not
timed, unless it alone takes longer than twice BUDGET. Seconds are wall time: median, least and most, number
of calls. Memory is how far a call pushes the peak of the process's resident memory above where it stood
before any form ran. That mark never falls, so the forms are called first in the order of their need, the
textbook form last. In these first calls freed arrays go back to the system at once (glibc's mallopt), or the
mark would also depend on how the heap happens to be cut up. A star marks numbers computed from a measured
slope, not run. The mark and mallopt are Linux's: elsewhere only --stages and --whole work.
"""

import argparse
import copy
import ctypes
import itertools
import multiprocessing
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    import start                                          # before torch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cam                                                # noqa: E402
import data                                               # noqa: E402
import train                                              # noqa: E402
import losses                                             # noqa: E402
from eval import CHUNK, segment_photograph                # noqa: E402
from model import BACKBONES, DMSA, VisionTransformer, normalise                   # noqa: E402
from par import BANDWIDTH, DILATIONS, EPS, ITERATIONS, OMEGA3, PAR                # noqa: E402
from tools.transfgu import DROPOUT, add_dropout           # noqa: E402

BUDGET = 6.0                                              # seconds: a form timed so long is not called again
TRAIN, VAL = 1464, 1449                                   # images of VOC
KEPT = 35                                                 # of 70 windows: about what lies on the foreground
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3               # of glibc's malloc.h


# ----------------------------------------------------------------------------
# Textbook forms


def textbook_par(image, masks):
    """Eq. 4, all neighbours of all channels in one tensor: (B, 3, H, W), (B, C, h, w) -> (B, C, H, W)."""
    one_hot = torch.eye(9)[[0, 1, 2, 3, 5, 6, 7, 8]].view(8, 1, 3, 3)           # a kernel picks one neighbour

    def neighbours(x):
        padded = [F.pad(x, (d, d, d, d), mode="replicate").flatten(0, 1)[:, None] for d in DILATIONS]
        rings = [F.conv2d(p, one_hot, dilation=d) for p, d in zip(padded, DILATIONS)]    # (B C, 8, H, W) each
        return torch.cat(rings, dim=1).unflatten(0, x.shape[:2])                  # (B, C, 48, H, W)

    masks = F.interpolate(masks, size=image.shape[2:], mode="bilinear", align_corners=True)
    near = neighbours(image)                                                      # (B, 3, 48, H, W)
    scaled = (near - image[:, :, None]).abs() / (near.std(2, keepdim=True) + EPS) / BANDWIDTH
    ring = 2 ** 0.5, 1, 2 ** 0.5, 1, 1, 2 ** 0.5, 1, 2 ** 0.5
    distance = torch.tensor([d * step for d in DILATIONS for step in ring])
    position = -(distance / (distance.std() + EPS) / BANDWIDTH) ** 2
    k = (-scaled ** 2).mean(1).softmax(1) + OMEGA3 * position.softmax(0).view(1, -1, 1, 1)
    for _ in range(ITERATIONS):
        near = neighbours(masks)                                                  # (B, C, 48, H, W)
        masks = (near * k[:, None]).sum(2)
    return masks


def textbook_attention(attn, x, dropout=0.0):
    """Eq. 2 with the whole attention map: x (B, n, D) -> (B, n, D), A (B, heads, n, n)."""
    q, k, v = attn.split(x)
    A = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3)
    x = (F.dropout(A, dropout, attn.training) @ v).transpose(1, 2).flatten(2)     # (B, n, D)
    return F.dropout(attn.proj(x), dropout, attn.training), A


def textbook_vit(vit, image):
    """Tokens (B, 1 + hw, D) and the last attention (B, heads, 1 + hw, 1 + hw)."""
    x = vit.prepare_tokens(image)
    for block in vit.blocks:
        attended, A = textbook_attention(block.attn, block.norm1(x))
        x = x + attended
        x = x + block.mlp(block.norm2(x))
    return vit.norm(x), A


def textbook_cam(vit, image, centroids):
    """Eq. 5 by a backward pass for each class through all blocks, their parameters included: (1, K, h, w)."""
    tokens, A = textbook_vit(vit, image)
    A.retain_grad()
    base = A[:, :, 0, 1:].mean(1).detach()
    maps = []
    for centroid in centroids:
        vit.zero_grad()
        A.grad = None
        (1 - F.cosine_similarity(tokens[:, 0], centroid[None])).sum().backward(retain_graph=True)
        alpha = -A.grad.mean(1)[:, 0, 1:]                                         # (1, hw)
        evidence = F.relu(alpha)
        maps.append((base / base.amax(1, keepdim=True) + evidence * cam.keep_mass(evidence)) * (alpha >= 0))
    return torch.stack(maps, 1).unflatten(2, vit.grid(image))


# ----------------------------------------------------------------------------
# Cases. Each returns its forms {name: function} in the order of their memory, and what makes the lines of the
# table from {name: seconds of its calls}, {name: MB above the start} and {name: result of its first call}.


def differ(a, b):
    return (a - b).abs().max().item()


def vits8():
    return VisionTransformer(**BACKBONES["vits8"][0]).eval().requires_grad_(False)


def par_case(channels):
    image, masks = torch.rand(1, 3, 320, 320), torch.rand(1, channels, 40, 40)
    forms = {"ours": lambda: PAR()(image, masks), "textbook": lambda: textbook_par(image, masks)}
    return forms, lambda s, mb, out: [
        row(f"PAR, 320×320, {channels} channels, {ITERATIONS} iterations", s["ours"], s["textbook"],
            (mb["ours"], mb["textbook"]), differ(out["ours"], out["textbook"]))]


def cam_case():
    vit, image = vits8(), torch.randn(1, 3, 320, 320)
    trained, centroids = copy.deepcopy(vit).requires_grad_(True), torch.randn(80, vit.embed_dim)
    forms = {"forward": lambda: vit(image)}
    forms |= {K: lambda K=K: cam.class_activation_maps(vit, image, centroids[:K]) for K in (1, 20, 80)}
    forms |= {f"textbook {K}": lambda K=K: textbook_cam(trained, image, centroids[:K]) for K in (1, 3)}

    def rows(s, mb, out):
        one, three = (np.median(s[f"textbook {K}"]) for K in (1, 3))
        lines = [row(f"CAM, 320×320, K = {K}; textbook: one plain forward", s[K], s["forward"],
                     (mb[K], mb["forward"]) if K == 80 else None) for K in (1, 20, 80)]
        lines += [row("CAM, 320×320, K = 1; textbook: K backward passes", s[1], s["textbook 1"],
                      (mb[1], mb["textbook 1"]), differ(out[1], out["textbook 1"]))]
        return lines + [row(f"CAM, 320×320, K = {K}; textbook: K backward passes *", s[K],
                            one + (K - 1) * (three - one) / 2) for K in (20, 80)]
    return forms, rows


def vit_case(size, batch):
    vit, image = vits8(), torch.randn(batch, 3, size, size)
    forms = {"ours": torch.no_grad()(lambda: vit(image)[0]),
             "textbook": torch.no_grad()(lambda: textbook_vit(vit, image)[0])}
    what = f"ViT-S/8 forward, {batch} × {size}×{size}"
    return forms, lambda s, mb, out: [
        row(what, s["ours"], s["textbook"], None, differ(out["ours"], out["textbook"]))]


def step_case():
    """One step of each, cropping and augmentation included, at an epoch when the teacher takes part."""
    args, vit, epoch = train.parse(["--data", "voc", "--batch", "8"]), vits8(), 10
    draws = data.draw(0, epoch, range(8))
    batch = train.MicroBatch(torch.rand(8, 3, 320, 320), torch.rand(8, 20, 40, 40), draws)
    trainer = train.Trainer(args, vit, data.VOC, {}, torch.device("cpu"))
    half = train.Trainer(args, vit, data.VOC, {}, torch.device("cpu"))
    half.bf16 = True
    plain = DMSA(vit, 21, use_aspp=False).train()
    for head in (plain.student, plain.teacher):
        add_dropout(head.decoder)                         # as TransFGU, Segmenter
        for block in head.decoder.blocks:
            block.attn.forward = (
                lambda x, angles=None, attn=block.attn: textbook_attention(attn, x, DROPOUT)[0])
    classes = torch.arange(21)
    permutation = torch.randperm(21)
    optimizer = torch.optim.Adam(plain.student.parameters(), lr=1e-4, weight_decay=5e-4)

    def textbook():
        with torch.no_grad():
            image = normalise(data.augment(data.crop(batch.image, draws, args.crop), draws))
            cams = cam.min_max(data.crop(batch.cams, draws, args.crop // 8, "area"))
            tokens = textbook_vit(vit, image)[0][:, 1:]                           # of the teacher's encoder
            teacher = plain.teacher.decoder(tokens)[0].unflatten(2, (20, 20))
            label = losses.pseudo_masks(cams, teacher, 0.5).argmax(1)
            confident = losses.confident_patches(cams)
            tokens = textbook_vit(vit, image)[0][:, 1:]                           # again, of the student's
        logits, embeddings = plain.student.decoder(tokens)
        counts = losses.pixel_counts(label, confident, 21)
        loss = losses.dmsa_losses(logits.unflatten(2, (20, 20)), embeddings, label, confident, counts,
                                  classes, (0.0, 1.0, 0.3, 1.0), True, permutation, 0.1)
        optimizer.zero_grad()
        loss["all"].backward()
        for p in plain.student.parameters():
            p.grad.clamp_(-1, 1)
        optimizer.step()

    def step(trainer):
        return trainer.train_step(*trainer.pseudo_labels([batch], epoch), epoch, 0)

    what = "training step, 8 × 160×160, 21 classes, with ASPP and PAR; textbook without"
    return {"ours": partial(step, trainer), "bf16": partial(step, half),
            "textbook": textbook}, lambda s, mb, out: [
        row(what, s["ours"], s["textbook"]),
        row("the same, `--precision bf16`; textbook in fp32", s["bf16"], s["textbook"])]


def window_case():
    """Some of the 70 windows; the pass over the whole image, which finds the foreground, is timed apart."""
    vit, image, scales = vits8(), torch.randn(1, 3, 640, 640), (0.6, 0.5)
    with torch.no_grad():                                 # the crops that window_features will make
        _, A, _ = cam.last_attention(vit, image)
        boxes = cam.windows(80, 80, 8, scales)
        kept, _ = cam.select_windows(cam.attended_patches(A, (80, 80))[0], boxes, 8)
        crops = cam.crop_windows(image[0], boxes[kept], 320)
    forms = {"whole": torch.no_grad()(lambda: cam.last_attention(vit, image)[0]),
             "plain": torch.no_grad()(lambda: vit(crops)[0][:, 0]),
             "plain 640": torch.no_grad()(lambda: vit(image)[0][:, 0]),
             "ours": lambda: cam.window_features(vit, image, 320, scales)[0]}

    def rows(s, mb, out):
        m, names = len(crops), ("whole", "plain", "plain 640", "ours")
        whole, plain, plain640, ours = (np.median(s[name]) for name in names)
        return [row(f"features of {m} windows of a 640×640 image; textbook: forward of {m} × 320×320",
                    s["ours"], s["plain"], None, differ(out["ours"], out["plain"])),
                row(f"the same, {KEPT} windows *", whole + (ours - whole) * KEPT / m, plain * KEPT / m),
                row("the same; textbook: also the forward of the 640×640 image *",
                    whole + (ours - whole) * KEPT / m, plain640 + plain * KEPT / m)]
    return forms, rows


def data_case():
    args = train.parse(["--data", "voc", "--batch", "32"])
    args.repeat = 1                                       # 32 images: an epoch is one batch
    folder = tempfile.TemporaryDirectory()                # removed when the last of these functions is

    def file(name):
        return Path(folder.name) / name

    images = np.lib.format.open_memmap(file("images.npy"), "w+", "u1", (32, 320, 320, 3))
    maps = np.lib.format.open_memmap(file("maps.npy"), "w+", "<f2", (32, 20, 40, 40))
    maps[:] = np.random.default_rng(0).random(maps.shape)
    for i in range(32):                                   # photographs' usual size and compression
        Image.fromarray(data.shapes(i, 400)[0]).resize((500, 375)).save(file(f"{i}.jpg"), quality=90)
        images[i] = data.squash(data.open_image(file(f"{i}.jpg")), 320)
        np.save(file(f"{i}.npy"), maps[i])

    def cut(image, cams, draws):
        data.crop(cams, draws, args.crop // 8, "area")    # timed, as training needs it
        return data.augment(data.crop(image, draws, args.crop), draws)

    def ours():
        (([batch], _),) = train.batches(args, images, maps, 1, 1, torch.device("cpu"))
        return cut(batch.image, batch.cams, batch.draws)

    def textbook():
        out = []
        for i in np.random.default_rng((args.seed, 1)).permutation(args.batch):
            image = torch.from_numpy(data.squash(data.open_image(file(f"{i}.jpg")), 320))
            image = image.permute(2, 0, 1).float() / 255
            cams = torch.from_numpy(np.load(file(f"{i}.npy"))).float()
            out.append(cut(image[None], cams[None], data.draw(args.seed, 1, [i])))
        return torch.cat(out)

    what = "data, 32 augmented crops of 160×160 from a memory map; textbook: from JPEGs, one by one"
    return {"ours": ours, "textbook": textbook}, lambda s, mb, out: [
        row(what, s["ours"], s["textbook"], None, differ(out["ours"], out["textbook"]))]


LARGE = "PAR 81"                                          # of COCO; runs only if --only names it
CASES = {"PAR 21": (par_case, 21), LARGE: (par_case, 81), "CAM": (cam_case,),
         "ViT 160": (vit_case, 160, 8), "ViT 320": (vit_case, 320, 1), "step": (step_case,),
         "windows": (window_case,), "data": (data_case,)}


# ----------------------------------------------------------------------------
# Measuring


def peak():
    """The most resident memory that this process ever had, MB."""
    status = Path("/proc/self/status").read_text()        # Linux's
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def measure(case, repeat):
    """Run one case, in this process: its lines of the table."""
    torch.manual_seed(0)
    make, *arguments = CASES[case]
    forms, rows = make(*arguments)
    warm = torch.ones(64, 64, requires_grad=True)         # loads what autograd and matrices need
    (warm @ warm).sum().backward()
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, 2 ** 18)
    start, first, seconds, mb, results = peak(), {}, {}, {}, {}
    for name, form in forms.items():
        print(f"{case}: {name}", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        results[name] = form()
        first[name], seconds[name], mb[name] = time.perf_counter() - begin, [], peak() - start
    mallopt(M_MMAP_THRESHOLD, 2 ** 25)                    # what glibc comes to by itself
    mallopt(M_TRIM_THRESHOLD, 2 ** 26)
    for i in range(repeat):
        print(f"{case}: round {i + 1} of up to {repeat}", file=sys.stderr, flush=True)
        for name, form in forms.items():
            if first[name] < 2 * BUDGET and sum(seconds[name]) < BUDGET:
                begin = time.perf_counter()
                form()
                seconds[name].append(time.perf_counter() - begin)
    return rows({name: s or [first[name]] for name, s in seconds.items()}, mb, results)


def row(what, ours, textbook, mb=None, difference=None):
    """A line of the table. ours, textbook: seconds of the calls, or one number; mb: (ours, textbook)."""
    def show(s):
        if np.ndim(s) == 0:
            return f"{s:.2f}"
        return f"{np.median(s):.2f} ({min(s):.2f}–{max(s):.2f}, {len(s)})"
    ratio = np.median(textbook) / np.median(ours)
    memory = "" if mb is None else f"{mb[0]:.0f} / {mb[1]:.0f}"
    equal = "" if difference is None else f"{difference:.1e}"
    return f"| {what} | {show(ours)} | {show(textbook)} | {ratio:.2f} | {memory} | {equal} |"


# ----------------------------------------------------------------------------
# A run of VOC: its stages on a GPU (or a CPU), and all of it on made-up images


def timed(form, device):
    """Median seconds of up to nine calls; the clock is read when the GPU has finished."""
    def call():
        form()
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):                                    # kernels are chosen, memory is taken
        call()
    seconds = []
    while len(seconds) < 9 and sum(seconds) < BUDGET:
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds))


def kernels(form):
    """Profile a call: its table, seconds that the GPU computes, number of kernels; on a CPU 0 and 0."""
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, *[kinds.CUDA] * torch.cuda.is_available()]) as profile:
        form()
    events = profile.key_averages()
    ran = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    by = "self_device_time_total" if ran else "self_cpu_time_total"
    table = events.table(sort_by=by, row_limit=15, max_name_column_width=50)
    return table, sum(e.self_device_time_total for e in ran) / 1e6, sum(e.count for e in ran)


def stages(backbone, crops):
    """Print seconds of the stages of a VOC run, where a step's time goes, and where it waits for the GPU."""
    torch.manual_seed(0)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    torch.backends.cudnn.allow_tf32 = False               # as train.py
    args = train.parse(["--data", "voc", "--backbone", backbone])
    vit = VisionTransformer(**BACKBONES[backbone][0]).to(device).eval().requires_grad_(False)
    trainer = train.Trainer(args, vit, data.VOC, {}, device)
    S, cells, epoch = args.size, args.size // vit.patch_size, 10

    def rand(*shape):
        return torch.rand(*shape, device=device)

    draws = data.Draws(*(numbers.to(device) for numbers in data.draw(0, epoch, range(crops))))
    batch = train.MicroBatch(rand(crops, 3, S, S), rand(crops, 20, cells, cells), draws)
    large = rand(1, 3, args.large, args.large)
    images = rand(16, 3, S, S)
    centroids = rand(20, vit.embed_dim)
    cut = data.crop(batch.image, draws, args.crop)
    masks = rand(crops, 21, cells // 2, cells // 2)
    # eight images of val, as they lie in the caches
    squashed = np.zeros((CHUNK, S, S, 3), np.uint8)
    labels = np.arange(CHUNK * S * S, dtype=np.uint8).reshape(CHUNK, S, S) % 21
    photograph = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)
    checkpoint, kept = train.checkpoint_of(trainer), {}
    steps, validations = args.epochs * args.repeat * TRAIN / crops, args.epochs * VAL / CHUNK

    def windows():
        return cam.window_features(vit, large, args.window)[0]

    def whole_image():
        return cam.last_attention(vit, large)

    def cams():
        return cam.class_activation_maps(vit, images, centroids)

    def evaluation(kept):                                 # of student and teacher
        return train.score_val(trainer, squashed, labels, epoch, kept)

    def predict(native=False, par=None):
        return segment_photograph(trainer.network, checkpoint, photograph, native, par)

    def refine():
        return trainer.par(cut, masks)

    def step(bf16=True):
        trainer.bf16 = bf16
        trainer.train_step(*trainer.pseudo_labels([batch], epoch), epoch, 0)

    print(f"| {torch.cuda.get_device_name() if gpu else 'CPU'}, {backbone} | seconds | minutes of a run |")
    print("|---|---|---|")
    for name, form, times in (
            ("photograph of 500 × 375, squashed", predict, 0),
            ("photograph, `--native`", partial(predict, native=True), 0),
            ("photograph, `--native --par`", partial(predict, native=True, par=trainer.par), 0),
            (f"windows of an image, {len(windows())} kept", windows, TRAIN),
            (f"windows: the image itself, {args.large} × {args.large}", whole_image, TRAIN),
            ("CAM, 16 images", cams, (TRAIN + VAL) / 16),
            (f"evaluation, {CHUNK} images", lambda: evaluation({}), validations),
            ("evaluation: heads and scores, behind the ViT", lambda: evaluation(kept), validations),
            (f"PAR, {crops} crops", refine, steps),
            (f"step, {crops} crops, fp32", partial(step, bf16=False), steps),
            (f"step, {crops} crops, bf16", step, steps)):
        seconds = timed(form, device)                     # after the loop: those of the last row
        print(f"| {name} | {seconds:.4f} | {seconds * times / 60:.1f} |", flush=True)
    (table, busy, count), (_, _, of_par) = kernels(step), kernels(refine)
    print(table)
    if gpu:
        print(f"a step has {count} kernels, {of_par} of PAR, and keeps the GPU busy for {busy / seconds:.0%}")
        torch.cuda.set_sync_debug_mode("warn")            # each place where a step waits is a warning
        step()


def make_voc(root):
    """Made-up photographs of VOC's usual size and number, in its layout; 32 scenes in turn."""
    base, scenes = Path(root) / "VOCdevkit" / "VOC2012", []
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    for i in range(32):
        scenes.append([Image.fromarray(x).resize((500, 375), Image.NEAREST) for x in data.shapes(i, 400)])
        scenes[i][1].putpalette(data.palette().flatten().tolist())
    for split, n in (("train", TRAIN), ("val", VAL)):
        names = [f"{split}{i}" for i in range(n)]
        (base / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names))
        for name, (image, label) in zip(names, itertools.cycle(scenes)):
            image.save(base / "JPEGImages" / f"{name}.jpg", quality=90)
            label.save(base / "SegmentationClass" / f"{name}.png")


def whole(root, backbone, processes, options):
    """An epoch of train.py on made-up images, with random weights: its lines, and when they came."""
    make_voc(root)
    weights, out = Path(root) / f"{backbone}.pt", Path(root) / "runs" / "voc"
    torch.save(VisionTransformer(**BACKBONES[backbone][0]).state_dict(), weights)
    several = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *several, train.__file__, "--data", "voc", "--root", root, "--epochs", "1",
               "--backbone", backbone, "--weights", weights, "--out", out, *options]
    begin = time.time()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            print(f"{time.time() - begin:8.1f} s  {line}", end="", flush=True)
    return run.returncode


def parse(argv=None):
    p = argparse.ArgumentParser(description="Time and memory of DMSA's stages beside their textbook forms.",
                                usage=argparse.SUPPRESS, allow_abbrev=False)     # others: train.py
    p.add_argument("--quick", action="store_true", help="half the repetitions")
    p.add_argument("--only", default="", metavar="WORD", help=f"of: {', '.join(CASES)} (default: all but "
                                                                    f"{LARGE}, which takes 5.2 GB)")
    p.add_argument("--stages", action="store_true",
                   help="instead: the stages of a VOC run on this GPU or CPU")
    p.add_argument("--crops", type=int, default=85, help="of --stages: in a step (default: 85, of 512 / 6)")
    p.add_argument("--whole", metavar="DIR", help="instead: make up as many images as VOC has, in this new "
                   "folder, and train on them for an epoch; further options, as --size, go to train.py")
    p.add_argument("--processes", type=int, default=1, help="of --whole (default: 1)")
    p.add_argument("--backbone", choices=BACKBONES, default="vits8",
                   help="of --stages and --whole (default: vits8)")
    args, args.options = p.parse_known_args(argv)
    args.cases = [case for case in CASES
                  if args.only.lower() in case.lower() and (args.only or case != LARGE)]
    if min(args.crops, args.processes) < 1:
        p.error("--crops, --processes: at least 1")
    if args.whole and Path(args.whole).exists():          # a run in it would only go on
        p.error(f"--whole {args.whole}: this folder is there already; give a new one")
    if args.options and not args.whole:
        p.error(f"unknown: {' '.join(args.options)}")
    if not args.cases:
        p.error(f"--only {args.only}: none of {', '.join(CASES)}")
    return args


def beside_textbook(cases, repeat):
    """Print the table of the CASES, each measured in a child process; this process itself never computes."""
    begin = time.time()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32; seconds: median "
          f"(least–most, calls)\n")
    print("| what | ours, s | textbook, s | textbook / ours | MB, ours / textbook | largest difference |")
    print("|---|---|---|---|---|---|", flush=True)
    for case in cases:
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as child:
            lines = child.submit(measure, case, repeat)
            if isinstance(lines.exception(), BrokenProcessPool):
                raise data.UserError(f"{case}: its process was killed; {LARGE} needs 5.2 GB: free memory or "
                                     f"use --only")
            print("\n".join(lines.result()), flush=True)
    print(f"\n{time.time() - begin:.0f} s in all; * computed from the measured slope", file=sys.stderr)


def main():
    args = parse()
    if args.whole:
        return whole(args.whole, args.backbone, args.processes, args.options)
    if args.stages:
        return stages(args.backbone, args.crops)
    return beside_textbook(args.cases, 3 if args.quick else 6)


if __name__ == "__main__":
    sys.exit(data.exit_code(main))
