"""Captions from an OpenAI-compatible endpoint."""

from __future__ import annotations

import base64
import io
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from PIL import Image

from kinema.config.errors import KinemaError
from kinema.curation.captions.answers import (
    Answer,
    Use,
    as_columns,
    columns_of,
    read_answer,
    read_short,
)
from kinema.curation.captions.clean import Unusable
from kinema.curation.captions.cost import CHARACTERS, MESSAGE, image_tokens
from kinema.curation.captions.pace import Budget, Pace, Stop
from kinema.curation.captions.prompts import SHORTEN, ask_for, template_of
from kinema.curation.config import CaptionConfig
from kinema.curation.scoring.strips import Picture
from kinema.curation.stage import Bad, Found, Row
from kinema.endpoint.chat import (
    LONGEST_WAIT_S,
    ChatEndpoint,
    Completion,
    NoAnswerError,
    PassingError,
    RefusedError,
    UnusableError,
    chat_url,
    read_key,
)

JPEG_QUALITY = 90
OTHER_TEMPERATURE = 0.7
"""For the one time that a question is repeated whose answer was no caption: at temperature 0 the
same answer would come."""
EVERY_REQUEST = (401, 402, 403, 404, 405, 407, 410)
"""Statuses that no other clip would change: a wrong key, no money, no such model or address."""
CONNECT_S = 10.0


class _FailedError(Exception):
    def __init__(self, bad: Bad) -> None:
        super().__init__(bad.message)
        self.bad = bad


