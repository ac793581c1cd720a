"""How a relay comes up in a login: every shell, what it prints, and all that can keep it from coming up."""

import os
import time

import pytest
import rig
from rig import far, product
from rig.far import over
from rig.logins import PYENV, Launcher

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are looked at in /proc")
machine = far.machine


SHELLS = ["/bin/sh", "/bin/bash", "/bin/dash", "/usr/bin/zsh", "/bin/csh", "/bin/tcsh", "/usr/bin/fish"]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_login_shell_starts_it(machine, shell):
    if not os.path.exists(shell):
        pytest.skip("no {} here".format(shell))
    with Launcher(machine, shell=shell) as launcher:
        kernel = launcher.start(machine.script("exit 5\n", python=False))
        launcher.wait(lambda: launcher.over, "the end")
        assert kernel.code == 5 and launcher.noise == ""


@pytest.mark.parametrize("noise", ["Welcome to the cluster!\\n", "no newline at all", "\\n--tunnel-relay\\n\\n"])
def test_a_login_that_prints_is_no_obstacle(machine, noise):
    command = "printf '{}'; echo to stderr >&2; {}".format(noise, product.bootstrap_command())
    with Launcher(machine, command=command, cable=True) as launcher:
        front_end, _ = launcher.launch(machine.kernel(), "compute")
        with front_end:
            launcher.cut()
            front_end.echo()
            assert launcher.noise.strip().startswith(noise.replace("\\n", "\n").strip()[:20])
            over(launcher, machine)


def ends_with(machine, command, data, shell="/bin/sh"):
    """The exit code of a login that gets ``data``, and what it printed."""
    login = machine.login(command, shell)
    out, errors = login.process.communicate(data, timeout=20)
    return login.process.returncode, out, errors.decode("utf-8", "replace")


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/csh", "/usr/bin/fish"])
def test_without_python_it_ends_with_101(machine, shell):
    if not os.path.exists(shell):
        pytest.skip("no {} here".format(shell))
    command = product.bootstrap_command().replace(product.PYTHONS, "no-python /nor/this")
    code, out, _ = ends_with(machine, command, product.first_sent(), shell)
    assert (code, out) == (101, b"") and "no Python 3" in product.explain_start(code, "")


@pytest.mark.skipif(not os.path.exists(os.path.join(PYENV, "2.7.18")), reason="no Python that is too old")
def test_an_old_python_is_passed_over_and_told(machine):
    old = os.path.join(PYENV, "2.7.18", "bin", "python2.7")
    alone = product.bootstrap_command().replace(product.PYTHONS, old)
    code, _, _ = ends_with(machine, alone, product.first_sent())
    assert code == 102 and "older than 3.6" in product.explain_start(code, "")
    both = product.bootstrap_command().replace(product.PYTHONS, old + " /bin/false python3")
    with Launcher(machine, command=both) as launcher:
        kernel = launcher.start(machine.script("exit 5\n", python=False))
        launcher.wait(lambda: launcher.over, "the end")
        assert kernel.code == 5


