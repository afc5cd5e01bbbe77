"""DINO self-distillation of the shipped tiny ViT. No labels are used.

    python tools/pretrain.py                                       # makes assets/tiny.pt again, in place
    python tools/pretrain.py --data folder --root photos --out my.pt   # the same on images of one's own

A student and its moving average, the teacher, see crops of the same thing; the student's distribution over
prototypes has to match the teacher's on another crop (DINO, the paper's [5]). On a folder, the two views are
crops of one image. On `shapes` they are crops of two pictures of one object: other background, place, size
and light, as two frames of a video would be. That is the renderer's knowledge of which pictures show one
object; it is what makes a ViT of this size attend to objects, and it is no category label.

The attention of the CLS token first is even, then lies on the object, then contracts to a small piece of it.
Training stops in between, when it is spread over ATTENDED of the patches.
"""

import argparse
import copy
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    import start                                          # before torch

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data                                               # noqa: E402
from model import BACKBONES, VisionTransformer, normalise  # noqa: E402

SIZE, LOCAL = 96, 48                                      # pixels of a picture and of a small crop
PROTOTYPES, TEACHER_TEMPERATURE, STUDENT_TEMPERATURE = 512, 0.03, 0.1
TOKEN_DROP = 0.75                                         # of the patch tokens of the student's large crops
ATTENDED = 0.38                                           # stop when CLS attends to this share of the patches
PAIRS = 3_000_000                                         # first seed: no scene of data.Shapes has it


def pair(seed):
    """Two pictures of one object, with more colour around it than in the scenes: uint8 (2, SIZE, SIZE, 3)."""
    rng = np.random.default_rng((PAIRS, seed))
    thing = data.new_object(rng, int(rng.integers(len(data.SHAPES))))
    pictures = [data.render(rng, [thing], SIZE, (0.18, 0.42), tint=0.09, clutter=0.8)[0] for _ in range(2)]
    return np.stack(pictures)


def photo(path):
    """One image twice: uint8 (2, SIZE, SIZE, 3)."""
    return np.stack([data.squash(data.open_image(path, upright=True), SIZE)] * 2)


def views(image, size, area, g):
    """Random crops of image (B, 3, H, W) in 0..1: turned, mirrored, a share `area` of it, other colours."""
    B = len(image)

    def u(low, high):                                     # uniform
        return torch.rand(B, generator=g) * (high - low) + low

    side = u(*area).sqrt()
    ratio = torch.exp(u(-1, 1) * math.log(4 / 3)) ** 0.5  # of width and height: 3 : 4 to 4 : 3
    sx, sy = (side * ratio).clamp(max=1), (side / ratio).clamp(max=1)
    tx, ty = u(-1, 1) * (1 - sx), u(-1, 1) * (1 - sy)
    turn = u(-math.pi, math.pi)
    mirror = (u(0, 1) < 0.5).float() * 2 - 1
    cos, sin = turn.cos(), turn.sin()
    theta = torch.stack([torch.stack([sx * cos * mirror, -sy * sin, tx], 1),
                         torch.stack([sx * sin * mirror, sy * cos, ty], 1)], 1)
    grid = F.affine_grid(theta, (B, 3, size, size), align_corners=False)
    image = F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)
    draws = data.Draws(*[torch.zeros(B)] * 4, brightness=u(0.6, 1.4), contrast=u(0.6, 1.4),
                       saturation=u(0.6, 1.4), hue=u(-0.03, 0.03), grey=(u(0, 1) < 0.05).float(),
                       sigma=(u(0, 1) < 0.3) * u(0.5, 1.5))
    return normalise(data.augment(image, draws))


