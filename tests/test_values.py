"""The pure parts: values, plans, prompts, quoting. Nothing here starts a process, but for real shells."""

import os
import random
import shutil
import socket
import subprocess

import pytest
from rig import product
from rig.product import Destination, Fatal, Kernel, LinkName, Plan, Settings

LINK = "53994@127.0.0.1,39359@127.0.0.1"
KERNEL = "/usr/local/Wolfram/Mathematica/10.1/Executables/MathKernel"


def request(*argv, role=product.CONTROLLER):
    return product.parse_arguments(role, list(argv))


def settings_of(asked, **others):
    """The settings of the first try."""
    return Settings(product.first_ports(asked), **others)


def plan_of(asked, relays=(), **others):
    return Plan(asked, settings_of(asked, **others), relays)


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
    code, line = product.guarded(lambda: request(text, KERNEL, LINK))
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
        ("/opt/mathematica/12/bin/math", (12,), "-wstp", "callback"),
        ("/opt/mathematica/11/bin/math", None, "-mathlink", "callback"),  # 11.0 and 11.1 differ
        ("/opt/mathematica/10/bin/math", (10,), "-wstp", "classic"),
        ("/opt/mathematica/9/bin/math", (9,), "-mathlink", "classic"),
        ("/opt/mathematica/5/bin/math", None, "-mathlink", "callback"),  # no version that there was
        ("/opt/12.0/Mathematica/13/bin/math", (12, 0), "-wstp", "callback"),
        ("/opt/12.0/Mathematica/13.1/bin/math", (13, 1), "-wstp", "callback"),
        ("/opt/mathematica_13.2/bin/math", (13, 2), "-wstp", "callback"),
        ("/opt/m13.2/bin/math", None, "-mathlink", "callback"),
        ("/opt/1\u0664.1/bin/math", None, "-mathlink", "callback"),  # no ASCII digit
        ("/opt/14\u00b2/bin/WolframKernel", None, "-wstp", "callback"),
        ("/opt/100.1/bin/math", None, "-mathlink", "callback"),
        ("/bin/14.1", None, "-mathlink", "callback"),  # the program itself
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


@pytest.mark.parametrize(
    "path", ["", " ", "/a\nb", "C:\\%ProgramFiles%\\math.exe", 'C:\\a"b\\math.exe', "/" * 4097]
)
def test_bad_kernel_paths(path):
    with pytest.raises(Fatal) as caught:
        Kernel(path)
    assert caught.value.text.startswith("kernel_path: ") and len(caught.value.text) < 200


def test_a_kernel_path_may_be_as_long_as_systems_take_it():
    assert Kernel("/" * 4096).path == "/" * 4096


SHELLS = ("sh", "bash", "dash", "zsh", "csh", "tcsh", "fish")  # what tests/run.py installs
# Each of these may stand for something in some shell.
SPECIAL = [
    " ",
    "  ",
    '"',
    "'",
    "\\",
    "\\\\",
    "!",
    "!!",
    "!x",
    "!1",
    ";",
    "&",
    "|",
    "<",
    ">",
    "(",
    ")",
    "*",
    "?",
    "[",
    "]",
]
SPECIAL += [
    "[a-z]*",
    "{",
    "}",
    "{a,b}",
    "{}",
    "~",
    "~root",
    "#",
    "^",
    "^a^b^",
    "%",
    "%1",
    "=",
    "+",
    ",",
    "@",
    "`",
    "`id`",
]
SPECIAL += ["$", "$$", "$?", "$HOME", "${HOME}", "$(id)", "$((1))", "$'x'", "=ls", "-", ":", "\\n", "\\0", "\\x41"]
SPECIAL += ["ä", "ß€", "日本", "e\u0301", "\u00a0", "\udc80"]  # the last is a byte that is no UTF-8


