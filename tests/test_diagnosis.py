"""From figures to a text: every branch, with its cause and a remedy that fits it; pure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from admm_nxm.diagnosis import Ending, PaperEnding, diagnose, diagnose_paper

EARLY = Ending(step=20, prune_at=34, calibrated=0, calibration_steps=8, by_magnitude=4, solved=0)


def test_nothing_left_to_do_is_no_warning() -> None:
    assert diagnose(replace(EARLY, by_magnitude=0)) is None


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        (EARLY, "4 weights were pruned by magnitude, without statistics, and no step"),
        (replace(EARLY, by_magnitude=1), "1 weight was pruned by magnitude, without statistics, and no step"),
        (
            replace(EARLY, by_magnitude=0, solved=4, calibrated=3),
            "4 weights were solved from 3 of 8 calibration steps, and no step",
        ),
        (
            replace(EARLY, by_magnitude=1, solved=1, calibrated=1),
            "1 weight was pruned by magnitude, without statistics and 1 weight was solved from 1 of 8 calibration ",
        ),
    ],
)
def test_a_run_that_ends_before_its_solve_says_what_was_done_instead(ending: Ending, said: str) -> None:
    text = diagnose(ending)
    assert text is not None
    assert text.startswith(
        "finalize() came after 20 optimizer steps, and the weights were to be pruned after step 34: " + said
    )
    assert text.endswith(
        "Remedy: train to the end, or give the true number of optimizer steps as total_steps, or an earlier prune_at"
    )


def test_a_run_whose_solve_failed_is_not_told_to_train_longer() -> None:
    text = diagnose(replace(EARLY, step=36, by_magnitude=1, calibrated=EARLY.calibration_steps))
    assert text is not None
    assert "after step 34, but the solve had failed: 1 weight was pruned by magnitude" in text
    assert "train to the end" not in text
    assert "Remedy: follow the error that step() raised after step 34" in text


FAR = PaperEnding(
    residual=0.3,
    worst=0.5,
    worst_name="up.weight",
    far_share=0.75,
    churn=0.05,
    dual_in_use=False,
    rho=0.01,
    step=42,
    prune_at=42,
    inner="AdamW",
)
REACHED = replace(FAR, residual=0.001, worst=0.05, far_share=0.0)
LEAVE_OUT = "leave the dual out (update_every=Every(interval, dual_start=None)) or let it wait"
EXACT = "use the exact w-step, ADMMNxM(...)"


def test_a_run_that_has_reached_its_pattern_is_silent() -> None:
    assert diagnose_paper(REACHED) is None
    assert diagnose_paper(replace(REACHED, residual=0.02, worst=0.1, churn=0.1)) is None


@pytest.mark.parametrize("change", [{"residual": 0.0201}, {"worst": 0.101}, {"churn": 0.101}])
def test_each_tolerance_is_a_limit_of_its_own(change: dict[str, float]) -> None:
    assert diagnose_paper(replace(REACHED, **change)) is not None


@pytest.mark.parametrize(
    ("ending", "cause", "remedy"),
    [
        (replace(FAR, rho=0.0), "no penalty was in force (rho = 0), so this is one-shot", "give a rho above 0"),
        (
            replace(FAR, step=30),
            "finalize() came after 30 steps, and the mask was to freeze after step 42",
            "train to the end, or give the true number of optimizer steps as total_steps",
        ),
        (replace(FAR, far_share=0.25), "this weight had no gradient for long", "train it, or leave it dense"),
        (replace(FAR, churn=0.4, dual_in_use=True), "the last z-step still replaced 40% of the kept places", LEAVE_OUT),
        (
            replace(FAR, churn=0.4),
            "the penalty in the gradient (rho = 0.01) has not brought the pruned weights to zero in 42 steps of AdamW",
            "use a larger rho, a longer run or a larger learning rate",
        ),
        (FAR, "by learning rate * rho * distance under SGD", EXACT),
    ],
)
def test_a_run_that_is_far_names_its_cause_and_a_remedy(ending: PaperEnding, cause: str, remedy: str) -> None:
    text = diagnose_paper(ending)
    assert text is not None
    assert text.startswith(
        "the run has not reached its pattern: projecting the weights changed them by 30.0% of their norm (tolerance "
        "2.0%), most of all 'up.weight', by 50.0%, so accuracy measured before does not hold. Likely cause: "
    )
    before, after = text.split("Remedy: ")
    assert cause in before
    assert remedy in after


@pytest.mark.parametrize(
    ("dual", "cause"),
    [(True, "the dual was at work while the mask moved"), (False, "the learning rate is high up to the freeze")],
)
def test_a_mask_that_moves_up_to_the_freeze(dual: bool, cause: str) -> None:
    text = diagnose_paper(replace(REACHED, churn=0.2, dual_in_use=dual))
    assert text is not None
    assert text.startswith(
        "the mask had not settled: the last z-step before the freeze replaced 20% of the kept places"
    )
    assert f"Likely cause: {cause}" in text
    assert (LEAVE_OUT in text) == dual
    assert EXACT in text


def test_after_a_resume_the_worst_weight_has_no_name() -> None:
    text = diagnose_paper(replace(FAR, worst_name=None, far_share=0.0))
    assert text is not None
    assert "most of all one weight, by 50.0%" in text
