"""All that this project draws of a run: panels, curves, overlays, the sheet of clusters. No program.

    page(), outlined(), plot() -> stages() of Fig. 2 -> panels(), cluster_sheet(), curves() -> of_run()

train.py draws with it where a run ends, eval.py its overlays and legend; tools/show.py is the program for
single photographs.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from scipy.ndimage import distance_transform_edt, maximum_filter, minimum_filter

import cam
import data
from eval import groups, run_par, segment
from losses import min_max, pseudo_masks
from model import normalise

SHEET = 500                                               # images that clusters.png is made from, at most
TILE = 160                                                # pixels: side of a tile on a page
LINE_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#222222")


# ----------------------------------------------------------------------------
# Tiles, pages, plots


def grey(values, size):
    """(h, w) in 0..1 -> uint8 (size, size, 3), so that the patches can be seen."""
    tile = Image.fromarray((np.asarray(values).clip(0, 1) * 255).astype(np.uint8)).convert("RGB")
    return np.array(tile.resize((size, size), Image.NEAREST))


def page(rows, titles, names):
    """A picture of rows of uint8 (S, S, 3) tiles under titles, with a legend of the classes."""
    gap, head, line = 6, 24, 18                           # pixels
    columns, colours = len(titles), data.palette()
    shown = [c for c, name in enumerate(names) if names.index(name) == c]         # each name once
    width = columns * (TILE + gap) + gap
    bottom = head + len(rows) * (TILE + gap)              # of the tiles; the legend follows
    sheet = Image.new("RGB", (width, bottom + line * -(-len(shown) // columns) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((gap + column * (TILE + gap), 8), title, "black")
    for r, row in enumerate(rows):
        for column, tile in enumerate(row):
            tile = Image.fromarray(tile).resize((TILE, TILE), Image.NEAREST)
            sheet.paste(tile, (gap + column * (TILE + gap), head + r * (TILE + gap)))
    for place, c in enumerate(shown):
        x, y = gap + place % columns * (TILE + gap), bottom + line * (place // columns)
        pen.rectangle([x, y + 1, x + 12, y + 13], fill=tuple(colours[c].tolist()), outline="grey")
        pen.text((x + 16, y + 1), names[c][:24], "black")
    return sheet


def legend(names):
    """A picture of the classes' colours and names."""
    return page([], ["legend", *[""] * 5], names)


