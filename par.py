"""Pixel-adaptive refinement, PAR (DMSA Sec. 3.2, Eq. 4). AFA introduced it, the paper's [6], not [16].

(B, 3, H, W) image and (B, C, h, w) masks -> (B, C, H, W) masks whose edges follow the image's. Each pixel
repeatedly takes the average of its neighbours' masks, weighted by how alike their colours are.

    offsets(), neighbours() -> affinity() (Eq. 4) -> average(), the definition -> class PAR, the same faster

Needs torch only (the picture of `python par.py` needs pillow): copy this file anywhere. "Decision N" is row
N of docs/decisions.md in the DMSA repository, which says what was chosen where the paper is silent.

    python par.py         # writes par.png: a coarse mask after 0 to 10 iterations, and one pixel's affinity
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# The paper names none of these. The values are AFA's, and the defaults of `PAR`: 48 neighbours. In training
# the dilations are 1 2 4 8, on `shapes` 1 2 8 16: 32 neighbours (decision 8).
DILATIONS = (1, 2, 4, 8, 12, 24)
ITERATIONS = 10
BANDWIDTH = 0.3
OMEGA3 = 0.01                                             # a pixel's weights sum to 1 + OMEGA3
EPS = 1e-8                                                # added to standard deviations
# Pixels refined together. On a CPU their weights fit into the L3 cache; on a GPU they keep all of it busy.
PIXELS_AT_ONCE = {"cpu": 160 * 160, "cuda": 16 * 160 * 160}


def offsets(dilations):
    """The 8 neighbours (dy, dx) at every dilation, in pixels; the centre is left out."""
    return [(dy * d, dx * d) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]


def neighbours(x, dilations):
    """Yield, for each offset (dy, dx), x (B, C, H, W) read at (y + dy, x + dx); the border is replicated.

    N = 8 * |dilations| tensors (B, C, H, W), all views of one padded copy.
    """
    H, W = x.shape[2:]
    pad = max(dilations)
    padded = F.pad(x, (pad, pad, pad, pad), mode="replicate")
    for dy, dx in offsets(dilations):
        yield padded[:, :, pad + dy:pad + dy + H, pad + dx:pad + dx + W]


def full(x):
    """Half precision and integers -> float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def colour_exponents(image, dilations, bandwidth):
    """Yield -((|I_kl - I_ij| / std_rgb) / bandwidth)^2 of each of the N neighbours: (B, 3, H, W).

    std_rgb is the unbiased standard deviation of the N neighbours' values. Mean, std_rgb and exponents read
    the neighbours anew, so that no tensor holds all N colours.
    """
    N = 8 * len(dilations)
    mean = sum(neighbours(image, dilations)) / N                                  # (B, 3, H, W)
    squares = sum((neighbour - mean).square_() for neighbour in neighbours(image, dilations))
    std = (squares / (N - 1)).sqrt()                                              # (B, 3, H, W)
    factor = -1 / ((std + EPS) * bandwidth) ** 2
    for neighbour in neighbours(image, dilations):
        yield (neighbour - image).square_().mul_(factor)


@torch.no_grad()
def affinity(image, dilations=DILATIONS, omega3=OMEGA3, bandwidth=BANDWIDTH):
    """Eq. 4: k = softmax(k_rgb) + omega3 * softmax(k_pos), both over the N neighbours.

    image    (B, 3, H, W), any range: colour differences are divided by their own standard deviation
    returns  (B, N, H, W) in fp32, of a float64 image in float64; sums to 1 + omega3 over N

    k_rgb is the mean of `colour_exponents` over the three colours; k_pos = -((distance / std_pos) /
    bandwidth)^2, distances and the standard deviation of all N in pixels.
    """
    image = full(image)
    exponents = colour_exponents(image, dilations, bandwidth)
    first = next(exponents)                               # (B, 3, H, W)
    # Each colour's exponents less the first neighbour's: softmax gives the same. Where a pixel is unlike its
    # surroundings, and these are flat in one colour, all of that colour's exponents are huge, and in fp32 the
    # mean over colours would lose the others'
    k_rgb = [torch.zeros_like(first[:, 0]), *((exponent - first).mean(1) for exponent in exponents)]
    k_rgb = torch.stack(k_rgb, dim=1)                     # (B, N, H, W)
    distance = torch.tensor([math.hypot(*offset) for offset in offsets(dilations)], dtype=image.dtype)
    distance = distance.to(image.device, non_blocking=True)                       # (N,)
    k_pos = -(distance / ((distance.std() + EPS) * bandwidth)) ** 2               # (N,)
    return k_rgb.softmax(1).add_(omega3 * k_pos.softmax(0).view(1, -1, 1, 1))


