"""Help in panels, as plain text: options under the headings that they name."""

from typing import Any

from typer.core import TyperCommand


class GroupedHelp(TyperCommand):
    """A command whose --help shows each option under its ``rich_help_panel``, in their order."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then panel by panel the options."""
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            if param.param_type_name == "argument":
                panels["Arguments"].append((getattr(param, "metavar", None) or record[0], record[1]))
            else:
                panel = getattr(param, "rich_help_panel", None) or "Options"
                panels.setdefault(panel, []).append(record)
        for name, records in panels.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)