def test_a_source_that_is_cut_short_or_altered_is_told(machine):
    source = product.first_sent()
    for data, code in ((b"", 103), (source[:5], 103), (source[:-1], 103), (source, 104)):
        assert ends_with(machine, product.bootstrap_command(), data)[0] == code, len(data)
        assert product.explain_start(code, "")
    mangled = bytearray(source)
    mangled[len(source) // 2] ^= 1
    code, _, errors = ends_with(machine, product.bootstrap_command(), bytes(mangled))
    assert code == 106 and "zlib" in errors


@pytest.mark.parametrize(
    "start", ["read -r a", "read -r a; read -r b", "head -c 1 >/dev/null", "head -c 26 >/dev/null"]
)
def test_a_login_that_has_read_the_beginning_is_told(machine, start):
    command = "{}; {}".format(start, product.bootstrap_command())
    code, out, errors = ends_with(machine, command, product.first_sent() + b"more", "/bin/bash")
    assert (code, out, errors) == (product.TAKEN, b"", "")
    assert "reads standard input" in product.explain_start(code, "")


@pytest.mark.parametrize("shell", SHELLS + ["/usr/bin/ksh", "/bin/bash -i", "/usr/bin/zsh -i", "/bin/tcsh -i"])
def test_another_shell_in_place_of_the_login_shell_executes_nothing(machine, shell):
    """Its standard input stays open, as in a login. A fish reads all of it first, and then executes nothing of
    what it cannot read to its end."""
    if not os.path.exists(shell.split()[0]):
        pytest.skip("no {} here".format(shell))
    login = machine.login("exec " + shell)
    os.write(login.stdin, product.first_sent())
    if "fish" in shell:
        login.process.stdin.close()
        assert login.process.wait(20) in (127, product.OTHER_SHELL)
    else:
        assert login.process.wait(20) == product.OTHER_SHELL
    errors = login.errors()
    assert "not found" not in errors and "Unknown" not in errors
    assert "runs another shell" in product.explain_start(product.OTHER_SHELL, "")


@pytest.mark.parametrize("where", [">&-", ">/dev/null", ">all"])
def test_a_login_whose_output_leads_nowhere_starts_nothing(machine, where):
    for shell in ("/bin/sh", "/bin/bash"):
        code, _, errors = ends_with(
            machine, "exec {}; {}".format(where, product.bootstrap_command()), first_words(machine), shell
        )
        assert (code, errors) == (product.UNHEARD, "")
        assert "standard output" in product.explain_start(code, "")
    machine.no_process()


def first_words(machine, goodbye=False):
    """What a near end sends that has a kernel started at once, a shell script that leaves a mark."""
    near = product.Near(product.PollLoop())
    name = "relay-" + product.session_name(near.secret)
    machine.names += [os.path.join(folder, name) for folder in product.folders()]
    near.start([machine.script("touch ~/started; sleep 60\n", python=False)], 0)
    facts = {"session": near.secret, "new": True, "minutes": 60, "rest": len(near.connections.rest)}
    near.wire.attach(facts, before=near.connections.source, fresh=True, after=near.connections.rest)
    data = b""
    while near.wire.pull():
        chunk = b"".join(near.wire.pull())
        near.wire.wrote(len(chunk))
        data += chunk
    return data + (near.farewell if goodbye else b"")


@pytest.mark.parametrize("goodbye", [False, True])
def test_who_has_gone_before_the_relay_came_up_gets_no_kernel(machine, goodbye):
    login = machine.login("while [ ! -e ~/go ]; do sleep 0.05; done; " + product.bootstrap_command())
    os.write(login.stdin, first_words(machine, goodbye))
    if not goodbye:
        login.process.stdin.close()
    machine.write("go", "")
    assert login.process.wait(20) == 0
    machine.no_process()
    assert not os.path.exists(machine.path("started"))


def test_a_kernel_whose_launcher_hears_nothing_of_it_is_ended(machine, monkeypatch):
    product.alter_sent(monkeypatch, DEAD_SECONDS=1.0)
    command = "set -o pipefail; ({}) | cat >/dev/null".format(product.bootstrap_command())
    login = machine.login(command, "/bin/bash")
    os.write(login.stdin, first_words(machine))
    rig.wait_until(lambda: os.path.exists(machine.path("started")), 20, "the kernel")
    assert login.process.wait(20) == product.UNHEARD
    machine.no_process()


def test_a_session_that_was_never_acknowledged_waits_a_minute_at_most(machine, monkeypatch):
    product.alter_sent(monkeypatch, FIRST_SECONDS=1.0)
    login = machine.login()
    os.write(login.stdin, first_words(machine))
    rig.wait_until(lambda: os.path.exists(machine.path("started")), 20, "the kernel")
    login.process.stdin.close()
    machine.no_process()


def test_a_file_with_line_ends_of_windows_is_sent_all_the_same(tmp_path):
    product.copy_to(str(tmp_path))
    for name in product.files():
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes().replace(b"\n", b"\r\n"))
    assert product.sent_from(tmp_path) == b"".join(product.parcel())


def test_a_windows_kernel_machine_is_recognized():
    text = "'exec' is not recognized as an internal or external command,\noperable program or batch file."
    assert "no sh" in product.explain_start(1, text)
    assert product.explain_start(255, "Connection refused") is None


def test_reads_that_come_up_short_are_completed(machine):
    login = machine.login()
    data = product.first_sent() + product.hello(
        "near", {"session": os.urandom(16).hex(), "new": False, "host": "h-1"}
    )
    for start in range(0, len(data), 97):
        os.write(login.stdin, data[start : start + 97])
        time.sleep(0.0005)
    out = b""
    while product.END not in out:
        more = os.read(login.stdout, 4096)
        assert more, login.errors()
        out += more
    _, facts, _ = product.HelloReader("far").feed(out)
    assert facts["error"] == product.ELSEWHERE and "h-1" in facts["text"]
    assert login.process.wait(5) == product.NO_SESSION


def test_bytes_that_are_changed_on_the_way_are_told_as_such(machine):
    command = "({}) | LC_ALL=C sed -u 's/\\x11/\\x12/g'".format(product.bootstrap_command())
    with Launcher(machine, command=command) as launcher:
        launcher.wait(lambda: launcher.over, "the verdict")
        text, error = launcher.over
        assert error == product.ALTERED and "byte 0x11 comes out as 0x12" in text
        machine.no_process()
