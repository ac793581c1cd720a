"""tunnel.m in Mathics3, a free interpreter of the Wolfram Language; what it lacks is stood in for here.

All cases run in one process, since it takes seconds to start: each prints its value, and the messages that
it raised, under its name.
"""

import os
import re
import shutil
import subprocess
import sys
from itertools import count

import pytest
import rig
from rig import docs

PRELUDE = r"""
(* Symbols that a kernel has and Mathics3 does not; tunnel.m has to find them in System`. *)
System`$ParentLink; System`LinkObject; System`LinkCreate; System`LinkMode; System`LinkProtocol; System`LinkHost;
System`Listen; System`$MachineAddresses; System`$FrontEnd; System`FrontEndObject; System`EvaluatorNames;
System`KernelSpeed; System`SystemInformation; System`$MachineID;
$MachineID = "1234";
SystemInformation["FrontEnd", name_] := frontEnd[name];
Unprotect[Pause, $UserBaseDirectory, $VersionNumber, $Packages, $CommandLine];
$UserBaseDirectory = "@BASE@";
$VersionNumber = 10.1;
Pause[_] := Null;
evaluators = {"Local" -> {"AutoStartOnLaunch" -> True}};
created = {};
LinkCreate[name_String, rules___] := (AppendTo[created, {name, rules}]; LinkObject[name, 1, 1]);
LinkCreate[rules___] := (AppendTo[created, {rules}]; LinkObject["automatic", 1, 1]);
System`LinkClose; System`StartProcess; System`ProcessStatus; System`ProcessInformation; System`ProcessConnection;
System`ReadString; System`LaunchKernels;
(* Launchers, each of which runs for as many looks as its number says; "bad" hosts fail. *)
processes = {}; looks = {}; closed = {};
StartProcess[words_List] := (AppendTo[processes, words]; AppendTo[looks, Length[processes]]; process[Length[processes]]);
ProcessStatus[process[n_]] := If[(looks[[n]] = looks[[n]] - 1) < 0, "Finished", "Running"];
failedQ[n_] := MemberQ[processes[[n]], "bad"] && n > 1;
ProcessInformation[process[n_], "ExitCode"] := If[looks[[n]] >= 0, "too soon", If[failedQ[n], 255, 0]];
ProcessConnection[process[n_], "StandardError"] := n;
ReadString[n_Integer] := "tunnel: number " <> ToString[n] <> "\n";
LinkClose[link_] := AppendTo[closed, link];
LaunchKernels[links_List] := {"launched", Length[links], If[Min[looks] < 0 && Max[looks] < 0, "in time", "too soon"]};
MathLink`CreateFrontEndLinkProtocol[] := "SharedMemory";
MathLink`LinkSetPrintFullSymbols[link_, True] := (fullSymbols = link);
MathLink`CreateFrontEndLink[] := "built in";
Protect[MathLink`CreateFrontEndLink];
case[name_, value_] := Print["@@", name, "@@", ToString[value, InputForm], "@@"];
SetAttributes[case, HoldRest];
link[name_] := ($ParentLink = LinkObject[name, 1, 1]; Clear[MathLink`Tunnel`Private`$lastPort]; created = {});
"""

