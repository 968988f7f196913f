from __future__ import annotations

import pytest

from kinema.generation.names import published_stem


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("a cat", "a cat"),
        ("../../etc/passwd", "_._.._etc_passwd"),
        (".hidden", "_hidden"),
        ("a\nb\0c\\d", "a_b_c_d"),
        ("凧" * 100, "凧" * 66),
    ],
)
def test_a_prompt_names_one_file_of_its_folder(prompt: str, stem: str) -> None:
    assert published_stem(number=0, prompt=prompt, prompt_as_path=True) == stem


def test_a_given_name_stays_in_its_folder_too() -> None:
    assert published_stem(number=7, prompt="a", sample_name="../v") == "_._v_0007"
    assert published_stem(number=7, prompt="a", num_samples=2, sample=1) == "sample_0007-1"
