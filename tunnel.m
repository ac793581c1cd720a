(* Tunnel: MathLink (WSTP) connections through SSH, the part in the Wolfram Language.

   As kernel init file (-initfile tunnel.m) of a remote controller kernel, for front ends up to 11.0:
   makes the kernel listen for its further links on the ports that the launcher has forwarded.

   Loaded in a session (Get["tunnel.m"]): SetupTunnelKernelConfiguration, RemoteMachineTunnel and
   LaunchTunnelKernels.

   Works in kernels 8 to 15; loading it anywhere, any number of times, does no harm and prints nothing. *)

BeginPackage["MathLink`Tunnel`"]

SetupTunnelKernelConfiguration::usage = "SetupTunnelKernelConfiguration[name, host] creates, or updates, the \
persistent kernel configuration name, which launches a controller kernel on host with all links carried by SSH. \
host is \"[user[:password]@]machine[:port]\". Options: \"OperatingSystem\" of the kernel machine (\"Windows\", \
\"MacOSX\" or \"Unix\"; Automatic: that of the front end), \"VersionNumber\" of the kernel (a number such as \
10.1; Automatic: that of the front end), \"KernelPath\" (a string; Automatic: where that version is installed; \
Default: the path that names no version) and \"Relay\" (True, or a number of minutes: the session survives a lost \
connection for an hour, or for so many minutes, and needs no forwarded ports; False: the links take forwarded \
ports) and \"Via\" (a command through which the kernel is run over there, with a relay, such as \"srun -n1 -u\"; \
None). Example: \
SetupTunnelKernelConfiguration[\"Cluster\", \"john@host.example.com\", \"OperatingSystem\" -> \"Unix\"]";

RemoteMachineTunnel::usage = "RemoteMachineTunnel[host, n] describes n compute kernels (by default 1) on host, for \
LaunchKernels; their links are carried by SSH. host is \"[user[:password]@]machine[:port]\". Load \
SubKernels`RemoteKernels` first. Options: \"OperatingSystem\", \"VersionNumber\", \"KernelPath\", \"Relay\" and \
\"Via\" as for SetupTunnelKernelConfiguration, \"KernelSpeed\" (a relative number, by default 1) and \"ShareConnection\" \
(True: one login for all; False: one each; Automatic: one for all when n is larger than 1, where the system can). \
Example: \
LaunchKernels[RemoteMachineTunnel[\"john@host.example.com\", 4, \"OperatingSystem\" -> \"Unix\"]]";

LaunchTunnelKernels::usage = "LaunchTunnelKernels[host, n] launches n compute kernels (by default 1) on host, all at \
once, waits for each as long as it takes, and hands their links to LaunchKernels: for kernels that a scheduler has in \
a queue. Options: those of RemoteMachineTunnel, but for \"KernelSpeed\". It takes a kernel from 10 on. Example: \
LaunchTunnelKernels[\"john@host.example.com\", 16, \"OperatingSystem\" -> \"Unix\", \"Via\" -> \"srun -n1 -u\"]";

Begin["`Private`"]

(* -- messages *)

(* Gives each of the functions each of the messages, which are rules from a tag to a text. *)
setMessages[functions_List, messages_List] :=
  Do[setMessage[function, First[message], Last[message]], {function, functions}, {message, messages}]

setMessage[function_, tag_, text_] := (MessageName[function, tag] = text)

setMessages[{SetupTunnelKernelConfiguration, RemoteMachineTunnel, LaunchTunnelKernels}, {
  "host" -> "`1` is no host specification; expected a string \"[user[:password]@]machine[:port]\".",
  "system" -> "\"OperatingSystem\" -> `1` is not known; expected \"Windows\", \"MacOSX\", \"Unix\" or Automatic.",
  "version" -> "\"VersionNumber\" -> `1` is no version; expected a number such as 10.1, or Automatic.",
  "path" -> "\"KernelPath\" -> `1` is no path; expected a string that is not empty, Default or Automatic.",
  "relay" -> "\"Relay\" -> `1` is not known; expected True, False, or minutes as an integer from 0 to 99999.",
  "via" -> "\"Via\" -> `1` is no command; expected None or one line without \" and backticks, on Windows without %.",
  "option" -> "`1` is no option; expected one of `2`.",
  "missing" -> "The launch script `1` is missing; run install.py on the front end machine."}];

