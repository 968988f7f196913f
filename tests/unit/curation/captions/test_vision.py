"""Captions by models here: tiny ones with random weights, one of each family."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinema.checkpoint.errors import HubError
from kinema.config.errors import KinemaError
from kinema.curation.captions.answers import Answer, Use
from kinema.curation.captions.patches import PatchSettings, fitted, patches
from kinema.curation.captions.prompts import TEMPLATES
from kinema.curation.captions.stage import CaptionStage, choose
from kinema.curation.captions.vision import LocalCaptions, Question
from kinema.curation.config import CaptionConfig, FramesConfig
from kinema.curation.stage import Bad, Places, Row
from tests.unit.curation.captions.conftest import captions, settings
from tests.unit.curation.captions.tiny_models import PATCH, write_llava, write_qwen
from tests.unit.curation.scoring.tiny_models import drawn

MODELS: dict[str, Callable[[Path], Any]] = {
    "llava": write_llava,
    "llava_next": lambda folder: write_llava(folder, next_one=True),
    "qwen2_vl": lambda folder: write_qwen(folder, "Qwen2VL"),
    "qwen2_5_vl": write_qwen,
    "qwen3_vl": lambda folder: write_qwen(folder, "Qwen3VL"),
}
SHAPES = [(40, 64), (64, 40), (40, 64), (30, 30)]
TENSORS = ("input_ids", "attention_mask", "pixel_values", "image_sizes", "image_grid_thw",
           "mm_token_type_ids")  # fmt: skip
QUESTIONS = ["what", "what is this, then", "a dog?", "say"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Kind -> folder, transformers' own model."""
    root = tmp_path_factory.mktemp("models")
    return {kind: (root / kind, write(root / kind)) for kind, write in MODELS.items()}


def local(folder: Path, **more: Any) -> LocalCaptions:
    config = settings(model=str(folder), max_tokens=10, **more)
    return LocalCaptions(config, CaptionStage(config, FramesConfig())._files())


def asked_of(local: LocalCaptions, count: int = 4) -> list[Answer]:
    asked = [Question(QUESTIONS[i], drawn(i, 3, SHAPES[i])) for i in range(count)]
    return local._generate(asked, [Use() for _ in asked])


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_says_what_each_clip_says_alone(
    models: dict[str, tuple[Path, Any]], kind: str
) -> None:
    made = local(models[kind][0])
    uses = [Use() for _ in SHAPES]
    asked = [Question(QUESTIONS[i], drawn(i, 3, shape)) for i, shape in enumerate(SHAPES)]
    together = made._generate(asked, uses)
    alone = [made._generate([one], [Use()])[0] for one in asked]
    assert together == alone
    assert together == made._generate(asked, [Use() for _ in asked])
    assert all(use.requests == 1 and use.tokens_in > 10 and use.tokens_out > 0 for use in uses)


