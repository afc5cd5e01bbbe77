"""Coarse labels from a self-supervised ViT alone: windows, clusters, class activation maps (DMSA Eq. 5).

    image --attention of CLS--> foreground --windows--> CLS features --k-means over all images--> K centroids
    image, K centroids --gradient of cos(CLS, centroid) in the last attention--> K maps (B, K, h, w)

    last_attention() -> windows(), window_features() -> cluster() -> class_activation_maps() (Eq. 5) -> main()

"The method borrowed from TransFGU" (DMSA Sec. 4.1). Nothing here is trained and no label is used.
"Decision N" is row N of docs/decisions.md in the DMSA repository, which says what was chosen where the paper
is silent.
Needs torch, numpy and scipy. Copy this file anywhere (the picture needs pillow).

The ViT is an argument. All that is asked of it: `patch_size`; `last_qkv(image)`, which gives the tokens that
enter its last block, CLS first and patches last, and the q, k, v of that block's attention; `attn.proj`,
`norm2` and `mlp` of blocks[-1]; a last `norm`; and `forward`. What a ViT of timm (made with
`dynamic_img_size=True`, since windows are smaller than images) lacks of these:

    def last_qkv(image):
        x, attn = vit.norm_pre(vit._pos_embed(vit.patch_embed(image))), vit.blocks[-1].attn
        for block in vit.blocks[:-1]:
            x = block(x)
        qkv = attn.qkv(vit.blocks[-1].norm1(x)).unflatten(2, (3, attn.num_heads, -1))
        return x, *qkv.permute(2, 0, 3, 1, 4)
    vit.last_qkv, vit.patch_size = last_qkv, vit.patch_embed.patch_size[0]

A ViTModel of HuggingFace (transformers 5.24) has other names:

    last, any_size = model.layers[-1], dict(interpolate_pos_encoding=True)
    def last_qkv(image):
        x, attn = model.embeddings(image, **any_size), last.attention
        for layer in model.layers[:-1]:
            x = layer(x)
        heads = lambda y: y.unflatten(2, (attn.num_attention_heads, -1)).transpose(1, 2)
        y = last.layernorm_before(x)
        return x, heads(attn.q_proj(y)), heads(attn.k_proj(y)), heads(attn.v_proj(y))
    block = SimpleNamespace(attn=SimpleNamespace(proj=last.attention.o_proj), norm2=last.layernorm_after,
                            mlp=last.mlp)
    vit = SimpleNamespace(patch_size=model.config.patch_size, last_qkv=last_qkv, blocks=[block],
                          norm=model.layernorm, forward=lambda image: model(image, **any_size))

A last block that does something else (LayerScale, norms of q and k) is refused: `check_last_block`.

    python cam.py         # writes cam.png: windows and class maps, by a ViT small enough to write by hand
"""

import math
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2, vq

# TransFGU's, but for RESTARTS and PATCHES_AT_ONCE
THING_SCALES = (0.6, 0.5, 0.4, 0.3)                       # sides of the windows as shares of the image: VOC
SCENE_SCALES = (0.5, 0.4, 0.3, 0.2)                       # COCO
COVER, CLEAR = 0.5, 0.8                                   # least share of a window: foreground, background
KEEP_MASS = 0.8                                           # share of a map's mass that is kept
RESTARTS = 5                                              # of k-means; TransFGU has one start
PATCHES_AT_ONCE = {"cpu": 2_400, "cuda": 25_600}          # of windows: what a cache holds, what fills a GPU


# ----------------------------------------------------------------------------
# The last attention: all that this file needs of a ViT


def last_attention(vit, image):
    """Normalised image (B, 3, H, W) -> what the CLS token does in the last block.

    returns  x (B, D) CLS before the block; A (B, heads, n) its attention over all n tokens, sums to 1;
             v (B, heads, n, d) the values. Only this row of the n x n map is ever needed.
    """
    x, q, k, v = vit.last_qkv(image)
    A = (q[:, :, :1] @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3)         # (B, heads, 1, n), Eq. 2
    return x[:, 0], A.squeeze(2), v


def cls_feature(vit, x, attended):
    """The rest of the last block for CLS alone: x, attended = A v (..., D) -> normed CLS (..., D)."""
    block = vit.blocks[-1]
    x = x + block.attn.proj(attended)
    return vit.norm(x + block.mlp(block.norm2(x)))


