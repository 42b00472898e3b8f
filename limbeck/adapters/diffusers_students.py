"""Students as pipelines of diffusers: a folder that samples without this library, and that this library reads back.

The folder has the pipeline's own layout (``model_index.json`` and a folder a part), a scheduler that fits the sampler, ``artifact.json`` with
the sampler's times and conventions, and a ``README.md`` whose code samples exactly as the sampler does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.adapters.diffusers_networks import DiffusersNetwork, SmallUNet
from limbeck.adapters.diffusers_pipelines import Teacher, load_teacher
from limbeck.adapters.diffusers_plans import Plan, plan_of
from limbeck.adapters.diffusers_readme import readme
from limbeck.blocks.lora import LoRA
from limbeck.core.artifacts import DESCRIPTION
from limbeck.core.errors import InputError, RunError
from limbeck.core.files import explained, write_json, write_text
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import make_schedule
from limbeck.diffusion.transforms import InSchedule

KIND = "diffusers-pipeline"


@dataclass
class Student:
    """A student read back.

    Attributes:
        sampler: the network with its conventions, times and rule.
        teacher: the pipeline's other parts (prompts, VAE) around the student's network.
        description: what ``artifact.json`` says.
    """

    sampler: Sampler
    teacher: Teacher
    description: dict[str, Any]


def save_student(
    folder: str | Path,
    teacher: Teacher,
    sampler: Sampler,
    description: Mapping[str, Any] | None = None,
    *,
    lora: LoRA | None = None,
) -> Plan:
    """Write a student as a pipeline's folder.

    The network's output is written with the sign that diffusers expects (folded into its last layer).

    Args:
        folder: made if needed.
        teacher: gives the pipeline and its parts other than network and scheduler.
        sampler: its denoiser's network is a wrapped network of diffusers of the teacher's class (its size may differ).
        description: plain values for ``artifact.json`` and the README (``title``, ``method`` …).
        lora: adapters of the student; the folder gets a copy with them merged.

    Returns:
        how it was expressed: the scheduler, the pipeline's call and whether it is exact, and the table of steps.

    Raises:
        InputError: a network that is no wrapped one or of another class, adapters that are not given, a sampler that cannot be exported.
        RunError: the folder cannot be written.
    """
    network = sampler.denoiser.module
    if not isinstance(network, DiffusersNetwork):
        raise InputError(
            f"only networks of diffusers are saved as pipelines, not {type(network).__name__}: save its weights instead"
        )
    if type(network.network) is not type(teacher.network.network):
        raise InputError(
            f"the student's network is a {network.name}, the teacher's pipeline has a {teacher.network.name}"
        )
    target = Path(folder)
    plan = plan_of(sampler, network, teacher.pipeline.scheduler)
    plain = _plain_network(network, lora)
    absent = _absent(teacher.pipeline)
    with explained(target), _signed(network, plain):
        target.mkdir(parents=True, exist_ok=True)
        _write(teacher.pipeline, network.component, plain, plan, target)
    said = dict(description or {})
    denoiser = sampler.denoiser
    inner = denoiser.inner if isinstance(denoiser, InSchedule) else denoiser
    record = {
        **said,
        "kind": KIND,
        "sampler": sampler.describe(),
        "denoiser": inner.describe(),
        "seen_in": {"schedule": denoiser.schedule.describe(), "prediction": denoiser.prediction}
        if isinstance(denoiser, InSchedule)
        else None,
        "shape": list(teacher.shape),
        "time_scale": network.time_scale,
        "absent": absent,
        "pipeline_call": plan.call,
        "pipeline_call_exact": plan.exact,
    }
    write_json(target / DESCRIPTION, record)
    write_text(target / "README.md", readme(teacher, sampler, plan, said, absent))
    return plan


def save_unet(folder: Path, sampler: Sampler, description: Mapping[str, Any]) -> bool:
    """Write a sampler whose network is a U-Net of diffusers that was trained here, without a pipeline around it; False where no
    table of steps can express the sampler (see :func:`limbeck.adapters.diffusers_plans.steps_of`), and nothing is written.
    """
    from diffusers import DDPMPipeline, DDPMScheduler

    network = sampler.denoiser.module
    assert isinstance(network, SmallUNet)
    spec: dict[str, Any] = network.spec
    channels, height, width = spec["shape"]
    pipeline: Any = DDPMPipeline(unet=network.network, scheduler=DDPMScheduler())
    teacher = Teacher(sampler.denoiser, pipeline, (channels, height, width), spec["num_classes"])
    try:
        plan_of(sampler, network, pipeline.scheduler)
    except InputError:
        return False
    save_student(folder, teacher, sampler, description)
    return True


def read_student(
    folder: Path, description: Mapping[str, Any], *, device: Any = None, dtype: torch.dtype | None = None
) -> Student:
    """Read what :func:`save_student` wrote; ``limbeck.load(folder).content``.

    Raises:
        RunError: files missing, damaged or of another kind.
    """
    try:
        said, kept = dict(description["denoiser"]), dict(description["sampler"])
        schedule, shape = make_schedule(**said["schedule"]), [int(n) for n in description["shape"]]
        kept.pop("nfe", None)
        times = torch.tensor(kept.pop("times"), dtype=torch.float64)
        absent = dict.fromkeys(description.get("absent", []))
        scale = float(description.get("time_scale", 1.0))
        null_class, seen = said.get("null_class"), description.get("seen_in")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RunError(
            f"{folder / DESCRIPTION} does not describe a student's sampler ({error}): it was changed or damaged"
        ) from None
    options = {"schedule": schedule, "prediction": said["prediction"]}
    teacher = load_teacher(folder, device=device, dtype=dtype, components=absent, **options)
    teacher = replace(teacher, shape=(shape[0], shape[1], shape[2]))
    null = teacher.null_cond if null_class is None else torch.tensor(int(null_class))
    network = teacher.network
    network.time_scale = scale
    denoiser = Denoiser(
        network, schedule, said["prediction"], precond=said["precond"], sigma_data=said["sigma_data"], null_cond=null
    )
    if seen is not None:
        denoiser = InSchedule(denoiser, make_schedule(**seen["schedule"]), seen["prediction"])
    denoiser.eval()
    return Student(Sampler(denoiser, times, **kept), replace(teacher, denoiser=denoiser), dict(description))


def _plain_network(network: DiffusersNetwork, lora: LoRA | None) -> Any:
    """The model of diffusers to be written, with adapters merged into a copy.

    Raises:
        InputError: adapters that nobody gave, or that are on something else.
    """
    model: Any = network.network
    if lora is None:
        owners = (getattr(hook, "__self__", None) for m in model.modules() for hook in m._forward_hooks.values())
        if any(type(owner).__module__ == LoRA.__module__ for owner in owners):
            raise InputError(
                "the student's network carries adapters, which would be lost: give them (lora=…), or merge them first"
            )
        if any(".lora_A." in name or ".base_layer." in name for name in model.state_dict()):
            raise InputError(
                "the student's network carries adapters of PEFT: merge them first (fuse_lora and unload_lora_weights)"
            )
        return model
    if not any(m is model for m in lora.base.modules()):
        raise InputError(
            f"the adapters given are on a {type(lora.base).__name__} that does not hold the student's network"
        )
    place = next(path for path, m in lora.base.named_modules() if m is model)
    merged: Any = deepcopy(lora).merge().get_submodule(place)
    return merged


@contextlib.contextmanager
def _signed(network: DiffusersNetwork, model: nn.Module) -> Iterator[None]:
    """Inside, the model's last layer carries the wrapper's sign. Negation is exact, so that afterwards all is as it was."""
    if network.sign == 1:
        yield
        return
    layer = model.get_submodule(network.last)
    parameters = list(layer.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.neg_()
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.neg_()


def _write(pipeline: Any, component: str, model: Any, plan: Plan, target: Path) -> None:
    """The pipeline's folder, with the student in the network's place."""
    if plan.pipeline is not None and type(pipeline).__name__ != plan.pipeline:
        import diffusers

        made = getattr(diffusers, plan.pipeline)(model, plan.scheduler)
        made.save_pretrained(target, safe_serialization=True)
        return
    before = {component: getattr(pipeline, component), "scheduler": pipeline.scheduler}
    try:
        pipeline.register_modules(**{component: model, "scheduler": plan.scheduler})
        pipeline.save_pretrained(target, safe_serialization=True)
    finally:
        pipeline.register_modules(**before)


def _absent(pipeline: Any) -> list[str]:
    """Parts that the pipeline lacks and that its class asks for on loading."""
    optional = set(getattr(pipeline, "_optional_components", []))
    return sorted(name for name, part in pipeline.components.items() if part is None and name not in optional)
