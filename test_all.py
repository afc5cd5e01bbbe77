"""Every test. Each name is the claim that it proves.

    python -m pytest -q test_all.py                              # needs nothing but this repository
    DMSA_GOLDEN=folder python -m pytest -q test_all.py           # golden numbers from another folder

The expected values are textbook forms written out here, straight from the equation, and golden numbers that
the peers' own code gave (assets/golden). What the golden numbers prove is not proved again more weakly.
"""

import argparse
import ast
import contextlib
import copy
import gzip
import hashlib
import http.server
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import warnings
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy.cluster.vq import vq
from scipy.io import savemat
from scipy.ndimage import gaussian_filter, map_coordinates
from torch.testing import assert_close

import aspp
import cam
import data
import eval as evaluation
import losses
import model
import par
import train
from tools import ablation, bench, get_data, how_many, par_on_photos, pictures, pretrain, show, transfgu

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """No test's random numbers depend on which tests ran before it."""
    torch.manual_seed(0)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_vit(seed=0, depth=3):
    torch.manual_seed(seed)
    vit = model.VisionTransformer(img_size=64, patch_size=8, embed_dim=48, depth=depth, num_heads=4)
    for p in vit.parameters():                            # larger than before training: attention is not flat
        p.data = torch.randn_like(p) * (0.15 if p.ndim > 1 else 0.1) + (p.data if p.ndim == 1 else 0)
    return vit.eval().requires_grad_(False)


def save(path, picture=("RGB", (4, 3), (1, 2, 3)), palette=None, **options):
    """Write an image, an array or one colour as (mode, size, colour), and the folders; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(picture, Image.Image):
        picture = Image.new(*picture) if isinstance(picture, tuple) else Image.fromarray(picture)
    if palette is not None:
        picture.putpalette(palette.flatten().tolist())
    picture.save(path, **options)
    return path


def refused(call, *parts):
    """The UserError of call(): one line that has all `parts`."""
    with pytest.raises(data.UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(str(part) in message for part in parts), message
    return message


def raising(error):
    """A function that raises it."""
    def fail(*args):
        raise error
    return fail


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def by_torchrun(rank, world, port):
    """The environment of a process that torchrun has started."""
    return dict(TORCHELASTIC_RUN_ID="test", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def program(name, *args, world=1, env=None, wait=True, cwd=HERE):
    """Start `world` processes of a program here; returns [(exit code, output)] or the processes."""
    port, started = free_port(), []
    for rank in range(world):
        variables = dict(os.environ, OMP_NUM_THREADS="1") | (env or {})
        if world > 1:
            variables |= by_torchrun(rank, world, port)
        started.append(subprocess.Popen([sys.executable, str(HERE / name), *map(str, args)], cwd=cwd,
                                        env=variables, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    if not wait:
        return started
    texts = [p.communicate(timeout=300)[0] for p in started]
    return [(p.returncode, text) for p, text in zip(started, texts)]


def ends(code, words, name, *args, **options):
    """Run a program here, which has to end with this code and these words; returns all that it said."""
    (found, text), = program(name, *args, **options)
    assert found == code and words in text and "Traceback" not in text, text
    return text


def here(code, words, name, *args):
    """As `ends`, but in this process, which has torch already."""
    mains = {"train.py": lambda: train.main(train.parse()), "eval.py": evaluation.main,
             "tools/show.py": show.main, "tools/how_many.py": how_many.main,
             "tools/ablation.py": ablation.main,
             "tools/transfgu.py": lambda: train.main(transfgu.parse(), transfgu.TransFGU)}
    said = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said),
          contextlib.redirect_stderr(said)):
        patch.setattr(sys, "argv", [name, *map(str, args)])
        result = data.exit_code(mains[name])
    text = said.buffer.getvalue().decode()
    assert result == code and words in text and "Traceback" not in text, text
    return text


# ----------------------------------------------------------------------------
# aspp.py


@pytest.mark.parametrize("epochs, rates", [
    ((1, 3, 5, 7, 11, 27), (1, 1, 2, 3)), ((2, 4, 6, 36), (1, 1, 3, 5)),
    ((8, 9, 19), (1, 3, 6, 9)), ((10, 20, 200), (1, 6, 12, 18))])
def test_dilation_rates_are_table_1_with_epochs_counted_from_1(epochs, rates):
    assert all(aspp.dilation_rates(e) == rates for e in epochs)
    with pytest.raises(ValueError, match="count from 1"):
        aspp.dilation_rates(0)


def test_eq_1_gives_the_size_that_the_convolution_has():
    for m, kernel, rate, padding, stride in ((20, 3, 6, 6, 1), (20, 3, 18, 18, 1), (21, 3, 2, 1, 2),
                                             (15, 5, 1, 0, 3)):
        conv = nn.Conv1d(1, 1, kernel, stride, padding, dilation=rate)
        assert aspp.output_size(m, kernel, rate, padding, stride) == conv(torch.zeros(1, 1, m)).shape[2]


def test_a_new_aspp_adds_nothing_and_keeps_the_size_at_every_rate_of_the_table():
    x = randn(2, 16, 7, 9)
    for epoch in range(1, 11):
        assert torch.equal(aspp.ASPP(16, 16)(x, aspp.dilation_rates(epoch)), torch.zeros_like(x))
    for rates in ((1, 2, 3), (2, 1, 2, 3)):
        with pytest.raises(ValueError, match="four numbers"):
            aspp.ASPP(16, 16)(x, rates)


def test_the_convolutions_of_aspp_start_with_kaimings_normal():
    for name, weight in aspp.ASPP(64, 64).named_parameters():
        if weight.ndim == 4 and not name.startswith("project"):
            weight = weight.detach()
            assert weight.std().item() == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.1), name
            assert weight.abs().max() > 2.5 * weight.std(), name                  # not uniform
    for dim, width in ((384, 256), (128, 128)):           # of a branch: DeepLabV3+'s, or the ViT's if less
        assert model.Head(dim, 4).aspp.project.weight.shape == (dim, 5 * width, 1, 1)


def test_aspp_branches_equal_loops_over_taps_at_their_rates_image_by_image():
    torch.manual_seed(0)
    module, x, rates = aspp.ASPP(8, 16).double(), randn(2, 8, 6, 7).double(), (1, 1, 3, 5)

    def mixed(y, branch):
        y = torch.einsum("oc,bchw->bohw", branch.pointwise.weight[:, :, 0, 0], y)
        return F.relu(torch.cat([F.group_norm(one[None], 2, branch.norm.weight, branch.norm.bias)
                                 for one in y]))

    expected = [mixed(x, module.point)]
    for branch, r in zip(module.atrous, rates[1:]):
        y = torch.zeros_like(x)
        for i, j, dy, dx in np.ndindex(6, 7, 3, 3):
            row, column = i + (dy - 1) * r, j + (dx - 1) * r
            if 0 <= row < 6 and 0 <= column < 7:
                y[:, :, i, j] += branch.depthwise.weight[:, 0, dy, dx] * x[:, :, row, column]
        expected.append(mixed(y, branch))
    expected.append(mixed(x.mean((2, 3), keepdim=True), module.pool).expand(-1, -1, 6, 7))
    assert_close(module.branches(x, rates), torch.cat(expected, 1))


# ----------------------------------------------------------------------------
# par.py


def textbook_par(image, masks, dilations, iterations, omega3=0.01, w=0.3):
    """Eq. 4 as loops over pixels and neighbours, in double precision; image (3, H, W), masks (C, H, W)."""
    image, masks = image.double().numpy(), masks.double().numpy()
    _, H, W = image.shape
    steps = [(dy * d, dx * d) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1)
             if (dy, dx) != (0, 0)]
    distance = np.array([math.sqrt(dy * dy + dx * dx) for dy, dx in steps])
    position = np.exp(-(distance / (distance.std(ddof=1) + 1e-8) / w) ** 2)
    position /= position.sum()
    kernel, at = np.zeros((H, W, len(steps))), np.zeros((H, W, len(steps), 2), int)
    for i, j in np.ndindex(H, W):
        at[i, j] = [(min(max(i + dy, 0), H - 1), min(max(j + dx, 0), W - 1)) for dy, dx in steps]
        seen = image[:, at[i, j, :, 0], at[i, j, :, 1]]
        std = seen.std(1, ddof=1)
        e = -(((seen - image[:, i, j, None]) / (std[:, None] + 1e-8) / w) ** 2).mean(0)
        rgb = np.exp(e - e.max())
        kernel[i, j] = rgb / rgb.sum() + omega3 * position
    for _ in range(iterations):
        masks = np.stack([(m[at[..., 0], at[..., 1]] * kernel).sum(2) for m in masks])
    return torch.from_numpy(masks).float()


@pytest.mark.parametrize("dilations, iterations", [((1, 2, 4, 8, 12, 24), 2), ((1, 2, 4, 8), 3), ((3,), 1)])
def test_par_equals_eq_4_written_as_loops_for_images_of_any_range(dilations, iterations):
    image = torch.rand(2, 3, 13, 10, generator=torch.Generator().manual_seed(1))
    masks = randn(2, 3, 13, 10).softmax(1)
    image[:, :, :6, :5] = 0.4                             # a flat region: uniform weights
    refined = par.PAR(dilations, iterations)(image, masks)
    for n in range(2):
        assert_close(refined[n], textbook_par(image[n], masks[n], dilations, iterations), rtol=0, atol=1e-5)
    assert_close(par.affinity(255 * image, dilations), par.affinity(image, dilations), rtol=1e-3, atol=1e-4)
    assert par.PAR(dilations, 1)(image.half().requires_grad_(), masks.half()).dtype == torch.float32


@pytest.mark.parametrize("value", [0.1, 0.5, 255.0])
def test_a_colour_that_all_neighbours_share_leaves_their_affinities_to_the_other_colours(value):
    image = value * torch.rand(1, 3, 21, 21, generator=torch.Generator().manual_seed(1))
    image[:, 1] = value
    alone = image.clone()
    alone[:, 1, 10, 10] = 0                               # far from its neighbours, whose deviation is 0
    at_10_10 = par.affinity(image)[..., 10, 10]
    assert torch.equal(par.affinity(alone)[..., 10, 10], at_10_10)
    assert_close(par.affinity(image.double())[..., 10, 10].float(), at_10_10, rtol=0, atol=1e-5)
    assert at_10_10.std() > 0.01                          # the other colours tell the neighbours apart


def test_par_is_the_average_of_neighbours_by_eq_4_repeated_also_at_the_border():
    image, masks = torch.rand(3, 3, 9, 14).double(), torch.rand(3, 4, 9, 14).double()
    k, expected = par.affinity(image, (1, 2, 24)), masks                          # 24: beyond every border
    for _ in range(4):
        expected = par.average(k, expected, (1, 2, 24))
    assert_close(par.PAR((1, 2, 24), 4)(image, masks), expected)


def test_par_gives_the_same_however_many_images_it_takes_at_once(monkeypatch):
    image, masks = torch.rand(5, 3, 20, 17), torch.rand(5, 3, 4, 4)
    together = par.PAR()(image, masks)
    for pixels in (1, 2 * 20 * 17):                       # one by one, and 2 + 2 + 1
        monkeypatch.setitem(par.PIXELS_AT_ONCE, "cpu", pixels)
        assert torch.equal(par.PAR()(image, masks), together)


# ----------------------------------------------------------------------------
# losses.py


def test_cams_get_a_background_below_half_the_threshold_and_fusion_weighs_the_teacher():
    cam_maps = torch.tensor([[0.0, 0.04, 0.06, 1.0], [0.0, 0.0, 0.0, 0.2]]).view(1, 2, 1, 4)
    p = losses.with_background(cam.min_max(5 + 3 * cam_maps))                     # any scale and offset
    assert_close(p[0, :, 0], torch.tensor([[0.1, 0.06, 0.04, 0], [0, 0.04, 0.06, 1], [0, 0, 0, 0.2]]))
    assert p.argmax(1).flatten().tolist() == [0, 0, 1, 1]
    assert_close(cam.min_max(cam_maps), cam_maps)
    p = losses.with_background(cam.min_max(torch.full((1, 3, 2, 2), 0.7)))        # constant: not NaN
    assert torch.equal(p[:, 0], torch.full((1, 2, 2), 0.1)) and p[:, 1:].eq(0).all()
    p, teacher = torch.rand(2, 3, 4, 4), randn(2, 3, 4, 4)
    share = torch.exp(teacher) / torch.exp(teacher).sum(1, keepdim=True)
    assert_close(losses.fuse(p, teacher, 0.7), 0.3 * p + 0.7 * share)


def test_the_four_losses_are_those_of_the_textbook():
    logits, label, permutation = randn(2, 4, 3, 3), torch.randint(0, 4, (2, 3, 3)), torch.tensor([2, 0, 3, 1])
    p = (torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)).movedim(1, 3)[..., None, :]
    ce = -p.gather(4, label[..., None, None])[..., 0, 0].log()
    pushed = -p.gather(4, permutation[label][..., None, None])[..., 0, 0].log()
    assert_close(losses.cross_entropy_loss(logits, label, permutation, 0.05), (ce - 0.05 * pushed).mean())
    label[0, :, 0] = torch.arange(3)                      # each of them occurs, the last one does not
    label, void = label.clamp(max=2), torch.where(label == 1, 255, label.clamp(max=2))
    ce = -p.gather(4, label[..., None, None])[..., 0, 0].log()
    of_class, pixels = [ce[label == c].mean() for c in range(3)], [(label == c).sum() for c in range(3)]
    assert len(set(map(int, pixels))) == 3                # of different sizes
    for things in (None, torch.tensor([False, True, True, True])):
        assert_close(losses.segmentation_loss(logits, label, things, by_class=True),
                     (of_class[0] + (of_class[1] + of_class[2]) / 2) / 2)
        assert_close(losses.segmentation_loss(logits, label, things),
                     (of_class[0] + ce[label > 0].mean()) / 2)
    for by_class in (False, True):                        # a class that does not occur does not count
        assert_close(losses.segmentation_loss(logits, void, None, by_class), (of_class[0] + of_class[2]) / 2)
    things = torch.tensor([True, False, True, False])     # whichever classes are things
    assert_close(losses.segmentation_loss(logits, label, things, True),
                 (of_class[1] + (of_class[0] + of_class[2]) / 2) / 2)
    for value in (0, 1):                                  # nor does a half, and it is not NaN
        for by_class in (False, True):
            assert_close(losses.segmentation_loss(logits, torch.full_like(label, value), None, by_class),
                         F.cross_entropy(logits, torch.full_like(label, value)))
        assert losses.segmentation_loss(logits, torch.full_like(label, 255), None, by_class) == 0

    best = torch.tensor([[0.5, 0.2, 0.3], [0.9, 0.1, 0.0], [0.4, 0.4, 0.2]]).T.reshape(1, 3, 1, 3)
    doubt = lambda pixels: losses.uncertainty_loss((best + 1e-9).log(), torch.tensor([[pixels]])).item()
    assert doubt([True, False, True]) == pytest.approx((0.8 + 1.0) / 2, abs=1e-5)
    assert doubt([False] * 3) == 0
    for x in (randn(2, 5, 3, 3).requires_grad_(), randn(1, 2, 4, 4).requires_grad_()):
        p1, p2 = x.softmax(1).topk(2, dim=1).values.unbind(1)
        expected, everywhere = (1 - (p1 - p2)).mean(), torch.ones_like(p1, dtype=torch.bool)
        loss = losses.uncertainty_loss(x, everywhere)
        assert_close(loss, expected)
        assert_close(*(torch.autograd.grad(value, x)[0] for value in (loss, expected)))

    c = randn(2, 4, 5)
    pairs = [1 + F.cosine_similarity(c[b, i], c[b, j], dim=0)
             for b in range(2) for i in range(4) for j in range(i + 1, 4)]
    assert_close(losses.class_loss(c), torch.stack(pairs).mean())
    assert losses.class_loss(torch.ones(1, 3, 4)).item() == pytest.approx(2)


def test_hard_labels_reach_par_as_one_class_a_patch_until_the_teacher_takes_part():
    maps, logits = cam.min_max(torch.rand(2, 3, 4, 5)), randn(2, 4, 4, 5)
    soft = losses.with_background(maps)
    hard = losses.pseudo_masks(maps, None, 0.7, hard=True)
    assert torch.equal(hard, F.one_hot(soft.argmax(1), 4).movedim(3, 1).float())
    assert torch.equal(losses.pseudo_masks(maps, None, 0.7), soft)                # without PAR the same label
    for how in (True, False):
        assert torch.equal(losses.pseudo_masks(maps, logits, 0.7, hard=how), losses.fuse(soft, logits, 0.7))
    assert torch.equal(losses.pseudo_masks(maps, None, 0.5, background=False), maps)              # with stuff
    assert torch.equal(losses.pseudo_masks(maps, logits[:, 1:], 0.5, background=False),
                       losses.fuse(maps, logits[:, 1:], 0.5))


def test_the_threshold_decides_what_is_background_and_which_patches_are_confident():
    maps = torch.tensor([0.05, 0.1, 0.2, 0.31]).view(1, 1, 1, 4).expand(1, 2, 1, 4)
    for threshold, background, confident in ((0.1, 1, 2), (0.3, 2, 1), (0.64, 4, 0)):
        label = losses.pseudo_masks(maps, None, 0.7, threshold=threshold).argmax(1)
        assert (label == 0).sum() == background
        assert losses.confident_patches(maps, threshold=threshold).sum() == confident
    assert losses.confident_patches(maps, background=False).all()                 # with stuff: everywhere


def test_every_loss_keeps_float64_and_has_the_gradient_that_it_should():
    logits, c = randn(2, 3, 2, 2).double().requires_grad_(), randn(2, 3, 4).double().requires_grad_()
    label, permutation = torch.randint(0, 3, (2, 2, 2)), torch.tensor([1, 2, 0])
    for loss in (lambda x: losses.cross_entropy_loss(x, label, permutation, 0.1),
                 lambda x: losses.segmentation_loss(x, label),
                 lambda x: losses.uncertainty_loss(x, label > 0)):
        assert torch.autograd.gradcheck(loss, logits) and loss(logits).dtype == torch.float64
    # of vectors of unit length, as the decoder gives them
    assert torch.autograd.gradcheck(lambda x: losses.class_loss(F.normalize(x, dim=2)), c)
    assert losses.class_loss(c.bfloat16()).dtype == losses.class_loss(c.half()).dtype == torch.float32


def test_losses_and_counts_leave_out_255_and_take_any_integers():
    logits, label = randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    void, permutation = torch.rand(2, 4, 5) < 0.3, torch.tensor([1, 2, 0])
    marked = label.masked_fill(void, 255).to(torch.uint8)
    kept = logits.permute(0, 2, 3, 1)[~void].T[None, :, None], label[~void][None, None]   # 1 x n pixels
    for loss in (losses.cross_entropy_loss, losses.segmentation_loss,
                 lambda x, y: losses.cross_entropy_loss(x, y, permutation, 0.1)):
        torch.testing.assert_close(loss(logits, marked), loss(*kept))
    counts = losses.pixel_counts(marked.long(), label > 0, 3)
    assert counts.tolist() == [2, (label > 0).sum(), *((kept[1] == c).sum() for c in range(3))]
    marked[:], confident = 255, label < 0                 # no pixel counts: 0, not NaN
    counts = losses.pixel_counts(marked.long(), confident, 3)
    found = losses.dmsa_losses(logits, randn(2, 3, 4), marked, confident, counts, torch.arange(3) > 0, True,
                               (1, 1, 1, 0))
    assert found["all"] == 0


def test_what_broadcasting_would_hide_is_refused_by_name():
    logits, label, image = randn(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long), torch.rand(2, 3, 8, 8)
    vit = small_vit()
    cases = {"label (2, 1, 4, 5)": lambda: losses.cross_entropy_loss(logits, label[:, None]),
             "label (2, 2, 4, 5)": lambda: losses.segmentation_loss(logits, torch.stack([label, label], 1)),
             "pixels (2, 1, 4, 5)": lambda: losses.uncertainty_loss(logits, label[:, None] > 0),
             "two classes at least": lambda: losses.uncertainty_loss(logits[:, :1], label > 0),
             "at least two classes": lambda: losses.class_loss(torch.ones(2, 1, 4)),
             "CAM (2, 1, 4, 5)": lambda: losses.fuse(logits[:, :1], logits, 0.5),
             "image (2, 8, 8, 3)": lambda: par.PAR()(image.permute(0, 2, 3, 1), logits),
             "masks (3, 3, 4, 5)": lambda: par.PAR()(image, randn(3, 3, 4, 5)),
             "image (3, 8, 8)": lambda: par.PAR()(image[0], logits[0]),
             "uint8": lambda: model.normalise(image.byte()),
             "divide by 255": lambda: data.augment(image.byte(), data.draw(0, 1, [0, 1])),
             "float32": lambda: data.squash(np.zeros((4, 4, 3), np.float32), 2),
             "centroids (48,)": lambda: cam.class_activation_maps(vit, randn(1, 3, 64, 64), randn(48)),
             "one at a time": lambda: cam.window_features(vit, randn(2, 3, 64, 64), 32),
             "0..2 expected": lambda: evaluation.confusion_matrix([0, 1], [0, 3], 3)}
    for message, call in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_crops_and_colours_keep_the_type_that_they_are_given():
    draws, x = data.draw(0, 1, [0, 1]), torch.rand(2, 3, 16, 16)
    for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for mode in ("bilinear", "nearest", "area"):
            cut = data.crop(x.to(kind), draws, 8, mode)
            assert_close(cut.float(), data.crop(x, draws, 8, mode), rtol=0, atol=1e-2)
            assert cut.dtype == kind
        assert data.augment(x.to(kind), draws).dtype == kind
    label = torch.randint(0, 255, (2, 1, 16, 16), dtype=torch.uint8)
    assert data.crop(label, draws, 8, "nearest").dtype == torch.uint8


def test_par_keeps_float64_and_takes_half_precision():
    image, masks = torch.rand(1, 3, 9, 9), torch.rand(1, 2, 3, 3)
    exact = par.PAR((1, 2))(image.double(), masks.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(par.PAR((1, 2))(image, masks).double(), exact, rtol=1e-5, atol=1e-6)
    assert par.PAR((1, 2))(image.half(), masks.half()).dtype == torch.float32


def test_network_and_par_export_with_a_dynamic_batch():
    class Segment(nn.Module):
        network = model.DMSA(small_vit(), 4).eval()

        def forward(self, image):
            return self.network(image, (1, 1, 2, 3))

    batch = torch.export.Dim("batch", min=1, max=64)
    for module, names, shapes in ((Segment(), ("image",), [(3, 32, 40)]),
                                  (par.PAR((1, 2)), ("image", "masks"), [(3, 12, 10), (4, 3, 5)])):
        module.eval()
        exported = torch.export.export(module, tuple(torch.rand(2, *shape) for shape in shapes),
                                       dynamic_shapes={name: {0: batch} for name in names}).module()
        inputs = [torch.rand(5, *shape) for shape in shapes]
        torch.testing.assert_close(exported(*inputs), module(*inputs))


def test_the_parts_of_a_training_step_compile_without_a_break_and_give_the_same():
    network, draws, things = model.DMSA(small_vit(depth=1), 4), data.draw(0, 1, [0, 1]), torch.arange(4) > 0

    def step(image, label):
        seen = model.normalise(data.augment(data.crop(image, draws, 32), draws))
        logits, c = network.decode(network.student, network.features(seen), (1, 1, 2, 3))
        counts = losses.pixel_counts(label, label > 1, 4)
        return losses.dmsa_losses(logits, c, label, label > 1, counts, things, True, (0.3, 1, 0.3, 1))["all"]

    image, label, masks = torch.rand(2, 3, 64, 64), torch.randint(0, 4, (2, 4, 4)), torch.rand(2, 4, 8, 8)
    for form, inputs in ((step, (image, label)), (par.PAR((1, 2)), (image, masks))):
        compiled = torch.compile(form, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), form(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_par_compiled_gives_the_same_and_is_two_functions_without_a_break(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config.cpp, "simdlen", 0)                 # such code compiles faster
    image, masks = torch.rand(2, 3, 16, 12), torch.rand(2, 3, 4, 3)
    compiled = par.PAR((1,), compile=True)
    torch.testing.assert_close(compiled(image, masks), par.PAR((1,))(image, masks), rtol=1e-4, atol=1e-5)
    seen, ran = [], []
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: seen.append((function, fullgraph)) or (
        lambda *args: ran.append(function) or function(*args)))
    par.PAR((1,), 3, compile=True)(image, masks)
    assert seen == [(par.affinity, True), (par.average, True)]
    assert ran == [par.affinity, *[par.average] * 3]


def test_a_run_that_shall_compile_without_a_compiler_is_refused_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))      # the first that torch tries, and it has no other
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    text = ends(2, "leave --compile out", "train.py", *RUN, "--compile", "--out", tmp_path / "run")
    assert "C++ compiler" in text and text.count("\n") == 1, text
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize("by_class", [False, True])
def test_losses_of_the_micro_batches_of_a_batch_add_up_to_those_of_the_whole(by_class):
    label = torch.randint(0, 4, (6, 5, 5), generator=torch.Generator().manual_seed(0))
    label[:2] = 0                                         # very different shares of foreground
    label[4:] = label[4:].clamp(max=2)                    # a class that one micro-batch alone has
    foreground, things = label > 1, torch.arange(4) > 0
    logits, embeddings = randn(6, 4, 5, 5).requires_grad_(), randn(6, 4, 8).requires_grad_()
    counts = sum(losses.pixel_counts(label[s], foreground[s], 4) for s in (slice(0, 2), slice(2, 6)))
    run = lambda s: losses.dmsa_losses(logits[s], embeddings[s], label[s], foreground[s], counts, things,
                                       by_class, (0.3, 1, 0.3, 1), True, torch.tensor([1, 2, 3, 0]), 0.05)
    whole = run(slice(0, 6))
    gradient = torch.autograd.grad(whole["all"], (logits, embeddings))
    pieces = [run(slice(i, i + 2)) for i in (0, 2, 4)]
    for name in whole:
        assert_close(sum(p[name] for p in pieces), whole[name])
    for a, b in zip(torch.autograd.grad(sum(p["all"] for p in pieces), (logits, embeddings)), gradient):
        assert_close(a, b)
    assert_close(whole["seg"], losses.segmentation_loss(logits, label, None, by_class))
    assert_close(whole["un"], losses.uncertainty_loss(logits[:, 1:], foreground))
    assert_close(whole["all"], 0.3 * whole["seg"] + whole["ce"] + 0.3 * whole["un"] + whole["cls"])


# ----------------------------------------------------------------------------
# cam.py


def test_windows_equal_transfgus_rule_written_as_loops_also_when_not_square_or_odd():
    for h, w in ((20, 28), (15, 15), (11, 24)):
        expected = []
        for scale in cam.THING_SCALES:
            s = int(min(h * scale, w * scale))
            for y, x in np.ndindex(h, w):
                if x - s / 2 >= 0 and y - s / 2 >= 0 and x + s / 2 < w and y + s / 2 < h:
                    left, top = x - s / 2 == 0, y - s / 2 == 0
                    right, bottom = x + s / 2 == w - 1, y + s / 2 == h - 1
                    on_x, on_y = x % (s / 2) == 0, y % (s / 2) == 0
                    if (on_x and on_y or on_y and (left or right) or on_x and (top or bottom)
                            or right and bottom):
                        expected.append([x - s // 2, y - s // 2, x + s // 2 + 1, y + s // 2 + 1])
        assert cam.windows(h, w, 1).tolist() == [[x0, y0, x1 - 1, y1 - 1] for x0, y0, x1, y1 in expected]


def test_the_foreground_is_what_cls_attends_to_more_than_average_among_patches():
    A = torch.rand(2, 3, 1 + 4 + 6)                       # CLS, four registers, 2 x 3 patches
    mean = A[:, :, 5:].mean(1)
    assert torch.equal(cam.attended_patches(A, (2, 3)).flatten(1), mean > mean.mean(1, keepdim=True))


def test_class_activation_maps_equal_k_full_backward_passes():
    """TransFGU's way: an explicit attention map of the last block, one backward pass a class, one image."""
    vit, image, centroids = small_vit(), randn(2, 3, 64, 64, seed=3), randn(4, 48, seed=4)
    maps = cam.class_activation_maps(vit, image, centroids)
    for n in range(2):
        block, (x, *_) = vit.blocks[-1], vit.last_qkv(image[n:n + 1])
        q, k, v = block.attn.split(block.norm1(x))
        A = (q @ k.transpose(2, 3) / math.sqrt(12)).softmax(3).requires_grad_()
        y = x + block.attn.proj((A @ v).transpose(1, 2).flatten(2))
        feature = vit.norm(y + block.mlp(block.norm2(y)))[:, 0]
        base = A[0, :, 0, 1:].mean(0).detach()
        for c in range(4):
            g, = torch.autograd.grad((1 - F.cosine_similarity(feature, centroids[c:c + 1])).mean(), A,
                                     retain_graph=True)
            g = g[0, :, 0, 1:].mean(0)
            fg = F.relu(-g)
            order, kept, total = fg.argsort(), torch.zeros(64), 0.0
            for i in order:
                total += fg[i]
                kept[i] = float(total > 0.2 * fg.sum())
            expected = (base / base.max() + fg * kept) * (g <= 0)
            assert_close(maps[n, c].flatten(), expected, rtol=1e-4, atol=1e-5)


class TimmLike(nn.Module):
    """A ViT with timm's names and order, LayerScale if asked for."""

    class Block(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.norm1, self.attn, self.norm2 = nn.LayerNorm(24), nn.Module(), nn.LayerNorm(24)
            self.attn.qkv, self.attn.proj, self.attn.num_heads = nn.Linear(24, 72), nn.Linear(24, 24), 3
            self.mlp, self.scale = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24)), scale

        def forward(self, x):
            q, k, v = self.attn.qkv(self.norm1(x)).unflatten(2, (3, 3, -1)).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self.scale * self.attn.proj(attended)
            return x + self.scale * self.mlp(self.norm2(x))

    def __init__(self, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.patch_embed, self.norm_pre = nn.Module(), nn.Identity()
        self.patch_embed.proj, self.patch_embed.patch_size = nn.Conv2d(3, 24, 8, 8), (8, 8)
        self.patch_embed.forward = lambda image: self.patch_embed.proj(image).flatten(2).transpose(1, 2)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 24))
        self.blocks = nn.ModuleList(self.Block(scale) for _ in range(2))
        self.norm = nn.LayerNorm(24)

    def _pos_embed(self, x):
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)

    def forward_features(self, image):
        x = self._pos_embed(self.patch_embed(image))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class HuggingFaceLike:
    """The same weights behind HuggingFace's names (transformers 5.24)."""

    class Layer:
        def __init__(self, block):
            attn, heads = block.attn, [nn.Linear(24, 24) for _ in range(3)]
            for part, weight, bias in zip(heads, attn.qkv.weight.chunk(3), attn.qkv.bias.chunk(3)):
                part.weight.data, part.bias.data = weight.data, bias.data
            query_key_value = dict(zip(("q_proj", "k_proj", "v_proj"), heads), num_attention_heads=3)
            self.attention = SimpleNamespace(o_proj=attn.proj, **query_key_value)
            self.layernorm_before, self.layernorm_after, self.mlp = block.norm1, block.norm2, block.mlp
            self.block = block

        def __call__(self, x):
            return self.block(x)

    def __init__(self, timm):
        self.timm, self.layernorm, self.config = timm, timm.norm, SimpleNamespace(patch_size=8)
        self.layers = [self.Layer(block) for block in timm.blocks]

    def embeddings(self, image, interpolate_pos_encoding=False):
        assert interpolate_pos_encoding                   # else an image has to have the size of pretraining
        return self.timm._pos_embed(self.timm.patch_embed(image))

    def __call__(self, image, interpolate_pos_encoding=False):
        assert interpolate_pos_encoding
        return SimpleNamespace(last_hidden_state=self.timm.forward_features(image))


def test_vits_of_timm_and_huggingface_give_the_maps_of_one_image_at_a_time():
    image, timm = randn(2, 3, 32, 40), TimmLike().eval()
    centroids = randn(4, 24, seed=1)
    vit = cam.from_timm(timm)
    maps = cam.class_activation_maps(vit, image, centroids)
    other = cam.from_huggingface(HuggingFaceLike(timm))
    torch.testing.assert_close(cam.class_activation_maps(other, image, centroids), maps)
    alone = torch.cat([cam.class_activation_maps(vit, one, centroids) for one in image.split(1)])
    torch.testing.assert_close(alone, maps)
    torch.testing.assert_close(cam.cls_feature(vit, image), timm.forward_features(image)[:, 0])
    assert cam.window_features(vit, image[:1], 16, (0.5,))[0].shape[1] == 24


def test_a_vit_with_layer_scale_is_refused_before_it_gives_wrong_maps():
    scaled = TimmLike(scale=0.5).eval()
    for adapt, vit in ((cam.from_timm, scaled), (cam.from_huggingface, HuggingFaceLike(scaled))):
        with pytest.raises(ValueError, match="LayerScale has to be multiplied"):
            adapt(vit)


def test_window_features_are_the_normed_cls_tokens_of_the_crops(monkeypatch):
    monkeypatch.setitem(cam.PATCHES_AT_ONCE, "cpu", 4 * 64)  # four crops in a pass, and a rest
    vit, image = small_vit(), randn(1, 3, 160, 160, seed=2)
    image[..., 80:] = 1                                   # a plain half, for windows of both kinds
    fore, back = cam.window_features(vit, image, 64, stuff=True)
    mask = vit(image)[1][:, :, 1:].mean(1)
    mask = (mask > mask.mean()).view(20, 20).numpy().repeat(8, 0).repeat(8, 1)
    expected = {True: [], False: []}
    for x0, y0, x1, y1 in cam.windows(20, 20, 8):
        ys, xs = slice(y0, y1), slice(x0, x1)
        share = mask[ys, xs].mean()
        if share > 0.5 or 1 - share > 0.8:
            crop = F.interpolate(image[:, :, ys, xs], (64, 64), mode="bilinear")
            expected[bool(share > 0.5)].append(vit(crop)[0][:, 0])
    for found, kind in ((fore, True), (back, False)):
        assert len(found) == len(expected[kind]) > 0
        assert_close(found, torch.cat(expected[kind]), rtol=1e-4, atol=1e-4)
    assert not len(cam.window_features(vit, image, 64)[1])                        # stuff alone needs these


def test_clusters_are_found_repeatably_and_too_few_windows_are_named():
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 5, (6, 8))
    x = np.concatenate([c + rng.normal(0, 0.3, (40, 8)) for c in centres])
    found = cam.cluster(x, 6, seed=1)
    assert np.abs(found[:, None] - centres[None]).max(2).min(0).max() < 0.3
    assert np.array_equal(found, cam.cluster(x, 6, seed=1)) and found.dtype == np.float32
    with pytest.raises(ValueError, match="5 different windows of 5 are too few for 6 clusters"):
        cam.cluster(x[:5], 6)


def test_copies_of_a_window_do_not_count_and_scipy_warns_of_nothing(recwarn):
    x = randn(5, 8)
    with pytest.raises(ValueError, match="5 different windows of 80 are too few for 20 clusters: .*copies"):
        cam.cluster(x.repeat(16, 1), 20)
    centroids = cam.cluster(x.repeat(16, 1).half(), 5)
    assert_close(torch.from_numpy(centroids).sort(0).values, x.half().float().sort(0).values)
    crowded = np.random.default_rng(7).normal(size=(200, 2))      # a cluster loses all its points
    assert cam.cluster(crowded, 100).shape == (100, 2) and not len(recwarn)


# ----------------------------------------------------------------------------
# model.py


def test_tokens_and_attention_equal_a_vit_written_as_einsums():
    vit, image = small_vit(depth=2).double(), randn(1, 3, 64, 64).double()
    s = vit.state_dict()
    norm = lambda x, n: F.layer_norm(x, (48,), s[n + ".weight"], s[n + ".bias"], 1e-6)
    patches = image.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(1, 64, -1)
    x = patches @ s["patch_embed.proj.weight"].flatten(1).T + s["patch_embed.proj.bias"]
    x = torch.cat([s["cls_token"], x], 1) + s["pos_embed"]
    for b in ("blocks.0.", "blocks.1."):
        y = norm(x, b + "norm1") @ s[b + "attn.qkv.weight"].T + s[b + "attn.qkv.bias"]
        q, k, v = y.view(1, 65, 3, 4, 12).unbind(2)
        A = torch.einsum("bqhd,bkhd->bhqk", q, k).div(math.sqrt(12)).softmax(3)   # Eq. 2
        x = (x + torch.einsum("bhqk,bkhd->bqhd", A, v).flatten(2) @ s[b + "attn.proj.weight"].T
             + s[b + "attn.proj.bias"])
        y = norm(x, b + "norm2") @ s[b + "mlp.fc1.weight"].T + s[b + "mlp.fc1.bias"]
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + y @ s[b + "mlp.fc2.weight"].T + s[b + "mlp.fc2.bias"]
    tokens, row = vit(image)
    assert_close(tokens, norm(x, "norm"))
    assert_close(row, A[:, :, 0])