@torch.no_grad()
def check_last_block(vit, image):
    """Once for each ViT: raise ValueError if its last block is not the one written above.

    image   (B, 3, H, W) normalised, of which the first is used. What comes out of the ViT's last norm when it
            runs by itself is compared with `cls_feature`.
    """
    if getattr(vit, "last_block_checked", False):
        return
    seen, image = [], image[:1]
    hook = vit.norm.register_forward_hook(lambda norm, inputs, output: seen.append(output))
    vit.forward(image)
    hook.remove()
    x, A, v = last_attention(vit, image)
    ours, theirs = cls_feature(vit, x, (A[:, :, None] @ v).flatten(1)), seen[0][:, 0]     # (1, D) each
    error = ((ours - theirs).norm() / theirs.norm()).item()
    if not error < 0.02:                                  # bf16 makes 0.01
        raise ValueError(f"the ViT's last block is not x + proj(A v), then + mlp(norm2(x)): CLS differs by "
                         f"{100 * error:.0f} %. LayerScale has to be multiplied into attn.proj and mlp.fc2, "
                         f"norms of q and k belong into last_qkv, and q, k, v have to be in this order")
    vit.last_block_checked = True


def patch_grid(vit, image):
    """Rows and columns of patches in image (B, 3, H, W)."""
    return tuple(side // vit.patch_size for side in image.shape[2:])


# ----------------------------------------------------------------------------
# Windows on the foreground, and their features


def window_centres(n, s):
    """Patches that are centres of windows of side s along n patches (TransFGU).

    Even s: half a side apart, and one more whose window ends at the far border: n = 20, s = 6 gives 3 6 9 12
    15 16. Odd s: a side apart, and no such window, whose centre would lie between two patches.
    """
    step = s // 2 if s % 2 == 0 else s
    return [c for c in range(n) if s / 2 <= c < n - s / 2 and (c % step == 0 or c == n - 1 - s / 2)]


def windows(h, w, scales=THING_SCALES):
    """Sliding windows on an h x w grid: (M, 4) int64 of x0 y0 x1 y1, patches, both ends inclusive (TransFGU).

    scales   sides of the windows as shares of the grid's shorter side. Scale by scale, rows first
    raises   ValueError if no window fits

    With s = int(min(h, w) * scale), a window has s + 1 patches a side where s is even, s where it is odd. On
    20 x 20, 40 x 40 and 80 x 80 there are 70 windows for VOC's scales, 142 for COCO's.
    """
    boxes = []
    for s in (int(min(h, w) * scale) for scale in scales):
        if s:
            boxes += [(math.ceil(x - s / 2), math.ceil(y - s / 2), int(x + s / 2), int(y + s / 2))
                      for y in window_centres(h, s) for x in window_centres(w, s)]
    if not boxes:
        raise ValueError(f"no window of scales {tuple(scales)} fits a grid of {h} x {w} patches")
    return np.array(boxes)


def attended_patches(A, grid):
    """Foreground: patches that CLS attends to more than average. A (B, heads, n) -> bool (B, h, w)."""
    attention = A[:, :, -grid[0] * grid[1]:].mean(1)      # (B, hw): the patches come last
    return (attention > attention.mean(1, keepdim=True)).unflatten(1, grid)


def select_windows(mask, boxes, patch):
    """Which windows lie on the foreground and which off it.

    mask     (h, w) bool, foreground patches
    boxes    (M, 4) of `windows`; patch: its side in pixels
    returns  fore, back: bool (M,); share of foreground above 0.5, share of background above 0.8
    """
    pixels = mask.cpu().numpy().repeat(patch, 0).repeat(patch, 1)                 # (H, W)
    sums = np.pad(pixels.cumsum(0).cumsum(1), ((1, 0), (1, 0)))                   # sums of all rectangles
    x0, y0, x1, y1 = pixel_boxes(boxes, patch).T
    share = (sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]) / ((x1 - x0) * (y1 - y0))
    return share > COVER, 1 - share > CLEAR


def pixel_boxes(boxes, patch):
    """Patches, both ends inclusive -> pixels, end exclusive, without the last row and column (TransFGU)."""
    return np.concatenate([boxes[:, :2] * patch, (boxes[:, 2:] + 1) * patch - 1], axis=1)


def crop_windows(image, boxes, patch, size):
    """Windows of one image (3, H, W) resized to size x size (bilinear): (M, 3, size, size)."""
    return torch.cat([F.interpolate(image[None, :, y0:y1, x0:x1], size=(size, size), mode="bilinear")
                      for x0, y0, x1, y1 in pixel_boxes(boxes, patch).tolist()])


