"""TransFGU, and DMSA as its authors released it, in the form of train.py, so that all are measured alike.

    python tools/transfgu.py --data voc                   # TransFGU
    python tools/transfgu.py --released --data voc        # DMSA's released code: with L_seg, teacher 0.7
    torchrun --nproc_per_node=6 tools/transfgu.py --data voc

All options of train.py, which has the same batches, losses and loop. What differs (docs/decisions.md, "What
the released code does"): no ASPP, no PAR; labels and losses have the crop's patches, not its pixels; CAM is
scaled by the crop; the decoder has dropout, so that the result depends on how a batch is cut; and the teacher
is no average: every few epochs it becomes the student, and the student starts anew.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    import start                                          # before torch

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cam                                                # noqa: E402
import data                                               # noqa: E402
import train                                              # noqa: E402
from losses import confident_patches, pixel_counts, pseudo_masks                      # noqa: E402
from model import Head, normalise                         # noqa: E402

DROPOUT = 0.1                                             # in the decoder, while it trains
# Epochs between two replacements of the teacher in epochs 1 to 10, 11 to 20 ...; the last one goes on
INTERVALS = {"shapes": (2,), "voc": (5, 5, 5, 5, 4, 4, 4, 4, 4, 3), "voc-aug": (5, 5, 5, 5, 4, 4, 4, 4, 4, 3),
             "coco80": (3, 3, 3, 2), "cocostuff27": (2,), "folder": (5, 5, 5, 5, 4, 4, 4, 4, 4, 3)}


def replacements(epochs, start, intervals):
    """The epochs up to `epochs`, from 1, before which the teacher is replaced.

    start       epochs without a teacher
    intervals   as INTERVALS has them. The teacher is replaced before an epoch if epoch - 1 is a multiple of
                its interval. For VOC: 6, 11, 16, 21 ...
    """
    return [epoch for epoch in range(start + 1, epochs + 1)
            if (epoch - 1) % intervals[min((epoch - 1) // 10, len(intervals) - 1)] == 0]


class TransFGU(train.Trainer):
    may_differ = train.Trainer.may_differ - {"accumulate"}                        # because of dropout

    def __init__(self, args, vit, source, inputs, device):
        super().__init__(args, vit, source, inputs, device)
        self.replaced = None                              # epoch of the last replacement in this process
        add_dropout(self.network.student.decoder)

    def teacher_age(self, epoch):
        """Epochs since the teacher was last replaced; None before the first time."""
        replaced = replacements(epoch, self.args.teacher_start, self.args.intervals)
        return epoch - replaced[-1] if replaced else None

    def replace_teacher(self):
        """The teacher becomes the student, the student gets its first weights; Adam's state is kept."""
        self.network.teacher.load_state_dict(self.network.student.state_dict())
        torch.manual_seed(self.args.seed)                 # as in Trainer.__init__
        fresh = Head(self.network.vit.embed_dim, train.n_channels(self.source), use_aspp=False)
        self.network.student.load_state_dict(fresh.state_dict())

    @torch.no_grad()
    def pseudo_labels(self, micro_batches, epoch):
        """As Trainer.pseudo_labels, but of patches: CAM, scaled by the crop, and the teacher; no PAR."""
        args, network, background = self.args, self.network, self.source.background
        if self.teacher_age(epoch) == 0 and self.replaced != epoch:               # the epoch's first step
            self.replace_teacher()
            self.replaced = epoch
        targets = []
        for batch in micro_batches:
            image = data.crop(batch.image, batch.draws, args.crop)                # (b, 3, H, W) in 0..1
            cams = data.crop(batch.cams, batch.draws, args.crop // network.vit.patch_size, "area")
            cams = cam.min_max(cams)                                              # (b, K, h, w)
            seen = normalise(data.augment(image, batch.draws))                    # (b, 3, H, W)
            teacher_logits = None
            with self.low_precision():
                features = network.features(seen)
                if self.teacher_age(epoch) is not None:
                    logits, _ = network.decode(network.teacher, features, self.rates(epoch))
                    teacher_logits = logits.float()                               # (b, N, h, w)
            masks = pseudo_masks(cams, teacher_logits, args.teacher_weight, background, args.threshold)
            confident = confident_patches(cams, background, args.threshold)       # (b, h, w)
            targets.append(train.Target(features, masks.argmax(1), confident))
        N = train.n_channels(self.source)
        return targets, sum(pixel_counts(t.label, t.confident, N) for t in targets)

    def train_step(self, targets, counts, epoch, step):
        """Trainer.train_step; each process and step has its own dropout, also in a run that goes on."""
        torch.manual_seed(self.args.seed + 1009 * step + 31 * train.RANK)
        return super().train_step(targets, counts, epoch, step)


def add_dropout(decoder):
    """Dropout in the decoder's blocks: of attention weights, after attention, and twice in the MLP."""
    def attend(attn, q, k, v):
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=DROPOUT if attn.training else 0.0)
        return F.dropout(attn.proj(x.transpose(1, 2).flatten(2)), DROPOUT, attn.training)

    def drop_inputs(layer, inputs):
        return tuple(F.dropout(x, DROPOUT, layer.training) for x in inputs)

    def drop_output(layer, inputs, output):
        return F.dropout(output, DROPOUT, layer.training)

    for block in decoder.blocks:
        block.attn.attend = partial(attend, block.attn)
        block.mlp.fc2.register_forward_pre_hook(drop_inputs)
        block.mlp.fc2.register_forward_hook(drop_output)


def parse(argv=None):
    """Options of train.py with TransFGU's settings, or with those of DMSA's released code."""
    p = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    p.add_argument("--released", action="store_true", help="DMSA as its authors released it, not TransFGU")
    released = p.parse_known_args(argv)[0].released
    defaults = train.parse(argv, p)
    fixed = dict(aspp="none", par=[], teacher="reset")
    settings = dict(method="released", intervals=INTERVALS[defaults.data], balance="pixels")
    if not released:                                      # without L_seg
        settings |= dict(method="transfgu", teacher_weight=0.5, lambdas=[0.0, *defaults.lambdas[1:]])
    args = train.parse(argv, p, **fixed, **settings)
    del args.released                                     # args.method says it
    for name, value in fixed.items():
        if getattr(args, name) != value:
            p.error(f"--{name}: this method has no choice of it; leave it out")
    return args


if __name__ == "__main__":
    train.launch(parse(), TransFGU)
