"""DMSA's network: a DINO ViT (Eq. 2), Segmenter's decoder (Eq. 3), ASPP behind the last attention (Fig. 1).

    image (B, 3, H, W) --frozen blocks, last attention--> patch tokens x, msa (B, D, h, w)
                       --head: x + msa + 0.1 ASPP(msa), last MLP, norm, decoder--> logits (B, N, h, w)

The ViT is frozen; a head (ASPP and decoder) is what trains. Student and teacher are two heads on the same
features, the teacher the moving average of the student (Fig. 2).

    class VisionTransformer (Eq. 2) -> class MaskTransformer (Eq. 3) -> class DMSA (Fig. 1)
    -> weights: load_dino(), backbone() -> main()

Needs torch and aspp.py: copy both anywhere. "Decision N" is row N of docs/decisions.md in the DMSA
repository, which says what was chosen where the paper is silent.

    python model.py       # parameters and FLOPs of every backbone
"""

import argparse
import copy
import hashlib
import http.client
import io
import json
import math
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from aspp import ASPP

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, what DINO was trained with

SMALL = dict(embed_dim=384, depth=12, num_heads=6)
BASE = dict(embed_dim=768, depth=12, num_heads=12)
V2 = dict(img_size=518, patch_size=14)
V2_REG = V2 | dict(registers=4)
V3 = dict(patch_size=16, registers=4, rope=True)
BACKBONES = {                                             # name: (arguments of VisionTransformer, file)
    "tiny": (dict(img_size=96, patch_size=8, embed_dim=128, depth=5, num_heads=4), "assets/tiny.pt"),
    "vits8": (SMALL | dict(patch_size=8), "dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"),
    "vits16": (SMALL | dict(patch_size=16), "dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"),
    "vitb8": (BASE | dict(patch_size=8), "dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth"),
    "vitb16": (BASE | dict(patch_size=16), "dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"),
    "dinov2_vits14": (SMALL | V2, "dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"),
    "dinov2_vitb14": (BASE | V2, "dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth"),
    "dinov2_vits14_reg": (SMALL | V2_REG, "dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"),
    "dinov2_vitb14_reg": (BASE | V2_REG, "dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"),
    "dinov3_vits16": (SMALL | V3, None),                  # None: its authors mail it on request
    "dinov3_vitb16": (BASE | V3, None),
}


def normalise(image):
    """Image (B, 3, H, W), floats in 0..1 -> with ImageNet's mean at 0 and deviation at 1, as DINO has it."""
    if not image.is_floating_point():
        raise ValueError(f"image is {image.dtype}: floats in 0..1 expected, divide by 255")
    rgb = torch.tensor([MEAN, STD], dtype=image.dtype).to(image.device, non_blocking=True)        # (2, 3)
    mean, std = rgb.view(2, 3, 1, 1)
    return (image - mean) / std


def initialize(module):
    """Normal of deviation 0.02, cut at -2 and 2, for every linear layer; zero biases (as DINO, Segmenter)."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


# ----------------------------------------------------------------------------
# ViT (Eq. 2), with DINO's parameter names


class Attention(nn.Module):
    """Eq. 2: softmax(Q K^T / sqrt(d_k)) V in every head, then the output projection."""

    def __init__(self, dim, num_heads, qkv_bias=True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, angles=None):
        """x (B, n, D) -> (B, n, D); angles as in `split`."""
        return self.attend(*self.split(x, angles))

    def split(self, x, angles=None):
        """x (B, n, D) -> q, k, v, each (B, heads, n, d_k); angles: cos, sin (n, d_k) to turn q and k by."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if angles is not None:                            # DINOv3
            q, k = rotate(q, *angles), rotate(k, *angles)
        return q, k, v

    def attend(self, q, k, v):
        """q, k, v of `split` -> (B, n, D). The fused kernel never forms the n x n attention map."""
        x = F.scaled_dot_product_attention(q, k, v)                               # (B, heads, n, d_k)
        return self.proj(x.transpose(1, 2).flatten(2))


