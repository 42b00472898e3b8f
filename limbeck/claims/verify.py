"""Run a claim: train every arm on every seed, compare, and write the verdict down.

Every trained arm is recorded as soon as it is done, under a key made of the claim's and the method's source code and the
data, so that a check that was killed goes on where it was and a changed method is measured anew.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import limbeck
from limbeck import catalogue
from limbeck.claims import load_claim, module_of
from limbeck.claims.base import MINUS, TUNING_SEEDS, Claim, Outcome
from limbeck.claims.statistics import overall, paired_difference
from limbeck.core.errors import InputError
from limbeck.core.files import explained, write_json
from limbeck.tasks.base import cache_folder

Job = tuple[str, int, int]  # arm, number of the candidate, seed


def verify(
    name: str,
    *,
    seeds: int | None = None,
    data_root: str | None = None,
    out: Path | None = None,
    fresh: bool = False,
    workers: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure a method's claim.

    Args:
        name: the method.
        seeds: how many; the claim's own number if None. Fewer than three give no verdict but ``undecided``.
        data_root: folder with data sets; bundled data where it is None or lacks what the claim wants.
        out: folder for ``NAME.json``; None writes nothing.
        fresh: measure again what was measured before.
        workers: processes that train side by side.
        quiet: print no progress.

    Returns:
        the scoreboard entry.

    Raises:
        UnknownNameError, InputError: no such method, no claim, or fewer than one seed.
    """
    card = catalogue.get(name)
    claim = load_claim(card.name, data_root)
    count = claim.seeds if seeds is None else seeds
    if count < 1:
        raise InputError(f"--seeds must be at least 1 (got {count})")
    began = time.monotonic()
    ledger = _Ledger(card.name, claim, fresh)
    tuning: list[Job] = [
        (arm, number, seed)
        for arm, spec in claim.arms.items()
        if len(spec.candidates) > 1
        for number in range(len(spec.candidates))
        for seed in TUNING_SEEDS
    ]
    ledger.measure(claim, tuning, data_root, workers, quiet)
    chosen = {arm: _choose(claim, ledger, arm) for arm in claim.arms}
    ledger.measure(claim, [(a, chosen[a], s) for s in range(count) for a in claim.arms], data_root, workers, quiet)

    arms = {}
    for arm, spec in claim.arms.items():
        outcomes = [ledger.known[(arm, chosen[arm], seed)] for seed in range(count)]
        arms[arm] = {
            "role": spec.role,
            "description": spec.description,
            "settings": dict(spec.candidates[chosen[arm]]),
            "candidates": len(spec.candidates),
            "metrics": {m: [o.test[m] for o in outcomes] for m in outcomes[0].test},
        }
    checks = [_check(claim, arms, number) for number in range(len(claim.checks))]
    headline = [c for c in checks if c["headline"]]
    first = headline[0]
    result: dict[str, Any] = {
        "name": card.name,
        "title": card.title,
        "claim": card.claim,
        "verdict": overall([c["verdict"] for c in headline]) if count >= 3 else "undecided",
        "metric": first["metric"],
        "higher_is_better": first["higher_is_better"],
        "arms": arms,
        "difference": {
            k: first[k] for k in ("method", "baseline", "metric", "per_seed", "mean", "low", "high", "margin")
        },
        "checks": checks,
        "seeds": list(range(count)),
        "data": dict(claim.data),
        "settings": dict(claim.settings),
        "tuning_seeds": list(TUNING_SEEDS) if tuning else [],
        "seconds": round(ledger.seconds([(a, chosen[a], s) for s in range(count) for a in claim.arms] + tuning), 1),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "limbeck": limbeck.__version__,
    }
    result["note"] = claim.note if isinstance(claim.note, str) else claim.note(result)
    if count < 3:
        result["note"] = f"Only {count} seed(s): no verdict. {result['note']}"
    if out is not None:
        write_json(Path(out) / f"{card.name}.json", result)
    if not quiet:
        print(f"{card.name}: measured in {time.monotonic() - began:.0f} s")
    return result


def _choose(claim: Claim, ledger: _Ledger, arm: str) -> int:
    """The candidate with the best mean validation measure on the tuning seeds."""
    candidates = claim.arms[arm].candidates
    if len(candidates) == 1:
        return 0
    sign, metric = (-1, claim.select[1:]) if claim.select.startswith("-") else (1, claim.select)
    scores = [sign * sum(ledger.known[(arm, n, s)].val[metric] for s in TUNING_SEEDS) for n in range(len(candidates))]
    return max(range(len(candidates)), key=scores.__getitem__)


def _per_seed(arms: Mapping[str, Any], name: str, metric: str) -> list[float]:
    """An arm's values, or for ``A - B`` the differences of two arms on the same seeds."""
    values: list[float]
    values, *others = (arms[arm]["metrics"][metric] for arm in name.split(MINUS))
    for other in others:
        values = [a - b for a, b in zip(values, other, strict=True)]
    return values