class EndpointCaptions:
    """Asks for captions, `parallel` at once; threads share pace, budget and when to stop.

    Raises:
        KinemaError: nobody is there, or the key would travel in clear.
    """

    def __init__(self, config: CaptionConfig) -> None:
        assert config.endpoint is not None
        key = read_key(
            config.api_key_env,
            config.endpoint,
            where="caption.endpoint",
            hint="an https address; or, if it needs no key, caption.api_key_env=NONE",
        )
        _reach(config.endpoint)
        self.config = config
        self.template = template_of(config.prompt)
        self.columns = columns_of(self.template, config)
        self._endpoint = ChatEndpoint(chat_url(config.endpoint), key, config.timeout_s)
        self._stop = Stop(config)
        self._pace = Pace(config.requests_per_minute, sleep=self._stop.sleep)
        self._budget = Budget(config)
        self._threads = ThreadPoolExecutor(config.parallel, thread_name_prefix="caption")

    def __call__(
        self, rows: Sequence[Row], read: Callable[[Row], list[Picture] | Bad]
    ) -> list[Found]:
        """Captions of clips, or why there is none; several calls at once share the threads.

        Args:
            read: gives the frames of a row.
        """
        return list(self._threads.map(lambda row: self._one(row, read), rows))

    def _one(self, row: Row, read: Callable[[Row], list[Picture] | Bad]) -> Found:
        try:
            self._check_stop()
            pictures = read(row)
            return pictures if isinstance(pictures, Bad) else self._caption(row, pictures)
        except _FailedError as failure:
            return failure.bad

    def _caption(self, row: Row, pictures: Sequence[Picture]) -> Found:
        config, use = self.config, Use()
        question = ask_for(self.template, row, len(pictures))
        body = self._body([*map(self._image, pictures), {"type": "text", "text": question}])
        pixels = sum(image_tokens(p.shape[0], p.shape[1], config) for p in pictures)
        needed = pixels + len(question) // CHARACTERS + MESSAGE
        caption = read_answer(self._ask(body, needed, use), self.template, config)
        if isinstance(caption, Unusable):
            if "temperature" in body and "temperature" not in config.request:
                body = {**body, "temperature": max(body["temperature"], OTHER_TEMPERATURE)}
            caption = read_answer(self._ask(body, needed, use), self.template, config)
        if isinstance(caption, Unusable):
            # Where none was of use yet, it may not see pictures at all.
            passing = caption.passing or not self._stop.works
            if passing:
                why = f"the endpoint gives no captions: {caption.message}"
                self._stop.failed(why, useless=not caption.passing)
            return Bad(caption.reason, f"{caption.message} (asked twice)", passing=passing)
        values = as_columns(caption, self.columns, config.model, use)
        if config.short == "asked" and not self.template.fields:
            text = SHORTEN + caption.text
            answer = self._ask(self._body(text), len(text) // CHARACTERS + MESSAGE, use)
            values = as_columns(caption, self.columns, config.model, use)
            values["text_short"] = read_short(answer, caption.text)
        if self._endpoint.key and any(self._endpoint.key in str(v) for v in values.values()):
            return Bad("refused", "the answer repeats the key")
        self._stop.answered()
        return values

    def _ask(self, body: dict[str, Any], tokens_in: int, use: Use) -> Answer:
        """One answer, asked for again where that may help.

        Args:
            tokens_in: of the question, as estimated.
        """
        config = self.config
        backoff = config.backoff_s
        for attempt in range(config.retries + 1):
            self._pace.wait(lambda: self._stop.stopped)
            self._check_stop()
            needed = (tokens_in, config.max_tokens)
            if not self._budget.reserve(*needed):
                self._stop.now(
                    f"max_cost: {self._budget} of {config.max_cost:g} {config.currency} are spent, "
                    "and another answer may cost more than what is left"
                )
                self._check_stop()
            used = (0, 0)
            try:
                said = self._endpoint.ask(body)
                used = _used(said, tokens_in)
                use.add(*used)
                if said.finish == "content_filter":
                    message = "the endpoint's filter stopped the answer"
                    raise _FailedError(Bad("refused", message))
                return Answer(said.text, cut_off=said.finish == "length")
            except PassingError as reason:
                wait = min(max(backoff, reason.wait_s), LONGEST_WAIT_S)
                if reason.wait_s or reason.code == 429:
                    self._pace.leave_alone(wait)
                if attempt == config.retries:
                    self._fail(reason, attempt + 1)
                self._stop.sleep(wait)
                backoff *= 2
            except UnusableError as reason:
                if attempt >= min(1, config.retries):
                    self._fail(reason, attempt + 1)
            except RefusedError as reason:
                every = reason.code in EVERY_REQUEST or (reason.code or 0) // 100 == 3
                if every:
                    self._stop.now(str(reason))
                # Where others are answered, it is this clip that is not (a content filter).
                self._fail(reason, attempt + 1, passing=every or not self._stop.works)
            finally:
                self._budget.settle(needed, used)
        raise AssertionError("the loop returns or raises")

    def _fail(self, reason: NoAnswerError, times: int, *, passing: bool = True) -> None:
        asked = f" (asked {times} times)" if times > 1 else ""
        self._stop.failed(str(reason))
        code = "no_answer" if passing else "declined"
        raise _FailedError(Bad(code, f"{reason}{asked}", passing=passing)) from None

    def _check_stop(self) -> None:
        if self._stop.stopped:
            raise _FailedError(Bad(NOT_ASKED, self._stop.why, passing=True))

    def _body(self, content: object) -> dict[str, Any]:
        config = self.config
        body: dict[str, Any] = {
            "model": config.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": config.max_tokens,
            "temperature": config.temperature,
            **config.request,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _image(self, picture: Picture) -> dict[str, Any]:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=JPEG_QUALITY)
        url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
        detail = {"detail": self.config.detail} if self.config.detail else {}
        return {"type": "image_url", "image_url": {"url": url, **detail}}


NOT_ASKED = "not_asked"
"""`Bad.reason` of clips that were not asked for, as asking had stopped."""


def _used(said: Completion, tokens_in: int) -> tuple[int, int]:
    """As the endpoint counts; estimated where it does not."""
    return (
        tokens_in if said.tokens_in is None else said.tokens_in,
        len(said.text) // CHARACTERS if said.tokens_out is None else said.tokens_out,
    )


def _reach(endpoint: str) -> None:
    """
    Raises:
        KinemaError: nobody answers at that address at all.
    """
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    if getproxies().get(parts.scheme) and not proxy_bypass(host):
        return  # the proxy reaches what this machine itself does not
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise KinemaError(
            f"the caption endpoint cannot be reached: {reason}",
            where=f"caption.endpoint={endpoint}",
            hint="start it, or check the address; what is done is kept, and the same command goes "
            "on from there",
        ) from None
