"""The contest notebook's decoder and training loop, as it has them."""
import numpy as np
import torch
import torch.nn.functional as F


def train_notebook(features: np.ndarray, masks: np.ndarray, steps: int, batch: int, seed: int = 0):
    """Train the notebook's decoder as it does, on full-size masks, frames in order.

    Returns (the decoder, its convolution first; the loss of each step).
    """
    torch.manual_seed(seed)
    decoder = notebook_decoder(features.shape[1], masks.shape[1:])
    optimizer = torch.optim.Adam(decoder.parameters(), lr=5e-4, betas=(0.9, 0.999))
    losses: list[float] = []
    while len(losses) < steps:
        for first in range(0, len(features), batch)[:steps - len(losses)]:
            xs = torch.from_numpy(features[first:first + batch]).float()
            ys = torch.from_numpy(masks[first:first + batch]).float()[:, None]
            loss = F.binary_cross_entropy(decoder(xs), ys)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return decoder, losses


def notebook_decoder(channels: int, size: tuple[int, int]) -> torch.nn.Sequential:
    """Return the contest notebook's decoder: [B, C, h, w] to probabilities [B, 1, H, W]."""
    convolution = torch.nn.Conv2d(channels, 1, kernel_size=3)
    return torch.nn.Sequential(convolution, torch.nn.Sigmoid(), torch.nn.AdaptiveAvgPool2d(size))
