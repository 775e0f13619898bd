"""What the user says: lines, blocks between triple quotes, commands."""

import contextlib
import sys
from typing import NamedTuple

from specmemo_jax.errors import RequestError

QUOTES = '"""'


class Said(NamedTuple):
    """One turn's text; a command when it is a line that begins with a slash."""

    text: str
    is_command: bool = False


class LineReader:
    """Standard input, one turn at a time; prompts are shown where a person types.

    A line that ends in a backslash goes on in the next; a text in triple quotes may have many lines.
    """

    def __init__(self) -> None:
        self.interactive = sys.stdin is not None and sys.stdin.isatty()
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # input() then has a history and edits

    def read(self) -> Said | None:
        """The next turn, None at the end of the input (Ctrl-D). Raises KeyboardInterrupt at Ctrl-C,
        RequestError for what is no text or a block without an end.
        """
        line = self._line(">>> ")
        if line is None:
            return None
        if line.lstrip().startswith(QUOTES):
            return Said(self._block(line.lstrip().removeprefix(QUOTES)))
        if line.startswith("/"):
            return Said(line.strip(), is_command=True)
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._line("... ") or "")
        return Said("\n".join(lines).strip())

    def _block(self, first: str) -> str:
        lines = [first]
        while not lines[-1].rstrip().endswith(QUOTES):
            line = self._line("... ")
            if line is None:
                raise RequestError(
                    f"the text after {QUOTES} has no end; {QUOTES} at the end of a line ends it"
                )
            lines.append(line)
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip()

    def _line(self, prompt: str) -> str | None:
        try:
            if not self.interactive:
                return None if sys.stdin is None else input()
            if sys.stdout.isatty():
                return input(prompt)
            print(prompt, end="", file=sys.stderr, flush=True)  # answers go elsewhere, prompts do not
            return input()
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input is not UTF-8 text ({error})") from error
