"""Coarse labels from a self-supervised ViT alone: windows, clusters, class activation maps (DMSA Eq. 5).

    image --attention of CLS--> foreground --windows--> CLS features --k-means over all images--> K centroids
    image, K centroids --gradient of cos(CLS, centroid) in the last attention--> K maps (B, K, h, w)

    last_attention() -> windows(), window_features() -> cluster() -> class_activation_maps() (Eq. 5), then
    min_max()

"The method borrowed from TransFGU" (DMSA Sec. 4.1). Nothing here is trained and no label is used.
"Decision N" is row N of docs/decisions.md in the DMSA repository, which says what was chosen where the paper
is silent.

Needs torch, numpy and scipy 1.15 or later (the picture of `python cam.py` needs pillow): copy this file
anywhere. The ViT is an argument: model.py's, or one of timm or HuggingFace, see the end of this file. It has
to have:

    last_qkv(image)     the n tokens that enter its last block (B, n, D), CLS first and patches last, and the
                        q, k, v of that block's attention (B, heads, n, d); D = heads * d
    blocks[-1], norm    the last block's attn.proj, norm2 and mlp, and the norm behind it
    patch_size          in pixels

    python cam.py         # writes cam.png: windows and class maps, by a ViT small enough to write by hand
"""

import warnings
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2, vq

# TransFGU's, but for RESTARTS and PATCHES_AT_ONCE
THING_SCALES = (0.6, 0.5, 0.4, 0.3)                       # sides of the windows as shares of the image: VOC
SCENE_SCALES = (0.5, 0.4, 0.3, 0.2)                       # COCO
COVER = 0.5                                               # foreground windows: more than this is foreground
CLEAR = 0.8                                               # background windows: more than this is background
KEEP_MASS = 0.8                                           # share of a map's mass that is kept
RESTARTS = 5                                              # of k-means; TransFGU has one start
PATCHES_AT_ONCE = {"cpu": 2_400, "cuda": 25_600}          # of windows: fit in a CPU's L3 cache, fill a GPU


# ----------------------------------------------------------------------------
# The last block for the CLS token alone: Block.forward of model.py, cut open behind the attention


def last_attention(vit, image):
    """Normalised image (B, 3, H, W) -> what the CLS token does in the last attention.

    returns  x (B, D) CLS before the block; A (B, heads, n) its attention over all n tokens, sums to 1;
             v (B, heads, n, d) the values. Only this row of the n x n map is ever needed.
    """
    x, q, k, v = vit.last_qkv(image)
    A = (q[:, :, :1] @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3)         # (B, heads, 1, n), Eq. 2
    return x[:, 0], A.squeeze(2), v


def weighted_values(A, v):
    """Eq. 2's A v for CLS, before the output projection: A (B, heads, n), v (B, heads, n, d) -> (B, D)."""
    return (A[:, :, None] @ v).flatten(1)


def finish_block(vit, x, attended):
    """The rest of the block, and the last norm: x and attended = A v (..., D) -> CLS feature (..., D)."""
    block = vit.blocks[-1]
    x = x + block.attn.proj(attended)
    return vit.norm(x + block.mlp(block.norm2(x)))


def cls_feature(vit, image):
    """CLS as the ViT gives it: normalised image (B, 3, H, W) -> (B, D)."""
    x, A, v = last_attention(vit, image)
    return finish_block(vit, x, weighted_values(A, v))


