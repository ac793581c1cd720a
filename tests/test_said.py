"""What is said: the lines of a log, the output of programs, and the one line at the end of a launch."""

import io
import os
import sys

import pytest
from rig import product

pytestmark = pytest.mark.usefixtures("in_time")

# -- the log


@pytest.fixture
def log(tmp_path):
    return product.Log(str(tmp_path), "tunnel", {})


def text_of(log):
    with open(log.path, "rb") as stream:
        return stream.read()


@pytest.mark.parametrize("line", ["x" * 100, "", "é", "\U0001f600" * 200, "\udcff" * 100])
def test_what_somebody_says_without_end_does_not_fill_the_disk(monkeypatch, log, line):
    monkeypatch.setattr(product, "LOG_BYTES", 1 << 17)
    for _ in range(2 * product.LOG_BYTES // (len("kernel") + len(line))):
        log.quote("kernel", line)
    assert len(text_of(log)) < 5 * product.LOG_BYTES
    assert log.room["kernel"] < 0
    assert text_of(log).count(b"what comes from here on is not logged") == 1
    assert text_of(log).endswith(b"kernel: ... what comes from here on is not logged\n")
    log.quote("ssh", "is heard all the same")
    log.write("and so is the launcher")
    assert text_of(log).endswith(b"ssh: is heard all the same\n" + text_of(log)[-32:])
    assert b"and so is the launcher" in text_of(log)[-40:]


def test_a_log_has_as_much_of_what_is_said_as_there_is_room_for(log):
    for number in range(product.LOG_BYTES // 106 - 1):
        log.quote("kernel", "{:0100}".format(number))
    assert b"not logged" not in text_of(log)
    assert text_of(log).count(b"\n") == product.LOG_BYTES // 106 - 1


def test_a_log_file_is_its_owners_and_each_has_its_own(tmp_path):
    logs = [product.Log(str(tmp_path), "tunnel", {}) for _ in range(3)]
    assert len({log.path for log in logs}) == 3
    for log in logs:
        log.write("ä \udcff")
        assert os.stat(log.path).st_mode & 0o777 == 0o600
        assert os.stat(os.path.dirname(log.path)).st_mode & 0o777 == 0o700
        assert text_of(log)[9:] == "ä \\xff\n".encode()


def test_a_full_disk_ends_the_log_and_not_the_launch(log, capsys):
    log.descriptor = os.open("/dev/full", os.O_WRONLY)
    log.write("one")
    log.write("two")
    log.quote("kernel", "three")
    assert log.descriptor is None
    assert capsys.readouterr().err.count("ends here: No space left on device") == 1


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain \u00e4 \u6f22", "plain \u00e4 \u6f22"),
        ("no UTF-8 \udcff\udc9b", "no UTF-8 \\xff\\x9b"),
        ("\u202eright to left\u2066", "\\u202eright to left\\u2066"),
        ("one\u2028two\u2029three\x85", "one\\u2028two\\u2029three\\x85"),
        ("\ufeff\U000e0041", "\\ufeff\\U000e0041"),
        ("a\x05b\x14\x1a\x7f", "a\\x05b\\x14\\x1a\\x7f"),
        ("\x1b[31mred\x9b0m", "\\x1b[31mred\\x9b0m"),
        ("a\tb\rc", "a b\\x0dc"),
        ("one\ntwo", "one\ntwo"),
    ],
)
def test_what_others_say_brings_no_control_characters_into_a_line(text, shown, log, capsys):
    assert product.visible(text) == shown
    log.write(text)
    assert text_of(log).partition(b" ")[2] == shown.encode("utf-8") + b"\n"
    product.say(text)
    assert capsys.readouterr().err == "tunnel: {}\n".format(shown)
    product.show(text)
    assert capsys.readouterr().out == shown


# -- output


def test_the_last_lines_are_kept():
    lines = []
    for number in range(1000):
        product.keep_last(lines, number)
    assert lines == list(range(800, 1000))


