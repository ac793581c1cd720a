"""README and MANUAL say what is so: their commands are run or parsed here, lists and numbers are the code's."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree

import picture
import pytest
import rig
import run
from rig import docs, product
from rig.docs import BOTH, MANUAL, README

import install

LINK = "53994@127.0.0.1,39359@127.0.0.1"
CODE = re.sub(r'"\s+f?"', "", product.text())
COMMANDS = sorted(set(docs.commands(README) + docs.commands(MANUAL)))

# What no test can run or parse, and why.
LEFT_ALONE = {
    "ssh-copy-id john@cluster.example.org": "asks for a password, to put a key there",
    "plink john@host.example.com exit": "plink logs in or fails: it has no way to only read its arguments",
    "plink john@host.example.com /usr/local/Wolfram/Mathematica/10.1/Executables/MathKernel": "the same",
    "module show mathematica": "a cluster's environment modules",
    "module avail": "the same",
    "module load mathematica": "the same",
    "which WolframKernel math": "finds a kernel where there is one",
    "module load mathematica; srun ...": "a line for --via, on a cluster",
    "module load mathematica; srun -n1 -u -c 8": "the same",
    "loginctl enable-linger": "changes a machine that has systemd",
    "qsub -I": "a scheduler's",
    "ssh-add ~/.ssh/id_ed25519": "needs an agent, which a user's desktop has",
    "sudo apt-get install openssh-client": "installs; tests/run.py does it in its own way",
    "sudo apt-get install openssh-server": "the same",
    "ssh -R": "no whole command: names a kind of forward",
    "ssh -f": "no whole command: names what launches are compared with",
    "ssh host command": "says how a server runs what it is told",
}


# ------------------------------------------------------------------------------------------------ commands


def parse_launch(command):
    words = shlex.split(command.replace("`linkname`", LINK).replace("\\", "\\\\"))
    assert re.search(r"FrontEnd[/\\]tunnel\.(sh|bat)$", words[0])
    for path in kernel_paths():
        if "--relay" in words and product.Kernel(path).on_windows:
            continue  # the manual says that a relay is not for these
        request = product.parse_arguments(product.CONTROLLER, [path if w == "KERNEL" else w for w in words[1:]])
        assert (str(request.destination), str(request.link)) == ("john@host.example.com", LINK)
        assert request.kernel.path == path


def parse_check(command):
    words = shlex.split(command.partition("tunnel.")[2])[1:]
    request = product.parse_arguments(product.CONTROLLER, words)
    assert request.check
    assert request.relay == (product.RELAY_MINUTES if {"--relay", "--via"} & set(words) else None)
    script = command.partition(" --check")[0].split(" ")[-1]
    assert os.path.exists(os.path.join(rig.LAUNCHERS, "tunnel.py"))
    assert script == "tunnel.py" or script.endswith("FrontEnd/tunnel.sh")


def parse_install(command):
    install.Installer(shlex.split(command.partition("install.py")[2]))


def compile_script(command):
    words = [word for word in command.split(" ") if word.endswith(".py")]
    ast.parse(docs.text_of(words[0]))


def parse_ssh(command):
    words = shlex.split(command)[1:]
    output = subprocess.check_output(["ssh", "-F", "/dev/null", "-G"] + words).decode()
    user, _, host = words[0].rpartition("@")
    assert "hostname {}\n".format(host) in output
    assert not user or "user {}\n".format(user) in output


def run_ssh_keygen(command, folder):
    words = shlex.split(command) + ["-f", str(folder / "file"), "-q"]
    if "-R" in words:
        (folder / "file").write_text("host.example.com ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA==\n")
        words.remove("-q")
    else:
        words += ["-N", ""]
    subprocess.check_call(words, stderr=subprocess.DEVNULL)


def run_chmod(command, folder):
    words = shlex.split(command)
    for name in words[2:]:
        assert os.path.exists(os.path.join(rig.LAUNCHERS, name))
        (folder / name).write_text("")
    subprocess.check_call(words, cwd=str(folder))
    assert all(os.access(str(folder / name), os.X_OK) for name in words[2:])


def compare_usage(command):
    script = command.split(" ")[0]
    asked = product.USAGE.format(script=script.partition(".")[0], role="").splitlines()[0]
    assert asked.split() == ["usage:"] + command.split()


def compare_with_the_package(command):
    assert '"MLOpenArguments" -> "{}"'.format(command) in docs.text_of("tunnel.m")


def run_version(command):
    subprocess.check_call([sys.executable] + shlex.split(command)[1:])


def choose_tests(command):
    version, arguments = run.version_in(shlex.split(command)[2:])
    files, options = run.chosen(arguments)
    assert (version, options) == ("3.6", [])
    for name, words in files.items():
        for word in words:
            assert "def {}(".format(word.partition("::")[2]) in docs.text_of(name)


def parse_via(command):
    request = product.parse_arguments(product.CONTROLLER, shlex.split(command) + ["host", "/k/10.1/math", LINK])
    assert request.via and request.relay == product.RELAY_MINUTES


HANDLERS = (
    (r'--via "', parse_via),
    (r'"`userbaseDirectory`', parse_launch),
    (r"(?:python3 tunnel\.py|\S+/tunnel\.sh|env .*/tunnel\.sh) --check ", parse_check),
    (r"(?:(?:sudo )?python3 )?install\.py(?: |$)", parse_install),
    (r"(?:python3 )?(?:tests|benchmarks|\.ci)/\w+\.py$", compile_script),
    (r"python3 tests/run\.py --python ", choose_tests),
    (r"ssh [a-z0-9@.]+ [a-z/]", parse_ssh),
    (r"ssh-keygen ", run_ssh_keygen),
    (r"chmod ", run_chmod),
    (r"tunnel(?:_sub)?\.py +\[options\]", compare_usage),
    (r"-LinkMode ", compare_with_the_package),
    (r"python3 --version$", run_version),
)


@pytest.mark.parametrize("command", [each for each in COMMANDS if each not in LEFT_ALONE])
def test_each_command_is_understood(command, tmp_path):
    (handler,) = [function for pattern, function in HANDLERS if re.match(pattern, command)]
    handler(command, tmp_path) if handler in (run_ssh_keygen, run_chmod) else handler(command)


def test_what_is_left_alone_is_there_and_has_a_reason():
    assert set(LEFT_ALONE) <= set(COMMANDS)
    assert all(LEFT_ALONE.values())


@pytest.mark.parametrize("block", docs.configurations(README) + docs.configurations(MANUAL), ids="; ".join)
def test_ssh_takes_the_configurations(block, tmp_path):
    (tmp_path / "config").write_text("\n".join(block) + "\n")
    host = block[0].split()[1]
    output = subprocess.check_output(["ssh", "-G", "-F", str(tmp_path / "config"), host]).decode()
    found = dict(line.partition(" ")[::2] for line in output.splitlines())
    for line in block[1:]:
        name, _, value = line.strip().partition(" ")
        assert name.lower() in found, name
        if name.startswith("Proxy"):
            assert found[name.lower()] == value


@pytest.mark.parametrize("script", docs.fences(BOTH, "sh"))
def test_a_shell_takes_the_scripts(script, tmp_path):
    (tmp_path / "script").write_text(script)
    subprocess.check_call(["bash", "-n", str(tmp_path / "script")])
    assert "exec " in script.splitlines()[-1]


def test_fences_name_what_they_hold():
    kinds = set(re.findall(r"^```(.*)$", BOTH, re.MULTILINE)) - {""}
    assert kinds == {"mathematica", "sh", "text"}
    assert BOTH.count("\n```") % 2 == 0
    # Nothing that is to be typed hides in a fence that nobody looks into.
    for text in docs.fences(BOTH, "text"):
        assert not re.search(r"^\s*(?:\$ )?(?:{}) ".format("|".join(docs.PROGRAMS)), text, re.MULTILINE)


# -------------------------------------------------------------------------------- commands in Wolfram Language


def kernel_paths():
    """All paths in the manual's table of kernels."""
    (table,) = docs.tables(docs.section(MANUAL, "The kernel's path"))
    return [path for row in table[1:] for cell in row[1:] for path in docs.code_in(cell)]


