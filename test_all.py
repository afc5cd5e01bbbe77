"""Every test. Each name is the claim that it proves.

    python -m pytest -q test_all.py                              # needs nothing but this repository
    DMSA_GOLDEN=folder python -m pytest -q test_all.py           # and against the peers' golden numbers

The expected values are textbook forms written out here, straight from the equation, and a few numbers made by
the peers' own code (TransFGU ea49bcd, AFA adcfa29, DINO 7c446df). With DMSA_GOLDEN the same functions are also
compared with whole files of such numbers.
"""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy.cluster.vq import vq

import aspp
import cam
import data
import eval as evaluation
import losses
import model
import par
import train

HERE = Path(__file__).resolve().parent
GOLDEN = os.environ.get("DMSA_GOLDEN")
golden = pytest.mark.skipif(not GOLDEN, reason="DMSA_GOLDEN names no folder of golden numbers")
torch.set_num_threads(1)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_vit(seed=0, depth=3):
    torch.manual_seed(seed)
    vit = model.VisionTransformer(img_size=64, patch_size=8, embed_dim=48, depth=depth, num_heads=4)
    for p in vit.parameters():                            # larger weights than at the start of training: attention is not flat
        p.data = torch.randn_like(p) * (0.15 if p.ndim > 1 else 0.1) + (p.data if p.ndim == 1 else 0)
    return vit.eval().requires_grad_(False)


# ----------------------------------------------------------------------------
# aspp.py


@pytest.mark.parametrize("epochs, rates", [((1, 3, 5, 7, 11, 27), (1, 1, 2, 3)), ((2, 4, 6, 36), (1, 1, 3, 5)),
                                           ((8, 9, 19), (1, 3, 6, 9)), ((10, 20, 200), (1, 6, 12, 18))])
def test_dilation_rates_are_table_1_with_epochs_counted_from_1(epochs, rates):
    assert all(aspp.dilation_rates(e) == rates for e in epochs)
    with pytest.raises(ValueError, match="count from 1"):
        aspp.dilation_rates(0)


def test_eq_1_gives_the_size_that_the_convolution_has():
    for m, kernel, rate, padding, stride in ((20, 3, 6, 6, 1), (20, 3, 18, 18, 1), (21, 3, 2, 1, 2), (15, 5, 1, 0, 3)):
        conv = nn.Conv1d(1, 1, kernel, stride, padding, dilation=rate)
        assert aspp.output_size(m, kernel, rate, padding, stride) == conv(torch.zeros(1, 1, m)).shape[2]


def test_a_new_aspp_adds_nothing_and_keeps_the_size_at_every_rate():
    x = randn(2, 16, 7, 9)
    for epoch in range(1, 11):
        assert torch.equal(aspp.ASPP(16, 16)(x, aspp.dilation_rates(epoch)), torch.zeros_like(x))


def test_aspp_branches_equal_loops_over_taps_at_their_rates():
    torch.manual_seed(0)
    module, x, rates = aspp.ASPP(8, 16).double(), randn(1, 8, 6, 7).double(), (1, 1, 3, 5)
    norm_relu = lambda y, b: F.relu(F.group_norm(y, 2, b.norm.weight, b.norm.bias))
    expected = [norm_relu(torch.einsum("oc,bchw->bohw", module.point.pointwise.weight[:, :, 0, 0], x), module.point)]
    for branch, r in zip(module.atrous, rates[1:]):
        y = torch.zeros_like(x)
        for i in range(6):
            for j in range(7):
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        if 0 <= i + dy * r < 6 and 0 <= j + dx * r < 7:
                            y[:, :, i, j] += branch.depthwise.weight[:, 0, dy + 1, dx + 1] * x[:, :, i + dy * r, j + dx * r]
        expected.append(norm_relu(torch.einsum("oc,bchw->bohw", branch.pointwise.weight[:, :, 0, 0], y), branch))
    pooled = torch.einsum("oc,bc->bo", module.pool.pointwise.weight[:, :, 0, 0], x.mean((2, 3)))[:, :, None, None]
    expected.append(norm_relu(pooled, module.pool).expand(-1, -1, 6, 7))
    torch.testing.assert_close(module.branches(x, rates), torch.cat(expected, 1))


def test_aspp_of_a_batch_is_that_of_its_images():
    torch.manual_seed(0)
    module, x = aspp.ASPP(16, 16).train(), randn(3, 16, 5, 5)
    nn.init.normal_(module.project.weight)
    torch.testing.assert_close(module(x, (1, 1, 2, 3))[1:2], module(x[1:2], (1, 1, 2, 3)))


def test_aspp_refuses_rates_that_are_not_a_row_of_the_table():
    for rates in ((1, 2, 3), (2, 1, 2, 3)):
        with pytest.raises(ValueError, match="four rates"):
            aspp.ASPP(16, 16)(randn(1, 16, 5, 5), rates)


# ----------------------------------------------------------------------------
# par.py