def rotate(x, cos, sin):
    """Rotary position (DINOv3): turn the pairs x_i, x_{i + d/2} of x (B, heads, n, d) by the angles."""
    a, b = x.float().chunk(2, dim=3)
    return (x * cos + torch.cat([-b, a], dim=3) * sin).to(x.dtype)


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention, x + MLP. DMSA cuts the last one open between the two."""

    def __init__(self, dim, num_heads, qkv_bias=True, eps=1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x, angles=None):
        x = x + self.attn(self.norm1(x), angles)
        return self.add_mlp(x)

    def add_mlp(self, x):
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """One linear map of every patch. Pixels beyond the last whole patch are dropped."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, image):
        return self.proj(image)                                                   # (B, D, h, w)


class VisionTransformer(nn.Module):
    """The ViT of DINO, DINOv2 and DINOv3: CLS, registers, patches; pre-norm blocks; final norm.

    img_size     side in pixels that the position table was learned for; other sizes interpolate it
    patch_size, embed_dim, depth, num_heads     ViT-S is 384 / 12 / 6, ViT-B 768 / 12 / 12
    registers    learned tokens that only take part in attention; `forward` does not return them
    rope         positions turn queries and keys in each block (DINOv3), and there is no table

    DINOv2's and v3's LayerScale needs no module: `load_vit` multiplies it into the layer before it.
    """

    def __init__(self, img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6, registers=0,
                 rope=False):
        super().__init__()
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.registers = registers
        eps = 1e-5 if rope else 1e-6
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, embed_dim))
        n_patches = (img_size // patch_size) ** 2
        self.pos_embed = None if rope else nn.Parameter(torch.zeros(1, 1 + n_patches, embed_dim))
        # see `angles`: of a head's d_k channels a half turns by rows, a half by columns, each in pairs, so
        # that there are d_k / 4 periods
        n = embed_dim // num_heads // 4
        self.register_buffer("periods", 100 ** (torch.arange(n) / n) if rope else None)   # decision 29
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, eps=eps) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=eps)
        initialize(self)
        for p in self.parameters(recurse=False):          # tokens, position table
            nn.init.trunc_normal_(p, std=0.02)

    def grid(self, image):
        """Rows and columns of patches in an image (B, 3, H, W)."""
        return image.shape[2] // self.patch_size, image.shape[3] // self.patch_size

    def position_table(self, image):
        """The position table for this image's size: (1, 1 + hw, D).

        Not interpolated for a square image of as many patches as it was learned for. Else bicubic: DINO and
        DINOv2 sample it with a scale factor of (h + 0.1) / side, which gives other tokens than h / side does;
        DINOv2 with registers by size, antialiased.
        """
        h, w = self.grid(image)
        side = math.isqrt(self.pos_embed.shape[1] - 1)    # rows and columns that it was learned for
        if h * w == side ** 2 and image.shape[2] == image.shape[3]:
            return self.pos_embed
        table = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if self.registers:
            table = F.interpolate(table, size=(h, w), mode="bicubic", antialias=True)
        else:
            scale = (h + 0.1) / side, (w + 0.1) / side
            table = F.interpolate(table, scale_factor=scale, mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)

    def angles(self, image):
        """cos, sin (n, d_k) of the angles by which `rotate` turns each token, or None with a position table.

        Row r of h has the coordinate 2 (r + 0.5) / h - 1, a column likewise; an angle is 2 pi times the
        coordinate over the period. CLS and registers are not turned: their angles are 0.
        """
        if self.periods is None:
            return None
        h, w = self.grid(image)
        rows = 2 * (torch.arange(h, device=image.device) + 0.5) / h - 1
        columns = 2 * (torch.arange(w, device=image.device) + 0.5) / w - 1
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=2)  # (h, w, 2)
        angle = 2 * math.pi * place[..., None] / self.periods                     # (h, w, 2, d_k / 4)
        angle = angle.flatten(2).flatten(0, 1)                                    # (hw, d_k / 2)
        angle = angle.tile(2)                             # (hw, d_k): both of a pair turn by the same angle
        angle = F.pad(angle, (0, 0, 1 + self.registers, 0))                       # (n, d_k)
        return angle.cos(), angle.sin()

    def prepare_tokens(self, image):
        """Normalised image (B, 3, H, W) -> CLS, registers, patches (B, n, D), n = 1 + registers + hw."""
        B = image.shape[0]
        patches = self.patch_embed(image).flatten(2).transpose(1, 2)              # (B, hw, D)
        x = torch.cat([self.cls_token.expand(B, -1, -1), patches], dim=1)         # (B, 1 + hw, D)
        if self.pos_embed is not None:
            x = x + self.position_table(image)
        if self.registers:                                # they have no position
            x = torch.cat([x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]], dim=1)
        return x

    def last_qkv(self, image):
        """All blocks but the last, and what its attention is made of: normalised image (B, 3, H, W) ->
        tokens before the last block (B, n, D); q, k, v (B, heads, n, d_k)."""
        x = self.prepare_tokens(image)
        angles = self.angles(image)
        for block in self.blocks[:-1]:
            x = block(x, angles)
        last = self.blocks[-1]
        return x, *last.attn.split(last.norm1(x), angles)

    def forward(self, image):
        """The whole ViT, as DINO runs it, for tools and other projects; Fig. 1 goes on from `last_qkv`.

        Takes a normalised image (B, 3, H, W), any size from one patch up. Returns the tokens after the last
        norm (B, 1 + hw, D), CLS first, and the CLS row of the last attention (B, heads, 1 + hw). Registers
        are left out of both; without any, a row sums to 1.
        """
        x, q, k, v = self.last_qkv(image)
        last = self.blocks[-1]                            # Block.forward, cut open at its attention
        x = x + last.attn.attend(q, k, v)
        x = self.norm(last.add_mlp(x))                                            # (B, n, D)
        row = (q[:, :, :1] @ k.transpose(2, 3) / math.sqrt(k.shape[3])).softmax(3).squeeze(2)
        first = 1 + self.registers                        # of the patches
        return (torch.cat([x[:, :1], x[:, first:]], dim=1),
                torch.cat([row[:, :, :1], row[:, :, first:]], dim=2))


