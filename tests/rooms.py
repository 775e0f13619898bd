"""The package's rooms, for the tests that hold their order and for the shape checks."""

# From the bottom to the top. A name without a folder is a module at the package's top.
ORDER = (
    "errors", "files", "devices", "llama", "mesh", "checkpoints", "draft", "decode", "memory", "engine",
    "planning", "measure", "serve", "batch", "llm", "testing", "chat", "integrations", "cli",
)  # fmt: skip
# Those that arrays pass through; the front doors check their own input, and are tested for it.
CHECKED = ("llama", "draft", "decode", "engine", "devices.compiled")