def templates():
    """The launch commands of compute kernels: as the Wolfram Language makes them, strings joined by <>."""
    text = "\n".join(docs.fences(MANUAL, "mathematica"))
    string = r'"(?:[^"\\]|\\.)*"'
    return re.findall(r"{0} <> \$UserBaseDirectory <> {0}".format(string), text)


def test_there_is_one_template_for_each_system_and_one_for_a_single_machine():
    found = templates()
    assert len(found) == len(set(found)) == 3
    assert sum("tunnel_sub.bat" in each for each in found) == 1
    assert len(kernel_paths()) == 12


@pytest.mark.parametrize("template", templates())
@pytest.mark.parametrize("path", kernel_paths())
def test_command_templates_are_understood(template, path):
    template = template.replace("KERNEL", path.replace("\\", "\\\\"))
    parts = re.findall(r'"((?:[^"\\]|\\.)*)"|(\$UserBaseDirectory)', template)
    command = "".join("/base" if name else text.replace('\\"', '"').replace("\\\\", "\\") for text, name in parts)
    if "tunnel_sub.bat" in template:
        assert command.startswith('""')
        assert command.endswith('""')
        command = command[1:-1]  # as cmd.exe does
    command = command.replace("`1`", "john@host").replace("`2`", LINK)
    words = shlex.split(command.replace("\\", "\\\\"))
    assert re.match(r"/base[/\\]FrontEnd[/\\]tunnel_sub\.(sh|bat)$", words[0])
    request = product.parse_arguments(product.COMPUTE, words[1:])
    assert (str(request.link), request.kernel.path) == (LINK, path)


