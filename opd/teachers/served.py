"""A frozen teacher behind a vLLM server: ``opd serve --role teacher`` starts one.

The server runs the body of the model, and answers with its last hidden states; here is only its
head. So the opinion is of all tokens, at any temperature, for every objective, and what travels is
H numbers per token rather than V. Token ids go there: which tokenizer the server has does not
matter, and the one of its model is compared with the student's here.

A micro-batch is asked for when it is read, and waited for when its opinion is opened: the server
works meanwhile.

Shapes: B completions, N tokens of all of them, H hidden, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opd.errors import UserError
from opd.rollouts import Rollouts
from opd.servers import Server, or_lost
from opd.teachers.local import LocalOpinion, LocalTeacher
from opd.teachers.teacher import Opened

TIMEOUT = 1800.0  # seconds for a micro-batch
START_TIMEOUT = 600.0  # for a server that is still starting


def is_served(source: str) -> bool:
    """Whether a teacher's source is the address of a server."""
    return source.startswith(("http://", "https://"))


@dataclass(frozen=True)
class TeacherServer:
    """A server of a teacher's hidden states.

    Attributes:
        server: Whom to ask.
        model: Where its model comes from, named as in a configuration.
        context: Positions that it takes.
    """

    server: Server
    model: str
    context: int

    @classmethod
    def at(cls, url: str) -> TeacherServer:
        """Find out what a server has.

        Raises:
            UserError: It is not there in time.
        """
        server = Server(url, what=f"model.teacher {url}", timeout=TIMEOUT)
        server.wait_until_ready(START_TIMEOUT)
        (model,) = server.get("/v1/models")["data"]
        return cls(server, model["id"], model["max_model_len"])

    def check(self, hidden_size: int) -> None:
        """See whether it answers as it should.

        Raises:
            UserError: It does not.
        """
        try:
            found = self.hidden_states([[0, 1]], "float32")[0]
        except UserError as error:
            raise UserError(
                f"{error}. Was it started by `opd serve --role teacher --model {self.model}`?"
            ) from error
        if found.shape[1] != hidden_size:
            raise UserError(
                f"{self.server.what}: its hidden states have {found.shape[1]} numbers, those of "
                f"{self.model} have {hidden_size}"
            )

    def hidden_states(self, token_ids: Sequence[Sequence[int]], dtype: str) -> list[Tensor]:
        """Ask for the last hidden states of all tokens of several texts, [tokens, H] each.

        Raises:
            UserError: There is no answer, or it is of something else.
        """
        answer = self.server.post_for_bytes(
            "/pooling",
            {
                "model": self.model,
                "input": token_ids,
                "encoding_format": "bytes",
                "embed_dtype": dtype,
                "endianness": "little",
            },
        )
        try:
            shapes = [one["shape"] for one in json.loads(answer.headers["metadata"])["data"]]
            lengths = [tokens for tokens, _ in shapes]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.server.what}: answers with something else than the hidden states of all "
                "tokens"
            ) from error
        if lengths != [len(ids) for ids in token_ids]:
            raise UserError(
                f"{self.server.what}: was asked about {[len(ids) for ids in token_ids]} tokens, "
                f"and answers about {lengths}"
            )
        values = torch.frombuffer(bytearray(answer.data), dtype=getattr(torch, dtype))
        return list(values.view(sum(lengths), -1).split(lengths))


class ServedTeacher(LocalTeacher):
    """A teacher whose body is elsewhere.

    Args:
        model: The model; of its weights those of the head are there, the others are on meta.
        server: What runs its body.
        vocabulary: See :class:`LocalTeacher`.
        temperature: See :class:`LocalTeacher`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        server: TeacherServer,
        *,
        vocabulary: int,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(model, vocabulary=vocabulary, temperature=temperature)
        self.server = server
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="teacher")  # this one, the next

    @property
    def whole(self) -> None:
        """Nothing: its body is elsewhere."""
        return None

    @property
    def context(self) -> int:
        """Positions that the server takes."""
        return self.server.context

    def to(self, device: torch.device) -> None:
        """Move the head to a device."""
        self.model.get_output_embeddings().to(device)

    def read(self, micro: Rollouts) -> ServedOpinion:  # type: ignore[override]  # not there yet
        """Have the server read B completions of N tokens together."""
        return ServedOpinion(self, self._threads.submit(self._read, micro), micro.counts)

    def _read(self, micro: Rollouts) -> Tensor:
        texts: list[list[int]] = []
        predicts: list[Tensor] = []  # hidden states of which tokens predict a sampled one
        rows = zip(
            micro.prompts.prompts,
            micro.completion_ids.tolist(),
            micro.lengths.tolist(),
            micro.mask.cpu(),
            strict=True,
        )
        for prompt, ids, length, sampled in rows:
            if length:  # the last token predicts none
                texts.append([*prompt.token_ids, *ids[: length - 1]])
                predicts.append(sampled[:length].nonzero().flatten() + len(prompt.token_ids) - 1)
        dtype = self.model.get_output_embeddings().weight.dtype
        if not texts:
            return torch.zeros(0, self.model.config.get_text_config().hidden_size, dtype=dtype)
        asked_as = str(dtype).removeprefix("torch.")
        states = self.server.hidden_states(texts, asked_as)
        return torch.cat([state[at] for state, at in zip(states, predicts, strict=True)])


@dataclass(frozen=True)
class ServedOpinion:
    """What a served teacher thinks, perhaps not yet.

    Attributes:
        teacher: Whose opinion it is.
        hidden: The teacher's last hidden states, [N, H], of B completions.
        counts: Of each of these, [B].
        rows: Those of the B whose opinion this is; None: all.
    """

    teacher: ServedTeacher
    hidden: Future[Tensor]
    counts: Tensor
    rows: Sequence[int] | None = None

    @contextmanager
    def opened(self) -> Iterator[Opened]:
        """Wait for the answer; rows of the N tokens become logits, [n, V].

        Raises:
            LostServer: The server of any rank is gone, or does not do what it should.
        """
        hidden = or_lost(self.hidden.result).to(self.counts.device)
        opinion = LocalOpinion(self.teacher, hidden, self.counts)
        if self.rows is not None:
            opinion = opinion.select(self.rows)
        with opinion.opened() as logits:
            yield logits

    def select(self, completions: Sequence[int]) -> ServedOpinion:
        """Keep the opinion of some completions, in the order given."""
        rows = completions if self.rows is None else [self.rows[i] for i in completions]
        return replace(self, rows=tuple(rows))
