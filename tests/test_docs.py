"""README and MANUAL say what is so: their commands are parsed, their lists compared with the code."""

import os
import re
import shlex

import pytest
import rig

import tunnel

LINK = "53994@127.0.0.1,39359@127.0.0.1"


def text_of(name):
    with open(os.path.join(rig.LAUNCHERS, name), encoding="utf-8") as stream:
        return stream.read()


MANUAL, README = text_of("MANUAL.md"), text_of("README.md")
LAUNCH_COMMANDS = re.findall(r'^    ("`userbaseDirectory`.*"`linkname`")$', MANUAL, re.MULTILINE)
TEMPLATES = re.findall(r"^\$RemoteCommand = (.*)$", MANUAL, re.MULTILINE)


def test_there_are_six_of_each():
    assert len(LAUNCH_COMMANDS) == len(set(LAUNCH_COMMANDS)) == 6
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 6


@pytest.mark.parametrize("command", LAUNCH_COMMANDS)
def test_launch_commands_are_understood(command):
    """As a shell reads them; backslashes in double quotes stay before ordinary letters."""
    words = shlex.split(command.replace("\\", "\\\\").replace("`linkname`", LINK))
    assert re.search(r"FrontEnd[/\\]tunnel\.(sh|bat)$", words[0])
    request = tunnel.parse_arguments(tunnel.CONTROLLER, words[1:])
    assert str(request.destination) == "john@host.example.com"
    windows = "C:\\" in command
    assert request.kernel.on_windows is windows
    assert request.kernel.version == ((10, 1) if "10.1" in command else None)


@pytest.mark.parametrize("template", TEMPLATES)
def test_command_templates_are_understood(template):
    """As the Wolfram Language makes them: strings joined by <>, with \\" and \\\\ in them."""
    parts = re.findall(r'"((?:[^"\\]|\\.)*)"|(\$UserBaseDirectory)', template)
    command = "".join("/base" if name else text.replace('\\"', '"').replace("\\\\", "\\") for text, name in parts)
    if "tunnel_sub.bat" in template:
        assert command.startswith('""')
        assert command.endswith('""')
        command = command[1:-1]  # as cmd.exe does
    command = command.replace("`1`", "john@host").replace("`2`", LINK)
    words = shlex.split(command.replace("\\", "\\\\"))
    request = tunnel.parse_arguments(tunnel.COMPUTE, words[1:])
    assert str(request.link) == LINK


def test_the_built_in_options_are_those_of_the_code():
    asked = tunnel.parse_arguments(tunnel.CONTROLLER, ["host", "/k/10.1/math", LINK])
    for name, value in tunnel.OpenSSH.defaults(asked):
        assert "`{}={}`".format(name, value) in MANUAL
    listed = re.search(r"The built-in options for OpenSSH are (.*?)\. `--dry-run`", MANUAL, re.DOTALL).group(1)
    assert len(re.findall("`[A-Za-z]+=", listed)) == len(tunnel.OpenSSH.defaults(asked))


def test_every_option_is_in_usage_manual_and_readme():
    options = set(re.findall(r"--[a-z-]+", tunnel.USAGE))
    assert options == {"--client", "--links", "--share", "--dry-run", "--check", "--version", "--help"}
    for option in options:
        assert option in MANUAL
        assert option in README


def test_times_and_numbers_are_those_of_the_code():
    assert "after {:.0f} s without a failure".format(tunnel.START_SECONDS) in MANUAL
    assert "ends {} s after its last kernel".format(tunnel.SHARE_SECONDS) in MANUAL
    assert "did not answer within {} s".format(tunnel.CONNECT_SECONDS) in MANUAL
    assert tunnel.TRIES == 5
    assert "up to five times" in MANUAL
    assert tunnel.NAMES_SECONDS == 300
    assert tunnel.VERSION in text_of("CHANGELOG.md")


def test_the_commands_of_the_readme_exist():
    for path in re.findall(r"^    python3 (\S+\.py)", README, re.MULTILINE):
        assert os.path.exists(os.path.join(rig.LAUNCHERS, path)), path
    assert "python3 tests/demo.py" in README
    assert "python3 tests/run.py" in README


def test_links_within_the_documents_lead_somewhere():
    for text in (MANUAL, README):
        headings = {
            re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", text, re.M)
        }
        for target in re.findall(r"\]\(#([^)]+)\)", text):
            assert target in headings
        for target in re.findall(r"\]\(([A-Z]+(?:\.md)?)\)", text):
            assert os.path.exists(os.path.join(rig.LAUNCHERS, target))


def test_lines_of_the_troubleshooting_table_are_said_by_the_code():
    with open(tunnel.__file__, encoding="utf-8") as stream:
        code = re.sub(r'"\s+"', "", stream.read())
    for line in re.findall(r"^\| ([a-z][^|]*) \| [^|]+ \|$", MANUAL.partition("| last line |")[2], re.MULTILINE):
        for part in line.replace("15 s", "").split("..."):
            assert part.strip() in code, part