@torch.no_grad()
def window_features(vit, image, size, scales=THING_SCALES, stuff=False):
    """CLS features of one image's foreground windows, and of its background windows.

    image    (1, 3, H, W) normalised; TransFGU's side is twice `size`
    size     side in pixels that a window is resized to for the ViT
    stuff    also the background windows (only they describe stuff; without it they are not computed)
    returns  fore (M, D), back (M', D); empty where no window qualifies
    """
    if len(image) != 1:
        raise ValueError(f"image {tuple(image.shape)}: one at a time, (1, 3, H, W)")
    grid, patch = patch_grid(vit, image), vit.patch_size
    x, A, _ = last_attention(vit, image)
    boxes = windows(*grid, scales)
    fore, back = select_windows(attended_patches(A, grid)[0], boxes, patch)
    features, batch = [], max(1, PATCHES_AT_ONCE["cuda" if image.is_cuda else "cpu"] // (size // patch) ** 2)
    for chosen in (fore, back & stuff):
        parts = [x[:0]]                                                           # (0, D)
        for start in range(0, chosen.sum(), batch):
            crops = crop_windows(image[0], boxes[chosen][start:start + batch], patch, size)
            check_last_block(vit, crops)
            x, A, v = last_attention(vit, crops)
            parts.append(cls_feature(vit, x, (A[:, :, None] @ v).flatten(1)))     # (M, D)
        features.append(torch.cat(parts))
    return features


def cluster(features, k, seed=0):
    """k-means of features (M, D), numpy or CPU tensor: centroids (k, D), numpy float32; the best start's.

    Euclidean distance of un-normalised features, as TransFGU; its single start at random points often sticks
    in a poor optimum. Raises ValueError if there are fewer than k features.
    """
    features = torch.as_tensor(features).detach().float().numpy()
    if len(features) < k:
        raise ValueError(f"{len(features)} windows are too few for {k} clusters: "
                         f"give more images or fewer classes")
    rng, best, lowest = np.random.default_rng(seed), None, np.inf
    for _ in range(RESTARTS):
        centroids, _ = kmeans2(features, k, iter=100, minit="++", rng=rng)
        inertia = (vq(features, centroids)[1] ** 2).sum()
        if inertia < lowest:
            best, lowest = centroids, inertia
    return best


# ----------------------------------------------------------------------------
# Class activation maps (Eq. 5)


def keep_mass(maps, share=KEEP_MASS):
    """Where the largest values lie that together hold `share` of a map's mass.

    maps (..., n) >= 0 -> bool (..., n); an all-zero map keeps nothing.
    """
    values, order = maps.sort(-1)
    tail = values.cumsum(-1) > (1 - share) * values.sum(-1, keepdim=True)
    return torch.zeros_like(tail).scatter(-1, order, tail)


@torch.no_grad()
def class_activation_maps(vit, image, centroids):
    """Eq. 5 as TransFGU has it: high where CLS attends to a patch, and where attending more would make the
    CLS feature more like a centroid.

    image      (B, 3, H, W) normalised
    centroids  (K, D) tensor, of `cluster`
    returns    (B, K, h, w) >= 0; every image by itself, whatever else is in the batch (decision 10)
    raises     RuntimeError under torch.inference_mode(); torch.no_grad() is fine

    A is the CLS row of the last attention, alpha^c the gradient of cos(CLS feature, centroid c) in A, each
    the mean over heads. Eq. 5 weighs A by alpha^c; TransFGU adds the two (decision 9): L^c = A / max A + the
    largest alpha^c that together hold 80 % of its positive mass, and 0 where alpha^c < 0.

    In closed form: attended = A v is linear in A, so d cos / d A = v u with u = d cos / d attended. One
    backward pass of K copies of one token through the last MLP gives all K of them.
    """
    check_last_block(vit, image)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("torch.inference_mode() allows no gradient, which these maps need: use no_grad()")
    if centroids.ndim != 2:
        raise ValueError(f"centroids {tuple(centroids.shape)}: (K, D) expected")
    B, K, grid = len(image), len(centroids), patch_grid(vit, image)
    x, A, v = last_attention(vit, image)                        # (B, D), (B, heads, n), (B, heads, n, d)
    attended = (A[:, :, None] @ v).flatten(1)                                     # (B, D)
    with torch.enable_grad():
        copies = attended[:, None].repeat(1, K, 1).requires_grad_()               # (B, K, D)
        cosine = F.cosine_similarity(cls_feature(vit, x[:, None], copies), centroids, dim=2)
        u, = torch.autograd.grad(cosine.sum(), copies)                            # (B, K, D)
    hw = grid[0] * grid[1]                                # the patches come last, behind CLS and registers
    v = v[:, :, -hw:].transpose(1, 2).flatten(2)                                  # (B, hw, D), D = heads * d
    alpha = u @ v.transpose(1, 2) / A.shape[1]                                    # (B, K, hw)
    evidence = F.relu(alpha)
    evidence = evidence * keep_mass(evidence)
    attention = A[:, :, -hw:].mean(1, keepdim=True)                               # (B, 1, hw)
    maps = attention / attention.amax(2, keepdim=True) + evidence
    return (maps * (alpha >= 0)).view(B, K, *grid)


# ----------------------------------------------------------------------------
# The concept in one picture, by a ViT small enough to write by hand


class HandViT:
    """One block, one head. A token is (1, saturation, red, green, blue); CLS attends to saturation."""

    def __init__(self):
        self.patch_size, self.norm, self.qkv = 8, nn.LayerNorm(5), torch.zeros(5, 15)
        self.qkv[0, 1], self.qkv[1, 6] = 25.0, 1.0                                # q k^T = 25 x saturation
        self.qkv[2, 12] = self.qkv[3, 13] = self.qkv[4, 14] = 1.0                 # v = colour
        attn = SimpleNamespace(proj=nn.Identity())
        self.blocks = [SimpleNamespace(attn=attn, norm2=nn.Identity(), mlp=torch.zeros_like)]

    def last_qkv(self, image):
        rgb = F.avg_pool2d(image, 8).flatten(2).transpose(1, 2)                   # (B, hw, 3)
        rgb = rgb - rgb.mean(2, keepdim=True)
        tokens = torch.cat([torch.ones_like(rgb[..., :1]), rgb.norm(dim=2, keepdim=True), rgb], dim=2)
        tokens = torch.cat([tokens.new_tensor([1.0, 0, 0, 0, 0]).expand(len(image), 1, 5), tokens], dim=1)
        return tokens, *(tokens @ self.qkv)[:, None].chunk(3, dim=3)

    def forward(self, image):
        x, q, k, v = self.last_qkv(image)
        return self.norm(x + F.scaled_dot_product_attention(q, k, v)[:, 0])


def main():
    """Two discs in each of 24 pictures, three colours in all: find windows, three clusters, their maps."""
    from PIL import Image, ImageDraw
    size, vit, rng = 160, HandViT(), np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    colours = np.array([[0.9, 0.2, 0.2], [0.2, 0.8, 0.3], [0.25, 0.35, 0.95]])
    pictures = []
    for i in range(24):
        picture = np.full((size, size, 3), 0.5) + rng.normal(0, 0.05, (size, size, 1))
        for side, colour in enumerate(rng.choice(3, 2, replace=False)):
            radius = rng.integers(24, 36)
            cy, cx = rng.integers(40, 120), 40 + 80 * side
            picture[np.hypot(y - cy, x - cx) < radius] = colours[colour] * rng.uniform(0.8, 1.0)
        pictures.append(torch.tensor(picture, dtype=torch.float32).permute(2, 0, 1)[None])
    bank = torch.cat([window_features(vit, picture, 64)[0] for picture in pictures])
    centroids = torch.tensor(cluster(bank, 3))
    print(f"{len(bank)} foreground windows of {len(pictures)} pictures; sizes of the clusters "
          f"{np.bincount(vq(bank.numpy(), centroids.numpy())[0]).tolist()}")
    picture, cell = pictures[0], 240
    _, A, _ = last_attention(vit, picture)
    boxes = windows(20, 20)
    chosen, _ = select_windows(attended_patches(A, (20, 20))[0], boxes, 8)
    attention = A[0, 0, 1:].view(20, 20)
    tiles = [("image and kept windows", picture[0]),
             ("attention of CLS", (attention / attention.max()).expand(3, -1, -1))]
    maps = class_activation_maps(vit, picture, centroids)[0]
    for k, cam in enumerate(maps / maps.max()):
        tiles += [(f"map of cluster {k}" + (": not here" if cam.max() < 0.1 else ""), cam.expand(3, -1, -1))]
    page = Image.new("RGB", (len(tiles) * (cell + 10) + 10, cell + 40), "white")
    draw = ImageDraw.Draw(page)
    for i, (title, pixels) in enumerate(tiles):
        tile = Image.fromarray((pixels.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())
        page.paste(tile.resize((cell, cell), Image.NEAREST), (10 + i * (cell + 10), 30))
        draw.text((10 + i * (cell + 10), 10), title, "black")
    for box in pixel_boxes(boxes[chosen], 8) * cell / size:
        draw.rectangle([10 + box[0], 30 + box[1], 10 + box[2], 30 + box[3]], outline="yellow")
    page.save("cam.png")
    print("wrote cam.png: the map of a cluster is bright on the disc of its colour and black on any other")


if __name__ == "__main__":
    main()