CASES = r"""
Get["@FILE@"];
case["loaded", {Attributes[MathLink`CreateFrontEndLink], $ContextPath[[1]], Context[RemoteMachineTunnel]}];
Get["@FILE@"];
(* Mathics3 has options of symbols only, and the front end is none. *)
MathLink`Tunnel`Private`keptConfigurations[] := evaluators;
MathLink`Tunnel`Private`keepConfigurations[all_List] := (evaluators = all);
case["loaded again", Attributes[MathLink`CreateFrontEndLink]];
case["usage", StringLength[SetupTunnelKernelConfiguration::usage] > 300 && StringLength[RemoteMachineTunnel::usage] > 300];

link["53994@127.0.0.1,39359@127.0.0.1"];
case["first link", MathLink`CreateFrontEndLink[]];
case["second link", MathLink`CreateFrontEndLink[]];
case["options of links", created];
case["full symbols", fullSymbols];
link["39359@localhost,53994@localhost"];
case["message port higher", First[MathLink`CreateFrontEndLink[]]];
link["53994@192.168.1.17,39359@192.168.1.17"]; $MachineAddresses = {"10.0.0.5", "192.168.7.1", "192.168.1.3", "::1"};
case["not tunneled", {MathLink`CreateFrontEndLink[], created}];
link["53994@my-host,39359@my-host"];
case["host name", {MathLink`CreateFrontEndLink[], created}];
link["shm_link_1"];
case["shared memory", {MathLink`CreateFrontEndLink[], created}];
Clear[$ParentLink, MathLink`Tunnel`Private`$lastPort]; created = {};
$CommandLine = {"MathKernel", "-wstp", "-LinkMode", "Connect", "-LinkName", "1000@127.0.0.1,2000@127.0.0.1", "-x"};
case["from the command line", First[MathLink`CreateFrontEndLink[]]];
Clear[MathLink`Tunnel`Private`$lastPort]; created = {}; $CommandLine = {"MathKernel", "-linkname"};
case["no link at all", {MathLink`CreateFrontEndLink[], created}];

case["no front end", SetupTunnelKernelConfiguration["a", "host"]];
$FrontEnd = FrontEndObject[1];
case["new", SetupTunnelKernelConfiguration["Example", "john@host.example.com", "OperatingSystem" -> "Windows", "VersionNumber" -> 10.1]];
case["second", SetupTunnelKernelConfiguration[" Other ", "host:22", {"OperatingSystem" -> "Unix"}]];
case["updated", SetupTunnelKernelConfiguration["Example", "[::1]:2222", "KernelPath" -> "/opt/my kernel", "VersionNumber" :> 14]];
case["kept", First /@ evaluators];
case["stored", "Example" /. evaluators];
frontEnd["OperatingSystem"] = "Windows"; frontEnd["VersionNumber"] = 14.1; frontEnd["MachineID"] = "other";
case["windows front end", "LoginScript" /. Last[SetupTunnelKernelConfiguration["W", "host"]]];
Clear[frontEnd];
path[rules___] := StringSplit["LoginScript" /. Last[SetupTunnelKernelConfiguration["P", "host", rules]], "\" \""][[3]];
Do[case[{"path", system, ToString[version], kind}, path["OperatingSystem" -> system, "VersionNumber" -> version, "KernelPath" -> kind]],
  {system, {"Windows", "MacOSX", "Unix"}}, {version, {8, 9.0, 10, 10.1, 11.3, 14.0, 14.1, 15}},
  {kind, {Automatic, Default}}];
case["path of this session", path[]];
login[rules___] := "LoginScript" /. Last[SetupTunnelKernelConfiguration["R", "host", rules]];
Do[case[{"relay", minutes}, login["Relay" -> minutes]], {minutes, {True, False, 0, 90, 99999}}];
case["relay by a symbol", login[Relay -> True]];
case["no relay", login[]];
Do[case[{"via", text}, login["Via" -> text]], {text, {None, "srun -n1 -u", "a $B 'c' \\d"}}];
case["via and relay", login["Via" -> "srun", "Relay" -> 5]];
noCommands = {"", " ", 7, True, "a\nb", "a\"b", "a`b"};
Do[case[{"bad via", text}, SetupTunnelKernelConfiguration["n", "h", "Via" -> text]], {text, noCommands}];

Scan[case[{"bad name", #}, SetupTunnelKernelConfiguration[#, "host"]] &, {"", "  ", 7}];
bad = {"", "@", "a@", "@host", "-x", "a@-x", "host:", "host:0", "host:70000", "host:x", "ho st", "a\"b", "[::1", "john:secret@", 7};
Scan[case[{"bad host", #}, SetupTunnelKernelConfiguration["n", #]] &, bad];
Scan[case[{"bad host of compute kernels", #}, RemoteMachineTunnel[#]] &, bad];
case["bad system", SetupTunnelKernelConfiguration["n", "h", "OperatingSystem" -> "BeOS"]];
case["bad version", SetupTunnelKernelConfiguration["n", "h", "VersionNumber" -> "ten"]];
case["bad path", SetupTunnelKernelConfiguration["n", "h", "KernelPath" -> ""]];
case["bad option", SetupTunnelKernelConfiguration["n", "h", "KernelSpeed" -> 2]];
notMinutes = {"True", Automatic, None, -1, 2.5, 60., 1/2, 100000, {60}};
Scan[case[{"bad relay", #}, SetupTunnelKernelConfiguration["n", "h", "Relay" -> #]] &, notMinutes];
Scan[case[{"bad relay of compute kernels", #}, RemoteMachineTunnel["h", 2, "Relay" -> #]] &, notMinutes];
case["nothing bad was stored", MemberQ[First /@ evaluators, "n"]];

case["package not loaded", RemoteMachineTunnel["host"]];
Unprotect[$Packages]; AppendTo[$Packages, "SubKernels`RemoteKernels`"];
case["one kernel", RemoteMachineTunnel["john:secret@host.example.com:22"]];
case["one kernel with options", RemoteMachineTunnel["host", "VersionNumber" -> 9.0, "KernelSpeed" -> 2.5]];
case["two kernels", RemoteMachineTunnel["host", 2, "OperatingSystem" -> "MacOSX", "KernelPath" -> Default]];
case["shared", RemoteMachineTunnel["host", 1, "ShareConnection" -> True][[2]]];
case["not shared", RemoteMachineTunnel["host", 8, "ShareConnection" -> False][[2]]];
case["relay of one", RemoteMachineTunnel["host", 1, "Relay" -> True][[2]]];
case["relay of many", RemoteMachineTunnel["host", 8, "Relay" -> 90][[2]]];
case["relay of many, each its own", RemoteMachineTunnel["host", 8, "Relay" -> True, "ShareConnection" -> False][[2]]];
case["no relay of many", RemoteMachineTunnel["host", 8, "Relay" -> False][[2]]];
case["via of many", RemoteMachineTunnel["host", 8, "Via" -> "srun -c 1"][[2]]];
launched[rules___] := (processes = {}; looks = {}; closed = {}; created = {}; LaunchTunnelKernels[rules]);
case["launched", launched["host", 3, "Via" -> "srun $X", "KernelPath" -> "/k"]];
case["launchers", {processes, created}];
case["launched one", launched["host", "Relay" -> 7, "KernelPath" -> "/k"]];
case["launcher of one", processes];
case["launched in part", launched["bad", 3]];
case["closed", Length[closed]];
case["launched none", (failedQ[_] = True; launched["bad", 2])]; failedQ[_] = .;
Scan[case[{"bad launch", #}, launched @@ #] &, {{""}, {"h", 0}, {"h", 1, "Via" -> 3}, {"h", 1, "KernelSpeed" -> 2}}];
case["nothing launched", processes];
case["machine", First /@ {RemoteMachineTunnel["a@[::1]:22"], RemoteMachineTunnel["a@fe80::1"], RemoteMachineTunnel["10.1.2.3:22"]}];
case["bad count", RemoteMachineTunnel["host", 0]];
case["bad speed", RemoteMachineTunnel["host", 1, "KernelSpeed" -> -1]];
case["bad share", RemoteMachineTunnel["host", 1, "ShareConnection" -> 7]];
case["unknown option", RemoteMachineTunnel["host", 1, "Speed" -> 7]];
@DOCUMENTS@
MathLink`Tunnel`Private`ownSystem[] := "Windows";
case["on windows", RemoteMachineTunnel["host", 2][[2]]];
case["via on windows", RemoteMachineTunnel["host", 2, "Via" -> "a $B c"][[2]]];
case["bad via on windows", RemoteMachineTunnel["host", 2, "Via" -> "a %B"]];
case["relay on windows", RemoteMachineTunnel["host", 2, "Relay" -> 90][[2]]];
MathLink`Tunnel`Private`ownSystem[] := "Unix"; Unprotect[$UserBaseDirectory]; $UserBaseDirectory = "/nowhere";
case["scripts missing", Head[SetupTunnelKernelConfiguration["m", "host"]]];
case["scripts missing for compute kernels", Head[RemoteMachineTunnel["host"]]];
text[function_, tag_] := MessageName[function, tag];
Do[case[{function, tag}, text[function, tag]], {function, @FUNCTIONS@}, {tag, @TAGS@}];
"""

