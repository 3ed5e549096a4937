"""What commands with a config share: their flags, and one line for what the user can mend."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from jaxdistill.errors import UserError, cannot_be_used, missing_extra
from jaxdistill.run import checkpoint, distributed
from jaxdistill.run.cost import Rates
from jaxdistill.run.help import Parser, unknown
from jaxdistill.run.loop import NonFiniteError, Stopped
from jaxdistill.run.workdir import say

MOVED = {
    "config.adversarial.weight": "config.methods.imagine_flash.adversarial_weight",
    "config.shifts": "config.methods.imagine_flash.shifts",
    "config.student.learning_rate": "config.methods.imagine_flash.learning_rate",
}
"""Keys of 0.1.0, which had one method."""
PROCESSES = ("distributed", "coordinator", "num_processes", "process_id")


class Command:
    """The flags of one command, defined where it runs.

    A flag's help may start with the form of its value in capitals, as "FOLDER: with a config". A
    flag whose help starts with "internal" is not listed.

    Args:
      doc: what --help says: what the command does and an example.
      workdir: whether it writes into one.
      processes: whether it is one of several processes; without it their flags are refused.
      needed: flags of its own that the usage line shows.
      define: adds the command's own flags to a FlagValues.
    """

    def __init__(
        self,
        doc: str | None,
        *,
        config: bool = True,
        workdir: bool = True,
        processes: bool = False,
        needed: str = "",
        define: Callable[[flags.FlagValues], None] = lambda values: None,
    ) -> None:
        self.doc, self.values = doc or "", flags.FlagValues()
        shared = (config and "--config=FILE", workdir and "--workdir=FOLDER", needed)
        self.needed = " ".join(flag for flag in shared if flag)
        values = self.values
        if config:
            about = "FILE: with get_config(), as in configs/; --config.KEY=VALUE sets any key"
            config_flags.DEFINE_config_file("config", None, about, flag_values=values)
        if workdir:
            about = "FOLDER: for checkpoints, exports and results; a second start in it resumes"
            flags.DEFINE_string("workdir", None, about, flag_values=values)
        if processes:
            self._define_processes()
        define(values)
        logging.set_verbosity(logging.FATAL)  # Orbax logs with a traceback what it raises as well

    def _define_processes(self) -> None:
        values = self.values
        about = "one of several processes that JAX finds: Cloud TPU pods, GKE, SLURM"
        flags.DEFINE_bool("distributed", False, about, flag_values=values)
        about = "HOST:PORT: process 0, where JAX cannot find the processes"
        flags.DEFINE_string("coordinator", None, about, flag_values=values)
        about = "how many processes there are, with --coordinator"
        flags.DEFINE_integer("num_processes", None, about, flag_values=values)
        about = "number of this process, from 0, with --coordinator"
        flags.DEFINE_integer("process_id", None, about, flag_values=values)

    def parse(self) -> "Command":
        """Read the flags of sys.argv. Raises UserError; leaves after --help."""
        given = sys.argv[:] = [renamed(word) for word in sys.argv]
        if any(word in ("--help", "-h", "-help") for word in given[1:]):
            print(self.help())
            sys.exit(0)
        for word in given[1:]:
            name = word.lstrip("-").partition("=")[0].removeprefix("no")
            flag = word.startswith("-") and name in PROCESSES
            if flag and name not in self.values:
                raise UserError(
                    f"--{name}: this command is one process; only jaxdistill.main runs as several"
                )
        try:
            rest = self.values(given)[1:]
        except (flags.Error, LookupError, AttributeError, TypeError, ValueError) as error:
            raise UserError(self._flag_error(error, given)) from None
        except (OSError, ImportError) as error:
            raise UserError(f"--config cannot be loaded: {_file_error(error)}") from None
        if rest:
            raise UserError(
                f"unexpected argument {rest[0]!r}; flags look like --config=configs/digits.py"
                " --workdir=runs/digits --config.KEY=VALUE"
            )
        return self

    def _flag_error(self, error: Exception, given: Sequence[str]) -> str:
        """A mistake in the flags as one line."""
        if "Error whilst parsing config file" in str(error):  # with the traceback of what it raised
            last = str(error).strip().splitlines()[-1]
            return f"--config cannot be loaded: {last.removeprefix('ValueError: ')}"
        frames = traceback.extract_tb(error.__traceback__)
        if own := [frame for frame in frames if frame.name == "get_config"]:
            where = f"{own[-1].filename}, line {own[-1].lineno}"
            return f"--config cannot be loaded: {type(error).__name__}: {error} ({where})"
        text = re.sub(r"\s+", " ", str(error)).strip()
        if isinstance(error, flags.UnrecognizedFlagError):
            known = [f"--{name}" for name in self.values]
            return unknown(f"--{error.flagname}", known, Parser(self.doc, self.needed).prog)
        if found := re.fullmatch(
            r"flag (--\S+?=.*): (invalid literal for int|could not conv).*", text
        ):
            return f"{found[1]} is not a {'whole ' * ('int' in found[2])}number"
        if not isinstance(error, (LookupError, AttributeError)) or "config" not in self.values:
            return text
        return f"unknown config key: {_without_key(_config_of(given), given) or text}"

    def help(self) -> str:
        """The docstring and a line a flag."""
        parser = Parser(self.doc, self.needed)
        for name in self.values:
            flag = self.values[name]
            if flag.help.startswith("internal"):
                continue
            if flag.flag_type() == "bool":
                parser.add_argument(f"--{name}", action="store_true", help=flag.help)
                continue
            found = re.match(r"(?:<.*>: )?([A-Z:,]+): ", flag.help)
            form, text = (found[1], flag.help[found.end() :]) if found else ("N", flag.help)
            default = None if name == "config" else flag.default
            default = ",".join(default) if isinstance(default, list) else default
            parser.add_argument(f"--{name}", metavar=form, help=text, default=default)
        return parser.format_help().rstrip()

    def __getattr__(self, name: str) -> Any:
        """The value of a flag."""
        values = self.__dict__.get("values")
        if values is None or name not in values:
            raise AttributeError(name)
        return values[name].value

    def given_config(self, *, writes: bool = True) -> ConfigDict:
        """The config of the flags. Raises UserError where it (or the workdir of a command that
        `writes`) is missing or the file cannot be loaded.
        """
        workdir = writes and "workdir" in self.values
        if workdir and (not self.values["config"].present or not self.workdir):
            raise UserError(
                "--config and --workdir are needed: --config=configs/digits.py"
                " --workdir=runs/digits"
            )
        if not self.values["config"].present:
            raise UserError("--config is missing; give a file such as configs/digits.py")
        try:
            config: ConfigDict = self.config
            config.keys()  # a file that could not be loaded fails at its first use
        except Exception as error:  # whatever the user's file raises
            cause = error.__cause__ or error
            said = [line.strip() for line in _file_error(cause).splitlines() if line.strip()]
            text = said[-1] if said else type(cause).__name__
            raise UserError(f"--config cannot be loaded: {text}") from None
        return config

    def rates(self) -> Rates:
        """Of `define_rates`. Raises UserError."""
        return Rates(self.mfu, self.price_per_hour).check()

    def folder(self) -> Path:
        """The workdir."""
        return Path(self.workdir)


def define_rates(values: flags.FlagValues) -> None:
    """The flags of a plan's hours and money."""
    about = "price of one device an hour: the plan then tells the money"
    flags.DEFINE_float("price_per_hour", None, about, flag_values=values)
    about = "share of the devices' peak that the plan's hours assume, up to 1"
    flags.DEFINE_float("mfu", Rates().mfu, about, flag_values=values)