# ----------------------------------------------------------------------------
# Segmenter's decoder (Eq. 3)


class MaskTransformer(nn.Module):
    """Patch tokens and class embeddings through a small transformer; their products are the masks (Eq. 3).

    dim        width of the encoder's tokens, D
    n_classes  N
    width      width inside, default dim
    depth      transformer blocks, without dropout (decision 22)
    heads      must divide the width; default: as many as that allows of 64 channels or more each
    """

    def __init__(self, dim, n_classes, width=None, depth=2, heads=None):
        super().__init__()
        width = width or dim
        self.n_classes = n_classes
        self.proj_dec = nn.Linear(dim, width)
        self.cls_emb = nn.Parameter(torch.zeros(1, n_classes, width))
        if heads is None:
            heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
        # no bias in qkv, and LayerNorm's usual eps, as in TransFGU's copy of Segmenter
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=False, eps=1e-5) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(width)
        self.proj_patch = nn.Parameter(torch.randn(width, width) * width ** -0.5)
        self.proj_classes = nn.Parameter(torch.randn(width, width) * width ** -0.5)
        self.mask_norm = nn.LayerNorm(n_classes)
        initialize(self)
        nn.init.trunc_normal_(self.cls_emb, std=0.02)

    def forward(self, patch_tokens):
        """patch_tokens (B, hw, D) -> logits (B, N, hw), class embeddings (B, N, width) of unit length.

        Eq. 3 divides z c^T by sqrt(D). Segmenter's code, followed here, gives both vectors unit length
        instead, and then puts a LayerNorm over the classes (decision 7). softmax(logits, dim=1) gives the
        masks of Eq. 3.
        """
        x = self.proj_dec(patch_tokens)                                           # (B, hw, width)
        x = torch.cat([x, self.cls_emb.expand(x.shape[0], -1, -1)], dim=1)        # (B, hw + N, width)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        z, c = x[:, :-self.n_classes], x[:, -self.n_classes:]
        z = F.normalize(z @ self.proj_patch, dim=2)                               # (B, hw, width)
        c = F.normalize(c @ self.proj_classes, dim=2)                             # (B, N, width)
        return self.mask_norm(z @ c.transpose(1, 2)).transpose(1, 2), c           # (B, N, hw), (B, N, width)


# ----------------------------------------------------------------------------
# The whole network (Fig. 1)