def _check(claim: Claim, arms: Mapping[str, Any], number: int) -> dict[str, Any]:
    check = claim.checks[number]
    difference = paired_difference(
        _per_seed(arms, check.method, check.metric),
        _per_seed(arms, check.baseline, check.metric),
        higher_is_better=check.higher_is_better,
    )
    return {
        "statement": check.statement,
        "method": check.method,
        "baseline": check.baseline,
        "metric": check.metric,
        "higher_is_better": check.higher_is_better,
        "per_seed": difference.per_seed,
        "mean": difference.mean,
        "low": difference.low,
        "high": difference.high,
        "margin": check.margin,
        "verdict": difference.verdict(check.margin),
        "headline": check.headline,
    }


class _Ledger:
    """What has been measured so far, on disk."""

    def __init__(self, name: str, claim: Claim, fresh: bool) -> None:
        self.name = name
        self.path = cache_folder() / "claims" / f"{name}-{source_key(name, claim)}.jsonl"
        self.known: dict[Job, Outcome] = {}
        self._seconds: dict[Job, float] = {}
        if self.path.exists():
            if fresh:
                self.path.unlink()
            else:
                self._read()

    def _read(self) -> None:
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that was being written when the process was killed
            job = (entry["arm"], entry["candidate"], entry["seed"])
            self.known[job] = Outcome(entry["val"], entry["test"])
            self._seconds[job] = entry["seconds"]

    def seconds(self, jobs: Sequence[Job]) -> float:
        return sum(self._seconds[job] for job in dict.fromkeys(jobs))

    def measure(self, claim: Claim, jobs: Sequence[Job], data_root: str | None, workers: int, quiet: bool) -> None:
        from joblib import Parallel, delayed

        missing = [job for job in dict.fromkeys(jobs) if job not in self.known]
        if not missing:
            return
        began = time.monotonic()
        parallel = Parallel(n_jobs=min(workers, len(missing)), return_as="generator_unordered")
        work = (delayed(_one)(self.name, data_root, job, workers > 1) for job in missing)
        for number, (job, outcome, seconds) in enumerate(parallel(work), 1):
            self._keep(job, outcome, seconds)
            if not quiet:
                left = (time.monotonic() - began) / number * (len(missing) - number)
                print(
                    f"  {number}/{len(missing)} {job[0]} seed {job[2]}: {_short(outcome.test)}, about {left:.0f} s left",
                    flush=True,
                )

    def _keep(self, job: Job, outcome: Outcome, seconds: float) -> None:
        self.known[job], self._seconds[job] = outcome, seconds
        entry = {
            "arm": job[0],
            "candidate": job[1],
            "seed": job[2],
            "val": dict(outcome.val),
            "test": dict(outcome.test),
        }
        with explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps({**entry, "seconds": round(seconds, 2)}) + "\n")


def _one(name: str, data_root: str | None, job: Job, alone: bool) -> tuple[Job, Outcome, float]:
    """Train one arm; in a worker process the claim is built anew, since functions do not travel."""
    import torch

    if alone:
        torch.set_num_threads(1)
    claim = load_claim(name, data_root)
    arm, number, seed = job
    began = time.monotonic()
    spec = claim.arms[arm]
    outcome = spec.train(spec.candidates[number], seed)
    return job, outcome, time.monotonic() - began


def source_key(name: str, claim: Claim) -> str:
    """A hash of what a measurement depends on: the claim's module, the method's and its bases' modules, the data."""
    digest = hashlib.sha256(json.dumps(dict(claim.data), sort_keys=True, default=str).encode())
    card = catalogue.get(name)
    own = dict.fromkeys(target.partition(":")[0] for target in card.classes().values())
    own |= dict.fromkeys(c.__module__ for c in card.load().__mro__ if c.__module__.startswith("limbeck.methods."))
    family = card.family
    beside = [  # modules of the family that the claim imports: grounds and arms shared by several claims
        value.__name__
        for value in vars(importlib.import_module(module_of(name))).values()
        if inspect.ismodule(value) and value.__name__.startswith(f"limbeck.claims.{family}.")
    ]
    for module in (module_of(name), *own, *beside, "limbeck.tasks.teachers"):
        digest.update(inspect.getsource(importlib.import_module(module)).encode())
    return digest.hexdigest()[:12]


def commit() -> str:
    """The commit of the checkout that the code runs from, with ``+`` if it was changed since; else ``installed``."""
    root = Path(__file__).parents[2]
    try:
        head = subprocess.run(
            ["git", "-C", root, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "-C", root, "status", "--porcelain", "--", "limbeck"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "installed"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _short(measures: Mapping[str, float]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in list(measures.items())[:3])
