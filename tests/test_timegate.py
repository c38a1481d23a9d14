"""The gate over time: its equations by hand, what must not matter, and where it has no opinion."""

from dataclasses import replace

import pytest
import torch
from made_up_batch import made_up_batch

from pipeline.models.timegate import EPSILON, GateConfig, TimeGate

torch.set_num_threads(1)
EVERY = {
    "paper": {},
    "shared weights": {"weights": "shared"},
    "signed days": {"signed_days": True, "condition": False},
    "hard mask": {"hard_mask": True},
    "no fallback": {"fallback": False},
    "prior as base": {"prior": "base", "estimates": 1},
    "prior as member": {"prior": "member", "estimates": 2, "hard_mask": True},
    "extra inputs": {"extra_inputs": ("known", "prior", "scale"), "context": 2},
    "any bands": {"bands": (), "prior": "member", "estimates": 1, "extra_inputs": ("prior",), "context": 1},
}


def _gate(seed=1, opening=0.7, **options):
    """A gate in the state of some training: running statistics and the opening moved, weights well above 0."""
    torch.manual_seed(seed)
    gate = TimeGate(GateConfig(name="gate", **options))
    with torch.no_grad():
        gate.last[1].bias += 1.0
        for _ in range(3):
            gate(made_up_batch(seed=seed + 9))
        if gate.opening is not None:
            gate.opening.fill_(opening)
    return gate.eval()


@pytest.fixture(params=EVERY, ids=str)
def options(request):
    return EVERY[request.param]


def _close(one, two, atol=1e-5):
    torch.testing.assert_close(one, two, rtol=0, atol=atol)


def test_the_equations_written_out_by_hand():
    gate, batch = _gate(), made_up_batch(targets=1)
    batch = replace(batch, steps=torch.ones_like(batch.steps), condition=torch.rand_like(batch.condition))
    with torch.no_grad():
        cond = gate.conditioning(batch.condition)
        htime = []
        for t in range(5):
            decay = torch.exp(-torch.relu(gate.decay_slope * batch.days[0, t].abs() / 30 + gate.decay_offset))
            seen = torch.cat([batch.looks[:, t], batch.present[:, t] * decay, batch.clear[:, t]], dim=1)
            x = gate.combine_norm(gate.combine(seen)) + cond
            htime.append(torch.exp(gate.last(gate.spatial(x)).clamp(min=0)) - 1)
        htime = torch.stack(htime, dim=1)
        x = (htime / (htime.sum(dim=1, keepdim=True) + EPSILON) * batch.looks).sum(dim=1)
        hagg = gate.abstract(htime[0]).amax(dim=0, keepdim=True)
        got = gate(batch, with_weights=True)
    sure = htime.sum(dim=1) > 1e-2
    assert sure.float().mean() > 0.5
    _close(got.aggregate[sure], x[sure])
    _close(got.features, hagg, 1e-4)
    _close(got.weights.sum(dim=1)[sure], torch.ones_like(x)[sure], 1e-3)
    assert got.features.shape[1] == 32


def test_weights_say_what_the_aggregate_is_made_of(options):
    gate, batch = _gate(**options), made_up_batch()
    with torch.no_grad():
        got = gate(batch, with_weights=True)
    if options.get("bands") == ():
        batch = batch.by_band()
    assert got.weights.shape == batch.looks.shape
    assert got.weights[~batch.steps].abs().max() == 0
    mixed = (got.weights * batch.looks).sum(dim=1)
    if options.get("prior", "none") == "none":
        _close(mixed, got.aggregate)
    else:
        assert (got.weights.sum(dim=1) < 1).all()  # the rest is the prior's


def test_streaming_equals_the_batch_result(options):
    gate, batch = _gate(**options), made_up_batch()
    with torch.no_grad():
        once, streamed = (way(batch, with_weights=True) for way in (gate.at_once, gate.streamed))
    _close(once.aggregate, streamed.aggregate)
    _close(once.features, streamed.features, 1e-4)
    _close(once.weights, streamed.weights)


