"""DMSA's network: a DINO ViT (Eq. 2), ASPP behind its last attention (Fig. 1), Segmenter's decoder (Eq. 3).

    image (B, 3, H, W) --frozen blocks, last attention--> patch tokens x, msa (B, D, h, w)
                       --head: x + msa + 0.1 ASPP(msa), last MLP, norm, decoder--> logits (B, N, h, w)

The ViT is frozen; a head (ASPP and decoder) is what trains. Student and teacher are two heads on the same
features, the teacher the moving average of the student (Fig. 2).

    BACKBONES -> class VisionTransformer (Eq. 2) -> load_dino(), backbone() -> class MaskTransformer (Eq. 3)
              -> class DMSA (Fig. 1) -> main()

Needs torch and aspp.py: copy both anywhere. "Decision N" is row N of docs/decisions.md in the DMSA
repository, which says what was chosen where the paper is silent.

    python model.py       # parameters and FLOPs of every backbone
"""

import argparse
import copy
import hashlib
import io
import math
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from aspp import ASPP

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, what DINO was trained with

WEIGHTS_URL = "https://dl.fbaipublicfiles.com/"
SMALL, BASE = dict(embed_dim=384, depth=12, num_heads=6), dict(embed_dim=768, depth=12, num_heads=12)
V2, V3 = dict(img_size=518, patch_size=14), dict(patch_size=16, registers=4, rope=True)
V2_REG = V2 | dict(registers=4)
BACKBONES = {                                             # name: (architecture, file shipped or fetched)
    "tiny": (dict(img_size=96, patch_size=8, embed_dim=128, depth=5, num_heads=4), "assets/tiny.pt"),
    "vits8": (dict(patch_size=8, **SMALL), "dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"),
    "vits16": (dict(patch_size=16, **SMALL), "dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"),
    "vitb8": (dict(patch_size=8, **BASE), "dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth"),
    "vitb16": (dict(patch_size=16, **BASE), "dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"),
    "dinov2_vits14": (V2 | SMALL, "dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"),
    "dinov2_vitb14": (V2 | BASE, "dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth"),
    "dinov2_vits14_reg": (V2_REG | SMALL, "dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"),
    "dinov2_vitb14_reg": (V2_REG | BASE, "dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"),
    "dinov3_vits16": (V3 | SMALL, None),                  # None: only with a file of weights, see `backbone`
    "dinov3_vitb16": (V3 | BASE, None),
}


class WeightsError(OSError):
    """A file of weights that cannot be used. The message is one line: what, where, what to do."""


# ----------------------------------------------------------------------------
# ViT with DINO's parameter names, so that its files load strictly


