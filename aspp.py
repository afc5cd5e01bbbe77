"""ASPP with a dynamic dilation table (DMSA Sec. 3.1, Eq. 1, Table 1).

(B, D, h, w) patch features -> (B, D, h, w), the same size at every rate. In DMSA they are msa, what the last
multi-head self-attention adds to the tokens x, which become x + msa + 0.1 aspp(msa) (decision 30). The
dilation rates change with the epoch, the weights stay.

    TABLE_1 -> dilation_rates(), output_size() (Eq. 1) -> Branch -> class ASPP -> main()

Needs torch only (the picture of `python aspp.py` needs pillow): copy this file anywhere. "Decision N" is row
N of docs/decisions.md in the DMSA repository, which says what was chosen where the paper is silent.

    python aspp.py        # writes aspp.png: what the four rows of Table 1 see on a 20 x 20 grid
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

# Table 1, by epoch mod 10. The first number of a row is the 1x1 branch's: one tap, which no rate can move, so
# that it is 1 in every row; the other three are the dilation rates of the 3x3 branches (decision 3).
TABLE_1 = {
    1: (1, 1, 2, 3), 3: (1, 1, 2, 3), 5: (1, 1, 2, 3), 7: (1, 1, 2, 3),
    2: (1, 1, 3, 5), 4: (1, 1, 3, 5), 6: (1, 1, 3, 5),
    8: (1, 3, 6, 9), 9: (1, 3, 6, 9),
    0: (1, 6, 12, 18),                                   # DeepLabV3+ at output stride 16
}
DEEPLAB_RATES = TABLE_1[0]


def dilation_rates(epoch):
    """Four dilation rates, in patches, for `epoch` (Table 1: k = epoch mod 10).

    epoch    int >= 1; the first epoch is 1 (decision 4). A checkpoint is evaluated at its own epoch's rates
    returns  (1, r1, r2, r3)
    raises   ValueError if epoch < 1
    """
    if epoch < 1:
        raise ValueError(f"epochs count from 1 (Table 1), got {epoch}")
    return TABLE_1[epoch % 10]


def output_size(m, kernel=3, rate=1, padding=0, stride=1):
    """Eq. 1: M = (m + 2p - k') / s + 1, with the effective kernel k' = k + (k - 1)(r - 1).

    m and the result are the side of the feature map, before and after, in patches.
    The paper rounds the quotient up; every convolution library rounds it down (decision 5). At stride 1
    nothing is rounded, and padding p = r gives M = m for a 3x3 kernel at every rate: `main` prints it.
    """
    effective = kernel + (kernel - 1) * (rate - 1)
    return (m + 2 * padding - effective) // stride + 1


# ----------------------------------------------------------------------------
# The module: five branches, concatenated and projected, as in DeepLabV3+


class Branch(nn.Module):
    """1x1 convolution -> GroupNorm -> ReLU; `separable`: a 3x3 convolution within each channel comes first.

    dim      channels in, D
    width    channels out, a multiple of 8

    GroupNorm, not BatchNorm: each image is normalised by itself, so that the result depends neither on the
    batch nor on how it is split over processes, and the pooling branch works on one image (decision 6).
    """

    def __init__(self, dim, width, separable=False):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, groups=dim, bias=False) if separable else None
        self.pointwise = nn.Conv2d(dim, width, 1, bias=False)
        self.norm = nn.GroupNorm(width // 8, width)

    def forward(self, x, rate=1):
        """x (B, D, h, w) -> (B, width, h, w); `rate` is the dilation of the 3x3 kernel, in patches."""
        if self.depthwise is not None:  # the weight stays, the rate changes; Eq. 1 with p = r: M = m
            x = F.conv2d(x, self.depthwise.weight, padding=rate, dilation=rate, groups=x.shape[1])
        return F.relu(self.norm(self.pointwise(x)))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling whose rates are an argument of the forward pass (Sec. 3.1).

    dim      channels in and out, D
    width    channels of a branch, a multiple of 8; 256 is DeepLabV3+'s

    A 1x1 branch, three depthwise-separable 3x3 branches at the rates r1, r2, r3, and image pooling; then a
    1x1 projection. The projection starts at zero, so that a new ASPP adds nothing to the pretrained network
    (decision 2).
    """

    def __init__(self, dim, width=256):
        super().__init__()
        if width % 8:
            raise ValueError(f"width {width} is not a multiple of 8, the channels of one normalisation group")
        self.point = Branch(dim, width)
        self.atrous = nn.ModuleList(Branch(dim, width, separable=True) for _ in range(3))
        self.pool = Branch(dim, width)
        self.project = nn.Conv2d(5 * width, dim, 1)
        self.initialize()

    def initialize(self):
        """Kaiming's normal, DeepLabV3+'s, for every convolution; then the projection to zero (decision 2)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def branches(self, x, rates):
        """The five branches before the projection: (B, D, h, w) -> (B, 5 * width, h, w)."""
        _, r1, r2, r3 = rates
        pooled = self.pool(x.mean((2, 3), keepdim=True))                          # (B, width, 1, 1)
        return torch.cat([
            self.point(x),                                                        # (B, width, h, w)
            self.atrous[0](x, r1),                                                # (B, width, h, w)
            self.atrous[1](x, r2),                                                # (B, width, h, w)
            self.atrous[2](x, r3),                                                # (B, width, h, w)
            pooled.expand(-1, -1, *x.shape[2:]),          # (B, width, h, w), the same at every patch
        ], dim=1)

    def forward(self, x, rates):
        """x (B, D, h, w), rates (1, r1, r2, r3) of `dilation_rates`, in patches -> (B, D, h, w).

        Raises ValueError if `rates` is no row of Table 1's form: four numbers of which the first is 1.
        """
        if len(rates) != 4 or rates[0] != 1:
            raise ValueError(f"rates {tuple(rates)}: four numbers that begin with 1 expected, as in Table 1")
        return self.project(self.branches(x, rates))


# ----------------------------------------------------------------------------
# The dilation rates in one picture, and Eq. 1 in numbers


def main():
    """Draw the taps that one patch reads, for the four rows of Table 1; print the sizes that Eq. 1 gives."""
    from PIL import Image, ImageDraw
    grid, centre = 20, 9                                  # patches of a side; row and column of the red one
    cell, gap, top = 14, 24, 40                           # pixels
    colours = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e")                # the centre, then the branches
    rows = [("epoch mod 10 = 1 3 5 7", 1), ("2 4 6", 2), ("8 9", 8), ("0", 10)]
    page = Image.new("RGB", (len(rows) * (grid * cell + gap) + gap, grid * cell + 64), "white")
    draw = ImageDraw.Draw(page)
    print("rates            side of a 20-patch map after each 3x3 branch (Eq. 1, p = r, s = 1)")
    for column, (name, epoch) in enumerate(rows):
        rates = dilation_rates(epoch)
        print(f"{str(rates):16} {[output_size(grid, 3, r, padding=r) for r in rates[1:]]}")
        left = gap + column * (grid * cell + gap)
        outside = sum(rate > grid - 1 - centre for rate in rates[1:])     # branches with taps off the grid
        draw.text((left, 8), f"{name}:  {list(rates)}", "black")
        draw.text((left, 22), f"{outside} of 3 branches read zeros around it" if outside else "", "black")
        draw.text((left, top + grid * cell + 6), "the patch itself", colours[0])
        for y in range(grid):
            for x in range(grid):
                box = [left + x * cell, top + y * cell, left + (x + 1) * cell, top + (y + 1) * cell]
                draw.rectangle(box, outline="#dddddd")
        for branch in (3, 2, 1):
            draw.text((left + 80 * branch, top + grid * cell + 6), f"rate {rates[branch]}", colours[branch])
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    y, x = centre + dy * rates[branch], centre + dx * rates[branch]
                    if 0 <= y < grid and 0 <= x < grid:                   # a tap outside reads zero
                        corner = left + x * cell + 2, top + y * cell + 2
                        draw.rectangle([*corner, corner[0] + 10, corner[1] + 10],
                                       fill=colours[branch if dy or dx else 0])
    page.save("aspp.png")
    print("wrote aspp.png: red the patch itself, blue / green / orange the taps of the three atrous branches")


if __name__ == "__main__":
    main()
