"""The pure parts: values, plans, prompts, quoting. Nothing here starts a process, but for real shells."""

import os
import random
import shutil
import subprocess

import pytest

import tunnel
from tunnel import Destination, Fatal, Kernel, LinkName

LINK = "53994@127.0.0.1,39359@127.0.0.1"
KERNEL = "/usr/local/Wolfram/Mathematica/10.1/Executables/MathKernel"


def request(*argv, role=tunnel.CONTROLLER):
    return tunnel.parse_arguments(role, list(argv))


@pytest.mark.parametrize(
    "text, user, password, host, port",
    [
        ("host", None, None, "host", None),
        ("host:2222", None, None, "host", 2222),
        ("john@host", "john", None, "host", None),
        ("john:secret@host", "john", "secret", "host", None),
        ("john:s:e@cr@t@host:22", "john", "s:e@cr@t", "host", 22),
        ("john:@host", "john", None, "host", None),
        ("[::1]:22", None, None, "::1", 22),
        ("[fe80::1%eth0]", None, None, "fe80::1%eth0", None),
        ("fe80::1", None, None, "fe80::1", None),
        ("John.Doe_2@My-Alias_1", "John.Doe_2", None, "My-Alias_1", None),
    ],
)
def test_destinations(text, user, password, host, port):
    there = Destination.parse(text)
    assert (there.user, there.password, there.host, there.port) == (user, password, host, port)


@pytest.mark.parametrize(
    "text",
    ["", "@", "@host", "john@", "host:", "host:0", "host:65536", "host:22x", "host:²", "-oProxyCommand=x", "a b"]
    + ["john@-x", "-x@host", "ho\nst", "[::1", "[::1]22", "[host]:22", "john:sec\nret@host", "host:000022"],
)
def test_bad_destinations_are_named_without_being_repeated(text):
    with pytest.raises(Fatal) as caught:
        Destination.parse(text)
    assert caught.value.code == 2
    assert caught.value.text.startswith("host: ")
    assert "\n" not in caught.value.text


def test_a_password_is_in_no_text_of_a_destination():
    there = Destination.parse("john:secret@host:22")
    assert "secret" not in repr(there) + str(there) + repr([there])
    assert str(there) == "john:***@host:22"


@pytest.mark.parametrize("text", ["john:secret@host:x", "john:secret", "john:secret@", "john:secret@[::1"])
def test_a_password_is_in_no_message_about_a_bad_destination(text):
    code, line = tunnel.guarded(lambda: request(text, KERNEL, LINK))
    assert code == 2
    assert "secret" not in line


@pytest.mark.parametrize(
    "text",
    [LINK, "1@host-1.example_x,65535@h", "40000@fe80::1,40001@fe80::1", "8000@::1,8001@::1"],
)
def test_link_names(text):
    assert str(LinkName.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "1@a", "1@a,2@b,3@c", "0@a,1@a", "1@a,65536@a", "x@a,2@a", "1@,2@a", "1@a b,2@a", "1@-a,2@a", "7@a,7@a"]
    + ["1@a;id,2@a", "1@a$x,2@a", "ClientName_1234", "1@ä,2@ä", "1@" + "a" * 300 + ",2@a"],
)
def test_bad_link_names(text):
    with pytest.raises(Fatal) as caught:
        LinkName.parse(text)
    assert caught.value.text.startswith("link_name: expected PORT@HOST,PORT@HOST")