def average(k, masks, dilations):
    """One iteration, as it is defined: of the N neighbours' masks the sum, weighted by their affinities.

    k (B, N, H, W) of `affinity`, masks (B, C, H, W) -> (B, C, H, W)
    """
    return sum(k[:, j:j + 1] * neighbour for j, neighbour in enumerate(neighbours(masks, dilations)))


# ----------------------------------------------------------------------------
# The same faster: masks as a table with a line for each pixel, neighbours as numbers of its lines


def table(x):
    """A line for each pixel: (n, C, H, W) -> (n HW, C)."""
    return x.flatten(2).transpose(1, 2).flatten(0, 1).contiguous()


def neighbour_index(n, H, W, dilations, device=None):
    """At which line of such a table each pixel's N neighbours are, for n images: (n HW, N) int32.

    An image that holds at each pixel the number of its line is read as masks are, by `neighbours`: in
    float64, since F.pad replicates no integers, and float32 counts to 2^24 only.
    """
    numbers = torch.arange(n * H * W, dtype=torch.float64, device=device).view(n, 1, H, W)
    return torch.cat([table(neighbour).int() for neighbour in neighbours(numbers, dilations)], dim=1)


class PAR(nn.Module):
    """Refine masks with the affinities of an image (Eq. 4). No parameters.

    dilations    distances of the 8 neighbours, in pixels
    iterations   how often each pixel takes its neighbours' average
    omega3       weight of the position term
    bandwidth    of both Gaussians, in standard deviations
    compile      for a GPU: `affinity` and `average` under torch.compile, a few kernels instead of hundreds.
                 The first call takes long, and raises where a compiler is missing (a GPU needs Triton, too)
    """

    def __init__(self, dilations=DILATIONS, iterations=ITERATIONS, omega3=OMEGA3, bandwidth=BANDWIDTH,
                 compile=False):
        super().__init__()
        self.dilations, self.iterations = dilations, iterations
        self.omega3, self.bandwidth = omega3, bandwidth
        self.compiled, self.affinity, self.average = compile, affinity, average
        if compile:
            self.affinity, self.average = (torch.compile(f, fullgraph=True) for f in (affinity, average))

    @torch.no_grad()
    def forward(self, image, masks):
        """image (B, 3, H, W), masks (B, C, h, w) of any size -> (B, C, H, W), fp32, or float64 if masks are.

        Masks are first resized to the image (bilinear, align_corners=True, as AFA does). The weights of a
        pixel sum to 1 + omega3, so `iterations` rounds multiply a constant mask by (1 + omega3)^iterations,
        1.1046 by default; the arg max over channels is unaffected. No gradient passes. Raises ValueError if
        the shapes are others. torch.export takes it with a dynamic B, not with a dynamic H or W.
        """
        if image.ndim != 4 or image.shape[1] != 3 or masks.ndim != 4 or masks.shape[0] != image.shape[0]:
            raise ValueError(f"image {tuple(image.shape)}, masks {tuple(masks.shape)}: (B, 3, H, W) and "
                             f"(B, C, h, w) expected")
        B, _, H, W = image.shape
        masks = F.interpolate(full(masks), size=(H, W), mode="bilinear", align_corners=True)
        if self.compiled or torch.compiler.is_compiling():            # by torch.compile or torch.export
            return self.by_definition(image, masks)
        pixels = PIXELS_AT_ONCE["cuda" if image.is_cuda else "cpu"]
        n = max(1, min(B, pixels // (H * W)))             # images together
        index = neighbour_index(n, H, W, self.dilations, image.device)            # (n HW, N)
        return torch.cat([self.by_table(*some, index) for some in zip(image.split(n), masks.split(n))])

    def by_definition(self, image, masks):
        """All iterations as they are defined: (B, 3, H, W), (B, C, H, W) -> (B, C, H, W)."""
        k = self.affinity(image, self.dilations, self.omega3, self.bandwidth)     # (B, N, H, W)
        k = k.to(masks.dtype)
        for _ in range(self.iterations):
            masks = self.average(k, masks, self.dilations)
        return masks

    def by_table(self, image, masks, index):
        """n images (n, 3, H, W), masks (n, C, H, W), `neighbour_index` of n or more -> (n, C, H, W)."""
        n, C, H, W = masks.shape
        k = self.affinity(image, self.dilations, self.omega3, self.bandwidth)     # (n, N, H, W)
        weights = table(k.to(masks.dtype))                                        # (n HW, N)
        del k                                             # as large as the weights: free it
        index = index[:n * H * W]                         # (n HW, N); the last images may be fewer
        lines = table(masks)                                                      # (n HW, C)
        for _ in range(self.iterations):                  # lines[p] = sum_j weights[p, j] lines[index[p, j]]
            lines = F.embedding_bag(index, lines, mode="sum", per_sample_weights=weights)
        return lines.view(n, H, W, C).permute(0, 3, 1, 2)                         # (n, C, H, W)


# ----------------------------------------------------------------------------
# The concept in one picture


def example(size=160):
    """A scene: image (1, 3, size, size) in 0..1, coarse mask (1, 2, 20, 20), true mask (size, size)."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    angle, radius = torch.atan2(y, x), torch.hypot(x, y)
    truth = (radius < 0.55 + 0.18 * torch.cos(5 * angle)).float()                 # a flower
    noise = torch.randn(3, size, size, generator=torch.Generator().manual_seed(0)) * 0.03
    ground = torch.stack([0.35 + 0.1 * y, 0.45 + 0.1 * x, 0.4 + 0 * x])
    flower = torch.stack([0.85 - 0.1 * y, 0.7 + 0.1 * x, 0.1 + 0 * x])
    image = (flower * truth + ground * (1 - truth) + noise).clamp(0, 1)
    foreground = F.adaptive_avg_pool2d(truth[None, None], 20)
    return image[None], torch.cat([1 - foreground, foreground], dim=1), truth


def main():
    """Refine the coarse mask of a flower; print how its overlap with the truth grows, and draw it."""
    from PIL import Image, ImageDraw
    image, coarse, truth = example()
    cell, tiles = 250, [("image", image[0])]
    print("iterations   IoU of arg max with the truth")
    for iterations in (0, 1, 3, 10):
        masks = PAR((1, 2, 4, 8), iterations)(image, coarse)
        flower = masks.argmax(1)[0].bool()
        iou = (flower & truth.bool()).sum() / (flower | truth.bool()).sum()
        print(f"{iterations:10}   {100 * iou:.1f}")
        share = (masks[0, 1] / masks[0].sum(0)).expand(3, -1, -1)
        tiles.append((f"after {iterations}: IoU {100 * iou:.1f}", share))
    y, x = 80, 133                                                                # a pixel beside the edge
    weights = affinity(image, (1, 2, 4, 8))[0, :, y, x]
    picture = image[0] * 0.5
    for weight, (dy, dx) in zip(weights / weights.max(), offsets((1, 2, 4, 8))):
        picture[:, y + dy, x + dx] = weight.sqrt()
    picture[:, y, x] = torch.tensor([1.0, 0, 0])
    zoom = F.interpolate(picture[None, :, y - 12:y + 12, x - 12:x + 12], size=240, mode="nearest")[0]
    tiles.append(("weights of the red pixel: none black, most white", zoom))
    page = Image.new("RGB", (len(tiles) * (cell + 10) + 10, cell + 40), "white")
    for i, (title, pixels) in enumerate(tiles):
        tile = Image.fromarray((pixels.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())
        page.paste(tile.resize((cell, cell), Image.NEAREST), (10 + i * (cell + 10), 30))
        ImageDraw.Draw(page).text((10 + i * (cell + 10), 10), title, "black")
    page.save("par.png")
    print(f"wrote par.png; the {len(weights)} weights of a pixel sum to {weights.sum():.2f} = 1 + omega3")


if __name__ == "__main__":
    main()
