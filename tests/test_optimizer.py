"""The optimiser and the learning rate's course, against torch.optim's."""
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from optimizer import Adam, learning_rate


def problem() -> tuple[list[torch.nn.Parameter], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (4,))]
    return weights, torch.randn(5, 3, generator=generator)


def backward(weights: list[torch.nn.Parameter], x: torch.Tensor, step: int) -> None:
    for weight in weights:
        weight.grad = None
    (x @ weights[0] + weights[1] - step / 10).square().mean().backward()


@pytest.mark.parametrize("kind, weight_decay", [("adam", 0.0), ("adam", 0.1), ("adamw", 0.0), ("adamw", 0.1)])
@pytest.mark.parametrize("schedule", ["constant", "onecycle"])
def test_it_goes_where_torch_optim_goes(kind, weight_decay, schedule):
    (ours, x), (theirs, _), steps = problem(), problem(), 40
    optimizer = Adam(ours, weight_decay, decoupled=kind == "adamw")
    reference = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind](theirs, lr=0.03, weight_decay=weight_decay, fused=True)
    course = torch.optim.lr_scheduler.OneCycleLR(reference, 0.03, total_steps=steps + 1, pct_start=0.1) if schedule == "onecycle" else None
    start = [weight.detach().clone() for weight in ours]
    for step in range(steps):
        backward(ours, x, step)
        optimizer.step(*learning_rate(schedule, 0.03, step, steps))
        backward(theirs, x, step)
        reference.step()
        if course:
            course.step()
        for weight, other in zip(ours, theirs):
            torch.testing.assert_close(weight, other, rtol=1e-6, atol=1e-7)
    assert all((weight - before).abs().min() > 0.01 for weight, before in zip(ours, start))


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 19, 20, 101, 500])
def test_one_cycle_is_torchs(steps):
    optimizer = torch.optim.Adam(problem()[0], lr=1.0)
    course = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1, pct_start=max(0.1, 2 / (steps + 1)))
    for step in range(steps):
        group = optimizer.param_groups[0]
        assert learning_rate("onecycle", 2e-3, step, steps) == pytest.approx((group["lr"], group["betas"][0]), rel=1e-9)
        optimizer.step()
        course.step()


def test_a_parameter_without_a_gradient_stays():
    weights, x = problem()
    optimizer, spare = Adam([*weights, torch.nn.Parameter(torch.ones(2))]), torch.ones(2)
    backward(weights, x, 0)
    optimizer.step(0.1)
    assert torch.equal(optimizer.parameters[2], spare) and optimizer.steps[2] == 0 and optimizer.steps[0] == 1


def test_its_state_goes_on_and_one_that_does_not_fit_is_refused():
    (ours, x), (theirs, _) = problem(), problem()
    first, second = Adam(ours), Adam(theirs)
    for step in range(3):
        backward(ours, x, step)
        first.step(0.1)
    for weight, other in zip(ours, theirs):
        other.data.copy_(weight)
    second.load_state_dict(first.state_dict())
    for weights, optimizer in ((ours, first), (theirs, second)):
        backward(weights, x, 3)
        optimizer.step(0.1)
    assert all(torch.equal(weight, other) for weight, other in zip(ours, theirs))
    for other in (ours[:1], ours[::-1]):
        with pytest.raises(ValueError):
            Adam(other).load_state_dict(first.state_dict())


def test_it_does_not_import_the_compiler():
    """What it is there for: a training starts a second or two earlier."""
    code = ("import sys, torch; from optimizer import Adam; w = torch.nn.Parameter(torch.ones(2)); a = Adam([w]); "
            "w.sum().backward(); a.step(0.1); print('torch._dynamo' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout == "False\n"
