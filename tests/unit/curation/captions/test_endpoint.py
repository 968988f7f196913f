"""Captions from an endpoint: what goes out, what is taken, what is not, and when it stops."""

from __future__ import annotations

import json
import logging
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kinema.config.errors import KinemaError
from kinema.curation.captions.cost import estimate, spent
from kinema.curation.captions.pace import Budget, Pace
from kinema.curation.captions.stage import CaptionStage, shortfall
from kinema.curation.config import CaptionConfig, FramesConfig
from kinema.curation.cut import BORDERS
from kinema.curation.stage import Bad, Found, Places, Row, result_key
from tests.unit.curation.captions.conftest import (
    KEY,
    Question,
    Reply,
    Server,
    caption_of,
    captions,
    failing,
    saying,
    settings,
)
from tests.unit.curation.scoring.tiny_models import strip_pictures

PROMPT = "Describe the clip {duration} now, in {frames} frames."


def config_of(server: Server, **more: Any) -> CaptionConfig:
    given = {
        "endpoint": server.address,
        "model": "eyes",
        "prompt": PROMPT,
        "backoff_s": 0.01,
        "timeout_s": 5.0,
        "retries": 2,
    }
    return settings(**(given | more))


def fine(found: list[Found]) -> list[dict[str, Any]]:
    assert not [one for one in found if isinstance(one, Bad)], found
    return [dict(one) for one in found if not isinstance(one, Bad)]


def bad(one: Found) -> Bad:
    assert isinstance(one, Bad), one
    return one


def in_turn(*replies: Reply | Callable[[Question], Reply]) -> Callable[[Question], Reply]:
    """One after the other; the last one for ever."""
    left, lock = list(replies), threading.Lock()

    def says(question: Question) -> Reply:
        with lock:
            reply = left.pop(0) if len(left) > 1 else left[0]
        return reply(question) if callable(reply) else reply

    return says


def good(question: Question) -> Reply:
    return saying(caption_of(question))


def test_a_question_goes_out_and_a_caption_comes_back(
    server: Server, clips: list[Row], places: Places
) -> None:
    found = fine(captions(config_of(server, detail="low"), clips, places))
    assert [one["text"] for one in found] == [
        f"The dog number {i + 2}.0 as it runs over green grass." for i in range(5)
    ]
    assert all(one["caption_model"] == "eyes" for one in found)
    assert all((one["_tokens_in"], one["_tokens_out"]) == (500, 20) for one in found)
    assert all(one["caption_words"] == 11 and one["caption_repeats"] == 0 for one in found)
    assert len(server.asked) == 5
    by_text = {question.text: question for question in server.asked}
    for i, row in enumerate(clips):
        question = by_text[f"Describe the clip {i + 2}.0 now, in 3 frames."]
        assert question.path == "/v1/chat/completions"
        assert question.headers["Authorization"] == f"Bearer {KEY}"
        assert question.body["model"] == "eyes"
        assert question.body["max_tokens"] == 300
        assert question.body["temperature"] == 0.0
        assert {p["image_url"]["detail"] for p in question.body["messages"][0]["content"][:3]} == {
            "low"
        }
        for seen, frame in zip(question.pictures, strip_pictures(places, row), strict=True):
            assert seen.shape == np.asarray(frame).shape
            assert np.abs(seen.astype(int) - np.asarray(frame).astype(int)).mean() < 8


def test_requests_go_out_together_but_not_too_many(
    server: Server, clips: list[Row], places: Places
) -> None:
    together = threading.Barrier(3, timeout=20)

    def says(question: Question) -> Reply:
        together.wait()  # answers only when three are asked at once
        return good(question)

    server.says = says
    fine(captions(config_of(server, parallel=3), clips[:3] * 2, places))
    assert server.most_at_once == 3


def test_keys_of_the_request_may_be_changed(
    server: Server, clips: list[Row], places: Places
) -> None:
    more = {"max_completion_tokens": 900, "max_tokens": None, "seed": 7}
    config = config_of(server, request=more, temperature=None, frames=1)
    fine(captions(config, clips[:1], places))
    body = server.asked[0].body
    assert (body["max_completion_tokens"], body["seed"]) == (900, 7)
    assert not {"max_tokens", "temperature"} & body.keys()
    (one,) = server.asked[0].pictures  # the middle one of three
    middle = np.asarray(strip_pictures(places, clips[0])[1]).astype(int)
    assert np.abs(one.astype(int) - middle).mean() < 8