class Attention(nn.Module):
    """Eq. 2: softmax(Q K^T / sqrt(d_k)) V in every head, then the output projection."""

    def __init__(self, dim, num_heads, qkv_bias=True, dropout=0.0):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rope=None):
        """x (B, n, D) -> (B, n, D); rope as in `split`."""
        return self.attend(*self.split(x, rope))

    def split(self, x, rope=None):
        """x (B, n, D) -> q, k, v, each (B, heads, n, d_k); rope: cos, sin (n, d_k) to turn q and k by."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return (q, k, v) if rope is None else (rotate(q, *rope), rotate(k, *rope), v)

    def attend(self, q, k, v):
        """q, k, v of `split` -> (B, n, D). The fused kernel never forms the n x n attention map."""
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.proj(x.transpose(1, 2).flatten(2)), self.dropout, self.training)


def rotate(x, cos, sin):
    """Rotary position (DINOv3): turn the pairs x_i, x_{i + d/2} of x (B, heads, n, d) by the angles."""
    a, b = x.float().chunk(2, dim=3)
    return (x * cos + torch.cat([-b, a], dim=3) * sin).to(x.dtype)


class Mlp(nn.Module):
    def __init__(self, dim, hidden, dropout=0.0):
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention, x + MLP."""

    def __init__(self, dim, num_heads, qkv_bias=True, eps=1e-6, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, 4 * dim, dropout)

    def forward(self, x, rope=None):
        x = x + self.attn(self.norm1(x), rope)
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
    registers    learned tokens that only take part in attention; they are no part of what `forward` returns
    rope         positions turn queries and keys in each block (DINOv3), and there is no table

    DINOv2's and v3's LayerScale needs no module: `load_dino` multiplies it into the layer before it.
    """

    def __init__(self, img_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6, registers=0,
                 rope=False):
        super().__init__()
        self.patch_size, self.side, self.embed_dim, self.registers = (
            patch_size, img_size // patch_size, embed_dim, registers)
        eps = 1e-5 if rope else 1e-6
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, embed_dim))
        self.pos_embed = None if rope else nn.Parameter(torch.zeros(1, 1 + self.side ** 2, embed_dim))
        n = embed_dim // num_heads // 4                   # wave lengths for rows, as many for columns
        self.register_buffer("periods", 100 ** (torch.arange(n) / n) if rope else None)
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
        if h * w == self.side ** 2 and image.shape[2] == image.shape[3]:
            return self.pos_embed
        table = self.pos_embed[:, 1:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        if self.registers:
            table = F.interpolate(table, size=(h, w), mode="bicubic", antialias=True)
        else:
            scale = ((h + 0.1) / self.side, (w + 0.1) / self.side)
            table = F.interpolate(table, scale_factor=scale, mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)

    def rope(self, image):
        """cos, sin (n, d_k) of the angles by which `rotate` turns each token, or None with a position table.

        Row r of h has the coordinate 2 (r + 0.5) / h - 1, a column likewise; an angle is 2 pi times the
        coordinate over the period. CLS and registers are not turned: their angles are 0.
        """
        if self.periods is None:
            return None
        rows, columns = (2 * (torch.arange(n, device=image.device) + 0.5) / n - 1 for n in self.grid(image))
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=2).flatten(0, 1)    # (hw, 2)
        angle = (2 * math.pi * place[:, :, None] / self.periods).flatten(1)       # (hw, d_k / 2)
        angle = F.pad(angle.tile(2), (0, 0, 1 + self.registers, 0))               # (n, d_k)
        return angle.cos(), angle.sin()

    def prepare_tokens(self, image):
        """Normalised image (B, 3, H, W) -> CLS, registers, patches (B, n, D), n = 1 + registers + hw."""
        B, patches = image.shape[0], self.patch_embed(image).flatten(2).transpose(1, 2)           # (B, hw, D)
        x = torch.cat([self.cls_token.expand(B, -1, -1), patches], dim=1)
        if self.pos_embed is not None:
            x = x + self.position_table(image)
        if self.registers:                                # they have no position
            x = torch.cat([x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]], dim=1)
        return x

    def last_qkv(self, image):
        """All blocks but the last, and what its attention is made of: normalised image (B, 3, H, W) ->
        tokens before the last block (B, n, D); q, k, v (B, heads, n, d_k)."""
        x, rope = self.prepare_tokens(image), self.rope(image)
        for block in self.blocks[:-1]:
            x = block(x, rope)
        last = self.blocks[-1]
        return x, *last.attn.split(last.norm1(x), rope)

    def forward(self, image):
        """Normalised image (B, 3, H, W), any size from one patch up.

        Returns the tokens after the last norm (B, 1 + hw, D), CLS first, and the CLS row of the last
        attention (B, heads, 1 + hw). Registers are left out of both; without any, a row sums to 1.
        """
        (x, q, k, v), last = self.last_qkv(image), self.blocks[-1]
        x = x + last.attn.attend(q, k, v)
        x = self.norm(x + last.mlp(last.norm2(x)))                                # (B, n, D)
        row = (q[:, :, :1] @ k.transpose(2, 3) / math.sqrt(k.shape[3])).softmax(3).squeeze(2)
        first = 1 + self.registers                        # of the patches
        return (torch.cat([x[:, :1], x[:, first:]], dim=1),
                torch.cat([row[:, :, :1], row[:, :, first:]], dim=2))


def normalise(image):
    """Image (B, 3, H, W), floats in 0..1 -> with ImageNet's mean at 0 and deviation at 1, as DINO has it."""
    if not image.is_floating_point():
        raise ValueError(f"image is {image.dtype}: floats in 0..1 expected, divide by 255")
    rgb = torch.tensor([MEAN, STD], dtype=image.dtype).to(image.device, non_blocking=True)        # (2, 3)
    mean, std = rgb.view(2, 3, 1, 1)
    return (image - mean) / std