def textbook_par(image, masks, dilations, iterations, omega3=0.01, w=0.3):
    """Eq. 4 as loops over pixels and neighbours, in double precision; one image (3, H, W), masks (C, H, W)."""
    image, masks = image.double().numpy(), masks.double().numpy()
    _, H, W = image.shape
    steps = [(dy * d, dx * d) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    distance = np.array([math.sqrt(dy * dy + dx * dx) for dy, dx in steps])
    position = np.exp(-(distance / (distance.std(ddof=1) + 1e-8) / w) ** 2)
    position /= position.sum()
    kernel, at = np.zeros((H, W, len(steps))), np.zeros((H, W, len(steps), 2), int)
    for i in range(H):
        for j in range(W):
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
def test_par_equals_eq_4_written_as_loops(dilations, iterations):
    image, masks = torch.rand(2, 3, 13, 10, generator=torch.Generator().manual_seed(1)), randn(2, 3, 13, 10).softmax(1)
    image[:, :, :6, :5] = 0.4                             # a flat region: uniform weights
    refined = par.PAR(dilations, iterations)(image, masks)
    for n in range(2):
        torch.testing.assert_close(refined[n], textbook_par(image[n], masks[n], dilations, iterations), rtol=0, atol=1e-5)


def test_par_weights_sum_to_1_01_and_do_not_depend_on_the_range_of_the_image():
    image = torch.rand(1, 3, 16, 20, generator=torch.Generator().manual_seed(2))
    k = par.affinity(image)
    assert k.shape == (1, 48, 16, 20)
    torch.testing.assert_close(k.sum(1), torch.full((1, 16, 20), 1.01))
    torch.testing.assert_close(par.affinity(255 * image), k, rtol=1e-3, atol=1e-4)


def test_par_scales_a_constant_mask_by_1_01_to_the_tenth():
    refined = par.PAR()(torch.rand(1, 3, 30, 30), torch.full((1, 2, 5, 5), 0.5))
    torch.testing.assert_close(refined, torch.full((1, 2, 30, 30), 0.5 * 1.01 ** 10))


def test_par_resizes_masks_with_corners_aligned():
    masks = randn(1, 2, 4, 5)
    expected = F.interpolate(masks, (9, 11), mode="bilinear", align_corners=True)
    torch.testing.assert_close(par.PAR(iterations=0)(torch.rand(1, 3, 9, 11), masks), expected)


def test_par_makes_a_coarse_mask_follow_the_edge_of_the_image():
    image, coarse, truth = par.example()
    iou = lambda m: ((m.argmax(1)[0] == 1) & (truth == 1)).sum() / ((m.argmax(1)[0] == 1) | (truth == 1)).sum()
    assert iou(par.PAR((1, 2, 4, 8))(image, coarse)) > 0.98 > 0.95 > iou(par.PAR(iterations=0)(image, coarse))


def test_par_names_a_wrong_batch():
    with pytest.raises(ValueError, match="2 images but 3 masks"):
        par.PAR()(torch.rand(2, 3, 8, 8), torch.rand(3, 2, 8, 8))


# ----------------------------------------------------------------------------
# losses.py


def test_cam_probabilities_put_a_background_below_half_the_threshold():
    cam_maps = torch.tensor([[0.0, 0.04, 0.06, 1.0], [0.0, 0.0, 0.0, 0.2]]).view(1, 2, 1, 4)
    p = losses.cam_probabilities(5 + 3 * cam_maps)        # any scale and offset
    torch.testing.assert_close(p[0, :, 0], torch.tensor([[0.1, 0.06, 0.04, 0], [0, 0.04, 0.06, 1], [0, 0, 0, 0.2]]))
    assert p.argmax(1).flatten().tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(losses.cam_probabilities(cam_maps, background=False), cam_maps)


def test_constant_maps_are_background_not_nan():
    p = losses.cam_probabilities(torch.full((1, 3, 2, 2), 0.7))
    assert torch.equal(p[:, 0], torch.full((1, 2, 2), 0.1)) and p[:, 1:].eq(0).all()


def test_fusion_weighs_the_teacher():
    p, teacher = torch.rand(2, 3, 4, 4), randn(2, 3, 4, 4)
    torch.testing.assert_close(losses.fuse(p, teacher, 0.7), 0.3 * p + 0.7 * torch.exp(teacher) / torch.exp(teacher).sum(1, keepdim=True))


def test_cross_entropy_pushes_the_permuted_class_away():
    logits, label, permutation = randn(2, 4, 3, 3), torch.randint(0, 4, (2, 3, 3)), torch.tensor([2, 0, 3, 1])
    total = 0.0
    for b in range(2):
        for i in range(3):
            for j in range(3):
                p = torch.exp(logits[b, :, i, j]) / torch.exp(logits[b, :, i, j]).sum()
                y = label[b, i, j]
                total += -math.log(p[y]) + 0.05 * math.log(p[permutation[y]])
    assert losses.cross_entropy_loss(logits, label, permutation, 0.05).item() == pytest.approx(total / 18, rel=1e-5)


def test_segmentation_loss_balances_background_and_foreground():
    logits, label = randn(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
    label[0, 0, :2], label[0, 3] = 1, 255
    ce = -logits.log_softmax(1).gather(1, label.clamp(max=2)[:, None])[:, 0]
    expected = (ce[label == 0].mean() + ce[label == 1].mean()) / 2
    torch.testing.assert_close(losses.segmentation_loss(logits, label), expected)


@pytest.mark.parametrize("value", [0, 1])
def test_segmentation_loss_is_half_not_nan_for_an_empty_side(value):
    logits, label = randn(2, 3, 4, 4), torch.full((2, 4, 4), value)
    torch.testing.assert_close(losses.segmentation_loss(logits, label), F.cross_entropy(logits, label) / 2)


def test_uncertainty_loss_is_one_minus_the_gap_on_foreground_only():
    p = torch.tensor([[0.5, 0.2, 0.3], [0.9, 0.1, 0.0], [0.4, 0.4, 0.2]]).T.reshape(1, 3, 1, 3)
    logits = (p + 1e-9).log()
    assert losses.uncertainty_loss(logits, torch.tensor([[[True, False, True]]])).item() == pytest.approx((0.8 + 1.0) / 2, abs=1e-5)
    assert losses.uncertainty_loss(logits, torch.zeros(1, 1, 3, dtype=torch.bool)).item() == 0


def test_class_loss_is_the_mean_over_pairs_of_1_plus_cosine():
    c = randn(2, 4, 5)
    pairs = [1 + F.cosine_similarity(c[b, i], c[b, j], dim=0) for b in range(2) for i in range(4) for j in range(i + 1, 4)]
    torch.testing.assert_close(losses.class_loss(c), torch.stack(pairs).mean())
    assert losses.class_loss(torch.ones(1, 3, 4)).item() == pytest.approx(2)


def test_losses_of_the_parts_of_a_batch_add_up_to_those_of_the_whole():
    label = torch.randint(0, 4, (6, 5, 5), generator=torch.Generator().manual_seed(0))
    label[:2] = 0                                         # parts with very different shares of foreground
    foreground, thing = label > 1, torch.tensor([False, True, True, True])
    logits, embeddings = randn(6, 4, 5, 5).requires_grad_(), randn(6, 4, 8).requires_grad_()
    counts = losses.pixel_counts(label, foreground, thing)
    run = lambda s: losses.dmsa_losses(logits[s], embeddings[s], label[s], foreground[s], counts, thing, (0.3, 1, 0.3, 1),
                                       True, torch.tensor([1, 2, 3, 0]), 0.05)
    whole = run(slice(0, 6))
    gradient = torch.autograd.grad(whole["all"], (logits, embeddings))
    parts = [run(slice(i, i + 2)) for i in (0, 2, 4)]
    for name in whole:
        torch.testing.assert_close(sum(p[name] for p in parts), whole[name])
    for a, b in zip(torch.autograd.grad(sum(p["all"] for p in parts), (logits, embeddings)), gradient):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(whole["seg"], losses.segmentation_loss(logits, label))
    torch.testing.assert_close(whole["un"], losses.uncertainty_loss(logits[:, 1:], foreground))
    torch.testing.assert_close(whole["all"], 0.3 * whole["seg"] + whole["ce"] + 0.3 * whole["un"] + whole["cls"])


# ----------------------------------------------------------------------------
# cam.py


@pytest.mark.parametrize("h, w", [(20, 20), (40, 40), (80, 80)])
def test_there_are_70_windows_of_vocs_scales(h, w):
    boxes = cam.windows(h, w)
    assert len(boxes) == 70 and boxes.min() == 0 and boxes.max() == h - 1
    assert boxes[:4].tolist() == [[0, 0, int(.6 * h), int(.6 * h)], [int(.3 * h), 0, int(.9 * h), int(.6 * h)],
                                  [h - 1 - int(.6 * h), 0, h - 1, int(.6 * h)], [0, int(.3 * h), int(.6 * h), int(.9 * h)]]


def test_windows_equal_transfgus_rule_written_as_loops_also_when_not_square_or_odd():
    for h, w in ((20, 28), (15, 15), (11, 24)):
        expected = []
        for scale in cam.THING_SCALES:
            s = int(min(h * scale, w * scale))
            for y in range(h):
                for x in range(w):
                    if x - s / 2 >= 0 and y - s / 2 >= 0 and x + s / 2 < w and y + s / 2 < h:
                        left, top, right, bottom = x - s / 2 == 0, y - s / 2 == 0, x + s / 2 == w - 1, y + s / 2 == h - 1
                        on_x, on_y = x % (s / 2) == 0, y % (s / 2) == 0
                        if on_x and on_y or on_y and (left or right) or on_x and (top or bottom) or right and bottom:
                            expected.append([i for i in (x - s // 2, y - s // 2, x + s // 2, y + s // 2)])
        assert cam.windows(h, w).tolist() == expected


def test_windows_are_kept_by_their_share_of_foreground():
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:4, :4] = True
    fore, back = cam.select_windows(mask, np.array([[0, 0, 3, 3], [0, 0, 7, 3], [4, 4, 7, 7], [3, 3, 7, 7]]), 8)
    assert fore.tolist() == [True, True, False, False] and back.tolist() == [False, False, True, True]


def test_class_activation_maps_equal_k_full_backward_passes():
    """TransFGU's way: an explicit attention map of the last block, one backward pass a class, one image."""
    vit, image, centroids = small_vit(), randn(2, 3, 64, 64, seed=3), randn(4, 48, seed=4)
    maps = cam.class_activation_maps(vit, image, centroids)
    for n in range(2):
        block, x = vit.blocks[-1], vit.trunk(image[n:n + 1])
        q, k, v = block.attn.split(block.norm1(x))
        A = (q @ k.transpose(2, 3) / math.sqrt(12)).softmax(3).requires_grad_()
        y = x + block.attn.proj((A @ v).transpose(1, 2).flatten(2))
        feature = vit.norm(y + block.mlp(block.norm2(y)))[:, 0]
        base = A[0, :, 0, 1:].mean(0).detach()
        for c in range(4):
            g, = torch.autograd.grad((1 - F.cosine_similarity(feature, centroids[c:c + 1])).mean(), A, retain_graph=True)
            g = g[0, :, 0, 1:].mean(0)
            fg = F.relu(-g)
            order, kept, total = fg.argsort(), torch.zeros(64), 0.0
            for i in order:
                total += fg[i]
                kept[i] = float(total > 0.2 * fg.sum())
            expected = (base / base.max() + fg * kept) * (g <= 0)
            torch.testing.assert_close(maps[n, c].flatten(), expected, rtol=1e-4, atol=1e-5)


def test_maps_of_a_batch_are_those_of_its_images():
    vit, image, centroids = small_vit(), randn(3, 3, 64, 96), randn(5, 48)
    torch.testing.assert_close(cam.class_activation_maps(vit, image, centroids)[2:], cam.class_activation_maps(vit, image[2:], centroids))


def test_window_features_are_the_normed_cls_tokens_of_the_crops():
    vit, image = small_vit(), randn(1, 3, 160, 160)
    fore, back = cam.window_features(vit, image, 64, stuff=True, batch=4)
    mask = vit(image)[1][:, :, 1:].mean(1)
    mask = (mask > mask.mean()).view(20, 20).numpy().repeat(8, 0).repeat(8, 1)
    expected = {True: [], False: []}
    for x0, y0, x1, y1 in cam.windows(20, 20):
        ys, xs = slice(y0 * 8, (y1 + 1) * 8 - 1), slice(x0 * 8, (x1 + 1) * 8 - 1)
        share = mask[ys, xs].mean()
        if share > 0.5 or 1 - share > 0.8:
            crop = F.interpolate(image[:, :, ys, xs], (64, 64), mode="bilinear")
            expected[bool(share > 0.5)].append(vit(crop)[0][:, 0])
    for found, kind in ((fore, True), (back, False)):
        assert len(found) == len(expected[kind])
        if len(found):
            torch.testing.assert_close(found, torch.cat(expected[kind]), rtol=1e-4, atol=1e-4)
    assert len(fore) and not len(cam.window_features(vit, image, 64)[1])


def test_keep_mass_keeps_the_largest_values_and_nothing_of_an_empty_map():
    assert cam.keep_mass(torch.tensor([4.0, 1, 3, 2]), 0.8).tolist() == [True, False, True, True]
    assert cam.keep_mass(torch.tensor([4.0, 1, 3, 2]), 0.5).tolist() == [True, False, True, False]
    assert not cam.keep_mass(torch.zeros(2, 6)).any()


def test_clusters_are_found_repeatably_and_too_few_windows_are_named():
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 5, (6, 8))
    x = np.concatenate([c + rng.normal(0, 0.3, (40, 8)) for c in centres])
    found = cam.cluster(x, 6, seed=1)
    assert np.abs(found[:, None] - centres[None]).max(2).min(0).max() < 0.3
    assert np.array_equal(found, cam.cluster(x, 6, seed=1)) and found.dtype == np.float32
    with pytest.raises(ValueError, match="5 windows are too few for 6 clusters"):
        cam.cluster(x[:5], 6)


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
        x = x + torch.einsum("bhqk,bkhd->bqhd", A, v).flatten(2) @ s[b + "attn.proj.weight"].T + s[b + "attn.proj.bias"]
        y = norm(x, b + "norm2") @ s[b + "mlp.fc1.weight"].T + s[b + "mlp.fc1.bias"]
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        x = x + y @ s[b + "mlp.fc2.weight"].T + s[b + "mlp.fc2.bias"]
    tokens, row = vit(image)
    torch.testing.assert_close(tokens, norm(x, "norm"))
    torch.testing.assert_close(row, A[:, :, 0])


def test_the_position_table_is_sampled_with_dinos_scale_factor():
    vit = small_vit()
    for H, W, same in ((64, 64, True), (32, 128, False), (40, 72, False), (100, 70, False)):
        h, w = H // 8, W // 8
        table = vit.position_table(torch.zeros(1, 3, H, W))
        assert table.shape == (1, 1 + h * w, 48) and torch.equal(table[:, 0], vit.pos_embed[:, 0])
        assert (table is vit.pos_embed) == same
        if not same:
            grid = vit.pos_embed[:, 1:].view(1, 8, 8, 48).permute(0, 3, 1, 2)
            exact = F.interpolate(grid, size=(h, w), mode="bicubic").flatten(2).transpose(1, 2)
            shifted = F.interpolate(grid, scale_factor=((h + 0.1) / 8, (w + 0.1) / 8), mode="bicubic").flatten(2).transpose(1, 2)
            assert torch.equal(table[:, 1:], shifted) and not torch.allclose(table[:, 1:], exact, atol=1e-3)


def test_vits8_has_dinos_150_tensors_and_21670272_parameters():
    with torch.device("meta"):
        state = model.VisionTransformer(**model.BACKBONES["vits8"][0]).state_dict()
    assert len(state) == 150 and sum(t.numel() for t in state.values()) == 21_670_272
    assert {"cls_token", "pos_embed", "patch_embed.proj.bias", "blocks.11.mlp.fc2.weight", "norm.bias"} <= state.keys()


def test_decoder_logits_are_normalised_products_of_patches_and_classes():
    torch.manual_seed(0)
    decoder, tokens = model.MaskTransformer(48, 5, width=32, heads=4).eval(), randn(2, 12, 48)
    logits, c = decoder(tokens)
    assert logits.shape == (2, 5, 12) and c.shape == (2, 5, 32)
    torch.testing.assert_close(c.norm(dim=2), torch.ones(2, 5))
    x = torch.cat([decoder.proj_dec(tokens), decoder.cls_emb.expand(2, -1, -1)], 1)
    for block in decoder.blocks:
        x = block(x)
    z = F.normalize(decoder.decoder_norm(x)[:, :12] @ decoder.proj_patch, dim=2)
    products = torch.einsum("bpd,bnd->bpn", z, c)
    torch.testing.assert_close(logits.transpose(1, 2), F.layer_norm(products, (5,)))


def test_the_untrained_network_is_dino_and_aspp_sees_what_the_last_attention_adds():
    vit, image = small_vit(), randn(2, 3, 64, 96)
    network, seen = model.DMSA(vit, 4).eval(), []
    with torch.no_grad():
        x, msa = network.features(image)
        assert x.shape == msa.shape == (2, 48, 8, 12)
        decoded, _ = network.student.decoder(vit(image)[0][:, 1:])
        torch.testing.assert_close(network(image).flatten(2), decoded, rtol=1e-4, atol=1e-5)
        network.student.aspp.register_forward_pre_hook(lambda m, args: seen.append(args))
        network(image, (1, 1, 2, 3))
        last, trunk = vit.blocks[-1], vit.trunk(image)
        expected = last.attn(last.norm1(trunk))[:, 1:].transpose(1, 2).unflatten(2, (8, 12))
        torch.testing.assert_close(seen[0][0], expected)
        assert seen[0][1] == (1, 1, 2, 3)


def test_only_aspp_and_decoder_train_and_aspp_does_get_a_gradient():
    network = model.DMSA(small_vit(), 4).train()
    logits, c = network.decode(network.student, network.features(randn(2, 3, 64, 64)), (1, 1, 2, 3))
    (logits.square().mean() + c.sum()).backward()
    assert all(p.grad is None for p in (*network.vit.parameters(), *network.teacher.parameters()))
    assert network.student.aspp.project.weight.grad.abs().max() > 0
    assert not network.teacher.training and not network.vit.training and network.student.training


def test_the_rates_change_what_the_network_sees_once_aspp_is_trained():
    network = model.DMSA(small_vit(), 4).eval()
    nn.init.normal_(network.student.aspp.project.weight, std=0.1)
    image = randn(1, 3, 64, 64)
    assert (network(image, (1, 1, 2, 3)) - network(image, (1, 6, 12, 18))).abs().max() > 1e-2


def test_the_teacher_is_the_moving_average_with_warm_up():
    network = model.DMSA(small_vit(), 3, momentum=0.6)
    average, p = None, network.student.decoder.cls_emb
    for t in range(6):
        p.data = randn(*p.shape, seed=t)
        network.teacher.update_parameters(network.student)
        m = min(1 - 1 / (t + 1), 0.6)
        average = p.detach().clone() if average is None else m * average + (1 - m) * p.detach()
        torch.testing.assert_close(network.teacher.module.decoder.cls_emb.detach(), average)


def test_weights_load_strictly_from_flat_and_full_checkpoints_in_any_float_type(tmp_path):
    vit = small_vit()
    torch.save({k: v.half() for k, v in vit.state_dict().items()}, tmp_path / "flat.pt")
    wrapped = {f"module.backbone.{k}": v for k, v in vit.state_dict().items()} | {"module.head.mlp.0.weight": torch.zeros(2)}
    torch.save({"teacher": wrapped, "student": {}, "epoch": 3}, tmp_path / "full.pt")
    for name, tolerance in (("flat.pt", 1e-3), ("full.pt", 0)):
        other = small_vit(seed=9)
        digest = model.load_dino(other, tmp_path / name)
        assert digest == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for k, v in vit.state_dict().items():
            torch.testing.assert_close(other.state_dict()[k], v, rtol=tolerance, atol=tolerance)


class Payload:
    def __reduce__(self):
        return os.system, ("echo this must never run",)


def test_weights_that_do_not_fit_or_are_no_weights_are_named(tmp_path):
    vit, state = small_vit(), small_vit().state_dict()
    cases = {"patch.pt": (state | {"patch_embed.proj.weight": torch.zeros(48, 3, 16, 16)}, "patch_embed.proj.weight"),
             "missing.pt": ({k: v for k, v in state.items() if k != "norm.bias"}, "norm.bias"),
             "extra.pt": (state | {"head.weight": torch.zeros(1)}, "head.weight"),
             "code.pt": ({"a": Payload()}, "not a file of plain tensors"), "list.pt": ([1, 2], "no state dict")}
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path / name)
    torch.save(state, tmp_path / "short.pt")
    (tmp_path / "short.pt").write_bytes((tmp_path / "short.pt").read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("hello")
    for name, message in [(n, m) for n, (_, m) in cases.items()] + [("short.pt", "damaged"), ("text.pt", "damaged"), ("none.pt", "No such file")]:
        with pytest.raises(model.WeightsError, match=re.escape(message)) as error:
            model.load_dino(vit, tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


def test_the_shipped_weights_are_small_plain_and_load():
    vit, file, digest = model.backbone("tiny")
    assert os.path.getsize(file) < 4e6 and len(digest) == 64
    assert vit(torch.zeros(1, 3, 96, 96))[0].shape == (1, 145, vit.embed_dim)


# ----------------------------------------------------------------------------
# eval.py


def test_confusion_counts_truth_in_rows_and_leaves_void_out():
    label = np.array([[0, 1, 2], [255, 2, 2]], np.uint8)
    prediction = np.array([[0, 0, 2], [1, 1, 2]], np.uint8)
    assert evaluation.confusion_matrix(label, prediction, 3).tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 2]]
    assert evaluation.confusion_matrix(np.array([-1, 1]), np.array([0, 1]), 3).sum() == 1


def test_hungarian_finds_the_best_of_all_assignments():
    from itertools import permutations
    for seed in range(5):
        c = np.random.default_rng(seed).integers(0, 50, (5, 5))
        best = max(permutations(range(5)), key=lambda a: sum(c[a[k], k] for k in range(5)))
        found = evaluation.hungarian(c)
        assert sorted(found) == list(range(5)) and sum(c[found[k], k] for k in range(5)) == sum(c[best[k], k] for k in range(5))


def test_miou_is_unchanged_by_permuting_clusters():
    c = np.random.default_rng(0).integers(0, 90, (6, 6))
    first, second = evaluation.scores(c), evaluation.scores(c[:, [3, 5, 0, 1, 4, 2]])
    assert first["miou"] == second["miou"] and first["accuracy"] == second["accuracy"]
    assert second["assignment"].tolist() == first["assignment"][[3, 5, 0, 1, 4, 2]].tolist()


def test_absent_classes_are_left_out_and_only_predicted_ones_count_zero():
    c = np.zeros((4, 4), int)
    c[0, 0], c[0, 3], c[1, 1] = 8, 2, 10                  # class 2 nowhere, class 3 only predicted
    s = evaluation.scores(c)
    assert np.isnan(s["iou"][2]) and s["iou"][3] == 0
    assert s["miou"] == pytest.approx((80 + 100 + 0) / 3) and s["accuracy"] == pytest.approx(90)
    assert s["clusters"] == 3


def test_collapse_shows_in_clusters_and_entropy():
    one, all_ = np.zeros((4, 4), int), np.full((4, 4), 5)
    one[:, 2] = 7
    assert (evaluation.scores(one)["clusters"], evaluation.scores(one)["entropy"]) == (1, 0)
    assert evaluation.scores(all_)["clusters"] == 4 and evaluation.scores(all_)["entropy"] == pytest.approx(1)


def test_groups_of_any_number_of_processes_cover_all_images_once():
    for n in (1, 16, 33, 100):
        for world in (1, 2, 3, 7):
            parts = [g for rank in range(world) for g in evaluation.groups(n, rank, world)]
            assert sorted(i for g in parts for i in g) == list(range(n))
            assert set(parts) == set(evaluation.groups(n))


# ----------------------------------------------------------------------------
# train.py: schedule and options


def test_teacher_age_is_transfgus_counter_and_emas_epochs_since_the_start():
    args = train.parse(["--data", "voc", "--teacher", "reset"])
    assert train.replacements(100, 5, [5, 5, 5, 5, 4, 4, 4, 4, 4, 3])[:10] == [5, 10, 15, 20, 25, 30, 35, 40, 44, 48]
    assert [train.teacher_age(args, e) for e in range(1, 13)] == [None] * 5 + [0, 1, 2, 3, 4, 0, 1]
    args = train.parse(["--data", "voc"])
    assert [train.teacher_age(args, e) for e in (1, 5, 6, 7)] == [None, None, 0, 1]
    assert train.teacher_age(train.parse(["--no-teacher"]), 50) is None
    assert [losses.permutation_weight(t) for t in (0, 1, 7, 50)] == [0.03, 0.04, 0.1, 0.1]


def test_presets_are_the_rows_of_the_tables():
    dmsa, transfgu, released = (train.parse(["--data", "voc", "--preset", p]) for p in ("dmsa", "transfgu", "released"))
    assert (dmsa.aspp, dmsa.par, dmsa.teacher, dmsa.teacher_weight, dmsa.lambdas) == ("dynamic", [1, 2, 4, 8], "ema", 0.7, [0.3, 1, 0.3, 1])
    assert (transfgu.aspp, transfgu.par, transfgu.teacher, transfgu.teacher_weight, transfgu.lambdas[0]) == ("none", [], "reset", 0.5, 0)
    assert (released.aspp, released.par, released.teacher, released.teacher_weight, released.lambdas[0]) == ("none", [], "reset", 0.7, 0.3)
    assert train.parse(["--preset", "released", "--static-aspp"]).aspp == "static"       # an option goes before the preset


# ----------------------------------------------------------------------------
# train.py as a program: processes, resuming, signals. Tiny runs on the CPU with gloo.

RUN = ["--limit", "12", "--epochs", "3", "--batch", "6", "--size", "64", "--teacher-start", "1", "--device", "cpu"]


def program(name, *args, world=1, env=None, wait=True, cwd=HERE):
    """Start `world` processes of a program of this repository; returns [(exit code, output)] or the processes."""
    port = str(20_000 + (os.getpid() * 7 + int(time.time() * 1000)) % 20_000)
    started = []
    for rank in range(world):
        variables = dict(os.environ, OMP_NUM_THREADS="1", **(env or {}))
        if world > 1:
            variables |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        started.append(subprocess.Popen([sys.executable, str(HERE / name), *map(str, args)], cwd=cwd, env=variables, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    return [(p.wait(timeout=300), p.stdout.read()) for p in started] if wait else started


def train_run(folder, *extra, world=1):
    ended = program("train.py", *RUN, "--out", folder / "run", *extra, world=world)
    assert [code for code, _ in ended] == [0] * world, ended
    return evaluation.load_checkpoint(folder / "run" / "last.pt"), log_values(folder / "run")


def log_values(run):
    timing = {"images_per_s", "data_wait", "peak_gb"}
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in (run / "log.jsonl").read_text().splitlines()]


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
    assert [(r["epoch"], r["step"]) for r in log] == [(1, 1), (1, 2), (2, 3), (2, 4), (3, 5), (3, 6)]
    assert all({"seg", "ce", "un", "cls", "all", "rates", "lr"} <= r.keys() for r in log)
    assert all({"miou", "accuracy", "clusters", "entropy", "cam_miou"} <= r.keys() for r in log[1::2])
    assert [r["rates"] for r in log[::2]] == [[1, 1, 2, 3], [1, 1, 3, 5], [1, 1, 2, 3]]
    for r in log:
        assert r["all"] == pytest.approx(sum(w * r[k] for w, k in zip(checkpoint["args"]["lambdas"], ("seg", "ce", "un", "cls"))), abs=1e-5)
    assert checkpoint["epoch"] == 3 and checkpoint["rates"] == [1, 1, 2, 3]


@pytest.mark.parametrize("world, accumulate", [(2, 1), (3, 2), (1, 3)])
def test_any_number_of_processes_and_parts_gives_the_same_run(uninterrupted, tmp_path, world, accumulate):
    """Caches bitwise; losses and weights up to the order of float32 sums, which Adam's division can enlarge."""
    folder, checkpoint, log = uninterrupted
    other, other_log = train_run(tmp_path, "--accumulate", str(accumulate), world=world)
    caches = sorted(p.name for p in (folder / "cache").iterdir())
    assert caches == sorted(p.name for p in (tmp_path / "cache").iterdir()) and len(caches) == 7
    for name in caches:
        assert (folder / "cache" / name).read_bytes() == (tmp_path / "cache" / name).read_bytes(), name
    for a, b in zip(log, other_log):
        for key in ("seg", "ce", "un", "cls", "all"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), (a["step"], key)
    assert log[1]["miou"] == pytest.approx(other_log[1]["miou"], abs=0.05)
    for k, v in checkpoint["student"].items():
        torch.testing.assert_close(other["student"][k], v, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kill, world", [(signal.SIGKILL, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_an_interrupted_run_ends_bitwise_as_the_uninterrupted_one(uninterrupted, tmp_path, kill, world):
    if world == 1:
        _, checkpoint, log = uninterrupted
    else:
        (tmp_path / "whole").mkdir()
        checkpoint, log = train_run(tmp_path / "whole", world=world)
    run = tmp_path / "cut" / "run"
    started = program("train.py", *RUN, "--out", run, world=world, wait=False)
    end = time.time() + 120
    while time.time() < end and not ((run / "log.jsonl").exists() and len((run / "log.jsonl").read_text().splitlines()) >= 3):
        time.sleep(0.002)
    started[-1].send_signal(kill)                         # one process is told; all have to leave
    codes = [p.wait(timeout=60) for p in started]
    if kill != signal.SIGKILL:
        assert codes == [128 + kill] * world, [p.stdout.read() for p in started]
        evaluation.load_checkpoint(run / "last.pt")
    (run / "last.pt.part").write_bytes(b"half a checkpoint")     # what a kill during a save leaves behind
    resumed, resumed_log = train_run(tmp_path / "cut", world=world)
    assert resumed_log == log
    assert same(resumed, checkpoint)


def test_a_finished_run_says_so_and_changes_nothing(uninterrupted):
    folder, _, _ = uninterrupted
    before = (folder / "run" / "last.pt").stat().st_mtime_ns
    (code, text), = program("train.py", *RUN, "--out", folder / "run")
    assert code == 0 and "finished" in text and (folder / "run" / "last.pt").stat().st_mtime_ns == before


def test_resuming_with_another_option_is_refused_with_its_name(uninterrupted):
    folder, _, _ = uninterrupted
    (code, text), = program("train.py", *RUN, "--out", folder / "run", "--lr", "0.5", "--epochs", "4")
    assert code == 2 and "--lr" in text and "0.5" in text and "Traceback" not in text


def test_scores_do_not_depend_on_how_the_images_are_shared(uninterrupted):
    _, checkpoint, _ = uninterrupted
    network, source = evaluation.restore(checkpoint), data.Shapes("val", 5)
    images = np.stack([data.squash(source.image(i), 64) for i in range(37)])
    labels = np.stack([data.squash(source.label(i), 64, "nearest") for i in range(37)])
    whole = evaluation.evaluate(network, images, labels, (1, 1, 2, 3))
    for world in (2, 3):
        parts = [evaluation.evaluate(network, images, labels, (1, 1, 2, 3), rank=r, world=world) for r in range(world)]
        assert torch.equal(sum(parts), whole)
    assert whole.sum() == labels.size


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    train.save({"a": torch.ones(3)}, tmp_path / "last.pt")

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(train.RunError, match="No space left.*one before is kept"):
        train.save({"a": torch.zeros(3)}, tmp_path / "last.pt")
    monkeypatch.undo()
    assert torch.load(tmp_path / "last.pt", weights_only=True)["a"].sum() == 3
    assert os.listdir(tmp_path) == ["last.pt"]


def test_checkpoints_that_are_truncated_foreign_or_carry_code_are_named(tmp_path, uninterrupted):
    folder, _, _ = uninterrupted
    (tmp_path / "short.pt").write_bytes((folder / "run" / "last.pt").read_bytes()[:100_000])
    torch.save({"x": Payload()}, tmp_path / "code.pt")
    torch.save({"x": 1}, tmp_path / "other.pt")
    for name in ("short.pt", "code.pt", "other.pt", "none.pt"):
        (code, text), = program("eval.py", tmp_path / name)
        assert code == 2 and name in text and "Traceback" not in text and "must never run" not in text, text


def test_a_loss_that_is_not_finite_is_named_with_step_and_samples():
    head, source = model.Head(16, 3), data.Shapes("train")
    gradients = [torch.zeros_like(p) for p in head.parameters()]
    train.check_finite({"seg": 1.0, "ce": 2.0}, gradients, head, 7, [1], source)
    with pytest.raises(FloatingPointError, match=r"step 7: ce not finite.*\(0, 0, 1\)"):
        train.check_finite({"seg": 1.0, "ce": float("nan")}, gradients, head, 7, [1], source)
    gradients[0][0] = float("inf")
    with pytest.raises(FloatingPointError, match="gradient of aspp"):
        train.check_finite({"seg": 1.0}, gradients, head, 7, [1], source)


def test_a_run_with_bad_numbers_stops_on_all_processes_and_keeps_its_checkpoint(tmp_path, uninterrupted):
    folder, _, _ = uninterrupted
    shutil.copytree(folder / "run", tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    state["student"]["decoder.cls_emb"][:] = float("nan")
    torch.save(state, tmp_path / "run" / "last.pt")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    ended = program("train.py", *RUN[:3], "4", *RUN[4:], "--out", tmp_path / "run", world=2)
    assert [code for code, _ in ended] == [1, 1] and all("step 7" in text and "seg" in text and "samples" in text for _, text in ended), ended
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


@pytest.mark.parametrize("args, message", [
    (["--data", "voc", "--root", "nowhere"], "nowhere/VOCdevkit/VOC2012: no such folder"),
    (["--weights", "none.pt"], "none.pt"), (["--batch", "7", "--accumulate", "2"], "not divisible"),
    (["--batch", "4096"], "larger than an epoch"), (["--epochs", "0"], "at least 1"), (["--backbone", "resnet"], "invalid choice"),
    (["--size", "100"], "multiple of"), (["--momentum", "1.5"], "between 0 and 1"), (["--out", "/proc/nowhere"], "cannot write there"),
    (["--device", "cuda"], "no GPU" if not torch.cuda.is_available() else "")])
def test_what_a_user_got_wrong_is_one_line_and_exit_code_2(tmp_path, args, message):
    out = [] if "--out" in args else ["--out", tmp_path / "run"]
    (code, text), = program("train.py", "--limit", "4", *out, *args)
    if message:
        assert code == 2 and message in text and "Traceback" not in text, text


def test_a_process_that_fails_takes_the_others_down(tmp_path):
    started = program("train.py", *RUN[:3], "50", *RUN[4:], "--out", tmp_path / "run", world=2, wait=False)
    end = time.time() + 120
    while time.time() < end and not ((tmp_path / "run" / "log.jsonl").exists() and (tmp_path / "run" / "log.jsonl").read_text()):
        time.sleep(0.01)
    started[1].kill()
    assert started[0].wait(timeout=60) != 0
    evaluation_output = started[0].stdout.read()
    assert "Traceback" not in evaluation_output, evaluation_output


def test_predictions_have_the_images_own_size_and_class_indices(uninterrupted, tmp_path):
    folder, checkpoint, _ = uninterrupted
    (tmp_path / "in" / "sub").mkdir(parents=True)
    Image.fromarray(data.shapes(1, 96)[0]).resize((75, 50)).save(tmp_path / "in" / "a.png")
    Image.fromarray(data.shapes(2, 96)[0]).convert("CMYK").resize((33, 91)).save(tmp_path / "in" / "sub" / "b.jpg")
    for extra in ([], ["--native"], ["--par"]):
        (code, text), = program("eval.py", folder / "run" / "best.pt", "--predict", tmp_path / "in", "--out", tmp_path / "out", *extra)
        assert code == 0, text
        for name, size in (("a", (75, 50)), ("sub/b", (33, 91))):
            with Image.open(tmp_path / "out" / f"{name}.png") as mask:
                assert mask.mode == "P" and mask.size == size and np.array(mask).max() < 6
                assert mask.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
            assert Image.open(tmp_path / "out" / f"{name}_overlay.png").size == size
    assert (tmp_path / "out" / "legend.png").exists()


def test_eval_prints_the_scores_of_the_log_and_draws_its_pictures(uninterrupted, tmp_path):
    folder, checkpoint, log = uninterrupted
    (code, text), = program("eval.py", folder / "run" / "last.pt", "--limit", "12")
    assert code == 0 and f"mIoU {log[-1]['miou']:.2f}  accuracy {log[-1]['accuracy']:.2f}" in text, text
    Image.fromarray(data.shapes(1, 96)[0]).save(tmp_path / "photo.png")
    for args in (["--explain", tmp_path / "photo.png", "--picture", tmp_path / "a.png"],
                 ["--compare", folder / "run" / "best.pt", "--picture", tmp_path / "b.png"]):
        (code, text), = program("eval.py", folder / "run" / "last.pt", *args)
        assert code == 0 and Image.open(args[-1]).size[0] > 300, text


def test_a_folder_of_photographs_trains_and_predicts_without_labels(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(8):
        Image.fromarray(data.shapes(i)[0]).resize((90 + i, 80)).save(tmp_path / "in" / f"{i}.jpg")
    (code, text), = program("train.py", "--data", "folder", "--root", tmp_path / "in", "--classes", "3", "--backbone", "tiny",
                            "--size", "64", "--batch", "4", "--epochs", "1", "--out", tmp_path / "run")
    assert code == 0 and (tmp_path / "run" / "panels.png").exists(), text
    (code, text), = program("eval.py", tmp_path / "run" / "last.pt")
    assert code == 2 and "--predict" in text
    (code, text), = program("eval.py", tmp_path / "run" / "last.pt", "--predict", tmp_path / "in", "--out", tmp_path / "out")
    assert code == 0 and len(list((tmp_path / "out").glob("*_overlay.png"))) == 8, text


# ----------------------------------------------------------------------------
# The files by themselves


@pytest.mark.parametrize("names", [("aspp",), ("par",), ("losses",), ("cam",), ("data",), ("model", "aspp")])
def test_a_concept_file_works_alone_in_an_empty_folder(tmp_path, names):
    for name in names:
        shutil.copy(HERE / f"{name}.py", tmp_path)
    start = time.time()
    ended = subprocess.run([sys.executable, f"{names[0]}.py"], cwd=tmp_path, capture_output=True, text=True,
                           env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0 and ended.stdout.strip() and time.time() - start < 60, ended.stderr
    for picture in tmp_path.glob("*.png"):
        assert Image.open(picture).size[0] > 300


def test_nothing_but_torch_numpy_pillow_scipy_and_the_standard_library_is_imported():
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "PIL", "scipy"} | {p.stem for p in HERE.glob("*.py")}
    for file in [*HERE.glob("*.py"), *HERE.glob("tools/*.py")]:
        for line in file.read_text().splitlines():
            found = re.match(r"\s*(?:from|import) (\w+)", line)
            if found and file.name != "test_all.py" and '"' not in line:
                assert found[1] in allowed, (file.name, line)


def test_nothing_executable_is_loaded_from_disk():
    for file in [*HERE.glob("*.py"), *HERE.glob("tools/*.py")]:
        if file.name != "test_all.py":
            text = file.read_text()
            assert "pickle" not in text.replace("no pickle", "") and "strict=False" not in text
            assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^\n]*", text)), file.name
