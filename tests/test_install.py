"""install.py: what it puts where, what it leaves alone, and that what it puts there works."""

import errno
import fcntl
import os
import pwd
import resource
import shutil
import subprocess
import sys
import threading
import time

import frontend
import pytest
import rig

import install
import tunnel

SHARE = install.SHARE
OLD = b"#!/bin/sh\n# the old shell script\n"
INSTALL = os.path.join(rig.LAUNCHERS, "install.py")
MINIMAL = "/usr/bin:/bin:/usr/sbin:/sbin"  # the PATH that a front end has
ODD = "it's 50% \"off\" $HOME `pwd` \\ ä * 'x'"


def tree(folder):
    """Every file and folder below ``folder``, with contents and modes."""
    found = {}
    for root, folders, names in os.walk(str(folder)):
        for name in folders:
            path = os.path.join(root, name)
            found[os.path.relpath(path, str(folder))] = None
        for name in names:
            path = os.path.join(root, name)
            if os.path.islink(path):
                found[os.path.relpath(path, str(folder))] = os.readlink(path)
                continue
            with open(path, "rb") as stream:
                found[os.path.relpath(path, str(folder))] = (stream.read(), os.stat(path).st_mode & 0o777)
    return found


@pytest.fixture(autouse=True)
def this_machine_is_left_alone(tmp_path, monkeypatch):
    """Whatever goes wrong: nobody's home is touched, nor what is for all users."""
    monkeypatch.setattr(install, "SHARE", str(tmp_path / "none") + "/")
    monkeypatch.setenv("HOME", str(tmp_path))
    for product in install.PRODUCTS:
        for suffix in ("_USERBASE", "_BASE"):
            monkeypatch.delenv(product.upper() + suffix, raising=False)


class Home:
    """A home on some system, and install.py for it."""

    def __init__(self, path, platform="linux", **environ):
        self.path, self.platform, self.environ, self.said = path, platform, environ, []

    def install(self, *argv, source=None):
        self.said = []
        installer = install.Installer(argv, self.platform, self.environ, str(self.path), self.said.append)
        installer.source = str(source or installer.source)
        return installer.run()


def copy_of_tunnel(folder, *names):
    """Tunnel as someone may have it elsewhere; of ``names`` only, if given."""
    folder.mkdir(parents=True)
    for name in names or ("install.py", "tunnel.py", "tunnel_sub.py", "tunnel.m"):
        shutil.copy(os.path.join(rig.LAUNCHERS, name), str(folder))
    return folder


def run_install(*argv, script=INSTALL, before="", **environ):
    """Run install.py as a user does; ``before`` is what a shell does first, ``None`` unsets a variable."""
    environ.setdefault("PYTHONUNBUFFERED", None)
    environ = {name: value for name, value in dict(os.environ, **environ).items() if value is not None}
    command = before + '; exec "$0" "$@"' if before else 'exec "$0" "$@"'
    return rig.run("sh", "-c", command, sys.executable, str(script), *argv, env=environ)


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
def test_directories_of_each_system(platform, user, system, monkeypatch):
    monkeypatch.setattr(install, "SHARE", SHARE)
    bases = install.base_directories(platform, {"APPDATA": "A", "ProgramData": "P"}, "/h")
    assert [pair[0] for pair in bases.values()] == user.split(" ")
    assert [pair[1] for pair in bases.values()] == system.split(" ")


def test_environment_variables_override_the_directories():
    environ = {"MATHEMATICA_BASE": "a", "MATHEMATICA_USERBASE": "b", "WOLFRAM_BASE": "c", "WOLFRAM_USERBASE": "d"}
    bases = install.base_directories("linux", environ, "/h")
    assert bases == {"Mathematica": ("b", "a"), "Wolfram": ("d", "c")}


@pytest.mark.parametrize("relay", [True, False])
def test_a_home_without_any_gets_both_layouts(home, tmp_path_factory, relay):
    source = copy_of_tunnel(tmp_path_factory.mktemp("of") / "tunnel")
    scripts = ["tunnel.py", "tunnel_sub.py"]
    if relay:
        scripts.append("tunnel_relay.py")
        (source / "tunnel_relay.py").write_text("a = 1\n")
    assert home.install(source=source) == 0
    expected = ["none"]
    for product in ("Mathematica", "Wolfram"):
        user, shared = "." + product, "none/" + product
        expected += [user, shared, shared + "/Kernel"]
        expected += [shared + "/Kernel/" + name for name in (install.RECORD, "tunnel.m")]
        for name in ["", "/__pycache__", "/" + install.RECORD, "/tunnel.sh", "/tunnel_sub.sh"]:
            expected.append(user + "/FrontEnd" + name)
        expected += [user + "/FrontEnd/" + name for name in scripts]
        for name in scripts:
            mode = tree(home.path)[user + "/FrontEnd/" + name][1]
            assert mode == (0o644 if "relay" in name else 0o755)
        assert len(list((home.path / user).rglob("*.pyc"))) == len(scripts)
    assert sorted(name for name in tree(home.path) if not name.endswith(".pyc")) == sorted(expected)
    assert home.install("--uninstall") == 0
    assert tree(home.path) == {}


@pytest.mark.parametrize("part, folder", [("--front-end", "FrontEnd"), ("--kernel", "Kernel")])
@pytest.mark.parametrize("name", ["MATHEMATICA_USERBASE", "WOLFRAM_USERBASE"])
def test_a_user_base_directory_that_is_named_is_installed_to(tmp_path, part, folder, name):
    """Whether it is there or not, another product is, or the base directory could be written as well."""
    home = Home(tmp_path, "win32", APPDATA=str(tmp_path), ProgramData=str(tmp_path / "all users"))
    home.environ[name] = str(tmp_path / "named")
    assert home.install(part) == 0
    assert sorted(os.listdir(str(tmp_path))) == ["named"]
    assert os.listdir(str(tmp_path / "named")) == [folder]
    assert home.install("--uninstall") == 0
    (tmp_path / ("\\Wolfram" if name.startswith("M") else "\\Mathematica")).mkdir()
    (tmp_path.parent / (tmp_path.name + "\\Wolfram")).mkdir()
    assert home.install(part) == 0
    assert os.listdir(str(tmp_path / "named")) == [folder]


@pytest.mark.parametrize("name", ["MATHEMATICA_BASE", "WOLFRAM_BASE"])
def test_a_base_directory_that_is_named_is_installed_to(home, name):
    home.environ[name] = str(home.path / "named")
    for _ in range(2):
        assert home.install("--kernel") == 0
        assert sorted(tree(home.path)) == ["named"] + [
            "named/Kernel" + rest for rest in ("", "/tunnel-install.txt", "/tunnel.m")
        ]


def test_a_base_directory_comes_first_where_both_are_named(home):
    home.environ.update(WOLFRAM_BASE=str(home.path / "all"), WOLFRAM_USERBASE=str(home.path / "mine"))
    assert home.install("--kernel") == 0
    assert os.listdir(str(home.path)) == ["all"]


