"""Prompts: segments, JSON at the end, scores, files of prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from kinema.generation.config import GenerateRequest
from kinema.generation.prompts import (
    PromptError,
    PromptLine,
    add_scores,
    join_segments,
    read_prompts,
    segment_texts,
    split_json,
    split_segments,
)


def request(prompt: str, **values: object) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, width=32, height=32, num_frames=17, **values)  # type: ignore[arg-type]


def test_each_segment_has_the_text_that_started_last_with_scores() -> None:
    made = segment_texts(request("|0| a day |2| a night", loop=4, aes=6.5, flow=4.25))
    scores = " aesthetic score: 6.5. motion score: 4.2."
    assert made == ["a day" + scores] * 2 + ["a night" + scores] * 2
    assert segment_texts(request("a kite", loop=2)) == ["a kite", "a kite"]


def test_a_score_in_the_text_is_not_given_again() -> None:
    text = "a kite aesthetic score: 5.0."
    assert add_scores(text, aes=6.5, camera_motion="pan left") == text + " camera motion: pan left."


def test_segments_go_there_and_back() -> None:
    texts, starts = split_segments("|0|a|3|b|7|c")
    assert (texts, starts) == (["a", "b", "c"], [0, 3, 7])
    assert split_segments(join_segments(texts, starts)) == (texts, starts)
    assert join_segments(*split_segments("plain | text")) == "plain | text"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("|0| a |x| b", "no number"),
        ("|0| a |2", "segment '2' has no text"),
        ("|0| a |3| b |2| c", "segment 2 comes after segment 3"),
        ("|0| a |0| b", "segment 0 comes after segment 0"),
    ],
)
def test_segments_that_make_no_sense_are_refused(prompt: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        segment_texts(request(prompt, loop=9))


def test_a_text_for_a_segment_that_is_not_made_is_refused() -> None:
    with pytest.raises(PromptError, match="there is only segment 0") as caught:
        segment_texts(request("|0| a |2| b"))
    assert caught.value.hint == "--loop 3 or more"
    with pytest.raises(PromptError, match="segments 0 to 1"):
        segment_texts(request("|0| a |2| b", loop=2))


def test_json_at_the_end_of_a_prompt() -> None:
    line = split_json('a cat{"reference_path": "a.png; b c.mp4", "mask_strategy": "0;0,1"}')
    assert line == PromptLine("a cat", ("a.png", "b c.mp4"), "0;0,1")
    assert split_json("a cat") == PromptLine("a cat")
    assert split_json('a {"reference_path": ""}') == PromptLine("a ", (), None)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a { b", "no JSON object"),
        ('a {"reference": "x"}', "unknown key 'reference'"),
        ('a {"mask_strategy": 3}', "not a text"),
        ('a {"mask_strategy": "0"} and more', "no JSON object"),
    ],
)
def test_json_that_is_none_is_refused(prompt: str, message: str) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        split_json(prompt)
    assert "reference_path" in str(caught.value.hint)


LINES = [PromptLine("a kite", ("a.png",), "0"), PromptLine("a, boat")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", '\n  a kite{"reference_path": "a.png", "mask_strategy": "0"}  \n\na, boat\n'),
        ("p.csv", 'prompt,reference_path,mask_strategy\na kite,a.png,0\n"a, boat",,\n'),
        ("p.csv", 'text,reference_path,mask_strategy\r\na kite,a.png,0\r\n"a, boat",,\r\n'),
        (
            "p.jsonl",
            '{"prompt": "a kite", "reference_path": "a.png", "mask_strategy": "0"}\n\n'
            '{"prompt": "a, boat"}\n',
        ),
    ],
)
def test_files_of_prompts(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("\ufeff" + content, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name) == LINES


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", " \n", "holds no prompt"),
        ("p.txt", "fine\nbad {\n", "p.txt, line 2: what begins with"),
        ("p.csv", "prompt,seed\na,1\n", "unknown column 'seed'"),
        ("p.csv", "prompt\na\n  \n", "row 2: has no prompt"),
        ("p.csv", "prompt,mask_strategy\na,0,1\n", "unknown column None"),
        ("p.csv", 'prompt\n"' + "a" * 200_000, "is no CSV"),
        ("p.json", '[{"prompt": "a"}]', "one object per line"),
        ("p.jsonl", "nonsense\n", "line 1: is no JSON"),
        ("p.jsonl", "[1]\n", "is no JSON object"),
        ("p.jsonl", '{"prompt": "a", "mask_strategy": 3}\n', "not a text"),
    ],
)
def test_broken_files_say_where(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PromptError, match=message):
        read_prompts(tmp_path / name)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptError, match="UTF-8"):
        read_prompts(tmp_path / "p.txt")
