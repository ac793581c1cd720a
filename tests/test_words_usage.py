"""What is said of a command line that cannot be read, and what is accepted in forms that ssh has, too."""

import pytest
from rig import product
from rig.product import Destination, Fatal

KERNEL, LINK = "/opt/14.1/WolframKernel", "53994@127.0.0.1,39359@127.0.0.1"


def told(*argv):
    with pytest.raises(Fatal) as caught:
        product.parse_arguments(product.CONTROLLER, list(argv))
    assert caught.value.code == 2 and "\n" not in caught.value.text
    return caught.value.text


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--check", "host", KERNEL, "--via", "srun"], ["too many", "options stand before the host"]),
        (
            ["--check", "host", "/opt/Wolfram", "Research/math"],
            ["too many", "a path with spaces stands in quotes"],
        ),
        (["--check", "host", KERNEL, "--share"], ["too many", "options stand before the host"]),
        (["--check", "--relay", "60", "host", KERNEL], ["--relay=60"]),
        (["--relay", "60", "host", KERNEL, LINK], ["--relay=60"]),
        (["--via", "srun", "-n1", "host", KERNEL, LINK], ["quote the whole COMMAND"]),
        (["--check", "--via", "srun", "-n1", "-u", "host", KERNEL], ["quote the whole COMMAND"]),
        (["--check", "--via", "\u201csrun", "-n1\u201d", "host", KERNEL], ["typographic"]),
        (["-p", "22", "host", KERNEL, LINK], ["-o Port="]),
        (["-p22", "host", KERNEL, LINK], ["-o Port="]),
        (["-J", "gate", "host", KERNEL, LINK], ["-o ProxyJump="]),
        (["-i", "key", "host", KERNEL, LINK], ["-o IdentityFile="]),
        (["-l", "john", "host", KERNEL, LINK], ["-o User="]),
        (["host", KERNEL], ["link_name is missing", "to try it by hand", "--check"]),
        (["--check", "host"], ["kernel_path is missing"]),
    ],
)
def test_the_mistake_that_a_command_line_looks_like_is_named(argv, words):
    line = told(*argv)
    assert all(word in line for word in words), line


def test_no_line_on_a_command_line_repeats_a_password():
    assert "secret" not in told("--check", "john:secret@host", KERNEL, "john:secret@host", "--via", "secret")


@pytest.mark.parametrize(
    "text, parts",
    [
        ("ssh://john@host:22", ("john", None, "host", 22)),
        ("ssh://host", (None, None, "host", None)),
        ("ssh://john@[::1]:2222/", ("john", None, "::1", 2222)),
    ],
)
def test_ssh_s_own_form_of_a_destination_is_accepted(text, parts):
    there = Destination.parse(text)
    assert (there.user, there.password, there.host, there.port) == parts