def test_the_heaviest_look_is_that_of_the_largest_share(options):
    """Found while the steps pass by, the largest of the shares that are there at the end."""
    gate, batch = _gate(**options), made_up_batch()
    with torch.no_grad():
        gate.last[1].bias.sub_(0.7)  # here and there the gate has no opinion
        got = gate(batch, with_weights=True)
    assert got.heaviest.shape == (2, 12, 16)
    shares = got.weights.unflatten(0, (2, -1)).movedim(1, 2).sum(dim=(2, 3))  # over bands, by step
    largest = shares.amax(dim=1)
    assert (got.heaviest[largest <= 0] == -1).all()
    there = largest > 0
    assert there.any()
    of_it = shares.gather(1, got.heaviest.clamp_min(0)[:, None])[:, 0]
    if options.get("bands") == () or options.get("weights", "per_band") == "per_band":
        # bands have sums of their own: the largest weight is nearly the largest share
        assert (of_it[there] > 0).all()
        assert (of_it[there] >= 0.9 * largest[there]).float().mean() > 0.98
    else:
        _close(of_it[there], largest[there])


def test_order_and_padding_do_not_matter(options):
    gate, batch = _gate(**options), made_up_batch()
    order = [3, 1, 4, 0, 2]
    series = ("looks", "present", "clear", "days", "steps")
    shuffled = replace(batch, **{name: getattr(batch, name)[:, order] for name in series})
    longer = {name: getattr(batch, name)[:, [*range(5), 0, 1]].clone() for name in series}
    longer["looks"][:, 5:] = 9.0
    longer["steps"][:, 5:] = False
    with torch.no_grad():
        for way in (gate.at_once, gate.streamed):
            wanted = way(batch)
            for other in (shuffled, replace(batch, **longer)):
                _close(way(other).aggregate, wanted.aggregate)
                _close(way(other).features, wanted.features, 1e-4)


def test_padding_enters_no_statistics_while_training(options):
    batch = made_up_batch()
    wild = replace(batch, looks=batch.looks.clone(), days=batch.days.clone())
    wild.looks[~batch.steps] = 50.0
    wild.days[~batch.steps] = 900.0
    gates = [_gate(**options).train() for _ in range(2)]
    got = [gate(given) for gate, given in zip(gates, (batch, wild), strict=True)]
    assert torch.equal(got[0].aggregate, got[1].aggregate)
    assert torch.equal(got[0].features, got[1].features)
    for name, value in gates[0].state_dict().items():
        assert torch.equal(value, gates[1].state_dict()[name]), name


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("trained", [False, True])
def test_a_single_clear_look_comes_out_as_it_went_in(seed, trained):
    gate = _gate(seed, hard_mask=True) if trained else TimeGate(GateConfig(name="gate", hard_mask=True)).eval()
    batch = made_up_batch(targets=3, seed=seed)
    which = torch.randint(0, 4, (3, 1, 1, 12, 16))
    clear = (torch.arange(5)[None, :, None, None, None] == which).float().expand(-1, -1, 2, -1, -1)
    batch = replace(batch, clear=clear, present=torch.ones_like(batch.present), looks=torch.rand_like(batch.looks))
    wanted = batch.looks.gather(1, which.expand(-1, -1, 6, -1, -1))[:, 0]
    with torch.no_grad():
        _close(gate(batch).aggregate, wanted)


def test_a_series_of_one_look_needs_no_hard_mask():
    batch = made_up_batch(steps=1)
    batch = replace(batch, clear=torch.ones_like(batch.clear), present=torch.ones_like(batch.present))
    for gate in (_gate(), TimeGate(GateConfig(name="gate")).eval()):
        with torch.no_grad():
            _close(gate(batch).aggregate, batch.looks[:, 0])