def test_the_table_of_kernels_says_system_and_version():
    (table,) = docs.tables(docs.section(MANUAL, "The kernel's path"))
    for title, windows, *others in table[1:]:
        number = re.match(r"(?:up to )?(\d+\.\d)", title)
        for cell in [windows] + others:
            kernel = product.Kernel(*docs.code_in(cell))
            assert kernel.on_windows is (cell is windows and number is not None)
            named = (10, 1) if "10.0 to" in title else number and tuple(map(int, number.group(1).split(".")))
            assert kernel.version == named
            assert kernel.switch == ("-mathlink" if number and kernel.version < (10,) else "-wstp")


def test_versions_are_those_of_the_code():
    rows = docs.tables(docs.section(MANUAL, "Versions"))[0][1:]
    examples = {"6 to 9": "9.0", "10.0 to 11.0": "11.0", "11.1 to 15": "15.0"}
    for row in rows[:3]:
        kernel = product.Kernel("/k/{}/MathKernel".format(examples[row[0]]))
        assert (row[1], row[2]) == ("`{}`".format(kernel.switch), kernel.links)
        assert ("`tunnel.m`" in row[3]) is (kernel.links == product.CLASSIC)
    for row in rows[3:]:
        for program in docs.code_in(row[0]):
            assert "`{}`".format(product.Kernel("/k/" + program).switch) == row[1]


def options_of(function):
    """The names of a function's options in tunnel.m."""
    text = re.search(r"Options\[{}\] =\s*\{{(.*?)\}};".format(function), docs.text_of("tunnel.m"), re.DOTALL)
    return set(re.findall(r'"(\w+)" ->', text.group(1)))


def test_the_options_of_both_functions_are_in_the_manual():
    kernels, computing = docs.section(MANUAL, "Controller kernels"), docs.section(MANUAL, "Compute kernels")
    first, second = ({row[0].strip('`"') for row in docs.tables(text)[0][1:]} for text in (kernels, computing))
    assert first == options_of("SetupTunnelKernelConfiguration")
    assert first | second == options_of("RemoteMachineTunnel")
    assert first | second == options_of("LaunchTunnelKernels") | {"KernelSpeed"}
    usage = docs.text_of("tunnel.m").partition("(* -- messages *)")[0]
    for name in first | second:
        assert usage.count('\\"{}\\"'.format(name)) >= (1 if name in second else 2), name


# ------------------------------------------------------------------------------------------ lists of options


def options_in(text):
    return set(re.findall(r"(?<!\S)--?[a-z-]+", re.sub(r"[\[=`,]", " ", text)))


def option_table(text):
    """What the table of options below a heading names."""
    (table,) = [table for table in docs.tables(text) if table[0][0] == "option"]
    return options_in(" ".join(row[0] for row in table[1:]))


def test_every_option_is_in_usage_manual_and_readme():
    usage = options_in(" ".join(re.findall(r"^  (-.*?)(?:  |$)", product.USAGE, re.MULTILINE)))
    assert "--relay" in usage
    assert option_table(docs.section(MANUAL, "Options of the launchers")) == usage
    assert option_table(docs.section(README, "Options")) == usage


def test_every_option_of_the_installer_is_in_the_manual():
    script = os.path.join(rig.LAUNCHERS, "install.py")
    said = subprocess.check_output([sys.executable, script, "--help"]).decode()
    usage = options_in(" ".join(re.findall(r"^  (-.*?)(?:  |$)", said, re.MULTILINE))) - {"-h"}
    assert option_table(docs.section(MANUAL, "Installation")) == usage


