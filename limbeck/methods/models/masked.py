"""What the methods around masked autoencoders share: teacher pre-training, masks common to both networks, fine-tuning.

Such a method is up to four stages of one run, each of which resumes: the teacher is pre-trained as a masked autoencoder
(unless it comes pre-trained), the student is distilled from it on images without labels, and is fine-tuned on those with
labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.adapters.patch_tokens import patch_decoder, patch_encoder
from limbeck.blocks.classes import class_count
from limbeck.blocks.layer_decay import decay_groups, layer_decay_groups
from limbeck.blocks.masking import TokenMask, masked_mse, patchify, standardise_patches
from limbeck.blocks.mixup import mix, soft_labels
from limbeck.blocks.patch_tokens import PatchDecoder, PatchEncoder, same_patches
from limbeck.core.batch import Batch, Losses
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised, make_optimised
from limbeck.core.seeding import preserved_random_state, seed_everything
from limbeck.core.semi import SemiSupervisedData, Unlabelled
from limbeck.core.stage import Stage
from limbeck.losses.logits import soft_cross_entropy
from limbeck.methods.models.base import ModelDistiller, make_network
from limbeck.metrics.cost import count_function_flops
from limbeck.networks.mae import build_decoder, fitting_sizes
from limbeck.tasks.base import Task

TEACHER_EPOCHS = 60.0
FINETUNE_STEPS = 500


class MaskedDistiller(ModelDistiller):
    """Base of the methods that distil masked autoencoders.

    Args:
        student: a vision transformer (see :func:`limbeck.adapters.patch_tokens.patch_encoder`). To be fine-tuned it must give
            logits: :class:`limbeck.networks.mae.MAEViT`, ``ViTForImageClassification``, a timm classifier.
        teacher: a vision transformer with the same grid of patches.
        config: hyper-parameters; or give single ones as keyword arguments.
        pretrained: True: the teacher is frozen. False: it is pre-trained in the first stage of the run.
        teacher_decoder: a ``ViTMAEDecoder`` behind the teacher, where the teacher has none of its own.

    Raises:
        InputError: no vision transformers, or grids of patches that do not match.
    """

    class Config(ModelDistiller.Config):
        epochs: float = Field(60, gt=0, description="passes over all images (labelled or not) while distilling")
        weight_decay: float = Field(0.05, ge=0, description="decoupled weight decay, not on biases, norms and tokens")
        betas: tuple[float, float] = Field((0.9, 0.95), description="decay of adamw's two running means")
        warmup: float = Field(0.1, ge=0, lt=1, description="fraction of each stage with a linearly rising rate")
        mask_ratio: float = Field(0.75, ge=0, lt=1, description="share of patches hidden from both networks")
        decoder_width: int = Field(32, ge=4, description="width of the student's decoder")
        decoder_depth: int = Field(2, ge=1, description="blocks of the student's decoder")
        decoder_heads: int = Field(4, ge=1, description="attention heads of both decoders")
        teacher_decoder_width: int = Field(32, ge=4, description="width of the teacher's decoder, if it has none yet")
        teacher_decoder_depth: int = Field(2, ge=1, description="blocks of the teacher's decoder, if it has none yet")
        normalise_pixels: bool = Field(True, description="reconstruct patches with mean 0 and variance 1")
        pixel_eps: float = Field(
            1e-2, gt=0, description="added to the variance; the published 1e-6 blows up flat patches"
        )
        teacher_epochs: float | None = Field(
            None,
            ge=0,
            description=f"passes that pre-train the teacher first; none: {TEACHER_EPOCHS:.0f} by name, 0 for your own",
        )
        finetune_steps: int | None = Field(
            None,
            ge=0,
            description=f"updates of fine-tuning on labels; none: {FINETUNE_STEPS} by name, 0 for your own modules",
        )
        finetune_lr: float = Field(5e-3, gt=0, description="peak learning rate of fine-tuning, at the head")
        finetune_weight_decay: float = Field(0.05, ge=0, description="weight decay of fine-tuning")
        finetune_batch_size: int = Field(64, ge=1, description="samples per update of fine-tuning")
        layer_decay: float = Field(
            1.0,
            gt=0,
            le=1,
            description="rate of each block over that of the one after it, in fine-tuning; published 0.75, for deep networks",
        )
        label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the labels, in fine-tuning")
        mixup: float = Field(0.0, ge=0, description="alpha of mixup in fine-tuning; 0: off")
        cutmix: float = Field(0.0, ge=0, description="alpha of CutMix in fine-tuning; 0: off")

    class Setup(ModelDistiller.Setup):
        """What a run by name builds."""

        labelled: int | None = Field(
            200, ge=1, description="so many training samples keep their labels; none: all. The rest is unlabelled"
        )
        teacher: str | None = Field(None, description="teacher network; none: one that fits the task")
        augment: bool = Field(False, description="random shifts; off, since they are large against the small patches")

    generic_name = "distillation"
    """What the stage without labels is called."""

    teacher: nn.Module
    decoder: nn.Module | None
    teacher_decoder: nn.Module | None

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        config: Config | None = None,
        *,
        pretrained: bool = True,
        teacher_decoder: nn.Module | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__(student, config, **overrides)
        if teacher is student:
            raise InputError("teacher and student are the same module: give a copy as the teacher (copy.deepcopy)")
        if not isinstance(teacher, nn.Module):
            raise InputError(f"the teacher must be an nn.Module, not {type(teacher).__name__}")
        same_patches(patch_encoder(student), patch_encoder(teacher))
        self.pretrained = pretrained
        c = self.config
        self.decoder = (
            build_decoder(self.encoder, width=c.decoder_width, depth=c.decoder_depth, heads=c.decoder_heads)
            if patch_decoder(student) is None
            else None
        )
        if pretrained:
            self.add_frozen("teacher", teacher)
            if teacher_decoder is None:
                self.teacher_decoder = None
            else:
                self.add_frozen("teacher_decoder", teacher_decoder)
            return
        self.teacher, self.teacher_decoder = teacher, teacher_decoder
        if patch_decoder(teacher) is None and teacher_decoder is None:
            self.teacher_decoder = build_decoder(
                patch_encoder(teacher),
                width=c.teacher_decoder_width,
                depth=c.teacher_decoder_depth,
                heads=c.decoder_heads,
            )

    # ---- the parts as views; made anew, so that they are right after copies and moves ------------------------------------

    @property
    def encoder(self) -> PatchEncoder:
        """The student's encoder."""
        return patch_encoder(self.student)

    @property
    def teacher_encoder(self) -> PatchEncoder:
        return patch_encoder(self.teacher)

    @property
    def student_decoder(self) -> PatchDecoder:
        found = patch_decoder(self.student if self.decoder is None else self.decoder)
        assert found is not None
        return found

    def teachers_decoder(self) -> PatchDecoder:
        """The teacher's decoder.

        Raises:
            InputError: it has none.
        """
        found = patch_decoder(self.teacher if self.teacher_decoder is None else self.teacher_decoder)
        if found is None:
            raise InputError(
                f"{self.name} needs the teacher's decoder, and {type(self.teacher).__name__} has none: give a "
                "ViTMAEForPreTraining, or teacher_decoder=… (a ViTMAEDecoder)"
            )
        return found

    # ---- losses -----------------------------------------------------------------------------------------------------------

    def draw_mask(self, images: Tensor) -> TokenMask:
        """A mask for a batch of images, for both networks, from torch's global random state."""
        return TokenMask.draw(len(images), self.encoder.patches, self.config.mask_ratio, images.device)

    def images(self, batch: Batch) -> Tensor:
        """The batch's images.

        Raises:
            InputError: they are no (B, C, H, W) tensor of the size that the networks take.
        """
        images = batch.inputs
        if isinstance(images, Mapping):
            images = images.get("pixel_values")
        if not isinstance(images, Tensor):
            raise InputError("masked pre-training needs images as one tensor (B, C, H, W)")
        self.encoder.check(images, "the student")
        return images

    def reconstruction(self, decoder: PatchDecoder, hidden: Tensor, images: Tensor, mask: TokenMask) -> Tensor:
        """Squared error of the predicted pixels over the hidden patches; a scalar."""
        target = patchify(images, self.encoder.patch)
        if self.config.normalise_pixels:
            target = standardise_patches(target, self.config.pixel_eps)
        return masked_mse(decoder.pixels(hidden), target, mask.removed)

    def pretraining_losses(self, batch: Batch) -> Losses:
        """Masked autoencoding by the teacher, before anything is distilled."""
        images = self.images(batch)
        mask = self.draw_mask(images)
        decoder = self.teachers_decoder()
        latent = self.teacher_encoder(images, mask).latent
        return Losses(pixels=self.reconstruction(decoder, decoder.hidden(latent, mask), images, mask))

    def mixed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images and soft labels (B, C) of a batch for fine-tuning, after mixup or CutMix."""
        c, labels = self.config, self.labels(batch)
        images = self.images(batch)
        classes = class_count(self.student, "fine-tuning")
        if not self.training:
            return images, soft_labels(labels, classes)
        return mix(images, labels, classes, mixup=c.mixup, cutmix=c.cutmix, smoothing=c.label_smoothing)

    def finetuning_losses(self, batch: Batch) -> Losses:
        """Cross-entropy on (mixed, smoothed) labels."""
        images, target = self.mixed(batch)
        return Losses(ce=soft_cross_entropy(self.student_logits(batch.with_inputs(images)), target))

    # ---- building by name ------------------------------------------------------------------------------------------------

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        small, big = fitting_sizes(task.in_shape)
        student = make_network(setup.student or cls.student_network(small, config), task, seed)
        given = setup.teacher is not None and ":" in setup.teacher
        teacher = make_network(setup.teacher or f"maevit-{big}", task, mix_seed(seed, 51))
        config = config.replace(
            teacher_epochs=(0 if given else TEACHER_EPOCHS) if config.teacher_epochs is None else config.teacher_epochs,
            finetune_steps=FINETUNE_STEPS if config.finetune_steps is None else config.finetune_steps,
        )
        with preserved_random_state():
            seed_everything(mix_seed(seed, 53))  # decoders, projections
            return cls(student, teacher, config, pretrained=config.teacher_epochs == 0)

    @classmethod
    def student_network(cls, sizes: str, config: Any) -> str:
        """The name of the student's network with sizes such as ``d24-l4-h4-p2``."""
        return f"maevit-{sizes}"

    @classmethod
    def from_modules(cls, student: Any, teacher: Any, config: Any, *, sample: Batch) -> Self:
        cls.require(student=student, teacher=teacher)
        return cls(student, teacher, config, pretrained=not config.teacher_epochs)

    # ---- stages ------------------------------------------------------------------------------------------------------------

    def stages(self, train: Data, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """``teacher-pretraining`` (where asked for), ``distillation``, and ``finetuning`` (where asked for).

        Raises:
            InputError: fine-tuning is asked for and the data has no labels.
        """
        everything = train.everything() if isinstance(train, SemiSupervisedData) else Unlabelled(train)
        found = []
        if not self.pretrained:
            found.append(self._pretraining(everything, seed))
        watched: dict[str, Any] = (
            {} if val is None or not self.config.evaluations else {"evaluate": lambda: self.distillation_metrics(val)}
        )
        found.append(self.stage(self.generic_name, everything, val, seed=mix_seed(seed, 61), **watched))
        if self.config.finetune_steps:
            found += self.finetuning_stages(train, val, seed)
        return found

    def finetuning_stages(self, train: Data, val: Data | None, seed: int) -> list[Stage]:
        """The stages on labelled images."""
        return [self.labelled_stage("finetuning", self.student, self.finetuning_losses, train, val, seed)]

    def optimisers(self, steps: int) -> Mapping[str, Optimised]:
        """Distillation: everything of the student's, the teacher left out."""
        theirs = {id(p) for module in (self.teacher, self.teacher_decoder) if module for p in module.parameters()}
        ours = [p for p in self.parameters() if id(p) not in theirs]
        return {"main": make_optimised(decay_groups(ours, self.config.weight_decay), self.config, steps)}

    def _pretraining(self, everything: Data, seed: int) -> Stage:
        recipe = self.config.replace(steps=None, epochs=self.config.teacher_epochs or TEACHER_EPOCHS)
        parts = nn.ModuleList([m for m in (self.teacher, self.teacher_decoder) if m is not None])
        stage = self.stage(
            "teacher-pretraining",
            everything,
            None,
            seed=mix_seed(seed, 63),
            recipe=recipe,
            losses=self.pretraining_losses,
        )
        steps = stage.steps
        return replace(
            stage,
            optimisers=lambda: {
                "teacher": make_optimised(decay_groups(parts.parameters(), recipe.weight_decay), recipe, steps)
            },
        )

    def labelled_stage(
        self, name: str, model: nn.Module, losses: Any, train: Data, val: Data | None, seed: int
    ) -> Stage:
        """Fine-tuning of ``model`` (the student, or a teacher) on the labelled part of the data, with layer-wise rates.

        Raises:
            InputError: the data has no labels.
        """
        c = self.config
        if train.fetch(torch.arange(1), None).labels is None:
            raise InputError(
                f"finetune_steps={c.finetune_steps} train on labels, and the data has none: give labels or finetune_steps=0"
            )
        recipe = c.replace(
            steps=c.finetune_steps, batch_size=c.finetune_batch_size, lr=c.finetune_lr, betas=(0.9, 0.999)
        )
        labelled = train.labelled if isinstance(train, SemiSupervisedData) else train

        def optimisers() -> Mapping[str, Optimised]:
            encoder = patch_encoder(model)
            theirs = {id(p) for p in encoder.parameters()}
            rest = [p for p in model.parameters() if id(p) not in theirs]
            groups = layer_decay_groups(
                encoder, rest, lr=c.finetune_lr, decay=c.layer_decay, weight_decay=c.finetune_weight_decay
            )
            return {"finetuning": make_optimised(groups, recipe, recipe.steps)}

        return self.stage(
            name, labelled, val, seed=mix_seed(seed, 65), recipe=recipe, losses=losses, optimisers=optimisers
        )

    @torch.no_grad()
    def distillation_metrics(self, data: Data) -> dict[str, float]:
        """Means of the distillation's loss terms over a data set, with masks from a fixed seed."""
        sums: dict[str, float] = {}
        device = next(self.student.parameters()).device
        with preserved_random_state():
            seed_everything(7)
            for batch in data.batches(256):
                losses = self.losses(batch.to(device))
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * len(batch)
        return {name: total / len(data) for name, total in sums.items()}

    # ---- checks, cost ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check_outputs(self, batch: Batch) -> None:
        self.images(batch)
        if self.config.finetune_steps:
            self.labels(batch)
            super().check_outputs(batch)

    def teacher_pass(self, images: Tensor) -> Any:
        """What a distillation step asks of the teacher for (B, C, H, W) images."""
        raise NotImplementedError

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """The classifier's measures where it was fine-tuned, and the cost of the teacher's part in a distillation step."""
        result: dict[str, Any] = super().evaluate(test, class_names) if self.config.finetune_steps else {}
        device = next(self.student.parameters()).device
        images = self.images(test.fetch(torch.arange(min(8, len(test))), None).to(device))
        return {**result, **self.teacher_cost(images)}

    def teacher_cost(self, images: Tensor) -> dict[str, float]:
        """FLOPs per image of the teacher's part in a distillation step, of a pass of the whole image through all its blocks, and
        their ratio.
        """
        counters = self.counters.copy()
        flops = count_function_flops(self.teacher, self.teacher_pass, images)
        self.counters = counters
        whole = count_function_flops(self.teacher, lambda x: self.teacher_encoder(x).latent, images)
        return {"teacher_flops": flops, "teacher_flops_whole": whole, "teacher_flops_ratio": flops / whole}
