"""The learning rate of "Deep Residual Learning" (He et al. 2015, section 4.2), scaled to any number of steps."""

from __future__ import annotations

#: The paper divides by 10 at iterations 32k and 48k of 64k.
MILESTONES = (0.5, 0.75)
#: "we use 0.01 to warm up the training until the training error is below 80% (about 400 iterations)": a tenth of 0.1.
WARMUP_FACTOR = 0.1
WARMUP_STEPS = 400
#: The depth from which the paper needed a warm-up.
WARMUP_DEPTH = 110


def warmup_steps(depth: int, total_steps: int) -> int:
    """Steps of warm-up: none below depth 110, else 400, but at most a tenth of the run."""
    return min(WARMUP_STEPS, total_steps // 10) if depth >= WARMUP_DEPTH else 0


def learning_rate(base: float, step: int, total_steps: int, warmup: int = 0) -> float:
    """The rate of step ``step`` (from 0) out of ``total_steps``: of nothing else, so that a resumed run agrees."""
    if step < warmup:
        return base * WARMUP_FACTOR
    passed = sum(step >= milestone * total_steps for milestone in MILESTONES)
    return base * 0.1**passed
