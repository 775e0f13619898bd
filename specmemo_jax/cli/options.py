"""The options that commands share, one name each; the panels that --help shows them in; how they are read."""

from enum import StrEnum
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from specmemo_jax.cli.completion import complete_drafter, complete_model
from specmemo_jax.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m-instruct"
PROMPTS, MODEL, SAMPLING, ENDING, OUTPUT = "Prompts", "Model and memory", "Sampling", "Ending", "Output"


in_prompts, in_model, in_sampling, in_ending, in_output = (
    partial(typer.Option, rich_help_panel=panel) for panel in (PROMPTS, MODEL, SAMPLING, ENDING, OUTPUT)
)


class Dtype(StrEnum):
    """What the weights and the cache are held in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class CacheDtype(StrEnum):
    """What the target's keys and values are held in."""

    auto = "auto"
    int8 = "int8"


class Format(StrEnum):
    """How answers are written."""

    auto = "auto"
    text = "text"
    jsonl = "jsonl"


Prompts = Annotated[
    list[str] | None,
    typer.Argument(metavar="PROMPT", help="Texts to answer; - is the text on standard input."),
]
Files = Annotated[
    list[str] | None,
    in_prompts(
        "--file", "-f", metavar="FILE", help="A text file whose whole content is one prompt; repeatable."
    ),
]
PromptsFile = Annotated[
    str | None,
    in_prompts("--prompts", "-p", metavar="FILE", help="Many prompts, as JSONL; - is standard input."),
]
Limit = Annotated[int | None, in_prompts(min=1, metavar="N", help="Only the first N prompts.")]
Chat = Annotated[
    bool | None,
    in_prompts(
        "--chat/--raw",
        help="Texts as a user's message, or as they are; default: as a message if the model knows chats.",
    ),
]

Model = Annotated[
    str,
    in_model(
        "--model",
        "-m",
        metavar="NAME",
        help="A name (specmemo list), folder, .gguf file or hub id.",
        autocompletion=complete_model,
    ),
]
Drafter = Annotated[
    str,
    in_model(
        metavar="NAME",
        help="Who guesses ahead: auto, ngram (repeats of the text so far), self:K (the model's first K "
        "layers), none (plain decoding), a trained head (such as smollm2-135m-eagle), or a smaller model "
        "with the same vocabulary: a name, folder, .gguf file or hub id.",
        autocompletion=complete_drafter,
    ),
]
TreeNodes = Annotated[
    int | None,
    in_model(min=1, metavar="N", help="Tokens checked a step; default: what suits."),
]
MaxBatch = Annotated[int, in_model(min=1, metavar="N", help="Prompts decoded together.")]
BatchRows = Annotated[
    str,
    in_model(
        "--max-batch",
        metavar="N|auto",
        help="Prompts decoded together; auto: as many as pay under the budget.",
    ),
]
MaxContext = Annotated[
    int | None,
    in_model(min=1, metavar="N", help="Most tokens, prompt and answer; default: what fits."),
]
MemoryBudget = Annotated[
    str | None,
    in_model(metavar="BYTES", help="Device memory to stay under, such as 1GiB."),
]
NumberFormat = Annotated[
    Dtype,
    in_model("--dtype", metavar="TYPE", help="auto, float32, bfloat16, float16."),
]
CacheFormat = Annotated[
    CacheDtype,
    in_model(
        "--kv-cache-dtype",
        metavar="TYPE",
        help="auto: the cache is as the weights; int8: a half to a quarter of it, lossy: some tokens change.",
    ),
]
Adaptive = Annotated[
    bool,
    in_model("--adaptive/--no-adaptive", help="Guess less, or not at all, while guessing does not pay."),
]

Temperature = Annotated[
    float | None,
    in_sampling(
        metavar="X",
        help="Default 0: the likeliest token each time (greedy), so that the answer is exactly the one of "
        "the model alone; above, the higher the more varied.",
    ),
]
TopP = Annotated[
    float,
    in_sampling(metavar="X", help="Only the likeliest tokens that sum to this probability."),
]
TopK = Annotated[
    int,
    in_sampling(metavar="K", help="Only the K likeliest tokens; 0: all."),
]
MinP = Annotated[
    float,
    in_sampling(metavar="X", help="Only tokens at least this likely, relative to the likeliest."),
]
RepetitionPenalty = Annotated[
    float,
    in_sampling(metavar="X", help="Above 1: against tokens of prompt and answer."),
]
PresencePenalty = Annotated[
    float,
    in_sampling(metavar="X", help="Above 0: against tokens of the answer."),
]
FrequencyPenalty = Annotated[
    float,
    in_sampling(metavar="X", help="The same, once for each time."),
]
BadWords = Annotated[
    list[str] | None,
    in_sampling("--bad-word", metavar="TEXT", help="Never in the answer; repeatable."),
]
Seed = Annotated[
    int | None,
    in_sampling(
        metavar="N", help="Makes sampling repeatable: the n-th answer (turns counted) has the seed N + n - 1."
    ),
]

MaxTokens = Annotated[
    int,
    in_ending("--max-tokens", "-n", min=1, metavar="N", help="Most new tokens an answer."),
]
MinTokens = Annotated[
    int,
    in_ending(min=0, metavar="N", help="Not before so many tokens."),
]
Stop = Annotated[
    list[str] | None,
    in_ending(metavar="TEXT", help="End before this text; repeatable."),
]
StopTokenIds = Annotated[
    list[int] | None,
    in_ending("--stop-token-id", min=0, metavar="ID", help="End at this id; repeatable."),
]
IgnoreEos = Annotated[
    bool,
    in_ending("--ignore-eos", help="Go on past the model's own end."),
]

