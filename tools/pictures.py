"""All that this project draws of a run: panels, curves, overlays, the sheet of clusters. No program.

    colours, text -> page(), outlined(), plot() -> stages() of Fig. 2 -> panels(), cluster_sheet(), curves()
    -> of_run()

train.py draws with it where a run ends, eval.py its overlays and legend; tools/show.py is the program for
single photographs.
"""

import colorsys
import json
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from scipy.ndimage import distance_transform_edt, maximum_filter, minimum_filter

import cam
import data
from eval import chunks, run_par, segment
from losses import pseudo_masks
from model import normalise

SHEET = 500                                               # images that clusters.png is made from, at most
TILE = 160                                                # pixels: side of a tile on a page
LINE_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#222222")


# ----------------------------------------------------------------------------
# Colours of classes, and text

# black, then Okabe and Ito's seven, which the colour-blind tell apart; more in `class_colours`
OWN_COLOURS = ((0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178),
               (213, 94, 0), (204, 121, 167))
# the first that has all letters of a text; Pillow's own has those of ASCII
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf",
         "arial.ttf", "msgothic.ttc")
CYRILLIC = dict(zip("абвгдеёжзийклмнопрстуфхцчшщъыьэюя", "a b v g d e yo zh z i y k l m n o p r s t u f kh "
                    "ts ch sh shch ' y ' e yu ya".split()))
LATIN = {"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ı": "i"}


def class_colours(checkpoint):
    """Colour of each class index, (256, 3) uint8: VOC's, or those for classes of one's own."""
    colours = data.palette()
    if checkpoint["args"]["data"] == "folder":
        hues = [0.618034 * c % 1 for c in range(256)]     # golden ratio: neighbours lie far apart
        colours[:] = [[round(255 * x) for x in colorsys.hsv_to_rgb(hue, 0.5 + c % 2 / 2, 0.5 + c % 3 / 4)]
                      for c, hue in enumerate(hues)]
        colours[:len(OWN_COLOURS)] = OWN_COLOURS
        colours[data.VOID] = 224, 224, 192                # as VOC's
    return colours


@lru_cache
def fonts(size):
    """Those of FONTS that this machine has, and Pillow's own, in pixels."""
    there = []
    for name in FONTS:
        try:
            there.append(ImageFont.truetype(name, size))
        except OSError:
            pass
    return [*there, ImageFont.load_default(size)]


def has_letters(font, text):
    missing = bytes(font.getmask("\U0010ffff"))          # what a font draws for a letter that it lacks
    return all(bytes(font.getmask(letter)) != missing for letter in text)