# What README and manual have users type; what is loaded first is here already, in part stood in for.
DOCUMENTS = [
    re.sub(r'(?:Needs\["SubKernels`RemoteKernels`"\]|Get\["tunnel.m"\]);?', "", text)
    for text in docs.fences(docs.BOTH, "mathematica")
]

MESSAGES = {
    "no front end": "SetupTunnelKernelConfiguration::frontend",
    "{bad name, }": "SetupTunnelKernelConfiguration::name",
    "{bad name, 7}": "SetupTunnelKernelConfiguration::name",
    "bad system": "SetupTunnelKernelConfiguration::system",
    "bad version": "SetupTunnelKernelConfiguration::version",
    "bad path": "SetupTunnelKernelConfiguration::path",
    "bad option": "SetupTunnelKernelConfiguration::option",
    "package not loaded": "RemoteMachineTunnel::package",
    "bad count": "RemoteMachineTunnel::count",
    "bad speed": "RemoteMachineTunnel::speed",
    "bad share": "RemoteMachineTunnel::share",
    "unknown option": "RemoteMachineTunnel::option",
}


SETUP, REMOTE, LAUNCH = FUNCTIONS = [
    "SetupTunnelKernelConfiguration",
    "RemoteMachineTunnel",
    "LaunchTunnelKernels",
]
TEXTS = {  # for each tag how its message begins, and the functions that may have to say it
    "host": ("`1` is no host specification; expected a string", FUNCTIONS),
    "system": ('"OperatingSystem" -> `1` is not known; expected "Windows",', FUNCTIONS),
    "version": ('"VersionNumber" -> `1` is no version; expected a number', FUNCTIONS),
    "path": ('"KernelPath" -> `1` is no path; expected a string that is not', FUNCTIONS),
    "relay": ('"Relay" -> `1` is not known; expected True, False, or minutes', FUNCTIONS),
    "via": ('"Via" -> `1` is no command; expected None or one line', FUNCTIONS),
    "option": ("`1` is no option; expected one of `2`.", FUNCTIONS),
    "missing": ("The launch script `1` is missing; run install.py", FUNCTIONS),
    "count": ("`1` is no number of kernels; expected a positive integer.", [REMOTE, LAUNCH]),
    "share": ('"ShareConnection" -> `1` is not known; expected True,', [REMOTE, LAUNCH]),
    "name": ("`1` is no name for a kernel configuration; expected a string", [SETUP]),
    "frontend": ("There is no front end that could keep a kernel configuration.", [SETUP]),
    "speed": ('"KernelSpeed" -> `1` is no speed; expected a positive number.', [REMOTE]),
    "package": ("Load the package of remote kernels first; see the usage of", [REMOTE]),
    "failed": ("Of `1` kernels `2` could not be launched; the newest logs", [LAUNCH]),
}