class Head(nn.Module):
    """What trains: ASPP (None without) and decoder. `DMSA.decode` puts them behind the frozen ViT."""

    def __init__(self, dim, n_classes, use_aspp=True):
        super().__init__()
        self.aspp = ASPP(dim, min(256, dim)) if use_aspp else None
        self.decoder = MaskTransformer(dim, n_classes)


class DMSA(nn.Module):
    """Frozen ViT, all of it, with a student and a teacher head.

    The student trains, all of it. The teacher is the moving average of the student's parameters over the
    optimizer's steps, from the first one on; in train.py's labels it takes part after some epochs (VOC: from
    epoch 6 on).

    vit        pretrained VisionTransformer; frozen here
    n_classes  N, background included
    use_aspp   without, a head is the decoder alone
    aspp_scale factor of what ASPP adds (decision 30)

    After each step of an optimizer on `student.parameters()`, call `update_teacher`.
    """

    def __init__(self, vit, n_classes, use_aspp=True, aspp_scale=0.1):
        super().__init__()
        self.aspp_scale = aspp_scale
        self.vit = vit.requires_grad_(False).eval()
        self.student = Head(vit.embed_dim, n_classes, use_aspp)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()

    def train(self, mode=True):
        super().train(mode)
        self.vit.eval()
        self.teacher.eval()
        return self

    @torch.no_grad()
    def features(self, image):
        """Normalised image (B, 3, H, W) -> x, msa (B, D, h, w): patch tokens before the last block and what
        its attention adds to them. Frozen, so student and teacher share one pass (decision 19)."""
        x, q, k, v = self.vit.last_qkv(image)                                     # x (B, n, D)
        msa = self.vit.blocks[-1].attn.attend(q, k, v)                            # (B, n, D), Eq. 2
        first = 1 + self.vit.registers                    # of the patch tokens; CLS and registers pass by
        grid = self.vit.grid(image)
        return tuple(t[:, first:].transpose(1, 2).unflatten(2, grid) for t in (x, msa))

    def decode(self, head, features, rates):
        """Fig. 1: Block.forward of the last block, cut open behind its attention for ASPP; then the decoder.

        head      self.student or self.teacher
        features  x, msa (B, D, h, w) of `features`
        rates     of `dilation_rates(epoch)`
        returns   logits (B, N, h, w); class embeddings (B, N, D), which L_cls moves apart (losses.py)
        """
        x, msa = features
        grid = x.shape[2:]
        x = x + msa                                                               # (B, D, h, w)
        if head.aspp is not None:
            x = x + self.aspp_scale * head.aspp(msa, rates)                       # 0.1: decisions 1, 30
        x = x.flatten(2).transpose(1, 2)                                          # (B, hw, D)
        x = self.vit.norm(self.vit.blocks[-1].add_mlp(x))                         # (B, hw, D)
        logits, class_embeddings = head.decoder(x)                                # (B, N, hw), (B, N, D)
        return logits.unflatten(2, grid), class_embeddings

    def forward(self, image, rates):
        """The student's logits (B, N, h, w) for a normalised image (B, 3, H, W); rates as in `decode`.

        torch.export takes it with a dynamic B, not with a dynamic H or W.
        """
        return self.decode(self.student, self.features(image), rates)[0]

    @torch.no_grad()
    def update_teacher(self, step, momentum=0.99):
        """Make the teacher the moving average of the student (Mean Teacher, the paper's [14]; decision 17).

        step      optimizer steps before this one, from 0. The momentum grows as 1 - 1 / (step + 1), that of a
                  plain mean of all steps, until it reaches `momentum`; so at step 0 the teacher is a copy.
        """
        m = min(1 - 1 / (step + 1), momentum)
        for teacher, student in zip(self.teacher.parameters(), self.student.parameters()):
            teacher.lerp_(student, 1 - m)                 # m * teacher + (1 - m) * student


# ============================================================================
# The network ends here. What follows loads weights: a file of DINO, DINOv2 or DINOv3, in the names of whoever
# wrote it, into a VisionTransformer.
# ============================================================================