@pytest.mark.parametrize(
    "path, version, switch, links",
    [
        (KERNEL, (10, 1), "-wstp", "classic"),
        ("/usr/local/Wolfram/Mathematica/9.0/Executables/MathKernel", (9, 0), "-mathlink", "classic"),
        ("/usr/local/Wolfram/Mathematica/11.0/Executables/WolframKernel", (11, 0), "-wstp", "classic"),
        ("/usr/local/Wolfram/Mathematica/11.1/Executables/WolframKernel", (11, 1), "-wstp", "callback"),
        ("/usr/local/Wolfram/Wolfram/14.1/Executables/WolframKernel", (14, 1), "-wstp", "callback"),
        ("/opt/mathematica-12.3.1/bin/MathKernel", (12, 3), "-wstp", "callback"),
        ("/opt/mathematica/13/bin/math", (13,), "-wstp", "callback"),
        ("/Applications/Mathematica 10.4.app/Contents/MacOS/WolframKernel", (10, 4), "-wstp", "classic"),
        ("/Applications/Mathematica.app/Contents/MacOS/MathKernel", None, "-mathlink", "callback"),
        ("/Applications/Wolfram.app/Contents/MacOS/WolframKernel", None, "-wstp", "callback"),
        ("C:\\Program Files\\Wolfram Research\\Mathematica\\8.0\\MathKernel.exe", (8, 0), "-mathlink", "classic"),
        ("C:\\Program Files\\Wolfram Research\\Wolfram\\14.1\\WolframKernel.exe", (14, 1), "-wstp", "callback"),
        ("WolframKernel", None, "-wstp", "callback"),
        ("/home/me/bin/math", None, "-mathlink", "callback"),
    ],
)
def test_what_a_kernel_path_says(path, version, switch, links):
    kernel = Kernel(path)
    assert (kernel.version, kernel.switch, kernel.links) == (version, switch, links)


@pytest.mark.parametrize("path", ["", " ", "/a\nb", "C:\\%ProgramFiles%\\math.exe", 'C:\\a"b\\math.exe'])
def test_bad_kernel_paths(path):
    with pytest.raises(Fatal) as caught:
        Kernel(path)
    assert caught.value.text.startswith("kernel_path: ")


@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "ksh", "zsh"])
def test_a_posix_shell_gets_the_kernel_path_as_it_was_given(shell, tmp_path):
    if not shutil.which(shell):
        shell = "sh"
    for path in ("/a b/$HOME/`id`/\"x\"/\\n/'q'/;&|<>*?!#~", "/ä/ß", "/$(touch x)/m"):
        script = "printf %s " + Kernel(path).quoted
        assert subprocess.check_output([shell, "-c", script], cwd=str(tmp_path)).decode() == path
    assert not os.listdir(str(tmp_path))
    for path in ("~/b $c/m", "$HOME/b $c/m"):
        script = "printf %s " + Kernel(path).quoted
        home = dict(os.environ, HOME="/my home")
        assert subprocess.check_output([shell, "-c", script], env=home).decode() == "/my home/b $c/m"


def test_a_windows_path_stands_in_quotes_untouched():
    path = "C:\\Program Files (x86)\\$Wolfram`\\14.1\\WolframKernel.exe"
    assert Kernel(path).quoted == '"{}"'.format(path)


def test_loopback_forms_are_what_inet_aton_reads():
    import socket

    for length in range(5, 60):
        text = tunnel.loopback_of(length)
        assert len(text) == length
        assert socket.inet_aton(text) == b"\x7f\0\0\1"
    assert tunnel.loopback_of(4) is None


def test_drawn_blocks_are_clear_of_ephemeral_ports_and_never_overlap_in_part():
    for _ in range(2000):
        data, message = tunnel.draw_ports()
        assert data % 10 == 0
        assert message == data + 1
        assert data >= 10000
        assert message + 8 < 32768


@pytest.mark.parametrize(
    "name, base, drawn", [("classic", 65531, False), ("classic", 65532, True), ("callback", 65528, True)]
)
def test_a_block_beyond_the_last_port_is_not_tried(name, base, drawn):
    asked = request("--links", name, "host", KERNEL, "{}@h,{}@h".format(base - 1, base))
    assert (tunnel.first_ports(asked) != (base - 1, base)) is drawn