def test_passing_failures_are_asked_again(server: Server, clips: list[Row], places: Places) -> None:
    server.says = in_turn(
        failing(429, {"Retry-After": "0.3"}), failing(500), failing(503, {"Retry-After": "x"}), good
    )
    (found,) = fine(captions(config_of(server, retries=3), clips[:1], places))
    assert found["text"].startswith("The dog number 2.0")
    times = [question.at for question in server.asked]
    assert len(times) == 4
    assert times[1] - times[0] >= 0.3
    assert found["_requests"] == 1  # the others gave no answer


def test_one_clip_fails_and_the_others_go_on(
    server: Server, clips: list[Row], places: Places
) -> None:
    def says(question: Question) -> Reply:
        return failing(500) if "clip 4.0" in question.text else good(question)

    server.says = says
    found = captions(config_of(server, parallel=1), clips, places)
    failed = bad(found[2])
    assert failed.reason == "no_answer"
    assert failed.passing
    assert "500 Internal Server Error (asked 3 times)" in failed.message
    assert len(fine([*found[:2], *found[3:]])) == 4
    error = shortfall(4, [failed])
    assert error is not None
    assert "4 of 5 captioned: the endpoint answered 500" in str(error)
    assert "the same command goes on" in str(error)
    assert shortfall(4, [Bad("refused", "no"), Bad("corrupt", "frames")]) is None


def test_what_the_endpoint_finds_wrong_with_one_clip_is_remembered(
    server: Server, clips: list[Row], places: Places
) -> None:
    def says(question: Question) -> Reply:
        return failing(400, message="blocked") if "clip 4.0" in question.text else good(question)

    server.says = says
    found = captions(config_of(server, parallel=1), clips, places)
    assert bad(found[2]) == Bad("declined", "the endpoint answered 400 Bad Request (blocked)")
    assert len(server.asked) == 5


def test_a_key_that_expires_is_not_the_clips_fault(
    server: Server, clips: list[Row], places: Places
) -> None:
    server.says = in_turn(good, failing(401))
    found = captions(config_of(server, parallel=1), clips, places)
    assert len(fine(found[:1])) == 1
    assert all(bad(one).passing for one in found[1:])
    assert [bad(one).reason for one in found[1:]] == ["no_answer", *["not_asked"] * 3]
    assert len(server.asked) == 2


def test_garbage_after_failures(server: Server, clips: list[Row], places: Places) -> None:
    garbage: Reply = (200, {}, b"<html>")
    server.says = in_turn(failing(500), failing(500), garbage, good)
    first, second = captions(config_of(server, parallel=1, retries=2), clips[:2], places)
    assert bad(first).message == ("the answer is no chat completion in JSON (asked 3 times)")
    assert len(fine([second])) == 1
    server.says = in_turn(garbage, good)
    (found,) = captions(config_of(server, retries=0), clips[:1], places)
    assert bad(found).message == "the answer is no chat completion in JSON"


def test_an_answer_that_a_filter_stopped(server: Server, clips: list[Row], places: Places) -> None:
    server.says = in_turn(saying("A man", "content_filter"), good)
    first, second = captions(config_of(server, parallel=1), clips[:2], places)
    assert bad(first) == Bad("refused", "the endpoint's filter stopped the answer")
    assert len(fine([second])) == 1