def test_an_untrained_exact_gate_loses_pixels_that_the_fallback_keeps():
    batch = made_up_batch(steps=1)
    batch = replace(batch, clear=torch.ones_like(batch.clear), present=torch.ones_like(batch.present))
    torch.manual_seed(3)
    with torch.no_grad():
        exact = TimeGate(GateConfig(name="gate", fallback=False)).eval()
        exact.train()(made_up_batch(seed=4))
        lost = (exact.eval()(batch).aggregate == 0).float().mean()
    assert 0.1 < lost < 0.9


def test_nothing_changed_and_no_cloud_gives_the_scene():
    batch = made_up_batch()
    same = batch.looks[:, :1].expand_as(batch.looks).clone()
    ones = {"clear": torch.ones_like(batch.clear), "present": torch.ones_like(batch.present)}
    with torch.no_grad():
        _close(_gate()(replace(batch, looks=same, **ones)).aggregate, same[:, 0])


def test_one_is_good_in_every_mask():
    gate, batch = _gate(hard_mask=True), made_up_batch(targets=1, steps=3)
    ones = replace(
        batch, clear=torch.ones_like(batch.clear), present=torch.ones_like(batch.present), steps=batch.steps | True
    )
    for name, channel in (("present", 0), ("clear", 0), ("clear", 1)):
        marked = getattr(ones, name).clone()
        marked[:, 1, channel] = 0
        with torch.no_grad():
            weights = gate(replace(ones, **{name: marked}), with_weights=True).weights
        assert weights[:, 1].abs().max() == 0, (name, channel)
        assert weights[:, 0].max() > 0


def test_where_nothing_is_clear_nothing_is_made_up():
    batch = made_up_batch()
    batch = replace(batch, clear=torch.zeros_like(batch.clear))
    with torch.no_grad():
        got = _gate(hard_mask=True)(batch, with_weights=True)
    assert got.aggregate.abs().max() == 0
    assert got.weights.abs().max() == 0


@pytest.mark.parametrize("prior", ["base", "member"])
def test_untrained_the_aggregate_is_the_prior(prior):
    torch.manual_seed(0)
    gate, batch = TimeGate(GateConfig(name="gate", prior=prior, estimates=1)), made_up_batch()
    assert torch.equal(gate(batch).aggregate, batch.prior)
    gate(batch).aggregate.square().mean().backward()
    assert gate.opening.grad.abs() > 0  # it can learn to leave it
    with torch.no_grad():
        assert torch.equal(gate.eval()(batch).aggregate, batch.prior)


@pytest.mark.parametrize("prior", ["base", "member"])
def test_where_there_is_no_prior_the_looks_speak(prior):
    gate, batch = _gate(prior=prior, estimates=1), made_up_batch()
    batch.prior[:, :, :4] = 0
    batch.estimates[:, :, :, :4] = 0
    with torch.no_grad():
        got = gate(batch, with_weights=True)
    _close((got.weights * batch.looks).sum(dim=1)[:, :, :4], got.aggregate[:, :, :4], 1e-3)
    assert (got.aggregate[:, :, :4] > 0).float().mean() > 0.9


def test_a_member_keeps_the_aggregate_between_the_prior_and_the_looks():
    batch = made_up_batch()
    low = batch.prior.minimum(batch.looks.amin(dim=1)).minimum(batch.estimates.amin(dim=1))
    high = batch.prior.maximum(batch.looks.amax(dim=1)).maximum(batch.estimates.amax(dim=1))
    for opening in (-0.5, 0.3, 5.0):
        with torch.no_grad():
            x = _gate(prior="member", estimates=2, opening=opening)(batch).aggregate
        assert ((x >= low - 1e-5) & (x <= high + 1e-5)).all()


def test_signed_days_tell_before_from_after_and_plain_ones_do_not():
    batch = made_up_batch()
    mirrored = replace(batch, days=-batch.days)
    with torch.no_grad():
        plain, signed = _gate(), _gate(signed_days=True)
        assert torch.equal(plain(batch).aggregate, plain(mirrored).aggregate)
        assert (signed(batch).aggregate - signed(mirrored).aggregate).abs().max() > 1e-4