def test_switchboard_ports_come_after_all_others():
    asked = request("--links", "callback", "host", KERNEL, LINK)
    plan = tunnel.Plan(asked, tunnel.first_ports(asked), (1001, 1002, 1003, 1004, 1005))
    assert [str(forward) for forward in plan.forwards] == [
        "127.0.0.1:53994:127.0.0.1:1001",
        "127.0.0.1:39359:127.0.0.1:39359",
        "127.0.0.1:53995:127.0.0.1:53995",
        "127.0.0.1:53996:127.0.0.1:53996",
        "127.0.0.1:53997:127.0.0.1:53997",
        "127.0.0.1:53998:127.0.0.1:53998",
        "127.0.0.1:53999:127.0.0.1:1002",
        "127.0.0.1:54000:127.0.0.1:1003",
        "127.0.0.1:54001:127.0.0.1:1004",
        "127.0.0.1:54002:127.0.0.1:1005",
    ]
    assert [forward.flag for forward in plan.forwards] == ["-R"] * 2 + ["-L"] * 4 + ["-R"] * 4


@pytest.mark.parametrize(
    "prompt, alone, answered",
    [
        ("john@host's password: ", False, True),
        ("(john@host) Password: ", False, True),
        ("(john@host) Password for john@host: ", False, True),
        ("(john@host) john's password: ", False, True),
        ("Password: ", True, True),
        ("Password: ", False, False),
        ("jane@host's password: ", True, False),
        ("john@jump's password: ", True, False),
        ("(john@jump) Password: ", True, False),
        ("(john@host) Verification code: ", True, False),
        ("(john@host) One-time password (OATH) for `john': ", True, False),
        ("(john@host) New password: ", True, False),
        ("Enter passphrase for key '/home/john/.ssh/id_rsa': ", True, False),
        ("Are you sure you want to continue connecting (yes/no/[fingerprint])? ", True, False),
        ("Enter john@host's old password: ", True, False),
        ("", True, False),
    ],
)
def test_only_the_password_prompt_of_this_login_is_answered(prompt, alone, answered):
    assert tunnel.is_password_prompt(prompt, "john", "host", alone) is answered


def test_long_names_in_prompts_are_cut_as_openssh_cuts_them():
    user, host = "u" * 40, "h" * 200
    assert tunnel.is_password_prompt("{}@{}'s password: ".format(user[:30], host[:128]), user, host, False)


def test_options_of_the_user_come_before_the_defaults():
    asked = request("-o", "ConnectTimeout=60", "-oStrictHostKeyChecking=yes", "host", KERNEL, LINK)
    words = tunnel.OpenSSH.login(asked)
    for mine, default in (
        ("ConnectTimeout=60", "ConnectTimeout=15"),
        ("StrictHostKeyChecking=yes", "StrictHostKeyChecking=accept-new"),
    ):
        assert words.index(mine) < words.index(default)


@pytest.mark.parametrize(
    "options, words",
    [
        ((), ["-A"]),
        (("-o", "ForwardAgent=no"), ["-a"]),
        (("-o", "Compression=yes"), ["-C", "-A"]),
        (("-o", "Port=2200"), ["-A", "-P", "2200"]),
        (("-o", "User=jane", "-o", "IdentityFile=C:\\k.ppk"), ["-A", "-l", "jane", "-i", "C:\\k.ppk"]),
    ],
)
def test_options_are_translated_for_plink(options, words):
    asked = request(*(options + ("host", KERNEL, LINK)), role=tunnel.COMPUTE)
    tunnel.Plink.check(asked)
    plan = tunnel.Plan(asked, tunnel.first_ports(asked), ())
    arguments = tunnel.Plink.arguments(asked, plan, "plink")
    assert arguments[:5] == ["-batch", "-v", "-ssh", "-x", "-t"]
    assert arguments[5 : arguments.index("-R")] == words


@pytest.mark.parametrize("option", ["ProxyJump=x", "Compression=maybe", "Port=x", "IdentityFile=-x"])
def test_options_that_plink_has_no_word_for_are_refused(option):
    with pytest.raises(Fatal) as caught:
        tunnel.Plink.check(request("-o", option, "host", KERNEL, LINK))
    assert caught.value.text.startswith("-o " + option.split("=")[0])


