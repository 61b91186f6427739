"""The stages that steps, validation and scores are made of, each for a module as it is now.

prompts -> :func:`generate` -> :func:`micro_batches` -> :func:`read` -> :func:`compare`, and
:func:`verify` beside them. Every rank goes through a stage together with all others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd import memory, tokens
from opd.answers import Verifier
from opd.extrapolation import Score
from opd.ledger import Ledger
from opd.metrics import (
    ENGINE_GAP,
    FIXED_FRACTION,
    REWARD_METRIC,
    StepMetrics,
    judged_by,
    rollout_metrics,
)
from opd.mixture import Mixture, given, merged
from opd.models import hidden_states, in_eval_mode
from opd.objectives import Objective
from opd.objectives.weighted import drift
from opd.prompts import Prompt, PromptBatch
from opd.randomness import derive_seed
from opd.reuse import Reuse, importance_weights, sampled_logprobs
from opd.rewards.critic import (
    EPSILON,
    EXPLAINED_VARIANCE,
    GAE,
    Critic,
    Moments,
    generalized_advantages,
    mean_and_variance,
)
from opd.rewards.reward import ADVANTAGE, REWARD, RewardTerm, equal_shares
from opd.rollouts import (
    SAMPLED,
    GapAlarm,
    RolloutEngine,
    Rollouts,
    Sampler,
    align_micro_batches,
    cut_into_micro_batches,
    records,
)
from opd.teachers import DEFAULT, TEACHER, Opinion, Teachers
from opd.tokens import Compared, Measure
from opd.weights import Weights
from opd.world import World

ROW = "row"  # column: the number of a completion among those that were cut into micro-batches


class Distillation(Protocol):
    """What stages and steps need of a module; :class:`opd.module.OPDModule` explains each."""

    student: PreTrainedModel
    teachers: Teachers
    tokenizer: PreTrainedTokenizerBase
    objective: Objective
    reuse: Reuse | None
    engine: RolloutEngine
    gap_alarm: GapAlarm
    sampler: Sampler
    verifier: Verifier
    reward: RewardTerm | None
    critic: Critic | None
    mixture: Mixture | None
    rollouts_per_prompt: int
    micro_batch_tokens: int
    tile_tokens: int | None
    max_grad_norm: float
    update_norm: bool
    weights: Weights
    gradient_sync: Literal["last", "every"]
    seed: int
    ledger: Ledger
    train_metrics: StepMetrics
    evaluation_metrics: StepMetrics

    @property
    def world(self) -> World:
        """The ranks of the run."""
        ...

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        ...

    @property
    def global_step(self) -> int:
        """Optimizer steps taken so far: t."""
        ...


@dataclass(frozen=True)
class Reading:
    """A micro-batch, and what its teachers think of it."""

    micro: Rollouts
    opinions: Mapping[str, Opinion]

    def select(self, rows: Sequence[int]) -> Reading:
        """Keep some completions; one without tokens if there are none, so ranks stay in step."""
        opinions = {name: opinion.select(rows) for name, opinion in self.opinions.items()}
        if rows:
            return Reading(self.micro.select(rows), opinions)
        return Reading(self.micro.placeholder(self.micro.prompts.prompts[0].teacher), opinions)


def generate(
    module: Distillation,
    prompts: PromptBatch,
    seed: int,
    *,
    copies: int = 1,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
) -> Rollouts:
    """Sample completions with the student.

    Args:
        module: Whose student, engine and sampler.
        prompts: B prompts.
        seed: What is drawn depends on it, the prompt's row and the number of the copy alone.
        copies: Completions per prompt, side by side.
        temperature: None: that of the rollouts; 0 is greedy.
        max_new_tokens: None, or more than that of the rollouts: that of the rollouts.
    """
    asked = _asked(module, prompts, seed, copies, temperature, max_new_tokens)
    with memory.needed_for("rollouts"):
        return module.engine(*asked)


def sample_ahead(
    module: Distillation,
    prompts: PromptBatch,
    seed: int,
    *,
    copies: int = 1,
    max_new_tokens: int | None = None,
) -> None:
    """Let an engine that can begin with what it will be asked for in the next step; likewise."""
    if not module.engine.staleness:
        return
    if module.mixture is not None:
        own = module.mixture.choose(prompts.prompts, seed)
        prompts = prompts.select([i for i, is_fixed in enumerate(own) if not is_fixed])
    prompts = prompts.to(module.device)
    module.engine.ahead(*_asked(module, prompts, seed, copies, None, max_new_tokens))


def _asked(
    module: Distillation,
    prompts: PromptBatch,
    seed: int,
    copies: int,
    temperature: float | None,
    max_new_tokens: int | None,
) -> tuple[PromptBatch, Sampler, list[int]]:
    sampler = module.sampler
    if temperature is not None:
        sampler = dataclasses.replace(sampler, temperature=temperature)
    if max_new_tokens is not None and max_new_tokens < sampler.max_new_tokens:
        sampler = dataclasses.replace(sampler, max_new_tokens=max_new_tokens)
    seeds = [derive_seed(seed, p.row, i) for p in prompts.prompts for i in range(copies)]
    return prompts.repeat(copies), sampler, seeds


def mixed(
    module: Distillation,
    mixture: Mixture,
    prompts: PromptBatch,
    seed: int,
    *,
    copies: int = 1,
    max_new_tokens: int | None = None,
) -> Rollouts:
    """Sample completions of some prompts, as :func:`generate`, and take those that others hold."""
    own = mixture.choose(prompts.prompts, seed)
    rows: tuple[list[int], list[int]] = ([], [])
    for i, is_fixed in enumerate(own):
        rows[is_fixed].append(i)
    sampled, fixed = (prompts.select(of) for of in rows)
    copied, sampler, _ = _asked(module, fixed, seed, copies, None, max_new_tokens)
    return merged(
        generate(module, sampled, seed, copies=copies, max_new_tokens=max_new_tokens),
        given(copied, sampler),
        [is_fixed for is_fixed in own for _ in range(copies)],
        sampler.pad_token_id,
    )


def micro_batches(module: Distillation, rollouts: Rollouts) -> list[Rollouts]:
    """Cut rollouts by the token budget and by teacher, on all ranks alike; a collective."""
    by_teacher: dict[str, list[Rollouts]] = {name: [] for name in module.teachers or (DEFAULT,)}
    name_of = module.teachers.name_of
    for micro in cut_into_micro_batches(rollouts, module.micro_batch_tokens, name_of):
        by_teacher[name_of(micro.prompts.prompts[0])].append(micro)
    return align_micro_batches(by_teacher, rollouts, module.world)


def read(module: Distillation, micro: Rollouts, *, reference: bool = False) -> Reading:
    """Let its teacher, if there is one, read a micro-batch; and the reference, if asked."""
    with memory.needed_for("the teacher's reading"):
        return Reading(micro, module.teachers.read(micro, reference=reference))


def drifted(module: Distillation, reading: Reading) -> Reading:
    """Say how far prefixes have drifted from the teacher, if the objective looks at that."""
    if not module.objective.needs_drift:
        return reading
    micro = reading.micro
    width = module.student.get_output_embeddings().in_features
    device = micro.lengths.device.type
    tile = module.tile_tokens or tokens.tile_size(width, module.teachers.vocabulary, device)
    with memory.needed_for("the teacher's reading"):
        logq_y = tokens.teacher_logprobs(reading.opinions[TEACHER], micro.tokens, tile=tile)
    columns = {**micro.columns, "drift": drift(micro.spread(logq_y), micro.engine_logprobs)}
    return Reading(dataclasses.replace(micro, columns=columns), reading.opinions)


def compare(
    module: Distillation, reading: Reading, objective: Objective | None, measure: Measure
) -> Compared:
    """Run the student over what its teachers have read; see :func:`opd.tokens.compare`."""
    opinions = reading.opinions
    if objective is None:  # measures look at the teacher alone
        opinions = {name: of for name, of in opinions.items() if name == TEACHER}
    with memory.needed_for("the comparison of student and teacher"):
        return tokens.compare(
            module.student,
            reading.micro,
            opinions,
            objective,
            measure,
            vocabulary=module.teachers.vocabulary,
            temperature=module.sampler.temperature,
            tile=module.tile_tokens,
        )


@torch.no_grad()
def judge(module: Distillation, readings: Sequence[Reading], divergence: str) -> Score:
    """Score the student, without dropout, by completions that its teachers have read.

    Args:
        module: Whose student.
        readings: The completions.
        divergence: See :func:`opd.metrics.judged_by`.

    Returns:
        Minus the divergence of each completion that has tokens, how many it has, and how far the
        student has moved from what has sampled them.
    """
    values, moved, weights = [torch.zeros(0)], [torch.zeros(0)], [torch.zeros(0)]
    with in_eval_mode(module.student):
        for reading in readings:
            micro = reading.micro
            found = compare(module, reading, None, judged_by(divergence)).values
            filled = micro.counts > 0  # the others only keep ranks in step
            values.append(-micro.spread(found["divergence"]).sum(dim=1)[filled].cpu())
            if (sampled := micro.are_sampled()) is not None:
                found["moved"] *= sampled  # from what nobody has sampled, nobody moves away
            moved.append(micro.spread(found["moved"]).sum(dim=1)[filled].cpu())
            weights.append(micro.counts[filled].float().cpu())
            module.ledger.count("search_tokens", micro.num_tokens)
    return Score(torch.cat(values), torch.cat(weights), torch.cat(moved))


@torch.no_grad()
def weighed(module: Distillation, reading: Reading) -> Reading:
    """Give each token the weight of its loss where the student is not the one that has sampled."""
    of, micro = module.objective.ratio_of, reading.micro
    if of is None:
        return reading
    with in_eval_mode(module.student):
        logp_y = compare(module, Reading(micro, {}), None, sampled_logprobs).values["logp_y"]
    columns = {**micro.columns, "weight": importance_weights(logp_y, micro, of)}
    return Reading(dataclasses.replace(micro, columns=columns), reading.opinions)


def verify(module: Distillation, rollouts: Rollouts) -> Tensor:
    """Check the answers of the prompts that have one: 1 right, 0 wrong, float64."""
    return records.verify(rollouts, module.tokenizer, module.verifier)


def count_rollouts(module: Distillation, metrics: StepMetrics, rollouts: Rollouts) -> Tensor:
    """Add the metrics of completions, and of their answers where prompts have one.

    Returns:
        What :func:`verify` has found of those that were sampled.
    """
    if SAMPLED in rollouts.columns:
        rollouts = rollouts.select(rollouts.columns[SAMPLED].nonzero().flatten().tolist())
    prompts = rollouts.prompts.prompts
    answered = [prompt for prompt in prompts if prompt.answer is not None]
    metrics.update(rollout_metrics(rollouts), members(module, metrics, prompts))
    right = verify(module, rollouts)
    metrics.update({"rollout/accuracy": right}, members(module, metrics, answered))
    return right


def reward(module: Distillation, term: RewardTerm, rollouts: Rollouts) -> None:
    """Give completions the columns ``outcome``, ``reward`` and ``advantage``; all ranks together.

    Args:
        module: Whose tokenizer and metrics.
        term: Makes them.
        rollouts: All completions of whole prompts, with the column ``right``.

    Raises:
        UserError: What the reward gives is no reward, on whatever rank.
    """
    texts = records.completion_texts(rollouts, module.tokenizer)
    columns = module.world.together(
        lambda: term.columns(
            rollouts, texts, module.rollouts_per_prompt, module.sampler.max_new_tokens
        )
    )
    rollouts.columns |= columns
    known = (~columns[REWARD].isnan()).tolist()
    prompts = [p for p, there in zip(rollouts.prompts.prompts, known, strict=True) if there]
    values = columns[REWARD][torch.tensor(known, dtype=torch.bool)].double()
    metrics = module.train_metrics
    metrics.update({REWARD_METRIC: values}, members(module, metrics, prompts))


@torch.no_grad()
def estimate_advantages(
    module: Distillation, critic: Critic, gae: GAE, weight: float, rollouts: Rollouts
) -> None:
    """Give each token an advantage of its own, and then fit the value head; all ranks together.

    Where a completion has no reward, advantages are 0, and the value head learns nothing.

    Args:
        module: Whose student the value head looks at, without dropout.
        critic: The value head, as the last batch has left it.
        gae: How advantages are made of its values.
        weight: What they are multiplied by in the end.
        rollouts: Completions with the column ``reward``; their ``advantage`` becomes [B, C].
    """
    reduce_sum, device = module.world.sum, rollouts.lengths.device
    numbers = torch.arange(len(rollouts), device=device)
    numbered = dataclasses.replace(rollouts, columns={**rollouts.columns, ROW: numbers})
    advantages = torch.zeros_like(rollouts.engine_logprobs, dtype=torch.float64, device="cpu")
    returns, counted = torch.zeros_like(advantages), _rewarded(rollouts)
    moments = Moments.none(len(critic.weight), device)
    with in_eval_mode(module.student), memory.needed_for("the values of completions"):
        for micro in micro_batches(module, numbered):
            hidden = hidden_states(module.student, *micro.inputs())
            with torch.autocast(device.type, enabled=False):
                x, of = critic.features(hidden), _rewarded(micro)
                values = micro.spread(critic(x)).double().cpu()
                reward = micro.columns[REWARD].double().cpu()
                found = generalized_advantages(
                    reward, values, of, gamma=gae.gamma, gae_lambda=gae.gae_lambda
                )
                moments.add(x[of[micro.mask.cpu()].to(device)], (found + values)[of].to(x))
            filled = (micro.counts > 0).cpu()  # the others only keep ranks in step
            rows, width = micro.columns[ROW].cpu()[filled], found.shape[1]
            advantages[rows, :width] = found[filled]
            returns[rows, :width] = (found + values)[filled]
    mean, variance = mean_and_variance(advantages[counted], reduce_sum)
    of_returns = mean_and_variance(returns[counted], reduce_sum)[1]
    if of_returns > 0:  # returns less advantages are values
        explained = torch.tensor([1 - variance / of_returns], dtype=torch.float64)
        module.train_metrics.update({EXPLAINED_VARIANCE: explained})
    if gae.normalize:
        advantages = (advantages - mean) / (math.sqrt(variance) + EPSILON) * counted
    rollouts.columns[ADVANTAGE] = (weight * advantages).float().to(device)
    critic.fit(moments.summed(reduce_sum), gae.damping)


def _rewarded(rollouts: Rollouts) -> Tensor:
    """Whether a token is a sampled one of a completion that has a reward, [B, C], on the CPU."""
    return (rollouts.mask & ~rollouts.columns[REWARD].isnan()[:, None]).cpu()


def share_equally(module: Distillation, rollouts: Rollouts) -> None:
    """Let completions count alike, however long they are, by their advantages; a collective."""
    shares = equal_shares(rollouts.counts, module.world.sum).float()
    advantage = rollouts.columns[ADVANTAGE]
    rollouts.columns[ADVANTAGE] = advantage * (shares if advantage.ndim == 1 else shares[:, None])


def count_tokens(
    module: Distillation, metrics: StepMetrics, micro: Rollouts, values: Mapping[str, Tensor]
) -> None:
    """Add metrics of the N tokens of a micro-batch, [N] each."""
    of_prompts = members(module, metrics, micro.prompts.prompts)
    counts = micro.counts.cpu() if of_prompts else micro.counts  # a GPU would have to be awaited
    of_tokens = {g: m.repeat_interleave(counts) for g, m in of_prompts.items()}
    if (sampled := micro.are_sampled()) is not None:
        of_sampled = {g: m.to(sampled.device)[sampled] for g, m in of_tokens.items()}
        metrics.update({ENGINE_GAP: values[ENGINE_GAP][sampled]}, of_sampled)
        values = {name: value for name, value in values.items() if name != ENGINE_GAP}
        values[FIXED_FRACTION] = (~sampled).double()
    metrics.update(values, of_tokens)


def members(
    module: Distillation, metrics: StepMetrics, prompts: Sequence[Prompt]
) -> dict[str, Tensor]:
    """Say which prompts belong to each group that metrics are taken of, [B] by group."""
    if not metrics.groups:
        return {}
    name_of = module.teachers.name_of
    of = [(f"data/{prompt.data_set}", f"teacher/{name_of(prompt)}") for prompt in prompts]
    return {
        group: torch.tensor([group in groups for groups in of], dtype=torch.bool)
        for group in metrics.groups
    }
