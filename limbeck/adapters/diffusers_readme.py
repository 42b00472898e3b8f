"""The README.md of an exported student: what it is, the pipeline's call, and the same steps in plain code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.adapters.diffusers_networks import DiffusersNetwork, UNet2D, UNet2DConditional
from limbeck.adapters.diffusers_pipelines import Teacher
from limbeck.adapters.diffusers_plans import Plan
from limbeck.adapters.diffusers_transformers import SD3, DiT, Flux, PixArt
from limbeck.diffusion.samplers import Sampler


def readme(teacher: Teacher, sampler: Sampler, plan: Plan, description: Mapping[str, Any], absent: list[str]) -> str:
    """The whole text; its ``python`` blocks run in the folder."""
    network = sampler.denoiser.module
    assert isinstance(network, DiffusersNetwork)
    title = str(description.get("title") or description.get("method") or "Distilled sampler")
    evaluations = f"{sampler.nfe} network evaluation{'s' if sampler.nfe != 1 else ''} per sample"
    lines = [
        "---",
        "library_name: diffusers",
        "tags: [distillation]",
        "---",
        f"# {title}",
        "",
        f"A student that samples in {sampler.steps} step{'s' if sampler.steps != 1 else ''} ({evaluations}), as a pipeline of diffusers.",
        "",
        *(
            f"- {key}: {value}"
            for key, value in description.items()
            if key != "title" and not isinstance(value, dict | list)
        ),
        "",
        "## With the pipeline",
        "",
    ]
    if plan.call is None:
        lines += [f"No stock pipeline samples as this student does: {plan.why}. Use the plain code below.", ""]
    else:
        lines += [_fenced(call_code(teacher, network, plan, absent)), ""]
        lines += [f"This is close, not exact: {plan.why}. The plain code below is exact.", ""] if not plan.exact else []
        if (
            network.component == "unet"
            and isinstance(network, UNet2DConditional)
            and plan.call.get("guidance_scale") == 1
        ):
            lines += [
                "Guidance is off, as in distillation: `guidance_scale` above 1 would ask the network twice and do harm.",
                "",
            ]
    lines += ["## In plain code", "", _fenced(plain_code(teacher, network, sampler, plan, absent)), ""]
    return "\n".join(lines)


def call_code(teacher: Teacher, network: DiffusersNetwork, plan: Plan, absent: list[str]) -> str:
    """The call of the stock pipeline."""
    assert plan.call is not None
    given = dict(plan.call)
    first = ""
    if isinstance(network, DiT):
        first = "[0, 1], "
    elif not isinstance(network, UNet2D):
        first = '["a photo"], '
        given.update(height=teacher.image_size[0], width=teacher.image_size[1])
        if isinstance(network, PixArt):
            given["use_resolution_binning"] = False
    arguments = ", ".join(f"{k}={v!r}" for k, v in given.items())
    return "\n".join([*_head(absent), *plan.prelude, f"images = pipe({first}{arguments}).images"])


def plain_code(teacher: Teacher, network: DiffusersNetwork, sampler: Sampler, plan: Plan, absent: list[str]) -> str:
    """The sampler as a function ``sample(noise, …)`` of plain PyTorch and the pipeline's parts."""
    argument, conditions, predict = _asking(teacher, network)
    guided = sampler.guidance != 1 and sampler.denoiser.null_cond is not None and argument
    noise = (
        "noise"
        if sampler.kind == "renoise" and sampler.noise == "initial"
        else "torch.randn(x.shape, generator=generator).to(x)"
    )
    rows = [f"    ({', '.join(_number(v) for v in vars(step).values())})," for step in plan.steps]
    channels, height, width = teacher.shape
    lines = [
        *_head(absent),
        f"network = pipe.{network.component}",
        "",
        "# One row a step: the time told to the network, the factor of its input, then",
        "# x0 = skip * x + out * network and next x = keep * x + clean * x0 + fresh * noise.",
        "steps = [",
        *rows,
        "]",
        "",
        *conditions,
        *predict,
        "",
        "@torch.no_grad()",
        f"def sample(noise, {argument}generator=None):",
        f'    """Unit noise (B, {channels}, {height}, {width}) to samples."""',
    ]
    if conditions:
        name = argument.rstrip(", ")
        lines.append(f"    cond = conditions({name})")
        if guided:
            lines.append(f"    null = {_null(teacher, network, sampler)}")
    given = ", cond" if conditions else ""
    lines += [
        f"    x = {_number(plan.start)} * noise",
        "    for time, scale, skip, out, keep, clean, fresh in steps:",
        "        times = torch.full((len(x),), time, device=x.device)",
        f"        found = predict(scale * x, times{given})",
    ]
    if guided:
        lines += [
            "        blank = predict(scale * x, times, null)",
            f"        found = blank + {_number(float(sampler.guidance))} * (found - blank)",
        ]
    lines += [
        "        x0 = skip * x + out * found",
        "        x = keep * x + clean * x0",
        "        if fresh:",
        f"            x = x + fresh * {noise}",
        "    return x",
        "",
        *_usage(teacher, network),
    ]
    return "\n".join(lines)