setMessages[{RemoteMachineTunnel, LaunchTunnelKernels}, {
  "count" -> "`1` is no number of kernels; expected a positive integer.",
  "share" -> "\"ShareConnection\" -> `1` is not known; expected True, False or Automatic."}];

SetupTunnelKernelConfiguration::name =
  "`1` is no name for a kernel configuration; expected a string that is not empty.";
SetupTunnelKernelConfiguration::frontend = "There is no front end that could keep a kernel configuration.";

RemoteMachineTunnel::speed = "\"KernelSpeed\" -> `1` is no speed; expected a positive number.";
RemoteMachineTunnel::package = "Load the package of remote kernels first; see the usage of RemoteMachineTunnel.";

LaunchTunnelKernels::failed = "Of `1` kernels `2` could not be launched; the newest logs say why. `3`";

complain[function_, tag_, arguments___] := (Message[MessageName[function, tag], arguments]; $Failed)

(* A bad host specification may hold a password: only what follows the last @ is shown. *)
shown[host_String] := If[StringFreeQ[host, "@"], host, "...@" <> placeIn[host]]
shown[other_] := other

(* -- link names: the launcher forwards the four ports after the higher one of the main link *)

(* The name of the main link: that of $ParentLink, else the one on the command line; None without one. *)
mainLinkName[] := Module[{words = If[ListQ[$CommandLine], $CommandLine, {}], position},
  position = Position[ToLowerCase /@ words, "-linkname"];
  Which[
    Head[$ParentLink] === LinkObject && StringQ[First[$ParentLink]], First[$ParentLink],
    position =!= {} && position[[1, 1]] < Length[words], words[[position[[1, 1]] + 1]],
    True, None
  ]
]