def defaults(role, *words):
    asked = product.parse_arguments(role, list(words) + ["host", "/k/10.1/math", LINK])
    return product.OpenSSH.defaults(asked, product.Settings(product.first_ports(asked)))


def test_the_built_in_options_are_those_of_the_code():
    listed = re.search(r"The built-in options for OpenSSH are (.*?)\. `--dry-run`", MANUAL, re.DOTALL).group(1)
    found = dict(each.split("=") for each in docs.code_in(listed) if "=" in each)
    asked = product.parse_arguments(product.CONTROLLER, ["john:secret@host", "/k/10.1/math", LINK])
    assert found == dict(product.OpenSSH.defaults(asked, product.Settings(product.first_ports(asked))))
    plain = dict(defaults(product.CONTROLLER))
    assert set(found) - set(plain) == {"BatchMode"}
    relayed = dict(defaults(product.CONTROLLER, "--relay"))
    changed = {name for name in plain if plain[name] != relayed[name]}
    assert changed == {"ClearAllForwardings", "RequestTTY"}
    for name in changed:
        assert "`{}={}` (with a relay `{}`)".format(name, plain[name], relayed[name]) in listed
    compute = dict(defaults(product.COMPUTE))
    assert {name for name in plain if plain[name] != compute[name]} == {"Compression"}


def test_options_that_cannot_be_changed_are_those_of_the_code():
    listed = re.search(r"goes into `-o`;\s(.*?) cannot be\schanged", MANUAL, re.DOTALL).group(1)
    names = docs.code_in(listed)
    assert len(names) == 4
    for name, _ in product.OpenSSH.defaults(
        product.parse_arguments(product.CONTROLLER, ["host", "/k/math", LINK]), product.Settings((1, 2))
    ):
        asked = product.parse_arguments(product.CONTROLLER, ["-o", name + "=no", "host", "/k/math", LINK])
        if name in names:
            with pytest.raises(product.Fatal):
                product.OpenSSH.check(asked)
        else:
            product.OpenSSH.check(asked)


def test_the_options_that_plink_takes_are_those_of_the_code():
    table = docs.tables(docs.section(MANUAL, "Windows and PuTTY"))[0]
    (cell,) = [row[2] for row in table if row[0] == "`-o`"]
    names = {name.lower() for name in docs.code_in(cell)} - {".ppk"}
    assert names == set(product.Plink.translated) | set(product.Plink.switches)


def test_the_exit_codes_are_those_of_the_code():
    (table,) = [table for table in docs.tables(docs.section(README, "Options")) if table[0][0] == "exit code"]
    codes = " ".join(row[0] for row in table[1:])
    for number in (
        product.EX_USAGE,
        product.EX_UNAVAILABLE,
        product.EX_SOFTWARE,
        product.OpenSSH.failure,
        "128+n",
    ):
        assert str(number) in codes
    assert all(str(number) in codes for number in product.KERNEL_CODES)
    gone = product.Facts()
    gone.stopped_by = "front end gone"
    assert "; {} also when the front end has closed".format(product.verdict(product.OpenSSH, gone)) in README
    assert "(plink: {})".format(product.Plink.failure) in README


# ------------------------------------------------------------------------------------------ times and numbers

ENDED = product.LATE_SECONDS + product.KILL_SECONDS


def flat(text):
    """Without line breaks."""
    return " ".join(text.split())


SILENT = product.ALIVE_SECONDS * (product.ALIVE_COUNT + 1)
HANG_UP = product.HANG_UP_SECONDS


@pytest.mark.parametrize(
    "phrase, numbers",
    [
        ("by SIGTERM, SIGINT, SIGHUP | kernel, relay | {:.0f} s |", [HANG_UP]),
        ("a kernel that computes on is hung up on after {:.0f} s | {:.0f} s |",
         [product.NOTICE_SECONDS, product.NOTICE_SECONDS + HANG_UP]),
        ("once the front end has all that the kernel sent | {:.0f} s |",
         [product.LATE_SECONDS + product.KILL_SECONDS]),
        ("and the front end takes none of that | the same | {} s |", [product.STALL_SECONDS]),
        ("processes behind that hold its links | the same | {:.0f} s |", [product.QUIET_SECONDS + ENDED]),
        ("5 s; a silent network {} s |", [SILENT]),
        ("last kernel on a shared connection | the connection | {} s |", [product.SHARE_SECONDS]),
        ("relay, and the process here | {} s |", [product.SHARE_SECONDS]),
        ("while the job waits | the job, at once | {:.0f} s |", [1 + product.FRONT_END_SECONDS]),
        ("at once and then every {} s, for {} min | noticed within {:.0f} s |",
         [product.PAUSE_SECONDS, product.RELAY_MINUTES, product.DEAD_SECONDS]),
    ],
)  # fmt: skip
def test_times_in_what_ends_when_are_those_of_the_code(phrase, numbers):
    assert phrase.format(*numbers) in flat(docs.section(MANUAL, "What ends when"))