def listed(names, form):
    """A list of the Wolfram Language."""
    return "{{{}}}".format(", ".join(map(form.format, names)))


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """What each case printed: messages and other output, then its value."""
    python = os.environ.get("TUNNEL_MATHICS", sys.executable)
    program = os.path.join(os.path.dirname(python), "mathics")
    if not os.path.exists(program):
        reason = "needs Mathics3; `python3 tests/run.py` installs it"
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("mathics")
    base = folder / "base"
    (base / "FrontEnd").mkdir(parents=True)
    for name in ("tunnel.sh", "tunnel_sub.sh", "tunnel.bat", "tunnel_sub.bat"):
        (base / "FrontEnd" / name).write_text("")
    documents = "\n".join(
        '{}\ncase[{{"document", {}}}, evaluators];'.format(*each) for each in zip(DOCUMENTS, count())
    )
    text = (PRELUDE + CASES.replace("@DOCUMENTS@", documents)).replace("@BASE@", str(base))
    text = text.replace("@FILE@", os.path.join(rig.LAUNCHERS, "tunnel.m"))
    text = text.replace("@FUNCTIONS@", listed(FUNCTIONS, "{}")).replace("@TAGS@", listed(TEXTS, '"{}"'))
    (folder / "cases.m").write_text(text)
    output = subprocess.check_output(
        [python, program, "-f", str(folder / "cases.m")],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        timeout=240,
        env=dict(os.environ, HOME=str(folder)),
        cwd=str(folder),
    ).decode("utf-8")
    shutil.rmtree(str(folder))
    parts = output.split("@@")
    found = {}
    for before, name, value in zip(parts[0::3], parts[1::3], parts[2::3]):
        found[name] = (before.strip(), value.replace("⇾", "->"))
    return found


def value(cases, name):
    said, result = cases[name]
    assert "::" not in said, said
    return result


def test_it_prints_nothing_and_keeps_attributes_however_often_it_is_loaded(cases):
    assert cases["loaded"] == ("", '{{Protected}, "MathLink`Tunnel`", "MathLink`Tunnel`"}')
    assert cases["loaded again"] == ("", "{Protected}")
    assert value(cases, "usage") == "True"


