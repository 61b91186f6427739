"""An lm-eval model that samples with a rollout engine, keeps what it samples, and has it judged.

Tasks of tasks/ are sampled by the engine, as in training: completion by completion from seeds of
their own, so that neither the batch nor the number of processes changes what is said. lm-eval's own
tasks, which stop at strings or compare likelihoods, go to its model for transformers.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.benchmarks import Completion, Scorer
from eval.kept import Generated, Kept, Key, question
from opd.errors import UserError
from opd.models import (
    context_length,
    eos_token_ids,
    generating_with,
    plain_sampling,
    vocabulary_size,
)
from opd.prompts import Prompt, PromptBatch, pad_token_id
from opd.randomness import derive_seed
from opd.rollouts import RolloutEngine, Sampler

log = logging.getLogger(__name__)


class GeneratedElsewhere(Exception):  # noqa: N818 - no error
    """A process other than the first has done its share; the first one judges and counts."""


@dataclass(frozen=True)
class Item:
    """One completion to be sampled.

    Attributes:
        key: Where it is kept.
        token_ids: Of the prompt.
        seed: Of its draws.
        request: What lm-eval asks for.
    """

    key: Key
    token_ids: tuple[int, ...]
    seed: int
    request: Instance


class EngineLM(LM):
    """Answers lm-eval with a rollout engine.

    Args:
        model: Causal language model.
        tokenizer: Its tokenizer.
        engine: Started with the model.
        scorers: By task: what judges completions; tasks without one are lm-eval's own.
        kept: What has been generated and judged before, and where to keep what is.
        identity: What tells the model from others, in the digest of a completion.
        batch_size: Completions per call of the engine.
        chat_template_kwargs: Passed to the chat template; None: prompts are plain text.
        seed: Seed of the sampling.
        progress: Show how many are done, and the time left.
        workers: Threads that judge completions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        engine: RolloutEngine,
        scorers: Mapping[str, Scorer],
        kept: Kept,
        *,
        identity: str,
        batch_size: int,
        chat_template_kwargs: Mapping[str, Any] | None,
        seed: int,
        progress: bool = False,
        workers: int = 1,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.engine = engine
        self.scorers = scorers
        self.kept = kept
        self.identity = identity
        self.batch_size = batch_size
        self.chat_template_kwargs = chat_template_kwargs
        self.seed = seed
        self.progress = progress
        self.workers = workers

    # --- prompts ----------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer; lm-eval asks for it with chat templates."""
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a chat as text."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **(self.chat_template_kwargs or {}),
        )
        assert isinstance(text, str)
        return text

    def _token_ids(self, task: str, requests: Sequence[Instance]) -> dict[str, tuple[int, ...]]:
        """Tokenize the prompts of a task, each once."""
        texts = list(dict.fromkeys(str(request.args[0]) for request in requests))
        # A template writes its own special tokens; plain text gets the tokenizer's
        special = self.chat_template_kwargs is None
        ids = self.tokenizer(texts, add_special_tokens=special)["input_ids"]
        if not all(ids):
            raise UserError(f"{task}: a prompt has no tokens")
        return dict(zip(texts, map(tuple, ids), strict=True))

    def _items(
        self,
        task: str,
        requests: Sequence[Instance],
        prompts: Mapping[str, tuple[int, ...]],
        how: object,
    ) -> list[Item]:
        """List the completions that are wanted: of each request as many as it is repeated."""
        digests = {
            text: hashlib.sha256(
                repr((self.identity, how, prompt, self.seed)).encode()
            ).hexdigest()[:16]
            for text, prompt in prompts.items()
        }
        copies = Counter[int]()
        items = []
        for request in requests:
            problem, text = int(request.doc_id or 0), str(request.args[0])
            copy = copies[problem]
            copies[problem] += 1
            seed = derive_seed(self.seed, "evaluate", task, problem, copy)
            items.append(Item((problem, copy, digests[text]), prompts[text], seed, request))
        return items

    def _sampler(self, task: str, options: Mapping[str, Any], longest: int) -> Sampler:
        """Read lm-eval's generation arguments; completions end where the context does."""
        context = context_length(self.model)
        new_tokens = int(options["max_gen_toks"])
        if context is not None and longest + new_tokens > context:
            if longest >= context:
                raise UserError(
                    f"{task}: a prompt has {longest} tokens, and the model's context is {context}"
                )
            log.warning(
                "%s: at most %d new tokens rather than %d: the model's context is %d tokens",
                *(task, context - longest, new_tokens, context),
            )
            new_tokens = context - longest
        head = vocabulary_size(self.model)
        return Sampler(
            max_new_tokens=new_tokens,
            temperature=float(options["temperature"]) if options.get("do_sample") else 0.0,
            top_p=float(options.get("top_p", 1.0)),
            top_k=int(options.get("top_k", 0)),
            eos_token_ids=eos_token_ids(self.model, self.tokenizer),
            pad_token_id=pad_token_id(self.tokenizer),
            vocabulary=len(self.tokenizer) if len(self.tokenizer) < head else None,
        )

    # --- completions ------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Sample what is missing, all processes together, and judge it.

        Raises:
            UserError: A prompt does not fit, or a completion cannot be written.
            GeneratedElsewhere: This is not the first process, and its share is done.
        """
        by_task: dict[str, list[Instance]] = defaultdict(list)
        for request in requests:
            by_task[str(request.task_name)].append(request)
        items = {task: self._generate(task, some) for task, some in by_task.items()}
        self.kept.gather()
        if self.kept.rank:
            raise GeneratedElsewhere
        # lm-eval wants them in the order in which it has asked
        said = {task: iter(self._judged(task, some)) for task, some in items.items()}
        return [next(said[str(request.task_name)]) for request in requests]

    def _generate(self, task: str, requests: Sequence[Instance]) -> list[Item]:
        prompts = self._token_ids(task, requests)
        options, how, sample = requests[0].args[1], "lm-eval", self._sample_until
        if task in self.scorers:
            sampler = self._sampler(task, options, max(map(len, prompts.values())))
            how = type(self.engine).__name__
            sample = functools.partial(self._sample, sampler=sampler)
            options = asdict(sampler)
        items = self._items(task, requests, prompts, (how, options))
        known = self.kept.completions(task)
        ordered = sorted(items, key=lambda item: (len(item.token_ids), item.key))
        chunks = [ordered[i : i + self.batch_size] for i in range(0, len(ordered), self.batch_size)]
        rank, size = self.kept.rank, self.kept.world_size
        own = [[item for item in chunk if item.key not in known] for chunk in chunks[rank::size]]
        total = sum(map(len, own))
        shown = self.progress and total > 0
        with tqdm(total=total, desc=task, unit="completion", disable=not shown) as bar:
            for chunk in filter(None, own):
                generated = sample(chunk)
                keys = [item.key for item in chunk]
                self.kept.add_completions(task, dict(zip(keys, generated, strict=True)))
                bar.update(len(chunk))
        return items

    def _sample(self, items: Sequence[Item], sampler: Sampler) -> list[Generated]:
        """Sample with the engine."""
        prompts = [Prompt(item.key[0], item.token_ids) for item in items]
        batch = PromptBatch.collate(prompts, sampler.pad_token_id).to(self.model.device)
        rollouts = self.engine(batch, sampler, [item.seed for item in items])
        ids, lengths = rollouts.completion_ids.tolist(), rollouts.lengths.tolist()
        texts = self.tokenizer.batch_decode(
            [tokens[:length] for tokens, length in zip(ids, lengths, strict=True)],
            skip_special_tokens=True,
        )
        ended = rollouts.finished.tolist()
        return [Generated(*one) for one in zip(texts, lengths, (not e for e in ended), strict=True)]

    def _sample_until(self, items: Sequence[Item]) -> list[Generated]:
        """Sample as lm-eval does, up to strings at which its own tasks stop."""
        cuda = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(cuda):
            torch.manual_seed(items[0].seed)
            texts = self._plainly("generate_until", [item.request for item in items])
        return [Generated(text, len(self.tokenizer(text)["input_ids"]), None) for text in texts]

    def _judged(self, task: str, items: Sequence[Item]) -> list[str]:
        """Return completions in the order of ``items``; those of our tasks have verdicts."""
        known = self.kept.completions(task)
        generated = [known[item.key] for item in items]
        scorer = self.scorers.get(task)
        if scorer is None:
            return [one.text for one in generated]
        asked = [
            (question(one.text, item.request.doc), one.text, item.request.doc)
            for item, one in zip(items, generated, strict=True)
        ]
        self._judge(task, scorer, asked)
        verdicts = self.kept.verdicts(task)
        return [
            Completion(
                one.text, tokens=one.tokens, truncated=one.truncated, verdict=verdicts[digest]
            )
            for (digest, _, _), one in zip(asked, generated, strict=True)
        ]

    def _judge(
        self, task: str, scorer: Scorer, asked: Sequence[tuple[str, str, Mapping[str, Any]]]
    ) -> None:
        """Judge what has not been: what several copies say, once."""
        known = self.kept.verdicts(task)
        new = {digest: (text, doc) for digest, text, doc in asked if digest not in known}
        shown = self.progress and bool(new)
        bar = tqdm(total=len(new), desc=f"{task}, scoring", unit="answer", disable=not shown)
        with ThreadPoolExecutor(self.workers) as pool, bar:
            judged = pool.map(lambda one: scorer(*one), new.values())
            try:
                for digest, verdict in zip(new, judged, strict=True):
                    self.kept.add_verdict(task, digest, verdict)
                    bar.update()
            finally:  # upon an error or Ctrl-C: not all that were waiting
                pool.shutdown(cancel_futures=True)

    # --- what only lm-eval's own tasks ask for ----------------------------------------------------

    def loglikelihood(self, requests: list[Instance], **kwargs: Any) -> list[tuple[float, bool]]:
        """Log-likelihood of given continuations, as lm-eval computes it."""
        return self._plainly("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Instance], **kwargs: Any) -> list[float]:
        """Log-likelihood of given texts, as lm-eval computes it."""
        return self._plainly("loglikelihood_rolling", requests)

    def _plainly(self, method: str, requests: Sequence[Instance]) -> list[Any]:
        ends = plain_sampling(eos_token_ids(self.model, self.tokenizer))
        with generating_with(self.model, ends):
            answer: Callable[..., list[Any]] = getattr(self._hflm, method)
            return answer(list(requests), disable_tqdm=not self.progress)

    @functools.cached_property
    def _hflm(self) -> Any:
        from lm_eval.models.huggingface import HFLM  # takes a while, and our tasks do without

        return HFLM(
            pretrained=self.model,
            tokenizer=self.tokenizer,
            batch_size=self.batch_size,
            max_length=context_length(self.model),
            add_bos_token=None if self.chat_template_kwargs is None else False,
        )