def transliterated(text):
    """Text in ASCII: ö -> o, ж -> zh; what has no such form becomes "?"."""
    letters = []
    for c in text:
        small = (CYRILLIC | LATIN).get(c.lower(), c.lower())
        letters.append(small if c == c.lower() else small.capitalize())
    decomposed = unicodedata.normalize("NFKD", "".join(letters))                  # ö -> o and its accent
    return "".join(c for c in decomposed if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def write(pen, place, text, colour="black", size=12, width=None, **how):
    """Draw text by `pen`, in a font that has its letters, shortened at its end to `width` pixels."""
    font = next((font for font in fonts(size) if has_letters(font, text)), None)
    if font is None:
        text, font = transliterated(text), fonts(size)[-1]
    shown = text
    while text and width is not None and pen.textlength(shown, font) > width:
        text = text[:-1]
        shown = text + ".."
    pen.text(place, shown, colour, font, **how)


# ----------------------------------------------------------------------------
# Tiles, pages, plots


def grey(values, size):
    """(h, w) in 0..1 -> uint8 (size, size, 3), so that the patches can be seen."""
    tile = Image.fromarray((np.asarray(values).clip(0, 1) * 255).astype(np.uint8)).convert("RGB")
    return np.array(tile.resize((size, size), Image.NEAREST))


def page(rows, titles, checkpoint=None):
    """A picture of rows of uint8 (S, S, 3) tiles under titles, with a legend of the checkpoint's classes."""
    gap, head, line = 6, 24, 18                           # pixels
    columns = len(titles)
    names = checkpoint["names"] if checkpoint else []
    shown = [c for c, name in enumerate(names) if names.index(name) == c]         # each name once
    bottom = head + len(rows) * (TILE + gap)              # of the tiles; the legend follows
    sheet = Image.new("RGB", (columns * (TILE + gap) + gap, bottom + line * -(-len(shown) // columns) + gap),
                      "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        write(pen, (gap + column * (TILE + gap), 6), title, width=TILE)
    for r, row in enumerate(rows):
        for column, tile in enumerate(row):
            picture = Image.fromarray(tile).resize((TILE, TILE), Image.NEAREST)
            sheet.paste(picture, (gap + column * (TILE + gap), head + r * (TILE + gap)))
    for place, c in enumerate(shown):
        x, y = gap + place % columns * (TILE + gap), bottom + line * (place // columns)
        colour = tuple(class_colours(checkpoint)[c].tolist())
        pen.rectangle([x, y + 1, x + 12, y + 13], fill=colour, outline="grey")
        write(pen, (x + 16, y), f"{c} {names[c]}", width=TILE - 16)
    return sheet


def legend(checkpoint):
    """A picture of the classes' colours, numbers and names."""
    return page([], ["legend", *[""] * 5], checkpoint)


def outlined(image, mask, colours, names=None):
    """A photograph with its mask: uint8 (H, W, 3), classes (H, W), or VOID -> a picture of its size.

    Classes are tinted in `colours` (256, 3) and outlined, with a white line around. Where the mask is VOID
    the photograph stays as it is. With `names` each class of more than 0.2 % is named where it is widest.
    """
    longest = max(mask.shape)
    tint = colours[mask]                                                          # (H, W, 3)
    picture = np.array(Image.blend(Image.fromarray(image), Image.fromarray(tint), 0.4))
    width = 1 + 2 * max(1, longest // 400)                # pixels, of an outline
    edge = maximum_filter(mask, width) != minimum_filter(mask, width)             # (H, W)
    rest = mask == data.VOID
    picture[edge] = tint[edge]
    picture[rest] = image[rest]
    picture[edge & rest] = 255
    overlay = Image.fromarray(picture)
    if names:
        write_names(overlay, mask, names)
    return overlay


def write_names(picture, mask, names):
    """Write the name of each class of more than 0.2 % of mask (H, W) where it is widest, in the picture."""
    size, longest = np.array(picture.size), max(picture.size)
    letters = max(12, longest // 40)                      # pixels, of the font
    step = 1 + longest // 256                             # the mask is searched in steps of so many pixels
    small = np.pad(mask[::step, ::step], 1, constant_values=data.VOID)
    pixels = np.bincount(small.flatten(), minlength=256)[:data.VOID]
    pen = ImageDraw.Draw(picture)
    for c in np.flatnonzero(500 * pixels > small.size):
        y, x = np.unravel_index(distance_transform_edt(small == c).argmax(), small.shape)
        half = np.array([min(size[0], letters * len(names[c])) / 2, letters])     # of the name's size
        place = np.clip([(x - 1) * step, (y - 1) * step], half, np.maximum(size - half, half))
        write(pen, tuple(place), names[c], "white", letters, width=size[0], anchor="mm",
              stroke_width=letters // 8, stroke_fill="black")


def plot(pen, left, title, lines, axis="epoch", mark=None):
    """One plot of lines {name: [(epoch, value), ...]} with its axes, drawn by `pen` from pixel `left` on.

    mark   (epoch, words): a dashed line there
    """
    top, width, height = 40, 380, 250
    values = [value for line in lines.values() for _, value in line]
    epochs = sorted({epoch for line in lines.values() for epoch, _ in line})
    last = epochs[-1]
    grain = next(g for g in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if max(values) <= 6 * g or g == 100)
    steps = np.arange(np.floor(min(0.0, *values) / grain), np.ceil(max(values) / grain) + 1) * grain
    low, high = steps[0], steps[-1]

    def place(epoch, value):
        return left + width * epoch / last, top + height * (1 - (value - low) / (high - low))

    pen.rectangle([left, top, left + width, top + height], outline="#bbbbbb")
    write(pen, (left, 8), title)
    for value in steps:
        write(pen, (left - 42, place(0, value)[1] - 7), f"{value:g}", "#666666")
        pen.line([place(0, value), place(last, value)], fill="#eeeeee")
    write(pen, (left - 42, top + height + 6), axis, "#666666")
    for epoch in epochs[::-len(epochs) // 12]:            # twelve at most, from the last back
        write(pen, (place(epoch, low)[0], top + height + 6), str(epoch), "#666666", anchor="ma")
    if mark and mark[0] <= last:
        x = place(mark[0], low)[0]
        for y in range(top, top + height, 8):
            pen.line([x, y, x, y + 4], fill="#999999")
        write(pen, (x + 4, top + 2), mark[1], "#666666", width=left + width - x)
    for i, (name, line) in enumerate(lines.items()):
        points = [place(*point) for point in line]
        if len(points) > 1:
            pen.line(points, fill=LINE_COLOURS[i], width=2)
        for x, y in points:
            pen.ellipse([x - 2, y - 2, x + 2, y + 2], fill=LINE_COLOURS[i])
        write(pen, (left + 90 * i, top + height + 24), name, LINE_COLOURS[i], width=86)


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
    cams = cam.min_max(maps)                                                      # (B, K, h, w)
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
    colours = class_colours(checkpoint)
    colour_of = colours[np.array(checkpoint["assignment"])]                       # (clusters, 3)
    rows = []
    for i in range(len(images)):
        row = [images[i], grey(stage.attention[i], images.shape[1])]
        row += [colour_of[mask[i]] for mask in (stage.coarse, stage.pseudo, stage.student)]
        rows.append(row + ([colours[labels[i]]] if labels is not None else []))
    titles = ["image", "attention", "coarse label", "pseudo label", "prediction", "truth"]
    return page(rows, titles[:len(rows[0])], checkpoint)


# ----------------------------------------------------------------------------
# The clusters of a folder, and the curves of a log


def masks_of(network, checkpoint, source):
    """Classes of the images of a data set, squashed as in training: indices (n,), masks (n, S, S) uint8.

    Of more than SHEET images every n-th is taken.
    """
    size, assignment = checkpoint["args"]["size"], np.array(checkpoint["assignment"], np.uint8)
    chosen = np.arange(0, len(source), -(-len(source) // SHEET))
    masks = []
    for chunk in chunks(len(chosen)):
        images = np.stack([source.squashed(i, size) for i in chosen[chunk]])
        masks.append(segment(network, checkpoint["rates"], images, (size, size)).cpu())
    return chosen, assignment[np.concatenate(masks)]


def cluster_sheet(network, checkpoint, source, columns=6):
    """A picture: of each class number, name and share, and the images that show it most, the rest darkened.

    source    training data set, each of whose images weighs the same
    """
    names, colours = checkpoint["names"], class_colours(checkpoint)
    chosen, masks = masks_of(network, checkpoint, source)
    pixels = np.stack([np.bincount(mask.flatten(), minlength=len(names)) for mask in masks])      # (n, N)
    rows = []
    for c in np.unique(checkpoint["assignment"]):
        shows = pixels[:, c] > 0                          # (n,) which images
        share = f"{100 * pixels[:, c].sum() / pixels.sum():.1f} % of all pixels"
        where = f"{shows.sum()} of {len(chosen)} images" if shows.any() else "lost: in no image"
        row = [class_tile(colours[c], [str(c), names[c], share, where])]
        for i in (-pixels[:, c]).argsort(kind="stable")[:min(columns, shows.sum())]:
            row.append(shown_alone(source.image(chosen[i]), masks[i] == c, colours))
        rows.append(row)
    return page(rows, ["class", "images that show it most", *[""] * (columns - 1)])


def class_tile(colour, lines):
    """A tile in the colour of a class, with lines of text: uint8 (TILE, TILE, 3)."""
    tile = Image.new("RGB", (TILE, TILE), tuple(colour.tolist()))
    for i, line in enumerate(lines):
        write(ImageDraw.Draw(tile), (8, 8 + 18 * i), line, "white", 14, TILE - 16, stroke_width=2,
              stroke_fill="black")
    return np.array(tile)


def shown_alone(image, pixels, colours):
    """A photograph (H, W, 3), all but the `pixels` (S, S) bool of it darkened: uint8 (TILE, TILE, 3)."""
    photo = Image.fromarray(image)
    photo.thumbnail((TILE, TILE))
    mask = Image.fromarray(np.where(pixels, data.VOID, 0).astype(np.uint8)).resize(photo.size, Image.NEAREST)
    picture = outlined(np.array(photo), np.array(mask), colours)
    return np.array(ImageOps.pad(picture, (TILE, TILE), color="white"))


def curves(log, teacher_start=None):
    """A picture of the losses and scores of log.jsonl by epoch, in two plots.

    teacher_start   epoch from which the teacher takes part, if it does
    """
    records = [json.loads(line) for line in Path(log).read_text().splitlines()]
    epochs = sorted({record["epoch"] for record in records})

    def means(key):
        """[(epoch, mean over its steps)]; of scores an epoch's last step alone has one."""
        of_epoch = {epoch: [r[key] for r in records if r["epoch"] == epoch and key in r] for epoch in epochs}
        return [(epoch, float(np.mean(values))) for epoch, values in of_epoch.items() if values]

    plots = {"losses (mean of an epoch)": {key: means(key) for key in ("seg", "ce", "un", "cls", "all")},
             "percent, on val": {name: means(key) for name, key in {
                 "mIoU": "miou", "accuracy": "accuracy", "CAM's mIoU": "cam_miou",
                 "teacher's": "teacher_miou"}.items()},
             "clusters in use": {"clusters": means("clusters")}}
    # a folder has no val; and where there is one, its mIoU says more than how many clusters are in use
    shown = list(plots)[:2] if plots["percent, on val"]["mIoU"] else list(plots)[::2]
    sheet = Image.new("RGB", (450 * len(shown), 340), "white")
    for p, title in enumerate(shown):
        lines = {name: line for name, line in plots[title].items() if line}
        words = "teacher takes part" if p == 0 else ""    # the second plot has lines where they would stand
        mark = (teacher_start, words) if teacher_start in epochs else None
        plot(ImageDraw.Draw(sheet), 50 + 450 * p, title, lines, mark=mark)
    return sheet


def of_run(out, network, checkpoint, images, labels, source):
    """Write the pictures of a run that is done into its folder; returns their names.

    images (n, S, S, 3), labels (n, S, S) of val; of a folder training images and None, and clusters.png, too
    """
    args = checkpoint["args"]
    teacher_start = None if args["teacher"] == "none" else args["teacher_start"] + 1
    pictures = {"panels.png": panels(network, checkpoint, images[:6], None if labels is None else labels[:6]),
                "curves.png": curves(out / "log.jsonl", teacher_start)}
    if labels is None:
        pictures["clusters.png"] = cluster_sheet(network, checkpoint, source)
    for name, picture in pictures.items():
        data.write_whole(out / name, lambda f: picture.save(f, "PNG"))
    return list(pictures)