WEIGHTS_URL = "https://dl.fbaipublicfiles.com/"
REPOSITORIES = {                                          # of facebook and of timm at huggingface.co
    "vits8": ("dino-vits8", "vit_small_patch8_224.dino"),
    "vits16": ("dino-vits16", "vit_small_patch16_224.dino"),
    "vitb8": ("dino-vitb8", "vit_base_patch8_224.dino"),
    "vitb16": ("dino-vitb16", "vit_base_patch16_224.dino"),
    "dinov2_vits14": ("dinov2-small", "vit_small_patch14_dinov2.lvd142m"),
    "dinov2_vitb14": ("dinov2-base", "vit_base_patch14_dinov2.lvd142m"),
    "dinov2_vits14_reg": ("dinov2-with-registers-small", "vit_small_patch14_reg4_dinov2.lvd142m"),
    "dinov2_vitb14_reg": ("dinov2-with-registers-base", "vit_base_patch14_reg4_dinov2.lvd142m"),
    "dinov3_vits16": ("dinov3-vits16-pretrain-lvd1689m", "vit_small_patch16_dinov3.lvd1689m"),
    "dinov3_vitb16": ("dinov3-vitb16-pretrain-lvd1689m", "vit_base_patch16_dinov3.lvd1689m"),
}

# A name loses its wrappers; then others' words at its beginning or behind a dot become DINO's, row by row
# from the top: attention.output.dense. before output.dense.
TORCH_WRAPPER = r"_(orig_mod|(fsdp|checkpoint)_wrapped_module)\."                 # anywhere in a name
WRAPPERS = re.compile(rf"^({TORCH_WRAPPER}|(module|model|backbone|teacher|teacher_backbone|vit|dinov2|"
                      rf"dinov3_vit|dinov2_with_registers|encoder|embeddings)\.)+|{TORCH_WRAPPER}")
OTHER_NAMES = {                                           # DINO's: HuggingFace's, DINOv3's, timm's
    "pos_embed": ("position_embeddings",),
    "register_tokens": ("storage_tokens", "reg_token"),
    "patch_embed.proj.": ("patch_embeddings.projection.", "patch_embeddings."),
    "periods": ("rope_embed.periods",),
    "blocks.": ("layer.", "layers."),
    "norm1.": ("layernorm_before.",),
    "attn.q.": ("attention.attention.query.", "attention.q_proj."),               # one matrix later: attn.qkv
    "attn.k.": ("attention.attention.key.", "attention.k_proj."),
    "attn.v.": ("attention.attention.value.", "attention.v_proj."),
    "attn.q.bias": ("attn.q_bias",),
    "attn.v.bias": ("attn.v_bias",),
    "attn.proj.": ("attention.output.dense.", "attention.o_proj."),
    "ls1.gamma": ("layer_scale1.lambda1", "gamma_1"),     # LayerScale
    "norm2.": ("layernorm_after.",),
    "mlp.fc1.": ("intermediate.dense.", "mlp.up_proj."),
    "mlp.fc2.": ("output.dense.", "mlp.down_proj."),
    "ls2.gamma": ("layer_scale2.lambda1", "gamma_2"),
    "norm.": ("layernorm.",),
}
LEFT_OUT = re.compile(r"((\w+_)?head|fc|classifier|pooler)\.|mask_token$")
SCALED = {                                                # a factor: the layer, and what of it it scales
    "ls1.gamma": ("attn.proj", ("weight", "bias")),
    "ls2.gamma": ("mlp.fc2", ("weight", "bias")),
    "attn.qkv.bias_mask": ("attn.qkv", ("bias",)),        # DINOv3: 0 for the keys
}

SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
               "U8": torch.uint8, "BOOL": torch.bool}
NO_WEIGHTS = {                                            # the first bytes of a file: what it is
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file that it stands for: git lfs pull",
    b"<": "a web page; fetch the file itself",
    b"{": "JSON without tensors, as an index of weights in several files is; give weights in one file",
}


class WeightsError(OSError):
    """Weights that cannot be used. The message is one line: what, where, what to do."""


