"""An environment for the built-in pair: it asks again where a sum is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from opd.prompts import Prompt
from opd.rollouts.conversations import Environment, Message


class AskAgain(Environment):
    """Asks for the same sum, its numbers in the other order, until the answer is right."""

    def __call__(self, prompt: Prompt, messages: Sequence[Message]) -> Sequence[Message]:
        """Look at the last answer."""
        *_, asked, said = (message["content"] for message in messages)
        if said.endswith(f"={prompt.answer}"):
            return []
        numbers = asked.removesuffix("=").split("+")
        return [{"role": "user", "content": "+".join(reversed(numbers)) + "="}]