@pytest.mark.parametrize(
    ("reply", "why", "requests"),
    [
        (failing(401, message=f"wrong key {KEY[:12]}"), "401 Unauthorized", 1),
        (failing(404, message="no model 'eyes'"), "404 Not Found (no model 'eyes')", 1),
        (failing(307, {"Location": "/elsewhere"}), "307", 1),
        (failing(400, message=f"you sent {KEY}"), "400 Bad Request, 3 clips in a row", 3),
        (failing(500), "500 Internal Server Error, 3 clips in a row", 9),
        ((200, {}, b"<html>welcome</html>"), "no chat completion in JSON, 3 clips in a row", 6),
        (saying(""), "gives no captions: the answer is empty, 3 clips in a row", 6),
        (saying("<html><body>Log in</body></html>"), "a web page, 3 clips in a row", 6),
    ],
)
def test_an_endpoint_that_answers_nothing_is_left_alone(
    server: Server,
    clips: list[Row],
    places: Places,
    caplog: pytest.LogCaptureFixture,
    reply: Reply,
    why: str,
    requests: int,
) -> None:
    server.says = in_turn(reply)
    with caplog.at_level(logging.DEBUG):
        found = [bad(one) for one in captions(config_of(server, parallel=1), clips, places)]
    assert len(server.asked) == requests
    assert all(one.passing for one in found)
    assert found[-1].reason == "not_asked"
    assert why in found[-1].message
    error = shortfall(0, found)
    assert error is not None
    assert f"0 of 5 captioned: {found[-1].message}" in str(error)
    for piece in (KEY, KEY[:12]):
        assert piece not in caplog.text + repr(found) + str(error)


def test_a_model_that_sees_nothing_is_left_alone(
    server: Server, clips: list[Row], places: Places
) -> None:
    server.says = in_turn(saying("I cannot see any images in your message."))
    found = [bad(b) for b in captions(config_of(server, parallel=1), clips * 3, places)]
    assert [b.reason for b in found] == ["refused"] * 10 + ["not_asked"] * 5
    assert all(b.passing for b in found)  # it is asked again when it can see
    assert len(server.asked) == 20
    assert "gives no captions: the model declined" in found[-1].message
    assert "0 of 15 captioned: the endpoint gives no captions" in str(shortfall(0, found))


def test_it_takes_longer_to_give_up_one_that_has_worked(
    server: Server, clips: list[Row], places: Places
) -> None:
    server.says = in_turn(good, failing(500))
    config = config_of(server, parallel=1, retries=0, give_up_after=4)
    found = captions(config, clips * 2, places)
    assert len(fine(found[:1])) == 1
    assert [bad(one).reason for one in found[1:]] == ["no_answer"] * 4 + ["not_asked"] * 5
    assert len(server.asked) == 5


def test_nobody_there(server: Server, clips: list[Row], places: Places) -> None:
    config = config_of(server)
    server.shutdown()
    server.server_close()
    with pytest.raises(KinemaError, match=r"cannot be reached: Connection refused"):
        captions(config, clips, places)


def test_time_is_limited(server: Server, clips: list[Row], places: Places) -> None:
    ended = threading.Event()

    def slow(question: Question) -> Reply:
        ended.wait(20)
        return good(question)

    server.says = slow
    config = config_of(server, timeout_s=0.2, retries=1, give_up_after=1)
    (found,) = captions(config, clips[:1], places)
    ended.set()
    assert bad(found).message == "no answer within 0.2 s (asked 2 times)"


def test_the_key_does_not_leave_the_machine_in_clear(
    clips: list[Row], places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    config = settings(endpoint="http://192.0.2.1:8000/v1", model="eyes")
    with pytest.raises(KinemaError, match=r"without encryption(.|\n)*api_key_env=NONE") as caught:
        captions(config, clips, places)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "finish", "reason"),
    [
        ("I'm sorry, but I can't help with that.", "stop", "refused"),
        ("I cannot see any images in your message.", "stop", "refused"),
        ("A man walks " + "and walks and talks " * 40, "length", "repeats"),
        (" ".join(f"word{i}" for i in range(700)), "stop", "too_long"),
        ("Dog.", "stop", "too_short"),
        ("A man in a long black coat walks slowly along a wet str", "length", "cut_off"),
        ("...", "stop", "empty"),
    ],
)
def test_answers_that_are_no_captions(
    server: Server, clips: list[Row], places: Places, answer: str, finish: str, reason: str
) -> None:
    server.says = in_turn(good, saying(answer, finish))
    found = captions(config_of(server, parallel=1), clips[:2], places)
    one = bad(found[1])
    assert one.reason == reason
    assert one.message.endswith("(asked twice)")
    assert one.passing == (reason == "empty")
    # The second time at another temperature: the same one would give the same answer.
    assert [q.body["temperature"] for q in server.asked] == [0.0, 0.0, 0.7]


