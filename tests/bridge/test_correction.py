"""Correction of predicted iterations, and room kept for online work, on numbers counted by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("aiohttp", reason="the bridge extra is not installed")
from test_live_telemetry import World

from ooco_gym.bridge.gateway.correction import LARGEST, Correction
from ooco_gym.bridge.gateway.instances import Scrape
from ooco_gym.bridge.gateway.load import DECODE, PREFILL

ALONE_S = 0.004


def taught(a, b, batches, rounds=200):
    """A correction that saw an engine whose iterations take a t + b B t1, where the model says t1 for every batch."""
    correction = Correction()
    for _ in range(rounds):
        for batch in batches:
            correction.observe((a + b * batch) * ALONE_S, 100.0, ALONE_S, batch, ALONE_S)
    return correction


def test_nothing_is_corrected_before_there_was_an_observation():
    assert Correction().corrected_s(0.01, 8, ALONE_S) == 0.01


def test_both_factors_are_found_where_batches_vary():
    correction = taught(1.5, 0.25, (1, 4, 8))
    assert correction.a == pytest.approx(1.5, rel=0.05) and correction.b == pytest.approx(0.25, rel=0.05)
    assert correction.corrected_s(ALONE_S, 16, ALONE_S) == pytest.approx((1.5 + 4.0) * ALONE_S, rel=0.05)


def test_one_batch_size_is_predicted_right_whatever_the_split():
    correction = taught(2.0, 0.0, (4,))
    assert correction.corrected_s(ALONE_S, 4, ALONE_S) == pytest.approx(2.0 * ALONE_S, rel=0.05)


def test_old_observations_fade():
    correction = taught(5.0, 0.0, (1, 8))
    for _ in range(400):
        for batch in (1, 8):
            correction.observe(ALONE_S, 100.0, ALONE_S, batch, ALONE_S)
    assert correction.corrected_s(ALONE_S, 8, ALONE_S) == pytest.approx(ALONE_S, rel=0.05)


def test_what_says_nothing_is_passed_over_and_factors_are_bounded():
    correction = Correction()
    for gap_s, tokens, predicted_s in ((0.0, 10.0, 0.01), (0.1, 0.0, 0.01), (0.1, 10.0, 0.0)):
        correction.observe(gap_s, tokens, predicted_s, 4, ALONE_S)
    assert (correction.a, correction.b) == (1.0, 0.0)
    for _ in range(100):
        correction.observe(1e6, 1000.0, 0.001, 4, ALONE_S)
    assert 0.0 < correction.a <= LARGEST and 0.0 <= correction.b <= LARGEST


def scrape(world, index, gaps, gaps_s):
    instance = world.scheduler.instances[index]
    instance.take_scrape(Scrape(world.clock.now, 0.0, 0.0, 0.0, first_tokens=0.0, gaps=gaps, gaps_s=gaps_s))
    world.scheduler.after_scrape(instance)


def test_an_engine_slower_than_predicted_is_believed_on_its_own_instance():
    world = World(connector="none")
    prediction = world.scheduler.prediction
    world.send(world.arrive(100), 2, DECODE)
    before_s = prediction.decode_s(2, 1, 100)
    scrape(world, 2, 0.0, 0.0)
    for count in range(1, 100):
        scrape(world, 2, 1000.0 * count, 3.0 * before_s * 1000.0 * count)
    assert prediction.decode_s(2, 1, 100) == pytest.approx(3.0 * before_s, rel=0.1)
    assert prediction.decode_s(3, 1, 100) == before_s


def test_correction_can_be_switched_off():
    world = World(connector="none")
    object.__setattr__(world.config, "cost_correction", False)
    world.send(world.arrive(100), 2, DECODE)
    before_s = world.scheduler.prediction.decode_s(2, 1, 100)
    for count in range(20):
        scrape(world, 2, 1000.0 * count, 9.0 * before_s * 1000.0 * count)
    assert world.scheduler.prediction.decode_s(2, 1, 100) == before_s


def test_room_is_kept_for_the_peak_of_online_work_for_two_periods():
    world = World(connector="none")
    placement, instance = world.scheduler.placement, world.scheduler.instances[2]
    requests = [world.arrive(100), world.arrive(200)]
    for request in requests:
        world.send(request, 2, DECODE)
    for request in requests:
        world.end(request, 1)
    assert instance.load.online == 0 and placement.held(instance) == (2, 300)
    instance.load.next_period()
    assert placement.held(instance) == (2, 300)
    instance.load.next_period()
    assert placement.held(instance) == (0, 0)


def test_strict_instance_computes_offline_prompts_beside_online_work_within_strict_prefill_and_the_bound():
    world = World(connector="none")
    placement, instance = world.scheduler.placement, world.scheduler.instances[2]
    offline = world.arrive(300, online=False)
    assert placement.computes(instance, offline)  # nobody is there to be slowed
    world.send(world.arrive(100), 2, PREFILL)
    instance.load.prefilled(next(iter(instance.load.requests)))
    assert placement.knobs["strict_prefill"] == 0.0 and not placement.computes(instance, offline)
    placement.knobs["strict_prefill"] = 512.0
    assert placement.computes(instance, offline)
    placement.tpot_s = 0.02  # an iteration with 300 tokens of a prompt takes longer
    assert not placement.computes(instance, offline)
