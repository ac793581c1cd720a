"""What is said of a command line that cannot be read: the mistake that its words look like."""

RELATIVES = {"-p": "Port", "-J": "ProxyJump", "-i": "IdentityFile", "-l": "User"}
QUOTES = "\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb"  # typographic ones, which no shell takes
ORDER = "options stand before the host, and a path with spaces stands in quotes"
BY_HAND = "to try it by hand, without a front end: --check in front of them"


def guess(argv, request, fault):
    """The line on a command line that cannot be read.

    Words are only repeated where they are options: a password stands anywhere.

    :param argv: the arguments, without the program
    :param request: what could be read of them
    :param fault: what the parser says of them
    :returns: that line, or a better one
    """
    before = argv[: argv.index("--")] if "--" in argv else argv
    via = next((n for n, word in enumerate(before) if word == "--via" or word.startswith("--via=")), None)
    words = before[via + (before[via] == "--via") :] if request.via and via is not None else []
    if words and words[0].replace("--via=", "", 1)[:1] in tuple(QUOTES):
        return '--via: typographic quotes are none for a shell; write --via "srun -n1 -u", in plain ones'
    flag = fault.partition(":")[0]
    unread = fault.startswith((flag + ": not known", "this option: not known"))
    if words and (unread or "too many" in fault):
        return '--via: quote the whole COMMAND, as in --via "srun -n1 -u"; ' + fault
    if unread and flag in RELATIVES:
        return "{}: not known; it is -o {}=VALUE".format(flag, RELATIVES[flag])
    if "too many" in fault:
        relay = [n for n, word in enumerate(argv[:-1]) if word == "--relay" and argv[n + 1].isdigit()]
        if relay:
            return "--relay: minutes are written with an equals sign: --relay={}".format(argv[relay[0] + 1])
        return "{}; {}".format(fault, ORDER)
    if fault.startswith("link_name is missing") and not request.check:
        return "{}; {}".format(fault, BY_HAND)
    return fault
