"""install.py on the kernel machine: tunnel.m, put there from here or there, taken away by either."""

import os
import shutil
import subprocess

import pytest
import rig
from rig import installing
from rig.installing import ODD, OLD, Home, Login, copy_of_tunnel, tree

import install

this_machine_is_left_alone = installing.this_machine_is_left_alone


@pytest.fixture
def login(tmp_path):
    return Login(tmp_path)


def put(login, how, source=None):
    assert getattr(login, how)(source=source) == 0
    return login.path / ".Mathematica" / "Kernel" / "tunnel.m"


WAYS = ["local", "remote"]


@pytest.mark.parametrize("there", ["nothing", "base", "folder", "file", "other files"])
@pytest.mark.parametrize("back", ["local", "remote"])
@pytest.mark.parametrize("how", WAYS)
def test_whoever_put_it_there_either_takes_it_away(login, how, back, there):
    folder = login.path / ".Mathematica" / "Kernel"
    if there != "nothing":
        (folder.parent if there == "base" else folder).mkdir(parents=True)
    elif how == "remote":
        login.ssh.write_text(
            login.ssh.read_text().replace("env -i", "env -i MATHEMATICA_USERBASE=" + repr(str(folder.parent)))
        )
    if there == "file":
        (folder / "tunnel.m").write_bytes(OLD)
    elif there == "other files":
        (folder / "init.m").write_bytes(OLD)
        (folder / "tunnel.m.before-tunnel-2").write_bytes(OLD)
    before = tree(login.path)
    file = put(login, how)
    assert file.read_bytes() != OLD
    between = tree(login.path)
    assert getattr(login, back)("--uninstall", "--dry-run") == 0
    assert login.said == ["would remove: {}".format(file)]
    assert tree(login.path) == between
    assert getattr(login, back)("--uninstall") == 0
    assert login.said == ["removed: {}".format(file)] + ["restored: {}".format(file)] * (there == "file")
    assert tree(login.path) == before


@pytest.mark.parametrize("update", ["local", "remote"])
@pytest.mark.parametrize("back", ["local", "remote"])
@pytest.mark.parametrize("how", WAYS)
def test_whoever_put_it_there_either_updates_it(login, tmp_path, how, back, update):
    source = copy_of_tunnel(tmp_path / "other")
    (source / "tunnel.m").write_text("(* another version *)\n")
    folder = login.path / ".Mathematica" / "Kernel"
    folder.mkdir(parents=True)
    (folder / "tunnel.m").write_bytes(OLD)
    before = tree(login.path)
    put(login, how)
    assert getattr(login, update)(source=source) == 0
    assert login.said == ["installed: {}".format(folder / "tunnel.m")]
    assert sorted(os.listdir(str(folder))) == sorted([install.RECORD, "tunnel.m", "tunnel.m.before-tunnel"])
    between = tree(login.path)
    for again in ("local", "remote"):
        assert getattr(login, again)(source=source) == 0
        assert login.said == ["unchanged: {}".format(folder / "tunnel.m")]
        assert tree(login.path) == between
    assert getattr(login, back)("--uninstall") == 0
    assert tree(login.path) == before


@pytest.mark.parametrize("back", ["local", "remote"])
@pytest.mark.parametrize("how", WAYS)
def test_whoever_put_it_there_what_has_changed_is_kept(login, how, back):
    folder = login.path / ".Mathematica" / "Kernel"
    folder.mkdir(parents=True)
    (folder / "tunnel.m").write_bytes(OLD)
    put(login, how)
    (folder / "tunnel.m").write_text("mine now")
    assert getattr(login, back)("--uninstall") == 0
    assert login.said == [
        "kept: {}: it has changed since it was installed; what was there before is tunnel.m.before-tunnel".format(
            folder / "tunnel.m"
        )
    ]
    assert (folder / "tunnel.m").read_text() == "mine now"
    assert (folder / "tunnel.m.before-tunnel").read_bytes() == OLD
    put(login, back)
    assert (folder / "tunnel.m.before-tunnel-2").read_text() == "mine now"
    assert getattr(login, "remote" if back == "local" else "local")("--uninstall") == 0
    assert (folder / "tunnel.m").read_text() == "mine now"
    assert sorted(os.listdir(str(folder))) == ["tunnel.m", "tunnel.m.before-tunnel"]