def test_vits8_has_dinos_150_tensors_and_21670272_parameters():
    with torch.device("meta"):
        state = model.VisionTransformer(**model.BACKBONES["vits8"][0]).state_dict()
    assert len(state) == 150 and sum(t.numel() for t in state.values()) == 21_670_272


def test_decoder_logits_are_normalised_products_of_patches_and_classes():
    torch.manual_seed(0)
    decoder, tokens = model.MaskTransformer(48, 5, width=32, heads=4).eval(), randn(2, 12, 48)
    logits, c = decoder(tokens)
    assert logits.shape == (2, 5, 12) and c.shape == (2, 5, 32)
    assert_close(c.norm(dim=2), torch.ones(2, 5))
    x = torch.cat([decoder.proj_dec(tokens), decoder.cls_emb.expand(2, -1, -1)], 1)
    for block in decoder.blocks:
        x = block(x)
    z = F.normalize(decoder.decoder_norm(x)[:, :12] @ decoder.proj_patch, dim=2)
    products = torch.einsum("bpd,bnd->bpn", z, c)         # Eq. 3
    assert_close(logits.transpose(1, 2), F.layer_norm(products, (5,)))
    for width in (200, 384):                              # heads divide any width
        assert model.MaskTransformer(width, 3)(randn(1, 4, width))[0].shape == (1, 3, 4)


def test_the_untrained_network_is_dino_and_aspp_sees_what_the_last_attention_adds():
    vit, image = small_vit(), randn(2, 3, 64, 96)
    network, seen = model.DMSA(vit, 4).eval(), []
    with torch.no_grad():
        x, msa = network.features(image)
        assert x.shape == msa.shape == (2, 48, 8, 12)
        decoded, _ = network.student.decoder(vit(image)[0][:, 1:])
        assert_close(network(image, (1, 1, 2, 3)).flatten(2), decoded, rtol=1e-4, atol=1e-5)
        network.student.aspp.register_forward_pre_hook(lambda m, args: seen.append(args))
        network(image, (1, 1, 2, 3))
        last, (trunk, *_) = vit.blocks[-1], vit.last_qkv(image)
        expected = last.attn(last.norm1(trunk))[:, 1:].transpose(1, 2).unflatten(2, (8, 12))
        assert_close(seen[0][0], expected)
        nn.init.normal_(network.student.aspp.project.weight, std=0.1)             # as if it were trained
        first, other = (network(image, rates) for rates in ((1, 1, 2, 3), (1, 6, 12, 18)))
        x = trunk[:, 1:] + (expected + 0.1 * network.student.aspp(expected, (1, 6, 12, 18))).flatten(2).mT
        tokens = vit.norm(x + last.mlp(last.norm2(x)))
        assert_close(other.flatten(2), network.student.decoder(tokens)[0], rtol=1e-4, atol=1e-5)
    assert (first - other).abs().max() > 1e-3 and [rates for _, rates in seen[1:]] == [
        (1, 1, 2, 3), (1, 6, 12, 18), (1, 6, 12, 18)]


def test_only_aspp_and_decoder_train_and_aspp_does_get_a_gradient():
    network = model.DMSA(small_vit(), 4).train()
    logits, c = network.decode(network.student, network.features(randn(2, 3, 64, 64)), (1, 1, 2, 3))
    (logits.square().mean() + c.sum()).backward()
    assert all(p.grad is None for p in (*network.vit.parameters(), *network.teacher.parameters()))
    assert network.student.aspp.project.weight.grad.abs().max() > 0
    assert not network.teacher.training and not network.vit.training and network.student.training


def test_the_teacher_is_the_moving_average_with_warm_up():
    network = model.DMSA(small_vit(), 3)
    average, p = None, network.student.decoder.cls_emb
    for t in range(6):
        p.data = randn(*p.shape, seed=t)
        network.update_teacher(t, 0.6)
        m = min(1 - 1 / (t + 1), 0.6)
        average = p.detach().clone() if average is None else m * average + (1 - m) * p.detach()
        assert_close(network.teacher.decoder.cls_emb, average)


def test_weights_load_strictly_from_flat_and_full_checkpoints_in_any_float_type(tmp_path):
    vit = small_vit()
    torch.save({k: v.half() for k, v in vit.state_dict().items()}, tmp_path / "flat.pt")
    wrapped = ({f"module.backbone.{k}": v for k, v in vit.state_dict().items()}
               | {"module.head.mlp.0.weight": torch.zeros(2)})
    torch.save({"teacher": wrapped, "student": {}, "epoch": 3}, tmp_path / "full.pt")
    compiled = {f"_orig_mod.module.{k}": v.bfloat16() for k, v in vit.state_dict().items()}
    torch.save({"state_dict": compiled | {"fc.weight": torch.zeros(3)},
                "args": argparse.Namespace(arch="vit_small")}, tmp_path / "lit.pt")
    for name, tolerance in (("flat.pt", 1e-3), ("full.pt", 0), ("lit.pt", 1e-2)):
        other = small_vit(seed=9)
        digest = model.load_dino(other, tmp_path / name)
        assert digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for k, v in vit.state_dict().items():
            assert_close(other.state_dict()[k], v, rtol=tolerance, atol=tolerance)
    vit, file, digest = model.backbone("tiny")            # shipped
    assert os.path.getsize(file) < 4e6 and len(digest) == 64
    assert vit(torch.zeros(1, 3, 96, 96))[0].shape == (1, 145, vit.embed_dim)


def written(file, content):
    """Write what torch.save takes, or bytes as they are; returns the path."""
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    return file


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def safetensors(tensors, **changes):
    """The bytes of a file of safetensors, from its definition; changes: other entries of its JSON."""
    kinds = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
             torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        begin, data = len(data), data + raw(tensor)
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, len(data)]}
    text = json.dumps(header | changes).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def hugging_face(state):
    """A state dict in DINO's names -> in those of the files of HuggingFace's ViTModel."""
    inside = {"norm1": ["layernorm_before"], "norm2": ["layernorm_after"], "mlp.fc1": ["intermediate.dense"],
              "mlp.fc2": ["output.dense"], "attn.proj": ["attention.output.dense"],
              "attn.qkv": [f"attention.attention.{name}" for name in ("query", "key", "value")]}
    theirs = {}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        if name.startswith("blocks."):
            _, i, module = module.split(".", 2)
            for piece, words in zip(value.chunk(len(inside[module])), inside[module]):
                theirs[f"encoder.layer.{i}.{words}.{leaf}"] = piece.clone()
        elif module == "norm":
            theirs[f"layernorm.{leaf}"] = value
        else:
            theirs["embeddings." + name.replace("patch_embed.proj", "patch_embeddings.projection")
                   .replace("pos_embed", "position_embeddings")] = value
    return theirs


def loads_as(vit, file):
    """Whether load_dino gives another ViT of this size exactly the weights of `vit`."""
    other = small_vit(seed=9)
    model.load_dino(other, file)
    return all(torch.equal(other.state_dict()[name], value) for name, value in vit.state_dict().items())


def test_cam_from_hugging_faces_names_equals_cam_from_dinos(tmp_path):
    vit, image, maps = small_vit(), randn(2, 3, 64, 48), []
    written(tmp_path / "dino.pth", vit.state_dict())
    written(tmp_path / "model.safetensors", safetensors(hugging_face(vit.state_dict())))
    for name in ("dino.pth", "model.safetensors"):
        other = small_vit(seed=9)
        model.load_dino(other, tmp_path / name)
        maps.append(cam.class_activation_maps(other, image, randn(5, 48)))
    assert torch.equal(*maps) and maps[0].std() > 0


def test_weights_load_from_own_trainings_and_runs_and_a_teacher_goes_before_its_student(tmp_path):
    vit, student, head = small_vit(), small_vit(seed=5).state_dict(), torch.zeros(4, 48)
    state = vit.state_dict()
    chunks = {re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", name): value
              for name, value in state.items()}           # DINOv2: blocks.1.2 is block 2, in chunk 1
    assert "blocks.1.2.norm1.bias" in chunks
    both = {f"student.backbone.{name}": value for name, value in student.items()}
    both |= {f"teacher.backbone.{name}": value for name, value in chunks.items()}
    both |= {"student.dino_head.mlp.0.weight": head, "teacher.dino_head.mlp.0.weight": head,
             "dino_loss.center": head}
    lightly = {f"student_backbone.{name}": value for name, value in student.items()}
    lightly |= {f"teacher_backbone.{name}": value for name, value in state.items()}
    lightly |= {"teacher_head.layers.0.weight": head, "criterion.teacher_temp": head}
    wrapped = {re.sub(r"^blocks\.\d+\.", r"\g<0>_checkpoint_wrapped_module.", name): value
               for name, value in state.items()}
    hf = hugging_face(state)
    cases = {"teacher_checkpoint.pth": {"teacher": {f"backbone.{n}": v for n, v in chunks.items()}
                                        | {"dino_head.mlp.0.weight": head, "ibot_head.mlp.0.weight": head}},
             "model_final.rank_0.pth": {"model": both, "iteration": 9},
             "lightly.ckpt": {"state_dict": lightly, "epoch": 9},
             "wrapped.pth": {"model": {f"module._orig_mod.backbone.{n}": v for n, v in wrapped.items()}},
             "vit.bin": {f"vit.{n}": v for n, v in hf.items()} | {"classifier.weight": head},
             "pooler.bin": hf | {"pooler.dense.weight": head, "embeddings.mask_token": torch.zeros(1, 1, 48)},
             "last.pt": {"vit": state, "student": {"aspp.x": head}, "teacher": {"aspp.x": head},
                         "args": {"backbone": "tiny"}}}
    for name, content in cases.items():
        assert loads_as(vit, written(tmp_path / name, content)), name


def test_a_position_table_of_another_image_size_is_taken_as_it_is_and_interpolated_from_there(tmp_path):
    torch.manual_seed(0)
    larger = model.VisionTransformer(img_size=96, patch_size=8, embed_dim=48, depth=3, num_heads=4).eval()
    nn.init.normal_(larger.pos_embed)
    for state in (larger.state_dict(), hugging_face(larger.state_dict())):
        vit = small_vit()
        model.load_dino(vit, written(tmp_path / "96.pth", state))
        for size in ((96, 96), (64, 64), (40, 72)):
            image = randn(1, 3, *size)
            assert torch.equal(vit(image)[0], larger(image)[0])
        assert not vit.pos_embed.requires_grad
    vit = small_vit()
    model.load_vit(vit, larger.state_dict())
    assert torch.equal(vit.pos_embed, larger.pos_embed)
    for n in (1 + 143, 1):                                # no square; CLS alone
        with pytest.raises(model.WeightsError, match=rf"pos_embed is \(1, {n}, 48\)"):
            model.load_vit(vit, larger.state_dict() | {"pos_embed": torch.zeros(1, n, 48)})
    with pytest.raises(model.WeightsError, match="no state dict"):
        model.load_vit(vit, None)


def test_periods_and_biases_that_are_in_no_file_of_dinov3_are_filled_in_and_others_not_guessed(tmp_path):
    sizes = dict(patch_size=8, embed_dim=48, depth=2, num_heads=1, registers=4, rope=True)
    vit = model.VisionTransformer(**sizes)
    state = {name: randn(*value.shape) for name, value in vit.state_dict().items() if name != "periods"}
    expected = 100 ** (torch.arange(12) / 12)
    q, k, v = state["blocks.1.attn.qkv.bias"].chunk(3)
    without = {name: value for name, value in state.items() if not name.endswith("qkv.bias")}
    apart = without | {f"blocks.{i}.attn.{x}_bias": value
                       for i in (0, 1) for x, value in (("q", q), ("v", v))}
    for content, bias in ((state, torch.cat([q, k, v])), (without, torch.zeros(144)),
                          (apart, torch.cat([q, 0 * k, v]))):
        other = model.VisionTransformer(**sizes)
        model.load_dino(other, written(tmp_path / "v3.pth", content))
        assert torch.equal(other.blocks[1].attn.qkv.bias, bias) and torch.equal(other.periods, expected)
    one = {name: value for name, value in state.items() if name != "blocks.0.attn.qkv.bias"}
    half = {name: value for name, value in apart.items() if name != "blocks.0.attn.q_bias"}
    table = {name: value for name, value in model.VisionTransformer(patch_size=8, embed_dim=48, depth=2,
                                                                   num_heads=1).state_dict().items()
             if not name.endswith("qkv.bias")}            # DINO's ViT, which has biases
    for content in (one, half, table):
        with pytest.raises(model.WeightsError, match="blocks.0.attn.qkv.bias"):
            model.load_dino(vit, written(tmp_path / "v3.pth", content))


def test_a_digest_in_a_files_name_is_checked_and_a_date_is_none(tmp_path):
    vit, file = small_vit(), written(tmp_path / "dino.pth", small_vit().state_dict())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for name in (f"dino-{digest[:8]}.pth", "dino-20261128.pth", "dino-abcdef01-last.pth"):
        assert model.load_dino(vit, shutil.copy(file, tmp_path / name)) == digest
    for name in ("dinov3_vits16_pretrain_lvd1689m-08c60483.pth", "dino-00000000.pth"):
        with pytest.raises(model.WeightsError, match=f"{name}: its SHA-256 begins with {digest[:8]}"):
            model.load_dino(vit, shutil.copy(file, tmp_path / name))


def test_safetensors_are_read_as_the_format_defines_them(tmp_path):
    tensors = {"a": randn(2, 3), "b": randn(4).bfloat16(), "c": randn(5, 1).half(), "d": randn(2).double(),
               "scalar": torch.tensor(7), "empty": torch.zeros(0, 4), "nan": torch.tensor([math.nan]),
               "flags": torch.tensor([True, False, True]), "bytes": torch.arange(3, dtype=torch.uint8)}
    found, digest = model.read_tensors(written(tmp_path / "a.safetensors", safetensors(tensors)))
    assert found.keys() == tensors.keys() and len(digest) == 64
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert raw(found[name]) == raw(tensor)


def test_damaged_safetensors_are_refused_whatever_is_wrong(tmp_path):
    two = {"a": randn(2), "b": randn(2)}
    good = safetensors(two)
    entry = '"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'

    def lying(begin=8, end=16, shape=(2,), dtype="F32"):
        return safetensors(two, b={"dtype": dtype, "shape": shape, "data_offsets": [begin, end]})

    def header(text, size=None):
        return struct.pack("<Q", len(text) if size is None else size) + text.encode()

    for content in (lying(), header("{" + entry + "}") + bytes(8)):
        assert "a" in model.read_tensors(written(tmp_path / "good.safetensors", content))[0]
    place, size = "does not lie where", "its header should have"
    cases = {"a hole": (lying(16, 24) + bytes(8), place), "an overlap": (lying(4, 12)[:-4], place),
             "beyond the end": (lying(8, 24, (4,)), place), "before the data": (lying(-8, 0), place),
             "backwards": (lying(8, 0), place), "cut": (good[:-1], place),
             "a lying shape": (lying(shape=(3,)), place),
             "huge": (lying(shape=(2 ** 62, 4)), place), "a byte too many": (good + b"x", "1 bytes too many"),
             "negative": (lying(shape=(-1, -2)), ""), "true": (lying(shape=(True, 2)), ""),
             "float": (lying(end=16.0), ""), "no list": (lying(shape="ab"), ""),
             "F4": (lying(dtype="F4"), "'b' has the unknown type 'F4'"),
             "a list as type": (lying(dtype=[]), ""),
             "no entry": (safetensors(two, b=7), ""),
             "no offsets": (safetensors(two, b={"dtype": "F32", "shape": [2]}), ""),
             "twice": (header("{" + entry + "," + entry + "}") + bytes(8), "a name stands twice"),
             "no JSON": (good.replace(b'"b":', b'"b";'), ""),
             "no UTF-8": (good.replace(b'"b"', b'"\xff"'), ""),
             "cut in the header": (good[:40], size), "a long header": (header("{}", size=2 ** 63), size),
             "a header beyond the end": (header("{}", size=3), size),
             "a header that no writer writes": (header("{" + " " * 10 ** 8 + "}"), size),
             "nested": (header('{"a":' + "[" * 200_000), "")}
    for name, (content, words) in cases.items():
        with pytest.raises(model.WeightsError, match="not a file of plain tensors, or damaged") as error:
            model.read_tensors(written(tmp_path / "bad.safetensors", content))
        message = str(error.value)
        assert "bad.safetensors" in message and "\n" not in message and words in message, (name, message)


def test_mutated_weights_load_or_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "BACKBONES", {})           # takes time to compare with
    torch.manual_seed(0)
    sizes = dict(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=1)
    vit, v3 = model.VisionTransformer(**sizes), model.VisionTransformer(**sizes, registers=4, rope=True)
    gammas = {f"blocks.{i}.ls{j}.gamma": torch.ones(8) for i in (0, 1) for j in (1, 2)}
    apart = {name.replace("qkv.weight", x + ".weight"): value.chunk(3)["qkv".index(x)]
             for name, value in v3.state_dict().items() if not name.endswith("qkv.bias")
             for x in ("qkv" if name.endswith("qkv.weight") else "q")}
    states = [(vit, hugging_face(vit.state_dict())), (vit, vit.state_dict() | gammas), (v3, apart)]
    rng, refusals, file = np.random.default_rng(0), 0, tmp_path / "weights.safetensors"
    for turn in range(240):
        target, state = states[turn % 3]
        content, whole = bytearray(safetensors(state)), turn % 2
        header = 8 + struct.unpack("<Q", content[:8])[0]
        for _ in range(rng.integers(1, 4)):               # in the header mostly, with a character of JSON
            at = rng.integers(0, header if whole else len(content))
            content[at] = rng.choice(list(b'0123456789[]{},":abF-')) if whole else rng.integers(0, 256)
        try:
            model.load_dino(target, written(file, bytes(content)))
        except model.WeightsError as error:
            refusals += 1
            assert "\n" not in str(error) and str(error).startswith(str(file))
    assert 120 < refusals < 240
    for shape in ((), (1,), (3, 8), (2, 2, 2)):           # of one tensor, of many
        for target, state in states:
            with pytest.raises(model.WeightsError):
                changed = {name: torch.ones(shape) for name in state if ".att" in name}
                model.load_dino(target, written(file, safetensors(state | changed)))
            for name in state:
                if state[name].shape != shape and name != "periods":
                    with pytest.raises(model.WeightsError):
                        model.load_dino(target, written(file, safetensors(state | {name: torch.ones(shape)})))


def test_a_failed_fetch_names_where_else_the_same_weights_are(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    no_route = raising(OSError("no route"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, progress: no_route())
    assert model.REPOSITORIES.keys() | {"tiny"} == model.BACKBONES.keys()
    for name in model.REPOSITORIES:
        with pytest.raises(model.WeightsError, match=f"^{name}: ") as error:
            model.backbone(name)
        words = ["--weights", "\\bhuggingface.co/facebook/dino", "\\bhuggingface.co/timm/vit_"]
        words += (["github.com/facebookresearch/dinov3", "form"] if "v3" in name
                  else ["no route", model.WEIGHTS_URL])
        assert all(re.search(word, str(error.value)) for word in words) and "\n" not in str(error.value)


class Payload:
    def __reduce__(self):
        return os.system, ("echo this must never run",)


def test_weights_that_do_not_fit_or_are_no_weights_are_named(tmp_path, capfd):
    def named(backbone):
        with torch.device("meta"):
            shapes = model.VisionTransformer(**model.BACKBONES[backbone][0]).state_dict()
        return {name: torch.zeros(1).expand(value.shape) for name, value in shapes.items()}

    vit, state = small_vit(), small_vit().state_dict()
    gammas = {f"blocks.{i}.ls{j}.gamma": torch.ones(48) for i in range(3) for j in (1, 2)}
    torch.save(state, tmp_path / "whole.pt")
    cases = {"patch.pt": (state | {"patch_embed.proj.weight": torch.zeros(48, 3, 16, 16)},
                          "patch_embed.proj.weight"),
             "missing.pt": ({k: v for k, v in state.items() if k != "norm.bias"}, "norm.bias"),
             "extra.pt": (state | {"neck.weight": torch.zeros(1)}, "neck.weight"),
             "nan.pt": (state | {"norm.bias": torch.full((48,), torch.nan)}, "norm.bias is not finite"),
             "code.pt": ({"a": Payload()}, "not a file of plain tensors"),
             "list.pt": ([1, 2], "no state dict"),
             "swiglu.pt": ({k: v for k, v in state.items() if ".fc" not in k}     # LayerScale before no fc2
                           | gammas | {"blocks.0.mlp.w12.weight": torch.ones(9)}, "SwiGLU"),
             "fc.pt": ({k: v for k, v in state.items() if ".fc" not in k} | gammas, "12 tensors missing"),
             "gamma.pt": (state | {"blocks.0.ls2.gamma": torch.ones(48)}, "2 tensors missing"),
             "wide.pt": (state | {"pos_embed": torch.zeros(1, 197, 32)}, "pos_embed is (1, 197, 32)"),
             "safe.pt": (struct.pack("<Q", 2) + b"{}", "no state dict"),
             "head.pt": ({"head.weight": torch.zeros(5, 48), "head.bias": torch.zeros(5)}, "heads without"),
             "resnet.pt": ({"conv1.weight": torch.zeros(8, 3, 7, 7)}, "['conv1.weight']"),
             "twice.pt": (state | {"module.norm.bias": torch.zeros(48)}, "'module.norm.bias' is the second"),
             "int8.pt": (state | {"norm.bias": torch.ones(48, dtype=torch.int8)}, "norm.bias is not finite"),
             "sparse.pt": (state | {"norm.bias": torch.ones(48).to_sparse()}, "no state dict"),
             "index.json": (b'{"metadata": {}, "weight_map": {}}', "index"),
             "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
             "page.pt": (b"<!DOCTYPE html>", "web page"),
             "vits16.pt": (named("vits16"), "give --backbone vits16"),
             "v2.pt": ({f"dinov2.{n}": v for n, v in named("dinov2_vits14_reg").items()},
                       "give --backbone dinov2_vits14_reg"),
             "s+.pt": (named("dinov3_vits16") | {"blocks.0.mlp.gate_proj.weight": torch.zeros(1536, 384)},
                       "12 blocks with SwiGLU, width 384, patches of 16: no --backbone"),
             "short.pt": ((tmp_path / "whole.pt").read_bytes()[:5000], "damaged"),
             "none.pt": (None, "No such file")}
    for name, (content, message) in cases.items():
        if content is not None:
            written(tmp_path / name, content)
        with pytest.raises(model.WeightsError, match=re.escape(message)) as error:
            model.load_dino(vit, tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert "never run" not in capfd.readouterr().out


def test_a_torch_that_could_run_code_in_a_file_is_refused_and_readme_names_the_oldest(monkeypatch):
    for version in ("1.13.1", "2.5.1+cu121"):
        monkeypatch.setattr(torch, "__version__", type(torch.__version__)(version))
        with pytest.raises(model.WeightsError, match=re.escape(f"torch {version} is too old")):
            model.backbone("tiny")
    for version in ("2.6.0", "2.13.0+cpu"):
        monkeypatch.setattr(torch, "__version__", type(torch.__version__)(version))
        model.backbone("tiny")
    assert "torch 2.6 or later" in README and "2.6" in (HERE / "requirements.txt").read_text()


# ----------------------------------------------------------------------------
# data.py and tools/get_data.py: small data sets and broken files are written below tmp_path


def make_voc(base, n=3, aug=False):
    """A VOC2012 folder at `base`: n images of classes 0, 1, 2 ..., the last one for validation."""
    ids = [f"2007_{i:06}" for i in range(n)]
    for i, name in enumerate(ids):
        save(base / f"JPEGImages/{name}.jpg", ("RGB", (12 + i, 10), (200, 100, 50)))
        save(base / f"SegmentationClass/{name}.png", np.full((10, 12 + i), i, np.uint8), data.palette())
        if aug:
            save(base / f"SegmentationClassAug/{name}.png", np.full((10, 12 + i), i + 5, np.uint8))
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name, listed in {"train": ids[:-1], "val": ids[-1:], **({"train_aug": ids} if aug else {})}.items():
        (lists / f"{name}.txt").write_text("\n".join(listed) + "\n")
    return base


def make_coco(root, maps, images="images/train2017", labels="annotations/train2017"):
    """COCO 2017 training images with these maps: {name: raw value of every pixel}."""
    for name, value in maps.items():
        save(root / images / f"{name}.jpg", ("RGB", (9, 8), (10, 20, 30)))
        save(root / labels / f"{name}.png", np.full((8, 9), value, np.uint8))
    return root


def encoded(picture, kind, **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind, body):
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_what_a_user_can_mend_is_one_line_with_the_name_of_the_program(tmp_path):
    (tmp_path / "data.png").mkdir()
    assert ends(2, "", "data.py", cwd=tmp_path) == "data.py: data.png: Is a directory\n"


NUMPY_MEMORY = np._core._exceptions._ArrayMemoryError((9 ** 9,), np.dtype(int))


@pytest.mark.parametrize("error, code, words", (
    (data.UserError("a.jpg: broken; leave it out"), 2, "a.jpg: broken; leave it out"),
    (model.WeightsError("w.pt: no weights"), 2, "w.pt: no weights"),
    (FileNotFoundError(2, "No such file", "a.jpg"), 2, "a.jpg: No such file"),
    (OSError(28, "No space\nleft"), 2, "No space left"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB."), 2, "memory on the GPU"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), 2, "on the GPU"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you"),
     2, "memory on this machine"),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), 2, "memory on this machine"),
    (NUMPY_MEMORY, 2, "memory on this machine"), (MemoryError(), 2, "memory on this machine"),
    (FloatingPointError("step 3: ce not finite"), 1, "step 3: ce not finite"),
    (ConnectionError("process 1 is gone"), 1, "process 1 is gone"),
    (BrokenPipeError(32, "Broken pipe"), 1, "")))
def test_each_error_of_a_program_is_one_line_and_an_exit_code(capsys, monkeypatch, error, code, words):
    monkeypatch.setattr(sys, "argv", ["/a/program.py"])
    assert data.exit_code(raising(error)) == code
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("program.py: ") and words in line and "Traceback" not in line
    if "on the GPU" in words or "on this machine" in words:
        assert "--accumulate" in line and "--size" in line and ("--device cpu" in line) == ("GPU" in words)


def test_a_mistake_of_ours_has_a_traceback_and_exit_codes_of_a_program_pass(capsys):
    assert data.exit_code(raising(RuntimeError("CUDA error: device-side assert"))) == 1
    assert "Traceback" in capsys.readouterr().err
    assert (data.exit_code(lambda: None), data.exit_code(lambda: 130)) == (0, 130)
    for error in (SystemExit(2), KeyboardInterrupt()):    # of argparse; of Ctrl-C
        with pytest.raises(type(error)):
            data.exit_code(raising(error))


def test_a_file_is_whole_or_as_it_was_and_what_killed_writes_left_is_removed_when_it_is_old(
        tmp_path, monkeypatch):
    file = tmp_path / "new" / "a.json"
    data.write_whole(str(file), lambda f: f.write(b"old"))
    with pytest.raises(ZeroDivisionError):
        data.write_whole(file, raising(ZeroDivisionError()))
    assert file.read_bytes() == b"old" and os.listdir(file.parent) == ["a.json"]
    monkeypatch.setattr(os, "replace", raising(KeyboardInterrupt()))              # killed at the end
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            data.write_whole(file, lambda f: f.write(b"new"), sync=False)
    left = sorted(file.parent.glob(f"a.json.*{data.TEMPORARY}"))
    assert len(left) == 2 and [f.read_bytes() for f in (file, *left)] == [b"old", b"new", b"new"]
    data.remove_temporary(file.parent)                    # another process may be writing these
    assert len(list(file.parent.iterdir())) == 3
    os.utime(left[0], (0, 0))
    data.remove_temporary(file.parent)
    assert sorted(file.parent.iterdir()) == [file, left[1]]
    data.remove_temporary(tmp_path / "none")              # no folder yet: nothing to remove


# ---- classes and layouts


def test_shares_of_classes_are_those_of_all_pixels_the_largest_first_and_rare_ones_are_added_up():
    pixels = np.bincount([0, 0, 0, 2, 255], minlength=256)
    assert (data.class_shares(pixels, ["a", "b", "c"]) == data.class_shares(pixels[[0, 1, 2, 255]], "abc")
            == "labels show 2 of 3 classes: a 60.0 %, c 20.0 %, void 20.0 %")
    line = data.class_shares(np.array([50, *[2] * 20, 10]), data.VOC_NAMES)
    assert line.startswith("labels show 21 of 21 classes: background 50.0 %, tvmonitor 2.0 %, ")
    assert line.endswith(", 9 others 18.0 %, void 10.0 %") and line.count(" 2.0 %") == 11
    assert data.class_shares(np.zeros(4, int), "abc") == "labels show 0 of 3 classes: void 0.0 %"


def test_what_is_read_is_said_in_one_line(tmp_path):
    assert data.Shapes("val", 3).summary() == "100 scenes rendered from seed 3"
    base = make_voc(tmp_path / "VOC2012")
    assert data.VOC(tmp_path).summary() == (
        f"2 images (2 .jpg) in {base}/JPEGImages, labels in {base}/SegmentationClass")
    root = make_coco(tmp_path / "coco", {"a": 3, "b": 7})
    assert data.COCO(root).summary() == (
        f"2 images (2 .jpg) in {root}/images/train2017, labels in {root}/annotations/train2017")
    photos, picture = tmp_path / "photos", Image.new("RGB", (4, 3))
    for name in ("a.jpg", "b.JPG", "sub/c.jpg"):
        save(photos / name, format="JPEG")
    save(photos / "b.JPG", picture, format="MPO", save_all=True, append_images=[picture])         # a phone's
    save(photos / "cut out.png", ("RGBA", (4, 3), 0))
    save(photos / "mask.png", np.zeros((3, 4), np.uint8), data.palette())
    save(photos / "grey.png", ("L", (4, 3), 0))
    save(photos / "grey16.png", ("I;16", (4, 3), 0))
    save(photos / "pages.tif", picture, save_all=True, append_images=[picture] * 2)
    save(photos / "bands.tif", ("RGBA", (4, 3), 0))       # the fourth need not be alpha
    (photos / "broken.webp").write_bytes(b"RIFF")
    for name in ("x.HEIC", "sub/y.heic", "notes", "z.raf"):
        (photos / name).write_bytes(b"")
    assert data.Folder(photos).summary() == (
        f"10 images (4 .png, 3 .jpg, 2 .tif, 1 .webp) in 2 folders: 9 {photos}, 1 {photos}/sub; "
        "1 that cannot be read; 1 with alpha, laid on white; 2 in grey; "
        "1 with a palette, as label maps have; 1 with several pages, the first is used; "
        "left out: 2 .heic, 1 without suffix, 1 .raf (convert pictures among these to JPEG)")
    assert data.Folder(photos / "a.jpg").summary() == f"1 images (1 .jpg) in {photos}"
    found = data.Folder(photos)
    found.limit(4)
    assert found.summary().startswith(f"4 images (2 .jpg, 1 .tif, 1 .webp) in {photos}; 1 that cannot")


def test_coco_classes_have_the_names_of_the_published_ids():
    things, stuff = data.coco_table("coco80"), data.coco_table("cocostuff27")
    names, groups = [n for n in data.COCO_THINGS if n != "-"], list(data.STUFF27)
    assert len(names) == 80 and (things[182:] == data.VOID).all() and (stuff[182:] == data.VOID).all()
    for raw, name, group in [(0, "person", "person"), (2, "car", "vehicle"), (12, "stop sign", "outdoor"),
                             (16, "cat", "animal"), (61, "chair", "furniture"), (71, "tv", "electronic"),
                             (89, "toothbrush", "indoor")]:                       # raw = category id - 1
        assert names[things[raw] - 1] == name and groups[stuff[raw]] == group
    for raw, group in [(105, "sky"), (123, "plant"), (154, "water"), (148, "ground"), (171, "wall")]:
        assert groups[stuff[raw]] == group


def test_palette_has_vocs_colours_and_voc_its_21_classes():
    known = {0: [0, 0, 0], 1: [128, 0, 0], 4: [0, 0, 128], 20: [0, 64, 128], 255: [224, 224, 192]}
    assert data.palette().shape == (256, 3) and {i: data.palette()[i].tolist() for i in known} == known
    assert len(data.VOC_NAMES) == 21 and data.VOC_NAMES[1::14] == ["aeroplane", "person"]


@pytest.mark.parametrize("below", ("VOCdevkit/VOC2012", "VOC2012", "."))
def test_voc_loads_from_every_accepted_root_and_by_lists_of_other_makers(tmp_path, below):
    base = make_voc(tmp_path / below, aug=True)
    train, val, aug = (data.dataset(n, tmp_path, s)
                       for n, s in (("voc", "train"), ("voc", "val"), ("voc-aug", "train")))
    assert (train.ids, val.ids) == (["2007_000000", "2007_000001"], ["2007_000002"])
    assert (len(aug), len(data.dataset("voc-aug", tmp_path, "val"))) == (3, 1)
    assert train.image(1).shape == (10, 13, 3) and (train.label(1) == 1).all() and (aug.label(1) == 6).all()
    assert (data.dataset("voc-aug", tmp_path, "val").label(0) == 2).all()         # val has no augmented masks
    for line in ("/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png", "{}  1", "{}\r", " {}.JPG ", "{}.png"):
        for encoding in ("utf-8-sig", "utf-16", "utf-16-le"):
            (base / "ImageSets/Segmentation/train.txt").write_text(
                "\n".join(line.format(i) for i in train.ids), encoding)
            assert data.VOC(tmp_path).ids == train.ids
    for name, content in (("my café", "my café.JPG".encode("latin-1")), ("a.b c", b"a.b c\n"),
                          ("d e", b"JPEGImages/d e.jpg SegmentationClass/d e.png"),
                          (os.fsdecode(b"caf\xe9"), b"caf\xe9 -1")):
        shutil.copy(base / "JPEGImages/2007_000000.jpg", base / f"JPEGImages/{name}.jpg")
        (base / "ImageSets/Segmentation/train.txt").write_bytes(content)
        assert data.VOC(tmp_path).ids == [name]
    train.limit(1)
    assert len(train) == len(train.images) == len(train.labels) == 1


def test_voc_takes_lists_and_pictures_of_other_names_and_names_those_that_are_there(tmp_path):
    base = make_voc(tmp_path / "VOC2012", aug=True)
    lists, images = base / "ImageSets/Segmentation", base / "JPEGImages"
    (lists / "train_aug.txt").rename(lists / "trainaug.txt")                      # as most projects call it
    assert len(data.VOC(tmp_path, aug=True)) == 3
    (lists / "trainaug.txt").rename(lists / "more.txt")
    there = "(here: more.txt, train.txt, val.txt)"
    refused(lambda: data.VOC(tmp_path, aug=True), lists / "train_aug.txt", there)
    refused(lambda: data.VOC(tmp_path, "test"), lists / "test.txt", there, "write it, or get it with")
    first, second = data.VOC(tmp_path).ids
    (images / f"{first}.jpg").rename(images / f"{first}.JPEG")
    save(images / f"{second}.tif", ("RGB", (13, 10), 0))  # there is a .jpg of that name
    save(base / f"SegmentationClass/{first}.bmp", np.full((10, 12), 3, np.uint8))
    (base / f"SegmentationClass/{first}.png").unlink()
    source = data.VOC(tmp_path)
    assert [file.name for file in source.images] == [f"{first}.JPEG", f"{second}.jpg"]
    assert (source.label(0) == 3).all() and (source.label(1) == 1).all()
    (lists / "train.txt").write_text(f"images/{first}.JPEG masks/{first}.bmp\nmasks\\{second}.tif\n")
    assert data.VOC(tmp_path).ids == [first, second]
    images.rename(base / "images")
    refused(lambda: data.VOC(tmp_path), base / "JPEGImages", "(here: ImageSets, SegmentationClass, ")


