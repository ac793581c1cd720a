"""install.py: what it puts where, what it leaves alone, and that what it puts there works."""

import os
import shutil
import subprocess
import sys

import frontend
import pytest
import rig

import install
import tunnel

OLD = b"#!/bin/sh\n# the old shell script\n"


def tree(folder):
    """Every file and folder below ``folder``, with contents and modes."""
    found = {}
    for root, folders, names in os.walk(str(folder)):
        for name in folders:
            path = os.path.join(root, name)
            found[os.path.relpath(path, str(folder))] = None
        for name in names:
            path = os.path.join(root, name)
            with open(path, "rb") as stream:
                found[os.path.relpath(path, str(folder))] = (stream.read(), os.stat(path).st_mode & 0o777)
    return found


class Home:
    """A home on some system, and install.py for it."""

    def __init__(self, path, platform="linux", **environ):
        self.path, self.platform, self.said = path, platform, []
        self.environ = dict(
            {"WOLFRAM_BASE": str(path / "none" / "w"), "MATHEMATICA_BASE": str(path / "none" / "m")}
        )
        self.environ.update(environ)

    def install(self, *argv):
        self.said = []
        return install.Installer(argv, self.platform, self.environ, str(self.path), self.said.append).run()


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path)


@pytest.mark.parametrize(
    "platform, user, system",
    [
        ("linux", "/h/.Mathematica /h/.Wolfram", "/usr/share/Mathematica /usr/share/Wolfram"),
        ("darwin", "/h/Library/Mathematica /h/Library/Wolfram", "/Library/Mathematica /Library/Wolfram"),
        ("win32", "A\\Mathematica A\\Wolfram", "P\\Mathematica P\\Wolfram"),
    ],
)
def test_directories_of_each_system(platform, user, system):
    bases = install.base_directories(platform, {"APPDATA": "A", "ProgramData": "P"}, "/h")
    assert [pair[0] for pair in bases.values()] == user.split(" ")
    assert [pair[1] for pair in bases.values()] == system.split(" ")


def test_environment_variables_override_the_directories():
    environ = {"MATHEMATICA_BASE": "a", "MATHEMATICA_USERBASE": "b", "WOLFRAM_BASE": "c", "WOLFRAM_USERBASE": "d"}
    bases = install.base_directories("linux", environ, "/h")
    assert bases == {"Mathematica": ("b", "a"), "Wolfram": ("d", "c")}


def test_a_home_without_any_gets_the_newest_layout(home):
    assert home.install() == 0
    assert sorted(tree(home.path)) == sorted(
        [".Wolfram", ".Wolfram/FrontEnd", ".Wolfram/FrontEnd/__pycache__", "none", "none/w", "none/w/Kernel"]
        + [".Wolfram/FrontEnd/" + name for name in ("tunnel.py", "tunnel_sub.py", "tunnel.sh", "tunnel_sub.sh")]
        + [".Wolfram/FrontEnd/" + install.RECORD, "none/w/Kernel/" + install.RECORD, "none/w/Kernel/tunnel.m"]
        + [name for name in tree(home.path) if name.endswith(".pyc")]
    )
    assert len([name for name in tree(home.path) if name.endswith(".pyc")]) == 2


def test_every_layout_that_exists_is_served(home):
    for name in (".Mathematica", ".Wolfram"):
        (home.path / name).mkdir()
    assert home.install("--front-end") == 0
    for name in (".Mathematica", ".Wolfram"):
        assert os.access(str(home.path / name / "FrontEnd" / "tunnel.sh"), os.X_OK)
    assert not (home.path / "none").exists()


def test_running_it_again_changes_nothing(home):
    home.install()
    before = tree(home.path)
    assert home.install() == 0
    assert tree(home.path) == before
    assert all(line.startswith("unchanged: ") for line in home.said)


