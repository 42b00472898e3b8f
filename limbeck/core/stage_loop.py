"""One stage being run: steps, records, checkpoints, agreement between processes."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from limbeck.core.batch import Batch, Losses
from limbeck.core.checkpoint import CHECKPOINT, save_checkpoint
from limbeck.core.errors import Interrupted, TrainingDiverged
from limbeck.core.interrupts import InterruptGuard
from limbeck.core.method import Method
from limbeck.core.optim import Optimised
from limbeck.core.progress import StageProgress
from limbeck.core.seeding import random_state, restore_random_state
from limbeck.core.stage import Stage

if TYPE_CHECKING:
    from limbeck.core.engine import Engine


class StageLoop:
    """One stage being run: the optimisers, the position, the values not yet logged."""

    def __init__(self, engine: Engine, method: Method, stage: Stage, guard: InterruptGuard) -> None:
        self.engine, self.method, self.stage, self.guard = engine, method, stage, guard
        self.accelerator = engine.accelerator
        self.step = 0
        self.pending: list[dict[str, Tensor]] = []
        world = self.accelerator.num_processes
        self.stream = (
            stage.stream
            if world == 1 or stage.stream is None
            else stage.stream.shard(self.accelerator.process_index, world)
        )
        self.optimised: dict[str, Optimised] = {}
        self.check_each_step = self.accelerator.device.type == "cpu"
        self._plain = self.accelerator.scaler is None

    # ---- entering and leaving ---------------------------------------------------------------------------------------

    def enter(self, checkpoint: dict[str, Any] | None) -> None:
        stage, method = self.stage, self.method
        if stage.prepare is not None:
            stage.prepare()
        if checkpoint is None and stage.begin is not None:
            stage.begin()
        method.to(self.accelerator.device)
        if checkpoint is not None:
            method.load_training_state(checkpoint["method"])
        elif self.accelerator.num_processes > 1:
            self._broadcast(method)
        for name, made in stage.optimisers().items():
            optimizer = made.optimizer if self._plain else self.accelerator.prepare_optimizer(made.optimizer)
            self.optimised[name] = Optimised(optimizer, made.scheduler, made.clip)
        if checkpoint is None:
            return
        self.step = checkpoint["step"]
        for name, made in self.optimised.items():
            made.optimizer.load_state_dict(checkpoint["optimisers"][name])
            if made.scheduler is not None:
                made.scheduler.load_state_dict(checkpoint["schedulers"][name])
        for name, item in stage.state.items():
            item.load_state_dict(checkpoint["state"][name])
        if self.accelerator.scaler is not None and checkpoint["scaler"]:
            self.accelerator.scaler.load_state_dict(checkpoint["scaler"])
        self.pending = list(checkpoint["pending"])
        states = checkpoint["random"]
        restore_random_state(states[self.accelerator.process_index % len(states)])

    def run(self) -> None:
        stage, settings = self.stage, self.engine.settings
        began = last_saved = time.monotonic()
        if self.step >= stage.steps:  # resumed at a stage that had ended
            return
        label = f"{self.method.name or type(self.method).__name__} {stage.name}"
        show = settings.progress and self.accelerator.is_main_process
        self.method.train()
        if self.step == 0:
            self._save()  # so that a crash in the first seconds of a later stage does not repeat the earlier one
        with StageProgress(label, stage.steps, self.step, show) as progress:
            while self.step < stage.steps:
                values = self._one_step()
                self.step += 1
                if stage.after_step is not None:
                    stage.after_step(self.step)
                self.pending.append(values)
                if len(self.pending) >= settings.log_every or self.step == stage.steps:
                    self._flush()
                due = stage.evaluate_every and self.step % stage.evaluate_every == 0
                if stage.evaluate is not None and (due or self.step == stage.steps):
                    self._evaluate()
                if progress.due():
                    progress.update(self.step, f"loss {float(values['loss']):.4g}" if "loss" in values else "")
                now = time.monotonic()
                save, stop = self._wishes(now - last_saved >= settings.checkpoint_seconds, self.guard.requested)
                save |= settings.checkpoint_steps is not None and self.step % settings.checkpoint_steps == 0
                if self.step < stage.steps and (save or stop):
                    self._account(now - began)
                    began = last_saved = now
                    self._save()
                    if stop:
                        self._stop()
            progress.update(self.step)
        if stage.end is not None:
            stage.end()
        self._account(time.monotonic() - began)
        self._save()
        if self._wishes(False, self.guard.requested, force=True)[1]:
            self._stop()

    # ---- one step ---------------------------------------------------------------------------------------------------

    def _one_step(self) -> dict[str, Tensor]:
        stage = self.stage
        batch = None if self.stream is None else self.stream.batch(self.step)
        if batch is not None and self.accelerator.device.type != "cpu":
            batch = batch.to(self.accelerator.device)
        if stage.update is not None:
            with self.accelerator.autocast():
                values = {k: v.detach() for k, v in stage.update(batch, self).items()}
            self._check(values)
            return values
        assert batch is not None
        if stage.accumulate > 1:
            return self._accumulated_step(batch)
        assert stage.losses is not None
        with self.accelerator.autocast():
            losses = stage.losses(batch)
        total = losses.total
        values = {"loss": total.detach(), **{k: v.detach() for k, v in losses.terms.items()}, **losses.observed}
        self._check(values)
        self._zero()
        self.accelerator.backward(total)
        self._apply(self.optimised)
        return values

    def _accumulated_step(self, batch: Batch) -> dict[str, Tensor]:
        """Micro-batches whose terms weigh by the number of items that their means go over."""
        stage = self.stage
        assert stage.losses is not None
        parts = batch.chunks(stage.accumulate)
        counts = [self._counts(part) for part in parts]
        sums: dict[str, float] = {}
        for count in counts:
            for name, n in count.items():
                sums[name] = sums.get(name, 0.0) + n
        self._zero()
        merged: dict[str, Tensor] = {}
        for part, count in zip(parts, counts, strict=True):
            with self.accelerator.autocast():
                losses = stage.losses(part)
            share = {name: _share(count, sums, name) for name in losses.terms}
            total = losses.scaled(share).total
            values = {"loss": total.detach(), **{k: v.detach() * share[k] for k, v in losses.terms.items()}}
            size = len(part) / len(batch)
            values.update({k: v * size for k, v in losses.observed.items()})
            for name, value in values.items():
                merged[name] = merged[name] + value if name in merged else value
            self._check(values)
            self.accelerator.backward(total)
        self._apply(self.optimised)
        return merged

    def _counts(self, batch: Batch) -> dict[str, float]:
        if self.stage.normalisers is None:
            return {"": float(len(batch))}
        return {"": float(len(batch)), **self.stage.normalisers(batch)}

    def minimise(self, losses: Losses | Tensor, *names: str) -> None:
        """See :class:`limbeck.core.stage.Stepper`."""
        total = losses.total if isinstance(losses, Losses) else losses
        chosen = {n: self.optimised[n] for n in names} if names else self.optimised
        self._zero()
        if names:
            self.accelerator.backward(total, inputs=[p for o in chosen.values() for p in o.parameters()])
        else:
            self.accelerator.backward(total)
        self._apply(chosen)

    def _zero(self) -> None:
        for made in self.optimised.values():
            made.optimizer.zero_grad(set_to_none=True)

    def _apply(self, chosen: Mapping[str, Optimised]) -> None:
        if self.accelerator.num_processes > 1:
            self._average_gradients(chosen)
        for made in chosen.values():
            if made.clip is not None:
                if not self._plain:
                    self.accelerator.unscale_gradients(made.optimizer)
                torch.nn.utils.clip_grad_norm_(made.parameters(), made.clip)
            made.optimizer.step()
            if made.scheduler is not None:
                made.scheduler.step()

    def _average_gradients(self, chosen: Mapping[str, Optimised]) -> None:
        """One flat all-reduce; a parameter without a gradient here may have one elsewhere, so it counts as zero."""
        parameters = [p for made in chosen.values() for p in made.parameters()]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
        flat = self.accelerator.reduce(flat, reduction="mean")
        assert isinstance(flat, Tensor)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()

    # ---- checks and records -----------------------------------------------------------------------------------------

    def _check(self, values: Mapping[str, Tensor]) -> None:
        if self.check_each_step and not torch.isfinite(values.get("loss", _ZERO)):
            self._diverged(values, self.step)

    def _diverged(self, values: Mapping[str, Tensor], step: int) -> None:
        bad = [k for k, v in values.items() if k != "loss" and not bool(torch.isfinite(v).all())] or ["loss"]
        term = bad[0]
        kept = ""
        if self.engine.resumable:
            kept = f"; the last good checkpoint is kept in {self.engine.directory}"
        raise TrainingDiverged(
            f"loss term '{term}' became {float(values[term])} at step {step} of stage '{self.stage.name}'{kept}: "
            "lower the learning rate, clip gradients, or check the data"
        )

    def _flush(self) -> None:
        """Log the means of the values since the last line; one transfer from the device."""
        if not self.pending:
            return
        names = list(self.pending[-1])
        rows = [v for v in self.pending if list(v) == names]
        table = torch.stack([torch.stack([v[n].float().reshape(()) for n in names]) for v in rows])
        if self.accelerator.num_processes > 1:
            table = self.accelerator.reduce(table.to(self.accelerator.device), reduction="mean")
        if "loss" in names:
            column = names.index("loss")
            wrong = (~torch.isfinite(table[:, column])).nonzero()
            if len(wrong):
                at = int(wrong[0])
                self._diverged(rows[at], self.step - len(rows) + at)
        means = table.mean(0).tolist()
        row: dict[str, Any] = {"stage": self.stage.name, "step": self.step, "split": "train"}
        if self.stream is not None:
            row["epoch"] = round(self.stream.epoch(self.step), 4)
        row.update(zip(names, means, strict=True))
        for name, made in self.optimised.items():
            row["lr" if len(self.optimised) == 1 else f"lr_{name}"] = made.optimizer.param_groups[0]["lr"]
        self.pending = []
        self.engine.log(row)

    def _evaluate(self) -> None:
        assert self.stage.evaluate is not None
        was_training = self.method.training
        self.method.eval()
        with torch.no_grad():
            values = dict(self.stage.evaluate())
        self.method.train(was_training)
        self.engine.log({"stage": self.stage.name, "step": self.step, "split": "val", **values})

    def _account(self, seconds: float) -> None:
        cost = self.engine.cost
        entry = cost["stages"].setdefault(self.stage.name, {"seconds": 0.0, "steps": 0})
        entry["seconds"] += seconds
        entry["steps"] = self.step
        cost["seconds"] += seconds
        cost["peak_memory_bytes"] = max(cost["peak_memory_bytes"], peak_memory(self.accelerator.device))
        cost.update({k: int(v) for k, v in self.method.counters.items()})

    def _save(self) -> None:
        directory = self.engine.directory
        if directory is None:
            return
        randoms = [random_state()]
        if self.accelerator.num_processes > 1:
            randoms = gather_object(randoms)
        if not self.accelerator.is_main_process:
            self.accelerator.wait_for_everyone()
            return
        state = self.method.training_state()
        wrong = [k for k, v in state["tensors"].items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
        if wrong:
            raise TrainingDiverged(
                f"the weights '{wrong[0]}' hold NaN or infinity at step {self.step} of stage '{self.stage.name}'; "
                f"the last good checkpoint is kept in {directory}: lower the learning rate or clip gradients"
            )
        save_checkpoint(
            directory / CHECKPOINT,
            {
                "stage": self.stage.name,
                "step": self.step,
                "method": state,
                "optimisers": {n: o.optimizer.state_dict() for n, o in self.optimised.items()},
                "schedulers": {
                    n: _plain_state(o.scheduler) for n, o in self.optimised.items() if o.scheduler is not None
                },
                "state": {n: s.state_dict() for n, s in self.stage.state.items()},
                "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
                "random": randoms,
                "pending": self.pending,
                "metrics_offset": self.engine.records.offset,
                "cost": self.engine.cost,
            },
        )
        self.accelerator.wait_for_everyone()

    def _stop(self) -> None:
        where = self.engine.directory
        tail = (
            "nothing was saved: the run has no directory" if where is None else f"continue with: limbeck resume {where}"
        )
        raise Interrupted(f"stopped at step {self.step} of stage '{self.stage.name}'; {tail}")

    # ---- several processes ------------------------------------------------------------------------------------------

    def _wishes(self, save: bool, stop: bool, force: bool = False) -> tuple[bool, bool]:
        """Whether any process wants to save or to stop. Saving is collective, so all must agree; they ask now and then."""
        if self.accelerator.num_processes == 1:
            return save, stop
        if self.step % _VOTE_EVERY and not force:
            return False, False
        votes = torch.tensor([float(save), float(stop)], device=self.accelerator.device)
        votes = self.accelerator.reduce(votes, reduction="sum")
        return bool(votes[0]), bool(votes[1])

    def _broadcast(self, method: Method) -> None:
        for tensor in (*method.parameters(), *method.buffers()):
            torch.distributed.broadcast(tensor.data, src=0)


_ZERO = torch.zeros(())
_VOTE_EVERY = 10  # steps between votes where there are several processes


def _plain_state(scheduler: torch.optim.lr_scheduler.LRScheduler) -> dict[str, Any]:
    """A schedule's state without its functions, which a checkpoint cannot hold and the stage builds anew."""
    state = scheduler.state_dict()
    if "lr_lambdas" in state:
        state["lr_lambdas"] = [None] * len(state["lr_lambdas"])
    return state


def _share(count: Mapping[str, float], sums: Mapping[str, float], name: str) -> float:
    key = name if name in sums else ""
    return count.get(key, 0.0) / sums[key] if sums[key] else 0.0


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's peak resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