(* Ports and hosts of a TCPIP link's name, as {{port, host}, {port, host}}; {} for any other name. *)
linkEnds[name_String] := Module[{ends = StringSplit[#, "@"] & /@ StringSplit[name, ","]},
  If[MatchQ[ends, {{_, _}, {_, _}}] && digitsQ[ends[[1, 1]]] && digitsQ[ends[[2, 1]]],
    {ToExpression[First[#]], Last[#]} & /@ ends,
    {}]
]
linkEnds[_] := {}

digitsQ[text_String] := text =!= "" && Complement[Characters[text], Characters["0123456789"]] === {}

loopbackQ[host_String] := StringMatchQ[host, "127.*"] || host === "localhost" || host === "::1"

(* The name of the next link that the kernel listens for; Automatic when the main link is not tunneled. *)
nextLinkName[] := Module[{ends = linkEnds[mainLinkName[]]},
  If[ends =!= {} && loopbackQ[ends[[1, 2]]] && loopbackQ[ends[[2, 2]]],
    If[!IntegerQ[$lastPort], $lastPort = Max[ends[[1, 1]], ends[[2, 1]]]];
    $lastPort = $lastPort + 2;
    ToString[$lastPort - 1] <> "@127.0.0.1," <> ToString[$lastPort] <> "@127.0.0.1",
    Automatic]
]

(* The address of this machine that shares the longest prefix with the front end's; Automatic without one. *)
addressTowards[host_String] := Module[{own},
  own = Select[If[ListQ[$MachineAddresses], $MachineAddresses, {}], addressBits[#] =!= {} &];
  If[own === {} || addressBits[host] === {},
    Automatic,
    Last[SortBy[own, sharedBits[addressBits[#], addressBits[host]] &]]]
]

(* The 32 bits of an IPv4 address; {} for anything else. *)
addressBits[address_String] := Module[{parts = StringSplit[address, "."]},
  If[Length[parts] === 4 && And @@ (digitsQ /@ parts),
    Flatten[IntegerDigits[ToExpression[#], 2, 8] & /@ parts],
    {}]
]

sharedBits[one_List, other_List] := Module[{different = Position[one - other, 1 | -1, {1}, Heads -> False]},
  If[different === {}, 32, different[[1, 1]] - 1]
]

tunneledLink[] := Module[{name = nextLinkName[], ends, link},
  link = If[name =!= Automatic,
    LinkCreate[name, LinkMode -> Listen, LinkProtocol -> "TCPIP"],
    ends = linkEnds[mainLinkName[]];
    LinkCreate[
      LinkMode -> Listen,
      LinkProtocol -> MathLink`CreateFrontEndLinkProtocol[],
      LinkHost -> If[ends === {}, Automatic, addressTowards[ends[[1, 2]]]]]
  ];
  MathLink`LinkSetPrintFullSymbols[link, True];
  link
]

(* -- launch commands *)

(* Where a kernel program lies. Installations are named Wolfram from 14.1 on, Mathematica before; the program
   is WolframKernel from 10 on, MathKernel before. *)
kernelPath["Windows", version_] :=
  "C:\\Program Files\\Wolfram Research\\" <> productName[version] <> "\\" <> versionText[version] <> "\\" <>
    programName[version] <> ".exe"
kernelPath["MacOSX", version_] :=
  "/Applications/" <> productName[version] <> " " <> versionText[version] <> ".app/Contents/MacOS/" <>
    programName[version]
kernelPath["Unix", version_] :=
  "/usr/local/Wolfram/" <> productName[version] <> "/" <> versionText[version] <> "/Executables/" <>
    programName[version]

(* The same where the path names no version. *)
defaultPath["Windows", version_] := programName[version] <> ".exe"
defaultPath["MacOSX", version_] :=
  "/Applications/" <> productName[version] <> ".app/Contents/MacOS/" <> programName[version]
defaultPath["Unix", version_] := "/usr/local/bin/" <> programName[version]

productName[version_] := If[Round[10 version] >= 141, "Wolfram", "Mathematica"]
programName[version_] := If[Round[10 version] >= 100, "WolframKernel", "MathKernel"]

(* 10.1 -> "10.1", 14 and 14. -> "14.0" *)
versionText[version_] := Module[{tenths = Round[10 version]},
  ToString[Quotient[tenths, 10]] <> "." <> ToString[Mod[tenths, 10]]
]

(* What follows the last @ of a host specification: machine[:port]. *)
placeIn[host_String] := Module[{positions = Flatten[Position[Characters[host], "@"]]},
  If[positions === {}, host, StringDrop[host, Last[positions]]]
]

loginIn[host_String] := StringDrop[host, -StringLength[placeIn[host]]]

(* machine[:port] as {machine, port}; a port of None where there is none. IPv6 addresses have more colons, and
   stand in brackets when a port follows. *)
placeParts[place_String] := Module[{colons = Flatten[Position[Characters[place], ":"]], close},
  close = Flatten[Position[Characters[place], "]"]];
  Which[
    StringMatchQ[place, "[*"] && close === {},
    {"", None},
    StringMatchQ[place, "[*"],
    {StringTake[place, {2, First[close] - 1}], afterColon[StringDrop[place, First[close]]]},
    Length[colons] === 1,
    {StringTake[place, First[colons] - 1], afterColon[StringDrop[place, First[colons] - 1]]},
    True,
    {place, None}
  ]
]

afterColon[""] := None
afterColon[text_String] := If[StringMatchQ[text, ":*"], StringDrop[text, 1], "?"]

hostQ[host_String] := Module[{parts = placeParts[placeIn[host]]},
  First[parts] =!= "" && loginIn[host] =!= "@" && !StringMatchQ[loginIn[host], ":*"] &&
    StringFreeQ[host, "\""] && StringFreeQ[host, "\n"] && StringFreeQ[host, "`"] &&
    StringFreeQ[placeIn[host], " "] && !StringMatchQ[placeIn[host], "-*"] && !StringMatchQ[host, "-*"] &&
    (Last[parts] === None ||
      (digitsQ[Last[parts]] && StringLength[Last[parts]] <= 5 && 0 < ToExpression[Last[parts]] < 65536))
]
hostQ[_] := False

ownSystem[] := $OperatingSystem

scriptName[script_, system_] := script <> If[system === "Windows", ".bat", ".sh"]

scriptPath[script_, system_] := FileNameJoin[{$UserBaseDirectory, "FrontEnd", scriptName[script, system]}]

quoted[text_] := "\"" <> text <> "\""

(* The values of options that are all good; $Failed, with a message of function, when one is unknown or bad. *)
checkedOptions[function_, options_List] := Module[{given, defaults, names, unknown, values},
  {given, defaults} = byName /@ {options, Options[function]};
  names = First /@ defaults;
  unknown = Complement[First /@ given, names];
  values = Function[name, name -> (name /. given /. defaults)] /@ names;
  If[unknown =!= {},
    complain[function, "option", First[unknown], names],
    If[And @@ (goodOptionQ[function, First[#], Last[#]] & /@ values), values, $Failed]]
]

(* An option may be named by a string or by a symbol. *)
byName[options_List] := (ToString[First[#]] -> Last[#]) & /@ options

goodOptionQ[function_, name_, value_] := Module[{tag = badOption[name, value]},
  tag === None || complain[function, tag, value] =!= $Failed
]

(* The tag of the message for a bad value; None for a good one. *)
badOption["OperatingSystem", "Windows" | "MacOSX" | "Unix" | Automatic] := None
badOption["OperatingSystem", _] := "system"
badOption["VersionNumber", version_] := If[version === Automatic || (NumberQ[version] && 5 < version < 100), None, "version"]
badOption["KernelPath", path_] := If[MemberQ[{Automatic, Default}, path] || (StringQ[path] && path =!= ""), None, "path"]
badOption["KernelSpeed", speed_] := If[NumberQ[speed] && speed > 0, None, "speed"]
badOption["ShareConnection", True | False | Automatic] := None
badOption["ShareConnection", _] := "share"
badOption["Relay", True | False] := None
badOption["Relay", minutes_] := If[IntegerQ[minutes] && 0 <= minutes < 100000, None, "relay"]

badOption["Via", None] := None
badOption["Via", command_] := If[StringQ[command] && commandQ[command], None, "via"]

commandQ[command_String] := StringTrim[command] =!= "" && StringFreeQ[command, "\""] && StringFreeQ[command, "`"] &&
  Min[ToCharacterCode[command]] > 31 && (ownSystem[] =!= "Windows" || StringFreeQ[command, "%"])

(* The kernel's path for good options, where Automatic stands for system and version. *)
chosenPath[options_List, system_, version_] := Module[{chosen, path},
  chosen = {"OperatingSystem", "VersionNumber"} /. options;
  chosen = {
    If[First[chosen] === Automatic, system, First[chosen]],
    If[Last[chosen] === Automatic, version, Last[chosen]]};
  path = "KernelPath" /. options;
  Which[
    path === Automatic, kernelPath @@ chosen,
    path === Default, defaultPath @@ chosen,
    True, path
  ]
]

(* What the launcher is told of a relay, for a good value of the option. *)
relayWord[True] := " --relay"
relayWord[False] := ""
relayWord[minutes_Integer] := " --relay=" <> ToString[minutes]

(* The words that ask the launcher for a relay, for good options. *)
relayWords[options_List] := Join[
  If[("Relay" /. options) === False, {}, {StringTrim[relayWord["Relay" /. options]]}],
  If[("Via" /. options) === None, {}, {"--via", "Via" /. options}]
]

(* The same within a line for a shell of this system. *)
relayText[options_List, system_] := relayWord["Relay" /. options] <> viaText["Via" /. options, system]

viaText[None, system_] := ""
viaText[command_String, "Windows"] := " --via " <> quoted[command]
viaText[command_String, system_] :=
  " --via " <> quoted[StringReplace[command, {"\\" -> "\\\\", "$" -> "\\$"}]]

(* -- controller kernels *)

Options[SetupTunnelKernelConfiguration] =
  {"OperatingSystem" -> Automatic, "VersionNumber" -> Automatic, "KernelPath" -> Automatic, "Relay" -> False,
    "Via" -> None};

(* What the front end says of itself; of this kernel where it does not say. It may run on another machine. *)
frontEndValue[name_String, own_] := Module[{value = Quiet[SystemInformation["FrontEnd", name]]},
  If[StringQ[value] || NumberQ[value], value, own]
]

frontEndHereQ[] := frontEndValue["MachineID", $MachineID] === $MachineID

SetupTunnelKernelConfiguration[name_, host_, rules___] := Module[{options},
  Which[
    !(StringQ[name] && StringTrim[name] =!= ""),
    complain[SetupTunnelKernelConfiguration, "name", name],
    !hostQ[host],
    complain[SetupTunnelKernelConfiguration, "host", shown[host]],
    (options = checkedOptions[SetupTunnelKernelConfiguration, Flatten[{rules}]]) === $Failed,
    $Failed,
    Head[$FrontEnd] =!= FrontEndObject,
    complain[SetupTunnelKernelConfiguration, "frontend"],
    True,
    storeConfiguration[StringTrim[name], host, options]
  ]
]

(* The front end keeps the configurations of all kernels in one option. *)
keptConfigurations[] := EvaluatorNames /. Options[$FrontEnd, EvaluatorNames] /.
  EvaluatorNames -> {"Local" -> {"AutoStartOnLaunch" -> True}}

keepConfigurations[all_List] := SetOptions[$FrontEnd, EvaluatorNames -> all]

storeConfiguration[name_String, host_String, options_List] := Module[{system, script, properties, known},
  system = frontEndValue["OperatingSystem", ownSystem[]];
  script = scriptPath["tunnel", system];
  If[frontEndHereQ[] && !FileExistsQ[script], complain[SetupTunnelKernelConfiguration, "missing", script]];
  properties = {
    "RemoteMachine" -> True,
    "TranslateReturns" -> True,
    "AppendNameToCellLabel" -> True,
    "AutoStartOnLaunch" -> False,
    "MLOpenArguments" -> "-LinkMode Listen -LinkProtocol TCPIP -LinkOptions MLDontInteract -LinkHost 127.0.0.1",
    (* The front end fills in both words between backticks. *)
    "LoginScript" -> StringJoin[
      quoted[
        "`userbaseDirectory`" <> If[system === "Windows", "\\FrontEnd\\", "/FrontEnd/"] <> scriptName["tunnel", system]],
      relayText[options, system],
      " ", quoted[host],
      " ", quoted[chosenPath[options, system, frontEndValue["VersionNumber", $VersionNumber]]],
      " ", quoted["`linkname`"]]
  };
  known = keptConfigurations[];
  If[MemberQ[First /@ known, name],
    Print["Existing configuration ", quoted[name], " updated in kernel configuration options."];
    known = If[First[#] === name, name -> properties, #] & /@ known,
    Print["New configuration ", quoted[name], " added to kernel configuration options."];
    known = Append[known, name -> properties]];
  keepConfigurations[known];
  name -> properties
]

(* -- compute kernels *)

Options[RemoteMachineTunnel] = {
  "OperatingSystem" -> Automatic, "VersionNumber" -> Automatic, "KernelPath" -> Automatic,
  "Relay" -> False, "Via" -> None, "KernelSpeed" -> 1, "ShareConnection" -> Automatic};

RemoteMachineTunnel[host_] := RemoteMachineTunnel[host, 1]
RemoteMachineTunnel[host_, rule : (_Rule | _RuleDelayed | _List), rules___] :=
  RemoteMachineTunnel[host, 1, rule, rules]

RemoteMachineTunnel[host_, count_, rules___] := Module[{options},
  Which[
    !hostQ[host],
    complain[RemoteMachineTunnel, "host", shown[host]],
    !(IntegerQ[count] && count > 0),
    complain[RemoteMachineTunnel, "count", count],
    (options = checkedOptions[RemoteMachineTunnel, Flatten[{rules}]]) === $Failed,
    $Failed,
    !MemberQ[$Packages, "SubKernels`RemoteKernels`"],
    complain[RemoteMachineTunnel, "package"],
    True,
    describeKernels[host, count, options]
  ]
]

describeKernels[host_String, count_Integer, options_List] := Module[{windows, script, share, command},
  windows = ownSystem[] === "Windows";
  script = scriptPath["tunnel_sub", ownSystem[]];
  If[!FileExistsQ[script], complain[RemoteMachineTunnel, "missing", script]];
  share = ("ShareConnection" /. options) /. Automatic -> count > 1;
  command = StringJoin[
    quoted[script],
    If[share && !windows, " --share", ""],
    relayText[options, ownSystem[]],
    " ", quoted[host],
    " ", quoted[chosenPath[options, ownSystem[], $VersionNumber]],
    " ", quoted["`2`"]];
  (* cmd.exe /c takes the first and the last quote off a command. *)
  SubKernels`RemoteKernels`RemoteMachine[
    First[placeParts[placeIn[host]]], If[windows, quoted[command], command], count,
    LinkHost -> "127.0.0.1", System`KernelSpeed -> ("KernelSpeed" /. options)]
]

(* -- compute kernels that may have to wait in a queue

   LaunchKernels[RemoteMachineTunnel[...]] runs one launcher after the other, each of which returns when its kernel is
   under way: with a queue it would wait for each job in turn, and give up the kernels that are there already, since
   it waits 15 s for them to call back. So here all launchers run at the same time, and LaunchKernels gets links whose
   kernels are there. What StartProcess, ProcessStatus and ProcessInformation do is as the documentation has it, and so
   is LaunchKernels for links: neither has been tried with a licensed kernel. *)

Options[LaunchTunnelKernels] = {
  "OperatingSystem" -> Automatic, "VersionNumber" -> Automatic, "KernelPath" -> Automatic,
  "Relay" -> False, "Via" -> None, "ShareConnection" -> Automatic};

LaunchTunnelKernels[host_] := LaunchTunnelKernels[host, 1]
LaunchTunnelKernels[host_, rule : (_Rule | _RuleDelayed | _List), rules___] :=
  LaunchTunnelKernels[host, 1, rule, rules]

LaunchTunnelKernels[host_, count_, rules___] := Module[{options, script},
  script = scriptPath["tunnel_sub", ownSystem[]];
  Which[
    !hostQ[host],
    complain[LaunchTunnelKernels, "host", shown[host]],
    !(IntegerQ[count] && count > 0),
    complain[LaunchTunnelKernels, "count", count],
    (options = checkedOptions[LaunchTunnelKernels, Flatten[{rules}]]) === $Failed,
    $Failed,
    !FileExistsQ[script],
    complain[LaunchTunnelKernels, "missing", script],
    True,
    launchAtOnce[launcherWords[script, host, count, options], count]
  ]
]

launcherWords[script_, host_, count_, options_] := Join[
  {script},
  If[(("ShareConnection" /. options) /. Automatic -> count > 1) && ownSystem[] =!= "Windows", {"--share"}, {}],
  relayWords[options],
  {host, chosenPath[options, ownSystem[], $VersionNumber]}
]

(* Closed links tell the launchers that nobody wants their kernels any more. *)
launchAtOnce[words_List, count_] := Module[{links, processes, codes, good},
  links = Table[LinkCreate[LinkMode -> Listen, LinkProtocol -> "TCPIP", LinkHost -> "127.0.0.1"], {count}];
  processes = StartProcess[Append[words, First[#]]] & /@ links;
  CheckAbort[
    While[MemberQ[ProcessStatus /@ processes, "Running"], Pause[0.1]],
    LinkClose /@ links; Abort[]];
  codes = ProcessInformation[#, "ExitCode"] & /@ processes;
  good = Flatten[Position[codes, 0, {1}]];
  If[Length[good] < count,
    Message[LaunchTunnelKernels::failed, count, count - Length[good], lastWords[processes, codes]];
    LinkClose /@ links[[Complement[Range[count], good]]]];
  If[good === {}, $Failed, LaunchKernels[links[[good]]]]
]

(* What the first launcher that has failed says. *)
lastWords[processes_List, codes_List] := Module[{failed, text},
  failed = First[Select[Range[Length[codes]], codes[[#]] =!= 0 &]];
  text = Quiet[ReadString[ProcessConnection[processes[[failed]], "StandardError"]]];
  If[StringQ[text], StringTrim[text], ""]
]

(* -- the kernel's own function *)

Module[{protected = MemberQ[Attributes[MathLink`CreateFrontEndLink], Protected]},
  Unprotect[MathLink`CreateFrontEndLink];
  MathLink`CreateFrontEndLink[] := tunneledLink[];
  If[protected, Protect[MathLink`CreateFrontEndLink]]
]

End[]

EndPackage[]