@pytest.mark.parametrize(
    "phrase, numbers",
    [
        ("is given {} s more, once", [product.VERIFY_SECONDS]),
        ("where it shows within {} s, else told by the next", [product.VERIFY_SECONDS]),
        ("A connection ends {} s after its last kernel", [product.SHARE_SECONDS]),
        ("which ends {} s after its last kernel", [product.SHARE_SECONDS]),
        ("another block of ports is drawn, at most {} times", ["five"][: product.TRIES == 5]),
        ("another block of ports, at most {} |", [product.TRIES]),
        ("ends the kernel, within {} s", [SILENT]),
        ("with pauses that grow to {} s, for an hour", [product.PAUSE_SECONDS]),
        ("which waits {} minutes, or MINUTES", [product.RELAY_MINUTES]),
        ("is tried at once and given {:.0f} s, then made anew", [product.PROBE_SECONDS]),
        ("a network goes silent | noticed within {:.0f} s |", [product.DEAD_SECONDS]),
        ("if it has not ended after {:.0f} s; SIGKILL {:.0f} s later", [product.NOTICE_SECONDS, HANG_UP]),
        ("the kernel is hung up on; SIGKILL after {:.0f} s", [HANG_UP]),
        ("the kernel is hung up on; SIGKILL after {:.0f} s; COMMAND ends with it", [HANG_UP]),
        ("with SIGKILL after {:.0f} s, and what else", [product.COMMAND_SECONDS]),
        ("nothing comes from the kernel's machine for {:.0f} s", [product.SUSPENDED_SECONDS]),
        ("when none comes within {} s", [product.BEGIN_SECONDS]),
        ("A COMMAND has at most {} characters", [product.VIA_LENGTH]),
        ("nobody ever comes, after the login | the relay ends after {:.0f} s |", [product.FIRST_SECONDS]),
        ("`-o ConnectTimeout=60` waits longer than {} s", [product.CONNECT_SECONDS]),
        ("given up after {} s, noticed within {} s", [product.CONNECT_SECONDS, SILENT]),
        ("noticed within {} s, with a relay {:.0f} s", [SILENT, product.DEAD_SECONDS]),
        ("both end within {:.0f} s, once everything", [product.LATE_SECONDS + product.KILL_SECONDS]),
        ("kernel and licence stay | kernel hung up on after {:.0f} s |", [product.NOTICE_SECONDS]),
        ("the beginning of what may be one, for {} s at most", [product.HOLD_SECONDS]),
        ("After two names it only copies; after {} minutes", ["five"][: product.NAMES_SECONDS == 300]),
        ("the kernel has {:.0f} s to see that for itself", [product.NOTICE_SECONDS]),
        ("said (up to {} MiB of each)", [product.LOG_BYTES >> 20]),
        ("has not acknowledged, {} MiB at most", [product.KEEP >> 20]),
        ("a credit of its own of up to {} MiB", [product.WINDOW >> 20]),
        ("all {} byte values", [len(product.ALL_BYTES)]),
        ("ssh has to be {}.{} or later, which says who does", product.PREFIXED),
    ],
)
def test_times_and_numbers_in_the_manual_are_those_of_the_code(phrase, numbers):
    assert phrase.format(*numbers) in flat(MANUAL)


def test_the_readme_says_how_long_a_relay_waits():
    said = "how long it waits for a lost connection ({}; 0: not at all)".format(product.RELAY_MINUTES)
    assert said in docs.section(README, "Options")
    assert 'for an hour (`"Relay" -> 600`: for ten)' in flat(README)


def test_what_a_refused_login_of_a_relay_costs_is_said():
    assert product.ASKING_SECONDS == 60
    for text in (README, MANUAL):
        assert "once a minute" in flat(text)


def test_ports_are_drawn_where_the_manual_says():
    assert "drawn between 10000 and 32767" in flat(MANUAL)
    for draw in (lambda: product.draw_ports()[0], product.draw_block):
        assert all(10000 <= draw() <= 32767 - 9 for _ in range(200))