def read_tensors(file):
    """Tensors and plain values of a file of torch.save or safetensors, never code: (object, SHA-256).

    Raises WeightsError naming the file.
    """
    if torch.__version__ < "2.6":                         # its weights_only could be led to run code
        raise WeightsError(f"torch {torch.__version__} is too old to read files safely; get 2.6 or later: "
                           f"python -m pip install -r requirements.txt")
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise WeightsError(f"{file}: cannot read this file ({error.strerror})") from None
    is_safetensors = content[8:9] == b"{"                 # 8 bytes of length, then JSON
    for start, kind in NO_WEIGHTS.items():
        if content.startswith(start) and not is_safetensors:
            raise WeightsError(f"{file}: {kind}")
    try:
        if is_safetensors:
            loaded = read_safetensors(content)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):          # DINO saves its options
                loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:                            # torch and json raise many kinds on a foreign file
        reason = error if type(error) is ValueError else type(error).__name__
        raise WeightsError(f"{file}: not a file of plain tensors, or damaged ({reason}); remove it, or give "
                           f"another") from None
    return loaded, hashlib.sha256(content).hexdigest()


def read_safetensors(content):
    """Bytes of a file of safetensors -> {name: tensor}. Raises ValueError, or what json raises.

    The bytes are n, 8 of them, little-endian; n of JSON: {name: {"dtype", "shape", "data_offsets": [begin,
    end]}}; those of the tensors, one behind the other without a gap.
    """
    n = int.from_bytes(content[:8], "little")
    if n > min(len(content) - 8, 100_000_000):
        raise ValueError(f"its header should have {n} bytes")
    header = json.loads(content[8:8 + n].decode(), object_pairs_hook=distinct)
    header.pop("__metadata__", None)
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)[8 + n:]
    tensors = {}
    at = 0                                                # where the tensor before ends
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        if entry["dtype"] not in SAFETENSORS:
            raise ValueError(f"{name!r} has the unknown type {entry['dtype']!r}")
        dtype = SAFETENSORS[entry["dtype"]]
        if begin != at or end - begin != math.prod(shape) * dtype.itemsize or end > len(data):
            raise ValueError(f"{name!r} does not lie where its shape and its neighbours have it")
        tensors[name] = data[begin:end].clone().view(dtype).view(shape)
        at = end
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes too many")
    return tensors


def distinct(pairs):
    """A JSON object's pairs -> dict. Raises ValueError where a name stands twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return dict(pairs)


def is_state_dict(loaded):
    """Whether this is {name: ordinary tensor}, not sparse and not without values."""
    return isinstance(loaded, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) and value.is_cpu
        and value.layout is torch.strided for name, value in loaded.items())


def positions(state):
    """Rows of the position table; 0 without one."""
    table = state.get("pos_embed", torch.empty(0))
    return table.shape[1] if table.ndim == 3 else 0


def is_square(n):
    return n > 0 and math.isqrt(n) ** 2 == n


def dino_name(name):
    """The name of a tensor in any of these files -> in DINO's, whose heads may still be there."""
    name = WRAPPERS.sub("", name)
    for dinos, others in OTHER_NAMES.items():
        for other in others:
            name = re.sub(rf"(^|\.){re.escape(other)}", rf"\1{dinos}", name)
    return re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)                   # DINOv2 trains in chunks


def dino_names(state):
    """A state dict in any of these names -> in DINO's, those of `VisionTransformer`. Raises WeightsError.

    Beside a student the teacher is taken; heads and the mask token are left out; q, k, v become one matrix.
    """
    teacher = {name: value for name, value in state.items()
               if re.search(r"(^|\.)teacher(_backbone)?\.", name)}
    vit = {}
    for theirs, value in (teacher or state).items():
        name = dino_name(theirs)
        if LEFT_OUT.match(name):
            continue
        if name in vit:
            raise WeightsError(f"{theirs!r} is the second tensor that stands for {name!r}; give another file")
        vit[name] = value
    merge_qkv(vit)
    add_position_of_cls(vit)
    return vit


def merge_qkv(vit):
    """Make attn.q, attn.k, attn.v of a state dict one attn.qkv, in place; DINOv3's missing biases are 0."""
    has_rope = "pos_embed" not in vit                     # DINOv3, whose keys have no bias
    for q in [name for name in vit if ".attn.q." in name]:
        k, v = q.replace(".q.", ".k."), q.replace(".q.", ".v.")
        if has_rope and q.endswith("bias"):
            vit.setdefault(k, torch.zeros_like(vit[q]))
        if all(name in vit and vit[name].shape == vit[q].shape for name in (k, v)):       # else `misfit` says
            pieces = [torch.atleast_1d(vit.pop(name)) for name in (q, k, v)]
            vit[q.replace(".q.", ".qkv.")] = torch.cat(pieces)
    if has_rope and not any(name.endswith(".attn.qkv.bias") for name in vit):     # timm leaves out zeros
        for weight in [name for name in vit if name.endswith(".attn.qkv.weight")]:
            vit[weight.replace(".weight", ".bias")] = vit[weight].new_zeros(vit[weight].shape[:1])