def outlined(image, mask, names=None):
    """A photograph with its mask: uint8 (H, W, 3), classes (H, W), or VOID -> a picture of its size.

    Classes are tinted and outlined, with a white line around. Where the mask is VOID the photograph stays as
    it is. With `names` each class of more than 0.2 % is named where it is widest.
    """
    longest = max(mask.shape)
    tint = data.palette()[mask]                                                   # (H, W, 3)
    picture = np.array(Image.blend(Image.fromarray(image), Image.fromarray(tint), 0.4))
    width = 1 + 2 * max(1, longest // 400)                # pixels, of an outline
    edge = maximum_filter(mask, width) != minimum_filter(mask, width)             # (H, W)
    rest = mask == data.VOID
    picture[edge] = tint[edge]
    picture[rest] = image[rest]
    picture[edge & rest] = 255
    picture = Image.fromarray(picture)
    if names:
        write_names(picture, mask, names)
    return picture


def write_names(picture, mask, names):
    """Write the name of each class of more than 0.2 % of mask (H, W) where it is widest, in the picture."""
    size, longest = np.array(picture.size), max(picture.size)
    letters = max(10, longest // 40)                      # pixels, of the font
    step = 1 + longest // 256                             # the mask is searched in steps of so many pixels
    small = np.pad(mask[::step, ::step], 1, constant_values=data.VOID)
    pixels = np.bincount(small.flatten(), minlength=256)[:data.VOID]
    pen = ImageDraw.Draw(picture)
    for c in np.flatnonzero(500 * pixels > small.size):
        y, x = np.unravel_index(distance_transform_edt(small == c).argmax(), small.shape)
        half = np.array([pen.textlength(names[c], font_size=letters) / 2, letters])   # of the name's size
        place = np.clip([(x - 1) * step, (y - 1) * step], half, np.maximum(size - half, half))
        pen.text(tuple(place), names[c], "white", anchor="mm", font_size=letters, stroke_width=letters // 8,
                 stroke_fill="black")


def plot(pen, left, title, lines, axis="epoch"):
    """One plot of lines {name: [(epoch, value), ...]} with its axes, drawn by `pen` from pixel `left` on."""
    top, width, height = 40, 380, 250
    values = [value for line in lines.values() for _, value in line]
    epochs = sorted({epoch for line in lines.values() for epoch, _ in line})
    last = epochs[-1]
    grain = next(g for g in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if max(values) <= 6 * g or g == 100)
    marks = np.arange(np.floor(min(0.0, *values) / grain), np.ceil(max(values) / grain) + 1) * grain
    low, high = marks[0], marks[-1]

    def place(epoch, value):
        return left + width * epoch / last, top + height * (1 - (value - low) / (high - low))

    pen.rectangle([left, top, left + width, top + height], outline="#bbbbbb")
    pen.text((left, 8), title, "black")
    for mark in marks:
        pen.text((left - 42, place(0, mark)[1] - 6), f"{mark:g}", "#666666")
        pen.line([place(0, mark), place(last, mark)], fill="#eeeeee")
    pen.text((left - 42, top + height + 6), axis, "#666666")
    for epoch in epochs[::-len(epochs) // 12]:            # twelve at most, from the last back
        pen.text((place(epoch, low)[0] - 3 * len(str(epoch)), top + height + 6), str(epoch), "#666666")
    for i, (name, line) in enumerate(lines.items()):
        points = [place(*point) for point in line]
        if len(points) > 1:
            pen.line(points, fill=LINE_COLOURS[i], width=2)
        for x, y in points:
            pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=LINE_COLOURS[i])
        pen.text((left + 70 * i, top + height + 22), name, LINE_COLOURS[i])


# ----------------------------------------------------------------------------
# The stages of Fig. 2


class Stages(NamedTuple):
    """Every stage of Fig. 2 for B images, on the CPU; masks hold clusters."""
    attention: torch.Tensor      # (B, h, w) in 0..1
    maps: torch.Tensor           # (B, K, h, w), Eq. 5
    coarse: np.ndarray           # (B, S, S), CAM alone
    teacher: np.ndarray          # (B, S, S)
    pseudo: np.ndarray           # (B, S, S), fused, refined
    student: np.ndarray          # (B, S, S)


@torch.no_grad()
def stages(network, checkpoint, image):
    """The Stages of squashed images uint8 (B, S, S, 3), whole, where training sees crops."""
    args, background, rates = checkpoint["args"], checkpoint["background"], checkpoint["rates"]
    device = network.vit.cls_token.device
    pixels = data.to_float(image, device)                                         # (B, 3, S, S)
    normalised = normalise(pixels)
    par = run_par(checkpoint)

    def enlarge(masks):
        return F.interpolate(masks, size=pixels.shape[2:], mode="bilinear")

    def clusters(masks):
        return masks.argmax(1).cpu().numpy()

    _, A = network.vit(normalised)                                                # (B, heads, 1 + hw)
    attention = A[:, :, 1:].mean(1).unflatten(1, network.vit.grid(normalised))    # (B, h, w)
    attention = attention / attention.amax((1, 2), keepdim=True)
    maps = cam.class_activation_maps(network.vit, normalised, checkpoint["centroids"].to(device))
    cams = min_max(maps)                                                          # (B, K, h, w)
    features = network.features(normalised)
    teacher, _ = network.decode(network.teacher, features, rates)                 # (B, N, h, w)
    student, _ = network.decode(network.student, features, rates)                 # (B, N, h, w)
    weight, threshold = args["teacher_weight"], args["threshold"]
    coarse = pseudo_masks(cams, None, weight, background, threshold)              # (B, N, h, w)
    fused = pseudo_masks(cams, teacher if checkpoint["teacher_on"] else None, weight, background, threshold,
                         hard=args["coarse"] == "hard" and par is not None)
    refined = par(pixels, fused) if par else enlarge(fused)                       # (B, N, S, S)
    return Stages(attention.cpu(), maps.cpu(), clusters(enlarge(coarse)), clusters(enlarge(teacher)),
                  clusters(refined), clusters(enlarge(student)))


def panels(network, checkpoint, images, labels):
    """A picture of image, attention, coarse and pseudo label, prediction and truth.

    images uint8 (B, S, S, 3); labels (B, S, S) or None
    """
    stage = stages(network, checkpoint, images)
    colour_of = data.palette()[np.array(checkpoint["assignment"])]                # (clusters, 3)
    rows = []
    for i in range(len(images)):
        row = [images[i], grey(stage.attention[i], images.shape[1])]
        row += [colour_of[mask[i]] for mask in (stage.coarse, stage.pseudo, stage.student)]
        rows.append(row + ([data.palette()[labels[i]]] if labels is not None else []))
    titles = ["image", "attention", "coarse label", "pseudo label", "prediction", "truth"]
    return page(rows, titles[:len(rows[0])], checkpoint["names"])


# ----------------------------------------------------------------------------
# The clusters of a folder, and the curves of a log


def cluster_sheet(network, checkpoint, source, columns=6):
    """A picture: of each class number, name and share, and the images that show it most, the rest darkened.

    source     training data set, whose images are squashed as in training. Each weighs the same; of more than
               SHEET every n-th is taken
    """
    names, size = checkpoint["names"], checkpoint["args"]["size"]
    assignment = np.array(checkpoint["assignment"], np.uint8)                     # cluster -> class
    chosen = np.arange(0, len(source), -(-len(source) // SHEET))                  # indices of the images
    masks = []
    for group in groups(len(chosen)):
        images = np.stack([source.squashed(i, size) for i in chosen[group]])
        masks.append(segment(network, checkpoint["rates"], images, (size, size)).cpu())
    masks = assignment[np.concatenate(masks)]                                     # (n, S, S)
    pixels = np.stack([np.bincount(mask.flatten(), minlength=len(names)) for mask in masks])      # (n, N)
    rows = []
    for c in np.unique(assignment):
        shows = pixels[:, c] > 0                          # (n,) which images
        text = f"{c}\n{names[c][:20]}\n{100 * pixels[:, c].sum() / pixels.sum():.1f} % of all pixels\n" \
               f"in {shows.sum()} of {len(chosen)} images"
        row = [class_tile(c, text)]
        for i in (-pixels[:, c]).argsort(kind="stable")[:min(columns, shows.sum())]:
            row.append(shown_alone(source.image(chosen[i]), masks[i] == c))
        rows.append(row)
    return page(rows, ["class", "images that show it most", *[""] * (columns - 1)], [])


def class_tile(c, text):
    """A tile in the colour of class c, with text: uint8 (TILE, TILE, 3)."""
    tile = Image.new("RGB", (TILE, TILE), tuple(data.palette()[c].tolist()))
    ImageDraw.Draw(tile).text((8, 8), text, "white", font_size=14, stroke_width=2, stroke_fill="black")
    return np.array(tile)


def shown_alone(image, pixels):
    """A photograph (H, W, 3), all but the `pixels` (S, S) bool of it darkened: uint8 (TILE, TILE, 3)."""
    photo = Image.fromarray(image)
    photo.thumbnail((TILE, TILE))
    mask = Image.fromarray(np.where(pixels, data.VOID, 0).astype(np.uint8)).resize(photo.size, Image.NEAREST)
    return np.array(ImageOps.pad(outlined(np.array(photo), np.array(mask)), (TILE, TILE), color="white"))


def curves(log):
    """A picture of the losses and scores of log.jsonl by epoch, in two plots."""
    records = [json.loads(line) for line in Path(log).read_text().splitlines()]
    epochs = sorted({record["epoch"] for record in records})

    def means(key):
        """[(epoch, mean over its steps)]; of scores an epoch's last step alone has one."""
        of_epoch = {epoch: [r[key] for r in records if r["epoch"] == epoch and key in r] for epoch in epochs}
        return [(epoch, float(np.mean(values))) for epoch, values in of_epoch.items() if values]

    plots = [("losses (mean of an epoch)", {key: means(key) for key in ("seg", "ce", "un", "cls", "all")}),
             ("percent, on val", {key: means(key) for key in ("miou", "accuracy", "cam_miou")})]
    plots = [(title, lines) for title, lines in plots if any(lines.values())]     # a folder has no val
    sheet = Image.new("RGB", (450 * len(plots), 340), "white")
    for p, (title, lines) in enumerate(plots):
        plot(ImageDraw.Draw(sheet), 50 + 450 * p, title, lines)
    return sheet


def of_run(out, network, checkpoint, images, labels, source):
    """Write the pictures of a run that is done into its folder; returns their names.

    images (n, S, S, 3), labels (n, S, S) of val; of a folder training images and None, and clusters.png, too
    """
    pictures = {"panels.png": panels(network, checkpoint, images[:6], None if labels is None else labels[:6]),
                "curves.png": curves(out / "log.jsonl")}
    if labels is None:
        pictures["clusters.png"] = cluster_sheet(network, checkpoint, source)
    for name, picture in pictures.items():
        data.write_whole(out / name, lambda f: picture.save(f, "PNG"))
    return list(pictures)