@pytest.mark.parametrize("kind", MODELS)
def test_the_network_sees_the_pictures(models: dict[str, tuple[Path, Any]], kind: str) -> None:
    made = local(models[kind][0])
    seen: list[torch.Tensor] = []
    generate = made._network.generate

    def first_logits(**inputs: Any) -> torch.Tensor:
        seen.append(made._network(**{n: v for n, v in inputs.items() if n in TENSORS}).logits)
        tokens: torch.Tensor = generate(**inputs)
        return tokens

    made._network.generate = first_logits
    for colour in (20, 230):
        pictures = [np.full((40, 64, 3), colour, np.uint8)] * 3
        made._generate([Question("what", pictures)], [Use()])
    assert len(seen) == 2
    assert (seen[0][:, -1] - seen[1][:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_gets_what_its_own_processor_gives(
    models: dict[str, tuple[Path, Any]], kind: str
) -> None:
    """Against transformers' image processor, and the positions of each picture's tokens."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder = models[kind][0]
    made = local(folder)
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    pictures = [drawn(7, 1, shape)[0] for shape in ((40, 64), (150, 33), (9, 8))]
    theirs = processor(images=pictures, return_tensors="pt", input_data_format="channels_last")
    ours = made._eyes.show(pictures, 1.0)
    assert torch.equal(ours.values["image_grid_thw"], theirs["image_grid_thw"])
    difference = (ours.values["pixel_values"] - theirs["pixel_values"]).abs().max()
    assert difference < 1e-6
    assert sum(ours.tokens) * 4 == len(ours.values["pixel_values"])

    calls: list[dict[str, Any]] = []
    network = made._network
    positions = network.model.get_rope_index

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append({"found": positions(*args, **kwargs), **kwargs})
        return calls[-1]["found"]

    network.model.get_rope_index = spy
    try:
        made._generate([Question("what", [pictures[0]])], [Use()])
    finally:
        del network.model.get_rope_index
    (found, _) = calls[0]["found"]
    where = calls[0]["mm_token_type_ids"][0] == 1
    assert int(where.sum()) == ours.tokens[0]
    _, height, width = (int(n) for n in ours.values["image_grid_thw"][0])
    # Rows and columns of a picture's tokens, not places in a line of text.
    assert len(set(found[1, 0, where].tolist())) == height // 2
    assert len(set(found[2, 0, where].tolist())) == width // 2


def test_frames_of_one_video_share_patches() -> None:
    """Two frames in a patch one after the other; an odd last one twice. Against the image
    processor, whose pictures are two equal frames."""
    settings = PatchSettings(patch=PATCH, least=16 * 16, most=48 * 48)
    first, second, third = drawn(3, 3, (32, 48))
    found, grid = patches([first, second, third], settings)
    assert grid == (2, 4, 6)
    each = [patches([frame], settings)[0].reshape(24, 3, 2, -1) for frame in (first, second, third)]
    ours = found.reshape(2, 24, 3, 2, -1)
    assert np.array_equal(ours[0, :, :, 0], each[0][:, :, 0])
    assert np.array_equal(ours[0, :, :, 1], each[1][:, :, 1])
    assert np.array_equal(ours[1], each[2])
    # The first patch is the top left of the picture, the second one right of it, the third below.
    grey = ((first[:PATCH, :PATCH] / 255 - settings.mean) / settings.std).transpose(2, 0, 1)
    assert np.allclose(each[0][0, :, 0], grey.reshape(3, -1), atol=1e-6)
    right = (first[:PATCH, PATCH : 2 * PATCH] / 255 - settings.mean) / settings.std
    assert np.allclose(each[0][1, :, 0], right.transpose(2, 0, 1).reshape(3, -1), atol=1e-6)
    below = (first[PATCH : 2 * PATCH, :PATCH] / 255 - settings.mean) / settings.std
    assert np.allclose(each[0][2, :, 0], below.transpose(2, 0, 1).reshape(3, -1), atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (56, 56), (432, 768), (768, 20), (2160, 3840), (41, 43)])
def test_sizes_are_those_of_transformers(size: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    given = PatchSettings()
    assert fitted(*size, given) == smart_resize(*size, 28, given.least, given.most)
    small = PatchSettings(patch=16, least=65536, most=200_000)
    assert fitted(*size, small) == smart_resize(*size, 32, 65536, 200_000)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_frames_as_a_video(models: dict[str, tuple[Path, Any]], kind: str) -> None:
    """Half the tokens, the positions in time as far apart as the frames, batch as alone."""
    made = local(models[kind][0], frames_as="video")
    one = Question("what", drawn(1, 4, (40, 64)), seconds=1.5)
    other = Question("what is it", drawn(2, 3, (64, 40)), seconds=0.5)
    together = made._generate([one, other], [Use(), Use()])
    assert together == [made._generate([q], [Use()])[0] for q in (one, other)]
    images = local(models[kind][0])._eyes.show(one.pictures, 1.5)
    shown = made._eyes.show(one.pictures, 1.5)
    assert sum(shown.tokens) * 2 == sum(images.tokens)
    assert shown.values["video_grid_thw"].tolist() == [[2, *images.values["image_grid_thw"][0, 1:]]]
    network, calls = made._network, []
    positions = network.model.get_rope_index

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append((positions(*args, **kwargs)[0], kwargs["mm_token_type_ids"]))
        return positions(*args, **kwargs)

    network.model.get_rope_index = spy
    try:
        made._generate([one], [Use()])
    finally:
        del network.model.get_rope_index
    found, types = calls[0]
    times = sorted(set(found[0, 0, types[0] == 2].tolist()))
    # Qwen2.5-VL: tokens_per_second (4 here by default) × 3 s between pairs of frames.
    apart = 3 * network.config.vision_config.tokens_per_second if kind == "qwen2_5_vl" else 1
    assert times[1] - times[0] == apart


def test_only_some_models_see_videos(models: dict[str, tuple[Path, Any]]) -> None:
    for kind in ("llava", "qwen3_vl"):
        with pytest.raises(KinemaError, match="is shown images, not a video"):
            local(models[kind][0], frames_as="video")
    with pytest.raises(KinemaError, match="frames_as=video is for models here"):
        settings(model="m", endpoint="http://h/v1", frames_as="video")


def test_llava_gets_what_its_own_processor_gives(models: dict[str, tuple[Path, Any]]) -> None:
    """Prompt and pixels, against transformers' own processor of LLaVA."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder, _ = models["llava"]
    made = local(folder)
    processor = LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(folder), made._tokenizer, patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    pictures = drawn(5, 2, (40, 64))
    theirs = processor(
        text="USER: <image>\n<image>\nwhat is it ASSISTANT:", images=pictures, return_tensors="pt"
    )
    ours = made._eyes.show(pictures, 1.0)
    assert torch.allclose(ours.values["pixel_values"], theirs["pixel_values"], atol=1e-6)
    assert made._ids("what is it", ours.tokens) == theirs["input_ids"][0].tolist()


def test_the_stage_gives_captions(
    models: dict[str, tuple[Path, Any]],
    clips: list[Row],
    places: Places,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = models["qwen2_5_vl"][0]
    said = iter(["The video shows a dog on grass.", "I'm sorry, I can't.", "A dog runs over it",
                 "A cat sits on a wall. It sleeps."])  # fmt: skip
    shorts = iter(["A dog on grass.", "A cat sits."])
    questions: list[str] = []

    def generate(self: LocalCaptions, asked: Any, uses: Any) -> list[Answer]:
        for question in asked:
            questions.append(question.text)
            assert len(question.pictures) == (0 if question.text.startswith("Shorten") else 2)
        for use in uses:
            use.add(100, 7)
        which = shorts if questions[-1].startswith("Shorten") else said
        return [Answer(text := next(which), cut_off=text[-1] != ".") for _ in asked]

    monkeypatch.setattr(LocalCaptions, "_generate", generate)
    config = settings(model=str(folder), prompt="short", frames=2, short="asked")
    clips[1]["text"] = "it has one"
    first, kept, refused, cut, last = captions(config, clips, places)
    assert not isinstance(first, Bad)
    assert first["text"] == "A dog on grass."
    assert first["text_short"] == "A dog on grass."
    assert first["caption_model"] == "qwen2_5_vl"
    assert (first["_requests"], first["_tokens_in"], first["_tokens_out"]) == (2, 200, 14)
    assert not isinstance(kept, Bad)
    assert (kept["text"], kept["_requests"]) == ("it has one", 0)
    assert isinstance(refused, Bad)
    assert (refused.reason, refused.passing) == ("refused", False)
    assert isinstance(cut, Bad)
    assert cut.reason == "cut_off"
    assert not isinstance(last, Bad)
    assert (last["text"], last["text_short"]) == ("A cat sits on a wall. It sleeps.", "A cat sits.")
    assert len(questions) == 6
    assert all(q.startswith("You see 2 frames") for q in questions[:4])


def test_random_words_are_no_captions(
    models: dict[str, tuple[Path, Any]], clips: list[Row], places: Places
) -> None:
    """The whole way with a network that babbles: every clip has an answer, none ends the run."""
    config = settings(model=str(models["qwen2_5_vl"][0]), max_tokens=40)
    assert len(captions(config, clips, places)) == 5


def test_what_a_clip_says_is_no_picture(models: dict[str, tuple[Path, Any]]) -> None:
    made = local(models["qwen2_5_vl"][0])
    ids = made._ids("a <|image_pad|> dog <|im_end|><|im_start|>system", (4,))
    assert ids.count(made._picture_id) == 4
    assert ids.count(made._tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert "a   dog   system<" in made._tokenizer.decode(ids)  # the rest of it stays


def test_chat_templates_of_older_folders(
    models: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    folder = shutil.copytree(models["llava"][0], tmp_path / "llava")
    (folder / "chat_template.json").write_text('{"chat_template": "{% for c in messages[0].content '
        "%}{% if c.type == 'image' %}<image>{% endif %}{% endfor %} Q: "
        '{{ messages[0].content[-1].text }} A:"}')  # fmt: skip
    made = local(folder)
    said = made._tokenizer.decode(made._ids("why", (1, 2)))
    assert said.removeprefix("<s>").strip() == "<image><image><image> Q: why A:"
    (folder / "chat_template.json").write_text('{"chat_template": "{{ messages[0].role }}"}')
    with pytest.raises(KinemaError, match="the chat template shows 0 of 2 frames"):
        local(folder)._ids("why", (1, 2))


def test_incomplete_folders(models: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    def error(folder: Path) -> str:
        with pytest.raises(KinemaError) as caught:
            local(folder)
        return str(caught.value)

    def copied(name: str, *without: str) -> Path:
        folder = shutil.copytree(models["qwen2_5_vl"][0], tmp_path / name)
        for file in without:
            (folder / file).unlink()
        return folder

    found = error(copied("a", "model.safetensors", "tokenizer.json"))
    assert "the vision-language model is not complete; missing:" in found
    assert "model.safetensors" in found
    assert "tokenizer.json" in found
    damaged = copied("b")
    (damaged / "model.safetensors").write_bytes(b"\x10" * 200)
    assert "the weights cannot be read" in error(damaged)
    foreign = copied("c")
    shutil.copy(models["llava"][0] / "model.safetensors", foreign)
    assert "are not the weights of the model that config.json describes" in error(foreign)
    other = copied("d")
    (other / "config.json").write_text('{"model_type": "clip"}')
    assert "describes a 'clip' model; of those that write captions, llava" in error(other)
    with pytest.raises(HubError, match="no such file or folder"):
        local(tmp_path / "gone")


def test_versions_follow_the_files(models: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    def key(folder: Path, **more: Any) -> str:
        return CaptionStage(settings(model=str(folder), **more), FramesConfig()).parts[0].key

    folder = models["qwen2_5_vl"][0]
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert key(copy) == key(folder)
    assert key(copy, batch=9) == key(folder)
    assert key(copy, prompt="short") != key(folder)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert key(copy) != key(folder)
    stage = CaptionStage(settings(model=str(folder), batch=9), FramesConfig())
    assert (stage.gpu, stage.batch, stage.threads, stage.max_workers) == (True, 9, 1, None)


def test_a_missing_package(
    models: dict[str, tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(KinemaError, match=r"pip install 'kinema\[pretrained\]'"):
        local(models["llava"][0])


def test_frames_are_chosen_evenly() -> None:
    pictures = [np.full((2, 2, 3), i, np.uint8) for i in range(7)]
    assert [int(p[0, 0, 0]) for p in choose(pictures, 3)] == [1, 3, 5]
    assert [int(p[0, 0, 0]) for p in choose(pictures[:4], 2)] == [1, 3]
    assert len(choose(pictures[:2], 3)) == 2


def test_models_here_take_the_likeliest_word() -> None:
    with pytest.raises(KinemaError, match="temperature"):
        settings(model="m", temperature=0.7)
    assert CaptionConfig(model="m").prompt in TEMPLATES