def add_position_of_cls(vit):
    """timm's DINOv2 with registers has a table of patches alone, a square: CLS gets zeros, in place."""
    if "register_tokens" in vit and is_square(positions(vit)):
        vit["pos_embed"] = F.pad(vit["pos_embed"], (0, 0, 1, 0))


def misfit(vit, state):
    """What of a state dict does not fit into `vit`, in words; "" if all does."""
    expected = {name: tuple(value.shape) for name, value in vit.state_dict().items()}
    if vit.pos_embed is not None and is_square(positions(state) - 1):     # a row for CLS, others for patches
        expected["pos_embed"] = (1, positions(state), vit.embed_dim)
    for factor, (layer, _) in SCALED.items():
        if any(name.endswith(factor) for name in state):  # if in any block, then in all
            for i in range(len(vit.blocks)):
                expected[f"blocks.{i}.{factor}"] = expected[f"blocks.{i}.{layer}.bias"]   # the same shape
    missing = sorted(expected.keys() - state.keys() - {"periods"})
    unknown = sorted(state.keys() - expected.keys())
    if missing or unknown:
        return f"{len(missing)} tensors missing {missing[:2]}, {len(unknown)} unknown {unknown[:2]}"
    for name, value in state.items():
        if value.shape != expected[name]:
            return f"{name} is {tuple(value.shape)}, this ViT has {expected[name]}"
    return ""


def load_vit(vit, state):
    """Load a state dict in `VisionTransformer`'s names strictly; the position table may be of any image size.

    state    name: tensor, of any float type. The factors of SCALED are multiplied in, which is exact: these
             layers are linear. Without `periods` those of a new ViT are kept (decision 29).
    raises   WeightsError in words that name no file
    """
    if not is_state_dict(state):
        raise WeightsError("no state dict of tensors")
    problem = misfit(vit, state)
    if problem:
        raise WeightsError(f"another ViT's weights: {problem}")
    for name, value in state.items():
        if not (value.is_floating_point() and value.float().isfinite().all()):
            raise WeightsError(f"{name} is not finite, or of no float type: damaged weights; give others")
    state = {name: value.float() for name, value in state.items()}
    for name in [name for name in state if name.endswith(tuple(SCALED))]:
        _, i, factor = name.split(".", 2)
        value = state.pop(name)
        layer, parameters = SCALED[factor]
        for parameter in parameters:
            scaled = f"blocks.{i}.{layer}.{parameter}"
            state[scaled] = state[scaled] * (value[:, None] if state[scaled].ndim == 2 else value)
    if vit.pos_embed is not None:
        vit.pos_embed.data = vit.pos_embed.new_empty(state["pos_embed"].shape)
    if vit.periods is not None:
        state.setdefault("periods", vit.periods)
    vit.load_state_dict(state, strict=True)


def advice(state, problem):
    """What the weights of another ViT are and what to do with them, in words."""
    for name, (architecture, _) in BACKBONES.items():
        with torch.device("meta"):
            vit = VisionTransformer(**architecture)
        if not misfit(vit, state):
            return f"weights of {name}, not of this ViT ({problem}): give --backbone {name}"
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    if not state:
        return "heads without their ViT; give the file of the ViT"
    if depth == 0:
        return f"no ViT in names of DINO, HuggingFace or timm: {list(state)[:3]}; give another file"
    mlp = "SwiGLU" if re.search(r"\.(gate_proj|weights_in|w1|w12|fc1_g)\.", " ".join(state)) else "MLP"
    patch = state.get("patch_embed.proj.weight", torch.empty(0))
    size = f", width {patch.shape[0]}, patches of {patch.shape[3]}" if patch.ndim == 4 else ""
    return f"a ViT of {depth} blocks with {mlp}{size}: no --backbone fits it ({problem}); give another file"


