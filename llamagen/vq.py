"""LlamaGen's image tokenizer: images to codes of a VQ codebook and back. Knows no policy, no reward, no trainer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llamagen import checkpoints
from llamagen.pixels import images_of

# Legend: B images, C channels, E codebook_embed_dim, V codebook_size, H x W pixels, h x w grid of codes, T = h * w.
# Code t sits in row t // w, column t % w of the grid.

# Channel multipliers of the released tokenizers, finest resolution first; encoder and decoder share them.
VQ_PRESETS: dict[str, tuple[int, ...]] = {"VQ-16": (1, 1, 2, 2, 4), "VQ-8": (1, 2, 2, 4)}

NORM_GROUPS = 32
NORM_EPS = 1e-6
ENCODER_BLOCKS_PER_LEVEL = 2
DECODER_BLOCKS_PER_LEVEL = 3
UNIT_NORM_EPS = 1e-12

COMMITMENT_WEIGHT = 0.25  # of LlamaGen's tokenizer training
ENTROPY_TEMPERATURE = 0.01

# Images that run through the network at once by default: as many as 16 of 256 x 256 (about 3 GB of VQ-16 activations).
PIXELS_PER_CHUNK = 16 * 256 * 256

RANGE_SLACK = 1e-3  # resizing and float noise; anything beyond is another range, not noise

CONFIG_NAME = "config.json"
WEIGHTS_NAME = checkpoints.SAFETENSORS_NAME
MODEL_TYPE = "llamagen_vq"


@dataclass(frozen=True)
class VQConfig:
    """Shape of a tokenizer. `preset("VQ-16")` and `preset("VQ-8")` are the released ones.

    Args:
        codebook_size: V, number of codes; the vocabulary of the policy.
        codebook_embed_dim: E, channels of one code.
        base_channels: width that the multipliers scale; every width has to be a multiple of 32 (group norm).
        encoder_channel_multipliers: one per resolution, finest first; each but the last is followed by a halving.
        decoder_channel_multipliers: the same for the decoder, also written finest first.
        z_channels: channels between the networks and the 1x1 convolutions around the codebook.
    Raises:
        ValueError: if a size is not positive, a width no multiple of 32, or encoder and decoder differ in depth.
    """

    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    base_channels: int = 128
    encoder_channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    z_channels: int = 256

    def __post_init__(self) -> None:
        for name in ("encoder_channel_multipliers", "decoder_channel_multipliers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON gives lists
        encoder, decoder = self.encoder_channel_multipliers, self.decoder_channel_multipliers
        for name in ("codebook_size", "codebook_embed_dim", "base_channels", "z_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but has to be at least 1")
        if not encoder or len(encoder) != len(decoder):
            raise ValueError(
                f"{len(encoder)} encoder and {len(decoder)} decoder multipliers: give as many of both, at least one, "
                "so that a decoded image has the size of the encoded one"
            )
        for multiplier in (1, *encoder, *decoder):
            width = self.base_channels * multiplier
            if width < 1 or width % NORM_GROUPS:
                raise ValueError(
                    f"base_channels {self.base_channels} times multiplier {multiplier} is {width} channels, no "
                    f"multiple of {NORM_GROUPS} (the groups of normalisation): take base_channels from 32, 64, 96 ..."
                )

    @classmethod
    def preset(cls, name: str) -> VQConfig:
        """Shape of a released tokenizer: "VQ-16" (vq_ds16_c2i.pt, vq_ds16_t2i.pt) or "VQ-8" (vq_ds8_c2i.pt).

        Raises:
            ValueError: if there is no such preset.
        """
        if name not in VQ_PRESETS:
            raise ValueError(f"no tokenizer preset {name!r}: take one of {', '.join(VQ_PRESETS)}")
        return cls(encoder_channel_multipliers=VQ_PRESETS[name], decoder_channel_multipliers=VQ_PRESETS[name])

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VQConfig:
        """Configuration in the config.json of a tokenizer's folder.

        Raises:
            FileNotFoundError, ValueError: if there is none, or it is another model's.
        """
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            raise FileNotFoundError(_not_a_folder_of_ours(path))
        settings = json.loads(path.read_text())
        if (model_type := settings.pop("model_type", None)) != MODEL_TYPE:
            raise ValueError(f"{path} has model_type {model_type!r}, but that of a tokenizer is {MODEL_TYPE!r}")
        if unknown := sorted(set(settings) - {field.name for field in fields(cls)}):
            raise ValueError(f"{path} has settings that VQConfig does not know: {', '.join(unknown)}")
        return cls(**settings)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json into `folder`, which is made if need be."""
        settings = json.dumps({"model_type": MODEL_TYPE} | asdict(self), indent=2)
        checkpoints.write_atomically(Path(folder) / CONFIG_NAME, lambda path: path.write_text(settings + "\n"))

    @property
    def downsample_factor(self) -> int:
        """Pixels per code along one side: 16 for VQ-16, so that 256 x 256 pixels become 16 x 16 codes."""
        return 2 ** (len(self.encoder_channel_multipliers) - 1)


