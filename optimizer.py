"""Adam and AdamW, and the learning rate's course over a training.

The arithmetic is torch.optim's own. Its Optimizer classes are left out since making one imports PyTorch's compiler, which
takes longer than the contest notebook's decoder takes to train.
"""
import math
from collections.abc import Iterable

import torch
from torch.optim.adam import adam


class Adam:
    """Adam (Kingma and Ba, ICLR 2015), or AdamW (Loshchilov and Hutter, ICLR 2019) when `decoupled`, as torch.optim has them."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], weight_decay: float = 0.0, decoupled: bool = False):
        self.parameters, self.weight_decay, self.decoupled = list(parameters), weight_decay, decoupled
        self.means, self.squares = ([torch.zeros_like(parameter) for parameter in self.parameters] for _ in range(2))
        self.steps = [torch.zeros((), device=parameter.device) for parameter in self.parameters]

    @torch.no_grad()
    def step(self, lr: float, beta1: float = 0.9) -> None:
        """Change every parameter that has a gradient, by all of its gradients so far."""
        rows = zip(self.parameters, self.means, self.squares, self.steps)
        parameters, means, squares, steps = map(list, zip(*(row for row in rows if row[0].grad is not None)))
        adam(parameters, [parameter.grad for parameter in parameters], means, squares, [], steps, fused=True, amsgrad=False,
             maximize=False, lr=lr, beta1=beta1, beta2=0.999, eps=1e-8, weight_decay=self.weight_decay,
             decoupled_weight_decay=self.decoupled)

    def state_dict(self) -> dict[str, list[torch.Tensor]]:
        """What `load_state_dict` of another needs to go on as this one would."""
        return {"means": self.means, "squares": self.squares, "steps": self.steps}

    def load_state_dict(self, state: dict[str, list[torch.Tensor]]) -> None:
        """Take over the state of one with parameters of the same shapes. Raises ValueError or RuntimeError when they are not."""
        for name, mine in self.state_dict().items():
            for tensor, saved in zip(mine, state[name], strict=True):
                if tensor.shape != saved.shape:
                    raise ValueError(f"{name} of shape {list(saved.shape)}, expected {list(tensor.shape)}")
                tensor.copy_(saved)


def learning_rate(schedule: str, peak: float, step: int, steps: int) -> tuple[float, float]:
    """Return the learning rate and Adam's beta1 of one of `steps` steps.

    "constant": peak and 0.9. "onecycle" (Smith and Topin, "Super-Convergence", 2018; torch.optim.lr_scheduler.OneCycleLR over
    steps + 1): up from peak / 25 in the first tenth, then down towards 0, along cosines; beta1 the other way, from 0.95 to 0.85.
    """
    if schedule == "constant":
        return peak, 0.9
    top = max(0.1 * (steps + 1), 2) - 1  # the step at the peak, no earlier than the second
    if step <= top:
        share = (1 - math.cos(math.pi * step / top)) / 2
        return peak / 25 + share * (peak - peak / 25), 0.95 - 0.1 * share
    share = (1 + math.cos(math.pi * (step - top) / (steps - top))) / 2
    return peak / 25e4 + share * (peak - peak / 25e4), 0.95 - 0.1 * share
