"""Prompts made richer by a language model, through any OpenAI-compatible endpoint.

Off unless it is asked for. Whatever goes wrong with the endpoint, the prompt stays as it was, and
a warning says why. What becomes of the key is in `kinema.endpoint.chat`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kinema.config.settings import settings
from kinema.endpoint.chat import (
    LONGEST_WAIT_S,
    ChatEndpoint,
    NoAnswerError,
    PassingError,
    RefusedError,
    chat_url,
    check_address,
    read_key,
    unwrapped,
)
from kinema.generation.prompts import join_segments, split_segments

TEMPLATE = """\
You prepare prompts for a model that makes short videos from text. Rewrite what the user sends \
into one caption of such a video, as someone would describe it who has just watched it.

Keep every subject, number, colour, place, action and style that is mentioned, and keep quoted \
words as they are. Where something is left open, decide on it: how the subjects look, where they \
are, what moves and which way, the light, and how the camera is held. Describe one continuous \
shot, in the present tense, in at most 100 words of plain English, without line breaks. Do not \
mention sound, do not address anyone, and do not add titles, lists or remarks.

Answer with the caption alone.
"""

log = logging.getLogger(__name__)


@settings
class RefineConfig:
    """Which language model refines prompts, and how long it may take."""

    endpoint: str
    """Address of the API: `http://localhost:8000/v1`; `/chat/completions` is added to it."""
    model: str
    """The language model's name, as the endpoint knows it."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key; where it is not set, none is sent."""
    timeout_s: float = 60.0
    """For one answer, in seconds."""
    retries: int = 2
    """How often a request is repeated that failed for a reason that may pass."""
    backoff_s: float = 1.0
    """Seconds before the first repetition; each further one waits twice as long."""
    max_chars: int = 1500
    """Longer answers are not used."""
    template: str = TEMPLATE
    """What the language model is told to do with the prompt that follows."""

    def __post_init__(self) -> None:
        check_address(self.endpoint)
        if not self.model:
            raise ValueError("model is empty; name one that the endpoint has")
        for name in ("timeout_s", "max_chars"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("retries", "backoff_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")

    @property
    def url(self) -> str:
        """Where requests go."""
        return chat_url(self.endpoint)

    def key(self) -> str:
        """The key; empty where none is set.

        Raises:
            KinemaError: it would travel to another machine in clear.
        """
        return read_key(
            self.api_key_env,
            self.endpoint,
            where="--refine",
            hint="an https address; or, if it needs no key, --refine-key-env NONE",
        )


@dataclass(frozen=True)
class RefinedPrompt:
    """A prompt before and after."""

    original: str
    """As the person wrote it."""
    text: str
    """The prompt to use; the original one where it could not be refined."""
    note: str | None = None
    """Why it could not, for the person; None: it was."""


class _NotRefinedError(Exception):
    """Why there is no refined prompt, in words for the person."""

    def __init__(self, why: str, *, lasting: bool = False) -> None:
        super().__init__(why)
        self.lasting = lasting
        """The endpoint fails, whatever the prompt."""


def refine(
    prompts: Sequence[str],
    config: RefineConfig,
    *,
    on_done: Callable[[], None] | None = None,
) -> list[RefinedPrompt]:
    """Refine prompts one after the other; texts of segments (`|0| a |2| b`) each by itself.

    A prompt that cannot be refined stays, with a note and a logged warning. After an endpoint did
    not answer at all it is not asked for the rest.

    Args:
        prompts: without JSON at their ends (`prompts.split_json` takes it off).
        on_done: called after each prompt.

    Raises:
        KinemaError: a prompt whose segments cannot be read, or a key that would be sent in clear.
    """
    endpoint = ChatEndpoint(config.url, config.key(), config.timeout_s)
    done: list[RefinedPrompt] = []
    given_up: str | None = None
    for prompt in prompts:
        try:
            if given_up is not None:
                raise _NotRefinedError(given_up, lasting=True)
            texts, starts = split_segments(prompt)
            refined = join_segments([_refine_text(endpoint, t, config) for t in texts], starts)
            done.append(RefinedPrompt(prompt, refined))
        except _NotRefinedError as failure:
            if given_up is None:
                log.warning("prompt not refined: %s", failure)
            if failure.lasting:
                given_up = str(failure)
            done.append(RefinedPrompt(prompt, prompt, note=str(failure)))
        if on_done:
            on_done()
    return done


def _refine_text(endpoint: ChatEndpoint, text: str, config: RefineConfig) -> str:
    body = {
        "model": config.model,
        "messages": [
            {"role": "system", "content": config.template},
            {"role": "user", "content": text},
        ],
    }
    wait = config.backoff_s
    for attempt in range(config.retries + 1):
        try:
            return _caption(endpoint.ask(body).text, config, endpoint.key)
        except PassingError as reason:
            if attempt == config.retries:
                times = f" (asked {attempt + 1} times)" if attempt else ""
                raise _NotRefinedError(f"{reason}{times}", lasting=True) from None
            time.sleep(min(max(wait, reason.wait_s), LONGEST_WAIT_S))
            wait *= 2
        except NoAnswerError as reason:
            lasting = isinstance(reason, RefusedError)
            raise _NotRefinedError(str(reason), lasting=lasting) from None
    raise AssertionError("the loop returns or raises")


def _caption(text: str, config: RefineConfig, key: str) -> str:
    # One line; bars would start segments.
    text = " ".join(unwrapped(text.replace("|", " ")).split())
    if not any(c.isalpha() for c in text):
        raise _NotRefinedError("the answer is empty")
    if len(text) > config.max_chars:
        raise _NotRefinedError(
            f"the answer has {len(text)} characters, more than {config.max_chars} (max_chars)"
        )
    if key and key in text:
        raise _NotRefinedError("the answer repeats the key")
    return text
