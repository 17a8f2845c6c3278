"""Paths that tables name stay within the folder of the table."""

import pytest

from xmc_jax.files import paths


@pytest.fixture
def folder(tmp_path):
    """A folder with files and links, and a secret beside it."""
    folder = tmp_path / "table"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.png").touch()
    (folder / "to_inner").symlink_to(folder / "inner")
    (tmp_path / "secret").touch()
    (tmp_path / "table-2").mkdir()
    (folder / "to_secret").symlink_to(tmp_path / "secret")
    (folder / "to_parent").symlink_to("..")
    return folder


@pytest.mark.parametrize("name", ["inner/a.png", "./inner/../inner/a.png", "to_inner/a.png"])
def test_a_path_within_the_folder_is_returned_without_its_links(folder, name):
    assert paths.within(folder, name) == (folder / "inner" / "a.png").resolve()


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../secret", "to_secret", "to_parent/secret", "../table-2", "inner/../../x"],
)
def test_a_path_that_leaves_the_folder_is_refused_unless_allowed(folder, name):
    with pytest.raises(ValueError, match=r"expected a path within the folder.*allow_paths"):
        paths.within(folder, name)
    assert paths.within(folder, name, allow=True) == folder / name


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_text_that_is_no_path_is_refused(folder, name, allow):
    with pytest.raises(ValueError, match="not a path"):
        paths.within(folder, name, allow)


def test_an_absolute_path_within_the_folder_is_taken(folder):
    there = folder / "inner" / "a.png"
    assert paths.within(folder, str(there)) == there.resolve()
