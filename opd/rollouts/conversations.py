"""Conversations: rollouts in which somebody answers the student, and it goes on.

An engine samples a turn of the student; an :class:`Environment` of the user's reads it, and says
what follows: the result of a tool, an objection, the next question. The next turn is sampled after
all of it. To everybody else a conversation is one completion, in which some tokens were inserted
rather than sampled: student and teachers read them, and no loss, metric or count is made of them
(``Rollouts.mask``).

What the student has sampled stays as it was sampled, token by token: it is not written anew from
its text. Only what a chat template puts after a turn of the assistant is tokenized and appended.

In a configuration::

    model:
      max_new_tokens: 2048              # of a whole conversation, inserted tokens included
      engine:
        class_path: opd.rollouts.Conversations
        init_args:
          environment: my_package.Calculator
          turn_tokens: 512

Shapes: B conversations, C tokens of a conversation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.errors import UserError
from opd.prompts import Prompt, PromptBatch
from opd.randomness import derive_seed
from opd.rollouts.engine import RolloutEngine
from opd.rollouts.rollouts import Rollouts, Sampler
from opd.rollouts.transformers import TransformersEngine
from opd.weights import Weights
from opd.world import gather, together

Message = dict[str, Any]
FIELDS = ("role", "content")
QUESTION, ANSWER = "QUESTION", "ANSWER"  # what a template is tried with


class Environment(ABC):
    """Base of all that answer a student; one for all conversations of a rank."""

    @abstractmethod
    def __call__(self, prompt: Prompt, messages: Sequence[Message]) -> Sequence[Message]:
        """Say what follows a turn of the student's.

        Args:
            prompt: Whose conversation it is; it may have an answer.
            messages: ``{"role": ..., "content": ...}`` each: what the student was asked, as its
                template has written it and without special tokens; its turns, and what followed
                each. The last one is the student's.

        Returns:
            Messages that follow, of whatever roles the chat template knows; none: that is the end.
        """


@dataclass
class _Conversation:
    """One that is going on.

    Attributes:
        prompt: What it began with.
        seed: Its own.
        messages: All of it, as messages.
        token_ids: All of it but the prompt.
        logprobs: Of each token under what it was drawn from; 0 of an inserted one.
        inserted: Whether each token was.
    """

    prompt: Prompt
    seed: int
    messages: list[Message]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    inserted: list[bool] = field(default_factory=list)
    finished: bool = False

    def add(self, token_ids: Sequence[int], logprobs: Sequence[float] | None) -> None:
        """Append what was sampled, or, without log-probabilities, what was not."""
        self.token_ids += token_ids
        self.logprobs += [0.0] * len(token_ids) if logprobs is None else logprobs
        self.inserted += [logprobs is None] * len(token_ids)

    def so_far(self) -> Prompt:
        """Return all of it as a prompt for the next turn."""
        return replace(self.prompt, token_ids=(*self.prompt.token_ids, *self.token_ids))


class Conversations(RolloutEngine):
    """Samples turns with an engine, and has an environment answer them.

    A conversation ends where the environment has nothing to say, where a turn of the student's is
    cut off, and after ``turns`` of them. Where what the environment says, and another turn, do not
    fit into ``model.max_new_tokens`` any more, it ends before, and counts as truncated.

    Args:
        environment: Who answers.
        turn_tokens: Longest turn of the student's.
        turns: Most turns of the student's.
        engine: What samples them. None: TransformersEngine.

    Raises:
        UserError: An option makes no sense.
    """

    def __init__(
        self,
        environment: Environment,
        turn_tokens: int,
        turns: int = 8,
        engine: RolloutEngine | None = None,
    ) -> None:
        self.engine = engine or TransformersEngine()
        if turn_tokens < 1 or turns < 1:
            raise UserError(
                f"Conversations(turn_tokens={turn_tokens}, turns={turns}): both must be at least 1"
            )
        if self.engine.staleness:
            raise UserError(
                f"Conversations.engine: {type(self.engine).__name__} cannot sample ahead what an "
                "environment has to answer first; set its staleness to 0"
            )
        self.environment = environment
        self.turn_tokens = turn_tokens
        self.turns = turns

    def start(
        self, student: PreTrainedModel, weights: Weights, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Get ready to sample with a student.

        Raises:
            UserError: The tokenizer has no chat template.
        """
        if tokenizer.chat_template is None:
            raise UserError(
                "opd.rollouts.Conversations needs a chat template, and the student's tokenizer has "
                "none; name one that has with --model.tokenizer"
            )
        self._tokenizer = tokenizer
        self.engine.start(student, weights, tokenizer)

    def stop(self) -> None:
        """Let go of the student."""
        self.engine.stop()

    def __call__(self, prompts: PromptBatch, sampler: Sampler, seeds: Sequence[int]) -> Rollouts:
        """Sample B conversations; ``sampler.max_new_tokens`` is of each as a whole.

        Raises:
            UserError: The environment fails, or says what the template cannot render; on all ranks.
        """
        if sampler.max_new_tokens < self.turn_tokens:
            raise UserError(
                f"Conversations.turn_tokens={self.turn_tokens} is more than a whole conversation "
                f"may have, model.max_new_tokens={sampler.max_new_tokens}"
            )
        conversations = [
            _Conversation(prompt, seed, [{"role": "user", "content": self._text(prompt.token_ids)}])
            for prompt, seed in zip(prompts.prompts, seeds, strict=True)
        ]
        going_on = conversations
        for turn in range(self.turns):
            if not any(gather(bool(going_on))):  # an engine is called by all ranks or by none
                break
            self._take_turns(going_on, turn, prompts, sampler)
            if turn < self.turns - 1:
                talking = [one for one in going_on if one.finished]
                going_on = together(lambda: [o for o in talking if self._goes_on(o, sampler)])  # noqa: B023
        if not conversations:
            return Rollouts.empty(prompts)
        rollouts = Rollouts.of_lists(
            prompts,
            [one.token_ids for one in conversations],
            [one.logprobs for one in conversations],
            sampler,
            inserted=[one.inserted for one in conversations],
        )
        rollouts.finished = rollouts.finished.new_tensor([one.finished for one in conversations])
        return rollouts

    def _take_turns(
        self, going_on: Sequence[_Conversation], turn: int, prompts: PromptBatch, sampler: Sampler
    ) -> None:
        """Sample a turn of the student's in each."""
        batch = PromptBatch.collate([one.so_far() for one in going_on], sampler.pad_token_id)
        seeds = [derive_seed(one.seed, turn) if turn else one.seed for one in going_on]
        of_turn = replace(sampler, max_new_tokens=self.turn_tokens)
        said = self.engine(batch.to(prompts.ids.device), of_turn, seeds)
        rows = zip(
            *(column.tolist() for column in (said.completion_ids, said.engine_logprobs)),
            said.lengths.tolist(),
            said.finished.tolist(),
            strict=True,
        )
        for one, (ids, logprobs, length, finished) in zip(going_on, rows, strict=True):
            one.add(ids[:length], logprobs[:length])
            one.messages.append({"role": "assistant", "content": self._text(ids[:length])})
            one.finished = finished

    def _goes_on(self, one: _Conversation, sampler: Sampler) -> bool:
        """Let the environment answer, and say whether the student is to."""
        name = type(self.environment).__name__
        try:
            replies = [dict(reply) for reply in self.environment(one.prompt, one.messages)]
            wanting = [r for r in replies if not all(isinstance(r.get(key), str) for key in FIELDS)]
        except Exception as error:
            raise UserError(
                f"environment {name} fails on a conversation of {one.prompt.place} "
                f"({type(error).__name__}: {error})"
            ) from error
        if wanting:
            raise UserError(
                f"environment {name}: messages need a role and a content, texts both; it answers "
                f"in a conversation of {one.prompt.place} with {str(wanting[0])[:100]}"
            )
        if not replies:
            return False
        token_ids = self._after(one.token_ids[-1], replies, one.prompt.place)
        if len(one.token_ids) + len(token_ids) + self.turn_tokens > sampler.max_new_tokens:
            one.finished = False
            return False
        one.messages += replies
        one.add(token_ids, None)
        return True

    def _after(self, end: int, replies: Sequence[Message], place: str) -> list[int]:
        """Return what stands between the end of a turn of the student's and its next.

        Args:
            end: The token that ended its turn.
            replies: What the environment has said.
            place: Which conversation, for messages.
        """
        before: list[Message] = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
        ]
        try:
            render = self._tokenizer.apply_chat_template
            known = str(render(before, tokenize=False))
            whole = str(render([*before, *replies], tokenize=False, add_generation_prompt=True))
        except Exception as error:  # templates raise whatever their author chose
            reason = " ".join(str(error).split())
            raise UserError(
                f"environment {type(self.environment).__name__}: the chat template refuses what it "
                f"says in a conversation of {place} ({reason})"
            ) from error
        if not whole.startswith(known):
            raise UserError(
                "opd.rollouts.Conversations: the chat template writes a turn of the assistant "
                "otherwise once another follows; use another template (--model.tokenizer)"
            )
        said = whole.removeprefix(known)
        if left_out := [reply for reply in replies if reply["content"] not in said]:
            raise UserError(
                f"environment {type(self.environment).__name__}: the chat template leaves out what "
                f"a {left_out[0]['role']} says"
            )
        after = known.rpartition(ANSWER)[2].removeprefix(str(self._tokenizer.decode([end])))
        inserted: list[int] = self._tokenizer(after + said, add_special_tokens=False)["input_ids"]
        return inserted

    def _text(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))