def initialize(module):
    """Normal of deviation 0.02, cut at two, for every linear layer; zero biases (as DINO, Segmenter)."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def read_tensors(file):
    """Tensors and plain values of a file, never code: (object, SHA-256). Raises WeightsError naming it."""
    if torch.__version__ < "2.6":                         # its weights_only could be led to run code
        raise WeightsError(f"torch {torch.__version__} is too old to read files safely; get 2.6 or later: "
                           f"python -m pip install -r requirements.txt")
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise WeightsError(f"{file}: cannot read this file ({error.strerror})") from None
    if content[8:9] == b"{":                              # 8 bytes of length, then JSON
        raise WeightsError(f"{file}: a file of safetensors; convert it where that package is installed: "
                           f"torch.save(safetensors.torch.load_file('{file}'), 'weights.pt')")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):              # DINO saves its options
            found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:                            # torch raises many kinds on a foreign file
        raise WeightsError(f"{file}: not a file of plain tensors, or damaged ({type(error).__name__}); "
                           f"remove it, or give another") from None
    return found, hashlib.sha256(content).hexdigest()


def dino_names(state):
    """A state dict as DINO, DINOv2 or DINOv3 save it -> one with `VisionTransformer`'s names, {} if none.

    Takes the teacher or model of a whole checkpoint, drops wrappers' prefixes, heads and the mask token, and
    multiplies LayerScale into the layer before it (exact: it is linear).
    """
    for key in ("teacher", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor)
                                              for k, v in state.items()):
        return {}
    prefix = re.compile(r"^((module|_orig_mod|backbone|teacher|encoder)\.)+")
    state = {prefix.sub("", name): value.float() for name, value in state.items()}
    state = {name: value for name, value in state.items()
             if not re.match(r"(head|fc|\w+_head)\.|mask_token$", name)}
    for name in [name for name in state if name.endswith((".gamma", ".bias_mask"))]:
        value, block = state.pop(name), name.rsplit(".", 2)[0]                    # blocks.i, or blocks.i.attn
        if name.endswith("bias_mask"):                    # of DINOv3: 0 for the keys' bias
            factors = {f"{block}.qkv.bias": value}
        else:
            layer = block + (".attn.proj" if ".ls1." in name else ".mlp.fc2")
            factors = {f"{layer}.weight": value[:, None], f"{layer}.bias": value}
        for parameter in factors.keys() & state.keys():   # a ViT of another form: `load_dino` tells
            state[parameter] = state[parameter] * factors[parameter]
    renamed = {"storage_tokens": "register_tokens", "rope_embed.periods": "periods"}
    return {renamed.get(name, name): value for name, value in state.items()}


def load_dino(vit, file):
    """Load the weights of a DINO, DINOv2 or DINOv3 strictly into `vit`; returns the file's SHA-256.

    file     as released or as saved by their training scripts (`dino_names`), in any float type
    raises   WeightsError naming the file and what does not fit
    """
    found, digest = read_tensors(file)
    state, wanted = dino_names(found), vit.state_dict()
    if not state:
        raise WeightsError(f"{file}: holds no state dict of tensors in DINO's format; give another")
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or extra:
        raise WeightsError(f"{file}: does not fit this ViT: {len(missing)} tensors missing {missing[:2]}, "
                           f"{len(extra)} unknown {extra[:2]}; choose the ViT that it is of (--backbone)")
    for name, value in wanted.items():
        if value.shape != state[name].shape:
            raise WeightsError(f"{file}: {name} is {tuple(state[name].shape)}, this ViT has "
                               f"{tuple(value.shape)} (patch size, image size or width differ); choose the "
                               f"ViT that the file is for (--backbone)")
        if not state[name].isfinite().all():
            raise WeightsError(f"{file}: {name} is not finite: a spoilt file; give another")
    vit.load_state_dict(state, strict=True)
    return digest


def backbone(name, file=None):
    """A pretrained ViT by name: `tiny` from assets/, the others fetched once into torch.hub's cache.

    file     weights to load instead. Returns (vit, file, sha256). Raises WeightsError.

    No checksums are published, so the SHA-256 of what was loaded is returned to be shown, the file is read
    with weights_only=True and must fit the architecture tensor by tensor.
    """
    architecture, source = BACKBONES[name]
    if file is None and source is None:
        raise WeightsError(f"{name}: its weights come by mail after a form, at github.com/facebookresearch/"
                           f"dinov3; fetch them and give the file with --weights")
    if file is None and name == "tiny":
        file = Path(__file__).resolve().parent / source
    elif file is None:
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(source).name
        if not file.exists():
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(WEIGHTS_URL + source, str(file), progress=sys.stderr.isatty())
            except OSError as error:
                raise WeightsError(f"{name}: no weights in {file}, and {WEIGHTS_URL + source} cannot be "
                                   f"fetched ({error}); fetch it elsewhere and give it with --weights "
                                   f"FILE") from None
    vit = VisionTransformer(**architecture)
    return vit, file, load_dino(vit, file)


# ----------------------------------------------------------------------------
# Segmenter's decoder (Eq. 3)


class MaskTransformer(nn.Module):
    """Patch tokens and class embeddings through a small transformer; their products are the masks (Eq. 3).

    dim        width of the encoder's tokens, D
    n_classes  N
    width      width inside, default dim; heads: default about one per 64 channels; depth: transformer blocks
    dropout    none by default (decision 22); the peers have 0.1
    """

    def __init__(self, dim, n_classes, width=None, depth=2, heads=None, dropout=0.0):
        super().__init__()
        width = width or dim
        self.n_classes = n_classes
        self.proj_dec = nn.Linear(dim, width)
        self.cls_emb = nn.Parameter(torch.zeros(1, n_classes, width))
        heads = heads or math.gcd(width, max(1, width // 64))                     # they must divide the width
        # no bias in qkv, and LayerNorm's usual eps, as in TransFGU's copy of Segmenter
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=False, eps=1e-5, dropout=dropout)
                                    for _ in range(depth))
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
# The whole network


class Head(nn.Module):
    """What trains: ASPP (None without) and decoder. `DMSA.decode` puts them behind the frozen ViT."""

    def __init__(self, dim, n_classes, use_aspp=True, dropout=0.0):
        super().__init__()
        self.aspp = ASPP(dim, min(256, dim)) if use_aspp else None
        self.decoder = MaskTransformer(dim, n_classes, dropout=dropout)


class DMSA(nn.Module):
    """Frozen ViT with a student and a teacher head.

    vit        pretrained VisionTransformer; frozen here
    n_classes  N, background included
    use_aspp   without, a head is the decoder alone; dropout: in the decoder
    aspp_scale factor of what ASPP adds (decision 30)

    After each step of an optimizer on `student.parameters()`, call `update_teacher`.
    """

    def __init__(self, vit, n_classes, use_aspp=True, dropout=0.0, aspp_scale=0.1):
        super().__init__()
        self.aspp_scale = aspp_scale
        self.vit = vit.requires_grad_(False).eval()
        self.student = Head(vit.embed_dim, n_classes, use_aspp, dropout)
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
        msa, grid = self.vit.blocks[-1].attn.attend(q, k, v), self.vit.grid(image)    # Eq. 2: (B, n, D)
        first = 1 + self.vit.registers                    # of the patch tokens; CLS and registers pass by
        return tuple(t[:, first:].transpose(1, 2).unflatten(2, grid) for t in (x, msa))

    def decode(self, head, features, rates):
        """Fig. 1: the last block with ASPP behind its attention, then the decoder.

        head      self.student or self.teacher
        features  x, msa (B, D, h, w) of `features`
        rates     of `dilation_rates(epoch)`
        returns   logits (B, N, h, w), class embeddings (B, N, D)
        """
        x, msa = features
        last, grid = self.vit.blocks[-1], x.shape[2:]
        x = x + msa                                                               # (B, D, h, w)
        if head.aspp is not None:
            x = x + self.aspp_scale * head.aspp(msa, rates)                       # decisions 1 and 30
        x = x.flatten(2).transpose(1, 2)                                          # (B, hw, D)
        x = self.vit.norm(x + last.mlp(last.norm2(x)))                            # (B, hw, D)
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


# ----------------------------------------------------------------------------
# The concept in one table


def load_vit(vit, state):
    vit.load_state_dict(state)


def main():
    """Print parameters and forward FLOPs of the network on every backbone, at the training crop 160 x 160."""
    print("backbone           frozen ViT   ASPP      decoder   "
          "GFLOP per 160 x 160 crop: ViT + ASPP + decoder   patches")
    for name, (architecture, _) in BACKBONES.items():
        with torch.device("meta"):
            network = DMSA(VisionTransformer(**architecture), 21)
        D, p, depth = network.vit.embed_dim, network.vit.patch_size, len(network.vit.blocks)
        size = [sum(t.numel() for t in part.parameters()) / 1e6
                for part in (network.vit, network.student.aspp, network.student.decoder)]
        n, width = (160 // p) ** 2, min(256, D)
        block = lambda n: 2 * n * 12 * D * D + 4 * n * n * D                      # multiply, add: 2
        vit = depth * block(1 + network.vit.registers + n) + 2 * n * 3 * p * p * D
        aspp = 2 * n * (D * width + 3 * (9 * D + D * width) + 5 * width * D)
        decoder = 2 * block(n + 21) + 2 * n * 2 * D * D
        print(f"{name:17}  {size[0]:8.2f} M   {size[1]:5.2f} M   {size[2]:5.2f} M   "
              f"{vit / 1e9:24.2f} + {aspp / 1e9:.2f} + {decoder / 1e9:.2f}{' ' * 18}{160 // p} x {160 // p}")


if __name__ == "__main__":
    main()


def load_vit(vit, state):
    vit.load_state_dict(state)
