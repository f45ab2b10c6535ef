"""Offline work: each kind by hand, and that kinds and rates share the same jobs."""

import numpy as np
import pytest

from ooco_gym.errors import OocoError
from ooco_gym.workload import FixedLengths, OfflineWork, PoissonArrivals, SyntheticSource, TableLengths

LENGTHS = TableLengths(np.arange(1, 2001), np.arange(2001, 4001))


def test_no_work():
    jobs = OfflineWork("none").sample(0, 600.0)
    assert (jobs.endless, len(jobs), jobs.arrival_s.size, jobs.output_tokens.dtype) == (False, 0, 0, np.int32)
    assert (OfflineWork("none").mean_prompt_tokens, OfflineWork("none").mean_output_tokens) == (0, 0)


def test_an_endless_backlog_has_lengths_but_no_arrivals():
    work = OfflineWork("endless", LENGTHS)
    jobs = work.sample(0, 600.0)
    assert (jobs.endless, len(jobs), jobs.arrival_s.size) == (True, 16_384, 0)
    assert (work.mean_prompt_tokens, work.mean_output_tokens) == (1000.5, 3000.5)


def test_a_job_list_is_there_from_the_start():
    jobs = OfflineWork("jobs", FixedLengths(100, 10), jobs=3).sample(0, 600.0)
    assert (jobs.endless, jobs.arrival_s.tolist(), jobs.prompt_tokens.tolist()) == (
        False,
        [0, 0, 0],
        [100] * 3,
    )


def test_poisson_jobs_have_the_asked_rate():
    work = OfflineWork("poisson", LENGTHS, rate_per_s=2.0)
    counts = []
    for seed in range(40):
        jobs = work.sample(seed, 100.0)
        counts.append(len(jobs))
        assert (np.diff(jobs.arrival_s) >= 0).all()
        assert jobs.arrival_s[-1] < 100
    assert np.mean(counts) == pytest.approx(200, abs=4 * (200 / 40) ** 0.5)
    assert np.std(counts) == pytest.approx(200**0.5, rel=0.5)
    assert len(work.with_rate(0).sample(0, 100.0)) == 0


def test_every_kind_and_rate_has_the_same_jobs():
    endless = OfflineWork("endless", LENGTHS).sample(9, 600.0)
    listed = OfflineWork("jobs", LENGTHS, jobs=50).sample(9, 600.0)
    slow = OfflineWork("poisson", LENGTHS, rate_per_s=0.5).sample(9, 600.0)
    fast = OfflineWork("endless", LENGTHS).with_rate(2.0).sample(9, 150.0)
    assert fast.arrival_s.tolist() == (slow.arrival_s / 4).tolist()
    for jobs in (listed, slow, fast):
        assert jobs.prompt_tokens.tolist() == endless.prompt_tokens[: len(jobs)].tolist()
        assert jobs.output_tokens.tolist() == endless.output_tokens[: len(jobs)].tolist()
    other = OfflineWork("endless", LENGTHS).sample(10, 600.0)
    assert other.prompt_tokens.tolist() != endless.prompt_tokens.tolist()


def test_online_and_offline_draws_of_one_seed_are_unrelated():
    online = SyntheticSource("made", PoissonArrivals(10.0), LENGTHS).sample(4, 1000.0)
    offline = OfflineWork("poisson", LENGTHS, rate_per_s=10.0).sample(4, 1000.0)
    n = min(len(online), len(offline))
    for a, b in (
        (online.prompt_tokens, offline.prompt_tokens),
        (np.diff(online.arrival_s, prepend=0), np.diff(offline.arrival_s, prepend=0)),
    ):
        assert abs(np.corrcoef(a[:n], b[:n])[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (
            lambda: OfflineWork("some", LENGTHS),
            "kind is 'some', it must be one of none, endless, jobs, poisson",
        ),
        (lambda: OfflineWork("endless"), "kind endless needs lengths"),
        (lambda: OfflineWork("jobs", LENGTHS), "offline: jobs is None"),
        (lambda: OfflineWork("jobs", LENGTHS, jobs=0), "offline: jobs is 0"),
        (lambda: OfflineWork("poisson", LENGTHS), "offline: rate_per_s is None"),
        (lambda: OfflineWork("poisson", LENGTHS, rate_per_s=-1), "offline: rate_per_s is -1"),
        (lambda: OfflineWork("endless", LENGTHS).sample(0, -5.0), "duration_s is -5.0"),
    ],
)
def test_bad_values_are_named(build, named):
    with pytest.raises(OocoError) as caught:
        build()
    assert named in str(caught.value)
