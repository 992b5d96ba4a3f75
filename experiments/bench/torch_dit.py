"""The `DiTTransformer2DModel` of diffusers in a plain PyTorch training loop; needs `sora_jax[test-peers]`."""

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import DiTTransformer2DModel

STEPS = 1000


def make_model(depth: int, width: int, heads: int, patch: int, side: int = 32) -> DiTTransformer2DModel:
    """Random weights, none of them zero; the copies of the embeddings that blocks hold are equal, as in a real one.

    As the official DiT where the one of diffusers departs from it: time frequencies 10000^(-i/128), 1e-6 in the norm
    before the MLP. In `eval`, which changes nothing but that classes are not dropped at random.
    """
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=4, out_channels=8, num_layers=depth,
        sample_size=side, patch_size=patch, num_embeds_ada_norm=1000,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.05 if name.endswith("bias") else 0.5 / math.sqrt(width))
        for block in model.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
            block.norm3.eps = 1e-6
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval()


def save(model: DiTTransformer2DModel, folder: Path) -> None:
    """In the format that `sora-jax convert --from=diffusers-dit` reads."""
    model.save_pretrained(folder)


class Tables:
    """The constants of DiT's 1000 linear steps, float32, as its official code keeps them."""

    def __init__(self):
        betas = np.linspace(1e-4, 2e-2, STEPS)
        bars = np.cumprod(1 - betas)
        before = np.append(1.0, bars[:-1])
        posterior = betas * (1 - before) / (1 - bars)
        self.signal, self.noise = self._of(np.sqrt(bars)), self._of(np.sqrt(1 - bars))
        self.lower = self._of(np.log(np.append(posterior[1], posterior[1:])))
        self.upper = self._of(np.log(betas))
        self.to_x0 = self._of(np.sqrt(1 / bars)), self._of(np.sqrt(1 / bars - 1))
        self.mean_x0 = self._of(betas * np.sqrt(before) / (1 - bars))

    @staticmethod
    def _of(values) -> torch.Tensor:
        return torch.from_numpy(values.astype(np.float32))


def hybrid_loss(tables: Tables, output, x0, x, eps, steps, weight=None):
    """Squared error plus variational bound in bits, of noise levels past the first; variance along axis 1.

    The mean, or for tokens (B, channels, L, values) the sum of the means of tokens times their weight (B, L).
    """

    def at(table):
        return table[steps].reshape(-1, *[1] * (x0.ndim - 1))

    predicted, values = output.chunk(2, dim=1)
    share = (values + 1) / 2
    log_variance = share * at(tables.upper) + (1 - share) * at(tables.lower)
    model_x0 = at(tables.to_x0[0]) * x - at(tables.to_x0[1]) * predicted.detach()
    off = at(tables.mean_x0) * (x0 - model_x0)
    true = at(tables.lower)
    divergence = 0.5 * (log_variance - true - 1 + torch.exp(true - log_variance) + off**2 * torch.exp(-log_variance))
    error = (predicted - eps) ** 2 + divergence / math.log(2.0)
    return error.mean() if weight is None else (error.mean((1, 3)) * weight).sum()


def tokens_of(latents: torch.Tensor, patch: int) -> torch.Tensor:
    """(B, C, H, W) to tokens (B, C, L, patch^2)."""
    batch, channels, height, width = latents.shape
    apart = latents.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return apart.permute(0, 1, 2, 4, 3, 5).reshape(batch, channels, -1, patch * patch)


def token_outputs(model: DiTTransformer2DModel, x, steps, classes) -> torch.Tensor:
    """The outputs (B, 2 C, L, patch^2) for latents that need not be square: the model's own parts in their order.

    Positions are those of the upper left corner of its table, which spares it to make one for each size.
    """
    side, patch = model.config.sample_size // model.config.patch_size, model.config.patch_size
    height, width = x.shape[2] // patch, x.shape[3] // patch
    table = model.pos_embed.pos_embed.reshape(side, side, -1)[:height, :width].reshape(1, height * width, -1)
    hidden = model.pos_embed.proj(x).flatten(2).transpose(1, 2) + table
    for block in model.transformer_blocks:
        hidden = block(hidden, timestep=steps, class_labels=classes)
    condition = model.transformer_blocks[0].norm1.emb(steps, classes, hidden_dtype=hidden.dtype)
    shift, scale = model.proj_out_1(torch.nn.functional.silu(condition)).chunk(2, dim=1)
    out = model.proj_out_2(model.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None])
    return out.reshape(len(x), height * width, patch * patch, -1).permute(0, 3, 1, 2)


def adamw(model) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)