def test_as_many_calls_of_the_shell_scripts_are_compared_as_the_manual_says():
    with open(os.path.join(rig.TESTS, "data", "cases.json")) as stream:
        assert "all {} recorded calls (`tests/data/cases.json`)".format(len(json.load(stream))) in MANUAL


def test_the_first_launch_asks_for_a_terminal_as_the_manual_says():
    asked = product.parse_arguments(product.CONTROLLER, ["host", "/k/math", LINK])
    settings = product.Settings(product.first_ports(asked))
    later = product.Plan(asked, settings, ()).command
    first = product.Plan(asked, settings.but(guarded=True), ()).command
    assert "`{}`".format(first[: -len(later)].strip()) in MANUAL
    assert first.endswith(later)


def test_the_figures_name_what_the_rig_sets():
    """The lines of its sshd_config that are no addresses, files or logins."""
    text = docs.text_of("tests/rig/machine.py").partition("def _server_config")[2].partition("\n    def ")[0]
    set_there = re.findall(r'^ +"([A-Z]\w+ (?:yes|no|[A-Z]+))",', text, re.MULTILINE)
    assert len(set_there) == 5
    for line in set_there:
        assert "`{}`".format(line) in docs.section(README, "Figures")


def test_the_version_is_in_the_changelog():
    assert "## {}".format(product.VERSION) in docs.text_of("CHANGELOG.md")


# ------------------------------------------------------------------------------------------ words and links


def anchors(text):
    titles = re.findall(r"^#+ (.*)$", docs.without_fences(text), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", docs.NAMES)
def test_links_lead_somewhere(name):
    text = docs.text_of(name)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        if path.startswith("https:"):
            continue
        assert os.path.exists(os.path.join(rig.LAUNCHERS, path)), target
        if anchor:
            assert anchor in anchors(docs.text_of(path) if path else text), target


def test_the_manual_lists_its_chapters():
    listed = re.findall(r"^- \[(.*)\]\(#.*\)$", MANUAL, re.MULTILINE)
    assert listed == re.findall(r"^## (.*)$", docs.without_fences(MANUAL), re.MULTILINE)


def test_lines_of_the_troubleshooting_table_are_said_by_the_code():
    (table,) = [table for table in docs.tables(MANUAL) if table[0][0] == "last line"]
    assert len(table) > 20
    for row in table[1:]:
        for part in row[0].split("..."):
            assert part.strip() in CODE, part


def test_lines_of_the_example_log_are_said_by_the_code():
    (log,) = [text for text in docs.fences(MANUAL, "text") if "the kernel has called back" in text]
    for line in re.findall(r"^[\d:]{8} ((?:the|forwards) .*)$", log, re.MULTILINE):
        for part in re.split(r"(?: \d[\d.]*)(?: s)?|: ", line):
            assert part.strip() in CODE, part


def test_the_picture_is_of_what_is_said_today_and_shows_nothing_of_the_machine_that_made_it():
    (path,) = re.findall(r"!\[[^\]]*\]\((\S+\.svg)\)", README)
    root = xml.etree.ElementTree.fromstring(docs.text_of(path))  # noqa: S314 - our own
    lines = ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]
    text = "\n".join(lines)
    assert "python3 tunnel.py --check --relay john@cluster.example.org" in text
    steps = re.findall(r"^ +\d+\.\d\d s  ok  ([a-z ]+): ", text, re.MULTILINE)
    names = ["client", "name", "host key", "login", "relay", "kernel", "data channel", "message channel"]
    assert steps == names + ["name", "host key", "login", "relay"]
    last = lines[-1].partition(": ")[2]
    assert last in CODE
    assert "the kernel has connected" in CODE
    assert re.search("^.* relay: Python [0-9.]+, process [0-9]+ on login1$", text, re.MULTILINE)
    for word in ("/tmp", "/root", "/home", "/work", "tunnel-rig"):
        assert word not in text


def test_a_picture_has_the_colours_of_the_terminal_and_every_character():
    text = picture.render("a <b>", "  \033[32mok\033[0m  x & y\n\033[1;35mz\n")
    root = xml.etree.ElementTree.fromstring(text)  # noqa: S314 - our own
    lines = [list(each) for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert ["".join(span.text for span in line) for line in lines] == ["$ a <b>", "  ok  x & y", "z"]
    green = [span.text for line in lines for span in line if span.get("fill") == picture.COLOURS["32"]]
    assert green == ["ok"]
