"""Every flag of `kinema generate` reaches the request, the pipeline or the files: none is idle."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from kinema.cli.main import app
from kinema.config.errors import KinemaError
from kinema.generation.config import GenerateRequest
from kinema.generation.pipeline import Pipeline
from tests.unit.generation.tiny import write_run
from tests.unit.media.clips import pictures, write_clip


@dataclass
class Call:
    """What a command would have generated."""

    pipeline: Pipeline
    requests: list[GenerateRequest]
    batch_size: int
    printed: str = ""
    names: list[str] = field(default_factory=list)

    @property
    def request(self) -> GenerateRequest:
        return self.requests[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a family, written when it is first asked for."""
    found: dict[str, Path] = {}

    def run(family: str) -> Path:
        if family not in found:
            found[family] = write_run(tmp_path_factory.mktemp(family), family)
        return found[family]

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    Image.fromarray(pictures(1)[0]).save(folder / "a.png")
    Image.fromarray(pictures(3)[2]).save(folder / "b.png")
    write_clip(folder / "v.mp4", pictures(40))
    return folder


@pytest.fixture
def generate(
    runs: Callable[[str], Path], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Call]:
    """Run the command in the folder of `files`, up to the point where weights would be read."""
    monkeypatch.chdir(files)

    def run(*arguments: str, family: str = "stdit3", prompt: str | None = "a kite") -> Call:
        calls: list[Call] = []
        names: list[str] = []

        def instead(self: Pipeline, requests: Any, *, batch_size: int, **_: Any) -> Iterator[None]:
            calls.append(Call(self, list(requests), batch_size))
            return iter(())

        from kinema.generation import ranks

        choose = ranks.choose_names

        def remember(*given: Any, **options: Any) -> list[Path]:
            chosen = choose(*given, **options)
            names.extend(path.name for path in chosen)
            return chosen

        monkeypatch.setattr(Pipeline, "generate_all", instead)
        monkeypatch.setattr(ranks, "choose_names", remember)
        given = ["generate", "--ckpt-path", str(runs(family)), "--save-dir", str(tmp_path)]
        given += [] if prompt is None else ["--prompt", prompt]
        result = CliRunner().invoke(app, [*given, *arguments])
        monkeypatch.undo()
        monkeypatch.chdir(files)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        if not calls:
            return Call(None, [], 0, result.output)  # type: ignore[arg-type]
        calls[0].printed, calls[0].names = result.output, names
        return calls[0]

    return run


# Arguments, the field of the request that they set, and its value.
FIELDS: list[tuple[list[str], str, Any]] = [
    (["--size", "64x48"], "width", 64),
    (["--size", "64x48"], "height", 48),
    (["--resolution", "144p"], "width", 256),
    (["--resolution", "144p", "--aspect-ratio", "9:16"], "width", 144),
    (["--resolution", "144p", "--aspect-ratio", "9:16"], "height", 256),
    (["--resolution", "144p", "--aspect-ratio", "1:1"], "height", 192),
    (["--num-frames", "34"], "num_frames", 34),
    (["--num-frames", "4s"], "num_frames", 34),
    (["--num-frames", "2s", "--fps", "24"], "num_frames", 51),
    (["--fps", "12"], "fps", 12.0),
    (["--negative-prompt", "blurred"], "negative_prompt", "blurred"),
    (["--image", "a.png"], "references", ("a.png",)),
    (["--animate", "a.png"], "mask_strategy", "0,0,0,0,1,0"),
    (["--edit", "v.mp4"], "mask_strategy", "0,0,0,0,5,0.4"),
    (["--edit", "v.mp4", "--edit-strength", "0.7"], "mask_strategy", "0,0,0,0,5,0.7"),
    (["--extend", "v.mp4", "--num-frames", "34"], "mask_strategy", "0,0,-5,0,5,0"),
    (["--extend-back", "v.mp4", "--num-frames", "34"], "mask_strategy", "0,0,0,-5,5,0"),
    (["--connect", "a.png", "--connect", "b.png"], "references", ("a.png", "b.png")),
    (["--connect", "a.png,b.png"], "references", ("a.png", "b.png")),
    (["--make-loop", "a.png"], "mask_strategy", "0,0,-1,0,1,0;0,0,0,-1,1,0"),
    (["--reference-path", "a.png;b.png", "--mask-strategy", "0;0,1,0,-1"], "references",
     ("a.png", "b.png")),
    (["--reference-path", "a.png", "--mask-strategy", "0,0,0,0,1,0.5"], "mask_strategy",
     "0,0,0,0,1,0.5"),
    (["--loop", "2", "--num-frames", "34"], "loop", 2),
    (["--loop", "2", "--num-frames", "51", "--condition-frame-length", "10"],
     "condition_frame_length", 10),
    (["--loop", "2", "--num-frames", "34", "--condition-frame-edit", "0.3"],
     "condition_frame_edit", 0.3),
    (["--aes", "5.5"], "aes", 5.5),
    (["--flow", "3"], "flow", 3.0),
    (["--camera-motion", "pan left"], "camera_motion", "pan left"),
    (["--num-sampling-steps", "7"], "num_sampling_steps", 7),
    (["--cfg-scale", "2.5"], "cfg_scale", 2.5),
    (["--seed", "9"], "seed", 9),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "name", "value"), FIELDS)
