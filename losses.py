"""The four losses of DMSA, their sum (Eq. 6) and the fusion of CAM and teacher (Fig. 2).

    L_all = lambda_1 L_seg + lambda_2 L_CE + lambda_3 L_un + lambda_4 L_cls

    min_max(), with_background(), fuse() -> pseudo_label() (Fig. 2)
    cross_entropy() -> cross_entropy_loss(), segmentation_loss(); uncertainty_loss(), class_loss()
        -> dmsa_losses() (Eq. 6)

Plain functions of logits (B, N, H, W), labels (B, H, W) and class embeddings (B, N, D). N counts every class,
the background included where there is one (channel 0). Needs torch only: copy this file anywhere.
"Decision N" is row N of docs/decisions.md in the DMSA repository, which says what was chosen where the paper
is silent.

A batch may be spread over processes and over parts of one process. The mean over a batch is then not the mean
of its parts' means. So every loss is a sum divided by a `count` that the caller may give: with the counts of
the whole batch (`pixel_counts`, added up over its parts), the losses and gradients of the parts add up to
those of the batch in one piece.

    python losses.py      # L_seg, L_CE, L_un on three cases, L_cls on two, to be checked by hand
"""

import torch
import torch.nn.functional as F

THRESHOLD = 0.1                                           # of the background channel, TransFGU's
VOID = 255                                                # label of pixels that do not count
# alpha(t) of L_CE, t = 0 .. 7 epochs after the teacher began to take part, or with TransFGU's scheme after it
# was last replaced; from then on the last one
ALPHA = (0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1)


def permutation_weight(t):
    """alpha(t): weight of the permuted cross-entropy, `t` >= 0 epochs after the teacher began."""
    return ALPHA[min(t, len(ALPHA) - 1)]


# ----------------------------------------------------------------------------
# Pseudo label: CAM and teacher, fused (Fig. 2)


def min_max(cam):
    """Per image over all K maps: (B, K, h, w) of any scale -> [0, 1]. Constant maps become 0, not NaN."""
    low, high = cam.amin((1, 2, 3), keepdim=True), cam.amax((1, 2, 3), keepdim=True)
    return (cam - low) / (high - low).clamp(min=torch.finfo(cam.dtype).tiny)


def with_background(cam, threshold=THRESHOLD):
    """Put a background channel relu(threshold - max_k) before the maps: (B, K, h, w) -> (B, K + 1, h, w).

    cam in [0, 1]. The background wins where all maps are below threshold / 2 (TransFGU).
    """
    return torch.cat([F.relu(threshold - cam.amax(1, keepdim=True)), cam], dim=1)


def fuse(cam, teacher_logits, teacher_weight):
    """Fig. 2: (1 - teacher_weight) * CAM + teacher_weight * softmax(teacher); all (B, N, h, w).

    cam              one map a class, in [0, 1], as `with_background` gives them
    teacher_weight   0.7 for things, 0.5 where there is stuff (decision 11)
    """
    if cam.shape != teacher_logits.shape:
        raise ValueError(f"CAM {tuple(cam.shape)}, teacher {tuple(teacher_logits.shape)}: one shape expected")
    return (1 - teacher_weight) * cam + teacher_weight * teacher_logits.softmax(1)


def pseudo_label(cam, teacher_logits, refine, teacher_weight, background=True, threshold=THRESHOLD,
                 hard=False):
    """The upper half of Fig. 2: CAM, fused with the teacher, refined -> the label that the student learns.

    cam             (B, K, h, w)  in [0, 1], of `min_max`; see decision 23 for the image that it is taken of
    teacher_logits  (B, N, h, w), or None before the teacher starts: CAM alone
    refine          (B, N, h, w) -> (B, N, H, W), the size of the losses: PAR with the image, or an upsampling
    background      whether class 0 is background, N = K + 1; else N = K
    hard            before the teacher starts, `refine` gets 1 for the class of each patch and 0 for others,
                    not CAM itself: its background is at most `threshold`, its classes reach 1 (decision 31)
    returns         label (B, H, W) int64; confident (B, H, W) bool, the pixels of L_un: those where the CAM
                    of some class exceeds the threshold, or all pixels where there is no background
    """
    if background:
        confident = cam.amax(1, keepdim=True) > threshold                         # (B, 1, h, w)
        cam = with_background(cam, threshold)                                     # (B, N, h, w)
    else:
        confident = torch.ones_like(cam[:, :1], dtype=torch.bool)
    if teacher_logits is not None:
        masks = fuse(cam, teacher_logits, teacher_weight)
    else:
        masks = torch.zeros_like(cam).scatter_(1, cam.argmax(1, keepdim=True), 1) if hard else cam
    label = refine(masks).argmax(1)                                               # (B, H, W)
    return label, F.interpolate(confident.float(), size=label.shape[1:])[:, 0].bool()