Output = Annotated[
    str | None,
    in_output("--output", "-o", metavar="FILE", help="Instead of standard output."),
]
Style = Annotated[
    Format,
    in_output(
        "--format",
        metavar="FORMAT",
        help="text, jsonl, or auto: text on a terminal (unless --prompts), else jsonl.",
    ),
]
Stream = Annotated[
    bool | None,
    in_output(
        "--stream/--no-stream", help="Write text as it comes; default: on a terminal, one prompt at a time."
    ),
]

CHAT = "Chat"


class Overflow(StrEnum):
    """What a chat does that no longer fits the context."""

    error = "error"
    drop_oldest = "drop-oldest"


System = Annotated[str | None, typer.Option(metavar="TEXT", help="The system prompt.", rich_help_panel=CHAT)]
OnOverflow = Annotated[
    Overflow,
    typer.Option(
        "--overflow",
        metavar="WHAT",
        help="When the context is full: error (nothing is cut), or drop-oldest: whole turns go, the oldest "
        "first; the system prompt stays.",
        rich_help_panel=CHAT,
    ),
]
Load = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Go on with a chat that /save wrote.", rich_help_panel=CHAT),
]
ChatMaxTokens = Annotated[
    int | None,
    in_ending(
        "--max-tokens",
        "-n",
        min=1,
        metavar="N",
        help="Most new tokens an answer; default: 512, or what the context leaves.",
    ),
]

WORKLOAD = "Workload"
# Of `specmemo plan`: numbers come as texts, so that whatever is wrong with one is a refusal like any other.
PlanModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help=f"As --model; default: {DEFAULT_MODEL}. A config is enough: weights need not be here.",
        autocompletion=complete_model,
    ),
]
PlanModelOption = Annotated[
    str | None,
    in_model(
        "--model",
        "-m",
        metavar="NAME",
        help="A name (specmemo list), folder, .gguf file or config.json.",
        autocompletion=complete_model,
    ),
]
PlanDevice = Annotated[
    str,
    in_model(
        "--device",
        metavar="SLUG",
        help="What to plan for; it need not be here: titan-rtx, t4, rtx-3090, rtx-4090, l4, a10g, a100-40, "
        "a100-80, h100, h200, mi250-gcd, mi250x-gcd, orin-64, cpu; auto: what runs here.",
    ),
]
PlanTreeNodes = Annotated[
    str | None,
    in_model("--tree-nodes", metavar="N", help="Tokens checked a step; default: searched."),
]
PlanDtype = Annotated[
    str,
    in_model("--dtype", metavar="TYPE", help="auto, float32, bfloat16, float16."),
]
PlanCacheDtype = Annotated[
    str,
    in_model(
        "--kv-cache-dtype", metavar="TYPE", help="auto: as the weights; int8: about half the cache, lossy."
    ),
]
PlanMesh = Annotated[
    str,
    in_model("--mesh", metavar="N", help="Devices that split the model; bytes are of each."),
]
PlanPolicy = Annotated[
    str,
    in_model(metavar="POLICY", help="plan; or a baseline to compare with: unbounded, unbounded-last-row."),
]
PlanBatch = Annotated[
    str,
    typer.Option(
        "--batch",
        metavar="N|auto",
        help="Prompts decoded together; auto: as many as pay.",
        rich_help_panel=WORKLOAD,
    ),
]
PlanContext = Annotated[
    str | None,
    typer.Option(
        "--context",
        metavar="N",
        help="Most tokens of a row, prompt and answer; default: the most that fits.",
        rich_help_panel=WORKLOAD,
    ),
]
PlanPromptTokens = Annotated[
    str | None,
    typer.Option(
        "--prompt-tokens", metavar="N", help="Tokens of a prompt; default: 512.", rich_help_panel=WORKLOAD
    ),
]
PlanNewTokens = Annotated[
    str | None,
    typer.Option(
        "--new-tokens", metavar="N", help="Tokens of an answer; default: 128.", rich_help_panel=WORKLOAD
    ),
]
PlanRequestTokens = Annotated[
    str | None,
    typer.Option(
        "--request-tokens",
        metavar="N,N,...",
        help="Tokens, prompt and answer, of requests like those to come: rows then lie in groups.",
        rich_help_panel=WORKLOAD,
    ),
]
Prove = Annotated[
    bool,
    in_output(
        "--prove",
        help="Compile every program from shapes alone and print the compiler's bytes; takes minutes.",
    ),
]
PlanJson = Annotated[bool, in_output("--json", help="One JSON object, refusals too.")]
Frontier = Annotated[
    str | None,
    in_output(
        "--frontier",
        metavar="FILE",
        help="Tokens/s against memory, as .png, .svg (needs matplotlib) or .csv.",
    ),
]
Measured = Annotated[
    str | None,
    in_output(
        "--measured",
        metavar="FILE",
        help="CSV with peak_bytes, tokens_per_second and perhaps label, to show in --frontier.",
    ),
]


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


def row_count(option: str, text: str) -> int | None:
    """A number of rows, None for ``auto``."""
    return None if text == "auto" else count(option, text, " or auto")


def count(option: str, text: str, other: str = "") -> int:
    """A whole number from 1 on. Raises ConfigError with what would work."""
    try:
        value = int(text)
    except ValueError:
        raise ConfigError(
            f"{option} {text!r} is not a whole number; one from 1 on{other} would work"
        ) from None
    if value < 1:
        raise ConfigError(f"{option} must be at least 1, found {value}")
    return value
