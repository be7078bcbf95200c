from __future__ import annotations

import pytest
import torch

from bm3il.protocol.layout import Layout
from bm3il.protocol.networks.options import FORBIDDEN_LOGIT, SHORT_AXIS, Options, log_softmax
from bm3il.protocol.registry import make_environment

TOWN = "berlin?types=2&agents=6&sight=near"


def some() -> tuple[Options, Options, torch.Tensor]:
    """Of nine actions three, of which the last may be padding; the same as a mask; outputs of networks."""
    generator = torch.Generator().manual_seed(0)
    actions = torch.stack([torch.randperm(9, generator=generator)[:3].sort()[0] for _ in range(20)])
    allowed = torch.ones(20, 3, dtype=torch.bool)
    allowed[::2, 2] = False
    mask = torch.zeros(20, 9, dtype=torch.bool).scatter_(-1, actions, allowed)
    return Options(allowed, actions), Options(mask), torch.randn(20, 9, generator=generator)


@pytest.mark.parametrize("learned", [False, True])
def test_probabilities_are_those_of_the_mask(learned: bool) -> None:
    near, mask, outputs = some()
    few = near.logits(outputs.clone().requires_grad_(learned)).softmax(-1)
    all_of_them = mask.logits(outputs.clone().requires_grad_(learned)).softmax(-1)
    torch.testing.assert_close(few, all_of_them.gather(-1, near.actions))
    assert not all_of_them[~mask.allowed].any()
    assert (near.logits(outputs.clone())[~near.allowed] == FORBIDDEN_LOGIT).all()


def test_gradients_go_back_to_where_the_logits_came_from() -> None:
    near, mask, outputs = some()
    weight = torch.randn(20, 9, generator=torch.Generator().manual_seed(1))
    gradients = []
    for options in (near, mask):
        logits = options.logits(outputs.clone()).requires_grad_()
        (logits.softmax(-1) * options.of(weight)).sum().backward()
        gradients.append(options.spread(logits.grad, 9))
    torch.testing.assert_close(*gradients)
    assert gradients[0].any()


def test_numbers_and_actions_are_each_others_inverse() -> None:
    near, mask, _ = some()
    for options in (near, mask):
        count = options.allowed.shape[-1]
        number = torch.multinomial(options.allowed.float(), 1, generator=torch.Generator().manual_seed(2)).squeeze(-1)
        action = options.action(number)
        assert torch.equal(options.number(action), number)
        assert mask.allowed.gather(-1, action.unsqueeze(-1)).all()
        assert count > int(number.max())


@pytest.mark.parametrize("options", [1, 5, SHORT_AXIS, SHORT_AXIS + 1])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 7)])
def test_few_options_make_no_difference_to_their_probabilities(shape: tuple[int, ...], options: int) -> None:
    logits = torch.randn(*shape, options, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits[..., :1] = FORBIDDEN_LOGIT if options > 1 else 0.0
    logits.requires_grad_()
    shares = log_softmax(logits)
    torch.testing.assert_close(shares, logits - logits.logsumexp(-1, keepdim=True))
    (found,), (expected,) = (
        torch.autograd.grad(x.square()[..., -1].sum(), logits) for x in (shares, logits.log_softmax(-1))
    )
    torch.testing.assert_close(found, expected)


def test_a_town_offers_the_roads_that_go_on_from_where_one_is() -> None:
    environment = make_environment(TOWN, 3)
    layout = Layout.of(environment.spec, "type")
    (block,), (seen,) = layout.blocks, environment.reset(1).seen(environment.spec)
    grid = block.see(seen)
    options = grid.options()
    assert options.actions is not None
    assert options.actions.shape[-1] * 4 < block.action_dim
    mask = torch.zeros(*grid.shape[:2], block.action_dim, dtype=torch.bool)
    assert torch.equal(mask.scatter_(-1, options.actions, options.allowed), grid.masks())