def test_flags_of_a_request(
    arguments: list[str], name: str, value: Any, generate: Callable[..., Call]
) -> None:
    assert getattr(generate(*arguments).request, name) == value
    assert getattr(generate().request, name) != value


def test_the_sampler_is_the_request_s(generate: Callable[..., Call]) -> None:
    assert generate(family="stdit2").request.sampler is None
    assert generate("--sampler", "dpm-solver", family="stdit2").request.sampler == "dpm-solver"


def test_flags_of_the_pipeline(generate: Callable[..., Call]) -> None:
    usual = generate().pipeline
    changed = generate(
        "--dtype", "bf16", "--vae-dtype", "fp32", "--offload", "phase", "--attention", "math",
        "--device", "cpu",
    ).pipeline  # fmt: skip
    assert (usual.dtype, usual.offload, usual.config.model.attention) == ("fp32", "none", "auto")
    assert (changed.dtype, changed.vae_dtype, changed.offload) == ("bf16", "fp32", "phase")
    assert changed.config.model.attention == "math"
    assert str(changed.device) == "cpu"


@pytest.mark.parametrize("flag", ["--compile", "--tiling"])
def test_switches_reach_the_pipeline(
    flag: str, generate: Callable[..., Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    make = Pipeline.from_pretrained

    def remember(*args: Any, **options: Any) -> Pipeline:
        given.append(options[flag.removeprefix("--")])
        return make(*args, **options)

    for arguments in ([], [flag]):
        with monkeypatch.context() as patch:
            patch.setattr(Pipeline, "from_pretrained", remember)
            try:
                generate(*arguments)
            except KinemaError:
                assert flag == "--compile"  # a machine without a compiler says so
    assert given == [False, True]


def test_samples_batches_and_names(generate: Callable[..., Call], tmp_path: Path) -> None:
    call = generate("--num-samples", "2", "--batch-size", "2", "--prompt", "a fish")
    assert [(r.prompt, r.sample) for r in call.requests] == [
        ("a kite", 0), ("a kite", 1), ("a fish", 0), ("a fish", 1)
    ]  # fmt: skip
    assert call.batch_size == 2
    assert call.names[:2] == ["a-kite-seed42.mp4", "a-kite-seed42-2.mp4"]
    named = generate("--sample-name", "v", "--num-samples", "2", "--prompt", "a fish")
    assert named.names == ["v_0000-0.mp4", "v_0000-1.mp4", "v_0001-0.mp4", "v_0001-1.mp4"]


def test_files_named_by_the_prompt_are_made_once(
    generate: Callable[..., Call], tmp_path: Path
) -> None:
    arguments = ("--prompt-as-path", "--prompt", "../a fish")
    assert generate(*arguments).names == ["a kite.mp4", "_._a fish.mp4"]
    (tmp_path / "a kite.mp4").touch()
    again = generate(*arguments)
    assert again.names == ["_._a fish.mp4"]
    assert "a kite.mp4 is there already: skipped" in again.printed
    (tmp_path / "_._a fish.mp4").touch()
    assert generate(*arguments).requests == []


def test_prompts_bring_their_own_references(generate: Callable[..., Call], tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,reference_path,mask_strategy\na fish,b.png,\na boat,,\n")
    call = generate(
        "--prompt", 'a cat{"reference_path": "v.mp4", "mask_strategy": "0,0,-1"}',
        "--prompt-path", str(file), prompt=None,
    )  # fmt: skip
    assert [(r.prompt, r.references, r.mask_strategy) for r in call.requests] == [
        ("a cat", ("v.mp4",), "0,0,-1"), ("a fish", ("b.png",), "0"), ("a boat", (), "")
    ]  # fmt: skip


def test_one_reference_for_all_prompts_or_one_each(generate: Callable[..., Call]) -> None:
    for given, want in (
        (["a.png"], ["a.png", "a.png"]),
        (["a.png", "b.png"], ["a.png", "b.png"]),
    ):
        flags = [part for path in given for part in ("--reference-path", path)]
        call = generate(*flags, "--mask-strategy", "0", "--prompt", "a fish")
        assert [r.references for r in call.requests] == [(path,) for path in want]


def test_what_may_surprise_is_told(generate: Callable[..., Call], files: Path) -> None:
    call = generate(
        "--image", "a.png", "--prompt", "one two three four five six seven eight nine", prompt=None
    )
    assert "a.png is 48x32; it is resized to cover 32x32 and cropped" in call.printed
    assert "this is lost: eight nine" in call.printed
    call = generate("--extend", "v.mp4", "--num-frames", "34")
    assert "v.mp4 has 40 frames; the autoencoder takes 34, the first 6" in call.printed
    assert "v.mp4 plays at 25 frames per second, the clip at 8" in call.printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "a.png", "--extend", "v.mp4"], "--image and --extend contradict"),
        (["--image", "a.png", "--reference-path", "b.png"], "contradict"),
        (["--edit-strength", "0.5"], "no effect without --edit"),
        (["--connect", "a.png"], "two images or videos are connected, not 1"),
        (["--mask-strategy", "0"], "needs a reference"),
        (["--reference-path", "a.png", "--mask-strategy", "0,0,0,9"], "target start 9"),
        (["--reference-path", "a.png", "--mask-strategy", "1"], "segment 1 is not there"),
        (["--reference-path", "none.png"], "no such file"),
        (["--image", "none.png"], "no such file"),
        (["--condition-frame-length", "5"], "no effect without several segments"),
        (["--condition-frame-edit", "0.5"], "no effect without several segments"),
        (["--loop", "2", "--num-frames", "34", "--condition-frame-length", "3"], "in steps of 5"),
        (["--loop", "2"], "nothing would be new"),
        (["--loop", "0"], "loop is 0"),
        (["--sampler", "dpm-solver"], "trained with rectified flow"),
        (["--negative-prompt", "x", "--cfg-scale", "1"], "no effect without guidance"),
        (["--aes", "high"], "'high' is no score"),
        (["--offline"], "no effect without --model"),
        (["--refine-model", "m"], "no effect without --refine"),
        (["--refine", "http://localhost:1"], "needs the language model's name"),
        (["--refine", "ftp://x", "--refine-model", "m"], "must be an http or https address"),
        (["--reference-path", "a.png"] * 3, "3 given for 1 prompt"),
        (["--prompt", "|0| a |1| b"], "only segment 0"),
        (["--dtype", "int3"], "dtype is 'int3'"),
        (["--offload", "some"], "offload"),
        (["--attention", "magic"], "attention is 'magic'"),
        (["--model", "opensora-1.3"], "is no released checkpoint"),
        (["--model", "opensora-1.2", "--no-ema"], "no effect with --model"),
    ],
)
def test_bad_flags_are_refused(
    arguments: list[str], message: str, generate: Callable[..., Call]
) -> None:
    with pytest.raises((KinemaError, ValueError), match=message):
        generate(*arguments)