def test_output_in_pieces_becomes_lines_however_it_is_split():
    data = "one\r\ntwo\n\n\r\nthrée \r x\r\r\n".encode() + b"\xff\xfe\nlast"
    expected = ["one", "two", "thrée \r x", "\udcff\udcfe", "last"]
    for first in range(len(data) + 1):
        for second in range(first, len(data) + 1):
            lines = []
            taker = product.Lines(lines.append)
            for piece in (data[:first], data[first:second], data[second:]):
                if piece:
                    taker.feed(piece)
            assert lines == expected[:-1]
            taker.feed(b"")
            taker.feed(b"")
            assert lines == expected


def test_a_line_without_end_does_not_fill_the_memory():
    lines = []
    taker = product.Lines(lines.append)
    for _ in range(40):
        taker.feed(b"x" * 65536)
        assert len(taker.partial) <= 65536
    taker.feed(b"\nnext\n")
    assert len(lines[0]) <= 65536
    assert lines[1] == "next"


# -- the end


def test_a_launch_is_told_once():
    reader, writer = os.pipe()
    teller = product.Teller(writer)
    assert not teller.has_told
    teller.tell(7, "why \udcff ä")
    teller.tell(0, "never mind")
    assert teller.has_told
    data = os.read(reader, 4096)
    assert os.read(reader, 1) == b""  # closed: whoever waits need not
    assert data == b"7 why \\udcff \xc3\xa4"
    os.close(reader)


@pytest.mark.parametrize(
    "data, code, said",
    [
        (b"0 ", 0, ""),
        (b"7 it failed", 7, "tunnel: it failed\n"),
        (b"255 \xc3\xa4 \xff", 255, "tunnel: ä \ufffd\n"),
        (b"", 70, ""),  # who was to tell has gone
        (b"x y", 70, "tunnel: y\n"),
        ("² y".encode(), 70, "tunnel: y\n"),
        (b"-1 y", 70, "tunnel: y\n"),
    ],
)
def test_what_was_told_becomes_exit_code_and_line(data, code, said, capsys):
    assert product.Teller.hear(data) == code
    assert capsys.readouterr().err == said


def test_nobody_need_listen():
    teller = product.Teller()
    teller.tell(0, "x")
    assert not teller.has_told
    reader, writer = os.pipe()
    os.close(reader)
    teller = product.Teller(writer)
    teller.tell(0, "x")
    assert teller.has_told
    with pytest.raises(OSError):
        os.fstat(writer)


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize(
    "nowhere", [lambda: open("/dev/full", "w"), closed_pipe], ids=["a full disk", "a closed pipe"]
)
def test_output_that_has_nowhere_to_go_is_no_failure(nowhere, monkeypatch):
    stream = nowhere()
    monkeypatch.setattr(sys, "stdout", stream)
    assert product.show("text\n" * 10000) == 0
    assert product.show("more\n") == 0
    stream.flush()  # as Python does at its end
    stream.close()


def test_without_standard_streams_nothing_is_said(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert product.show("text") == 0
    product.say("text")


def test_somebody_who_has_stopped_listening_is_no_failure(monkeypatch):
    stream = closed_pipe()
    monkeypatch.setattr(sys, "stderr", stream)
    product.say("text")
    monkeypatch.undo()
    stream.close()  # as Python does in the end, which would exit with 120 if this failed


@pytest.mark.parametrize(
    "encoding, text", [("utf-8", "/\udcff/math\n"), ("ascii", "/ä/math\n"), ("latin-1", "/日\n")]
)
def test_a_path_that_cannot_be_written_is_shown_in_another_way(encoding, text, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    assert product.show("kernel: " + text) == 0
    sys.stdout.flush()
    assert shown.getvalue().startswith(b"kernel: /")
    assert shown.getvalue().endswith(b"\n")