def patch_grid(vit, image):
    """Rows and columns of patches in image (B, 3, H, W)."""
    return tuple(side // vit.patch_size for side in image.shape[2:])


# ----------------------------------------------------------------------------
# Windows on the foreground, and their features


def spans(n, s, patch):
    """TransFGU's windows along an axis of n patches, 0 < s < n: a list of (start, end) in pixels.

        0 1 2 3 4 5 6 7    n = 8        0 1 2 3 4 5 6 7    n = 8
        [ - - - ]          s = 4            [ - ]          s = 3
            [ - - - ]                             [ - ]
              [ - - - ]

    Of an even s: s + 1 patches each, s / 2 apart, and one more that ends at the far border. Of an odd s: s
    patches each, s apart, centred on s, 2 s ..: the first patches, and often the last, are in none.
    """
    if s % 2 == 0:
        length, starts = s + 1, sorted({*range(0, n - s, s // 2), n - s - 1})     # in patches
    else:
        length, starts = s, range(s - s // 2, n - s + 1, s)
    # without the last pixel, as in TransFGU
    return [(start * patch, (start + length) * patch - 1) for start in starts]


def windows(h, w, patch, scales=THING_SCALES):
    """Sliding windows on a grid of h x w patches: (M, 4) int64 of x0 y0 x1 y1 in pixels, the end exclusive.

    patch    side of a patch in pixels
    scales   sides of the windows as shares of the grid's shorter side. Scale by scale, rows first
    raises   ValueError if no window fits

    On 20 x 20, 40 x 40 and 80 x 80 there are 70 windows for VOC's scales, 142 for COCO's.
    """
    sides = [int(min(h, w) * scale) for scale in scales]                          # in patches
    boxes = [(x0, y0, x1, y1) for s in sides if 0 < s < min(h, w)
             for y0, y1 in spans(h, s, patch) for x0, x1 in spans(w, s, patch)]
    if not boxes:
        raise ValueError(f"no window of scales {tuple(scales)} fits a grid of {h} x {w} patches")
    return np.array(boxes)


def attended_patches(A, grid):
    """Foreground: patches that CLS attends to more than average. A (B, heads, n) -> bool (B, h, w)."""
    h, w = grid
    attention = A[:, :, -h * w:].mean(1)                  # (B, hw): the patches are the last tokens
    return (attention > attention.mean(1, keepdim=True)).unflatten(1, grid)


def select_windows(mask, boxes, patch):
    """Which windows lie on the foreground and which off it.

    mask     (h, w) bool, foreground patches of `patch` pixels a side
    boxes    (M, 4) of `windows`
    returns  fore, back: bool (M,); share of foreground above COVER, share of background above CLEAR
    """
    # in pixels, since windows end within a patch; sums[y, x] counts the foreground above and left of (y, x)
    pixels = mask.cpu().numpy().repeat(patch, 0).repeat(patch, 1)                 # (H, W)
    sums = np.pad(pixels.cumsum(0).cumsum(1), ((1, 0), (1, 0)))                   # (H + 1, W + 1)
    x0, y0, x1, y1 = boxes.T
    share = (sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]) / ((x1 - x0) * (y1 - y0))
    return share > COVER, 1 - share > CLEAR


def crop_windows(image, boxes, size):
    """Windows of one image (3, H, W) resized to size x size (bilinear): (M, 3, size, size)."""
    return torch.cat([F.interpolate(image[None, :, y0:y1, x0:x1], size=(size, size), mode="bilinear")
                      for x0, y0, x1, y1 in boxes.tolist()])


def features_of_windows(vit, image, boxes, size):
    """CLS features of windows (M, 4) of one image (3, H, W), each resized to size x size pixels: (M, D)."""
    patches = PATCHES_AT_ONCE["cuda" if image.is_cuda else "cpu"]
    together = max(1, patches // (size // vit.patch_size) ** 2)                   # windows
    features = image.new_empty(len(boxes), len(vit.norm.weight))                  # (M, D)
    for start in range(0, len(boxes), together):
        crops = crop_windows(image, boxes[start:start + together], size)
        features[start:start + together] = cls_feature(vit, crops)
    return features


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
    grid = patch_grid(vit, image)
    _, A, _ = last_attention(vit, image)
    boxes = windows(*grid, vit.patch_size, scales)
    fore, back = select_windows(attended_patches(A, grid)[0], boxes, vit.patch_size)
    fore_boxes = boxes[fore]
    back_boxes = boxes[back] if stuff else boxes[:0]
    return (features_of_windows(vit, image[0], fore_boxes, size),
            features_of_windows(vit, image[0], back_boxes, size))


def cluster(features, k, seed=0):
    """k-means of features (M, D), numpy or CPU tensor: centroids (k, D), numpy float32; the best start's.

    Euclidean distance of un-normalised features, as TransFGU; its single start at random points often sticks
    in a poor optimum. Raises ValueError if there are fewer than k different features.
    """
    features = torch.as_tensor(features).detach().float().numpy()
    different = len({hash(row.tobytes()) for row in features})
    if different < k:
        raise ValueError(f"{different} different windows of {len(features)} are too few for {k} clusters: "
                         f"give more images (copies of one do not count) or fewer classes")
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                   # of a cluster that lost all its windows: it stays
        starts = [kmeans2(features, k, iter=100, minit="++", rng=rng)[0] for _ in range(RESTARTS)]
    inertias = [(vq(features, centroids)[1] ** 2).sum() for centroids in starts]
    return starts[np.argmin(inertias)]


# ----------------------------------------------------------------------------
# Class activation maps (Eq. 5)


def keep_mass(maps, share=KEEP_MASS):
    """Where the largest values lie that together hold `share` of a map's mass.

    maps (..., n) >= 0 -> bool (..., n); an all-zero map keeps nothing.
    """
    values, order = maps.sort(-1)                         # smallest first
    kept = values.cumsum(-1) > (1 - share) * values.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept)        # each answer where its value was in `maps`


@torch.no_grad()
def class_activation_maps(vit, image, centroids):
    """Eq. 5 as TransFGU has it: high where CLS attends to a patch, and where attending more would make the
    CLS feature more like a centroid.

    image      (B, 3, H, W) normalised
    centroids  (K, D) tensor, of `cluster`
    returns    (B, K, h, w) >= 0; every image by itself, whatever else is in the batch (decision 10)
    raises     RuntimeError under torch.inference_mode(); torch.no_grad() is fine

    A is the CLS row of the last attention, alpha^c the gradient of cos(CLS feature, centroid c) in A, each
    the mean over heads. Eq. 5 weighs A by alpha^c; TransFGU adds the two (decision 9):

        L^c = (A / max A + evidence^c)  where alpha^c >= 0,  0 elsewhere

    evidence^c is alpha^c where it is one of the largest, which together hold 80 % of its positive mass; else
    it is 0.

    In closed form: attended = A v is linear in A, so that, with u = d cos / d attended,

        alpha[b, k, n] = d cos / d A, mean over heads = 1 / heads sum_head u[b, k, head] . v[b, head, n]

    One backward pass of K copies of one token through the last MLP gives all K u.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("torch.inference_mode() allows no gradient, which these maps need: use no_grad()")
    if centroids.ndim != 2:
        raise ValueError(f"centroids {tuple(centroids.shape)}: (K, D) expected")
    h, w = patch_grid(vit, image)
    patches = slice(-h * w, None)                         # of the tokens: the last, behind CLS and registers
    x, A, v = last_attention(vit, image)                  # (B, D), (B, heads, n), (B, heads, n, d)
    attended = weighted_values(A, v)                                              # (B, D)
    with torch.enable_grad():
        copies = attended[:, None].repeat(1, len(centroids), 1).requires_grad_()  # (B, K, D)
        cosine = F.cosine_similarity(finish_block(vit, x[:, None], copies), centroids, dim=2)     # (B, K)
        u, = torch.autograd.grad(cosine.sum(), copies)                            # (B, K, D)
    u = u.unflatten(2, (v.shape[1], v.shape[3]))                                  # (B, K, heads, d)
    alpha = torch.einsum("bkhd,bhnd->bhkn", u, v[:, :, patches]).mean(1)          # (B, K, hw)
    evidence = F.relu(alpha)
    evidence = evidence * keep_mass(evidence)
    attention = A[:, :, patches].mean(1, keepdim=True)                            # (B, 1, hw)
    maps = attention / attention.amax(2, keepdim=True) + evidence                 # (B, K, hw)
    return (maps * (alpha >= 0)).unflatten(2, (h, w))


def min_max(cam):
    """Per image over all K maps: (B, K, h, w) of any scale -> [0, 1]. Constant maps become 0, not NaN."""
    low, high = cam.amin((1, 2, 3), keepdim=True), cam.amax((1, 2, 3), keepdim=True)
    return (cam - low) / (high - low).clamp(min=torch.finfo(cam.dtype).tiny)


# ----------------------------------------------------------------------------
# The concept in one picture, by a ViT small enough to write by hand


class HandViT:
    """One block, one head. A token is (1, saturation, red, green, blue); CLS attends to saturation."""

    def __init__(self):
        self.patch_size = 8
        self.norm = nn.LayerNorm(5)
        self.q, self.k, self.v = torch.zeros(3, 5, 5)
        self.q[0, 0], self.k[1, 0] = 25.0, 1.0            # q of CLS times k = 25 x saturation
        self.v[2:, 2:] = torch.eye(3)                     # v = colour
        attn = SimpleNamespace(proj=nn.Identity())
        self.blocks = [SimpleNamespace(attn=attn, norm2=nn.Identity(), mlp=torch.zeros_like)]

    def last_qkv(self, image):
        rgb = F.avg_pool2d(image, 8).flatten(2).transpose(1, 2)                   # (B, hw, 3)
        rgb = rgb - rgb.mean(2, keepdim=True)
        tokens = torch.cat([torch.ones_like(rgb[..., :1]), rgb.norm(dim=2, keepdim=True), rgb], dim=2)
        tokens = torch.cat([tokens.new_tensor([1.0, 0, 0, 0, 0]).expand(len(image), 1, 5), tokens], dim=1)
        return tokens, *((tokens @ matrix)[:, None] for matrix in (self.q, self.k, self.v))       # one head


def main():
    """Two discs in each of 24 pictures, three colours in all: find windows, three clusters, their maps."""
    from PIL import Image, ImageDraw
    size, cell = 160, 240                                 # pixels of a picture, and of a tile of the page
    vit = HandViT()
    rng = np.random.default_rng(0)
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
    picture = pictures[0]
    _, A, _ = last_attention(vit, picture)
    boxes = windows(20, 20, 8)
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
    for box in boxes[chosen] * cell / size:
        draw.rectangle([10 + box[0], 30 + box[1], 10 + box[2], 30 + box[3]], outline="yellow")
    page.save("cam.png")
    print("wrote cam.png: the map of a cluster is bright on the disc of its colour and black on any other")


# ----------------------------------------------------------------------------
# For another project: a ViT of timm or HuggingFace as this file wants it


def from_timm(vit):
    """A VisionTransformer of timm, made with dynamic_img_size=True: windows are smaller than images."""
    last, heads = vit.blocks[-1], vit.blocks[-1].attn.num_heads

    def last_qkv(image):
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image)))
        for block in vit.blocks[:-1]:
            x = block(x)
        qkv = last.attn.qkv(last.norm1(x)).unflatten(2, (3, heads, -1))           # (B, n, 3, heads, d)
        return x, *qkv.permute(2, 0, 3, 1, 4)

    ours = SimpleNamespace(patch_size=vit.patch_embed.patch_size[0], last_qkv=last_qkv, blocks=[last],
                           norm=vit.norm)
    check_last_block(ours, vit.forward_features)
    return ours


def from_huggingface(model):
    """A ViTModel of HuggingFace (transformers 5.24)."""
    last = model.layers[-1]
    attn = last.attention

    def last_qkv(image):
        x = model.embeddings(image, interpolate_pos_encoding=True)
        for layer in model.layers[:-1]:
            x = layer(x)
        y = last.layernorm_before(x)
        qkv = [proj(y).unflatten(2, (attn.num_attention_heads, -1)).transpose(1, 2)
               for proj in (attn.q_proj, attn.k_proj, attn.v_proj)]               # (B, heads, n, d) each
        return x, *qkv

    block = SimpleNamespace(attn=SimpleNamespace(proj=attn.o_proj), norm2=last.layernorm_after, mlp=last.mlp)
    ours = SimpleNamespace(patch_size=model.config.patch_size, last_qkv=last_qkv, blocks=[block],
                           norm=model.layernorm)
    check_last_block(ours, lambda image: model(image, interpolate_pos_encoding=True).last_hidden_state)
    return ours


@torch.no_grad()
def check_last_block(vit, forward):
    """Raise ValueError if the ViT's last block is not the one written in this file.

    forward    (B, 3, H, W) -> tokens (B, n, D) after the last norm, CLS first, as the ViT itself makes them
    """
    side = 4 * vit.patch_size
    image = torch.linspace(-2, 2, 3 * side * side).view(1, 3, side, side).to(vit.norm.weight)
    expected = forward(image)[:, 0]                                               # (1, D)
    error = ((cls_feature(vit, image) - expected).norm() / expected.norm()).item()
    if not error < 0.02:                                  # bf16 makes 0.01
        raise ValueError(f"the ViT's last block is not x + proj(A v), then + mlp(norm2(x)): CLS differs by "
                         f"{100 * error:.0f} %. LayerScale has to be multiplied into attn.proj and mlp.fc2, "
                         f"norms of q and k belong into last_qkv, and q, k, v have to be in this order")


if __name__ == "__main__":
    main()