def test_a_temperature_that_is_not_sent_stays_away(
    server: Server, clips: list[Row], places: Places
) -> None:
    for more in ({"temperature": None}, {"request": {"temperature": None}}):
        server.says = in_turn(saying("I'm unable to assist."), good)
        fine(captions(config_of(server, **more), clips[:1], places))
    config = config_of(server, request={"temperature": 1})
    server.says = in_turn(saying("I'm unable to assist."), good)
    fine(captions(config, clips[:1], places))
    sent = [q.body.get("temperature", "none") for q in server.asked]
    assert sent == ["none"] * 4 + [1, 1]


def test_a_bad_answer_gets_one_more_chance(
    server: Server, clips: list[Row], places: Places
) -> None:
    server.says = in_turn(saying("I'm unable to assist.", usage=(400, 7)), good)
    (found,) = fine(captions(config_of(server), clips[:1], places))
    assert found["text"].startswith("The dog")
    assert (found["_requests"], found["_tokens_in"], found["_tokens_out"]) == (2, 900, 27)


def test_what_is_cut_off_ends_with_a_sentence(
    server: Server, clips: list[Row], places: Places
) -> None:
    server.says = in_turn(saying("A dog runs over grass. It then jumps into the wat", "length"))
    (found,) = fine(captions(config_of(server), clips[:1], places))
    assert found["text"] == "A dog runs over grass."


def test_a_short_caption_is_asked_for(server: Server, clips: list[Row], places: Places) -> None:
    def says(question: Question) -> Reply:
        if isinstance(question.body["messages"][0]["content"], str):
            assert "The dog number 2.0 as it runs over green grass." in question.text
            return saying('"A dog runs."', usage=(60, 5))
        return good(question)

    server.says = says
    (found,) = fine(captions(config_of(server, short="asked"), clips[:1], places))
    assert found["text_short"] == "A dog runs."
    assert (found["_requests"], found["_tokens_in"], found["_tokens_out"]) == (2, 560, 25)


def test_structured_answers(server: Server, clips: list[Row], places: Places) -> None:
    answer = {
        "short": "The video shows a dog.", "dense": "In this video, a dog runs over green grass.",
        "background": "a field", "style": "documentary", "shot": "wide", "lighting": "sun",
        "atmosphere": "calm",
    }  # fmt: skip
    server.says = in_turn(saying(f"```json\n{json.dumps(answer)}\n```"), saying("A dog runs fast."))
    config = config_of(server, prompt="structured", parallel=1)
    one, other = captions(config, clips[:2], places)
    (found,) = fine([one])
    assert found["text"] == "A dog runs over green grass."
    assert found["text_short"] == "A dog."
    assert (found["caption_background"], found["caption_shot"]) == ("a field", "wide")
    assert bad(other).reason == "not_json"
    (part,) = CaptionStage(config, FramesConfig()).parts
    assert set(found) == set(part.columns)


def test_the_next_run_asks_for_what_is_missing_and_nothing_else(
    server: Server, clips: list[Row], places: Places
) -> None:
    """Results are kept as the store keeps them: by key, and not those that are passing."""
    down = {"now": True}

    def says(question: Question) -> Reply:
        if "clip 3.0" in question.text:
            return saying("I'm sorry, but I can't help with that.")
        return failing(503) if down["now"] and "clip 5.0" in question.text else good(question)

    server.says = says
    stage = CaptionStage(config_of(server, parallel=2, retries=1), FramesConfig())
    (part,) = stage.parts
    kept: dict[str, Found] = {}

    def run() -> int:
        missing = [row for row in clips if result_key(row, part) not in kept]
        for row, result in zip(missing, stage.open(places)(missing), strict=True):
            one = result["caption"]
            if not (isinstance(one, Bad) and one.passing):
                kept[result_key(row, part)] = one
        return len(missing)

    assert run() == 5
    assert len(server.asked) == 3 + 2 + 2  # answered; refused, twice; failed, twice
    assert len(kept) == 4
    down["now"] = False
    assert run() == 1
    assert [q.text for q in server.asked[7:]] == ["Describe the clip 5.0 now, in 3 frames."]
    assert run() == 0
    assert len(server.asked) == 8
    clips[0]["duration"] = 9.0  # the question says it
    assert run() == 1


