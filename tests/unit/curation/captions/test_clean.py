"""Captions out of answers as models give them."""

from __future__ import annotations

import pytest

from kinema.config.errors import ConfigError
from kinema.curation.captions.answers import Answer, Caption, read_answer, read_short, with_scores
from kinema.curation.captions.clean import (
    Unusable,
    cleaned,
    count_words,
    first_sentence,
    repeats,
    sentences,
    unusable,
)
from kinema.curation.captions.prompts import (
    PLACEHOLDERS,
    TEMPLATES,
    ask_for,
    columns,
    placeholders,
    template_of,
)
from kinema.endpoint.chat import unwrapped
from kinema.generation.prompts import add_scores
from tests.unit.curation.captions.conftest import settings


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("The video shows a man walking. He wears a hat.", "A man walking. He wears a hat."),
        ("In this video, we see two dogs at play.", "Two dogs at play."),
        ("In the video, there is a cat on a mat.", "A cat on a mat."),
        ("The footage is of a train that arrives.", "A train that arrives."),
        ("The video is a time-lapse of clouds.", "A time-lapse of clouds."),
        ("The three images depict a boat on a lake.", "A boat on a lake."),
        ("This short clip captures a bee on a flower.", "A bee on a flower."),
        ("Based on the provided frames, a man walks his dog.", "A man walks his dog."),
        ("Two boys run. The video also shows a dog.", "Two boys run. A dog."),
        ("Throughout the video, the camera is still.", "The camera is still."),
        ("Sure! Here's a detailed caption for the video:\n\nA red car drives by.",
         "A red car drives by."),
        ("**Caption:** \"A red car drives by.\"", "A red car drives by."),
        ("Caption: In this clip, a red car drives by.", "A red car drives by."),
        ("```\nA red car drives by.\n```", "A red car drives by."),
        ("# A car\n\nA *very* red `car` with a [sign](http://x.y) drives __by__.",
         "A very red car with a sign drives by."),
        ("- A red car drives by.\n- The road is wet.", "A red car drives by. The road is wet."),
        ("1. **Subject**: a red car\n2. **Light**: sunset", "A red car. Sunset."),
        ("In the first frame, she stands. In the second frame, she turns. In the last frame, she "
         "smiles.", "At first, she stands. Then, she turns. In the end, she smiles."),
        ("The first frame shows a red car. The second image shows it turn. The third frame depicts "
         "it at rest.", "At first, a red car. Then, it turn. In the end, it at rest."),
        ("The video begins with a girl. As the video progresses, she runs. The clip ends with a "
         "jump.", "A girl. Then, she runs. In the end, a jump."),
        ("Throughout the clip, the camera pans left, revealing more of it.",
         "The camera pans left, revealing more of it."),
        ("Frame 1: A dog sits. Frame 2: It runs.", "A dog sits. It runs."),
        ("The clip, lasting 4 seconds, shows a puppy.", "A puppy."),
        ("Seen from above, the clip features a tractor.", "Seen from above, a tractor."),
        ("A man sings. Overall, the sequence of frames suggests joy. This caption is short.",
         "A man sings."),
        ("A dog runs, its tail up across the frames.", "A dog runs, its tail up."),
        ("A beach. These frames do not show any people. Let me know if you need more.", "A beach."),
        ("A bird sits there. It is not possible to determine its kind.", "A bird sits there."),
        ("A cat sits. A cat sits. A CAT sits! A dog runs.", "A cat sits. A dog runs."),
        ("He walks very very very very slowly.", "He walks very slowly."),
        ("He\u200b  eats\n\na caf\u0065\u0301 cr&egrave;me.", "He eats a caf\u00e9 cr\u00e8me."),
        # What only looks like an opening, a remark or a refusal stays.
        ("The image captures how light falls on a wall.",
         "The image captures how light falls on a wall."),
        ("The frames of his glasses are black.", "The frames of his glasses are black."),
        ("Of course you can see the sea from here.", "Of course you can see the sea from here."),
        ("The scene is set in a kitchen.", "The scene is set in a kitchen."),
        ("A sign reads \"I'm sorry\" and \"shut\".", "A sign reads \"I'm sorry\" and \"shut\"."),
        ("Dr. Li walks 5.5 km to the U.S. Capitol, i.e. far.",
         "Dr. Li walks 5.5 km to the U.S. Capitol, i.e. far."),
    ],
)  # fmt: skip
def test_what_is_not_about_the_picture_goes(answer: str, caption: str) -> None:
    assert cleaned(unwrapped(answer)) == caption
    assert cleaned(caption) == caption  # nothing more to take off


def test_thoughts_are_not_captions() -> None:
    answer = Answer("<think>" + "The user wants a caption. " * 99 + "</think>\nA dog runs fast.")
    found = read_answer(answer, TEMPLATES["short"], settings(model="m"))
    assert found == Caption("A dog runs fast.")


def test_length_is_limited_to_full_sentences() -> None:
    text = "A dog runs over grass. It sees a cat, and stops. The cat runs away from it."
    assert cleaned(text, max_words=11) == "A dog runs over grass. It sees a cat, and stops."
    assert cleaned(text, max_words=10) == "A dog runs over grass."
    assert cleaned(text[:-4], cut_off=True) == "A dog runs over grass. It sees a cat, and stops."
    assert cleaned(text[:9], cut_off=True) == ""


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't assist with that.", "I\u2019m unable to view images.",
        "I cannot identify people.", "Sorry, but I can't describe this.",
        "Unfortunately, I am not able to see it.", "As an AI language model, I see nothing here.",
        "There are no images attached.", "Please provide the video frames.",
        "I don't see any frames here.", "I apologize, something went wrong there.",
        "You haven't attached a video.",
    ],
)  # fmt: skip
def test_refusals(answer: str) -> None:
    found = unusable(answer, cleaned(answer), max_words=100)
    assert found is not None
    assert found.reason == "refused"
    assert not found.passing


