"""install.py: what it puts where, what it leaves alone, and that what it puts there works."""

import os
import pwd
import resource
import shutil
import subprocess
import sys

import pytest
import rig
from rig import installing, product
from rig.installing import INSTALL, OLD, Home, Login, copy_of_tunnel, killed_after, run_install, tree

import install

SHARE = install.SHARE
this_machine_is_left_alone = installing.this_machine_is_left_alone


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
    for brand in ("Mathematica", "Wolfram"):
        user, shared = "." + brand, "none/" + brand
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
    shutil.copy(product.path("tunnel.py"), str(folder))
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
    assert tuple(capsys.readouterr()) == ("tunnel {}\n".format(product.VERSION), "")


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
    with pytest.raises(product.Fatal):
        install.home_directory("linux", {})


def test_sudo_installs_for_kernels_only(home, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    home.environ["SUDO_USER"] = "john"
    for argv in ([], ["--front-end"]):
        with pytest.raises(product.Fatal) as caught:
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
    with pytest.raises(product.Fatal):
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