def load_dino(vit, file):
    """Load the weights of a DINO, DINOv2 or DINOv3 strictly into `vit`; returns the file's SHA-256.

    file     as its authors, HuggingFace or timm give it out, as their or Lightly's training scripts save it,
             or a checkpoint of train.py, for the ViT of that run; .safetensors, or of torch.save
    raises   WeightsError naming the file and what does not fit
    """
    loaded, digest = read_tensors(file)
    named = re.search(r"-(?!20\d{6}\.)([0-9a-f]{8})\.\w+$", Path(file).name)      # not a date
    if named and not digest.startswith(named[1]):
        raise WeightsError(f"{file}: its SHA-256 begins with {digest[:8]}, not as its name says: damaged, or "
                           f"another file; fetch it again, or rename it")
    for key in ("vit", "teacher", "state_dict", "model"):  # of train.py; of DINO, DINOv2, Lightning, timm
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not is_state_dict(loaded) or not loaded:
        raise WeightsError(f"{file}: holds no state dict of tensors; give another")
    try:
        state = dino_names(loaded)
        problem = misfit(vit, state)
        if problem:
            raise WeightsError(advice(state, problem))
        load_vit(vit, state)
    except WeightsError as error:
        raise WeightsError(f"{file}: {error}") from None
    return digest


def backbone(name, file=None):
    """A pretrained ViT by name: `tiny` from assets/, the others fetched once into torch.hub's cache.

    file     weights to load instead. Returns (vit, file, sha256). Raises WeightsError.

    DINO and DINOv2 publish no checksums, so the SHA-256 of what was loaded is returned to be shown.
    """
    architecture, source = BACKBONES[name]
    if file is None and name == "tiny":
        file = Path(__file__).resolve().parent / source
    elif file is None:
        file = fetched(name, source)
    vit = VisionTransformer(**architecture)
    return vit, file, load_dino(vit, file)


def fetched(name, source):
    """The authors' file of a backbone, in torch.hub's cache. Raises WeightsError: where else to get it."""
    facebooks, timms = REPOSITORIES[name]
    elsewhere = (f"huggingface.co/facebook/{facebooks} and huggingface.co/timm/{timms} hold the same in "
                 f"model.safetensors")
    if source is None:
        raise WeightsError(f"{name}: its authors mail its weights after a form (github.com/facebookresearch/"
                           f"dinov3); {elsewhere}, the first after a form, the second freely; give the file "
                           f"with --weights FILE")
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(source).name
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(WEIGHTS_URL + source, str(file), progress=sys.stderr.isatty())
        except (OSError, http.client.HTTPException) as error:
            raise WeightsError(f"{name}: no weights in {file}, and {WEIGHTS_URL + source} cannot be fetched "
                               f"({error}); {elsewhere}; give the file with --weights FILE") from None
    return file


# ----------------------------------------------------------------------------
# The concept in one table


def block_flops(n, D):
    """FLOPs of a Block for n tokens (n, D); a multiplication and an addition are two."""
    return 2 * n * 12 * D * D + 4 * n * n * D


def main():
    """Print parameters and forward FLOPs of the network on every backbone, at the training crop 160 x 160."""
    print("backbone           frozen ViT   ASPP      decoder   "
          "GFLOP per 160 x 160 crop: ViT + ASPP + decoder   patches")
    for name, (architecture, _) in BACKBONES.items():
        with torch.device("meta"):
            network = DMSA(VisionTransformer(**architecture), 21)
        D, p, depth = network.vit.embed_dim, network.vit.patch_size, len(network.vit.blocks)
        size = [sum(t.numel() for t in module.parameters()) / 1e6
                for module in (network.vit, network.student.aspp, network.student.decoder)]
        n, width = (160 // p) ** 2, min(256, D)
        vit = depth * block_flops(1 + network.vit.registers + n, D) + 2 * n * 3 * p * p * D
        aspp = 2 * n * (D * width + 3 * (9 * D + D * width) + 5 * width * D)
        decoder = 2 * block_flops(n + 21, D) + 2 * n * 2 * D * D
        print(f"{name:17}  {size[0]:8.2f} M   {size[1]:5.2f} M   {size[2]:5.2f} M   "
              f"{vit / 1e9:24.2f} + {aspp / 1e9:.2f} + {decoder / 1e9:.2f}{' ' * 18}{160 // p} x {160 // p}")


if __name__ == "__main__":
    main()