def test_voc_of_ones_own_has_the_classes_of_names_txt(tmp_path):
    base = make_voc(tmp_path)
    file = base / "ImageSets/Segmentation/names.txt"
    for encoding in ("utf-8-sig", "utf-16"):
        file.write_text("road\nHäuser aus Stein\n\nsky \n", encoding)
        source = data.VOC(tmp_path)
        assert source.names == ["road", "Häuser aus Stein", "sky"]
        assert source.things == 2 and source.background
    save(source.labels[0], np.full((10, 12), 2, np.uint8), data.palette()[::-1])  # any colours
    assert (source.label(0) == 2).all()
    save(source.labels[0], np.full((10, 12), 3, np.uint8))
    refused(lambda: source.label(0), source.labels[0], "label value 3", "(0 to 2, and 255)")
    assert get_data.check_splits("voc", tmp_path) == 1
    for content in (b"road", b"", b"\n".join(b"%d" % i for i in range(256)), b"road\ncaf\xe9"):
        file.write_bytes(content)
        refused(lambda: data.VOC(tmp_path), file)


def test_other_class_names_are_noticed_by_a_run_that_goes_on_and_by_its_caches(tmp_path):
    names = make_voc(tmp_path / "data") / "ImageSets/Segmentation/names.txt"      # the label of val is 2
    names.write_text("road\nsky\ncar\n")
    args = options("--data", "voc", "--root", str(tmp_path / "data"), "--batch", "1", out=tmp_path / "run")
    sources = train.open_data(args, None)
    train.cached_labels(args, sources["val"])
    state = {"names": ["road", "sky", "car"],
             "images": {split: train.identity(source) for split, source in sources.items()}}
    train.open_data(args, state)
    names.write_text("road\ncar\nsky\n")
    refused(lambda: train.open_data(args, state), "last.pt: the class names of voc have changed")
    names.write_text("road\nsky\n")
    refused(lambda: train.open_data(args, None), "one class beside the background")
    args.classes = 2                                      # kinds of it
    val = train.open_data(args, None)["val"]
    refused(lambda: train.cached_labels(args, val), "label value 2 is not in use")


def make_masks(root, photographs, masks, names="road\nsky\ncar\n"):
    """Photographs and masks of classes 0, 1, 2, 0 ... below root, of these names; returns Masks of both."""
    for name in photographs:
        save(root / "photos" / name, ("RGB", (12, 10), 0))
    for i, name in enumerate(masks):
        save(root / "masks" / name, np.full((10, 12), i % 3, np.uint8))
    (root / "masks/names.txt").write_text(names)
    return data.Masks(root / "photos", root / "masks")


@pytest.mark.parametrize("photographs, masks", (
    (("a.jpg", "b.tif", "sub/c.webp"), ("a.png", "b.png", "sub/c.png")),
    (("a.jpg", "a_b.jpg", "sub/c.jpg"), ("a_mask.png", "a_b_mask.png", "sub/c_mask.png")),
    (("a_1_RGB.tif", "a_2_RGB.tif", "b_1_RGB.tif"), ("a_1_label.png", "a_2_label.png", "b_1_label.png")),
    (("aachen/aachen_000000_000019_leftImg8bit.png", "aachen/aachen_000001_000019_leftImg8bit.png",
      "bonn/bonn_000000_000019_leftImg8bit.png"),
     ("aachen/aachen_000000_000019_gtFine_labelTrainIds.png",
      "aachen/aachen_000001_000019_gtFine_labelTrainIds.png",
      "bonn/bonn_000000_000019_gtFine_labelTrainIds.png"))))
def test_masks_belong_to_the_photographs_of_their_names_or_endings(tmp_path, photographs, masks):
    source = make_masks(tmp_path, photographs, masks)
    assert source.names == ["road", "sky", "car"] and source.upright and len(source) == 3
    assert [str(file.relative_to(tmp_path / "photos")) for file in source.images] == list(photographs)
    assert [int(source.label(i).mean()) for i in range(3)] == [0, 1, 2]
    assert source.summary().endswith("0 photographs have no mask, 0 masks have no photograph")


def test_photographs_without_a_mask_are_counted_and_what_does_not_fit_is_named(tmp_path):
    source = make_masks(tmp_path, ("a.jpg", "b.jpg", "c.jpg", "d.jpg"), ("b.png", "d.png", "e.png"))
    assert source.ids == ["b", "d"] and [int(source.label(i).mean()) for i in range(2)] == [0, 1]
    assert source.summary().endswith(f"labels in {tmp_path}/masks; 2 photographs have no mask, "
                                     "1 masks have no photograph")
    for names, label_names, pairs in (
            (["a10_b_x", "a20_b_x"], ["a10", "a20"], {"a10_b_x": "a10", "a20_b_x": "a20"}),
            (["IMG_1"], ["IMG_2_label"], {}),             # a number is no ending
            (["img_1", "img_2", "img_3"], ["img_2_label"], {"img_2": "img_2_label"}),
            (["a_1", "b_1", "c_2"], ["a_1_mask", "b_1_mask"], {"a_1": "a_1_mask", "b_1": "b_1_mask"}),
            (["cat_left", "cat_right"], ["cat_right_mask", "cat_left_mask"],
             {"cat_left": "cat_left_mask", "cat_right": "cat_right_mask"}),
            (["my_photos/a"], ["my_masks/b"], {}), (["a"], ["b"], {})):
        assert data.pair_names(names, label_names) == pairs, names
    values = np.full((10, 12), 255, np.uint8)
    values[:, :4] = 2
    save(source.labels[0], values)
    assert np.array_equal(source.label(0), values)        # 255 is void
    values[0, 0] = 3
    refused(lambda: source.label(save(source.labels[0], values) and 0), source.labels[0], "label value 3")
    exif = Image.Exif()
    exif[0x112] = 6                                       # shown, and scored, as 10 x 12
    save(source.images[1], ("RGB", (12, 10), 0), exif=exif)
    refused(lambda: source.label(1), source.labels[1], "12 x 10", "its image 10 x 12", "its EXIF turns it")
    save(source.labels[1], np.ones((12, 10), np.uint8))
    assert source.label(1).shape == source.image(1).shape[:2] == (12, 10)
    (tmp_path / "masks/names.txt").unlink()
    again = lambda: data.Masks(tmp_path / "photos", tmp_path / "masks")
    refused(again, tmp_path / "masks/names.txt: no such file; write the names")
    (tmp_path / "masks/names.txt").write_text("a\nb\n")
    (tmp_path / "masks").rename(tmp_path / "photos/masks")
    refused(lambda: data.Masks(tmp_path / "photos/masks", tmp_path / "none"), "none")
    refused(lambda: data.Masks(save(tmp_path / "x/other.jpg").parent, tmp_path / "photos/masks"),
            "no mask is named like a photograph (the first are b and other)")


def test_all_files_of_a_data_set_that_cannot_be_read_are_named_at_once(tmp_path):
    source = data.VOC(make_voc(tmp_path, n=16), "train")
    data.raise_unreadable(source)                         # nothing is wrong
    source.images[3].write_bytes(b"")
    refused(lambda: data.raise_unreadable(source), source.images[3], "cannot read this image", "leave it out")
    source.labels[7].unlink()
    refused(lambda: data.raise_unreadable(source), f"2 files cannot be used: {source.images[3]}, "
            f"{source.labels[7]}; ", f"python tools/get_data.py voc --root {tmp_path} --check")
    for image in source.images:
        image.write_bytes(b"")
    message = refused(lambda: data.raise_unreadable(source), "15 files cannot be used", " and 5 more; ")
    assert message.count(".jpg") == 10
    for photos in (tmp_path / "JPEGImages", [tmp_path / "JPEGImages"]):
        refused(lambda: data.raise_unreadable(data.Folder(photos)), "get_data.py folder --root "
                f"{tmp_path}/JPEGImages --check")


def test_each_missing_piece_of_voc_is_named_with_the_command_that_gets_it(tmp_path):
    get = "python tools/get_data.py voc --root "
    refused(lambda: data.VOC(tmp_path / "none"), tmp_path / "none/VOCdevkit/VOC2012", get, tmp_path / "none")
    base, lists = make_voc(tmp_path / "VOC2012"), tmp_path / "VOC2012/ImageSets/Segmentation"
    refused(lambda: data.VOC(tmp_path, aug=True), lists / "train_aug.txt", "get_data.py voc-aug --root")
    for folder in ("SegmentationClass", "JPEGImages"):
        (base / folder).rename(base / "away")
        refused(lambda: data.VOC(tmp_path), base / folder, get)
        (base / "away").rename(base / folder)
    for listed, reason in (("2007_000000\n2007_000001\n2007_000000\n", "2007_000000 is listed twice"),
                           ("\n", "empty")):
        (lists / "train.txt").write_text(listed)
        refused(lambda: data.VOC(tmp_path), lists / "train.txt", reason)
    (lists / "train.txt").unlink()
    refused(lambda: data.VOC(tmp_path), lists / "train.txt", get)


def test_bench_times_every_stage_of_a_run(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(train.BY_DATA_SET, "voc", dict(size=64, crop=32, large=128, window=64))
    monkeypatch.setattr(bench, "BUDGET", 1e-3)
    bench.stages("tiny", 2)
    rows = re.findall(r"^\| (\w+)\b.* \| [\d.]+ \| [\d.]+ \|$", capsys.readouterr().out, re.M)
    assert rows == [*["photograph"] * 3, "windows", "windows", "CAM", "evaluation", "evaluation", "PAR",
                    "step", "step"]


def test_the_textbook_forms_of_bench_compute_what_ours_do():
    image, masks, vit = torch.rand(2, 3, 20, 17), torch.rand(2, 4, 5, 4), small_vit()
    assert_close(bench.textbook_par(image, masks), par.PAR()(image, masks), rtol=1e-4, atol=1e-5)
    seen, centroids, trained = randn(1, 3, 64, 64), randn(3, 48), copy.deepcopy(vit).requires_grad_(True)
    assert_close(bench.textbook_vit(vit, seen)[0], vit(seen)[0], rtol=1e-4, atol=1e-5)
    assert_close(bench.textbook_cam(trained, seen, centroids),
                 cam.class_activation_maps(vit, seen, centroids), rtol=1e-4, atol=1e-5)


def test_coarse_masks_of_photographs_are_means_of_cells_a_fifth_wrong_or_blurred_and_void_is_in_none():
    label = np.zeros((160, 160), np.uint8)
    label[:, 84:], label[:8] = 7, 255
    clean, wrong, blurred = par_on_photos.coarse_masks(label, np.array([0, 7]), np.random.default_rng(0))
    assert not clean[:, 0].any() and clean[:, 5, 10].tolist() == [0.5, 0.5]
    assert (wrong.argmax(0) != clean.argmax(0)).sum() == (wrong != clean).any(0).sum() == 80
    assert blurred[:, 1, 0].tolist() == [0.75, 0]         # at the border: 9 of 12 cells
    assert par_on_photos.miou(np.array([0, 0, 1, 255]), np.array([0, 1, 1, 0]), 2) == 50


def test_the_made_up_voc_of_bench_loads_as_voc_does(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "TRAIN", 3)
    monkeypatch.setattr(bench, "VAL", 33)                 # the 33rd is the first scene again
    bench.make_voc(tmp_path)
    train_split, val = data.VOC(tmp_path), data.VOC(tmp_path, "val")
    assert len(train_split) == 3 and len(val) == 33 and val.image(0).shape == (375, 500, 3)
    assert np.array_equal(val.label(32), train_split.label(0)) and len(np.unique(val.label(0))) > 2


@pytest.mark.parametrize("images, labels", (("images/train2017", "annotations/train2017"),
                                            ("train2017", "stuffthingmaps/train2017")))
def test_coco_samples_are_the_images_with_a_thing_pixel(tmp_path, images, labels):
    make_coco(tmp_path, {"a": 0, "b": 90 - 1, "c": 91, "d": 255, "e": 181}, images, labels)
    mixed = np.full((8, 9), 105, np.uint8)
    mixed[3, 4] = 16                                      # one pixel of cat in the sky
    save(tmp_path / labels / "e.png", mixed)
    coco80, stuff27 = (data.dataset(n, tmp_path, "train") for n in ("coco80", "cocostuff27"))
    assert coco80.ids == stuff27.ids == ["a", "b", "e"]
    assert (len(coco80.names), coco80.things, coco80.stuff, coco80.background) == (81, 80, 0, True)
    assert (len(stuff27.names), stuff27.things, stuff27.stuff, stuff27.background) == (27, 12, 15, False)
    assert coco80.names[coco80.label(2)[3, 4]] == "cat" and coco80.label(2)[0, 0] == 0
    assert [stuff27.names[stuff27.label(2)[at]] for at in ((3, 4), (0, 0))] == ["animal", "sky"]


def test_each_missing_piece_of_coco_is_named_with_the_command_that_gets_it(tmp_path):
    images, labels = tmp_path / "images/train2017", tmp_path / "annotations/train2017"
    refused(lambda: data.dataset("coco"), "coco80", "cocostuff27")                # an unknown name
    refused(lambda: data.COCO(tmp_path), images, f"python tools/get_data.py coco80 --root {tmp_path}")
    images.mkdir(parents=True)
    refused(lambda: data.COCO(tmp_path, kind="cocostuff27"), labels, "get_data.py cocostuff27 --root")
    labels.mkdir(parents=True)
    refused(lambda: data.COCO(tmp_path), images, "no .jpg images")
    make_coco(tmp_path, {"a": 120, "b": 255})
    refused(lambda: data.COCO(tmp_path), labels, "no map shows a thing")


def test_scenes_differ_by_split_seed_and_number_and_stay_as_they_are_whatever_a_reader_does():
    scenes = [data.Shapes(split, seed).image(i)
              for split in ("train", "val") for seed in (0, 1) for i in (0, 1)]
    assert len({scene.tobytes() for scene in scenes}) == 8
    kinds = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "new_object", lambda rng, category: category)
        patch.setattr(data, "render", lambda rng, objects, *rest: kinds.append(objects))
        for i in range(30):
            data.shapes.__wrapped__((0, 0, i))
    assert all(len(set(objects)) == len(objects) in (2, 3) for objects in kinds)  # of a kind one
    source, label = data.Shapes(), data.Shapes().label(0)
    assert len(np.unique(label)) in (3, 4) and label.max() <= 5                   # background, two or three
    for array in (source.image(0), source.label(0)):
        array[:] = 9
    assert np.array_equal(source.image(0), scenes[0]) and np.array_equal(source.label(0), label)


def test_the_list_of_coco_samples_is_kept_and_follows_names_and_sizes(tmp_path, monkeypatch):
    make_coco(tmp_path, {"a": 3, "b": 120, "c with space": 7})
    real, reads, ids = data.open_label, [], lambda root=".": data.COCO(root, cache=tmp_path / "cache").ids
    monkeypatch.setattr(data, "open_label", lambda *args: reads.append(args) or real(*args))
    monkeypatch.chdir(tmp_path)
    assert ids() == ["a", "c with space"] and len(reads) == 3
    os.utime("annotations/train2017/a.png", (1, 1))       # copied again, or another spelling: the same list
    assert ids(tmp_path) == ids("images/..") == ["a", "c with space"] and len(reads) == 3
    make_coco(tmp_path, {"d": 1})                         # another image: another list
    assert ids() == ["a", "c with space", "d"] and len(reads) == 7
    noise = np.random.default_rng(0).integers(100, 120, (8, 9)).astype(np.uint8)
    save(tmp_path / "annotations/train2017/a.png", noise)                         # a map of another size
    assert ids() == ["c with space", "d"] and len(reads) == 11
    for content in (b"", b'["a", "c wi'):                 # after a power cut: the list is made again
        for file in (tmp_path / "cache").iterdir():
            file.write_bytes(content)
        reads.clear()
        assert ids() == ids() == ["c with space", "d"] and len(reads) == 4


def test_an_unreadable_coco_map_stays_a_sample_that_is_named_and_is_not_remembered(tmp_path):
    broken = make_coco(tmp_path, {"a": 3, "b": 120, "c": 7}) / "annotations/train2017/b.png"
    good, found = broken.read_bytes(), lambda: data.COCO(tmp_path, cache=tmp_path / "cache")
    broken.write_bytes(good[:40] + bytes(len(good) - 40))
    assert found().ids == ["a", "b", "c"] and refused(lambda: found().label(1), broken)
    broken.write_bytes(good)
    assert found().ids == ["a", "c"]


# ---- decoding


def test_labels_are_palette_or_grey_files_of_known_indices_and_others_are_named(tmp_path):
    values = np.array([[3, 255], [21, 0]], np.uint8)
    for palette in (None, data.palette()):
        file = save(tmp_path / "label.png", values, palette)
        assert (data.open_label(file, 22) == values).all()
        refused(lambda: data.open_label(file, 21), file, "label value 21", "(0 to 20, and 255)")
    for mode, colour in (("RGB", (1, 1, 1)), ("LA", (1, 1)), ("1", 1), ("I;16", 300)):
        save(file, (mode, (4, 3), colour))
        refused(lambda: data.open_label(file), file, "palette or grey PNG")
    save(file, ("L", (4, 3), 3), format="JPEG")           # its values are not exact
    refused(lambda: data.open_label(file), file, "is a JPEG", "palette or grey PNG")
    save(make_coco(tmp_path, {"a": 3}) / "annotations/train2017/a.png",
         np.where(np.eye(8, 9), 182, 3).astype(np.uint8))                         # COCO's ids end at 181
    for value in (182, 67):                               # dining table is category 67, and 66 here
        values = np.where(np.eye(8, 9), value, 3).astype(np.uint8)
        file = save(tmp_path / "annotations/train2017/a.png", values)
        for kind in ("coco80", "cocostuff27"):
            refused(lambda: data.COCO(tmp_path, kind=kind).label(0), file, f"label value {value}",
                    "(0 to 181, with gaps, and 255)")
    grey = np.arange(256).repeat(3).reshape(256, 3)
    save(file, np.full((8, 9), 3, np.uint8), grey)
    assert (data.COCO(tmp_path).label(0) == 4).all()
    save(file, np.full((8, 9), 3, np.uint8), data.palette())
    refused(lambda: data.COCO(tmp_path).label(0), file, "palette shows label value 3 in colour [128, 128, 0]")


def test_a_voc_mask_whose_palette_was_sorted_anew_is_refused(tmp_path):
    """A mask that went through RGB and a palette optimiser has the same colours at other values."""
    base, mask = make_voc(tmp_path), np.zeros((10, 12), np.uint8)
    mask[2:6, 3:9], mask[1, 3:9] = 10, 255
    file, grey = base / "SegmentationClass/2007_000000.png", np.repeat(np.arange(256), 3)
    for palette in (data.palette(), grey, data.palette()[:21]):                      # the last has 21 colours
        save(file, mask, palette)
        assert (data.VOC(tmp_path).label(0) == mask).all()
    save(file, mask, data.palette())
    with Image.open(file) as image:
        save(file, image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=8))
    refused(lambda: data.VOC(tmp_path).label(0), file, "palette", "original file")
    save(file, (mask == 10).astype(np.uint8), grey.reshape(256, 3)[[0, 10]])      # grey 10, but as value 1
    refused(lambda: data.VOC(tmp_path).label(0), file, "label value 1 ")


def test_a_label_of_another_size_than_its_image_is_named_and_a_broken_image_by_itself(tmp_path):
    base = make_voc(tmp_path)
    file = save(base / "SegmentationClass/2007_000000.png", np.zeros((12, 10), np.uint8))
    refused(lambda: data.VOC(tmp_path).label(0), file, "10 x 12", "12 x 10")
    exif = Image.Exif()
    exif[0x112] = 6                                       # a viewer shows it as tall as the label
    save(base / "JPEGImages/2007_000000.jpg", ("RGB", (12, 10), 0), exif=exif)
    refused(lambda: data.VOC(tmp_path).label(0), file, "10 x 12", "12 x 10", "its EXIF turns it")
    (base / "JPEGImages/2007_000001.jpg").unlink()
    refused(lambda: data.VOC(tmp_path).label(1), base / "JPEGImages/2007_000001.jpg")


def test_images_of_unknown_range_are_refused(tmp_path):
    ramp = lambda low, high, kind: np.linspace(low, high, 81).reshape(9, 9).astype(kind)
    for name, *values in (("float.tif", 0, 1, np.float32), ("32bit.tif", 0, 70_000, np.int32),
                          ("negative.tif", -9, 9000, np.int32), ("12bit.png", 0, 4095, np.uint16),
                          ("14bit.tif", 0, 16383, np.uint16)):
        refused(lambda: data.open_image(save(tmp_path / name, ramp(*values))), name, "8 bits")
    for high in (4095, 16383, 65535):                     # of colours Pillow reads the high bytes
        for kind, alpha in ((2, []), (6, [np.full((9, 9), 65535)])):
            pixels = np.stack([ramp(0, high, int)] * 3 + alpha, 2).astype(">u2")
            file, rows = tmp_path / "colours.png", b"".join(b"\0" + row.tobytes() for row in pixels)
            file.write_bytes(b"\x89PNG\r\n\x1a\n"
                             + chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 16, kind, 0, 0, 0))
                             + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
            if high == 65535:
                assert data.open_image(file).max() == 255
            else:
                refused(lambda: data.open_image(file), file, "does not say which value is white", "8 bits")
    for name, kind in (("16bit.png", np.uint16), ("16bit.tif", np.int32)):
        grey = data.open_image(save(tmp_path / name, ramp(0, 65535, kind)))
        assert grey.shape == (9, 9, 3) and abs(grey.mean() - 127.5) < 1
        assert (grey.min(), grey.max()) == (0, 255)


