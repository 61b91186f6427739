"""OPDModule: a student, its frozen teachers, if any, and Lightning's hooks around their steps.

What a step is stands in ``opd/step.py``; how student and teacher are compared, in
``opd/tokens.py``. Here are the options, the models, and what is logged when.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedModel

from opd import checkpoints, compatibility, logs, models, optimization, sharding
from opd.answers import AnswerVerifier, Verifier
from opd.errors import UserError
from opd.evaluation import evaluate, predict
from opd.ledger import Ledger
from opd.metrics import (
    DROPPED_FRACTION,
    FIXED_FRACTION,
    REWARD_METRIC,
    ROLLOUT_MAXIMA,
    ROLLOUT_MEANS,
    ROLLOUT_SUMS,
    TOKEN_METRICS,
    WITHOUT_TEACHER,
    StepMetrics,
)
from opd.mixture import Mixture
from opd.objectives import Objective, ReverseKL
from opd.objectives.probe import check_objective
from opd.prompts import PromptBatch, PromptDataModule, pad_token_id
from opd.prompts.format import Reader
from opd.randomness import random_state, restore_random_state
from opd.reuse import Reuse, reuse_name
from opd.rewards.critic import EXPLAINED_VARIANCE, GAE, Critic
from opd.rewards.reward import RewardTerm
from opd.rollouts import (
    GapAlarm,
    GapLimits,
    RolloutEngine,
    Sampler,
    TransformersEngine,
)
from opd.step import RequestsSteps, StepRequest, SurroundsSteps, take_step
from opd.strategies import load_under
from opd.teachers import (
    DEFAULT,
    REFERENCE,
    TEACHER,
    Teachers,
    TeacherServer,
    is_served,
    load_teachers,
)
from opd.weights import Weights
from opd.world import World

log = logging.getLogger(__name__)


def _adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0)


TRAIN_METRICS = (
    *("opd/loss", *ROLLOUT_MEANS, *ROLLOUT_SUMS, *ROLLOUT_MAXIMA),
    *("optim/lr", "optim/grad_norm"),
)
REUSE_METRICS = ("reuse/steps", "reuse/undone", "reuse/ratio")


class OPDModule(LightningModule):
    """On-policy distillation of a student from one or several frozen teachers; or RL, from rewards.

    Args:
        student: The model to train: hub id, perhaps with @REVISION (branch, tag or commit), folder,
            checkpoint, GGUF file, or one of the built-in: embedded:base, embedded:base-long.
        teacher: The model that it learns from, named alike, or http://HOST:PORT of a server of it
            that ``opd serve --role teacher`` has started; or several, as a mapping from the name
            that a prompt's ``teacher`` field holds to a model. None: there is none, for objectives
            that ask none, as ClippedPolicyGradient; then nothing of a teacher is logged. Where
            there is one all the same, such a run logs how far the student is from it.
        objective: Loss per token. None: ReverseKL over the whole vocabulary, whose gradient is the
            mean of the paper's, PolicyGradient's, with less noise.
        reference: The frozen model that some objectives, as ExOPD, compare the teacher with, named
            like a model. None: the student as it comes, loaded once more.
        optimizer: Builds the optimizer from the student's parameters.
        scheduler: Builds the learning-rate scheduler, advanced once per step. None: constant.
        reuse: Take several optimizer steps on each batch of rollouts, and undo those that clearly
            harm. None: one.
        adapter: Train a low-rank adapter of the student only. None: all of the student.
        max_new_tokens: Longest completion in tokens.
        temperature: Of rollouts; student and teacher logits are divided by it in the objective too.
        top_p: Nucleus sampling of rollouts; 1 keeps all tokens.
        top_k: Top-k sampling of rollouts; 0 keeps all tokens.
        rollouts_per_prompt: Completions sampled per prompt.
        eos_token_ids: Tokens that end a completion. None: those of the student and of all teachers.
        engine: What samples completions. None: TransformersEngine.
        engine_gap: How far its log-probabilities may be from the student's before a line warns, and
            before the run stops.
        verifier: Finds and checks the answers of prompts that have one: AnswerVerifier, whose
            options need no class_path, or opd.rewards.ProgramVerifier, for programs with tests.
        reward: Adds the advantage of a reward to the teacher's, for objectives that look at it, as
            PolicyGradient; ClippedPolicyGradient has no other. None: the teacher's alone.
        mixture: Train some prompts on the completions that come with them. None: all are sampled.
        micro_batch_tokens: Positions per forward and backward, padding and prompts included. Bounds
            memory; does not change the loss.
        tile_tokens: Completion tokens whose logits exist at a time. Bounds memory; does not change
            the loss. None: as many as have 2**22 logits on a CPU, 2**26 on a GPU, or an eighth of
            the numbers of the head if that is more.
        max_grad_norm: Gradients are clipped to this norm.
        update_norm: Log optim/update_norm, the norm of the weights' change, which takes a copy of
            the weights for the time of the optimizer's step.
        tokenizer: Where the tokenizer comes from, named like a model. None: the student.
        teacher_dtype: Dtype of the teacher's weights.
        teacher_offload: Keep the teacher's weights in host memory, and copy each layer to the
            device when it runs.
        attn_implementation: sdpa, eager, flash_attention_2, ... None: what a model's config names,
            as that of a checkpoint does, else sdpa, or eager for models that have no sdpa.
        gradient_checkpointing: Recompute the activations of each layer in backward: less memory,
            more time.
        compile: Compile each layer of the student with torch.compile, for all but rollouts.
        gradient_sync: When gradients are summed over ranks. ``last``: with the last micro-batch,
            the least communication; FSDP then holds whole gradients in between, 4 bytes per
            parameter. ``every``: with each micro-batch; FSDP then holds shards of them only.
        trust_remote_code: Let hub models run their own code.
        seed: Seed of rollouts and dropout; the command line fills in seed_everything.
    """

    student: PreTrainedModel
    teachers: Teachers

    def __init__(
        self,
        student: str,
        teacher: str | dict[str, str] | None = None,
        objective: Objective | None = None,
        reference: str | None = None,
        optimizer: OptimizerCallable = _adamw,
        scheduler: LRSchedulerCallable | None = None,
        reuse: Reuse | None = None,
        adapter: models.LoRA | None = None,
        max_new_tokens: int = 16384,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        rollouts_per_prompt: int = 1,
        eos_token_ids: list[int] | None = None,
        engine: RolloutEngine | None = None,
        engine_gap: GapLimits = GapLimits(),  # noqa: B008 - frozen
        verifier: Verifier = AnswerVerifier(),  # noqa: B008 - frozen
        reward: RewardTerm | None = None,
        mixture: Mixture | None = None,
        micro_batch_tokens: int = 32768,
        tile_tokens: int | None = None,
        max_grad_norm: float = 1.0,
        update_norm: bool = False,
        tokenizer: str | None = None,
        teacher_dtype: models.Dtype = "float32",
        teacher_offload: bool = False,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,  # noqa: A002 - the YAML key
        gradient_sync: Literal["last", "every"] = "last",
        trust_remote_code: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if temperature <= 0:
            raise UserError(f"model.temperature={temperature} must be above 0: OPD samples")
        for name, value in [
            ("rollouts_per_prompt", rollouts_per_prompt),
            ("micro_batch_tokens", micro_batch_tokens),
            ("tile_tokens", 1 if tile_tokens is None else tile_tokens),
            ("max_grad_norm", max_grad_norm),
        ]:
            if value <= 0:
                raise UserError(f"model.{name}={value} must be above 0")
        if teacher is not None and not teacher:
            raise UserError("model.teacher names no model; null says that there is none")
        self.student_source = student
        self.teacher_sources = {DEFAULT: teacher} if isinstance(teacher, str) else teacher or {}
        self.objective = objective or ReverseKL()
        if self.objective.needs_reward and reward is None:
            raise UserError(
                f"model.objective {type(self.objective).__name__} learns from a reward alone; name "
                "one, as --model.reward.of opd.rewards.Correctness"
            )
        self.reference_source = None
        if REFERENCE in self.objective.needs:
            self.reference_source = reference or student
        elif reference is not None:
            raise UserError(
                f"model.reference {reference}: objective {type(self.objective).__name__} asks no "
                "reference; take it out, or use opd.objectives.ExOPD"
            )
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.reuse = reuse if reuse is not None and reuse.steps > 1 else None
        if self.reuse is not None and self.reuse.held_out and TEACHER not in self.objective.needs:
            raise UserError(
                f"model.reuse.held_out={self.reuse.held_out}: further steps are judged by the KL "
                f"to a teacher, from which {type(self.objective).__name__} does not learn; set "
                "--model.reuse.held_out 0"
            )
        if not self.teacher_sources:
            self._check_without_teacher(teacher_dtype, teacher_offload)
        self.adapter = adapter
        self.strict_loading = adapter is None  # its base is in no checkpoint
        self.rollouts_per_prompt = rollouts_per_prompt
        self.engine = engine or TransformersEngine()
        self.gap_alarm = GapAlarm(engine_gap)
        self.verifier = verifier
        self.reward = reward
        self.critic: Critic | None = None  # configure_model makes it, if the advantage is GAE
        self.mixture = mixture
        if mixture is not None and reward is not None:
            raise UserError(
                "model.mixture and model.reward: a reward is for what the student has sampled; "
                "take one of them out"
            )
        if mixture is not None and self.objective.needs_drift:
            raise UserError(
                "model.mixture: ByDrift weighs by what the student has sampled; take one of them "
                "out"
            )
        if mixture is not None and self.objective.ratio_of != "previous":
            raise UserError(
                f"model.mixture: objective {type(self.objective).__name__} takes every token for "
                "one that the student has sampled; use one of whole distributions, as "
                "opd.objectives.GeneralizedJSD"
            )
        if reward is not None:
            reward.check_copies(rollouts_per_prompt)
            if reward.overlong is not None:
                reward.overlong.check(max_new_tokens)
            if reward.dynamic is not None and self.engine.staleness:
                raise UserError(
                    "model.reward.dynamic samples in rounds, and model.engine samples all prompts "
                    "of the next step meanwhile; set its staleness to 0"
                )
        self.micro_batch_tokens = micro_batch_tokens
        self.tile_tokens = tile_tokens
        self.max_grad_norm = max_grad_norm
        self.update_norm = update_norm
        self._token_metrics = TOKEN_METRICS if self.teacher_sources else WITHOUT_TEACHER
        self._logged = (
            *TRAIN_METRICS,
            *self._token_metrics,
            *self.objective.metrics,
            *self._further_metrics,
            *(["optim/update_norm"] if update_norm else []),
            *(self._reuse_metrics if self.reuse is not None else []),
        )
        self.teacher_dtype: models.Dtype = teacher_dtype
        self.teacher_offload = teacher_offload
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile
        self.gradient_sync = gradient_sync
        self.trust_remote_code = trust_remote_code
        self.seed = seed
        self.ledger = Ledger()
        self.weights = Weights(self)
        self.tokenizer = models.load_tokenizer(
            tokenizer or student, trust_remote_code=trust_remote_code
        )
        models.check_eos_token_ids(eos_token_ids or (), self.tokenizer)
        self.eos_token_ids = eos_token_ids
        self.sampler = Sampler(  # configure_model fills in ends and vocabulary
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            pad_token_id=pad_token_id(self.tokenizer),
        )
        self._make_metrics([], [])
        self._student_files: dict[str, bytes] = {}
        self._options: optimization.Options = {}  # of optimizer and schedule, as configured
        self._saved_options: optimization.Options | None = None  # as a checkpoint was saved with
        self._measured: dict[str, float] = {}  # of the last step
        self._compared = False  # how student and teachers render prompts

    def _check_without_teacher(self, dtype: models.Dtype, offload: bool) -> None:
        """Refuse what would ask a teacher that there is not."""
        name = type(self.objective).__name__
        if TEACHER in self.objective.needs or self.objective.needs_drift:
            raise UserError(
                f"model.teacher is null, and objective {name} learns from one; name it, as "
                "--model.teacher MODEL, or learn from rewards (--config rl/grpo)"
            )
        if self.reference_source is None and (offload or dtype != "float32"):
            raise UserError(
                "model.teacher is null, and model.teacher_dtype or model.teacher_offload says how "
                "to keep one; take it out"
            )

    def configure_callbacks(self) -> list[Callback]:
        """None; the first of Lightning's hooks, and so the place to refuse what cannot work."""
        compatibility.check_trainer(self.trainer)
        return []

    @property
    def world(self) -> World:
        """The ranks of the run."""
        return World(None if self._trainer is None else self._trainer.strategy)

    def setup(self, stage: str) -> None:
        """Take the metrics of each data set and teacher too, where there are several.

        Raises:
            UserError: The objective would learn nothing.
        """
        if stage == TrainerFn.FITTING:
            self._check_objective()
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, PromptDataModule):
            self._make_metrics(data.train_sets, data.validation_sets)

    def _check_objective(self, same: Mapping[str, str] | None = None) -> None:
        if not {TEACHER, REFERENCE}.issuperset(self.objective.needs):
            return  # models are missing, as is said when they are loaded
        try:
            check_objective(
                self.objective,
                vocabulary=len(self.tokenizer),
                max_new_tokens=self.sampler.max_new_tokens,
                rewarded=self.reward is not None,
                same=same,
            )
        except UserError:
            raise
        except Exception as error:  # a class of the user's may take float32 only, or a GPU
            log.warning(
                "model.objective %s cannot be tried out on made-up numbers before the run: %s",
                *(type(self.objective).__name__, " ".join(str(error).split())),
            )

    @property
    def _further_metrics(self) -> list[str]:
        found: dict[str, object] = {REWARD_METRIC: self.reward, FIXED_FRACTION: self.mixture}
        if self.reward is not None:
            found[DROPPED_FRACTION] = self.reward.dynamic
            found[EXPLAINED_VARIANCE] = self._gae
        return [name for name, of in found.items() if of is not None]

    @property
    def _gae(self) -> GAE | None:
        of = None if self.reward is None else self.reward.advantage
        return of if isinstance(of, GAE) else None

    @property
    def _reuse_metrics(self) -> list[str]:
        return [*REUSE_METRICS, *map(reuse_name, self.objective.metrics)]

    def _make_metrics(self, train_sets: Sequence[str], validation_sets: Sequence[str]) -> None:
        names = [*self._token_metrics, *ROLLOUT_MEANS]
        several = self.teacher_sources if len(self.teacher_sources) > 1 else ()
        teachers = [f"teacher/{name}" for name in several]
        train, held_out = (
            [*(f"data/{name}" for name in sets), *teachers]
            for sets in (train_sets, validation_sets)
        )
        self.train_metrics = StepMetrics(
            ["opd/loss", *self.objective.metrics, *self._further_metrics, *names],
            ROLLOUT_SUMS,
            ROLLOUT_MAXIMA,
            groups=train,
        )
        self.evaluation_metrics = StepMetrics(names, ROLLOUT_SUMS, ROLLOUT_MAXIMA, groups=held_out)

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a checkpoint is a student, and does not know its teacher.

        Raises:
            UserError: Always.
        """
        raise UserError("name the checkpoint as a student: OPDModule(student=CHECKPOINT, ...)")

    # --- models ---------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load student and teachers, once; Lightning calls this for every stage.

        Raises:
            UserError: A model cannot be loaded, or student and teacher do not fit.
        """
        if not hasattr(self, "student"):
            self.student = self._load_model(self.student_source, trained=True)
            if self.gradient_checkpointing:
                self.student.gradient_checkpointing_enable({"use_reentrant": False})
            if self.compile_layers:
                sharding.compile_layers(self.student)
            self.teachers = load_teachers(
                self.teacher_sources,
                self._load_teacher,
                functools.partial(
                    models.load_head,
                    dtype=self.teacher_dtype,
                    trust_remote_code=self.trust_remote_code,
                ),
                self.student,
                self.tokenizer,
                temperature=self.sampler.temperature,
                offload=self.teacher_offload,
                trust_remote_code=self.trust_remote_code,
                reference=self.reference_source,
            )
            self.teachers.check_objective(type(self.objective).__name__, self.objective.needs)
            own_ends = models.eos_token_ids(self.student, self.tokenizer)
            ends = models.ends_of_all(own_ends, self.teachers.ends, self.eos_token_ids)
            self.sampler = dataclasses.replace(
                self.sampler, eos_token_ids=ends, vocabulary=self.teachers.vocabulary
            )
            if ends != own_ends:  # whoever uses the student elsewhere ends where it was taught to
                self.student.generation_config.eos_token_id = list(ends) or None
            self._student_files = models.student_files(self.student, self.tokenizer)
            if self._gae is not None:
                width = self.student.get_output_embeddings().in_features
                self.critic = Critic(width).to(self.device)
        self.engine.start(self.student, self.weights, self.tokenizer)

    def _load_model(self, source: str, *, trained: bool) -> PreTrainedModel:
        model = load_under(
            None if self._trainer is None else self._trainer.strategy,
            source,
            trained=trained,
            offload=self.teacher_offload and not trained,
            dtype=self._dtype_of_weights(trained),
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            adapter=self.adapter if trained else None,
        )
        model.train(trained)
        return model

    def teacher_readers(self) -> dict[str | None, Reader]:
        """Return where teachers come from and their own tokenizers, by what prompts call them.

        Raises:
            UserError: There is none, or their vocabulary is not the student's.
        """
        found: dict[str | None, Reader] = {}
        if not self.teacher_sources:
            raise UserError(
                "data.format.teacher_rendering own: model.teacher is null, so that nobody reads "
                "it; take it out"
            )
        for name, source in self.teacher_sources.items():
            model = TeacherServer.at(source).model if is_served(source) else source
            own = models.load_tokenizer(model, trust_remote_code=self.trust_remote_code)
            models.check_tokenizers(self.tokenizer, own, source)
            found[name] = (source, own)
        default = next(iter(found)) if len(found) == 1 else DEFAULT
        return found | ({None: found[default]} if default in found else {})

    def _load_teacher(self, source: str) -> PreTrainedModel:
        """Load a teacher; the base of an adapter is there already, unless it is sharded."""
        is_base = self.adapter is not None and source == self.student_source
        as_it_is = self._dtype_of_weights(True) == self.teacher_dtype and not self.teacher_offload
        if is_base and as_it_is and not self.weights.sharded:
            return self.student
        return self._load_model(source, trained=False)

    def _dtype_of_weights(self, trained: bool) -> models.Dtype:
        if not trained:
            return self.teacher_dtype
        return "float32" if self.adapter is None else self.adapter.base_dtype

    def on_fit_start(self) -> None:
        """Check what only a run can know.

        Raises:
            UserError: Completions do not fit a context, or the master weights are not float32.
        """
        self._check_run()
        self._check_models_differ()
        data = getattr(self.trainer, "datamodule", None)
        trained = data.train_prompts if isinstance(data, PromptDataModule) else []
        if self.reward is not None:
            self.reward.of.check(trained)
            size = data.batch_size if isinstance(data, PromptDataModule) else None
            if size is not None and size < (self.reward.dynamic or 0):
                raise UserError(
                    f"model.reward.dynamic={self.reward.dynamic}: more prompts than a step may "
                    f"sample, data.batch_size={size}; raise that, to several times as many"
                )
        if self.mixture is not None:
            self.mixture.check(trained)
        elif self.world.rank == 0 and any(prompt.completion_ids for prompt in trained):
            log.warning("data.format.completion_field is of no use without model.mixture")
        has_prompts = not isinstance(data, PromptDataModule) or data.validation_prompts
        if not (has_prompts and self.trainer.limit_val_batches):
            compatibility.check_monitors(self.trainer, self._logged)
        models.check_master_weights(self.student)
        models.check_precision(str(self.trainer.precision))

    def _check_models_differ(self) -> None:
        """Refuse models that are compared with themselves, if they read the same prompts."""
        data = getattr(self.trainer, "datamodule", None)
        prompts = data.train_prompts if isinstance(data, PromptDataModule) else []
        teachers = set(self.teacher_sources.values())
        if any(prompt.teacher_ids is not None for prompt in prompts) or len(teachers) > 1:
            return
        if self.reference_source in teachers:
            raise UserError(
                f"model.reference and model.teacher are both {self.reference_source}: what the "
                f"teacher has learnt since the reference is nothing, so "
                f"{type(self.objective).__name__} would be plain OPD; name another reference, or "
                "use opd.objectives.ReverseKL or PolicyGradient"
            )
        if self.student_source in teachers and self._dtype_of_weights(True) == self.teacher_dtype:
            self._check_objective({"student": TEACHER})

    def on_validation_start(self) -> None:
        self._check_run()

    on_test_start = on_predict_start = on_validation_start

    def _check_run(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        prompts = data.prompts if isinstance(data, PromptDataModule) else []
        self.teachers.check(prompts)
        if answers := [prompt.answer for prompt in prompts if prompt.answer is not None]:
            self.verifier.check(answers)
        if isinstance(data, PromptDataModule) and self.world.rank == 0 and not self._compared:
            self._compared = True
            if data.format.teacher_rendering == "student":
                self.teachers.check_rendering(data.examples, data.format, self.tokenizer)
        context = models.context_length(self.student)
        longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
        models.check_context(context, "student", longest, self.sampler.max_new_tokens)
        longest = max((len(p.teacher_ids or p.token_ids) for p in prompts), default=0)
        for name, reader in self.teachers.readers.items():
            models.check_context(reader.context, name, longest, self.sampler.max_new_tokens)
            reader.to(self.device)

    def teardown(self, stage: str) -> None:
        self.engine.stop()

    def configure_optimizers(self) -> Any:
        """Build optimizer and scheduler.

        Raises:
            UserError: They cannot be built, would fail before ``max_steps``, or cannot go on from
                the checkpoint's.
        """
        steps = min(max(self.trainer.max_steps, 1), optimization.REHEARSED)
        optimization.rehearse(self.optimizer, self.scheduler, steps)
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        optimizer = optimization.build(self.optimizer, parameters)
        if self.reuse is not None and optimization.trains_others(optimizer):
            raise UserError(
                f"model.reuse: {type(optimizer).__name__} trains other weights than those that "
                "would be judged after each step; use another optimizer, as torch.optim.AdamW"
            )
        scheduler = None if self.scheduler is None else self.scheduler(optimizer)
        self._options = optimization.options_of(optimizer, scheduler)
        self._check_resumed()
        return optimizer if scheduler is None else [[optimizer], [scheduler]]

    def _check_resumed(self) -> None:
        if self._saved_options is not None and self._options:
            optimization.check_resumed(self._saved_options, self._options)

    def on_train_start(self) -> None:
        """Let the options of optimizer and schedule hold, where a checkpoint's are others."""
        if self._saved_options is None:
            return
        different = optimization.differences(self._saved_options, self._options)
        if different:
            if self.global_rank == 0:
                log.warning(
                    "resumed at step %d with other options of optimizer or schedule than the "
                    "checkpoint was saved with; they hold from here on: %s",
                    *(self.global_step, "; ".join(different)),
                )
            (optimizer,) = self.trainer.optimizers
            schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
            optimization.apply(
                self.optimizer, self.scheduler, optimizer, schedulers, self.global_step
            )

    # --- training -------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Take one step of on-policy distillation.

        Returns:
            ``step``, the :class:`opd.step.StepOutput`; ``loss``, its mean over the global batch.
        """
        if not isinstance(batch, PromptBatch):
            raise UserError(
                f"OPDModule is trained on prompts of a PromptDataModule, not on {type(batch)}"
            )
        callbacks = compatibility.callbacks_of(self.trainer)
        t = self.global_step + 1
        if t == self.trainer.max_steps:
            batch = dataclasses.replace(batch, upcoming=None)
        asked = StepRequest.merged(
            c.step_request(t) for c in callbacks if isinstance(c, RequestsSteps)
        )
        optimizer = self.optimizers()
        with contextlib.ExitStack() as stack:
            for callback in callbacks:
                if isinstance(callback, SurroundsSteps):
                    stack.enter_context(callback.around_step())
            stack.enter_context(optimization.where_it_trains(optimizer, self.weights))
            output = take_step(self, batch, asked, optimizer, self.lr_schedulers())
        self.ledger.synchronize(self.world.sum, self.world.size)
        measured = self.train_metrics.compute()
        self.train_metrics.reset()
        self._measured = {**measured, **output.update}
        logs.show(self.trainer, self._measured)
        return {"step": output, "loss": torch.tensor(measured.get("opd/loss", 0.0))}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the step, and the cost with that of searches; runs after all callbacks."""
        often = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        if often and self.global_step % often == 0:
            logs.log(self.trainer, {**self._measured, **self.ledger.metrics()})

    # --- validation, test, predict --------------------------------------------------------------

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Add to the metrics of held-out prompts.

        Returns:
            ``evaluation``, the :class:`opd.evaluation.Evaluation`, for callbacks.
        """
        with self.ledger.phase("validation"):
            return {"evaluation": evaluate(self, batch)}

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        evaluate(self, batch)

    def on_validation_epoch_end(self) -> None:
        self.ledger.synchronize(self.world.sum, self.world.size)
        results = self._evaluation_results("val")
        if self.trainer.sanity_checking:  # the first validation: what will be logged is known now
            compatibility.check_monitors(self.trainer, [*results, *self._logged])
        self.log_dict({**results, "step": float(self.global_step)})

    def on_test_epoch_end(self) -> None:
        self.log_dict(self._evaluation_results("test"))

    def _evaluation_results(self, prefix: str) -> dict[str, float]:
        results = self.evaluation_metrics.compute()
        self.evaluation_metrics.reset()
        return {f"{prefix}/{name.partition('/')[2]}": value for name, value in results.items()}

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        return predict(self, batch)

    # --- checkpoints ----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what makes a checkpoint complete: config and tokenizer, random state, cost.

        Of a student with an adapter it holds only that.
        """
        if self.adapter is not None:
            checkpoint[checkpoints.STATE_DICT] = self._trained(checkpoint[checkpoints.STATE_DICT])
        checkpoint[checkpoints.STUDENT_FILES] = self._student_files
        checkpoint["random_state"] = random_state()
        checkpoint["cost"] = dict(self.ledger.totals)
        checkpoint["optimization"] = self._options

    def _trained(self, state: dict[str, Any]) -> dict[str, Any]:
        """Leave out the frozen parameters of a state dict."""
        trained = self.weights.parameters()
        return {
            name: tensor
            for name, tensor in state.items()
            if name in trained or not name.startswith(checkpoints.STUDENT_PREFIX)
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore cost and random state; pass over tensors of a callback that this run lacks.

        Raises:
            UserError: It is of another model, or of an optimizer that this one cannot go on from.
        """
        state, parts = checkpoint.get(checkpoints.STATE_DICT, {}), dict(self.named_children())
        for name in [name for name in state if name.partition(".")[0] not in parts]:
            del state[name]
        wanted = self.state_dict() if state else {}
        if self.adapter is not None:
            wanted = self._trained(wanted)
            files = checkpoint.get(checkpoints.STUDENT_FILES, {})
            models.check_adapter(self.trainer.ckpt_path, files, self._student_files)
        if misfit := checkpoints.find_misfit(wanted, state):
            raise UserError(
                f"--ckpt_path {self.trainer.ckpt_path}: is of another student than "
                f"{self.student_source}: {misfit}"
            )
        self._saved_options = checkpoint.get("optimization")  # none in checkpoints of before
        self._check_resumed()  # a sharded one is loaded after the optimizer has been built
        self.ledger.totals.update(checkpoint["cost"])
        restore_random_state(checkpoint["random_state"])
        self.weights.changed()
