"""Rollouts by vLLM, in the process that trains: an engine with a copy of the student's weights.

Each rank has an engine of its own. Weights are pushed, layer by layer, when they have changed since
the last rollout, and only then: what judges candidates without sampling, pushes nothing. What vLLM
keeps of old weights, the cache of common prefixes, is emptied with every push. On a GPU the engine
sleeps between rollouts, its weights and its cache given back to training.

vLLM schedules, and computes logits; what is drawn from them is ours, as in all engines: so a
completion is the same under each of them, whatever else is in the batch, to rounding, and its
log-probabilities are those of what it was drawn from. (On a GPU the rounding depends on the batch.)

Shapes: B completions, R of them in a pass, V vocabulary.
"""

from __future__ import annotations

import gc
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.errors import UserError
from opd.models import student_files, whole_weights
from opd.prompts import PromptBatch
from opd.randomness import own_randomness
from opd.rollouts.engine import RolloutEngine
from opd.rollouts.rollouts import Rollouts, Sampler
from opd.sharding import unwrapped
from opd.weights import Weights

LOGPROBS = "processed_logits"  # what vLLM is to say of a token: what Drawing leaves of its logits


class VLLM(RolloutEngine):
    """Rollouts by vLLM in this process.

    Args:
        dtype: Of its weights; auto: bfloat16 on a GPU, float32 on a CPU.
        memory: Share of a GPU's memory that it may take, weights included, while it samples.
        cpu_cache: GiB for keys and values on a CPU.
        max_tokens: Longest prompt and completion together; None: the model's context.
        max_completions: Completions decoded at a time.
        compiled: Use CUDA graphs and compiled layers: minutes at the first rollout, then faster.
        sleep: Give memory back between rollouts; on a GPU only.

    Raises:
        UserError: An option makes no sense, or vLLM is not installed.
    """

    def __init__(
        self,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        memory: float = 0.5,
        cpu_cache: float = 1.0,
        max_tokens: int | None = None,
        max_completions: int = 256,
        compiled: bool = True,
        sleep: bool = True,
    ) -> None:
        if not 0 < memory <= 1 or cpu_cache <= 0 or max_completions < 1:
            raise UserError(
                f"VLLM(memory={memory}, cpu_cache={cpu_cache}, max_completions={max_completions}): "
                "memory must be above 0 and at most 1, cpu_cache above 0, max_completions at least "
                "1"
            )
        self.dtype = dtype
        self.memory = memory
        self.cpu_cache = cpu_cache
        self.max_tokens = max_tokens
        self.max_completions = max_completions
        self.compiled = compiled
        self.sleep = sleep
        self.pushes = 0
        self._student: PreTrainedModel | None = None
        self._llm: Any = None
        self._pushed: int | None = None  # version of the weights that it has

    def start(
        self, student: PreTrainedModel, weights: Weights, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Remember whose weights to take over; vLLM itself begins with the first rollout.

        Raises:
            UserError: vLLM is not installed.
        """
        _import_vllm()
        if self._llm is not None and self._student is student:
            return
        self.stop()
        self._student, self._weights, self._tokenizer = student, weights, tokenizer

    def stop(self) -> None:
        """End vLLM, and give its memory back."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm, self._pushed = None, None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @torch.no_grad()
    def __call__(self, prompts: PromptBatch, sampler: Sampler, seeds: Sequence[int]) -> Rollouts:
        """Sample one completion per prompt.

        Raises:
            UserError: vLLM cannot run the student, or not so long completions.
        """
        student, device = self._student, prompts.ids.device
        assert student is not None, "start the engine first"
        with own_randomness(device, "vllm"):  # vLLM sets seeds
            if self._llm is None:
                self._llm = self._begin(student, device)
            self._wake()
            try:
                self._push(student)
                if not len(prompts):
                    return Rollouts.empty(prompts)
                return self._sample(prompts, sampler, seeds)
            finally:
                self._fall_asleep()

    def _sample(self, prompts: PromptBatch, sampler: Sampler, seeds: Sequence[int]) -> Rollouts:
        limit = self._llm.model_config.max_model_len
        longest = max(len(prompt.token_ids) for prompt in prompts.prompts)
        if longest + sampler.max_new_tokens > limit:
            raise UserError(
                f"VLLM.max_tokens={limit} is less than a prompt of {longest} tokens and a "
                f"completion of {sampler.max_new_tokens}"
            )
        params = [
            _import_vllm().SamplingParams(**sampling_params(sampler, seed), flat_logprobs=True)
            for seed in seeds
        ]
        inputs = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts.prompts]
        with self._explained():
            answers = self._llm.generate(inputs, params, use_tqdm=False)
        outputs = [answer.outputs[0] for answer in answers]
        return Rollouts.of_lists(
            prompts,
            [output.token_ids for output in outputs],
            [output.logprobs.logprobs for output in outputs],
            sampler,
        )

    # --- vLLM itself ------------------------------------------------------------------------------

    def _begin(self, student: PreTrainedModel, device: torch.device) -> Any:
        """Start vLLM with weights that are not yet the student's."""
        vllm = _import_vllm()
        from opd.rollouts.vllm_worker import Drawing

        on_gpu = device.type == "cuda"
        dtype = self.dtype if self.dtype != "auto" else ("bfloat16" if on_gpu else "float32")
        with tempfile.TemporaryDirectory() as folder, _settings(device, self.cpu_cache):
            for name, content in self._files(student).items():
                (Path(folder) / name).write_bytes(content)
            with self._explained():
                return vllm.LLM(
                    model=folder,
                    skip_tokenizer_init=True,
                    load_format="dummy",
                    dtype=dtype,
                    max_model_len=self.max_tokens,
                    max_num_seqs=self.max_completions,
                    gpu_memory_utilization=self.memory,
                    enforce_eager=not (self.compiled and on_gpu),
                    enable_sleep_mode=self.sleep and on_gpu,
                    generation_config="vllm",  # none
                    logits_processors=[Drawing],
                    logprobs_mode=LOGPROBS,
                    async_scheduling=False,  # what is drawn last is known when the next is drawn
                    disable_log_stats=True,
                    seed=0,  # of nothing: all that is random is drawn by us
                )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say in a line what vLLM has against a model or a machine."""
        student = self._student
        assert student is not None, "start the engine first"
        try:
            yield
        except Exception as error:  # of whatever kind
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"VLLM cannot run {type(unwrapped(student)).__name__} here ({reason}). Use "
                "opd.rollouts.TransformersEngine"
            ) from error

    def _files(self, student: PreTrainedModel) -> dict[str, bytes]:
        """Config and tokenizer of the student, as of a model without adapter."""
        with tempfile.TemporaryDirectory() as folder:
            student.config.save_pretrained(folder)
            config = json.loads((Path(folder) / "config.json").read_bytes())
        config.pop("quantization_config", None)  # what it gets is not
        files = student_files(student, self._tokenizer)
        return {**files, "config.json": json.dumps(config).encode()}

    def _push(self, student: PreTrainedModel) -> None:
        """Hand the student's weights over, if they are others than those that vLLM has."""
        if self._pushed == self._weights.version:
            return
        from opd.rollouts.vllm_worker import pack_heads

        weights = whole_weights(student)
        with self._explained():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self._llm.apply_model(pack_heads)
        self._llm.reset_prefix_cache()
        self._pushed = self._weights.version
        self.pushes += 1

    def _wake(self) -> None:
        if self._sleeps and self._llm.llm_engine.is_sleeping():
            self._llm.wake_up()

    def _fall_asleep(self) -> None:
        if self._sleeps and self._llm is not None:
            self._llm.sleep(level=2)
            self._pushed = None  # it has thrown them away

    @property
    def _sleeps(self) -> bool:
        return self.sleep and torch.cuda.is_available()


def sampling_params(sampler: Sampler, seed: int) -> dict[str, Any]:
    """Return what vLLM is asked for, so that our worker samples a completion.

    Args:
        sampler: How to sample.
        seed: Of the completion.
    """
    return {
        "max_tokens": sampler.max_new_tokens,
        "temperature": 0.0,  # what is drawn is the only token left
        "stop_token_ids": list(sampler.eos_token_ids),
        "ignore_eos": True,  # the model's own: those that count are named
        "detokenize": False,
        "logprobs": 0,  # of the sampled token only
        "extra_args": {"seed": seed, "sampler": asdict(sampler)},
    }


@contextmanager
def _settings(device: torch.device, cpu_cache: float) -> Iterator[None]:
    """Set what vLLM takes from the environment, for as long as it starts."""
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process
        "VLLM_CPU_KVCACHE_SPACE": str(max(math.ceil(cpu_cache), 1)),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or it would bind the training's threads too
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _import_vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise UserError(
            "model.engine opd.rollouts.VLLM needs vLLM: pip install 'opd[vllm]' (on a machine "
            "without a GPU see `make test-vllm`)"
        ) from error
    return vllm
