"""Costs of passes, from measurements."""

from __future__ import annotations

from server.scheduling.costs import CostTable, Work, buckets_up_to

STUDENT = Work("tiny", "student")


def table(limit: int = 8, **seconds: float) -> CostTable:
    """A table of the student with `b1=…, b2=…` seconds."""
    costs = CostTable(buckets_up_to(limit))
    for name, value in seconds.items():
        costs.observe(STUDENT, int(name[1:]), value)
    return costs


def test_buckets_double_up_to_the_limit_which_is_one_itself() -> None:
    assert buckets_up_to(1) == (1,)
    assert buckets_up_to(8) == (1, 2, 4, 8)
    assert buckets_up_to(12) == (1, 2, 4, 8, 12)


def test_a_device_that_is_idle_with_one_image_takes_all_that_wait() -> None:
    costs = table(b1=1.0, b2=1.0, b4=1.1, b8=1.2)
    assert costs.best(STUDENT, 1) == 1
    assert costs.best(STUDENT, 3) == 4, "a row stays idle"
    assert costs.best(STUDENT, 100) == 8


def test_a_device_that_is_full_with_one_image_takes_the_smallest_batch_that_is_as_good() -> None:
    costs = table(b1=1.0, b2=1.98, b4=3.9, b8=7.8)
    assert costs.best(STUDENT, 8) == 1
    assert table(b1=1.0, b2=1.2, b4=2.3, b8=4.6).best(STUDENT, 8) == 2


def test_what_the_images_go_through_besides_counts_at_its_own_size_of_batch() -> None:
    costs, decode = table(b1=1.0, b2=1.5, b4=2.5, b8=4.5), Work("tiny", "decode")
    assert costs.best(STUDENT, 8) == 8
    for bucket in costs.buckets:
        costs.observe(decode, bucket, 10.0 * bucket)
    assert costs.best(STUDENT, 8, decode) < 8, "no gain there"
    for bucket in costs.buckets:
        costs.observe(Work("other", "decode"), bucket, 1.0)
    assert costs.best(STUDENT, 8, Work("other", "decode")) == 8


def test_what_every_pass_costs_besides_makes_large_batches_worth_more() -> None:
    costs = table(b1=1.0, b2=1.98, b4=3.9, b8=7.8)
    for _ in range(40):
        costs.observe_gap(0.5)
    assert costs.best(STUDENT, 8) == 8
    assert costs.best(STUDENT, 3) == 2, "a row that stays idle must still pay"
    for _ in range(40):
        costs.observe_gap(0.0)
    assert costs.best(STUDENT, 8) == 1


def test_a_size_that_never_ran_is_tried_and_then_judged() -> None:
    costs = table(b1=1.0)
    assert costs.best(STUDENT, 8) == 8
    costs.observe(STUDENT, 8, 9.0)
    assert costs.best(STUDENT, 8) == 4, "the next one below is still unknown"


def test_a_limit_holds_and_never_grows() -> None:
    costs = table(b1=1.0, b8=1.0)
    costs.limit(STUDENT, 4)
    costs.limit(STUDENT, 8)
    assert costs.best(STUDENT, 100) == costs.largest(STUDENT) == 4
    assert costs.largest(Work("other", "student")) == 8


def test_an_outlier_is_forgotten() -> None:
    costs = table(b1=10.0)
    for _ in range(40):
        costs.observe(STUDENT, 1, 0.01)
    assert 0.009 < costs.seconds(STUDENT, 1) < 0.02


def test_the_cost_of_a_size_that_never_ran_is_in_proportion() -> None:
    costs = table(b2=1.0)
    assert costs.seconds(STUDENT, 8) == 4.0
    assert costs.seconds(STUDENT, 1) == 1.0
    assert costs.seconds(Work("other", "student"), 1) == 0.0
    assert table(b1=1.0, b2=1.0, b4=1.0, b8=1.0).total(STUDENT, 20) == 3.0


def test_an_unloaded_model_is_forgotten() -> None:
    costs = table(b1=1.0)
    costs.limit(STUDENT, 1)
    costs.forget("tiny")
    assert costs.seconds(STUDENT, 1) == 0.0
    assert costs.largest(STUDENT) == 8
