"""How often to save: the interval between checkpoints that loses least to saving and to failures.

With C, the time for which one save holds training up, and M, the mean time between failures, saving every W seconds
loses the share C / W to saving and about W / (2 M) to failures, since half an interval is lost to each.

J. W. Young, A first order approximation to the optimum checkpoint interval, CACM 17 (9), 1974, pp. 530-531.
J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer
Systems 22 (3), 2006, pp. 303-312, Eq. 37.
"""

import math


def young(save_s: float, between_failures_s: float) -> float:
    """Young's interval, sqrt(2 C M), in s; both arguments in s, more than 0."""
    return math.sqrt(2 * save_s * between_failures_s)


def daly(save_s: float, between_failures_s: float) -> float:
    """Daly's interval, of a higher order in C / M, in s; both arguments in s, more than 0."""
    if save_s >= 2 * between_failures_s:
        return between_failures_s
    ratio = save_s / (2 * between_failures_s)
    return young(save_s, between_failures_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


def share_lost(interval_s: float, save_s: float, between_failures_s: float) -> float:
    """Share of the time that saving every `interval_s` is expected to lose, in first order; all in s."""
    return save_s / interval_s + interval_s / (2 * between_failures_s)