def test_every_layout_that_exists_is_served(home):
    for name in (".Mathematica", ".Wolfram"):
        (home.path / name).mkdir()
    assert home.install("--front-end") == 0
    for name in (".Mathematica", ".Wolfram"):
        assert os.access(str(home.path / name / "FrontEnd" / "tunnel.sh"), os.X_OK)
    assert not (home.path / "none").exists()


@pytest.mark.parametrize("name", ["Mathematica", "Wolfram"])
def test_a_layout_that_is_there_alone_is_served_alone(tmp_path, name):
    home, login = Home(tmp_path / "home"), Login(tmp_path)
    for path in (home.path, login.path):
        (path / ("." + name)).mkdir(parents=True)
    assert home.install("--front-end") == login.remote() == 0
    assert os.listdir(str(home.path)) == os.listdir(str(login.path)) == ["." + name]


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


def test_what_is_there_already_is_not_taken_away(home):
    """Byte code of it included: somebody has put it there by hand, and what he starts writes the same."""
    folder = home.path / ".Wolfram" / "FrontEnd"
    folder.mkdir(parents=True)
    shutil.copy(tunnel.__file__, str(folder))
    before = tree(home.path)
    assert home.install("--front-end") == 0
    assert home.said[0] == "unchanged: {}".format(folder / "tunnel.py")
    assert home.install("--uninstall") == 0
    assert tree(home.path) == before


def test_dry_run_lists_and_does_nothing(home):
    assert home.install("--dry-run") == 0
    assert tree(home.path) == {}
    assert len([line for line in home.said if line.startswith("would install: ")]) == len(home.said) >= 5
    home.install()
    before = tree(home.path)
    assert home.install("--dry-run", "--uninstall") == 0
    assert tree(home.path) == before
    assert len([line for line in home.said if line.startswith("would remove: ")]) == len(home.said) >= 5


def test_what_is_in_the_way_is_moved_aside_or_said(home):
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
    assert home.said == ["failed: {}: File exists".format(folder)]


def test_windows_gets_batch_files(tmp_path):
    home = Home(tmp_path, "win32", APPDATA=str(tmp_path / "AppData"))
    home.environ["ProgramData"] = str(tmp_path / "ProgramData")
    assert home.install("--front-end") == 0
    found = [path for path in tmp_path.rglob("tunnel*.bat")] or os.listdir(str(tmp_path))
    names = sorted(str(each).replace("\\", "/").rpartition("/")[2] for each in found)
    assert names == ["tunnel.bat"] * 2 + ["tunnel_sub.bat"] * 2  # for both layouts, since there is none


@pytest.mark.parametrize(
    "argv, line",
    [
        (["--what"], "--what: not known; --help lists the options"),
        (["--what=x"], "--what: not known; --help lists the options"),
        (["--w\nhat"], "this option: not known; --help lists the options"),
        (["--front"], "--front: not known; --help lists the options"),
        (["--dry-run=yes"], "--dry-run: expected nothing after it"),
        (["john:secret@host"], "too many arguments; a host stands after --remote"),
        ([""], "too many arguments; a host stands after --remote"),
        (["--remote"], "--remote: expected HOST, as in --remote john@host.example.com"),
        (["--remote", "-x"], "--remote: expected HOST, as in --remote john@host.example.com"),
        (["--remote="], "--remote: the host is empty; expected [user[:password]@]host[:port]"),
        (["--remote", "a:b@c"], "--remote: no password here; ssh asks for it"),
        (
            ["--remote", "c", "--kernel"],
            "--remote: installs for the kernel there; leave --front-end and --kernel out",
        ),
        (["-o"], "-o: expected NAME=VALUE, as in -o Compression=no"),
        (["-o", "x"], "-o: expected NAME=VALUE, as in -o Compression=no"),
        (["-ox"], "-o: expected NAME=VALUE, as in -o Compression=no"),
        (["-o", "Port=22"], "-o: is for --remote only"),
    ],
)
def test_bad_arguments(argv, line, capsys):
    assert install.main(argv) == 2
    assert tuple(capsys.readouterr()) == ("", "install.py: {}\n".format(line))


def test_options_are_understood_as_ssh_understands_them():
    options = install.Parser.make().parse(["-oPort=22", "-o", "User=john", "--remote=c", "--dry-run"])
    assert options.ssh_options == [("Port", "22"), ("User", "john")]
    assert (options.remote.host, options.dry_run, options.uninstall) == ("c", True, False)


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--kernel", "--help"]])
def test_help_lists_all_options(argv, capsys):
    assert install.main(argv) == 0
    output, errors = capsys.readouterr()
    words = "--front-end --kernel --remote HOST -o NAME=VALUE --dry-run --uninstall --version --help"
    assert set(words.split()) <= set(output.replace(",", " ").split())
    assert errors == ""


def test_version(capsys):
    assert install.main(["--version"]) == 0
    assert tuple(capsys.readouterr()) == ("tunnel {}\n".format(tunnel.VERSION), "")


@pytest.mark.parametrize(
    "argv, redirection, code, errors",
    [
        (["--help"], ">/dev/full", 1, "install.py: the output could not be written: No space left on device\n"),
        (["--help"], ">&-", 0, ""),
        (
            ["--front-end"],
            ">/dev/full",
            1,
            "install.py: the output could not be written: No space left on device\n",
        ),
        (["--front-end"], ">&-", 0, ""),
        (["--what"], "2>/dev/full", 2, ""),
        (["--what"], "2>&-", 2, ""),
    ],
)
def test_output_that_has_nowhere_to_go(tmp_path, argv, redirection, code, errors):
    done = run_install(*argv, before="exec " + redirection, HOME=str(tmp_path))
    assert (done.returncode, done.stderr) == (code, errors)
    if argv == ["--front-end"]:  # what was to be done is done
        assert (tmp_path / ".Wolfram/FrontEnd/tunnel_sub.sh").exists()


def test_a_reader_who_has_seen_enough(tmp_path):
    environ = dict(os.environ, PYTHONUNBUFFERED="")
    reader, writer = os.pipe()
    os.close(reader)
    for argv in (["--dry-run"], ["--help"], ["--front-end"]):
        process = subprocess.Popen(
            [sys.executable, INSTALL] + argv, stdout=writer, stderr=subprocess.PIPE, env=environ
        )
        assert process.communicate()[1] == b""
        assert process.returncode == 0
    os.close(writer)
    assert (tmp_path / ".Wolfram/FrontEnd/tunnel_sub.sh").exists()


