"""OPDModule: a student, its frozen teachers, and one step of on-policy distillation.

One ``training_step`` is one optimizer step, t = ``trainer.global_step`` of the paper (2605.11739):

1. the student samples completions for the step's prompts,
2. they are cut into micro-batches,
3. the teacher scores each micro-batch,
4. the objective's loss is summed over tokens, divided by the token count of the global batch,
5. one backward per micro-batch; then clip, optimizer, scheduler.

Callbacks act in ``on_train_batch_end``: EffOPD may move the weights there.

Shapes: B completions, N tokens of them together, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from transformers import PreTrainedModel

from opd import checkpoints, models, sharding
from opd.answers import AnswerVerifier
from opd.errors import NonFiniteError, UserError
from opd.ledger import Ledger
from opd.metrics import (
    ROLLOUT_MAXIMA,
    ROLLOUT_MEANS,
    ROLLOUT_SUMS,
    TOKEN_METRICS,
    StepMetrics,
    token_metrics,
)
from opd.objectives import Objective, ReverseKL, kl
from opd.prompts import Prompt, PromptBatch, PromptDataModule, pad_token_id
from opd.randomness import generator, own_randomness, random_state, restore_random_state
from opd.rollouts import (
    RolloutEngine,
    Rollouts,
    Sampler,
    TransformersEngine,
    cut_into_micro_batches,
    rollout_records,
)
from opd.step_rollouts import StepRollouts
from opd.strategies import ShardedStrategy
from opd.teachers import LocalTeacher, TeacherScored

DEFAULT_TEACHER = "default"


def _adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-6, weight_decay=0.0)


class OPDModule(LightningModule):
    """On-policy distillation of a student from one or several frozen teachers.

    Args:
        student: The model to train: hub id, folder, checkpoint, embedded:base or embedded:teacher.
        teacher: The model that scores, named alike; or several, as a mapping from the name that a
            prompt's ``teacher`` field holds to a model.
        objective: Loss per token. None: ReverseKL, the paper's.
        optimizer: Builds the optimizer from the student's parameters.
        scheduler: Builds the learning-rate scheduler, advanced once per step. None: constant.
        max_new_tokens: Longest completion in tokens.
        temperature: Of rollouts; student and teacher logits are divided by it in the objective too.
        top_p: Nucleus sampling of rollouts; 1 keeps all tokens.
        top_k: Top-k sampling of rollouts; 0 keeps all tokens.
        rollouts_per_prompt: Completions sampled per prompt.
        eos_token_ids: Tokens that end a completion. None: those of the student.
        engine: What samples completions. None: TransformersEngine.
        verifier: Finds and checks the answers of prompts that have one.
        micro_batch_tokens: Positions per forward and backward, padding and prompts included. Bounds
            memory; does not change the loss.
        max_grad_norm: Gradients are clipped to this norm.
        tokenizer: Where the tokenizer comes from. None: the student.
        teacher_dtype: Dtype of the teacher's weights.
        teacher_offload: Keep the teacher's weights in host memory, and copy each layer to the
            device when it runs.
        attn_implementation: sdpa, eager, flash_attention_2, ...
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
    teachers: dict[str, LocalTeacher]

    def __init__(
        self,
        student: str,
        teacher: str | dict[str, str],
        objective: Objective | None = None,
        optimizer: OptimizerCallable = _adamw,
        scheduler: LRSchedulerCallable | None = None,
        max_new_tokens: int = 16384,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        rollouts_per_prompt: int = 1,
        eos_token_ids: list[int] | None = None,
        engine: RolloutEngine | None = None,
        verifier: AnswerVerifier = AnswerVerifier(),  # noqa: B008 - frozen
        micro_batch_tokens: int = 32768,
        max_grad_norm: float = 1.0,
        tokenizer: str | None = None,
        teacher_dtype: models.Dtype = "float32",
        teacher_offload: bool = False,
        attn_implementation: str = "sdpa",
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
            ("max_grad_norm", max_grad_norm),
        ]:
            if value <= 0:
                raise UserError(f"model.{name}={value} must be above 0")
        self.student_source = student
        self.teacher_sources = {DEFAULT_TEACHER: teacher} if isinstance(teacher, str) else teacher
        self.objective = objective or ReverseKL()
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.rollouts_per_prompt = rollouts_per_prompt
        self.engine = engine or TransformersEngine()
        self.verifier = verifier
        self.micro_batch_tokens = micro_batch_tokens
        self.max_grad_norm = max_grad_norm
        self.teacher_dtype: models.Dtype = teacher_dtype
        self.teacher_offload = teacher_offload
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile
        self.gradient_sync = gradient_sync
        self.trust_remote_code = trust_remote_code
        self.seed = seed
        self.ledger = Ledger()
        self.tokenizer = models.load_tokenizer(
            tokenizer or student, trust_remote_code=trust_remote_code
        )
        self.sampler = Sampler(  # configure_model fills in the student's EOS
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            eos_token_ids=tuple(eos_token_ids or ()),
            pad_token_id=pad_token_id(self.tokenizer),
        )
        names = [*TOKEN_METRICS, *ROLLOUT_MEANS]
        self.train_metrics = StepMetrics(["opd/loss", *names], ROLLOUT_SUMS, ROLLOUT_MAXIMA)
        self.evaluation_metrics = StepMetrics(names, ROLLOUT_SUMS, ROLLOUT_MAXIMA)
        self.step_rollouts = StepRollouts()
        self._student_files: dict[str, bytes] = {}

    # --- models ---------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load student and teachers, once; Lightning calls this for every stage.

        Raises:
            UserError: A model cannot be loaded, or student and teacher do not fit.
        """
        if hasattr(self, "student"):
            return
        self.student = self._load_model(self.student_source, dtype="float32", trained=True)
        self.student.train()
        if self.gradient_checkpointing:
            self.student.gradient_checkpointing_enable({"use_reentrant": False})
        if self.compile_layers:
            for layer in sharding.transformer_layers(self.student):
                layer.compile(dynamic=True)
        self._student_files = models.student_files(self.student, self.tokenizer)
        if not self.sampler.eos_token_ids:
            eos = models.eos_token_ids(self.student, self.tokenizer)
            self.sampler = dataclasses.replace(self.sampler, eos_token_ids=eos)
        teachers = {name: self._load_teacher(name) for name in self.teacher_sources}
        # Kept out of the module tree: in no checkpoint, no optimizer and no data-parallel wrapper.
        object.__setattr__(self, "teachers", teachers)
        everyone = [self.student, *(teacher.model for teacher in teachers.values())]
        # Beyond the smallest vocabulary there is only padding: check_models has made sure of that
        self.vocabulary = min(models.vocabulary_size(model) for model in everyone)

    def _load_teacher(self, name: str) -> LocalTeacher:
        source = self.teacher_sources[name]
        tokenizer = models.load_tokenizer(source, trust_remote_code=self.trust_remote_code)
        models.check_tokenizers(self.tokenizer, tokenizer, source)
        model = self._load_model(source, dtype=self.teacher_dtype, trained=False)
        models.check_models(self.student, model, self.tokenizer, self.sampler.eos_token_ids, source)
        return LocalTeacher(model, offload=self.teacher_offload)

    def _load_model(self, source: str, *, dtype: models.Dtype, trained: bool) -> PreTrainedModel:
        load = functools.partial(
            models.load_model,
            source,
            dtype=dtype,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
        )
        strategy = None if self._trainer is None else self._trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            offload = self.teacher_offload and not trained
            return strategy.load_model(load, trained=trained, offload=offload)
        if not isinstance(strategy, DDPStrategy | SingleDeviceStrategy | None):
            raise UserError(
                f"trainer.strategy {type(strategy).__name__} cannot share out student and teacher; "
                "use one of configs/strategy/"
            )
        return load()

    def on_fit_start(self) -> None:
        """Check what only a run can know.

        Raises:
            UserError: Completions do not fit a context, or the master weights are not float32.
        """
        self._place_and_check()
        low = {p.dtype for p in self.student.parameters() if p.requires_grad} - {torch.float32}
        if low:
            raise UserError(
                f"the student's weights are {low.pop()}: steps of the usual size round to nothing. "
                "Train with --trainer.precision bf16-mixed, which keeps float32 master weights"
            )

    def on_validation_start(self) -> None:
        self._place_and_check()

    on_test_start = on_predict_start = on_validation_start

    def _place_and_check(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        longest = data.longest_prompt if isinstance(data, PromptDataModule) else 0
        for prompt in data.prompts if isinstance(data, PromptDataModule) else []:
            self._teacher_name(prompt)  # now, on all ranks, rather than later on one
        models.check_context(self.student, "student", longest, self.sampler.max_new_tokens)
        for teacher in self.teachers.values():
            models.check_context(teacher.model, "teacher", longest, self.sampler.max_new_tokens)
            teacher.to(self.device)

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        optimizer = self.optimizer(parameters)
        if self.scheduler is None:
            return optimizer
        return [optimizer], [self.scheduler(optimizer)]

    # --- the parts of a step --------------------------------------------------------------------

    def generate(
        self, prompts: PromptBatch, rng: torch.Generator, temperature: float | None = None
    ) -> Rollouts:
        """Sample one completion per prompt with the student as it is now."""
        sampler = self.sampler
        if temperature is not None:
            sampler = dataclasses.replace(sampler, temperature=temperature)
        return self.engine(self.student, prompts, sampler, rng)

    def generator(self, step: int, purpose: str) -> torch.Generator:
        """Random numbers that depend on (seed, step, rank, purpose) alone."""
        return generator(self.device, self.seed, step, self.global_rank, purpose)

    def teacher_of(self, rollouts: Rollouts) -> LocalTeacher:
        """Return the teacher that the prompts of a micro-batch name.

        Raises:
            UserError: There is no teacher of that name.
        """
        return self.teachers[self._teacher_name(rollouts.prompts.prompts[0])]

    def _teacher_name(self, prompt: Prompt) -> str:
        if prompt.teacher is None and len(self.teachers) == 1:
            return next(iter(self.teachers))
        name = prompt.teacher or DEFAULT_TEACHER
        if name not in self.teachers:
            raise UserError(
                f"prompt row {prompt.row} names teacher {prompt.teacher!r}; model.teacher has "
                f"{sorted(self.teachers)}"
            )
        return name

    def micro_batches(self, rollouts: Rollouts) -> list[Rollouts]:
        """Cut rollouts into micro-batches: on all ranks equally many, and of the same teachers.

        A pass of a sharded model is a collective, and gradients are summed with the last one, so a
        rank with fewer micro-batches gets placeholders without tokens. A collective itself.
        """
        cut = cut_into_micro_batches(rollouts, self.micro_batch_tokens)
        if self.trainer.world_size == 1:
            return cut
        by_teacher: dict[str, list[Rollouts]] = {name: [] for name in self.teachers}
        for micro in cut:
            by_teacher[self._teacher_name(micro.prompts.prompts[0])].append(micro)
        mine = torch.tensor([len(group) for group in by_teacher.values()], device=self.device)
        most = self.trainer.strategy.reduce(mine, reduce_op="max").tolist()
        for (name, group), count in zip(by_teacher.items(), most, strict=True):
            group += [Rollouts.placeholder(name, self.device)] * (count - len(group))
        return [micro for group in by_teacher.values() for micro in group]

    def student_logprobs(self, rollouts: Rollouts) -> Tensor:
        """Log-probabilities of the student at all completion tokens, float32, [N, V]."""
        logits = models.completion_logits(self.student, *rollouts.inputs())[:, : self.vocabulary]
        return torch.log_softmax(logits / self.sampler.temperature, dim=-1)

    def teacher_logprobs(self, scored: TeacherScored) -> Tensor:
        """Log-probabilities of the teacher at the same tokens, float32, [N, V]."""
        return scored.teacher_logprobs(self.vocabulary, self.sampler.temperature)

    def score_with_teacher(self, rollouts: Rollouts) -> TeacherScored:
        """Let the teacher of a micro-batch score it; counts its tokens."""
        self.ledger.count("teacher_tokens", rollouts.num_tokens)
        return self.teacher_of(rollouts).score(rollouts)

    def verify(self, rollouts: Rollouts) -> Tensor:
        """Check the answers of the prompts that have one: 1 right, 0 wrong, float64."""
        ids, lengths = rollouts.completion_ids.tolist(), rollouts.lengths.tolist()
        verdicts = []
        for i, prompt in enumerate(rollouts.prompts.prompts):
            if prompt.answer is not None:
                text = self.tokenizer.decode(ids[i][: lengths[i]], skip_special_tokens=True)
                assert isinstance(text, str)
                verdicts.append(float(self.verifier(text, prompt.answer)))
        return torch.tensor(verdicts, dtype=torch.float64)

    # --- training -------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Take one step of on-policy distillation.

        Returns:
            ``rollouts``, the micro-batches trained on, and ``reverse_kl``, for each its values per
            token [N].
        """
        step = self.global_step + 1
        with self.ledger.phase("rollout"):
            prompts = batch.repeat(self.rollouts_per_prompt)
            rollouts = self.generate(prompts, self.generator(step, "rollout"))
            self.ledger.count("rollout_tokens", rollouts.num_tokens)
        self._update_rollout_metrics(self.train_metrics, rollouts)
        held_out, trained = self.step_rollouts.split(rollouts, self.generator(step, "held out"))
        micro_batches = self.micro_batches(trained)
        with own_randomness(self.device, self.seed, step, self.global_rank, "dropout"):
            token_kls = self._accumulate_gradients(micro_batches)
        if self.step_rollouts.held_out_fraction:
            self.step_rollouts.unscored = self.micro_batches(held_out)
        update = self._apply_gradients()
        self.ledger.synchronize(self._sum_over_ranks, self.trainer.world_size)
        self.log_dict({**self.train_metrics.compute(), **update, "step": float(step)})
        self.train_metrics.reset()
        filled = [i for i, micro in enumerate(micro_batches) if micro.num_tokens]
        return {
            "rollouts": [micro_batches[i] for i in filled],
            "reverse_kl": [token_kls[i] for i in filled],
        }

    def _accumulate_gradients(self, micro_batches: Sequence[Rollouts]) -> list[Tensor]:
        """Backward through every micro-batch; returns the reverse KL per token of each.

        Raises:
            NonFiniteError: A loss or a teacher's score is infinite or NaN, on whatever rank.
        """
        tokens = torch.tensor(float(sum(m.num_tokens for m in micro_batches)), device=self.device)
        total = max(self._sum_over_ranks(tokens).item(), 1.0)
        token_kls, losses, teacher_scores = [], [], []
        wrapper = self.trainer.strategy.model
        indices = range(len(micro_batches))
        synced = indices if self.gradient_sync == "every" else indices[-1:]
        for i, micro in enumerate(micro_batches):
            with self.ledger.phase("teacher"):
                scored = self.score_with_teacher(micro)
                log_q = self.teacher_logprobs(scored)
            with self.ledger.phase("train"):
                log_p = self.student_logprobs(micro)
                logmu_y = micro.engine_logprobs[micro.mask]
                loss = self.objective(log_p, log_q, micro.tokens, logmu_y)
                # Lightning's bf16-mixed keeps autocast on in here; a backward under it would round
                # the products of the float32 head to bfloat16.
                with (
                    torch.autocast(self.device.type, enabled=False),
                    sharding.gradient_sync(wrapper, self.student, i in synced),
                ):
                    # Data parallel strategies average gradients over ranks; the sum is wanted.
                    self.manual_backward(loss.sum() * (self.trainer.world_size / total))
                self.ledger.count("train_tokens", micro.num_tokens)
                diagnosis = token_metrics(log_p.detach(), log_q, micro.tokens, logmu_y)
                self.train_metrics.update({**diagnosis, "opd/loss": loss.detach()})
            token_kls.append(diagnosis["opd/reverse_kl"])
            losses.append(loss.detach())
            teacher_scores.append(diagnosis["opd/teacher_logprob"])
            self.step_rollouts.keep(scored)
        # The teacher first: where it fails, the loss follows
        self._check_finite(micro_batches, teacher_scores, "teacher's log-probability")
        self._check_finite(micro_batches, losses, "loss")
        return token_kls

    def _check_finite(
        self, micro_batches: Sequence[Rollouts], values: Sequence[Tensor], what: str
    ) -> None:
        """Stop all ranks, before the optimizer's step, if a value of any of them is not finite."""
        bad = torch.zeros(self.trainer.world_size, device=self.device)
        bad[self.global_rank] = sum((~v.isfinite()).sum() for v in values)
        bad = self._sum_over_ranks(bad)
        if not bad.any():
            return
        rows = [
            f"{prompt.row} ({value})"
            for micro, token_values in zip(micro_batches, values, strict=True)
            for prompt, value in zip(
                micro.prompts.prompts, micro.spread(token_values).sum(dim=1).tolist(), strict=True
            )
            if not math.isfinite(value)
        ]
        found = ", ".join(rows[:5]) + (", ..." if len(rows) > 5 else "")
        rank = int(bad.argmax())
        row = self.trainer.strategy.broadcast(found, src=rank)
        raise NonFiniteError(
            f"step {self.global_step + 1}, rank {rank}: the {what} of prompt row {row} is not "
            f"finite; the weights are those of step {self.global_step}"
        )

    def _apply_gradients(self) -> dict[str, float]:
        """Clip, step, advance the scheduler; returns the metrics of the update.

        Raises:
            NonFiniteError: The gradient is infinite or NaN.
        """
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        with self.ledger.phase("train"):
            parameters = [p for p in self.student.parameters() if p.requires_grad]
            grad_norm = sharding.clip_gradients(self.student, self.max_grad_norm)
            if not math.isfinite(grad_norm):
                raise NonFiniteError(
                    f"step {self.global_step + 1}: the gradient's norm is {grad_norm}, although "
                    f"every loss is finite; the weights are those of step {self.global_step}"
                )
            shards = sharding.local_shards(parameters)
            before = [shard.clone() for shard in shards]
            learning_rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            optimizer.zero_grad()
            torch._foreach_sub_(before, shards)
            squares = torch.stack(torch._foreach_norm(before)).double().square().sum()
            if sharding.is_sharded(self.student):
                squares = self._sum_over_ranks(squares)
            if self.scheduler is not None:
                scheduler = self.lr_schedulers()
                assert scheduler is not None
                assert not isinstance(scheduler, list)
                scheduler.step()
        return {
            "optim/lr": float(learning_rate),
            "optim/grad_norm": grad_norm,
            "optim/update_norm": float(squares.sqrt()),
        }

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the cost, that of searches included; runs after all callbacks."""
        self.step_rollouts = StepRollouts()
        self.log_dict(self.ledger.metrics())

    def _update_rollout_metrics(self, metrics: StepMetrics, rollouts: Rollouts) -> None:
        lengths = rollouts.lengths.double()
        metrics.update(
            {
                "rollout/tokens": lengths,
                "rollout/length_mean": lengths,
                "rollout/length_max": lengths,
                "rollout/truncated_fraction": (~rollouts.finished).double(),
                "rollout/accuracy": self.verify(rollouts),
            }
        )

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        reduced = self.trainer.strategy.reduce(value.to(self.device), reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return reduced

    # --- validation, test, predict --------------------------------------------------------------

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        with self.ledger.phase("validation"):
            self._evaluate(batch, batch_idx)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.log_dict({**self._evaluation_results("val"), "step": float(self.global_step)})

    def on_test_epoch_end(self) -> None:
        self.log_dict(self._evaluation_results("test"))

    def _evaluate(self, batch: PromptBatch, batch_idx: int) -> None:
        """Accuracy and teacher KL on prompts, with the same random numbers every time."""
        rollouts = self.generate(batch, self.generator(batch_idx, "validation"))
        self._update_rollout_metrics(self.evaluation_metrics, rollouts)
        for micro in self.micro_batches(rollouts):
            log_q = self.teacher_logprobs(self.teacher_of(micro).score(micro))
            logmu_y = micro.engine_logprobs[micro.mask]
            diagnosis = token_metrics(self.student_logprobs(micro), log_q, micro.tokens, logmu_y)
            self.evaluation_metrics.update(diagnosis)

    def _evaluation_results(self, prefix: str) -> dict[str, float]:
        results = self.evaluation_metrics.compute()
        self.evaluation_metrics.reset()
        return {f"{prefix}/{name.partition('/')[2]}": value for name, value in results.items()}

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Sample completions and score them.

        Returns:
            One JSON record per prompt: prompt, completion, and per token the log-probabilities of
            student and teacher and their reverse KL.
        """
        rollouts = self.generate(batch, self.generator(batch_idx, "predict"))
        records: list[dict[str, Any]] = []
        for micro in self.micro_batches(rollouts):
            log_q = self.teacher_logprobs(self.teacher_of(micro).score(micro))
            log_p = self.student_logprobs(micro)
            values = {
                "student_logprob": log_p.gather(1, micro.tokens[:, None]).squeeze(1),
                "teacher_logprob": log_q.gather(1, micro.tokens[:, None]).squeeze(1),
                "reverse_kl": kl(log_p, log_q),
            }
            columns = {name: micro.spread(value) for name, value in values.items()}
            if micro.num_tokens:
                records += rollout_records(micro, self.tokenizer, **columns)
        return sorted(records, key=lambda record: record["row"])

    # --- checkpoints ----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what makes a checkpoint complete: config and tokenizer, random state, cost."""
        checkpoint[checkpoints.STUDENT_FILES] = self._student_files
        checkpoint["random_state"] = random_state()
        checkpoint["cost"] = dict(self.ledger.totals)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore cost and random state; pass over tensors of a callback that this run lacks."""
        state, parts = checkpoint.get(checkpoints.STATE_DICT, {}), dict(self.named_children())
        for name in [name for name in state if name.partition(".")[0] not in parts]:
            del state[name]
        self.ledger.totals.update(checkpoint["cost"])
        restore_random_state(checkpoint["random_state"])
