"""From a trained decoder to masks: adapting it to a clip, predicting at frame size.

B batch, h w feature grid, H W frame.
"""
import copy
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from guided import guided_probabilities
from models import Decoder
from optimizer import Adam
from resident import Features


def adapt(decoder: Decoder, features: Features, index: torch.Tensor, seed: int = 0) -> Decoder:
    """Return a copy of the decoder trained a little on its own confident predictions for one clip, without labels.

    index: int64 [n], the clip's frames. Cells predicted above 0.8 or below 0.2 are the targets, of `decoder.adapt_steps`
    steps of 8 frames drawn from `seed`. Hiding cues and features is off, dropping components on.
    """
    tuned = copy.deepcopy(decoder)
    with torch.no_grad():
        probability = torch.cat([torch.sigmoid(decoder(features.batch(part)).float()) for part in index.split(16)])
    target, sure = (probability > 0.5).float(), ((probability > 0.8) | (probability < 0.2)).float()
    optimizer = Adam(tuned.parameters(), weight_decay=0.01, decoupled=True)
    tuned.train()
    vars(tuned).update(hide=0.0, lose=0.0)
    for step in range(decoder.adapt_steps):
        torch.manual_seed(seed + step)
        chosen = torch.randperm(len(index))[:8]
        output = tuned(features.batch(index[chosen]))
        where = chosen.to(output.device)
        loss = (F.binary_cross_entropy_with_logits(output, target[where], reduction="none") * sure[where]).mean()
        tuned.zero_grad()
        loss.backward()
        optimizer.step(lr=5e-4)
    return tuned.eval()


@torch.inference_mode()
def predict(decoder: Decoder, features: Features, index: torch.Tensor, batch: int = 32,
            images: Iterator[np.ndarray] | None = None) -> Iterator[torch.Tensor]:
    """Yield masks for the frames of `index`, int64 [n], in order: each uint8 [H, W], floor(255 * probability).

    images: the frames themselves, uint8 [H, W, 3] each, in that order; the decoder's logits are then upsampled
    along their edges, to their size (see guided.py). Without, they are upsampled plainly to the decoder's own.
    """
    for part in index.split(batch):
        output = decoder(features.batch(part)).float()
        if images is None:
            yield from decoder.pixels(output)
            continue
        for logits in output:
            frame = torch.from_numpy(next(images)).to(features.device).permute(2, 0, 1)
            yield (guided_probabilities(logits, frame) * 255).to(torch.uint8)