def test_links_on_the_ports_after_the_highest_of_the_main_link(cases):
    assert value(cases, "first link") == 'LinkObject["53995@127.0.0.1,53996@127.0.0.1", 1, 1]'
    assert value(cases, "second link") == 'LinkObject["53997@127.0.0.1,53998@127.0.0.1", 1, 1]'
    assert value(cases, "options of links").count('LinkMode -> Listen, LinkProtocol -> "TCPIP"') == 2
    assert value(cases, "full symbols") == value(cases, "second link")
    assert value(cases, "message port higher") == '"53995@127.0.0.1,53996@127.0.0.1"'
    assert value(cases, "from the command line") == '"2001@127.0.0.1,2002@127.0.0.1"'


def test_links_as_built_in_when_the_main_link_is_not_tunneled(cases):
    assert 'LinkProtocol -> "SharedMemory", LinkHost -> "192.168.1.3"' in value(cases, "not tunneled")
    for name in ("host name", "shared memory", "no link at all"):
        assert "LinkHost -> Automatic" in value(cases, name)


def test_configurations_are_those_of_the_manual(cases):
    said, result = cases["new"]
    assert said == 'New configuration "Example" added to kernel configuration options.'
    kernel = "C:\\Program Files\\Wolfram Research\\Mathematica\\10.1\\WolframKernel.exe"
    login = '"`userbaseDirectory`/FrontEnd/tunnel.sh" "john@host.example.com" "{}" "`linkname`"'.format(kernel)
    options = "-LinkMode Listen -LinkProtocol TCPIP -LinkOptions MLDontInteract -LinkHost 127.0.0.1"
    assert result == (
        '"Example" -> {"RemoteMachine" -> True, "TranslateReturns" -> True, "AppendNameToCellLabel" -> True,'
        ' "AutoStartOnLaunch" -> False, "MLOpenArguments" -> "%s", "LoginScript" -> "%s"}'
        % (options, login.replace("\\", "\\\\").replace('"', '\\"'))
    )


def test_configurations_are_updated_and_all_others_kept(cases):
    assert cases["updated"][0] == 'Existing configuration "Example" updated in kernel configuration options.'
    assert value(cases, "kept") == '{"Local", "Example", "Other"}'
    assert '\\"[::1]:2222\\" \\"/opt/my kernel\\"' in value(cases, "stored")


def test_a_front_end_on_windows_gets_its_own_script(cases):
    expected = (
        r'"\"`userbaseDirectory`\\FrontEnd\\tunnel.bat\" \"host\"'
        r' \"C:\\Program Files\\Wolfram Research\\Wolfram\\14.1\\WolframKernel.exe\" \"`linkname`\""'
    )
    assert cases["windows front end"][1] == expected


@pytest.mark.parametrize("version", ["8", "9.", "10", "10.1", "11.3", "14.", "14.1", "15"])
def test_kernel_paths(cases, version):
    number = float(version)
    product = "Wolfram" if number >= 14.1 else "Mathematica"
    program = "WolframKernel" if number >= 10 else "MathKernel"
    expected = {
        ("Windows", "Automatic"): "C:\\\\Program Files\\\\Wolfram Research\\\\{0}\\\\{1}\\\\{2}.exe",
        ("MacOSX", "Automatic"): "/Applications/{0} {1}.app/Contents/MacOS/{2}",
        ("Unix", "Automatic"): "/usr/local/Wolfram/{0}/{1}/Executables/{2}",
        ("Windows", "Default"): "{2}.exe",
        ("MacOSX", "Default"): "/Applications/{0}.app/Contents/MacOS/{2}",
        ("Unix", "Default"): "/usr/local/bin/{2}",
    }
    for (system, kind), path in expected.items():
        names = ["{{path, {}, {}, {}}}".format(system, text, kind) for text in (version, version + "0")]
        (name,) = [name for name in names if name in cases]
        assert cases[name][1] == '"{}"'.format(path.format(product, number, program))


def test_the_path_of_this_session_is_that_of_its_own_version(cases):
    assert cases["path of this session"][1] == '"/usr/local/Wolfram/Mathematica/10.1/Executables/WolframKernel"'


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_messages(cases, name):
    said, result = cases[name]
    assert said.startswith(MESSAGES[name] + ":"), said
    assert said.count("::") == 1
    assert result == "$Failed"