def renamed(word: str) -> str:
    """A flag under the name that its key has today, which is said."""
    key = word.lstrip("-").partition("=")[0]
    for old, new in MOVED.items():
        if word.startswith("-") and (key == old or key.startswith(f"{old}.")):
            today = new + key.removeprefix(old)
            print(f"warning: {key} is {today} since 0.2.0", file=sys.stderr)
            return word.replace(key, today, 1)
    return word


def _file_error(error: BaseException) -> str:
    """What an error says, without its number."""
    return re.sub(r"\[Errno \d+\] ", "", str(error))


def _config_of(given: Sequence[str]) -> ConfigDict:
    """The file's config, without the changes."""
    values = flags.FlagValues()
    kept = [word for word in given if not word.lstrip("-").startswith("config.")]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=kept)
    values(kept, known_only=True)
    config: ConfigDict = values["config"].value
    return config


def _without_key(config: ConfigDict, words: Sequence[str]) -> str:
    """The first key of the flags that the config does not have and what there is, or nothing."""
    for word in words:
        block, walked = config, "config"
        first, *path = word.lstrip("-").partition("=")[0].split(".")
        for part in path if first == "config" else ():
            name = part.partition("[")[0]
            if not isinstance(block, ConfigDict) or name not in block:
                there = list(block) if isinstance(block, ConfigDict) else []
                near = get_close_matches(name, there, n=1)
                meant = f"; did you mean {walked}.{near[0]}?" if near else ""
                has = f"; {walked} has {', '.join(there)}" if there and not near else ""
                return f"{walked}.{name}{meant}{has}"
            block, walked = block[name], f"{walked}.{name}"
    return ""


def fail(line: str) -> NoReturn:
    """One clear line, exit code 2."""
    if checkpoint.FULL in line:
        print(f"error: {line}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)  # other libraries' exit handlers would write again, and trace back
    distributed.leave(f"error: {line}", 2)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Leave with one line for what the user can mend (exit code 2), and after a stop (0). What was
    finished before is kept. A bug keeps its traceback.
    """
    try:
        with distributed.device_errors_are_one_line():
            yield
    except Stopped as stopped:
        say(str(stopped))
    except (UserError, NonFiniteError) as error:
        fail(str(error))
    except ModuleNotFoundError as error:
        if (line := missing_extra(error)) is None:
            raise
        fail(line)
    except OSError as error:
        if line := cannot_be_used(error):
            fail(line)
        if not checkpoint.disk_is_full(error):
            raise
        where = f" ({error.filename})" if error.filename else ""
        fail(f"{checkpoint.FULL}{where}; free some space and run the same command again")
