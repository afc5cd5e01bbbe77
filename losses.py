"""The four losses of DMSA, their sum (Eq. 6), and the fusion of CAM and teacher before PAR (Fig. 2).

    L_all = lambda_1 L_seg + lambda_2 L_CE + lambda_3 L_un + lambda_4 L_cls

    with_background(), fuse() -> pseudo_masks(), confident_patches() (Fig. 2)
    cross_entropy(), permuted(), doubt(): a value for each pixel -> dmsa_losses(): their means (Eq. 6)
    then each loss by itself, for other projects

Plain functions of logits (B, N, H, W), labels (B, H, W) and class embeddings (B, N, D). N counts every class,
the background included where there is one (channel 0). Needs torch only: copy this file anywhere.
"Decision N" is row N of docs/decisions.md in the DMSA repository, which says what was chosen where the paper
is silent.

    python losses.py      # L_seg, L_CE, L_un on three cases, L_cls on two, to be checked by hand
"""

import torch
import torch.nn.functional as F

THRESHOLD = 0.1                                           # of the background channel, TransFGU's
VOID = 255                                                # label of pixels that do not count


# ----------------------------------------------------------------------------
# Fig. 2, top: CAM and teacher, fused. PAR refines what comes out, and its arg max is the pseudo label


def with_background(cam, threshold=THRESHOLD):
    """Put a background channel relu(threshold - max_k) before the maps: (B, K, h, w) -> (B, K + 1, h, w).

    cam in [0, 1]. The background wins where all maps are below threshold / 2, that is 0.05 (TransFGU).
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


def pseudo_masks(cam, teacher_logits, teacher_weight, background=True, threshold=THRESHOLD, hard=False):
    """Fig. 2 as far as PAR: the masks whose arg max, once they are refined, is the pseudo label.

    cam             (B, K, h, w)  in [0, 1]: scaled over the whole image, then cropped (decision 23)
    teacher_logits  (B, N, h, w), or None before the teacher takes part: CAM alone
    background      whether class 0 is background, N = K + 1; else N = K
    hard            CAM alone becomes 1 for the class of each patch and 0 for the others (decision 31): a
                    background of at most 0.1 would lose against classes of up to 1 when PAR averages both
    returns         (B, N, h, w)
    """
    masks = with_background(cam, threshold) if background else cam                # (B, N, h, w)
    if teacher_logits is not None:
        return fuse(masks, teacher_logits, teacher_weight)
    if hard:
        return torch.zeros_like(masks).scatter_(1, masks.argmax(1, keepdim=True), 1)
    return masks


def confident_patches(cam, background=True, threshold=THRESHOLD):
    """Where L_un counts: patches in which the CAM of some class exceeds the threshold (TransFGU).

    cam (B, K, h, w) in [0, 1] -> (B, h, w) bool; without a background all patches
    """
    if background:
        return cam.amax(1) > threshold
    return torch.ones_like(cam[:, 0], dtype=torch.bool)


# ----------------------------------------------------------------------------
# Maps (B, H, W), and their means.
#
# A batch may be spread over processes, and over micro-batches in one process. The mean over a batch is not
# the mean of its micro-batches' means. So a mean here divides by a number of pixels that the caller may give:
# with those of the whole batch (`pixel_counts`, added up over all micro-batches), the losses and gradients of
# the micro-batches add up to those of the batch in one piece.


def mean_over(values, pixels, n_pixels=None):
    """Mean of values (B, H, W) over the `pixels` (B, H, W) bool; 0, not NaN, where there are none.

    n_pixels   what the sum is divided by; default: how many `pixels` there are
    """
    if pixels.shape != values.shape:                      # broadcasting would hide it
        raise ValueError(f"pixels {tuple(pixels.shape)}: (B, H, W) = {tuple(values.shape)} expected")
    n_pixels = pixels.sum() if n_pixels is None else n_pixels
    return (values * pixels).sum() / torch.as_tensor(n_pixels).clamp(min=1)


def full(x):
    """Half precision -> float32, in which long sums neither overflow nor lose digits; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def cross_entropy(logits, label):
    """CE of each pixel, of which L_CE and L_seg are means: (B, N, H, W), (B, H, W) -> (B, H, W), void 0."""
    if label.shape != logits[:, 0].shape:
        raise ValueError(f"label {tuple(label.shape)}: (B, H, W) of logits {tuple(logits.shape)} expected")
    return F.cross_entropy(full(logits), label.long(), ignore_index=VOID, reduction="none")


def look_up(numbers, label, of_void):
    """The number of each pixel's class: numbers (N,), of void `of_void`; label (B, H, W) -> (B, H, W)."""
    void = label == VOID
    return numbers[label.long().masked_fill(void, 0)].masked_fill(void, of_void)


# alpha(t), the weight of L_CE's second term (`permuted`): t is 0 in the epoch in which the teacher begins to
# take part in the labels, 1 in the next; after 7 alpha stays
ALPHA = (0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1)


