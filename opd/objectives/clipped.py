"""RL with verifiable rewards in the step of distillation: PPO's clipped loss, also for GRPO, DAPO.

The advantage A of a completion is that of ``model.reward``; no teacher is asked. In a configuration
(recipes: ``configs/rl``; with a value head: ``opd/rewards/critic.py``)::

    model:
      teacher: null
      objective:
        class_path: opd.objectives.ClippedPolicyGradient
        init_args: {clip_low: 0.2, clip_high: 0.28}
      rollouts_per_prompt: 8
      reward: {of: opd.rewards.Correctness}

A teacher that is named all the same is measured, as ``opd/reverse_kl``, and not trained on: that
is what a comparison of OPD with RL wants. With one optimizer step on a batch of rollouts rho is 1
and no clip fires; ``model.reuse`` takes several, and t goes on counting batches of rollouts.

Symbols: p = student, mu = what has sampled, r = the reference, y = the token sampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from opd.errors import UserError
from opd.objectives.distributions import Distributions
from opd.objectives.objective import Objective, of_sampled
from opd.objectives.policy_gradient import clipped_surrogate, k3, probability_ratio
from opd.rollouts import Tokens
from opd.teachers import REFERENCE, Gives


@dataclass(frozen=True)
class ClippedPolicyGradient(Objective):
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + kl k3, rho = p(y) / mu(y).

    That is PPO's surrogate (1707.06347, eq. 7) with the advantage of GRPO (2402.03300, eq. 3), and
    with two bounds: DAPO's clip-higher (2503.14476, eq. 10) is ``clip_high`` 0.28. The mean is over
    all tokens of the global batch, as of every objective (DAPO); ``model.reward.per: completion``
    lets completions count alike instead, long and short (GRPO). Where a sampler leaves out tokens
    (top_p, top_k), rho includes the mass that it has kept: leave them at 1 and 0.

    Logs the mean ``rl/ratio`` rho, ``rl/clip_fraction``, the share of tokens whose gradient the
    clip takes away, and with ``kl`` the mean ``rl/kl``, of the first optimizer step on a batch; of
    further ones, ``reuse/clip_fraction`` and so on.

    Args:
        clip_low: Where A < 0, a token is left alone below a ratio of 1 - clip_low; at most 1.
        clip_high: Where A > 0, a token is left alone above a ratio of 1 + clip_high.
        kl: Weight of KL(p || r), estimated from the token sampled by k3 = r/p - log r/p - 1
            (2402.03300, eq. 4), a mean over tokens; r is ``model.reference``. 0: none, and no
            reference is loaded.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: float = 0.0

    def __post_init__(self) -> None:
        for name, value, valid, wanted in [
            ("clip_low", self.clip_low, 0 < self.clip_low <= 1, "above 0 and at most 1"),
            ("clip_high", self.clip_high, 0 < self.clip_high < math.inf, "above 0"),
            ("kl", self.kl, 0 <= self.kl < math.inf, "at least 0, which asks no reference"),
        ]:
            if not valid:
                raise UserError(f"ClippedPolicyGradient.{name}={value} must be {wanted}")

    @property
    def needs(self) -> Mapping[str, Gives]:
        return {REFERENCE: "sampled"} if self.kl else {}

    @property
    def needs_reward(self) -> bool:
        return True

    @property
    def ratio_of(self) -> None:
        return None

    @property
    def metrics(self) -> Sequence[str]:
        return ("rl/ratio", "rl/clip_fraction", *(["rl/kl"] if self.kl else []))

    def measure(self, both: Distributions, tokens: Tokens) -> Mapping[str, Tensor]:
        """Measure rho, whether a token is clipped, and k3."""
        logp_y, advantage = of_sampled(both.log_p, tokens.y), _advantage(tokens)
        rho = probability_ratio(logp_y, tokens.logmu_y)
        above, below = rho > 1 + self.clip_high, rho < 1 - self.clip_low
        clipped = (above & (advantage > 0)) | (below & (advantage < 0))
        found = {"rl/ratio": rho, "rl/clip_fraction": clipped.to(rho.dtype)}
        if self.kl:
            logr_y = both.opinions[REFERENCE]
            logr_y = logr_y if logr_y.ndim == 1 else of_sampled(logr_y, tokens.y)
            found["rl/kl"] = k3(logp_y, logr_y)
        return found

    def __call__(self, log_p: Tensor, opinions: Mapping[str, Tensor], tokens: Tokens) -> Tensor:
        logp_y = of_sampled(log_p, tokens.y)
        rho = probability_ratio(logp_y, tokens.logmu_y)
        loss = -clipped_surrogate(rho, _advantage(tokens), self.clip_low, self.clip_high)
        return loss + self.kl * k3(logp_y, opinions[REFERENCE]) if self.kl else loss


def _advantage(tokens: Tokens) -> Tensor:
    assert tokens.advantage is not None, "nobody has rewarded the completions"
    return tokens.advantage
