from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kinema.config.errors import ConfigError
from kinema.data.aspect import NAMED, aspect_names, resolution, size_for


def test_aspect_is_width_to_height_for_people() -> None:
    height, width = size_for("480p", "16:9")
    assert (height, width) == (480, 854)
    assert size_for("480p", "9:16") == (854, 480)
    assert size_for("512", "1:1") == (512, 512)
    assert size_for("480p", "32:18") == (480, 854)
    assert size_for("720p", "16:10") == size_for("720p", "8:5") == (758, 1212)


def test_every_aspect_offered_has_a_size_of_about_that_shape() -> None:
    for name in NAMED:
        for aspect in aspect_names(name):
            height, width = size_for(name, aspect)
            across, down = map(int, aspect.split(":"))
            # The published table calls a size of 27:56 "27:50"; the others are nearer.
            assert width / height == pytest.approx(across / down, rel=0.13), (name, aspect)


def test_sizes_of_a_resolution_have_about_its_area() -> None:
    for found in NAMED.values():
        areas = [h * w for h, w in found.sizes]
        assert min(areas) > 0.85 * found.pixels
        assert max(areas) < 1.1 * found.pixels


def test_explicit_size_has_one_aspect() -> None:
    found = resolution("64x48")
    assert (found.pixels, found.sizes) == (64 * 48, ((48, 64),))
    assert found.closest(np.array([10, 1000]), np.array([1000, 10])).tolist() == [0, 0]
    assert size_for("64x48") == (48, 64)
    with pytest.raises(ConfigError, match="leaves no choice"):
        size_for("64x48", "16:9")


@pytest.mark.parametrize("name", ["480", "480P", "0x64", "64x", "64x64x3", ""])
def test_unknown_resolution_names_the_known(name: str) -> None:
    with pytest.raises(ConfigError, match="480p"):
        resolution(name)


@pytest.mark.parametrize("aspect", ["16:11", "16:0", None, "x"])
def test_unknown_aspect_names_those_there_are(aspect: str | None) -> None:
    with pytest.raises(ConfigError, match="16:9"):
        size_for("720p", aspect)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from(sorted(NAMED)))
def test_closest_is_the_first_key_of_least_distance(height: int, width: int, name: str) -> None:
    found = NAMED[name]
    distances = [abs(key - height / width) for key in found.ratios]
    index = int(found.closest(np.array([height]), np.array([width]))[0])
    assert index == distances.index(min(distances))


def test_tie_goes_to_the_key_that_stands_first() -> None:
    # 3/4 lies exactly between 0.5 and 1.0, which are keys of a table made for this.
    from kinema.data.aspect import Resolution

    ascending = Resolution("a", 1, (0.5, 1.0), ((1, 2), (1, 1)))
    descending = Resolution("b", 1, (1.0, 0.5), ((1, 1), (1, 2)))
    assert ascending.closest(np.array([3]), np.array([4]))[0] == 0
    assert descending.closest(np.array([3]), np.array([4]))[0] == 0
