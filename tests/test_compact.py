"""The network that ships: any bands in any order, exact where it must be, kriging equal to its textbook formula."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from made_up_batch import made_up_batch

from pipeline.estimates import CONTEXT, ESTIMATES
from pipeline.models import build
from pipeline.models.batch import Batch
from pipeline.models.compact import LIMIT
from pipeline.models.doubt import middle_look
from pipeline.models.kriging import Kriging, Residual, closed_series

DISTANCE, FITTED = CONTEXT.index("distance"), CONTEXT.index("fitted")


def batch(**given):
    """A made-up batch whose estimates and context lie in plausible ranges, half of each target clear."""
    made = made_up_batch(estimates=len(ESTIMATES), context=len(CONTEXT), **given)
    context = made.context.clone()
    context[:, FITTED] = 1.0
    context[:, DISTANCE] = (1.0 - 2.0 * made.known) * 0.1
    return replace(made, context=context)


def trained(**options):
    """A network whose every weight was moved away from its start."""
    torch.manual_seed(3)
    model = build({"name": "compact", "width": 8, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def bands_of(given: Batch, order: list[int]) -> Batch:
    banded = {name: getattr(given, name)[:, :, order] for name in ("looks", "estimates", "context")}
    return replace(given, **banded, prior=given.prior[:, order], scale=given.scale[:, order])


@pytest.mark.parametrize("bands", [3, 4, 5, 10])
def test_any_number_of_bands_in_any_order(bands):
    given = batch(bands=bands, size=(16, 20))
    model, order = (
        trained(doubt=True, middle=True),
        torch.randperm(bands, generator=torch.Generator().manual_seed(bands)).tolist(),
    )
    with torch.inference_mode():
        there, turned = model(given, with_weights=True), model(bands_of(given, order), with_weights=True)
    for name in ("image", "aggregate", "sigma"):
        torch.testing.assert_close(getattr(turned, name), getattr(there, name)[:, order], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(turned.weights, there.weights[:, :, order], atol=1e-5, rtol=1e-4)
    assert there.image.shape == given.prior.shape
    assert (there.sigma > 0).all()


def test_whoever_shares_the_batch_changes_nothing():
    """One target shows nothing clear, the other does: the kriging of the first must not depend on the second."""
    given = batch(bands=3, size=(16, 20))
    known, context = given.known.clone(), given.context.clone()
    known[0], context[0, DISTANCE] = 0.0, 0.1
    both = replace(given, known=known, context=context)
    model = trained(doubt=True, middle=True, yields=True)
    with torch.inference_mode():
        together = model(both)
        for i in range(2):
            alone = model(Batch(**{f.name: getattr(both, f.name)[i : i + 1] for f in fields(Batch)}))
            for name in ("image", "aggregate", "sigma"):
                torch.testing.assert_close(getattr(together, name)[i : i + 1], getattr(alone, name))


def test_untrained_it_answers_with_the_prior_or_the_kriging():
    given = batch()
    plain = build({"name": "compact", "kriging": False}).eval()(given)
    assert torch.equal(plain.image, given.prior)
    kriged = build("compact").eval()(given)
    torch.testing.assert_close(kriged.image, kriged.aggregate)
    clear = given.known.expand_as(given.prior) > 0
    assert torch.equal(kriged.image[clear], given.prior[clear])
    assert not torch.allclose(kriged.image[~clear], given.prior[~clear])


def test_without_the_residual_network_x_is_the_answer():
    given, model = batch(), trained()
    off = build({"name": "compact", "width": 8, "fusion": False}).eval()
    off.load_state_dict(model.state_dict())
    torch.testing.assert_close(off(given).image, model(given).aggregate)


def test_the_order_of_dates_and_padding_do_not_matter():
    given, model = batch(steps=7), trained(doubt=True, middle=True)
    days = torch.tensor([[-31.0, -20, -11, -5, 4, 9, 26]]).expand(2, -1)
    given = replace(given, days=days)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    shuffled = replace(
        given, **{name: getattr(given, name)[:, order] for name in ("looks", "present", "clear", "days", "steps")}
    )
    padded = replace(
        given,
        **{
            name: torch.cat([getattr(given, name), torch.zeros_like(getattr(given, name)[:, :3])], dim=1)
            for name in ("looks", "present", "clear", "days", "steps")
        },
    )
    with torch.inference_mode():
        there = model(given).image
        torch.testing.assert_close(model(shuffled).image, there, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(padded).image, there, atol=1e-5, rtol=0)


def test_a_gate_that_yields_leaves_what_the_kriging_explains():
    given = batch(size=(24, 24))
    free, yielding = trained(), trained(yields=True)
    yielding.load_state_dict(free.state_dict())
    with torch.inference_mode():
        everywhere, held = free(given).aggregate, yielding(given).aggregate
        estimates, left, _ = free._estimates(given)
    kriged = given.prior + given.scale * ((estimates[:, -1] - given.prior) / given.scale).clamp(-LIMIT, LIMIT)
    torch.testing.assert_close(held - kriged, left * (everywhere - kriged), atol=1e-6, rtol=1e-4)
    gap = (given.known == 0).expand_as(kriged)
    assert (held - kriged)[gap].abs().mean() < (everywhere - kriged)[gap].abs().mean()


def test_a_target_that_shows_nothing_is_predicted():
    given, model = batch(), trained()
    nothing = replace(given, known=torch.zeros_like(given.known))
    out = model(nothing, with_weights=True)
    assert torch.isfinite(out.image).all()
    assert out.weights.abs().sum() > 0


def test_weights_lie_on_the_looks_beside_the_target():
    given, model = batch(targets=1, steps=4), trained()
    given = replace(
        given,
        days=torch.tensor([[-20.0, -5.0, 3.0, 40.0]]),
        steps=torch.ones(1, 4, dtype=torch.bool),
        present=torch.ones_like(given.present),
        clear=torch.ones_like(given.clear),
    )
    share = model(given, with_weights=True).weights.mean(dim=(0, 2, 3, 4))
    assert share[0] == 0
    assert share[3] == 0
    assert share[1].abs() > 0
    assert share[2].abs() > 0


@pytest.mark.parametrize("doubted", [False, True])
def test_kriging_is_the_textbook_formula(doubted):
    torch.manual_seed(0)
    kriging, h, w = Kriging().double().requires_grad_(False), 9, 11
    series = torch.randn(1, 3, 2, h, w, dtype=torch.float64)
    usable = (torch.rand(1, 1, h, w) > 0.5).double()
    residual = torch.randn(1, 2, h, w, dtype=torch.float64) * usable
    weights = torch.tensor([[1.0, 0.5, 0.25]], dtype=torch.float64)
    asked = 1.0 - usable
    doubt = torch.randn_like(usable) if doubted else torch.zeros_like(usable)
    known = Residual(residual, usable, torch.rand_like(usable), doubt)
    got, left = kriging((series, weights), known, asked, keys=h * w)

    share = (weights / weights.sum() / 2).sqrt().numpy()[0]
    features = (series.numpy()[0] * share[:, None, None, None]).reshape(6, -1).T
    y, x = np.mgrid[:h, :w]
    places = np.stack([y, x], axis=-1).reshape(-1, 2).astype(float)
    mixture = np.array([0.5, 0.5])

    def covariance(a, b):
        near = ((places[a][:, None] - places[b][None]) ** 2).sum(-1)
        alike = ((features[a][:, None] - features[b][None]) ** 2).sum(-1)
        space, season = kriging.log_space.exp().detach().numpy(), kriging.log_series.exp().detach().numpy()
        return sum(mixture[k] * np.exp(-np.sqrt(near / space[k] ** 2 + alike / season[k] ** 2 + 1e-6)) for k in (0, 1))

    keys, gaps = np.flatnonzero(usable.numpy().ravel()), np.flatnonzero(asked.numpy().ravel())
    noise = kriging.log_noise.exp().item() * np.exp(doubt.numpy().ravel()[keys])
    values = residual.numpy()[0].reshape(2, -1)[:, keys].T
    want = covariance(gaps, keys) @ np.linalg.solve(covariance(keys, keys) + np.diag(noise), values)
    np.testing.assert_allclose(got.detach().numpy()[0].reshape(2, -1)[:, gaps].T, want, atol=1e-6)
    assert (got.detach().numpy()[0].reshape(2, -1)[:, keys] == 0).all()
    assert ((left >= 0) & (left <= 1)).all()


def test_fewer_pixels_to_learn_from_give_the_same_answer():
    given = batch(size=(16, 16))
    every, some = (trained(doubt=True, middle=True, learned_at=n).train() for n in (None, 40))
    torch.testing.assert_close(some(given).image, every(given).image)
    some(given).image.square().mean().backward()
    assert some.kriging.log_space.grad.abs().sum() > 0
    assert some.doubt.tell.weight.grad.abs().sum() > 0


def test_doubt_begins_at_hardly_anything():
    given = batch()
    plain, robust = (build({"name": "compact", "doubt": d}).eval() for d in (False, True))
    torch.testing.assert_close(robust(given).image, plain(given).image, atol=2e-3, rtol=0)


def test_the_middle_look_is_levelled_and_not_moved_by_one_cloud():
    given = batch(targets=1, steps=5, bands=2, size=(16, 16))
    ground = 0.1 + 0.2 * torch.rand(1, 1, 2, 16, 16)
    gain = torch.tensor([0.0, 0.03, -0.02, 0.01, 0.0]).view(1, 5, 1, 1, 1)
    known = torch.ones(1, 1, 16, 16)
    known[..., :4, :4] = 0
    looks = ground + gain
    looks[:, 1, :, :3, :3] = 0.9  # a cloud that its mask misses
    given = replace(given, looks=looks, prior=ground[:, 0], known=known)
    clear = torch.ones(1, 5, 1, 16, 16)
    clear[:, :, :, 0, 0] = 0
    middle, spread = middle_look(given, clear)
    assert (middle - ground[:, 0])[..., 1:, 1:].abs().max() < 0.01
    assert torch.equal(middle[..., 0, 0], given.prior[..., 0, 0])
    assert (spread[..., 0, 0] == 0).all()
    assert torch.isfinite(spread).all()


@pytest.mark.parametrize("options", [{}, {"doubt": True, "middle": True, "local": True, "yields": True}])
def test_every_part_learns(options):
    model = trained(**options).train()
    given = batch(size=(16, 16))
    out = model(given)
    (out.image.square().mean() + out.sigma.log().mean()).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not still
    assert model.kriging.log_space.grad.abs().sum() > 0
    assert model.kriging.fade.grad.abs() > 0


def test_gaps_of_a_series_are_closed_linearly():
    looks = torch.tensor([0.1, 9.0, 0.3, 0.5]).view(1, 4, 1, 1, 1).repeat(1, 1, 1, 1, 2)
    looks[..., 1] += torch.tensor([0.1, 0.0, -0.1, 0.1]).view(1, 4, 1, 1)
    clear = torch.tensor([1.0, 0.0, 1.0, 1.0]).view(1, 4, 1, 1, 1).repeat(1, 1, 1, 1, 2)
    series, days, share = closed_series(looks, clear, torch.tensor([[-20.0, -10.0, 0.5, 10.0]]), 4)
    assert days.tolist() == [[-20.0, -10.0, 0.5, 10.0]]
    assert share.tolist() == [[1.0, 0.0, 1.0, 1.0]]
    # the second date lies half way between the first and the third: hardly any contrast is left there
    assert series[0, 1].abs().max() < 0.5 * series[0, 0].abs().max()