def run_in(shell, words, **environment):
    """What a program is given for the quoted ``words`` by a shell, as sshd starts it."""
    path = shutil.which(shell)
    if not path:
        missing = "{} is not installed: tests/run.py installs it".format(shell)
        if os.environ.get("CI") and shell in SHELLS:
            pytest.fail(missing)
        pytest.skip(missing)
    command = "/usr/bin/printf '%s\\n' " + " ".join(words)
    output = subprocess.check_output(
        [path, "-c", command.encode("utf-8", "surrogateescape")],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        env=dict({"PATH": "/usr/bin:/bin", "HOME": "/nowhere", "LANG": "C.UTF-8"}, **environment),
    )
    return output.decode("utf-8", "surrogateescape").split("\n")[:-1]


@pytest.mark.parametrize("shell", SHELLS + ("ksh",))
def test_a_shell_gets_the_kernel_path_as_it_was_given(shell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [
        "/a b/$HOME/`id`/\"x\"/\\n/'q'/;&|<>*?!#~^%=+,@()[]{}",
        "/ä/ß",
        "/$(touch x)/`touch y`/m",
        "/`touch z`",
    ]
    paths += ["/opt/{}/math".format(each) for each in SPECIAL]
    paths += ["/opt/math{}".format(each) for each in SPECIAL]  # at the end
    # At the beginning, where ~/ and $HOME/ are the shell's, and two backslashes are a Windows machine's name.
    paths += ["{}/math".format(each) for each in SPECIAL if each not in ("~", "$HOME", "\\\\")]
    paths += [
        "/{0}{1}/{0}{1}".format(one, other) for one in ('"', "'", "\\", "!", "$", "`", " ") for other in SPECIAL
    ]
    paths += ["/{}{}".format(other, one) for one in ('"', "'", "\\", "!", "$", "`", " ") for other in SPECIAL]
    for first in range(0, len(paths), 40):
        some = paths[first : first + 40]
        assert run_in(shell, [Kernel(path).quoted for path in some]) == some
    assert not os.listdir(str(tmp_path))  # nothing was run


@pytest.mark.parametrize("shell", SHELLS + ("ksh",))
@pytest.mark.parametrize("home", ["/my home", "/höme"])
def test_a_shell_resolves_the_home_of_the_kernel_machine_and_nothing_else(shell, home):
    rests = ["m", "b $c/$HOME/m", "~/m", "!!/`id`/\\x"]
    for start in ("~/", "$HOME/"):
        quoted = [Kernel(start + rest).quoted for rest in rests]
        assert run_in(shell, quoted, HOME=home) == [home + "/" + rest for rest in rests]


@pytest.mark.parametrize("path", ["~root/m", "$HOMEx/m", "${HOME}/m", "/~/m", "~", "$HOME"])
def test_what_is_not_exactly_the_home_is_not_left_to_the_shell(path):
    assert run_in("sh", [Kernel(path).quoted]) == [path]


@pytest.mark.parametrize("shell", SHELLS + ("ksh",))
def test_the_whole_command_line_is_read_alike_by_all_shells(shell):
    """Words of a link name and of the switches mean nothing to any of them; nor does asking for a terminal."""
    asked = request("host", "/usr/bin/printf", LINK)
    plain, guarded = (plan_of(asked, guarded=each).command for each in (False, True))
    assert guarded == "test -t 0 && " + plain
    words = plain.split(" ")
    words[0] = words[0] + " '%s\\n'"
    expected = plain.split(" ")[1:]
    path = shutil.which(shell)
    if not path:
        pytest.skip("{} is not installed".format(shell))
    seen = subprocess.check_output([path, "-c", " ".join(words)]).decode().split("\n")[:-1]
    assert seen == expected
    ended = subprocess.run([path, "-c", guarded], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert (ended.returncode, ended.stdout) == (1, b"")


def test_a_windows_path_stands_in_quotes_untouched():
    path = "C:\\Program Files (x86)\\$Wolfram`\\14.1\\WolframKernel.exe"
    assert Kernel(path).quoted == '"{}"'.format(path)


def test_loopback_forms_are_what_inet_aton_reads():
    for length in range(5, 60):
        text = product.loopback_of(length)
        assert len(text) == length
        assert socket.inet_aton(text) == b"\x7f\0\0\1"
    assert product.loopback_of(4) is None


def test_drawn_blocks_are_clear_of_ephemeral_ports_and_never_overlap_in_part():
    for _ in range(2000):
        data, message = product.draw_ports()
        assert data % 10 == 0
        assert message == data + 1
        assert data >= 10000
        assert message + 8 < 32768


@pytest.mark.parametrize(
    "name, base, drawn", [("classic", 65531, False), ("classic", 65532, True), ("callback", 65528, True)]
)
def test_a_block_beyond_the_last_port_is_not_tried(name, base, drawn):
    asked = request("--links", name, "host", KERNEL, "{}@h,{}@h".format(base - 1, base))
    assert (product.first_ports(asked) != (base - 1, base)) is drawn


def test_switchboard_ports_come_after_all_others():
    asked = request("--links", "callback", "host", KERNEL, LINK)
    plan = plan_of(asked, (1001, 1002, 1003, 1004, 1005, 1006))
    assert [str(forward) for forward in plan.forwards] == [
        "127.0.0.1:53994:127.0.0.1:1001",
        "127.0.0.1:39359:127.0.0.1:1002",
        "127.0.0.1:53995:127.0.0.1:53995",
        "127.0.0.1:53996:127.0.0.1:53996",
        "127.0.0.1:53997:127.0.0.1:53997",
        "127.0.0.1:53998:127.0.0.1:53998",
        "127.0.0.1:53999:127.0.0.1:1003",
        "127.0.0.1:54000:127.0.0.1:1004",
        "127.0.0.1:54001:127.0.0.1:1005",
        "127.0.0.1:54002:127.0.0.1:1006",
    ]
    assert [forward.flag for forward in plan.forwards] == ["-R"] * 2 + ["-L"] * 4 + ["-R"] * 4
    assert plan.pairs == [(53999, 54000), (54001, 54002)]
    words = [word for forward in plan.forwards for word in (forward.flag, str(forward))]
    assert plan.forward_words == words


@pytest.mark.parametrize("role", [product.CONTROLLER, product.COMPUTE])
@pytest.mark.parametrize("links", ["classic", "callback"])
@pytest.mark.parametrize("host", ["127.0.0.1", "192.168.1.17", "fe80::1"])
def test_every_link_leads_through_the_launcher(role, links, host):
    """Whatever the front end's host: only the launcher itself is named in a forward."""
    asked = request("--links", links, "host", KERNEL, "40001@{0},40000@{0}".format(host), role=role)
    relays = (1001, 1002, 1003, 1004, 1005, 1006) if asked.callback else (1001, 1002)
    forwards = plan_of(asked, relays).forwards
    remote = [forward for forward in forwards if forward.flag == "-R"]
    assert [(each.host, each.to) for each in remote] == [("127.0.0.1", relay) for relay in relays]
    assert [each.port for each in remote[:2]] == [40001, 40000]
    local = [forward for forward in forwards if forward.flag == "-L"]
    assert [(each.port, each.host, each.to) for each in local] == [
        (40001 + n, "127.0.0.1", 40001 + n) for n in ((1, 2, 3, 4) if role is product.CONTROLLER else ())
    ]


def test_ports_of_a_plan_are_its_own_and_no_others():
    asked = request("--links", "callback", "host", KERNEL, LINK)
    plan, given = plan_of(asked, (1, 2, 3, 4, 5, 6)), settings_of(asked)
    ports = [port for port in range(1, 65536) if port % 10 == 1 or abs(port - 39359) < 9 or abs(port - 53994) < 20]
    refused = {port: product.obstacle_in(given, plan, "port", [str(port)]) for port in ports}
    assert [port for port in refused if refused[port] == "port"] == [39359] + list(range(53994, 54003))
    assert set(refused.values()) == {"port", "foreign forward"}


def test_another_block_is_told_to_the_kernel():
    asked = request("host", KERNEL, LINK)
    plan = Plan(asked, Settings((20000, 20001)), (1001, 1002))
    assert str(plan.link) == "20000@127.0.0.1,20001@127.0.0.1"
    assert " -LinkName 20000@127.0.0.1,20001@127.0.0.1 " in plan.command
    assert [forward.port for forward in plan.forwards] == [20000, 20001, 20002, 20003, 20004, 20005]


@pytest.mark.parametrize(
    "links, kernel, callback, inward",
    [
        ("auto", KERNEL, False, True),
        ("auto", "/opt/Wolfram/14.1/WolframKernel", True, False),
        ("auto", "/opt/math", True, True),  # nobody knows: both are looked for
        ("classic", "/opt/Wolfram/14.1/WolframKernel", False, True),
        ("callback", KERNEL, True, False),
        ("callback", "/opt/math", True, False),
        ("classic", "/opt/math", False, True),
    ],
)
def test_who_may_create_links(links, kernel, callback, inward):
    asked = request("--links", links, "host", kernel, LINK)
    assert (asked.callback, asked.inward) == (callback, inward)
    compute = request("--links", links, "host", kernel, LINK, role=product.COMPUTE)
    assert (compute.callback, compute.inward) == (False, False)


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
    assert product.is_password_prompt(prompt, "john", "host", alone) is answered


@pytest.mark.parametrize(
    "prompt, alone, answered",
    [
        ("john@host's password: ", True, True),
        ("john@host's password: ", False, False),  # a jump host may ask in these words
        ("(john@host) Password: ", False, True),  # it says who asks all the same
        ("Password: ", False, False),
        ("Password: ", True, True),
        ("(john@jump) Password: ", False, False),
        ("Password for john@host: ", False, False),
        ("Password for john@host: ", True, True),
    ],
)
def test_an_ssh_that_may_not_say_who_asks_is_trusted_only_when_nobody_else_can_ask(prompt, alone, answered):
    assert product.is_password_prompt(prompt, "john", "host", alone, prefixed=False) is answered


def test_ssh_says_who_asks_from_8_5_on():
    assert [version >= product.PREFIXED for version in ((0,), (7, 6), (8, 4), (8, 5), (9, 2), (10, 0))] == (
        [False] * 3 + [True] * 3
    )


@pytest.mark.parametrize(
    "said, login",
    [
        (b"user john\nhostname h.example.org\nport 22\n", ("john", "h.example.org", True)),
        (b"user john\nhostname 10.0.0.1\nhostkeyalias h\n", ("john", "h", True)),
        (b"hostname h\nuser jane\nproxyjump none\nproxycommand none\n", ("jane", "h", True)),
        (b"hostname h\nuser jane\nproxyjump jump\n", ("jane", "h", False)),
        (b"hostname h\nuser jane\nproxycommand nc %h %p\n", ("jane", "h", False)),
        (b"user first\nuser second\nhostname h\n", ("first", "h", True)),  # the first counts, as for ssh
        (b"", ("", "", False)),  # ssh -G has failed: nobody knows who could ask
        (b"user \xff\n\nhostname\n", ("\ufffd", "", False)),
    ],
)
def test_who_logs_in_is_read_from_what_ssh_prints(said, login):
    assert product.login_in(said) == login


def test_no_prompt_is_answered_where_ssh_did_not_say_who_logs_in():
    for prompt in ("Password: ", "(john@host) Password: ", "john@host's password: ", "'s password: "):
        assert not product.is_password_prompt(prompt, *product.login_in(b""))


def test_long_names_in_prompts_are_cut_as_openssh_cuts_them():
    user, host = "u" * 40, "h" * 200
    assert product.is_password_prompt("{}@{}'s password: ".format(user[:30], host[:128]), user, host, False)


def test_options_of_the_user_come_before_the_defaults():
    asked = request("-o", "ConnectTimeout=60", "-oStrictHostKeyChecking=yes", "host", KERNEL, LINK)
    words = product.OpenSSH.login(asked, settings_of(asked))
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
    asked = request(*(options + ("host", KERNEL, LINK)), role=product.COMPUTE)
    product.Plink.check(asked)
    arguments = product.Plink.arguments(asked, plan_of(asked), "plink")
    assert arguments[:5] == ["-batch", "-v", "-ssh", "-x", "-t"]
    assert arguments[5 : arguments.index("-R")] == words


@pytest.mark.parametrize("option", ["ProxyJump=x", "Compression=maybe", "Port=x", "IdentityFile=-x"])
def test_options_that_plink_has_no_word_for_are_refused(option):
    with pytest.raises(Fatal) as caught:
        product.Plink.check(request("-o", option, "host", KERNEL, LINK))
    assert caught.value.text.startswith("-o " + option.split("=")[0])


def test_quest_plink_stores_unknown_keys_itself():
    asked = request("host", KERNEL, LINK)
    plan = plan_of(asked)
    assert "-auto_store_key_in_cache" in product.Plink.arguments(
        asked, plan, "C:\\P\\Quest Software\\PuTTY\\plink.exe"
    )
    assert "-auto_store_key_in_cache" not in product.Plink.arguments(asked, plan, "C:\\P\\PuTTY\\plink.exe")


def test_mathematica_libraries_are_taken_out_of_the_environment_and_nothing_else():
    libraries = "/opt/M/SystemFiles/Libraries/Linux-x86-64"
    environ = {"A": "1", "LD_LIBRARY_PATH": "/x:" + libraries + ":/y"}
    assert product.client_environment(environ) == {"A": "1", "LD_LIBRARY_PATH": "/x:/y"}
    assert product.client_environment({"LD_LIBRARY_PATH": libraries}) == {}
    assert product.client_environment({"B": "2"}) == {"B": "2"}


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
        (("--client",), "--client: a value has to follow"),
        (("--client", "a\nb", "host", KERNEL, LINK), "--client: expected"),
        (("--links", "host", KERNEL, LINK), "--links: expected"),
        (("--relay=x", "host", KERNEL, LINK), "--relay: expected"),
        (("--relay=", "host", KERNEL, LINK), "--relay: expected"),
        (("--relay=-1", "host", KERNEL, LINK), "--relay: expected"),
        (("--relay=100000", "host", KERNEL, LINK), "--relay: expected"),
        (("--relay", "host", "C:\\Wolfram\\14.1\\math.exe", LINK), "--relay: needs sh and Python 3"),
        (("--check", "host"), "kernel_path is missing"),
        (("--check", "host", KERNEL, LINK, "x"), "too many arguments"),
        (("--check", "host", KERNEL, "x"), "too many arguments"),
        (("-\n", "host", KERNEL, LINK), "this option: not known"),
    ],
)
def test_bad_arguments_are_named(argv, named):
    code, line = product.guarded(lambda: request(*argv))
    assert code == 2
    assert named in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "argv, values",
    [
        ((), {"options": [], "client": None, "links": "auto", "share": False, "check": False, "relay": None}),
        (("-o", " Port = 22 "), {"options": [("Port", "22")]}),
        (("-oProxyCommand=nc -x a=b %h %p",), {"options": [("ProxyCommand", "nc -x a=b %h %p")]}),
        (("-o", "A=1", "-oB=2"), {"options": [("A", "1"), ("B", "2")]}),
        (("--client=plink", "--links=callback"), {"client": "plink", "links": "callback"}),
        (("--client", "-odd", "--links", "classic"), {"client": "-odd", "links": "classic"}),
        (("--share", "--dry-run"), {"share": True, "dry_run": True, "check": False}),
        (("--check",), {"check": True}),
        (("--relay",), {"relay": 60}),
        (("--relay=0",), {"relay": 0}),
        (("--relay=99999",), {"relay": 99999}),
        (("--share", "--"), {"share": True}),
    ],
)
def test_options_are_taken_as_they_are_given(argv, values):
    asked = request(*(argv + ("host", KERNEL, LINK)))
    assert {name: getattr(asked, name) for name in values} == values
    assert (asked.destination.host, asked.kernel.path, str(asked.link)) == ("host", KERNEL, LINK)


