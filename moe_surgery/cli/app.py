"""The commands and their flags. What a command does is in ``scan_plan_explain``, ``apply_verify`` and the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_surgery.cli import (
    apply_verify,
    benchmark,
    difference,
    exits,
    packs_doctor,
    run_report,
    scan_plan_explain,
    tune,
)
from moe_surgery.cli.command import Group, command
from moe_surgery.cli.guard import run
from moe_surgery.cli.options import (
    Batch,
    BenchTokens,
    Choice,
    DType,
    Generate,
    Html,
    Loading,
    Model,
    ModelOrPlan,
    NewTokens,
    OnFailure,
    Output,
    Packs,
    Place,
    Prompt,
    Proof,
    Prove,
    RunFolder,
    Save,
    Svg,
    Trust,
    TuneTokens,
    Words,
)
from moe_surgery.cli.packs_commands import packs

app = typer.Typer(
    name="moe-surgery",
    cls=Group,
    help="Replace the sparse-MoE blocks of a model with fused ones, and prove that each computes the same.",
    epilog=exits.epilog(),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(packs, name="packs")


def _version(wanted: bool) -> None:
    if wanted:
        from moe_surgery import __version__

        typer.echo(f"moe-surgery {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@command(app, "scan")
def scan(model: Model, trust: Trust, output: Output) -> None:
    """List every site in MODEL that looks like an MoE block, and what is known of it. Needs no weights."""
    run(output, lambda screen: scan_plan_explain.scan(screen, model, trust))


@command(app, "plan")
def plan(
    model: Model,
    choice: Choice,
    place: Place,
    trust: Trust,
    output: Output,
    save: Save = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 10 if the plan would change anything.")] = False,
    svg: Svg = None,
    html: Html = None,
) -> None:
    """Say what apply would do to MODEL, and why. Needs no weights, changes nothing."""
    run(
        output,
        lambda screen: scan_plan_explain.plan(
            screen, model, choice, place, trust, save=save, check=check, svg=svg, html=html
        ),
    )


@command(app, "explain")
def explain(
    model: Model,
    site: Annotated[str, typer.Argument(metavar="SITE", help="A site's path, as scan lists it.", show_default=False)],
    trust: Trust,
    output: Output,
    pack: Packs = None,
    rule: Annotated[str | None, typer.Option("--rule", metavar="R", help="Only this rule.", show_default=False)] = None,
) -> None:
    """Say how SITE was read, and which clause of which rule holds or fails there. Needs no weights."""
    run(output, lambda screen: scan_plan_explain.explain(screen, model, site, trust, packs=pack, rule=rule))


@command(app, "apply")
def apply(
    model: ModelOrPlan,
    choice: Choice,
    loading: Loading,
    proof: Proof,
    trust: Trust,
    output: Output,
    generate: Generate = None,
    prompt: Prompt = None,
    new_tokens: NewTokens = 16,
    no_undo: Annotated[
        bool, typer.Option("--no-undo", help="Drop each original once it is replaced: less memory, no undo, no timing.")
    ] = False,
    no_model_check: Annotated[
        bool, typer.Option("--no-model-check", help="Don't run the whole model on a few tokens, before and after.")
    ] = False,
    svg: Svg = None,
    html: Html = None,
) -> None:
    """Load MODEL, replace its MoE blocks, prove each, and report: a rehearsal, of which nothing is kept."""
    job = apply_verify.Job(
        model,
        choice,
        loading,
        proof,
        trust,
        generate=generate,
        prompt=prompt,
        new_tokens=new_tokens,
        undoable=not no_undo,
        model_check=not no_model_check,
        svg=svg,
        html=html,
    )
    run(output, lambda screen: apply_verify.apply(screen, job))


@command(app, "verify")
def verify(
    model: ModelOrPlan,
    choice: Choice,
    loading: Loading,
    proof: Proof,
    trust: Trust,
    output: Output,
    svg: Svg = None,
    html: Html = None,
) -> None:
    """Run only the proof: load MODEL, build each block, compare it, and throw it away again."""
    job = apply_verify.Job(model, choice, loading, proof, trust, svg=svg, html=html)
    run(output, lambda screen: apply_verify.verify(screen, job))


@command(app, "bench")
def bench(
    model: ModelOrPlan,
    choice: Choice,
    loading: Loading,
    proof: Proof,
    trust: Trust,
    output: Output,
    tokens: BenchTokens = None,
    batch: Batch = None,
    engine: Annotated[
        bool, typer.Option("--engine", help="Time the steps of a vLLM engine instead, with surgery and without.")
    ] = False,
    eager: Annotated[bool, typer.Option("--eager", help="With --engine: no compilation and no graphs.")] = False,
    svg: Svg = None,
    html: Html = None,
) -> None:
    """Time the steps of MODEL and each kind of its MoE blocks, old against new; then put the model back."""
    job = apply_verify.Job(model, choice, loading, proof, trust, svg=svg, html=html)
    times = benchmark.Times(tuple(tokens or (1, 8, 64, 512)), tuple(batch or (1, 8)))
    if engine:
        run(output, lambda screen: benchmark.bench_engine(screen, job, times, eager=eager))
    else:
        run(output, lambda screen: benchmark.bench(screen, job, times, eager=eager))


@command(app, "run", context_settings={"allow_interspersed_args": False})
def run_command(
    words: Words,
    output: Output,
    pack: Packs = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="PLAN.JSON", help="A saved plan that models must fit.", show_default=False),
    ] = None,
    prove: Annotated[Prove, typer.Option("--prove", help="How many of an engine's blocks to prove.")] = Prove.sample,
    on_failure: Annotated[
        OnFailure, typer.Option("--on-failure", help="Stop, or keep the model as it was and say so.")
    ] = OnFailure.stop,
    html: Html = None,
    target: Annotated[
        str, typer.Option("--target", metavar="NAME", help="What to build; engines take auto, folded and vllm.")
    ] = "auto",
    folder: RunFolder = None,
) -> None:
    """Start COMMAND, operate on every model that its processes load or build, and report on stderr."""
    packs = tuple(pack) if pack else None
    job = run_report.Launch(tuple(words), packs, plan, prove.value, on_failure.value, target, folder, html=html)
    run(output, lambda screen: run_report.launch(screen, job), shared=True)


@command(app, "audit", context_settings={"allow_interspersed_args": False})
def audit_command(
    words: Words,
    output: Output,
    on_failure: Annotated[
        OnFailure, typer.Option("--on-failure", help="Stop where a layer is wrong, or keep going and say so.")
    ] = OnFailure.stop,
    html: Html = None,
    folder: RunFolder = None,
) -> None:
    """Start COMMAND and check every MoE layer that its engines build against the checkpoint; replace nothing."""
    job = run_report.Launch(tuple(words), None, None, "sample", on_failure.value, "auto", folder, True, html)
    run(output, lambda screen: run_report.launch(screen, job), shared=True)


@command(app, "report")
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder that a run's receipts went to.", show_default=False)
    ],
    output: Output,
    html: Html = None,
) -> None:
    """Say what each process of a run did, and fail if they disagree."""
    run(output, lambda screen: run_report.report(screen, folder, html))


@command(app, "diff")
def diff(
    old: Annotated[
        Path, typer.Argument(metavar="A", help="A plan or result as JSON, or a run's folder.", show_default=False)
    ],
    new: Annotated[Path, typer.Argument(metavar="B", help="Another of the kind.", show_default=False)],
    output: Output,
) -> None:
    """Show which sites differ between two plans, reports or runs, and how; exit with 10 if any does.

    Margins count as different if a factor of 2 or more lies between them, speeds if more than their spreads.
    """
    run(output, lambda screen: difference.diff(screen, old, new))


@command(app, "tune")
def tune_command(
    model: Model,
    trust: Trust,
    output: Output,
    tokens: TuneTokens = None,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=1, help="How long to look, for each shape.")
    ] = 300.0,
    ranks: Annotated[
        int,
        typer.Option("--tensor-parallel", metavar="N", min=1, help="Tune for the share that each of N ranks holds."),
    ] = 1,
    dtype: Annotated[DType, typer.Option("--dtype", help="Tune for weights in this dtype.")] = DType.auto,
    e4m3: Annotated[
        bool, typer.Option("--e4m3", help="Tune for experts in FP8 with a scale for each block, as engines fold them.")
    ] = False,
) -> None:
    """Find the fastest tile sizes for MODEL's blocks on this machine's GPU; they are used from then on.

    Needs no weights. Tables are kept in the user's cache folder, one for each shape and GPU.
    """
    kept = None if dtype is DType.auto else dtype.value
    job = tune.Job(model, tuple(tokens or ()), seconds, ranks, kept, e4m3)
    run(output, lambda screen: tune.tune(screen, job, trust))


@command(app, "doctor")
def doctor(output: Output) -> None:
    """Say whether this installation can operate, and what to do if it can't."""
    run(output, packs_doctor.doctor)