def test_without_a_model_the_way_to_one_is_shown() -> None:
    result = CliRunner().invoke(app, ["generate", "--prompt", "a"])
    assert isinstance(result.exception, KinemaError)
    assert "--model opensora-1.2" in str(result.exception)


@pytest.mark.parametrize(
    ("prompt", "message"), [("10", "class 10"), ("-1", "class -1"), ("a cat", "'a cat'")]
)
def test_class_numbers_are_checked(
    prompt: str, message: str, generate: Callable[..., Call]
) -> None:
    assert generate(family="dit", prompt="9").request.prompt == "9"
    with pytest.raises(KinemaError, match=message) as caught:
        generate(family="dit", prompt=prompt)
    assert caught.value.where == "prompt"


@pytest.mark.parametrize("flag", [["--image", "a.png"], ["--loop", "2"]])
@pytest.mark.parametrize("family", ["dit", "latte", "pixart"])
def test_models_that_take_no_frames_name_those_that_do(
    family: str, flag: list[str], generate: Callable[..., Call]
) -> None:
    with pytest.raises(KinemaError, match="it cannot be given frames") as caught:
        generate(*flag, family=family, prompt="3")
    assert "1.0, 1.1 or 1.2" in str(caught.value.hint)


def test_dpm_solver_keeps_no_frames(generate: Callable[..., Call]) -> None:
    assert generate("--image", "a.png", family="stdit2").request.references == ("a.png",)
    with pytest.raises(KinemaError, match="dpm-solver cannot keep frames"):
        generate("--image", "a.png", "--sampler", "dpm-solver", family="stdit2")


def test_prompts_are_refined_and_the_original_is_kept(
    generate: Callable[..., Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    class Endpoint(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(self.headers["Authorization"])
            answer = f"richer {body['messages'][-1]['content']} by {body['model']}"
            reply = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Endpoint) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MY_KEY", "secret")
        call = generate(
            "--refine", f"http://127.0.0.1:{server.server_port}/v1", "--refine-model", "m",
            "--refine-key-env", "MY_KEY",
        )  # fmt: skip
        server.shutdown()
    assert (call.request.prompt, call.request.refined_from) == ("richer a kite by m", "a kite")
    assert seen == ["Bearer secret"]
    assert "secret" not in call.printed


def test_every_option_is_under_a_heading() -> None:
    command = typer.main.get_command(app).commands["generate"]  # type: ignore[attr-defined]
    loose = [
        param.name
        for param in command.params
        if param.name != "help" and getattr(param, "rich_help_panel", None) is None
    ]
    assert not loose
    text = CliRunner().invoke(app, ["generate", "--help"]).output
    assert text.index("What to make:") < text.index("--prompt ") < text.index("The model:")
