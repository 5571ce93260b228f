"""What ``--help`` shows below the flags: how a command is called, and how its reports are read."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "scan": ("scan Qwen/Qwen1.5-MoE-A2.7B", "scan model --format json --out sites.json"),
    "plan": ("plan model -o plan.json", 'plan model --only "talker.**" --check', "plan model -o - | jq .fingerprint"),
    "explain": ("explain model model.layers.0.mlp", "explain model model.layers.0.mlp --pack mine.toml"),
    "apply": (
        'apply model --prompt "The capital of France is"',
        "apply model --generate 1,2,3 --svg report.svg",
        "apply plan.json",
    ),
    "verify": ("verify model --dtype bfloat16", "verify plan.json --html report.html"),
    "bench": ("bench model --tokens 1 --tokens 512", "bench model --engine"),
    "run": ("run -- vllm serve model", "run --pack mine.toml --run receipts -- python script.py"),
    "audit": ("audit -- vllm serve model", "audit --run receipts -- python script.py"),
    "report": ("report receipts", "report receipts --html run.html"),
    "diff": ("diff before.json after.json", "diff receipts-monday receipts-today --format json"),
    "tune": ("tune model", "tune model --tensor-parallel 2 --tokens 1 --tokens 64"),
    "doctor": ("doctor",),
    "packs list": ("packs list",),
    "packs show": ("packs show qwen3-omni",),
    "packs check": ("packs check mine.toml rules/",),
    "packs test": ("packs test mine.toml --family mixtral",),
}
_READ = (
    "In reports: ~ replaced, = kept, ? missed (no rule fits, or it couldn't be read), ! refused.",
    "rel: the new block's error against a float64 reference, relative to the output.",
    "margin: how many times nearer to the reference it is than the nearest wrong block.",
)
_READ_AUDIT = (
    "In reports: ✓ right, ≠ wrong (what it does instead, if that is a known mistake), ? not comparable and why.",
    *_READ[1:],
)
_WITH_REPORT = ("plan", "apply", "verify", "bench", "run", "report")


def epilog(command: str) -> str:
    """The end of a command's ``--help``."""
    lines = ["Examples:", *(f"  moe-surgery {example}" for example in EXAMPLES[command])]
    if command in _WITH_REPORT:
        lines += ["", *_READ]
    if command == "audit":
        lines += ["", *_READ_AUDIT]
    return "\n".join(lines)