def test_bad_hosts(cases):
    names = [name for name in cases if name.startswith("{bad host")]
    assert len(names) == 30
    for name in names:
        said, result = cases[name]
        function = "RemoteMachineTunnel" if "compute" in name else "SetupTunnelKernelConfiguration"
        assert said.startswith(function + "::host: "), (name, said)
        assert "secret" not in said
        assert result == "$Failed"
    assert value(cases, "nothing bad was stored") == "False"


def test_compute_kernels(cases):
    script = r"FrontEnd/tunnel_sub.sh\""
    one = value(cases, "one kernel")
    assert one.startswith('SubKernels`RemoteKernels`RemoteMachine["host.example.com", ')
    assert script + r" \"john:secret@host.example.com:22\" \"/usr/local/Wolfram/Mathematica/10.1/" in one
    assert one.endswith(r'\"`2`\"", 1, LinkHost -> "127.0.0.1", KernelSpeed -> 1]')
    options = value(cases, "one kernel with options")
    assert "9.0/Executables/MathKernel" in options
    assert options.endswith("KernelSpeed -> 2.5]")
    two = value(cases, "two kernels")
    assert script + r" --share \"host\" \"/Applications/Mathematica.app/Contents/MacOS/WolframKernel\"" in two
    assert ', 2, LinkHost -> "127.0.0.1"' in two
    assert script + " --share " in value(cases, "shared")
    assert "--share" not in value(cases, "not shared")
    assert value(cases, "machine") == '{"::1", "fe80::1", "10.1.2.3"}'


def test_compute_kernels_on_windows_get_a_second_pair_of_quotes_and_no_shared_connection(cases):
    text = value(cases, "on windows")
    assert re.match(r'"\\"\\".*tunnel_sub\.bat\\" \\"host\\" .* \\"`2`\\"\\""$', text)
    assert "--share" not in text


RELAY_WORDS = {"True": " --relay", "False": "", "0": " --relay=0", "90": " --relay=90", "99999": " --relay=99999"}


@pytest.mark.parametrize("given", sorted(RELAY_WORDS))
def test_a_controller_kernel_gets_the_relay_it_was_asked_for(cases, given):
    assert r"tunnel.sh\"{} \"host\" ".format(RELAY_WORDS[given]) in cases["{{relay, {}}}".format(given)][1]


def test_a_relay_is_chosen_by_a_symbol_too_and_left_out_by_default(cases):
    assert r"tunnel.sh\" --relay \"host\" " in cases["relay by a symbol"][1]
    assert r"tunnel.sh\" \"host\" " in cases["no relay"][1]


def test_many_compute_kernels_share_a_relay_where_the_system_can(cases):
    script = r"tunnel_sub.sh\""
    assert script + r" --relay \"host\" " in value(cases, "relay of one")
    assert script + r" --share --relay=90 \"host\" " in value(cases, "relay of many")
    assert script + r" --relay \"host\" " in value(cases, "relay of many, each its own")
    assert script + r" --share \"host\" " in value(cases, "no relay of many")
    assert r"tunnel_sub.bat\" --relay=90 \"host\" " in value(cases, "relay on windows")


def test_a_command_is_quoted_for_the_shell_of_the_front_end(cases):
    assert r"tunnel.sh\" \"host\" " in cases["{via, None}"][1]
    assert r"tunnel.sh\" --via \"srun -n1 -u\" \"host\" " in cases["{via, srun -n1 -u}"][1]
    (name,) = [name for name in cases if name.startswith("{via, a")]
    assert r"tunnel.sh\" --via \"a \\$B 'c' \\\\d\" \"host\" " in cases[name][1]
    assert r"tunnel.sh\" --relay=5 --via \"srun\" \"host\" " in cases["via and relay"][1]
    assert r"tunnel_sub.sh\" --share --via \"srun -c 1\" \"host\" " in value(cases, "via of many")
    assert r"tunnel_sub.bat\" --via \"a $B c\" \"host\" " in value(cases, "via on windows")


def test_a_bad_command_is_complained_about(cases):
    names = [name for name in cases if name.startswith("{bad via")]
    assert len(names) == 7
    for name in names:
        assert cases[name][0].startswith("SetupTunnelKernelConfiguration::via: "), cases[name]
        assert cases[name][1] == "$Failed"
    assert cases["bad via on windows"][0].startswith("RemoteMachineTunnel::via: ")