def test_quest_plink_stores_unknown_keys_itself():
    asked = request("host", KERNEL, LINK)
    plan = tunnel.Plan(asked, tunnel.first_ports(asked), ())
    assert "-auto_store_key_in_cache" in tunnel.Plink.arguments(
        asked, plan, "C:\\P\\Quest Software\\PuTTY\\plink.exe"
    )
    assert "-auto_store_key_in_cache" not in tunnel.Plink.arguments(asked, plan, "C:\\P\\PuTTY\\plink.exe")


def test_mathematica_libraries_are_taken_out_of_the_environment_and_nothing_else():
    libraries = "/opt/M/SystemFiles/Libraries/Linux-x86-64"
    environ = {"A": "1", "LD_LIBRARY_PATH": "/x:" + libraries + ":/y"}
    assert tunnel.client_environment(environ) == {"A": "1", "LD_LIBRARY_PATH": "/x:/y"}
    assert tunnel.client_environment({"LD_LIBRARY_PATH": libraries}) == {}
    assert tunnel.client_environment({"B": "2"}) == {"B": "2"}


@pytest.mark.parametrize(
    "argv, named",
    [
        ((), "host is missing"),
        (("host",), "kernel_path is missing"),
        (("host", KERNEL), "link_name is missing"),
        (("host", KERNEL, LINK, "x"), "too many arguments"),
        (("-z", "host", KERNEL, LINK), "-z: not known"),
        (("--clint", "ssh", "host", KERNEL, LINK), "--clint: not known"),
        (("-o",), "-o: a value"),
        (("-o", "Port", "host", KERNEL, LINK), "-o: expected NAME=VALUE"),
        (("-o", "Po rt=1", "host", KERNEL, LINK), "-o: expected NAME=VALUE"),
        (("--links", "some", "host", KERNEL, LINK), "--links: expected"),
        (("--client", "", "host", KERNEL, LINK), "--client: expected"),
        (("--share=x", "host", KERNEL, LINK), "--share: not known"),
    ],
)
def test_bad_arguments_are_named(argv, named):
    code, line = tunnel.guarded(lambda: request(*argv))
    assert code == 2
    assert named in line
    assert "\n" not in line


def test_a_client_is_looked_for_where_a_front_end_would_not(tmp_path):
    program = tmp_path / "plink"
    program.write_text("")
    program.chmod(0o755)
    assert tunnel.find_client(None, {"TUNNEL_SSH": str(program)}) == (str(program), tunnel.Plink)
    assert tunnel.find_client("plink", {"PATH": str(tmp_path)})[1] is tunnel.Plink
    path, kind = tunnel.find_client(None, {"PATH": ""})
    assert os.path.basename(path) == "ssh"
    assert kind is tunnel.OpenSSH
    with pytest.raises(Fatal) as caught:
        tunnel.find_client(str(tmp_path / "none"), {})
    assert caught.value.code == 69
    assert str(tmp_path / "none") in caught.value.text


def test_windows_looks_for_quest_then_putty_then_path_then_openssh():
    places = tunnel.windows_places({"ProgramFiles": "P", "ProgramFiles(x86)": "Q", "PATH": "", "SystemRoot": "W"})
    names = [place.replace(os.sep, "/") for place in places]
    assert names == [
        "P/Quest Software/PuTTY/plinkw.exe",
        "Q/Quest Software/PuTTY/plinkw.exe",
        "P/Quest Software/PuTTY/plink.exe",
        "Q/Quest Software/PuTTY/plink.exe",
        "P/PuTTY/plink.exe",
        "Q/PuTTY/plink.exe",
        "W/System32/OpenSSH/ssh.exe",
    ]


def test_the_private_folder_of_somebody_else_is_not_used(tmp_path):
    (tmp_path / "tunnel-{}".format(os.getuid())).mkdir(mode=0o777)
    (tmp_path / "tunnel-{}".format(os.getuid())).chmod(0o777)
    with pytest.raises(OSError):
        tunnel.private_folder({"TMPDIR": str(tmp_path)})