@pytest.mark.parametrize("back", ["local", "remote"])
@pytest.mark.parametrize(
    "record", [b"", b"\xff\n{", b"folders x\nfile tunnel.m", b"folders -1\nfile tunnel.m - - -\n"]
)
def test_a_damaged_record_removes_nothing(login, capfd, back, record):
    folder = login.path / ".Mathematica" / "Kernel"
    folder.mkdir(parents=True)
    (folder / install.RECORD).write_bytes(record)
    (folder / "tunnel.m").write_bytes(OLD)
    assert getattr(login, back)("--uninstall") == 0
    assert (folder / "tunnel.m").read_bytes() == OLD
    assert capfd.readouterr() == ("", "")


def test_the_remote_side_serves_the_same_directories(tmp_path):
    mine, shared = tmp_path / ODD.replace("'", ""), tmp_path / "none" / "Mathematica"
    login = Login(tmp_path, WOLFRAM_USERBASE=mine)
    assert login.remote() == 0
    assert login.said == ["installed: {}/Kernel/tunnel.m".format(mine)]
    shared.mkdir(parents=True)  # it is here, though nobody has started it yet
    assert login.remote() == 0
    assert login.said[0] == "installed: {}/.Mathematica/Kernel/tunnel.m".format(login.path)
    (shared / "Kernel").mkdir()
    assert Home(login.path, WOLFRAM_BASE=str(shared)).install("--kernel") == 0  # as root may have done
    assert login.remote("--uninstall") == 0
    assert len([line for line in login.said if line.startswith("removed: ")]) == 3
    assert (tree(login.path), tree(shared)) == ({}, {"Kernel": None})
    assert login.remote("--uninstall") == 0
    assert login.said == ["nothing of Tunnel is installed here"]


def test_the_folder_of_both_parts_goes_with_the_last(login):
    home = Home(login.path, WOLFRAM_USERBASE=str(login.path / ".Wolfram"))
    assert home.install("--front-end") == 0
    assert login.remote() == 0
    assert home.install("--front-end", "--uninstall") == 0
    assert login.remote("--uninstall") == 0
    assert tree(login.path) == {}


SHELLS = {
    "bash": ".bashrc",
    "tcsh": ".tcshrc",
    "fish": ".config/fish/config.fish",
    "zsh": ".zshenv",
    "dash": ".profile",
}


@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_any_login_shell_will_do_and_may_print(tmp_path, shell):
    program = shutil.which(shell)
    if not program:
        pytest.skip("needs " + shell)
    login = Login(
        tmp_path, "{} -l".format(program) if shell == "dash" else program, SSH_CLIENT="1 2 3", SSH_CONNECTION="1"
    )
    noise = login.path / SHELLS[shell]
    noise.parent.mkdir(parents=True, exist_ok=True)
    noise.write_text("echo 'removed: everything'\nprintf 'no end of line: '\n")
    before = tree(login.path)
    if program and shell != "bash":
        assert "removed" in rig.run(str(login.ssh), "host", "true").stdout  # it does print
    assert login.remote() == 0
    assert login.said == [
        "installed: {}/.{}/Kernel/tunnel.m".format(login.path, name) for name in ("Mathematica", "Wolfram")
    ]
    assert login.remote("--uninstall") == 0
    assert {name: data for name, data in tree(login.path).items() if name in before} == before
    assert not [name for name in (".Mathematica", ".Wolfram") if (login.path / name).exists()]