def test_the_floor_gives_every_step_a_weight_while_training_only():
    torch.manual_seed(0)
    gate, batch = TimeGate(GateConfig(name="gate", floor=True)), made_up_batch()
    with torch.no_grad():
        gate.last[1].bias.fill_(-50.0)  # every g is negative
        got = gate(batch, with_weights=True)
        wanted = batch.steps[:, :, None, None, None] / (batch.steps.sum(dim=1)[:, None, None, None, None] + 1.0)
        _close(got.weights, wanted.expand_as(batch.looks))  # uniform; epsilon in the denominator is one step's share
        off = gate.eval()(batch, with_weights=True)
    usable = batch.present * batch.clear.prod(dim=2, keepdim=True) * batch.steps[:, :, None, None, None]
    _close(off.weights, (usable / usable.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(batch.looks))


def test_the_condition_and_extra_inputs_are_used_or_not():
    batch = made_up_batch()
    cloudy = replace(batch, condition=torch.zeros_like(batch.condition))
    other = replace(batch, known=1 - batch.known, context=batch.context.flip(2))
    with torch.no_grad():
        assert (_gate()(batch).aggregate - _gate()(cloudy).aggregate).abs().max() > 1e-4
        off = _gate(condition=False)
        assert torch.equal(off(batch).aggregate, off(cloudy).aggregate)
        extra = _gate(extra_inputs=("known",), context=1)
        assert (extra(batch).aggregate - extra(other).aggregate).abs().max() > 1e-4


def test_a_condition_that_never_varies_means_the_same_in_training_and_in_use():
    """Batch norm would divide by the root of no variance: a training on clear targets then fails where it is used."""
    torch.manual_seed(0)
    gate, batch = TimeGate(GateConfig(name="gate")), made_up_batch()
    with torch.no_grad():
        for _ in range(60):
            gate(batch)
        gate.conditioning[0].weight *= 1.1  # a step of the optimiser
        trained = gate.train().conditioning(batch.condition)
        torch.testing.assert_close(gate.eval().conditioning(batch.condition), trained)


def test_all_parameters_learn(options):
    gate, batch = _gate(**options).train(), made_up_batch()
    got = gate(replace(batch, condition=torch.rand_like(batch.condition)))
    (got.aggregate.square().mean() + got.features.square().mean()).backward()
    for name, value in gate.named_parameters():
        assert value.grad is not None, name
        assert value.grad.abs().sum() > 0, name


def test_any_bands_in_any_order_give_the_same():
    gate, batch = _gate(bands=()), made_up_batch()
    pick = [4, 0, 2]
    fewer = replace(
        batch,
        looks=batch.looks[:, :, pick],
        prior=batch.prior[:, pick],
        scale=batch.scale[:, pick],
        estimates=batch.estimates[:, :, pick],
        context=batch.context[:, :, pick],
    )
    with torch.no_grad():
        wanted = gate(batch).aggregate.unflatten(0, (2, 6))[:, pick]
        _close(gate(fewer).aggregate.unflatten(0, (2, 3)), wanted, 1e-6)


def test_memory_does_not_grow_with_the_number_of_steps():
    gate = _gate(prior="member")
    peaks = []
    for steps in (2, 48):
        batch = made_up_batch(targets=1, steps=steps, size=(64, 64))
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            gate(batch)  # as ``predict`` calls it, with the heaviest look in its answer
        held = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        peaks.append(peak)
    assert peaks[0] > 64 * 64 * 64 * 4  # it did measure: one step's widest features
    assert peaks[1] <= 1.02 * peaks[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bands": ("red", "nir")}, "takes 2 bands, the batch has 6"),
        ({"context": 3}, "takes 3 context channels, got 2"),
        ({"prior": "base", "estimates": 3}, "takes 3 estimates, got 2"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TimeGate(GateConfig(name="gate", **options))(made_up_batch())