def permutation_weight(t):
    """alpha(t) of L_CE, `t` >= 0 epochs after the teacher began to take part."""
    return ALPHA[min(t, len(ALPHA) - 1)]


def permuted(ce_map, logits, label, permutation, alpha):
    """L_CE of each pixel: CE(logits, label) - alpha * CE(logits, permutation[label]), (B, H, W); void 0.

    The second term is TransFGU's and not in the paper (decision 12). permutation[label] is mostly a wrong
    class, and a pixel is rewarded for being unlike it. The permutation is a random one of all N classes, one
    for a batch; before the teacher takes part it is None, and there is no second term.

    ce_map  (B, H, W)  CE(logits, label): `cross_entropy`
    """
    if permutation is None:
        return ce_map
    wrong_label = look_up(permutation, label, VOID)                               # (B, H, W)
    return ce_map - alpha * cross_entropy(logits, wrong_label)


def doubt(logits):
    """1 - (p_1 - p_2), p_1 and p_2 the largest two of softmax(logits): (B, K, H, W), K >= 2 -> (B, H, W)."""
    if logits.shape[1] < 2:
        raise ValueError(f"logits {tuple(logits.shape)}: two classes at least have to compete")
    p = full(logits).softmax(1)
    p1, best = p.max(1, keepdim=True)                     # not topk, which a GPU does pixel by pixel
    p2 = p.scatter(1, best, 0).amax(1, keepdim=True)                              # (B, 1, H, W)
    return (1 - (p1 - p2))[:, 0]


def pixels_of_classes(label, N):
    """How many pixels each of N classes has: (B, H, W) -> (N,) int64."""
    of_pixel = label.long().masked_fill(label == VOID, N).flatten()
    n_pixels = of_pixel.new_zeros(N + 1)
    return n_pixels.scatter_add_(0, of_pixel, torch.ones_like(of_pixel))[:-1]     # bincount makes a GPU wait


def pixel_weights(n_pixels, is_thing, by_class):
    """What a pixel of each class weighs in L_seg: (N,); over all pixels the weights sum to 1.

    n_pixels   (N,) pixels of each class. In training they are the whole batch's, so that a crop without
               background adds nothing to that half, and its other pixels weigh as ever
    is_thing   (N,) bool, which classes are foreground. Foreground and background weigh one half each; if one
               of them has no pixel, the other weighs all
    by_class   in each half its classes weigh the same, whatever their pixels are (decision 13); else its
               pixels weigh the same, as in AFA
    """
    def weights_in(half):                                 # over the pixels of the half they sum to 1
        found = half & (n_pixels > 0)                     # (N,), its classes that occur
        if by_class:
            return found / (n_pixels * found.sum()).clamp(min=1)                  # (N,)
        return found / (n_pixels * found).sum().clamp(min=1)                      # (N,)

    of_things, of_others = weights_in(is_thing), weights_in(~is_thing)            # (N,) each
    n_halves = of_things.any().long() + of_others.any().long()
    return (of_things + of_others) / n_halves.clamp(min=1)


def similarity(class_embeddings):
    """Mean over the pairs i < j of 1 + cos(c_i, c_j): (B, N, D), N >= 2 -> (B,)."""
    N = class_embeddings.shape[1]
    if N < 2:
        raise ValueError(f"class embeddings {tuple(class_embeddings.shape)}: at least two classes expected")
    c = full(class_embeddings)
    # the decoder gives them a length of 1 but for rounding: a constant, without a gradient (TransFGU)
    unit = c / c.norm(dim=2, keepdim=True).detach()                               # (B, N, D)
    cosine = unit @ unit.transpose(1, 2)                                          # (B, N, N)
    i, j = torch.triu_indices(N, N, offset=1, device=c.device)
    return (1 + cosine[:, i, j]).mean(1)


# ----------------------------------------------------------------------------
# Eq. 6, for a micro-batch


def pixel_counts(label, confident, N):
    """What the means of Eq. 6 divide by: (2 + N,) int64, to be added up over the micro-batches of a batch.

    label     (B, H, W)  int64, of N classes
    confident (B, H, W)  bool
    returns   images (L_cls), confident pixels (L_un), pixels of each class (L_seg; together L_CE)
    """
    n_confident = confident.sum()
    n_images = torch.full_like(n_confident, len(label))
    return torch.cat([n_images[None], n_confident[None], pixels_of_classes(label, N)])