def test_every_row_of_the_diagnoses_can_be_formatted():
    words = ("host", "kernel", "seconds", "by_hand", "code", "last", "said")
    facts = {name: name for name in words}
    for table in (tunnel.DIAGNOSES, tunnel.KERNEL_DIAGNOSES):
        for pattern, what, advice in table:
            text = pattern.split("|")[0].replace("(?i)", "").replace("\\", "")
            line = tunnel.diagnose([(pattern.split("|")[0] or "", what, advice)], text, facts)
            assert line is None or "{" not in line
            assert "\n" not in what + advice


def test_fuzzed_argument_vectors_are_refused_with_code_2_or_planned():
    draw = random.Random(20)
    pieces = ["-o", "--", "-", "--share", "--links", "auto", "=", "@", ":", ",", "22", "65536", "host", "[::1]"]
    pieces += [
        "\n",
        "\0",
        "ä",
        "\udc80",
        "~",
        "$HOME/",
        "`",
        '"',
        "%",
        "C:\\",
        " ",
        "john:pw@host:1",
        KERNEL,
        LINK,
    ]
    planned = 0
    for _ in range(2000):
        argv = []
        for good in ("host", KERNEL, LINK):
            word = good if draw.random() < 0.7 else "".join(draw.choice(pieces) for _ in range(draw.randint(0, 4)))
            argv.append(word)
        if draw.random() < 0.3:
            argv.insert(draw.randint(0, 3), draw.choice(pieces))

        def plan(argv=argv):
            asked = request(*argv)
            ports = tunnel.first_ports(asked)
            made = tunnel.Plan(asked, ports, (1, 2, 3, 4, 5) if asked.callback else ())
            return tunnel.OpenSSH.arguments(asked, made)

        result, line = tunnel.guarded(plan)
        assert result == 2 or isinstance(result, list), (argv, line)
        assert "\n" not in line
        assert "pw" not in line
        planned += isinstance(result, list)
    assert 200 < planned < 1900


class Quiet:
    """A launch whose client says whatever a test has it say."""

    def __init__(self, client=tunnel.OpenSSH):
        self.lines = []
        asked = request("host", KERNEL, LINK)
        self.launch = tunnel.Launch(asked, "client", client, self)
        self.launch.state = tunnel.State()
        self.launch.plan = tunnel.Plan(asked, tunnel.first_ports(asked), ())

    def write(self, text):
        self.lines.append(text)

    def hears(self, *lines):
        for line in lines:
            self.launch._on_output("err", line)
        return self.launch.state


@pytest.mark.parametrize("client", [tunnel.OpenSSH, tunnel.Plink])
def test_no_text_of_a_server_brings_the_launcher_down(client):
    """A server's banner comes through the same pipe as what the client says of itself."""
    draw = random.Random(5)
    words = [text for text, _ in client.events] + [
        "port",
        "127.0.0.1:",
        "99999999",
        "²",
        "-1",
        ",",
        " failed: ",
        " refused",
    ]
    for _ in range(2000):
        quiet = Quiet(client)
        quiet.hears(" ".join(draw.choice(words) for _ in range(draw.randint(1, 6))))
    assert Quiet(client).hears("Exit status -1", "Session sent command exit status x").status is None


def test_the_port_of_a_callback_is_that_of_the_main_link():
    line = "debug1: client_request_forwarded_tcpip: listen 127.0.0.1 port {}, originator 127.0.0.1 port 1"
    assert not Quiet().hears(line.format(39359)).called_back
    assert Quiet().hears(line.format(53994)).called_back
    plink = "Received remote port 127.0.0.1:53994 open request from 127.0.0.1:1"
    assert Quiet(tunnel.Plink).hears(plink).called_back


def test_what_a_kernel_prints_without_end_does_not_fill_the_disk():
    quiet = Quiet()
    for number in range(5000):
        quiet.launch._on_output("out", "line {}".format(number))
    assert len(quiet.lines) == tunnel.KERNEL_LINES + 1
    assert len(quiet.launch.state.printed) == 200