def test_captions_that_clips_came_with_stay(
    server: Server, clips: list[Row], places: Places
) -> None:
    clips[1]["text"] = "A cat. It sleeps."
    clips[3]["text"] = "  "
    found = fine(captions(config_of(server, short="first_sentence"), clips, places))
    assert found[1]["text"] == "A cat. It sleeps."
    assert found[1]["text_short"] == "A cat."
    assert found[1]["caption_model"] is None
    assert found[1]["_requests"] == 0
    assert found[3]["text_short"] == "The dog number 5.0 as it runs over green grass."
    assert len(server.asked) == 4
    found = fine(captions(config_of(server, existing="replace"), clips, places))
    assert found[1]["text"].startswith("The dog")


def test_clips_without_frames(server: Server, clips: list[Row], places: Places) -> None:
    clips[0]["frames"] = None
    clips[1]["frames"] = "gone.jpg"
    found = captions(config_of(server), clips[:3], places)
    assert [bad(one).reason for one in found[:2]] == ["no_frames", "bad_strip"]
    assert len(fine(found[2:])) == 1


class Clock:
    """Time that passes only when someone waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def test_requests_keep_their_pace() -> None:
    clock = Clock()
    pace = Pace(30.0, clock=clock, sleep=clock.sleep)
    at = []
    for i in range(5):
        if i == 3:
            pace.leave_alone(10.0)
        pace.wait(lambda: False)
        at.append(clock.now - 100.0)
    assert at == pytest.approx([0.0, 2.0, 4.0, 14.0, 16.0])
    pace.wait(lambda: True)  # stopped: at once
    assert clock.now == pytest.approx(116.0)


def test_threads_share_the_pace(
    server: Server, clips: list[Row], places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[float | None, list[str]]] = []

    class Counted(Pace):
        def __init__(self, per_minute: float | None, **more: Any) -> None:
            super().__init__(None, **more)
            self.waits: list[str] = []
            made.append((per_minute, self.waits))

        def wait(self, stopped: Callable[[], bool]) -> None:
            self.waits.append(threading.current_thread().name)
            super().wait(stopped)

    monkeypatch.setattr("kinema.curation.captions.asking.Pace", Counted)
    server.says = in_turn(failing(500), good)
    fine(captions(config_of(server, requests_per_minute=600.0, parallel=3), clips, places))
    ((per_minute, waits),) = made
    assert per_minute == 600.0
    assert len(waits) == len(server.asked) == 6  # the one that failed waited twice
    assert all(name.startswith("caption") for name in waits)


PRICES = {"price_per_million_input": 2.0, "price_per_million_output": 8.0}


def test_what_it_costs(server: Server, clips: list[Row], places: Places) -> None:
    config = config_of(server, **PRICES, prompt="say what you see now")  # 20 characters
    rows = [
        {"height": 720, "width": 1280},  # 768 × 432 in the strip: 2 tiles
        {"height": 1280, "width": 720},
        {"height": 200, "width": 300},  # 1 tile
        {"height": 720, "width": 1280, "text": "it has one"},
    ]
    before = estimate(rows, config, FramesConfig())
    assert before is not None
    text = 20 // 4 + 10
    assert before.tokens_in == 3 * text + 2 * 3 * (85 + 2 * 170) + 3 * (85 + 170)
    assert before.tokens_out == 3 * (110 * 4 // 3)
    assert before.price == pytest.approx((before.tokens_in * 2 + before.tokens_out * 8) / 1e6)
    assert str(before) == "3 videos: 3,360 tokens in, 438 out, 0.010 USD (0.0034 a video)"
    low = config_of(server, detail="low", prompt="say what you see now")
    cheap = estimate(rows[:1], low, FramesConfig())
    assert cheap is not None
    assert (cheap.tokens_in, cheap.price) == (text + 3 * 85, None)
    known = config_of(server, image_tokens=420, prompt="say what you see now")
    assert (e := estimate(rows[:1], known, FramesConfig()))
    assert e.tokens_in == text + 3 * 420
    after = spent(fine(captions(config, clips, places)), config)
    assert after is not None
    assert (after.videos, after.tokens_in, after.tokens_out) == (5, 2500, 100)
    assert after.price == pytest.approx(0.0058)
    assert estimate(rows, settings(model="some/model"), FramesConfig()) is None


def test_it_stops_before_it_costs_too_much(
    server: Server, clips: list[Row], places: Places
) -> None:
    # An answer is (500·2 + 20·8) / 1e6 = 0.00116; before it is there, up to 300 tokens are held
    # back for it: 0.0024 and the pictures'.
    config = config_of(server, **PRICES, max_cost=0.0065, parallel=1, detail="low")
    found = captions(config, clips * 2, places)
    done = [one for one in found if not isinstance(one, Bad)]
    assert len(done) == len(server.asked) == 4
    total = spent(done, config)
    assert total is not None
    assert total.price is not None
    assert total.price <= 0.0065
    assert bad(found[-1]).reason == "not_asked"
    assert "max_cost: 0.00464 of 0.0065 USD are spent" in bad(found[-1]).message
    assert "4 of 10 captioned: max_cost" in str(shortfall(len(done), map(bad, found[len(done) :])))


def test_money_is_held_back_for_what_is_under_way() -> None:
    budget = Budget(settings(endpoint="http://h/v1", model="m", **PRICES, max_cost=0.01))
    assert budget.reserve(1000, 500)  # 0.006
    found: list[bool] = []
    other = threading.Thread(target=lambda: found.append(budget.reserve(1000, 500)))
    other.start()
    other.join(0.05)
    assert other.is_alive()  # it waits for what the first one really costs
    budget.settle((1000, 500), (1000, 100))  # 0.0028
    other.join(20)
    assert found == [True]
    budget.settle((1000, 500), (2000, 200))  # 0.0056
    assert not budget.reserve(1000, 500)


def test_an_endpoint_that_does_not_count(server: Server, clips: list[Row], places: Places) -> None:
    server.says = in_turn(saying("A dog runs over green grass.", usage=None))
    (found,) = fine(captions(config_of(server, detail="low"), clips[:1], places))
    question = len("Describe the clip 2.0 now, in 3 frames.")
    assert found["_tokens_in"] == 3 * 85 + question // 4 + 10
    assert found["_tokens_out"] == len("A dog runs over green grass.") // 4


def test_the_stage_travels_and_knows_its_version(server: Server) -> None:
    stage = CaptionStage(config_of(server), FramesConfig())
    assert pickle.loads(pickle.dumps(stage)) == stage
    assert (stage.gpu, stage.max_workers, stage.batch) == (False, 1, 8)
    assert stage.time_limit_s({}) > 3 * 5.0
    (part,) = stage.parts
    assert part.depends == tuple(sorted(("duration", "text", "start_frame", "end_frame", *BORDERS)))

    def key(**more: Any) -> str:
        return CaptionStage(config_of(server, **more), FramesConfig()).parts[0].key

    for other in ({"model": "m2"}, {"prompt": "what is there"}, {"frames": 2}, {"max_words": 50},
                  {"request": {"seed": 1}}, {"existing": "replace"}):  # fmt: skip
        assert key(**other) != part.key
    for same in ({"parallel": 2}, {"retries": 9}, {"endpoint": "https://h/v1"}, PRICES,
                 {"score_text": True}, {"requests_per_minute": 1.0}):  # fmt: skip
        assert key(**same) == part.key


def test_calls_at_once_share_one_pool(server: Server, clips: list[Row], places: Places) -> None:
    work = CaptionStage(config_of(server, parallel=2), FramesConfig()).open(places)
    server.says = lambda question: (time.sleep(0.02), good(question))[1]
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.extend(work(clips))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 10
    assert server.most_at_once <= 2
