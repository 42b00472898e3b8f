"""The command line: parse, call, print. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from limbeck import __version__
from limbeck.core.errors import InputError, Interrupted, LimbeckError, UnknownNameError

USER_MISTAKE, STOPPED = 2, 130

_OVERVIEW = """\
limbeck distils: big models into small ones, data sets into a handful of samples, samplers of many steps into one, and in time
everything else.

  limbeck demo                     see it work on real digits, in about two minutes
  limbeck methods                  what there is
  limbeck show NAME                one method: what it does, needs and claims
  limbeck run NAME                 run a method (limbeck run NAME --help lists its settings)
  limbeck resume DIR               continue a run that was stopped
  limbeck report DIR               write a run's report as one HTML file
  limbeck compare A B …            methods on equal ground, over seeds
  limbeck verify NAME | --all      re-check a method's claim by experiment
  limbeck scoreboard               the page of all verdicts
  limbeck export DIR --to onnx     the result in a format other programs load
  limbeck taps MODEL               the layers of a network that can be tapped
"""


class _Parser(argparse.ArgumentParser):
    """argparse that reports mistakes as our errors, in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see: {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for a user's mistake, 130 when stopped by Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    warnings.showwarning = _show_warning
    try:
        return _dispatch(arguments)
    except Interrupted as stop:
        print(f"\nlimbeck: {stop}", file=sys.stderr)
        return STOPPED
    except LimbeckError as error:
        print(f"limbeck: {error}", file=sys.stderr)
        return USER_MISTAKE
    except KeyboardInterrupt:
        print("\nlimbeck: stopped; what had been saved before stays", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
    if issubclass(category, UserWarning) and "limbeck" in filename:
        print(f"warning: {message}", file=sys.stderr)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_OVERVIEW, end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"limbeck {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in _COMMANDS:
        raise UnknownNameError("command", command, _COMMANDS, hint="See: limbeck --help")
    try:
        return _COMMANDS[command](rest) or 0
    except SystemExit as leaving:  # argparse ends --help this way
        return int(leaving.code or 0)


# ---- looking around ------------------------------------------------------------------------------------------------------


def _methods(arguments: list[str]) -> int:
    parser = _Parser("limbeck methods", description="List the methods.")
    parser.add_argument("--family", help="only this family")
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(arguments)
    from limbeck import catalogue

    cards = list(catalogue.cards().values() if options.family is None else catalogue.of_family(options.family))
    if options.json:
        print(json.dumps([card.as_dict() for card in cards], indent=1, ensure_ascii=False))
        return 0
    width = max(len(card.name) for card in cards)
    for family, meaning in catalogue.FAMILIES.items():
        members = [card for card in cards if card.family == family]
        if members:
            print(f"{family}: {meaning}")
            for card in members:
                print(f"  {card.name:{width}}  {card.summary}{' [baseline]' if card.baseline else ''}")
    return 0


def _show(arguments: list[str]) -> int:
    parser = _Parser("limbeck show", description="Show one method's card.")
    parser.add_argument("name")
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(arguments)
    from limbeck import catalogue

    card = catalogue.get(options.name)
    if options.json:
        print(json.dumps(card.as_dict(), indent=1, ensure_ascii=False))
        return 0
    print(f"{card.name}: {card.title}{' [baseline]' if card.baseline else ''}")
    for label, text in (
        ("paper", f"{card.paper} ({card.year})"),
        ("family", card.family),
        ("does", card.summary),
        ("needs", card.needs),
        ("gives", card.gives),
        ("claim", card.claim),
        ("run", f"limbeck run {card.name}"),
        ("import", f"from {card.implementation.replace(':', ' import ')}"),
        *(("also", f"from {target.replace(':', ' import ')}") for target in card.also),
    ):
        print(f"  {label:7} {text}")
    return 0


def _taps(arguments: list[str]) -> int:
    parser = _Parser("limbeck taps", description="List the layers of a network that can be tapped, with their shapes.")
    parser.add_argument(
        "model", help="a network's name (cnn-w16-s3), package.module:factory, or a folder with an artifact"
    )
    parser.add_argument("--input", default="1,8,8", help="input shape without the batch (default: 1,8,8)")
    parser.add_argument("--classes", type=int, default=10, help="number of classes (default: 10)")
    options = parser.parse_args(arguments)
    try:
        c, h, w = (int(n) for n in options.input.split(","))
    except ValueError:
        raise InputError(f"--input must be three integers like 3,32,32 (got '{options.input}')") from None
    import torch

    from limbeck import networks
    from limbeck.blocks.taps import format_taps, list_taps
    from limbeck.core.artifacts import load

    if Path(options.model).is_dir():
        artifact = load(options.model)
        model = artifact.content
        shape = (artifact.description.get("network") or {}).get("in_shape", [c, h, w])
    else:
        model, shape = networks.build(options.model, in_shape=(c, h, w), num_classes=options.classes), [c, h, w]
    print(format_taps(list_taps(model, torch.zeros(2, *shape))))
    return 0


# ---- running -------------------------------------------------------------------------------------------------------------


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        _Parser("limbeck run", usage="limbeck run NAME [settings]", description="Run a method.").parse_args(
            [a for a in arguments if a in ("-h", "--help")]
        )
        raise InputError("name a method: limbeck run NAME (see: limbeck methods)")
    from limbeck import catalogue

    card = catalogue.get(arguments[0])
    from limbeck.core.engine import EngineConfig

    cls: Any = card.load()
    parser = _Parser(f"limbeck run {card.name}", description=card.summary, formatter_class=argparse.HelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/NAME-TASK-N)")
    parser.add_argument("--preset", default="small", metavar="P", help="small (default) or paper")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="fixes every random choice (default: 0)")
    parser.add_argument("--no-report", action="store_true", help="write no HTML report at the end")
    groups = {"what to run on": cls.Setup, "settings of the method": cls.Config, "execution": EngineConfig}
    from limbeck.flags import add_flags, given, parse_strictly

    for title, model in groups.items():
        add_flags(parser, title, model, cls.Config.presets.get("paper", {}) if model is cls.Config else {})
    options = parse_strictly(parser, arguments[1:])
    from limbeck.core.config import validate
    from limbeck.fitting import fit, split_settings

    settings = {**given(options, cls.Setup), **given(options, cls.Config)}
    split_settings(cls, options.preset, settings, flags=True)  # complains in terms of flags, before anything is loaded
    engine = validate(EngineConfig, given(options, EngineConfig), flags=True)
    out = options.out or _free_folder(card.name, settings.get("data") or settings.get("task") or _default_task(cls))
    run = fit(card.name, out=out, preset=options.preset, seed=options.seed, engine=engine, **settings)
    return _finish(run, not options.no_report)


def _default_task(cls: Any) -> str:
    return str(cls.Setup.model_fields["task"].default) if "task" in cls.Setup.model_fields else "default"


def _free_folder(name: str, task: str) -> Path:
    stem = f"{name}-{Path(task).name}"
    number = 1
    while (Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return Path("runs") / f"{stem}-{number}"


def _finish(run: Any, report: bool) -> int:
    from limbeck.report.tables import result_table

    print(result_table(run.result))
    if run.path is not None:
        print(f"run: {run.path}")
        if report:
            from limbeck.report.run import write_run_report

            print(f"report: {write_run_report(run.path)}")
    return 0


def _resume(arguments: list[str]) -> int:
    parser = _Parser("limbeck resume", description="Continue a run that was stopped.")
    parser.add_argument("dir", type=Path)
    parser.add_argument("--no-report", action="store_true", help="write no HTML report at the end")
    options = parser.parse_args(arguments)
    from limbeck.fitting import resume

    return _finish(resume(options.dir), not options.no_report)


def _report(arguments: list[str]) -> int:
    parser = _Parser("limbeck report", description="Write a run's report as one HTML file that opens offline.")
    parser.add_argument("dir", type=Path)
    parser.add_argument("--out", type=Path, help="where to (default: DIR/report.html)")
    options = parser.parse_args(arguments)
    from limbeck.report.run import write_run_report

    print(write_run_report(options.dir, options.out))
    return 0


def _export(arguments: list[str]) -> int:
    parser = _Parser("limbeck export", description="Export a run's student.")
    parser.add_argument("dir", type=Path, help="a run's folder, or an artifact's")
    parser.add_argument("--to", required=True, choices=("onnx", "onnx-int8", "safetensors"), help="format")
    parser.add_argument(
        "--out", type=Path, help="file to write (default: DIR/student.onnx, -int8.onnx or .safetensors)"
    )
    options = parser.parse_args(arguments)
    from limbeck.adapters.export import export_artifact

    samples = None
    if options.to == "onnx-int8":  # activations need their usual range
        from limbeck.tasks.calibration import calibration_inputs

        samples = calibration_inputs(options.dir)
    print(export_artifact(options.dir, options.to, options.out, samples))
    return 0


# ---- comparing -----------------------------------------------------------------------------------------------------------


def _compare(arguments: list[str]) -> int:
    parser = _Parser("limbeck compare", description="Methods on equal ground: same data, networks, updates and seeds.")
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--steps", type=int, help="updates for every method (default: the first method's own number)")
    parser.add_argument("--metric", help="measure to compare (default: accuracy; of samplers a Fréchet distance)")
    parser.add_argument("--out", type=Path, help="folder (default: runs/compare-TASK-N)")
    options, unknown = parser.parse_known_args(arguments)
    from limbeck.claims.compare import compare, comparison_setup
    from limbeck.report.compare import write_comparison
    from limbeck.report.tables import comparison_table

    setup = comparison_setup(options.names, unknown)
    out = options.out or _free_folder("compare", setup.get("data") or setup.get("task") or "digits")
    found = compare(options.names, setup, seeds=options.seeds, steps=options.steps, metric=options.metric, out=out)
    print(comparison_table(found))
    print(f"report: {write_comparison(found, out)}")
    return 0


def _verify(arguments: list[str]) -> int:
    parser = _Parser("limbeck verify", description="Re-check a method's claim by experiment.")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true", help="every method that has a claim")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: the claim's own, at least 3)")
    parser.add_argument(
        "--data-root", help="folder with mnist/, cifar10/ … (default: $LIMBECK_DATA; else bundled data)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("scoreboard"), help="folder for NAME.json (default: scoreboard)"
    )
    parser.add_argument("--workers", type=int, default=1, help="trainings side by side, one thread each (default: 1)")
    parser.add_argument("--fresh", action="store_true", help="do not reuse arms that were measured before")
    options = parser.parse_args(arguments)
    from limbeck.claims import claim_names
    from limbeck.claims.verify import verify
    from limbeck.report.tables import verdict_table

    if options.all == bool(options.names):
        raise InputError("name the methods to verify, or give --all")
    for name in claim_names() if options.all else options.names:
        result = verify(
            name,
            seeds=options.seeds,
            data_root=options.data_root,
            out=options.out,
            fresh=options.fresh,
            workers=options.workers,
        )
        print(verdict_table(result))
    return 0


def _scoreboard(arguments: list[str]) -> int:
    parser = _Parser("limbeck scoreboard", description="Write the page of all verdicts as one HTML file.")
    parser.add_argument(
        "--from", dest="folder", type=Path, default=Path("scoreboard"), help="folder with NAME.json files"
    )
    parser.add_argument("--out", type=Path, help="where to (default: FOLDER/index.html)")
    options = parser.parse_args(arguments)
    from limbeck.report.scoreboard import write_scoreboard

    print(write_scoreboard(options.folder, options.out))
    return 0


def _demo(arguments: list[str]) -> int:
    parser = _Parser("limbeck demo", description="Distil a network on real digits and show what came out.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder (default: runs/demo)")
    options = parser.parse_args(arguments)
    from limbeck.demo import demo

    return demo(options.out)


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "methods": _methods,
    "show": _show,
    "run": _run,
    "resume": _resume,
    "report": _report,
    "compare": _compare,
    "verify": _verify,
    "scoreboard": _scoreboard,
    "export": _export,
    "taps": _taps,
    "demo": _demo,
}
