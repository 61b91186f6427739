"""Rollouts by a vLLM server, on other devices than those that train: ``opd serve`` starts one.

The student's weights go there, layer by layer, when they have changed and something is to be
sampled; prompts go as token ids, and tokens come back with the log-probabilities of what they were
drawn from. What is drawn is drawn by our own code there (``opd/rollouts/vllm_worker.py``), from the
completion's seed: a completion is the same as under any other engine, to rounding.

With ``staleness: 1`` the completions of the next step are sampled while this one trains: so with
the weights of before this step, mu, one step behind those that they will train, p. The losses of
their tokens are then weighed by p / mu, truncated, as those of reused rollouts are
(``opd/reuse.py`` says what is exact). A run that is resumed samples its first step afresh, so that
it is not bit for bit the one that was not stopped.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.errors import UserError
from opd.models import whole_weights
from opd.prompts import PromptBatch
from opd.rollouts import weight_stream
from opd.rollouts.engine import RolloutEngine
from opd.rollouts.rollouts import Rollouts, Sampler
from opd.rollouts.vllm import sampling_params
from opd.servers import Server, or_lost
from opd.sharding import unwrapped
from opd.weights import Weights
from opd.world import gather, rank, together

Answers = list[dict[str, Any]]
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


class VLLMServer(RolloutEngine):
    """Rollouts by servers that ``opd serve`` has started.

    Args:
        url: Of the server, as http://HOST:PORT; or of several: each rank asks one of them, and all
            get the weights.
        staleness: 1: sample what the next step trains on while this one trains; 0: do not.
        at_once: Completions that a rank asks for at a time.
        timeout: Seconds to wait for a completion, and for a server to take a layer's weights.
        start_timeout: Seconds to wait for a server that is still starting.

    Raises:
        UserError: An option makes no sense.
    """

    def __init__(
        self,
        url: str | list[str],
        staleness: Literal[0, 1] = 0,
        at_once: int = 256,
        timeout: float = 1800.0,
        start_timeout: float = 600.0,
    ) -> None:
        urls = [url] if isinstance(url, str) else url
        if not urls or at_once < 1 or timeout <= 0 or start_timeout < 0:
            raise UserError(
                f"VLLMServer(url={url}, at_once={at_once}, timeout={timeout}, "
                f"start_timeout={start_timeout}): name a server; at_once must be at least 1, "
                "timeout above 0, start_timeout at least 0"
            )
        self.staleness = staleness
        self.at_once = at_once
        self.timeout = timeout
        self.start_timeout = start_timeout
        self.pushes = 0
        self._servers = [Server(one, timeout=timeout, what="VLLMServer") for one in urls]
        self._own = self._servers[0]  # whom this rank asks
        self._student: PreTrainedModel | None = None
        self._models: list[_Served] = []
        self._pushed: int | None = None  # version of the weights that they have
        self._ahead: _Ahead | None = None
        self._thread: ThreadPoolExecutor | None = None

    def start(
        self, student: PreTrainedModel, weights: Weights, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Wait for the servers, and see whether they have a model like the student.

        Raises:
            UserError: One is not there in time, is no ``opd serve``, or has another model.
        """
        if self._student is student:
            return
        self.stop()
        self._student, self._weights = student, weights
        self._own = self._servers[rank() % len(self._servers)]
        servers = self._servers
        self._models = together(lambda: [self._meet(server, student) for server in servers])
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts-ahead")

    def stop(self) -> None:
        """Forget the servers; they go on."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._student, self._pushed, self._ahead, self._thread = None, None, None, None

    @torch.no_grad()
    def __call__(self, prompts: PromptBatch, sampler: Sampler, seeds: Sequence[int]) -> Rollouts:
        """Sample one completion per prompt, or take what was sampled ahead.

        Raises:
            LostServer: A server is gone, or does not do what it should; on all ranks.
        """
        begun, self._ahead = self._ahead, None
        expected = begun is not None and (begun.sampler, begun.seeds) == (sampler, tuple(seeds))
        if all(gather(expected)) and begun is not None:
            answers = or_lost(begun.answers.result)
        else:
            self._ahead = begun  # of a step that is still to come, while something else is judged
            self._push()
            answers = or_lost(lambda: self._ask(prompts, sampler, seeds))
        if not len(prompts):
            return Rollouts.empty(prompts)
        choices = [answer["choices"][0] for answer in answers]
        return Rollouts.of_lists(
            prompts,
            [choice["token_ids"] for choice in choices],
            [[token["logprob"] for token in choice["logprobs"]["content"]] for choice in choices],
            sampler,
        )

    def ahead(self, prompts: PromptBatch, sampler: Sampler, seeds: Sequence[int]) -> None:
        """Begin to sample what the next step will ask for, if ``staleness`` allows it.

        Raises:
            LostServer: A server is gone; on all ranks.
        """
        if not self.staleness:
            return
        assert self._thread is not None, "start the engine first"
        self._push()
        answers = self._thread.submit(self._ask, prompts, sampler, seeds)
        self._ahead = _Ahead(sampler, tuple(seeds), answers)

    def _ask(self, prompts: PromptBatch, sampler: Sampler, seeds: Sequence[int]) -> Answers:
        """Have this rank's server sample; in whatever thread."""
        limit = self._models[0].max_tokens
        longest = max((len(prompt.token_ids) for prompt in prompts.prompts), default=0)
        if longest + sampler.max_new_tokens > limit:
            raise UserError(
                f"VLLMServer: its servers take {limit} tokens (opd serve --max_tokens), and there "
                f"is a prompt of {longest} and a completion of {sampler.max_new_tokens}"
            )
        bodies = [
            {"token_ids": list(prompt.token_ids), "sampling_params": sampling_params(sampler, seed)}
            for prompt, seed in zip(prompts.prompts, seeds, strict=True)
        ]
        answers: Answers = self._own.post_many(
            "/inference/v1/generate", bodies, at_once=self.at_once
        )
        for answer in answers:
            if (reason := answer["choices"][0]["finish_reason"]) not in ("stop", "length"):
                raise UserError(f"{self._own.url}: ended a completion because of {reason!r}")
        return answers

    # --- the student's weights --------------------------------------------------------------------

    def _push(self) -> None:
        """Send the student's weights, if they are others than those that the servers have."""
        if self._pushed == self._weights.version:
            return
        if self._ahead is not None:
            wait([self._ahead.answers])  # it is sampled with the old ones
        student = self._student
        assert student is not None, "start the engine first"
        with ExitStack() as stack:
            stream = or_lost(lambda: self._stream(stack) if rank() == 0 else None)
            or_lost(lambda: self._send(student, stream))
        self._pushed = self._weights.version
        self.pushes += 1

    def _stream(self, stack: ExitStack) -> _Stream:
        """Have the workers of all servers connect to this process."""
        listener = stack.enter_context(weight_stream.listening(_own_address(self._own.url)))
        key = secrets.token_hex(weight_stream.KEY_BYTES // 2)
        host, port = listener.getsockname()[:2]
        call = {"method": "opd_receive", "args": [host, str(port), key, str(self.timeout)]}
        pool = ThreadPoolExecutor(len(self._servers))
        stack.callback(pool.shutdown, wait=False)
        taken = [pool.submit(server.post, "/collective_rpc", call) for server in self._servers]
        workers = sum(model.workers for model in self._models)
        try:
            connections = weight_stream.accept(listener, workers, key, self.timeout / 2, taken)
        except OSError as error:
            for future in taken:
                if future.done():
                    future.result()  # what the server has against it
            raise UserError(
                f"VLLMServer: its server has not come for the student's weights to {host}:{port} "
                f"({error}); can it reach this address?"
            ) from error
        for connection in connections:
            stack.enter_context(connection)
        return _Stream(connections, taken)

    def _send(self, student: PreTrainedModel, stream: _Stream | None) -> None:
        """Send the weights, on the first rank, which has the stream; the others help to gather."""
        problem, dtype = None, self._models[0].dtype
        for name, weight in whole_weights(student):  # goes on whatever happens: a collective
            if stream is not None and problem is None:
                try:
                    weight_stream.send(stream.connections, name, weight, dtype)
                except OSError as error:
                    problem = error
        if stream is None:
            return
        if problem is None:
            weight_stream.end(stream.connections)
        for future in stream.taken:
            future.result()  # what the server has against it
        if problem is not None:
            raise UserError(f"VLLMServer: the student's weights have not arrived ({problem})")
        for server in self._servers:
            server.post("/reset_prefix_cache", {})

    def _meet(self, server: Server, student: PreTrainedModel) -> _Served:
        """Ask a server what it is."""
        server.wait_until_ready(self.start_timeout)
        (model,) = server.get("/v1/models")["data"]
        try:
            workers = server.post("/collective_rpc", {"method": "opd_describe", "args": SIZES})[
                "results"
            ]
        except UserError as error:
            raise UserError(
                f"{server.url}: was not started by `opd serve --model {model['id']}`, so it cannot "
                "take the student's weights"
            ) from error
        config = unwrapped(student).config
        own = {size: getattr(config, size, None) for size in SIZES}
        theirs = {size: workers[0][size] for size in SIZES}
        if own != theirs:
            raise UserError(
                f"{server.url}: serves {model['id']}, which is no model like the student: "
                + ", ".join(
                    f"{size} {theirs[size]}, the student's is {own[size]}"
                    for size in SIZES
                    if own[size] != theirs[size]
                )
            )
        return _Served(len(workers), getattr(torch, workers[0]["dtype"]), model["max_model_len"])


@dataclass(frozen=True)
class _Served:
    """A server's model: in how many processes, of what dtype, and how many tokens it takes."""

    workers: int
    dtype: torch.dtype
    max_tokens: int


@dataclass(frozen=True)
class _Stream:
    """Connections to workers, and what the servers say once they have all weights."""

    connections: Sequence[socket.socket]
    taken: Sequence[Future[Any]]


@dataclass(frozen=True)
class _Ahead:
    """What has been begun."""

    sampler: Sampler
    seeds: tuple[int, ...]
    answers: Future[Answers]


def _own_address(url: str) -> str:
    """Return the address of this machine from which a server is reached."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "", parts.port or 80))  # sends nothing
        return str(probe.getsockname()[0])
