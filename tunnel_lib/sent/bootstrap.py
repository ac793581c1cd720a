"""The command lines that start the door: for a login shell, and for the shell beyond a command (``srun``)."""

from .door import OTHER_SHELL, TAKEN, TERMINAL

BEGIN_SECONDS = 60  # from there until its hello
PYTHONS = (
    "python3 /usr/bin/python3 /usr/local/bin/python3 /opt/homebrew/bin/python3 /usr/libexec/platform-python"
    " python3.14 python3.13 python3.12 python3.11 python3.10 python3.9 python3.8 python3.7 python3.6"
)
# What is sent begins with this: a shell that a start-up file runs in the place of ours takes it for its first
# command, and executes nothing of what follows. (An exit would have csh go on with its next block.)
OPENING = 'exec /bin/sh -c "exit {}"\n'.format(OTHER_SHELL).encode("ascii")
HEAD = len(OPENING) + 8
# Neither quotes nor a backslash, a dollar, a backtick, an exclamation mark or a line break: this stands in double
# quotes in single quotes, in a login shell that may be any. Standard input is read unbuffered, for what follows is
# the keeper's, and until complete, for reads come up short on slow lines. An exception after that must not start
# the next Python. What it reads begins with OPENING, which is skipped, and a length in eight digits.
FIRST = (
    "import sys;sys.version_info<(3,6) and sys.exit(102);import os,zlib;sent=bytearray();"
    "sys.excepthook=lambda*a:[sys.__excepthook__(*a),sys.stderr.flush(),os._exit(106)];"
    "r=lambda n:list(iter(lambda:len(sent)<n and [sent.extend(os.read(0,n-len(sent)) or sys.exit(103))],False));"
    "r({head});n=sent[{start}:];n.isdigit() or sys.exit({taken});r({head}+int(n));"
    "exec(zlib.decompress(sent[{head}:]));sys.exit(main(bytes(sent)))"
)
for name, number in (("{start}", len(OPENING)), ("{head}", HEAD), ("{taken}", TAKEN)):
    FIRST = FIRST.replace(name, str(number))
# What the shell beyond a command runs. The command may give it a terminal for its input, which would change what
# passes, or may never end; so it looks for a terminal, and has an alarm. It says that it is ready in words that an
# echo of this text does not have.
BEYOND = (
    "import sys;sys.version_info<(3,6) and sys.exit(102);import os,signal;signal.alarm({seconds});"
    "os.isatty(0) and sys.exit({terminal});"
    "print();print('--tunnel-relay-'+'ready--',flush=True);"
) + FIRST


def find_python(program):
    """What a shell runs: the program, by the first Python that takes it.

    It ends with 101 where there is no Python 3, 102 where it is too old, else as :data:`LOGIN_ENDS` says.
    """
    return (
        "c=101;for p in {};do command -v $p >/dev/null 2>&1||continue;"
        '$p -SEsc "{}";r=$?;case $r in 102)c=102;;1|126|127);;*)exit $r;;esac;done;exit $c'
    ).format(PYTHONS, program)


def bootstrap_command():
    """The command line for the login shell over there, be it sh, bash, zsh, csh, tcsh or fish."""
    return "exec /bin/sh -c '{}'".format(find_python(FIRST))


def beyond_command():
    """What a shell beyond a command reads from its standard input. It has to outlive what it runs: when the first
    process of a task ends, schedulers end all others at once, and nobody hears why."""
    program = BEYOND.replace("{seconds}", str(BEGIN_SECONDS)).replace("{terminal}", str(TERMINAL))
    return ("trap : HUP INT TERM;" + find_python(program) + "\n").encode("ascii")