def test_what_follows_two_dashes_is_no_option():
    assert request("--", "host", "-odd/math", LINK).kernel.path == "-odd/math"
    code, line = product.guarded(lambda: request("--", "--share", "host", KERNEL, LINK))
    assert (code, line.partition(";")[0]) == (2, "too many arguments")


def test_a_check_needs_no_link_and_takes_one():
    assert request("--check", "host", KERNEL).link is None
    assert str(request("--check", "host", KERNEL, LINK).link) == LINK


def test_of_two_values_for_an_option_the_first_counts_whatever_the_case_of_its_name():
    asked = request("-o", "CONNECTTIMEOUT=5", "-o", "connecttimeout=7", "host", KERNEL, LINK)
    assert asked.option("ConnectTimeout") == "5"
    assert asked.option("Port") is None


def test_a_client_is_looked_for_where_a_front_end_would_not(tmp_path):
    program = tmp_path / "plink"
    program.write_text("")
    program.chmod(0o755)
    assert product.find_client(None, {"TUNNEL_SSH": str(program)}) == (str(program), product.Plink)
    assert product.find_client("plink", {"PATH": str(tmp_path)})[1] is product.Plink
    path, kind = product.find_client(None, {"PATH": ""})
    assert os.path.basename(path) == "ssh"
    assert kind is product.OpenSSH
    with pytest.raises(Fatal) as caught:
        product.find_client(str(tmp_path / "none"), {})
    assert caught.value.code == 69
    assert str(tmp_path / "none") in caught.value.text


