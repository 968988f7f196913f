"""Each way as references and a mask strategy, and what contradicts itself."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from kinema.diffusion.config import IDDPMConfig
from kinema.generation.config import GenerateRequest, PipelineConfig, TextComponent, VAEComponent
from kinema.generation.references import plan_references
from kinema.generation.ways import Conditions, WayError, Ways, check_ways, conditions
from kinema.models.config import (
    ClassTextConfig,
    ImageVAEConfig,
    LatteConfig,
    PixArtConfig,
    STDiT2Config,
    STDiT3Config,
    STDiTConfig,
    T5TextConfig,
    VideoVAEConfig,
)
from tests.unit.generation.test_references import config
from tests.unit.media.clips import pictures, write_clip

FRAMES = 51
"""15 latent frames."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    Image.fromarray(pictures(1)[0]).save(folder / "image.png")
    write_clip(folder / "long.mp4", pictures(40))
    write_clip(folder / "short.mp4", pictures(9))
    return {p.stem: str(p) for p in sorted(folder.iterdir())}


# With 1.2's autoencoder: the image is 1 latent frame, `long` 10 and `short` 3; 5 are taken over.
WAYS: list[tuple[dict[str, Any], int, list[str], str]] = [
    ({"image": "image"}, 1, ["image"], "0,0,0,0,1,0"),
    ({"image": "image"}, 3, ["image"], "0,0,0,0,1,0"),
    ({"edit": "long", "edit_strength": 0.7}, 1, ["long"], "0,0,0,0,10,0.7"),
    ({"edit": "long"}, 1, ["long"], "0,0,0,0,10,0.4"),
    ({"extend": "long"}, 1, ["long"], "0,0,-5,0,5,0"),
    ({"extend": "short"}, 1, ["short"], "0,0,-3,0,3,0"),
    ({"extend_back": "long"}, 1, ["long"], "0,0,0,-5,5,0"),
    ({"extend_back": "long"}, 3, ["long"], "2,0,0,-5,5,0"),
    ({"connect": ("image", "long")}, 1, ["image", "long"], "0,0,-1,0,1,0;0,1,0,-5,5,0"),
    ({"connect": ("long", "image")}, 2, ["long", "image"], "0,0,-5,0,5,0;1,1,0,-1,1,0"),
    ({"make_loop": "long"}, 1, ["long"], "0,0,-5,0,5,0;0,0,0,-5,5,0"),
    ({"make_loop": "image"}, 2, ["image"], "0,0,-1,0,1,0;1,0,0,-1,1,0"),
]