def test_transparent_pixels_are_white_whatever_colour_hides_there_but_not_those_of_a_tiff(tmp_path):
    rng = np.random.default_rng(0)
    cut, colours = rng.random((9, 8)) < 0.5, rng.integers(0, 250, (9, 8, 3), np.uint8)
    shown, alpha = np.where(cut[..., None], 255, colours), np.where(cut, 0, 255).astype(np.uint8)
    grey = np.where(cut, 7, 100 + colours[..., 0] // 9).astype(np.uint8)
    grey_shown = np.where(cut, 255, grey)[..., None].repeat(3, 2)
    for name in ("rgba.png", "rgba.webp"):
        file = save(tmp_path / name, np.dstack([colours, alpha]), lossless=True, exact=True)
        assert np.array_equal(data.open_image(file), shown), name
    la = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    for name, palette, options in (("grey.png", None, {"transparency": 7}), ("la.png", None, {}),
                                   ("palette.png", np.arange(256).repeat(3), {"transparency": 7})):
        file = save(tmp_path / name, la if name == "la.png" else grey, palette, **options)
        assert np.array_equal(data.open_image(file), grey_shown), name
    half = np.dstack([colours, np.full((9, 8), 128, np.uint8)])
    expected = colours * (128 / 255) + 255 * (127 / 255)
    assert abs(data.open_image(save(tmp_path / "half.png", half)) - expected).max() <= 1
    opaque = np.dstack([colours, np.full((9, 8), 255, np.uint8)])
    for picture, name in ((opaque, "opaque.png"), (np.dstack([colours, alpha]), "infrared.tif")):
        assert np.array_equal(data.open_image(save(tmp_path / name, picture)), colours)


def test_files_that_pillow_does_not_know_are_called_what_they_are(tmp_path):
    """A TIFF of five bands, one of three bands of floats, and the first bytes of a HEIC and of a BigTIFF."""
    def tiff(samples, bits, kind):                        # 2 x 2 pixels in one strip
        tags = [(256, 3, [2]), (257, 3, [2]), (258, 3, [bits] * samples), (259, 3, [1]), (262, 3, [1]),
                (273, 4, [8]), (277, 3, [samples]), (278, 3, [2]), (279, 4, [4 * samples * bits // 8]),
                (339, 3, [kind] * samples)]
        directory, rest = struct.pack("<H", len(tags)), b""
        start = 8 + 4 * samples * bits // 8               # of the directory
        for tag, number, values in tags:
            value = struct.pack(f"<{len(values)}{'H' if number == 3 else 'I'}", *values)
            if len(value) > 4:
                value, rest = struct.pack("<I", start + 6 + 12 * len(tags) + len(rest)), rest + value
            directory += struct.pack("<HHI", tag, number, len(values)) + value.ljust(4, b"\0")
        return b"II*\0" + struct.pack("<I", start) + bytes(start - 8) + directory + bytes(4) + rest

    for name, content, kind, advice in (
            ("five.tif", tiff(5, 8, 1), "a TIFF of more bands", "save three bands with 8 bits"),
            ("floats.tif", tiff(3, 32, 3), "a TIFF of more bands", "save three bands with 8 bits"),
            ("big.tif", b"MM\0+" + bytes(99), "a TIFF", "save three bands"),
            ("photo.heic", b"\0\0\0\x18ftypheic" + bytes(99), "HEIC", "convert it to JPEG"),
            ("photo.jpg", b"\0\0\0\x18ftypmif1" + bytes(99), "HEIC", "convert it to JPEG")):
        (tmp_path / name).write_bytes(content)
        for read in (data.open_image, data.open_label):
            message = refused(lambda: read(tmp_path / name), tmp_path / name, kind, advice)
            assert "get it again" not in message
    (tmp_path / "four.tif").write_bytes(tiff(1, 8, 1))    # the maker above makes what can be read, too
    assert data.open_image(tmp_path / "four.tif").shape == (2, 2, 3)


def test_photographs_are_turned_as_pillow_turns_them_and_data_sets_are_not(tmp_path):
    exif, pixels = Image.Exif(), np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    for exif[0x112] in range(1, 9):
        for name in ("a.png", "a.webp", "a.tif", "a.jpg"):
            file = save(tmp_path / name, pixels, exif=exif, lossless=True)
            with Image.open(file) as image:
                expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
            assert np.array_equal(data.open_image(file, upright=True), expected)
            assert data.upright_size(file) == expected.shape[1::-1]
        assert (data.open_image(tmp_path / "a.png") == pixels).all()
    assert data.Folder.upright and not data.VOC.upright and not data.COCO.upright


def test_a_readable_picture_is_never_refused_for_its_exif(tmp_path):
    """Tags that Pillow cannot write anew, and EXIF that it cannot read."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255                                  # left half white
    turn, file = struct.pack("<HHII", 0x112, 3, 1, 6), tmp_path / "a.jpg"
    jpg, png = (encoded(Image.fromarray(pixels), kind) for kind in ("JPEG", "PNG"))
    for tag in (struct.pack("<HHIIIii", 0x11A, 10, 1, 38, 0, -1, 0),
                struct.pack("<HHIII", 0x128, 2, 2, 0x3131, 0)):
        exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + turn + tag
        file.write_bytes(jpg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpg[2:])
        turned = data.open_image(file, upright=True)
        assert turned.shape == (32, 16, 3) and turned[:16].min() > 200 and turned[16:].max() < 50
    save(tmp_path / "bad.webp", pixels, exif=b"Exif\0\0junkjunk", lossless=True)
    (tmp_path / "bad.png").write_bytes(png[:33] + chunk(b"eXIf", b"\0\x08\0\2") + png[33:])
    for name in ("bad.webp", "bad.png"):
        assert (data.open_image(tmp_path / name, upright=True) == pixels).all()


def test_photographs_of_ones_own_are_antialiased_and_reduced_and_those_of_data_sets_as_peers_do(tmp_path):
    """Every fourth column is white, and between them bilinear samples see black."""
    columns = np.zeros((512, 512, 3), np.uint8)
    columns[:, 1::4] = 255
    for name in ("a.png", "b.jpg"):
        save(tmp_path / name, columns, quality=100)
    found = data.Folder(tmp_path)
    for i in range(2):                                    # the mean is 63.75
        assert abs(found.squashed(i, 32).astype(int) - 64).max() < 6
        reduced = data.open_image(found.images[i], least=100)
        assert reduced.shape == [(103, 103, 3), (128, 128, 3)][i] and abs(reduced.mean() - 64) < 3
    assert data.open_image(found.images[1], least=513).shape == columns.shape
    found.upright, bilinear = False, lambda x: data.squash(x, len(x) // 2, antialias=True)
    assert found.squashed(0, 32).max() == 0 and found.squashed(1, 32).max() < 20
    assert np.array_equal(bilinear(columns), data.squash(columns, 256))           # not more than twice
    assert abs(data.squash(columns, 128, antialias=True).astype(int) - 64).max() < 40


HUGE = """
import sys
import data
def peak():                                               # in KB; ru_maxrss would be the parent's
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
imports = peak()                                          # torch for a GPU takes twice as much
photo = data.Folder(sys.argv[1])
squashed = photo.squashed(0, 320)
assert squashed[:, 0].min() > 220 and squashed[:, -1].max() < 30                  # turned
assert photo.image(0).shape == (6000, 4500, 3) and data.upright_size(photo.images[0]) == (9000, 12000)
print(peak() - imports)
"""


def test_a_jpeg_of_108_megapixels_is_reduced_while_it_is_decoded(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    save(tmp_path / "a.jpg", Image.linear_gradient("L").resize((12000, 9000)).convert("RGB"), exif=exif)
    done = subprocess.run([sys.executable, "-c", HUGE, tmp_path], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) < 0.5e6, done


# ---- hostile files


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_damaged_huge_or_no_file_is_named_as_an_image_and_as_a_label(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8))
    jpg, png = encoded(noise, "JPEG"), encoded(noise, "PNG")
    header = lambda *size: png[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)) + png[33:]
    for name, content, reason in (
            ("half.jpg", jpg[:len(jpg) // 2], "truncated"), ("half.png", png[:len(png) // 2], ""),
            ("head.jpg", jpg[:20], ""), ("magic.jpg", b"\0\1" + jpg[2:], "no JPEG"),
            ("zero.png", b"", "no JPEG"), ("text.jpg", b"<html>\n" * 99, "no JPEG"),
            # PostScript is a program: Pillow by itself would have it run
            ("eps.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "no JPEG"),
            ("huge.png", header(60000, 60000), "3600000000 pixels"),
            ("huge.jpg", jpg.replace(b"\0\x28\0\x28", b"\x4e\x20\x4e\x20", 1), "400000000 pixels"),
            ("large.png", header(10000, 9500), "10000 x 9500 pixels"), ("folder.jpg", None, "not a file"),
            ("loop.jpg", "loop.jpg", "symbolic links"), ("link.jpg", "nowhere.jpg", "No such file")):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content:
            (tmp_path / name).symlink_to(content)
        else:
            (tmp_path / name).mkdir()
        for read in (data.open_image, data.open_label):
            refused(lambda: read(tmp_path / name), tmp_path / name, reason)


READ_ALL = """
import sys
from pathlib import Path
import data
for file in Path(sys.argv[1]).iterdir():
    for read in (data.open_image, lambda file: data.open_image(file, upright=True), data.open_label):
        try:
            assert read(file).dtype == "uint8"
            print("decoded")
        except data.UserError as error:
            assert str(error).startswith(f"{file}: ") and "\\n" not in str(error)
            print("refused", error)
"""


def test_mutated_files_and_pipes_decode_or_are_refused_and_never_warn_or_hang(tmp_path):
    rng = np.random.default_rng(10)
    photo, exif = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((48, 40)), Image.Exif()
    exif[0x112], exif[0x10F] = 6, "camera"
    transparent = photo.quantize(16)
    transparent.info["transparency"] = bytes(range(0, 160, 10))                   # Pillow warns of this
    whole = {"exif.jpg": encoded(photo, "JPEG", exif=exif),
             "progressive.jpg": encoded(photo, "JPEG", progressive=True),
             "cmyk.jpg": encoded(photo.convert("CMYK"), "JPEG"), "exif.png": encoded(photo, "PNG", exif=exif),
             "grey.png": encoded(photo.convert("L"), "PNG"), "palette.png": encoded(transparent, "PNG")}
    for name, content in whole.items():
        (tmp_path / f"whole_{name}").write_bytes(content)
        for i in range(50):
            mutated = bytearray(content)
            for _ in range(rng.integers(1, 6)):           # headers are hit as often as bodies
                at = int(rng.integers(min(len(mutated), 200 if rng.random() < 0.5 else 10 ** 6)))
                mutated[at:at + rng.integers(2)] = rng.bytes(rng.integers(1, 3))
            if i % 3 == 0:
                del mutated[rng.integers(1, len(mutated)):]
            (tmp_path / f"{i:02}_{name}").write_bytes(mutated)
    os.mkfifo(tmp_path / "pipe.jpg")
    command = [sys.executable, "-c", READ_ALL, tmp_path]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 * 307 and min(lines.count("decoded"), done.stdout.count("refused ")) > 100
    assert [f"{tmp_path}/pipe.jpg: " in line and "not a file" in line for line in lines].count(True) == 3


# ---- folders


def test_a_folder_gives_its_images_and_those_of_subfolders_and_says_what_it_leaves_out(tmp_path, capsys):
    root = tmp_path / ".photos"                           # a root may be anything
    for name in ("b.png", "a.JPG", "sub/z/c.jpeg", "sub/a.webp", "Sub2/d.bmp", "sub/e.tif", "b.jpg/c.png",
                 ".ipynb_checkpoints/c.png", "sub/.thumbnails/d.png", "._a.png", "@eaDir/e.png",
                 "Thumbs/a.png", "sub/h.jfif", "sub/i.jpe", "sub/j.jif", "../other/f.png"):
        save(root / name, format={".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}.get(name[-4:], "JPEG"))
    for name in ("x.HEIC", "sub/y.heic", "sub/z/x.heic", "sub/z/w.heic", "b.jpg/z.gif", ".v.heic",
                 "@eaDir/u.gif"):
        (root / name).write_bytes(b"")
    (root / "notes.txt").write_text("no image")
    (root / "link").symlink_to(tmp_path / "other")
    (root / "sub" / "up").symlink_to("..")                # would never end
    (root / "g.png").symlink_to(tmp_path / "other/f.png")                         # a linked file is an image
    found = data.Folder(root, n_classes=3)
    assert found.summary().endswith(
        "; left out: 4 .heic, 2 linked folders, 1 folders of thumbnails, 1 .gif, 1 .txt (convert pictures "
        "among these to JPEG)") and not capsys.readouterr().err
    assert found.ids == ["a", "b", "g", "Sub2/d", "b.jpg/c", "sub/a", "sub/e", "sub/h", "sub/i", "sub/j",
                         "sub/z/c"]
    assert [found.image(i).shape for i in range(11)] == [(3, 4, 3)] * 11 and found.label(0) is None
    assert found.names == ["background", "cluster 1", "cluster 2", "cluster 3"] and found.things == 3


def test_a_folder_may_be_one_image_or_a_list_and_what_is_bad_in_it_is_named_not_dropped(tmp_path):
    one = save(tmp_path / "a.b.png")
    assert data.Folder(one).ids == ["a.b"] and data.Folder(str(one)).image(0).shape == (3, 4, 3)
    for name in ("x/a.png", "x/sub/b.png", "y/b.png"):
        save(tmp_path / name)
    (tmp_path / "y/b.jpg").write_bytes(b"")
    (tmp_path / "y/d.jpg").symlink_to("nowhere")
    found = data.Folder([tmp_path / "y", one, str(tmp_path / "x")])
    assert found.ids == ["b", "b", "d", "a.b", "a", "sub/b"]
    assert [f.name for f in found.images] == ["b.jpg", "b.png", "d.jpg", "a.b.png", "a.png", "b.png"]
    for i in (0, 2):
        refused(lambda: found.image(i), found.images[i])


def test_a_folder_that_is_empty_absent_or_not_readable_is_named(tmp_path, monkeypatch):
    private, real = save(tmp_path / "photos/private/a.png").parent, os.scandir
    (tmp_path / "empty" / "below").mkdir(parents=True)
    (tmp_path / "empty" / "readme.txt").write_text("")
    refused(lambda: data.Folder([private, tmp_path / "empty"]), tmp_path / "empty", ".jpg",
            "no images here; left out: 1 .txt (convert pictures among these to JPEG)")
    refused(lambda: data.Folder(tmp_path / "none"), tmp_path / "none", "no such file or folder")

    denied = raising(PermissionError(13, "Permission denied", str(private)))      # a superuser may read all
    monkeypatch.setattr(os, "scandir", lambda path: (denied if str(path) == str(private) else real)(path))
    refused(lambda: data.Folder(tmp_path / "photos"), private, "Permission denied")


# ---- crop and augmentation


def draws_of(*squares, **change):
    """Draws of whole, unchanged images but for (scale, y, x, flip) of each sample and the named numbers."""
    neutral = dict(brightness=1, contrast=1, saturation=1, hue=0, grey=0, sigma=0) | change
    numbers = torch.tensor([(*square, *neutral.values()) for square in squares], dtype=torch.float32)
    return data.Draws(*numbers.T)


def cut_by_hand(plane, scale, y, x, flip, size, order=1):
    """What a crop has at the centres of its size x size cells: the plane there, edges repeated."""
    along = (np.arange(size) + 0.5) / size
    centres = y + scale * along, x + scale * (1 - along if flip else along)
    centres = np.meshgrid(*(len(plane) * c - 0.5 for c in centres), indexing="ij")
    return map_coordinates(plane, centres, order=order, mode="nearest")


def test_crop_moves_image_cam_and_label_alike():
    squares = ((0.5, 0.25, 0.25, 0), (0.5, 0.26, 0.23, 1), (0.4, 0, 0.6, 0), (0.43, 0.45, 0.1, 1),
               (0.4, 0.6, 0, 1), (0.97, 0.01, 0.02, 0))   # two of them at the edges
    S, size, n = 17, 8, len(squares)
    x, label = randn(n, 2, S, S), torch.randint(0, 256, (n, 1, S, S), dtype=torch.uint8)
    draws = draws_of(*squares)
    smooth, cells = data.crop(x, draws, size), data.crop(x, draws, size // 2, "area")
    near = data.crop(label, draws, size, "nearest")
    assert smooth.shape == (n, 2, size, size) and cells.shape == (n, 2, 4, 4)
    for b, square in enumerate(squares):
        for c in range(2):
            expected = cut_by_hand(x[b, c].numpy(), *square, size)
            assert np.abs(smooth[b, c].numpy() - expected).max() < 1e-4
            assert np.abs(cells[b, c].numpy() - expected.reshape(4, 2, 4, 2).mean((1, 3))).max() < 1e-4
        assert (near[b, 0].numpy() == cut_by_hand(label[b, 0].numpy(), *square, size, order=0)).all()


def test_draws_of_seed_epoch_and_sample_are_these_and_depend_on_nothing_else():
    """Another number would be another run: these are of samples that are jittered, and blurred."""
    np.random.seed(0)
    torch.manual_seed(0)
    draws = data.draw(1, 2, [2, 3])
    expected = [[0.92137486, 0.034000125, 0.07255067, 1, 1.6029785, 1.3118587, 0.95817387, -0.08129314, 0, 0],
                [0.80228335, 0.021949442, 0.10113386, 1, 1, 1, 1, 0, 0, 1.7057031]]
    assert all(d.dtype == torch.float32 and d.shape == (2,) for d in draws)
    assert np.allclose(torch.stack(draws, 1), expected, rtol=1e-6, atol=0)
    for samples in (torch.tensor([3]), np.array([3]), range(3, 4)):
        assert all(torch.equal(a, b[1:]) for a, b in zip(data.draw(1, 2, samples), draws))
    for key in ((2, 2, [3]), (1, 3, [3]), (1, 2, [4])):
        assert all((a != b[1:]).all() for a, b in zip(data.draw(*key)[:3], draws))
    full, half = data.draw(0, 1, range(50)), data.draw(0, 1, range(50), (0.4, 0.4, 0.4, 0.1))
    for name, a, b in zip(full._fields, full, half):      # weaker jitter scales the same draws
        middle = {"brightness": 1, "contrast": 1, "saturation": 1, "hue": 0}.get(name)
        expected = a if middle is None else middle + (a - middle) / 2
        assert torch.allclose(b, expected, atol=1e-6) and len(a.unique()) > 1, name


def test_draws_have_transfgus_ranges_and_probabilities():
    draws = [torch.cat(d).double().numpy() for d in zip(*(data.draw(0, e, range(1000)) for e in range(1, 5)))]
    d = data.Draws(*draws)
    jitter = np.stack([d.brightness - 1, d.contrast - 1, d.saturation - 1, d.hue])
    jittered = d.brightness != 1
    assert 0.4 <= d.scale.min() < 0.41 and 0.99 < d.scale.max() <= 1
    for edge in (d.x, d.y):
        share = edge / (1 - d.scale)                      # uniform over where the square fits
        assert (edge.min() >= 0 and (edge + d.scale).max() <= 1 + 1e-6
                and abs(share[d.scale < 0.99].mean() - 0.5) < 0.02)
    for share, probability in ((d.flip, 0.5), (jittered, 0.3), (d.grey, 0.2), (d.sigma > 0, 0.2)):
        assert abs(share.mean() - probability) < 0.03
    assert (jitter[:, ~jittered] == 0).all()
    for change, most in zip(jitter[:, jittered], (0.8, 0.8, 0.8, 0.2)):
        assert all(0.95 * most < edge <= most + 1e-4 for edge in (-change.min(), change.max()))
    assert 1 <= d.sigma[d.sigma > 0].min() < 1.05 and 1.95 < d.sigma.max() <= 2


def augmented(image, **change):
    """`augment` with neutral draws but for the named ones."""
    return data.augment(image, draws_of(*[(1, 0, 0, 0)] * len(image), **change))


def test_augmentation_keeps_the_range_is_per_image_and_changes_nothing_when_neutral():
    image = torch.rand(40, 3, 12, 9)
    out = data.augment(image, data.draw(0, 1, range(40)))
    assert out.shape == image.shape and 0 <= out.min() and out.max() <= 1 and (out - image).abs().max() > 0.1
    alone = torch.cat([data.augment(image[i:i + 1], data.draw(0, 1, [i])) for i in range(40)])
    assert torch.allclose(out, alone, atol=1e-6)
    assert torch.allclose(augmented(image), image, atol=1e-6)


def test_brightness_contrast_saturation_grey_and_hue_are_those_of_the_textbook():
    image = torch.rand(2, 3, 8, 8) * 0.4 + 0.3
    stark = (image - 0.3) * 2.5                           # 0 to 1: contrast leaves the range and is cut there
    shade = lambda x: (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    mean = lambda x: shade(x).mean((1, 2, 3), keepdim=True)
    for before, change, after in (
            (image, {"brightness": 0.5}, image / 2), (image, {"contrast": 0.5}, (image + mean(image)) / 2),
            (stark, {"contrast": 1.8}, ((stark - mean(stark)) * 1.8 + mean(stark)).clamp(0, 1)),
            (image, {"saturation": 0.5}, (image + shade(image)) / 2),
            (image, {"saturation": 0}, shade(image)), (image, {"grey": 1}, shade(image))):
        assert torch.allclose(augmented(before, **change), after.expand(-1, 3, -1, -1), atol=1e-6)
    red, green, blue = torch.eye(3).view(3, 3, 1, 1).expand(3, 3, 4, 4).split(1)
    grey = torch.full((1, 3, 4, 4), 0.4)
    for before, after in ((red, green), (green, blue), (blue, red), (grey, grey)):
        assert torch.allclose(augmented(before, hue=1 / 3), after, atol=1e-6)
        assert torch.allclose(augmented(after, hue=-1 / 3), before, atol=1e-6)


@pytest.mark.parametrize("sigma", (1.0, 1.7))
def test_blur_is_a_3_by_3_gaussian_with_mirrored_edges(sigma):
    image = torch.rand(1, 3, 5, 6)
    expected = [gaussian_filter(plane, sigma, mode="mirror", radius=1) for plane in image[0].numpy()]
    assert torch.allclose(augmented(image, sigma=sigma)[0], torch.tensor(np.array(expected)), atol=1e-6)


# ---- checking


def test_check_lists_every_problem_once_and_exits_with_0_for_a_good_set_and_2_for_a_bad_one(tmp_path):
    base = make_voc(tmp_path / "VOC2012", n=7)
    images, labels = data.VOC(tmp_path).images, data.VOC(tmp_path).labels
    check = ("tools/get_data.py", "voc", "--check", "--root", tmp_path)
    jpegs, masks = base / "JPEGImages", base / "SegmentationClass"
    assert ends(0, "", *check).splitlines() == [
        f"voc train: 6 images (6 .jpg) in {jpegs}, labels in {masks}",
        "voc train: labels show 6 of 21 classes: bottle 19.5 %, boat 18.4 %, bird 17.2 %, bicycle 16.1 %, "
        "aeroplane 14.9 %, background 13.8 %, void 0.0 %",
        "voc train: 6 images, 1464 published, 0 problems",
        f"voc val: 1 images (1 .jpg) in {jpegs}, labels in {masks}",
        "voc val: labels show 1 of 21 classes: bus 100.0 %, void 0.0 %",
        "voc val: 1 images, 1449 published, 0 problems"]
    images[0].write_bytes(b"no image")                    # met by both: listed once
    images[1].unlink()
    save(labels[2], np.zeros((10, 13), np.uint8))         # 14 x 10 is right
    labels[3].write_bytes(labels[3].read_bytes()[:30])
    save(images[4], np.random.default_rng(0).integers(0, 256, (10, 16, 3), np.uint8))
    images[4].write_bytes(images[4].read_bytes()[:-80])   # its end and label missing
    labels[4].unlink()
    (base / "JPEGImages/2007_000006.jpg").unlink()
    lines = ends(2, "train: 6 images, 1464 published, 6 problems", *check).splitlines()
    assert len(lines) == 12 and "voc val: 1 images, 1449 published, 1 problems" in lines
    for file, reason in [(images[0], "no JPEG"), (images[1], "No such file"),
                         (labels[2], "13 x 10, its image 14 x 10"), (labels[3], ""),
                         (images[4], "truncated"), (labels[4], "No such file")]:
        assert sum(line.startswith(f"  {file}: ") and reason in line for line in lines) == 1, (file, lines)


def test_check_names_labels_that_show_nothing_and_images_that_exif_turns(tmp_path):
    base, exif = make_voc(tmp_path), Image.Exif()
    assert get_data.check(data.VOC(tmp_path))[0] == []
    void = save(base / "SegmentationClass/2007_000000.png", np.full((10, 12), 255, np.uint8))
    exif[0x112] = 3                                       # by 180 degrees: of the same size
    image = save(base / "JPEGImages/2007_000001.jpg", ("RGB", (13, 10), 0), exif=exif)
    first, second = get_data.check(data.VOC(tmp_path))[0]
    assert first.startswith(f"{void}: no labelled pixel") and second.startswith(f"{image}: its EXIF turns it")
    save(image, ("RGB", (13, 10), 0))
    for name in ("2007_000000", "2007_000001"):           # objects without their classes
        save(base / f"SegmentationClass/{name}.png", np.eye(10, 12, dtype=np.uint8) * 255)
    save(image, ("RGB", (12, 10), 0))
    (problem,), pixels = get_data.check(data.VOC(tmp_path))
    assert problem.startswith(f"{void.parent}: no label shows a class other than background")
    assert problem.endswith("if 255, void, is the object, make it 1")
    assert (pixels[0], pixels[255], pixels.sum()) == (220, 20, 240)


@pytest.mark.parametrize("change", ("nothing", "jpeg", "bilinear"))
def test_check_names_labels_whose_classes_were_interpolated(tmp_path, change):
    base, label = make_voc(tmp_path), data.shapes(0)[0:2][1]
    picture = Image.fromarray(np.where(label > 0, label + 9, 0).astype(np.uint8))
    if change == "jpeg":
        picture = Image.open(io.BytesIO(encoded(picture, "JPEG", quality=90)))
    elif change == "bilinear":
        picture = picture.resize((64, 64)).resize((128, 128), Image.Resampling.BILINEAR)
    file = save(base / "SegmentationClass/2007_000000.png", picture)
    save(base / "JPEGImages/2007_000000.jpg", ("RGB", (128, 128), 0))
    problems, pixels = get_data.check(data.VOC(tmp_path))
    assert [p.startswith(f"{file}: ") and "classes are but lines of one or two pixels" in p
            for p in problems] == [True] * (change != "nothing")
    assert pixels.sum() == 128 * 128 + 130 and (np.count_nonzero(pixels) > 9) == (change != "nothing")
    fine = np.arange(9).repeat(64).reshape(9, 8, 8).transpose(1, 0, 2).reshape(8, 72).astype(np.uint8)
    fine[0, :3] = 10, 11, 12                              # three small objects among nine classes
    save(file, fine)
    save(base / "JPEGImages/2007_000000.jpg", ("RGB", (72, 8), 0))
    assert get_data.check(data.VOC(tmp_path))[0] == []
    fine[0, 4:7] = 13, 14, 15
    save(file, fine)
    assert "6 of its 15 classes are but lines" in get_data.check(data.VOC(tmp_path))[0][0]


def test_a_class_that_is_somewhere_three_pixels_wide_is_no_line():
    label = np.zeros((9, 9), np.uint8)
    label[:, 1], label[2:5, 3:6], label[6:8], label[1, 7] = 1, 2, 3, 255          # 3: two rows
    assert get_data.lines_alone(label) == {1, 3}
    assert get_data.lines_alone(label[:2, :2]) == {0, 1}


def test_get_data_without_a_name_lists_the_names(tmp_path):
    text = ends(2, "which data set? voc, voc-aug, coco80, cocostuff27", "tools/get_data.py", cwd=tmp_path)
    assert len(text.splitlines()) == 1 and "shapes" in text and "folder" in text


def test_a_name_that_is_not_utf_8_does_not_end_the_list_of_problems(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"x")
    (tmp_path / "z.jpg").write_bytes(b"x")
    text = ends(2, "folder all: 2 images, 2 problems", "tools/get_data.py", "folder", "--check", "--root",
                tmp_path, env={"PYTHONIOENCODING": "utf-8:strict"})
    assert "caf\\udce9.jpg: cannot" in text and "z.jpg: cannot" in text


# ---- downloads, against a server on this computer

BODY = np.random.default_rng(0).bytes(3_000_001)
NOBODY = "http://127.0.0.1:1/a.tar"                       # listens there


class Host(http.server.BaseHTTPRequestHandler):
    """Serves server.files {path: bytes, or as str an answer as it stands}. A path with `cut` breaks off
    midway the first time; one with `old` cannot go on from there; one with `page` is a web page."""

    def do_GET(self):
        name, wanted, seen = self.path.split("?")[0], self.headers.get("Range"), self.server.seen
        body, cut = self.server.files.get(name), "cut" in name and name not in dict(seen)
        start = int(wanted[6:-1]) if wanted and "old" not in name else 0
        seen.append((name, wanted))
        if isinstance(body, str):
            self.wfile.write(body.encode())
        elif body is None or start >= len(body):
            self.send_error(404 if body is None else 416)
        else:
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.send_header("Content-Type", "text/html" if "page" in name else "application/x-tar")
            self.end_headers()
            self.wfile.write(body[start:len(body) // 2 if cut else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def host(monkeypatch):
    """A server on localhost: host.files, host.seen (paths, ranges asked for), host.url."""
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        server.files, server.seen, server.url = {}, [], f"http://127.0.0.1:{server.server_port}"
        server.handle_error = lambda request, address: None                       # clients that hang up
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


def archived(kind, files):
    """A tar or zip as bytes: {name: content, or as str the target of a link}."""
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return stream.getvalue()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname, content = tarfile.SYMTYPE, content, b""
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def published(*urls, body=BODY, folder="made"):
    """An archive that `body` is, at these addresses."""
    return get_data.Archive("a.tar", urls, hashlib.md5(body).hexdigest(), folder)


def test_each_address_that_fails_is_one_line_and_the_next_one_is_tried(host, tmp_path, capsys):
    host.files |= {"/cut": BODY, "/wrong": b"another file", "/right": BODY, "/odd": "hello\r\n\r\n",
                   "/many": "HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"}
    reasons = {NOBODY: "refused", "http://127.0.0.1:port/a.tar": "", "a.tar": "",
               "http://127.0.0.1:1\u00e4/a.tar": "", f"file://{tmp_path}/none.tar": "No such file",
               f"{host.url}/odd": "", f"{host.url}/many": "", f"{host.url}/none": "404",
               f"{host.url}/cut": "broke off after 1500000 of 3000001 bytes",
               f"{host.url}/wrong": "sent another file"}
    file = get_data.fetch(published(*reasons, f"{host.url}/right"), tmp_path)
    assert file == tmp_path / "a.tar" and file.read_bytes() == BODY and os.listdir(tmp_path) == ["a.tar"]
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("a.tar: from ")]
    for line, (url, reason) in zip(lines, reasons.items(), strict=True):
        assert line.startswith(f"{url}: ") and reason in line and line[len(url) + 2:]
    assert host.seen[4:] == [("/wrong", "bytes=1500000-"), ("/wrong", None), ("/right", None)]


@pytest.mark.parametrize("path", ("/cut", "/cut/old"))
def test_a_broken_transfer_goes_on_where_it_stopped_if_the_host_can(host, tmp_path, path):
    host.files[path], part = BODY, tmp_path / "a.tar.part"
    archive = published(f"{host.url}{path}")
    refused(lambda: get_data.fetch(archive, tmp_path), "a.tar: could not be downloaded", "--url",
            f"put the file into {tmp_path}", f"unpack it so that {tmp_path / 'made'} exists")
    assert os.listdir(tmp_path) == ["a.tar.part"] and part.read_bytes() == BODY[:1_500_000]
    assert get_data.fetch(archive, tmp_path).read_bytes() == BODY and os.listdir(tmp_path) == ["a.tar"]
    assert host.seen == [(path, None), (path, "bytes=1500000-")]
    assert get_data.fetch(archive, tmp_path) and len(host.seen) == 2              # it is there: no request


@pytest.mark.parametrize("part", (b"0123456789", b"of another, longer file", b"0123456xxx"))
def test_a_part_is_completed_one_of_another_file_removed_and_none_spoilt_by_a_web_page(host, tmp_path, part):
    host.files |= {"/old/page": b"<html>We have moved</html>", "/a.tar": b"0123456789"}
    archive = published(f"{host.url}/a.tar", body=b"0123456789")
    (tmp_path / "a.tar.part").write_bytes(part)           # the first: killed before its renaming
    refused(lambda: get_data.fetch(archive, tmp_path, f"{host.url}/old/page"), "a.tar")
    assert (tmp_path / "a.tar.part").read_bytes() == part
    assert get_data.fetch(archive, tmp_path).read_bytes() == b"0123456789"
    assert os.listdir(tmp_path) == ["a.tar"]


def test_a_file_is_believed_only_with_its_md5_or_if_none_is_published_as_a_zip(host, tmp_path):
    (tmp_path / "a.tar").write_bytes(b"something")
    archive = published(f"{host.url}/a.tar")
    refused(lambda: get_data.fetch(archive, tmp_path), tmp_path / "a.tar", archive.md5, "move it away")
    assert (tmp_path / "a.tar").read_bytes() == b"something" and not host.seen
    host.files |= {"/a.zip": b"sorry, no longer here", "/b.zip": archived("zip", {"a": b"one"})}
    archive = get_data.Archive("a.zip", (f"{host.url}/a.zip", f"{host.url}/b.zip"), None, "a")
    assert get_data.fetch(archive, tmp_path).read_bytes() == host.files["/b.zip"]


def test_a_full_disk_is_named_and_no_other_address_is_asked(host, tmp_path):
    host.files["/a.tar"], part = BODY, tmp_path / "a.tar.part"
    part.symlink_to("/dev/full")
    refused(lambda: get_data.fetch(published(*[f"{host.url}/a.tar"] * 2), tmp_path), part,
            "No space left on device", "what was fetched is kept, free the disk")
    assert len(host.seen) == 1 and part.is_symlink()


def test_ctrl_c_during_a_download_is_one_line_and_keeps_what_came(host, tmp_path, monkeypatch, capsys):
    def look(looks=iter((0, 100, 200))):                  # at the clock: at the start, after 1 MB, shown
        if (now := next(looks, None)) is None:
            raise KeyboardInterrupt                       # after 2 MB
        return now

    host.files["/a.tar"], part = BODY, tmp_path / "a.tar.part"
    monkeypatch.setitem(get_data.ARCHIVES, "voc", (published(f"{host.url}/a.tar"),))
    monkeypatch.setattr(time, "monotonic", look)
    monkeypatch.setattr(sys, "argv", ["get_data.py", "voc", "--root", str(tmp_path)])
    assert data.exit_code(get_data.main) == 130
    assert capsys.readouterr().err.splitlines()[1:] == [
        "a.tar: 1 of 2 MB", "", "get_data.py: stopped; the same command goes on from here"]
    assert part.stat().st_size >= 1 << 20 and BODY.startswith(part.read_bytes())


@pytest.mark.parametrize("kind", ("tar", "zip"))
def test_archives_are_unpacked_and_damaged_ones_named(tmp_path, kind):
    whole, file = archived(kind, {"VOC/a.txt": b"one", "VOC/b/c.bin": BODY[:20_000]}), tmp_path / "archive"
    file.write_bytes(whole)
    get_data.unpack(file, tmp_path / "out")
    assert (tmp_path / "out/VOC/b/c.bin").read_bytes() == BODY[:20_000]
    spoilt = [whole[:9_000] + b"damage" + whole[9_006:]]  # a tar has no checksums of contents
    for content in (whole[:len(whole) // 2], b"", b"<html>moved</html>", *(spoilt if kind == "zip" else [])):
        file.write_bytes(content)
        refused(lambda: get_data.unpack(file, tmp_path / "out"), file, "cannot unpack")
    file.write_bytes(whole)
    (tmp_path / "VOC").write_text("in the way")
    refused(lambda: get_data.unpack(file, tmp_path), file, tmp_path, "put that right")


@pytest.mark.parametrize("kind, files", (
    ("tar", {"../evil": b"!"}), ("tar", {"a/../../evil": b"!"}),
    ("tar", {"up": "..", "up/evil": b"!"}), ("tar", {"up": "/etc"}), ("zip", {"good": b"1", "../evil": b"!"}),
    ("zip", {"good": b"1", "a/../../evil": b"!"}), ("zip", {"good": b"1", "/evil": b"!"})))
def test_an_archive_that_leads_out_of_its_folder_is_refused(tmp_path, kind, files):
    (tmp_path / "archive").write_bytes(archived(kind, files))
    refused(lambda: get_data.unpack(tmp_path / "archive", tmp_path / "out"), tmp_path / "archive")
    assert {p.name for p in tmp_path.rglob("*")} <= {"archive", "out"} and not Path("/evil").exists()


def test_voc_downloads_from_an_address_that_is_given_and_loads(host, tmp_path, monkeypatch):
    made = make_voc(tmp_path / "made/VOCdevkit/VOC2012").parent.parent
    body = archived("tar", {str(f.relative_to(made)): f.read_bytes() for f in made.rglob("*") if f.is_file()})
    host.files["/x"], archive = body, published(NOBODY, body=body, folder="VOCdevkit")
    monkeypatch.setitem(get_data.ARCHIVES, "voc", (archive,))
    get_data.download("voc", tmp_path / "root", f"{host.url}/x?token=1")
    for split, n in (("train", 2), ("val", 1)):
        source = data.VOC(tmp_path / "root", split)
        assert len(source) == n and get_data.check(source)[0] == []


def test_coco_comes_in_three_archives_and_each_can_have_another_address(host, tmp_path, monkeypatch):
    made, root = make_coco(tmp_path / "made", {"a": 3, "b": 120}), tmp_path / "root"
    jpg, png = ({f.name: f.read_bytes() for f in (made / d / "train2017").iterdir()}
                for d in ("images", "annotations"))
    placed = lambda files, *splits: archived("zip", {f"{s}/{n}": files[n] for s in splits for n in files})
    host.files |= {"/train2017.zip": placed(jpg, "train2017"), "/val2017.zip": placed(jpg, "val2017"),
                   "/stuffthingmaps_trainval2017.zip": placed(png, "train2017", "val2017")}
    archives = get_data.ARCHIVES["coco80"]
    assert [f"/{archive.name}" for archive in archives] == list(host.files)
    refused(lambda: get_data.download("coco80", root, f"{host.url}/x.zip"), "which file", "train2017.zip")
    get_data.download("coco80", root, f"{host.url}/stuffthingmaps_trainval2017.zip?x=1")
    assert host.seen == [("/stuffthingmaps_trainval2017.zip", None)]
    archives = tuple(archive._replace(urls=(f"{host.url}/{archive.name}",)) for archive in archives)
    monkeypatch.setitem(get_data.ARCHIVES, "coco80", archives)
    get_data.download("coco80", root)
    assert [n for n, _ in host.seen[1:]] == ["/train2017.zip", "/val2017.zip"]    # the rest is there already
    assert [data.COCO(root, split).ids for split in ("train", "val")] == [["a"], ["a"]]


def sbd(masks, train, val):
    """SBD's archive: {id: value of every pixel} as cls/ID.mat, and its two lists."""
    files = {"train.txt": "\n".join(train).encode(), "val.txt": ("\n".join(val) + "\n").encode()}
    for name, value in masks.items():
        stream, image = io.BytesIO(), np.full((10, 12), value, np.uint8)
        image[0, 0] = 20                                  # so that rows and columns are told apart
        savemat(stream, {"GTcls": {"Boundaries": np.zeros(20), "Segmentation": image}})
        files |= {f"cls/{name}.mat": stream.getvalue(), f"inst/{name}.mat": b"not read"}
    return gzip.compress(archived("tar", {f"benchmark_RELEASE/dataset/{n}": f for n, f in files.items()}))


def test_voc_aug_is_built_from_sbds_archive(tmp_path, monkeypatch, capsys):
    """Of VOC: 2007_000000 and 1 in train, 2 in val. SBD has other masks of 1 and 2, and two images more."""
    root, base = tmp_path / "root", make_voc(tmp_path / "root/VOCdevkit/VOC2012")
    for name in ("2008_000007", "2008_000008"):
        save(base / f"JPEGImages/{name}.jpg", ("RGB", (12, 10), (9, 9, 9)))
    monkeypatch.setattr(get_data, "SBD", get_data.SBD._replace(md5=None))         # the archive lies there
    (root / "benchmark.tgz").write_bytes(sbd(
        {"2007_000001": 9, "2007_000002": 9, "2008_000007": 7, "2008_000008": 8},
        ("2008_000008", "2007_000002"), ("2008_000007", "2007_000001")))
    get_data.download("voc-aug", root)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("train_aug.txt: 4 images, not the published 10582: is VOC or SBD whole?")
    aug = data.dataset("voc-aug", root, "train")
    assert aug.ids == ["2007_000000", "2007_000001", "2008_000007", "2008_000008"]
    assert [int(aug.label(i)[5, 5]) for i in range(4)] == [0, 1, 7, 8]            # VOC's own where it has one
    assert aug.label(2)[0, 0] == 20 and (aug.label(2) == 7).sum() == 119 and get_data.check(aug)[0] == []
    with Image.open(aug.labels[2]) as image:
        assert image.mode == "P" and image.getpalette() == data.palette().flatten().tolist()
    assert sorted(f.stem for f in (base / "SegmentationClassAug").iterdir()) == aug.ids

    before = [os.stat(f).st_mtime_ns for f in aug.labels]
    aug.labels[3].unlink()                                # interrupted: the rest is not made again
    get_data.download("voc-aug", root)
    assert [os.stat(f).st_mtime_ns for f in aug.labels[:3]] == before[:3] and (aug.label(3) == 8).any()


def test_an_sbd_that_lacks_a_mask_or_is_damaged_is_named_and_voc_has_to_be_there(tmp_path, monkeypatch):
    root, file = tmp_path / "root", tmp_path / "root" / "benchmark.tgz"
    refused(lambda: get_data.download("voc-aug", root), f"get_data.py voc --root {root}")
    base = make_voc(root / "VOC2012")
    monkeypatch.setattr(get_data, "SBD", get_data.SBD._replace(md5=None))
    whole = sbd({"a": 3}, ("a", "b"), ("c",))
    other = gzip.compress(gzip.decompress(whole).replace(b"GTcls", b"GTxyz"))
    for body, reason in ((whole, "masks of only 3 of 5 images, not of b"), (whole[:300], "cannot read"),
                         (b"", "cannot read"), (other, "cannot read")):
        file.write_bytes(body)
        shutil.rmtree(base / "SegmentationClassAug", ignore_errors=True)
        refused(lambda: get_data.download("voc-aug", root), file, reason, "move it away")
        assert not (base / "ImageSets/Segmentation/train_aug.txt").exists()
    file.write_bytes(whole)
    shutil.rmtree(base / "SegmentationClassAug")
    monkeypatch.setattr(os, "replace", raising(OSError(28, "No space left on device")))
    message = refused(lambda: get_data.download("voc-aug", root), base / "SegmentationClassAug",
                      "cannot be written (No space left on device)")
    assert "move it away" not in message and not (base / "ImageSets/Segmentation/train_aug.txt").exists()


# ----------------------------------------------------------------------------
# eval.py


def test_scores_count_truth_in_rows_leave_void_out_and_show_collapse():
    label, prediction = np.array([0, 1, 2, 255, 2, 2, -1, 3]), np.array([0, 0, 2, 1, 1, 2, 0, 1])
    assert evaluation.confusion_matrix(label, prediction, 3).tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 2]]
    for labels, shown in (([255], "void (255)"), ([2, 255], "class 2 and void (255)")):
        confusion = evaluation.confusion_matrix(np.resize(labels, 9), np.arange(9) % 3, 3)
        refused(lambda: evaluation.scores(confusion), f"nothing but {shown}: nothing to score")
    one, every = (evaluation.scores(np.full((4, 4), 5) * share) for share in ([0, 0, 1, 0], [1] * 4))
    assert (one["clusters"], one["entropy"]) == (1, 0)
    assert (every["clusters"], every["entropy"]) == (4, pytest.approx(1))


def test_clusters_beyond_the_classes_count_as_wrong_and_many_to_one_is_a_score_of_its_own():
    label, prediction = np.repeat([0, 1], (10, 6)), np.repeat([2, 0, 1, 3, 1], (7, 3, 4, 1, 1))
    confusion = evaluation.confusion_matrix(label, prediction, 2, 4)
    assert confusion.tolist() == [[3, 0, 7, 0], [0, 5, 0, 1]]
    assert evaluation.hungarian(confusion).tolist() == [-1, 1, 0, -1]
    found = evaluation.scores(confusion)
    assert found["assignment"].tolist() == [0, 1, 0, 1]   # those left over: of most of their pixels
    assert found["iou"].tolist() == pytest.approx([100 * 7 / 10, 100 * 5 / 6])
    assert (found["accuracy"], found["many_accuracy"]) == (pytest.approx(75), 100)
    assert (found["miou"], found["many_miou"]) == (pytest.approx((70 + 500 / 6) / 2), 100)
    assert "many_miou" not in evaluation.scores(confusion[:, [2, 1]])


def test_names_are_read_beside_a_checkpoint_and_classes_of_one_name_become_one(tmp_path):
    file = tmp_path / "names.txt"
    checkpoint = {"args": {"data": "folder"}, "assignment": [*range(5)],
                  "names": ["background", *(f"cluster {k}" for k in range(1, 5))]}
    read = lambda: evaluation.with_names(checkpoint, file)
    assert read() is checkpoint
    file.write_bytes("\ufeff# the dogs\r\n\r\n 4= dog = Bär\r\n1 = background\n2=dog = Bär".encode())
    assert read()["names"] == ["background", "background", "dog = Bär", "cluster 3", "dog = Bär"]
    assert read()["assignment"] == [0, 0, 2, 3, 2]
    for n, text in ((2, b"\n5 = dog"), (2, b"\r-1 = dog"), (1, b"dog"),
                    (3, b"\r\n\n1 ="), (2, b"0 = b\n0 = c"),
                    (1, b"1 = B\xe4r"), (1, "1 = dog".encode("utf-16")), (1, "1 = dog".encode("utf-16-le")),
                    (1, "\u0663 = dog".encode())):         # a 3 of other digits
        file.write_bytes(text)
        refused(read, file, f"line {n}: ", "NUMBER = NAME expected", "0 to 4")
    checkpoint["args"]["data"] = "voc"
    refused(read, file, "voc has class names of its own")


def test_overlays_leave_the_photograph_where_nothing_is_tint_and_outline_each_class_and_name_it():
    image, mask = np.full((64, 96, 3), 100, np.uint8), np.full((64, 96), 255, np.uint8)
    mask[8:56, 8:48], mask[8:56, 48:88], colours = 1, 2, data.palette()
    bare = np.array(pictures.outlined(image, mask, data.palette()))
    assert (bare[:7] == 100).all() and (bare[7, 8:88] == 255).all()               # as it was; white around
    assert (bare[8:56, 8] == colours[1]).all() and (bare[9:55, 48] == colours[2]).all()
    assert np.abs(bare[30, 30] - (0.6 * 100 + 0.4 * colours[1])).max() <= 1
    names = np.array(pictures.outlined(image, mask, data.palette(), ["", "first", "second"]))
    changed = (names != bare).any(2)
    assert changed[:, 8:48].sum() > 50 and changed[:, 48:88].sum() > 50           # each on its own ground
    assert not changed[:20].any() and not changed[44:].any()
    mask[0, 0], edge = 3, np.full((64, 96), 255, np.uint8)
    pictures.outlined(image, mask, data.palette(), ["", "first", "second"])       # a speck needs no name
    edge[:, :3] = 1                                       # thinner than its name
    named, bare = (np.array(pictures.outlined(image, edge, data.palette(), names))
                   for names in (["", "class"], None))
    assert np.ptp(np.flatnonzero((named != bare).any((0, 2)))) > 20               # not cut by the border


@pytest.mark.parametrize("width", (None, -3, 0, 3, 40, 400))
def test_a_text_is_shortened_to_its_width_and_ends_if_there_is_none(monkeypatch, width):
    pen, drawn = pictures.ImageDraw.Draw(Image.new("RGB", (200, 20))), []
    monkeypatch.setattr(pen, "text", lambda place, text, *rest, **how: drawn.append(text))
    for text in ("", "a name of some length", "собака", "Grüße"):
        pictures.write(pen, (0, 0), text, width=width)
    assert drawn[0] == "" and len(drawn) == 4
    for text in drawn:
        font = next(font for font in pictures.fonts(12) if pictures.has_letters(font, text))
        assert width is None or text in ("", "..") or pen.textlength(text, font) <= width
    assert drawn[1] == {None: "a name of some length", 400: "a name of some length"}.get(width, drawn[1])
    assert pictures.transliterated("Grüße, ł собака 星") == "Grusse, l sobaka ?"


def test_the_sheet_shows_of_each_class_its_share_and_first_the_images_that_have_most_of_it(monkeypatch):
    class Source(data.Dataset):                           # four images of one grey each
        ids, image = range(4), lambda self, i: np.full((80, 160, 3), 60 * (i + 1), np.uint8)

    def segment(network, rates, images, size):
        masks = torch.zeros(len(images), *size, dtype=torch.uint8)
        for mask, grey in zip(masks, images[:, 0, 0, 0]):
            rows, cluster = {60: (0, 0), 120: (10, 1), 180: (2, 1), 240: (6, 3)}[int(grey)]
            mask[:rows] = cluster
        return masks

    monkeypatch.setattr(pictures, "segment", segment)
    checkpoint = {"names": ["a", "b", "c", "b"], "assignment": [0, 1, 2, 1], "rates": None,
                  "args": {"size": 10, "data": "voc"}}    # cluster 3 is b, too
    drawn = []
    monkeypatch.setattr(pictures, "page", lambda rows, *rest: drawn.append(rows))
    pictures.cluster_sheet(None, checkpoint, Source())
    a, b, c = drawn[0]
    middle = lambda tile, y: int(tile[y, 80, 0])
    assert [middle(tile, 100) for tile in a[1:]] == [60, 180, 240]                # the second has no a
    assert [middle(tile, 50) for tile in b[1:]] == [120, 240, 180] and len(c) == 1
    assert [middle(tile, 110) for tile in b[2:]] == [144, 108]                    # the rest is darkened
    assert (a[1][0] == 255).all()                         # 2 : 1, not squashed
    monkeypatch.setattr(pictures, "SHEET", 3)             # every second
    pictures.cluster_sheet(None, checkpoint, Source())
    assert len(drawn[1][0]) == 3


def test_masks_of_a_large_photograph_have_the_edges_of_logits_at_its_own_size(monkeypatch, capsys):
    logits, sizes = F.interpolate(randn(1, 3, 6, 8), size=(60, 80), mode="bilinear"), []
    monkeypatch.setattr(evaluation, "MOST", 80)
    monkeypatch.setattr(evaluation, "mask_logits", lambda n, r, image, size, *how: (
        sizes.append(tuple(size)) or F.interpolate(logits, size=size, mode="bilinear")))
    checkpoint = {"args": {"size": 32}, "rates": 0, "assignment": [5, 6, 7]}
    found = lambda h, w: evaluation.segment_photograph(None, checkpoint, np.zeros((h, w, 3), np.uint8)) - 5
    assert np.array_equal(found(60, 80), logits.argmax(1)[0])
    exact = F.interpolate(logits, size=(240, 320), mode="bilinear").argmax(1)[0].numpy()
    nearest = logits.argmax(1)[0].numpy().repeat(4, 0).repeat(4, 1)
    assert (found(240, 320) != exact).mean() < 0.001 < (nearest != exact).mean()
    # so are they scored at their own size, `--native`: all logits of 12 megapixels would take 1 GB
    source = SimpleNamespace(names=["a", "b", "c"], image=lambda i: np.zeros((240, 320, 3), np.uint8),
                             label=lambda i: found(240, 320))
    monkeypatch.setattr(evaluation, "len", lambda x: 1 if x is source else len(x), raising=False)
    network = SimpleNamespace(vit=SimpleNamespace(patch_size=8))
    evaluation.print_scores(network, checkpoint | {"epoch": 1, "args": {"size": 32, "limit": None}}, source,
                            True, None, False)
    assert "mIoU 100.00" in capsys.readouterr().out and set(sizes) == {(60, 80)}


def test_a_photograph_is_antialiased_and_its_mirror_image_counts_if_asked_for(monkeypatch):
    """Every fourth column is white, and between them bilinear samples see black."""
    network, columns, inputs = model.DMSA(small_vit(), 4).eval(), np.zeros((256, 256, 3), np.uint8), []
    columns[:, 1::4] = 255
    real = evaluation.mask_logits
    monkeypatch.setattr(evaluation, "mask_logits", lambda *args: inputs.append(args) or real(*args))
    checkpoint = {"args": {"size": 64}, "rates": (1, 6, 12, 18), "assignment": [0, 1, 2, 3]}
    for flip in (False, True):
        evaluation.segment_photograph(network, checkpoint, columns, flip=flip)
    assert [args[5] for args in inputs] == [False, True] and inputs[0][1] == (1, 6, 12, 18)
    assert abs(inputs[0][2].astype(int) - 64).max() < 20


def test_par_refines_a_photograph_at_the_size_that_the_network_sees(uninterrupted):
    checkpoint, seen = evaluation.load_checkpoint(uninterrupted[0] / "run" / "best.pt"), []
    network, photograph = evaluation.restore(checkpoint, "cpu"), data.shapes(1, 300)[0][:200]
    par = lambda image, masks: seen.append(image.shape[2:]) or masks
    for native in (False, True):
        mask = evaluation.segment_photograph(network, checkpoint, photograph, native, par=par)
        assert mask.shape == (200, 300)
    assert seen == [(64, 64), (200, 304)]                 # squashed; in whole patches


def test_another_data_set_must_have_as_many_classes(uninterrupted, tmp_path):
    checkpoint = evaluation.load_checkpoint(uninterrupted[0] / "run" / "best.pt")
    make_voc(tmp_path)
    of_a_folder = checkpoint | {"args": checkpoint["args"] | {"data": "folder"}}  # has no classes of its own
    assert evaluation.open_split(of_a_folder, "voc", tmp_path).names[0] == "background"
    refused(lambda: evaluation.open_split(checkpoint, "voc", tmp_path), "has 6 classes, the data set 21")


def test_the_scenes_that_are_scored_are_those_of_the_runs_seed():
    checkpoint = {"args": {"data": "shapes", "root": "x", "seed": 7, "classes": None, "out": "y"},
                  "names": data.Shapes.names}
    assert evaluation.open_split(checkpoint).ids == data.Shapes("val", 7).ids
    assert evaluation.open_split(checkpoint, split="train", limit=3).ids == data.Shapes("train", 7).ids[:3]


# ----------------------------------------------------------------------------
# train.py: schedule and options

# of tiny runs on the CPU
RUN = ["--limit", "24", "--epochs", "3", "--batch", "6", "--size", "64", "--teacher-start", "1",
       "--device", "cpu"]


def options(*args, out=None):
    return train.parse([*args, *(["--out", str(out)] if out else [])])


def test_teacher_age_is_transfgus_counter_and_emas_epochs_since_the_start():
    age = lambda epochs, method, args: [method.teacher_age(SimpleNamespace(args=args), e) for e in epochs]
    voc, none = options("--data", "voc"), options("--teacher", "none")
    assert age(range(1, 13), transfgu.TransFGU, transfgu.parse(["--data", "voc"])) == (
        [None] * 5 + [0, 1, 2, 3, 4, 0, 1])
    assert age((1, 5, 6, 7), train.Trainer, voc) == [None, None, 0, 1]
    assert age((50,), train.Trainer, none) == [None]
    assert [losses.permutation_weight(t) for t in (0, 1, 7, 50)] == [0.03, 0.04, 0.1, 0.1]


def test_methods_are_the_rows_of_the_tables_and_an_option_goes_before_their_settings(capsys):
    names = ("aspp", "par", "teacher", "teacher_weight", "lambdas")
    row = lambda parse, *args: [vars(parse(list(args)))[name] for name in names]
    voc = ("--data", "voc")
    assert row(train.parse, *voc) == ["dynamic", [1, 2, 4, 8], "ema", 0.7, [0.3, 1, 0.3, 1]]
    assert row(transfgu.parse, *voc) == ["none", [], "reset", 0.5, [0, 1, 0.3, 1]]
    assert row(transfgu.parse, *voc, "--released") == ["none", [], "reset", 0.7, [0.3, 1, 0.3, 1]]
    assert row(transfgu.parse, "--data", "cocostuff27", "--released")[3] == 0.5
    assert row(transfgu.parse)[4] == [0, 1, 0.1, 1]       # but for L_seg shapes' own
    assert row(transfgu.parse, "--lambdas", "2", "1", "0", "1")[4] == [2, 1, 0, 1]
    assert row(train.parse, "--par")[1] == []
    methods = [train.parse([]), transfgu.parse([]), transfgu.parse(["--released"])]
    assert [args.method for args in methods] == ["dmsa", "transfgu", "released"]  # no run goes on as another


def test_what_is_not_finite_is_named():
    trainer = train.Trainer(options(), small_vit(), data.Shapes(), {}, torch.device("cpu"))
    gradient = torch.zeros(sum(p.numel() for p in trainer.params))
    values = {"seg": float("nan"), "ce": float("inf"), "un": 0.0}
    assert trainer.not_finite(values, gradient) == "seg, ce"
    gradient[0] = float("inf")
    assert trainer.not_finite({"seg": 1.0}, gradient).startswith("gradient of aspp")


# ---- one step, stage by stage


def trainer_of(*args, method=train.Trainer, source=data.Shapes, vit=None):
    """A Trainer of a small ViT whose ASPP adds something and whose teacher is another than the student."""
    parse = transfgu.parse if method is transfgu.TransFGU else train.parse
    args = parse(["--size", "64", "--batch", "2", "--device", "cpu", *args])
    trainer = method(args, vit or small_vit(), source(), {}, torch.device("cpu"))
    for head in (trainer.network.student, trainer.network.teacher):
        if head.aspp is not None:
            nn.init.normal_(head.aspp.project.weight, std=0.1)
        head.decoder.cls_emb.data += randn(*head.decoder.cls_emb.shape, seed=len(head.decoder.cls_emb[0]))
    trainer.network.teacher.decoder.cls_emb.data += randn(*head.decoder.cls_emb.shape, seed=7)
    return trainer


def micro_batch(trainer, samples=range(2), seed=0):
    """Images, maps and draws of `samples` for a Trainer, all of them random."""
    g, S = torch.Generator().manual_seed(seed), trainer.args.size
    K, cells = trainer.source.things + trainer.source.stuff, S // trainer.network.vit.patch_size
    return train.MicroBatch(torch.rand(len(samples), 3, S, S, generator=g),
                            torch.rand(len(samples), K, cells, cells, generator=g) ** 16, # half of it near 0
                            data.draw(0, 1, samples, trainer.args.jitter))


class Stuff(data.Shapes):
    """`shapes` as things and stuff without a background, as cocostuff27 is."""
    things, stuff, background = 2, 4, False


def with_registers():
    torch.manual_seed(0)
    vit = model.VisionTransformer(img_size=64, patch_size=8, embed_dim=48, depth=3, num_heads=4, registers=4)
    return vit.eval().requires_grad_(False)


# the epochs have each row of Table 1; in 1 and 2 the teacher takes no part
@pytest.mark.parametrize("epoch, rates, args, source, vit", [
    (1, (1, 1, 2, 3), (), data.Shapes, small_vit), (4, (1, 1, 3, 5), (), data.Shapes, small_vit),
    (8, (1, 3, 6, 9), (), data.Shapes, with_registers), (10, (1, 6, 12, 18), (), Stuff, small_vit),
    (2, (1, 1, 3, 5), ("--coarse", "soft"), Stuff, with_registers),
    (5, None, ("--aspp", "none", "--balance", "pixels"), Stuff, small_vit),
    (8, (1, 6, 12, 18), ("--aspp", "static", "--par"), data.Shapes, small_vit),
    (1, (1, 1, 2, 3), ("--par",), data.Shapes, small_vit),
    (7, (1, 1, 2, 3), ("--aspp-scale", "0.7", "--threshold", "0.3", "--teacher-weight", "0.2", "--lambdas",
                       "1", "0.5", "2", "0.3", "--lr", "0.01", "--momentum", "0.5", "--par", "1", "3",
                       "--balance", "pixels"),
     data.Shapes, small_vit)])
def test_a_step_is_fig_2_from_crop_to_teacher(epoch, rates, args, source, vit):
    """Every stage written out here, from the textbook; two micro-batches, which make one batch."""
    trainer = trainer_of("--teacher-start", "2", *args, source=source, vit=vit())
    settings, network, background = trainer.args, trainer.network, trainer.source.background
    N, patch, crop = len(trainer.is_thing), 8, 32
    batches = [micro_batch(trainer, range(2)), micro_batch(trainer, range(2, 5), seed=1)]
    reference = copy.deepcopy(network)
    teaches = epoch > 2
    dilations, scale, threshold = tuple(settings.par), settings.aspp_scale, settings.threshold

    def decoded(head, x, msa):
        """Fig. 1, from the attention of the last block on."""
        x = x + msa + (scale * head.aspp(msa, rates) if head.aspp is not None else 0)
        block = reference.vit.blocks[-1]
        tokens = x.flatten(2).mT
        tokens = reference.vit.norm(tokens + block.mlp(block.norm2(tokens)))
        logits, c = head.decoder(tokens)
        return logits.unflatten(2, (crop // patch, crop // patch)), c

    # Fig. 2, top
    labels, confident, features = [], [], []
    for batch in batches:
        draws = batch.draws
        image = data.crop(batch.image, draws, crop)
        maps = data.crop(batch.cams, draws, crop // patch, "area")
        changed = data.augment(image, draws)
        normalised = (changed - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
            [0.229, 0.224, 0.225]).view(3, 1, 1)
        with torch.no_grad():
            x, q, k, v = reference.vit.last_qkv(normalised)
            msa = reference.vit.blocks[-1].attn.attend(q, k, v)
            first = x.shape[1] - (crop // patch) ** 2     # CLS and registers do not count
            pair = [t[:, first:].mT.unflatten(2, (crop // patch, crop // patch)) for t in (x, msa)]
            masks = maps
            if background:
                masks = torch.cat([F.relu(threshold - maps.amax(1, keepdim=True)), maps], 1)
            if teaches:
                share = settings.teacher_weight
                masks = (1 - share) * masks + share * decoded(reference.teacher, *pair)[0].softmax(1)
            elif settings.coarse == "hard" and dilations:
                masks = F.one_hot(masks.argmax(1), N).movedim(3, 1).float()
            if dilations:
                masks = par.PAR(dilations)(image, masks)
            else:
                masks = F.interpolate(masks, size=(crop, crop), mode="bilinear")
        labels.append(masks.argmax(1))
        sure = maps.amax(1) > threshold if background else torch.ones_like(maps[:, 0], dtype=torch.bool)
        confident.append(sure.repeat_interleave(patch, 1).repeat_interleave(patch, 2))
        features.append(pair)
    refined = []                                          # by PAR: images before the jitter (decision 24)
    if dilations:
        trainer.par.register_forward_pre_hook(lambda par, inputs: refined.append(inputs[0]))
    targets, counts = trainer.pseudo_labels(batches, epoch)
    assert same(refined, [data.crop(batch.image, batch.draws, crop) for batch in batches if dilations])
    for target, label, sure, pair in zip(targets, labels, confident, features):
        assert torch.equal(target.label, label) and torch.equal(target.confident, sure)
        for ours, theirs in zip(target.features, pair):
            assert torch.equal(ours, theirs)

    # Fig. 2, bottom, of the batch as a whole
    step = 7
    for p in trainer.params:
        p.grad = torch.ones_like(p)                       # of the step before: counts no more
    losses_of = trainer.train_step(targets, counts, epoch, step)
    label, sure = torch.cat(labels), torch.cat(confident)
    logits, c = decoded(reference.student, *(torch.cat(t) for t in zip(*features)))
    logits = F.interpolate(logits, size=(crop, crop), mode="bilinear")
    ce = F.cross_entropy(logits, label, reduction="none")
    thing = (label > 0) if background else (label < 2)
    assert 0 < thing.float().mean() < 1 and (sure.all() or 0 < sure.float().mean() < 1)
    if settings.balance == "pixels":
        seg = (ce[thing].mean() + ce[~thing].mean()) / 2
    else:
        halves = [[ce[label == c].mean() for c in label[half].unique()] for half in (thing, ~thing)]
        seg = sum(torch.stack(half).mean() for half in halves) / 2
    second = 0
    if teaches:
        permutation = torch.from_numpy(np.random.default_rng((settings.seed, epoch, step)).permutation(N))
        alpha = (0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1)[epoch - 3]
        second = alpha * F.cross_entropy(logits, permutation[label])
    p = (logits[:, 1:] if background else logits).softmax(1).sort(1).values
    un = (1 - (p[:, -1] - p[:, -2]))[sure].mean()
    pairs = [1 + F.cosine_similarity(c[:, i], c[:, j]) for i in range(N) for j in range(i + 1, N)]
    terms = {"seg": seg, "ce": ce.mean() - second, "un": un, "cls": torch.stack(pairs).mean()}
    terms["all"] = sum(weight * terms[name] for weight, name in zip(settings.lambdas, terms))
    for name, value in terms.items():
        assert losses_of[name] == pytest.approx(value.item(), rel=2e-6, abs=2e-7), name

    # clamp, Adam with L2 on matrices, moving average
    student, before = list(reference.student.parameters()), copy.deepcopy(reference.teacher)
    gradients = torch.autograd.grad(terms["all"], student)
    for ours, theirs in zip(trainer.params, gradients):
        assert_close(ours.grad, theirs.clamp(-1, 1), rtol=1e-4, atol=1e-6)
    m = min(1 - 1 / (step + 1), settings.momentum)
    old_teacher = list(before.parameters())
    for now, old, p, followed in zip(trainer.params, student, old_teacher, network.teacher.parameters()):
        g = now.grad + (5e-4 * old if old.ndim > 1 else 0)
        assert_close(now, old - settings.lr * g / (g.abs() + 1e-8), rtol=1e-6, atol=1e-4 * settings.lr)
        assert_close(followed, m * p + (1 - m) * now, rtol=1e-6, atol=1e-7)


def test_a_checkpoint_restores_both_heads_and_all_that_their_logits_depend_on():
    trainer = trainer_of("--aspp-scale", "0.7", "--par", "1", "3", vit=model.backbone("tiny")[0])
    trainer.epoch, trainer.inputs = 8, {"centroids": randn(5, 128)}
    trainer.train_step(*trainer.pseudo_labels([micro_batch(trainer)], 8), 8, 0)   # Adam has something to keep
    stream = io.BytesIO()
    torch.save(train.checkpoint_of(trainer), stream)
    checkpoint = torch.load(io.BytesIO(stream.getvalue()), weights_only=True)     # tensors and plain values
    network, image = evaluation.restore(checkpoint, "cpu"), randn(1, 3, 64, 64)
    assert checkpoint["rates"] == [1, 3, 6, 9] and checkpoint["teacher_on"]
    assert evaluation.run_par(checkpoint).dilations == (1, 3)
    trainer.network.eval()
    features = trainer.network.features(image)
    for theirs, ours in ((trainer.network.student, network.student),
                         (trainer.network.teacher, network.teacher)):
        expected, _ = trainer.network.decode(theirs, features, (1, 3, 6, 9))
        assert torch.equal(network.decode(ours, network.features(image), checkpoint["rates"])[0], expected)
    other = trainer_of("--aspp-scale", "0.7", "--par", "1", "3", vit=model.backbone("tiny")[0])
    train.load_state(other, checkpoint)
    assert other.epoch == 8 and same(train.checkpoint_of(other) | {"centroids": 0},
                                     checkpoint | {"centroids": 0})


def test_things_are_clustered_among_windows_of_the_foreground_and_stuff_among_those_of_the_background(
        monkeypatch):
    rng, vit = np.random.default_rng(0), SimpleNamespace(embed_dim=8)
    bank = []                                             # of two shards; the first number is the kind
    for kind in (train.FOREGROUND, train.BACKGROUND, train.FOREGROUND):
        windows = 5 * np.eye(8)[rng.integers(0, 4, 40)] * (1 - 2 * kind) + rng.normal(0, 0.1, (40, 8))
        bank.append(np.concatenate([np.full((40, 1), kind), windows], 1).astype(np.float16))
    monkeypatch.setattr(train, "window_bank", lambda *args: bank)
    source = Stuff()
    centroids = train.cluster_windows(options(), source, vit, "digest", "cpu")
    assert centroids.shape == (6, 8)
    assert (centroids[:2].amax(1) > 1).all() and (centroids[2:].amin(1) < -4).all()
    sizes, real = [], cam.cluster
    monkeypatch.setattr(train, "BANK_WINDOWS", 30)        # more windows are drawn from, without repetition
    monkeypatch.setattr(cam, "cluster", lambda windows, *rest: (
        sizes.append(len(np.unique(windows, axis=0))) or real(windows, *rest)))
    train.cluster_windows(options(), source, vit, "digest", "cpu")
    assert sizes == [30, 30]


def test_windows_are_of_images_spread_evenly_over_the_list_with_their_kind_before_them(tmp_path, monkeypatch):
    args, vit, taken = options("--size", "64", out=tmp_path / "run"), small_vit(), []
    source = Stuff()
    source.limit(9)
    monkeypatch.setattr(train, "BANK_IMAGES", 3)
    monkeypatch.setattr(source, "squashed", lambda i, size: taken.append(int(i)) or np.resize(
        data.shapes(i)[0], (size, size, 3)))
    bank = np.concatenate(train.window_bank(args, source, vit, "digest", torch.device("cpu")))
    assert taken == [0, 4, 8] and bank.shape[1] == 1 + 48
    image = model.normalise(data.to_float(np.resize(data.shapes(0)[0], (1, 128, 128, 3))))
    fore, back = cam.window_features(vit, image, 64, stuff=True)
    expected = torch.cat([F.pad(fore, (1, 0), value=train.FOREGROUND),
                          F.pad(back, (1, 0), value=train.BACKGROUND)])
    assert_close(torch.from_numpy(bank[:len(expected)]).float(), expected, rtol=1e-3, atol=1e-3)
    assert len(fore) and len(back)


def test_coarse_labels_are_eq_5_scaled_over_each_image_and_scored_as_such(tmp_path):
    args, vit, source = options("--size", "64", out=tmp_path / "run"), small_vit(), data.Shapes()
    source.limit(18)                                      # 16 are computed at once
    images, centroids = np.stack([source.squashed(i, 64) for i in range(18)]), randn(5, 48)
    cams = train.cached_cams(args, "train", source, images, vit, "digest", centroids, torch.device("cpu"))
    exact = cam.class_activation_maps(vit, model.normalise(data.to_float(images)), centroids)
    low, high = exact.amin((1, 2, 3), keepdim=True), exact.amax((1, 2, 3), keepdim=True)
    assert_close(torch.from_numpy(cams[:]).float(), (exact - low) / (high - low), rtol=0, atol=2e-3)
    trainer = trainer_of("--threshold", "0.5")
    labels = np.stack([source.label(i)[::2, ::2] for i in range(18)])
    found = train.score_cams(trainer, cams, labels)
    maps = torch.from_numpy(cams[:]).float()
    masks = torch.cat([F.relu(0.5 - maps.amax(1, keepdim=True)), maps], 1)
    clusters = F.interpolate(masks, size=(64, 64), mode="bilinear").argmax(1)
    expected = evaluation.scores(evaluation.confusion_matrix(labels, clusters, 6))
    assert (found["cam_miou"], found["cam_accuracy"]) == (expected["miou"], expected["accuracy"])


def test_no_element_of_a_gradient_exceeds_1():
    trainer = trainer_of("--lambdas", "1e5", "1e5", "1e5", "1e5")
    targets, counts = trainer.pseudo_labels([micro_batch(trainer)], 2)
    trainer.train_step(targets, counts, 2, 0)
    assert torch.cat([p.grad.flatten() for p in trainer.params]).abs().max() == 1


def epoch_of(epoch, **settings):
    """All MicroBatches of an epoch of 40 images of one grey each, which is also the value of their maps."""
    args = options("--batch", "4")
    vars(args).update(settings)
    images, cams = (np.arange(40).astype(kind) for kind in (np.uint8, np.float16))
    images, cams = images.repeat(12).reshape(40, 2, 2, 3), cams.reshape(40, 1, 1, 1)
    loader = train.batches(args, images, cams, 10, epoch, torch.device("cpu"))
    return [batch for micro_batches, _ in loader for batch in micro_batches]


def test_each_epoch_has_every_image_once_in_another_order_with_the_draws_of_its_samples():
    orders = []
    for epoch, jitter in ((1, [0.8, 0.8, 0.8, 0.2]), (2, [0.1] * 4), (2, [0] * 4)):
        loaded = epoch_of(epoch, jitter=jitter)
        order = torch.cat([batch.cams[:, 0, 0, 0] for batch in loaded]).long()    # sample s is image s
        greys = 255 * torch.cat([batch.image[:, 0, 0, 0] for batch in loaded])
        assert torch.equal(greys.round().long(), order)
        expected = data.draw(0, epoch, order, jitter)
        assert all(torch.equal(torch.cat(numbers), theirs)
                   for numbers, theirs in zip(zip(*(batch.draws for batch in loaded)), expected))
        assert (expected.brightness == 1).all() == (jitter == [0] * 4)
        orders.append(order.tolist())
    assert orders[0] != orders[1] == orders[2] and sorted(orders[0]) == sorted(orders[1]) == list(range(40))
    for other in (dict(seed=1), dict(repeat=2)):          # of the latter 10 of 20 steps are taken here
        order = [int(number) for batch in epoch_of(1, **other) for number in batch.cams[:, 0, 0, 0]]
        assert len(order) == 40 and order != orders[0]


@pytest.mark.parametrize("args, message", [
    ("train --batch 7 --accumulate 8", "fewer images than micro-batches"),
    ("train --size 100", "multiple of"),
    ("train --epochs 0", "--epochs: 0: must be at least 1"), ("train --data folder", "with --root"),
    ("train --data folder --root x --classes 1", "at least 2 and at most 254"), ("train --lr 2", "at most 1"),
    ("train --data cocostuff27 --classes 30", "not for cocostuff27"), ("train --epoch 3", "unrecognized"),
    ("train --backbone resnet", "invalid choice"), ("train --lambdas nan 1 1 1", "--lambdas: nan: must be"),
    ("train --momentum 1.5", "at most 1"), ("train --seed -1", "--seed: -1: must be"),
    ("train --par 0", "--par: 0: must be at least 1"), ("train --teacher-start -3", "at least 0"),
    ("train --jitter -1 0 0 0", "at least 0"), ("eval x.pt --limit 0", "at least 1"),
    ("train --preset transfgu", "unrecognized"), ("train --teacher reset", "invalid choice"),
    ("transfgu --teacher none", "no choice of it"), ("transfgu --aspp static", "no choice of it"),
    ("transfgu --epochs 0", "at least 1"), ("show compare x --limit 0", "at least 1"),
    ("show x", "invalid choice"), ("get_data shapes", "nothing to download"),
    ("get_data folder", "nothing to download"), ("get_data voc --check --url http://a/b", "for downloads"),
    ("get_data voc --root README.md", "is a file"),
    ("get_data coco80 --check --root x", "x/images/train2017: no such folder"),
    ("ablation --seeds x", "invalid int"), ("ablation --rows nobody", "invalid choice"),
    ("ablation -- --lambdas --released", "--lambdas, --released: not after --"),
    ("ablation -- --epochs 0", "at least 1"), ("bench --only nothing", "none of"),
    ("bench --stages --crops 0", "at least 1"), ("bench --quick --size 64", "unknown: --size 64"),
    ("how_many x --classes 1", "at least 2"),
    ("par_on_photos --limit 1", "at least 2"), ("pretrain --steps 0", "at least 1")])
def test_an_option_that_makes_no_sense_is_refused_by_name(capsys, monkeypatch, args, message):
    tools = {tool.__name__.split(".")[1]: tool.main
             for tool in (ablation, bench, get_data, how_many, par_on_photos, pretrain, show)}
    parsers = {"train": train.parse, "eval": evaluation.parse, "transfgu": transfgu.parse}
    start = (tools | parsers)[args.split()[0]]
    monkeypatch.setattr(sys, "argv", args.split())
    monkeypatch.chdir(HERE)
    with pytest.raises(SystemExit, match="2"):
        sys.exit(data.exit_code(start))
    line, = capsys.readouterr().err.splitlines()
    assert message in line


# ----------------------------------------------------------------------------
# train.py: caches and checkpoints


@pytest.mark.parametrize("n", [1, 64, 65, 400])
def test_a_cache_reads_like_the_array_and_names_a_shard_that_another_machine_should_have_made(
        tmp_path, monkeypatch, n):
    compute = lambda shard: np.array([[i, 10 * i] for i in shard])
    read = lambda: train.PerImage(train.cached_shards(options(out=tmp_path / "run"), "x", [], n, compute))
    cache, shards = read(), sorted((tmp_path / "cache").rglob("*"))[1:]
    assert len(cache) == n and cache[n - 1].tolist() == [n - 1, 10 * n - 10]
    assert np.array_equal(cache[n // 3:n], compute(range(n // 3, n)))
    assert [file.name for file in shards] == [f"{k:02}.npy" for k in range(min(n, 64))]
    shards[0].unlink()
    for name, value in (("WORLD", 2), ("RANK", 1), ("barrier", lambda: None)):
        monkeypatch.setattr(train, name, value)
    refused(read, "00.npy", "all must share this folder")


def test_a_killed_run_computes_only_the_shards_that_are_not_there(tmp_path):
    args, computed = options(out=tmp_path / "run"), []

    def compute(shard):
        if len(computed) in (3, 5):
            computed.append(None)
            raise KeyboardInterrupt
        computed.append(shard)
        return np.arange(shard.start, shard.stop)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train.cached_shards(args, "x", [], 100, compute)
    assert train.PerImage(train.cached_shards(args, "x", [], 100, compute))[:].tolist() == list(range(100))
    assert [i for shard in computed if shard for i in shard] == list(range(100))


def test_a_cache_is_read_where_files_can_be_neither_mapped_nor_linked(tmp_path, monkeypatch):
    load = np.load
    monkeypatch.setattr(np, "load", lambda file, mmap_mode=None: (
        raising(OSError(19, "No such device"))() if mmap_mode else load(file)))
    monkeypatch.setattr(os, "link", None)
    shards = train.cached_shards(train.parse(["--out", str(tmp_path / "run")]), "x", [], 9, np.array)
    assert train.PerImage(shards)[:].tolist() == list(range(9))


def test_damaged_shards_and_log_lines_are_named_or_dropped(tmp_path):
    args = train.parse(["--out", str(tmp_path / "run")])
    train.cached_shards(args, "x", [], 9, np.array)
    shard, = (tmp_path / "cache").rglob("03.npy")
    for content in (b"", shard.read_bytes()[:-3], b"\0" * 200):
        shard.write_bytes(content)
        with pytest.raises(data.UserError, match="03.npy: damaged; delete it"):
            train.cached_shards(args, "x", [], 9, np.array)
    (tmp_path / "log.jsonl").write_bytes(b'{"epoch": 1}\n\0\0\n[]\n{"step": 1}\n\xff\n{"epoch": 2}\n{"epo')
    train.Log(tmp_path, 1).file.close()
    assert (tmp_path / "log.jsonl").read_text() == '{"epoch": 1}\n'


def test_a_full_disk_is_named_and_leaves_the_old_file_whole(tmp_path, monkeypatch):
    file = tmp_path / "last.pt"
    train.write_whole(file, lambda f: f.write(b"old"))
    monkeypatch.setattr(os, "fsync", raising(OSError(28, "No space left on device")))
    refused(lambda: train.write_whole(file, lambda f: f.write(b"new")), "last.pt: ",
            "No space left on device", "the same command goes on")
    monkeypatch.setattr(os, "replace", raising(OSError(28, "No space left on device")))
    refused(lambda: train.cached_shards(options(out=tmp_path / "run"), "x", [], 9, np.array), "00.npy: ",
            "No space")
    assert file.read_bytes() == b"old" and [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["last.pt"]


def test_each_cache_depends_on_all_that_made_it_and_on_nothing_else(tmp_path, monkeypatch):
    args, vit, cpu = options(*RUN, out=tmp_path / "run"), SimpleNamespace(embed_dim=8), torch.device("cpu")
    first, fewer, other = data.Shapes(), data.Shapes(), data.Shapes(seed=1)
    for source, n in ((first, 3), (fewer, 2), (other, 3)):
        source.limit(n)
    now, known = SimpleNamespace(source=first, digest="a", centroids=randn(5, 8)), set()
    monkeypatch.setattr(cam, "window_features", lambda *args, **how: (torch.ones(4, 8), torch.ones(2, 8)))
    monkeypatch.setattr(cam, "class_activation_maps", lambda vit, image, k: torch.rand(len(image), 5, 2, 2))
    every = {"train-images", "val-labels", "windows", "train-cams"}
    for where, name, value, expected in (
            (args, "seed", 0, every), (cam, "COVER", 0.4, {"windows"}), (cam, "CLEAR", 0.1, {"windows"}),
            (train, "BANK_IMAGES", 9, {"windows"}), (args, "large", 96, {"windows"}),
            (args, "window", 32, {"windows"}), (args, "scales", (0.5,), {"windows"}),
            (cam, "KEEP_MASS", 0.2, {"train-cams"}), (now, "centroids", randn(5, 8, seed=1), {"train-cams"}),
            (now, "centroids", randn(6, 8), {"train-cams"}), (now, "digest", "b", {"windows", "train-cams"}),
            (args, "size", 128, every - {"windows"}), (now, "source", other, every),
            (now, "source", fewer, every), (fewer, "names", list("abcdef"), {"val-labels"}),
            (args, "data", "voc", every), (train, "VERSION", 0, every),
            *((args, option, value, set()) for option, value in (
                ("seed", 1), ("root", "x"), ("workers", 1), ("batch", 2), ("jitter", [0] * 4), ("crop", 16),
                ("threshold", 0.5), ("classes", 9), ("precision", "bf16"), ("accumulate", 2),
                ("limit", 5), ("epochs", 9), ("out", str(tmp_path / "another"))))):
        monkeypatch.setattr(where, name, value)
        train.window_bank(args, now.source, vit, now.digest, cpu)
        images = train.cached_squashed(args, "train-images", now.source, now.source.squashed)
        train.cached_labels(args, now.source)
        train.cached_cams(args, "train", now.source, images, vit, now.digest, now.centroids, cpu)
        folders = {path.name for path in (tmp_path / "cache").iterdir()}
        assert {folder.split("-", 1)[1][:-17] for folder in folders - known} == expected, (name, value)
        known = folders


def test_a_run_knows_its_files_by_names_and_fingerprints_but_not_by_the_roots_spelling(tmp_path, monkeypatch):
    for i in range(3):
        save(tmp_path / f"photos/{i}.png", data.shapes(i)[0])
    whole = train.identity(data.Folder(tmp_path / "photos"))
    monkeypatch.chdir(tmp_path)
    os.utime("photos/0.png", (0, 0))                      # another time of change, spelt in another way
    assert train.identity(data.Folder("./photos/")) == train.identity(data.Folder("photos")) == whole
    shutil.copy("photos/0.png", "photos/1.png")
    assert train.identity(data.Folder("photos")) != whole
    for suffix in ("bmp", "tif"):                         # of all images of a shape these have one size
        for i, folder in enumerate(("one", "two")):
            save(tmp_path / f"{suffix}/{folder}/a.{suffix}", data.shapes(i)[0])
        one, two = sorted((tmp_path / suffix).rglob(f"a.{suffix}"))
        assert os.path.getsize(one) == os.path.getsize(two)
        assert train.identity(data.Folder(one.parent)) != train.identity(data.Folder(two.parent))
    voc = make_voc(tmp_path / "voc")
    known, name = [train.identity(data.VOC(voc))], "2007_000001"
    save(voc / f"SegmentationClass/{name}.png", np.eye(200, dtype=np.uint8))      # of other numbers of bytes
    known.append(train.identity(data.VOC(voc)))
    save(voc / f"JPEGImages/{name}.jpg", ("RGB", (200, 200), 0))
    known.append(train.identity(data.VOC(voc)))
    for file in [*voc.rglob(f"{name}.*")]:
        file.rename(file.with_stem("another"))
    (voc / "ImageSets/Segmentation/train.txt").write_text("2007_000000\nanother")
    known.append(train.identity(data.VOC(voc)))
    assert len({digest for _, digest in known}) == 4


def test_going_on_needs_the_same_folder_on_all_machines_and_with_dropout_the_same_accumulate(
        tmp_path, monkeypatch):
    args = transfgu.parse([*RUN, "--out", str(tmp_path)])
    torch.save({"args": vars(args), "epoch": 1}, tmp_path / "last.pt")
    monkeypatch.setattr(train, "load_checkpoint", lambda file: torch.load(file, weights_only=True))
    assert train.resume(args, transfgu.TransFGU)["epoch"] == 1
    refused(lambda: train.resume(options(*RUN, out=tmp_path)), "--aspp none, now dynamic")
    args.accumulate = 2
    assert train.resume(args)["epoch"] == 1               # without dropout
    refused(lambda: train.resume(args, transfgu.TransFGU), "--accumulate 1, now 2")
    monkeypatch.setattr(train, "all_reduce_sum", lambda tensor: tensor + 4)       # another has epoch 4
    refused(lambda: train.resume(args), "must share this folder")
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(train, "all_reduce_sum", lambda tensor: tensor + 1)       # this one has no checkpoint
    refused(lambda: train.resume(options(*RUN, out=tmp_path / "none")), "must share this folder")


# ----------------------------------------------------------------------------
# train.py as a program: processes, and runs that go on


def train_run(folder, *extra, world=1, by="train.py"):
    """A run in `world` processes of its own, or with 0 in this one: what its last.pt and its log hold."""
    typed = (by, *RUN, "--out", folder / "run", *extra)
    if world == 0:
        here(0, "wrote ", *typed)
    else:
        ended = program(*typed, world=world)
        assert [code for code, _ in ended] == [0] * world, ended
    return evaluation.load_checkpoint(folder / "run" / "last.pt"), log_values(folder / "run")


def test_a_run_says_which_epoch_is_far_slower_than_the_fastest(tmp_path, monkeypatch):
    speeds = iter((10.0, 40.0, 21.0, 19.0))
    monkeypatch.setattr(train, "speed", lambda *args: {"images_per_s": next(speeds), "data_wait": 0.0})
    text = here(0, "slower than the fastest", "train.py", *RUN, "--epochs", "4", "--out", tmp_path / "run")
    after = text[text.index("epoch 4/4"):].splitlines()[1]
    assert after.startswith("2 times slower") and text.count("slower than") == 1, text


@pytest.mark.parametrize("content, gb", [("VmHWM:\t  2000000 kB\n", 2.048), ("VmRSS:\t 1 kB\n", None)])
def test_a_system_that_does_not_tell_its_peak_of_memory_is_none_the_worse(monkeypatch, content, gb):
    monkeypatch.setattr(Path, "read_text", lambda path: content)
    monkeypatch.setattr(Path, "exists", lambda path: True)
    cost = train.speed(options(), torch.device("cpu"), 10, 2.0, 0.5)
    assert cost == {"images_per_s": 40.0, "data_wait": 0.25} | ({"peak_gb": gb} if gb else {})


def log_values(run):
    timing = {"images_per_s", "data_wait", "peak_gb"}
    return [{k: v for k, v in json.loads(line).items() if k not in timing}
            for line in (run / "log.jsonl").read_text().splitlines()]


def wait_for_lines(log, n):
    end = time.time() + 300
    while time.time() < end and not (log.exists() and len(log.read_text().splitlines()) >= n):
        time.sleep(0.002)


def same(a, b):
    """Bitwise equality of nested dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ("out", "accumulate"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, *train_run(folder)


def test_a_run_writes_its_files_and_logs_every_key(uninterrupted):
    folder, checkpoint, log = uninterrupted
    for name in ("log.jsonl", "last.pt", "best.pt", "panels.png", "curves.png"):
        assert (folder / "run" / name).stat().st_size > 0
    assert [(r["epoch"], r["step"]) for r in log] == [((s - 1) // 4 + 1, s) for s in range(1, 13)]
    assert all({"seg", "ce", "un", "cls", "all", "rates", "lr"} <= r.keys() for r in log)
    assert all({"miou", "accuracy", "clusters", "entropy", "cam_miou"} <= r.keys() for r in log[3::4])
    assert ["teacher_miou" in r for r in log[3::4]] == [False, True, True]        # --teacher-start 1
    assert [r["rates"] for r in log[::4]] == [[1, 1, 2, 3], [1, 1, 3, 5], [1, 1, 2, 3]]
    for r in log:
        assert r["all"] == pytest.approx(
            sum(w * r[k] for w, k in zip(checkpoint["args"]["lambdas"], ("seg", "ce", "un", "cls"))),
            abs=1e-5)
    assert checkpoint["epoch"] == 3 and checkpoint["rates"] == [1, 1, 2, 3]


# (2, 2) cuts batches of 6 into 2 + 2 + 1 + 1
@pytest.mark.parametrize("world, accumulate", [(2, 1), (3, 2), (2, 2)])
def test_any_number_of_processes_and_micro_batches_gives_the_same_run(
        uninterrupted, tmp_path, world, accumulate):
    """Caches bitwise; losses and weights up to float32 summation order, which Adam's division can enlarge."""
    folder, checkpoint, log = uninterrupted
    other, other_log = train_run(tmp_path, "--accumulate", str(accumulate), world=world)
    caches = sorted(p.relative_to(folder) for p in (folder / "cache").rglob("*.npy"))
    assert caches == sorted(p.relative_to(tmp_path) for p in (tmp_path / "cache").rglob("*.npy"))
    assert len({shard.parent for shard in caches}) == 6   # images and maps of two splits, labels, windows
    for name in caches:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name
    for a, b in zip(log, other_log):
        for key in ("seg", "ce", "un", "cls", "all"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), (a["step"], key)
    assert log[3]["miou"] == pytest.approx(other_log[3]["miou"], abs=0.05)
    for k, v in checkpoint["student"].items():
        assert_close(other["student"][k], v, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kill, world", [(signal.SIGKILL, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_an_interrupted_run_ends_bitwise_as_the_uninterrupted_one(uninterrupted, tmp_path, kill, world):
    if world == 1:
        _, checkpoint, log = uninterrupted
    else:
        checkpoint, log = train_run(tmp_path / "whole", world=world)
    run = tmp_path / "cut" / "run"
    started = program("train.py", *RUN, "--out", run, world=world, wait=False)
    wait_for_lines(run / "log.jsonl", 6)                  # in the second epoch
    started[0].send_signal(kill)                          # one process gets it; all have to leave
    codes = [p.wait(timeout=180) for p in started]
    texts = [p.stdout.read() for p in started]
    assert codes == [-kill] + [1] * (world - 1) and "Traceback" not in "".join(texts), texts
    torn = run / "last.pt.0123abcd.tmp"                   # what a kill during a save leaves behind
    torn.write_bytes(b"half a checkpoint")
    (code, text), *_ = program("train.py", *RUN, "--out", run, world=world)
    shown = re.findall(r"epoch (\d)/3 .* all (-?[\d.]+)", text)
    assert code == 0 and "1 of 3 epochs are done, going on" in text, text
    assert [epoch for epoch, _ in shown] == ["2", "3"]
    assert log_values(run) == log and not torn.exists()
    assert same(evaluation.load_checkpoint(run / "last.pt"), checkpoint)


def test_a_kill_before_the_first_epoch_keeps_the_clusters(uninterrupted, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "cached_cams", raising(KeyboardInterrupt))
        train.main(options(*RUN, out=tmp_path / "run"))
    shutil.rmtree(tmp_path / "cache")                     # k-means cannot be done again from them
    checkpoint, log = train_run(tmp_path, world=0)
    assert "windows" not in "".join(p.name for p in (tmp_path / "cache").iterdir())
    assert log == uninterrupted[2] and same(checkpoint, uninterrupted[1])


def test_a_run_goes_on_without_caches_or_weights_and_on_another_machine(uninterrupted, tmp_path, monkeypatch):
    """Other kernels and threads stand for the other machine: there k-means would find other clusters."""
    fewer = ("--limit", "6", "--batch", "3")
    here(0, "epoch 1/1", "train.py", *RUN, *fewer, "--epochs", "1", "--out", tmp_path / "run")
    shutil.rmtree(tmp_path / "cache")
    elsewhere = dict(OMP_NUM_THREADS="2", ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41")
    text = ends(0, "1 of 2 epochs are done, going on", "train.py", *RUN, *fewer, "--epochs", "2",
                "--out", tmp_path / "run", env=elsewhere)
    assert "k-means" not in text, text
    monkeypatch.setattr(train, "backbone", raising(AssertionError("the file of the ViT's weights was read")))
    train.frozen_vit(SimpleNamespace(backbone="tiny"), uninterrupted[1], "cpu")


def test_a_finished_run_trains_nothing_draws_its_pictures_again_and_says_so(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[0], tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    drawn = [run / "curves.png", run / "panels.png"]
    before = [picture.read_bytes() for picture in drawn]
    drawn[0].unlink()                                     # as if it had been killed before its pictures
    drawn[1].write_bytes(b"half")                         # or as another version drew it
    text = here(0, "3 of 3 epochs are done; raise --epochs to train on", "train.py", *RUN, "--out", run)
    assert "last epoch: mIoU" in text and "epoch 3/3" not in text, text
    assert [picture.read_bytes() for picture in drawn] == before
    with pytest.MonkeyPatch.context() as patch:           # killed before the first step of a further epoch
        patch.setattr(train, "Log", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            train.main(train.parse([*RUN, "--epochs", "4", "--out", str(run)]))
    for name in ("last.pt", "best.pt", "log.jsonl"):
        assert (run / name).read_bytes() == (uninterrupted[0] / "run" / name).read_bytes()
    here(2, "--lr 0.0005, now 0.5", "train.py", *RUN, "--out", run, "--lr", "0.5", "--epochs", "4")
    here(2, "--par 1 2 8 16, now 1 2: use another --out", "train.py", *RUN, "--out", run, "--par", "1", "2")


@pytest.mark.parametrize("stop", (signal.SIGTERM, signal.SIGINT))
def test_a_process_that_waits_for_another_one_ends_at_once_when_it_is_stopped(tmp_path, stop):
    port = free_port()
    waiting, = program("train.py", *RUN, "--out", tmp_path / "run", env=by_torchrun(0, 2, port), wait=False)
    end = time.time() + 180
    while time.time() < end:                              # until it listens for the other one
        with socket.socket() as other:
            if other.connect_ex(("127.0.0.1", int(port))) == 0:
                break
        time.sleep(0.1)
    time.sleep(0.5)
    assert waiting.poll() is None
    waiting.send_signal(stop)
    assert waiting.wait(timeout=60) == -stop and "Traceback" not in waiting.stdout.read()


@pytest.mark.parametrize("variables", [dict(RANK="1", LOCAL_RANK="x"),
                                       dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="x", MASTER_PORT="1")])
def test_a_clusters_variables_are_nothing_where_torchrun_has_not_started_the_process(tmp_path, variables):
    text = ends(0, '"seed": 0', "train.py", *RUN, "--dry-run", "--out", tmp_path / "run", env=variables)
    assert "val: 24 scenes" in text                       # said by the first process


def test_processes_of_an_old_launcher_get_local_rank_and_ignore_it(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=2",
              f"--master_port={free_port()}", "train.py", *RUN, "--dry-run", "--out", tmp_path / "run"]
    done = subprocess.run(list(map(str, launch)), cwd=HERE, capture_output=True, text=True, timeout=120,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0 and done.stdout.count('"seed": 0') == 1, done     # two processes, one speaks
    assert "local_rank" not in vars(options("--local-rank", "1")) == vars(options("--local_rank=1"))


def test_scores_do_not_depend_on_how_the_images_are_shared(monkeypatch):
    trainer = trainer_of("--teacher-start", "0")
    rng, network = np.random.default_rng(0), trainer.network
    images, labels = (rng.integers(0, n, (37, 64, 64, *c), np.uint8) for n, c in ((256, (3,)), (6, ())))
    cams = rng.random((37, 5, 8, 8)).astype(np.float16)
    real, totals = network.decode, {}

    def decode(head, features, rates):
        """What is predicted depends on all images of a group, as the last bits of a network's sums do."""
        assert not head.training                          # no dropout where it has some
        logits, c = real(head, features, rates)
        return logits.roll(int(features[0].abs().sum()) % 6, 1), c

    def add(confusion):
        """Instead of a sum over processes: theirs, one after the other."""
        totals[train.WORLD] = totals.get(train.WORLD, []) + [confusion.clone()]
        return confusion

    monkeypatch.setattr(network, "decode", decode)
    monkeypatch.setattr(train, "all_reduce_sum", add)
    for world in (1, 2, 3):
        monkeypatch.setattr(train, "WORLD", world)
        for rank in range(world):
            monkeypatch.setattr(train, "RANK", rank)
            train.score_val(trainer, images, labels, 3, {})
            train.score_cams(trainer, cams, labels)
    for world in (2, 3):
        for i in range(2):                                # of student and teacher (2, 6, 6), of CAM (6, 6)
            assert torch.equal(sum(totals[world][i::2]), totals[1][i]), (world, i)
    assert totals[1][0].sum() == 2 * labels.size and totals[1][1].sum() == labels.size
    assert not torch.equal(*totals[1][0]) and network.student.training            # again


def test_a_run_with_bad_numbers_stops_on_all_processes_and_keeps_its_checkpoint(tmp_path, uninterrupted):
    last = shutil.copytree(uninterrupted[0], tmp_path / "copy") / "run" / "last.pt"
    state = torch.load(last, weights_only=True)
    state["student"]["decoder.cls_emb"][:] = float("nan")
    torch.save(state, last)
    before = last.read_bytes()
    ended = program("train.py", *RUN, "--epochs", "4", "--out", last.parent, world=2)
    assert ([code for code, _ in ended] == [1, 1]
            and all("step 13: seg" in text and "is kept" in text for _, text in ended)
            and all("Traceback" not in text for _, text in ended)), ended
    assert last.read_bytes() == before


def test_a_process_that_fails_takes_the_others_down(tmp_path):
    started = program("train.py", *RUN, "--epochs", "50", "--out", tmp_path / "run", world=2, wait=False)
    wait_for_lines(tmp_path / "run" / "log.jsonl", 1)
    started[1].kill()
    assert started[0].wait(timeout=180) == 1
    text = started[0].stdout.read()
    assert "another process is gone" in text and "Traceback" not in text, text


def test_what_goes_wrong_on_a_gpu_or_between_processes_is_one_line_that_claims_no_more(monkeypatch, capsys):
    """Errors as torch, the GPU's driver, nccl and gloo word them; no GPU is needed."""
    nccl = "NCCL error in: NCCLUtils.cpp:77, {}, NCCL version 2.27\nLast error:\n{}"
    full = nccl.format("ncclUnhandledCudaError: Call to CUDA function failed", "failure 2 'out of memory'")
    twice = nccl.format("invalid usage", "Duplicate GPU detected : rank 0 and rank 1 on CUDA device 1000")
    left_by = []                                          # of several processes torch's clean-up may hang
    monkeypatch.setattr(os, "_exit", left_by.append)
    monkeypatch.setattr(train, "start_processes", lambda device: device)
    for error, code, words in ((torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"), 2, "--accumulate"),
                               (RuntimeError("CUDA error: out of memory\nCompile with"), 2, "--accumulate"),
                               (RuntimeError(full), 2, "--accumulate"),
                               (RuntimeError("CUDA error: device-side assert"), 1, "Traceback"),
                               (ConnectionError("gone"), 1, "gone")):
        monkeypatch.setattr(train, "resume", raising(error))
        for world in (1, 2):
            monkeypatch.setattr(train, "WORLD", world)
            with pytest.raises(SystemExit) as end:
                train.launch(options("--dry-run"))
            assert end.value.code == code and left_by == [code] * (world - 1)
            left_by.clear()
            text = capsys.readouterr().err
            assert words in text and (len(text.splitlines()) == 1) == ("Traceback" not in text), text
    monkeypatch.undo()
    monkeypatch.setattr(train, "WORLD", 2)
    for error, kind, words in ((RuntimeError("Connection closed by peer"), ConnectionError, "is gone"),
                               (RuntimeError(full), RuntimeError, "out of memory"),
                               (RuntimeError(twice), RuntimeError, "Duplicate GPU")):
        monkeypatch.setattr(train.dist, "all_reduce", raising(error))
        with pytest.raises(kind, match=words) as raised:
            train.all_reduce_sum(torch.zeros(1))
        assert kind is ConnectionError or "gone" not in str(raised.value)
    monkeypatch.setattr(train, "choose_device", lambda device: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(train, "LOCAL_RANK", 1)
    refused(lambda: train.start_processes("auto"), "process 1", "no GPU of its own", "--nproc_per_node")


def test_transfgus_teacher_becomes_the_student_which_starts_anew(tmp_path):
    trainer = transfgu.TransFGU(transfgu.parse([]), small_vit(), data.Shapes(), {}, torch.device("cpu"))
    network, first = trainer.network, copy.deepcopy(trainer.network.student.state_dict())
    for p in trainer.params:
        p.data += 1
    trained = copy.deepcopy(network.student.state_dict())
    trainer.replace_teacher()
    assert same(network.teacher.state_dict(), trained) and same(network.student.state_dict(), first)
    before, _ = train_run(tmp_path, "--epochs", "2", world=0, by="tools/transfgu.py")
    after, log = train_run(tmp_path, world=0, by="tools/transfgu.py")             # replaced before epoch 3
    assert same(after["teacher"], before["student"])
    assert ["teacher_miou" in record for record in log if "miou" in record] == [False, False, True]


def test_labels_of_transfgu_are_of_patches_by_cam_scaled_by_the_crop_and_a_teacher_of_one_half():
    trainer = trainer_of("--teacher-start", "1", method=transfgu.TransFGU)
    network, batch = trainer.network, micro_batch(trainer)
    maps = data.crop(0.3 * batch.cams, batch.draws, 4, "area")
    low, high = maps.amin((1, 2, 3), keepdim=True), maps.amax((1, 2, 3), keepdim=True)
    maps = (maps - low) / (high - low)
    background = torch.cat([F.relu(0.1 - maps.amax(1, keepdim=True)), maps], 1)
    image = model.normalise(data.augment(data.crop(batch.image, batch.draws, 32), batch.draws))
    features = network.features(image)
    teacher = network.decode(network.teacher, features, (1, 1, 2, 3))[0].softmax(1)
    for epoch, masks in ((1, background), (2, background), (4, (background + teacher) / 2)):
        (target,), counts = trainer.pseudo_labels([batch._replace(cams=0.3 * batch.cams)], epoch)
        assert torch.equal(target.label, masks.argmax(1)) and target.label.shape == (2, 4, 4)
        assert torch.equal(target.confident, maps.amax(1) > 0.1) and counts[0] == 2
        assert all(map(torch.equal, target.features, features))
    assert not torch.equal(background.argmax(1), target.label)


def test_dropout_of_transfgu_is_of_step_and_process_and_ends_with_training(monkeypatch):
    trainer = transfgu.TransFGU(transfgu.parse([]), small_vit(), data.Shapes(), {}, torch.device("cpu"))
    decoder, tokens = trainer.network.student.decoder, randn(2, 9, 48)
    with monkeypatch.context() as patch:
        shares, attend, dropout = [], F.scaled_dot_product_attention, F.dropout
        patch.setattr(F, "dropout", lambda x, p, training: shares.append(p) or dropout(x, p, training))
        patch.setattr(F, "scaled_dot_product_attention", lambda *qkv, dropout_p: (
            shares.append(dropout_p) or attend(*qkv, dropout_p=dropout_p)))
        decoder(tokens)
    assert shares == [0.1] * 4 * len(decoder.blocks)
    outputs = [decoder(tokens)[0] for _ in range(2)]
    assert not torch.equal(*outputs)
    decoder.eval()
    assert torch.equal(decoder(tokens)[0], decoder(tokens)[0])
    trainer.network.train()
    losses_of = []
    for rank, step in ((0, 5), (0, 5), (0, 6), (1, 5)):   # the same step again draws the same
        monkeypatch.setattr(train, "RANK", rank)
        state = copy.deepcopy(trainer.network.student.state_dict())
        targets, counts = trainer.pseudo_labels([micro_batch(trainer)], 1)
        losses_of.append(trainer.train_step(targets, counts, 1, step)["all"])
        trainer.network.student.load_state_dict(state)
    assert losses_of[0] == losses_of[1] and len(set(losses_of)) == 3


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="torch is too old to tell")
def test_whether_a_cpu_multiplies_in_bf16_is_asked_as_torch_asks_it(capsys):
    flags = torch.cpu.get_capabilities()
    assert train.use_bf16("bf16", torch.device("cpu"))
    slow = "fp32 is many times faster" in capsys.readouterr().out
    assert slow != any(has is True for name, has in flags.items() if "bf16" in name)


def test_bf16_on_a_cpu_without_it_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "Path", lambda name: tmp_path / Path(name).name)   # for /proc
    for precision, flags, warned in (("bf16", "avx2", True), ("bf16", "avx2 avx512_bf16", False),
                                     ("auto", "avx2", False), ("bf16", None, False)):
        (tmp_path / "cpuinfo").unlink(missing_ok=True)
        if flags:                                         # else not Linux
            (tmp_path / "cpuinfo").write_text(f"flags: {flags}")
        assert train.use_bf16(precision, torch.device("cpu")) == (precision == "bf16")
        assert ("fp32 is many times faster" in capsys.readouterr().out) == warned


def test_bf16_changes_the_losses_little_and_the_caches_not_at_all(uninterrupted, tmp_path):
    folder, _, log = uninterrupted
    here(0, "", "train.py", *RUN, "--epochs", "1", "--precision", "bf16", "--out", tmp_path / "run")
    first = log_values(tmp_path / "run")[0]
    assert first["ce"] == pytest.approx(log[0]["ce"], rel=0.02) and first["ce"] != log[0]["ce"]
    for shard in (folder / "cache").rglob("*.npy"):
        assert shard.read_bytes() == (tmp_path / shard.relative_to(folder)).read_bytes()


@pytest.mark.parametrize("method", [train.Trainer, transfgu.TransFGU])
def test_crops_are_in_fp32_also_where_the_network_computes_in_bf16(method, monkeypatch):
    trainer = trainer_of("--precision", "bf16", method=method)
    batch = train.MicroBatch(torch.rand(2, 3, 64, 64), torch.rand(2, 5, 8, 8), data.draw(0, 1, [0, 1]))
    seen, features = [], trainer.network.features
    monkeypatch.setattr(trainer.network, "features", lambda x: seen.append(x) or features(x))
    trainer.pseudo_labels([batch], 1)
    crop = data.crop(batch.image, batch.draws, trainer.args.crop)
    assert torch.equal(seen[0], model.normalise(data.augment(crop, batch.draws)))


@pytest.mark.parametrize("args, message", [
    ("--data voc --root nowhere", "nowhere/VOCdevkit/VOC2012/ImageSets: no such folder"),
    ("--weights none.pt --batch 4", "none.pt: cannot read"), ("--batch 4096", "larger than an epoch"),
    ("--dry-run", "larger than an epoch"),
    ("--out /proc/nowhere --batch 4", "/proc/nowhere: No such file"),
    ("--classes 4 --batch 4", "--classes 4: shapes has 5 classes; give at least so many"),
    ("--data folder --root assets/panels.png --classes 254 --backbone tiny --batch 1 --size 64",
     "too few for 254 clusters"),
    *([] if torch.cuda.is_available() else [("--device cuda", "no GPU")])])
def test_what_is_not_there_is_one_line_and_exit_code_2_before_the_first_step(
        tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(HERE)
    text = here(2, message, "train.py", "--limit", "4", "--out", tmp_path / "run", *args.split())
    *facts, last = text.splitlines()                      # what was read, and done
    assert last.startswith("train.py: ") and message in last, text
    assert not any(line.startswith(("train.py", "epoch")) for line in facts), text
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_folder_of_photographs_trains_and_predicts_without_labels_and_has_to_stay(uninterrupted, tmp_path):
    photos, run, other = tmp_path / "in", tmp_path / "run", uninterrupted[0] / "run" / "last.pt"
    for i in range(6):
        save(photos / f"{i}.jpg", Image.fromarray(data.shapes(i)[0]).resize((90 + i, 80)))
    go = ("train.py", "--data", "folder", "--root", photos, "--classes", "3", "--backbone", "tiny",
          "--size", "64", "--batch", "4", "--out", run, "--epochs")
    (photos / "broken.jpg").write_text("no picture")
    here(2, "broken.jpg: cannot read this image", *go, "1")
    assert not (run / "log.jsonl").exists()               # before the first step
    (photos / "broken.jpg").unlink()
    here(2, "lies in the folder of photographs", *go, "1", "--out", photos / "runs" / "a")
    here(0, "names.txt", *go, "1")
    assert (run / "panels.png").exists() and Image.open(run / "clusters.png").size[0] > 1000
    assert (run / "names.txt").read_text().splitlines()[1:] == [
        "0 = background", "1 = cluster 1", "2 = cluster 2", "3 = cluster 3"]
    (run / "names.txt").write_text("1 = dog\n3 = dog\n2 = background")            # as a user edits it
    shutil.copy(photos / "0.jpg", photos / "7.jpg")
    text = here(2, "images or labels of train have changed, 6 then, 7 now", *go, "2")
    assert text.count("train.py: ") == 1 and (run / "curves.png").exists(), text
    (photos / "7.jpg").unlink()
    here(0, "1 of 2 epochs are done, going on", *go, "2")
    here(2, "--predict", "eval.py", run)
    assert (run / "names.txt").read_text().startswith("1 = dog\n")
    here(0, "wrote 6 masks", "eval.py", run, "--predict", photos, "--out", tmp_path / "out")
    shares = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {name for share in shares.values() for name in share} <= {"background", "dog"}
    for name, share in shares.items():
        mask = np.array(Image.open(tmp_path / "out" / f"{name}_mask.png"))
        assert mask.max() <= 1 and share.get("dog", 0) == pytest.approx(mask.mean(), abs=1e-4)
    (run / "clusters.png").unlink()
    here(0, "clusters.png", "tools/show.py", "clusters", run)
    assert Image.open(run / "clusters.png").size[1] == 24 + 2 * 166 + 6           # dog and background
    here(2, "other classes", "tools/show.py", "compare", run, other)
    here(2, "no labels", "tools/show.py", "pairs", run)

    text = here(0, "too few for 200", "tools/how_many.py", run, "--classes", "3", "2", "200")
    assert re.findall(r"^\| +(\d+) \|", text, re.M) == ["2", "3"]
    assert Image.open(run / "how_many.png").size == (450, 340)
    assert len([*(tmp_path / "cache").glob("*-windows-*")]) == 1                  # the run's were used
    here(2, "too few for 200", "tools/how_many.py", run, "--classes", "200")
    here(2, "none/last.pt", "tools/how_many.py", tmp_path / "none")

    (run / "names.txt").write_text("1 = dog\n2 dog\n")
    assert here(2, "names.txt: line 2", *go, "3").count("\n") == 1                # before it trains
    assert here(2, "names.txt: line 2", "tools/show.py", "clusters", run).count("\n") == 1
    here(2, "/run/names.txt: line 2", "tools/show.py", "compare", other, run)
    (run / "last.pt").unlink()                            # a new run has other clusters
    here(2, "/run/names.txt: of an earlier run", *go, "1")
    (run / "best.pt").touch()                             # of which eval.py would read this one
    here(2, "/run/best.pt: of an earlier run", *go, "1")


def test_the_ablation_trains_its_rows_and_compares_them_seed_by_seed(tmp_path):
    run = lambda *miou: [{"epoch": i, "miou": m, "accuracy": 50.0, "iou": [m, m]}
                         for i, m in enumerate(miou, 1)]
    finished = {"baseline": {0: run(40, 50, 30), 1: run(60, 20, 30)},
                "par": {0: run(60, 55, 50), 1: run(60, 61, 60)},
                "dmsa": {0: run(10, 55, 60), 1: run(10, 20, 50)}, "no-par": {0: run(10, 20, 57)},
                "static": {}}
    lines = ablation.table(finished, {"par": (1, 2)})
    cells = [[cell.strip() for cell in line.split("|")[5:-1]] for line in lines]
    assert cells[2] == ["30.00 ± 0.00", "30.00", "0 of 2", "–", "–", "50.00 ± 0.00", "55.00 ± 7.07", "–", "–",
                        "–"]
    # 50 - 30 and 60 - 30; the baselines' best are 50, passed in epoch 1, and 60, passed in epoch 2
    assert cells[3] == ["55.00 ± 7.07", "55.00", "0 of 2", "+25.00 [+20.00, +30.00] to baseline", "2 of 2",
                        "50.00 ± 0.00", "60.50 ± 0.71", "1.5", "1.00", "2.00"]
    assert cells[4][3:5] == ["+25.00 [+20.00, +30.00] to baseline", "2 of 2"]
    assert cells[4][7] == "1 of 2 seeds"
    assert cells[5][:5] == ["57.00", "57.00", "0 of 1", "-3.00 [-3.00, -3.00] to dmsa", "0 of 1"]
    assert cells[6][0] == "failed"
    ends_with = lambda *iou: [{"iou": [0, 0]}, {"iou": iou}]                      # the last epoch counts
    assert ablation.lost({seed: ends_with(90, iou) for seed, iou in enumerate((80, 39, 38, 90, 100))}) == 2
    assert ablation.lost({0: ends_with(90, 80), 1: ends_with(90, 41), 2: ends_with(None, 90)}) == 0
    low, high = ablation.interval(np.arange(16) - 7.5)    # of a deviation of 4.6: 1.96 * 4.6 / 4
    assert abs(low + 2.26) < 0.1 and abs(high - 2.26) < 0.1
    rows = ("baseline", "dmsa", "released")
    small = (*RUN, "--limit", "6", "--batch", "3")
    go = ("tools/ablation.py", "--rows", *rows, "--seeds", "0", "--out", tmp_path, "--", *small, "--epochs")
    text = ends(0, "shapes, seeds [0], 2 epochs", *go, "2")
    assert "3 runs, 3 rows of 1 seeds: 0 are finished" in text and "run 1 of 3: " in text, text
    assert re.search(r"run 3 of 3, about \d+ \w+ left: .*shapes-released-0\n", text), text
    base, whole, released = (evaluation.load_checkpoint(tmp_path / f"shapes-{row}-0" / "last.pt")["args"]
                             for row in rows)
    assert (base["lambdas"], base["aspp"], base["par"]) == ([0, 1, 0.1, 1], "none", [])
    assert whole == vars(options(*small, "--epochs", "2", out=tmp_path / "shapes-dmsa-0"))
    assert (released["method"], released["teacher"]) == ("released", "reset")
    before = [(tmp_path / f"shapes-{row}-0" / "curves.png").stat().st_mtime_ns for row in rows]
    less = here(0, "3 are finished", *go, "1")            # of a longer run: its first epoch
    assert "run 1" not in less and "shapes, seeds [0], 1 epochs" in less, less
    first = [next(r["miou"] for r in log_values(tmp_path / f"shapes-{row}-0") if "miou" in r) for row in rows]
    *table, _, title, base_line, dmsa_line, released_line = less.splitlines()
    assert title == "mIoU of each seed" and dmsa_line.split() == ["dmsa", f"{first[1]:.1f}"]
    assert [line.split(" | ")[4] for line in table[-3:]] == [f"{miou:.2f}" for miou in first]
    assert before == [(tmp_path / f"shapes-{row}-0" / "curves.png").stat().st_mtime_ns for row in rows]
    here(2, "--momentum 0.97, now 0.9", *go, "2", "--momentum", "0.9")


def test_each_class_counts_the_same_in_a_half_of_l_seg_of_shapes_and_folders_and_each_pixel_elsewhere():
    balance = {name: options("--data", name, "--root", "x").balance for name in train.BY_DATA_SET}
    assert balance.pop("folder") == balance.pop("shapes") == "classes" and set(balance.values()) == {"pixels"}
    assert trainer_of(source=Stuff).is_thing.tolist() == [True, True, False, False, False, False]
    assert trainer_of().is_thing.tolist() == [False, True, True, True, True, True]


def test_each_row_of_the_ablation_leaves_out_what_its_marks_say():
    p = ablation.parse(["--rows", "all", "--seeds", "3", "3"])
    runs = ablation.runs_of(p)
    assert [run.row for run in runs] == list(ablation.ROWS) == p.rows and p.seeds == [3]
    for run in runs:
        marks = ablation.ROWS[run.row][1]
        args = run.args
        assert [mark == "✓" for mark in marks] == [args.lambdas[0] > 0, args.aspp != "none", args.par != []]
        assert args.lambdas[1:] == options().lambdas[1:] and args.seed == 3
        assert (run.method is transfgu.TransFGU) == (run.program.name == "transfgu.py") == (
            args.method != "dmsa")


def test_the_best_epoch_has_the_largest_sum_of_miou_and_accuracy_or_came_first(monkeypatch):
    trainer, written, epochs = SimpleNamespace(results={}), [], ((50, 30), (60, 10), (50, 30), (60, 21))
    monkeypatch.setattr(train, "save_checkpoint", lambda trainer, name: written.append((trainer.epoch, name)))
    records = [dict(epoch=n, miou=miou, accuracy=accuracy) for n, (miou, accuracy) in enumerate(epochs, 1)]
    for n, record in enumerate(records, 1):
        train.finish_epoch(trainer, record)
        assert trainer.results == {"last": record, "best": ablation.best(records[:n])}
    assert ablation.best(records[:3]) is records[0] and ablation.best(records) is records[3]
    assert written == [(1, "best.pt"), (1, "last.pt"), (2, "last.pt"), (3, "last.pt"), (4, "best.pt"),
                       (4, "last.pt")]


def test_the_adjusted_rand_index_counts_pairs_of_windows():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 3, 40), rng.integers(0, 4, 40)
    b[:25] = a[:25]
    together = lambda labels: np.array([labels[i] == labels[j] for i in range(40) for j in range(i)])
    one, other = together(a), together(b)
    chance, most = one.sum() * other.sum() / len(one), (one.sum() + other.sum()) / 2
    assert how_many.adjusted_rand(a, b, 4) == pytest.approx(((one & other).sum() - chance) / (most - chance))
    assert how_many.adjusted_rand(a, (a + 1) % 3, 3) == 1 == how_many.adjusted_rand(a * 0, a * 0, 2)


def test_clusters_that_all_images_share_are_stable_and_those_of_single_images_over_starts_only():
    rng = np.random.default_rng(0)                        # 20 images of 4 kinds of windows; 8 of a kind each
    windows = lambda kinds: (10 * np.eye(8)[kinds] + rng.normal(0, 1, (12, 8))).astype(np.float32)
    shared = how_many.agreement([windows(rng.integers(0, 4, 12)) for _ in range(20)], 4, rng)
    single = how_many.agreement([windows([i] * 12) for i in range(8)], 8, rng)
    assert np.mean(shared["halves"]) > 0.95 and np.mean(single["starts"]) > 0.95
    assert np.mean(single["halves"]) < 0.8


def test_more_clusters_than_classes_are_scored_twice_and_predicted_as_classes(uninterrupted, tmp_path):
    checkpoint, log = train_run(tmp_path, "--classes", "8", world=0)
    last = tmp_path / "run" / "last.pt"
    assert len(checkpoint["assignment"]) == 9 and checkpoint["names"] == uninterrupted[1]["names"]
    assert checkpoint["centroids"].shape[0] == 8 and set(checkpoint["assignment"]) <= set(range(6))
    assert log[-1]["many_accuracy"] >= log[-1]["accuracy"] and "many_miou" not in uninterrupted[2][-1]
    text = here(0, "many to one", "eval.py", last, "--limit", "24")
    assert f"mIoU {log[-1]['miou']:.2f}  accuracy {log[-1]['accuracy']:.2f}  clusters in use" in text
    assert f"mIoU {log[-1]['many_miou']:.2f}  accuracy {log[-1]['many_accuracy']:.2f}" in text
    photo = save(tmp_path / "in" / "a.png", data.shapes(1, 96)[0])
    here(0, "wrote 1 masks", "eval.py", last, "--predict", photo, "--out", tmp_path / "out")
    assert np.array(Image.open(tmp_path / "out" / "a_mask.png")).max() < 6
    here(0, "a_explain.png", "tools/show.py", "explain", last, photo, "--out", tmp_path / "out")
    here(0, "compare.png", "tools/show.py", "compare", last, uninterrupted[0] / "run" / "last.pt", "--limit",
         "1", "--out", tmp_path / "out")
    here(0, "clusters.png", "tools/show.py", "clusters", last)                    # of labelled data, too
    here(2, "--classes 8, now 9", "train.py", *RUN, "--classes", "9", "--out", tmp_path / "run")
    source = data.Shapes()
    source.things = 8                                     # last.pt has classes also before the first scores
    assert train.Trainer(options(), small_vit(), source, {}, torch.device("cpu")).assignment == [0] * 9
    (tmp_path / "run" / "names.txt").write_text("1 = dog")
    here(2, "class names of its own", "eval.py", last, "--predict", photo)


# ----------------------------------------------------------------------------
# eval.py as a program


def test_predictions_have_the_images_own_size_and_class_indices(uninterrupted, tmp_path, monkeypatch):
    checkpoint, photos, out = uninterrupted[0] / "run" / "best.pt", tmp_path / "in", tmp_path / "out"
    save(photos / "a.png", Image.fromarray(data.shapes(1, 96)[0]).resize((75, 50)))
    save(photos / "sub" / "b.jpg", Image.fromarray(data.shapes(2, 96)[0]).convert("CMYK").resize((33, 91)))
    for extra in ([], ["--native"], ["--par"]):
        here(0, "wrote 2 masks", "eval.py", checkpoint, "--predict", photos, "--out", out, *extra)
        shares = json.loads((out / "predictions.json").read_text())
        for name, size in (("a", (75, 50)), ("sub/b", (33, 91))):
            with Image.open(out / f"{name}_mask.png") as mask:
                assert mask.mode == "P" and mask.size == size and np.array(mask).max() < 6
                assert mask.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
                share = np.bincount(np.array(mask).flatten(), minlength=6) / np.array(mask).size
            found = [shares[name].get(n, 0) for n in uninterrupted[1]["names"]]
            assert np.allclose(found, share, atol=1e-4)
            assert Image.open(out / f"{name}_overlay.png").size == size
    assert sorted(p.name for p in out.rglob("*") if p.is_file()) == [
        "a_mask.png", "a_overlay.png", "b_mask.png", "b_overlay.png", "legend.png", "predictions.json"]
    for damaged in ("{", "7"):
        (out / "predictions.json").write_text(damaged)
        refused(lambda: evaluation.earlier_shares(out / "predictions.json"), "predictions.json: damaged")
    (out / "predictions.json").unlink()
    here(0, "wrote 1 masks", "eval.py", checkpoint, "--predict", photos / "a.png", photos / "sub",
         "--limit", "1", "--out", tmp_path / "one")       # several paths
    exif, loaded = Image.Exif(), evaluation.load_checkpoint(checkpoint)
    exif[0x112] = 6
    photo = save(tmp_path / "c/c.jpg", data.shapes(1, 95)[0][:51], exif=exif)     # stored 95 x 51
    monkeypatch.setattr(data, "REDUCED", 95 * 51 - 1)                             # decoded as 48 x 26
    evaluation.predict(evaluation.restore(loaded), loaded, data.Folder(photo), out, False, None, False)
    assert Image.open(out / "c_mask.png").size == (51, 95)


MASK = """
import eval
eval.main()
print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])         # KB; as in HUGE
"""


def test_a_photograph_of_12_megapixels_has_a_mask_of_its_size_within_2_gb(tmp_path):
    photo = save(tmp_path / "in" / "a.jpg", ("RGB", (4000, 3000), (90, 120, 30)))
    args = options("--data", "folder", "--root", str(photo), "--backbone", "tiny", "--size", "128")
    trainer = train.Trainer(args, model.backbone("tiny")[0], data.Folder(photo, 20),
                            {"centroids": torch.zeros(20, 128)}, torch.device("cpu"))
    trainer.epoch = 1
    torch.save(train.checkpoint_of(trainer), tmp_path / "last.pt")
    command = [sys.executable, "-c", MASK, tmp_path / "last.pt", "--predict", photo, "--native", "--par",
               "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout.split()[-1]) * 1024 < 2e9, done
    assert Image.open(tmp_path / "out" / "a_mask.png").size == (4000, 3000)


def test_an_unreadable_photograph_costs_its_own_mask_only(uninterrupted, tmp_path):
    save(tmp_path / "in" / "a.png", data.shapes(1, 96)[0])
    (tmp_path / "in" / "a-broken.png").write_text("no picture")
    text = here(2, "a-broken.png: cannot read", "eval.py", uninterrupted[0] / "run" / "best.pt",
                "--predict", tmp_path / "in", "--out", tmp_path / "out")
    assert "wrote 1 masks" in text
    assert text.splitlines()[-1] == "eval.py: 1 of 2 images have no mask, see above"


def test_masks_never_lie_among_photographs_nor_on_one_another(uninterrupted, tmp_path):
    photos, checkpoint = tmp_path / "in", uninterrupted[0] / "run" / "best.pt"
    for name in ("a.png", "a_mask.png", "a.jpg"):
        save(photos / name, data.shapes(1, 96)[0])
    before = {p.name: p.read_bytes() for p in photos.iterdir()}
    predict = ("eval.py", checkpoint, "--predict", photos, "--out")
    here(2, "rename one", *predict, tmp_path / "two")     # a.png and a.jpg
    assert not (tmp_path / "two").exists()
    (photos / "a.jpg").unlink()
    for args in ((*predict, photos), (*predict, photos / "masks"),
                 ("eval.py", checkpoint, "--predict", photos / "a.png", "--out", photos),
                 ("tools/show.py", "explain", checkpoint, photos / "a.png", "--out", photos),
                 ("tools/show.py", "compare", checkpoint, "--predict", photos, "--out", photos / "x" / "y")):
        here(2, "lies in the folder of photographs", *args)
    here(0, "", *predict, tmp_path / "out")
    here(0, "", "tools/show.py", "explain", checkpoint, photos / "a.png", "--out", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*_mask.png"))) == 2                  # a and a_mask
    del before["a.jpg"]
    assert {p.name: p.read_bytes() for p in photos.iterdir()} == before


def test_progress_is_told_now_and_then_in_a_file_and_on_one_line_of_a_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(data, "time", SimpleNamespace(time=lambda: now[0]))
    line = "step {0} of 100, {0} s, about {1} s left".format
    for terminal, expected in (
            (False, f"{line(40, 60)}\n{line(80, 20)}\n"),
            (True, "".join(f"{line(n, 100 - n)}\x1b[K\r" for n in (40, 60, 80)) + "\x1b[K")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
        now[0] = 0.0
        progress = data.Progress("step", 100)
        for now[0] in (40.0, 60.0, 80.0, 100.0):
            progress(int(now[0]))
        assert capsys.readouterr().out == expected


def test_segment_takes_the_mean_over_the_mirror_image_and_par_refines_probabilities():
    network, rates, refine = model.DMSA(small_vit(), 4).eval(), (1, 3, 6, 9), par.PAR((1, 2))
    nn.init.normal_(network.student.aspp.project.weight, std=0.1)                 # a new ASPP adds nothing
    image = (torch.rand(2, 64, 64, 3) * 255).byte()
    pixels = data.to_float(image)
    normalised = model.normalise(pixels)
    with torch.no_grad():
        plain = network(normalised, rates)
        mean = (plain + network(normalised.flip(3), rates).flip(3)) / 2
        refined = refine(pixels, mean.softmax(1))
        expected = [F.interpolate(x, size=(96, 80), mode="bilinear") for x in (plain, mean, refined)]
    found = [evaluation.mask_logits(network, rates, image, (96, 80), *how)
             for how in ((), (None, True), (refine, True))]
    for ours, theirs in zip(found, expected):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len({x.argmax(1).numpy().tobytes() for x in expected}) == 3
    assert torch.equal(evaluation.segment(network, rates, image, (96, 80)), found[0].argmax(1).byte())


@pytest.mark.parametrize("kept, passes", ((2 ** 30, 2), (0, 4), (2 * 2 * 48 * 64 * 4, 3)))
def test_the_frozen_vit_sees_each_group_of_val_once_as_far_as_the_memory_goes(monkeypatch, kept, passes):
    network, images = model.DMSA(small_vit(), 4).eval(), (torch.rand(4, 64, 64, 3) * 255).byte().numpy()
    expected = network.features(model.normalise(data.to_float(images)))
    counted, features, held = [], network.features, {}
    monkeypatch.setattr(train, "KEPT", kept)
    monkeypatch.setattr(network, "features", lambda image: counted.append(len(image)) or features(image))
    for _ in range(2):
        for group in (slice(0, 2), slice(2, 4)):
            found = train.kept_features(network, images, group, held)
            assert all(torch.allclose(a, b[group], atol=1e-5) for a, b in zip(found, expected))
    assert counted == [2] * passes


def test_pictures_of_a_run_are_drawn_without_dropout(tmp_path, monkeypatch):
    trainer, modes = trainer_of("--out", str(tmp_path), method=transfgu.TransFGU), []
    scored = {"epoch": 1, "miou": 1.0, "accuracy": 1.0}
    trainer.results = {"last": scored, "best": scored, "cam": {"cam_miou": 1.0}}
    monkeypatch.setattr(pictures, "of_run", lambda out, network, *rest: modes.append(network.training) or [])
    train.show_results(trainer, [], [])
    assert modes == [False]


def test_clusters_in_use_are_those_of_some_patch_of_the_first_images(monkeypatch):
    trainer, images = trainer_of(), np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)
    classes = trainer.network.student.decoder.cls_emb.data
    classes[:, 3] = classes[:, 2]                         # cluster 3 is never the first of the most likely
    monkeypatch.setattr(train, "IN_USE", 5)
    in_use = train.clusters_in_use(trainer, images, 8, {})
    assert trainer.network.training                       # again
    logits = trainer.network.eval()(model.normalise(data.to_float(images[:5])), (1, 3, 6, 9))
    assert in_use == trainer.results["clusters"] == len(logits.argmax(1).unique()) < 6


def test_eval_prints_the_scores_of_the_log_of_a_run_or_a_checkpoint(uninterrupted, tmp_path):
    run, log = uninterrupted[0] / "run", uninterrupted[2]
    words = "mIoU {miou:.2f}  accuracy {accuracy:.2f}".format
    here(0, words(**log[-1]), "eval.py", run / "last.pt", "--limit", "24")
    best = max(log[3::4], key=lambda record: record["miou"] + record["accuracy"])
    here(0, words(**best), "eval.py", run, "--limit", "24")                       # the folder: best.pt of it
    (tmp_path / "other").mkdir()
    shutil.copy(run / "last.pt", tmp_path / "other")
    here(0, words(**log[-1]), "eval.py", tmp_path / "other", "--limit", "24")
    here(2, "no best.pt and no last.pt", "eval.py", tmp_path)
    last = evaluation.load_checkpoint(run / "last.pt")
    torch.save(last | {"epoch": 0}, tmp_path / "begun.pt")
    here(2, "begun.pt: no epoch of this run is done", "eval.py", tmp_path / "begun.pt", "--predict", tmp_path)
    torch.save(last | {"student": last["teacher"]}, tmp_path / "teacher.pt")
    here(0, f"mIoU {log[-1]['teacher_miou']:.2f}  accuracy {log[-1]['teacher_accuracy']:.2f}", "eval.py",
         tmp_path / "teacher.pt", "--limit", "24", "--device", "cpu")
    here(0, "rates [1, 6, 12, 18]", "eval.py", run / "last.pt", "--flip", "--rates", "1,6,12,18")
    scored = [here(0, "24 images at", "eval.py", run / "last.pt", "--limit", "24", *how)
              for how in ((), ("--par",), ("--native",))]
    assert len({re.search(r"^mIoU ([\d.]+)", text, re.M)[1] for text in scored}) == 3


def test_pictures_show_the_stages_of_fig_2_and_no_teacher_that_is_not_in_use(uninterrupted, tmp_path):
    run, last = uninterrupted[0] / "run", uninterrupted[1]
    images = np.stack([data.shapes((9, i), 64)[0] for i in range(2)])
    network, rates, size = evaluation.restore(last, "cpu"), last["rates"], (64, 64)
    found = pictures.stages(network, last, images)
    assert np.array_equal(found.student, evaluation.segment(network, rates, images, size).numpy())
    pixels = data.to_float(images)
    normalised = model.normalise(pixels)
    with torch.no_grad():
        maps = cam.class_activation_maps(network.vit, normalised, last["centroids"])
        teacher = network.decode(network.teacher, network.features(normalised), rates)[0]
        masks = losses.pseudo_masks(cam.min_max(maps), teacher, 0.7)
        pseudo = par.PAR((1, 2, 8, 16))(pixels, masks).argmax(1)
        enlarged = F.interpolate(teacher, size=size, mode="bilinear").argmax(1)
    assert torch.equal(found.maps, maps) and np.array_equal(found.pseudo, pseudo.numpy())
    assert np.array_equal(found.teacher, enlarged.numpy()) and (found.teacher != found.student).any()
    before = pictures.stages(network, last | {"teacher_on": False}, images)
    assert (before.pseudo != found.pseudo).any()          # of CAM alone
    photo, tiles = save(tmp_path / "in" / "photo.png", data.shapes(1, 96)[0]), []
    for on in (True, False):
        torch.save(last | {"teacher_on": on}, tmp_path / "run.pt")
        here(0, "", "tools/show.py", "explain", tmp_path / "run.pt", photo, "--out", tmp_path)
        row = np.array(Image.open(tmp_path / "photo_explain.png"))[24 + 166:24 + 166 + 160]
        tiles.append(sum((row[:, x:x + 160] < 255).any() for x in range(6, row.shape[1] - 160, 166)))
    assert tiles == [4, 3]                                # without a teacher in use none is shown
    here(0, "", "tools/show.py", "compare", run, run / "last.pt", "--out", tmp_path)
    assert Image.open(tmp_path / "compare.png").size[0] > 300


def test_too_little_memory_of_the_machine_is_one_line_and_exit_code_2(monkeypatch, capsys):
    """Errors of torch and numpy themselves, as they come from asking for a petabyte."""
    monkeypatch.setattr(sys, "argv", ["eval.py", "run.pt"])
    for error in (lambda: torch.empty(2 ** 50), lambda: np.empty(2 ** 50),
                  raising(torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried"))):
        monkeypatch.setattr(evaluation, "load_checkpoint", lambda file: error())
        assert data.exit_code(evaluation.main) == 2
        line, = capsys.readouterr().err.splitlines()
        assert line.startswith("eval.py: too little memory on "), line


@pytest.mark.parametrize("args, message", [
    ("tools/show.py explain RUN none.png", "none.png: "),
    ("eval.py RUN --predict README.md", "1 of 1 images have no mask"),
    ("eval.py RUN --predict assets --out /proc/nowhere", "/proc/nowhere: No such file or directory")])
def test_what_a_user_asks_wrong_of_a_run_is_one_line_and_exit_code_2(
        uninterrupted, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(HERE)
    args = args.replace("RUN", str(uninterrupted[0] / "run")).split()
    text = here(2, message, *args, *(() if "--out" in args else ("--out", tmp_path / "out")))
    assert text.splitlines()[-1].startswith(Path(args[0]).name + ": "), text


@pytest.mark.parametrize("name, words", [
    *((name, f"{name}: ") for name in ("short.pt", "code.pt", "other.pt", "none.pt")),
    ("unfit.pt", "the tensors of this checkpoint do not fit its own options")])
def test_checkpoints_that_are_truncated_foreign_or_carry_code_are_named(
        tmp_path, uninterrupted, capfd, name, words):
    whole = uninterrupted[0] / "run" / "last.pt"
    (tmp_path / "short.pt").write_bytes(whole.read_bytes()[:100_000])
    torch.save({"x": Payload()}, tmp_path / "code.pt")
    torch.save({"x": 1}, tmp_path / "other.pt")
    torch.save(torch.load(whole, weights_only=True) | {"student": {}}, tmp_path / "unfit.pt")
    text = here(2, words, "eval.py", tmp_path / name)
    assert text.count("\n") == 1 and "must never run" not in capfd.readouterr().out     # of a shell


# ----------------------------------------------------------------------------
# On a GPU, beside the CPU: `python -m pytest -q test_all.py -k cuda`, less than five minutes

GPU = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def everything(device):
    """{what: tensor} that the concept files compute on `device` from the same inputs."""
    torch.manual_seed(0)
    network, rates = model.DMSA(model.backbone("tiny")[0], 6), (1, 6, 12, 18)
    nn.init.normal_(network.student.aspp.project.weight, std=0.02)                # a new ASPP adds nothing
    network.to(device)
    student, vit, params = network.student, network.vit, list(network.student.parameters())
    images, labels = (np.stack(maps) for maps in zip(*map(data.shapes, range(4))))
    image, masks = data.to_float(images, device), randn(4, 3, 16, 16).softmax(1).to(device)
    draws = data.Draws(*(numbers.to(device) for numbers in data.draw(0, 1, range(4))))
    seen, larger = model.normalise(image), lambda size: F.interpolate(image, size=size, mode="bilinear")
    with torch.autocast(device.type, enabled=False):      # as in training
        found = {"crop": data.crop(image, draws, 96), "jitter": data.augment(image, draws),
                 "windows": cam.window_features(vit, seen[:1], 96)[0]}
    features = network.features(seen)
    logits, c = network.decode(student, features, rates)
    found |= {"ViT": vit(seen)[0], "attention": vit(seen)[1], "ASPP": student.aspp(features[1], rates),
              "decoder": logits, "embeddings": c,
              "CAM": cam.class_activation_maps(vit, seen, randn(5, 128).to(device)),
              "PAR 160": par.PAR()(larger(160), masks),
              "PAR 1024": par.PAR((1, 2, 4, 8), 3)(larger(1024)[:1], masks[:1])}
    label, things = torch.from_numpy(labels).long().to(device), torch.arange(6, device=device) > 0
    label[:, :9] = 255
    counts, permutation = losses.pixel_counts(label, label < 3, 6), torch.arange(6).roll(1).to(device)
    large = F.interpolate(logits.float(), size=label.shape[1:], mode="bilinear")
    values = losses.dmsa_losses(large, c.float(), label, label < 3, counts, things, True, (0.3, 1, 0.3, 1),
                                True, permutation, 0.1)
    for name, loss in values.items():
        gradient = torch.autograd.grad(loss, params, retain_graph=True, materialize_grads=True)
        found |= {name: loss, f"gradient of {name}": torch.cat([g.flatten() for g in gradient])}
    return {name: value.detach().float().cpu() for name, value in found.items()}


@pytest.fixture(scope="module")
def on_the_cpu():
    return everything(torch.device("cpu"))


# `near`: how far a value may be off, as a share of the largest. A CPU that sums in another order is off by
# 6e-6, one in bf16 by 0.06. `steps`: share of CAM's values that may be further off, where a sign turns
@needs_gpu
@pytest.mark.parametrize("precision, near, steps", [("fp32", 1e-4, 2e-3), ("bf16", 0.15, 0.01)])
def test_each_concept_file_on_cuda_equals_the_cpu(on_the_cpu, monkeypatch, precision, near, steps):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.autocast(GPU.type, torch.bfloat16, enabled=precision == "bf16"):
        found = everything(GPU)
    far = {}
    for name, theirs in on_the_cpu.items():
        assert found[name].shape == theirs.shape and found[name].isfinite().all(), name
        error = (found[name] - theirs).abs() / theirs.abs().max()
        if (error > near).float().mean() > (steps if name == "CAM" else 0):
            far[name] = error.max().item()
    assert not far


@needs_gpu
def test_evaluation_on_cuda_equals_the_cpus_to_the_pixel_but_for_ties(uninterrupted):
    checkpoint, images = uninterrupted[1], np.stack([data.shapes((9, i), 64)[0] for i in range(32)])
    network, size = evaluation.restore(checkpoint), (64, 64)
    cpu = copy.deepcopy(network).cpu()
    for refine in (None, par.PAR()):
        ours, theirs = (evaluation.segment(net, checkpoint["rates"], images, size, refine).cpu()
                        for net in (network.to(GPU), cpu))
        pixels = data.to_float(images)
        maps = cpu(model.normalise(pixels), checkpoint["rates"])
        maps = refine(pixels, maps.softmax(1)) if refine else F.interpolate(maps, size=size, mode="bilinear")
        best, second = maps.topk(2, dim=1).values.unbind(1)
        other = ours != theirs
        assert (best - second)[other].le(1e-3).all() and other.float().mean() < 1e-3


def same_losses(log, other, near):
    for a, b in zip(log, other, strict=True):
        for key in ("seg", "ce", "un", "cls", "all"):
            assert a[key] == pytest.approx(b[key], rel=near, abs=near), (a["step"], key)


@needs_gpu
def test_a_run_on_cuda_that_goes_on_twice_equals_the_cpus(tmp_path):
    """From the CPU's first epoch, so with its clusters. `near`: of losses. `apart`: of weights, the distance
    of the runs as a share of their way; Adam goes a whole step even where rounding decides whither."""
    first, _ = train_run(tmp_path, "--precision", "fp32", "--epochs", "1")
    for precision in ("fp32", "bf16"):
        shutil.copytree(tmp_path / "run", tmp_path / precision / "run")
        changed = {"precision": precision, "out": str(tmp_path / precision / "run")}
        torch.save(first | {"args": first["args"] | changed}, tmp_path / precision / "run" / "last.pt")
    last, log = train_run(tmp_path, "--precision", "fp32")
    flat = lambda state: torch.cat([value.flatten() for value in state["student"].values()])
    for precision, near, apart in (("fp32", 1e-3, 0.02), ("bf16", 0.03, 0.2)):
        for epochs in ("2", "3"):
            ours, ours_log = train_run(tmp_path / precision, "--device", GPU.type, "--precision", precision,
                                       "--epochs", epochs)
        same_losses(log, ours_log, near)
        assert (flat(ours) - flat(last)).norm() < apart * (flat(last) - flat(first)).norm(), precision


@needs_gpu
def test_nccl_sums_what_a_run_sums_on_cuda(monkeypatch):
    one = dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    for name, value in one.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(train, "WORLD", 2)                # else no sum is asked for
    device = train.start_processes(GPU.type)
    try:
        for kind in (torch.int64, torch.float32):         # of counts; of losses and gradients
            assert train.all_reduce_sum(torch.arange(4, device=device).to(kind)).tolist() == [0, 1, 2, 3]
        train.barrier()                                   # of the CPU's tensors by gloo
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_on_two_cuda_devices_give_the_run_of_one(tmp_path):
    logs = [train_run(tmp_path / f"{world}", "--device", GPU.type, "--precision", "fp32", world=world)[1]
            for world in (1, 2)]
    same_losses(*logs, 1e-3)


def voc_step(crops):
    """A function that loads `crops` of VOC's size, makes a step on the GPU, and tells the peak of memory."""
    args = options("--data", "voc", "--batch", str(crops), "--precision", "bf16")
    vit = model.VisionTransformer(**model.BACKBONES["vits8"][0]).to(GPU)
    trainer = train.Trainer(args, vit, data.VOC, {}, GPU)
    images, cams = np.zeros((crops, 320, 320, 3), np.uint8), np.random.rand(crops, 20, 40, 40).astype("f2")

    def step():
        torch.cuda.reset_peak_memory_stats()
        (micro_batches, _), = train.batches(args, images, cams, 1, 10, GPU)
        trainer.train_step(*trainer.pseudo_labels(micro_batches, 10), 10, 0)
        return torch.cuda.max_memory_allocated()
    return step


@needs_gpu
def test_memory_of_a_crop_on_cuda_is_what_docs_estimate_and_a_step_waits_once():
    steps = [voc_step(16), voc_step(48)]                  # PAR takes 16 at once
    less, more = [[step(), step()][1] for step in steps]  # the second has Adam's state
    docs = (HERE / "docs" / "results.md").read_text()
    estimate = re.search(r"^\| `voc` \|.* about ([\d.]+) GB \|$", docs, re.M)[1]
    # on a CPU it is a third of the estimate
    assert 0.25 < (more - less) / 32 / 1e9 / float(estimate) < 1.25, (less, more, estimate)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        steps[0]()
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    assert len(waits) == 1, waits


@needs_gpu
def test_too_little_cuda_memory_is_one_line_and_exit_code_2(tmp_path):
    small = tmp_path / "small.py"
    small.write_text(textwrap.dedent(f"""
        import sys, torch
        sys.path.insert(0, {str(HERE)!r})
        import train
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(2e7 / total)
        train.launch(train.parse())"""))
    ends(2, "too little memory on the GPU", small, *RUN, "--device", "cuda", "--out", tmp_path / "run")


# ----------------------------------------------------------------------------
# The files by themselves


@pytest.mark.parametrize("names", [("aspp",), ("par",), ("losses",), ("cam",), ("data",), ("model", "aspp")])
def test_a_concept_file_works_alone_in_an_empty_folder(tmp_path, names):
    for name in names:
        shutil.copy(HERE / f"{name}.py", tmp_path)
    start = time.time()
    assert ends(0, "", tmp_path / f"{names[0]}.py", cwd=tmp_path, env={"PYTHONPATH": ""}).strip()
    assert time.time() - start < 60
    for picture in tmp_path.glob("*.png"):
        assert Image.open(picture).size[0] > 300


def test_nothing_foreign_or_of_posix_alone_is_imported_and_nothing_executable_loaded_from_disk():
    posix = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
    allowed = (set(sys.stdlib_module_names) - posix | {"torch", "numpy", "PIL", "scipy", "tools"}
               | {p.stem for p in HERE.glob("*.py")} | {"start"})
    for file in [*HERE.glob("*.py"), *HERE.glob("tools/*.py")]:
        text, test = file.read_text(), file.name.startswith("test_")
        for node in ast.walk(ast.parse(text)):
            names = ([a.name for a in node.names] if isinstance(node, ast.Import)
                     else [node.module] if isinstance(node, ast.ImportFrom) else [])
            assert all(name.split(".")[0] in allowed | ({"pytest"} if test else set())
                       for name in names), (file.name, names)
        if not test:
            assert "pickle" not in text and "strict=False" not in text, file.name
            assert all("weights_only=True" in call
                       for call in re.findall(r"torch\.load\([^\n]*", text)), file.name


# ----------------------------------------------------------------------------
# Golden numbers: inputs and outputs of the peers' own code, DINO 7c446df, TransFGU ea49bcd, AFA adcfa29,
# VainF's DeepLabV3+ and faiss, kept in assets/golden (its README says how they were made). DMSA_GOLDEN=folder
# compares with another set of the same layout, for instance a fuller one. Each docstring says whose code is
# meant and how near ours must be.

SHIPPED = HERE / "assets" / "golden"
GOLDEN = Path(os.environ.get("DMSA_GOLDEN") or SHIPPED)
READERS = {}                                              # pattern of file names: the test that reads them


def golden(pattern):
    """Run a test on every golden file of this name; where there is none the test is skipped and says so."""
    none = pytest.param(None, id=pattern, marks=pytest.mark.skip(f"no {pattern} in {GOLDEN}"))
    cases = pytest.mark.parametrize("file", sorted(GOLDEN.glob(pattern)) or [none], ids=lambda f: f.name)

    def decorate(test):
        READERS[pattern] = test.__name__
        return cases(test)
    return decorate


@pytest.fixture
def z(file):
    """The arrays of a golden file, or its JSON."""
    return json.loads(file.read_text()) if file.suffix == ".json" else np.load(file, allow_pickle=False)


@pytest.fixture
def c(z):
    """The settings of a golden file."""
    return json.loads(str(z["cfg"]))


def generated(salt, key, shape):
    """The weight of this name in the golden files, which do not store it: drawn from a stream of its own."""
    x = np.random.RandomState(zlib.crc32(f"{salt}:{key}".encode())).standard_normal(shape)
    last = key.split(".")[-1]
    own = {"pos_embed": 0.5 * x, "cls_token": 0.5 * x, "cls_emb": 0.5 * x,
           "gamma": 1 + 0.1 * x, "running_var": 1 + 0.1 * np.abs(x), "num_batches_tracked": 0 * x}
    if last in own:
        x = own[last]
    elif last == "bias_mask":
        x = np.repeat([1.0, 0.0, 1.0], len(x) // 3)       # of q, k, v
    elif last == "periods":                               # as DINOv3's files hold them, in bfloat16
        x = torch.tensor(100 ** (np.arange(len(x)) / len(x)), dtype=torch.bfloat16).float().numpy()
    elif len(shape) >= 2:
        x = x / np.sqrt(np.prod(shape[1:]))
    else:
        x = 1 + 0.1 * x if last == "weight" else 0.1 * x
    return torch.tensor(x, dtype=torch.float32)


def fill(module, salt, prefix=""):
    """`module` with generated weights, in eval mode; `prefix`: where it stands in the peer's network."""
    module.load_state_dict({k: generated(salt, prefix + k, v.shape) for k, v in module.state_dict().items()})
    return module.eval()


def stream(text):
    """The input that a golden file names: RandomState(n).standard_normal([...]), with [:m] or not."""
    seed, shape, cut = re.match(r"RandomState\((\d+)\)\.standard_normal\(\[([\d,]+)\]\)(?:\[:(\d+)\])?",
                                text).groups()
    x = np.random.RandomState(int(seed)).standard_normal([int(side) for side in shape.split(",")])
    return torch.from_numpy(x.astype(np.float32))[:int(cut) if cut else None]


def golden_vit(salt):
    """ViT-S/8, or the small ViT that the files call tinydim."""
    small = dict(img_size=64, embed_dim=48, depth=3, num_heads=4)
    return fill(model.VisionTransformer(patch_size=8, **(small if "tinydim" in salt else model.SMALL)), salt)


def near(ours, theirs, atol, rtol=0.0):
    ours = ours.detach() if isinstance(ours, torch.Tensor) else ours
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=rtol, atol=atol)


@golden("dinov[23]*_*.npz")
def test_golden_dinov2_and_v3_with_registers_rotary_positions_and_layer_scale(file, z, c, tmp_path):
    """The official modules of DINOv2 and DINOv3: tokens within 1e-4 (small: 1e-5), CLS row within 1e-6, and
    Eq. 5 by brute force in their whole last attention within 2e-4, but for 0.5 % of the cells."""
    weights = {"backbone." + k: generated(c["salt"], k, shape) for k, shape in c["keys"].items()}
    torch.save({"teacher": weights}, tmp_path / "vit.pth")
    sizes = {k: c[k] for k in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "registers")}
    vit = model.VisionTransformer(**sizes, rope=c["family"] == "dinov3").eval().requires_grad_(False)
    model.load_dino(vit, tmp_path / "vit.pth")
    image = stream(c["input"].replace(" ", ""))
    tokens, row = vit(image)
    atol = 1e-5 if "tinydim" in file.name else 1e-4
    near(tokens[:, 0], z["cls"], atol)
    near(tokens[:, 1::c["token_stride"]], z["patch_tokens"], atol)
    near(row, np.delete(z["attn_cls"], range(1, 1 + c["registers"]), axis=2), 1e-6)
    if "cam" in z:
        maps = cam.class_activation_maps(vit, image, torch.tensor(z["centroids"], dtype=torch.float32))
        assert np.mean(abs(maps.numpy() - z["cam"]) > 2e-4) <= 0.005


@golden("weights/*.npz")
def test_golden_files_that_hugging_face_and_timm_write(file, z, tmp_path, monkeypatch):
    """transformers 5.24 and timm 1.0.31, files and models: tokens within 2e-5 (decision 29). Without any one
    of its tensors a file is refused, and with one more."""
    sizes = json.loads(str(z["arch"]))
    vit = model.VisionTransformer(**sizes).eval().requires_grad_(False)
    model.load_dino(vit, file.parent / str(z["weights"]))
    near(vit(torch.from_numpy(z["x"]))[0], z["tokens"], 2e-5)
    state, _ = model.read_tensors(file.parent / str(z["weights"]))
    monkeypatch.setattr(model, "BACKBONES", {})           # takes time to compare with
    for name in state:
        if "mask_token" not in name:
            torch.save({n: value for n, value in state.items() if n != name}, tmp_path / "less.pth")
            with pytest.raises(model.WeightsError, match="missing|unknown| is "):
                model.load_dino(vit, tmp_path / "less.pth")
    torch.save(state | {"blocks.0.mlp.gate_proj.weight": torch.ones(4, 4)}, tmp_path / "more.pth")
    with pytest.raises(model.WeightsError, match="SwiGLU"):
        model.load_dino(vit, tmp_path / "more.pth")


@golden("dino_tinydim_*.npz")
def test_golden_small_vit_at_any_size(z, c):
    """DINO's ViT: tokens within 1e-5 (eps 1e-5 shows as 2e-5), CLS row of the last attention within 1e-6."""
    tokens, row = golden_vit(c["salt"])(stream(c["input"]))
    near(tokens, z["tokens"], 1e-5)
    near(row, z["attn"][:, :, 0] if z["attn"].ndim == 4 else z["attn"], 1e-6)


@golden("dino_vit_small_8_*.npz")
def test_golden_vits8(z, c):
    """DINO's ViT-S/8 of true size: tokens within 1e-4, CLS row of the last attention within 1e-5."""
    tokens, row = golden_vit(c["salt"])(stream(c["input"]))
    near(tokens[:, 0], z["cls"], 1e-4)
    near(tokens[:, 1::c["token_stride"]], z["patch_tokens"], 1e-4)
    near(row, z["attn_cls"], 1e-5)


@golden("dino_posembed.npz")
def test_golden_position_table(z, c):
    """DINO's interpolated position table at several image sizes, within 1e-5."""
    vit, step = golden_vit(c["salt"]), int(c["channels"].strip(":"))
    for key in (k for k in z.files if k.startswith("pe_")):
        H, W = map(int, key[3:].split("x"))
        near(vit.position_table(torch.zeros(1, 3, H, W))[0, :, ::step], z[key], 1e-5)


@golden("mask_decoder_*.npz")
def test_golden_decoder(z, c):
    """TransFGU's copy of Segmenter's decoder: logits and class embeddings, within 1e-5."""
    decoder = model.MaskTransformer(c["d_encoder"], c["n_cls"], c["d_model"], c["n_layers"], c["n_heads"])
    logits, class_embeddings = fill(decoder, c["salt"])(stream(c["input"]))
    near(logits.transpose(1, 2), z["masks"], 1e-5)
    near(class_embeddings, z["cls_embs"], 1e-5)


@golden("aspp_*.npz")
def test_golden_aspp(z, c):
    """VainF's separable ASPP, within 1e-5, with its BatchNorm for our GroupNorm (decision 6) and with its
    projection, which has a norm and ReLU behind it."""
    module, salt = aspp.ASPP(c["in"], 256), c["salt_separable"]
    for i, branch in enumerate((module.point, *module.atrous, module.pool)):
        at = int(i == 4)                                  # the pool itself is layer 0 of its branch
        separable = branch.depthwise is not None
        if separable:
            fill(branch.depthwise, salt, f"convs.{i}.0.body.0.")
        fill(branch.pointwise, salt, f"convs.{i}.0.body.1." if separable else f"convs.{i}.{at}.")
        branch.norm = fill(nn.BatchNorm2d(256), salt, f"convs.{i}.{at + 1}.")
    project = nn.Sequential(fill(nn.Conv2d(1280, 256, 1, bias=False), salt, "project.0."),
                            fill(nn.BatchNorm2d(256), salt, "project.1."), nn.ReLU())
    out = project(module.branches(stream(c["input"]), (1, *c["rates"])))
    near(out[:, ::16, ::2, ::2], z["out_separable"], 1e-5)


@golden("par_*.npz")
def test_golden_par(z, c):
    """AFA's PAR, within 1e-5: enlarged masks, other dilations, an image of which half is constant."""
    image, masks = torch.from_numpy(z["image"]), torch.from_numpy(z["masks"])
    near(par.PAR(c["dilations"], c["num_iter"])(image, masks), z["out"], 1e-5)
    if "out_1iter" in z:
        near(par.PAR(c["dilations"], 1)(image, masks), z["out_1iter"], 1e-5)


@golden("anchors_*.npz")
def test_golden_windows(z, c):
    """TransFGU's windows: the same, in the same order. In the file x1 and y1 are the last patches."""
    x0, y0, x1, y1 = z["windows"].T
    pixels = np.stack([8 * x0, 8 * y0, 8 * x1 + 7, 8 * y1 + 7], 1)                # without the last row
    assert np.array_equal(cam.windows(c["h"], c["w"], 8, c["scales"]), pixels)


@golden("window_bank_*.npz")
def test_golden_window_crops(z, c):
    """TransFGU's choice of foreground windows, the same number, and its crops of them, within 1e-5."""
    patch = c["image"] // c["grid"]
    boxes = (z["windows"] + (0, 0, 1, 1)) * patch - (0, 0, 1, 1)
    fore, _ = cam.select_windows(torch.from_numpy(z["fg_mask"][0]).bool(), boxes, patch)
    crops = cam.crop_windows(torch.from_numpy(z["image"][0]), boxes[fore], c["crop_size"])
    known = np.isfinite(z["crops_mean"][:, 0])            # the shipped file has a part of the image
    assert len(crops) == z["n_kept"] and known.any()
    near(crops[known].mean((2, 3)), z["crops_mean"][known], 1e-5)
    near(crops[known][:, :, ::16, ::16], z["crops_sub"][known], 1e-5)


@golden("binarize_mask.npz")
def test_golden_keep_mass(z):
    """TransFGU's choice of the largest values: the same."""
    for share in (0.6, 0.8):
        assert np.array_equal(cam.keep_mass(torch.from_numpy(z["values"]), share), z[f"keep_{share}"])
    assert np.array_equal(cam.keep_mass(torch.zeros(6)), z["keep_allzero"])


@golden("cam_*.npz")
def test_golden_cam(z, c):
    """TransFGU's gradient maps, within 1e-5; it divides the gradient's part by the batch's size, undone here
    (decision 10)."""
    maps = cam.class_activation_maps(golden_vit(c["salt"]), stream(c["input"]), stream(c["centroids"])[0])
    expected, stable = z["cam"], z["stable"]
    if len(maps) > 1:
        base = z["attn_cls_mean"] / z["attn_cls_mean"].max(1, keepdims=True)
        base = base.reshape(len(maps), 1, *maps.shape[2:])
        expected = np.where(expected > 0, base + len(maps) * (expected - base), 0)
    near(maps.numpy()[stable], expected[stable], 1e-5)


@golden("kmeans.npz")
def test_golden_kmeans_inertia(z):
    """faiss: our inertia is at most 2 % above its. Of the points drawn around 8 centres faiss finds a poor
    optimum: there ours is also at most that of the 8 centres."""
    inertia = lambda x, centroids: (vq(x, centroids.astype(np.float32))[1] ** 2).sum()
    found = inertia(z["x"], cam.cluster(z["x"], 8, 1))
    assert found <= 1.02 * z["inertia"] and found <= inertia(z["x"], z["true_centres"])
    if "x_gauss" in z:
        assert inertia(z["x_gauss"], cam.cluster(z["x_gauss"], 10, 1)) <= 1.02 * z["inertia_gauss"]


@golden("loss_thing*.npz")
def test_golden_cross_entropy_and_uncertainty(file, z, c):
    """TransFGU's two losses within 1e-5, their gradients within 1e-6, and its target, the same. It fuses
    0.5 / 0.5 at patch size; of a constant CAM its L_un is NaN, ours 0."""
    things, logits = "things_" in file.name, torch.from_numpy(z["masks"]).requires_grad_()
    teacher = torch.from_numpy(z["teacher_logits"]) if c["teacher"] else None
    cams = cam.min_max(torch.from_numpy(z["pseudo_label"]))
    label = losses.pseudo_masks(cams, teacher, 0.5, things).argmax(1)
    confident = losses.confident_patches(cams, things)
    uncertainty = losses.uncertainty_loss(logits[:, 1:] if things else logits, confident)
    if "constant" in file.name:
        assert np.isnan(z["loss_uncertainty_mean"]) and uncertainty == 0 and (label == 0).all()
        return
    assert np.array_equal(label, z["target"])
    # new channel j holds old channel perm[j]
    permutation = torch.from_numpy(z["perm"]).argsort() if c["teacher"] else None
    alpha = losses.permutation_weight(c["epoch"]) if c["teacher"] else 0.0
    ce = losses.cross_entropy_loss(logits, label, permutation, alpha)
    for ours, value, gradient in ((ce, "loss_cat_mean", "grad_cat"),
                                  (uncertainty, "loss_uncertainty_mean", "grad_unc")):
        near(ours, z[value], 1e-5)
        near(torch.autograd.grad(ours, logits)[0], z[gradient], 1e-6)


@golden("loss_cls_emb.npz")
def test_golden_class_loss(z):
    """TransFGU's loss of the class embeddings within 1e-5, its gradient within 1e-6."""
    embeddings = torch.from_numpy(z["cls_emb"]).requires_grad_()
    loss = losses.class_loss(embeddings)
    near(loss, z["loss_mean"], 1e-5)
    near(torch.autograd.grad(loss, embeddings)[0], z["grad"], 1e-6)


@golden("loss_afa_seg.npz")
def test_golden_segmentation_loss(z, c):
    """AFA's get_seg_loss within 1e-5, its gradient within 1e-6; of an empty half AFA's is NaN."""
    logits = torch.from_numpy(z["pred"]).requires_grad_()
    loss = losses.segmentation_loss(logits, torch.from_numpy(z["label"]))
    near(loss, z["loss"], 1e-5)
    gradient, = torch.autograd.grad(loss, logits)
    near(gradient.flatten()[::c.get("grad_stride", 1)], z["grad"].flatten(), 1e-6)
    for half in ("background", "foreground"):
        ours = losses.segmentation_loss(logits, torch.from_numpy(z[f"label_no_{half}"]))
        assert np.isnan(z[f"loss_no_{half}"]) and ours.isfinite()


@golden("metrics_*.npz")
def test_golden_scores(z, c):
    """TransFGU's Hungarian scores: the counts the same, percents within 1e-6, absent classes too."""
    confusion = evaluation.confusion_matrix(z["gt"], z["pred"], c["n_classes"])
    found = evaluation.scores(confusion)
    assert np.array_equal(confusion, z["hist"])
    near([found["accuracy"], found["miou"]], [z["pixel_acc"], z["mean_iou"]], 1e-6)
    near(np.sort(found["iou"]), np.sort(z["iou"]), 1e-6)  # it has them in the order of the clusters


@golden("eval_loop.npz")
def test_golden_evaluation(z, c):
    """TransFGU's evaluation of logits, enlarged and matched, within 1e-4 percent (it rounds)."""
    masks = F.interpolate(torch.from_numpy(z["logits"]), size=z["label"].shape[1:], mode="bilinear").argmax(1)
    found = evaluation.scores(evaluation.confusion_matrix(z["label"], masks, c["K"]))
    near([found["accuracy"], found["miou"]], [z["pixel_acc"], z["mean_iou"]], 1e-4)


@golden("preproc_resize.npz")
def test_golden_resizing(z):
    """TransFGU's squashed image, within 0.501 of 255 since ours is rounded, and label, the same."""
    near(data.squash(z["img_u8"], 32).transpose(2, 0, 1).astype(float), z["train_img"], 0.501)
    assert np.array_equal(data.squash(z["label"].astype(np.uint8), 32, "nearest"),
                          z["eval_label"].astype(np.uint8))


@golden("label_maps.json")
def test_golden_label_maps(z):
    """TransFGU's classes of COCO's raw ids: the same."""
    for kind in ("coco80", "cocostuff27"):
        assert {raw: data.coco_table(kind)[int(raw)] for raw in z[kind]} == {
            raw: index % 256 for raw, index in z[kind].items()}


@golden("schedule.json")
def test_golden_schedule_of_the_teacher(z):
    """TransFGU's replacements of the teacher and its counter of epochs for alpha: the same."""
    for s in z.values():
        intervals = [int(i) for i in s["interval"].split(",")]
        ours = transfgu.replacements(s["epochs"], s["start"], intervals)          # from 1, theirs from 0
        assert [epoch - 1 for epoch in ours] == s["teacher_update_epochs"]
        run = SimpleNamespace(args=SimpleNamespace(teacher_start=s["start"], intervals=intervals))
        assert ([transfgu.TransFGU.teacher_age(run, e + 1) for e in range(s["start"], s["epochs"])]
                == s["epochs_since_update"][s["start"]:])


@golden("train_step.npz")
def test_golden_training_step(z, c, monkeypatch):
    """TransFGU's step against `train_step`: no ASPP, losses at patch size, weights 1, 0.3 and 1, Adam with
    L2 on matrices alone, no dropout. Losses are within 1e-5, gradients and new weights within 1e-6 (lr is
    1e-4)."""
    args = transfgu.parse(["--data", "voc", "--size", "160", "--lambdas", "0",
                           *map(str, c["loss_weights"]), "--lr", str(c["adam"]["lr"])])
    monkeypatch.setattr(transfgu, "DROPOUT", 0.0)
    source = SimpleNamespace(names=range(c["n_cls"]), things=c["n_cls"] - 1, stuff=0, background=True)
    vit = golden_vit(c["salts"]["encoder"])
    trainer = transfgu.TransFGU(args, vit, source, {}, torch.device("cpu"))
    network, rates = trainer.network, (1, 1, 2, 3)
    student, teacher = network.student.decoder, network.teacher.decoder
    fill(student, c["salts"]["student decoder"])
    fill(teacher, c["salts"]["teacher decoder"])
    features = network.features(stream(c["input"]))
    cams, logits = torch.from_numpy(z["pseudo_label"]), network.decode(network.teacher, features, rates)[0]
    cams = cam.min_max(cams)
    label = losses.pseudo_masks(cams, logits, args.teacher_weight).argmax(1)
    confident = losses.confident_patches(cams)
    # `train_step` shall draw the file's permutation; there new channel j holds old channel perm[j]
    drawn = SimpleNamespace(permutation=lambda n: z["perm"].argsort())
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn)
    values = trainer.train_step([train.Target(features, label, confident)],
                                losses.pixel_counts(label, confident, len(trainer.is_thing)),
                                args.teacher_start + 1 + c["epoch"], 0)
    near([values[k] for k in ("ce", "un", "cls", "all")],
         [z[k] for k in ("loss_cat", "loss_uncertainty", "loss_cls_emb", "total")], 1e-5)
    for name, p in student.named_parameters():
        if f"grad.{name}" in z:
            step = max(1, p.numel() // 200)
            near(p.grad.flatten()[::step], z[f"grad.{name}"], 1e-6, 1e-5)
            near(p.flatten()[::step], z[f"new.{name}"], 1e-6)
    if "masks_after_step" in z:
        near(network.decode(network.student, features, rates)[0], z["masks_after_step"], 1e-4)


def test_golden_readme_has_a_row_for_every_test_and_the_tests_read_every_shipped_file():
    readme = (SHIPPED / "README.md").read_text()
    for pattern, test in READERS.items():
        assert f"`{pattern}` | `{test}`" in readme and list(SHIPPED.glob(pattern)), pattern
    shipped = [file for file in SHIPPED.rglob("*.*") if file.name != "README.md"]
    read = [file for file in shipped if any(file.match(pattern) for pattern in READERS)]
    read += [file.parent / str(np.load(file)["weights"]) for file in read if file.parent.name == "weights"]
    assert sorted(read) == sorted(shipped)
    for folder, limit in ((SHIPPED, 420_000), (SHIPPED / "weights", 500_000)):
        assert sum(file.stat().st_size for file in shipped if file.parent == folder) < limit


# ----------------------------------------------------------------------------
# Every option of every program, from its own parser, changes what it names and nothing else


def arguments_of(start, *words):
    """Names of the options and arguments of a program, or of what it can do, from its own parser."""
    parsers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *words, "--help"])
        patch.setattr(argparse.ArgumentParser, "print_help", lambda parser, file=None: parsers.append(parser))
        with pytest.raises(SystemExit, match="0"):
            start()
    shown = [action for action in parsers[0]._actions if action.help is not argparse.SUPPRESS]
    if isinstance(shown[-1], argparse._SubParsersAction):
        return shown[-1].choices.keys()
    return {max(action.option_strings, key=len, default=action.dest) for action in shown} - {"--help"}


def see_what_changes(table, quantities):
    """See that each row of {option: rows} changes exactly the quantities that it names, or at least (...).

    row          arguments, those to compare with, names of the quantities that are not the same
    quantities   what a program makes of such arguments: {name: value}
    """
    results, wrong = {}, []
    for option, rows in table.items():
        for *both, names in rows:
            for args in both:
                if args not in results:
                    results[args] = quantities(*args.split())
            one, other = (results[args] for args in both)
            changed = {name for name in one.keys() | other.keys()
                       if name not in one or name not in other or not same(one[name], other[name])}
            named, more = set(names.split()) - {"..."}, "..." in names
            if changed != named and not (more and changed > named):
                wrong.append((option, *both, sorted(changed ^ named)))
    assert not wrong
    return results


def run_of(out, *args, method=train.Trainer):
    """Quantities of a run of two epochs of two steps; the teacher takes part in the second.

    They are of the first step; student and teacher, and the labels that it then gives ("taught"), are of the
    first step of the second epoch.
    """
    result = {"steps": 0}

    class Recorder(method):
        def pseudo_labels(self, micro_batches, epoch):
            targets, counts = super().pseudo_labels(micro_batches, epoch)
            label = torch.cat([target.label for target in targets])
            if "label" not in result:
                draws = [torch.cat(numbers) for numbers in zip(*(batch.draws for batch in micro_batches))]
                result.update(
                    micro_batches=len(micro_batches), place=draws[:4], colours=draws[4:], label=label,
                    image=torch.cat([batch.image for batch in micro_batches]),
                    cams=torch.cat([batch.cams for batch in micro_batches]),
                    features=[torch.cat(pair) for pair in zip(*(target.features for target in targets))],
                    confident=torch.cat([target.confident for target in targets]),
                    compiled=self.par is not None and self.par.compiled,
                    names=self.source.names, files=self.inputs["images"], weights=self.inputs["weights"],
                    centroids=self.inputs["centroids"])
            if epoch == 2 and "taught" not in result:
                student, teacher = (copy.deepcopy(head.state_dict())
                                    for head in (self.network.student, self.network.teacher))
                result.update(student=student, teacher=teacher, taught=label)
            return targets, counts

        def train_step(self, *targets):
            losses_of = super().train_step(*targets)
            result["steps"] += 1
            return [result.setdefault(name, value) for name, value in losses_of.items()] and losses_of

    parse = transfgu.parse if method is transfgu.TransFGU else train.parse
    args = parse(["--limit", "6", "--epochs", "2", "--batch", "3", "--size", "64", "--teacher-start", "1",
                  "--threshold", "0.3", "--out", out, *args])
    train.main(args, Recorder)
    if (Path(args.out) / "log.jsonl").exists():
        result["out"] = Path(args.out).parent
    return result


LATER = "student teacher taught "                         # what follows from other losses,
LABEL = "label seg ce all " + LATER                       # from other labels,
BATCH = "image cams features confident un cls " + LABEL   # and from other images
FOLDER = "--data folder --backbone tiny --classes 3 --root "
OF_A_RUN = {
    "--data": [(FOLDER + "a", "", "names files ...")],
    "--root": [("--root x", "", ""), (FOLDER + "./a/", FOLDER + "a", ""),
               (FOLDER + "b", FOLDER + "a", "files ...")],
    "--classes": [("--classes 7", "", "centroids cams un cls " + LABEL)],
    "--limit": [("--limit 7", "", "files centroids place colours " + BATCH)],
    "--out": [("--out elsewhere/run --workers 1", "", "out")],                    # without the others' caches
    "--workers": [("--out elsewhere/again --workers 2", "", "out")],
    "--seed": [("--seed 1", "", "files centroids place colours " + BATCH)],
    "--dry-run": [("--dry-run", "", "steps out ...")],
    "--backbone": [("--backbone vits16 --weights shallow.pt", "",
                    "weights centroids cams features confident un cls " + LABEL)],
    "--weights": [("--weights tiny.pt", "", ""),
                  ("--weights other.pt", "", "weights centroids cams features confident un cls " + LABEL)],
    "--size": [("--size 96", "", "centroids " + BATCH)],
    "--aspp": [("--aspp none", "", "seg ce un cls all " + LATER), ("--aspp static", "", LATER)],
    "--aspp-scale": [("--aspp-scale 0.7", "", LATER)],
    "--par": [("--par", "", LABEL), ("--par 3", "", LABEL)],
    "--threshold": [("--threshold 0.4", "", "confident un " + LABEL)],
    "--coarse": [("--coarse soft", "", LABEL), ("--coarse soft --par", "--par", "")],
    "--teacher": [("--teacher none", "", "teacher taught")],
    "--teacher-start": [("--teacher-start 0", "", LABEL), ("--teacher-start 2", "", "taught")],
    "--teacher-weight": [("--teacher-weight 0.95", "", "taught")],
    "--momentum": [("--momentum 0.1", "", "teacher taught")],
    "--balance": [("--balance pixels", "", "seg all " + LATER), ("--balance classes", "", "")],
    "--lambdas": [(f"--lambdas {lambdas}", "", "all " + LATER)
                  for lambdas in ("2 1 0.1 1", "0.3 2 0.1 1", "0.3 1 1 1", "0.3 1 0.1 3")],
    "--epochs": [("--epochs 3", "", "steps")],
    "--batch": [("--batch 2", "", "steps place colours " + BATCH)],
    "--lr": [("--lr 0.01", "", LATER)],
    "--jitter": [(f"--jitter {jitter}", "", "colours features seg ce un cls all " + LATER)
                 for jitter in ("0 0.4 0.4 0.05", "0.4 0 0.4 0.05", "0.4 0.4 0 0.05", "0.4 0.4 0.4 0")],
    "--precision": [("--precision bf16", "", "features seg ce un cls all " + LATER),
                    ("--precision fp32", "", "")],        # what auto is on a CPU
    "--compile": [("--compile --par 1", "--par 1", "compiled")],
    "--accumulate": [("--accumulate 3", "", "micro_batches ...")],                # and the order of sums
    "--device": [("--device cpu", "", "")]}
OF_TRANSFGU = {                                           # whose student is new when the second epoch begins
    "--threshold": [("--threshold 0.4", "", "label confident seg ce un all teacher taught")],
    "--teacher-weight": [("--teacher-weight 0.95", "", "taught")],
    "--released": [("--released", "", "all teacher taught")],
    "--lambdas": [("--lambdas 2 1 0.1 1", "", "all teacher taught")]}


def test_every_option_of_a_run_changes_what_it_names_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "compile", lambda function, **settings: function)  # it takes a minute
    monkeypatch.setattr(train, "show_results", lambda *args: None)
    monkeypatch.setattr(train, "FOLDER_STEPS", 2)
    monkeypatch.setitem(transfgu.INTERVALS, "shapes", (1,))
    monkeypatch.setitem(model.BACKBONES, "vits16", (model.BACKBONES["tiny"][0] | {"depth": 4}, None))
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        save(tmp_path / f"{'ab'[i // 6]}/{i}.png", data.shapes(i, 96)[0])
    shutil.copy(HERE / "assets" / "tiny.pt", "tiny.pt")
    tiny = torch.load("tiny.pt", weights_only=True)
    torch.save({name: value * (1 + 0.1 * randn(*value.shape)) for name, value in tiny.items()}, "other.pt")
    torch.save({name: tiny[name] for name in tiny if not name.startswith("blocks.4.")}, "shallow.pt")
    count = iter(range(1000))
    run = lambda *args, **method: run_of(f"runs/{next(count)}", *args, **method)

    assert {file.stem for file in HERE.glob("tools/*.py") if "__main__" in file.read_text()} == {
        "ablation", "bench", "get_data", "how_many", "par_on_photos", "pretrain", "show", "transfgu"}
    assert arguments_of(train.parse) == OF_A_RUN.keys()
    planned = []
    monkeypatch.setattr(train, "Progress", lambda *what: planned.append(what) or (lambda done: None))
    run()
    shown = re.search(r"epoch 1/2  seg (\S+)  ce (\S+)  un (\S+)  cls (\S+)  all (\S+)",
                      capsys.readouterr().out)
    logged = [[r[name] for name in train.LOSSES] for r in log_values(Path("runs/0")) if r["epoch"] == 1]
    assert np.allclose(np.array(shown.groups(), float), np.mean(logged, 0), atol=6e-5)
    run_of("runs/0", "--epochs", "3")                     # goes on
    assert [n for stage, n in planned if stage == "step"] == [4, 2]
    monkeypatch.setattr(train, "save_checkpoint", lambda *args: None)             # a third of the time
    results = see_what_changes(OF_A_RUN, run)
    for name, value in results["--accumulate 3"].items():
        if name not in ("micro_batches", "out"):
            assert same(value, results[""][name]) or isinstance(value, (float, dict)) and all(
                np.allclose(*pair, rtol=1e-3, atol=1e-4) for pair in zip(
                    *([*v.values()] if isinstance(v, dict) else [v] for v in (value, results[""][name]))))
    assert arguments_of(transfgu.parse) == OF_A_RUN.keys() | {"--released"}       # of the same loop, but
    see_what_changes(OF_TRANSFGU, lambda *args: run(*args, method=transfgu.TransFGU))     # labels of its own
    with pytest.raises(data.UserError, match="no GPU"):
        run("--device", "cuda")


OF_EVAL = {
    "checkpoint": [("teacher.pt", "", "logits")],
    "--data": [("--data voc --root one", "", "images labels logits ...")],
    "--root": [("--root x", "", ""),
               ("--data voc --root two", "--data voc --root one", "images labels logits")],
    "--masks": [("--root photos --masks truth", "", "images labels logits ...")],
    "--limit": [("--limit 3", "", "images labels logits ...")],
    "--native": [("--native", "", "images labels size logits ...")],
    "--par": [("--par", "", "par logits")],
    "--flip": [("--flip", "", "flip logits")],
    "--rates": [("--rates 1,6,12,18", "", "rates logits"), ("--rates epoch", "", "")],
    "--device": [("--device auto", "", "")],
    "--predict": [("--predict photos", "", "images size logits files ...")],
    "--out": [("--predict photos --out other", "--predict photos", "files")]}


def test_every_option_of_eval_changes_what_it_names_and_nothing_else(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    checkpoint = uninterrupted[1]
    torch.save(checkpoint | {"student": checkpoint["teacher"]}, "teacher.pt")
    torch.save(checkpoint, "student.pt")
    for i in range(4):
        image, label = data.shapes(i, 96)
        save(tmp_path / f"photos/{i}.png", image)
        save(tmp_path / f"truth/{i}.png", label)
    (tmp_path / "truth/names.txt").write_text("\n".join(checkpoint["names"]))
    for i, root in enumerate(("one", "two")):
        lists = make_voc(tmp_path / root) / "ImageSets/Segmentation"
        (lists / "names.txt").write_text("\n".join(checkpoint["names"]))
        for file, picture in zip(("JPEGImages/2007_000002.jpg", "SegmentationClass/2007_000002.png"),
                                 data.shapes(4 + i, 96)):
            save(tmp_path / root / file, picture)
    real, count = evaluation.mask_logits, evaluation.confusion_matrix

    def scored(*args):
        result = {name: [] for name in ("rates", "images", "size", "par", "flip", "logits", "labels")}

        def recorded(network, rates, image, size, par=None, flip=False):
            logits = real(network, rates, image, size, par, flip)
            for name, value in (("rates", list(rates)), ("images", torch.as_tensor(image)),
                                ("size", tuple(size)), ("par", par.dilations if par else ()), ("flip", flip),
                                ("logits", logits)):
                result[name].append(value)
            return logits

        def counted(labels, *rest):
            result["labels"].append(torch.as_tensor(labels))
            return count(labels, *rest)

        monkeypatch.setattr(evaluation, "mask_logits", recorded)
        monkeypatch.setattr(evaluation, "confusion_matrix", counted)
        file, *others = args if "teacher.pt" in args else ("student.pt", *args)
        monkeypatch.setattr(sys, "argv", ["eval.py", file, "--limit", "2", *others])
        before = set(Path().rglob("*_mask.png"))
        evaluation.main()
        result["files"] = sorted(map(str, set(Path().rglob("*_mask.png")) - before))
        return result

    assert arguments_of(evaluation.parse) == OF_EVAL.keys()
    see_what_changes(OF_EVAL, scored)


OF_ABLATION = {
    "--data": [("--data voc", "", "data backbone epochs out")],
    "--backbone": [("--backbone vits16", "", "backbone out")],
    "--seeds": [("--seeds 1 2 1", "", "seeds out"), ("--seeds 2 1", "--seeds 1 2", "seeds out")],
    "--rows": [("--rows static", "", "rows aspp teacher out"),
               ("--rows released no-teacher", "", "rows aspp teacher out")],
    "--out": [("--out elsewhere", "", "out")],
    "options": [("-- --epochs 3", "", "epochs")]}
OF_BENCH = {
    "--quick": [("--quick", "", "repeat")],
    "--only": [("--only par", "", "cases")],
    "--stages": [("--stages", "", "cases repeat crops backbone")],
    "--crops": [("--stages --crops 7", "--stages", "crops")],
    "--whole": [("--whole new", "", "cases repeat command"),
                ("--whole new --limit 3", "--whole new", "command")],             # goes to train.py
    "--processes": [("--whole new --processes 2", "--whole new", "command")],
    "--backbone": [("--whole new --backbone tiny", "--whole new", "command"),
                   ("--stages --backbone tiny", "--stages", "backbone")]}
OF_GET_DATA = {
    "name": [("coco80", "voc", "name")],
    "--root": [("voc --root x", "voc", "root"), ("voc --check --root x", "voc --check", "root")],
    "--check": [("voc --check", "voc", "check")],
    "--url": [("voc --url http://a/b", "voc", "url")]}
OF_HOW_MANY = {
    "run": [("other", "run", "run")],
    "--root": [("run --root photos", "run", "root")],
    "--classes": [("run --classes 4 3 4", "run", "classes")]}
OF_PAR_ON_PHOTOS = {
    "--root": [("--root x", "", "root")],
    "--limit": [("--limit 3", "", "images")],
    "--seed": [("--seed 5", "", "seed")]}
OF_PRETRAIN = {
    "--data": [("--data folder", "", "pictures weights out")],
    "--root": [("--root x", "", ""), ("--data folder --root other", "--data folder", "pictures weights")],
    "--images": [("--images 3", "", "pictures weights")],
    "--steps": [("--steps 1", "", "weights")],
    "--batch": [("--batch 1", "", "weights")],
    "--lr": [("--lr 0.1", "", "weights")],
    "--seed": [("--seed 1", "", "weights")],
    "--out": [("--out elsewhere.pt", "", "out")]}
OF_SHOW = {
    "explain": {
        "run": [("explain other.pt photo.png", "explain run.pt photo.png", "picture")],
        "photo": [("explain run.pt other.png", "explain run.pt photo.png", "picture files")],
        "--out": [("explain run.pt photo.png --out x", "explain run.pt photo.png", "files")],
        "--device": [("explain run.pt photo.png --device cpu", "explain run.pt photo.png", "")]},
    "compare": {
        "runs": [("compare other.pt", "compare run.pt", "picture")],
        "--predict": [("compare run.pt --predict photo.png", "compare run.pt", "picture")],
        "--limit": [("compare run.pt --limit 2", "compare run.pt", "picture")],
        "--out": [("compare run.pt --out x", "compare run.pt", "files")],
        "--device": [("compare run.pt --device cpu", "compare run.pt", "")]},
    "pairs": {
        "run": [("pairs other.pt", "pairs run.pt", "picture")],
        "--out": [("pairs run.pt --out x", "pairs run.pt", "files")],
        "--device": [("pairs run.pt --device cpu", "pairs run.pt", "")]},
    "clusters": {
        "run": [("clusters other.pt", "clusters run.pt", "picture")],
        "--device": [("clusters run.pt --device cpu", "clusters run.pt", "")]}}


def test_every_option_of_the_ablation_and_bench_changes_what_it_names_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def ablated(*args):
        base = [] if "--rows" in args else ["--rows", "dmsa", "released"]
        base += [] if "--seeds" in args else ["--seeds", "0"]
        runs = ablation.runs_of(ablation.parse([*base, *args]))
        found = {"rows": [run.row for run in runs], "seeds": [run.seed for run in runs]}
        for name in ("data", "backbone", "epochs", "out", "aspp", "teacher"):
            found[name] = [getattr(run.args, name) for run in runs]
        return {name: list(dict.fromkeys(values)) for name, values in found.items()}

    def timed(*args):
        """Of --whole the command that would train; of the rest what is to be timed."""
        result = {}
        monkeypatch.setattr(sys, "argv", ["bench.py", *args])
        monkeypatch.setattr(bench, "beside_textbook",
                            lambda cases, repeat: result.update(cases=cases, repeat=repeat))
        monkeypatch.setattr(bench, "stages", lambda backbone, crops: result.update(
            backbone=backbone, crops=crops))
        monkeypatch.setattr(bench, "make_voc", lambda root: Path(root).mkdir())
        monkeypatch.setattr(bench, "VisionTransformer", lambda **architecture: nn.Identity())

        class Popen:
            stdout, returncode = (), 0
            __enter__, __exit__ = lambda self: self, lambda *args: None

            def __init__(self, command, **rest):
                result["command"] = [str(word) for word in command]

        monkeypatch.setattr(bench.subprocess, "Popen", Popen)
        bench.main()
        shutil.rmtree("new", ignore_errors=True)
        return result

    assert arguments_of(ablation.parse) == OF_ABLATION.keys()
    see_what_changes(OF_ABLATION, ablated)
    assert arguments_of(bench.parse) == OF_BENCH.keys()
    results = see_what_changes(OF_BENCH, timed)
    assert results["--whole new --limit 3"]["command"][-2:] == ["--limit", "3"]
    assert "--nproc_per_node=2" in results["--whole new --processes 2"]["command"]


def test_every_option_of_the_small_tools_changes_what_it_names_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fetched(*args):
        monkeypatch.setattr(sys, "argv", ["get_data.py", *args])
        result = {}
        monkeypatch.setattr(get_data, "download", lambda name, root, url: result.update(
            name=name, root=root, url=url or "", check=False))
        monkeypatch.setattr(get_data, "check_splits", lambda name, root: result.update(
            name=name, root=root, url="", check=True))
        get_data.main()
        return result

    def counted(*args):
        monkeypatch.setattr(sys, "argv", ["how_many.py", *args])
        result, vit = {"classes": []}, SimpleNamespace()
        source = data.Shapes()

        def read(args, state):
            result["root"] = args.root
            return {"train": source}

        monkeypatch.setattr(how_many, "load_checkpoint", lambda file: result.update(run=file) or {
            "args": {"root": "data"}})
        monkeypatch.setattr(train, "open_data", read)
        monkeypatch.setattr(train, "frozen_vit", lambda *args: (vit, "digest"))
        monkeypatch.setattr(train, "window_bank", lambda *args: [np.zeros((9, 5), np.float16)])
        monkeypatch.setattr(how_many, "agreement", lambda bank, k, rng: result["classes"].append(k) or {
            "halves": [1.0, 1.0], "starts": [1.0, 1.0]})
        how_many.main()
        return result

    def refined(*args):
        monkeypatch.setattr(sys, "argv", ["par_on_photos.py", "--limit", "2", *args])
        result = {"images": [], "seed": []}

        class Source(data.Dataset):
            def __init__(self, root, split):
                self.ids = self.images = self.labels = range(9)
                result["root"] = root

        def scored(source, i, seed):
            result["images"].append(i)
            result["seed"] = seed
            return np.zeros((len(par_on_photos.RESTORED), len(par_on_photos.COARSE)))

        monkeypatch.setattr(data, "VOC", Source)
        monkeypatch.setattr(par_on_photos, "scores", scored)
        par_on_photos.main()
        return result

    assert arguments_of(get_data.parse) == OF_GET_DATA.keys()
    see_what_changes(OF_GET_DATA, fetched)
    assert arguments_of(how_many.parse) == OF_HOW_MANY.keys()
    for run in ("run", "other"):
        (tmp_path / run).mkdir()
    see_what_changes(OF_HOW_MANY, counted)
    assert arguments_of(par_on_photos.parse) == OF_PAR_ON_PHOTOS.keys()
    see_what_changes(OF_PAR_ON_PHOTOS, refined)


def test_every_option_of_pretrain_changes_what_it_names_and_nothing_else(tmp_path, monkeypatch):
    for folder, i in np.ndindex(2, 4):
        save(tmp_path / ("data", "other")[folder] / f"{i}.png", data.shapes((folder, int(i)), 96)[0])
    (tmp_path / "assets").mkdir()
    monkeypatch.chdir(tmp_path)
    here = SimpleNamespace(map=lambda call, items, chunksize: map(call, items))   # without processes
    monkeypatch.setattr(pretrain, "ProcessPoolExecutor", lambda: contextlib.nullcontext(here))
    all_pictures = pretrain.all_pictures

    def trained(*args):
        result = {}
        base = ["--images", "4", "--steps", "2", "--batch", "2"]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *base, *args])
        monkeypatch.setattr(pretrain, "all_pictures", lambda args: result.setdefault(
            "pictures", all_pictures(args)))
        pretrain.main()
        file, = Path().rglob("*.pt")
        result |= {"out": str(file), "weights": torch.load(file, weights_only=True)}
        file.unlink()
        return result

    assert arguments_of(pretrain.parse) == OF_PRETRAIN.keys()
    see_what_changes(OF_PRETRAIN, trained)


def test_pairs_counts_what_is_right_of_a_class_with_and_without_another_one(monkeypatch):
    monkeypatch.setattr(show, "FEWEST", 2)
    labels = np.array([[1, 1, 2], [1, 2, 2], [1, 1, 0], [1, 0, 0], [2, 0, 255]]).reshape(5, 1, 3)
    masks = np.array([[1, 2, 2], [2, 2, 2], [1, 1, 1], [0, 0, 0], [2, 2, 2]]).reshape(5, 1, 3)
    found = show.recall_beside(labels, masks, 3)
    # class 1 beside 2: one pixel of three is right, elsewhere two of three; beside 0 as elsewhere without 2
    assert found[0] == (1, 2, pytest.approx(1 / 3), pytest.approx(2 / 3), 2, 2)
    assert found[-1] == (1, 0, pytest.approx(2 / 3), pytest.approx(1 / 3), 2, 2) and len(found) == 2


def test_every_option_of_show_changes_what_it_names_and_nothing_else(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pictures, "SHEET", 4)
    monkeypatch.setattr(show, "FEWEST", 1)
    monkeypatch.chdir(tmp_path)
    last = uninterrupted[1] | {"args": uninterrupted[1]["args"] | {"limit": 4}}
    torch.save(last, "run.pt")
    torch.save(last | {"student": last["teacher"]}, "other.pt")
    for i, name in enumerate(("photo.png", "other.png")):
        save(tmp_path / "in" / name, data.shapes(i, 96)[0])

    def drawn(*args):
        before = set(Path().rglob("*.png"))
        words = [f"in/{word}" if word.endswith(".png") else word for word in args]
        limit = ["--limit", "1"] if args[0] == "compare" and "--limit" not in args else []
        monkeypatch.setattr(sys, "argv", ["show.py", *words, *limit])
        show.main()
        file, = set(Path().rglob("*.png")) - before
        with Image.open(file) as picture:
            result = {"files": str(file), "picture": torch.from_numpy(np.array(picture))}
        file.unlink()
        return result

    for what, table in OF_SHOW.items():
        assert arguments_of(show.parse, what) == table.keys()
        see_what_changes(table, drawn)
    assert arguments_of(show.parse) == OF_SHOW.keys()


# ----------------------------------------------------------------------------
# README.md and docs/ cannot drift

README = (HERE / "README.md").read_text()
DOCS = {file.name: file.read_text() for file in sorted(HERE.glob("docs/*.md"))}


def test_every_function_beside_the_paper_exists_and_names_its_equation():
    rows = re.findall(r"^\| (Fig|Eq|Table|Tables|Figs)\.? ([\d, ]+) \|[^|]*\|([^|]*)\|$",
                      "\n".join((README, *DOCS.values())), re.M)
    assert {f"{kind} {number}" for kind, number, _ in rows} >= {
        *(f"Eq {i}" for i in range(1, 7)), "Table 1", "Table 4", "Fig 1", "Fig 2"}
    for kind, number, cell in rows:
        named, texts = re.findall(r"`(\S+\.py): ([\w.]+)`", cell), []
        assert named, cell
        for file, name in named:
            source = (HERE / file).read_text()
            last = name.split(".")[-1]
            found = re.search(rf"^( *)(?:def|class) {last}\b.*?(?=^\1\S|\Z)", source, re.M | re.S)
            assert found, (file, name)
            texts.append(found[0])
        if kind == "Eq":
            assert any(re.search(rf"Eq\. {number}\b", text) for text in texts), (kind, number, cell)


@pytest.mark.parametrize("text", (README, DOCS["usage.md"]), ids=("README", "usage"))
def test_the_snippets_of_readme_and_usage_run_as_they_stand(text):
    torch.manual_seed(0)
    space = {"torch": torch, "image": torch.rand(3, 3, 96, 96), "masks": torch.rand(3, 4, 12, 12),
             "x": randn(2, 384, 5, 5), "logits": randn(2, 5, 8, 8), "label": torch.randint(0, 5, (2, 8, 8)),
             "vit": model.backbone("tiny")[0].eval()}
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    for snippet in snippets:
        assert len(snippet.splitlines()) <= 5
        exec(snippet, space)
    if text is not README:                                # one for each file
        assert len(snippets) == 6 and (
            space["masks"].shape == (3, 4, 96, 96) and space["crop"].shape == (3, 3, 96, 96)
            and space["logits"].shape == (3, 21, 12, 12))


def test_every_option_that_readme_and_docs_name_exists_and_helps_defaults_are_the_real_ones(
        monkeypatch, capsys):
    def help_of(start, *args):
        monkeypatch.setattr(sys, "argv", ["program", *args, "--help"])
        with pytest.raises(SystemExit, match="0"):
            start()
        return capsys.readouterr().out

    tools = [importlib.import_module(f"tools.{file.stem}") for file in HERE.glob("tools/*.py")
             if "__main__" in file.read_text()]
    mains = [getattr(tool, "parse", None) or tool.main for tool in tools]
    texts = [help_of(start) for start in (train.parse, evaluation.parse, *mains)]
    texts += [help_of(show.parse, what) for what in ("explain", "compare", "pairs", "clusters")]
    known = set(re.findall(r"--[a-z][a-z-]+", "".join(texts)))
    torchrun = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"}
    for text in (*DOCS.values(), README):
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+[a-z]", text)) <= known | torchrun
    for given in ([], ["--data", "voc"], ["--data", "cocostuff27"]):              # those of the data set
        args, text = train.parse(given), help_of(train.parse, *given)
        for name in ("teacher_weight", "momentum", "threshold", "batch", "lr", "teacher", "epochs", "lambdas",
                     "par", "jitter", "size", "teacher_start", "backbone"):
            entry = re.search(rf"\n  --{name.replace('_', '-')}[ ,\n].*?(?=\n  -|\n\n)", text, re.S)[0]
            assert re.search(rf"\({re.escape(str(vars(args)[name]))}[,;)]", re.sub(r"\s+", " ", entry)), entry


def test_decisions_that_code_cites_exist_and_functions_that_docs_name_do():
    rows = set(re.findall(r"^\| (\d+) \|", DOCS["decisions.md"], re.M))
    for file in HERE.glob("*.py"):
        cited = re.findall(r"[Dd]ecisions? ((?:\d+(?:, | and )?)+)", file.read_text())
        assert set(re.findall(r"\d+", " ".join(cited))) <= rows, file
    for page, text in {**DOCS, "README.md": README}.items():
        for file, name in re.findall(r"`((?:tools/)?\w+\.py): ([\w.]+)`", text):
            assert re.search(rf"^\s*(?:def|class) {name.split('.')[-1]}\b|^{name} = ",
                             (HERE / file).read_text(), re.M), (file, name)
        folder = HERE if page == "README.md" else HERE / "docs"
        for target, anchor in re.findall(r"\]\(([\w/.]+\.md|)#([\w-]+)\)", text):
            headings = re.findall(r"^#+ (.*)$", (folder / target).read_text() if target else text, re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, anchor


def test_readme_counts_its_files_and_lines_and_shows_only_pictures_that_exist():
    lines = sum(len(f.read_text().splitlines()) for f in HERE.glob("*.py") if f.name != "test_all.py")
    assert all(count == f"{lines:,}" for count in re.findall(r"(\d,\d{3}) lines", README))
    assert len(list(HERE.glob("*.py"))) == 9             # eight, and the tests
    for picture in re.findall(r"!\[[^]]*\]\((\S+)\)", README):
        assert (HERE / picture).stat().st_size > 0
    assert "@@" not in README
