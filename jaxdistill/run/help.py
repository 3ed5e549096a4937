"""The help of every command: one screen with an example, a line a flag; mistakes in one line."""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

KINDS = {"int": "a whole number", "float": "a number"}


class Formatter(argparse.RawDescriptionHelpFormatter):
    """A line a flag with its default, at most 100 columns wide."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[-1]
        return name if action.nargs == 0 else f"{name}={action.metavar}"

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.help or ""
        if "default" in told or action.default in (None, "") or action.nargs == 0:
            return told
        return f"{told} (default: %(default)s)"


class More(argparse.Action):
    """A flag that prints the help of another parser and leaves."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, parser: "Parser", help: str):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)
        self._parser = parser

    def __call__(self, *_: Any) -> NoReturn:
        """Print and leave."""
        self._parser.print_help()
        sys.exit(0)


class Parser(argparse.ArgumentParser):
    """The flags of one command.

    Args:
      doc: of the module: what the command does, an example that starts with "python -m", and more.
      needed: the flags that the usage line shows.
    """

    def __init__(self, doc: str | None, needed: str) -> None:
        found = re.search(r"python -m \S+", doc or "")
        name = found[0] if found else "python -m jaxdistill"
        self._needed = needed
        super().__init__(
            prog=name,
            usage=f"{name} {needed} [options]",
            description=(doc or "").strip(),
            formatter_class=Formatter,
            add_help=False,
        )
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

    def add_more(
        self, flag: str, title: str, flags: Mapping[str, Mapping[str, Any]], *, group: Any
    ) -> None:
        """Flags that --help names in one line; `flag` explains them.

        Args:
          flag: as --help_files.
          title: what they are about.
          group: of flags, where --help has the line.
          flags: {--name: options of `add_argument`}.
        """
        more = Parser(f"{title}, as flags of {self.prog}", self._needed)
        for name, options in flags.items():
            more.add_argument(name, **options)
            self.add_argument(name, **{**options, "help": argparse.SUPPRESS})
        names = ", ".join(name.removeprefix("--") for name in flags)
        about = f"explains --{names}"
        group.add_argument(flag, action=More, parser=more, help=about)

    def error(self, message: str) -> NoReturn:
        """Print the mistake in one line and leave with exit code 2."""
        print(f"error: {self._told(message)}", file=sys.stderr)
        sys.exit(2)

    def _told(self, message: str) -> str:
        """A message of argparse, in the words of the other errors."""
        head, _, rest = message.partition(": ")
        if head == "the following arguments are required":
            names = rest.replace(", ", " and ")
            verb = "are" if "," in rest else "is"
            return f"{names} {verb} missing; {self.prog} --help shows an example"
        if head == "unrecognized arguments":
            return unknown(rest.split()[0], list(self._option_string_actions), self.prog)
        if not head.startswith("argument "):
            return message
        flag = head.removeprefix("argument ").rpartition("/")[2]
        if found := re.fullmatch(r"invalid (\w+) value: (.*)", rest):
            return f"{flag}={unquoted(found[2])} is not {KINDS.get(found[1], 'valid')}"
        if found := re.fullmatch(r"invalid choice: (.*) \(choose from (.*)\)", rest):
            allowed = found[2].replace("'", "")
            return f"{flag}={unquoted(found[1])} is not known; choose one of {allowed}"
        if rest == "expected one argument":
            return f"{flag} needs a value: {flag}=VALUE"
        if found := re.fullmatch(r"('.*'|\".*\") (is .*)", rest):
            return f"{flag}={unquoted(found[1])} {found[2]}"
        return f"{flag}: {rest}"


def unknown(word: str, flags: Sequence[str], command: str) -> str:
    """What to do about a flag that a command does not have."""
    near = get_close_matches(word.partition("=")[0], flags, n=1)
    mend = f"did you mean {near[0]}?" if near else f"{command} --help lists the flags"
    return f"{word} is not a flag of this command; {mend}"


def note(line: str) -> None:
    """Tell who sits at a terminal what takes its time."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


def unquoted(value: str) -> str:
    """A value without the quotes that argparse puts around it."""
    return value[1:-1] if value[:1] in ("'", '"') else value


def boolean(text: str) -> bool:
    """True or false, as a flag's value."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def named(choices: Sequence[str]) -> dict[str, Any]:
    """The choices of a flag, with their names as its value."""
    return {"choices": tuple(choices), "metavar": "NAME"}