def dmsa_losses(logits, class_embeddings, label, confident, counts, is_thing, by_class, lambdas,
                background=True, permutation=None, alpha=0.0):
    """Eq. 6 for a micro-batch. Returns {"seg", "ce", "un", "cls", "all"}, each ().

    logits            (B, N, H, W)
    class_embeddings  (B, N, D)
    label             (B, H, W)     integers in 0..N-1, or 255
    confident         (B, H, W)     bool, pixels that count in L_un: those in whose patch the CAM of some
                                    class exceeds the threshold, 0.1; without a background all
    counts            (2 + N,)      `pixel_counts` of the whole batch
    is_thing, by_class              as for `pixel_weights`
    lambdas           lambda_1 .. lambda_4
    background        channel 0 is background, and does not compete in L_un: its softmax goes over the others
    permutation, alpha              as for `permuted`
    """
    n_images, n_confident, n_pixels = counts[0], counts[1], counts[2:]            # as `pixel_counts` has them
    ce_map = cross_entropy(logits, label)                                         # (B, H, W)
    weights = pixel_weights(n_pixels, is_thing, by_class)                         # (N,)
    seg = (ce_map * look_up(weights, label, 0)).sum()                             # L_seg
    ce_less_other = permuted(ce_map, logits, label, permutation, alpha)           # (B, H, W)
    ce = mean_over(ce_less_other, label != VOID, n_pixels.sum())                  # L_CE
    un_map = doubt(logits[:, 1:] if background else logits)                       # (B, H, W)
    un = mean_over(un_map, confident, n_confident)                                # L_un
    cls = similarity(class_embeddings).sum() / n_images                           # L_cls
    lambda_1, lambda_2, lambda_3, lambda_4 = lambdas
    total = lambda_1 * seg + lambda_2 * ce + lambda_3 * un + lambda_4 * cls       # Eq. 6
    return {"seg": seg, "ce": ce, "un": un, "cls": cls, "all": total}


# ----------------------------------------------------------------------------
# The same losses one by one, for a project that needs one of them. Training does not call these.


def cross_entropy_loss(logits, label, permutation=None, alpha=0.0):
    """L_CE of Eq. 6: the mean over pixels of CE(logits, label) - alpha * CE(logits, permutation[label]).

    logits       (B, N, H, W)
    label        (B, H, W)     integers in 0..N-1; pixels of value 255 do not count
    permutation  (N,)          int64; a class that stays in its place has the loss (1 - alpha) CE. None before
                               the teacher takes part: no second term
    alpha        weight of the second term (`permutation_weight`)
    returns      ()            negative where the other class is far less likely than the label
    """
    ce_map = cross_entropy(logits, label)                 # (B, H, W)
    return mean_over(permuted(ce_map, logits, label, permutation, alpha), label != VOID)


def segmentation_loss(logits, label, is_thing=None, by_class=False):
    """L_seg of Eq. 6: the mean CE over foreground and background, which weigh one half each (decision 13).

    logits      (B, N, H, W)
    label       (B, H, W)     integers in 0..N-1; pixels of value 255 do not count
    is_thing    (N,)          bool, which classes are foreground. Default: all but class 0
    by_class                  in each half its classes weigh the same; else its pixels, as in AFA
    returns     ()            a class, or a half, without a pixel does not count (AFA's is NaN then)
    """
    N = logits.shape[1]
    is_thing = torch.arange(N, device=logits.device) > 0 if is_thing is None else is_thing
    weights = pixel_weights(pixels_of_classes(label, N), is_thing, by_class)      # (N,)
    return (cross_entropy(logits, label) * look_up(weights, label, 0)).sum()


def uncertainty_loss(logits, confident):
    """L_un of Eq. 6: 1 - (p_1 - p_2), one minus the best two's gap, mean over confident pixels (TransFGU).

    logits     (B, K, H, W)  of the classes that compete, K >= 2: without the background channel
    confident  (B, H, W)     bool, pixels that count: `confident_patches`, enlarged
    returns    ()            in [0, 1]; 0, not NaN, without any such pixel
    """
    return mean_over(doubt(logits), confident)


def class_loss(class_embeddings):
    """L_cls of Eq. 6: mean over pairs i < j of 1 + cos(c_i, c_j), and over images (TransFGU).

    class_embeddings  (B, N, D)  N >= 2, of unit length, as the decoder gives them: the gradient takes the
                                 lengths for constants
    returns           ()         in [0, 2]; 2 when all classes are the same: collapse
    """
    return similarity(class_embeddings).mean()


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
        seg = segmentation_loss(logits, label)
        ce = cross_entropy_loss(logits, label)
        less_other = cross_entropy_loss(logits, label, torch.tensor([1, 2, 0]), 0.1)
        un = uncertainty_loss(logits[:, 1:], label > 0)
        print(f"{name:28}  {seg:.4f}  {ce:.4f}  {less_other:.4f}                  {un:.4f}")
    print("by hand: log 3 = 1.0986;  log 10 - log 8 = 0.2231, of the others log 10 = 2.3026;")
    print("         un: 1 - (1/2 - 1/2) = 1,  1 - (8/9 - 1/9) = 0.2222, the same when wrong")
    for name, c in embeddings.items():
        print(f"class embeddings {name:10}  cls {class_loss(c):.4f}")


if __name__ == "__main__":
    main()