def test_uninstall_gives_the_home_back_byte_for_byte(home):
    for base in (".Mathematica", ".Wolfram"):
        folder = home.path / base / "FrontEnd"
        folder.mkdir(parents=True)
        (folder / "init.m").write_text("settings")
    for name in ("tunnel.sh", "tunnel_sub.sh"):
        (home.path / ".Mathematica" / "FrontEnd" / name).write_bytes(OLD)
        (home.path / ".Mathematica" / "FrontEnd" / name).chmod(0o700)
    before = tree(home.path)
    assert home.install() == 0
    assert (home.path / ".Mathematica/FrontEnd/tunnel.sh.before-tunnel").read_bytes() == OLD
    assert tree(home.path) != before
    assert home.install("--uninstall") == 0
    assert tree(home.path) == before


def test_a_changed_file_is_kept(home):
    home.install("--front-end")
    script = home.path / ".Wolfram/FrontEnd/tunnel.sh"
    script.write_text("mine now")
    assert home.install("--front-end") == 0
    assert (home.path / ".Wolfram/FrontEnd/tunnel.sh.before-tunnel").read_text() == "mine now"
    script.write_text("mine again")
    assert home.install("--uninstall") == 0
    assert script.read_text() == "mine again"
    assert "has changed since" in str(home.said)


def test_dry_run_lists_and_does_nothing(home):
    assert home.install("--dry-run") == 0
    assert tree(home.path) == {}
    assert len([line for line in home.said if line.startswith("would install: ")]) == 5
    home.install()
    before = tree(home.path)
    assert home.install("--dry-run", "--uninstall") == 0
    assert tree(home.path) == before
    assert len([line for line in home.said if line.startswith("would remove: ")]) == 5


def test_what_failed_is_said_per_file_and_the_rest_goes_on(home):
    folder = home.path / ".Wolfram" / "FrontEnd"
    (folder / "tunnel.py").mkdir(parents=True)
    (folder / "tunnel.py" / "x").write_text("")
    (home.path / "none").write_text("a file where a folder should be")
    assert home.install("--kernel") == 0  # falls back to the user's
    assert "cannot be written" in home.said[0]
    (folder / "tunnel_sub.sh").mkdir()
    assert home.install("--front-end") == 0
    assert (folder / "tunnel_sub.sh.before-tunnel").is_dir()
    shutil.rmtree(str(folder))
    folder.write_text("in the way")
    assert home.install("--front-end") == 1
    assert home.said[-1].startswith("failed: " + str(folder))


def test_windows_gets_batch_files(tmp_path):
    home = Home(tmp_path, "win32", APPDATA=str(tmp_path / "AppData"))
    home.environ.pop("WOLFRAM_BASE")
    home.environ["ProgramData"] = str(tmp_path / "ProgramData")
    assert home.install("--front-end") == 0
    found = [path for path in tmp_path.rglob("tunnel*.bat")] or os.listdir(str(tmp_path))
    names = sorted(str(each).replace("\\", "/").rpartition("/")[2] for each in found)
    assert names == ["tunnel.bat", "tunnel_sub.bat"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--what"], "--what: not known"),
        (["--remote"], "--remote: a value"),
        (["--remote", "a:b@c"], "--remote: no password"),
        (["--remote", "-x"], "host: "),
        (["--remote", "c", "--kernel"], "--remote: installs"),
        (["-o", "x"], "-o: expected"),
    ],
)
def test_bad_arguments(argv, words, capsys):
    assert install.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_the_scripts_need_nothing_but_the_standard_library():
    script = os.path.join(rig.LAUNCHERS, ".ci", "stdlib_only.py")
    names = [os.path.join(rig.LAUNCHERS, name) for name in ("tunnel.py", "tunnel_sub.py", "install.py")]
    assert subprocess.call([sys.executable, script] + names, stdout=subprocess.DEVNULL) == 0


# -- what was installed is used


@pytest.fixture
def installed(tmp_path, desk):
    """A home with blanks in its path, where the old shell scripts were, and Tunnel now is."""
    home = Home(tmp_path / "my home")
    folder = home.path / ".Mathematica" / "FrontEnd"
    folder.mkdir(parents=True)
    for name in ("tunnel.sh", "tunnel_sub.sh"):
        (folder / name).write_bytes(OLD)
        (folder / name).chmod(0o755)
    assert home.install("--front-end") == 0
    desk.folder = folder
    return folder