def resolve(way: dict[str, Any], files: dict[str, str]) -> dict[str, Any]:
    def path(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(files[v] for v in value)
        return files[value] if isinstance(value, str) else value

    return {name: path(value) for name, value in way.items()}


@pytest.mark.parametrize(("way", "loop", "references", "strategy"), WAYS)
def test_ways_are_references_and_a_strategy(
    way: dict[str, Any], loop: int, references: list[str], strategy: str, files: dict[str, str]
) -> None:
    settings = config(condition_frame_length=5)
    made = conditions(resolve(way, files), settings, num_frames=FRAMES, loop=loop)
    assert made == Conditions(tuple(files[r] for r in references), strategy)
    # What a way makes is never refused.
    plan_references(
        GenerateRequest(
            prompt="a", width=48, height=32, num_frames=FRAMES, loop=loop,
            references=made.references, mask_strategy=made.mask_strategy,
        ),
        settings,
    )  # fmt: skip


def test_every_way_is_tried() -> None:
    assert {name for way, *_ in WAYS for name in way} == Ways.__annotations__.keys()


def test_the_length_taken_from_a_video_can_be_said(files: dict[str, str]) -> None:
    made = conditions(
        {"extend": files["long"]}, config(), num_frames=FRAMES, condition_frame_length=2
    )
    assert made is not None
    assert made.mask_strategy == "0,0,-2,0,2,0"


def test_editing_goes_on_over_segments(files: dict[str, str]) -> None:
    # 40 latent frames over segments of 16 that share 4: they begin at 0, 12, 24, 36.
    made = conditions({"edit": files["long"]}, config(ImageVAEConfig()), num_frames=16, loop=5)
    assert made is not None
    assert made.mask_strategy == ";".join(
        ["0,0,0,0,16,0.4", "1,0,12,0,16,0.4", "2,0,24,0,16,0.4", "3,0,36,0,4,0.4"]
    )


@pytest.mark.parametrize(
    ("way", "num_frames", "align", "hint"),
    [
        ({"extend": "long"}, 17, None, "--num-frames 34 or more, or --condition-frame-length 4"),
        ({"extend_back": "long"}, 17, 5, "--num-frames 34 or more, or --condition-frame-length 4"),
        ({"make_loop": "long"}, 34, 5, "--num-frames 51 or more"),
        ({"make_loop": "long"}, 34, None, "--num-frames 51 or more, or --condition-frame-length 4"),
        ({"connect": ("image", "image")}, 1, None, "--num-frames 9 or more"),
    ],
)
def test_a_clip_that_its_files_would_fill_is_refused(
    way: dict[str, Any], num_frames: int, align: int | None, hint: str, files: dict[str, str]
) -> None:
    with pytest.raises(WayError, match="nothing would be new") as caught:
        conditions(resolve(way, files), config(align=align), num_frames=num_frames)
    assert caught.value.hint == hint
    longer = int(hint.split()[1])
    assert conditions(resolve(way, files), config(align=align), num_frames=longer) is not None
    if "length" in hint:
        length = int(hint.split()[-1])
        assert conditions(
            resolve(way, files), config(), num_frames=num_frames, condition_frame_length=length
        )
    # With several segments the rest is new.
    assert conditions(resolve(way, files), config(), num_frames=num_frames, loop=2) is not None


def test_no_way_is_none() -> None:
    assert conditions({"image": None, "edit_strength": None}, config(), num_frames=17) is None


@pytest.mark.parametrize(
    ("ways", "message"),
    [
        ({"image": "a.png", "extend_back": "b.mp4"}, "--image and --extend-back contradict"),
        ({"edit_strength": 0.5}, "no effect without --edit"),
        ({"image": "a.png", "edit_strength": 0.5}, "no effect without --edit"),
        ({"animate": "a.png"}, "no way 'animate'"),
        ({"connect": ("a.png",)}, "1 given; two are connected"),
    ],
)
def test_ways_that_contradict_are_refused(ways: dict[str, Any], message: str) -> None:
    with pytest.raises(WayError, match=message):
        conditions(ways, config(), num_frames=17)


def pipeline(model: Any, diffusion: Any = None) -> PipelineConfig:
    text: Any = ClassTextConfig(num_classes=101)
    if not isinstance(model, LatteConfig):
        text = T5TextConfig(max_tokens=model.model_max_length)
    return PipelineConfig(
        model=model,
        vae=VAEComponent(config=ImageVAEConfig()),
        text=TextComponent(config=text),
        diffusion=diffusion or IDDPMConfig(),
    )


def test_models_without_frame_masks_say_which_have_them() -> None:
    for able in (STDiTConfig(), STDiT2Config()):
        check_ways(pipeline(able))
    check_ways(config(VideoVAEConfig()))
    for unable in (PixArtConfig(), LatteConfig()):
        with pytest.raises(WayError, match=f"type {unable.type} .* cannot be given frames") as e:
            check_ways(pipeline(unable))
        assert "stdit3" in str(e.value.hint)
    assert STDiT3Config().uses_frame_mask


def test_dpm_solver_cannot_keep_frames() -> None:
    solver = pipeline(STDiT2Config(), IDDPMConfig(sampler="dpm-solver"))
    with pytest.raises(WayError, match="dpm-solver cannot keep frames"):
        check_ways(solver)
    check_ways(solver, "iddpm")
    with pytest.raises(WayError, match="dpm-solver"):
        check_ways(pipeline(STDiT2Config()), "dpm-solver")