def test_repetition_is_measured() -> None:
    assert repeats("a dog runs over the grass and then it sleeps in the sun for a long time") == 0
    loop = "the dog runs and the dog runs and the dog runs and the dog runs and the dog runs"
    assert repeats(loop) > 0.7
    assert repeats("the dog " * 4) == 0  # too short to tell
    found = unusable(loop, loop, max_words=100)
    assert found is not None
    assert found.reason == "repeats"


def test_words_and_sentences_of_other_scripts() -> None:
    text = "一只猫坐在窗台上。它看着外面。"
    assert count_words(text) == 13
    assert sentences(text) == ["一只猫坐在窗台上。", "它看着外面。"]
    assert (
        first_sentence("Mr. Li's well-known dog barks! It runs.")
        == "Mr. Li's well-known dog barks!"
    )
    assert count_words("Mr. Li's well-known dog barks!") == 5


def test_short_captions_that_are_none() -> None:
    long = "A dog runs over grass. It sees a cat."
    assert read_short(Answer("Dog runs over grass."), long) == "Dog runs over grass."
    assert read_short(Answer("I can't do that."), long) == "A dog runs over grass."
    assert read_short(Answer("word " * 50), long) == "A dog runs over grass."


def test_structured_answers_that_are_none() -> None:
    config = settings(model="m", prompt="structured")
    for text in ("[1, 2]", "no JSON here at all", '{"dense": ', '{"dense": 5}', '{"dense": null}'):
        found = read_answer(Answer(text), TEMPLATES["structured"], config)
        assert isinstance(found, Unusable)
    cut = read_answer(Answer('{"dense": "A dog', cut_off=True), TEMPLATES["structured"], config)
    assert isinstance(cut, Unusable)
    assert cut.reason == "cut_off"


def test_ready_templates_say_what_they_know() -> None:
    row = {"duration": 4.26, "camera_motion": "pan_left", "text": "a\ndog {width}"}
    for name, template in TEMPLATES.items():
        question = ask_for(template_of(name), row, 3)
        assert "You see 3 frames of one video clip of 4.3 seconds" in question
        assert set(columns(template.text)) <= {"duration", "camera_motion", "text"}
    assert "is: pan left." in ask_for(TEMPLATES["camera"], row, 3)
    assert "is: unknown." in ask_for(TEMPLATES["camera"], {}, 3)
    assert "a dog {width}\n" in ask_for(TEMPLATES["improve"], row, 3)  # not filled in again
    assert '"short"' in TEMPLATES["structured"].text.replace("{{", "{")


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="existing=replace"):
        settings(model="m", prompt="improve")
    assert settings(model="m", prompt="improve", existing="replace").existing == "replace"
    with pytest.raises(ConfigError, match="request may not set 'stream'"):
        settings(model="m", endpoint="http://h/v1", request={"stream": True})
    with pytest.raises(ConfigError, match="max_cost needs"):
        settings(model="m", endpoint="http://h/v1", max_cost=1.0)
    with pytest.raises(ConfigError, match="one price is missing"):
        settings(model="m", price_per_million_input=1.0)
    with pytest.raises(ConfigError, match="parallel is 0"):
        settings(model="m", parallel=0)
    with pytest.raises(ConfigError, match="must be an http or https address"):
        settings(model="m", endpoint="localhost:8000")


def test_templates_of_ones_own() -> None:
    own = template_of("At {fps} per second, {width} by {height}: list {{things}} in {ocr_text}")
    row = {"fps": 29.97, "width": 640, "height": 360}
    assert ask_for(own, row, 2) == "At 29.97 per second, 640 by 360: list {things} in unknown"
    assert placeholders(own.text) == ("fps", "width", "height", "ocr_text")
    assert set(placeholders("".join(f"{{{name}}}" for name in PLACEHOLDERS))) == set(PLACEHOLDERS)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("detalied", "no ready template; did you mean 'detailed'"),
        ("what is {durration} long", "unknown placeholder {durration}; did you mean 'duration'"),
        ("what {text.__class__} is", "unknown placeholder {text.__class__}"),
        ("what {text!r} is", "unknown placeholder {text}"),
        ("what {0} is", "unknown placeholder {0}"),
        ('as JSON {"a": 1}', "stand for braces themselves"),
        ("an open { brace", "stand for braces themselves"),
        ("", "no ready template"),
    ],
)
def test_templates_that_cannot_be_filled(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"prompt") as caught:
        template_of(prompt)
    assert message in str(caught.value)


def test_scores_are_appended_as_they_are_asked_for() -> None:
    row = {"aesthetic": 5.46, "flow": 8.0, "camera_motion": "pan_right"}
    text = "A dog runs. aesthetic score: 5.5. motion score: 8.0. camera motion: pan right."
    assert with_scores("A dog runs.", row) == text
    assert add_scores("A dog runs.", aes=5.46, flow=8.0, camera_motion="pan right") == text
    assert with_scores(text, row) == text
    for nothing in ("", None, "mixed"):
        assert with_scores("A dog.", {"flow": None, "camera_motion": nothing}) == "A dog."