def login_script(desk, machine, role, installed, environment, host=None):
    """Launch as a front end does: the configuration's command, through the shell, with a minimal PATH."""
    end = frontend.FrontEnd(role)
    desk.front_ends.append(end)
    script = "tunnel_sub.sh" if role == "compute" else "tunnel.sh"
    kernel = machine.modern if role == "callback" else machine.classic
    command = '"{}/{}" "{}" "{}" "{}"'.format(installed, script, host or machine.destination, kernel, end.link)
    environ = dict(desk.environment(machine), PATH="/usr/bin:/bin:/usr/sbin:/sbin", HOME=str(installed))
    environ.update(environment)
    end.launcher = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environ,
        cwd="/",
        universal_newlines=True,
    )
    return end


@pytest.mark.parametrize("role", ["callback", "classic", "compute"])
def test_an_unchanged_kernel_configuration_launches(desk, machine, installed, role):
    libraries = "/opt/Wolfram/SystemFiles/Libraries/Linux-x86-64:/opt/mine"
    end = login_script(desk, machine, role, installed, {"LD_LIBRARY_PATH": libraries})
    end.accept()
    end.echo()
    end.quit()
    assert end.wait() == (0, "")
    assert "the kernel has ended" in desk.logs()[0] or role == "compute"


def test_the_drop_in_answers_the_password_prompt(desk, machine, installed):
    host = "john:{}@{}".format(rig.PASSWORD, machine.address)
    os.chmod(str(installed / "tunnel.py"), 0o644)  # as on a file system without execute bits
    end = login_script(desk, machine, "compute", installed, {"TUNNEL_SSH": machine.make_keyless_ssh()}, host)
    end.accept()
    assert end.wait() == (0, "")


def test_the_drop_in_takes_mathematica_libraries_out_before_python_starts(tmp_path):
    seen = tmp_path / "seen"
    python = tmp_path / "it's python"
    python.write_text('#!/bin/sh\necho "${{LD_LIBRARY_PATH-unset}}" > "{}"\n'.format(seen))
    python.chmod(0o755)
    script = tmp_path / "tunnel.sh"
    script.write_text(install.drop_in("tunnel", "linux", str(python)))
    libraries = "/opt/Wolfram Research/SystemFiles/Libraries/Linux-x86-64"
    for given, kept in (
        (libraries, "unset"),
        ("/a b:" + libraries + ":/c*", "/a b:/c*"),
        ("/a", "/a"),
    ):
        subprocess.check_call(["/bin/sh", str(script)], env={"PATH": "/bin:/usr/bin", "LD_LIBRARY_PATH": given})
        assert seen.read_text() == kept + "\n"


def test_the_drop_in_says_what_to_do_when_its_python_is_gone(tmp_path):
    script = tmp_path / "tunnel_sub.sh"
    script.write_text(install.drop_in("tunnel_sub", "linux", "/no/such/python3"))
    done = rig.run("/bin/sh", str(script), "host", "kernel", "link")
    assert done.returncode == 69
    assert "run install.py again" in done.stderr
    (log,) = (tmp_path / "Logs").glob("*.log")
    assert "run install.py again" in log.read_text()


def test_the_drop_in_ignores_modules_where_it_is_called(tmp_path, installed):
    (tmp_path / "socket.py").write_text("raise SystemExit(99)")
    (tmp_path / "select.py").write_text("raise SystemExit(99)")
    done = rig.run(str(installed / "tunnel.sh"), "--version", cwd=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "tunnel {}\n".format(tunnel.VERSION))


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
    assert ": unchanged " in said[0]
    assert remote(machine, tmp_path, "--uninstall")[0] == 0
    assert tree(machine.home) == before


def test_remote_makes_the_newest_layout_where_there_is_none_and_takes_it_back(machine, tmp_path):
    machine.shell("rm -rf .Mathematica .Wolfram")
    before = tree(machine.home)
    assert remote(machine, tmp_path)[0] == 0
    assert os.path.exists(os.path.join(machine.home, ".Wolfram", "Kernel", "tunnel.m"))
    assert remote(machine, tmp_path, "--uninstall")[0] == 0
    assert tree(machine.home) == before


def test_remote_says_when_it_fails(machine, tmp_path):
    code, said = remote(machine, tmp_path, "-o", "Port=1")
    assert code == 1
    assert said[-1].startswith("failed: ")
