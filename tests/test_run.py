"""run.py: which tests its arguments choose, on which Python."""

import os
import sys

import pytest
import rig
import run

FOUND = [((3, 6, 15), "a"), ((3, 11, 2), "b"), ((3, 11, 7), "c"), ((3, 13, 1), "d")]


@pytest.mark.parametrize("version, paths", [(None, ["a", "d"]), ("3.6", ["a"]), ("3.11", ["c"]), ("3.13", ["d"])])
def test_the_oldest_and_the_newest_python_are_used_or_the_one_that_is_asked_for(version, paths):
    assert [path for _, path in run.under_test(FOUND, version)] == paths


def test_one_python_alone_is_oldest_and_newest():
    assert run.under_test(FOUND[:1], None) == FOUND[:1]


@pytest.mark.parametrize("words", [["--python", "3.6", "a", "-x"], ["a", "--python=3.6", "-x"]])
def test_the_version_may_stand_anywhere(words):
    assert run.version_in(words) == ("3.6", ["a", "-x"])


def test_files_folders_and_tests_are_told_from_what_pytest_is_told():
    words = ["tests/test_run.py::test_x", "-k", "a/b.py", "tests/test_run.py", "--maxfail", "1", "-x"]
    assert run.chosen(words) == (
        {"tests/test_run.py": ["tests/test_run.py::test_x", "tests/test_run.py"]},
        ["-k", "a/b.py", "--maxfail", "1", "-x"],
    )
    assert "tests/test_run.py" in run.chosen(["tests"])[0]
    assert run.chosen([])[0] == run.chosen(["tests"])[0]


@pytest.mark.parametrize(
    "words, line",
    [
        (["--python", "2.7"], "--python 2.7: there is no such Python here; found: 3."),
        (["--python"], "--python: expected a version, such as 3.6"),
        (["--python", "tests/test_run.py"], "--python tests/test_run.py: expected a version, such as 3.6"),
        (["--python=", "3.6"], "--python: expected a version, such as 3.6"),
        (["tests/test_nowhere.py"], "tests/test_nowhere.py: there are no such tests"),
        (["tests/test_nowhere.py::test_x"], "tests/test_nowhere.py::test_x: there are no such tests"),
        (["nowhere/"], "nowhere/: there are no such tests"),
    ],
)
def test_an_argument_that_cannot_be_followed_is_told_in_one_line(words, line):
    done = rig.run(sys.executable, os.path.join(rig.TESTS, "run.py"), *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("run.py: " + line) and done.stderr.count("\n") == 1
