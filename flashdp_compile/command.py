"""The `flashdp` command.

flashdp epsilon --noise-multiplier 1.0 --sample-rate 0.01 --steps 1000 --delta 1e-5
flashdp noise --target-epsilon 8 --sample-rate 0.01 --steps 1000 --delta 1e-5 --json
flashdp noise --target-epsilon 8 --sample-rate 0.01 --steps 1000 --delta 1e-5 --norm hutchinson --probes 64
flashdp explain train.py --epochs 3
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from flashdp_compile import accounting
from flashdp_compile.checks import PROBES
from flashdp_compile.errors import OptionError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 2 for arguments that cannot be, as argparse has it, 3 for a model that is refused."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        found = given.run(given)
    except OptionError as error:
        parser.exit(2, f"flashdp {given.command}: {error}\n")
    if given.command == "explain":
        return _print_explanation(found[0], found[1], given.json)
    if given.json:
        print(json.dumps(found))
        return 0
    table = Table(show_header=False)
    for name, value in found.items():
        table.add_row(name.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else str(value))
    Console(file=sys.stdout).print(table)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flashdp", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    epsilon = commands.add_parser("epsilon", help="what a run reveals")
    epsilon.add_argument("--noise-multiplier", type=float, required=True)
    epsilon.set_defaults(run=_epsilon)
    noise = commands.add_parser("noise", help="the noise multiplier that keeps a run within an epsilon")
    noise.add_argument("--target-epsilon", type=float, required=True)
    noise.set_defaults(run=_noise)
    probes = commands.add_parser("probes", help="the same for norms that are estimated, by their number of probes")
    probes.add_argument("--target-epsilon", type=float, required=True)
    probes.set_defaults(run=_probes)
    explain = commands.add_parser("explain", help="what flashdp makes of the first model that a script compiles")
    explain.add_argument("--json", action="store_true", help="for programs")
    explain.add_argument("script", help="run until then; what it prints goes to stderr")
    explain.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    explain.set_defaults(run=_explain)
    for command in (epsilon, noise, probes):
        command.add_argument("--steps", type=int, required=True, help="optimizer steps, each of which is one release")
        command.add_argument("--delta", type=float, required=True)
        command.add_argument(
            "--accountant", choices=accounting.ACCOUNTANTS, help="the tightest that knows the sampling"
        )
        command.add_argument("--json", action="store_true", help="for programs")
        how = command.add_argument_group(
            "how samples are drawn: one of --sample-rate and --steps-per-epoch, or the rest"
        )
        how.add_argument("--sample-rate", type=float, help="Poisson sampling: the probability of taking part in a step")
        how.add_argument("--steps-per-epoch", type=int, help="passes over the data in batches of a fixed size")
        how.add_argument("--sample-size", type=int, help="number of samples")
        how.add_argument("--cap", type=int, help="Poisson sampling of which a step keeps at most so many")
        how.add_argument("--batch-size", type=int, help="so many of --sample-size, drawn anew in every step")
        norms = command.add_argument_group("how norms are found, by which samples are clipped")
        norms.add_argument("--norm", choices=accounting.NORMS, default="exact", help="all but exact are estimates")
        norms.add_argument("--probes", type=int, help="Gaussian probes of an estimate")
        norms.add_argument("--groups", type=int, help="clipping groups of equal bounds, each with its own probes")
        norms.add_argument("--bound", choices=accounting.BOUNDS, default="convex", help="how their risk is bounded")
    return parser


def _sampling(given: argparse.Namespace) -> accounting.Sampling:
    if given.steps_per_epoch is not None:
        _alone(given, "steps_per_epoch")
        return accounting.Fixed(given.steps_per_epoch)
    if given.batch_size is not None:
        _alone(given, "batch_size", "sample_size")
        return accounting.WithoutReplacement(given.batch_size, given.sample_size)
    if given.cap is not None:
        _alone(given, "cap", "sample_rate", "sample_size")
        return accounting.TruncatedPoisson(given.sample_rate, given.cap, given.sample_size)
    if given.sample_rate is None:
        raise OptionError(
            "how are samples drawn? Give --sample-rate, --steps-per-epoch, or --batch-size of --sample-size"
        )
    return accounting.Poisson(given.sample_rate, given.sample_size)


def _alone(given: argparse.Namespace, *names: str) -> None:
    known = ("sample_rate", "steps_per_epoch", "sample_size", "cap", "batch_size")
    others = [f"--{name.replace('_', '-')}" for name in known if name not in names and getattr(given, name) is not None]
    if others:
        raise OptionError(f"--{names[0].replace('_', '-')} and {', '.join(others)} contradict each other")


def _explain(given: argparse.Namespace) -> Any:
    from flashdp_compile.script import explain_script  # late: it loads the compiler

    return explain_script(given.script, given.arguments)


def _print_explanation(label: str, explanation: Any, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"region": label, **explanation.as_dict()}))
    else:
        console = Console(file=sys.stdout)
        console.rule(label)
        console.print(str(explanation), markup=False, highlight=True, soft_wrap=True)
    return 3 if explanation.refusal is not None else 0


def _epsilon(given: argparse.Namespace) -> dict[str, Any]:
    run = _run(given)
    found = accounting.epsilon(noise_multiplier=given.noise_multiplier, **run)
    return {"epsilon": found, "noise_multiplier": given.noise_multiplier, **_shown(run)}


def _noise(given: argparse.Namespace) -> dict[str, Any]:
    run = _run(given)
    found = accounting.noise_multiplier(target_epsilon=given.target_epsilon, **run)
    return {"noise_multiplier": found, "target_epsilon": given.target_epsilon, **_shown(run)}


def _probes(given: argparse.Namespace) -> dict[str, Any]:
    """How much more noise than exact norms each number of probes asks for."""
    if given.probes is not None:
        raise OptionError("--probes is what this command tries: leave it out")
    run = _run(given) | {"target_epsilon": given.target_epsilon}
    run["norm"] = "hutchinson" if given.norm == "exact" else given.norm
    exact = accounting.noise_multiplier(**{**run, "norm": "exact", "groups": None})
    found: dict[str, Any] = {"exact_norms": exact}
    for count in PROBES:
        found[f"{count}_probes"] = sigma = accounting.noise_multiplier(**{**run, "probes": count})
        found[f"{count}_probes_over_exact"] = sigma / exact
    return {**found, "target_epsilon": given.target_epsilon, **_shown(run)}


def _run(given: argparse.Namespace) -> dict[str, Any]:
    """What both functions are told."""
    sampling = _sampling(given)
    accountant = given.accountant or sampling.accountants[0]
    run = {"steps": given.steps, "delta": given.delta, "sampling": sampling, "accountant": accountant}
    return {**run, "norm": given.norm, "probes": given.probes, "groups": given.groups, "bound": given.bound}


def _shown(run: dict[str, Any]) -> dict[str, Any]:
    sampling = run["sampling"]
    of_estimates = ("probes", "groups", "bound") if run["norm"] == "exact" else ()
    shown = {name: value for name, value in run.items() if name not in of_estimates and value is not None}
    return {**shown, "sampling": str(sampling), "adjacency": sampling.adjacency}


if __name__ == "__main__":
    sys.exit(main())
