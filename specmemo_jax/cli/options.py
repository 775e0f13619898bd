"""The options of ``specmemo generate``, one name each, and the panels that --help shows them in."""

from enum import StrEnum
from typing import Annotated

import typer

from specmemo_jax.cli.completion import complete_drafter, complete_model

DEFAULT_MODEL = "smollm2-135m-instruct"
PROMPTS, MODEL, SAMPLING, ENDING, OUTPUT = "Prompts", "Model and memory", "Sampling", "Ending", "Output"


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
    typer.Option(
        "--file",
        "-f",
        metavar="FILE",
        help="A text file whose whole content is one prompt; repeatable.",
        rich_help_panel=PROMPTS,
    ),
]
PromptsFile = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        "-p",
        metavar="FILE",
        help="Many prompts, as JSONL; - is standard input.",
        rich_help_panel=PROMPTS,
    ),
]
Limit = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Only the first N prompts.", rich_help_panel=PROMPTS)
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw",
        help="Texts as a user's message, or as they are; default: as a message if the model knows chats.",
        rich_help_panel=PROMPTS,
    ),
]

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="A name (specmemo list), folder, .gguf file or hub id.",
        autocompletion=complete_model,
        rich_help_panel=MODEL,
    ),
]
Drafter = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Who guesses ahead: auto, ngram (repeats of the text so far), self:K (the model's first K "
        "layers), none (plain decoding), or a smaller model with the same vocabulary: a name, folder, "
        ".gguf file or hub id.",
        autocompletion=complete_drafter,
        rich_help_panel=MODEL,
    ),
]
TreeNodes = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Tokens checked a step; default: what suits.", rich_help_panel=MODEL
    ),
]
MaxBatch = Annotated[
    int, typer.Option(min=1, metavar="N", help="Prompts decoded together.", rich_help_panel=MODEL)
]
BatchRows = Annotated[
    str,
    typer.Option(
        "--max-batch",
        metavar="N|auto",
        help="Prompts decoded together; auto: as many as pay under the budget.",
        rich_help_panel=MODEL,
    ),
]
MaxContext = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Most tokens, prompt and answer; default: what fits.",
        rich_help_panel=MODEL,
    ),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(metavar="BYTES", help="Device memory to stay under, such as 1GiB.", rich_help_panel=MODEL),
]
NumberFormat = Annotated[
    Dtype,
    typer.Option("--dtype", metavar="TYPE", help="auto, float32, bfloat16, float16.", rich_help_panel=MODEL),
]
CacheFormat = Annotated[
    CacheDtype,
    typer.Option(
        "--kv-cache-dtype",
        metavar="TYPE",
        help="auto: the cache is as the weights; int8: a half to a quarter of it, lossy: some tokens change.",
        rich_help_panel=MODEL,
    ),
]
Adaptive = Annotated[
    bool,
    typer.Option(
        "--adaptive/--no-adaptive",
        help="Guess less, or not at all, while guessing does not pay.",
        rich_help_panel=MODEL,
    ),
]