# ----------------------------------------------------------------------------
# The four losses of Eq. 6


def full(x):
    """Half precision -> float32, in which long sums neither overflow nor lose digits; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def check_pixels(logits, **masks):
    """Raise ValueError where broadcasting would hide that a mask has not one value for each pixel."""
    for name, mask in masks.items():
        if mask.shape != logits[:, 0].shape:
            raise ValueError(f"{name} {tuple(mask.shape)}: (B, H, W) of {tuple(logits.shape)} expected")


def mean(total, count):
    """total / count; 0, not NaN, where nothing counts. count: a number or tensor."""
    return total / torch.as_tensor(count).clamp(min=1)


def cross_entropy(logits, label):
    """CE of each pixel, of which L_CE and L_seg are means: (B, N, H, W), (B, H, W) -> (B, H, W), void 0."""
    check_pixels(logits, label=label)
    return F.cross_entropy(full(logits), label.long(), ignore_index=VOID, reduction="none")


def cross_entropy_loss(logits, label, permutation=None, alpha=0.0, count=None, ce=None):
    """L_CE of Eq. 6: CE(logits, label) - alpha * CE(logits, permutation[label]), mean over pixels.

    The second term is TransFGU's and not in the paper (decision 12): a random permutation, one for a batch,
    mostly gives a class another, and a pixel is rewarded for being unlike the one that stands for its own.

    logits       (B, N, H, W)
    label        (B, H, W)     integers in 0..N-1; pixels of value 255 do not count
    permutation  (N,)          int64: a pixel of class n is pushed away from class permutation[n]; if that is
                               n, its loss is (1 - alpha) CE. None before the teacher starts: no second term
    alpha        weight of the second term (`permutation_weight`)
    count        pixels to divide by; default those that count
    ce           cross_entropy(logits, label), if it is known already
    returns      ()            negative where the wrong class is far less likely than the label
    """
    ce = cross_entropy(logits, label) if ce is None else ce                       # (B, H, W)
    valid = label != VOID
    if permutation is not None:
        wrong = permutation[label.long() * valid].masked_fill(~valid, VOID)
        ce = ce - alpha * cross_entropy(logits, wrong)
    return mean(ce.sum(), valid.sum() if count is None else count)


def segmentation_loss(logits, label, second=None, counts=None, ce=None):
    """L_seg of Eq. 6: the mean CE over each of two groups of pixels, of which each counts one half (AFA).

    logits    (B, N, H, W)
    label     (B, H, W)     integers in 0..N-1; pixels of value 255 do not count
    second    (B, H, W)     bool, the pixels of the second half; default label != 0, so that the halves are
                            background and foreground. Where there is stuff: stuff and things (decision 13)
    counts    pixels of the first and second half to divide by; default those of `label`
    ce        cross_entropy(logits, label), if it is known already
    returns   ()            an empty half counts 0 (AFA's is NaN)
    """
    second = label != 0 if second is None else second
    check_pixels(logits, second=second)
    ce = cross_entropy(logits, label) if ce is None else ce                       # (B, H, W)
    valid = label != VOID
    halves = (valid & ~second, valid & second)
    if counts is None:
        counts = [half.sum() for half in halves]
    return sum(mean((ce * half).sum(), n) for half, n in zip(halves, counts)) / 2


def uncertainty_loss(logits, confident, count=None):
    """L_un of Eq. 6: 1 - (p_1 - p_2), one minus the best two's gap, mean over confident pixels (TransFGU).

    logits     (B, K, H, W)  of the classes that compete, K >= 2: without the background channel
    confident  (B, H, W)     bool, pixels that count; `pseudo_label` gives those where the CAM of some class
                             exceeds the threshold, or all where there is no background
    count      pixels to divide by; default those of `confident`
    returns    ()            in [0, 1]; 0, not NaN, without any such pixel
    """
    check_pixels(logits, confident=confident)
    if logits.shape[1] < 2:
        raise ValueError(f"logits {tuple(logits.shape)}: two classes at least have to compete")
    p = full(logits).softmax(1)
    p1, best = p.max(1, keepdim=True)                     # not topk, which a GPU does pixel by pixel
    p2 = p.scatter(1, best, 0).amax(1, keepdim=True)                              # (B, 1, H, W)
    doubt = (1 - (p1 - p2))[:, 0] * confident
    return mean(doubt.sum(), confident.sum() if count is None else count)


def class_loss(class_embeddings, count=None):
    """L_cls of Eq. 6: mean over pairs i < j of 1 + cos(c_i, c_j), and over images (TransFGU).

    class_embeddings  (B, N, D)  of the decoder, unit length; N >= 2
    count             images to divide by; default B
    returns           ()         in [0, 2]; 2 when all classes are the same: collapse
    """
    B, N, _ = class_embeddings.shape
    if N < 2:
        raise ValueError(f"class embeddings {tuple(class_embeddings.shape)}: at least two classes expected")
    # divided by their lengths, so that this is a cosine in any case; no gradient through the lengths
    c = full(class_embeddings)
    c = c / c.norm(dim=2, keepdim=True).detach()
    cosine = c @ c.transpose(1, 2)                                                # (B, N, N)
    i, j = torch.triu_indices(N, N, offset=1, device=c.device)
    return (1 + cosine[:, i, j]).mean(1).sum() / (B if count is None else count)


def pixel_counts(label, confident, is_thing):
    """What the means of Eq. 6 divide by: (4,) int64, to be added up over the parts of a batch.

    label (B, H, W) int64; confident (B, H, W) bool; is_thing (N,) bool, the classes of L_seg's second half
    returns  images (L_cls), pixels of the first and of the second half (L_seg; together L_CE), confident
             pixels (L_un)
    """
    valid = label != VOID
    second = (is_thing[label.long() * valid] & valid).sum()
    return torch.stack([torch.full_like(second, len(label)), valid.sum() - second, second, confident.sum()])


def dmsa_losses(logits, class_embeddings, label, confident, counts, is_thing, lambdas, background=True,
                permutation=None, alpha=0.0):
    """Eq. 6 for one part of a batch. Returns {"seg", "ce", "un", "cls", "all"}, each ().

    logits (B, N, H, W), class_embeddings (B, N, D), label (B, H, W), confident (B, H, W) as above; counts
    (4,) of the whole batch; is_thing (N,) as in `pixel_counts`; lambdas (lambda_1 .. lambda_4). `background`:
    channel 0 is background and has no part in L_un.
    """
    n_images, n_first, n_second, n_confident = counts
    of_pixels, second = cross_entropy(logits, label), is_thing[label.long() * (label != VOID)]    # (B, H, W)
    seg = segmentation_loss(logits, label, second, (n_first, n_second), of_pixels)
    ce = cross_entropy_loss(logits, label, permutation, alpha, n_first + n_second, of_pixels)
    un = uncertainty_loss(logits[:, 1:] if background else logits, confident, n_confident)
    cls = class_loss(class_embeddings, n_images)
    lambda_1, lambda_2, lambda_3, lambda_4 = lambdas
    total = lambda_1 * seg + lambda_2 * ce + lambda_3 * un + lambda_4 * cls       # Eq. 6
    return {"seg": seg, "ce": ce, "un": un, "cls": cls, "all": total}


# ----------------------------------------------------------------------------
# The concept in one table


def main():
    """Print L_seg, L_CE, L_un of a 1 x 2 image (background, class 1) and three classes, and L_cls twice."""
    label = torch.tensor([[[0, 1]]])
    cases = {
        "undecided (all logits 0)": torch.zeros(3, 2),
        "right (log 8 at the label)": torch.tensor([[8.0, 1], [1, 8], [1, 1]]).log(),
        "wrong (log 8 at class 2)": torch.tensor([[1.0, 1], [1, 1], [8, 8]]).log(),
    }
    embeddings = {"orthogonal": torch.eye(3)[None], "collapsed": torch.ones(1, 3, 3)}
    print("logits                        seg     CE      CE - 0.1 CE(permuted)   un")
    for name, logits in cases.items():
        logits = logits.view(1, 3, 1, 2)
        seg, ce = segmentation_loss(logits, label), cross_entropy_loss(logits, label)
        permuted = cross_entropy_loss(logits, label, torch.tensor([1, 2, 0]), 0.1)
        un = uncertainty_loss(logits[:, 1:], label > 0)
        print(f"{name:28}  {seg:.4f}  {ce:.4f}  {permuted:.4f}                  {un:.4f}")
    print("by hand: log 3 = 1.0986;  log 10 - log 8 = 0.2231, of the others log 10 = 2.3026;")
    print("         un: 1 - (1/2 - 1/2) = 1,  1 - (8/9 - 1/9) = 0.2222, the same when wrong")
    for name, c in embeddings.items():
        print(f"class embeddings {name:10}  cls {class_loss(c):.4f}")


if __name__ == "__main__":
    main()