@pytest.mark.parametrize(
    "shell, words",
    [
        ("/bin/true", "ssh ended with exit code 0, and no shell there has run the script to its end"),
        ("echo 'tunnel-install> installed: x'; exit 3", "ssh ended with exit code 3, and no shell there"),
        ("exit 255", "ssh ended with exit code 255"),
    ],
)
def test_a_script_that_was_not_run_is_a_failure(tmp_path, shell, words):
    login = Login(tmp_path, "/bin/sh")
    login.ssh.write_text("#!/bin/sh\ncat >/dev/null\n{}\n".format(shell))
    assert login.remote() == 1
    assert words in login.said[-1]


def test_a_script_that_arrives_in_part_does_nothing(login):
    script = install.Installer(["--remote", "host"]).remote_script()
    begin = script.index(b"TUNNEL_END_OF_FILE")
    for end in (begin + 1000, script.rindex(b"TUNNEL_END_OF_FILE"), script.rindex(b"\nmain\n")):
        rig.run(str(login.ssh), "sh", input=script[:end].decode("utf-8"))
        assert tree(login.path) == {}


def test_the_remote_side_says_what_it_needs_and_what_failed(login, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("sh", "env", "cat", "sed", "cut", "uname", "mkdir", "rmdir", "rm", "mv", "chmod", "grep", "head"):
        (bare / name).symlink_to(shutil.which(name))
    assert login.remote(KERNEL_PATH=str(bare)) == 1
    assert login.said == ["failed: one of sha256sum, shasum and openssl has to be there"]
    assert tree(login.path) == {}
    text = login.ssh.read_text()
    login.ssh.write_text(text.replace("HOME=", "OTHER="))
    assert login.remote() == 1
    assert login.said == ["failed: HOME is not set"]
    login.ssh.write_text(text)
    (login.path / ".Wolfram").write_text("in the way")
    assert login.remote() == 1
    assert login.said == [
        "installed: {}/.Mathematica/Kernel/tunnel.m".format(login.path),
        "failed: {}/.Wolfram/Kernel/tunnel.m: the folder cannot be made".format(login.path),
    ]


@pytest.mark.parametrize("tool", ["shasum", "openssl"])
def test_the_remote_side_makes_do_with_another_tool(login, tmp_path, tool):
    if not shutil.which(tool):
        pytest.skip("needs " + tool)
    bare = tmp_path / "bare"
    bare.mkdir()
    names = [
        "sh",
        "env",
        "cat",
        "sed",
        "cut",
        "uname",
        "mkdir",
        "rmdir",
        "rm",
        "mv",
        "chmod",
        "grep",
        "head",
        "perl",
    ]
    for name in [each for each in names + [tool] if shutil.which(each)]:
        (bare / name).symlink_to(shutil.which(name))
    assert login.remote(KERNEL_PATH=str(bare)) == 0
    assert login.local("--uninstall") == 0
    assert tree(login.path) == {}


def test_a_full_disk_there_leaves_what_was_there(login):
    text = login.ssh.read_text()
    login.ssh.write_text(text.replace("cd / &&", "trap '' XFSZ; ulimit -f 8; cd / &&"))
    folder = login.path / ".Wolfram" / "Kernel"
    for present, products in (({}, ("Mathematica", "Wolfram")), ({"tunnel.m": OLD}, ("Wolfram",))):
        for name, data in present.items():
            folder.mkdir(parents=True)
            (folder / name).write_bytes(data)
        before = tree(login.path)
        assert login.remote() == 1
        assert login.said == [
            "failed: {}/.{}/Kernel/tunnel.m: cannot be written".format(login.path, product) for product in products
        ]
        assert tree(login.path) == before


@pytest.fixture
def deadly(tmp_path):
    """A ``PATH`` whose tools that change files kill their shell, at the change whose number is in ``left``."""
    folder, left = tmp_path / "deadly", tmp_path / "left"
    folder.mkdir()
    for name in ("chmod", "mv", "rm"):
        (folder / name).write_text(
            '#!/bin/sh\nn=$(($(cat "{0}") - 1)); echo $n >"{0}"\n[ $n != 0 ] || {{ kill -9 $PPID; exit 1; }}\n'
            'exec {1} "$@"\n'.format(left, shutil.which(name))
        )
        (folder / name).chmod(0o755)
    return "{}:{}".format(folder, os.environ["PATH"]), left


@pytest.mark.parametrize("back", ["local", "remote"])
@pytest.mark.parametrize("first", [None, "local", "remote"])
def test_a_run_there_that_was_killed_can_be_undone(login, tmp_path, deadly, first, back):
    """The first one, or an update."""
    source = copy_of_tunnel(tmp_path / "other")
    (source / "tunnel.m").write_text("(* another version *)\n")
    folder = login.path / ".Mathematica" / "Kernel"
    folder.mkdir(parents=True)
    (folder / "tunnel.m").write_bytes(OLD)
    before = tree(login.path)
    number, code = 0, None
    while code != 0:
        number += 1
        if first:
            put(login, first)
        deadly[1].write_text(str(number))
        code = login.remote(source=source, KERNEL_PATH=deadly[0])
        assert getattr(login, back)("--uninstall") == 0
        assert tree(login.path) == before, number
    assert number > 3


def test_a_connection_that_is_cut_leaves_nothing_half_done(login):
    folder = login.path / ".Mathematica" / "Kernel"
    folder.mkdir(parents=True)
    (folder / "tunnel.m").write_bytes(OLD)
    before = tree(login.path)
    login.remote()
    script = install.Installer(["--remote", "host", "--uninstall"]).remote_script()
    process = subprocess.Popen(
        [str(login.ssh), "sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    process.stdin.write(script)
    process.stdin.close()
    process.wait(10)
    process.stderr.close()
    assert tree(login.path) == before


def remote(machine, tmp_path, *argv):
    environ = dict(os.environ, TUNNEL_SSH=machine.ssh)
    said = []
    options = ["--remote", machine.destination, "-o", "StrictHostKeyChecking=accept-new"] + list(argv)
    code = install.Installer(options, "linux", environ, str(tmp_path), said.append).run()
    return code, said


def test_remote_puts_tunnel_m_into_the_home_on_the_kernel_machine(machine, tmp_path):
    source = os.path.join(rig.LAUNCHERS, "tunnel.m")
    there = os.path.join(machine.home, ".Mathematica", "Kernel", "tunnel.m")
    machine.shell(
        "rm -rf .Mathematica .Wolfram; mkdir -p .Mathematica/Kernel; echo old > .Mathematica/Kernel/tunnel.m"
    )
    before = tree(machine.home)
    assert remote(machine, tmp_path, "--dry-run")[0] == 0
    assert tree(machine.home) == before
    assert remote(machine, tmp_path)[0] == 0
    assert install.read(there) == install.read(source)
    assert install.read(there + ".before-tunnel") == b"old\n"
    code, said = remote(machine, tmp_path)
    assert (code, len(said)) == (0, 1)
    assert said[0].endswith(": unchanged: " + there)
    assert remote(machine, tmp_path, "--uninstall")[0] == 0
    assert tree(machine.home) == before


def test_remote_makes_both_layouts_where_there_is_none_and_takes_them_back(machine, tmp_path):
    machine.shell("rm -rf .Mathematica .Wolfram")
    before = tree(machine.home)
    assert remote(machine, tmp_path)[0] == 0
    for base in (".Mathematica", ".Wolfram"):
        assert os.path.exists(os.path.join(machine.home, base, "Kernel", "tunnel.m"))
    assert remote(machine, tmp_path, "--uninstall")[0] == 0
    assert tree(machine.home) == before


def test_remote_says_when_it_fails(machine, tmp_path):
    code, said = remote(machine, tmp_path, "-o", "Port=1")
    assert code == 1
    assert said[-1].startswith("failed: ")