def test_paths_that_the_output_cannot_show(tmp_path):
    home = tmp_path / "Möbel"
    home.mkdir()
    done = run_install("--front-end", HOME=str(home), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "M\\xf6bel" in done.stdout


# -- odd situations


def test_what_is_missing_beside_it_is_named(tmp_path):
    alone = copy_of_tunnel(tmp_path / "alone", "install.py")
    done = run_install("--dry-run", script=alone / "install.py")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "tunnel.py is missing" in done.stderr
    part = copy_of_tunnel(tmp_path / "part", "install.py", "tunnel.py", "tunnel_sub.py")
    for argv in (["--kernel"], ["--remote", "host"]):
        done = run_install(
            *argv, script=part / "install.py", MATHEMATICA_BASE=str(tmp_path), TUNNEL_SSH="/bin/true"
        )
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
        assert "{}: No such file or directory; it has".format(part / "tunnel.m") in done.stderr


def test_it_can_be_run_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to(INSTALL)
    done = run_install("--dry-run", script=tmp_path / "link", HOME=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


def test_an_old_python_is_told():
    code = "import sys; sys.version_info = (3, 5, 2, 'final', 0); exec(open(sys.argv[1]).read())"
    done = rig.run(sys.executable, "-c", code, INSTALL)
    assert (done.returncode, done.stderr) == (1, "install.py: needs Python 3.6 or later, and this is 3.5\n")


@pytest.mark.parametrize("home", [".", "/no/such/home"])
def test_a_home_that_is_none(tmp_path, home):
    done = run_install("--dry-run", HOME=home)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("install.py: HOME: names no directory;")
    named = {name + "_USERBASE": str(tmp_path) for name in ("MATHEMATICA", "WOLFRAM")}
    assert run_install("--dry-run", HOME=home, **named).returncode == 0


def test_without_home_the_list_of_users_counts(monkeypatch):
    there = pwd.getpwuid(os.getuid()).pw_dir
    for home in (None, ""):
        done = run_install("--dry-run", "--front-end", HOME=home)
        if os.path.isdir(there):
            assert done.stdout.startswith(("would install: " + there, "unchanged: " + there))
        else:
            assert done.stderr.startswith("install.py: HOME: names no directory")

    def unknown(path):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(os.path, "expanduser", unknown)
    with pytest.raises(tunnel.Fatal):
        install.home_directory("linux", {})


def test_sudo_installs_for_kernels_only(home, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    home.environ["SUDO_USER"] = "john"
    for argv in ([], ["--front-end"]):
        with pytest.raises(tunnel.Fatal) as caught:
            home.install(*argv)
        assert "john's" in str(caught.value.text)
        assert tree(home.path) == {}
    assert home.install("--kernel") == 0
    assert home.install("--uninstall") == 0
    assert tree(home.path) == {}


def test_all_users_can_read_what_is_for_all(home):
    before = os.umask(0o077)
    try:
        assert home.install("--kernel") == 0
    finally:
        os.umask(before)
    for path in ("none", "none/Wolfram", "none/Wolfram/Kernel", "none/Wolfram/Kernel/tunnel.m"):
        assert os.stat(str(home.path / path)).st_mode & 0o055 in (0o055, 0o044)


def test_a_lost_execute_bit_comes_back(home):
    home.install("--front-end")
    before = tree(home.path)
    script = home.path / ".Wolfram/FrontEnd/tunnel.sh"
    script.chmod(0o644)
    assert home.install("--front-end") == 0
    assert [line for line in home.said if "unchanged" not in line] == ["made executable: {}".format(script)]
    assert tree(home.path) == before


def test_one_directory_for_both_products(home):
    (home.path / "link").symlink_to(home.path / "one")
    for suffix in ("_USERBASE", "_BASE"):
        home.environ["MATHEMATICA" + suffix] = str(home.path / "one")
        home.environ["WOLFRAM" + suffix] = str(home.path / "link")
    (home.path / "one").mkdir()
    before = tree(home.path)
    assert home.install() == 0
    assert len(home.said) == len(set(home.said)) == len([line for line in home.said if "installed" in line])
    assert home.install("--uninstall") == 0
    assert len(home.said) == len([line for line in home.said if "removed" in line])
    assert tree(home.path) == before


@pytest.mark.parametrize("first, second", [("--front-end", "--kernel"), ("--kernel", "--front-end")])
def test_both_parts_can_go_one_after_the_other(home, first, second):
    home.environ["WOLFRAM_USERBASE"] = str(home.path / "w")
    for part in (first, second, first, second):
        assert home.install(part) == 0
    assert home.install("--uninstall", first) == 0
    assert home.install("--uninstall", second) == 0
    assert tree(home.path) == {}


def test_nothing_to_uninstall_is_said(home):
    assert home.install("--uninstall") == 0
    (line,) = home.said
    assert line.startswith("nothing of Tunnel is installed in " + str(home.path))


def test_a_full_disk_leaves_what_was_there(home, tmp_path_factory):
    """A limit on the size of files: what is longer than 8 KB cannot be written."""
    source = copy_of_tunnel(tmp_path_factory.mktemp("of") / "tunnel")
    folder = home.path / ".Wolfram" / "FrontEnd"
    folder.mkdir(parents=True)
    (folder / "tunnel.sh").write_bytes(OLD)  # which works, and has to after this
    before = tree(home.path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        assert home.install(source=source) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert home.said == [
        "failed: {}: File too large".format(path)
        for path in (folder / "tunnel.py", home.path / "none/Wolfram/Kernel/tunnel.m")
    ]
    assert tree(home.path) == before


def test_a_folder_that_cannot_be_written_is_one_line(home):
    folder = home.path / ".Wolfram" / "FrontEnd"
    (folder / install.RECORD).mkdir(parents=True)  # as good as a read-only folder, for root too
    for argv in (["--front-end"], ["--front-end", "--uninstall"]):
        assert home.install(*argv) == 1
        assert home.said == ["failed: {}: Is a directory".format(folder / install.RECORD)]


def killed_after(number, action):
    """Whether ``action`` ended by itself in a process that is killed at its ``number``-th change of a file."""
    child = os.fork()
    if not child:
        left = [number]

        def counted(real):
            def call(*arguments, **options):
                left[0] -= 1
                if not left[0]:
                    os._exit(9)
                return real(*arguments, **options)

            return call

        for name in ("chmod", "rename", "replace", "remove"):
            setattr(os, name, counted(getattr(os, name)))
        action()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("then", ["", "again", "another"])
def test_a_run_that_was_killed_can_be_undone(home, tmp_path_factory, then):
    one, other = (copy_of_tunnel(tmp_path_factory.mktemp(name) / "tunnel") for name in ("one", "other"))
    (one / "tunnel.py").write_text("one = 1\n")  # soon compiled
    (other / "tunnel.py").write_text("other = 1\n")
    folder = home.path / ".Wolfram" / "FrontEnd"
    folder.mkdir(parents=True)
    (home.path / "none").mkdir()
    for name in ("tunnel.sh", "tunnel.py"):
        (folder / name).write_bytes(OLD)
    before = tree(home.path)
    number, ended = 0, False
    while not ended:
        number += 1
        if then == "another":
            assert home.install("--front-end", source=other) == 0
        ended = killed_after(number, lambda: home.install("--front-end", source=one))
        if then == "again":
            assert home.install("--front-end", source=one) == 0
        assert home.install("--uninstall") == 0, number
        assert tree(home.path) == before, number
    assert number > 3
    assert home.install("--front-end", source=one) == 0
    ended = False
    while not ended:
        ended = killed_after(3, lambda: home.install("--uninstall"))
    assert {name: content for name, content in tree(home.path).items() if name in before} == before


def test_a_changed_file_is_kept_and_says_where_the_one_before_is(home):
    folder = home.path / ".Wolfram" / "FrontEnd"
    folder.mkdir(parents=True)
    (folder / "tunnel.sh").write_bytes(OLD)
    home.install("--front-end")
    (folder / "tunnel.sh").write_text("mine now")
    assert home.install("--uninstall") == 0
    assert [line for line in home.said if line.endswith("; what was there before is tunnel.sh.before-tunnel")]
    assert (folder / "tunnel.sh").read_text() == "mine now"
    assert (folder / "tunnel.sh.before-tunnel").read_bytes() == OLD


def test_a_file_of_the_users_in_place_of_ours_is_kept(home):
    """A link, here; and it is not looked through."""
    home.install("--front-end")
    script = home.path / ".Wolfram/FrontEnd/tunnel.sh"
    script.unlink()
    script.symlink_to("nowhere")
    assert home.install("--uninstall") == 0
    assert os.readlink(str(script)) == "nowhere"
    assert "kept: {}: it has changed".format(script) in str(home.said)


# -- the Python that is pinned


def test_the_python_of_a_virtual_environment_is_not_pinned(tmp_path):
    subprocess.check_call([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")])
    code = "import sys; sys.path.insert(0, sys.argv[1]); import install; print(install.base_python('linux'))"
    done = rig.run(str(tmp_path / "venv/bin/python"), "-c", code, rig.LAUNCHERS)
    python = done.stdout.strip()
    assert not python.startswith(str(tmp_path))
    code = "import sys; print(sys.version_info[:2], sys.prefix == sys.base_prefix)"
    assert rig.run(python, "-c", code).stdout == "{} True\n".format(sys.version_info[:2])


def test_the_python_that_is_pinned_is_of_the_version_that_ran_it(tmp_path, monkeypatch):
    name = "python{}.{}".format(*sys.version_info[:2])
    (tmp_path / "bin").mkdir()
    for each in ("python3", name):
        (tmp_path / "bin" / each).write_text("")
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.setattr(sys, "_base_executable", sys.executable, raising=False)
    assert install.base_python("linux") == str(tmp_path / "bin" / name)
    monkeypatch.setattr(sys, "executable", "")
    monkeypatch.setattr(sys, "_base_executable", "", raising=False)
    assert install.base_python("linux") == str(tmp_path / "bin" / name)
    shutil.rmtree(str(tmp_path / "bin"))
    with pytest.raises(tunnel.Fatal):
        install.base_python("linux")


def test_byte_code_lies_where_the_drop_ins_look(tmp_path):
    """They start Python with -E, so what the environment says of byte code does not hold for them."""
    environ = {"PYTHONPYCACHEPREFIX": str(tmp_path / "elsewhere"), "PYTHONOPTIMIZE": "2", "HOME": str(tmp_path)}
    assert run_install("--front-end", **environ).returncode == 0
    found = sorted(os.listdir(str(tmp_path / ".Wolfram/FrontEnd/__pycache__")))
    assert [name for name in found if "opt" not in name and name.startswith("tunnel.")]
    before = tree(tmp_path / ".Wolfram")
    assert rig.run(str(tmp_path / ".Wolfram/FrontEnd/tunnel_sub.sh"), "--version").returncode == 0
    assert tree(tmp_path / ".Wolfram") == before


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


@pytest.mark.parametrize("linked_to", [False, True])
def test_the_drop_in_answers_the_password_prompt(desk, machine, installed, tmp_path, linked_to):
    host = "john:{}@{}".format(rig.PASSWORD, machine.address)
    os.chmod(str(installed / "tunnel.py"), 0o644)  # as on a file system without execute bits
    place = installed
    if linked_to:
        place = tmp_path / "Ort der Links"
        place.mkdir()
        (place / "tunnel_sub.sh").symlink_to(os.path.relpath(str(installed / "tunnel_sub.sh"), str(place)))
    end = login_script(desk, machine, "compute", place, {"TUNNEL_SSH": machine.make_keyless_ssh()}, host)
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
    script.write_text(install.drop_in("tunnel_sub", "linux", "/no/such\\nice/it's python3"))
    done = rig.run("/bin/sh", str(script), "host", "kernel", "link")
    assert done.returncode == 69
    assert done.stderr.endswith("is gone (/no/such\\nice/it's python3); run install.py again\n")
    (log,) = (tmp_path / "Logs").glob("*.log")
    assert log.read_text() == done.stderr


@pytest.fixture
def linked(tmp_path):
    """A drop-in below a folder with blanks and letters beyond ASCII, with a Python that only says what it gets:
    the folder and ``TUNNEL_DROPIN``. ``readlink`` takes no options, as on macOS before 12.3."""
    tools = tmp_path / "tools"
    tools.mkdir()
    readlink = tools / "readlink"
    readlink.write_text('#!/bin/sh\n[ $# = 1 ] && exec {} "$1"\nexit 1\n'.format(shutil.which("readlink")))
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n%s" "$4" "$TUNNEL_DROPIN"\n')
    front_end = tmp_path / "Möbel und {}".format(ODD) / "FrontEnd"
    front_end.mkdir(parents=True)
    script = front_end / "tunnel.sh"
    script.write_text(install.drop_in("tunnel", "linux", str(python)))
    for path in (readlink, python, script):
        path.chmod(0o755)
    places = [tmp_path / "ein Ort" / "ö", tmp_path / "bin"]
    for place in places:
        place.mkdir(parents=True)
    (places[0] / "absolute").symlink_to(script)
    (places[0] / "relative link").symlink_to(os.path.relpath(str(script), str(places[0])))
    (places[1] / "chain").symlink_to("../ein Ort/ö/relative link")
    (tmp_path / "folder").symlink_to(places[1])
    return front_end


@pytest.mark.parametrize(
    "place, command",
    [
        (".", ["Möbel und {}/FrontEnd/tunnel.sh".format(ODD)]),
        ("Möbel und {}/FrontEnd".format(ODD), ["./tunnel.sh"]),
        ("Möbel und {}/FrontEnd".format(ODD), ["sh", "tunnel.sh"]),
        ("/", ["{}/ein Ort/ö/absolute"]),
        ("/", ["{}/ein Ort/ö/relative link"]),
        ("ein Ort/ö", ["./relative link"]),
        ("ein Ort/ö", ["sh", "relative link"]),
        ("ein Ort", ["ö/relative link"]),
        ("/", ["{}/bin/chain"]),
        ("/", ["{}/folder/chain"]),
        (".", ["folder/chain"]),
        ("/", ["chain"]),
        ("/", ["bash", "chain"]),
        ("folder", ["bash", "chain"]),
    ],
)
def test_the_drop_in_works_from_everywhere(tmp_path, linked, place, command):
    tools = str(tmp_path / "tools")
    shells = {name: shutil.which(name) for name in ("sh", "bash")}
    command = [shells.get(word) or word.replace("{}", str(tmp_path)) for word in command]
    environ = {"PATH": "{}:{}/bin".format(tools, tmp_path)}
    if command[0] == "chain":
        command = ["/usr/bin/env"] + command  # which looks along PATH
    done = rig.run(*command, env=environ, cwd=str(tmp_path / place))
    assert done.stderr == ""
    folder, script = done.stdout.split("\n")
    assert os.path.realpath(folder) == str(linked)
    assert os.path.isabs(script)
    assert os.path.realpath(script) == str(linked / "tunnel.sh")


def test_the_drop_in_logs_beside_itself_that_its_python_is_gone(tmp_path, linked):
    (tmp_path / "python").unlink()
    assert rig.run(str(tmp_path / "bin/chain"), env={"PATH": MINIMAL}).returncode == 69
    assert os.listdir(str(linked / "Logs")) == ["tunnel_no_python.log"]


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "POSIX"])
def test_the_launcher_starts_from_a_folder_with_an_odd_name(tmp_path, locale):
    home = Home(tmp_path / ODD / "Bücher")
    home.path.mkdir(parents=True)
    assert home.install("--front-end") == 0
    link = tmp_path / "link"
    link.symlink_to(home.path / ".Wolfram/FrontEnd/tunnel_sub.sh")
    done = rig.run(str(link), "--version", env={"PATH": MINIMAL, "LC_ALL": locale}, cwd="/")
    assert (done.returncode, done.stdout, done.stderr) == (0, "tunnel {}\n".format(tunnel.VERSION), "")


def test_the_drop_in_ignores_modules_where_it_is_called(tmp_path, installed):
    (tmp_path / "socket.py").write_text("raise SystemExit(99)")
    (tmp_path / "select.py").write_text("raise SystemExit(99)")
    done = rig.run(str(installed / "tunnel.sh"), "--version", cwd=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "tunnel {}\n".format(tunnel.VERSION))


def cut_short(folder):
    """Cut the byte code in ``folder`` short, as Python leaves it on a disk that runs full; returns how many."""
    found = [os.path.join(root, name) for root, _, names in os.walk(str(folder)) for name in names]
    found = [path for path in found if path.endswith(".pyc")]
    for path in found:
        os.truncate(path, os.path.getsize(path) // 2)
    return len(found)


@pytest.mark.parametrize("command", [["tunnel.sh"], ["tunnel_sub.sh"], [sys.executable, "tunnel_sub.py"]])
def test_byte_code_that_was_cut_short_is_made_anew(installed, command):
    environment = dict(os.environ, TUNNEL_SSH="/bin/true")
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def outputs():
        found = []
        for relay in ([], ["--relay"]):
            words = relay + ["host", "/k/MathKernel", "53994@127.0.0.1,39359@127.0.0.1"]
            argv = command[:-1] + [str(installed / command[-1]), "--dry-run"] + words
            done = rig.run(*argv, env=environment)
            assert (done.returncode, done.stderr) == (0, "")
            found.append(done.stdout)
        return found, {path.name: path.stat().st_size for path in (installed / "__pycache__").iterdir()}

    said, sizes = outputs()
    assert cut_short(installed) >= 2
    assert outputs()[0] == said
    said_then, sizes_then = outputs()
    assert said_then == said
    assert len(sizes_then) >= 2
    assert all(sizes_then[name] == sizes[name] for name in sizes_then)


# -- the kernel machine


class Login:
    """The home on a kernel machine: its ssh is a program that does what sshd does with a command."""

    def __init__(self, folder, shell="/bin/sh", **environ):
        self.path = folder / "kernel home"
        self.path.mkdir()
        self.ssh = folder / "ssh"
        words = ["{}='{}'".format(name, value) for name, value in dict(environ, HOME=self.path).items()]
        self.ssh.write_text(
            '#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done\ncd / && exec env -i PATH="${{KERNEL_PATH:-$PATH}}"'
            ' {} {} -c "$1"\n'.format(" ".join(words), shell)
        )
        self.ssh.chmod(0o755)
        self.said = []

    def remote(self, *argv, source=None, **environ):
        self.said = []
        environ = dict(os.environ, TUNNEL_SSH=str(self.ssh), **environ)
        installer = install.Installer(("--remote", "host") + argv, "linux", environ, "/none", self.said.append)
        installer.source = str(source or installer.source)
        code = installer.run()
        self.said = [line.partition(": ")[2] for line in self.said]
        return code

    def local(self, *argv, source=None):
        """The same on the machine itself."""
        home = Home(self.path, MATHEMATICA_USERBASE=str(self.path / ".Mathematica"))
        code = home.install("--kernel", *argv, source=source)
        self.said = home.said
        return code


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


# -- updates


# What tunnel.py loads when it is needed; the folder is a package with or without an __init__.py.
LOADED = ["tunnel_relay.py", "tunnel_lib/__init__.py", "tunnel_lib/names.py", "tunnel_lib/sent/wire.py"]


def version(folder, text, *loaded):
    """A Tunnel whose scripts say ``text`` and nothing else."""
    for name in ("tunnel.py", "tunnel_sub.py", "tunnel.m") + (loaded or tuple(LOADED)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("# {}\n".format(text))
    return folder


def look_at(folder, names):
    """What the scripts in ``folder`` say, by name; and which file tunnel.py is."""
    there = os.stat(str(folder / "tunnel.py"))
    said = {name: (folder / name).read_text() for name in names}
    return said, (there.st_ino, there.st_mtime_ns)


@pytest.fixture
def updated(home, tmp_path_factory):
    """A folder into which version one is installed, and the sources of that and of version two."""
    one, two = (version(tmp_path_factory.mktemp(name), name) for name in ("one", "two"))
    assert home.install("--front-end", source=one) == 0
    return home.path / ".Wolfram" / "FrontEnd", one, two


def test_what_runs_during_an_update_keeps_the_files_that_it_has_open(home, updated):
    folder, _, two = updated
    names = ["tunnel.py", "tunnel_sub.py"] + LOADED
    streams = [(folder / name).open() for name in names]
    assert home.install("--front-end", source=two) == 0
    assert [stream.read() for stream in streams] == ["# one\n"] * len(names)
    assert set(look_at(folder, names)[0].values()) == {"# two\n"}
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("name", LOADED)
def test_tunnel_py_is_another_file_when_anything_that_it_loads_is(home, updated, name):
    folder, one, _ = updated
    (one / name).write_text("# changed\n")
    before = look_at(folder, LOADED)
    assert home.install("--front-end", source=one) == 0
    after = look_at(folder, LOADED)
    assert after[0] == dict(before[0], **{name: "# changed\n"})
    assert after[1] != before[1]
    assert home.install("--front-end", source=one) == 0
    assert look_at(folder, LOADED) == after
    assert home.install("--uninstall") == 0
    assert tree(home.path) == {}


def test_files_of_two_versions_are_told_by_the_new_name_of_tunnel_py(home, updated):
    """Wherever an update is, or was killed: a launcher that finds tunnel.py to be the file that it was at its
    start, and no new one beside it, has loaded files of its own version only."""
    folder, one, two = updated
    names, mixed, number, ended = ["tunnel.py"] + LOADED, 0, 0, False
    while not ended:
        number += 1
        assert home.install("--front-end", source=one) == 0
        before = look_at(folder, names)
        ended = killed_after(number, lambda: home.install("--front-end", source=two))
        after = look_at(folder, names)
        if not (folder / "tunnel.py.tunnel-new").exists():
            assert len(set(after[0].values())) == 1, number
            assert (after[0] == before[0]) is (after[1] == before[1]), number
        elif len(set(after[0].values())) > 1:
            mixed += 1
    assert mixed >= 1  # else nothing was tried
    assert not [name for name in tree(home.path) if name.endswith(install.NEW)]


def test_what_cannot_be_written_leaves_all_as_it_was(home, updated, monkeypatch):
    folder, _, two = updated
    before = tree(home.path)
    write_new = install.write_new
    for name in ["tunnel.py", "tunnel_sub.py", install.RECORD] + LOADED:

        def full(path, data, mode, name=name):
            if path.endswith(os.sep + os.path.basename(name)):
                raise OSError(28, "No space left on device")
            write_new(path, data, mode)

        monkeypatch.setattr(install, "write_new", full)
        assert home.install("--front-end", source=two) == 1
        assert "failed: {}: No space left on device".format(folder / name) in home.said
        assert tree(home.path) == before


def test_the_folder_is_put_beside_the_scripts_and_taken_away_with_its_byte_code(home, updated):
    folder, _, _ = updated
    for name in LOADED:
        path = folder / name
        assert path.stat().st_mode & 0o777 == 0o644
        cached = path.stem + "." + sys.implementation.cache_tag + ".pyc"
        assert (path.parent / "__pycache__" / cached).exists()
    (folder / "tunnel_lib/__pycache__/names.cpython-38.pyc").write_text("of another Python that ran here")
    assert home.install("--uninstall", "--dry-run") == 0
    for name in LOADED:
        assert "would remove: {}".format(folder / name) in home.said
    assert home.install("--uninstall") == 0
    assert tree(home.path) == {}


def test_what_else_is_in_the_folder_stays(home, updated):
    folder, _, _ = updated
    kept = ["tunnel_lib/__pycache__/mine.cpython-38.pyc", "tunnel_lib/mine.py", "tunnel_lib/sent/notes"]
    for name in kept:
        (folder / name).write_text("mine")
    assert home.install("--uninstall") == 0
    assert sorted(name for name, content in tree(folder).items() if content) == sorted(kept)


def test_modules_only_are_taken_from_the_folder(home, tmp_path_factory):
    source = version(tmp_path_factory.mktemp("of"), "one")
    for name in ("README", "x.py~", ".x.py", "a b.py", "x.pyc", "deeper/x.py", "sent/deeper/x.py"):
        (source / "tunnel_lib" / name).parent.mkdir(exist_ok=True)
        (source / "tunnel_lib" / name).write_text("")
    assert home.install("--front-end", source=source) == 0
    found = [name for name in tree(home.path / ".Wolfram/FrontEnd") if name.startswith("tunnel_lib/")]
    found = [name for name in found if "__pycache__" not in name and name != "tunnel_lib/sent"]
    assert sorted(found) == sorted(name for name in LOADED if "/" in name)


def test_what_a_version_no_longer_has_is_taken_away(home, updated, tmp_path_factory):
    """With its byte code, and what was in its place before comes back; what has changed since stays."""
    folder, one, _ = updated
    for number, name in enumerate(LOADED):
        (folder / name).write_text("mine {}".format(number))
    assert home.install("--front-end", source=one) == 0  # moves aside what is in the way
    (folder / "tunnel_lib/names.py").write_text("changed")
    (folder / "tunnel_relay.py.before-tunnel").unlink()
    last = version(tmp_path_factory.mktemp("last"), "last", "tunnel_lib/share.py")
    assert home.install("--front-end", "--dry-run", source=last) == 0
    assert [line for line in home.said if line.startswith("would remove: {}".format(folder))] == [
        "would remove: {}".format(folder / name)
        for name in ("tunnel_lib/__init__.py", "tunnel_lib/sent/wire.py", "tunnel_relay.py")
    ]
    assert home.install("--front-end", source=last) == 0
    assert (
        "kept: {}: it has changed since it was installed; what was there before is {}".format(
            folder / "tunnel_lib/names.py", "tunnel_lib/names.py.before-tunnel"
        )
        in home.said
    )
    assert not (folder / "tunnel_relay.py").exists()
    assert (folder / "tunnel_lib/__init__.py").read_text() == "mine 1"
    assert (folder / "tunnel_lib/names.py").read_text() == "changed"
    assert (folder / "tunnel_lib/sent/wire.py").read_text() == "mine 3"
    stems = {name.split(".")[0] for name in os.listdir(str(folder / "__pycache__"))}
    assert stems == {"tunnel", "tunnel_sub"}
    assert home.install("--uninstall") == 0
    left = [name for name, content in tree(folder).items() if content and "__pycache__" not in name]
    assert sorted(left) == sorted(
        [
            "tunnel_lib/__init__.py",
            "tunnel_lib/names.py",
            "tunnel_lib/names.py.before-tunnel",
            "tunnel_lib/sent/wire.py",
        ]
    )


def test_the_one_file_of_an_earlier_installation_goes_when_the_folder_comes(home, tmp_path_factory):
    folder = home.path / ".Wolfram" / "FrontEnd"
    earlier = version(tmp_path_factory.mktemp("earlier"), "one", "tunnel_relay.py")
    later = version(tmp_path_factory.mktemp("later"), "two", *LOADED[1:])
    assert home.install("--front-end", source=earlier) == 0
    assert home.install("--front-end", source=later) == 0
    assert "removed: {}".format(folder / "tunnel_relay.py") in home.said
    assert not [name for name in tree(home.path) if "tunnel_relay" in name]
    (folder / "tunnel_relay.py").write_text("# one\n")  # put there by hand, though a version had it
    assert home.install("--front-end", source=later) == 0
    assert home.install("--uninstall") == 0
    assert list(tree(folder)) == ["tunnel_relay.py"]


def test_an_update_to_other_modules_that_was_killed_can_be_undone(home, tmp_path_factory):
    one = version(tmp_path_factory.mktemp("one"), "one", *LOADED)
    two = version(tmp_path_factory.mktemp("two"), "two", "tunnel_lib/names.py", "tunnel_lib/share.py")
    folder = home.path / ".Wolfram" / "FrontEnd"
    folder.mkdir(parents=True)
    (folder / "tunnel_relay.py").write_text("mine")
    before, number, ended = tree(home.path), 0, False
    while not ended:
        number += 1
        if number % 2:
            assert home.install("--front-end", source=one) == 0
        ended = killed_after(number, lambda: home.install("--front-end", source=two))
        assert home.install("--uninstall") == 0
        assert tree(home.path) == before, number


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_folder_that_is_none_of_ours_is_in_the_way(home, tmp_path_factory, kind):
    source = version(tmp_path_factory.mktemp("of"), "one")
    folder = home.path / ".Wolfram" / "FrontEnd"
    folder.mkdir(parents=True)
    if kind == "link":
        (folder / "tunnel_lib").symlink_to(version(tmp_path_factory.mktemp("mine"), "mine") / "tunnel_lib")
    else:
        (folder / "tunnel_lib").write_text("mine")
    before = tree(home.path), tree(tmp_path_factory.getbasetemp())
    assert home.install("--front-end", source=source) == 1
    (line,) = home.said
    assert line.startswith("failed: {}/tunnel_lib/".format(folder))
    assert "{}/tunnel_lib is in the way".format(folder) in line
    assert (tree(home.path), tree(tmp_path_factory.getbasetemp())) == before


def test_a_link_in_place_of_the_folder_is_not_looked_through(home, updated):
    """Somebody has linked it to the folder of the repository after he has installed it."""
    folder, one, _ = updated
    shutil.rmtree(str(folder / "tunnel_lib"))
    (folder / "tunnel_lib").symlink_to(one / "tunnel_lib")
    (one / "tunnel_lib" / ("x" + install.NEW)).write_text("")
    (one / "tunnel_lib" / "__pycache__").mkdir()
    before = tree(one)
    assert home.install("--uninstall") == 0
    assert tree(one) == before
    assert os.listdir(str(folder)) == ["tunnel_lib"]
    assert "kept: {}: it has changed".format(folder / "tunnel_lib/names.py") in str(home.said)


def test_folders_that_hold_nothing_of_a_version_go(home, updated, tmp_path_factory):
    folder, _, _ = updated
    assert home.install("--front-end", source=version(tmp_path_factory.mktemp("of"), "one", LOADED[2])) == 0
    assert sorted(os.listdir(str(folder / "tunnel_lib"))) == ["__pycache__", "names.py"]
    alone = version(tmp_path_factory.mktemp("alone"), "one", "tunnel_sub.py")
    assert home.install("--front-end", source=alone) == 0
    assert not (folder / "tunnel_lib").exists()
    before = tree(home.path)
    (alone / "tunnel_lib/sent").mkdir(parents=True)
    (alone / "tunnel_lib/sent/wire.py").write_bytes(b"-" * 9999)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        assert home.install("--front-end", source=alone) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tree(home.path) == before


@pytest.mark.parametrize("role", ["callback", "compute"])
def test_a_session_goes_on_through_an_update_and_an_uninstallation(desk, machine, installed, role, tmp_path):
    home = Home(tmp_path / "my home")
    source = copy_of_tunnel(tmp_path / "next")
    for name in ("tunnel.py", "tunnel_sub.py"):
        with (source / name).open("a") as stream:
            stream.write("# the next version\n")
    end = login_script(desk, machine, role, installed, {})
    end.accept()
    assert home.install("--front-end", source=source) == 0
    assert "installed: {}".format(installed / "tunnel.py") in home.said
    end.echo()
    assert home.install("--front-end", "--uninstall") == 0
    assert not (installed / "tunnel.py").exists()
    end.echo()
    end.quit()
    assert end.wait() == (0, "")


# -- several at once


@pytest.fixture
def another_runs(tmp_path):
    """The home is held, as by another install.py; returns what ends that."""
    descriptor = os.open(str(tmp_path), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    left = [descriptor]

    def end():
        while left:
            os.close(left.pop())

    yield end
    end()


@pytest.mark.parametrize("argv", [["--front-end"], ["--front-end", "--uninstall"]])
def test_one_run_waits_for_another(home, another_runs, tmp_path, argv):
    home.path = tmp_path / "other home"  # which nobody holds
    home.path.mkdir()
    assert home.install("--front-end") == 0
    (home.path / ".Wolfram").rename(tmp_path / ".Wolfram")
    before = tree(tmp_path / ".Wolfram")
    if "--uninstall" not in argv:
        (tmp_path / ".Wolfram/FrontEnd/tunnel.py").unlink()
        before = tree(tmp_path / ".Wolfram")
    process = subprocess.Popen(
        [sys.executable, INSTALL] + argv,
        env=dict(os.environ, HOME=str(tmp_path), PYTHONUNBUFFERED=""),
        stdout=subprocess.PIPE,
        universal_newlines=True,
    )
    assert process.stdout.readline() == "waiting: another install.py is at work\n"
    assert tree(tmp_path / ".Wolfram") == before
    another_runs()
    assert "tunnel.py" in process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert (tmp_path / ".Wolfram/FrontEnd/tunnel.py").exists() is ("--uninstall" not in argv)


def test_a_run_waits_for_another_no_longer_than_a_minute(home, another_runs, monkeypatch):
    assert install.LOCK_SECONDS == 60
    monkeypatch.setattr(install, "LOCK_SECONDS", 0.1)
    before = tree(home.path)
    with pytest.raises(tunnel.Fatal) as caught:
        home.install()
    assert caught.value.code == 1
    assert caught.value.text == "another install.py has been at work for 0.1 s; run this again when it has ended"
    assert home.said == ["waiting: another install.py is at work"]
    assert tree(home.path) == before
    another_runs()
    assert home.install() == 0
    assert "waiting" not in str(home.said)


def test_several_at_once_leave_what_one_would(tmp_path, tmp_path_factory):
    """Of two versions, so that each replaces what another has put there."""
    scripts = [version(copy_of_tunnel(tmp_path_factory.mktemp(name) / "tunnel"), name) for name in ("one", "two")]
    for source in scripts:
        shutil.copy(tunnel.__file__, str(source))
    folder = tmp_path / ".Wolfram" / "FrontEnd"
    folder.mkdir(parents=True)
    (tmp_path / "none").mkdir()
    for name in ("tunnel.sh", "tunnel_sub.py"):
        (folder / name).write_bytes(OLD)
    before = tree(tmp_path)
    environ = dict(os.environ, HOME=str(tmp_path), WOLFRAM_BASE=str(tmp_path / "none/W"))
    for argv in ([], ["--uninstall"]):
        processes = [
            subprocess.Popen(
                [sys.executable, str(source / "install.py")] + argv,
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                universal_newlines=True,
            )
            for source in scripts * 2
        ]
        outputs = [process.communicate(timeout=60)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * 4, outputs
        assert "failed" not in str(outputs)
        if not argv:
            assert len({(folder / name).read_text() for name in LOADED}) == 1
    assert tree(tmp_path) == before


def test_the_remote_side_waits_too(login, monkeypatch, tmp_path):
    if not shutil.which("flock"):
        pytest.skip("needs flock")
    tools, waits = tmp_path / "tools", tmp_path / "waits"
    tools.mkdir()
    (tools / "flock").write_text(
        '#!/bin/sh\n[ "$1" = -n ] || : >"{}"\nexec {} "$@"\n'.format(waits, shutil.which("flock"))
    )
    (tools / "flock").chmod(0o755)
    path = "{}:{}".format(tools, os.environ["PATH"])
    monkeypatch.setattr(install, "LOCK_SECONDS", 1)
    descriptor = os.open(str(login.path), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert login.remote(KERNEL_PATH=path) == 1
    assert login.said == ["failed: another install.py has been at work for 1 s; run this again when it has ended"]
    assert tree(login.path) == {}
    monkeypatch.setattr(install, "LOCK_SECONDS", 60)
    waits.unlink()
    run = threading.Thread(target=login.remote, kwargs={"KERNEL_PATH": path})
    run.start()
    while not waits.exists():
        assert run.is_alive()
        time.sleep(0.01)
    os.close(descriptor)
    run.join(30)
    assert [line.partition(":")[0] for line in login.said] == ["installed", "installed"]


@pytest.mark.parametrize("folder", ["/no/such/folder", "/"])
def test_what_cannot_be_locked_is_not_waited_for(folder, monkeypatch):
    def no_locks(descriptor, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    said = []
    with install.Lock(folder, said.append), install.Lock(folder, said.append):
        assert said == []


# -- damaged records


def damaged(record):
    """What may have become of a record, by kind."""
    title, folders, *files, _ = record.split(b"\n")
    lines = {
        "no levels": [title] + files,
        "levels beyond all": [title, b"folders 99999999999"] + files,
        "many levels": [title, b"folders 99"] + files,
        "digits beyond all": [title, b"folders " + b"9" * 9999] + files,
        "odd digits": [title, "folders ²".encode()] + files,
        "no files": [title, folders],
        "no title": [folders] + files,
        "twice": [title, folders] + files * 2,
        "nothing": [],
        "zeros": [b"\0" * len(record)],
        "long line": [title, folders, b"file tunnel.m " + b"a" * (1 << 20)] + files,
        "many lines": [title, folders] + [b"file tunnel.m"] * (1 << 14) + files,
        "capitals": [record.upper()[:-1]],
        "\\r": [line + b"\r" for line in record.split(b"\n")],
        "bits": [bytes(byte ^ (number % 50 == 49) for number, byte in enumerate(record))],
    }
    for number, line in enumerate(files):
        _, name, sha256, aside, former = line.split()
        for kind, other in (
            ("gone", b""),
            ("cut", line[:40]),
            ("digest", b" ".join([b"file", name, sha256[:-1], aside, former])),
            ("other digest", b" ".join([b"file", name, sha256[::-1], aside, former])),
            ("place", b" ".join([b"file", b"../" + name, sha256, aside, former])),
            ("user's", b" ".join([b"file", b"init.m", sha256, aside, former])),
            ("aside", b" ".join([b"file", name, sha256, b"init.m", former])),
            ("former", b" ".join([b"file", name, sha256, aside, b"\xff\0*"])),
        ):
            replaced = [title, folders] + files[:number] + [other] * bool(other) + files[number + 1 :]
            lines["{} {}".format(kind, number)] = replaced
    return {kind: b"".join(line + b"\n" for line in each) for kind, each in lines.items()}


def check_damage(folder, kind, install_it, uninstall, said, mine):
    """Whatever has become of the record in ``folder``: what is the user's stays, and of what is not removed all is
    named."""
    assert install_it() == 0
    record = folder / install.RECORD
    record.write_bytes(damaged(record.read_bytes())[kind])
    begin = time.monotonic()
    assert uninstall() == 0
    assert time.monotonic() - begin < 10
    found = {name: content for name, content in tree(folder).items() if content and not name.endswith(".pyc")}
    assert OLD in [content[0] for content in found.values()]
    for name, content in found.items():
        if name in mine:
            assert content[0] == b"mine", name
        else:
            lines = [line + " " for line in said()]
            named = ("restored: {} ", "kept: {}: ", "what was there before is {} ")
            named = [text.format(path) for text, path in zip(named, (folder / name, folder / name, name))]
            assert any(text in line for text in named for line in lines), (name, lines)
    assert folder.is_dir() and set(mine) <= set(found)
    if not kind.startswith(("many levels", "gone", "other digest")):  # those cannot be told from a good one
        assert "damaged: {}: {}".format(record, install.DAMAGED) in said(), said()


RECORDED = """# title
folders 2
file tunnel.m 0 - -
"""


@pytest.mark.parametrize("kind", sorted(damaged(RECORDED.encode("ascii"))))
def test_a_damaged_record_of_launchers_costs_the_user_nothing(home, tmp_path_factory, kind):
    source = version(tmp_path_factory.mktemp("of"), "one", *LOADED[2:])
    folder = home.path / ".Wolfram" / "FrontEnd"
    folder.mkdir(parents=True)
    mine = ["init.m", "mine.sh", "x.py.before-tunnel"]
    for name in mine:
        (folder / name).write_bytes(b"mine")
    (folder / "tunnel.py").write_bytes(OLD)
    check_damage(
        folder,
        kind,
        lambda: home.install("--front-end", source=source),
        lambda: home.install("--front-end", "--uninstall"),
        lambda: home.said,
        mine,
    )


@pytest.mark.parametrize("back", ["local", "remote"])
@pytest.mark.parametrize("kind", sorted(damaged(RECORDED.encode("ascii"))))
def test_a_damaged_record_of_kernels_costs_the_user_nothing(login, capfd, back, kind):
    folder = login.path / ".Mathematica" / "Kernel"
    folder.mkdir(parents=True)
    (folder / "init.m").write_bytes(b"mine")
    (folder / "tunnel.m").write_bytes(OLD)
    run = getattr(login, back)
    check_damage(folder, kind, run, lambda: run("--uninstall"), lambda: login.said, ["init.m"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("back", ["local", "remote"])
def test_no_number_of_levels_leads_to_the_home(login, back):
    """It is empty but for what is removed."""
    run = getattr(login, back)
    assert run() == 0
    for record in login.path.rglob(install.RECORD):
        record.write_text(record.read_text().replace("folders 2", "folders 98"))
    assert run("--uninstall") == 0
    assert os.listdir(str(login.path)) == []


@pytest.mark.parametrize("argv", [["--kernel"], ["--kernel", "--uninstall"]])
def test_a_record_that_would_be_read_for_ever_is_one_line(home, argv):
    folder = home.path / ".Wolfram" / "Kernel"
    folder.mkdir(parents=True)
    home.environ["WOLFRAM_USERBASE"] = str(folder.parent)
    os.mkfifo(str(folder / install.RECORD))
    assert home.install(*argv) == 1
    assert home.said == ["failed: {}: is no file".format(folder / install.RECORD)]


def test_files_of_others_that_end_as_ours_do_stay(home):
    folder = home.path / ".Wolfram" / "FrontEnd"
    folder.mkdir(parents=True)
    for name in ("mine" + install.NEW, "tunnel.txt" + install.NEW):
        (folder / name).write_text("mine")
    before = tree(home.path)
    assert home.install("--front-end") == 0
    assert home.install("--uninstall") == 0
    assert tree(home.path) == before