def test_windows_looks_for_quest_then_putty_then_path_then_openssh():
    places = product.windows_places({"ProgramFiles": "P", "ProgramFiles(x86)": "Q", "PATH": "", "SystemRoot": "W"})
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
        product.private_folder({"TMPDIR": str(tmp_path)})


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
            settings = settings_of(asked)
            made = Plan(asked, settings, (1, 2, 3, 4, 5, 6) if asked.callback else (1, 2))
            return product.OpenSSH.arguments(asked, made, settings)

        result, line = product.guarded(plan)
        assert result == 2 or isinstance(result, list), (argv, line)
        assert "\n" not in line
        assert "pw" not in line
        planned += isinstance(result, list)
    assert 200 < planned < 1900


def test_whether_ssh_can_ask_somebody(tmp_path):
    there, here = tmp_path / "libexec" / "ssh-askpass", tmp_path / "ssh"
    there.parent.mkdir()
    there.write_text("")
    here.write_bytes(b"\x7fELF\0" + os.fsencode(str(there)) + b"\0SSH_ASKPASS\0")
    at_a_desktop = {"DISPLAY": ":0"}
    assert not product.can_ask({}, str(here))
    assert not product.can_ask(at_a_desktop, str(here))
    there.chmod(0o755)
    assert product.can_ask(at_a_desktop, str(here))
    assert product.can_ask(dict(at_a_desktop, SSH_ASKPASS=str(there)), str(here))
    assert product.can_ask({"SSH_ASKPASS": "one-along-the-path"}, str(here))
    assert not product.can_ask(dict(at_a_desktop, SSH_ASKPASS="/none"), str(here))
    for start in ("#!/bin/sh", "#! /bin/sh"):
        here.write_text(start + "\nexec ssh2\n")
        assert product.can_ask(at_a_desktop, str(here))
    assert product.can_ask(at_a_desktop, str(tmp_path / "none"))


def test_whether_a_front_end_still_listens():
    listener = product.listen()
    port = listener.getsockname()[1]
    for host in ("127.0.0.1", "localhost"):
        assert not product.is_deserted(host, port)
    listener.close()
    assert product.is_deserted("127.0.0.1", port)
    assert not product.is_deserted("192.0.2.1", port), "another machine's is not known"
    assert not product.is_deserted("no.such.host.example", port)


def test_a_front_end_that_listens_everywhere_is_there():
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen(1)
        assert not product.is_deserted("127.0.0.1", listener.getsockname()[1])