class VQOutput(NamedTuple):
    """What one training step of the tokenizer needs; the three losses are scalars and already weighted."""

    reconstruction: Tensor  # [B, 3, H, W], unclamped, meant for [-1, 1]
    ids: Tensor  # [B, T], int64
    codebook_loss: Tensor  # pulls the codes towards the encoder's features
    commitment_loss: Tensor  # pulls the features towards their codes
    entropy_loss: Tensor  # sharp choices, evenly used codes; 0 where entropy_weight is 0


class VQModel(nn.Module):
    """Convolutional encoder, codebook with lookup by cosine, convolutional decoder (LlamaGen, arXiv:2406.06525, 2.2).

    Module names are those of the official state dict. Runs in float32, also inside an autocast region: half precision
    moves features across cell borders of the codebook and pixels across byte borders.
    """

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.quantize = Codebook(config.codebook_size, config.codebook_embed_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)

    @classmethod
    def from_official(cls, source: checkpoints.Source, config: VQConfig) -> VQModel:
        """Tokenizer with the weights of an official file, of an AR-GRPO folder, or of a state dict in memory.

        Args:
            source: path of a file such as vq_ds16_c2i.pt, of a folder with safetensors, or a state dict.
            config: the shape the weights have, e.g. `VQConfig.preset("VQ-16")`.
        Raises:
            FileNotFoundError, ValueError: if the source is no such tokenizer; the message says what to do.
        """
        with torch.device("meta"):
            model = cls(config)
        checkpoints.load_official_tokenizer(model, source)
        return model.eval()

    def save_official(self, path: str | Path) -> None:
        """Write a .pt file that the official LlamaGen programs read, usage bookkeeping included."""
        usage = {"quantize.codebook_used": self.quantize.codebook_used}
        checkpoints.save_official(self.state_dict() | usage, path)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VQModel:
        """Tokenizer of a folder written by `save_pretrained`, in evaluation mode, on the CPU.

        Raises:
            FileNotFoundError: if the folder lacks config.json or model.safetensors.
            ValueError: if config.json is another model's, or config and weights disagree.
        """
        config = VQConfig.from_pretrained(folder)
        weights = Path(folder) / WEIGHTS_NAME
        if not weights.is_file():
            raise FileNotFoundError(_not_a_folder_of_ours(weights))
        return cls.from_official(weights, config)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`, which is made if need be."""
        self.config.save_pretrained(folder)
        checkpoints.save_safetensors(self.state_dict(), Path(folder) / WEIGHTS_NAME)

    @property
    def device(self) -> torch.device:
        """Where the weights are; ids and images are moved there."""
        return self.quantize.embedding.weight.device

    @torch.no_grad()
    def encode(self, images: Tensor, batch_size: int | None = None) -> Tensor:
        """Codes of images.

        Args:
            images: [B, 3, H, W] in [-1, 1]; H and W multiples of `config.downsample_factor`.
            batch_size: images at once; by default as many as hold `PIXELS_PER_CHUNK` pixels, at least one.
        Returns:
            [B, T] int64, T = (H / factor) * (W / factor), row by row.
        Raises:
            ValueError: for another shape, another range, or non-finite pixels.
        """
        self._check_images(images)
        if not images.numel():
            raise ValueError("no images to encode")
        low, high = (bound.item() for bound in images.detach().aminmax())
        if not (low >= -1 - RANGE_SLACK and high <= 1 + RANGE_SLACK):  # written so that NaN fails
            raise ValueError(f"pixels span [{low:.4g}, {high:.4g}], expected [-1, 1]: bytes become x / 127.5 - 1")
        chunks = _chunks(images, images.shape[-2] * images.shape[-1], batch_size)
        with self._float32():
            features = (self.encode_features(chunk.to(self.device, torch.float32)) for chunk in chunks)
            return torch.cat([self.quantize(feature)[1] for feature in features])  # [B, T]

    @torch.no_grad()
    def decode(self, ids: Tensor, grid_size: tuple[int, int] | None = None, batch_size: int | None = None) -> Tensor:
        """Images of codes: the one place where codes become pictures in [0, 1].

        Args:
            ids: [B, T] integers in [0, V), row by row.
            grid_size: (h, w) with h * w = T; by default the grid is square.
            batch_size: images at once; by default as many as hold `PIXELS_PER_CHUNK` pixels, at least one.
        Returns:
            [B, 3, h * factor, w * factor], float32 in [0, 1].
        Raises:
            ValueError: for ids that are no integers, outside the codebook, or do not fill the grid.
        """
        return images_of(self.decode_raw(ids, grid_size, batch_size))

    @torch.no_grad()
    def decode_raw(
        self, ids: Tensor, grid_size: tuple[int, int] | None = None, batch_size: int | None = None
    ) -> Tensor:
        """As `decode`, but the decoder's own output: meant for [-1, 1], not clamped. FID bytes are made from it."""
        h, w = self._check_ids(ids, grid_size)
        chunks = _chunks(ids, h * w * self.config.downsample_factor**2, batch_size)
        with self._float32():
            return torch.cat([self.decode_features(self.quantize.lookup(chunk, (h, w))) for chunk in chunks])

    def encode_features(self, images: Tensor) -> Tensor:
        """What the codebook sees: images [B, 3, H, W] in [-1, 1] to features [B, E, h, w]; keeps gradients."""
        return self.quant_conv(self.encoder(images))

    def decode_features(self, features: Tensor) -> Tensor:
        """What a decoder makes of looked-up codes [B, E, h, w]: images [B, 3, H, W], unclamped; keeps gradients."""
        return self.decoder(self.post_quant_conv(features))

    def forward(
        self, images: Tensor, commitment_weight: float = COMMITMENT_WEIGHT, entropy_weight: float = 0.0
    ) -> VQOutput:
        """One training pass: straight-through reconstruction and the losses of the codebook.

        Losses on pixels (L2, perceptual, adversarial in LlamaGen) are the caller's. The codes are chosen in float32;
        the networks follow the caller's autocast.

        Args:
            images: [B, 3, H, W] in [-1, 1].
            commitment_weight: factor of the commitment loss.
            entropy_weight: factor of the entropy loss; 0 leaves it out, as LlamaGen did for the released tokenizers.
        """
        self._check_images(images)
        features = self.encode_features(images)  # [B, E, h, w]
        with self._float32():
            features = features.float()
            quantized, ids = self.quantize(features)  # [B, E, h, w], [B, T]
            unit = F.normalize(features, dim=1, eps=UNIT_NORM_EPS)
            codes = self.quantize.lookup(ids, tuple(features.shape[-2:]))  # [B, E, h, w], without straight-through
            codebook_loss = F.mse_loss(codes, unit.detach())
            commitment_loss = commitment_weight * F.mse_loss(unit, codes.detach())
            entropy_loss = features.new_zeros(())
            if entropy_weight:
                entropy_loss = entropy_weight * usage_entropy_loss(-self.quantize.distances(_rows(unit)))
        return VQOutput(self.decode_features(quantized), ids, codebook_loss, commitment_loss, entropy_loss)

    def _float32(self) -> torch.autocast:
        if (dtype := self.quantize.embedding.weight.dtype) in (torch.float16, torch.bfloat16):
            raise ValueError(f"the tokenizer was cast to {dtype}, but has to stay float32: call .float() on it")
        return torch.autocast(self.device.type, enabled=False)

    def _check_images(self, images: Tensor) -> None:
        factor = self.config.downsample_factor
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images are {list(images.shape)} {images.dtype}, expected floats [B, 3, H, W]")
        if images.shape[-2] % factor or images.shape[-1] % factor:
            raise ValueError(
                f"images of {images.shape[-2]} x {images.shape[-1]} pixels, but one code covers {factor} x {factor}: "
                f"crop or resize both sides to multiples of {factor}"
            )

    def _check_ids(self, ids: Tensor, grid_size: tuple[int, int] | None) -> tuple[int, int]:
        """Grid (h, w) that the ids fill."""
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool or not ids.numel():
            raise ValueError(f"ids are {list(ids.shape)} {ids.dtype}, expected integers [B, T] with B, T > 0")
        num_codes = ids.shape[1]
        h, w = grid_size or (round(num_codes**0.5),) * 2
        if h < 1 or w < 1 or h * w != num_codes:
            raise ValueError(
                f"{num_codes} codes an image do not fill a grid of {h} x {w}: "
                + ("give grid_size with h * w codes" if grid_size else "give grid_size=(h, w), they make no square")
            )
        low, high = (bound.item() for bound in ids.aminmax())
        if low < 0 or high >= self.config.codebook_size:
            raise ValueError(
                f"ids span {low}..{high}, but this codebook has 0..{self.config.codebook_size - 1}: pass codes without "
                "the condition in front of them, made with a codebook of the same size"
            )
        return h, w


class Codebook(nn.Module):
    """V codes of E channels, compared and returned with unit length (the stored rows need not have it)."""

    def __init__(self, codebook_size: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, embed_dim)
        with torch.no_grad():
            self.embedding.weight.uniform_(-1 / codebook_size, 1 / codebook_size)
            self.embedding.weight.copy_(self.unit_codes())
        # Official training's record of recent codes. Nothing here reads it; kept so that conversion loses nothing.
        self.register_buffer("codebook_used", torch.zeros(checkpoints.USAGE_WINDOW), persistent=False)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes of features [B, E, h, w]: the codes with straight-through gradient [B, E, h, w], ids [B, T].

        The value is z + (e - z), which is the unit code e up to one rounding; the gradient goes to z alone.
        """
        unit = F.normalize(features, dim=1, eps=UNIT_NORM_EPS)  # [B, E, h, w]
        with torch.no_grad():
            ids = self.distances(_rows(unit)).argmin(dim=1).view(len(features), -1)  # [B, T]; the first one on ties
            codes = self.lookup(ids, tuple(features.shape[-2:]))  # [B, E, h, w]
        return unit + (codes - unit).detach(), ids

    def lookup(self, ids: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """Unit codes of ids [B, T] as a grid [B, E, h, w]."""
        ids = ids.to(self.embedding.weight.device).long()
        codes = F.normalize(self.embedding(ids), dim=-1, eps=UNIT_NORM_EPS)  # [B, T, E]
        return codes.transpose(1, 2).unflatten(2, grid_size)  # [B, E, h, w]

    def distances(self, unit: Tensor) -> Tensor:
        """Squared distances of unit features [N, E] to all codes: |z|^2 + |e|^2 - 2 z.e, [N, V]."""
        codes = self.unit_codes()
        return unit.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * (unit @ codes.T)

    def unit_codes(self) -> Tensor:
        """All codes with unit length, [V, E]."""
        return F.normalize(self.embedding.weight, dim=-1, eps=UNIT_NORM_EPS)


def usage_entropy_loss(affinities: Tensor, temperature: float = ENTROPY_TEMPERATURE) -> Tensor:
    """Entropy of each choice minus entropy of the average choice: low where choices are sharp and codes evenly used.

    p_n = softmax(affinities_n / temperature), loss = mean_n H(p_n) - H(mean_n p_n), in nats; at least -log V.

    Args:
        affinities: [N, V], minus the squared distances of N features to V codes.
        temperature: of the softmax.
    Source: the regulariser of MaskGIT's tokenizer training, as in LlamaGen's VectorQuantizer (off by default there).
    """
    log_probs = F.log_softmax(affinities / temperature, dim=-1)  # [N, V]
    probs = log_probs.exp()
    average = probs.mean(0)  # [V]
    sample_entropy = -(probs * log_probs).sum(-1).mean()
    average_entropy = -(average * (average + 1e-5).log()).sum()
    return sample_entropy - average_entropy


class _Encoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.encoder_channel_multipliers]
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        in_channels = config.base_channels
        for width in widths[:-1]:
            level = _Level(in_channels, width, ENCODER_BLOCKS_PER_LEVEL, attention=False)
            level.downsample = _Downsample(width)
            self.conv_blocks.append(level)
            in_channels = width
        self.conv_blocks.append(_Level(in_channels, widths[-1], ENCODER_BLOCKS_PER_LEVEL, attention=True))
        self.mid = _middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)  # [B, C, H, W]
        for level in self.conv_blocks:
            x = level(x)  # halves H, W on all levels but the last
        for block in self.mid:
            x = block(x)  # [B, C, h, w]
        return self.conv_out(F.silu(self.norm_out(x)))  # [B, Z, h, w]


class _Decoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in reversed(config.decoder_channel_multipliers)]  # coarsest first
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        in_channels = widths[0]
        for i, width in enumerate(widths):
            level = _Level(in_channels, width, DECODER_BLOCKS_PER_LEVEL, attention=i == 0)
            if i < len(widths) - 1:
                level.upsample = _Upsample(width)
            self.conv_blocks.append(level)
            in_channels = width
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)  # [B, C, h, w]
        for block in self.mid:
            x = block(x)
        for level in self.conv_blocks:
            x = level(x)  # doubles h, w on all levels but the last
        return self.conv_out(F.silu(self.norm_out(x)))  # [B, 3, H, W]


class _Level(nn.Module):
    """Residual blocks of one resolution, with attention after each on the coarsest, then the change of resolution."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, attention: bool) -> None:
        super().__init__()
        channels = [in_channels] + [out_channels] * num_blocks
        self.res = nn.ModuleList(_ResidualBlock(channels[i], channels[i + 1]) for i in range(num_blocks))
        self.attn = nn.ModuleList(_AttentionBlock(out_channels) for _ in range(num_blocks if attention else 0))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        resample = self.downsample or self.upsample
        return resample(x) if resample else x


class _ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _AttentionBlock(nn.Module):
    """One head over all positions of the grid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (conv(y).flatten(2).mT.unsqueeze(1) for conv in (self.q, self.k, self.v))  # [B, 1, h*w, C]
        y = F.scaled_dot_product_attention(q, k, v)  # scale 1 / sqrt(C)
        return x + self.proj_out(y.squeeze(1).mT.reshape(x.shape))  # [B, C, h, w]


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # zeros on the right and at the bottom only


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [_ResidualBlock(channels, channels), _AttentionBlock(channels), _ResidualBlock(channels, channels)]
    )


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


def load_tokenizer(path: str | Path, vq_size: str = "VQ-16") -> VQModel:
    """A tokenizer in evaluation mode from a folder of `save_pretrained`, or an official file of the size `vq_size`.

    Raises:
        FileNotFoundError, ValueError: as `VQModel.from_pretrained` and `VQModel.from_official`.
    """
    if (Path(path) / CONFIG_NAME).is_file():
        return VQModel.from_pretrained(path)
    return VQModel.from_official(path, VQConfig.preset(vq_size))


def _rows(grid: Tensor) -> Tensor:
    """[B, E, h, w] to [B * h * w, E]: batch, then row, then column."""
    return grid.permute(0, 2, 3, 1).flatten(0, 2)


def _chunks(batch: Tensor, pixels_per_image: int, batch_size: int | None) -> Iterator[Tensor]:
    if batch_size is None:
        batch_size = max(1, PIXELS_PER_CHUNK // pixels_per_image)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but at least one image has to be in a batch")
    yield from batch.split(batch_size)


def _not_a_folder_of_ours(path: Path) -> str:
    return (
        f"there is no {path}: from_pretrained reads folders that VQModel.save_pretrained wrote. An official file "
        f"becomes one with: python -m llamagen.checkpoints convert vq_ds16_c2i.pt {path.parent} --model VQ-16"
    )