def _usage(teacher: Teacher, network: DiffusersNetwork) -> list[str]:
    shape = ", ".join(map(str, teacher.shape))
    if not network.parts:
        argument = ""
    else:
        argument = ", torch.tensor([0, 1])" if _classes(network) else ', ["a photo", "another"]'
    lines = [f"samples = sample(torch.randn(2, {shape}){argument})"]
    if teacher.vae is None:
        return [*lines, "images = (samples / 2 + 0.5).clamp(0, 1)  # (B, C, H, W) in [0, 1]"]
    shift = float(teacher.vae.config.get("shift_factor", None) or 0.0)
    scale = float(teacher.vae.config.get("scaling_factor", None) or 1.0)
    if teacher.vae.config.get("latents_mean", None) is not None:
        lines += [
            "mean, std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std))",
            f"latents = samples / {scale!r} * std + mean",
        ]
    else:
        lines.append(f"latents = samples / {scale!r}" + (f" + {shift!r}" if shift else ""))
    return [
        *lines,
        "with torch.no_grad():",
        "    images = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)  # (B, 3, H, W)",
    ]


def _head(absent: list[str]) -> list[str]:
    missing = "".join(f", {name}=None" for name in absent)
    return [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        'folder = "."  # the folder of this file',
        f"pipe = DiffusionPipeline.from_pretrained(folder{missing})",
    ]


def _classes(network: DiffusersNetwork) -> bool:
    return isinstance(network, DiT | UNet2D)


def _asking(teacher: Teacher, network: DiffusersNetwork) -> tuple[str, list[str], list[str]]:
    """The function's argument, the code that makes a condition of it, and the code that asks the network."""
    kept = network.channels
    height, width = teacher.image_size
    if isinstance(network, UNet2D | DiT):
        call = "x, timestep=times" if isinstance(network, DiT) else "x, times"
        if not network.parts:
            return "", [], ["def predict(x, times):", f"    return network({call}).sample[:, :{kept}]"]
        conditions = ["def conditions(labels):", '    return {"class_labels": labels}', "", ""]
        return "labels, ", conditions, _predict(f"network({call}, **cond).sample[:, :{kept}]")
    start = ["@torch.no_grad()", "def conditions(prompts):"]
    end = ["", ""]
    if isinstance(network, UNet2DConditional):
        if network.config.addition_embed_type != "text_time":
            body = [
                "    text = pipe.encode_prompt(prompts, pipe.device, 1, False)[0]",
                '    return {"encoder_hidden_states": text}',
            ]
        else:
            body = [
                "    text, _, pooled, _ = pipe.encode_prompt(prompts, device=pipe.device, do_classifier_free_guidance=False)",
                f"    sizes = torch.tensor([[{height}.0, {width}.0, 0.0, 0.0, {height}.0, {width}.0]]).to(text).repeat(len(prompts), 1)",
                '    return {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}',
            ]
        return "prompts, ", [*start, *body, *end], _predict(f"network(x, times, **cond).sample[:, :{kept}]")
    if isinstance(network, PixArt):
        sizes = ['    sizes = {"resolution": None, "aspect_ratio": None}']
        if network.sized:
            sizes = [
                f"    resolution = torch.tensor([[{height}.0, {width}.0]]).to(text).repeat(len(prompts), 1)",
                '    sizes = {"resolution": resolution, "aspect_ratio": resolution[:, :1] / resolution[:, 1:]}',
            ]
        body = [
            "    text, mask, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)",
            *sizes,
            '    return {"encoder_hidden_states": text, "encoder_attention_mask": mask, "added_cond_kwargs": sizes}',
        ]
        return "prompts, ", [*start, *body, *end], _predict(f"network(x, timestep=times, **cond).sample[:, :{kept}]")
    if isinstance(network, SD3):
        body = [
            "    text, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)",
            '    return {"encoder_hidden_states": text, "pooled_projections": pooled}',
        ]
        return "prompts, ", [*start, *body, *end], _predict(f"network(x, timestep=times, **cond).sample[:, :{kept}]")
    assert isinstance(network, Flux)
    guidance = (
        f', "guidance": torch.full((len(text),), {network.embedded_guidance!r})'
        if network.config.guidance_embeds
        else ""
    )
    body = [
        "    text, pooled, places = pipe.encode_prompt(prompts, None)",
        f'    return {{"encoder_hidden_states": text, "pooled_projections": pooled, "txt_ids": places{guidance}}}',
    ]
    predict = [
        "def predict(x, times, cond):",
        "    count, channels, height, width = x.shape",
        "    packed = pipe._pack_latents(x, count, channels, height, width)",
        "    places = pipe._prepare_latent_image_ids(count, height // 2, width // 2, x.device, x.dtype)",
        "    found = network(packed, timestep=times / 1000, img_ids=places, **cond).sample",
        "    factor = pipe.vae_scale_factor",
        "    return pipe._unpack_latents(found, height * factor, width * factor, factor)",
    ]
    return "prompts, ", [*start, *body, *end], predict


def _predict(expression: str) -> list[str]:
    return ["def predict(x, times, cond):", f"    return {expression}"]


def _null(teacher: Teacher, network: DiffusersNetwork, sampler: Sampler) -> str:
    """The null condition as an expression."""
    if _classes(network):
        return f"conditions(torch.full_like(labels, {int(sampler.denoiser.null_cond)}))"  # type: ignore[arg-type]
    empty = 'conditions([""] * len(prompts))'
    if isinstance(network, UNet2DConditional) and bool(
        teacher.pipeline.config.get("force_zeros_for_empty_prompt", False)
    ):
        return (
            '{"encoder_hidden_states": 0 * cond["encoder_hidden_states"], "added_cond_kwargs": '
            '{**cond["added_cond_kwargs"], "text_embeds": 0 * cond["added_cond_kwargs"]["text_embeds"]}}'
        )
    return empty


def _number(value: float) -> str:
    return repr(float(value)) if value != int(value) or abs(value) > 1e9 else f"{int(value)}.0"


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"