Temperature = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Default 0: the likeliest token each time (greedy), so that the answer is exactly the one of "
        "the model alone; above, the higher the more varied.",
        rich_help_panel=SAMPLING,
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        metavar="X", help="Only the likeliest tokens that sum to this probability.", rich_help_panel=SAMPLING
    ),
]
TopK = Annotated[
    int,
    typer.Option(metavar="K", help="Only the K likeliest tokens; 0: all.", rich_help_panel=SAMPLING),
]
MinP = Annotated[
    float,
    typer.Option(
        metavar="X",
        help="Only tokens at least this likely, relative to the likeliest.",
        rich_help_panel=SAMPLING,
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(metavar="X", help="Above 1: against tokens of prompt and answer.", rich_help_panel=SAMPLING),
]
PresencePenalty = Annotated[
    float,
    typer.Option(metavar="X", help="Above 0: against tokens of the answer.", rich_help_panel=SAMPLING),
]
FrequencyPenalty = Annotated[
    float,
    typer.Option(metavar="X", help="The same, once for each time.", rich_help_panel=SAMPLING),
]
BadWords = Annotated[
    list[str] | None,
    typer.Option(
        "--bad-word", metavar="TEXT", help="Never in the answer; repeatable.", rich_help_panel=SAMPLING
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Makes sampling repeatable: the n-th answer (turns counted) has the seed N + n - 1.",
        rich_help_panel=SAMPLING,
    ),
]

MaxTokens = Annotated[
    int,
    typer.Option(
        "--max-tokens", "-n", min=1, metavar="N", help="Most new tokens an answer.", rich_help_panel=ENDING
    ),
]
MinTokens = Annotated[
    int,
    typer.Option(min=0, metavar="N", help="Not before so many tokens.", rich_help_panel=ENDING),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="End before this text; repeatable.", rich_help_panel=ENDING),
]
StopTokenIds = Annotated[
    list[int] | None,
    typer.Option(
        "--stop-token-id", min=0, metavar="ID", help="End at this id; repeatable.", rich_help_panel=ENDING
    ),
]
IgnoreEos = Annotated[
    bool,
    typer.Option("--ignore-eos", help="Go on past the model's own end.", rich_help_panel=ENDING),
]

Output = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Instead of standard output.", rich_help_panel=OUTPUT
    ),
]
Style = Annotated[
    Format,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="text, jsonl, or auto: text on a terminal (unless --prompts), else jsonl.",
        rich_help_panel=OUTPUT,
    ),
]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Write text as it comes; default: on a terminal, one prompt at a time.",
        rich_help_panel=OUTPUT,
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
    typer.Option(
        "--max-tokens",
        "-n",
        min=1,
        metavar="N",
        help="Most new tokens an answer; default: 512, or what the context leaves.",
        rich_help_panel=ENDING,
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
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="A name (specmemo list), folder, .gguf file or config.json.",
        autocompletion=complete_model,
        rich_help_panel=MODEL,
    ),
]
PlanDevice = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="SLUG",
        help="What to plan for; it need not be here: titan-rtx, t4, rtx-3090, rtx-4090, l4, a10g, a100-40, "
        "a100-80, h100, h200, mi250-gcd, mi250x-gcd, orin-64, cpu; auto: what runs here.",
        rich_help_panel=MODEL,
    ),
]
PlanTreeNodes = Annotated[
    str | None,
    typer.Option(
        "--tree-nodes", metavar="N", help="Tokens checked a step; default: searched.", rich_help_panel=MODEL
    ),
]
PlanDtype = Annotated[
    str,
    typer.Option("--dtype", metavar="TYPE", help="auto, float32, bfloat16, float16.", rich_help_panel=MODEL),
]
PlanCacheDtype = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype",
        metavar="TYPE",
        help="auto: as the weights; int8: about half the cache, lossy.",
        rich_help_panel=MODEL,
    ),
]
PlanMesh = Annotated[
    str,
    typer.Option(
        "--mesh", metavar="N", help="Devices that split the model; bytes are of each.", rich_help_panel=MODEL
    ),
]
PlanPolicy = Annotated[
    str,
    typer.Option(
        metavar="POLICY",
        help="plan; or a baseline to compare with: unbounded, unbounded-last-row.",
        rich_help_panel=MODEL,
    ),
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
Prove = Annotated[
    bool,
    typer.Option(
        "--prove",
        help="Compile every program from shapes alone and print the compiler's bytes; takes minutes.",
        rich_help_panel=OUTPUT,
    ),
]
PlanJson = Annotated[
    bool, typer.Option("--json", help="One JSON object, refusals too.", rich_help_panel=OUTPUT)
]
Frontier = Annotated[
    str | None,
    typer.Option(
        "--frontier",
        metavar="FILE",
        help="Tokens/s against memory, as .png, .svg (needs matplotlib) or .csv.",
        rich_help_panel=OUTPUT,
    ),
]
Measured = Annotated[
    str | None,
    typer.Option(
        "--measured",
        metavar="FILE",
        help="CSV with peak_bytes, tokens_per_second and perhaps label, to show in --frontier.",
        rich_help_panel=OUTPUT,
    ),
]
