"""The package's rooms, for the tests that hold their order and for the shape checks."""

# From the bottom to the top. A name without a folder is a module at the package's top.
ORDER = (
    "errors", "files", "devices", "llama", "mesh", "checkpoints", "draft", "decode", "memory", "engine",
    "train", "planning", "measure", "serve", "batch", "llm", "testing", "chat", "integrations", "cli",
)  # fmt: skip
# What arrays pass through; the front doors check their own input, and are tested for it. Of the target's
# room not the arithmetic over buffers, which a plan calls many thousand times.
CHECKED = (
    "llama.attention", "llama.config", "llama.kv", "llama.layers", "llama.model", "llama.packing",
    "llama.rope", "llama.tiles", "draft", "decode", "engine", "devices.compiled",
)  # fmt: skip