class Projection(nn.Module):
    """CLS feature -> cosine with each prototype."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(),
                                 nn.Linear(256, 64))
        self.prototypes = nn.Linear(64, PROTOTYPES, bias=False)
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return F.normalize(self.mlp(x), dim=1) @ F.normalize(self.prototypes.weight, dim=1).T


def project(network, image, g=None):
    """Image -> (B, PROTOTYPES). With a generator, three quarters of the patch tokens are left out."""
    vit, projection = network
    x = vit.prepare_tokens(image)
    if g is not None:
        B, n, D = x.shape
        keep = torch.rand(B, n - 1, generator=g).argsort(1)[:, :int((n - 1) * (1 - TOKEN_DROP))] + 1
        x = torch.cat([x[:, :1], x.gather(1, keep[..., None].expand(-1, -1, D))], 1)
    for block in vit.blocks:
        x = block(x)
    return projection(vit.norm(x)[:, 0])


@torch.no_grad()
def attended(vit, image):
    """Share of the hw patches that CLS attends to: (1 / sum a^2) / hw, a its attention to them, sum 1."""
    a = vit(image)[1][:, :, 1:].mean(1)                   # (B, hw)
    a = a / a.sum(1, keepdim=True)
    return (1 / (a ** 2).sum(1)).mean().item() / a.shape[1]


def parse(argv=None):
    p = argparse.ArgumentParser(description="DINO self-distillation of the tiny ViT, without labels.",
                                usage=argparse.SUPPRESS, allow_abbrev=False)
    p.add_argument("--data", choices=("shapes", "folder"), default="shapes",
        help="pairs of renders, or a folder of images (default: shapes)")
    p.add_argument("--root", default="data", help="the folder of images (default: data)")
    p.add_argument("--images", type=int, default=4096,
        help="pairs, or images of the folder, to learn from (default: 4096)")
    p.add_argument("--steps", type=int, default=400, help="optimizer steps at most (default: 400)")
    p.add_argument("--batch", type=int, default=64, help="pairs per step (default: 64)")
    p.add_argument("--lr", type=float, default=1e-3, help="highest learning rate (default: 0.001)")
    p.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    p.add_argument("--out", help="file to write (default: assets/tiny.pt; of a folder: tiny.pt)")
    args = p.parse_args(argv)
    args.out = Path(args.out or ("assets/tiny.pt" if args.data == "shapes" else "tiny.pt"))
    if min(args.images, args.steps, args.batch) < 1 or not 0 < args.lr < 1 or args.seed < 0:
        p.error("--images, --steps, --batch: at least 1; --lr: between 0 and 1; --seed: at least 0")
    if args.out.is_dir():
        p.error(f"--out {args.out}: is a folder, give a file")
    return args


def check_writable(file):
    """Raise UserError now, not after the training, if `file` cannot be written."""
    probe = file.with_name(file.name + data.TEMPORARY)
    data.write_whole(probe, lambda f: None)
    probe.unlink()


def all_pictures(args):
    """The pairs to learn from: uint8 (n, 2, 3, SIZE, SIZE)."""
    with ProcessPoolExecutor() as pool:
        if args.data == "shapes":
            pictures = list(pool.map(pair, range(args.images), chunksize=64))
        else:
            pictures = list(pool.map(photo, data.Folder(args.root).images[:args.images], chunksize=8))
    return torch.from_numpy(np.stack(pictures)).permute(0, 1, 4, 2, 3)


def main():
    args = parse()
    check_writable(args.out)
    pictures = all_pictures(args)                         # (n, 2, 3, SIZE, SIZE)
    torch.manual_seed(args.seed)
    g = torch.Generator().manual_seed(args.seed)
    batch = min(args.batch, len(pictures))

    vit = VisionTransformer(**BACKBONES["tiny"][0])
    student = nn.ModuleList([vit, Projection(vit.embed_dim)])
    teacher = copy.deepcopy(student).requires_grad_(False)
    matrices = [t for t in student.parameters() if t.ndim > 1 and len(t) > 1]
    others = [t for t in student.parameters() if not (t.ndim > 1 and len(t) > 1)]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=args.lr)
    centre = torch.zeros(PROTOTYPES)
    start = time.time()
    for step in range(args.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 100) * max(cosine, 0.02)
        optimizer.param_groups[0]["weight_decay"] = 0.2 - 0.16 * cosine
        chosen = torch.randperm(len(pictures), generator=g)[:batch]
        a, b = (pictures[chosen].float() / 255).unbind(1)
        large = torch.cat([views(a, SIZE, (0.4, 1), g), views(b, SIZE, (0.4, 1), g)])
        small = torch.cat([views(x, LOCAL, (0.1, 0.4), g) for x in (a, b, a, b)])
        with torch.no_grad():
            # only the student needs fp32; bf16 is faster where the CPU multiplies in it, else much slower
            with torch.autocast("cpu", torch.bfloat16):
                out = project(teacher, large)
            out = out.float()
            target = ((out - centre) / TEACHER_TEMPERATURE).softmax(1).chunk(2)
            centre = 0.9 * centre + 0.1 * out.mean(0)
        out = torch.cat([project(student, large, g), project(student, small)])
        log_p = (out / STUDENT_TEMPERATURE).log_softmax(1).chunk(6)      # views 0, 1 are large, 2 to 5 small
        pairs = [(t, s) for t in range(2) for s in range(6) if s != t]
        loss = -sum((target[t] * log_p[s]).sum(1).mean() for t, s in pairs) / len(pairs)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 3.0)
        if step < len(pictures) // batch:                 # DINO: prototypes are fixed in the first epoch
            student[1].prototypes.weight.grad = None
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.01 * cosine)
        if step % 10 == 9 or step == args.steps - 1:
            share = attended(teacher[0], large)
            print(f"step {step + 1}/{args.steps}  loss {loss:.3f} (random: {math.log(PROTOTYPES):.3f})  "
                  f"attended {share:.2f}  {time.time() - start:.0f} s", flush=True)
            if share < ATTENDED:
                break
    state = {k: v.half() for k, v in teacher[0].state_dict().items()}
    data.write_whole(args.out, lambda f: torch.save(state, f))
    print(f"wrote {args.out}: {args.out.stat().st_size / 1e6:.1f} MB, {time.time() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(data.exit_code(main))