def test_all_launchers_run_at_once_and_each_is_waited_for(cases):
    assert value(cases, "launched") == '{"launched", 3, "in time"}'
    found = value(cases, "launchers")
    assert found.count('FrontEnd/tunnel_sub.sh", "--share", "--via", "srun $X", "host", "/k", "automatic"}') == 3
    assert found.count('{LinkMode -> Listen, LinkProtocol -> "TCPIP", LinkHost -> "127.0.0.1"}') == 3
    assert value(cases, "launched one") == '{"launched", 1, "in time"}'
    assert 'FrontEnd/tunnel_sub.sh", "--relay=7", "host", "/k", "automatic"}' in value(cases, "launcher of one")


def test_launchers_that_fail_cost_their_own_kernel_only(cases):
    said, result = cases["launched in part"]
    assert said.startswith("LaunchTunnelKernels::failed: Of 3 kernels 2 could not be launched")
    assert "tunnel: number 2" in said
    assert result == '{"launched", 1, "in time"}'
    assert value(cases, "closed") == "2"
    assert cases["launched none"][1] == "$Failed"


def test_a_bad_launch_starts_nothing(cases):
    said = [cases[name][0].partition(": ")[0] for name in cases if name.startswith("{bad launch")]
    assert said == ["LaunchTunnelKernels::" + tag for tag in ("host", "count", "via", "option")]
    assert value(cases, "nothing launched") == "{}"


def test_a_bad_relay_is_complained_about(cases):
    names = [name for name in cases if name.startswith("{bad relay")]
    assert len(names) == 18
    for name in names:
        said, result = cases[name]
        function = "RemoteMachineTunnel" if "compute" in name else "SetupTunnelKernelConfiguration"
        assert said.startswith(function + "::relay: "), (name, said)
        assert "99999" in said
        assert result == "$Failed"


def test_what_the_documents_have_users_type_is_taken_without_a_message(cases):
    assert len(DOCUMENTS) > 8
    for number in range(len(DOCUMENTS)):
        said, result = cases["{{document, {}}}".format(number)]
        assert "::" not in said, (DOCUMENTS[number], said)
    names = re.findall(r'SetupTunnelKernelConfiguration\["(\w+)"', "".join(DOCUMENTS))
    assert {"Cluster", "Example", "MathJump"} <= set(names)
    for name in names:
        assert '"{}" -> {{"RemoteMachine" -> True'.format(name) in result


def test_the_paths_in_the_manual_are_those_that_are_made(cases):
    (table,) = docs.tables(docs.section(docs.MANUAL, "The kernel's path"))
    systems = ("Windows", "MacOSX", "Unix")
    versions = {"14.1 and later": "14.1", "10.0 to 14.0": "10.1", "up to 9.0": "9.", "`Default`": "14.1"}
    for title, *cells in table[1:]:
        kind = "Default" if "Default" in title else "Automatic"
        for system, cell in zip(systems, cells):
            name = "{{path, {}, {}, {}}}".format(system, versions[title], kind)
            found = cases[name if name in cases else name.replace("9.", "9.0")][1]
            assert found == '"{}"'.format(*docs.code_in(cell)).replace("\\", "\\\\")


def test_missing_scripts_are_said_and_the_rest_is_done(cases):
    said, result = cases["scripts missing"]
    assert "SetupTunnelKernelConfiguration::missing: The launch script /nowhere/FrontEnd/tunnel.sh" in said
    assert result == "Rule"
    said, result = cases["scripts missing for compute kernels"]
    assert "RemoteMachineTunnel::missing" in said
    assert result == "SubKernels`RemoteKernels`RemoteMachine"


@pytest.mark.parametrize("tag", sorted(TEXTS))
def test_a_message_is_that_of_each_function_that_says_it_and_stands_once_in_the_file(cases, tag):
    begin, functions = TEXTS[tag]
    begin = begin.replace('"', '\\"')
    found = [cases["{{{}, {}}}".format(function, tag)][1] for function in FUNCTIONS]
    said = [function for function, text in zip(FUNCTIONS, found) if text.startswith('"' + begin)]
    assert said == functions
    assert len(set(found)) == 4 - len(functions)  # a function that lacks the message has its own name there
    assert docs.text_of("tunnel.m").count(begin) == 1
    assert len(re.findall(r'"{0}" ->|\w::{0} ='.format(tag), docs.text_of("tunnel.m"))) == 1
